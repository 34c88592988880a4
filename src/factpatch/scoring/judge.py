"""A judge: another model, behind an OpenAI-compatible endpoint, that says whether an answer is right.

Matching words misses a right answer that is put otherwise. What a judge says stands beside the score and never in its place:
judges err too, and another one would say something else.
"""

from __future__ import annotations

from collections.abc import Sequence

from factpatch.lm import RemoteLM
from factpatch.scoring.metrics import normalise

__all__ = ["Judge"]

Case = tuple[str, tuple[str, ...], str]
"""A question, its right answers, and the answer to judge."""

REPLY_TOKENS = 8


class Judge:
    """Asks `lm` about each answer once, through its chat template."""

    def __init__(self, lm: RemoteLM) -> None:
        self.lm = lm
        self._known: dict[Case, bool | None] = {}

    @property
    def name(self) -> str:
        """Of the model."""
        return self.lm.name

    def verdicts(self, cases: Sequence[Case]) -> list[bool | None]:
        """Whether each answer is right; None where the reply is neither yes nor no. Raises RemoteError."""
        new = [case for case in dict.fromkeys(cases) if case not in self._known]
        replies = self.lm.answer([_question(*case) for case in new], chat=True, max_new=REPLY_TOKENS) if new else []
        self._known |= {case: _verdict(reply) for case, reply in zip(new, replies, strict=True)}
        return [self._known[case] for case in cases]


def _question(prompt: str, answers: Sequence[str], said: str) -> str:
    known = "; or: ".join(answers)
    return (
        "Here are the beginning of a sentence or a question, what is right, and what somebody wrote. "
        "Does the writing say what is right, in whatever words, and nothing that contradicts it? "
        f"Reply with one word, yes or no.\n\nAsked: {prompt}\nRight: {known}\nWritten: {said}\n\nYes or no?"
    )


def _verdict(reply: str) -> bool | None:
    first = next(iter(normalise(reply).split()), "")
    return {"yes": True, "no": False}.get(first)
