"""A judge: another model, behind an OpenAI-compatible endpoint, that says whether an answer is right.

Matching words misses a right answer that is put otherwise. What a judge says stands beside the score and never in its place:
judges err too, and another one would say something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from factpatch.errors import BadConfig, RemoteError
from factpatch.lm import RemoteLM, connect
from factpatch.lm.remote import PREFIX
from factpatch.scoring.metrics import normalise

__all__ = ["Judge"]

Case = tuple[str, tuple[str, ...], str]
"""A question, its right answers, and the answer to judge."""

REPLY_TOKENS = 16
_CONNECTIONS = 4


class Judge:
    """Asks `lm` about each answer once, through its chat template."""

    def __init__(self, lm: RemoteLM) -> None:
        self.lm = lm
        self._known: dict[Case, bool | None] = {}

    @classmethod
    def at(cls, name: str | None, url: str | None) -> Self | None:
        """As the options --judge and --judge-url say; None without a name. It is asked something once, to see that it is there.

        Raises BadConfig if the name is not `openai:NAME`, or there is an address alone; RemoteError if no judge answers.
        """
        if name is None and url is None:
            return None
        if name is None or not name.startswith(PREFIX):
            raise BadConfig(
                f"--judge {name or ''}: expected {PREFIX}NAME, the name that the endpoint knows the judge by.\n"
                f"  For example: --judge {PREFIX}NAME --judge-url http://localhost:8000/v1"
            )
        judge = cls(connect(name, url))
        try:
            judge.lm.answer(
                [_question("The capital of France is", ["Paris"], "Paris")], chat=True, max_new=REPLY_TOKENS
            )
        except RemoteError as error:
            raise RemoteError(f"the judge: {str(error).splitlines()[0]}\n  See --judge and --judge-url.") from None
        return judge

    @property
    def name(self) -> str:
        """Of the model."""
        return self.lm.name

    def verdicts(self, cases: Sequence[Case]) -> list[bool | None]:
        """Whether each answer is right; None where the reply is neither yes nor no, or there is none."""
        new = [case for case in dict.fromkeys(cases) if case not in self._known]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            self._known |= dict(zip(new, pool.map(self._verdict, new), strict=True))
        return [self._known[case] for case in cases]

    def _verdict(self, case: Case) -> bool | None:
        try:
            (reply,) = self.lm.answer([_question(*case)], chat=True, max_new=REPLY_TOKENS)
        except RemoteError:  # a judge that fails takes nothing away from the scores
            return None
        return {"yes": True, "no": False}.get(next(iter(normalise(reply).split()), ""))


def _question(prompt: str, answers: Sequence[str], said: str) -> str:
    known = "; or: ".join(answers)
    return (
        "Here are the beginning of a sentence or a question, what is right, and what somebody wrote. "
        "Does the writing say what is right, in whatever words, and nothing that contradicts it? "
        f"Reply with one word, yes or no.\n\nAsked: {prompt}\nRight: {known}\nWritten: {said}\n\nYes or no?"
    )
