"""Insertion: the change of a linear map that gives chosen keys new values and disturbs other keys least.

One closed form serves every method that locates a fact first. For `W` of shape (out, in), keys `K` (in, n), what is to be
added to their values `R` (out, n), and a metric `C` (in, in) that says how dear a change along each direction is:

    Δ = R (Kᵀ C⁻¹ K + λ I)⁻¹ Kᵀ C⁻¹

It minimises `‖Δ K - R‖² + λ tr(Δ C Δᵀ)`; with λ = 0 the values are met exactly by the least change. With λ > 0 it equals
`R Kᵀ (K Kᵀ + λ C)⁻¹`, which is solved where there are more keys than they have numbers.

    ROME        n = 1, λ = 0, C the second moment of keys    arXiv 2202.05262, equation 2
    EMMET       n > 1, λ = 0 but for a small ridge           arXiv 2403.14236, equation 12
    MEMIT       λ the weight of what is known already        arXiv 2210.07229, equation 14
    AlphaEdit   K projected, C the keys of earlier edits     arXiv 2410.02355, equation 14
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.patches import LowRank

__all__ = ["insert"]


def insert(
    residuals: Float[Tensor, "out edits"],
    keys: Float[Tensor, "in edits"],
    factor: Float[Tensor, "in in"] | None = None,
    *,
    ridge: float | Float[Tensor, ""] = 0.0,
    directions: Float[Tensor, "in edits"] | None = None,
) -> LowRank:
    """`Δ` for residuals `R` and keys `K`, of rank at most n; solved in float64, returned in float32. Differentiable.

    With more keys than they have numbers it is written out, as the identity times itself.

    factor      the lower Cholesky factor of `C`; None for `C = I`
    ridge       λ
    directions  keys to take in place of `K` on the right; the published ROME takes keys averaged over contexts there
    """
    exact = keys.double().cpu()
    ridge = ridge.double().cpu() if isinstance(ridge, Tensor) else ridge
    if directions is None and ridge > 0 and exact.shape[1] > exact.shape[0]:
        return _of_many(residuals, exact, factor, ridge)
    along = exact if directions is None else directions.double().cpu()
    solved = along if factor is None else torch.cholesky_solve(along, factor)
    small = solved.T @ exact + ridge * torch.eye(exact.shape[1], dtype=torch.double)
    scaled = torch.linalg.solve(small, solved.T)
    return LowRank(residuals.float(), scaled.to(residuals.device, torch.float32))


def _of_many(
    residuals: Float[Tensor, "out edits"],
    keys: Float[Tensor, "in edits"],
    factor: Float[Tensor, "in in"] | None,
    ridge: float | Float[Tensor, ""],
) -> LowRank:
    """The same by the side of which there is less."""
    width = len(keys)
    metric = torch.eye(width, dtype=torch.double) if factor is None else factor @ factor.T
    wanted = residuals.double().cpu() @ keys.T
    change = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(keys @ keys.T + ridge * metric)).T
    return LowRank(torch.eye(len(residuals)).to(residuals.device), change.to(residuals.device, torch.float32))
