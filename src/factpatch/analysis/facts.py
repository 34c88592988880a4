"""Facts that a model knows, of which analyses ask where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.predictions import predict
from factpatch.lm.tokens import Encoded
from factpatch.scoring.metrics import normalise

__all__ = ["Fact", "first_telling", "from_telling", "known_facts", "says"]


@dataclass(frozen=True, slots=True)
class Fact:
    """What a model says after a prompt.

    prompt   contains the subject
    subject  what the fact is about
    answer   what the model says; of several tokens the first that tells something is traced
    """

    prompt: str
    subject: str
    answer: str


def first_telling(lm: LM, answer: Sequence[int]) -> int | None:
    """The index of the first of an answer's tokens that tells something; None if none does.

    White space, marks and articles tell nothing. Some tokenizers begin every number with a token for the space before it.
    Of a character that is cut into several tokens the last one counts.
    """
    for i in range(len(answer)):
        said = lm.tokens.decode(answer[: i + 1])
        # "A" may be an article, and the beginning of "Ahmed".
        if normalise(said) or (said[-1:].isalpha() and _goes_on(lm, answer, i + 1).isalpha()):
            return i
    return None


def from_telling(lm: LM, text: Encoded) -> Encoded:
    """The text with the tokens of its target before the first telling one moved into the prompt; as it is if none tells."""
    return replace(text, target=text.target + (first_telling(lm, text.target_ids) or 0))


def says(lm: LM, facts: Sequence[Fact], *, chat: bool = False) -> list[bool]:
    """Of each fact, whether the model's likeliest tokens are those of the answer, as far as the first telling one.

    Of a number that is cut into several tokens all must be right, since nearly all years begin with one digit.
    """
    if not facts:
        return []
    texts = lm.encode([fact.prompt for fact in facts], [fact.answer for fact in facts], chat=chat)
    found = []
    for text, said in zip(texts, predict(lm, texts), strict=True):
        end = _enough(lm, text.target_ids)
        found.append(bool(end) and said.best[:end] == said.target[:end])
    return found


def known_facts(lm: LM, edits: Sequence[Edit], *, chat: bool = False) -> list[Fact]:
    """The old answers of edits that have a subject, where the model says as much; see `says`.

    An answer may have aliases: the first that the model gives counts. A fact whose answer tells nothing is none.
    """
    facts = [
        Fact(edit.prompt, edit.subject, answer)
        for edit in edits
        if edit.subject is not None
        for answer in edit.ground_truth
    ]
    found: dict[str, Fact] = {}
    for fact, is_said in zip(facts, says(lm, facts, chat=chat), strict=True):
        if is_said:
            found.setdefault(fact.prompt, fact)
    return list(found.values())


def _enough(lm: LM, answer: Sequence[int]) -> int:
    """How many of an answer's tokens must be right for it to be known; 0 if it tells nothing."""
    at = first_telling(lm, answer)
    if at is None:
        return 0
    end = at + 1
    while lm.tokens.decode(answer[:end])[-1:].isdigit() and _goes_on(lm, answer, end).isdigit():
        end += 1
    return end


def _goes_on(lm: LM, answer: Sequence[int], end: int) -> str:
    """The character that follows the first so many tokens; empty at the end."""
    return lm.tokens.decode(answer[: end + 1])[len(lm.tokens.decode(answer[:end])) :][:1]
