"""Insertion: the change of a linear map that gives chosen keys new values and disturbs other keys least.

One closed form serves every method that locates a fact first. For `W` of shape (out, in), keys `K` (in, n), what is to be
added to their values `R` (out, n), and a metric `C` (in, in) that says how dear a change along each direction is:

    Δ = R (Kᵀ C⁻¹ K + λ I)⁻¹ Kᵀ C⁻¹

It minimises `‖Δ K - R‖² + λ tr(Δ C Δᵀ)`; with λ = 0 the values are met exactly by the least change. With λ > 0 it equals
`R Kᵀ (K Kᵀ + λ C)⁻¹`, which is solved where there are more keys than they have numbers.

    ROME        n = 1, λ = 0, C the second moment of keys          arXiv 2202.05262, equation 2
    EMMET       n > 1, λ = 0 but for a small ridge                 arXiv 2403.14236, equation 12
    MEMIT       λ the weight of what is known already              arXiv 2210.07229, equation 14
    AlphaEdit   K projected, keys of earlier edits beside them     arXiv 2410.02355, equation 14
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.methods.needs import Held
from factpatch.patches import Dense, LowRank
from factpatch.patches.delta import moved, smaller

__all__ = ["insert", "insert_needed", "set_aside", "where_exact", "with_room"]

T = TypeVar("T")

_COLUMNS = 4096
"""Keys that are taken in float64 at a time, where there are many."""


def where_exact(device: torch.device) -> torch.device:
    """Where float64 is computed for what lies on this device: there, or on the CPU if it has no such numbers."""
    return torch.device("cpu") if device.type == "mps" else device


def with_room(device: torch.device, compute: Callable[[torch.device], T]) -> T:
    """What is computed in float64 for what lies on this device: where `where_exact` says, or on the CPU if there is no room."""
    try:
        return compute(where_exact(device))
    except torch.OutOfMemoryError:
        if where_exact(device).type == "cpu":
            raise
    return compute(torch.device("cpu"))


def insert(
    residuals: Float[Tensor, "out edits"],
    keys: Float[Tensor, "in edits"],
    factor: Float[Tensor, "in in"] | None = None,
    *,
    ridge: float | Float[Tensor, ""] = 0.0,
    directions: Float[Tensor, "in edits"] | None = None,
    still: Float[Tensor, "in others"] | None = None,
) -> LowRank | Dense:
    """`Δ` for residuals `R` and keys `K`, of rank at most n; solved in float64 where the keys lie, given in float32.

    On the CPU if there is no room for it. Differentiable. Where there are more keys than they have numbers it may be written out.

    factor      the lower Cholesky factor of `C`; None for `C = I`
    ridge       λ
    directions  keys to take in place of `K` on the right, as the published ROME takes keys averaged over contexts; not with
                `still`
    still       further keys, whose values are to stay
    """
    assert directions is None or still is None

    def solve(place: torch.device) -> LowRank | Dense:
        own = ridge.to(place, torch.double) if isinstance(ridge, Tensor) else ridge
        more = [None if each is None else each.to(place) for each in (factor, directions, still)]
        return _solved(residuals.to(place), keys.to(place), *more, ridge=own)

    return with_room(keys.device, solve)


def insert_needed(
    out: int, width: int, keys: int, *, metric: bool = False, directions: bool = False, exact: bool = False
) -> Held:
    """What `insert` holds at its height for so many keys, with a ridge, beside its arguments.

    metric      with a `factor`
    directions  with `directions`
    exact       the keys are in float64 already, so that no copy of them is made
    """
    if keys <= width or directions:
        taken = (1 + metric + directions - exact) * width * keys
        solving, rounding = width * keys + 2 * keys**2, 3 * width * keys // 2 + keys**2
        held = taken + max(metric * width**2, 3 * keys**2, solving, rounding)
    else:
        part = min(keys, _COLUMNS)
        own = 0 if exact else part * width
        adding = 2 * width**2 + own
        wanting = width**2 + 2 * out * width + part * out + own
        held = max(adding, wanting, 2 * (width + out) * width)
    return Held(what=f"the solve of {keys} keys, float64", bytes=8 * held)


def set_aside(change: LowRank | Dense) -> LowRank | Dense:
    """In its smaller form and in main memory, as a patch keeps it; multiplied where it lies, or on the CPU without room."""
    lies = next(iter(change.parts().values())).device
    return with_room(lies, lambda place: moved(smaller(moved(change, place)), torch.device("cpu")))


def _solved(
    residuals: Float[Tensor, "out edits"],
    keys: Float[Tensor, "in edits"],
    factor: Float[Tensor, "in in"] | None,
    directions: Float[Tensor, "in edits"] | None,
    still: Float[Tensor, "in others"] | None,
    *,
    ridge: float | Float[Tensor, ""],
) -> LowRank | Dense:
    every = keys if still is None else torch.cat([keys, still.to(keys)], 1)
    if directions is None and ridge > 0 and every.shape[1] > len(every):
        return _of_many(residuals, keys, every, factor, ridge)
    every = every.double()
    along = every if directions is None else directions.double()
    solved = along if factor is None else torch.cholesky_solve(along, factor)
    small = solved.T @ every + ridge * torch.eye(every.shape[1], dtype=torch.double, device=every.device)
    return LowRank(residuals.float(), torch.linalg.solve(small, solved.T)[: keys.shape[1]].float())


def _of_many(
    residuals: Float[Tensor, "out edits"],
    keys: Float[Tensor, "in edits"],
    every: Float[Tensor, "in all"],
    factor: Float[Tensor, "in in"] | None,
    ridge: float | Float[Tensor, ""],
) -> LowRank | Dense:
    """The same by the side of which there is less; `every` are the keys and those that stay."""
    out, (width, n) = len(residuals), keys.shape
    root = _root(every, factor, ridge)
    if n * (out + width) <= out * width:
        return LowRank(residuals.float(), torch.cholesky_solve(keys.double(), root).T.float())
    wanted = root.new_zeros(out, width)
    for some, own in zip(torch.split(keys, _COLUMNS, 1), torch.split(residuals, _COLUMNS, 1), strict=True):
        wanted = torch.addmm(wanted, own.double(), some.double().T)
    return Dense(torch.cholesky_solve(wanted.T, root).T.float())


def _root(
    keys: Float[Tensor, "in all"], factor: Float[Tensor, "in in"] | None, ridge: float | Float[Tensor, ""]
) -> Float[Tensor, "in in"]:
    """The lower Cholesky factor of `K Kᵀ + λ C`."""
    square = ridge * (
        torch.eye(len(keys), dtype=torch.double, device=keys.device) if factor is None else factor @ factor.T
    )
    for some in torch.split(keys, _COLUMNS, 1):
        part = some.double()
        square = torch.addmm(square, part, part.T)
    root: Tensor = torch.linalg.cholesky(square)
    return root
