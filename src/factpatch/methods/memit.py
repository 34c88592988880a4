"""MEMIT, PMET and AlphaEdit: many facts at once, spread over the MLP output projections of several blocks.

MEMIT      Meng et al., ICLR 2023 (arXiv 2210.07229)
PMET       Li et al., AAAI 2024 (arXiv 2308.08742)
AlphaEdit  Fang et al., ICLR 2025 (arXiv 2410.02355)

All search for what the last of these blocks should put out, then close the gap block by block, each time on the model as the
blocks before have been changed. They differ in what "put out" means, in how the gap is shared among the blocks, and in the
metric of the update.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.batches import BATCH_TOKENS
from factpatch.methods.base import Layers, Method, Preset, Traits
from factpatch.methods.insertion import insert, insert_needed, set_aside, with_room
from factpatch.methods.kept import kept
from factpatch.methods.keys import context_keys, context_prefixes, subject_outputs
from factpatch.methods.moments import (
    MomentConfig,
    directions,
    directions_needed,
    factors_held,
    least_used,
    making_factor,
    metric_factor,
    moments_needed,
    second_moments,
)
from factpatch.methods.needs import Held, Needs, Preparation, Stage, laid_on, low_rank, widest_pass
from factpatch.methods.values import ValueConfig, search_needed, target_values
from factpatch.patches import Dense, LowRank, WeightPatch
from factpatch.progress import Progress, silent
from factpatch.words import counted

__all__ = ["AlphaEdit", "AlphaEditConfig", "Memit", "MemitConfig", "Pmet", "SpreadConfig"]


class SpreadConfig(ValueConfig, MomentConfig):
    """Settings that MEMIT and its descendants share."""

    layers: Layers | None = Field(
        default=None, description="blocks to edit, such as 4,5,6,7,8; default: five, up to a quarter of the stack"
    )
    ends_only: bool = Field(
        default=False, description="change the first and the last block alone, each by the whole gap (BLUE)"
    )
    contexts: NonNegativeInt = Field(default=5, description="sampled texts put before the prompt, beside none at all")


class MemitConfig(SpreadConfig):
    """Settings of MEMIT and PMET."""

    prior: PositiveFloat = Field(
        default=15_000.0,
        description="weight of what is known already against one new fact (lambda); smaller edits harder",
    )


class AlphaEditConfig(SpreadConfig):
    """Settings of AlphaEdit."""

    lr: PositiveFloat = Field(default=0.1, description="learning rate of Adam")
    weight_decay: NonNegativeFloat = Field(default=0.5, description="weight of |change| / |old value|^2")
    clamp: PositiveFloat = Field(default=0.75, description="largest change, in norms of the old value")
    free_share: float = Field(
        default=0.9, gt=0, le=1, description="share of the directions of keys, least used first, that may change"
    )
    l2: PositiveFloat = Field(default=1.0, description="weight of keeping the change small")


C = TypeVar("C", bound=SpreadConfig)


class _Spread(Method[C], Generic[C]):
    def needs(self, lm: LM, edits: Sequence[Edit], config: C) -> Needs:
        """The search for values, then the keys and the solve of one block after the other, each matrix kept."""
        last = _layers(lm, config)[-1]
        edited = [lm.anatomy.mlp_out(layer) for layer in _edited(lm, config)]
        sites = self.sites(lm, last)
        first = last + (sites[0] is lm.anatomy.block(last))
        search = search_needed(lm, edits, first, config.contexts, config, len(sites))
        texts = len(edits) * (1 + config.contexts)
        out, width = (int(n) for n in edited[-1].matrix.shape)
        preparations, stages, solving = self.matrices_needed(lm, (out, width), len(edits), config)
        beside = (
            Held(what=f"keys of {texts} texts", bytes=4 * width * texts),
            Held(what="values before, wanted, and what lies between", bytes=16 * out * len(edits)),
            # As long as the longest that a batch may hold.
            widest_pass(lm, min(BATCH_TOKENS, 32 * texts)),
            laid_on(lm, edited),
        )
        changes = [low_rank(projection, len(edits)) for projection in edited]
        remembered = sum(
            4 * tensor.numel()
            for projection in edited
            for tensor in self.remembered(projection, torch.empty(width, len(edits), device="meta")).values()
        )
        return Needs(
            stages=(*stages, search, *(Stage(doing=one.doing, held=(*one.held, *beside)) for one in solving)),
            changes=tuple(change for change, _ in changes),
            preparations=preparations,
            patch_bytes=sum(size for _, size in changes) + remembered,
        )

    @abstractmethod
    def matrices_needed(
        self, lm: LM, shape: tuple[int, int], edits: int, config: C
    ) -> tuple[tuple[Preparation, ...], tuple[Stage, ...], tuple[Stage, ...]]:
        """What `solve` needs for so many edits of matrices of this shape, keys and values apart.

        What is prepared beforehand, in which stages, and in which stages the solve.
        """

    def make(self, lm: LM, edits: tuple[Edit, ...], config: C, progress: Progress) -> WeightPatch:
        """Search the values, then change one block after the other."""
        layers = _layers(lm, config)
        settled = config.model_copy(update={"layers": layers})
        edited = _edited(lm, config)
        prefixes = context_prefixes(lm, config.contexts, config.seed, lengths=(10,))
        site, *beside = self.sites(lm, layers[-1])
        first = layers[-1] + (site is lm.anatomy.block(layers[-1]))
        values = target_values(lm, edits, site, first, prefixes, config, progress, beside=beside)
        goal = torch.stack([value.old + value.delta for value in values])
        notes = [{"edit": edit.id, **value.note()} for edit, value in zip(edits, values, strict=True)]
        changes: dict[Projection, LowRank | Dense] = {}
        state: dict[str, Tensor] = {}
        for i, layer in enumerate(edited):
            progress(f"Changing block {layer}", i, len(edited))
            projection = lm.anatomy.mlp_out(layer)
            so_far = WeightPatch.of(self.provenance(lm, settled, edits), changes)
            with lm.patched(so_far):
                gap = (goal - subject_outputs(lm, site, edits, chat=config.chat)).T
                keys = context_keys(lm, layer, edits, prefixes, chat=config.chat).mean(1).T
            share = 1.0 if config.ends_only else self.share(len(edited) - i)
            changes[projection] = set_aside(self.solve(lm, layer, gap * share, keys, config, progress))
            state |= self.remembered(projection, keys)
        progress("Changing blocks", len(edited), len(edited))
        return WeightPatch.of(self.provenance(lm, settled, edits, notes), changes, state)

    def sites(self, lm: LM, layer: int) -> Sequence[nn.Module]:
        """The module whose output is searched for, then those whose outputs are searched along with it."""
        return [lm.anatomy.block(layer)]

    def share(self, left: int) -> float:
        """The part of the gap that one block closes, if `left` blocks are left, itself included."""
        return 1 / left

    @abstractmethod
    def solve(
        self,
        lm: LM,
        layer: int,
        residuals: Float[Tensor, "hidden edits"],
        keys: Float[Tensor, "inter edits"],
        config: C,
        progress: Progress,
    ) -> LowRank | Dense:
        """The change of one block's projection."""

    def remembered(self, projection: Projection, keys: Float[Tensor, "inter edits"]) -> dict[str, Tensor]:  # noqa: ARG002
        """What the next edits of a sequence need of this one."""
        return {}


