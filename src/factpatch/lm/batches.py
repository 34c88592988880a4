"""Texts in batches: padded, cut to a size, and what patches inside the model may know of the pass that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from factpatch.lm.tokens import Encoded

__all__ = ["BATCH_TOKENS", "Batch", "Pass", "Places", "by_rows", "current_pass", "length_batches", "passing"]

BATCH_TOKENS = 4096
"""The most tokens in one batch: padding counts, and so do those whose keys and values are known before it runs.

It bounds memory, and changes no result.
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded token ids, and what goes with them.

    mask   1 where there is a token
    ends   the column where each prompt ends
    lanes  the lane of each row, -1 for none; None if no row has one
    """

    ids: Int[Tensor, "batch seq"]
    mask: Int[Tensor, "batch seq"]
    ends: Int[Tensor, " batch"]
    lanes: Int[Tensor, " batch"] | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[int]],
        device: torch.device,
        *,
        left: bool = False,
        prompts: Sequence[int] | None = None,
        lanes: Sequence[int | None] | None = None,
        align: Sequence[int] | None = None,
    ) -> Batch:
        """Pad rows to one length: on the right for reading, on the left for writing on.

        prompts  how many tokens of each row are its prompt; all by default
        align    a token of each row; these come to stand in one column, and rows are padded on both sides
        lanes    the lane of each row, as in `LM.side_by_side`; none by default
        """
        longest = max(len(row) for row in rows)
        starts = [longest - len(row) if left else 0 for row in rows]
        if align is not None:
            starts = [max(align) - token for token in align]
        width = max(start + len(row) for start, row in zip(starts, rows, strict=True))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (start, row) in enumerate(zip(starts, rows, strict=True)):
            ids[i, start : start + len(row)] = torch.tensor(list(row), dtype=torch.long)
            mask[i, start : start + len(row)] = 1
        lengths = prompts or [len(row) for row in rows]
        ends = torch.tensor([start + n - 1 for start, n in zip(starts, lengths, strict=True)])
        has_lanes = any(lane is not None for lane in lanes or ())
        own = torch.tensor([-1 if lane is None else lane for lane in lanes or ()], device=device) if has_lanes else None
        return cls(ids.to(device), mask.to(device), ends.to(device), own)

    @classmethod
    def of_texts(cls, texts: Sequence[Encoded], device: torch.device, *, align: Sequence[int] | None = None) -> Batch:
        """Texts with their targets, padded on the right, or aligned at a token of each."""
        prompts, lanes = [text.target for text in texts], [text.lane for text in texts]
        return cls.of([text.ids for text in texts], device, prompts=prompts, lanes=lanes, align=align)


@dataclass(slots=True)
class Pass:
    """What a patch inside the model may know of the forward pass it takes part in; see `current_pass`.

    mask   1 where there is a token, of all columns so far
    ends   the column of each row's last prompt token; None in passes that write on after the prompt was read
    notes  what patches keep from the pass that reads the prompt to those that write on; tensors have a row for each text
    lanes  the lane that each row belongs to, -1 for none; None if no row has one
    """

    mask: Int[Tensor, "batch seq"]
    ends: Int[Tensor, " batch"] | None
    notes: dict[Any, Tensor] = field(default_factory=dict)
    lanes: Int[Tensor, " batch"] | None = None


_PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)


def current_pass() -> Pass | None:
    """The forward pass that is going on; None if the model was called from elsewhere."""
    return _PASS.get()


def by_rows(activation: Tensor) -> Float[Tensor, "rows seq width"]:
    """What a module reads or puts out, with a row for each text; some blocks flatten the first two axes."""
    now = current_pass()
    rows = len(now.mask) if now is not None else (len(activation) if activation.ndim == 3 else 1)
    return activation.reshape(rows, -1, activation.shape[-1])


@contextmanager
def passing(now: Pass) -> Iterator[None]:
    """Let `current_pass` tell of this pass."""
    token = _PASS.set(now)
    try:
        yield
    finally:
        _PASS.reset(token)


@dataclass(frozen=True, slots=True)
class Places:
    """Positions in a batch: row and column of each."""

    rows: Int[Tensor, " reads"]
    cols: Int[Tensor, " reads"]

    @classmethod
    def of(cls, columns: Sequence[Sequence[int]], device: torch.device) -> Places:
        """For each row of a batch, the columns to read."""
        rows = [row for row, cols in enumerate(columns) for _ in cols]
        flat = [col for cols in columns for col in cols]
        return cls(
            torch.tensor(rows, dtype=torch.long, device=device), torch.tensor(flat, dtype=torch.long, device=device)
        )


def length_batches(
    lengths: Sequence[int], budget: int | None = None, *, widths: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Indices sorted by length and cut so that rows times the longest stay within the budget, `BATCH_TOKENS` if none.

    widths  what counts for the budget, where it is not the lengths
    """
    budget = BATCH_TOKENS if budget is None else budget
    widths = lengths if widths is None else widths
    batch: list[int] = []
    widest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        widest = max(widest, widths[index])
        if batch and (len(batch) + 1) * widest > budget:
            yield batch
            batch, widest = [], widths[index]
        batch.append(index)
    if batch:
        yield batch
