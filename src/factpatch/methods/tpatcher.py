"""T-Patcher: one neuron for each token the model gets wrong, added to the last MLP.

Huang et al., ICLR 2023 (arXiv 2301.09785).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.batches import Batch
from factpatch.lm.hooks import reading, replacing_output
from factpatch.lm.run import input_of
from factpatch.methods.base import Config, Method, Preset, Traits, told
from factpatch.methods.keys import context_prefixes
from factpatch.methods.targets import TargetBatch, with_targets
from factpatch.patches.neurons import NeuronPatch, fired
from factpatch.progress import Progress

__all__ = ["TPatcher", "TPatcherConfig"]


class TPatcherConfig(Config):
    """Settings of T-Patcher."""

    layer: NonNegativeInt | None = Field(
        default=None, description="block beside whose MLP neurons are put; default: last"
    )
    steps: PositiveInt = Field(default=100, description="gradient steps, at most")
    lr: PositiveFloat = Field(default=1e-2, description="learning rate of Adam")
    stop_loss: NonNegativeFloat = Field(default=5e-2, description="stop once the target's loss is below this, in nats")
    activation: NonNegativeFloat = Field(default=1.0, description="weight of firing on the edit's own token")
    memory: NonNegativeFloat = Field(default=10.0, description="weight of not firing on other texts")
    margin: NonNegativeFloat = Field(
        default=3.0, description="by how much less a neuron fires on other texts than on its own"
    )
    texts: PositiveInt = Field(
        default=40, description="other texts, written by the model, on which neurons must not fire"
    )


class TPatcher(Method[TPatcherConfig]):
    """T-Patcher: keys, biases and values of the new neurons are trained together; all else stays.

    The loss is the target's NLL, plus `exp(-(q·k + b))` on each neuron's own token, plus on those tokens of other texts on
    which it fires `exp(q·k + b)` and `exp(q·k - q_own·k + margin)`; each cut off at e¹⁰, so that none drowns the rest.
    """

    name = "t-patcher"
    config_type = TPatcherConfig
    traits = Traits(
        family="memory inside",
        phase="association",
        paper="Huang et al. 2023, arXiv 2301.09785",
        patch=NeuronPatch,
        needs="MLP projections",
        effort=110,
    )
    presets = (Preset((30, 576), {"layer": 20}, "SmolLM2-135M, measured: docs/results/tuning/t-patcher.md"),)

    def make(self, lm: LM, edits: tuple[Edit, ...], config: TPatcherConfig, progress: Progress) -> NeuronPatch:
        """One edit after the other, each beside the neurons of the earlier ones."""
        layer = lm.anatomy.n_layers - 1 if config.layer is None else config.layer
        provenance = self.provenance(lm, config.model_copy(update={"layer": layer}), edits)
        reads, writes = lm.anatomy.mlp_in(layer)[0], lm.anatomy.mlp_out(layer)
        others = _other_queries(lm, reads, config)
        width = lm.anatomy.hidden_size
        site_in, site_out = (projection.parameter.removesuffix(".weight") for projection in (reads, writes))
        keys, biases, values = torch.empty(0, width), torch.empty(0), torch.empty(0, width)
        notes: list[dict[str, Any]] = []
        for i, edit in enumerate(edits):
            progress("Training neurons", i, len(edits))
            with lm.patched(NeuronPatch(provenance, site_in, site_out, keys, biases, values)):
                more, losses = _train(lm, edit, layer, reads, writes, others, config)
            keys, biases, values = (
                torch.cat([old, new.cpu()]) for old, new in zip((keys, biases, values), more, strict=True)
            )
            notes.append({"edit": edit.id, "neurons": len(more[0]), **told(losses)})
        progress("Training neurons", len(edits), len(edits))
        finished = provenance.model_copy(update={"notes": tuple(notes)})
        return NeuronPatch(finished, site_in, site_out, keys, biases, values)


def _train(
    lm: LM,
    edit: Edit,
    layer: int,
    reads: Projection,
    writes: Projection,
    others: Float[Tensor, "queries hidden"],
    config: TPatcherConfig,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[float]]:
    """Keys, biases and values of an edit's neurons, one for each target token that the model gets wrong; and the losses."""
    batch = TargetBatch(lm, with_targets(lm, [edit], chat=config.chat), layer)
    seen: list[Tensor] = []
    with torch.no_grad(), reading(reads.module, lambda x, _: seen.append(x)):
        wrong = batch.upper.logits_at(batch.places).argmax(-1) != batch.target
    own = seen[0].reshape(*batch.batch.ids.shape, -1)[0, batch.places.cols[wrong]].float()
    keys = (own / own.square().sum(-1, keepdim=True)).requires_grad_()  # fires by 1 on its own token
    biases = torch.zeros(len(own), device=own.device, requires_grad=True)
    values = torch.zeros_like(own, requires_grad=True)
    losses: list[float] = []
    if not len(own):
        return (keys.detach(), biases.detach(), values.detach()), losses
    optimiser = torch.optim.Adam([keys, biases, values], lr=config.lr)
    with _beside(reads, writes, lambda x: fired(x, keys, biases) @ values), torch.enable_grad():
        for step in range(config.steps):
            nll = batch.nll().sum()
            losses.append(nll.item())
            if losses[-1] < config.stop_loss or step == config.steps - 1:
                break
            at_own = (own * keys).sum(-1)
            at_others = others @ keys.T
            loss = nll + config.activation * _exp(-(at_own + biases)).mean()
            fires = at_others + biases > 0
            quiet = _exp(at_others + biases) + _exp(at_others - at_own + config.margin)
            loss = loss + config.memory * (quiet * fires).mean()
            gradients = torch.autograd.grad(loss, [keys, biases, values])
            for parameter, gradient in zip((keys, biases, values), gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
    return (keys.detach(), biases.detach(), values.detach()), losses


def _exp(x: Tensor) -> Tensor:
    return x.clamp(max=10).exp()


@contextmanager
def _beside(reads: Projection, writes: Projection, new: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add `new(x)` to what one module puts out, x being what the other reads."""
    seen: list[Tensor] = []

    def add(_: Tensor, out: Tensor) -> Tensor:
        return out + new(seen.pop()).reshape(out.shape).to(out.dtype)

    with reading(reads.module, lambda x, _: seen.append(x.float())), replacing_output(writes.module, add):
        yield


def _other_queries(lm: LM, reads: Projection, config: TPatcherConfig) -> Float[Tensor, "queries hidden"]:
    """What the MLP reads in other texts, at each of their tokens."""

    def measure() -> Tensor:
        prefixes = context_prefixes(lm, config.texts, config.seed)[1:]
        texts = [lm.tokens.encode(prefix.rstrip()).ids for prefix in prefixes]
        batch = Batch.of(texts, lm.device)
        return input_of(lm, reads.module, batch)[batch.mask.bool()].float()

    found: Tensor = lm.once(("t-patcher queries", reads.parameter, config.texts, config.seed), measure)
    return found