class Memit(_Spread[MemitConfig]):
    """MEMIT: the values are outputs of the last block; each block closes its share of the gap by least squares.

    `Δ = R Kᵀ (λ C + K Kᵀ)⁻¹`, with the residuals R divided by the number of blocks left, and λ the weight of the keys known
    already.
    """

    name = "memit"
    config_type = MemitConfig
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            (30, 576),
            {"prior": 20.0, "steps": 60, "contexts": 1},
            "SmolLM2-135M, measured: docs/results/tuning/memit.md and memit-contexts.md",
        ),
        Preset(
            (48, 1600), {"layers": (13, 14, 15, 16, 17), "clamp": 0.75, "weight_decay": 0.5}, "GPT-2 XL in the release"
        ),
        Preset((28, 4096), {"layers": (3, 4, 5, 6, 7, 8), "clamp": 0.75, "weight_decay": 0.5}, "GPT-J in the release"),
        Preset((32, 4096), {"layers": (4, 5, 6, 7, 8)}, "Llama-2-7B in the survey (arXiv 2401.01286)"),
    )
    traits = Traits(
        family="locate then edit",
        phase="mastery",
        paper="Meng et al. 2023, arXiv 2210.07229",
        patch=WeightPatch,
        needs_subject=True,
        joint=True,
        prepares="second moments of keys at each block",
        needs="MLP output projection",
        effort=100,
    )

    def prepare(self, lm: LM, progress: Progress = silent) -> None:
        """Compute and cache the second moments."""
        config = self.resolve(lm)
        second_moments(lm, _edited(lm, config), config, progress)

    def matrices_needed(
        self, lm: LM, shape: tuple[int, int], edits: int, config: MemitConfig
    ) -> tuple[tuple[Preparation, ...], tuple[Stage, ...], tuple[Stage, ...]]:
        """A factor for each block, all of them kept."""
        layers, (_, width) = _edited(lm, config), shape
        held = (*factors_held(width, len(layers)), insert_needed(*shape, edits, metric=True))
        solving = Stage(doing="Changing the last block", held=held)
        return *moments_needed(lm, layers, config), (making_factor(width, len(layers) - 1), solving)

    def solve(
        self,
        lm: LM,
        layer: int,
        residuals: Float[Tensor, "hidden edits"],
        keys: Float[Tensor, "inter edits"],
        config: MemitConfig,
        progress: Progress,
    ) -> LowRank | Dense:
        """Equation 14."""
        factor = metric_factor(lm, layer, config, progress, beside=_edited(lm, config))
        return insert(residuals, keys, factor, ridge=config.prior)


