"""Texts that begin alike: which of them, and with how many tokens, so that what they share runs once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ONE_PASS", "Shared", "shared_prefixes"]

ONE_PASS = 32
"""What a forward pass costs however little is in it, in tokens: to read the weights takes as long as to compute with them."""

_COST = 48
"""What a prefix costs, in tokens: a pass of its own, and keys and values to copy. Measured: two texts gain from 45 on."""

_LEAST = 16
"""Fewest tokens to share: what ordinary texts have in common is not worth looking at."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A prefix: how many tokens long it is, and which texts begin with it, two at least."""

    length: int
    texts: tuple[int, ...]

    @property
    def gain(self) -> int:
        """How many tokens need not run, less what that costs."""
        return self.length * (len(self.texts) - 1) - _COST


def shared_prefixes(texts: Sequence[Sequence[int]]) -> list[Shared]:
    """The prefixes that gain the most between them, each text under one at most; of those that gain nothing, none."""
    order = sorted((i for i, text in enumerate(texts) if len(text) >= _LEAST), key=lambda i: tuple(texts[i]))
    # In this order texts that begin alike are neighbours. A stretch of them stays open as long as all share its tokens; then
    # either all of it is under one prefix, or the stretches within it, which share more, are each under their own.
    stretches: list[_Stretch] = []
    for at, index in enumerate(order):
        is_last = at + 1 == len(order)
        depth = 0 if is_last else _common(texts[index], texts[order[at + 1]])
        now = _Stretch(depth, at, [])
        while stretches and stretches[-1].depth > depth:
            now = stretches.pop().closed(order[: at + 1], now)
        if stretches and stretches[-1].depth == depth:
            stretches[-1].found += now.found
        else:
            stretches.append(_Stretch(depth, now.start, now.found))
    return stretches[0].found if stretches else []


@dataclass(slots=True)
class _Stretch:
    """Neighbours with `depth` tokens in common, from `start` on, and the best prefixes found among them so far."""

    depth: int
    start: int
    found: list[Shared]

    def closed(self, order: Sequence[int], last: _Stretch) -> _Stretch:
        """With the last of its neighbours, and under one prefix if that gains more; `order` ends with it."""
        parts = self.found + last.found
        whole = Shared(self.depth, tuple(sorted(order[self.start :])))
        best = [whole] if whole.gain > sum(part.gain for part in parts) else parts
        return _Stretch(self.depth, self.start, best)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning on; 0 if too few."""
    unlike = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    length = next(unlike, min(len(one), len(other)))
    return length if length >= _LEAST else 0
