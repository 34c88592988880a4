"""Patches made and scored each alone: the setting of the survey's Table 4."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from factpatch.bench.outcome import ALONE, Outcome, watching_memory
from factpatch.edits import Edit
from factpatch.errors import CannotEdit, TokenizerError
from factpatch.lm import LM, BaseLM
from factpatch.methods import Method
from factpatch.patches import Patch
from factpatch.progress import Progress, silent
from factpatch.scoring import Scorecard, Scorer

__all__ = ["ABREAST", "Failure", "Singles", "each_alone", "make", "score_singly"]

ABREAST = 16
"""How many patches are scored at once, where there is room; see `LM.abreast`."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An edit the method refused, and why."""

    edit: str
    reason: str


@dataclass(frozen=True, slots=True)
class Singles:
    """The joint scorecard of edits made alone, and those that could not be made.

    prepare_seconds  wall time of what the method computed once for the model
    """

    card: Scorecard | None
    failures: tuple[Failure, ...]
    prepare_seconds: float


def make(lm: BaseLM, method: Method[Any], edits: Sequence[Edit]) -> tuple[Patch | None, Outcome]:
    """One patch, not scored yet; what the method refuses is told as the reason.

    What is wrong with the model, the settings or the cache is raised.
    """
    ids, begun = tuple(edit.id for edit in edits), time.perf_counter()
    device = lm.device if isinstance(lm, LM) else torch.device("cpu")
    try:
        with watching_memory(device) as memory:
            patch = method.fit(lm, edits)
    except (CannotEdit, TokenizerError) as error:
        return None, Outcome(0, ALONE, ids, None, reason=str(error))
    seconds = round(time.perf_counter() - begun, 3)
    return patch, Outcome(0, ALONE, ids, None, fit_seconds=seconds, peak_memory_mb=memory.peak_mb)


def each_alone(
    lm: BaseLM,
    method: Method[Any],
    units: Mapping[int, Sequence[Edit]],
    scorer: Scorer,
    progress: Progress = silent,
) -> Iterator[Outcome]:
    """Make a patch of each unit, and score it on the model by itself; some at a time side by side.

    units  by number, the edits of each patch
    """
    doing, numbers = f"Editing and scoring with {method.name}", list(units)
    for start in range(0, len(numbers), ABREAST):
        made = []
        for done, number in enumerate(numbers[start : start + ABREAST], start):
            progress(doing, done, len(numbers))
            made.append((number, units[number], *make(lm, method, units[number])))
        patches = [(edits, patch) for _, edits, patch, _ in made if patch is not None]
        cards = iter(scorer.score_each([edits for edits, _ in patches], [(patch,) for _, patch in patches]))
        for number, _, patch, outcome in made:
            card = next(cards).model_copy(update={"fit_seconds": outcome.fit_seconds}) if patch is not None else None
            yield replace(outcome, number=number, card=card)
    progress(doing, len(units), len(units))


def score_singly(
    lm: BaseLM, method: Method[Any], edits: Sequence[Edit], scorer: Scorer, progress: Progress = silent
) -> Singles:
    """Fit, lay on, score and take off each edit by itself.

    An edit that the method refuses is listed as a failure and the rest goes on; what is wrong with the model, the settings
    or the cache is raised.
    """
    started = time.perf_counter()
    method.prepare(lm, progress)
    prepared = time.perf_counter() - started
    scorer.baseline(edits, progress)
    baseline = time.perf_counter() - started - prepared
    outcomes = list(each_alone(lm, method, {i: [edit] for i, edit in enumerate(edits)}, scorer, progress))
    cards = [outcome.card for outcome in outcomes if outcome.card is not None]
    card = Scorecard.join(cards).model_copy(update={"baseline_seconds": round(baseline, 3)}) if cards else None
    failures = tuple(Failure(outcome.edits[0], outcome.reason) for outcome in outcomes if outcome.reason)
    return Singles(card, failures, round(prepared, 3))
