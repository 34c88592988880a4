"""A health monitor: how far weights have moved, perplexity on neutral texts, and facts that a model must still know.

Edits that each look well can ruin a model together: gradually at first, then at once (Gupta et al. 2024, arXiv 2401.07453).
Perplexity follows what is lost in downstream tasks at a small part of their cost (Yang et al. 2024, arXiv 2402.09656).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from factpatch.analysis.base import Result
from factpatch.analysis.spectra import as_matrix
from factpatch.bench import Failure, Mode
from factpatch.bench.sequence import laid_in_turn
from factpatch.data.questions import guard_questions, guard_texts
from factpatch.edits import Edit, Probe
from factpatch.lm import LM, BaseLM
from factpatch.methods import Method
from factpatch.patches import Patch, WeightPatch
from factpatch.progress import Progress, silent
from factpatch.scoring import Retained
from factpatch.scoring.guard import ANSWER_TOKENS, perplexity
from factpatch.scoring.retained import retained

__all__ = [
    "Check",
    "Copies",
    "Health",
    "Monitor",
    "Sign",
    "Verdict",
    "Vitals",
    "Watched",
    "check",
    "edit_until_sick",
    "judge",
]

_log = logging.getLogger("factpatch")


class Health(Result):
    """Limits within which a model is called healthy. None: not watched."""

    max_norm: PositiveFloat | None = Field(
        default=0.1, description="how far all weights together may move, as a share of their Frobenius norm"
    )
    max_perplexity: PositiveFloat | None = Field(
        default=2.0, description="perplexity on neutral texts, as a multiple of the unedited model's"
    )
    min_canaries: float | None = Field(
        default=0.9, ge=0, le=1, description="share of the canary facts that must be answered as before"
    )


class Vitals(Result):
    """What was measured of a model at one moment.

    norm               Frobenius norm of the change of all weights, over that of the unedited weights; 0 where patches change
                       no weights; None for a model that can only be asked
    perplexity         on neutral texts; None for a model that can only be asked
    perplexity_before  the unedited model's
    questions          all that were asked, with the unedited model's answer and the one given now
    """

    norm: float | None
    perplexity: float | None
    perplexity_before: float | None
    questions: tuple[Retained, ...]

    @property
    def perplexity_ratio(self) -> float | None:
        """Of now to the unedited model's."""
        if self.perplexity is None or self.perplexity_before is None:
            return None
        return self.perplexity / self.perplexity_before

    @property
    def canaries(self) -> tuple[Retained, ...]:
        """Questions that the unedited model answers rightly, and those of which no right answer is known."""
        return tuple(question for question in self.questions if question.was_right is not False)

    @property
    def canaries_lost(self) -> int:
        """How many canaries are no longer answered rightly; of those without a known answer, no longer alike."""
        return sum(one.changed if one.was_right is None else one.lost for one in self.canaries)

    @property
    def canaries_kept(self) -> float | None:
        """The share of canaries that are not lost; None if there is no canary."""
        asked = len(self.canaries)
        return (asked - self.canaries_lost) / asked if asked else None

    @property
    def right(self) -> int | None:
        """How many questions are answered rightly now; None if no answer is known."""
        known = [question.is_right for question in self.questions if question.is_right is not None]
        return sum(known) if known else None


class Sign(Result):
    """One measure beside its limit. A value of None could not be measured, and counts as healthy."""

    name: str
    value: float | None
    limit: float
    healthy: bool


