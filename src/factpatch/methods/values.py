"""Target values: what a part should put out at the subject's last token so that the model says the target.

ROME (arXiv 2202.05262, section 3.1, step 2, equation 4) and its descendants. Many edits share one batch; each has its own
`delta`, its own Adam state and its own end, so a batch gives what the edits would give one by one. Only what depends on
`delta` runs at each step: the blocks from the edited one on, in the columns from the subject's last token on, of the edits
that are not done yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.batches import Batch, Places, length_batches
from factpatch.lm.hooks import reading, replacing_output
from factpatch.lm.run import UpperRun, can_resume
from factpatch.lm.tokens import Encoded
from factpatch.methods.base import Config, told
from factpatch.methods.keys import subject_texts
from factpatch.methods.needs import Held, Stage, kept_keys, kept_tokens, most, predictions
from factpatch.methods.targets import constant_weights, cross_entropy, tokens_at_once
from factpatch.progress import Progress, part
from factpatch.words import counted

__all__ = ["TargetValue", "ValueConfig", "search_needed", "target_values"]


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
            **told(self.losses),
            "value_change": round(float(self.delta.norm() / self.old.norm()), 6),
        }


@dataclass(frozen=True, slots=True)
class _Text:
    """A text that is run for an edit: its prompt and target after a context, or its essence, "<subject> is a".

    weight   in the edit's loss, of the mean over the target's tokens or of the divergence after the essence
    is_bare  whether it is the prompt without a context, where the old value is read
    """

    encoded: Encoded
    weight: float
    is_bare: bool = False

    @property
    def subject(self) -> int:
        """The subject's last token."""
        assert self.encoded.subject is not None, "texts here are encoded with their subject"
        return self.encoded.subject

    @property
    def reads(self) -> Sequence[int]:
        """Before each target token; at the end of an essence."""
        return range(self.encoded.target - 1, max(self.encoded.target, len(self.encoded.ids) - 1))

    def width(self, *, resumes: bool) -> int:
        """The columns that run at each step: from the subject's last token on, if those before can be kept."""
        return len(self.encoded.ids) - (self.subject if resumes else 0)


