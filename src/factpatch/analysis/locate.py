"""Which block to edit: a sweep over a few facts, beside what causal tracing suggests.

Tracing says where restoring a state brings a fact back; whether a fact is best edited there is another question, and the
two were found to be nearly unrelated (Hase et al. 2023, arXiv 2301.04213). So the choice is made by editing, and tracing's
curve is laid beside it.

Every fact that is traced and every place that is tried is kept in the cache as soon as it is done. A sweep that was
stopped, or that is asked for more places, goes on from there.
"""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from factpatch.analysis.base import Result, digest, packages
from factpatch.analysis.facts import Fact, known_facts
from factpatch.analysis.locate_result import (
    MEASURES,
    RULE,
    Located,
    Measures,
    Place,
    Stopped,
    Traced,
    Trial,
    best_of,
    rank_correlation,
    supports,
)
from factpatch.analysis.tracing import shares, trace
from factpatch.bench.singles import each_alone, make
from factpatch.data import read
from factpatch.edits import Edit
from factpatch.errors import AnatomyError, BadConfig, CannotEdit, SingularMoment
from factpatch.files import cache_root, whole_file
from factpatch.lm import LM
from factpatch.methods import Method, create, located
from factpatch.methods.base import Config
from factpatch.methods.learning import Learned
from factpatch.methods.located import Choice, PlaceField, place_field
from factpatch.methods.moments import MomentConfig, second_moments
from factpatch.progress import Progress, part, silent
from factpatch.scoring import Scorecard, Scorer
from factpatch.scoring.protocols import PROTOCOLS
from factpatch.words import counted

__all__ = ["RULE", "Located", "Measures", "Place", "Traced", "keep", "locate", "outline"]

FACTS, TRACED, SAMPLES = 8, 24, 10
"""Facts that are edited at each place, facts that are traced, and draws of noise for each of the latter, by default."""

_TRACING_SHARE = 0.25
"""Of the time that is given, at most."""
_MOST_PLACES = 16
"""In the first, coarse round, where nobody says otherwise."""
_ASKED_AT_ONCE = 64
"""Facts that the model is asked whether it knows them, until enough are known."""
_MOMENTS_AT_ONCE = 2 << 30
"""Bytes that the sums of second moments gathered in one pass may take."""
_ORDINALS = {2: "second", 3: "third", 4: "fourth", 5: "fifth"}
_GIVE_A_WINDOW = "  Give a window of the length wanted, wherever it lies, such as --set layers=0,1,2"

