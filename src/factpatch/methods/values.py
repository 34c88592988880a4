"""Target values: what an MLP should put out at the subject's last token so that the model says the target.

ROME (arXiv 2202.05262, section 3.1, step 2, equation 4) and its descendants. Many edits share one batch; each has its own
`delta`, its own Adam state and its own end, so a batch gives what the edits would give one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.hooks import reading, replacing_output
from factpatch.lm.run import Batch, Places, UpperRun
from factpatch.lm.tokens import Encoded
from factpatch.methods.base import Config
from factpatch.methods.keys import at_subject, subject_texts
from factpatch.progress import Progress

__all__ = ["TargetValue", "ValueConfig", "target_values"]


class ValueConfig(Config):
    """Settings of the search for a target value."""

    steps: PositiveInt = Field(default=25, description="gradient steps on the value, at most")
    lr: PositiveFloat = Field(default=0.5, description="learning rate of Adam")
    kl_factor: NonNegativeFloat = Field(
        default=0.0625, description="weight of keeping the next word after '<subject> is a'"
    )
    weight_decay: NonNegativeFloat = Field(default=1e-3, description="weight of |change| / |old value|^2")
    clamp: PositiveFloat = Field(default=4.0, description="largest change, in norms of the old value")
    stop_loss: NonNegativeFloat = Field(default=5e-2, description="stop once the loss is below this, in nats")


@dataclass(frozen=True, slots=True)
class TargetValue:
    """`old` and `delta`: the projection's output for the bare prompt, and what to add to it. Float32.

    `losses` is the objective at each step, in nats.
    """

    old: Float[Tensor, " hidden"]
    delta: Float[Tensor, " hidden"]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Rows:
    """All rows of the batch: for each edit its contexts with the target, then the essence prompt."""

    texts: list[Encoded]
    owner: list[int]
    bare: list[int]
    essence: list[int]


def target_values(
    lm: LM, edits: Sequence[Edit], layer: int, prefixes: Sequence[str], config: ValueConfig, progress: Progress
) -> list[TargetValue]:
    """For each edit the `delta` at block `layer`'s MLP output that minimises

        mean_j NLL(o | x_j + p)  +  kl_factor KL(p_old || p_delta) on "<subject> is a"  +  wd |delta| / |v0|^2

    over the contexts `x_j`, with `|delta| <= clamp |v0|` kept by projection after each step of Adam.
    """
    rows = _rows(lm, edits, prefixes, config)
    projection = lm.anatomy.mlp_out(layer)
    batch = Batch.of([text.ids for text in rows.texts], lm.device)
    upper = UpperRun(lm, batch, layer)
    places = Places.of([_reads(text) for text in rows.texts], lm.device)
    essence_rows = torch.tensor(rows.essence, device=lm.device)
    is_essence = torch.isin(places.rows, essence_rows)
    owner = torch.tensor(rows.owner, device=lm.device)
    seen: list[Tensor] = []
    with torch.no_grad(), reading(projection.module, lambda _, out: seen.append(at_subject(out, batch, rows.texts))):
        before = upper.logits_at(places)[is_essence].log_softmax(-1)
    old = seen[0].float()[rows.bare]
    limit = config.clamp * old.norm(dim=-1)

    target = torch.tensor([t for text in rows.texts for t in text.target_ids], device=lm.device)
    target_row = places.rows[~is_essence]
    length = torch.zeros(len(rows.texts), device=lm.device).index_add(
        0, target_row, torch.ones(len(target_row), device=lm.device)
    )
    weight = 1.0 / (length[target_row] * len(prefixes))

    deltas = [torch.zeros_like(value, requires_grad=True) for value in old]
    optimiser = torch.optim.Adam(deltas, lr=config.lr)
    losses: list[list[float]] = [[] for _ in edits]
    live = set(range(len(edits)))
    cols = torch.tensor([text.subject for text in rows.texts], device=lm.device)

    def add_delta(_: Tensor, out: Tensor) -> Tensor:
        grid = out.reshape(*batch.ids.shape, -1)
        at = (torch.arange(len(rows.texts), device=out.device), cols)
        return grid.index_put(at, torch.stack(deltas)[owner].to(out.dtype), accumulate=True).reshape(out.shape)

    with replacing_output(projection.module, add_delta), torch.enable_grad():
        for step in range(config.steps):
            progress(f"Optimising the value at block {layer}", step, config.steps)
            logprobs = upper.logits_at(places).log_softmax(-1)
            nll = -logprobs[~is_essence].gather(-1, target[:, None])[:, 0] * weight
            kl = (before.exp() * (before - logprobs[is_essence])).sum(-1) * config.kl_factor
            decay = config.weight_decay * torch.stack([d.norm() for d in deltas]) / old.norm(dim=-1) ** 2
            loss = decay.index_add(0, owner[target_row], nll).index_add(0, owner[essence_rows], kl)
            for i in sorted(live):
                losses[i].append(loss[i].item())
            live -= {i for i in live if losses[i][-1] < config.stop_loss}
            if not live or step == config.steps - 1:
                break
            gradients = torch.autograd.grad(loss.sum(), deltas)
            for i, (delta, gradient) in enumerate(zip(deltas, gradients, strict=True)):
                delta.grad = gradient if i in live else None  # Adam leaves a parameter without gradient alone
            optimiser.step()
            with torch.no_grad():
                for delta, bound in zip(deltas, limit, strict=True):
                    delta.mul_((bound / delta.norm().clamp(min=1e-12)).clamp(max=1))
    progress(f"Optimising the value at block {layer}", config.steps, config.steps)
    return [TargetValue(old[i], deltas[i].detach(), tuple(losses[i])) for i in range(len(edits))]


def _rows(lm: LM, edits: Sequence[Edit], prefixes: Sequence[str], config: ValueConfig) -> _Rows:
    rows = _Rows([], [], [], [])
    for i, edit in enumerate(edits):
        rows.bare.append(len(rows.texts))
        rows.texts.extend(subject_texts(lm, edit, prefixes, target=True, chat=config.chat))
        rows.essence.append(len(rows.texts))
        rows.texts.append(lm.tokens.encode(f"{edit.subject} is a", subject=edit.subject))
        rows.owner.extend([i] * (len(rows.texts) - len(rows.owner)))
    return rows


def _reads(text: Encoded) -> Sequence[int]:
    """Before each target token; at the end of a text without one."""
    return range(text.target - 1, max(text.target, len(text.ids) - 1))
