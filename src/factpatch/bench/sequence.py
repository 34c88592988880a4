"""Edits made one after the other, each kept: how well each does right after it was made, and at the end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from factpatch.bench.singles import ABREAST, Failure
from factpatch.edits import Edit
from factpatch.errors import CannotEdit, TokenizerError
from factpatch.lm import BaseLM
from factpatch.methods import Method
from factpatch.patches import Patch
from factpatch.progress import Progress, silent
from factpatch.scoring import Scorecard, Scorer

__all__ = ["Sequential", "score_sequence"]


@dataclass(frozen=True, slots=True)
class Sequential:
    """The two clocks of a sequence.

    at_edit  each edit scored right after it was made, all earlier ones lying beneath
    at_end   by number of edits made: all of them scored at that point
    failures edits the method refused; the sequence goes on without them
    """

    at_edit: Scorecard | None
    at_end: dict[int, Scorecard]
    failures: tuple[Failure, ...]

    @property
    def last(self) -> Scorecard | None:
        """All edits after the last; None if none was made."""
        return self.at_end[max(self.at_end)] if self.at_end else None


def score_sequence(
    lm: BaseLM,
    method: Method[Any],
    edits: Sequence[Edit],
    scorer: Scorer,
    checkpoints: Collection[int] = (),
    progress: Progress = silent,
) -> Sequential:
    """Fit each edit on the model as the earlier ones left it, and keep it there; afterwards the model is as it was.

    checkpoints  after how many edits to score all of them; always after the last
    """
    method.prepare(lm, progress)
    scorer.baseline(edits, progress)
    at_edit: list[Scorecard] = []
    at_end: dict[int, Scorecard] = {}
    failures: list[Failure] = []
    made: list[Edit] = []
    patches: list[Patch] = []
    doing = f"Editing in sequence with {method.name}"
    with ExitStack() as stack:
        for i, edit in enumerate(edits):
            progress(doing, i, len(edits))
            try:
                patch = method.fit(lm, [edit])
            except (CannotEdit, TokenizerError) as error:
                failures.append(Failure(edit.id, str(error)))
            else:
                stack.enter_context(lm.patched(patch))
                made.append(edit)
                patches.append(patch)
            if made and (i + 1 in checkpoints or i + 1 == len(edits)):
                at_end[i + 1] = scorer.score(made)
            if len(made) - len(at_edit) >= ABREAST or i + 1 == len(edits):
                # Patches are values: what the model was after each of these edits is laid on again, side by side.
                turns = range(len(at_edit), len(made))
                with lm.without(*patches):
                    at_edit += scorer.score_each([[made[n]] for n in turns], [patches[: n + 1] for n in turns])
    progress(doing, len(edits), len(edits))
    return Sequential(Scorecard.join(at_edit) if at_edit else None, at_end, tuple(failures))
