"""How sure a mean over edits is: bootstrap intervals, plain and paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

__all__ = ["Difference", "Interval", "bootstrap", "difference"]

RESAMPLES = 2000
LEVEL = 0.95
Interval = tuple[float, float]


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval | None:
    """The percentile interval of the mean at 95 %, by resampling the values with replacement (Efron 1979); None for one.

    The same values give the same interval, in whatever order they come.
    """
    if len(values) < 2:
        return None
    sample = torch.tensor(sorted(values), dtype=torch.float64)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed))
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = sample[picks].mean(1).quantile(tails).tolist()
    return low, high


@dataclass(frozen=True, slots=True)
class Difference:
    """Of the same edits under two conditions.

    edits     how many have a value in both
    a, b      the means over these
    mean      b - a
    interval  at 95 %, of the mean, over edits
    """

    edits: int
    a: float
    b: float
    mean: float
    interval: Interval | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def difference(a: Mapping[str, float], b: Mapping[str, float]) -> Difference | None:
    """Paired by edit; None if no edit has a value in both."""
    both = sorted(set(a) & set(b))
    if not both:
        return None
    apart = [b[edit] - a[edit] for edit in both]
    return Difference(len(both), fmean(a[e] for e in both), fmean(b[e] for e in both), fmean(apart), bootstrap(apart))
