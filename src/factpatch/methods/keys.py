"""Keys of facts: what the MLP output projection reads at the subject's last token, averaged over contexts.

Shared by the methods that locate a fact first: ROME (arXiv 2202.05262, section 3.1, step 1) and its descendants.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.run import Batch, Sampler, generate, input_of, length_batches
from factpatch.lm.tokens import Encoded

__all__ = ["at_subject", "context_prefixes", "subject_keys", "subject_texts"]

_OPENINGS = ("The", "In", "It", "When", "A", "There", "We", "For", "As", "One")
_LENGTHS = (5, 10)


def context_prefixes(lm: LM, count: int, seed: int) -> tuple[str, ...]:
    """The empty prefix, then `count` short texts the model writes, half of 5 tokens and half of 10.

    Each ends in ". ", ready to be put before a prompt. They are written by the base model, whatever patches lie on it,
    so that a sequence of edits shares them.
    """
    prefixes = [""]
    with lm.unpatched():
        for index, length in enumerate(_LENGTHS):
            share = (count + index) // len(_LENGTHS)
            for start in range(0, share, len(_OPENINGS)):
                prompts = [lm.tokens.encode(opening).ids for opening in _OPENINGS[: share - start]]
                sampler = Sampler(seed=seed + 1000 * start + length, top_k=10)
                for prompt, ids in zip(prompts, generate(lm, prompts, max_new=length, choose=sampler), strict=True):
                    text = " ".join(lm.tokens.decode([*prompt, *ids]).split())
                    prefixes.append(text.rstrip(".!?,;: ") + ". ")
    return tuple(prefixes)


def subject_texts(lm: LM, edit: Edit, prefixes: Sequence[str], *, target: bool, chat: bool) -> list[Encoded]:
    """The edit's prompt after each prefix, with or without its target, and where its subject ends."""
    goal = edit.target if target else ""
    return [lm.tokens.encode(edit.prompt, goal, subject=edit.subject, prefix=prefix, chat=chat) for prefix in prefixes]


def at_subject(activation: Tensor, batch: Batch, texts: Sequence[Encoded]) -> Float[Tensor, "batch width"]:
    """Rows of a `(batch, seq, width)` activation at each text's subject; some blocks flatten the first two axes."""
    cols = torch.tensor([_subject(text) for text in texts], device=activation.device)
    rows = torch.arange(len(texts), device=activation.device)
    return activation.reshape(*batch.ids.shape, -1)[rows, cols]


@torch.no_grad()
def subject_keys(lm: LM, layer: int, texts: Sequence[Encoded]) -> Float[Tensor, "texts inter"]:
    """`k` at block `layer` and the subject's last token of each text, in float32."""
    projection = lm.anatomy.mlp_out(layer)
    keys: dict[int, Tensor] = {}
    for indices in length_batches([len(text.prompt_ids) for text in texts]):
        chosen = [texts[i] for i in indices]
        batch = Batch.of([text.prompt_ids for text in chosen], lm.device)
        read = input_of(lm, projection.module, batch)
        keys.update(zip(indices, at_subject(read, batch, chosen).float(), strict=True))
    return torch.stack([keys[i] for i in range(len(texts))])


def _subject(text: Encoded) -> int:
    assert text.subject is not None, "texts here are encoded with their subject"
    return text.subject
