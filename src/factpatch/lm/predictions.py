"""What the model predicts for targets it is shown token by token. Texts of one length run together, in batches.

No result depends on batch order or size beyond float tolerance. What many texts begin with runs once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.lm.batches import Batch, Pass, Places, passing
from factpatch.lm.prefix import Known, shared_batches
from factpatch.lm.run import Runnable, evaluating, forward_on, logits_at, only_at
from factpatch.lm.tokens import Encoded

__all__ = ["Prediction", "predict", "target_logprobs"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model predicts for a target it is shown token by token (teacher forcing).

    target     the target's tokens
    best       the most likely token at each of their positions
    logprobs   log-probability of each target token, in nats
    """

    target: tuple[int, ...]
    best: tuple[int, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def of(cls, text: Encoded, logprobs: Float[Tensor, "target vocab"]) -> Prediction:
        """From the log-probabilities before each of the target's tokens."""
        target = torch.tensor(text.target_ids, device=logprobs.device)
        own = logprobs.gather(-1, target[:, None])[:, 0]
        return cls(text.target_ids, tuple(logprobs.argmax(-1).tolist()), tuple(own.tolist()))


def target_logprobs(lm: Runnable, texts: Sequence[Encoded]) -> Iterator[tuple[int, Float[Tensor, "target vocab"]]]:
    """By the index of each text, log-probabilities before each token of its target, in nats; in an order of its own."""
    for indices, known in shared_batches(lm, [text.ids for text in texts], [text.target for text in texts]):
        chosen = [texts[i] for i in indices]
        logits = _target_logits(lm, chosen, known)
        # One text at a time, and nothing kept while the next batch runs: a row for each token read is as wide as the vocabulary.
        for index, own in zip(indices, torch.split(logits, [len(text.target_ids) for text in chosen]), strict=True):
            yield index, own.log_softmax(-1)
        del logits, own


@torch.no_grad()
def _target_logits(lm: Runnable, texts: Sequence[Encoded], known: Known | None) -> Float[Tensor, "reads vocab"]:
    columns = [range(text.target - 1, len(text.ids) - 1) for text in texts]
    if known is None:
        return logits_at(lm, Batch.of_texts(texts, lm.device), Places.of(columns, lm.device))
    batch = Batch.of([text.ids for text in texts], lm.device, left=True)
    since, past = known.past(batch)
    shifts = [batch.ids.shape[1] - len(text.ids) - since for text in texts]
    here = Places.of([[c + shift for c in own] for own, shift in zip(columns, shifts, strict=True)], lm.device)
    with evaluating(lm.model), only_at(lm, here), passing(Pass(batch.mask, batch.ends)):
        out = forward_on(lm, batch.ids[:, since:], batch.mask, past)
    logits: Tensor = out.logits[0]
    return logits.float()


def predict(lm: Runnable, texts: Sequence[Encoded]) -> list[Prediction]:
    """Teacher-forced predictions for each text's target, in the order given."""
    wanted = list(dict.fromkeys(texts))
    done = {wanted[i]: Prediction.of(wanted[i], logprobs) for i, logprobs in target_logprobs(lm, wanted)}
    return [done[text] for text in texts]
