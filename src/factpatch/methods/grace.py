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
from factpatch.lm.run import Batch, input_of, output_of
from factpatch.methods.base import Config, Method, Traits
from factpatch.methods.keys import context_prefixes
from factpatch.methods.targets import TargetBatch, with_targets
from factpatch.patches.base import Provenance
from factpatch.patches.codebook import UNMOVED, CodebookPatch, nearest, radii
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
    )

    def make(self, lm: LM, edits: tuple[Edit, ...], config: GraceConfig, progress: Progress) -> CodebookPatch:
        """One edit after the other, each in view of all entries that are there already."""
        layer = round(lm.anatomy.n_layers * 5 / 6) if config.layer is None else config.layer
        projection = lm.anatomy.mlp_out(layer)
        provenance = self.provenance(lm, config.model_copy(update={"layer": layer}), edits)
        radius = config.radius * _spacing(lm, projection, config.seed)
        book = _empty(provenance, projection)
        notes: list[dict[str, Any]] = []
        for i, edit in enumerate(edits):
            progress("Editing the codebook", i, len(edits))
            with lm.patched(book):
                key = _key(lm, projection, edit, chat=config.chat)
                book, note = self._learn(lm, book, edit, key, radius, projection, layer, config)
            notes.append({"edit": edit.id, **note})
        progress("Editing the codebook", len(edits), len(edits))
        return replace(book, provenance=provenance.model_copy(update={"notes": tuple(notes)}))

    def _learn(
        self,
        lm: LM,
        book: CodebookPatch,
        edit: Edit,
        key: Float[Tensor, " in"],
        radius: float,
        projection: Projection,
        layer: int,
        config: GraceConfig,
    ) -> tuple[CodebookPatch, dict[str, Any]]:
        """Algorithm 1: add, split or widen."""
        books = CodebookPatch.on(lm, book.site)
        labels = [label for each in books for label in each.labels]
        split = False
        if labels:
            found = nearest(key[None], books)
            at, distance = int(found.entry), float(found.distance)
            reach = float(radii(books)[at])
            if distance <= radius + reach:
                if labels[at] == edit.target:
                    return _with_radius(book, books, at, max(reach, distance)), {"codebook": "widened"}
                book = _with_radius(book, books, at, distance / 2 - 1e-5)
                radius, split = distance / 2, True
        value, losses = _value(lm, edit, projection, layer, config)
        note = {
            "codebook": "split" if split else "added",
            "steps": len(losses),
            "first_loss": round(losses[0], 6),
            "last_loss": round(losses[-1], 6),
        }
        added = replace(
            book,
            keys=torch.cat([book.keys, key[None].cpu()]),
            values=torch.cat([book.values, value[None].cpu()]),
            radii=torch.cat([book.radii, torch.tensor([radius])]),
            labels=(*book.labels, edit.target),
        )
        return added, note


def _empty(provenance: Provenance, projection: Projection) -> CodebookPatch:
    out, width = projection.matrix.shape
    site = projection.parameter.removesuffix(".weight")
    return CodebookPatch(provenance, site, torch.empty(0, width), torch.empty(0, out), torch.empty(0), ())


def _with_radius(book: CodebookPatch, books: list[CodebookPatch], at: int, radius: float) -> CodebookPatch:
    """`book`, the uppermost of `books`, with the radius of entry `at`, counted through them all, set anew."""
    for each in books:
        if at < len(each.keys):
            break
        at -= len(each.keys)
    if each is books[-1]:
        own = book.radii.clone()
        own[at] = radius
        return replace(book, radii=own)
    moved = book.moved.get(each.id, torch.full_like(each.radii, UNMOVED)).clone()
    moved[at] = radius
    return replace(book, moved={**book.moved, each.id: moved})


def _key(lm: LM, projection: Projection, edit: Edit, *, chat: bool) -> Float[Tensor, " in"]:
    ids = lm.tokens.encode(edit.prompt, edit.target, chat=chat).prompt_ids
    return input_of(lm, projection.module, Batch.of([ids], lm.device))[0, -1].float()


def _spacing(lm: LM, projection: Projection, seed: int) -> float:
    """The median distance between the keys of two short texts that the model writes."""

    def measure() -> float:
        texts = [lm.tokens.encode(prefix.rstrip()).ids for prefix in context_prefixes(lm, 20, seed)[1:]]
        keys = [input_of(lm, projection.module, Batch.of([ids], lm.device))[0, -1].float() for ids in texts]
        return float(torch.pdist(torch.stack(keys)).median())

    return lm.once(("grace spacing", projection.parameter, seed), measure)


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
