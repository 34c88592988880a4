"""Read or replace an activation for the length of a `with`; whatever happens inside, the module is left as it was.

Modules take and give a tensor, or a tuple whose first item is the hidden state; these hooks see the tensor alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

__all__ = ["reading", "recording", "replacing_input", "replacing_output", "resuming", "until"]


class _Reached(Exception):
    """The forward pass has gone far enough."""


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state a module was called with: attention is given it by name in most architectures."""
    given: Tensor = args[0] if args else kwargs["hidden_states"]
    return given


def _hidden(value: Any) -> Tensor:
    hidden: Tensor = value[0] if isinstance(value, tuple) else value
    return hidden


def _with_hidden(value: Any, hidden: Tensor) -> Any:
    return (hidden, *value[1:]) if isinstance(value, tuple) else hidden


@contextmanager
def reading(module: nn.Module, see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(input, output)` each time the module runs.

    Take from them at once what is wanted: some blocks go on to add to the very tensor they were given.
    """
    with module.register_forward_hook(
        lambda _, args, kwargs, out: see(_given(args, kwargs), _hidden(out)), with_kwargs=True
    ):
        yield


@contextmanager
def replacing_output(module: nn.Module, new: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let `new(input, output)` stand for the module's output."""
    with module.register_forward_hook(
        lambda _, args, kwargs, out: _with_hidden(out, new(_given(args, kwargs), _hidden(out))), with_kwargs=True
    ):
        yield


@contextmanager
def replacing_input(module: nn.Module, new: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `new(input)` stand for the module's input."""
    with module.register_forward_pre_hook(lambda _, args: (new(args[0]), *args[1:])):
        yield


@contextmanager
def until(module: nn.Module) -> Iterator[None]:
    """Run the model only as far as this module, which still runs; the rest of the `with` body is left there."""

    def stop(*_: Any) -> None:
        raise _Reached

    with suppress(_Reached), module.register_forward_hook(stop):
        yield


@contextmanager
def recording(module: nn.Module) -> Iterator[list[Any]]:
    """Keep what the module returns, as it returns it: the form `resuming` takes."""
    kept: list[Any] = []
    with module.register_forward_hook(lambda _, __, out: kept.append(out)):
        yield kept


@contextmanager
def resuming(blocks: Sequence[nn.Module], output: Any, acted: Sequence[Collection[int]] = ()) -> Iterator[None]:
    """Skip these first blocks: each hands on `output`, recorded at the last of them from the same tokens.

    acted  for each block, the ids of the hooks that acted while it was recorded, and must not act again

    What depends on tokens and positions alone (masks, rotary angles) is still computed by the model around them.
    """
    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            done = acted[i] if acted else ()
            stack.enter_context(_returning(block, output))
            for hooks in (block._forward_hooks, block._forward_pre_hooks):
                stack.enter_context(_lifted(hooks, done))
        yield


@contextmanager
def _lifted(hooks: MutableMapping[int, Any], ids: Collection[int]) -> Iterator[None]:
    """Some hooks out of a module's own table for a while."""
    kept = dict(hooks)
    for i in ids:
        hooks.pop(i, None)
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(kept)


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    # Replacing `forward` on the instance skips the work itself; a hook could only discard its result.
    own = module.__dict__.get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