V = TypeVar("V", bound=BaseModel)


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
    interruptible: bool = False,
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
    seconds  for all of it, of which tracing takes a quarter at most; no limit by default. What is found by then is the result,
            and whatever is being done is left at its next step: at the end of an edit, or of a batch
    seed    decides which facts are drawn, and the noise of tracing
    interruptible  whether a KeyboardInterrupt ends it as the end of the time does, rather than being raised

    Tracing asks in the way in which the method edits, plainly or in the chat template. A place without an MLP of its own,
    such as a mixture of experts, is told as refused.

    Raises CannotEdit if the method can make none of these edits or chooses no block; BadConfig for blocks that are not
    there or settings at odds with a sweep; AnatomyError, TokenizerError, OutputError (the cache).
    """
    maker = create(method) if isinstance(method, str) else method
    field = _field(maker)
    pool = read("sample").edits if edits is None else tuple(edits)
    facts = _drawn(maker, pool, limit, seed)
    clock = _Clock(seconds)
    found, untraced = None, "it was stopped before that"
    stopped: Stopped | None = None
    with lm.unpatched():
        sweep = _Sweep(lm, maker, field, facts, clock, progress)
        try:
            sweep.check(layers)
            found, untraced = _traced(lm, pool, traced, seed, maker.config.chat, clock, progress)
            sweep.run(layers, None if found is None else found.suggested)
        except _TimeIsUp:
            stopped = "time"
        except KeyboardInterrupt:
            if not interruptible:
                raise
            stopped = "interrupt"
    return _result(sweep, seed, found, untraced, stopped)


def outline(
    lm: LM,
    method: Method[Any],
    *,
    layers: Sequence[int] | None = None,
    limit: int = FACTS,
    traced: int = TRACED,
    seconds: float | None = None,
) -> str:
    """What `locate` will do with these arguments, in a few sentences, for those who wait for it."""
    several = place_field(method.config_type) == "layers"
    blocks, step = lm.anatomy.n_layers, _coarse(lm.anatomy.n_layers)
    if layers is not None:
        where = f"{counted(len(set(layers)), 'window')} of blocks" if several else counted(len(set(layers)), "block")
    else:
        every = (
            f"every {_ORDINALS.get(step, f'{step}th')} of the {blocks} blocks" if step > 1 else f"all {blocks} blocks"
        )
        where = f"{'windows that begin at ' if several else ''}{every}" + (", then around the best" if step > 1 else "")
    told = [f"causal tracing of up to {counted(traced, 'fact')} that the model knows"] if traced else []
    told.append(f"up to {counted(limit, 'fact')} edited with {method.name}, one at a time, at {where}")
    said = f"{lm.name}: {', then '.join(told)}."
    if _needs_moments(method.resolve(lm)):
        said += f" {method.name} needs second moments of the keys of each of these blocks, which are measured once."
    if seconds is not None:
        least = f", of which tracing takes {_minutes(_TRACING_SHARE * seconds)} at most" if traced else ""
        said += f" It takes {_minutes(seconds)} at most{least}; what is found by then is kept."
    return said


def keep(lm: LM, found: Located) -> Path | None:
    """Keep the choice for models nobody has tuned, as `methods.located` says; where, or None if it is not kept.

    It is not if nothing was chosen, or if it is preliminary and there is a choice for this method already. Raises
    OutputError.
    """
    if found.chosen is None:
        return None
    choice = Choice(layers=found.chosen, made=found.model_dump(mode="json"))
    return located.keep(lm, found.method, choice, replace=not found.preliminary)


class _Known(Result):
    """Facts of a pool that the model knows: prompt, subject and answer."""

    facts: tuple[tuple[str, str, str], ...]


class _Window(Result):
    """Which blocks a method edits together, counted from the first."""

    offsets: tuple[int, ...]

    @classmethod
    def of(cls, layers: Sequence[int]) -> _Window:
        """From where the blocks lie, in whatever order."""
        return cls(offsets=tuple(sorted({each - min(layers) for each in layers})))


class _TimeIsUp(Exception):
    """Nobody's fault, and seen by nobody outside."""


