"""Keys and values of attention: written in place, begun with those of a known prefix, or added to while others keep them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["Roomy", "adding_to", "begun", "roomy"]

_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that hold keys and values by column and nothing else. They put the old and the new together in a new tensor."""


class Roomy(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one block, in tensors made once for all the columns there will be.

    A plain layer copies all it holds at every step. One with a sliding window would drop columns, which are kept here: the
    model's masks hide them as well.
    """

    def __init__(self, columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._columns = columns
        self._rooms: list[Tensor] = []

    @classmethod
    def begun(cls, known: Roomy, starts: Sequence[tuple[int, int]], since: int, columns: int) -> Roomy:
        """With the columns before `since` filled in; see the function of this name."""
        layer = cls(columns)
        layer._make(known._rooms, len(starts))
        for room, kept in zip(layer._rooms, known._rooms, strict=True):
            for row, (whose, start) in enumerate(starts):
                room[row, :, :start] = 0  # padding is masked, but must be finite
                room[row, :, start:since] = kept[whose, :, : max(0, since - start)]
        layer._show(since)
        return layer

    def update(
        self,
        key_states: Float[Tensor, "batch heads new key"],
        value_states: Float[Tensor, "batch heads new value"],
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "batch heads seq key"], Float[Tensor, "batch heads seq value"]]:
        """Write the new ones behind those there are, and return all."""
        new = [key_states, value_states]
        if not self.is_initialized:
            self._make(new, len(key_states))
        return self._write(self.get_seq_length(), new)

    def batch_select_indices(self, indices: Int[Tensor, " kept"]) -> None:
        """Keep these rows alone."""
        seen = self.get_seq_length()
        kept = [room[indices, :, :seen] for room in self._rooms]
        self._make(kept, len(indices))
        self._write(0, kept)

    def _make(self, like: Sequence[Tensor], rows: int) -> None:
        """Room for so many rows of such keys and values."""
        self.dtype, self.device, self.is_initialized = like[0].dtype, like[0].device, True
        self._rooms = [own.new_empty(rows, own.shape[1], self._columns, own.shape[3]) for own in like]
        self._show(0)

    def _write(self, start: int, new: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        end = start + new[0].shape[2]
        assert end <= self._columns, "a single column would be lost without a word"
        for room, own in zip(self._rooms, new, strict=True):
            room[:, :, start:end] = own
        return self._show(end)

    def _show(self, columns: int) -> tuple[Tensor, Tensor]:
        keys, values = (room[:, :, :columns] for room in self._rooms)
        self.keys, self.values = keys, values
        return keys, values


def roomy(model: nn.Module, columns: int) -> DynamicCache | None:
    """An empty cache with room for so many columns; None if the model would make itself one of another kind."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    config: Any = model.config
    cache = DynamicCache(config=config)
    if not _is_plain(cache):
        return None
    cache.layers = [Roomy(columns) for _ in cache.layers]
    return cache


def begun(known: DynamicCache, starts: Sequence[tuple[int, int]], since: int, columns: int) -> DynamicCache:
    """A roomy cache, from another, for a batch that is padded on the left, with the columns before `since` filled in.

    starts  of each row, which row of `known` it begins with, and in which column
    """
    cache, layers = copy.copy(known), cast("list[Roomy]", known.layers)
    cache.layers = [Roomy.begun(layer, starts, since, columns) for layer in layers]
    return cache


def adding_to(past: Any) -> Any:
    """A cache that goes on from this one, which stays as it is. Tensors are shared where adding makes new ones."""
    if not _is_plain(past):
        return copy.deepcopy(past)
    cache = copy.copy(past)
    cache.layers = [copy.copy(layer) for layer in past.layers]
    return cache


def _is_plain(cache: Any) -> bool:
    return type(cache) is DynamicCache and bool(cache.layers) and all(type(own) in _PLAIN for own in cache.layers)
