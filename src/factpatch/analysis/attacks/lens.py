"""Attacks that read intermediate states through the output head: what the model is about to say, block by block.

Patil et al., ICLR 2024 (arXiv 2309.17410) call them head projection and probability delta; the first is the logit lens. All
read at the last token of the prompt, and here of its rephrases too, through the final norm and the head, and find tokens: the
first of an answer. Tokens without a letter or digit are passed over, as are other spellings of one found before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from factpatch.analysis.attacks.base import Attack, Candidate, Question, Setting, best
from factpatch.lm import LM
from factpatch.lm.batches import Batch, Places, by_rows, length_batches
from factpatch.lm.hooks import reading
from factpatch.lm.run import logits_at
from factpatch.lm.tokens import Encoded
from factpatch.progress import Progress, part

__all__ = ["HeadProjection", "ProbabilityDelta", "UpdateProjection", "read_through_head", "states"]

_WORDINGS = 3
"""Read at the end of the prompt, and of its rephrases up to so many wordings."""
AT_ONCE = 64
"""Questions whose predictions are held at once, for one place."""


@dataclass(slots=True)
class _Sighting:
    """A token where it stands foremost: 1 is the first; `size` tells those of one rank apart, `blocks` are all with this rank."""

    rank: int
    size: float
    block: int
    place: str
    blocks: set[int]

    @property
    def key(self) -> tuple[int, float, int]:
        """What goes before what."""
        return self.rank, -self.size, self.block


@torch.no_grad()
def states(lm: LM, modules: Sequence[nn.Module], texts: Sequence[Encoded]) -> Float[Tensor, "modules texts hidden"]:
    """What each module puts out at the last token of each text, on the model's device and in its type."""
    found: list[dict[int, Tensor]] = [{} for _ in modules]
    for indices in length_batches([len(text.ids) for text in texts]):
        chosen = [texts[i] for i in indices]
        batch = Batch.of_texts(chosen, lm.device)
        rows = torch.arange(len(chosen), device=lm.device)
        with ExitStack() as stack:
            for own, module in zip(found, modules, strict=True):
                stack.enter_context(reading(module, _keeping(own, indices, rows, batch.ends)))
            logits_at(lm, batch, Places.of([[]], lm.device))
    return torch.stack([torch.stack([own[i] for i in range(len(texts))]) for own in found])


def _keeping(
    kept: dict[int, Tensor], indices: Sequence[int], rows: Tensor, ends: Tensor
) -> Callable[[Tensor, Tensor], None]:
    # Picking rows copies them, before a block goes on to add to what it was given.
    return lambda _, out: kept.update(zip(indices, by_rows(out)[rows, ends].unbind(), strict=True))


@torch.no_grad()
def read_through_head(lm: LM, hidden: Float[Tensor, "texts hidden"]) -> Float[Tensor, "texts vocab"]:
    """Log-probabilities of the next token, in nats, if the model ended here: final norm, then head."""
    normed = lm.anatomy.final_norm(hidden)
    logits: Tensor = nn.functional.linear(normed, lm.anatomy.head.weight, lm.anatomy.head.bias)
    return logits.float().log_softmax(-1)


