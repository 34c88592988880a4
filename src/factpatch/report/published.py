"""Published figures to lay beside one's own, never to be mixed with them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

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
    """By data set."""
    text = files("factpatch.report").joinpath("published.csv").read_text(encoding="utf-8")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in csv.DictReader(text.splitlines()):
        dataset, score = row.pop("dataset"), row.pop("score")
        for method, value in row.items():
            own = found.setdefault(dataset, {}).setdefault(method, {})
            own[score] = float(value) if score == "kl" else round(float(value) / 100, 6)
    return {
        dataset: tuple(Published(method, **scores) for method, scores in methods.items())
        for dataset, methods in found.items()
    }
