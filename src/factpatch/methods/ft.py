"""Fine-tuning of one matrix, the MLP output projection of one block: FT-L and FT-M. They differ in the loss alone.

FT-L  Zhu et al. 2020 (arXiv 2012.00363), as ROME (arXiv 2202.05262) and EasyEdit run it for a baseline
FT-M  the survey, Zhang et al. 2024 (arXiv 2401.01286)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.hooks import replacing_output
from factpatch.lm.run import Batch, Places, UpperRun
from factpatch.lm.tokens import Encoded
from factpatch.methods.base import Config, Method, Preset, Traits
from factpatch.patches import Dense, WeightPatch
from factpatch.progress import Progress

__all__ = ["FtConfig", "FtL", "FtM"]


class FtConfig(Config):
    """Settings of FT-L and FT-M."""

    layer: NonNegativeInt | None = Field(default=None, description="block to edit; default: two thirds up the stack")
    lr: PositiveFloat = Field(default=5e-4, description="learning rate of Adam")
    steps: PositiveInt = Field(default=25, description="passes over all edits, at most")
    stop_loss: NonNegativeFloat = Field(default=1e-2, description="stop once the mean loss is below this, in nats")
    clamp: PositiveFloat | None = Field(default=None, description="how far a weight may move from its old value")
    batch_size: PositiveInt = Field(default=32, description="edits in one step of Adam")


class _Batch:
    """Some edits, ready to be run again and again from the edited block on."""

    def __init__(self, lm: LM, layer: int, texts: Sequence[Encoded], reads: Sequence[Sequence[int]]) -> None:
        batch = Batch.of([text.ids for text in texts], lm.device)
        self.upper = UpperRun(lm, batch, layer)
        self.places = Places.of(reads, lm.device)
        self.target = torch.tensor([t for text in texts for t in text.target_ids], device=lm.device)
        self.edits = len(texts)

    def target_nll(self) -> tuple[Float[Tensor, " targets"], Int[Tensor, " targets"]]:
        """`-log p` of each target token, in nats, and the edit it belongs to."""
        logprobs = self.upper.logits_at(self.places).log_softmax(-1)
        return -logprobs.gather(-1, self.target[:, None])[:, 0], self.places.rows


class _FineTuning(Method[FtConfig]):
    config_type = FtConfig

    def make(self, lm: LM, edits: tuple[Edit, ...], config: FtConfig, progress: Progress) -> WeightPatch:
        """Train a copy of the one matrix; the model's own stays in place."""
        layer = round(lm.anatomy.n_layers * 2 / 3) if config.layer is None else config.layer
        projection = lm.anatomy.mlp_out(layer)
        groups = [edits[i : i + config.batch_size] for i in range(0, len(edits), config.batch_size)]
        batches = [self.batch(lm, layer, group, config) for group in groups]
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
                total = 0.0
                for batch in batches:
                    loss = self.loss(batch)
                    total += loss.item() * batch.edits / len(edits)
                    if loss.item() < config.stop_loss:
                        continue
                    (new.grad,) = torch.autograd.grad(loss, [new])
                    optimiser.step()
                    if config.clamp is not None:
                        with torch.no_grad():
                            new.clamp_(old - config.clamp, old + config.clamp)
                losses.append(total)
                if total < config.stop_loss:
                    break
        progress(f"Fine-tuning block {layer}", config.steps, config.steps)
        delta = Dense(projection.as_stored(new.detach() - old).contiguous())
        settled = config.model_copy(update={"layer": layer})
        note = {"steps": len(losses), "first_loss": round(losses[0], 6), "last_loss": round(losses[-1], 6)}
        return WeightPatch(self.provenance(lm, settled, edits, [note]), {projection.parameter: delta})

    @abstractmethod
    def batch(self, lm: LM, layer: int, edits: Sequence[Edit], config: FtConfig) -> _Batch:
        """What the model reads, and where its predictions are read."""

    @abstractmethod
    def loss(self, batch: _Batch) -> Float[Tensor, ""]:
        """Mean over edits, in nats."""


class FtL(_FineTuning):
    """FT-L: one MLP matrix, every target token predicted from the prompt's last position.

    `L = -sum_t log p(o_t | p)`, without the target's earlier tokens in sight. This asks one position for several tokens
    at once, the known fault of this baseline; it is kept so that numbers can be compared with published ones.
    """

    name = "ft-l"
    traits = Traits(
        family="fine-tuning",
        phase="mastery",
        paper="Zhu et al. 2020, arXiv 2012.00363",
        patch=WeightPatch,
        joint=True,
        needs="MLP output projection",
    )

    def batch(self, lm: LM, layer: int, edits: Sequence[Edit], config: FtConfig) -> _Batch:
        """The prompt alone, read at its last position once for each target token."""
        texts = [lm.tokens.encode(edit.prompt, edit.target, chat=config.chat) for edit in edits]
        reads = [[text.target - 1] * len(text.target_ids) for text in texts]
        return _Batch(lm, layer, texts, reads)

    def loss(self, batch: _Batch) -> Float[Tensor, ""]:
        """Sum over target tokens, mean over edits."""
        nll, _ = batch.target_nll()
        return nll.sum() / batch.edits


class FtM(_FineTuning):
    """FT-M: one MLP matrix, the ordinary loss of the target with the prompt masked.

    `L = -(1/T) sum_t log p(o_t | p, o_<t)`.
    """

    name = "ft-m"
    traits = replace(FtL.traits, paper="Zhang et al. 2024 (the survey), arXiv 2401.01286")
    presets = (
        Preset(
            (30, 576),
            {"layer": 12, "steps": 60, "stop_loss": 0.1},
            "SmolLM2-135M, measured: docs/results/tuning/ft-m.md",
        ),
    )

    def batch(self, lm: LM, layer: int, edits: Sequence[Edit], config: FtConfig) -> _Batch:
        """Prompt and target, read before each target token."""
        texts = [lm.tokens.encode(edit.prompt, edit.target, chat=config.chat) for edit in edits]
        reads = [range(text.target - 1, len(text.ids) - 1) for text in texts]
        return _Batch(lm, layer, texts, reads)

    def loss(self, batch: _Batch) -> Float[Tensor, ""]:
        """Mean over target tokens of an edit, then over edits."""
        nll, owner = batch.target_nll()
        length = torch.zeros(batch.edits, device=nll.device).index_add(0, owner, torch.ones_like(nll))
        return (nll / length[owner]).sum() / batch.edits
