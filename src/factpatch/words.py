"""Numbers in sentences."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str, several: str | None = None) -> str:
    """`1 patch`, `2 patches`: a number of things, for people.

    several  the plural, where it is not the noun with an s
    """
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"