class Verdict(Result):
    """Whether a model is healthy; each measure that is watched; and the reason in a sentence."""

    healthy: bool
    signs: tuple[Sign, ...]
    reason: str

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Names of what was to be watched and could not be measured."""
        return tuple(sign.name for sign in self.signs if sign.value is None)


def judge(vitals: Vitals, limits: Health) -> Verdict:
    """Measures against limits; what sits on its limit is healthy, and what is not a number is not."""
    signs, reasons = [], []
    moved = "the weights have moved by {:.3g} of their norm"
    risen = "perplexity on neutral texts is {:.3g} times that of the unedited model"
    lost = f"{vitals.canaries_lost} of {len(vitals.canaries)} canary facts are lost, a share of {{:.3g}} is kept"
    for name, value, limit, is_most, says in (
        ("norm", vitals.norm, limits.max_norm, True, moved),
        ("perplexity", vitals.perplexity_ratio, limits.max_perplexity, True, risen),
        ("canaries", vitals.canaries_kept, limits.min_canaries, False, lost),
    ):
        if limit is None:
            continue
        healthy = value is None or (value <= limit if is_most else value >= limit)
        signs.append(Sign(name=name, value=value, limit=limit, healthy=healthy))
        if value is not None and not healthy:
            reasons.append(f"{says.format(value)}, {'more' if is_most else 'less'} than {limit:g}")
    found = "; ".join(reasons) or "all that was measured is within its limits"
    return Verdict(healthy=not reasons, signs=tuple(signs), reason=f"{found[0].upper()}{found[1:]}.")


class Monitor:
    """Knows the unedited model, and measures it as it stands.

    It is asked once, without whatever patches lie on it. Its weights are not copied: they are kept as they are by the
    patches that change copies of them.

    canaries  questions; those that the unedited model answers rightly are watched, and those without an answer for whether
              what is said changes. By default the guard's
    texts     to take the perplexity of; by default the guard's
    """

    def __init__(
        self,
        lm: BaseLM,
        limits: Health | None = None,
        *,
        canaries: Sequence[Probe] | None = None,
        texts: Sequence[str] | None = None,
        chat: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.lm, self.limits, self.chat = lm, limits or Health(), chat
        self.canaries = guard_questions() if canaries is None else tuple(canaries)
        self.texts = guard_texts() if texts is None else tuple(texts)
        progress("Health: asking the unedited model", 0, 1)
        with lm.unpatched():
            self._said = self._answers()
            self._perplexity = perplexity(lm, self.texts)
            self._weights = _weights(lm)
            self._norm = math.sqrt(sum(_squared(weight) for weight in self._weights.values()))
        progress("Health: asking the unedited model", 1, 1)

    def unedited(self) -> Vitals:
        """Of the model without patches, as it was when it was asked."""
        asked = retained(self.canaries, self._said, self._said, chat=self.chat)
        norm = 0.0 if isinstance(self.lm, LM) else None
        return Vitals(norm=norm, perplexity=self._perplexity, perplexity_before=self._perplexity, questions=asked)

    def vitals(self) -> Vitals:
        """Of the model as it stands."""
        return Vitals(
            norm=self._growth(),
            perplexity=perplexity(self.lm, self.texts),
            perplexity_before=self._perplexity,
            questions=retained(self.canaries, self._said, self._answers(), chat=self.chat),
        )

    def check(self) -> Verdict:
        """Whether the model as it stands is within the limits."""
        return judge(self.vitals(), self.limits)

    def _answers(self) -> list[str]:
        return self.lm.answer([probe.prompt for probe in self.canaries], chat=self.chat, max_new=ANSWER_TOKENS)

    def _growth(self) -> float | None:
        """`||W' - W|| / ||W||` over all weights; those that no patch has touched are not read."""
        if not isinstance(self.lm, LM):
            return None
        moved = 0.0
        for name, weight in _weights(self.lm).items():
            base = self._weights[name]
            if weight.data_ptr() != base.data_ptr():
                moved += _squared(weight.float() - base.float())
        return math.sqrt(moved) / self._norm


def _weights(lm: BaseLM) -> dict[str, Tensor]:
    """All weights by name, those shared by two parts once."""
    return {name: p.data for name, p in lm.model.named_parameters()} if isinstance(lm, LM) else {}


def _squared(tensor: Tensor) -> float:
    """In float64 from the norms of rows in float32, which every device knows: Apple's has no float64."""
    rows = torch.linalg.vector_norm(as_matrix(tensor), dim=1, dtype=torch.float32)
    return float(rows.cpu().double().square().sum())


class Copies:
    """Foresees whether the copies of weights that a sequence keeps will have room; made before its first patch.

    Each patch points the weights it touches at copies of its own, and all stay until the end.
    """

    def __init__(self, lm: BaseLM, method: str, units: int) -> None:
        self.lm, self.method, self.units = lm, method, units
        self.beneath = len(lm.patches)
        self.at: dict[str, int] | None = {name: weight.data_ptr() for name, weight in _weights(lm).items()}

    def look(self) -> None:
        """Log a warning, once, if as many more patches as are to come, each like the last one, have no room."""
        if self.at is None:
            return
        each = sum(weight.nbytes for name, weight in _weights(self.lm).items() if weight.data_ptr() != self.at[name])
        if not each:
            return
        self.at = None
        top = self.lm.patches[-1]
        if isinstance(top, WeightPatch):
            # A change that is written out lies beside the copy it made.
            tensors = (t for delta in top.deltas.values() for t in delta.parts().values())
            each += sum(t.nbytes for t in tensors if t.device.type == _place(self.lm).type)
        free, need = _free(_place(self.lm)), each * (self.units - (len(self.lm.patches) - self.beneath))
        if need > free:
            _log.warning(
                f"{self.method}: each patch keeps {each / 1e6:,.0f} MB of weights until the sequence is over; "
                f"those still to come would take {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free.\n"
                "  Make fewer edits; change one block instead of several, with a method or settings that do; "
                "or make several edits with one patch, by giving them the same group."
            )


def _place(lm: BaseLM) -> torch.device:
    assert isinstance(lm, LM)
    return lm.device


def _free(place: torch.device) -> int:
    """Memory that is free where a model lies, in bytes."""
    return int(torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else psutil.virtual_memory().available)


