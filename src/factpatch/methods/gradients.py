"""The gradient of a linear map's weight in its two factors: what it reads, and the loss's gradient at its output.

Over the tokens of an edit, `∂L/∂W = Σ_i g_i h_iᵀ`. UltraEdit, MEND and MALMEN edit by way of these factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.batches import Places, length_batches
from factpatch.lm.hooks import replacing_output
from factpatch.methods.targets import TargetBatch, tokens_at_once, with_targets
from factpatch.progress import Progress, silent

__all__ = ["Gradients", "Moments", "gradients"]


@dataclass(frozen=True, slots=True)
class Gradients:
    """One row for each token looked at, of all edits in their order; in main memory, in the model's own numbers.

    inputs   h, what the map reads there
    outputs  g, the gradient at its output there, of the edits' mean losses summed over edits
    """

    inputs: Float[Tensor, "rows in"]
    outputs: Float[Tensor, "rows out"]

    @property
    def joined(self) -> Float[Tensor, "rows both"]:
        """`[h, g]`, float32."""
        return torch.cat([self.inputs, self.outputs], 1).float()

    def empty(self, rows: int) -> Gradients:
        """Room for so many rows."""
        inputs, outputs = (each.new_empty(rows, each.shape[1]) for each in (self.inputs, self.outputs))
        return Gradients(inputs, outputs)

    def split(self, rows: int, device: torch.device) -> Iterator[Gradients]:
        """At most so many rows after the other, each part in float32 on the device."""
        for h, g in zip(torch.split(self.inputs, rows), torch.split(self.outputs, rows), strict=True):
            yield Gradients(h.to(device, torch.float32), g.to(device, torch.float32))


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and summed squared deviation of rows, such that those of two sets of rows can be joined."""

    count: Float[Tensor, ""]
    mean: Float[Tensor, " width"]
    spread: Float[Tensor, " width"]

    @classmethod
    def of(cls, rows: Float[Tensor, "rows width"]) -> Moments:
        """Of some rows, in float64."""
        exact = rows.double()
        mean = exact.mean(0)
        return cls(exact.new_tensor(float(len(rows))), mean, ((exact - mean) ** 2).sum(0))

    def joined(self, other: Moments) -> Moments:
        """Of both sets of rows together (Chan et al. 1983)."""
        count = self.count + other.count
        step = other.mean - self.mean
        return Moments(
            count,
            self.mean + step * (other.count / count),
            self.spread + other.spread + step**2 * (self.count * other.count / count),
        )

    def normalise(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """Rows less the mean, over the standard deviation (of a sample); a column that never varies becomes 0."""
        deviation = (self.spread / (self.count - 1).clamp(min=1)).sqrt()
        return torch.where(deviation > 0, (rows.double() - self.mean) / deviation.clamp(min=1e-30), 0.0).float()

    def packed(self) -> Float[Tensor, "3 width"]:
        """As one tensor, to be kept in a patch."""
        return torch.stack([self.count.expand_as(self.mean), self.mean, self.spread])

    @classmethod
    def unpacked(cls, tensor: Float[Tensor, "3 width"]) -> Moments:
        """From `packed`."""
        return cls(tensor[0, 0], tensor[1], tensor[2])


def gradients(
    lm: LM,
    modules: Sequence[Projection],
    first: int,
    edits: Sequence[Edit],
    *,
    chat: bool,
    everywhere: bool = False,
    progress: Progress = silent,
) -> dict[Projection, Gradients]:
    """Both factors for each module, none of which lies beneath block `first`.

    everywhere  at every token, not only where target tokens are predicted
    """
    texts = with_targets(lm, edits, chat=chat)
    bounds = list(accumulate((len(text.ids if everywhere else text.target_ids) for text in texts), initial=0))
    found: dict[Projection, Gradients] = {}
    done = 0
    for indices in length_batches([len(text.ids) for text in texts], tokens_at_once(lm, first)):
        progress("Taking gradients", done, len(texts))
        chosen = [texts[i] for i in indices]
        batch = TargetBatch(lm, chosen, first)
        places = Places.of([range(len(text.ids)) for text in chosen], lm.device) if everywhere else batch.places
        own = torch.tensor([row for i in indices for row in range(bounds[i], bounds[i + 1])])
        for module, pair in _of_batch(modules, batch, places).items():
            if module not in found:
                # Made whole at once: many small ones, joined in the end, would be held twice.
                found[module] = pair.empty(bounds[-1])
            found[module].inputs[own], found[module].outputs[own] = pair.inputs, pair.outputs
        done += len(indices)
    progress("Taking gradients", len(texts), len(texts))
    return found


def _of_batch(modules: Sequence[Projection], batch: TargetBatch, places: Places) -> dict[Projection, Gradients]:
    """At these places of the batch, in their order. A zero added to an output has that output's gradient."""
    inputs: dict[Projection, Tensor] = {}
    zeros: dict[Projection, Tensor] = {}

    def probing(module: Projection) -> Callable[[Tensor, Tensor], Tensor]:
        def add(x: Tensor, out: Tensor) -> Tensor:
            inputs[module], zeros[module] = x.detach(), torch.zeros_like(out, requires_grad=True)
            return out + zeros[module]

        return add

    def at_places(tensor: Tensor) -> Float[Tensor, "rows width"]:
        return tensor.reshape(*batch.batch.ids.shape, -1)[places.rows, places.cols].cpu()

    with ExitStack() as stack, torch.enable_grad():
        for module in modules:
            stack.enter_context(replacing_output(module.module, probing(module)))
        loss = batch.nll().sum()
        found = torch.autograd.grad(loss, [zeros[module] for module in modules])
    return {
        module: Gradients(at_places(inputs[module]), at_places(gradient))
        for module, gradient in zip(modules, found, strict=True)
    }
