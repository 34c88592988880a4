"""Fine-tuning of one matrix, the MLP output projection of one block: FT-L, FT-M and FT-BF.

FT-L   Zhu et al. 2020 (arXiv 2012.00363), as ROME (arXiv 2202.05262) and EasyEdit run it for a baseline
FT-M   the survey, Zhang et al. 2024 (arXiv 2401.01286)
FT-BF  "Fine-tuning done right in model editing", 2025 (arXiv 2509.22072): breadth first, earlier edits rehearsed
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.hooks import replacing_output
from factpatch.methods.base import Config, Method, Preset, Traits, in_own_order
from factpatch.methods.targets import TargetBatch, with_targets
from factpatch.patches import Dense, WeightPatch
from factpatch.progress import Progress

__all__ = ["FtBf", "FtBfConfig", "FtConfig", "FtL", "FtM"]


class FtConfig(Config):
    """Settings of FT-L and FT-M."""

    layer: NonNegativeInt | None = Field(default=None, description="block to edit; default: two thirds up the stack")
    lr: PositiveFloat = Field(default=5e-4, description="learning rate of Adam")
    steps: PositiveInt = Field(default=25, description="passes over all edits, at most")
    stop_loss: NonNegativeFloat = Field(default=1e-2, description="stop once the mean loss is below this, in nats")
    clamp: PositiveFloat | None = Field(default=None, description="how far a weight may move from its old value")
    batch_size: PositiveInt = Field(default=32, description="edits in one step of Adam")


class FtBfConfig(FtConfig):
    """Settings of FT-BF."""

    batch_size: PositiveInt = Field(default=8, description="edits in one step of Adam")
    steps: PositiveInt = Field(default=60, description="passes over all edits, at most")
    stop_loss: NonNegativeFloat = Field(default=0.1, description="stop once the mean loss is below this, in nats")


C = TypeVar("C", bound=FtConfig)


class _FineTuning(Method[C], Generic[C]):
    def make(self, lm: LM, edits: tuple[Edit, ...], config: C, progress: Progress) -> WeightPatch:
        """Train a copy of the one matrix; the model's own stays in place."""
        layer = round(lm.anatomy.n_layers * 2 / 3) if config.layer is None else config.layer
        projection = lm.anatomy.mlp_out(layer)
        learnt = self.learnt(lm, edits, config)
        batches = [
            self.batch(lm, layer, learnt[i : i + config.batch_size], config)
            for i in range(0, len(learnt), config.batch_size)
        ]
        old = projection.matrix.detach().float()
        new = old.clone().requires_grad_()
        optimiser = torch.optim.Adam([new], lr=config.lr)
        losses: list[float] = []
        with (
            replacing_output(projection.module, lambda x, _: projection.apply(new.to(x.dtype), x)),
            torch.enable_grad(),
        ):
            for step in range(config.steps):
                progress(f"Fine-tuning block {layer}", step, config.steps)
                total, finished = 0.0, True
                for batch in batches:
                    loss, correct = self.loss(batch)
                    total += loss.item() * batch.texts / len(learnt)
                    if self.is_learnt(loss, correct, config):
                        continue
                    finished = False
                    (new.grad,) = torch.autograd.grad(loss, [new])
                    optimiser.step()
                    if config.clamp is not None:
                        with torch.no_grad():
                            new.clamp_(old - config.clamp, old + config.clamp)
                losses.append(total)
                if finished:
                    break
        progress(f"Fine-tuning block {layer}", config.steps, config.steps)
        settled = config.model_copy(update={"layer": layer})
        note = {"steps": len(losses), "first_loss": round(losses[0], 6), "last_loss": round(losses[-1], 6)}
        return WeightPatch.of(self.provenance(lm, settled, edits, [note]), {projection: Dense(new.detach() - old)})

    def learnt(self, lm: LM, edits: tuple[Edit, ...], config: C) -> Sequence[Edit]:  # noqa: ARG002
        """The edits to train on, in the order in which they are cut into batches."""
        return in_own_order(edits)

    def batch(self, lm: LM, layer: int, edits: Sequence[Edit], config: C) -> TargetBatch:
        """What the model reads, and where its predictions are read: prompt and target, before each target token."""
        return TargetBatch(lm, with_targets(lm, edits, chat=config.chat), layer)

    def loss(self, batch: TargetBatch) -> tuple[Float[Tensor, ""], Bool[Tensor, " texts"]]:
        """The mean over edits, in nats; and which of them are predicted as they should be."""
        nll, correct = batch.nll_and_correct()
        return nll.mean(), correct

    def is_learnt(self, loss: Float[Tensor, ""], correct: Bool[Tensor, " texts"], config: C) -> bool:  # noqa: ARG002
        """Whether a batch needs no further step for now."""
        return loss.item() < config.stop_loss