def check(lm: BaseLM, limits: Health | None = None, **watched: Any) -> Verdict:
    """Whether a model with the patches that lie on it is healthy; the model is left as it was.

    watched  `canaries`, `texts`, `chat`, `progress`, as of `Monitor`, which saves asking the unedited model each time
    """
    return Monitor(lm, limits, **watched).check()


@dataclass(frozen=True, slots=True)
class Check:
    """A look at the model when so many patches of a sequence lay on it."""

    patches: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Watched:
    """What came of a sequence under a monitor.

    patches   the good ones, first to last: laid on together, they were found healthy
    edits     ids of the edits that each of them makes
    culprit   ids of the edits of the next patch, with which the model is sick; empty if it never was
    verdict   on the model with the culprit; if there is none, with all patches
    checks    every look that was taken, by number of patches
    failures  edits the method refused
    units     how many patches were asked for
    """

    patches: tuple[Patch, ...]
    edits: tuple[tuple[str, ...], ...]
    culprit: tuple[str, ...]
    verdict: Verdict
    checks: tuple[Check, ...]
    failures: tuple[Failure, ...]
    units: int

    @property
    def stopped_early(self) -> bool:
        """Whether the model was sick at some check."""
        return not self.verdict.healthy


def edit_until_sick(
    lm: BaseLM,
    method: Method[Any],
    edits: Sequence[Edit],
    limits: Health | None = None,
    *,
    every: int = 10,
    monitor: Monitor | None = None,
    progress: Progress = silent,
) -> Watched:
    """Make edits one after the other until the model is sick, and go back to the last one with which it was not.

    The model is looked at before the first patch, after each `every` of them and after the last. Between a healthy look and
    a sick one the place is found by halving: with the patches returned the model was healthy, with one more it was sick. If
    it was sick and well again in between, that is one such place of several. The model is left as it was.

    monitor  one that knows the model already; by default one with `limits` is made. Raises ValueError if both are given.

    All patches lie on the model until the end, and each holds a copy of the weights that it touches; after the first one a
    warning is logged if there will be no room for the others.
    """
    if every < 1 or (limits is not None and monitor is not None):
        raise ValueError("expected every >= 1, and either limits or a monitor")
    units = Mode("sequential").units(edits)
    method.prepare(lm, progress)
    watch = Monitor(lm, limits, progress=progress) if monitor is None else monitor
    run, copies = _Run(lm, watch), Copies(lm, method.name, len(units))
    run.look(0)
    if run.well is not None:
        with closing(laid_in_turn(lm, method, units, progress)) as turns:
            for laid in turns:
                if laid.patch is None:
                    reason = laid.outcome.reason if laid.outcome is not None else ""
                    run.failures += [Failure(edit.id, reason) for edit in laid.edits]
                else:
                    run.add(laid.patch, laid.edits)
                    copies.look()
                is_last = laid.number + 1 == len(units)
                due = len(run.patches) - max(run.looks) >= (1 if is_last else every)
                if due and not run.look(len(run.patches)).healthy:
                    break
        run.halve(progress)
    return run.result(len(units))


class _Run:
    """A sequence under way, and what was seen of it."""

    def __init__(self, lm: BaseLM, monitor: Monitor) -> None:
        self.lm, self.monitor = lm, monitor
        self.patches: list[Patch] = []
        self.edits: list[tuple[str, ...]] = []
        self.failures: list[Failure] = []
        self.looks: dict[int, Verdict] = {}

    @property
    def well(self) -> int | None:
        """With how many patches the model was last found healthy; None if never."""
        return max((count for count, verdict in self.looks.items() if verdict.healthy), default=None)

    @property
    def sick(self) -> int | None:
        """With how few it was found sick; None if it never was."""
        return min((count for count, verdict in self.looks.items() if not verdict.healthy), default=None)

    def add(self, patch: Patch, edits: Sequence[Edit]) -> None:
        self.patches.append(patch)
        self.edits.append(tuple(edit.id for edit in edits))

    def look(self, count: int) -> Verdict:
        """At the model as it stands, which `count` patches of the sequence lie on."""
        self.looks[count] = self.monitor.check()
        return self.looks[count]

    def halve(self, progress: Progress) -> None:
        """Look between the last healthy look and the first sick one until there is nothing between them."""
        doing = "Looking for the last healthy edit"
        while self.sick is not None and self.well is not None and self.sick - self.well > 1:
            progress(doing, self.well, self.sick)
            middle = (self.well + self.sick) // 2
            with self.lm.patched(*self.patches[:middle]):
                self.look(middle)
        progress(doing, 1, 1)

    def result(self, units: int) -> Watched:
        good, sick = self.well or 0, self.sick
        return Watched(
            patches=tuple(self.patches[:good]),
            edits=tuple(self.edits[:good]),
            culprit=() if not sick else self.edits[sick - 1],
            verdict=self.looks[max(self.looks) if sick is None else sick],
            checks=tuple(Check(count, self.looks[count]) for count in sorted(self.looks)),
            failures=tuple(self.failures),
            units=units,
        )