def _texts(lm: LM, edit: Edit, prefixes: Sequence[str], config: ValueConfig) -> list[_Text]:
    told = subject_texts(lm, edit, prefixes, target=True, chat=config.chat)
    essence = lm.tokens.encode(f"{edit.subject} is a", subject=edit.subject)
    return [*(_Text(text, 1 / len(told), i == 0) for i, text in enumerate(told)), _Text(essence, config.kl_factor)]


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
    prefixes  the contexts, the first of them empty
    first   the first block to run again; those beneath it come before `site` and run once
    beside  further modules that get a `delta` of their own, optimised along but not returned, as PMET does
    """
    every = [_texts(lm, edit, prefixes, config) for edit in edits]
    budget, resumes = tokens_at_once(lm, first), can_resume(lm)
    sizes = [len(texts) * max(text.width(resumes=resumes) for text in texts) for texts in every]
    groups = list(length_batches(sizes, budget))
    found: dict[int, TargetValue] = {}
    with constant_weights(lm):
        for i, group in enumerate(groups):
            search = _Search(lm, [every[index] for index in group], [site, *beside], first, config, budget)
            found.update(zip(group, search.run(part(progress, i, len(groups))), strict=True))
    return [found[i] for i in range(len(edits))]


_SAMPLED = "It was one of the first things that they saw. "
"""About as long as a context that the model writes."""


def search_needed(
    lm: LM, edits: Sequence[Edit], first: int, contexts: int, config: ValueConfig, sites: int = 1
) -> Stage:
    """What `target_values` holds at once, with so many sampled contexts and sites; `lm` may be without its weights."""
    prefixes = ("", *[_SAMPLED] * contexts)
    every = [_texts(lm, edit, prefixes, config) for edit in edits]
    budget = tokens_at_once(lm, first)
    sizes = [len(texts) * max(text.width(resumes=True) for text in texts) for texts in every]
    found: list[Stage] = []
    for group in length_batches(sizes, budget):
        rows = [text for i in group for text in every[i]]
        widest = max(text.width(resumes=True) for text in rows)
        since = max(text.subject for text in rows)
        at_once = min(len(rows), max(1, budget // widest))
        reads = max(sum(len(text.reads) for text in rows[k : k + at_once]) for k in range(0, len(rows), at_once))
        numbers = 4 * lm.anatomy.hidden_size * sites * len(group)
        held = (
            kept_tokens(lm, first, at_once * widest),
            predictions(lm, reads, len(group)),
            # Those before are kept from pass to pass, those of the blocks above once more together with the new ones.
            kept_keys(lm, since * len(rows)),
            kept_keys(lm, (since + widest) * at_once, lm.anatomy.n_layers - first),
            Held(
                what=f"values of {counted(len(group), 'edit')}, their changes, gradients and Adam's moments",
                bytes=5 * numbers,
            ),
        )
        found.append(Stage(doing="Optimising values", held=held))
    return most(found)


class _Search:
    """The values of one batch of edits, searched for side by side; edits that are done leave it."""

    def __init__(
        self,
        lm: LM,
        edits: Sequence[Sequence[_Text]],
        sites: Sequence[nn.Module],
        first: int,
        config: ValueConfig,
        budget: int,
    ) -> None:
        self.lm, self.edits, self.sites, self.first, self.config, self.budget = lm, edits, sites, first, config, budget
        self.live = list(range(len(edits)))
        self.parts = self._parts()
        old: dict[int, list[Tensor]] = {}
        self.before: dict[int, Tensor] = {}
        for one in self.parts:
            values, predicted = one.look()
            old |= values
            self.before |= predicted
        self.old = [torch.stack([old[i][site] for i in self.live]) for site in range(len(sites))]

    def _parts(self) -> list[_Part]:
        """All texts of the edits that are not done, as one batch; as several if a single edit has very many."""
        rows = [(i, text) for i in self.live for text in self.edits[i]]
        widest = max(text.width(resumes=can_resume(self.lm)) for _, text in rows)
        size = max(1, self.budget // widest)
        return [_Part(self.lm, rows[k : k + size], self.sites, self.first) for k in range(0, len(rows), size)]

    def run(self, progress: Progress) -> list[TargetValue]:
        """Take steps until each edit's loss is low enough, or there have been enough."""
        config = self.config
        deltas = [[torch.zeros_like(value, requires_grad=True) for value in values] for values in self.old]
        flat = [delta for row in deltas for delta in row]
        optimiser = torch.optim.Adam(flat, lr=config.lr)
        losses: list[list[float]] = [[] for _ in self.edits]
        for step in range(config.steps):
            progress("Optimising values", step, config.steps)
            with torch.enable_grad():
                loss = self._penalty(deltas)
                for one in self.parts:
                    if one is not self.parts[0]:  # let go of what the part before has kept for its gradients
                        torch.autograd.backward(loss.sum(), inputs=flat)
                        loss = loss.detach()
                    loss = loss.index_add(0, one.owner, one.loss(deltas, self.before))
            for i in self.live:
                losses[i].append(loss[i].item())
            # Put so that a loss that is no number counts as not done: its value will not be finite, which `fit` refuses.
            self.live = [i for i in self.live if not losses[i][-1] < config.stop_loss]
            if not self.live or step == config.steps - 1:
                break
            torch.autograd.backward(loss.sum(), inputs=flat)
            for index, delta in enumerate(flat):
                if index % len(self.edits) not in self.live:
                    delta.grad = None  # Adam leaves a parameter without gradient alone
            optimiser.step()
            optimiser.zero_grad()
            with torch.no_grad():
                for delta, value in zip(flat, torch.cat(self.old), strict=True):
                    bound = config.clamp * value.norm()
                    delta.mul_((bound / delta.norm().clamp(min=1e-12)).clamp(max=1))
            # What is kept for a batch has to be run anew for a smaller one, which a quarter of it repays.
            if len(self.live) <= 0.75 * len({i for one in self.parts for i in one.edits}):
                self.parts = self._parts()
        progress("Optimising values", config.steps, config.steps)
        old, found = self.old[0], [delta.detach() for delta in deltas[0]]
        return [TargetValue(old[i], found[i], tuple(losses[i])) for i in range(len(self.edits))]

    def _penalty(self, deltas: Sequence[Sequence[Tensor]]) -> Float[Tensor, " edits"]:
        sizes = [
            torch.stack([delta.norm() for delta in row]) / old.norm(dim=-1) ** 2
            for row, old in zip(deltas, self.old, strict=True)
        ]
        return self.config.weight_decay * torch.stack(sizes).sum(0)


