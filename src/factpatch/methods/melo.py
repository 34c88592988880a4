"""MELO: an index of edits as GRACE keeps it, in front of low-rank slices that only their own cluster turns on.

Yu et al., AAAI 2024 (arXiv 2312.11795).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from factpatch.edits import Edit
from factpatch.errors import BadConfig
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.hooks import replacing_output
from factpatch.methods.base import Config, Layers, Method, Preset, Traits, told
from factpatch.methods.placing import key_of, placed, spacing
from factpatch.methods.targets import TargetBatch, with_targets
from factpatch.patches import LowRank
from factpatch.patches.slices import SlicePatch, Slices
from factpatch.progress import Progress

__all__ = ["Melo", "MeloConfig"]


class MeloConfig(Config):
    """Settings of MELO."""

    layer: NonNegativeInt | None = Field(
        default=None, description="block whose MLP reads the keys; default: half up the stack"
    )
    layers: Layers | None = Field(default=None, description="blocks with slices, above it; default: the next four")
    radius: PositiveFloat = Field(
        default=0.3, description="of a new cluster, in units of the usual distance between the keys of two texts"
    )
    rank: PositiveInt = Field(default=2, description="of each slice")
    steps: PositiveInt = Field(default=50, description="gradient steps on a slice, at most")
    lr: PositiveFloat = Field(default=1e-2, description="learning rate of Adam")
    stop_loss: NonNegativeFloat = Field(default=5e-2, description="stop once the loss is below this, in nats")


class Melo(Method[MeloConfig]):
    """MELO: each cluster of edits owns a slice of the adapter; what no cluster is near to stays to the bit.

    Clusters are kept by GRACE's rules: added, split where a near one has another target, widened where it has the same.
    The slices change the MLP output projections of later blocks, for the whole text that turned them on.
    """

    name = "melo"
    config_type = MeloConfig
    traits = Traits(
        family="memory inside",
        phase="association",
        paper="Yu et al. 2024, arXiv 2312.11795",
        patch=SlicePatch,
        needs="MLP output projection",
        effort=7,
    )
    presets = (Preset((30, 576), {"layer": 20}, "SmolLM2-135M, measured: docs/results/tuning/melo.md"),)

    def make(self, lm: LM, edits: tuple[Edit, ...], config: MeloConfig, progress: Progress) -> SlicePatch:
        """One edit after the other, each in view of all clusters that are there already."""
        n = lm.anatomy.n_layers
        layer = n // 2 - 1 if config.layer is None else config.layer
        layers = config.layers or tuple(range(layer + 1, min(layer + 5, n)))
        if not layers:
            raise BadConfig(f"melo: there is no block for slices above block {layer}, the last.\n  Give a lower layer.")
        if min(layers) <= layer:
            raise BadConfig(
                f"melo: slices at block {min(layers)}, whose keys are read at block {layer}.\n"
                "  Give layers above layer: what turns a slice on must come before it."
            )
        settled = config.model_copy(update={"layer": layer, "layers": layers})
        site, changed = lm.anatomy.mlp_out(layer), [lm.anatomy.mlp_out(each) for each in layers]
        patch = _empty(self, lm, settled, edits, site, changed)
        radius = config.radius * spacing(lm, site, config.seed)
        notes: list[dict[str, Any]] = []
        for i, edit in enumerate(edits):
            progress("Training slices", i, len(edits))
            with lm.patched(patch):
                key = key_of(lm, site, edit, chat=config.chat)
                place = placed(SlicePatch.on(lm, patch.site), key, edit.target, radius)
            patch = replace(patch, radii=place.radii, moved=place.moved)
            note: dict[str, Any] = {"edit": edit.id, "codebook": place.how}
            if place.radius is not None:
                with lm.without(*SlicePatch.on(lm, patch.site)):
                    slices, losses = _train(lm, edit, changed, min(layers), settled)
                patch = _with_entry(patch, key, place.radius, edit.target, slices)
                note |= told(losses)
            notes.append(note)
        progress("Training slices", len(edits), len(edits))
        return replace(patch, provenance=patch.provenance.model_copy(update={"notes": tuple(notes)}))


def _empty(
    method: Melo, lm: LM, config: MeloConfig, edits: tuple[Edit, ...], site: Projection, changed: list[Projection]
) -> SlicePatch:
    """A codebook without entries."""
    slices = {}
    for projection in changed:
        out, width = projection.matrix.shape
        none = Slices(torch.empty(0, out, config.rank), torch.empty(0, config.rank, width))
        slices[projection.parameter.removesuffix(".weight")] = none
    name, width = site.parameter.removesuffix(".weight"), site.matrix.shape[1]
    provenance = method.provenance(lm, config, edits)
    return SlicePatch(provenance, name, torch.empty(0, width), torch.empty(0), (), slices=slices)


def _with_entry(
    patch: SlicePatch, key: Float[Tensor, " in"], radius: float, label: str, slices: list[LowRank]
) -> SlicePatch:
    """One entry more."""
    named = zip(patch.slices.items(), slices, strict=True)
    return replace(
        patch,
        keys=torch.cat([patch.keys, key[None].cpu()]),
        radii=torch.cat([patch.radii, torch.tensor([radius])]),
        labels=(*patch.labels, label),
        slices={name: old.joined(Slices(new.u[None].cpu(), new.v[None].cpu())) for (name, old), new in named},
    )


def _train(
    lm: LM, edit: Edit, changed: list[Projection], first: int, config: MeloConfig
) -> tuple[list[LowRank], list[float]]:
    """A slice of each changed map, trained on the target's loss as if the edit's cluster had turned it on."""
    generator = torch.Generator().manual_seed(config.seed)
    factors: list[Tensor] = []
    for projection in changed:
        out, width = projection.matrix.shape
        v = torch.randn(config.rank, width, generator=generator) / width**0.5
        factors += [torch.zeros(out, config.rank, device=lm.device), v.to(lm.device)]
    for factor in factors:
        factor.requires_grad_()
    slices = [LowRank(factors[2 * i], factors[2 * i + 1]) for i in range(len(changed))]
    batch = TargetBatch(lm, with_targets(lm, [edit], chat=config.chat), first)
    optimiser = torch.optim.Adam(factors, lr=config.lr)
    losses: list[float] = []
    with ExitStack() as stack, torch.enable_grad():
        for projection, change in zip(changed, slices, strict=True):
            stack.enter_context(replacing_output(projection.module, change.added))
        for step in range(config.steps):
            loss = batch.nll().sum()
            losses.append(loss.item())
            if losses[-1] < config.stop_loss or step == config.steps - 1:
                break
            for factor, gradient in zip(factors, torch.autograd.grad(loss, factors), strict=True):
                factor.grad = gradient
            optimiser.step()
    return [LowRank(change.u.detach(), change.v.detach()) for change in slices], losses
