"""What was measured beside what was published."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from factpatch.bench.reproduce import Recipe
from factpatch.bench.store import Store
from factpatch.report.rows import UNEDITED, result_rows
from factpatch.report.stats import Interval

__all__ = ["Reproduced", "reproduced"]


class Reproduced(BaseModel):
    """One score of one recipe, in the units that it was published in.

    interval  of `measured`, at 95 %
    """

    model_config = ConfigDict(frozen=True)

    recipe: str
    dataset: str
    method: str
    model: str
    edits: int
    score: str
    expected: float
    measured: float | None
    interval: Interval | None


def reproduced(recipe: Recipe, store: Store, cell: int) -> list[Reproduced]:
    """Each expected score of a recipe, and what the cell that ran it has."""
    (row,) = (r for r in result_rows(store, {cell}) if r.method != UNEDITED and r.protocol == "survey")
    found = []
    for score, expected in recipe.expected.items():
        value = row.measures.get("locality/kl") if score == "kl" else getattr(row, score)
        scale = 1 if score == "kl" else 100
        low_high = row.intervals.get(score)
        found.append(
            Reproduced(
                recipe=recipe.name,
                dataset=row.dataset,
                method=row.method,
                model=row.model,
                edits=row.edits,
                score=score,
                expected=expected,
                measured=None if value is None else round(value * scale, 2),
                interval=None if low_high is None else (round(low_high[0] * scale, 2), round(low_high[1] * scale, 2)),
            )
        )
    return found
