"""Every exception factpatch raises on purpose, in one tree.

    FactpatchError
    ├── DataError              what was read is not what was promised
    │   ├── BadRecord          one record: file, number, field, what was expected
    │   └── BadFile            a whole file: unreadable, not JSON, of an unknown form
    ├── ModelError             the model itself
    │   ├── UnknownModel       no such short name, folder, file or hub id
    │   ├── UnknownDevice      no such place to run it
    │   ├── FetchError         a download that failed or arrived damaged
    │   ├── RemoteError        an endpoint that cannot be reached, or does not answer as it should
    │   ├── AnatomyError       a part of the network that could not be found
    │   └── TokenizerError     a tokenizer that cannot do what editing needs
    ├── MethodError            the editing method
    │   ├── MissingExtra       a library it needs is not installed
    │   ├── BadEditor          a folder that is not a trained editor, or is damaged
    │   ├── UnknownMethod      no such name
    │   ├── BadConfig          an unknown option, or a value out of bounds
    │   ├── CannotEdit         an edit this method cannot make, by its nature or on this model
    │   └── SingularMoment     a second moment that cannot be inverted
    ├── PatchError             the patch
    │   ├── WrongBase          made for another model
    │   └── BadPatch           a folder that is not a patch, or is damaged
    └── OutputError            a place that cannot be written

Each message says what was found, where, what was expected and what to do next. The command line prints it on
stderr and exits with code 2; nothing else is printed, and nothing half-written is left behind.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AnatomyError",
    "BadConfig",
    "BadEditor",
    "BadFile",
    "BadPatch",
    "BadRecord",
    "CannotEdit",
    "DataError",
    "FactpatchError",
    "FetchError",
    "MethodError",
    "MissingExtra",
    "ModelError",
    "OutputError",
    "PatchError",
    "RemoteError",
    "SingularMoment",
    "TokenizerError",
    "UnknownDevice",
    "UnknownMethod",
    "UnknownModel",
    "WrongBase",
    "did_you_mean",
]


class FactpatchError(Exception):
    """Base of all errors a user can cause or mend."""

    def __init__(self, message: str) -> None:
        # A message may quote a broken file, and must still be fit for every terminal and log.
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


class DataError(FactpatchError):
    """What was read is not what was promised."""


class BadRecord(DataError):
    """One record cannot be read as an edit.

    `source` is the file, `record` its number counted from 0, `field` the field at fault.
    """

    def __init__(self, source: str, record: int | None, field: str, problem: str, hint: str = "") -> None:
        self.source, self.record, self.field, self.problem = source, record, field, problem
        where = source if record is None else f"{source}, record {record}"
        super().__init__(f'{where}, "{field}": {problem}' + (f"\n  {hint}" if hint else ""))


class BadFile(DataError):
    """A whole file cannot be read."""


class ModelError(FactpatchError):
    """Something about the model."""


class UnknownModel(ModelError):
    """Neither a short name, a folder, a GGUF file nor a reachable hub id."""


class UnknownDevice(ModelError):
    """The device named is not on this machine."""


class FetchError(ModelError):
    """A download failed or arrived damaged."""


class RemoteError(ModelError):
    """An endpoint that cannot be reached, refuses, or does not answer as it should."""


class AnatomyError(ModelError):
    """A part of the network could not be found."""


class TokenizerError(ModelError):
    """The tokenizer lacks something editing needs."""


class MethodError(FactpatchError):
    """Something about the editing method."""


class MissingExtra(MethodError):
    """A method needs a library that is not installed."""


class UnknownMethod(MethodError):
    """No method of that name is registered."""


class BadConfig(MethodError):
    """A setting is unknown or out of bounds."""


class CannotEdit(MethodError):
    """The method cannot make this edit."""


class SingularMoment(MethodError):
    """A second moment is not positive definite."""


class PatchError(FactpatchError):
    """Something about the patch."""


class WrongBase(PatchError):
    """The patch was made for another model."""


class BadPatch(PatchError):
    """The folder holds no patch, or a damaged one."""


class BadEditor(MethodError):
    """The folder holds no trained editor, a damaged one, or one for another method."""


class OutputError(FactpatchError):
    """A place that cannot be written."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""
