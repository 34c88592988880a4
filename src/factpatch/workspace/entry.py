"""`Entry`: one line of the ledger, hashed over the one before; and `replay`, which makes a stack of patches out of them.

Nothing here knows of files or models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, StringConstraints

from factpatch.errors import PatchError
from factpatch.scoring import ScoreRole

__all__ = ["Action", "Entry", "Place", "Regression", "replay"]

_LOOK = "  See what else is wrong: factpatch verify"

Action = Literal["init", "accept", "revert"]
PatchId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A ledger may come from elsewhere: a path in it must not lead out of the workspace.
FilePath = Annotated[str, StringConstraints(pattern=r"^(workspace\.json|patches/[0-9a-f]{16}/\w[\w.-]*)$")]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Regression(_Value):
    """A probe of an earlier or later patch that was answered rightly and is not any more.

    number          of the entry that brought its patch in
    before, after   what the model says
    """

    number: int
    patch: str
    edit: str
    role: ScoreRole
    prompt: str
    expected: tuple[str, ...]
    before: str
    after: str

    @property
    def says(self) -> str:
        """In a line."""
        wanted = " or ".join(self.expected)
        was = f' instead of "{self.before}"' if self.before not in {"", *self.expected} else ""
        return f'entry {self.number}: "{self.prompt}" wants "{wanted}", and gives "{self.after}"{was}'


class Entry(_Value):
    """What was done, by whom, when, and what came of it.

    number       counted from 1; the first is "init"
    time         UTC, ISO 8601
    patch        id of the patch that was laid on, or taken out
    reverts      of a revert: the number of the entry that brought the patch in
    proposal     of an accept: the number the proposal had
    replaced     of a revert: patches that were made anew without the one taken out, by the id of what they took the place of
    files        SHA-256 of each file that this entry brings in, by its path in the workspace
    scores       summary of the scorecard under the open protocol; None for what could not be scored
    regressions  what other patches lost by it
    previous     hash of the entry before; empty of the first
    hash         SHA-256 of the canonical JSON of all the rest; fields at their defaults are left out of it
    """

    number: PositiveInt
    action: Action
    author: str
    time: str
    message: str = ""
    patch: PatchId | None = None
    reverts: PositiveInt | None = None
    proposal: NonNegativeInt | None = None
    replaced: dict[PatchId, PatchId] = {}
    files: dict[FilePath, Digest] = {}
    scores: dict[str, float | None] = {}
    regressions: tuple[Regression, ...] = ()
    previous: str
    hash: str = ""

    def sealed(self) -> Self:
        """With its hash."""
        return self.model_copy(update={"hash": self.digest})

    @property
    def digest(self) -> str:
        """What its hash must be."""
        return hashlib.sha256(_canonical(self._body())).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; fields at their defaults are left out."""
        return self._body() | {"hash": self.hash}

    def _body(self) -> dict[str, Any]:
        # What is at its default is left out, so that a field added later breaks no chain.
        return self.model_dump(mode="json", exclude={"hash"}, exclude_defaults=True)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class Place(NamedTuple):
    """A patch in the stack, and the number of the entry that brought it in; a patch made anew keeps the place."""

    number: int
    patch: str


def replay(entries: Iterable[Entry]) -> tuple[Place, ...]:
    """The stack after these entries, first to last. Raises PatchError for entries that cannot follow one another."""
    stack: list[Place] = []
    for entry in entries:
        if entry.action == "accept" and entry.patch is not None:
            stack.append(Place(entry.number, entry.patch))
        elif entry.action == "revert":
            kept = [place for place in stack if place.number != entry.reverts]
            if len(kept) == len(stack) or entry.replaced.keys() - {place.patch for place in kept}:
                raise PatchError(
                    f"entry {entry.number}: takes out or replaces a patch that is not in the stack.\n{_LOOK}"
                )
            stack = [Place(place.number, entry.replaced.get(place.patch, place.patch)) for place in kept]
        elif entry.action == "accept" or entry.number != 1:
            raise PatchError(f"entry {entry.number}: says no patch, or begins the ledger again.\n{_LOOK}")
    return tuple(stack)
