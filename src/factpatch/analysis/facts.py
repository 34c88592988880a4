"""Facts that a model knows, of which analyses ask where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.predictions import predict

__all__ = ["Fact", "known_facts"]


@dataclass(frozen=True, slots=True)
class Fact:
    """What a model says after a prompt.

    prompt   contains the subject
    subject  what the fact is about
    answer   what the model says; of several tokens the first is traced
    """

    prompt: str
    subject: str
    answer: str


def known_facts(lm: LM, edits: Sequence[Edit]) -> list[Fact]:
    """The old answers of edits that have a subject, where the model's likeliest first token is that of the answer.

    An answer may have aliases: the first that the model gives counts.
    """
    facts = [
        Fact(edit.prompt, edit.subject, answer)
        for edit in edits
        if edit.subject is not None
        for answer in edit.ground_truth
    ]
    texts = lm.encode([fact.prompt for fact in facts], [fact.answer for fact in facts])
    right = (fact for fact, said in zip(facts, predict(lm, texts), strict=True) if said.best[0] == said.target[0])
    found: dict[str, Fact] = {}
    for fact in right:
        found.setdefault(fact.prompt, fact)
    return list(found.values())
