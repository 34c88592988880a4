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
from factpatch.lm.batches import length_batches
from factpatch.lm.hooks import replacing_output
from factpatch.methods.base import Config, Method, Preset, Traits, in_own_order, told
from factpatch.methods.needs import Change, Held, Needs, Stage, kept_tokens, predictions
from factpatch.methods.targets import TargetBatch, constant_weights, with_targets
from factpatch.patches import Dense, WeightPatch
from factpatch.progress import Progress

__all__ = ["FtBf", "FtBfConfig", "FtConfig", "FtL", "FtM"]


_FEWEST_TOKENS = 128
"""That run at once; with fewer, reading the weights takes longer than using them."""


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
    def needs(self, lm: LM, edits: Sequence[Edit], config: C) -> Needs:
        """One part's activations at a time, what the blocks beneath put out for all, and the matrix as Adam trains it."""
        layer = _layer(lm, config)
        projection = lm.anatomy.mlp_out(layer)
        out, width = (int(n) for n in projection.matrix.shape)
        learnt = self.learnt(lm, tuple(edits), config)
        chunks = [learnt[i : i + config.batch_size] for i in range(0, len(learnt), config.batch_size)]
        texts = [
            with_targets(lm, part, chat=config.chat) for chunk in chunks for part in _parts(lm, layer, chunk, config)
        ]
        tokens = [len(part) * max(len(text.ids) for text in part) for part in texts]
        reads = [sum(len(text.target_ids) for text in part) for part in texts]
        size, half = out * width, lm.dtype.itemsize < 4
        beneath = sum(tokens) * lm.anatomy.hidden_size * lm.dtype.itemsize
        held = (
            kept_tokens(lm, layer, max(tokens)),
            predictions(lm, max(reads)),
            Held(what=f"what block {layer} reads of all edits", bytes=beneath),
            Held(what="the matrix being trained, its gradient and Adam's two moments, float32", bytes=16 * size),
            Held(
                what="Adam's step, and the old weights where they are bounded", bytes=(8 if config.clamp else 4) * size
            ),
            *(
                [Held(what="the old matrix in float32, the new one in the model's type", bytes=8 * size)]
                if half
                else []
            ),
        )
        change = Change(part=projection.parameter, shape=(out, width), form="dense")
        return Needs(stages=(Stage(doing="Fine-tuning", held=held),), changes=(change,), patch_bytes=4 * size)

    def make(self, lm: LM, edits: tuple[Edit, ...], config: C, progress: Progress) -> WeightPatch:
        """Train a copy of the one matrix; the model's own stays in place."""
        layer = _layer(lm, config)
        projection = lm.anatomy.mlp_out(layer)
        learnt = self.learnt(lm, edits, config)
        batches = [
            [
                self.batch(lm, layer, part, config)
                for part in _parts(lm, layer, learnt[i : i + config.batch_size], config)
            ]
            for i in range(0, len(learnt), config.batch_size)
        ]
        old = projection.matrix.detach().float()
        new = old.clone().requires_grad_()
        optimiser = torch.optim.Adam([new], lr=config.lr)
        losses: list[float] = []
        with (
            constant_weights(lm),
            replacing_output(projection.module, lambda x, _: projection.apply(new.to(x.dtype), x)),
            torch.enable_grad(),
        ):
            for step in range(config.steps):
                progress(f"Fine-tuning block {layer}", step, config.steps)
                total, finished = 0.0, True
                for batch in batches:
                    loss, new.grad = self._read(batch, new, config)
                    total += loss * sum(part.texts for part in batch) / len(learnt)
                    if new.grad is None:
                        continue
                    finished = False
                    optimiser.step()
                    if config.clamp is not None:
                        with torch.no_grad():
                            new.clamp_(old - config.clamp, old + config.clamp)
                losses.append(total)
                if finished:
                    break
        progress(f"Fine-tuning block {layer}", config.steps, config.steps)
        settled = config.model_copy(update={"layer": layer})
        return WeightPatch.of(
            self.provenance(lm, settled, edits, [told(losses)]), {projection: Dense(new.detach() - old)}
        )

    def _read(
        self, batch: Sequence[TargetBatch], new: Float[Tensor, "out in"], config: C
    ) -> tuple[float, Float[Tensor, "out in"] | None]:
        """The loss of a batch that may run in parts, and its gradient; None where there is nothing left to learn."""
        texts = sum(part.texts for part in batch)
        loss, gradient = 0.0, None
        learnt: list[Tensor] = []
        share: Tensor | None = None
        for part in batch:
            if share is not None:  # let go of what the part before has kept for its gradient
                gradient = _added(gradient, share, new)
            own, correct = self.loss(part)
            share = own * (part.texts / texts)
            loss += share.item()
            learnt.append(correct)
        assert share is not None, "a batch has at least one part"
        if self.is_learnt(loss, torch.cat(learnt), config):
            return loss, None
        return loss, _added(gradient, share, new)

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

    def is_learnt(self, loss: float, correct: Bool[Tensor, " texts"], config: C) -> bool:  # noqa: ARG002
        """Whether a batch needs no further step for now."""
        return loss < config.stop_loss


def _layer(lm: LM, config: FtConfig) -> int:
    return round(lm.anatomy.n_layers * 2 / 3) if config.layer is None else config.layer


def _parts(lm: LM, layer: int, edits: Sequence[Edit], config: FtConfig) -> list[list[Edit]]:
    """The edits of one batch as they run at once, in their order: all of them, if that does not take too much memory."""
    lengths = [len(text.ids) for text in with_targets(lm, edits, chat=config.chat)]
    return [[edits[i] for i in sorted(part)] for part in length_batches(lengths, _tokens_at_once(lm, layer))]


def _tokens_at_once(lm: LM, layer: int) -> int:
    """As many as let that which is kept for the gradient take about a quarter of the model's size, a third at most.

    Of each token a block keeps one to two times as many numbers as it has weights for each entry of the hidden state. The
    logits are few, since only the targets' are read; so this lets more through than `tokens_at_once` of the searches.
    """
    weights = sum(p.numel() for block in lm.anatomy.blocks[layer:] for p in block.parameters())
    size = sum(weight.numel() for weight in lm.model.parameters())
    return max(_FEWEST_TOKENS, size // 3 // (2 * weights // lm.anatomy.hidden_size))


def _added(
    gradient: Float[Tensor, "out in"] | None, loss: Float[Tensor, ""], new: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """The gradient of `loss` on top of that of the parts before."""
    (own,) = torch.autograd.grad(loss, [new])
    return own if gradient is None else gradient + own


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
        effort=30,
    )
    presets = (Preset((30, 576), {"layer": 18}, "SmolLM2-135M, measured: docs/results/tuning/ft-l-layers.md"),)

    def batch(self, lm: LM, layer: int, edits: Sequence[Edit], config: FtConfig) -> TargetBatch:
        """Read at the prompt's last position once for each target token; what follows cannot be seen from there."""
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

    def is_learnt(self, loss: float, correct: Bool[Tensor, " texts"], config: FtBfConfig) -> bool:
        """High accuracy and a low loss."""
        return bool(correct.all()) and loss < config.stop_loss
