"""Target values: what a part should put out at the subject's last token so that the model says the target.

ROME (arXiv 2202.05262, section 3.1, step 2, equation 4) and its descendants. Many edits share one batch; each has its own
`delta`, its own Adam state and its own end, so a batch gives what the edits would give one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.hooks import reading, replacing_output
from factpatch.lm.run import Batch, Places, UpperRun, can_resume, length_batches
from factpatch.lm.tokens import Encoded
from factpatch.methods.base import Config
from factpatch.methods.keys import subject_texts
from factpatch.progress import Progress, part

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
    """`old` and `delta`: the site's output for the bare prompt, and what to add to it. Float32.

    `losses` is the objective at each step, in nats.
    """

    old: Float[Tensor, " hidden"]
    delta: Float[Tensor, " hidden"]
    losses: tuple[float, ...]

    def note(self) -> dict[str, Any]:
        """How the search went, JSON-ready."""
        return {
            "steps": len(self.losses),
            "first_loss": round(self.losses[0], 6),
            "last_loss": round(self.losses[-1], 6),
            "value_change": round(float(self.delta.norm() / self.old.norm()), 6),
        }


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is run for one edit: its prompt and target after each context, the first of them empty; then the essence."""

    texts: tuple[Encoded, ...]

    @classmethod
    def of(cls, lm: LM, edit: Edit, prefixes: Sequence[str], config: ValueConfig) -> _Rows:
        """Encode them."""
        texts = subject_texts(lm, edit, prefixes, target=True, chat=config.chat)
        return cls((*texts, lm.tokens.encode(f"{edit.subject} is a", subject=edit.subject)))


def target_values(
    lm: LM,
    edits: Sequence[Edit],
    site: nn.Module,
    first: int,
    prefixes: Sequence[str],
    config: ValueConfig,
    progress: Progress,
    *,
    beside: Sequence[nn.Module] = (),
) -> list[TargetValue]:
    """For each edit the `delta` at the output of `site` that minimises

        mean_j NLL(o | x_j + p)  +  kl_factor KL(p_old || p_delta) on "<subject> is a"  +  wd |delta| / |v0|^2

    over the contexts `x_j`, with `|delta| <= clamp |v0|` kept by projection after each step of Adam.

    site    the module whose output is changed, at the subject's last token
    first   the first block to run again; those beneath it come before `site` and run once
    beside  further modules that get a `delta` of their own, optimised along but not returned, as PMET does
    """
    rows = [_Rows.of(lm, edit, prefixes, config) for edit in edits]
    found: dict[int, TargetValue] = {}
    groups = list(length_batches([len(own.texts) * max(len(text.ids) for text in own.texts) for own in rows]))
    for i, group in enumerate(groups):
        search = _Search(lm, [rows[index] for index in group], [site, *beside], first, config)
        found.update(zip(group, search.run(part(progress, i, len(groups))), strict=True))
    return [found[i] for i in range(len(edits))]


