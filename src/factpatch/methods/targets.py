"""Texts with their targets, ready to be run again and again: the loss that fine-tuning and gradients are taken of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.batches import BATCH_TOKENS, Batch, Places
from factpatch.lm.run import UpperRun
from factpatch.lm.tokens import Encoded

__all__ = ["TargetBatch", "constant_weights", "cross_entropy", "tokens_at_once", "with_targets"]

_FEWEST_TOKENS = 128
"""In a batch; with fewer, reading the weights takes longer than using them."""


def tokens_at_once(lm: LM, first: int) -> int:
    """As many as let that which is kept for their gradients, from block `first` on, take about a quarter of the model's size.

    Of each token a block keeps about twice as many numbers as it has weights for each entry of the hidden state; the logits
    come on top, as if every token were read. Never more than `BATCH_TOKENS`.
    """
    weights = sum(p.numel() for block in lm.anatomy.blocks[first:] for p in block.parameters())
    kept = 2 * weights // lm.anatomy.hidden_size + len(lm.anatomy.head.weight)
    size = sum(weight.numel() for weight in lm.model.parameters())
    return min(BATCH_TOKENS, max(_FEWEST_TOKENS, size // 4 // kept))


@contextmanager
def constant_weights(lm: LM) -> Iterator[None]:
    """Let no weight ask for a gradient for the length of a `with`; every flag is as it was afterwards.

    Otherwise what each map reads is kept for a gradient of its weight that nobody takes, a third of all that is kept.
    """
    flagged = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    for parameter in flagged:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in flagged:
            parameter.requires_grad = True


def with_targets(lm: LM, edits: Sequence[Edit], *, chat: bool) -> list[Encoded]:
    """Each edit's prompt followed by its target."""
    return [lm.tokens.encode(edit.prompt, edit.target, chat=chat) for edit in edits]


class TargetBatch:
    """Some texts, the places from which their target tokens are predicted, and what is predicted there.

    first  the first block that may change; those beneath it run once
    reads  columns to predict from, for each text; by default the place before each target token
    """

    def __init__(
        self, lm: LM, texts: Sequence[Encoded], first: int = 0, reads: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.batch = Batch.of_texts(texts, lm.device)
        self.upper = UpperRun(lm, self.batch, first)
        self.places = Places.of(reads or [range(text.target - 1, len(text.ids) - 1) for text in texts], lm.device)
        self.target = torch.tensor([t for text in texts for t in text.target_ids], device=lm.device)
        self.texts = len(texts)

    def token_nll(self) -> Float[Tensor, " targets"]:
        """`-log p` of each target token, in nats; `places.rows` tells which text it belongs to."""
        return cross_entropy(self.upper.logits_at(self.places), self.target)

    def nll(self) -> Float[Tensor, " texts"]:
        """`-log p` of each text's target, in nats, the mean over its tokens."""
        return self.mean(self.token_nll())

    def nll_and_correct(self) -> tuple[Float[Tensor, " texts"], Bool[Tensor, " texts"]]:
        """As `nll`, and whether each of the text's target tokens is the most likely one."""
        logits = self.upper.logits_at(self.places)
        wrong = (logits.argmax(-1) != self.target).float()
        return self.mean(cross_entropy(logits, self.target)), self.mean(wrong) == 0

    def logprobs(self) -> Float[Tensor, "targets vocab"]:
        """Log-probabilities of all tokens at each place, in nats."""
        return self.upper.logits_at(self.places).log_softmax(-1)

    def mean(self, values: Float[Tensor, " targets"]) -> Float[Tensor, " texts"]:
        """The mean over each text's target tokens."""
        rows: Int[Tensor, " targets"] = self.places.rows
        length = torch.zeros(self.texts, device=values.device).index_add(0, rows, torch.ones_like(values))
        return torch.zeros_like(length).index_add(0, rows, values / length[rows])


def cross_entropy(
    logits: Float[Tensor, "reads vocab"],
    tokens: Int[Tensor, " tokens"],
    wanted: Float[Tensor, "rest vocab"] | None = None,
) -> Float[Tensor, " reads"]:
    """`-sum_v q_v log p_v` at each place, in nats; `q` is all on one token at the first places, and `wanted` at the rest.

    With vocabularies of 50,000 and more this is where a step of a search spends its memory; so the logits are passed over
    as few times as can be, and no log-probabilities are kept.
    """
    found: Float[Tensor, " reads"] = _CrossEntropy.apply(logits, tokens, wanted)  # type: ignore[no-untyped-call]
    return found


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, wanted: Tensor | None) -> Tensor:
        total = logits.logsumexp(-1)
        found = total.clone()
        n = len(tokens)
        found[:n] -= logits[:n].gather(-1, tokens[:, None])[:, 0]
        if wanted is not None:
            found[n:] -= (wanted * logits[n:]).sum(-1)
        ctx.save_for_backward(logits, total, tokens, wanted)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, total, tokens, wanted = ctx.saved_tensors
        n = len(tokens)
        change = (logits - total[:, None]).exp_()
        change[torch.arange(n, device=tokens.device), tokens] -= 1
        if wanted is not None:
            change[n:] -= wanted
        return change.mul_(gradient[:, None]), None, None
