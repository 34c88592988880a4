"""Keys of facts: what the MLP output projection reads at the subject's last token, averaged over contexts.

Shared by the methods that locate a fact first: ROME (arXiv 2202.05262, section 3.1, step 1) and its descendants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.batches import Batch, length_batches
from factpatch.lm.run import input_of, output_of
from factpatch.lm.tokens import Encoded
from factpatch.lm.writing import Sampler, generate

__all__ = ["at_subject", "context_keys", "context_prefixes", "subject_outputs", "subject_texts"]

_OPENINGS = ("The", "In", "It", "When", "A", "There", "We", "For", "As", "One")


def context_prefixes(lm: LM, count: int, seed: int, lengths: tuple[int, ...] = (5, 10)) -> tuple[str, ...]:
    """The empty prefix, then `count` short texts the model writes, as many of each length in tokens.

    Each ends in ". ", ready to be put before a prompt. They are written by the base model, whatever patches lie on it,
    so that a sequence of edits shares them.
    """
    return lm.once(("context prefixes", count, seed, lengths), lambda: _write_prefixes(lm, count, seed, lengths))


def _write_prefixes(lm: LM, count: int, seed: int, lengths: tuple[int, ...]) -> tuple[str, ...]:
    prefixes = [""]
    for index, length in enumerate(lengths):
        share = (count + index) // len(lengths)
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


def context_keys(
    lm: LM, layer: int, edits: Sequence[Edit], prefixes: Sequence[str], *, chat: bool
) -> Float[Tensor, "edits contexts inter"]:
    """`k` at block `layer` and the subject's last token: each edit's prompt after each prefix, in float32."""
    texts = [text for edit in edits for text in subject_texts(lm, edit, prefixes, target=False, chat=chat)]
    keys = _at_subjects(lm, lm.anatomy.mlp_out(layer).module, texts, input_of)
    return keys.reshape(len(edits), len(prefixes), -1)


def subject_outputs(lm: LM, site: nn.Module, edits: Sequence[Edit], *, chat: bool) -> Float[Tensor, "edits hidden"]:
    """What a part puts out at the subject's last token of each edit's bare prompt, in float32."""
    texts = [text for edit in edits for text in subject_texts(lm, edit, ("",), target=False, chat=chat)]
    return _at_subjects(lm, site, texts, output_of)


def _at_subjects(
    lm: LM, module: nn.Module, texts: Sequence[Encoded], read: Callable[[LM, nn.Module, Batch], Tensor]
) -> Float[Tensor, "texts width"]:
    found: dict[int, Tensor] = {}
    for indices in length_batches([len(text.prompt_ids) for text in texts]):
        chosen = [texts[i] for i in indices]
        batch = Batch.of([text.prompt_ids for text in chosen], lm.device)
        found.update(zip(indices, at_subject(read(lm, module, batch), batch, chosen).float(), strict=True))
    return torch.stack([found[i] for i in range(len(texts))])


def _subject(text: Encoded) -> int:
    assert text.subject is not None, "texts here are encoded with their subject"
    return text.subject