class _Clock:
    """The time that is given, or a part of it; without end if none is."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.until = math.inf if seconds is None else time.monotonic() + seconds

    def part(self, share: float) -> _Clock:
        """From now on, a share of the whole and no more than what is left of it."""
        own = _Clock(None if self.seconds is None else share * self.seconds)
        own.until = min(own.until, self.until)
        return own

    def check(self) -> None:
        """Raise _TimeIsUp if it is."""
        if time.monotonic() >= self.until:
            raise _TimeIsUp

    def watching(self, progress: Progress) -> Progress:
        """Progress that looks at the clock at each step; what is done by then is not thrown away at its last one."""

        def report(doing: str, done: int, total: int | None) -> None:
            progress(doing, done, total)
            if done != total:
                self.check()

        return report


class _Sweep:
    """Places tried with one method, by their first block."""

    def __init__(
        self,
        lm: LM,
        method: Method[Any],
        field: PlaceField,
        facts: tuple[Edit, ...],
        clock: _Clock,
        progress: Progress,
    ) -> None:
        self.lm, self.method, self.field, self.facts = lm, method, field, facts
        self.clock, self.progress = clock, progress
        self.ids = [fact.id for fact in facts]
        self.trials: dict[int, Trial] = {}
        self.n = lm.anatomy.n_layers
        self.scorer = Scorer(lm, chat=method.config.chat, fluency=False)

    @property
    def starts(self) -> int:
        """How many places there are."""
        return self.n - max(self.offsets)

    def check(self, wanted: Sequence[int] | None) -> None:
        """Raise BadConfig if there is no such place, or the method has but one."""
        outside = [start for start in wanted or () if not 0 <= start < self.starts]
        if outside or (wanted is not None and not wanted):
            what = "block" if len(self.offsets) == 1 else "window that begins at block"
            problem = f"there is no {what} {outside[0]}" if outside else "no block was given"
            raise BadConfig(f"{problem}: {self.lm.name} has 0 to {self.starts - 1}.\n  Give some of these.")

    def run(self, wanted: Sequence[int] | None, suggested: int | None) -> None:
        """Try places until all that are wanted are tried. Raises _TimeIsUp."""
        if wanted is not None:
            self._try(list(dict.fromkeys(wanted)), len(set(wanted)))
            return
        step = _coarse(self.starts)
        first = _spread(self.starts, step)
        if suggested is not None:
            # In the middle of its window, as far as the ends of the model allow.
            at = min(max(0, suggested - max(self.offsets) // 2), self.starts - 1)
            first = list(dict.fromkeys([*first, at]))
        planned = len(first) + 2 * math.ceil(math.log2(step)) if step > 1 else len(first)
        self._try(first, planned)
        while step > 1:
            step, best = math.ceil(step / 2), best_of(list(self.trials.values()), self.ids)
            # Where no edit held anywhere there is nothing to look around.
            finer = range(0, self.starts, step) if best is None else (best.layers[0] - step, best.layers[0] + step)
            near = [at for at in finer if 0 <= at < self.starts and at not in self.trials]
            self._try(near, max(planned, len(self.trials) + len(near)))

    def layers(self, start: int) -> tuple[int, ...]:
        """The blocks of the place that begins here."""
        return tuple(start + each for each in self.offsets)

    def at(self, start: int) -> Method[Any]:
        """The method with its blocks set to the place that begins here."""
        config = self.method.config
        given = {name: getattr(config, name) for name in config.model_fields_set}
        return type(self.method)(**{**given, self.field: self.layers(start) if self.field == "layers" else start})

    def _try(self, starts: Sequence[int], planned: int) -> None:
        for start in starts:
            kept = _read(self._key(start), Trial)
            if kept is not None:
                self.trials[start] = kept
        for chunk in self._with_moments([start for start in starts if start not in self.trials]):
            for start in chunk:
                self.clock.check()
                watched = self.clock.watching(part(self.progress, len(self.trials), planned))
                self.trials[start] = self._trial(start, watched)

    def _trial(self, start: int, progress: Progress) -> Trial:
        method, layers, begun = self.at(start), self.layers(start), time.perf_counter()
        try:
            method.prepare(self.lm, self.clock.watching(self.progress))
            self.scorer.baseline(self.facts, self.clock.watching(self.progress))
            units = {i: [fact] for i, fact in enumerate(self.facts)}
            outcomes = list(each_alone(self.lm, method, units, self.scorer, progress))
        except (AnatomyError, BadConfig, CannotEdit, SingularMoment) as error:
            # Not kept: what is wrong with the settings or the corpus may be mended without changing either's name.
            return Trial(layers=layers, by_fact={}, refused=dict.fromkeys(self.ids, str(error)), seconds=0.0)
        cards = [outcome.card for outcome in outcomes if outcome.card is not None]
        card = Scorecard.join(cards) if cards else None
        trial = Trial(
            layers=layers,
            by_fact={name: {role: card.per_edit(name, role) for role in MEASURES.values()} for name in card.versions}
            if card
            else {},
            refused={outcome.edits[0]: outcome.reason for outcome in outcomes if outcome.reason},
            seconds=round(time.perf_counter() - begun, 3),
        )
        _write(self._key(start), trial)
        return trial

    def _with_moments(self, starts: Sequence[int]) -> Iterator[Sequence[int]]:
        """The same places, in turns whose second moments are gathered in one pass each, where the method needs any.

        One pass for many blocks takes less time in all; but where the time is limited it might be over before any block was
        tried, so that each block's are measured when it is its turn.
        """
        config = self.method.resolve(self.lm)
        if self.clock.seconds is not None or not _needs_moments(config):
            yield starts
            return
        assert isinstance(config, MomentConfig)
        widths = {start: self._width(start) for start in starts}
        if without := [start for start in starts if widths[start] is None]:
            yield without  # the method says what is wrong there
        starts = [start for start in starts if start not in without]
        width = max((width for width in widths.values() if width is not None), default=1)
        at_once = max(1, _MOMENTS_AT_ONCE // (8 * width * width * len(self.offsets)))
        for i in range(0, len(starts), at_once):
            chunk = starts[i : i + at_once]
            second_moments(self.lm, sorted({at for start in chunk for at in self.layers(start)}), config, self.progress)
            yield chunk

    def _width(self, start: int) -> int | None:
        """Of the MLPs of a place; None where a block has none of its own."""
        try:
            return max(self.lm.anatomy.mlp_out(layer).matrix.shape[1] for layer in self.layers(start))
        except AnatomyError:
            return None

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The blocks of a place, counted from its first. Raises BadConfig, _TimeIsUp."""
        if self.field == "layer":
            return (0,)
        layers = getattr(self.method.resolve(self.lm), "layers", None)
        if layers is not None:
            window = _Window.of(layers)
        else:
            # Only the method knows what it does by default, and it tells in its patch.
            key = self._common | {"what": "window", "config": self.method.resolve(self.lm).model_dump(mode="json")}
            window = _once(key, _Window, self._usual)
        if self.n - max(window.offsets) < 2:
            raise BadConfig(
                f"{self.method.name} edits blocks in a window of {max(window.offsets) + 1} of the model's {self.n}, which "
                f"fits in one place alone.\n{_GIVE_A_WINDOW}"
            )
        return window.offsets

    def _usual(self) -> _Window:
        self.method.prepare(self.lm, self.clock.watching(self.progress))
        made = (make(self.lm, self.method, [fact])[0] for fact in self.facts)
        patch = next((patch for patch in made if patch is not None), None)
        if patch is None:
            # For the method's own reason.
            patch = self.method.fit(self.lm, self.facts[:1])
        layers = patch.provenance.config.get("layers")
        if not layers:
            raise BadConfig(f"{self.method.name} does not tell which blocks it edits by default.\n{_GIVE_A_WINDOW}")
        return _Window.of(layers)

    @cached_property
    def _common(self) -> dict[str, object]:
        return _about(self.lm) | {"method": self.method.name, "facts": _hash_of(self.facts)}

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
    lm: LM, pool: Sequence[Edit], count: int, seed: int, chat: bool, clock: _Clock, progress: Progress
) -> tuple[Traced | None, str]:
    """Tracing over facts that the model knows, of which those count that there is time for; or why there is none."""
    if not count:
        return None, "not asked for"
    clock = clock.part(_TRACING_SHARE)
    askable = [edit for edit in pool if edit.subject is not None and edit.ground_truth]
    try:
        facts = _known(lm, askable, count, seed, chat, clock.watching(progress))
    except _TimeIsUp:
        return None, "there was no time for it"
    if not facts:
        return None, f"the model knows none of the {len(askable)} facts"
    found = _trace(lm, facts, seed, chat, clock, progress)
    return found, "" if found else "there was no time for it"


