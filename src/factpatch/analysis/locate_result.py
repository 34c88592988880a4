"""What a sweep over blocks found, and how a place is chosen from it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from statistics import StatisticsError, correlation, fmean
from typing import Any, Literal

from factpatch.analysis.base import Result, mean_over
from factpatch.edits import Role
from factpatch.methods.located import PlaceField
from factpatch.scoring.metrics import taken_together
from factpatch.scoring.protocols import ProtocolName

__all__ = [
    "MEASURES",
    "RULE",
    "ByFact",
    "Located",
    "Measures",
    "Place",
    "Stopped",
    "Traced",
    "Trial",
    "best_of",
    "rank_correlation",
    "supports",
]

RULE = (
    "the highest harmonic mean of edit success, rephrase and locality, each the mean over facts under the open protocol "
    "and counted as at least 0.01, so that where one is nought the others decide; measures without probes are left out; "
    "a place without any success is never chosen, one where an edit was refused only after the others; of equals the one "
    "with the higher mean under the survey protocol, then the lowest"
)
"""How a place is chosen. ROME's evaluation (arXiv 2202.05262) sums its three measures up by the same mean.

What the model says by itself decides. An answer is right or wrong there, so that few facts leave many places level; among
these the survey's finer shares decide.
"""

MEASURES: dict[str, Role] = {
    "edit_success": "edit",
    "rephrase": "rephrase",
    "portability": "portability",
    "locality": "locality",
}
_RESAMPLES = 1000

Stopped = Literal["time", "interrupt"]
"""The time that was given was over; a KeyboardInterrupt."""

ByFact = dict[ProtocolName, dict[Role, dict[str, float]]]


class Measures(Result):
    """Means over facts under one protocol, from 0 to 1; None where nothing could be scored."""

    edit_success: float | None
    rephrase: float | None
    portability: float | None
    locality: float | None


class Place(Result):
    """One block, or several that are edited together, and how edits do there.

    layers   numbers of blocks, lowest first
    score    what the choice is made by; see RULE. None where no fact could be edited
    survey_score  the same mean under the survey protocol, which decides between places of one score
    support  share of a thousand resamples of the facts in which this place is the best: near 1, the choice hardly hangs on
             which facts were drawn
    refused  by fact, why the method could not edit it here
    seconds  wall time of making and scoring the edits
    by_fact  by protocol and kind of probe, the number of each fact
    """

    layers: tuple[int, ...]
    score: float | None
    survey_score: float | None
    support: float
    survey: Measures
    open: Measures
    refused: dict[str, str]
    seconds: float
    by_fact: ByFact

    @property
    def block(self) -> int:
        """The block itself; of several the middle one."""
        return self.layers[len(self.layers) // 2]


class Traced(Result):
    """What causal tracing says, averaged over facts that the model knows.

    part       whose output is restored at the subject's last token
    window     blocks restored together
    facts      how many were traced
    of         how many were to be; more than `facts` if there was no time for them
    effects    by block, the average indirect effect: how much probability of the answer comes back
    suggested  the block with the highest
    """

    part: str
    window: int
    facts: int
    of: int
    effects: tuple[float, ...]
    suggested: int


class Located(Result):
    """A sweep, its choice, and tracing's suggestion.

    field     the setting that holds the place: `layer` of one block, `layers` of several
    config    the method's other settings
    facts     ids of the facts that were edited; scores on these flatter the choice
    rule      how the choice was made
    places    those that were tried, lowest first
    stopped   what ended the sweep before all places were tried; None if nothing did
    chosen    the blocks; None if no place did any good
    traced    None if nothing was traced, and `untraced` says why
    agree     whether tracing's block is among those chosen; None if there is nothing to compare
    rank_correlation  Spearman's, between score and effect over the places tried; of several blocks the mean effect counts.
              None if there are fewer than three places, or one of the two is the same everywhere
    """

    model: str
    fingerprint: str
    method: str
    field: PlaceField
    config: dict[str, Any]
    facts: tuple[str, ...]
    facts_sha256: str
    seed: int
    rule: str
    places: tuple[Place, ...]
    stopped: Stopped | None
    chosen: tuple[int, ...] | None
    traced: Traced | None
    untraced: str
    agree: bool | None
    rank_correlation: float | None
    versions: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether all places were tried."""
        return self.stopped is None

    @property
    def best(self) -> Place | None:
        """The place chosen."""
        return next((place for place in self.places if place.layers == self.chosen), None)

    @property
    def preliminary(self) -> bool:
        """Whether the choice rests on little: the sweep was stopped, or there was a single fact, or a single place, to try."""
        return not self.complete or len(self.facts) < 2 or len(self.places) < 2

    @property
    def at_suggestion(self) -> Place | None:
        """Of the places tried, the one around the block that tracing suggests; None if none holds it."""
        if self.traced is None:
            return None
        block = self.traced.suggested
        around = [place for place in self.places if block in place.layers]
        return min(around, key=lambda place: abs(place.block - block), default=None)


class Trial(Result):
    """One place as it is kept in the cache."""

    layers: tuple[int, ...]
    by_fact: ByFact
    refused: dict[str, str]
    seconds: float

    def measures(self, protocol: ProtocolName, facts: Sequence[str]) -> Measures:
        """Means over these facts, which may repeat."""
        found = self.by_fact.get(protocol, {})
        return Measures(**{name: mean_over(found.get(role, {}), facts) for name, role in MEASURES.items()})

    def score(self, facts: Sequence[str], protocol: ProtocolName = "open") -> float | None:
        """The mean that RULE takes, over these facts."""
        found = self.by_fact.get(protocol, {})
        roles: tuple[Role, ...] = ("edit", "rephrase", "locality")
        return taken_together(*(mean_over(found.get(role, {}), facts) for role in roles))


def best_of(trials: Sequence[Trial], facts: Sequence[str]) -> Trial | None:
    """What RULE chooses over these facts, which may repeat; None where no place has a score above 0."""
    scored = [
        (
            (
                sum(fact in trial.refused for fact in facts),
                -score,
                -(trial.score(facts, "survey") or 0.0),
                trial.layers,
            ),
            trial,
        )
        for trial in trials
        if (score := trial.score(facts))
    ]
    return min(scored, key=lambda each: each[0])[1] if scored else None


def supports(trials: Sequence[Trial], facts: Sequence[str], seed: int) -> list[float]:
    """For each place, the share of resamples of the facts in which it would be chosen."""
    draw = random.Random(seed)  # noqa: S311
    chosen = (best_of(trials, draw.choices(facts, k=len(facts))) for _ in range(_RESAMPLES))
    wins = Counter(best.layers for best in chosen if best is not None)
    return [wins[trial.layers] / _RESAMPLES for trial in trials]


def rank_correlation(places: Sequence[Place], effects: Sequence[float]) -> float | None:
    """Between score and effect; see `Located`."""
    pairs = [(one.score, fmean(effects[layer] for layer in one.layers)) for one in places if one.score is not None]
    if len(pairs) < 3:
        return None
    try:
        return correlation(*(_ranks(values) for values in zip(*pairs, strict=True)))
    except StatisticsError:  # one of the two is constant
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1 up; equals share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]
