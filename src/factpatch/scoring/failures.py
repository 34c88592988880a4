"""How an edit failed: what kind of wrong answer the edited model gives.

The survey names four kinds (arXiv 2401.01286, its analysis of errors): meaningless tokens, missing tokens, text that has
nothing to do with the fact, and partial replacement. Two more are told apart here: what was said before is still said, and
the new answer is there, but not where it was asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

from factpatch.scoring.metrics import contains, normalise

__all__ = ["FAILURES", "FailureMode", "failure_mode"]

FailureMode = Literal["meaningless", "unchanged", "displaced", "partial", "missing", "irrelevant"]
"""
meaningless  nothing, no words, or the same few over and over
unchanged    the old fact, or what the model said before
displaced    the new answer is in it, but the answer is not that
partial      some words of the new answer, others replaced
missing      some words of the new answer, and no more
irrelevant   anything else
"""
FAILURES: tuple[FailureMode, ...] = get_args(FailureMode)

_CLAUSE = re.compile(r"[,.;:!?()\n\"]")
_SHARE = 0.5
"""Of an answer that is meaningless, at least so much is repetition."""


def failure_mode(said: str, *, wanted: Sequence[str], old: Sequence[str] = (), before: str = "") -> FailureMode:
    """The kind of wrong answer; `said` must be one.

    wanted, old  aliases of the answer that was wanted, and of the one that was true before
    before       what the model said before the edit
    """
    words = normalise(said).split()
    if not words or not any(char.isalpha() for word in words for char in word) or _repeats(words):
        return "meaningless"
    if _begins_as(said, before):
        return "unchanged"
    if contains(said, wanted):
        return "partial" if contains(said, old) else "displaced"
    if contains(said, old):
        return "unchanged"
    found = max((_shared(words, alias) for alias in wanted), default=0)
    if found:
        return "missing" if found == len(words) else "partial"
    return "irrelevant"


def _repeats(words: Sequence[str]) -> bool:
    """Whether the most frequent run of one to three words, or one letter group in a word, makes up most of it."""
    for n in (1, 2, 3):
        runs = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        count = max(runs.values(), default=0)
        if count >= 4 and count * n >= _SHARE * len(words):
            return True
    return any(_stutters(word) for word in words)


def _stutters(word: str) -> bool:
    """Whether a word is long and mostly one to six letters over and over."""
    if len(word) < 20:
        return False
    for n in range(1, 7):
        runs = Counter(word[i : i + n] for i in range(len(word) - n + 1))
        if max(runs.values()) * n >= _SHARE * len(word):
            return True
    return False


def _begins_as(said: str, before: str) -> bool:
    """Whether two answers are the same as far as the first clause of the longer one, or in their first three words."""
    one, other = (normalise(_CLAUSE.split(text.strip("\"' "))[0]).split() for text in (said, before))
    return bool(one) and (one == other or (len(one) > 2 and one[:3] == other[:3]))


def _shared(words: Sequence[str], alias: str) -> int:
    """How many words of the answer are words of the alias, each as often."""
    return (Counter(words) & Counter(normalise(alias).split())).total()