def _known(lm: LM, askable: Sequence[Edit], count: int, seed: int, chat: bool, progress: Progress) -> list[Fact]:
    """So many facts that the model knows, drawn by the seed; of a great pool no more are asked than it takes."""
    if not askable:
        return []
    key = _about(lm) | {"what": "known", "pool": _hash_of(askable), "count": count, "seed": seed, "chat": chat}

    def ask() -> _Known:
        order = random.Random(seed).sample(askable, len(askable))  # noqa: S311
        found: dict[str, Fact] = {}
        for start in range(0, len(order), _ASKED_AT_ONCE):
            progress("Asking what the model knows", start, len(order))
            for fact in known_facts(lm, order[start : start + _ASKED_AT_ONCE], chat=chat):
                found.setdefault(fact.prompt, fact)
            if len(found) >= count:
                break
        progress("Asking what the model knows", len(order), len(order))
        return _Known(facts=tuple((fact.prompt, fact.subject, fact.answer) for fact in list(found.values())[:count]))

    return [Fact(*each) for each in _once(key, _Known, ask).facts]


class _FactTraced(Result):
    """What tracing found of one fact: the effect of each block's MLP at the subject's last token, where ROME finds it."""

    part: str
    window: int
    effects: tuple[float, ...]


def _trace(lm: LM, facts: Sequence[Fact], seed: int, chat: bool, clock: _Clock, progress: Progress) -> Traced | None:
    """The average over facts; over the first of them if the time is up, and None if that is before the first is done."""
    found: list[_FactTraced] = []
    try:
        for fact, told in zip(facts, shares(lm, facts, clock.watching(progress), chat=chat), strict=True):
            found.append(_trace_one(lm, fact, seed, chat, clock, told))
    except _TimeIsUp:
        if not found:
            return None
    effects = tuple(fmean(column) for column in zip(*(one.effects for one in found), strict=True))
    return Traced(
        part=found[0].part,
        window=found[0].window,
        facts=len(found),
        of=len(facts),
        effects=effects,
        suggested=max(range(len(effects)), key=effects.__getitem__),
    )


