"""Each edit made and scored alone: the setting of the survey's Table 4."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from factpatch.edits import Edit
from factpatch.errors import CannotEdit, TokenizerError
from factpatch.lm import BaseLM
from factpatch.methods import Method
from factpatch.patches import Patch
from factpatch.progress import Progress, silent
from factpatch.scoring import Scorecard, Scorer

__all__ = ["ABREAST", "Failure", "Singles", "score_singly"]

ABREAST = 8
"""How many edits are scored at once. Each lane holds a copy of the weights that its patch touches."""


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
    cards: list[Scorecard] = []
    failures: list[Failure] = []
    doing = f"Editing and scoring with {method.name}"
    for start in range(0, len(edits), ABREAST):
        made: list[tuple[Edit, Patch, float]] = []
        for i, edit in enumerate(edits[start : start + ABREAST], start):
            progress(doing, i, len(edits))
            begun = time.perf_counter()
            try:
                patch = method.fit(lm, [edit])
                made.append((edit, patch, round(time.perf_counter() - begun, 3)))
            except (CannotEdit, TokenizerError) as error:
                failures.append(Failure(edit.id, str(error)))
        scored = scorer.score_each([[edit] for edit, _, _ in made], [(patch,) for _, patch, _ in made])
        cards += [c.model_copy(update={"fit_seconds": s}) for c, (_, _, s) in zip(scored, made, strict=True)]
    progress(doing, len(edits), len(edits))
    card = Scorecard.join(cards).model_copy(update={"baseline_seconds": round(baseline, 3)}) if cards else None
    return Singles(card, tuple(failures), round(prepared, 3))
