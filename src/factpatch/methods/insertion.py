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

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.patches import Dense, LowRank

__all__ = ["exact", "insert", "where_exact"]

_COLUMNS = 4096
"""Keys that are taken in float64 at a time, where there are many."""


def exact(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float64, where it lies if there are such numbers there."""
    return tensor.to(where_exact(tensor.device), torch.double)


def where_exact(device: torch.device) -> torch.device:
    """Where float64 is computed for what lies on this device: there, or on the CPU if it has no such numbers."""
    return torch.device("cpu") if device.type == "mps" else device


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

    With more keys than they have numbers it is written out. Differentiable.

    factor      the lower Cholesky factor of `C`; None for `C = I`
    ridge       λ
    directions  keys to take in place of `K` on the right; the published ROME takes keys averaged over contexts there
    still       further keys, whose values are to stay
    """
    still = keys[:, :0] if still is None else still.to(keys)
    if directions is None and ridge > 0 and keys.shape[1] + still.shape[1] > keys.shape[0]:
        return _of_many(residuals, keys, still, factor, ridge)
    every = exact(torch.cat([keys, still], 1))
    along = every if directions is None else exact(directions)
    solved = along if factor is None else torch.cholesky_solve(along, factor.to(along.device))
    small = solved.T @ every + _as(ridge, every) * torch.eye(every.shape[1], dtype=torch.double, device=every.device)
    scaled = torch.linalg.solve(small, solved.T)[: keys.shape[1]]
    return LowRank(residuals.float(), scaled.to(residuals.device, torch.float32))


def _of_many(
    residuals: Float[Tensor, "out edits"],
    keys: Float[Tensor, "in edits"],
    still: Float[Tensor, "in others"],
    factor: Float[Tensor, "in in"] | None,
    ridge: float | Float[Tensor, ""],
) -> Dense:
    """The same by the side of which there is less."""
    here = exact(keys[:, :0])
    metric = torch.eye(len(keys), dtype=torch.double, device=here.device) if factor is None else factor.to(here.device)
    square = _as(ridge, here) * (metric if factor is None else metric @ metric.T)
    wanted = here.new_zeros(len(residuals), len(keys))
    for some, own in zip(torch.split(keys, _COLUMNS, 1), torch.split(residuals, _COLUMNS, 1), strict=True):
        read = exact(some)
        square, wanted = square + read @ read.T, wanted + exact(own) @ read.T
    for some in torch.split(still, _COLUMNS, 1):
        read = exact(some)
        square = square + read @ read.T
    change = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(square)).T
    return Dense(change.to(residuals.device, torch.float32))


def _as(ridge: float | Float[Tensor, ""], like: Tensor) -> float | Float[Tensor, ""]:
    return ridge.to(like) if isinstance(ridge, Tensor) else ridge
