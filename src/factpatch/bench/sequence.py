"""Patches made one after the other, each kept: how well each does right after it was made, and at the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from factpatch.bench.outcome import AT_EDIT, Moment, Outcome, after
from factpatch.bench.singles import ABREAST, Failure, make
from factpatch.edits import Edit
from factpatch.lm import LM, BaseLM
from factpatch.methods import Method
from factpatch.patches import Patch
from factpatch.patches.weight import point
from factpatch.progress import Progress, silent
from factpatch.scoring import Scorecard, Scorer

__all__ = ["Kept", "Laid", "Sequential", "laid_in_turn", "one_after_another", "score_sequence"]


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


@dataclass(frozen=True, slots=True)
class Laid:
    """One patch of a sequence, which lies on the model from now on.

    patch    None if the method refused
    outcome  of making it, without scores; None if it was on record and not made again
    """

    number: int
    edits: Sequence[Edit]
    patch: Patch | None
    outcome: Outcome | None


def laid_in_turn(
    lm: BaseLM,
    method: Method[Any],
    units: Sequence[Sequence[Edit]],
    progress: Progress = silent,
    kept: Kept | None = None,
) -> Generator[Laid]:
    """Make each patch on the model as the earlier ones left it, and lay it there.

    All are taken off once there is nothing more to make, or when the generator is closed, which may be done at any time.
    """
    kept = _Nothing() if kept is None else kept
    doing = f"Editing in sequence with {method.name}"
    with ExitStack() as stack:
        for i, edits in enumerate(units):
            progress(doing, i, len(units))
            outcome = None
            if kept.is_done(AT_EDIT, i):
                patch = kept.patch(i)
            else:
                patch, outcome = make(lm, method, edits)
                outcome = replace(outcome, number=i, moment=AT_EDIT)
            if patch is not None:
                stack.enter_context(lm.patched(patch))
            yield Laid(i, edits, patch, outcome)
    progress(doing, len(units), len(units))


@dataclass(frozen=True, slots=True)
class _Weights:
    """The model as some patches left it, for patches that change nothing but weights: it can be attached in their place.

    tensors  the weights' values at that moment, by name. They are shared with the model, or with what it keeps to put back
             when a patch is taken off, so that keeping them takes no memory
    """

    tensors: Mapping[str, Tensor] = field(repr=False)

    def attach(self, lm: LM) -> Callable[[], None]:
        parameters = dict(lm.model.named_parameters())
        kept = {name: parameters[name].data for name in self.tensors}
        point(parameters, self.tensors)
        return lambda: point(parameters, kept)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A patch whose score is still to be taken, on the model as it was right after the patch was laid on it.

    count    how many patches lay there then
    weights  what they came to; None if they do more than change weights, so that the first `count` must be laid on again
    """

    laid: Laid
    count: int
    weights: _Weights | None


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
    after the last. What is on record already is not told again. While an outcome of all of them is told, the model still is
    as it was scored, and may be looked at.
    """
    kept = _Nothing() if kept is None else kept
    patches: list[Patch] = []
    every: list[Edit] = []
    waiting: list[_Waiting] = []
    with closing(laid_in_turn(lm, method, units, progress, kept)) as turns:
        for laid in turns:
            if laid.patch is not None:
                patches.append(laid.patch)
                every += laid.edits
                if laid.outcome is not None:
                    waiting.append(_Waiting(laid, len(patches), _weights(lm, patches)))
            elif laid.outcome is not None:
                yield laid.outcome
            count = laid.number + 1
            is_last = count == len(units)
            if patches and (count in checkpoints or is_last) and not kept.is_done(after(count), laid.number):
                yield Outcome(laid.number, after(count), tuple(edit.id for edit in every), scorer.score(every))
            if waiting and (len(waiting) >= ABREAST or is_last):
                yield from _at_edit(lm, patches, waiting, scorer, kept)
                waiting.clear()


def _weights(lm: BaseLM, patches: Sequence[Patch]) -> _Weights | None:
    """Of the model as it stands; None if these patches change more than weights."""
    if not isinstance(lm, LM) or not all(patch.mergeable for patch in patches):
        return None
    return _Weights({name: parameter.data for name, parameter in lm.model.named_parameters()})


def _at_edit(
    lm: BaseLM, patches: Sequence[Patch], waiting: Sequence[_Waiting], scorer: Scorer, kept: Kept
) -> Iterator[Outcome]:
    """What the model was after each of these is laid on again, side by side; patches are values.

    A stack of changed weights is laid on as what it came to: a lane for each of its patches would hold a copy of all that
    they touch for every edit made so far.
    """
    groups = [one.laid.edits for one in waiting]
    weights = [one.weights for one in waiting if one.weights is not None]
    if len(weights) == len(waiting):
        cards = scorer.score_each(groups, [[one] for one in weights])
    else:
        with lm.without(*patches):
            cards = scorer.score_each(groups, [patches[: one.count] for one in waiting])
    for one, card in zip(waiting, cards, strict=True):
        outcome, patch = one.laid.outcome, one.laid.patch
        assert outcome is not None
        assert patch is not None
        kept.keep(one.laid.number, patch)
        yield replace(outcome, card=card.model_copy(update={"fit_seconds": outcome.fit_seconds}))


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