class _Reading(Attack):
    """Reads predictions at several places and ranks the union of the foremost tokens of each."""

    access = "activations"

    def candidates(
        self, lm: LM, questions: Sequence[Question], setting: Setting, progress: Progress
    ) -> list[list[Candidate]]:
        """The first of every place before the second of any; of equals those with the greatest probability, or change of it."""
        parts = [questions[start : start + AT_ONCE] for start in range(0, len(questions), AT_ONCE)]
        found = []
        for number, own in enumerate(parts):
            found += self._candidates(lm, own, setting, part(progress, number, len(parts)))
        return found

    def _candidates(
        self, lm: LM, questions: Sequence[Question], setting: Setting, progress: Progress
    ) -> list[list[Candidate]]:
        asked = [(q, text) for q, question in enumerate(questions) for text in question.wordings[:_WORDINGS]]
        texts = lm.encode([text for _, text in asked], chat=setting.chat)
        seen: list[dict[int, _Sighting]] = [{} for _ in questions]
        # Some of the foremost are white space and marks, and the same words stand foremost at several places.
        most = 2 * setting.budget
        for block, place, scores in self.scores(lm, texts):
            progress(f"Attack: {self.title}", block, lm.anatomy.n_layers)
            top = scores.topk(min(most, scores.shape[-1]), dim=-1)
            for (q, text), tokens, sizes in zip(asked, top.indices.tolist(), top.values.tolist(), strict=True):
                where = f"{place}: {text}"
                for rank, (token, size) in enumerate(zip(tokens, sizes, strict=True), 1):
                    _see(seen[q], token, _Sighting(rank, size, block, where, {block}))
        progress(f"Attack: {self.title}", lm.anatomy.n_layers, lm.anatomy.n_layers)
        return [best(_union(lm, own), setting.budget) for own in seen]

    @abstractmethod
    def scores(self, lm: LM, texts: Sequence[Encoded]) -> Iterator[tuple[int, str, Float[Tensor, "texts vocab"]]]:
        """Block, place in words, and what tokens are ranked by there, for each place in turn."""


class HeadProjection(_Reading):
    """The logit lens at every block: the union of the likeliest tokens of each (Patil et al., head projection)."""

    name = "head-projection"
    title = "head projection"
    about = "The logit lens: the residual stream after every block, read through final norm and head."

    def scores(self, lm: LM, texts: Sequence[Encoded]) -> Iterator[tuple[int, str, Float[Tensor, "texts vocab"]]]:
        """Log-probabilities after each block."""
        for block, hidden in enumerate(states(lm, lm.anatomy.blocks, texts)):
            yield block, f"block {block}", read_through_head(lm, hidden)


class UpdateProjection(_Reading):
    """The same, of what the attention and the MLP of each block add to the residual stream."""

    name = "update-projection"
    title = "update projection"
    about = "What attention and MLP of every block add to the residual stream, read through final norm and head."

    def scores(self, lm: LM, texts: Sequence[Encoded]) -> Iterator[tuple[int, str, Float[Tensor, "texts vocab"]]]:
        """Log-probabilities read off each addition; a mixture of experts has none of its own."""
        sites = list(lm.anatomy.projections_out())
        found = states(lm, [projection.module for _, _, projection in sites], texts)
        for (block, what, _), hidden in zip(sites, found, strict=True):
            yield block, f"{what} of block {block}", read_through_head(lm, hidden)


class ProbabilityDelta(_Reading):
    """Tokens whose probability rises or falls most from one block to the next (Patil et al., probability delta)."""

    name = "probability-delta"
    title = "probability delta"
    about = "Tokens whose probability under the logit lens rises or falls most between consecutive blocks."

    def scores(self, lm: LM, texts: Sequence[Encoded]) -> Iterator[tuple[int, str, Float[Tensor, "texts vocab"]]]:
        """How much the probability rises; then how much it falls."""
        before: Tensor | None = None
        for block, hidden in enumerate(states(lm, lm.anatomy.blocks, texts)):
            now = read_through_head(lm, hidden).exp()
            if before is not None:
                yield block, f"rise in block {block}", now - before
                yield block, f"fall in block {block}", before - now
            before = now


def _see(seen: dict[int, _Sighting], token: int, now: _Sighting) -> None:
    """Keep the best sighting of a token, with all blocks at which it ranks as high."""
    kept = seen.get(token)
    if kept is None or now.rank < kept.rank:
        seen[token] = now
    elif now.rank == kept.rank:
        kept.blocks |= now.blocks
        if now.key < kept.key:
            now.blocks = kept.blocks
            seen[token] = now


def _union(lm: LM, seen: Mapping[int, _Sighting]) -> Iterator[Candidate]:
    """Tokens by their best rank anywhere, then by size, with the blocks at which they have that rank."""
    for token, own in sorted(seen.items(), key=lambda pair: pair[1].key):
        yield Candidate(
            text=lm.tokens.decode([token]).strip(),
            token=token,
            source=f"rank {own.rank}, {own.place}",
            blocks=tuple(sorted(own.blocks)),
        )
