"""ROME, r-ROME and EMMET: facts as keys and values, inserted into the MLP output projection of one block.

ROME    Meng et al., NeurIPS 2022 (arXiv 2202.05262)
r-ROME  Gupta et al. 2024, "Rebuilding ROME" (arXiv 2403.07175)
EMMET   Gupta et al. 2024, "A unified framework for model editing" (arXiv 2403.14236)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.methods.base import Method, Preset, Traits
from factpatch.methods.insertion import insert, insert_needed
from factpatch.methods.keys import context_keys, context_prefixes
from factpatch.methods.moments import (
    MomentConfig,
    factors_held,
    making_factor,
    metric_factor,
    moments_needed,
    second_moment,
)
from factpatch.methods.needs import Held, Needs, Stage, laid_on, low_rank, most
from factpatch.methods.values import TargetValue, ValueConfig, search_needed, target_values
from factpatch.patches import LowRank, WeightPatch
from factpatch.patches.delta import moved
from factpatch.progress import Progress, silent

__all__ = ["Emmet", "EmmetConfig", "RRome", "RRomeConfig", "Rome", "RomeConfig"]


class RomeConfig(ValueConfig, MomentConfig):
    """Settings of ROME."""

    layer: NonNegativeInt | None = Field(default=None, description="block to edit; default: a quarter up the stack")
    contexts: NonNegativeInt = Field(default=20, description="sampled texts put before the prompt, beside none at all")
    covariance: bool = Field(default=True, description="weigh by the second moment of keys; false takes C = I")
    consistent_keys: bool = Field(default=False, description="the averaged key everywhere, as r-ROME does")
    ridge: NonNegativeFloat = Field(default=0.0, description="how far values may be missed to keep the change small")


class RRomeConfig(RomeConfig):
    """Settings of r-ROME."""

    consistent_keys: bool = Field(default=True, description="the averaged key everywhere; false is ROME")


class EmmetConfig(RRomeConfig):
    """Settings of EMMET."""

    ridge: NonNegativeFloat = Field(default=0.1, description="how far values may be missed to keep the change small")


_PRESETS = (
    Preset(
        (30, 576),
        {"layer": 6, "steps": 60, "contexts": 2, "clamp": 8.0},
        "SmolLM2-135M, measured: docs/results/tuning/rome.md and rome-contexts.md",
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
        effort=80,
    )

    def prepare(self, lm: LM, progress: Progress = silent) -> None:
        """Compute and cache the second moment."""
        config = self.resolve(lm)
        if config.covariance:
            second_moment(lm, _layer(lm, config), config, progress)

    def needs(self, lm: LM, edits: Sequence[Edit], config: RomeConfig) -> Needs:
        """The search of values on the model as the earlier edits left it, beside the factor; and the solve."""
        layer = _layer(lm, config)
        projection = lm.anatomy.mlp_out(layer)
        out, width = (int(n) for n in projection.matrix.shape)
        preparations, stages = moments_needed(lm, [layer], config) if config.covariance else ((), ())
        metric: tuple[Held, ...] = ()
        if config.covariance:
            stages = (*stages, making_factor(width))
            metric = factors_held(width)
        groups = [list(edits)] if self.traits.joint else [[edit] for edit in edits]
        search = most(search_needed(lm, group, layer, config.contexts, config) for group in groups)
        copies = laid_on(lm, [projection])
        keys = max(map(len, groups))
        texts = keys * (1 + config.contexts)
        solving = (
            *metric,
            Held(what="the matrix in float32", bytes=4 * out * width),
            Held(what=f"keys of {texts} texts", bytes=4 * width * texts),
            insert_needed(out, width, keys, metric=config.covariance, directions=True),
            copies,
        )
        stages = (*stages, Stage(doing=search.doing, held=(*search.held, *metric, copies)))
        change, size = low_rank(projection, len(edits))
        return Needs(
            stages=(*stages, Stage(doing="Solving", held=solving)),
            changes=(change,),
            preparations=preparations,
            patch_bytes=size,
        )

    def make(self, lm: LM, edits: tuple[Edit, ...], config: RomeConfig, progress: Progress) -> WeightPatch:
        """One edit after the other, each on the model as the earlier ones left it; or all at once."""
        layer = _layer(lm, config)
        settled = config.model_copy(update={"layer": layer})
        factor = metric_factor(lm, layer, config, progress) if config.covariance else None
        prefixes = context_prefixes(lm, config.contexts, config.seed)
        notes: list[dict[str, Any]] = []
        change: LowRank | None = None

        def patch(change: LowRank) -> WeightPatch:
            delta = {lm.anatomy.mlp_out(layer): change}
            return WeightPatch.of(self.provenance(lm, settled, edits, notes), delta)

        for group in [edits] if self.traits.joint else [(edit,) for edit in edits]:
            with lm.patched(*([] if change is None else [patch(change)])):
                values = target_values(lm, group, lm.anatomy.mlp_out(layer).module, layer, prefixes, config, progress)
                step = self._step(lm, layer, group, values, prefixes, factor, config)
            notes += [{"edit": edit.id, **value.note()} for edit, value in zip(group, values, strict=True)]
            change = step if change is None else change + step
        assert change is not None, "fit refuses an empty batch"
        return patch(change)

    def _step(
        self,
        lm: LM,
        layer: int,
        edits: Sequence[Edit],
        values: Sequence[TargetValue],
        prefixes: Sequence[str],
        factor: Tensor | None,
        config: RomeConfig,
    ) -> LowRank:
        projection = lm.anatomy.mlp_out(layer)
        every = context_keys(lm, layer, edits, prefixes, chat=config.chat)
        mean = every.mean(1)
        keys = mean if config.consistent_keys else every[:, 0]
        with torch.no_grad():
            outputs = projection.apply(projection.matrix.float(), keys)
            residuals = torch.stack([value.old + value.delta for value in values]) - outputs
            step = insert(residuals.T, keys.T, factor, ridge=config.ridge, directions=mean.T)
        assert isinstance(step, LowRank), "directions are given"
        return moved(step, torch.device("cpu"))


class RRome(Rome):
    """ROME with one key throughout, the mean over contexts; it does not destroy models."""

    name = "r-rome"
    config_type = RRomeConfig
    traits = replace(Rome.traits, paper="Gupta et al. 2024, arXiv 2403.07175")


class Emmet(Rome):
    """EMMET: many facts at once, each met as exactly as ROME meets one, by one change of rank n.

    `Δ = (V - W K)(Kᵀ C⁻¹ K + ridge)⁻¹ Kᵀ C⁻¹`; with one edit and no ridge this is r-ROME. The ridge keeps edits whose
    keys nearly coincide from tearing the matrix.
    """

    name = "emmet"
    config_type = EmmetConfig
    traits = replace(Rome.traits, paper="Gupta et al. 2024, arXiv 2403.14236", joint=True)


def _layer(lm: LM, config: RomeConfig) -> int:
    return round(lm.anatomy.n_layers * 0.27) if config.layer is None else config.layer
