"""The measures, as pure functions of tokens and texts."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "agreement",
    "begins_with",
    "contains",
    "divergence",
    "exactly",
    "fluency",
    "ngram_entropy",
    "normalise",
    "rouge1",
    "same_answer",
    "sentiment_shift",
    "taken_together",
    "words",
]

_WORD = re.compile(r"\w+|[^\w\s]")
# Letters of scripts that put no space between words, each with the marks that belong to it: Thai, Lao, Burmese, Khmer, kana,
# and Chinese characters.
_UNSPACED = re.compile(
    "[\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u1000-\u102a\u1780-\u17b3"
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    "[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u17b4-\u17d3\u3099\u309a]*"
)
_MOST_EXPONENT = 700.0
"""Of `math.exp`, rounded down."""
_LEAST = 0.01
_ARTICLES = frozenset({"a", "an", "the"})


def agreement(best: Sequence[int], target: Sequence[int]) -> float:
    """The share of positions at which two token sequences of one length agree. Raises ValueError on other lengths."""
    if len(best) != len(target) or not target:
        raise ValueError(f"expected two sequences of one length, not empty; found {len(best)} and {len(target)} tokens")
    return sum(a == b for a, b in zip(best, target, strict=True)) / len(target)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces.

    >>> normalise("The  U.S.A.!")
    'usa'
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("-", " ")
    kept = "".join(c for c in folded if not unicodedata.category(c).startswith(("P", "S")))
    return " ".join(word for word in kept.split() if word not in _ARTICLES)


def _alike(answer: str, alias: str) -> tuple[list[str], list[str]]:
    """The words of both, normalised. Where the alias is in a script without spaces, letters take the place of words."""
    said, wanted = normalise(answer), normalise(alias)
    if _UNSPACED.search(wanted):
        said, wanted = (_UNSPACED.sub(r" \g<0> ", text) for text in (said, wanted))
    return said.split(), wanted.split()


def begins_with(answer: str, aliases: Sequence[str]) -> bool:
    """Whether the answer, normalised, begins with an alias in whole words."""
    pairs = [_alike(answer, alias) for alias in aliases]
    return any(wanted and said[: len(wanted)] == wanted for said, wanted in pairs)


def contains(answer: str, aliases: Sequence[str]) -> bool:
    """Whether the answer, normalised, has an alias in it as a whole phrase."""
    pairs = [_alike(answer, alias) for alias in aliases]
    return any(wanted and f" {' '.join(wanted)} " in f" {' '.join(said)} " for said, wanted in pairs)


def exactly(answer: str, aliases: Sequence[str]) -> bool:
    """Whether the answer, normalised, is an alias and nothing more."""
    said = normalise(answer)
    return any(said == alias for alias in map(normalise, aliases) if alias)


def rouge1(answer: str, aliases: Sequence[str]) -> float:
    """ROUGE-1 recall: the share of an alias's words that the answer has, each as often; the best over aliases.

    Lin 2004 (ACL W04-1013). On normalised words, without stemming. An alias without words does not count.
    """
    pairs = [(Counter(said), Counter(wanted)) for said, wanted in (_alike(answer, alias) for alias in aliases)]
    return max(((said & wanted).total() / wanted.total() for said, wanted in pairs if wanted), default=0.0)


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are the same once normalised."""
    return normalise(one) == normalise(other)


def divergence(before: Float[Tensor, " vocab"], after: Float[Tensor, " vocab"]) -> float:
    """KL(before || after) of two distributions given by their log-probabilities, in nats, not negative."""
    possible = before > -torch.inf
    before, after = before[possible], after[possible]
    found = float((before.exp() * (before - after)).sum())
    # Of a ruined model nothing is known, least of all that it is near.
    return found if math.isnan(found) else max(0.0, found)


def sentiment_shift(*, before: float, after: float, other_after: float) -> tuple[float, float]:
    """Whether the wanted manner is the likelier one, and whether the topic is kept: two factors, each from 0 to 1.

    Given the mean log-probability of sample replies in the wanted manner, before and after the edit, and in the other one
    after it: `sigmoid(after - other_after)` and `min(1, exp(after - before))` (Mitchell et al. 2022, arXiv 2206.06520).
    Their product is the success of the edit.
    """
    return 1 / (1 + math.exp(min(_MOST_EXPONENT, other_after - after))), math.exp(min(0.0, after - before))


def taken_together(success: float | None, *others: float | None) -> float | None:
    """The harmonic mean of success and of what else was measured, each counted as at least 0.01.

    So where another is nought, the rest decide; without any success it is 0, and None where success was not measured.
    """
    if not success:
        return success
    parts = [success, *(value for value in others if value is not None)]
    return len(parts) / sum(1 / max(_LEAST, value) for value in parts)


def words(text: str) -> list[str]:
    """Words and punctuation marks; a plain tokenizer that needs no download."""
    return _WORD.findall(text)


def ngram_entropy(tokens: Sequence[str], n: int) -> float:
    """Shannon entropy, in bits, of the distribution of n-grams in one text; 0 for a text without any."""
    counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def fluency(text: str) -> float:
    """`(2/3 H2 + 4/3 H3) / 2` in bits: the mean of weighted 2- and 3-gram entropies (ROME, section 3.3; the survey).

    The survey prints it times 100. Repetition lowers it; text of 100 tokens without any has about 5.9.
    """
    tokens = words(text)
    return (2 / 3 * ngram_entropy(tokens, 2) + 4 / 3 * ngram_entropy(tokens, 3)) / 2