class FtL(_FineTuning[FtConfig]):
    """FT-L: one MLP matrix, every target token predicted from the prompt's last position.

    `L = -sum_t log p(o_t | p)`, without the target's earlier tokens in sight. This asks one position for several tokens
    at once, the known fault of this baseline; it is kept so that numbers can be compared with published ones.
    """

    name = "ft-l"
    config_type = FtConfig
    traits = Traits(
        family="fine-tuning",
        phase="mastery",
        paper="Zhu et al. 2020, arXiv 2012.00363",
        patch=WeightPatch,
        joint=True,
        needs="MLP output projection",
    )
    presets = (Preset((30, 576), {"layer": 18}, "SmolLM2-135M, measured: docs/results/tuning/ft-l-layers.md"),)

    def batch(self, lm: LM, layer: int, edits: Sequence[Edit], config: FtConfig) -> TargetBatch:
        """The prompt alone, read at its last position once for each target token."""
        texts = with_targets(lm, edits, chat=config.chat)
        return TargetBatch(lm, texts, layer, [[text.target - 1] * len(text.target_ids) for text in texts])

    def loss(self, batch: TargetBatch) -> tuple[Float[Tensor, ""], Bool[Tensor, " texts"]]:
        """Sum over target tokens, mean over edits."""
        nll = batch.token_nll()
        return nll.sum() / batch.texts, torch.zeros(batch.texts, dtype=torch.bool)


class FtM(_FineTuning[FtConfig]):
    """FT-M: one MLP matrix, the ordinary loss of the target with the prompt masked.

    `L = -(1/T) sum_t log p(o_t | p, o_<t)`.
    """

    name = "ft-m"
    config_type = FtConfig
    traits = replace(FtL.traits, paper="Zhang et al. 2024 (the survey), arXiv 2401.01286")
    presets = (
        Preset(
            (30, 576),
            {"layer": 12, "steps": 60, "stop_loss": 0.1},
            "SmolLM2-135M, measured: docs/results/tuning/ft-m.md",
        ),
    )


class FtBf(_FineTuning[FtBfConfig]):
    """FT-BF: FT-M's loss, breadth first: small batches drawn from all edits of the sequence, none trained to the end alone.

    Edits of the FT-BF patches that lie on the model are learnt again with the new ones, unless a new one has their prompt;
    so a sequence stays breadth first. A batch whose targets are all predicted as they should be, at a low loss, is passed
    over; training ends when all are.
    """

    name = "ft-bf"
    config_type = FtBfConfig
    traits = replace(FtL.traits, paper="Fine-tuning done right 2025, arXiv 2509.22072")
    presets = (Preset((30, 576), {"layer": 14}, "SmolLM2-135M, measured: docs/results/tuning/ft-bf.md"),)

    def learnt(self, lm: LM, edits: tuple[Edit, ...], config: FtBfConfig) -> Sequence[Edit]:
        """Earlier edits and these, shuffled; the order in which they are given does not count."""
        earlier = (p for p in lm.patches if isinstance(p, WeightPatch) and p.provenance.method == self.name)
        kept = {edit.prompt: edit for patch in earlier for edit in patch.provenance.edits}
        for edit in edits:
            kept.pop(edit.prompt, None)
        every = in_own_order([*kept.values(), *edits])
        random.Random(config.seed).shuffle(every)  # noqa: S311
        return every

    def is_learnt(self, loss: Float[Tensor, ""], correct: Bool[Tensor, " texts"], config: FtBfConfig) -> bool:
        """High accuracy and a low loss."""
        return bool(correct.all()) and loss.item() < config.stop_loss
