"""What every reader shares: the file in hand, the records in it, and the words for what is wrong with them.

A reader is a function from a `Source` to `Record`s. It checks what it finds with small pydantic forms; what a form
objects to becomes a `BadRecord` in `Source.edit`, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from factpatch.edits import Edit, brief, first_problem
from factpatch.errors import BadFile, BadRecord, did_you_mean
from factpatch.files import parse_json, read_whole

__all__ = ["AtLeastOne", "Form", "OneOrMany", "Reader", "Record", "Source", "only_within"]


class Record(NamedTuple):
    """One record as the file has it, and how to make an edit of it.

    number  counted from 0 in the file, bad records included
    raw     the decoded JSON value, or the row of a CSV file by column
    build   gives the edit; raises pydantic's ValidationError or BadRecord
    """

    number: int
    raw: object
    build: Callable[[], Edit]


@dataclass(frozen=True)
class Reader:
    """A form of file by its name.

    description  one line on it
    records      the function that reads it
    path         where it lies, if built in
    beside       the name of a file that belongs to one of the given name and is read too if it lies beside it; "" for none
    """

    name: str
    description: str
    records: Callable[[Source], Iterable[Record]]
    path: Path | None = None
    beside: Callable[[str], str] = lambda _: ""


@dataclass(frozen=True)
class Source:
    """A file in hand: read once, so that its hash and its records are of the same bytes.

    `spec` is how a user would name it again: `NAME:PATH`, or the name of what is built in. `beside` is the file that belongs
    to it, if there is one.
    """

    name: str
    path: Path
    spec: str
    data: bytes
    beside: Source | None = None

    @classmethod
    def open(cls, reader: Reader, path: Path) -> Source:
        """Read the file. Raises BadFile."""
        spec = reader.name if reader.path else f"{reader.name}:{path}"
        name = reader.beside(path.name)
        beside = path.with_name(name) if name else path
        try:
            other = cls.open(reader, beside) if beside != path and beside.is_file() else None
            return cls(reader.name, path, spec, read_whole(path), other)
        except FileNotFoundError:
            near = did_you_mean(path.name, (other.name for other in path.parent.glob("*")))
            raise BadFile(f"{path}: no such file.{near}\n  Expected a file that reader {reader.name} reads.") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadFile(f"{path}: cannot be read ({reason}).\n  Name a file that you may read.") from None

    @property
    def sha256(self) -> str:
        """Of the file's bytes, in hex; and of those of the file beside it."""
        return hashlib.sha256(self.data + (self.beside.data if self.beside else b"")).hexdigest()

    @cached_property
    def text(self) -> str:
        """The file as UTF-8, with or without a byte order mark. Raises BadFile."""
        try:
            return self.data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = self.data.count(b"\n", 0, error.start) + 1
            raise BadFile(f"{self.path}, line {line}: not UTF-8 text.\n  Save it as UTF-8 and try again.") from None

    def json(self) -> Any:
        """The file as one JSON value. Raises BadFile naming line and column."""
        try:
            return parse_json(self.text)
        except ValueError as error:
            raise BadFile(
                f"{self.path}{_why_not_json(error)}\n  Is it all there? Fetch it again, or mend it at that place."
            ) from None

    def raws(self) -> list[object]:
        """The file as a list of JSON values. Raises BadFile."""
        value = self.json()
        if not isinstance(value, list):
            raise self.bad_file(f"expected a list of records, found {brief(value)}")
        return value

    def each(self, build: Callable[[object, str], Edit]) -> Iterator[Record]:
        """The records of a list that become one edit each: `build` takes the raw record and the edit's id."""
        for number, raw in enumerate(self.raws()):
            yield Record(number, raw, partial(build, raw, self.id(number)))

    def id(self, number: int) -> str:
        """The id of the edit that a record becomes."""
        return f"{self.name}-{number}"

    def edit(self, record: Record) -> Edit:
        """What a record becomes. Raises BadRecord."""
        try:
            return record.build()
        except ValidationError as error:
            raise self.bad_record(record.number, *first_problem(error, of_edit=True)) from None

    def bad_file(self, problem: str) -> BadFile:
        """The error for a file of another form than this reader's."""
        return BadFile(
            f"{self.path}: {problem}.\n"
            f"  It was read as {self.name}. If it is of another form, name that reader; all of them: factpatch data"
        )

    def bad_record(self, number: int, field: str, problem: str) -> BadRecord:
        """The error for one record, with the command that shows it."""
        hint = f"See how a record is read: factpatch data show {shlex.quote(self.spec)} --record {number}"
        return BadRecord(str(self.path), number, field, problem, hint)


class Form(BaseModel):
    """The fields of a raw record that are read; others are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


def _flat(value: object) -> tuple[str, ...]:
    groups: list[Any] = value if isinstance(value, list) else [value]
    texts = [text for group in groups for text in (group if isinstance(group, list) else [group])]
    for text in texts:
        if not isinstance(text, str):
            problem = f"expected a text, a list of texts or a list of lists of texts, found {brief(text)}"
            raise ValueError(problem)  # noqa: TRY004 - of which pydantic makes a ValidationError
    return tuple(text for text in texts if text.strip())


def _not_none(texts: tuple[str, ...]) -> tuple[str, ...]:
    if not texts:
        raise ValueError("expected at least one text that is not empty, found none")
    return texts


OneOrMany = Annotated[tuple[str, ...], BeforeValidator(_flat)]
"""A text, a list of texts or a list of alias lists, as the benchmarks write answers: made flat, in order.

Empty texts and empty groups fall away, so that nothing may be left. An `Edit` trims what remains.
"""

AtLeastOne = Annotated[OneOrMany, AfterValidator(_not_none)]


def only_within(prompt: str, subject: str | None) -> str | None:
    """The subject if the prompt has it letter for letter, else None.

    A few published records name a subject that their prompt spells differently. They are kept, without a subject;
    a method that has to find the subject in the prompt refuses such an edit by name.
    """
    subject = (subject or "").strip()
    return subject if subject and subject in prompt else None


def _why_not_json(error: Exception) -> str:
    """Where and why a text is not JSON, to be put behind the name of the file."""
    if isinstance(error, json.JSONDecodeError):
        return f", line {error.lineno}, column {error.colno}: expected JSON ({error.msg})."
    return f": expected JSON ({error})."
