"""What other patches lose when the stack changes: their edits are asked on it before and after."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

from factpatch.edits import Edit
from factpatch.lm import BaseLM
from factpatch.patches import Patch
from factpatch.progress import Progress, silent
from factpatch.scoring import ProbeScore, Scorecard, Scorer
from factpatch.workspace.conflicts import Standing
from factpatch.workspace.entry import Regression

__all__ = ["Reviewed", "edits_lost", "review", "summary_of"]

_RIGHT = 0.5
"""A probe is answered rightly from this score on; free answers score 0 or 1."""
_NAMES = ("edit_success", "rephrase", "portability", "locality", "fluency")


class Reviewed(NamedTuple):
    """What came of asking other patches' edits again.

    lost  probes that were answered rightly and are not any more
    held  how many edits' own prompts are answered rightly, as before
    """

    lost: tuple[Regression, ...]
    held: int


def review(
    lm: BaseLM,
    before: Sequence[Patch] | None,
    after: Sequence[Patch],
    watched: Sequence[Standing],
    *,
    chat: bool = False,
    progress: Progress = silent,
) -> Reviewed:
    """Which probes of watched patches are answered rightly with the stack `before` and not with `after`, and which still are.

    before  None if it cannot be laid on: all are taken to have been answered rightly

    Free answers: to each edit's own prompt, its rephrases, and what follows from it. Other patches on `lm` do not count.
    """
    owners: dict[str, tuple[Standing, Edit]] = {}
    for standing in watched:
        for i, edit in enumerate(standing.patch.provenance.edits):
            owners[f"{standing.number}/{i}"] = (standing, edit)
    if not owners:
        return Reviewed((), 0)
    # What is asked about an edit is told apart by a name of our own: different patches may use one id.
    asked = [
        edit.model_copy(update={"id": name, "locality": MappingProxyType({})}) for name, (_, edit) in owners.items()
    ]
    with lm.unpatched(), lm.patched(*after):
        scorer = Scorer(lm, protocols=["open"], fluency=False, chat=chat, beneath=before or ())
        card = scorer.score(asked, progress=progress)
    lost = tuple(
        Regression(
            number=standing.number or 0,
            patch=standing.patch.id,
            edit=edit.id,
            role=row.role,
            prompt=row.prompt,
            expected=row.answers,
            before="" if before is None else row.said_before,
            after=row.said_after,
        )
        for row in card.scores
        for standing, edit in [owners[row.edit]]
        if _is_lost(row, assume=before is None)
    )
    held = sum(
        row.role == "edit" and (row.after or 0) >= _RIGHT and (before is None or (row.before or 0) >= _RIGHT)
        for row in card.scores
    )
    return Reviewed(lost, held)


def _is_lost(row: ProbeScore, *, assume: bool) -> bool:
    return row.after is not None and row.after < _RIGHT and (assume or (row.before or 0) >= _RIGHT)


def edits_lost(regressions: Sequence[Regression]) -> tuple[Regression, ...]:
    """Those in which an edit itself is lost, not only another wording or what follows from it."""
    return tuple(each for each in regressions if each.role == "edit")


def summary_of(card: Scorecard) -> dict[str, float | None]:
    """The numbers of the open protocol that an entry keeps; what was not measured is left out."""
    summary = card.summary("open")
    found = {name: getattr(summary, name) for name in _NAMES}
    return {name: round(value, 6) for name, value in found.items() if value is not None}
