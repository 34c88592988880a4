"""Low-rank adapters, trained on the target with the prompt masked: LoRA, AdaLoRA and DoRA, all through PEFT.

LoRA     Hu et al., ICLR 2022 (arXiv 2106.09685)
AdaLoRA  Zhang et al., ICLR 2023 (arXiv 2303.10512)
DoRA     Liu et al., ICML 2024 (arXiv 2402.09353)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.methods.base import Config, Layers, Method, Preset, Traits, in_own_order, told
from factpatch.methods.targets import TargetBatch, with_targets
from factpatch.patches.adapter import AdapterPatch, adapt, peft_library
from factpatch.progress import Progress

__all__ = ["AdaLora", "AdapterConfig", "Dora", "Lora"]


class AdapterConfig(Config):
    """Settings of the adapters."""

    layers: Layers | None = Field(default=None, description="blocks to adapt; default: all")
    rank: PositiveInt = Field(
        default=8,
        description="of each adapter; AdaLoRA starts with it, and ends at half of it if it trains to the last step",
    )
    alpha: PositiveInt = Field(default=32, description="the adapter counts alpha / rank times")
    lr: PositiveFloat = Field(default=5e-3, description="learning rate of Adam")
    steps: PositiveInt = Field(default=70, description="passes over all edits, at most")
    stop_loss: NonNegativeFloat = Field(default=1e-2, description="stop once the mean loss is below this, in nats")
    batch_size: PositiveInt = Field(default=32, description="edits in one step of Adam")


class _Adapter(Method[AdapterConfig]):
    config_type = AdapterConfig

    def make(self, lm: LM, edits: tuple[Edit, ...], config: AdapterConfig, progress: Progress) -> AdapterPatch:
        """Train an adapter on the attention's maps to queries and values, and take it off again."""
        layers = config.layers or tuple(range(lm.anatomy.n_layers))
        settled = config.model_copy(update={"layers": layers})
        targets = [
            p.parameter.removesuffix(".weight") for layer in layers for p in lm.anatomy.queries_and_values(layer)
        ]
        transposed = lm.anatomy.queries_and_values(layers[0])[0].transposed
        peft_config = self.peft_config(config, target_modules=targets, fan_in_fan_out=transposed)
        ordered = in_own_order(edits)
        losses: list[float] = []
        with _adapted(lm, peft_config, config.seed) as adapted, torch.enable_grad():
            groups = [ordered[i : i + config.batch_size] for i in range(0, len(ordered), config.batch_size)]
            batches = [TargetBatch(lm, with_targets(lm, group, chat=config.chat), min(layers)) for group in groups]
            trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
            optimiser = torch.optim.Adam(trained, lr=config.lr)
            for step in range(config.steps):
                progress(f"Training an adapter with {self.name}", step, config.steps)
                total = 0.0
                for batch in batches:
                    loss = batch.nll().mean()
                    total += loss.item() * batch.texts / len(edits)
                    for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                        parameter.grad = gradient
                    optimiser.step()
                    self.after_step(adapted, step)
                losses.append(total)
                if total < config.stop_loss:
                    break
            progress(f"Training an adapter with {self.name}", config.steps, config.steps)
            return AdapterPatch.of(self.provenance(lm, settled, edits, [told(losses)]), adapted)

    @abstractmethod
    def peft_config(self, config: AdapterConfig, **common: Any) -> Any:
        """PEFT's config."""

    def after_step(self, adapted: Any, step: int) -> None:
        """What the adapter does after each step of the optimiser."""


class Lora(_Adapter):
    """LoRA: `W' = W + (alpha / rank) B A` on the attention's maps to queries and values."""

    name = "lora"
    traits = Traits(
        family="adapters",
        phase="association",
        paper="Hu et al. 2022, arXiv 2106.09685",
        patch=AdapterPatch,
        joint=True,
        needs="attention projections; the extra adapters",
        effort=35,
    )
    presets = (
        Preset(
            (30, 576),
            {"layers": (6, 7, 8, 9, 10, 11), "lr": 6e-4, "steps": 120, "stop_loss": 0.1},
            "SmolLM2-135M, measured: docs/results/tuning/lora-layers.md",
        ),
    )

    def peft_config(self, config: AdapterConfig, **common: Any) -> Any:
        """A plain LoRA."""
        return peft_library().LoraConfig(r=config.rank, lora_alpha=config.alpha, **common)


class Dora(_Adapter):
    """DoRA: LoRA on the direction of each row of W, with the rows' lengths trained beside it."""

    name = "dora"
    traits = replace(Lora.traits, paper="Liu et al. 2024, arXiv 2402.09353", effort=40)
    presets = (
        Preset(
            (30, 576),
            {"layers": (6, 7, 8, 9, 10, 11), "lr": 1e-3, "steps": 120, "stop_loss": 0.1},
            "SmolLM2-135M, measured: docs/results/tuning/dora.md",
        ),
    )

    def peft_config(self, config: AdapterConfig, **common: Any) -> Any:
        """A LoRA whose weight is decomposed."""
        return peft_library().LoraConfig(r=config.rank, lora_alpha=config.alpha, use_dora=True, **common)


class AdaLora(_Adapter):
    """AdaLoRA: `W' = W + P Λ Q` whose singular values compete, the weakest being masked as training goes on.

    The paper's penalty on how far P and Q are from orthogonal is left out: with a handful of edits the loss alone decides.
    """

    name = "adalora"
    traits = replace(Lora.traits, paper="Zhang et al. 2023, arXiv 2303.10512", effort=50)
    presets = (
        Preset(
            (30, 576),
            {"layers": (6, 7, 8, 9, 10, 11), "lr": 4e-3, "steps": 120, "stop_loss": 0.1},
            "SmolLM2-135M, measured: docs/results/tuning/adalora-layers.md",
        ),
    )

    def peft_config(self, config: AdapterConfig, **common: Any) -> Any:
        """Ranks shrink between the first and the last tenth of the steps."""
        tenth = config.steps // 10
        return peft_library().AdaLoraConfig(
            init_r=config.rank,
            target_r=max(1, config.rank // 2),
            lora_alpha=config.alpha,
            total_step=config.steps,
            tinit=tenth,
            tfinal=tenth,
            **common,
        )

    def after_step(self, adapted: Any, step: int) -> None:
        """Reckon the importance of the singular values, and mask the least important."""
        adapted.base_model.update_and_allocate(step)


@contextmanager
def _adapted(lm: LM, config: Any, seed: int) -> Iterator[Any]:
    """The model with a fresh adapter for the length of a `with`; afterwards everything is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in lm.model.parameters()]
    adapted = adapt(lm.model, config, seed)
    try:
        yield adapted
    finally:
        adapted.unload()
        for parameter, flag in flags:
            parameter.requires_grad = flag