def _trace_one(lm: LM, fact: Fact, seed: int, chat: bool, clock: _Clock, progress: Progress) -> _FactTraced:
    key = _about(lm) | {
        "what": "trace",
        "fact": [fact.prompt, fact.subject, fact.answer],
        "samples": SAMPLES,
        "seed": seed,
        "chat": chat,
    }

    def ask() -> _FactTraced:
        clock.check()
        own = trace(lm, fact, part="mlp", samples=SAMPLES, seed=seed, chat=chat, progress=progress)
        return _FactTraced(part=own.part, window=own.window, effects=tuple(own.effects[own.subject[1] - 1].tolist()))

    return _once(key, _FactTraced, ask)


def _result(sweep: _Sweep, seed: int, traced: Traced | None, untraced: str, stopped: Stopped | None) -> Located:
    trials = [sweep.trials[start] for start in sorted(sweep.trials)]
    if trials and all(len(trial.refused) == len(sweep.facts) for trial in trials):
        reason = next(iter(trials[0].refused.values()))
        raise CannotEdit(f"{sweep.method.name} could edit none of the {len(sweep.facts)} facts at any place: {reason}")
    places = tuple(
        Place(
            layers=trial.layers,
            score=trial.score(sweep.ids),
            survey_score=trial.score(sweep.ids, "survey"),
            support=support,
            survey=trial.measures("survey", sweep.ids),
            open=trial.measures("open", sweep.ids),
            refused=trial.refused,
            seconds=trial.seconds,
            by_fact=trial.by_fact,
        )
        for trial, support in zip(trials, supports(trials, sweep.ids, seed), strict=True)
    )
    best = best_of(trials, sweep.ids)
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
        stopped=stopped,
        chosen=chosen,
        traced=traced,
        untraced=untraced,
        agree=None if chosen is None or traced is None else traced.suggested in chosen,
        rank_correlation=None if traced is None else rank_correlation(places, traced.effects),
        versions={"python": platform.python_version()} | packages(),
    )


def _needs_moments(config: Config) -> bool:
    return isinstance(config, MomentConfig) and bool(getattr(config, "covariance", True))


def _coarse(starts: int) -> int:
    """Of so many places, every which one is tried first."""
    return min(max(2, math.ceil(starts / _MOST_PLACES)), max(1, starts - 1))


def _minutes(seconds: float) -> str:
    if seconds < 60:
        return counted(round(seconds), "second")
    return f"{seconds / 60:.3g} minute{'' if seconds == 60 else 's'}"


def _spread(count: int, step: int) -> list[int]:
    """Every `step`-th of so many, in an order in which the first few lie far apart, in case there is no time for the rest."""
    # The more often a number can be halved, the earlier.
    return [step * i for i in sorted(range(math.ceil(count / step)), key=lambda i: (-(i & -i) if i else -count, i))]


def _hash_of(edits: Sequence[Edit]) -> str:
    return digest([edit.to_json() for edit in edits])


def _about(lm: LM) -> dict[str, object]:
    return {
        "fingerprint": lm.fingerprint,
        "surroundings": lm.surroundings,
        "dtype": str(lm.dtype),
        "format": 1,
        "factpatch": version("factpatch"),
    }


def _once(key: Mapping[str, object], kind: type[V], make: Callable[[], V]) -> V:
    """What was kept under this key; made, and kept, if nothing was."""
    found = _read(key, kind)
    if found is None:
        found = make()
        _write(key, found)
    return found


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
    return cache_root() / "located" / "places" / f"{digest(key)[:32]}.json"
