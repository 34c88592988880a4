"""The guard: is a patched model still what it was where nobody asked it to change? Seconds to run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from factpatch.data.questions import guard_questions, guard_texts
from factpatch.edits import Probe
from factpatch.lm import LM, Attachable, BaseLM
from factpatch.lm.predictions import predict
from factpatch.progress import Progress, silent
from factpatch.scoring.retained import Retained, retained

__all__ = ["GuardReport", "perplexity", "run_guard"]

ANSWER_TOKENS = 24


class GuardReport(BaseModel):
    """Before and after.

    perplexity_*  on neutral texts; None for a model that can only be asked
    questions     all of them, in the order asked
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    perplexity_before: float | None
    perplexity_after: float | None
    questions: tuple[Retained, ...]

    @property
    def changed(self) -> tuple[Retained, ...]:
        """Those answered otherwise than before, right or wrong."""
        return tuple(question for question in self.questions if question.changed)

    @property
    def lost(self) -> tuple[Retained, ...]:
        """Those answered rightly before and not any more."""
        return tuple(question for question in self.questions if question.lost)


def run_guard(
    lm: BaseLM,
    *patches: Attachable,
    questions: Sequence[Probe] | None = None,
    texts: Sequence[str] | None = None,
    chat: bool = False,
    progress: Progress = silent,
) -> GuardReport:
    """Ask the unpatched model and the one with `patches` on top of what lies on it already, and compare.

    questions, texts  by default those built in
    """
    probes = guard_questions() if questions is None else questions
    neutral = guard_texts() if texts is None else texts
    prompts = [probe.prompt for probe in probes]
    progress("Guard: asking the unedited model", 0, 2)
    with lm.unpatched():
        before, before_perplexity = _ask(lm, prompts, chat=chat), perplexity(lm, neutral)
    progress("Guard: asking the edited model", 1, 2)
    with lm.patched(*patches):
        after, after_perplexity = _ask(lm, prompts, chat=chat), perplexity(lm, neutral)
    progress("Guard: asking the edited model", 2, 2)
    found = retained(probes, before, after, chat=chat)
    return GuardReport(perplexity_before=before_perplexity, perplexity_after=after_perplexity, questions=found)


def _ask(lm: BaseLM, prompts: Sequence[str], *, chat: bool) -> list[str]:
    return lm.answer(prompts, chat=chat, max_new=ANSWER_TOKENS)


def perplexity(lm: BaseLM, texts: Sequence[str]) -> float | None:
    """`exp` of the mean negative log-probability, over all tokens of all texts after the first word of each.

    None for a model that can only be asked; infinite where it is greater than a number can be.
    """
    if not isinstance(lm, LM):
        return None
    begun, rest = zip(*(text.split(maxsplit=1) for text in texts), strict=True)
    found = [logprob for one in predict(lm, lm.encode(begun, rest)) for logprob in one.logprobs]
    try:
        return math.exp(-sum(found) / len(found))
    except OverflowError:  # of a model that an edit has ruined
        return math.inf
