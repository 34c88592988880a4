"""Where an answer ends as a reader sees it: at a new line, or at the end of a sentence."""

from __future__ import annotations

import re

__all__ = ["first_sentence", "has_ended"]

_CLOSERS = r"\"'”’»)\]」』）"
_STOP = re.compile(
    rf"(?P<word>[^\s。！？]*)[.!?]+[{_CLOSERS}]*(?=\s)"
    rf"|[。！？][.!?。！？{_CLOSERS}]*(?=[^.!?。！？{_CLOSERS}])"  # no white space follows in Chinese and Japanese
)
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
_NUMBER = re.compile(r"\s*(\d|$)")
_ABBREVIATIONS = frozenset(
    "dr mr mrs ms st mt ft jr sr prof gen col sgt vs etc inc ltd co u.s u.k e.g i.e".split()  # noqa: SIM905
)


def has_ended(text: str) -> bool:
    """Whether the first line or sentence is complete, so that writing on adds nothing."""
    return _end(text.lstrip()) is not None


def first_sentence(text: str) -> str:
    """The first line or sentence, whichever ends sooner; initials and abbreviations end none.

    >>> first_sentence(" St. Moritz. It lies in")
    'St. Moritz.'
    """
    text = text.lstrip()
    return text[: _end(text)].strip()


def _end(text: str) -> int | None:
    line = text.find("\n")
    for match in _STOP.finditer(text if line < 0 else text[: line + 1]):
        if match["word"] is None:
            return match.end()
        word = match["word"].lower().strip("\"'“‘«([")
        list_number = match.start() == 0 and word.isdigit()
        numero = word == "no" and _NUMBER.match(text, match.end())
        if word and not (list_number or numero or word in _ABBREVIATIONS or _INITIALS.fullmatch(word)):
            return match.end()
    return line if line >= 0 else None
