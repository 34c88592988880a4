"""UltraEdit: many facts at once from one backward pass, without searching for values.

Gu et al. 2025 (arXiv 2505.14679), whose release this follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat
from torch import Tensor

from factpatch.edits import Edit
from factpatch.errors import CannotEdit
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.methods.base import Config, Layers, Method, Preset, Traits
from factpatch.methods.gradients import Gradients, Moments, gradients
from factpatch.methods.insertion import insert, insert_needed, set_aside, with_room
from factpatch.methods.kept import kept
from factpatch.methods.needs import Held, Needs, Stage, low_rank
from factpatch.methods.targets import with_targets
from factpatch.patches import Dense, LowRank, WeightPatch
from factpatch.progress import Progress
from factpatch.words import counted

__all__ = ["UltraEdit", "UltraEditConfig"]


class UltraEditConfig(Config):
    """Settings of UltraEdit."""

    layers: Layers | None = Field(default=None, description="blocks to edit; default: from a third to two thirds up")
    part: Literal["in", "out"] = Field(default="in", description="which MLP projections: into the MLP, or out of it")
    lr: PositiveFloat = Field(default=1e-6, description="size of the change; must be chosen for each model")


class UltraEdit(Method[UltraEditConfig]):
    """UltraEdit: each chosen module's inputs `H` and output gradients `G` at the answer's tokens give the change directly.

    `Δᵀ = (Hᵀ H + I)⁻¹ Hᵀ V` with `V_i = -lr ‖ĥ_i‖² ĝ_i`, where `[ĥ, ĝ]` is `[h, g]` normalised by mean and deviation over
    all edits so far: those of this batch, and of the UltraEdit patches that lie on the model.
    """

    name = "ultraedit"
    config_type = UltraEditConfig
    traits = Traits(
        family="gradient to update",
        phase="mastery",
        paper="Gu et al. 2025, arXiv 2505.14679",
        patch=WeightPatch,
        joint=True,
        needs="MLP projections",
        effort=1,
    )

    presets = (
        Preset(
            (30, 576),
            {"layers": (24, 25, 26, 27, 28, 29), "lr": 1e-3, "part": "out"},
            "SmolLM2-135M, measured: docs/results/tuning/ultraedit-upper.md",
        ),
    )

    def needs(self, lm: LM, edits: Sequence[Edit], config: UltraEditConfig) -> Needs:
        """One pass with gradients, whose rows of all edits wait in main memory; then one solve after the other."""
        layers = _layers(lm, config)
        modules = [p for layer in layers for p in _projections(lm, layer, config.part)]
        shapes = [(int(p.matrix.shape[0]), int(p.matrix.shape[1])) for p in modules]
        rows = sum(len(text.target_ids) for text in with_targets(lm, edits, chat=config.chat))
        widths = [out + width for out, width in shapes]
        waiting = Held(
            what=f"inputs and gradients of {rows} tokens at {counted(len(modules), 'matrix', 'matrices')}",
            bytes=rows * sum(widths) * lm.dtype.itemsize,
            host=True,
        )
        values = Held(what="one matrix's values, float32", bytes=4 * rows * max(out for out, _ in shapes))
        inputs = Held(what="its inputs, float32", bytes=4 * rows * max(width for _, width in shapes))
        solve = max((insert_needed(*shape, rows) for shape in shapes), key=lambda held: held.bytes)
        # Side by side, and in float64 less their mean and squared; with a copy in float32 if they are not.
        each = 28 if lm.dtype == torch.float32 else 32
        part = Held(what="some rows in float64", bytes=each * min(rows, _ROWS) * max(widths))
        changes = [low_rank(projection, rows) for projection in modules]
        made = Held(what="the changes", bytes=sum(size for _, size in changes), host=True)
        (learning,) = super().needs(lm, edits, config.model_copy(update={"layers": layers})).stages
        return Needs(
            stages=(
                Stage(doing="Taking gradients", held=(*learning.held, waiting)),
                Stage(doing="Normalising", held=(waiting, values, part)),
                Stage(doing="Solving the first", held=(waiting, values, inputs, solve)),
                Stage(doing="Solving the last", held=(values, inputs, solve, made)),
            ),
            changes=tuple(change for change, _ in changes),
            patch_bytes=made.bytes + 24 * sum(map(sum, set(shapes))),
        )

    def make(self, lm: LM, edits: tuple[Edit, ...], config: UltraEditConfig, progress: Progress) -> WeightPatch:
        """One forward and backward pass, one solve for each module."""
        layers = _layers(lm, config)
        settled = config.model_copy(update={"layers": layers})
        modules = [p for layer in layers for p in _projections(lm, layer, config.part)]
        found = gradients(lm, modules, layers[0], edits, chat=config.chat, progress=progress)
        own = with_room(lm.device, partial(_by_shape, found))
        state = {_STATE + shape: moments.packed() for shape, moments in own.items()}
        changes: dict[Projection, LowRank | Dense] = {}
        for i, projection in enumerate(modules):
            progress("Solving", i, len(modules))
            shape = _shape(projection)
            moments = _with_earlier(lm, shape, own[shape])
            if moments.count < 2:
                raise CannotEdit(
                    f'edit "{edits[0].id}": ultraedit cannot tell what is usual from one token at one module.\n'
                    "  Make more edits at once, or edit more layers: --set layers=…"
                )
            rows = found.pop(projection)  # they go as the changes come: of thousands of edits they are what takes most
            changes[projection] = set_aside(with_room(lm.device, partial(_change, rows, moments, config.lr)))
        progress("Solving", len(modules), len(modules))
        return WeightPatch.of(self.provenance(lm, settled, edits), changes, state)


_STATE = "ultraedit moments of "
_ROWS = 1024
"""Tokens that are looked at in float64 at a time, where there are many."""


def _layers(lm: LM, config: UltraEditConfig) -> tuple[int, ...]:
    n = lm.anatomy.n_layers
    return config.layers or tuple(range(n // 3, max(n // 3 + 1, 2 * n // 3)))


def _projections(lm: LM, layer: int, part: Literal["in", "out"]) -> Sequence[Projection]:
    return lm.anatomy.mlp_in(layer) if part == "in" else [lm.anatomy.mlp_out(layer)]


def _shape(projection: Projection) -> str:
    return "x".join(str(n) for n in projection.matrix.shape)


def _change(rows: Gradients, moments: Moments, lr: float, place: torch.device) -> LowRank | Dense:
    """Of one module, from all its rows."""
    moments = Moments.unpacked(moments.packed().to(place))
    values = torch.empty(rows.outputs.shape, dtype=torch.float32, device=place)
    for some, own in zip(rows.split(_ROWS, place), torch.split(values, _ROWS), strict=True):
        own.copy_(_values(moments, some, lr))
    return insert(values.T, rows.inputs.to(values).T, ridge=1.0)


def _values(moments: Moments, rows: Gradients, lr: float) -> Float[Tensor, "rows out"]:
    """`V`, what is to be added to each row's value."""
    normal = moments.normalise(rows.joined)
    width = rows.inputs.shape[1]
    h, g = normal[:, :width], normal[:, width:]
    return -lr * h.square().sum(1, keepdim=True) * g


def _by_shape(found: Mapping[Projection, Gradients], device: torch.device) -> dict[str, Moments]:
    """Of all rows `[h, g]` of the modules of one shape, which share their mean and deviation."""
    grouped: dict[str, Moments] = {}
    for projection, pair in found.items():
        shape = _shape(projection)
        for rows in pair.split(_ROWS, device):
            moments = Moments.of(rows.joined)
            grouped[shape] = grouped[shape].joined(moments) if shape in grouped else moments
    return grouped


def _with_earlier(lm: LM, shape: str, moments: Moments) -> Moments:
    """Joined with those that the patches on the model have kept, first to last."""
    for packed in kept(lm, _STATE + shape, len(moments.mean), rows=3):
        moments = Moments.unpacked(packed.to(moments.mean)).joined(moments)
    return moments
