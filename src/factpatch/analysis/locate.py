"""Which block to edit: a sweep over a few facts, beside what causal tracing suggests.

Tracing says where restoring a state brings a fact back; whether a fact is best edited there is another question, and the
two were found to be nearly unrelated (Hase et al. 2023, arXiv 2301.04213). So the choice is made by editing, and tracing's
curve is laid beside it.

Every place that is tried is kept in the cache as soon as it is scored. A sweep that was killed, or that is asked for more
places, goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import StatisticsError, correlation, fmean
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from factpatch.analysis.facts import Fact, known_facts
from factpatch.analysis.tracing import ROLES, average, suggested_layer, trace_all
from factpatch.bench.singles import each_alone, make
from factpatch.data import read
from factpatch.edits import Edit, Role
from factpatch.errors import AnatomyError, BadConfig, CannotEdit, SingularMoment
from factpatch.files import cache_root, whole_file
from factpatch.lm import LM
from factpatch.methods import Method, create, located
from factpatch.methods.learning import Learned
from factpatch.methods.located import Choice, PlaceField, place_field
from factpatch.methods.moments import MomentConfig, second_moments
from factpatch.progress import Progress, part, silent
from factpatch.scoring import Scorecard, Scorer
from factpatch.scoring.protocols import PROTOCOLS, ProtocolName

__all__ = ["RULE", "Located", "Measures", "Place", "Traced", "keep", "locate"]

RULE = (
    "the highest harmonic mean of edit success, rephrase and locality, each the mean over facts under the survey protocol "
    "and counted as at least 0.01, so that where one is nought the others decide; measures without probes are left out; "
    "a place without any success is never chosen, one where an edit was refused only after the others; of equals the lowest"
)
"""How a place is chosen. ROME's evaluation (arXiv 2202.05262) sums its three measures up by the same mean."""
_LEAST = 0.01
_DECIDING: tuple[Role, ...] = ("edit", "rephrase", "locality")

FACTS, TRACED, SAMPLES = 8, 24, 10
"""Facts that are edited at each place, facts that are traced, and draws of noise for each of the latter, by default."""

_MEASURES: dict[str, Role] = {
    "edit_success": "edit",
    "rephrase": "rephrase",
    "portability": "portability",
    "locality": "locality",
}
_SUBJECT_END = ROLES.index("last subject token")
"""Where ROME finds the effect of the MLPs."""
_MOST_PLACES = 16
"""In the first, coarse round, where nobody says otherwise."""
_RESAMPLES = 1000
_ASKED_AT_ONCE = 64
"""Facts that the model is asked whether it knows them, until enough are known."""
_MOMENTS_AT_ONCE = 2 << 30
"""Bytes that the sums of second moments gathered in one pass may take."""

ByFact = dict[ProtocolName, dict[Role, dict[str, float]]]
V = TypeVar("V", bound=BaseModel)


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measures(_Result):
    """Means over facts under one protocol, from 0 to 1; None where nothing could be scored."""

    edit_success: float | None
    rephrase: float | None
    portability: float | None
    locality: float | None


class Place(_Result):
    """One block, or several that are edited together, and how edits do there.

    layers   numbers of blocks, lowest first
    score    what the choice is made by; see RULE. None where no fact could be edited
    support  share of a thousand resamples of the facts in which this place is the best: near 1, the choice hardly hangs on
             which facts were drawn
    refused  by fact, why the method could not edit it here
    seconds  wall time of making and scoring the edits
    by_fact  by protocol and kind of probe, the number of each fact
    """

    layers: tuple[int, ...]
    score: float | None
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


class Traced(_Result):
    """What causal tracing says, averaged over facts that the model knows.

    part       whose output is restored at the subject's last token
    window     blocks restored together
    facts      how many were traced
    effects    by block, the average indirect effect: how much probability of the answer comes back
    suggested  the block with the highest
    """

    part: str
    window: int
    facts: int
    effects: tuple[float, ...]
    suggested: int


