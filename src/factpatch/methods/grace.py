"""GRACE: a codebook at one late module, whose entries act where a prompt comes near to an edited one.

Hartvigsen et al., NeurIPS 2023 (arXiv 2211.11031).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.hooks import replacing_output
from factpatch.lm.run import output_of
from factpatch.methods.base import Config, Method, Preset, Traits, told
from factpatch.methods.placing import key_of, placed, spacing
from factpatch.methods.targets import TargetBatch, with_targets
from factpatch.patches.base import Provenance
from factpatch.patches.codebook import CodebookPatch
from factpatch.progress import Progress

__all__ = ["Grace", "GraceConfig"]


class GraceConfig(Config):
    """Settings of GRACE."""

    layer: NonNegativeInt | None = Field(default=None, description="block to edit; default: five sixths up the stack")
    radius: PositiveFloat = Field(
        default=0.3, description="of a new entry, in units of the usual distance between the keys of two texts"
    )
    steps: PositiveInt = Field(default=50, description="gradient steps on the value, at most")
    lr: PositiveFloat = Field(default=1.0, description="learning rate of plain gradient descent")
    stop_loss: NonNegativeFloat = Field(default=5e-2, description="stop once the loss is below this, in nats")
    start: Literal["warm", "cold"] = Field(
        default="warm", description="the value starts from the module's own output, or at random"
    )


class Grace(Method[GraceConfig]):
    """GRACE: nothing else in the model changes, so what no entry is near to stays to the bit.

    The key is what the module reads at the prompt's last token. A query beyond reach of all keys gets an entry of its own;
    one that is near to a key of another target splits the distance between the two; one that is near to a key of its own
    target widens that entry instead.
    """

    name = "grace"
    config_type = GraceConfig
    traits = Traits(
        family="memory inside",
        phase="association",
        paper="Hartvigsen et al. 2023, arXiv 2211.11031",
        patch=CodebookPatch,
        needs="MLP output projection",
        effort=50,
    )
    presets = (
        Preset(
            (30, 576),
            {"layer": 20, "lr": 300.0, "steps": 100},
            "SmolLM2-135M, measured: docs/results/tuning/grace.md",
        ),
    )

    def make(self, lm: LM, edits: tuple[Edit, ...], config: GraceConfig, progress: Progress) -> CodebookPatch:
        """One edit after the other, each in view of all entries that are there already."""
        layer = round(lm.anatomy.n_layers * 5 / 6) if config.layer is None else config.layer
        projection = lm.anatomy.mlp_out(layer)
        provenance = self.provenance(lm, config.model_copy(update={"layer": layer}), edits)
        radius = config.radius * spacing(lm, projection, config.seed)
        book = _empty(provenance, projection)
        notes: list[dict[str, Any]] = []
        for i, edit in enumerate(edits):
            progress("Editing the codebook", i, len(edits))
            with lm.patched(book):
                key = key_of(lm, projection, edit, chat=config.chat)
                place = placed(CodebookPatch.on(lm, book.site), key, edit.target, radius)
            book = replace(book, radii=place.radii, moved=place.moved)
            note: dict[str, Any] = {"edit": edit.id, "codebook": place.how}
            if place.radius is not None:
                with lm.patched(book):  # as it is now, so that the search starts from the module's own output
                    value, losses = _value(lm, edit, projection, layer, config)
                book = _with_entry(book, key, value, place.radius, edit.target)
                note |= told(losses)
            notes.append(note)
        progress("Editing the codebook", len(edits), len(edits))
        return replace(book, provenance=provenance.model_copy(update={"notes": tuple(notes)}))


def _empty(provenance: Provenance, projection: Projection) -> CodebookPatch:
    out, width = projection.matrix.shape
    site = projection.parameter.removesuffix(".weight")
    return CodebookPatch(provenance, site, torch.empty(0, width), torch.empty(0), (), values=torch.empty(0, out))


def _with_entry(
    book: CodebookPatch, key: Float[Tensor, " in"], value: Float[Tensor, " out"], radius: float, label: str
) -> CodebookPatch:
    """One entry more."""
    return replace(
        book,
        keys=torch.cat([book.keys, key[None].cpu()]),
        values=torch.cat([book.values, value[None].cpu()]),
        radii=torch.cat([book.radii, torch.tensor([radius])]),
        labels=(*book.labels, label),
    )


def _value(
    lm: LM, edit: Edit, projection: Projection, layer: int, config: GraceConfig
) -> tuple[Float[Tensor, " out"], list[float]]:
    """What the module should put out at the prompt's last token, by gradient descent on the target's loss."""
    batch = TargetBatch(lm, with_targets(lm, [edit], chat=config.chat), layer)
    end = int(batch.batch.ends)
    own = output_of(lm, projection.module, batch.batch)[0, end].float()
    if config.start == "cold":
        own = torch.rand(own.shape, generator=torch.Generator().manual_seed(config.seed)).to(own)
    value = own.clone().requires_grad_()

    def put(_: Tensor, out: Tensor) -> Tensor:
        grid = out.reshape(*batch.batch.ids.shape, -1)
        at = (torch.tensor([0], device=out.device), torch.tensor([end], device=out.device))
        return grid.index_put(at, value[None].to(out.dtype)).reshape(out.shape)

    losses: list[float] = []
    with replacing_output(projection.module, put), torch.enable_grad():
        for step in range(config.steps):
            loss = batch.nll().sum()
            losses.append(loss.item())
            if losses[-1] < config.stop_loss or step == config.steps - 1:
                break
            (gradient,) = torch.autograd.grad(loss, [value])
            with torch.no_grad():
                value -= config.lr * gradient
    return value.detach(), losses
