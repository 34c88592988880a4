"""Texts with their targets, ready to be run again and again: the loss that fine-tuning and gradients are taken of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.run import Batch, Places, UpperRun
from factpatch.lm.tokens import Encoded

__all__ = ["TargetBatch", "with_targets"]


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
        return self._nll(self.upper.logits_at(self.places))

    def nll(self) -> Float[Tensor, " texts"]:
        """`-log p` of each text's target, in nats, the mean over its tokens."""
        return self.mean(self.token_nll())

    def nll_and_correct(self) -> tuple[Float[Tensor, " texts"], Bool[Tensor, " texts"]]:
        """As `nll`, and whether each of the text's target tokens is the most likely one."""
        logits = self.upper.logits_at(self.places)
        wrong = (logits.argmax(-1) != self.target).float()
        return self.mean(self._nll(logits)), self.mean(wrong) == 0

    def logprobs(self) -> Float[Tensor, "targets vocab"]:
        """Log-probabilities of all tokens at each place, in nats."""
        return self.upper.logits_at(self.places).log_softmax(-1)

    def mean(self, values: Float[Tensor, " targets"]) -> Float[Tensor, " texts"]:
        """The mean over each text's target tokens."""
        rows: Int[Tensor, " targets"] = self.places.rows
        length = torch.zeros(self.texts, device=values.device).index_add(0, rows, torch.ones_like(values))
        return torch.zeros_like(length).index_add(0, rows, values / length[rows])

    def _nll(self, logits: Float[Tensor, "targets vocab"]) -> Float[Tensor, " targets"]:
        return -logits.log_softmax(-1).gather(-1, self.target[:, None])[:, 0]
