"""`Outcome`: what came of one patch, and how a data set is cut into what each patch is made of."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, Self

import psutil
import torch

from factpatch.edits import Edit
from factpatch.errors import BadConfig
from factpatch.scoring import Scorecard

__all__ = ["ALONE", "AT_EDIT", "Memory", "Mode", "Moment", "Outcome", "after", "watching_memory"]

Moment = str
"""When a patch was scored: alone, right after it was made in a sequence, or after so many of the sequence."""
ALONE: Moment = "alone"
AT_EDIT: Moment = "at edit"


def after(count: int) -> Moment:
    """After so many patches of a sequence were made."""
    return f"after {count}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One patch and its scores, or why it could not be made.

    number          of the patch in its series, from 0; of the last one made, where a whole sequence is scored
    edits           ids of the edits that it makes, or that are scored
    card            None if the method refused, and `reason` says why
    fit_seconds     wall time of making the patch; None where nothing was made
    peak_memory_mb  the most that the process held while the patch was made, in units of 10^6 bytes; of a GPU, its memory
    """

    number: int
    moment: Moment
    edits: tuple[str, ...]
    card: Scorecard | None
    reason: str = ""
    fit_seconds: float | None = None
    peak_memory_mb: float | None = None


@dataclass(frozen=True, slots=True)
class Mode:
    """How edits are put together: each alone, so many in one patch, or one after the other, each kept."""

    name: Literal["single", "batch", "sequential"] = "single"
    size: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """`single`, `batch:K` or `sequential`. Raises BadConfig."""
        name, _, size = text.partition(":")
        if name == "batch" and size.isdecimal() and int(size) > 0:
            return cls("batch", int(size))
        if text in {"single", "sequential"}:
            return cls(text)  # type: ignore[arg-type]
        raise BadConfig(f'mode "{text}": expected single, batch:K with a number K, such as batch:10, or sequential.')

    def __str__(self) -> str:
        return f"batch:{self.size}" if self.name == "batch" else self.name

    def units(self, edits: Sequence[Edit]) -> list[tuple[Edit, ...]]:
        """What each patch is made of. Edits of one group that follow one another are never put into several patches."""
        whole: list[tuple[Edit, ...]] = []
        for edit in edits:
            if whole and edit.group is not None and edit.group == whole[-1][-1].group:
                whole[-1] += (edit,)
            else:
                whole.append((edit,))
        return [sum(whole[i : i + self.size], ()) for i in range(0, len(whole), self.size)]


@dataclass(slots=True)
class Memory:
    """How much memory was held, in bytes; looked at every few milliseconds."""

    start: int
    peak: int = field(default=0)

    @property
    def peak_mb(self) -> float:
        """In units of 10^6 bytes."""
        return round(self.peak / 1e6, 1)


@contextmanager
def watching_memory(device: torch.device) -> Iterator[Memory]:
    """The most that is held meanwhile: on a GPU what PyTorch has taken of it, else this process's resident memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        memory = Memory(torch.cuda.memory_allocated(device))
        yield memory
        memory.peak = torch.cuda.max_memory_allocated(device)
        return
    _hand_back()
    process, done = psutil.Process(), threading.Event()
    memory = Memory(process.memory_info().rss)

    def look() -> None:
        memory.peak = max(memory.peak, process.memory_info().rss)

    def watch() -> None:
        while not done.wait(0.005):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()
        look()


def _hand_back() -> None:
    """Give the system what was freed, lest what is done next take it and seem to need nothing."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
