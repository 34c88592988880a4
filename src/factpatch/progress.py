"""How long work tells how far it is, without knowing of terminals."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["Progress", "part", "silent"]


@runtime_checkable
class Progress(Protocol):
    """Called with what is being done, how many steps are done and how many there are (None: not known)."""

    def __call__(self, doing: str, done: int, total: int | None) -> None:
        """Take note."""


def silent(doing: str, done: int, total: int | None) -> None:
    """Tell nobody."""


def part(progress: Progress, index: int, count: int) -> Progress:
    """What reports on one of `count` equal parts of a longer piece of work."""

    def report(doing: str, done: int, total: int | None) -> None:
        progress(doing, done if total is None else index * total + done, None if total is None else count * total)

    return report