class _Part:
    """Some texts of a search's edits, run as one batch.

    edits  the edit of each text
    owner  the edit of each place that is read
    """

    def __init__(self, lm: LM, rows: Sequence[tuple[int, _Text]], sites: Sequence[nn.Module], first: int) -> None:
        self.edits, self.texts, self.sites = [i for i, _ in rows], [text for _, text in rows], sites
        encoded, subjects = [text.encoded for text in self.texts], [text.subject for text in self.texts]
        # Nothing changes before the subject's last token: with all of them in one column, what is before it runs once.
        since = max(subjects) if can_resume(lm) else 0
        shifts = [since - subject if since else 0 for subject in subjects]
        batch = Batch.of_texts(encoded, lm.device, align=subjects if since else None)
        self.upper = UpperRun(lm, batch, first, since=since)

        def numbers(values: Sequence[int]) -> Int[Tensor, " n"]:
            return torch.tensor(values, dtype=torch.long, device=lm.device)

        columns = numbers([at + shift - since for at, shift in zip(subjects, shifts, strict=True)])
        self._at = (torch.arange(len(rows), device=lm.device), columns)
        # First where a token is wanted, then where the old distribution is: the order that `cross_entropy` takes.
        in_order = sorted(range(len(rows)), key=lambda row: not encoded[row].target_ids)
        reads = [(row, at + shifts[row]) for row in in_order for at in self.texts[row].reads]
        self.places = Places(numbers([row for row, _ in reads]), numbers([column for _, column in reads]))
        self.tokens = numbers([token for row in in_order for token in encoded[row].target_ids])
        self.owner = numbers([self.edits[row] for row, _ in reads])
        weights = [self.texts[row].weight / len(self.texts[row].reads) for row, _ in reads]
        self.weights = torch.tensor(weights, device=lm.device)
        self.essences = [self.edits[row] for row in in_order if not encoded[row].target_ids]

    @torch.no_grad()
    def look(self) -> tuple[dict[int, list[Tensor]], dict[int, Tensor]]:
        """By edit: what each site puts out for the bare prompt, and what is predicted after the essence, in nats."""
        seen: dict[int, Tensor] = {}

        def see(index: int) -> Callable[[Tensor, Tensor], None]:
            return lambda _, out: seen.update({index: self._grid(out)[self._at].float()})

        with ExitStack() as stack:
            for i, site in enumerate(self.sites):
                stack.enter_context(reading(site, see(i)))
            predicted = self.upper.logits_at(self.places)[len(self.tokens) :].log_softmax(-1)
        bare = {i: row for row, (i, text) in enumerate(zip(self.edits, self.texts, strict=True)) if text.is_bare}
        old = {i: [seen[site][row] for site in range(len(self.sites))] for i, row in bare.items()}
        return old, dict(zip(self.essences, predicted, strict=True))

    def loss(self, deltas: Sequence[Sequence[Tensor]], before: Mapping[int, Tensor]) -> Float[Tensor, " reads"]:
        """What each place adds to its edit's loss, with the deltas in place.

        before  by edit, what was predicted after its essence
        """
        with ExitStack() as stack:
            for site, own in zip(self.sites, deltas, strict=True):
                stack.enter_context(replacing_output(site, self._adding([own[i] for i in self.edits])))
            logits = self.upper.logits_at(self.places)
        held = torch.stack([before[i] for i in self.essences]) if self.essences else logits[:0]
        entropy = cross_entropy(logits, self.tokens, held.exp())
        # A divergence is a cross entropy less the entropy, so that it is 0 where nothing has changed.
        least = torch.cat([entropy.new_zeros(len(self.tokens)), -(held.exp() * held).sum(-1)])
        return (entropy - least) * self.weights

    def _adding(self, deltas: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def add(_: Tensor, out: Tensor) -> Tensor:
            added = torch.stack(list(deltas)).to(out.dtype)
            return self._grid(out).index_put(self._at, added, accumulate=True).reshape(out.shape)

        return add

    def _grid(self, out: Tensor) -> Float[Tensor, "rows seq width"]:
        """What a site puts out, with a row for each text; some blocks flatten the first two axes."""
        return out.reshape(len(self.texts), -1, out.shape[-1])
