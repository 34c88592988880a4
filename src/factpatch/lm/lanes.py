"""Lanes: several stacks of patches on one model at once, each acting only in the rows of a batch that are its own.

A batch of rows from many lanes costs little more than one of rows from a single lane, so that many patches can be asked side
by side. Any patch will do: the hooks it adds are shown its own rows alone, and where it changed a weight the module runs
again for those rows with the changed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from factpatch.lm.base import Attachable, BaseLM
from factpatch.lm.batches import Pass, current_pass, passing

__all__ = ["Lane", "laid"]

Hooks = MutableMapping[int, Any]
"""A module's own table of hooks."""


class Lane:
    """A stack of patches that acts in rows of its own; see `laid`."""

    def __init__(self, lm: BaseLM, number: int, own: Any, contexts: Any) -> None:
        self.lm, self.number = lm, number
        self._stack, self._contexts = [*lm._stack, *own], [*lm.contexts, *contexts]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The model shows this lane's patches and contexts, as if they alone lay on it."""
        kept = self.lm._stack, self.lm.contexts
        self.lm._stack, self.lm.contexts = self._stack, self._contexts
        try:
            yield
        finally:
            self.lm._stack, self.lm.contexts = kept

    def rows(self) -> Int[Tensor, " own"]:
        """The rows of the forward pass that goes on which are its own."""
        now = current_pass()
        if now is None or now.lanes is None:
            return torch.empty(0, dtype=torch.long)
        return (now.lanes == self.number).nonzero()[:, 0]

    @contextmanager
    def reading(self, rows: Int[Tensor, " own"]) -> Iterator[None]:
        """Let patches see a forward pass of these rows alone, and keep the notes they leave for the next one."""
        now = current_pass()
        assert now is not None
        notes = {key: note[rows] for (number, key), note in _of_lanes(now) if number == self.number}
        own = Pass(now.mask[rows], None if now.ends is None else now.ends[rows], notes)
        with self.alone(), passing(own):
            yield
        for key, note in own.notes.items():
            whole = note.new_zeros(len(now.mask), *note.shape[1:])
            whole[rows] = note
            now.notes[self.number, key] = whole

    def gate(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A forward hook, given its own rows of what the module reads and puts out, and changing those alone."""

        def gated(module: nn.Module, *given: Any) -> Any:
            rows = self.rows()
            if not len(rows):
                return None
            count = _count()
            with self.reading(rows):
                changed = hook(module, *(_picked(value, rows, count) for value in given))
            return None if changed is None else _put(given[-1], changed, rows, count)

        return gated

    def gate_before(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that looks at what a module reads, given its own rows of it. Raises TypeError if it changes something."""

        def gated(module: nn.Module, *given: Any) -> None:
            rows = self.rows()
            if not len(rows):
                return
            count = _count()
            with self.reading(rows):
                if hook(module, *(_picked(value, rows, count) for value in given)) is not None:
                    raise TypeError("a patch on a lane may change what a module puts out, not what it reads")

        return gated

    def with_weights(self, changed: dict[nn.Parameter, Tensor]) -> Callable[..., Any]:
        """A forward hook that runs the module again for its own rows, with other values in its parameters."""

        def run(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            rows = self.rows()
            if not len(rows):
                return None
            count = _count()
            kept = {parameter: parameter.data for parameter in changed}
            _point(changed)
            try:
                own = module.forward(*_picked(args, rows, count), **_picked(kwargs, rows, count))
            finally:
                _point(kept)
            return _put(out, own, rows, count)

        return run


@contextmanager
def laid(lm: BaseLM, model: nn.Module, stacks: Sequence[Sequence[Attachable]]) -> Iterator[list[Lane]]:
    """Lay each stack on a lane of its own, above what lies on the model already; all are taken off at the end.

    A row that belongs to no lane is read by the model as it was.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(_lane(lm, model, i, patches)) for i, patches in enumerate(stacks)]


@contextmanager
def _lane(lm: BaseLM, model: nn.Module, number: int, patches: Sequence[Attachable]) -> Iterator[Lane]:
    modules = list(model.modules())
    before = [(m._forward_pre_hooks, set(m._forward_pre_hooks)) for m in modules]
    after = [(m._forward_hooks, set(m._forward_hooks)) for m in modules]
    old_values = {parameter: parameter.data for parameter in model.parameters()}
    depth, said = len(lm._stack), len(lm.contexts)
    with lm.patched(*patches):
        own = lm._stack[depth:], lm.contexts[said:]
        del lm._stack[depth:], lm.contexts[said:]
        lane = Lane(lm, number, *own)
        looking, acting = _added(before), _added(after)
        changed = {p: p.data for p, old in old_values.items() if p.data_ptr() != old.data_ptr()}
        _point({parameter: old_values[parameter] for parameter in changed})
        handles = [
            module.register_forward_hook(lane.with_weights(mine), prepend=True, with_kwargs=True)
            for module in modules
            if (mine := {p: changed[p] for p in module._parameters.values() if p in changed})
        ]
        try:
            for table, key, hook in looking:
                table[key] = lane.gate_before(hook)
            for table, key, hook in acting:
                table[key] = lane.gate(hook)
            yield lane
        finally:
            for table, key, hook in looking + acting:
                table[key] = hook
            for handle in handles:
                handle.remove()
            _point(changed)
            lm._stack += own[0]
            lm.contexts += own[1]


def _added(tables: Sequence[tuple[Hooks, set[int]]]) -> list[tuple[Hooks, int, Any]]:
    """The hooks that were not there before, with where they stand."""
    return [(table, key, hook) for table, old in tables for key, hook in table.items() if key not in old]


def _of_lanes(now: Pass) -> list[tuple[tuple[int, Any], Tensor]]:
    return [(key, note) for key, note in now.notes.items() if isinstance(key, tuple)]


def _count() -> int:
    now = current_pass()
    assert now is not None
    return len(now.mask)


def _point(values: dict[nn.Parameter, Tensor]) -> None:
    for parameter, value in values.items():
        parameter.data = value


def _picked(value: Any, rows: Int[Tensor, " own"], count: int) -> Any:
    """These rows of every tensor that has a row for each text; some blocks flatten rows and columns into one axis."""
    if isinstance(value, Tensor):
        if value.ndim and len(value) == count:
            return value[rows]
        return value.reshape(count, -1, value.shape[-1])[rows].flatten(0, 1) if _is_flat(value, count) else value
    if isinstance(value, dict):
        return {key: _picked(item, rows, count) for key, item in value.items()}
    return type(value)(_picked(item, rows, count) for item in value) if type(value) in {tuple, list} else value


def _put(value: Any, new: Any, rows: Int[Tensor, " own"], count: int) -> Any:
    """The value with new rows in it."""
    if isinstance(value, Tensor):
        if len(value) == count:
            return value.index_put((rows,), new)
        if not _is_flat(value, count):
            return value
        grid = value.reshape(count, -1, value.shape[-1])
        return grid.index_put((rows,), new.reshape(len(rows), *grid.shape[1:])).reshape(value.shape)
    if type(value) in {tuple, list}:
        return type(value)(_put(item, own, rows, count) for item, own in zip(value, new, strict=True))
    return value


def _is_flat(value: Tensor, count: int) -> bool:
    return value.ndim == 2 and len(value) > count and len(value) % count == 0
