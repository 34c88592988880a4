"""The gradient of a linear map's weight in its two factors: what it reads, and the loss's gradient at its output.

Over the tokens of an edit, `∂L/∂W = Σ_i g_i h_iᵀ`. UltraEdit, MEND and MALMEN edit by way of these factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.hooks import replacing_output
from factpatch.lm.run import length_batches
from factpatch.methods.targets import TargetBatch, with_targets
from factpatch.progress import Progress

__all__ = ["Gradients", "gradients"]


@dataclass(frozen=True, slots=True)
class Gradients:
    """One row for each target token, of all edits in their order; float32.

    inputs   h, what the map reads where that token is predicted
    outputs  g, the gradient at its output there, of the edits' mean losses summed over edits
    """

    inputs: Float[Tensor, "rows in"]
    outputs: Float[Tensor, "rows out"]

    @property
    def joined(self) -> Float[Tensor, rows in +out]:
        """`[h, g]`."""
        return torch.cat([self.inputs, self.outputs], 1)


def gradients(
    lm: LM, modules: Sequence[Projection], first: int, edits: Sequence[Edit], *, chat: bool, progress: Progress
) -> dict[Projection, Gradients]:
    """Both factors at the places from which targets are predicted, for each module; none lies beneath block `first`."""
    texts = with_targets(lm, edits, chat=chat)
    rows: dict[int, dict[Projection, Gradients]] = {}
    for indices in length_batches([len(text.ids) for text in texts]):
        progress("Taking gradients", len(rows), len(texts))
        batch = TargetBatch(lm, [texts[i] for i in indices], first)
        for module, pair in _of_batch(modules, batch).items():
            for row, index in enumerate(indices):
                own = batch.places.rows == row
                rows.setdefault(index, {})[module] = Gradients(pair.inputs[own], pair.outputs[own])
    progress("Taking gradients", len(texts), len(texts))
    ordered = [rows[i] for i in range(len(texts))]
    return {
        module: Gradients(
            torch.cat([row[module].inputs for row in ordered]), torch.cat([row[module].outputs for row in ordered])
        )
        for module in modules
    }


def _of_batch(modules: Sequence[Projection], batch: TargetBatch) -> dict[Projection, Gradients]:
    """At the batch's places, in their order. A zero added to an output has that output's gradient."""
    inputs: dict[Projection, Tensor] = {}
    zeros: dict[Projection, Tensor] = {}

    def probing(module: Projection) -> Callable[[Tensor, Tensor], Tensor]:
        def add(x: Tensor, out: Tensor) -> Tensor:
            inputs[module], zeros[module] = x.detach(), torch.zeros_like(out, requires_grad=True)
            return out + zeros[module]

        return add

    def at_places(tensor: Tensor) -> Float[Tensor, "rows width"]:
        return tensor.reshape(*batch.batch.ids.shape, -1)[batch.places.rows, batch.places.cols].float()

    with ExitStack() as stack, torch.enable_grad():
        for module in modules:
            stack.enter_context(replacing_output(module.module, probing(module)))
        loss = batch.nll().sum()
        found = torch.autograd.grad(loss, [zeros[module] for module in modules])
    return {
        module: Gradients(at_places(inputs[module]), at_places(gradient))
        for module, gradient in zip(modules, found, strict=True)
    }
