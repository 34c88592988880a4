"""Text to tokens: the one place that knows of leading spaces, subject spans, special tokens and chat templates.

Rules, all by character offsets and never by decoding pieces:

* A target follows its prompt after exactly one space, or after none where the prompt already ends in white space
  (as a chat template does). The same text is trained on and scored.
* A token belongs to the target if it ends beyond the prompt, so a token that straddles the border is predicted too.
* A subject's tokens are those that overlap the subject's last occurrence in the prompt: the last as a whole word if there
  is one.
* Special tokens in front are those the tokenizer adds by itself; in a chat, the template brings them. None follow.

Padding is done with our own masks, so the tokenizer's padding side and token are neither read nor changed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from factpatch.errors import TokenizerError

__all__ = ["Encoded", "Tokens"]

_MARK = "\ue000"
"""A letter for private use: no template has it in its own text."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt, with or without its target, in tokens.

    ids      all tokens
    target   index of the first target token; `len(ids)` if there is no target
    subject  index of the subject's last token; None if no subject was asked for
    lane     which of several stacks of patches reads it, as in `LM.side_by_side`; None for what lies on the model
    begin    index of the subject's first token; None if no subject was asked for
    """

    ids: tuple[int, ...]
    target: int
    subject: int | None = None
    lane: int | None = None
    begin: int | None = None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens before the target."""
        return self.ids[: self.target]

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The target's tokens."""
        return self.ids[self.target :]


class Tokens:
    """A tokenizer under the rules above. `limit` is how many tokens the model can read; None if there is no limit."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(
                f"{type(tokenizer).__name__} gives no character offsets, which finding a subject needs.\n"
                "  Load the model with its fast tokenizer (a tokenizer.json beside the weights)."
            )
        self.tokenizer = tokenizer
        self.limit = limit

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.tokenizer.chat_template)

    def render(self, prompt: str, *, chat: bool = False) -> str:
        """The text the model is given: the prompt itself, or a chat in which the user says it.

        Raises TokenizerError if there is no chat template.
        """
        if not chat:
            return prompt
        if not self.has_chat:
            raise TokenizerError("this model has no chat template.\n  Ask it plainly: leave out --chat (chat=False).")
        turns = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def encode(
        self, prompt: str, target: str = "", *, subject: str | None = None, prefix: str = "", chat: bool = False
    ) -> Encoded:
        """Encode `prefix + prompt`, and `target` after it.

        `prefix` is text put before the prompt, with its own final space. Raises TokenizerError if the subject is not
        in the prompt, or the target leaves no tokens.
        """
        body = prefix + prompt
        text = self.render(body, chat=chat)
        joined = text + (target if not target or text[-1:].isspace() else f" {target}")
        ids, spans = self._offsets(joined, add_special=not chat)
        if not ids:
            raise TokenizerError("the prompt is empty, and this tokenizer puts no token in front.\n  Write a prompt.")
        if self.limit is not None and len(ids) > self.limit:
            raise TokenizerError(
                f'the text beginning "{joined[:40]}" has {len(ids)} tokens; this model reads {self.limit} at most.\n'
                "  Shorten it."
            )
        first = next((i for i, (_, end) in enumerate(spans) if end > len(text)), len(ids))
        if target and first == len(ids):
            raise TokenizerError(f'the target "{target}" leaves no tokens after the prompt "{prompt}".')
        if target and not first:
            raise TokenizerError(
                f'nothing stands before the target "{target}", so the model cannot predict its first token.\n'
                "  Write a prompt; this tokenizer puts no token of its own in front."
            )
        if subject is None:
            return Encoded(ids, first)
        shift, at = self._shift(text, body, chat=chat), _last_whole(prompt, subject)
        if shift is None or at < 0:
            raise TokenizerError(
                f'the subject "{subject}" is not in the prompt "{prompt}" as the model is given it.\n'
                "  Write the subject letter for letter as it stands in the prompt."
            )
        start = shift + len(prefix) + at
        overlapping = [i for i, (a, b) in enumerate(spans[:first]) if a < start + len(subject) and b > start and a < b]
        if not overlapping:
            raise TokenizerError(f'the subject "{subject}" leaves no token of its own in "{prompt}".')
        return Encoded(ids, first, overlapping[-1], begin=overlapping[0])

    def ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a text of any length, also of one that is longer than the model can read at once."""
        return self._offsets(text, add_special=True)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones left out."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _shift(self, text: str, body: str, *, chat: bool) -> int | None:
        """What to add to a place in what the user says to have it in the text; None if it does not stand there.

        A template frames what the user says, and may strip white space off its ends.
        """
        if not chat:
            return 0
        before, _, after = self.render(_MARK, chat=True).partition(_MARK)
        said = text[len(before) : len(text) - len(after)]
        return len(before) - body.find(said) if said.strip() and said in body else None

    def _offsets(self, text: str, *, add_special: bool) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        coded = self.tokenizer(
            text, add_special_tokens=add_special, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        ids, spans = list(coded["input_ids"]), list(coded["offset_mapping"])
        # Some tokenizers close every text with an end token, after which no target can follow.
        while ids and coded["special_tokens_mask"][len(ids) - 1] and spans[len(ids) - 1][1] < len(text):
            ids.pop()
        return tuple(ids), spans[: len(ids)]


def _last_whole(prompt: str, subject: str) -> int:
    """Where the subject last begins, as a whole word if it is anywhere; -1 if it is nowhere."""
    whole = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt))
    return whole[-1].start() if whole else prompt.rfind(subject)
