"""WISE: edits go into side copies of one late matrix, and prompts that are about them are routed there.

Wang et al., NeurIPS 2024 (arXiv 2405.14768).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from factpatch.data import read
from factpatch.edits import Edit
from factpatch.errors import BadConfig
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.batches import Batch
from factpatch.lm.hooks import replacing_output
from factpatch.lm.run import input_of, output_of
from factpatch.methods.base import Config, Method, Preset, Traits, told
from factpatch.methods.keys import context_prefixes
from factpatch.methods.targets import TargetBatch
from factpatch.patches.delta import Sparse
from factpatch.patches.side import SideMemory, SidePatch, memories, routing_activation
from factpatch.progress import Progress

__all__ = ["Wise", "WiseConfig", "margin_loss", "ties"]


class WiseConfig(Config):
    """Settings of WISE. Activations are counted in units of what the matrix usually puts out at a token."""

    layer: NonNegativeInt | None = Field(default=None, description="block to edit; default: five sixths up the stack")
    contexts: NonNegativeInt = Field(default=10, description="texts of the model's own that are put before the prompt")
    unrelated: PositiveInt = Field(default=8, description="other prompts, on which the memory must stay quiet")
    corpus: str = Field(default="sample", description="where those come from, as NAME:PATH; see factpatch data")
    steps: PositiveInt = Field(default=70, description="gradient steps for each edit, at most")
    lr: PositiveFloat = Field(default=1.0, description="learning rate of plain gradient descent")
    stop_loss: NonNegativeFloat = Field(default=1e-2, description="stop once the loss is below this, margins met")
    share: float = Field(default=0.2, gt=0, le=1, description="share of the matrix that one memory may change")
    bound: PositiveFloat = Field(default=1.0, description="most that one weight may change")
    quiet: NonNegativeFloat = Field(default=0.1, description="activation that unrelated prompts stay below (alpha)")
    loud: NonNegativeFloat = Field(default=0.4, description="activation that edits rise above (beta)")
    gap: NonNegativeFloat = Field(default=0.2, description="by how much edits rise above the unrelated (gamma)")
    ratio: float = Field(default=0.88, gt=0, description="share of the least edit's activation that routes a prompt")
    save_every: PositiveInt = Field(default=500, description="edits in one memory")
    merge_every: PositiveInt = Field(default=1000, description="edits after which the memories are merged into one")
    retrieve: bool = Field(default=False, description="never merge: keep all memories and take the most active")
    density: float = Field(default=0.53, gt=0, le=1, description="share of a memory's entries that merging keeps")


class Wise(Method[WiseConfig]):
    """WISE: a prompt goes through the side copy where its routing activation is as high as an edit's; else nothing changes.

    The copy is trained on the target's NLL after several contexts, plus margins that keep the activation high on the edit
    and low on unrelated prompts. Each memory may change a random share of the matrix. Full memories are merged by TIES.
    """

    name = "wise"
    config_type = WiseConfig
    traits = Traits(
        family="memory inside",
        phase="association",
        paper="Wang et al. 2024, arXiv 2405.14768",
        patch=SidePatch,
        needs="MLP output projection",
        effort=250,
    )
    presets = (Preset((30, 576), {"lr": 10.0}, "SmolLM2-135M, measured: docs/results/tuning/wise.md"),)

    def make(self, lm: LM, edits: tuple[Edit, ...], config: WiseConfig, progress: Progress) -> SidePatch:
        """One edit after the other, each in the memory that the earlier ones left."""
        layer = round(lm.anatomy.n_layers * 5 / 6) if config.layer is None else config.layer
        settled = config.model_copy(update={"layer": layer})
        projection = lm.anatomy.mlp_out(layer)
        site = projection.parameter.removesuffix(".weight")
        beneath = SidePatch.on(lm, site)
        patch = SidePatch(self.provenance(lm, settled, edits), site, config.ratio, merged=False, added={})
        notes: list[dict[str, Any]] = []
        with lm.without(*beneath):
            training = _Training(lm, projection, layer, config)
            for i, edit in enumerate(edits):
                progress("Training a side memory", i, len(edits))
                patch, note = self._learn(training, patch, beneath, edit, config)
                notes.append({"edit": edit.id, **note})
            progress("Training a side memory", len(edits), len(edits))
        finished = patch.provenance.model_copy(update={"notes": tuple(notes)})
        return SidePatch(finished, site, config.ratio, patch.merged, patch.added)

    def _learn(
        self, training: _Training, patch: SidePatch, beneath: Sequence[SidePatch], edit: Edit, config: WiseConfig
    ) -> tuple[SidePatch, dict[str, Any]]:
        """The patch with one more edit, its memories merged if they have become full."""
        there = memories([*beneath, patch])
        number = max(there, default=0)
        if number in there and there[number].edits >= config.save_every:
            number += 1
        change, least, losses = training.learn(edit, number, there.get(number))
        added = SideMemory(Sparse.of(change), least, 1)
        patch = _with(patch, number, patch.added[number] + added if number in patch.added else added)
        note = {
            "memory": number,
            **told(losses),
            "activation": round(least, 6),
        }
        full = memories([*beneath, patch])
        if not config.retrieve and sum(m.edits for m in full.values()) % config.merge_every == 0 and len(full) > 1:
            merged = Sparse.of(ties([memory.change.full() for memory in full.values()], config.density))
            least = min(memory.least for memory in full.values())
            one = SideMemory(merged, least, sum(memory.edits for memory in full.values()))
            patch = SidePatch(patch.provenance, patch.site, patch.ratio, merged=True, added={number: one})
        return patch, note


def _with(patch: SidePatch, number: int, memory: SideMemory) -> SidePatch:
    return SidePatch(patch.provenance, patch.site, patch.ratio, patch.merged, {**patch.added, number: memory})


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a matrix reads and puts out in some texts, and which of their tokens belong to the prompt."""

    x: Float[Tensor, "rows seq in"]
    out: Float[Tensor, "rows seq out"]
    prompt: Bool[Tensor, "rows seq"]


