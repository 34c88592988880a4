"""ROME and r-ROME: one fact as one key and one value, inserted by a rank-one change of one MLP output projection.

ROME    Meng et al., NeurIPS 2022 (arXiv 2202.05262)
r-ROME  Gupta et al. 2024, "Rebuilding ROME" (arXiv 2403.07175)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt
from torch import Tensor

from factpatch.edits import Edit
from factpatch.errors import CannotEdit
from factpatch.lm import LM
from factpatch.methods.base import Method, Preset, Traits
from factpatch.methods.keys import context_prefixes, subject_keys, subject_texts
from factpatch.methods.moments import MomentConfig, factorised, second_moment
from factpatch.methods.values import ValueConfig, target_values
from factpatch.patches import LowRank, WeightPatch
from factpatch.progress import Progress, silent

__all__ = ["RRome", "RRomeConfig", "Rome", "RomeConfig", "insert"]


class RomeConfig(ValueConfig, MomentConfig):
    """Settings of ROME."""

    layer: NonNegativeInt | None = Field(default=None, description="block to edit; default: a quarter up the stack")
    contexts: NonNegativeInt = Field(default=20, description="sampled texts put before the prompt, beside none at all")
    covariance: bool = Field(default=True, description="weigh by the second moment of keys; false takes C = I")
    consistent_keys: bool = Field(default=False, description="the averaged key everywhere, as r-ROME does")


class RRomeConfig(RomeConfig):
    """Settings of r-ROME."""

    consistent_keys: bool = Field(default=True, description="the averaged key everywhere; false is ROME")


_PRESETS = (
    Preset(
        (30, 576),
        {"layer": 6, "steps": 60, "contexts": 5, "clamp": 8.0},
        "SmolLM2-135M, measured: docs/results/tuning/rome.md",
    ),
    Preset((48, 1600), {"layer": 17, "weight_decay": 0.5}, "GPT-2 XL in the release of ROME (arXiv 2202.05262)"),
    Preset((28, 4096), {"layer": 5, "weight_decay": 0.5}, "GPT-J in the release of ROME (arXiv 2202.05262)"),
    Preset((32, 4096), {"layer": 5}, "Llama-2-7B in the survey (arXiv 2401.01286)"),
)


class Rome(Method[RomeConfig]):
    """Rank-one edit of one MLP output projection, as published.

    The reference averages the key over contexts in the update's direction but takes the bare prompt's key elsewhere,
    which makes some edits destroy the model; `consistent_keys` mends it and makes this r-ROME.
    """

    name = "rome"
    config_type = RomeConfig
    presets = _PRESETS
    traits = Traits(
        family="locate then edit",
        phase="mastery",
        paper="Meng et al. 2022, arXiv 2202.05262",
        patch=WeightPatch,
        needs_subject=True,
        prepares="second moment of keys at one block",
        needs="MLP output projection",
    )

    def prepare(self, lm: LM, progress: Progress = silent) -> None:
        """Compute and cache the second moment."""
        config = self.resolve(lm)
        if config.covariance:
            second_moment(lm, _layer(lm, config), config, progress)

    def make(self, lm: LM, edits: tuple[Edit, ...], config: RomeConfig, progress: Progress) -> WeightPatch:
        """One edit after the other, each on the model as the earlier ones left it."""
        layer = _layer(lm, config)
        settled = config.model_copy(update={"layer": layer})
        projection = lm.anatomy.mlp_out(layer)
        factor = factorised(second_moment(lm, layer, config, progress), config.damping) if config.covariance else None
        prefixes = context_prefixes(lm, config.contexts, config.seed)
        notes: list[dict[str, Any]] = []
        change: LowRank | None = None

        def patch(change: LowRank) -> WeightPatch:
            stored = change.T if projection.transposed else change
            return WeightPatch(self.provenance(lm, settled, edits, notes), {projection.parameter: stored})

        for edit in edits:
            with lm.patched(*([] if change is None else [patch(change)])):
                step, note = self._one(lm, layer, edit, prefixes, factor, config, progress)
            notes.append({"edit": edit.id, **note})
            change = step if change is None else change + step
        assert change is not None, "fit refuses an empty batch"
        return patch(change)

    def _one(
        self,
        lm: LM,
        layer: int,
        edit: Edit,
        prefixes: tuple[str, ...],
        factor: Tensor | None,
        config: RomeConfig,
        progress: Progress,
    ) -> tuple[LowRank, dict[str, Any]]:
        projection = lm.anatomy.mlp_out(layer)
        (value,) = target_values(lm, [edit], layer, prefixes, config, progress)
        keys = subject_keys(lm, layer, subject_texts(lm, edit, prefixes, target=False, chat=config.chat))
        mean, bare = keys.mean(0), keys[0]
        key = mean if config.consistent_keys else bare
        with torch.no_grad():
            weight = projection.matrix.detach().float()
            output = projection.apply(weight, key)
            change = insert(value.old + value.delta - output, key, mean, factor)
        if not bool(change.u.isfinite().all() and change.v.isfinite().all()):
            raise CannotEdit(
                f'edit "{edit.id}": the update of {self.name} is not finite.\n'
                "  Try consistent_keys=true (r-rome), or another layer."
            )
        note = {
            "steps": len(value.losses),
            "first_loss": round(value.losses[0], 6),
            "last_loss": round(value.losses[-1], 6),
            "value_change": round(float(value.delta.norm() / value.old.norm()), 6),
            "weight_change": round(change.norm() / float(weight.norm()), 6),
        }
        return change, note


class RRome(Rome):
    """ROME with one key throughout, the mean over contexts; it does not destroy models."""

    name = "r-rome"
    config_type = RRomeConfig
    traits = replace(Rome.traits, paper="Gupta et al. 2024, arXiv 2403.07175")


def insert(
    residual: Float[Tensor, " hidden"],
    key: Float[Tensor, " inter"],
    direction_key: Float[Tensor, " inter"],
    factor: Float[Tensor, "inter inter"] | None,
) -> LowRank:
    """The smallest change in the metric of `C` that adds `residual` to what the projection says of `key`.

    W' = W + r uᵀ / (uᵀ k),  u = C⁻¹ k̄   (ROME, equation 2)

    `factor` is C's lower Cholesky factor, None for C = I. With `direction_key` k̄ equal to `key` k this is exact least
    squares; the published ROME takes the mean key for k̄ and the bare prompt's for k. Solved in float64, returned in
    float32, for W of shape (hidden, inter).
    """
    exact = direction_key.double().cpu()
    u = exact if factor is None else torch.cholesky_solve(exact[:, None], factor)[:, 0]
    scaled = u / (u @ key.double().cpu())
    return LowRank(residual.float()[:, None], scaled.to(residual.device, torch.float32)[None, :])


def _layer(lm: LM, config: RomeConfig) -> int:
    return round(lm.anatomy.n_layers * 0.27) if config.layer is None else config.layer
