"""Texts that begin alike: which of them, and with how many tokens, so that what they share runs once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from factpatch.lm.batches import Batch, Pass, Places, length_batches, passing
from factpatch.lm.kv import begun, roomy
from factpatch.lm.run import Runnable, can_resume, evaluating, forward_on, only_at

__all__ = ["ONE_PASS", "Known", "Shared", "can_share", "shared_batches", "shared_prefixes"]

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


@dataclass(slots=True)
class _Stretch:
    """Neighbours, in the order of their tokens, that have `depth` tokens in common.

    texts  those of them that are in no stretch within this one
    inner  stretches that share more
    """

    depth: int
    texts: list[int]
    inner: list[_Stretch]


def shared_prefixes(texts: Sequence[Sequence[int]]) -> list[Shared]:
    """The prefixes that gain the most between them, each text under one at most; of those that gain nothing, none."""
    order = sorted((i for i, text in enumerate(texts) if len(text) >= _LEAST), key=lambda i: tuple(texts[i]))
    if not order:
        return []
    # In this order texts that begin alike are neighbours, so that stretches lie within one another.
    open_ones = [_Stretch(0, [], [])]
    for at, index in enumerate(order):
        depth = _common(texts[index], texts[order[at + 1]]) if at + 1 < len(order) else 0
        if depth > open_ones[-1].depth:
            open_ones.append(_Stretch(depth, [], []))
        open_ones[-1].texts.append(index)
        while open_ones[-1].depth > depth:
            done = open_ones.pop()
            if open_ones[-1].depth < depth:
                open_ones.append(_Stretch(depth, [], []))
            open_ones[-1].inner.append(done)
    place = {index: at for at, index in enumerate(order)}
    found = [Shared(depth, tuple(sorted(own))) for depth, own in _best(open_ones[0])]
    return sorted(found, key=lambda shared: min(place[i] for i in shared.texts))


def _best(root: _Stretch) -> list[tuple[int, list[int]]]:
    """Lengths and texts of the prefixes that gain the most.

    A text under a prefix of `d` tokens saves `d`, and the prefix costs `d` once, and `_COST`. So the most that a stretch can
    gain hangs on the prefix around it that its texts may be under instead: `value[stretch, d]`, all texts in it counted.
    """
    todo: list[tuple[_Stretch, tuple[int, ...]]] = [(root, (0,))]
    listed: list[tuple[_Stretch, tuple[int, ...]]] = []
    while todo:
        listed.append(todo.pop())
        stretch, around = listed[-1]
        todo += [(inner, (*around, stretch.depth) if stretch.depth else around) for inner in stretch.inner]
    value: dict[tuple[int, int], int] = {}

    def left(stretch: _Stretch, depth: int) -> int:
        """Its texts under a prefix of so many tokens, or under those within it."""
        return depth * len(stretch.texts) + sum(value[id(inner), depth] for inner in stretch.inner)

    def own(stretch: _Stretch) -> int:
        """The same with a prefix of its own."""
        return left(stretch, stretch.depth) - stretch.depth - _COST if stretch.depth else 0

    for stretch, around in reversed(listed):
        value |= {(id(stretch), depth): max(left(stretch, depth), own(stretch)) for depth in around}
    found: list[tuple[int, list[int]]] = []
    walk: list[tuple[_Stretch, int, list[int]]] = [(root, 0, [])]
    while walk:
        stretch, depth, under = walk.pop()
        if own(stretch) > left(stretch, depth):
            depth, under = stretch.depth, []
            found.append((depth, under))
        under += stretch.texts
        walk += [(inner, depth, under) for inner in stretch.inner]
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning on; 0 if too few."""
    unlike = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    length = next(unlike, min(len(one), len(other)))
    return length if length >= _LEAST else 0


