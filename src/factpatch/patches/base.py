"""What every patch can do, whatever it is made of."""

from __future__ import annotations

import hashlib
import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from factpatch.edits import Edit
from factpatch.errors import WrongBase
from factpatch.lm import BaseLM
from factpatch.lm.model import raw_bytes

__all__ = ["Patch", "Provenance"]


class Provenance(BaseModel):
    """Where a patch comes from: enough to make it again.

    method            the method's registered name
    config            its full settings, defaults and presets included
    edits             what it was asked to change
    base_name         what the model was called; for people
    base_fingerprint  the model it was made for; see `lm.fingerprint`
    fitted_on         ids of the patches that lay on the model while it was made, first to last
    notes             what the method has to tell of each edit, such as its last loss
    versions          of the packages that decide the numbers
    scorecard         how well it did, if it was scored
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    config: dict[str, Any]
    edits: tuple[Edit, ...]
    base_name: str
    base_fingerprint: str
    fitted_on: tuple[str, ...] = ()
    notes: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str]
    scorecard: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        lm: BaseLM,
        method: str,
        config: Mapping[str, Any],
        edits: tuple[Edit, ...],
        notes: tuple[dict[str, Any], ...] = (),
    ) -> Self:
        """The provenance of a patch made just now on `lm`."""
        return cls(
            method=method,
            config=dict(config),
            edits=edits,
            base_name=lm.name,
            base_fingerprint=lm.fingerprint,
            fitted_on=tuple(patch.id for patch in lm.patches if isinstance(patch, Patch)),
            notes=notes,
            versions={"python": platform.python_version()}
            | {p: version(p) for p in ("factpatch", "torch", "transformers")},
        )


@dataclass(frozen=True, eq=False)
class Patch(ABC):
    """A change of what a model says, as a value: apply, remove, save, load, stack, merge, throw away.

    `with lm.patched(patch): ...` lays it on and takes it off again, exactly.

    needs_weights  it can only lie on a model whose weights are in hand, not on one behind an endpoint
    mergeable      all that it changes are weights, so that a plain checkpoint can hold it
    whole          how names of tensors of whole numbers end, after the last dot; all others hold fractions, in float32
    exact          how names of tensors begin that may hold fractions in float64; None if there are none
    """

    kind: ClassVar[str]
    tensor_file: ClassVar[str] = "patch.safetensors"
    needs_weights: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    whole: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[str | None] = None
    provenance: Provenance

    @abstractmethod
    def attach(self, lm: Any) -> Callable[[], None]:
        """Change `lm` and return what undoes exactly that; on an error, change nothing.

        Raises WrongBase if the patch was made for another model.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All its numbers by name, as they are saved."""

    def spec(self) -> dict[str, Any]:
        """All else that it is made of, such as texts and places; JSON-ready."""
        return {}

    def files(self) -> dict[str, str]:
        """Further text files that other programs look for in its folder; they are written, never read."""
        return {}

    @classmethod
    @abstractmethod
    def from_parts(cls, provenance: Provenance, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The patch with this `spec()` and these `tensors()`. Raises BadPatch if they do not fit together."""

    @abstractmethod
    def changes(self) -> list[dict[str, Any]]:
        """What is changed where, one JSON-ready row for each part touched: `part` and `form`, with `norm` of weights."""

    @cached_property
    def id(self) -> str:
        """A short name made of the contents: equal patches have equal ids. Scorecard, versions and names do not count."""
        # What is at its default is left out, so that a field added later changes no id.
        rest = {"scorecard", "versions", "base_name", "edits"}
        source = self.provenance.model_dump(mode="json", exclude=rest, exclude_defaults=True)
        source |= {"kind": self.kind, "spec": self.spec(), "edits": [edit.to_json() for edit in self.provenance.edits]}
        digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(raw_bytes(tensor))
        return digest.hexdigest()[:16]

    def check_base(self, lm: BaseLM) -> None:
        """Raise WrongBase unless `lm` is the model this patch was made for."""
        if lm.fingerprint != self.provenance.base_fingerprint:
            raise WrongBase(
                f"this patch was made for {self.provenance.base_name} ({self.provenance.base_fingerprint[:8]}…), "
                f"the model in hand is {lm.name} ({lm.fingerprint[:8]}…).\n"
                f"  Load the model it was made for, or make the patch again for this one: factpatch edit --model {lm.name} …"
            )

    def with_scorecard(self, scorecard: Mapping[str, Any]) -> Self:
        """The same patch with its scores written beside it."""
        return replace(self, provenance=self.provenance.model_copy(update={"scorecard": dict(scorecard)}))

    def describe(self) -> dict[str, Any]:
        """Everything but the numbers, JSON-ready."""
        return {
            "id": self.id,
            "kind": self.kind,
            "changes": self.changes(),
            "bytes": sum(t.numel() * t.element_size() for t in self.tensors().values()),
            **self.provenance.model_dump(mode="json", exclude={"edits"}),
            "edits": [edit.to_json() for edit in self.provenance.edits],
        }

    def save(self, folder: str | Path, *, replace: bool = False) -> Path:
        """Write `patch.json` and its tensors into a new folder, whole or not at all.

        Raises OutputError if the folder cannot be written, or holds something already; a patch there gives way to this
        one if `replace`.
        """
        from factpatch.patches.folder import save_patch

        return save_patch(self, Path(folder), replace=replace)

    @staticmethod
    def load(folder: str | Path) -> Patch:
        """Read a saved patch of any kind. Raises BadPatch naming what is wrong with the folder."""
        from factpatch.patches.folder import load_patch

        return load_patch(Path(folder))
