"""Trained editors on disk: `editor.json` beside `editor.safetensors`; while one is being trained, `training.safetensors`.

`editor.json` says what it was trained for and on, how its loss on held-out edits went, and the SHA-256 of its tensors.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from factpatch.edits import first_problem
from factpatch.errors import BadEditor, WrongBase
from factpatch.files import make_folder, sha256_of, whole_file
from factpatch.lm import LM
from factpatch.lm.cache import save_tensors

__all__ = ["Editor", "Record", "Training", "is_editor"]

_AGAIN = "Copy the whole folder again from where it was made, or train the editor again: factpatch train"
_FORMAT = 1
_EDITOR, _TENSORS, _TRAINING = "editor.json", "editor.safetensors", "training.safetensors"


class Record(BaseModel):
    """Where an editor comes from.

    method            whose editor it is
    config            the settings of its training
    base_name         what the model was called; for people
    base_fingerprint  the model it was trained for
    source            where the edits came from; for people
    edits             how many there were
    edits_sha256      of all that they said
    steps             that were made
    curve             the looks at held-out edits, one for each check: step, loss, and what that is made of
    versions          of the packages that decide the numbers
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = _FORMAT
    method: str
    config: dict[str, Any]
    base_name: str
    base_fingerprint: str
    source: str
    edits: int
    edits_sha256: str
    steps: int
    curve: tuple[dict[str, float], ...]
    versions: dict[str, str]
    tensors_sha256: str = ""


@dataclass(frozen=True, eq=False)
class Editor:
    """A trained editor: its network's tensors, and where it comes from."""

    about: Record
    tensors: Mapping[str, Tensor]
    folder: Path | None = None

    @cached_property
    def id(self) -> str:
        """The first letters of its tensors' SHA-256; empty for one that was not saved."""
        return self.about.tensors_sha256[:16]

    @property
    def best(self) -> Mapping[str, float]:
        """The look at held-out edits that the editor is from: the one of the lowest loss."""
        return min(self.about.curve, key=lambda look: look["loss"])

    def check(self, method: str, lm: LM) -> None:
        """Raise BadEditor if it is another method's, WrongBase if it is for another model."""
        if self.about.method != method:
            raise BadEditor(
                f"{self.folder}: an editor of {self.about.method}, not of {method}.\n"
                f"  Use it with --method {self.about.method}, or train one: factpatch train {method}"
            )
        if self.about.base_fingerprint != lm.fingerprint:
            raise WrongBase(
                f"{self.folder}: trained for {self.about.base_name} ({self.about.base_fingerprint[:8]}…); the model in "
                f"hand is {lm.name} ({lm.fingerprint[:8]}…).\n"
                f"  Train one for this model: factpatch train {method} --model {lm.name}"
            )

    @classmethod
    def load(cls, folder: str | Path) -> Editor:
        """Read a saved editor. Raises BadEditor naming what is wrong with the folder."""
        path = Path(folder)
        head = path / _EDITOR
        if not is_editor(path):
            unfinished = (path / _TRAINING).is_file()
            what = "its training has not ended" if unfinished else f"not an editor; expected a folder with {_EDITOR}"
            then = "Run the same factpatch train again; it goes on." if unfinished else "Make one: factpatch train"
            raise BadEditor(f"{path}: {what}.\n  {then}")
        try:
            about = Record.model_validate_json(head.read_text(encoding="utf-8"))
            damaged = sha256_of(path / _TENSORS) != about.tensors_sha256 or about.format != _FORMAT
            tensors = {} if damaged else load_file(path / _TENSORS)
        except ValidationError as error:
            field, problem = first_problem(error)
            raise BadEditor(f'{head}, "{field}": {problem}\n  {_AGAIN}') from None
        except (OSError, UnicodeDecodeError, safetensors.SafetensorError) as error:
            raise BadEditor(f"{path}: cannot be read ({error}).\n  {_AGAIN}") from None
        if damaged:
            raise BadEditor(f"{path / _TENSORS}: damaged, or of another version of factpatch.\n  {_AGAIN}")
        return cls(about, tensors, path)


def is_editor(folder: Path) -> bool:
    """Whether a finished editor is there."""
    return (folder / _EDITOR).is_file()


@dataclass(frozen=True, eq=False)
class Training:
    """A training's place on disk. Two trainings are the same if all but their number of steps is."""

    about: Mapping[str, Any]

    @classmethod
    def of(cls, lm: LM, about: Mapping[str, Any]) -> Training:
        """A training for this model's base."""
        versions = {"python": platform.python_version()}
        versions |= {package: version(package) for package in ("factpatch", "torch", "transformers")}
        return cls({**about, "base_name": lm.name, "base_fingerprint": lm.fingerprint, "versions": versions})

    def resume(self, folder: Path | None) -> tuple[dict[str, Tensor], int, list[dict[str, float]]] | None:
        """The tensors, step and curve that were kept last; None if nothing was.

        Raises BadEditor if the folder holds a finished editor, another training, or something unreadable.
        """
        if folder is None:
            return None
        if is_editor(folder):
            raise BadEditor(f"{folder}: holds a trained editor already.\n  Name another folder, or remove this one.")
        path = make_folder(folder) / _TRAINING
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                kept = json.loads(file.metadata()["training"])
            tensors = load_file(path)
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise BadEditor(f"{path}: damaged.\n  Remove it to start the training anew.") from None
        different = [key for key in _identity(self.about) if _identity(self.about)[key] != kept["about"].get(key)]
        if different:
            was, now = kept["about"].get(different[0]), _identity(self.about)[different[0]]
            raise BadEditor(
                f"{folder}: holds a training with another {different[0]} ({was}; now {now}).\n"
                "  Give the same settings to go on with it, or name another folder."
            )
        return tensors, int(kept["step"]), kept["curve"]

    def keep(
        self, folder: Path | None, tensors: Mapping[str, Tensor], step: int, curve: list[dict[str, float]]
    ) -> None:
        """Write down where the training stands, whole or not at all."""
        if folder is None:
            return
        described = json.dumps({"about": _identity(self.about), "step": step, "curve": curve})
        with whole_file(folder / _TRAINING) as draft:
            save_tensors(tensors, draft, {"training": described})

    def finish(
        self, folder: Path | None, tensors: Mapping[str, Tensor], steps: int, curve: list[dict[str, float]]
    ) -> Editor:
        """The editor, saved if there is a folder."""
        about = Record(**self.about, steps=steps, curve=tuple(curve))
        if folder is None:
            return Editor(about, tensors)
        with whole_file(folder / _TENSORS) as draft:
            save_tensors(tensors, draft)
        about = about.model_copy(update={"tensors_sha256": sha256_of(folder / _TENSORS)})
        # Last, because an editor is finished when it is there.
        with whole_file(folder / _EDITOR) as draft:
            draft.write_text(about.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / _TRAINING).unlink(missing_ok=True)
        return Editor(about, tensors, folder)


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a training to go on: each setting, the edits, and the model."""
    longer = {"steps", "patience"}
    settings = {key: value for key, value in about["config"].items() if key not in longer}
    return {
        "method": about["method"],
        **settings,
        "edits_sha256": about["edits_sha256"],
        "base_fingerprint": about["base_fingerprint"],
    }
