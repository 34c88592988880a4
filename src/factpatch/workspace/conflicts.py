"""Conflicts between edits that are to be made and those that lie there, found before anything is changed.

Texts are compared by rule. What two edits call the same is certain where their prompts are the same once normalised; that two
prompts ask for one fact in different words is a guess, which is told and stops nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from factpatch.analysis.spectra import mean_squared_cosine, spectrum
from factpatch.edits import Edit
from factpatch.gate.propose import rewordings
from factpatch.patches import LowRank, Patch, WeightPatch
from factpatch.patches.delta import Delta
from factpatch.scoring.metrics import contains, normalise

__all__ = ["BLOCKING", "OVERLAP", "Conflict", "Standing", "conflicts"]

ConflictKind = Literal["duplicate", "contradiction", "reversal", "rewording", "overlap"]
BLOCKING: frozenset[ConflictKind] = frozenset({"duplicate", "contradiction", "reversal"})
"""Those that have to be allowed; the others are only told."""
OVERLAP = 0.25
"""Shares below it are not told: patches of one method often touch one matrix, and small overlaps are harmless."""

_EMPTY_WORDS = (
    "is was are were be been do does did what which who whom whose where when how "
    "of in on at by to for from s it its that this can you tell me please"
)


@dataclass(frozen=True, slots=True)
class Standing:
    """A patch that lies there; `number` is that of the entry that brought it in, None within one proposal."""

    number: int | None
    patch: Patch


class Conflict(BaseModel):
    """One edit, or patch, against one that lies there.

    kind       duplicate      the same prompt, the same target
               contradiction  the same prompt, another target
               reversal       the same prompt, and the target is what was true before the earlier edit
               rewording      perhaps the same fact in other words
               overlap        two changes of one matrix that share directions
    number     of the entry that brought the earlier one in; None if it is in the same proposal
    edit, earlier      their ids; empty of an overlap
    parameter, share   of an overlap: the matrix they share most of, and how much, 0 to 1
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ConflictKind
    number: int | None
    patch: str
    edit: str = ""
    prompt: str = ""
    target: str = ""
    earlier: str = ""
    earlier_prompt: str = ""
    earlier_target: str = ""
    parameter: str = ""
    share: float | None = None

    @property
    def blocks(self) -> bool:
        """Whether it has to be allowed."""
        return self.kind in BLOCKING

    @property
    def says(self) -> str:
        """In a line."""
        where = "the same proposal" if self.number is None else f"entry {self.number}"
        if self.kind == "overlap":
            return (
                f"overlap with {where}: {self.parameter}, {100 * (self.share or 0):.0f} % of the directions are shared"
            )
        return (
            f'{self.kind} of {where}: "{self.earlier_prompt}" → "{self.earlier_target}", '
            f'now "{self.prompt}" → "{self.target}"'
        )


def conflicts(stack: Sequence[Standing], edits: Sequence[Edit], patch: Patch | None = None) -> tuple[Conflict, ...]:
    """What edits, and the patch made of them if there is one, have against the patches of a stack and each other."""
    found = [
        _between(standing.number, standing.patch.id, earlier, edit)
        for standing in stack
        for earlier in standing.patch.provenance.edits
        for edit in edits
    ]
    found += [_between(None, "", earlier, edit) for i, edit in enumerate(edits) for earlier in edits[:i]]
    overlaps = (_overlap(standing, patch) for standing in stack) if isinstance(patch, WeightPatch) else ()
    return tuple(each for each in [*found, *overlaps] if each is not None)


def _between(number: int | None, patch_id: str, earlier: Edit, edit: Edit) -> Conflict | None:
    kind = _kind(earlier, edit)
    if kind is None:
        return None
    return Conflict(
        kind=kind,
        number=number,
        patch=patch_id,
        edit=edit.id,
        prompt=edit.prompt,
        target=edit.target,
        earlier=earlier.id,
        earlier_prompt=earlier.prompt,
        earlier_target=earlier.target,
    )


def _kind(earlier: Edit, edit: Edit) -> ConflictKind | None:
    if _plain(earlier.prompt) == _plain(edit.prompt):
        if _plain(earlier.target) == _plain(edit.target):
            return "duplicate"
        is_back = _plain(edit.target) in {_plain(text) for text in earlier.ground_truth}
        return "reversal" if is_back else "contradiction"
    return "rewording" if _same_fact(earlier, edit) else None


def _plain(text: str) -> str:
    """Normalised; what consists of marks alone stays as it is."""
    return normalise(text) or text.strip()


def _same_fact(one: Edit, other: Edit) -> bool:
    """Whether one's prompt is a rephrase of the other's, or both ask for one relation of one subject."""
    for a, b in ((one, other), (other, one)):
        if _plain(b.prompt) in {_plain(text) for text in (*a.rephrases, *rewordings(a))}:
            return True
    subjects = [subject for subject in (one.subject, other.subject) if subject]
    if len(subjects) == 2 and not (contains(subjects[0], subjects[1:]) or contains(subjects[1], subjects[:1])):
        return False
    relations = [_relation(edit, subjects) for edit in (one, other)]
    return bool(relations[0]) and relations[0] == relations[1]


def _relation(edit: Edit, subjects: Sequence[str]) -> frozenset[str]:
    """The words of a prompt that tell what is asked, without the subject; empty if the subject is not in it."""
    there = [subject for subject in subjects if contains(edit.prompt, (subject,))]
    if not there:
        return frozenset()
    subject = normalise(edit.subject or max(there, key=len))
    rest = f" {normalise(edit.prompt)} ".replace(f" {subject} ", " ").replace(f" {subject}s ", " ")
    return frozenset(rest.split()) - {*_EMPTY_WORDS.split()}


def _overlap(standing: Standing, patch: WeightPatch) -> Conflict | None:
    """The parameter of which two patches share most, if it is enough to tell."""
    if not isinstance(standing.patch, WeightPatch):
        return None
    share, parameter = max(_shares(standing.patch, patch), default=(0.0, ""))
    if share < OVERLAP:
        return None
    return Conflict(
        kind="overlap", number=standing.number, patch=standing.patch.id, parameter=parameter, share=round(share, 4)
    )


def _shares(one: WeightPatch, other: WeightPatch) -> Iterator[tuple[float, str]]:
    for parameter, delta in other.deltas.items():
        if parameter in one.deltas:
            yield _share(one.deltas[parameter], delta), parameter


def _share(one: Delta, other: Delta) -> float:
    """How far two changes of a matrix lie over one another, 0 to 1.

    Of low-rank ones: mean squared cosine of the spaces they read or write, whichever is greater; two that read the same
    keys meet even where they write different values. Of others: the cosine of the two matrices, without its sign.
    """
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        a, b = spectrum(one), spectrum(other)
        return max(mean_squared_cosine(a.left, b.left), mean_squared_cosine(a.right, b.right))
    norms = one.norm() * other.norm()
    dot = (one.full().float() * other.full().float()).double().sum()
    return min(1.0, abs(float(dot)) / norms) if norms else 0.0