class _Search:
    """The values of one batch of edits, searched for side by side."""

    def __init__(
        self, lm: LM, edits: Sequence[_Rows], sites: Sequence[nn.Module], first: int, config: ValueConfig
    ) -> None:
        self.config, self.sites, self.n = config, sites, len(edits)
        self.texts = texts = [text for own in edits for text in own.texts]
        starts = list(accumulate((len(own.texts) for own in edits), initial=0))
        self.bare = starts[:-1]
        essence = torch.tensor([end - 1 for end in starts[1:]], device=lm.device)
        self.owner = torch.tensor([i for i, own in enumerate(edits) for _ in own.texts], device=lm.device)
        subjects = [text.subject or 0 for text in texts]
        # Nothing changes before the subject's last token: with all of them in one column, what is before it runs once.
        since = max(subjects) if can_resume(lm) else 0
        shifts = [since - subject for subject in subjects] if since else [0] * len(texts)
        self.batch = Batch.of_texts(texts, lm.device, align=subjects if since else None)
        self.upper = UpperRun(lm, self.batch, first, since=since)
        columns = torch.tensor([at + shift - since for at, shift in zip(subjects, shifts, strict=True)])
        self._at = (torch.arange(len(texts), device=lm.device), columns.to(lm.device))
        self.places = Places.of(
            [[at + shift for at in _reads(text)] for text, shift in zip(texts, shifts, strict=True)], lm.device
        )
        self.is_essence = torch.isin(self.places.rows, essence)
        self.target = torch.tensor([t for text in texts for t in text.target_ids], device=lm.device)
        rows = self.places.rows[~self.is_essence]
        length = torch.zeros(len(texts), device=lm.device).index_add(0, rows, torch.ones_like(rows, dtype=torch.float))
        contexts = torch.tensor([len(own.texts) - 1 for own in edits], device=lm.device)
        self.target_owner = self.owner[rows]
        self.target_weight = 1.0 / (length[rows] * contexts[self.target_owner])
        self.old = self._outputs()

    def _outputs(self) -> list[Float[Tensor, "edits hidden"]]:
        """What each site puts out for the bare prompts; and what is predicted after "<subject> is a"."""
        seen: dict[int, Tensor] = {}

        def see(index: int) -> Callable[[Tensor, Tensor], None]:
            return lambda _, out: seen.update({index: self._grid(out)[self._at][self.bare].float()})

        with torch.no_grad(), ExitStack() as stack:
            for i, site in enumerate(self.sites):
                stack.enter_context(reading(site, see(i)))
            self.before = self.upper.logits_at(self.places)[self.is_essence].log_softmax(-1)
        return [seen[i] for i in range(len(self.sites))]

    def run(self, progress: Progress) -> list[TargetValue]:
        """Take steps until each edit's loss is low enough, or there have been enough."""
        config = self.config
        deltas = [[torch.zeros_like(value, requires_grad=True) for value in values] for values in self.old]
        flat = [delta for row in deltas for delta in row]
        optimiser = torch.optim.Adam(flat, lr=config.lr)
        losses: list[list[float]] = [[] for _ in range(self.n)]
        live = set(range(self.n))
        with ExitStack() as stack, torch.enable_grad():
            for site, row in zip(self.sites, deltas, strict=True):
                stack.enter_context(replacing_output(site, self._adding(row)))
            for step in range(config.steps):
                progress("Optimising values", step, config.steps)
                loss = self._loss(deltas)
                for i in sorted(live):
                    losses[i].append(loss[i].item())
                live -= {i for i in live if losses[i][-1] < config.stop_loss}
                if not live or step == config.steps - 1:
                    break
                gradients = torch.autograd.grad(loss.sum(), flat)
                for index, (delta, gradient) in enumerate(zip(flat, gradients, strict=True)):
                    # Adam leaves a parameter without gradient alone.
                    delta.grad = gradient if index % self.n in live else None
                optimiser.step()
                with torch.no_grad():
                    for delta, value in zip(flat, torch.cat(self.old), strict=True):
                        bound = config.clamp * value.norm()
                        delta.mul_((bound / delta.norm().clamp(min=1e-12)).clamp(max=1))
        progress("Optimising values", config.steps, config.steps)
        old, found = self.old[0], [delta.detach() for delta in deltas[0]]
        return [TargetValue(old[i], found[i], tuple(losses[i])) for i in range(self.n)]

    def _adding(self, deltas: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def add(_: Tensor, out: Tensor) -> Tensor:
            added = torch.stack(list(deltas))[self.owner].to(out.dtype)
            return self._grid(out).index_put(self._at, added, accumulate=True).reshape(out.shape)

        return add

    def _grid(self, out: Tensor) -> Float[Tensor, "rows seq width"]:
        """What a site puts out, with a row for each text; some blocks flatten the first two axes."""
        return out.reshape(len(self.texts), -1, out.shape[-1])

    def _loss(self, deltas: Sequence[Sequence[Tensor]]) -> Float[Tensor, " edits"]:
        config = self.config
        logprobs = self.upper.logits_at(self.places).log_softmax(-1)
        nll = -logprobs[~self.is_essence].gather(-1, self.target[:, None])[:, 0] * self.target_weight
        kl = (self.before.exp() * (self.before - logprobs[self.is_essence])).sum(-1)
        loss = (config.kl_factor * kl).index_add(0, self.target_owner, nll)
        for row, old in zip(deltas, self.old, strict=True):
            loss = loss + config.weight_decay * torch.stack([d.norm() for d in row]) / old.norm(dim=-1) ** 2
        return loss


def _reads(text: Encoded) -> Sequence[int]:
    """Before each target token; at the end of a text without one."""
    return range(text.target - 1, max(text.target, len(text.ids) - 1))
