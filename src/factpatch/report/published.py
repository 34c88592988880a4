"""Published figures to lay beside one's own, never to be mixed with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from factpatch.bench.reproduce import recipes

__all__ = ["SOURCE", "Published", "published"]

SOURCE = (
    "Published: the survey's Table 4, Llama-2-7b-chat, survey protocol as its authors ran it "
    "(arXiv 2401.01286, as corrected in November 2024)"
)


@dataclass(frozen=True, slots=True)
class Published:
    """One method on one data set, in our units: shares from 0 to 1, fluency in bits. None where nothing is published.

    kl  of ConvSent, which the survey gives as its locality; lower is better
    """

    method: str
    edit_success: float | None = None
    portability: float | None = None
    locality: float | None = None
    fluency: float | None = None
    kl: float | None = None


@cache
def published() -> dict[str, tuple[Published, ...]]:
    """By data set, what the recipes expect."""
    found: dict[str, tuple[Published, ...]] = {}
    for recipe in recipes().values():
        scores = {score: value if score == "kl" else round(value / 100, 6) for score, value in recipe.expected.items()}
        found[recipe.dataset] = (*found.get(recipe.dataset, ()), Published(recipe.method, **scores))
    return found
