"""Patches made one after the other, each kept: how well each does right after it was made, and at the end."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

from factpatch.bench.outcome import AT_EDIT, Moment, Outcome, after
from factpatch.bench.singles import ABREAST, Failure, make
from factpatch.edits import Edit
from factpatch.lm import BaseLM
from factpatch.methods import Method
from factpatch.patches import Patch
from factpatch.progress import Progress, silent
from factpatch.scoring import Scorecard, Scorer

__all__ = ["Kept", "Sequential", "one_after_another", "score_sequence"]


class Kept(Protocol):
    """What an interrupted sequence has left behind, so that it can go on where it stopped."""

    def is_done(self, moment: Moment, number: int) -> bool:
        """Whether this outcome is on record."""
        ...

    def patch(self, number: int) -> Patch | None:
        """The patch of an outcome on record; None if it was refused."""
        ...

    def keep(self, number: int, patch: Patch) -> None:
        """Keep a patch; its outcome will be on record only after that."""
        ...


class _Nothing:
    """For a sequence that is made in one go."""

    def is_done(self, moment: Moment, number: int) -> bool:  # noqa: ARG002
        return False

    def patch(self, number: int) -> Patch | None:  # noqa: ARG002
        return None

    def keep(self, number: int, patch: Patch) -> None:
        pass


@dataclass(slots=True)
class _Link:
    """One patch of the sequence that lies on the model."""

    number: int
    edits: Sequence[Edit]
    patch: Patch
    outcome: Outcome | None


def one_after_another(
    lm: BaseLM,
    method: Method[Any],
    units: Sequence[Sequence[Edit]],
    scorer: Scorer,
    checkpoints: Collection[int] = (),
    progress: Progress = silent,
    kept: Kept | None = None,
) -> Iterator[Outcome]:
    """Make each patch on the model as the earlier ones left it, and keep it there; afterwards the model is as it was.

    Each is scored right after it was made, some at a time side by side; and all of them after so many of `checkpoints`, and
    after the last. What is on record already is not told again.
    """
    kept = _Nothing() if kept is None else kept
    doing = f"Editing in sequence with {method.name}"
    links: list[_Link] = []
    waiting: list[int] = []  # which of the links are still to be scored
    with ExitStack() as stack:
        for i, edits in enumerate(units):
            progress(doing, i, len(units))
            outcome = None
            if kept.is_done(AT_EDIT, i):
                patch = kept.patch(i)
            else:
                patch, outcome = make(lm, method, edits)
                outcome = replace(outcome, number=i, moment=AT_EDIT)
            if patch is None:
                if outcome is not None:
                    yield outcome
            else:
                stack.enter_context(lm.patched(patch))
                waiting += [len(links)] if outcome is not None else []
                links.append(_Link(i, edits, patch, outcome))
            is_last = i + 1 == len(units)
            if links and (i + 1 in checkpoints or is_last) and not kept.is_done(after(i + 1), i):
                every = [edit for link in links for edit in link.edits]
                yield Outcome(i, after(i + 1), tuple(edit.id for edit in every), scorer.score(every))
            if waiting and (len(waiting) >= ABREAST or is_last):
                yield from _at_edit(lm, links, waiting, scorer, kept)
                waiting.clear()
    progress(doing, len(units), len(units))


def _at_edit(
    lm: BaseLM, links: Sequence[_Link], waiting: Sequence[int], scorer: Scorer, kept: Kept
) -> Iterator[Outcome]:
    """Patches are values: what the model was after each of these is laid on again, side by side."""
    patches = [link.patch for link in links]
    with lm.without(*patches):
        cards = scorer.score_each([links[n].edits for n in waiting], [patches[: n + 1] for n in waiting])
    for n, card in zip(waiting, cards, strict=True):
        link = links[n]
        assert link.outcome is not None
        kept.keep(link.number, link.patch)
        yield replace(link.outcome, card=card.model_copy(update={"fit_seconds": link.outcome.fit_seconds}))


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
    told = list(one_after_another(lm, method, [[edit] for edit in edits], scorer, checkpoints, progress))
    at_edit = [outcome.card for outcome in told if outcome.moment == AT_EDIT and outcome.card is not None]
    return Sequential(
        Scorecard.join(at_edit) if at_edit else None,
        {
            outcome.number + 1: outcome.card
            for outcome in told
            if outcome.moment != AT_EDIT and outcome.card is not None
        },
        tuple(Failure(outcome.edits[0], outcome.reason) for outcome in told if outcome.reason),
    )
