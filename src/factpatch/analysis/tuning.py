"""Settings for a model that nobody has tuned: a search on some facts within a time, judged on others.

From the settings that the method has for the model now, one or two are changed at a time by chance, and a change is kept if it
does better on the search's facts. What wins is then held against the start on facts that the search has not seen, because
the best of many tries is partly the luckiest.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import ValidationError

from factpatch.analysis.base import Result, packages
from factpatch.bench.singles import each_alone
from factpatch.edits import Edit, first_problem
from factpatch.errors import AnatomyError, BadConfig, BadFile, CannotEdit, SingularMoment
from factpatch.files import whole_file
from factpatch.lm import LM
from factpatch.methods import Method, create
from factpatch.methods.base import Config
from factpatch.methods.learning import Learned
from factpatch.methods.located import place_field
from factpatch.methods.moments import MomentConfig
from factpatch.progress import Progress, silent
from factpatch.scoring import Scorecard, Scorer, ScoreRole
from factpatch.scoring.metrics import taken_together

__all__ = ["FACTS", "RULE", "Preset", "Trial", "Tuned", "read_preset", "tune"]

FACTS = 8
"""For the search, and as many others to judge it."""
RULE = "harmonic mean of edit success, rephrase and locality when the model answers by itself; what is not scored is left out"

_ROLES: tuple[ScoreRole, ...] = ("edit", "rephrase", "locality")
_FOR_BATCHES = frozenset({"batch_size", "save_every", "most"})
"""Settings that change nothing, or little, where each edit is made alone."""
_STUCK = 200
"""Changes in a row that were tried before, after which nothing new is expected."""


class Trial(Result):
    """One choice of settings on some facts.

    settings  those that differ from the start
    score     see `RULE`; 0 where no edit could be made
    measures  edit, rephrase and locality; None where nothing could be scored
    reason    why no edit could be made; empty if any was
    """

    settings: dict[str, Any]
    score: float
    measures: dict[str, float | None]
    seconds: float
    reason: str = ""


class Preset(Result):
    """Settings of a method that serve a model, and where they come from; `--set @FILE` reads it.

    settings  those that differ from the method's defaults
    made      by the search: facts, rule, scores on facts that it had not seen, seed, time, versions
    """

    format: Literal[1] = 1
    method: str
    model: str
    fingerprint: str
    settings: dict[str, Any]
    made: dict[str, Any]

    def save(self, path: Path) -> Path:
        """Write it as JSON. Raises OutputError."""
        with whole_file(path) as draft:
            draft.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return path


class Tuned(Result):
    """What the search found.

    start, best    on the facts of the search; the start is the best if nothing has a higher score
    held_start, held_best  the same two on the others
    trials         all that was tried, in turn
    """

    method: str
    model: str
    fingerprint: str
    start: Trial
    best: Trial
    held_start: Trial
    held_best: Trial
    trials: tuple[Trial, ...]
    facts: tuple[str, ...]
    held: tuple[str, ...]
    seed: int
    preset: Preset

    @property
    def changed(self) -> bool:
        """Whether any settings did better than the start in the search."""
        return self.best.settings != self.start.settings

    @property
    def better(self) -> bool:
        """Whether what was found does better than the start on facts that the search has not seen."""
        return self.held_best.score > self.held_start.score


def tune(
    lm: LM,
    method: str | Method[Any],
    edits: Sequence[Edit],
    *,
    seconds: float = 600,
    limit: int = FACTS,
    seed: int = 0,
    progress: Progress = silent,
) -> Tuned:
    """Search a method's settings for a model.

    method   settings that are given with it are not changed
    edits    facts to draw from: `limit` for the search, as many others to judge it
    seconds  after which nothing new is tried; judging comes on top

    The model is left as it was. If nothing does better on the facts held back, the preset is the start. Raises CannotEdit if the
    method can make too few of these edits or learns an editor, BadConfig if it has no setting to search, and what `fit` raises
    at the start.
    """
    maker = create(method) if isinstance(method, str) else method
    if isinstance(maker, Learned):
        raise CannotEdit(
            f"{maker.name} learns an editor; its settings are those of a training.\n  See: factpatch train"
        )
    search = _Search(lm, maker, edits, limit, seed, progress)
    start = search.trial({}, search.facts)
    if start.reason:
        raise CannotEdit(start.reason)
    trials, best, began, stuck = [start], start, time.monotonic(), 0
    tried = {_key({})}
    while (spent := time.monotonic() - began) < seconds and stuck < _STUCK:
        progress("Searching settings", round(spent), round(seconds))
        settings = search.changed(best.settings)
        if _key(settings) in tried:
            stuck += 1
            continue
        stuck = 0
        tried.add(_key(settings))
        found = search.trial(settings, search.facts)
        trials.append(found)
        if found.score > best.score:
            best = found
    progress("Searching settings", 1, 1)
    held = [search.trial(start.settings, search.held)]
    held.append(held[0] if best is start else search.trial(best.settings, search.held))
    winner = best.settings if held[1].score > held[0].score else {}
    return Tuned(
        method=maker.name,
        model=lm.name,
        fingerprint=lm.fingerprint,
        start=start,
        best=best,
        held_start=held[0],
        held_best=held[1],
        trials=tuple(trials),
        facts=tuple(edit.id for edit in search.facts),
        held=tuple(edit.id for edit in search.held),
        seed=seed,
        preset=search.preset(winner, held, len(trials), seed),
    )


def read_preset(path: Path) -> Preset:
    """A preset that `tune` wrote. Raises BadFile."""
    try:
        return Preset.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file.\n  Make one: factpatch tune") from None
    except ValidationError as error:
        field, problem = first_problem(error)
        raise BadFile(f'{path}, "{field}": {problem}\n  Expected a preset, as factpatch tune writes it.') from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(
            f"{path}: cannot be read ({str(error).splitlines()[0]}).\n  Make it again: factpatch tune"
        ) from None


class _Search:
    """One method on one model, with the facts it is tried on."""

    def __init__(
        self, lm: LM, method: Method[Any], edits: Sequence[Edit], limit: int, seed: int, progress: Progress
    ) -> None:
        self.lm, self.method, self.progress = lm, method, progress
        self.base = method.resolve(lm)
        self.random = random.Random(seed)  # noqa: S311 - a search, no secret
        usable = [edit for edit in edits if _can(method, edit)]
        if len(usable) < 4 or limit < 1:
            raise CannotEdit(
                f"{method.name} can make {len(usable)} of these {len(edits)} edits; a search takes four at least, and one "
                "to search with.\n  Give more: --data, --limit"
            )
        drawn = self.random.sample(usable, min(2 * limit, len(usable) // 2 * 2))
        self.facts, self.held = tuple(drawn[::2]), tuple(drawn[1::2])
        self.scorer = Scorer(lm, protocols=["open"], fluency=False, chat=method.config.chat)
        self.names = self._searchable()
        if not self.names:
            raise BadConfig(f"{method.name} has no setting that a search could change.")

    def _searchable(self) -> list[str]:
        """Numbers, and the place, but for what was given and what serves other ends."""
        aside = {*Config.model_fields, *MomentConfig.model_fields, *_FOR_BATCHES, *self.method.config.model_fields_set}
        names = [name for name in type(self.base).model_fields if name not in aside]
        place = place_field(type(self.base))
        return [name for name in names if name == place or _is_number(getattr(self.base, name))]

    def changed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The same with one setting or two drawn anew."""
        found = dict(settings)
        for name in self.random.sample(self.names, min(len(self.names), self.random.choice((1, 1, 2)))):
            value = found.get(name, getattr(self.base, name))
            new = self._place(name, value) if name == place_field(type(self.base)) else self._number(value)
            if new is not None and new != value:
                found[name] = new
        return {name: value for name, value in found.items() if value != getattr(self.base, name)}

    def _place(self, name: str, value: Any) -> Any:
        blocks = self.lm.anatomy.n_layers
        if name == "layer":
            return self.random.randrange(blocks)
        if not value:
            return None  # the method's own choice, of which only it knows how many blocks there are
        shift = self.random.randint(-min(value), blocks - 1 - max(value))
        return tuple(each + shift for each in value)

    def _number(self, value: Any) -> Any:
        """Up to fourfold more or less, on a scale of ratios; of whole numbers twofold."""
        if value == 0:
            return None
        if isinstance(value, int):
            return max(1, round(value * 2 ** self.random.uniform(-1, 1)))
        return float(f"{value * 4 ** self.random.uniform(-1, 1):.2g}")

    def trial(self, settings: Mapping[str, Any], facts: Sequence[Edit]) -> Trial:
        """How these settings do; what the method refuses under them scores nothing."""
        started, own = time.monotonic(), dict(settings)
        try:
            given = self.method.config.model_dump(include=self.method.config.model_fields_set)
            method = type(self.method)(**{**self.base.model_dump(), **given, **own})
            outcomes = list(each_alone(self.lm, method, {i: [fact] for i, fact in enumerate(facts)}, self.scorer))
        except (AnatomyError, BadConfig, CannotEdit, SingularMoment) as error:
            return Trial(settings=own, score=0.0, measures={}, seconds=0.0, reason=str(error).splitlines()[0])
        cards = [outcome.card for outcome in outcomes if outcome.card is not None]
        seconds = round(time.monotonic() - started, 3)
        if not cards:
            return Trial(settings=own, score=0.0, measures={}, seconds=seconds, reason=outcomes[0].reason)
        measures = _measures(Scorecard.join(cards), facts)
        score = taken_together(*(measures[role] for role in _ROLES)) or 0.0
        return Trial(settings=own, score=score, measures=measures, seconds=seconds)

    def preset(self, settings: Mapping[str, Any], held: Sequence[Trial], tried: int, seed: int) -> Preset:
        """Everything in which these settings differ from the method's defaults."""
        plain = type(self.base)().model_dump(mode="json")
        whole = self.base.model_copy(update=dict(settings)).model_dump(mode="json", exclude={"chat", "seed"})
        return Preset(
            method=self.method.name,
            model=self.lm.name,
            fingerprint=self.lm.fingerprint,
            settings={name: value for name, value in whole.items() if value != plain[name]},
            made={
                "by": "factpatch tune",
                "rule": RULE,
                "tried": tried,
                "facts": [edit.id for edit in self.facts],
                "judged_on": [edit.id for edit in self.held],
                "score_before": held[0].score,
                "score": max(each.score for each in held),
                "seed": seed,
                "versions": packages(),
            },
        )


def _can(method: Method[Any], edit: Edit) -> bool:
    try:
        method.check([edit])
    except CannotEdit:
        return False
    return edit.kind in {"insert", "modify"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value != 0


def _measures(card: Scorecard, facts: Sequence[Edit]) -> dict[str, float | None]:
    """Over all facts: one that could not be made has no success."""
    found: dict[str, float | None] = {}
    for role in _ROLES:
        own = card.per_edit("open", role)
        values = [own.get(edit.id, 0.0) for edit in facts] if role == "edit" else list(own.values())
        found[role] = fmean(values) if values else None
    return found


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)