class Pmet(Memit):
    """PMET: the outputs of attention and MLP are searched for side by side; the MLP's alone is aimed at.

    The residual is divided by the root of the number of blocks left, so that later blocks carry more.
    """

    name = "pmet"
    traits = replace(Memit.traits, paper="Li et al. 2024, arXiv 2308.08742")
    presets: ClassVar[tuple[Preset, ...]] = (
        replace(Memit.presets[0], source="SmolLM2-135M, measured: docs/results/tuning/pmet.md"),
        *Memit.presets[1:],
    )

    def sites(self, lm: LM, layer: int) -> Sequence[nn.Module]:
        """The MLP's output, and the attention's beside it."""
        return [lm.anatomy.mlp_out(layer).module, lm.anatomy.attention_out(layer).module]

    def share(self, left: int) -> float:
        """Section 3.4 of the paper."""
        return float(left**-0.5)


class AlphaEdit(_Spread[AlphaEditConfig]):
    """AlphaEdit: MEMIT's values, the update projected onto directions that other keys hardly use.

    `Δ P = R Kᵀ P (P M P + l2 I)⁻¹` with `M = K Kᵀ` summed over this and all earlier edits, P the projector onto the least
    used directions of keys. Keys of earlier edits are taken from the AlphaEdit patches that lie on the model.
    """

    name = "alphaedit"
    config_type = AlphaEditConfig
    traits = replace(
        Memit.traits,
        paper="Fang et al. 2025, arXiv 2410.02355",
        prepares="directions of keys at each block, by how much they are used",
    )
    presets = (
        Preset(
            (30, 576),
            {"lr": 0.5, "weight_decay": 1e-3, "steps": 60, "clamp": 4.0, "contexts": 1},
            "SmolLM2-135M, measured: docs/results/tuning/alphaedit.md and alphaedit-contexts.md",
        ),
    )

    def prepare(self, lm: LM, progress: Progress = silent) -> None:
        """Compute and cache the directions."""
        config = self.resolve(lm)
        directions(lm, _edited(lm, config), config, progress)

    def matrices_needed(
        self, lm: LM, shape: tuple[int, int], edits: int, config: AlphaEditConfig
    ) -> tuple[tuple[Preparation, ...], tuple[Stage, ...], tuple[Stage, ...]]:
        """Free directions of each block, all of them kept; one of them in float64, and what is found in its coordinates."""
        layers, (out, width) = _edited(lm, config), shape
        free = max(1, round(config.free_share * width))
        kept = Held(
            what=f"free directions of {counted(len(layers), 'block')}",
            bytes=4 * width * free * len(layers),
            host=True,
        )
        reading = Held(what="directions as they are read", bytes=4 * width**2, host=True)
        one = Held(what="one block's directions in float64", bytes=8 * width * free)
        own = Held(what=f"{edits} keys by these directions, float64", bytes=8 * free * edits)
        turning = Held(what="one block's directions in float32", bytes=4 * width * free)
        return *directions_needed(lm, layers, config), (
            Stage(doing="Reading directions", held=(kept, reading)),
            Stage(doing="Changing the last block", held=(kept, one, own, insert_needed(out, free, edits, exact=True))),
            Stage(doing="Turning its change back", held=(kept, one, own, turning)),
        )

    def solve(
        self,
        lm: LM,
        layer: int,
        residuals: Float[Tensor, "hidden edits"],
        keys: Float[Tensor, "inter edits"],
        config: AlphaEditConfig,
        progress: Progress,
    ) -> LowRank | Dense:
        """Equation 14, in the coordinates of the free directions, where the projector is the identity."""
        free = least_used(lm, layer, config.free_share, config, progress, beside=_edited(lm, config))
        kept_keys = kept(lm, _keys_of(lm.anatomy.mlp_out(layer)), len(keys))
        earlier = torch.cat([torch.empty(0, len(keys)), *kept_keys]).T

        def solve(place: torch.device) -> LowRank | Dense:
            onto = free.to(place).T
            new, still = (onto @ each.to(place, torch.double) for each in (keys, earlier))
            return insert(residuals, new, ridge=config.l2, still=still if still.shape[1] else None).after(onto)

        return with_room(lm.device, solve)

    def remembered(self, projection: Projection, keys: Float[Tensor, "inter edits"]) -> dict[str, Tensor]:
        """The keys, which later edits must leave alone."""
        return {_keys_of(projection): keys.T.contiguous()}


def _keys_of(projection: Projection) -> str:
    """The name under which a patch keeps them, those of one edit a row."""
    return f"alphaedit keys of {projection.parameter}"


def _layers(lm: LM, config: SpreadConfig) -> tuple[int, ...]:
    if config.layers is not None:
        return config.layers
    last = round(lm.anatomy.n_layers / 4)
    return tuple(range(max(0, last - 4), last + 1))


def _edited(lm: LM, config: SpreadConfig) -> tuple[int, ...]:
    """Those of these blocks that are changed."""
    layers = _layers(lm, config)
    return tuple(dict.fromkeys((layers[0], layers[-1]))) if config.ends_only else layers
