"""`Grid`: which methods on which data, as a command line or a YAML file says it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from factpatch.bench.outcome import Mode
from factpatch.data import Dataset, read
from factpatch.edits import brief, first_problem
from factpatch.errors import BadConfig, BadFile
from factpatch.methods import create
from factpatch.scoring import ProtocolName

__all__ = ["DataSpec", "Grid", "MethodSpec"]


def _named(value: Any) -> Any:
    """A method's name alone stands for it with its own settings."""
    return {"name": value} if isinstance(value, str) else value


def _filed(value: Any) -> Any:
    """A file alone stands for it with the grid's range of records."""
    return {"file": value} if isinstance(value, str) else value


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MethodSpec(_Value):
    """A method by name, and the settings given to it."""

    name: str
    settings: dict[str, Any] = {}


class DataSpec(_Value):
    """A file as `NAME:PATH`, or the path of one's own; and which of its records, if not those that the grid says."""

    file: str
    start: NonNegativeInt | None = None
    limit: PositiveInt | None = None


class Grid(_Value):
    """Every method on every data set.

    model, base_url, dtype, device  as for the other commands
    methods      names, or names with settings
    data         `NAME:PATH`, or the path of a file of one's own; or either as `file`, with a start and limit of its own
    start, limit which records: from this number on, so many of each file
    mode         single, batch:K or sequential
    at           of a sequence, after how many patches to score all of them; always after the last
    seed         of the methods, where their settings do not say otherwise, and of sampled text
    chat         put prompts into the chat template
    protocols    under which to score; by default all that the model allows
    fluency      whether to measure it; it takes about as long as all the rest
    retain       a file of questions that should be answered as before, asked under every patch
    judge        a model behind an OpenAI-compatible endpoint that says which free answers are right, and its address
    """

    model: str = "smollm2-135m"
    base_url: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    methods: tuple[Annotated[MethodSpec, BeforeValidator(_named)], ...] = Field(min_length=1)
    data: tuple[Annotated[DataSpec, BeforeValidator(_filed)], ...] = Field(min_length=1)
    start: NonNegativeInt = 0
    limit: PositiveInt | None = None
    mode: str = "single"
    at: tuple[PositiveInt, ...] = (1, 10, 30, 100, 300, 1000)
    seed: int = 0
    chat: bool = False
    protocols: tuple[ProtocolName, ...] | None = None
    fluency: bool = True
    retain: Path | None = None
    judge: str | None = None
    judge_url: str | None = None

    @classmethod
    def make(cls, values: object, source: str = "the grid") -> Self:
        """A grid of these values, checked. Raises BadConfig naming the source and the field, UnknownMethod."""
        if not isinstance(values, dict):
            raise BadConfig(f"{source}: expected fields such as methods and data, found {brief(values)}.")
        try:
            grid = cls.model_validate(values)
        except ValidationError as error:
            field, problem = first_problem(error)
            raise BadConfig(f"{source}, {field}: {problem}.\n  Its fields: {', '.join(cls.model_fields)}") from None
        Mode.parse(grid.mode)
        for spec in grid.methods:
            create(spec.name, spec.settings)
        return grid

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a YAML file. Raises BadFile, BadConfig, UnknownMethod."""
        return cls.make(read_yaml(path), str(path))

    def read_data(self, *, skip_invalid: bool = False) -> tuple[Dataset, ...]:
        """The edits of each file. Raises what `factpatch.data.read` raises, BadFile for a range without any, BadConfig for a
        file that is given twice.
        """
        found = []
        for spec in self.data:
            start, limit = (self.start if spec.start is None else spec.start), spec.limit or self.limit
            found.append(read(spec.file, start=start, limit=limit, skip_invalid=skip_invalid))
            if not found[-1].edits:
                raise BadFile(
                    f"{spec.file}: holds no edit from number {start} on.\n  See how a record is read: factpatch data show"
                )
            if any((one.name, one.sha256) == (found[-1].name, found[-1].sha256) for one in found[:-1]):
                raise BadConfig(
                    f"{spec.file}: given twice.\n  Give it once; another range is a run of its own, which may share the --out."
                )
        return tuple(found)


def read_yaml(path: Path) -> object:
    """What a YAML file says. Raises BadFile."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file.\n  Expected a grid as YAML; see: factpatch bench --help") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadFile(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}).") from None