class Located(_Result):
    """A sweep, its choice, and tracing's suggestion.

    field     the setting that holds the place: `layer` of one block, `layers` of several
    config    the method's other settings
    facts     ids of the facts that were edited; scores on these flatter the choice
    rule      how the choice was made
    places    those that were tried, lowest first
    complete  false if the time given was over before all were tried
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
    complete: bool
    chosen: tuple[int, ...] | None
    traced: Traced | None
    untraced: str
    agree: bool | None
    rank_correlation: float | None
    versions: dict[str, str]

    @property
    def best(self) -> Place | None:
        """The place chosen."""
        return next((place for place in self.places if place.layers == self.chosen), None)

    @property
    def preliminary(self) -> bool:
        """Whether the choice rests on little: the time was over, or there was a single fact, or a single place, to try."""
        return not self.complete or len(self.facts) < 2 or len(self.places) < 2

    @property
    def at_suggestion(self) -> Place | None:
        """Of the places tried, the one around the block that tracing suggests; None if none holds it."""
        if self.traced is None:
            return None
        block = self.traced.suggested
        around = [place for place in self.places if block in place.layers]
        return min(around, key=lambda place: abs(place.block - block), default=None)


def locate(
    lm: LM,
    method: str | Method[Any] = "rome",
    *,
    edits: Sequence[Edit] | None = None,
    layers: Sequence[int] | None = None,
    limit: int = FACTS,
    traced: int = TRACED,
    seconds: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Located:
    """The block, or blocks, at which this method edits this model best.

    Each fact is edited alone at each place, with the method's settings otherwise as given, and scored under both protocols,
    without fluency. A method of several blocks is tried with windows of as many as it edits by default, or in the same
    pattern as the setting `layers` has. The patches that lie on the model are off meanwhile.

    method  its name, or the method with settings; one whose editor must be trained for its blocks is refused
    edits   what facts are drawn from; by default the built-in sample
    layers  blocks to try, or the first blocks of windows; by default every second of the model, or fewer of a deep one,
            then those around the best, and what tracing suggests
    limit   how many facts are edited at each place. With few, neighbouring blocks cannot be told apart: see `support`
    traced  how many facts are traced; 0 for none
    seconds  time after which no other place is begun; none by default
    seed    decides which facts are drawn, and the noise of tracing

    Tracing asks in the way in which the method edits, plainly or in the chat template. A place without an MLP of its own,
    such as a mixture of experts, is told as refused.

    Raises CannotEdit if the method can make none of these edits or chooses no block; BadConfig for blocks that are not
    there or settings at odds with a sweep; AnatomyError, TokenizerError, OutputError (the cache).
    """
    maker = create(method) if isinstance(method, str) else method
    field = _field(maker)
    pool = read("sample").edits if edits is None else tuple(edits)
    facts = _drawn(maker, pool, limit, seed)
    started = time.monotonic()
    with lm.unpatched():
        sweep = _Sweep(lm, maker, field, facts, progress)
        if layers is not None:
            sweep.check(layers)
        traced_layers, untraced = _traced(lm, pool, traced, seed, maker.config.chat, progress)
        suggested = None if traced_layers is None else traced_layers.suggested
        complete = sweep.run(layers, suggested, None if seconds is None else started + seconds)
    return _result(sweep, seed, traced_layers, untraced, complete=complete)


def keep(lm: LM, found: Located) -> Path | None:
    """Keep the choice for models nobody has tuned, as `methods.located` says; where, or None if it is not kept.

    It is not if nothing was chosen, or if it is preliminary and there is a choice for this method already. Raises
    OutputError.
    """
    if found.chosen is None:
        return None
    choice = Choice(layers=found.chosen, made=found.model_dump(mode="json"))
    return located.keep(lm, found.method, choice, replace=not found.preliminary)


class _Trial(_Result):
    """One place as it is kept in the cache."""

    layers: tuple[int, ...]
    by_fact: ByFact
    refused: dict[str, str]
    seconds: float

    def measures(self, protocol: ProtocolName, facts: Sequence[str]) -> Measures:
        """Means over these facts, which may repeat."""
        found = self.by_fact.get(protocol, {})
        return Measures(**{name: _mean(found.get(role, {}), facts) for name, role in _MEASURES.items()})

    def score(self, facts: Sequence[str]) -> float | None:
        """What RULE says, over these facts."""
        found = self.by_fact.get("survey", {})
        success, *others = (_mean(found.get(role, {}), facts) for role in _DECIDING)
        if not success:
            return success
        parts = [success, *(value for value in others if value is not None)]
        return len(parts) / sum(1 / max(_LEAST, value) for value in parts)


class _Known(_Result):
    """Facts of a pool that the model knows: prompt, subject and answer."""

    facts: tuple[tuple[str, str, str], ...]


class _Window(_Result):
    """Which blocks a method edits together, counted from the first."""

    offsets: tuple[int, ...]


class _Sweep:
    """Places tried with one method, by their first block."""

    def __init__(
        self, lm: LM, method: Method[Any], field: PlaceField, facts: tuple[Edit, ...], progress: Progress
    ) -> None:
        self.lm, self.method, self.field, self.facts, self.progress = lm, method, field, facts, progress
        self.ids = [fact.id for fact in facts]
        self.trials: dict[int, _Trial] = {}
        self.n = lm.anatomy.n_layers
        self.offsets = self._offsets()
        self.scorer = Scorer(lm, chat=method.config.chat, fluency=False)

    @property
    def starts(self) -> int:
        """How many places there are."""
        return self.n - max(self.offsets)

    def check(self, wanted: Sequence[int]) -> None:
        """Raise BadConfig if there is no such place."""
        outside = [start for start in wanted if not 0 <= start < self.starts]
        if outside or not wanted:
            what = "block" if len(self.offsets) == 1 else "window that begins at block"
            problem = f"there is no {what} {outside[0]}" if outside else "no block was given"
            raise BadConfig(f"{problem}: {self.lm.name} has 0 to {self.starts - 1}.\n  Give some of these.")

    def run(self, wanted: Sequence[int] | None, suggested: int | None, until: float | None) -> bool:
        """Try places until all that are wanted are tried, or the time is over: whether all were."""
        if wanted is not None:
            return self._try(list(dict.fromkeys(wanted)), until, len(set(wanted)))
        step = min(max(2, math.ceil(self.starts / _MOST_PLACES)), max(1, self.starts - 1))
        first = _spread(self.starts, step)
        if suggested is not None:
            # In the middle of its window, as far as the ends of the model allow.
            at = min(max(0, suggested - max(self.offsets) // 2), self.starts - 1)
            first = list(dict.fromkeys([*first, at]))
        planned = len(first) + 2 * math.ceil(math.log2(step)) if step > 1 else len(first)
        if not self._try(first, until, planned):
            return False
        while step > 1:
            step, best = math.ceil(step / 2), self.best()
            # Where no edit held anywhere there is nothing to look around.
            finer = range(0, self.starts, step) if best is None else (best - step, best + step)
            near = [at for at in finer if 0 <= at < self.starts and at not in self.trials]
            if not self._try(near, until, max(planned, len(self.trials) + len(near))):
                return False
        return True

    def best(self) -> int | None:
        """The first block of the best place so far."""
        found = _best(list(self.trials.values()), self.ids)
        return None if found is None else found.layers[0]

    def at(self, start: int) -> Method[Any]:
        """The method with its blocks set to the place that begins here."""
        config = self.method.config
        given = {name: getattr(config, name) for name in config.model_fields_set}
        layers = tuple(start + each for each in self.offsets)
        return type(self.method)(**{**given, self.field: layers if self.field == "layers" else layers[0]})

    def _try(self, starts: Sequence[int], until: float | None, planned: int) -> bool:
        for start in starts:
            kept = _read(self._key(start), _Trial)
            if kept is not None:
                self.trials[start] = kept
        missing = [start for start in starts if start not in self.trials]
        for chunk in self._with_moments(missing, until):
            for start in chunk:
                if until is not None and self.trials and time.monotonic() >= until:
                    return False
                self.trials[start] = self._trial(start, part(self.progress, len(self.trials), planned))
        return all(start in self.trials for start in starts)

    def _trial(self, start: int, progress: Progress) -> _Trial:
        method, begun = self.at(start), time.perf_counter()
        layers = tuple(start + each for each in self.offsets)
        try:
            method.prepare(self.lm, self.progress)
            self.scorer.baseline(self.facts, self.progress)
            units = {i: [fact] for i, fact in enumerate(self.facts)}
            outcomes = list(each_alone(self.lm, method, units, self.scorer, progress))
        except (AnatomyError, BadConfig, CannotEdit, SingularMoment) as error:
            # Not kept: what is wrong with the settings or the corpus may be mended without changing either's name.
            return _Trial(layers=layers, by_fact={}, refused=dict.fromkeys(self.ids, str(error)), seconds=0.0)
        cards = [outcome.card for outcome in outcomes if outcome.card is not None]
        trial = _Trial(
            layers=layers,
            by_fact=_by_fact(Scorecard.join(cards)) if cards else {},
            refused={outcome.edits[0]: outcome.reason for outcome in outcomes if outcome.reason},
            seconds=round(time.perf_counter() - begun, 3),
        )
        _write(self._key(start), trial)
        return trial

    def _with_moments(self, starts: Sequence[int], until: float | None) -> Iterator[Sequence[int]]:
        """The same places, in turns whose second moments are gathered in one pass each, where the method needs any."""
        config = self.method.resolve(self.lm)
        if not (isinstance(config, MomentConfig) and getattr(config, "covariance", True)):
            yield starts
            return
        widths = {start: self._width(start) for start in starts}
        if without := [start for start in starts if widths[start] is None]:
            yield without  # the method says what is wrong there
        starts = [start for start in starts if start not in without]
        width = max((width for width in widths.values() if width is not None), default=1)
        at_once = max(1, _MOMENTS_AT_ONCE // (8 * width * width * len(self.offsets)))
        for i in range(0, len(starts), at_once):
            if until is not None and self.trials and time.monotonic() >= until:
                return
            chunk = starts[i : i + at_once]
            second_moments(
                self.lm, sorted({start + each for start in chunk for each in self.offsets}), config, self.progress
            )
            yield chunk

    def _width(self, start: int) -> int | None:
        """Of the MLPs of a place; None where a block has none of its own."""
        try:
            return max(self.lm.anatomy.mlp_out(start + each).matrix.shape[1] for each in self.offsets)
        except AnatomyError:
            return None

    def _offsets(self) -> tuple[int, ...]:
        """The blocks of a place, counted from its first."""
        if self.field == "layer":
            return (0,)
        layers = getattr(self.method.resolve(self.lm), "layers", None)
        if layers is not None:
            offsets = tuple(sorted({each - min(layers) for each in layers}))
        else:
            # Only the method knows what it does by default, and it tells in its patch.
            key = self._common | {"what": "window", "config": self.method.resolve(self.lm).model_dump(mode="json")}
            found = _read(key, _Window)
            if found is None:
                found = self._usual()
                _write(key, found)
            offsets = found.offsets
        if self.n - max(offsets) < 2:
            raise BadConfig(
                f"{self.method.name} edits blocks in a window of {max(offsets) + 1} of the model's {self.n}, which fits in "
                "one place alone.\n"
                "  Give a window of the length wanted, wherever it lies, such as --set layers=0,1,2"
            )
        return offsets

    def _usual(self) -> _Window:
        made = (make(self.lm, self.method, [fact])[0] for fact in self.facts)
        patch = next((patch for patch in made if patch is not None), None)
        if patch is None:
            # For the method's own reason.
            patch = self.method.fit(self.lm, self.facts[:1])
        layers = patch.provenance.config.get("layers")
        if not layers:
            raise BadConfig(
                f"{self.method.name} does not tell which blocks it edits by default.\n"
                "  Give a window of the length wanted, wherever it lies, such as --set layers=0,1,2"
            )
        return _Window(offsets=tuple(sorted({each - min(layers) for each in layers})))

    @cached_property
    def _common(self) -> dict[str, object]:
        return _about(self.lm) | {
            "method": self.method.name,
            "facts": _hash_of(self.facts),
            "factpatch": version("factpatch"),
        }

    def _key(self, start: int) -> dict[str, object]:
        """All that the scores of a place depend on."""
        return self._common | {
            "what": "place",
            "config": self.at(start).resolve(self.lm).model_dump(mode="json"),
            "protocols": {protocol.name: protocol.version for protocol in PROTOCOLS.values()},
        }


def _field(method: Method[Any]) -> PlaceField:
    field = place_field(method.config_type)
    if field is None:
        raise CannotEdit(
            f"{method.name} does not choose a block to edit, so that there is nothing to locate.\n"
            "  Choose a method with a setting layer or layers: factpatch methods"
        )
    if isinstance(method, Learned):
        raise CannotEdit(
            f"{method.name} learns an editor for the blocks that it edits, so that it cannot be tried at others.\n"
            "  Choose a method that edits without one: factpatch methods"
        )
    if field == "layer" and field in method.config.model_fields_set and method.config.layer is not None:
        raise BadConfig(
            f"{method.name}, setting layer: it is what a sweep looks for.\n  Leave it out; --layers says which to try."
        )
    return field


def _drawn(method: Method[Any], pool: Sequence[Edit], limit: int, seed: int) -> tuple[Edit, ...]:
    """Facts to edit: changes of what is so, as these are what tracing traces; else whatever the method can make."""
    able = [
        edit
        for edit in pool
        if edit.kind in method.traits.kinds and not (method.traits.needs_subject and edit.subject is None)
    ]
    usable = [edit for edit in able if edit.kind == "modify"] or able
    if not usable or limit < 1:
        raise CannotEdit(
            f"{method.name} can make none of the {len(pool)} edits to draw facts from.\n"
            "  Give edits of other kinds, or with subjects."
        )
    return tuple(random.Random(seed).sample(usable, min(limit, len(usable))))  # noqa: S311 - a fair draw, no secret


def _traced(
    lm: LM, pool: Sequence[Edit], count: int, seed: int, chat: bool, progress: Progress
) -> tuple[Traced | None, str]:
    """Tracing over facts that the model knows; or why there is none."""
    if not count:
        return None, "not asked for"
    askable = [edit for edit in pool if edit.subject is not None and edit.ground_truth]
    facts = _known(lm, askable, count, seed, chat, progress)
    if not facts:
        return None, f"the model knows none of the {len(askable)} facts"
    key = _about(lm) | {
        "what": "trace",
        "facts": [[fact.prompt, fact.subject, fact.answer] for fact in facts],
        "samples": SAMPLES,
        "seed": seed,
        "chat": chat,
        "factpatch": version("factpatch"),
    }
    kept = _read(key, Traced)
    if kept is None:
        kept = _trace(lm, facts, seed, chat, progress)
        _write(key, kept)
    return kept, ""


def _known(lm: LM, askable: Sequence[Edit], count: int, seed: int, chat: bool, progress: Progress) -> list[Fact]:
    """So many facts that the model knows, drawn by the seed; of a great pool no more are asked than it takes."""
    if not askable:
        return []
    key = _about(lm) | {
        "what": "known",
        "pool": _hash_of(askable),
        "count": count,
        "seed": seed,
        "chat": chat,
        "factpatch": version("factpatch"),
    }
    kept = _read(key, _Known)
    if kept is None:
        order = random.Random(seed).sample(askable, len(askable))  # noqa: S311
        found: dict[str, Fact] = {}
        for start in range(0, len(order), _ASKED_AT_ONCE):
            progress("Asking what the model knows", start, len(order))
            for fact in known_facts(lm, order[start : start + _ASKED_AT_ONCE], chat=chat):
                found.setdefault(fact.prompt, fact)
            if len(found) >= count:
                break
        progress("Asking what the model knows", len(order), len(order))
        kept = _Known(facts=tuple((fact.prompt, fact.subject, fact.answer) for fact in list(found.values())[:count]))
        _write(key, kept)
    return [Fact(*each) for each in kept.facts]


def _trace(lm: LM, facts: Sequence[Fact], seed: int, chat: bool, progress: Progress) -> Traced:
    found = average(trace_all(lm, facts, part="mlp", samples=SAMPLES, seed=seed, chat=chat, progress=progress))
    return Traced(
        part=found.part,
        window=found.window,
        facts=len(facts),
        effects=tuple(found.effects[_SUBJECT_END].tolist()),
        suggested=suggested_layer(found),
    )


def _result(sweep: _Sweep, seed: int, traced: Traced | None, untraced: str, *, complete: bool) -> Located:
    trials = [sweep.trials[start] for start in sorted(sweep.trials)]
    if all(len(trial.refused) == len(sweep.facts) for trial in trials):
        reason = next(iter(trials[0].refused.values()))
        raise CannotEdit(f"{sweep.method.name} could edit none of the {len(sweep.facts)} facts at any place: {reason}")
    supports = _supports(trials, sweep.ids, seed)
    places = tuple(
        Place(
            layers=trial.layers,
            score=trial.score(sweep.ids),
            support=support,
            survey=trial.measures("survey", sweep.ids),
            open=trial.measures("open", sweep.ids),
            refused=trial.refused,
            seconds=trial.seconds,
            by_fact=trial.by_fact,
        )
        for trial, support in zip(trials, supports, strict=True)
    )
    best = _best(trials, sweep.ids)
    chosen = None if best is None else best.layers
    return Located(
        model=sweep.lm.name,
        fingerprint=sweep.lm.fingerprint,
        method=sweep.method.name,
        field=sweep.field,
        config=sweep.method.resolve(sweep.lm).model_dump(mode="json", exclude={sweep.field}),
        facts=tuple(sweep.ids),
        facts_sha256=_hash_of(sweep.facts),
        seed=seed,
        rule=RULE,
        places=places,
        complete=complete,
        chosen=chosen,
        traced=traced,
        untraced=untraced,
        agree=None if chosen is None or traced is None else traced.suggested in chosen,
        rank_correlation=None if traced is None else _agreement(places, traced.effects),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("factpatch", "torch", "transformers")},
    )


def _best(trials: Sequence[_Trial], facts: Sequence[str]) -> _Trial | None:
    """What RULE chooses over these facts, which may repeat; None where no place has a score above 0."""
    scored = [(trial, score) for trial in trials if (score := trial.score(facts))]
    best = min(
        scored,
        key=lambda each: (sum(fact in each[0].refused for fact in facts), -each[1], each[0].layers),
        default=None,
    )
    return None if best is None else best[0]


def _supports(trials: Sequence[_Trial], facts: Sequence[str], seed: int) -> list[float]:
    """For each place, the share of resamples of the facts in which it would be chosen."""
    draw = random.Random(seed)  # noqa: S311
    wins = Counter(
        best.layers for _ in range(_RESAMPLES) if (best := _best(trials, draw.choices(facts, k=len(facts)))) is not None
    )
    return [wins[trial.layers] / _RESAMPLES for trial in trials]


def _agreement(places: Sequence[Place], effects: Sequence[float]) -> float | None:
    pairs = [
        (place.score, fmean(effects[layer] for layer in place.layers)) for place in places if place.score is not None
    ]
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


def _spread(count: int, step: int) -> list[int]:
    """Every `step`-th of so many, in an order in which the first few lie far apart, in case there is no time for the rest."""
    # The more often a number can be halved, the earlier.
    return [step * i for i in sorted(range(math.ceil(count / step)), key=lambda i: (-(i & -i) if i else -count, i))]


def _mean(values: Mapping[str, float], facts: Sequence[str]) -> float | None:
    found = [values[fact] for fact in facts if fact in values]
    return sum(found) / len(found) if found else None


def _by_fact(card: Scorecard) -> ByFact:
    return {name: {role: card.per_edit(name, role) for role in _MEASURES.values()} for name in card.versions}


def _hash_of(edits: Sequence[Edit]) -> str:
    return hashlib.sha256(json.dumps([edit.to_json() for edit in edits], sort_keys=True).encode()).hexdigest()


def _about(lm: LM) -> dict[str, object]:
    return {"fingerprint": lm.fingerprint, "surroundings": lm.surroundings, "dtype": str(lm.dtype), "format": 1}


def _read(key: Mapping[str, object], kind: type[V]) -> V | None:
    """What was kept under this key; None if nothing was, or it is damaged."""
    try:
        return kind.model_validate_json(_path(key).read_bytes())
    except (OSError, ValidationError):
        return None


def _write(key: Mapping[str, object], value: BaseModel) -> None:
    with whole_file(_path(key)) as draft:
        draft.write_text(value.model_dump_json() + "\n", encoding="utf-8")


def _path(key: Mapping[str, object]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_root() / "located" / "places" / f"{name}.json"