class _Training:
    """Puts edits into the side memories of one matrix; no side memory lies on the model meanwhile."""

    def __init__(self, lm: LM, projection: Projection, layer: int, config: WiseConfig) -> None:
        self.lm, self.projection, self.layer, self.config = lm, projection, layer, config
        self.activation = lm.anatomy.activation
        self.prefixes = context_prefixes(lm, config.contexts, config.seed)
        self.corpus = read(config.corpus).edits
        self.unit = self._unit()

    def learn(
        self, edit: Edit, number: int, memory: SideMemory | None
    ) -> tuple[Float[Tensor, "out in"], float, list[float]]:
        """What the edit adds to memory `number`, the edit's routing activation after it, and the losses."""
        config, lm = self.config, self.lm
        start = torch.zeros_like(self.projection.matrix, dtype=torch.float32)
        if memory is not None:
            start = memory.change.full().to(start)
        change = start.clone().requires_grad_()
        mask = self._mask(number).to(start)
        texts = [lm.tokens.encode(edit.prompt, edit.target, prefix=p, chat=config.chat) for p in self.prefixes]
        batch = TargetBatch(lm, texts, self.layer)
        inside, outside = self._read(batch.batch), self._unrelated(edit)
        losses: list[float] = []
        with self._beside(change), torch.enable_grad():
            for step in range(config.steps):
                nll = batch.nll().mean()
                margins = margin_loss(
                    self._activation(inside, change) / self.unit, self._activation(outside, change) / self.unit, config
                )
                losses.append(float((nll + margins).detach()))
                if losses[-1] < config.stop_loss or step == config.steps - 1:
                    break
                (gradient,) = torch.autograd.grad(nll + margins, [change])
                with torch.no_grad():
                    change -= config.lr * gradient * mask
                    change.clamp_(-config.bound, config.bound)
        with torch.no_grad():
            least = float(self._activation(inside, change)[0])
        return (change - start).detach(), least, losses

    def _activation(self, reading: _Reading, change: Float[Tensor, "out in"]) -> Float[Tensor, " rows"]:
        return routing_activation(reading.out, reading.x @ change.T, reading.prompt, self.activation)

    def _read(self, batch: Batch) -> _Reading:
        module = self.projection.module
        prompt = batch.mask.bool() & (torch.arange(batch.ids.shape[1], device=batch.ids.device) <= batch.ends[:, None])
        x, out = input_of(self.lm, module, batch), output_of(self.lm, module, batch)
        return _Reading(x.float(), out.float(), prompt)

    def _unrelated(self, edit: Edit) -> _Reading:
        """Prompts of other edits, the same ones for the same edit whatever else is edited."""
        others = [
            o for o in self.corpus if o.prompt != edit.prompt and (edit.subject is None or o.subject != edit.subject)
        ]
        if not others:
            what = "with another prompt" if edit.subject is None else f"about another subject than {edit.subject!r}"
            raise BadConfig(
                f'wise: corpus "{self.config.corpus}" has no edit {what}.\n'
                "  Give one with edits about many: --set corpus=NAME:PATH"
            )
        generator = torch.Generator().manual_seed(self.config.seed + len(edit.prompt))
        picked = torch.randperm(len(others), generator=generator)[: self.config.unrelated].tolist()
        texts = [self.lm.tokens.encode(others[i].prompt, chat=self.config.chat).ids for i in picked]
        return self._read(Batch.of(texts, self.lm.device))

    def _mask(self, number: int) -> Bool[Tensor, "out in"]:
        """The entries that memory `number` may change."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + number)
        return torch.rand(self.projection.matrix.shape, generator=generator) < self.config.share

    def _unit(self) -> float:
        """How large what the matrix puts out usually is, after the activation: the median over tokens of the corpus."""

        def measure() -> float:
            texts = [self.lm.tokens.encode(edit.prompt).ids for edit in self.corpus[:32]]
            reading = self._read(Batch.of(texts, self.lm.device))
            norms: Tensor = self.activation(reading.out).norm(dim=-1)
            return float(norms[reading.prompt].median())

        return self.lm.once(("wise unit", self.projection.parameter, self.config.corpus), measure)

    @contextmanager
    def _beside(self, change: Float[Tensor, "out in"]) -> Any:
        def add(x: Tensor, out: Tensor) -> Tensor:
            return out + (x.float() @ change.T).to(out.dtype)

        with replacing_output(self.projection.module, add):
            yield


def margin_loss(
    inside: Float[Tensor, " edits"], outside: Float[Tensor, " others"], config: WiseConfig
) -> Float[Tensor, ""]:
    """`max(0, a_out - α) + max(0, β - a_in) + max(0, a_out - a_in + γ)`, each the mean over its texts or pairs (eq. 5)."""
    pairs = outside[:, None] - inside[None, :]
    terms = (outside - config.quiet, config.loud - inside, pairs + config.gap)
    return sum((term.clamp(min=0).mean() for term in terms), torch.zeros((), device=inside.device))


def ties(changes: Sequence[Float[Tensor, "out in"]], density: float) -> Float[Tensor, "out in"]:
    """TIES merging (arXiv 2306.01708): trim each to its largest entries, elect a sign, average those that agree with it."""
    trimmed = torch.stack([_largest(change, density) for change in changes])
    sign = trimmed.sum(0).sign()
    agreeing = trimmed * (trimmed.sign() == sign)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def _largest(change: Float[Tensor, "out in"], density: float) -> Float[Tensor, "out in"]:
    """The given share of the entries that are not zero, by size; the others zero."""
    flat = change.abs().reshape(-1)
    count = max(1, round(density * int((flat > 0).sum())))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(count).indices] = True
    return change * kept.reshape(change.shape)