@dataclass(frozen=True, slots=True)
class Known:
    """Keys and values of prefixes, and how a batch of texts begins with them.

    prefixes  a row for each prefix
    whose     the prefix of each text
    last      how many columns at the end of the batch, which is padded on the left, must run
    """

    prefixes: DynamicCache
    whose: tuple[int, ...]
    last: int

    def past(self, batch: Batch, more: int = 0) -> tuple[int, DynamicCache]:
        """How many columns of the batch need not run, and their keys and values, with room for all columns and more.

        Texts end in one column, so one with less after its prefix than another runs the end of the prefix again.
        """
        width = batch.ids.shape[1]
        since, starts = width - self.last, (width - batch.mask.sum(-1)).tolist()
        return since, begun(self.prefixes, list(zip(self.whose, starts, strict=True)), since, width + more)


def shared_batches(
    lm: Runnable, texts: Sequence[Sequence[int]], prompts: Sequence[int], more: int = 0
) -> Iterator[tuple[list[int], Known | None]]:
    """Batches of texts by index, and what is known of each before it runs.

    prompts  how many tokens of each text stand before all that is read; the last of these is never taken as known
    more     how many tokens will be written after each

    Beside a batch, the keys and values of some prefixes are held, as many as a batch may hold.
    """
    lengths = [len(text) + more for text in texts]
    groups = shared_prefixes([text[: prompt - 1] for text, prompt in zip(texts, prompts, strict=True)])
    alone = sorted({*range(len(texts))}.difference(*(group.texts for group in groups)))
    # Texts that share nothing lose those that do from their batches: at worst there is one more, with all its passes.
    lost = ONE_PASS * more if alone else 0
    if not groups or sum(group.gain for group in groups) < lost or not can_share(lm):
        groups, alone = [], list(range(len(texts)))
    for bundle in length_batches([group.length for group in groups]):
        own = [groups[i] for i in bundle]
        prefixes = _read_prefixes(lm, [texts[group.texts[0]][: group.length] for group in own])
        if prefixes is None:
            alone += [i for group in own for i in group.texts]
            continue
        yield from _batches_of(own, prefixes, lengths, more)
    for batch in length_batches([lengths[i] for i in alone]):
        yield [alone[i] for i in batch], None


def _batches_of(
    groups: Sequence[Shared], prefixes: DynamicCache, lengths: Sequence[int], more: int
) -> Iterator[tuple[list[int], Known]]:
    """Batches of the texts of all these groups, sorted by how much of them is left to run."""
    texts = [(i, whose, lengths[i] - more - group.length) for whose, group in enumerate(groups) for i in group.texts]
    for batch in length_batches([left for _, _, left in texts], widths=[lengths[i] for i, _, _ in texts]):
        indices, whose, left = zip(*(texts[i] for i in batch), strict=True)
        yield list(indices), Known(prefixes, whose, max(left))


@torch.no_grad()
def _read_prefixes(lm: Runnable, prefixes: Sequence[Sequence[int]]) -> DynamicCache | None:
    """Keys and values of all blocks; None if the model does not keep all it knows of a text in such a cache."""
    batch = Batch.of(prefixes, lm.device)
    cache = roomy(lm.model, batch.ids.shape[1])
    if cache is None:
        return None
    with evaluating(lm.model), only_at(lm, Places.of([[]], lm.device)), passing(Pass(batch.mask, batch.ends)):
        forward_on(lm, batch.ids, batch.mask, cache)
    is_read = all(cache.get_seq_length(i) == batch.ids.shape[1] for i in range(len(cache.layers)))
    return cache if is_read else None


def can_share(lm: Runnable) -> bool:
    """Whether a prefix is read alike whatever follows.

    Hooks may see to it that it is not, on any lane; without any, all lanes read alike. Nor is it where a model stretches its
    rotary angles with the length of the text.
    """
    kinds = [getattr(module, "rope_type", None) for module in lm.model.modules()]
    flat = {kind for own in kinds for kind in (own.values() if isinstance(own, dict) else [own])}
    return can_resume(lm) and not flat & {"dynamic", "longrope"}
