"""Edits to work on: KnowEdit's six files, CounterFact, zsRE, one's own file, and a built-in sample.

    read("zsre:KnowEdit/ZsRE/ZsRE-test-all.json")     a benchmark file, by its reader's name
    read("facts.csv")                                 one's own, ending in .jsonl, .json or .csv
    read("sample")                                    what is built in

A reader is a function and one line in the table here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import overload

from factpatch.data import counterfact, knowedit, own
from factpatch.data.own import write_jsonl
from factpatch.data.records import Reader, Record, Source
from factpatch.edits import Edit
from factpatch.errors import BadFile, BadRecord, did_you_mean

__all__ = ["Dataset", "Reader", "Record", "ShownRecord", "Source", "read", "readers", "show", "write_jsonl"]

_log = logging.getLogger("factpatch")

_SAMPLE = Path(str(files("factpatch.data") / "sample.jsonl"))

_READERS = {
    reader.name: reader
    for reader in (
        Reader("sample", "built in: a small set of all kinds of edit, with probes", own.own, _SAMPLE),
        Reader("own", "your own edits: JSON lines, a JSON list or a CSV table", own.own),
        Reader("wiki_recent", "KnowEdit, WikiData recent: new facts to insert", knowedit.wiki_recent),
        Reader("zsre", "KnowEdit, ZsRE: answers to change, with rephrases", knowedit.zsre),
        Reader("wiki_counterfact", "KnowEdit, WikiData counterfact: facts to falsify", knowedit.wiki_counterfact),
        Reader("wikibio", "KnowEdit, WikiBio: biographies with invented sentences to correct", knowedit.wikibio),
        Reader("convsent", "KnowEdit, ConvSent: opinions to restyle", knowedit.convsent),
        Reader(
            "sanitation", "KnowEdit, Sanitation: answers to erase", knowedit.sanitation, beside=knowedit.sanitation_test
        ),
        Reader("counterfact", "CounterFact as released with ROME", counterfact.counterfact),
        Reader("mend_zsre", "zsRE as released with MEND", counterfact.mend_zsre),
    )
}


@dataclass(frozen=True)
class Dataset(Sequence[Edit]):
    """The edits of one file, in its order.

    name     of the reader
    path     the file
    edits    what could be read
    skipped  what could not, if that was asked for
    sha256   of the file's bytes, in hex
    start    the number of the first record that was read
    """

    name: str
    path: Path
    edits: tuple[Edit, ...]
    skipped: tuple[BadRecord, ...]
    sha256: str
    start: int = 0

    def __len__(self) -> int:
        return len(self.edits)

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Edit, ...]: ...
    def __getitem__(self, index: int | slice) -> Edit | tuple[Edit, ...]:
        return self.edits[index]


@dataclass(frozen=True)
class ShownRecord:
    """One record as the file has it, and what became of it: an edit, or the problem with it."""

    path: Path
    number: int
    raw: object
    edit: Edit | None
    problem: BadRecord | None


def readers() -> Mapping[str, Reader]:
    """All readers by name; `Reader.description` is one line on each."""
    return MappingProxyType(_READERS)


def read(spec: str | Path, *, skip_invalid: bool = False, start: int = 0, limit: int | None = None) -> Dataset:
    """The edits of a file: `NAME:PATH`, the path of one's own file, or the name of what is built in.

    Records are read from number `start` on, which counts from 0, and of `limit` only so many. With `skip_invalid`, a
    record that cannot be read is logged as a warning and kept in `Dataset.skipped`.

    Raises BadFile, and BadRecord unless `skip_invalid`.
    """
    reader, source = _open(spec)
    edits: dict[str, Edit] = {}
    skipped = []
    for record in islice(reader.records(source), start, None if limit is None else start + limit):
        try:
            edit = _new_edit(source, record, edits)
        except BadRecord as problem:
            if not skip_invalid:
                raise
            _log.warning("skipped: %s", problem)
            skipped.append(problem)
        else:
            edits[edit.id] = edit
    return Dataset(reader.name, source.path, tuple(edits.values()), tuple(skipped), source.sha256, start)


def show(spec: str | Path, number: int) -> ShownRecord:
    """One record, counted from 0, raw and read. Raises BadFile, or BadRecord if there is no such number."""
    reader, source = _open(spec)
    records = list(reader.records(source))
    if not 0 <= number < len(records):
        there = f"there are {len(records)}, counted from 0" if records else "the file holds none"
        raise BadRecord(str(source.path), number, "record", f"no record of this number; {there}")
    record = records[number]
    try:
        return ShownRecord(source.path, number, record.raw, source.edit(record), None)
    except BadRecord as problem:
        return ShownRecord(source.path, number, record.raw, None, problem)


def _new_edit(source: Source, record: Record, taken: Iterable[str]) -> Edit:
    edit = source.edit(record)
    if edit.id in taken:
        raise source.bad_record(record.number, "id", f'"{edit.id}" is the id of an earlier record; ids must differ')
    return edit


def _open(spec: str | Path) -> tuple[Reader, Source]:
    reader, path = _locate(spec)
    return reader, Source.open(reader, path)


def _locate(spec: str | Path) -> tuple[Reader, Path]:
    name, colon, rest = str(spec).partition(":")
    reader = _READERS.get(name.strip().lower().replace("-", "_"))
    whole = _at_home(str(spec))
    is_own = whole.suffix.lower() in own.SUFFIXES and reader is None and (not colon or os.path.isfile(whole))  # noqa: PTH113
    if isinstance(spec, Path) or is_own:
        return _READERS["own"], whole
    if reader is None:
        raise BadFile(
            f'no reader "{name}".{did_you_mean(name, _READERS)}\n'
            f"  Expected NAME:PATH, or your own file ending in {', '.join(own.SUFFIXES)}.\n"
            f"  All readers: {', '.join(_READERS)}  (factpatch data)"
        )
    if reader.path is not None and rest:
        raise BadFile(f'"{spec}": {reader.name} is built in and takes no path.\n  Write {reader.name} alone.')
    if reader.path is None and not rest:
        raise BadFile(f'"{spec}": expected a file to read.\n  Write {reader.name}:PATH')
    return reader, reader.path or _at_home(rest)


def _at_home(path: str) -> Path:
    """The path with a leading ~ replaced, which a shell leaves alone behind `NAME:`."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for a user it does not know
