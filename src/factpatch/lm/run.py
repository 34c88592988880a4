"""Run the model over a batch: whole, up to a module, or from a block and a column on; and read it at chosen places.

The head is computed only where it is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from factpatch.lm.anatomy import Anatomy
from factpatch.lm.batches import Batch, Pass, Places, passing
from factpatch.lm.hooks import reading, recording, replacing_input, resuming, until
from factpatch.lm.kv import adding_to

__all__ = [
    "Runnable",
    "UpperRun",
    "can_resume",
    "evaluating",
    "forward",
    "forward_on",
    "input_of",
    "logits_at",
    "of_any_shape",
    "only_at",
    "output_of",
]


@runtime_checkable
class Runnable(Protocol):
    """What is needed of a model here; `LM` is one."""

    @property
    def model(self) -> nn.Module:
        """The model itself."""

    @property
    def anatomy(self) -> Anatomy:
        """Where its parts are."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""


def forward(lm: Runnable, batch: Batch, notes: dict[Any, Tensor] | None = None) -> Any:
    """The model's output over a whole batch; `notes` are those of the pass."""
    with passing(Pass(batch.mask, batch.ends, {} if notes is None else notes, batch.lanes)), of_any_shape():
        return lm.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)


def forward_on(lm: Runnable, ids: Int[Tensor, "batch new"], mask: Int[Tensor, "batch seq"], past: Any) -> Any:
    """The last columns, after those whose keys and values are in `past`. The output has them all."""
    positions = _positions(lm, mask, ids.shape[1])
    with of_any_shape():
        return lm.model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, **positions)


@contextmanager
def of_any_shape() -> Iterator[None]:
    """Let attention be computed by what needs no plan for each shape.

    cuDNN makes one, in some tens of milliseconds; batches here have nearly every shape, and in writing each step its own.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled=enabled)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, and every module back to the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def input_of(lm: Runnable, module: nn.Module, batch: Batch) -> Float[Tensor, "batch seq width"]:
    """What a module reads, everywhere in the batch; the model runs no further than that."""
    return _seen_at(lm, module, batch)[0]


@torch.no_grad()
def output_of(lm: Runnable, module: nn.Module, batch: Batch) -> Float[Tensor, "batch seq width"]:
    """What a module puts out, everywhere in the batch; the model runs no further than that."""
    return _seen_at(lm, module, batch)[1]


def _seen_at(lm: Runnable, module: nn.Module, batch: Batch) -> list[Tensor]:
    # Copied, because some blocks go on to add to the very tensor they were given.
    seen: list[Tensor] = []
    with evaluating(lm.model), reading(module, lambda x, out: seen.extend((x, out.clone()))), until(module):
        forward(lm, batch)
    return [tensor.reshape(*batch.ids.shape, -1) for tensor in seen]  # some blocks flatten the first two axes


@contextmanager
def only_at(lm: Runnable, places: Places) -> Iterator[None]:
    """Let the head read the given places alone, as one row."""
    with replacing_input(lm.anatomy.head, lambda hidden: hidden[places.rows, places.cols].unsqueeze(0)):
        yield


def logits_at(lm: Runnable, batch: Batch, places: Places) -> Float[Tensor, "reads vocab"]:
    """Logits at the given places only, in float32; keeps the graph if gradients are on."""
    with evaluating(lm.model), only_at(lm, places):
        out = forward(lm, batch)
    logits: Tensor = out.logits[0]
    return logits.float()


class UpperRun:
    """The forward pass from block `layer` and column `since` on, over one batch, as often as wanted.

    The blocks beneath run once and are then skipped, and so do the columns before, whose keys and values are kept; which
    changes nothing as long as nothing changes there. Only a model without hooks can be given `since`; see `can_resume`.
    """

    def __init__(self, lm: Runnable, batch: Batch, layer: int, *, since: int = 0) -> None:
        self.lm, self.batch, self.since = lm, batch, since
        self._below = lm.anatomy.blocks[:layer]
        self._output: Any = None
        self._past: Any = None
        # What these hooks do is in the output already; those that are added later act on it.
        self._acted = [{*block._forward_hooks, *block._forward_pre_hooks} for block in self._below]
        # What they noted for hooks further up is given to every run.
        self._notes: dict[Any, Tensor] = {}
        with torch.no_grad(), evaluating(lm.model):
            if since:
                self._past = self._read_past()
            if self._below:
                noted: dict[Any, Tensor] = {}
                with recording(self._below[-1]) as kept, until(self._below[-1]):
                    self._run(noted)
                self._output, self._notes = kept[0], noted

    def logits_at(self, places: Places) -> Float[Tensor, "reads vocab"]:
        """As the function of this name, without running again what does not change; no place may lie before `since`."""
        here = Places(places.rows, places.cols - self.since)
        with resuming(self._below, self._output, self._acted), evaluating(self.lm.model), only_at(self.lm, here):
            out = self._run(dict(self._notes))
        logits: Tensor = out.logits[0]
        return logits.float()

    def _run(self, notes: dict[Any, Tensor]) -> Any:
        if not self.since:
            return forward(self.lm, self.batch, notes)
        # Each run adds keys and values of its own.
        past = adding_to(self._past)
        with passing(Pass(self.batch.mask, self.batch.ends, notes)):
            return forward_on(self.lm, self.batch.ids[:, self.since :], self.batch.mask, past)

    def _read_past(self) -> Any:
        """Keys and values of all blocks in the columns before; nothing reads what is predicted there."""
        ids, mask = self.batch.ids[:, : self.since], self.batch.mask[:, : self.since]
        with only_at(self.lm, Places.of([[]], self.lm.device)), passing(Pass(mask, self.batch.ends)):
            return forward_on(self.lm, ids, mask, None).past_key_values


def can_resume(lm: Runnable) -> bool:
    """Whether the columns of a batch may run one after the other: hooks may want to see them all."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def _positions(lm: Runnable, mask: Int[Tensor, "batch seq"], last: int) -> dict[str, Tensor]:
    """The positions of the last so many columns, counted from each row's first token, if the model wants to be told."""
    if "position_ids" not in inspect.signature(lm.model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -last:]}
