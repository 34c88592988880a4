"""Spectra of changes of weights: singular values, the spaces a change reads and writes, and what rounding alone would give.

What is low-rank is never multiplied out for its spectrum: QR of both factors, then the SVD of the small product. What is
written out goes through the Gram matrix of its shorter side, in float64 on the CPU and a piece at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.patches import LowRank
from factpatch.patches.delta import Delta

__all__ = [
    "ENERGY",
    "Pieces",
    "Spectrum",
    "as_matrix",
    "eps_of",
    "gram_values",
    "mean_squared_cosine",
    "rounding_noise",
    "spectrum",
]

ENERGY = 0.9
"""The spaces of a change are those of the leading singular vectors that hold this share of its squared norm."""

Index = tuple[slice, slice]
_PIECE = 1 << 22


@dataclass(frozen=True, eq=False, slots=True)
class Pieces:
    """A matrix that is read a piece at a time, so that a large one is never held in float64 as a whole."""

    rows: int
    cols: int
    read: Callable[[Index], Tensor]

    @classmethod
    def of(cls, delta: Delta) -> Pieces:
        """The entries of a change of a parameter."""
        if isinstance(delta, LowRank):
            u, v = delta.u.detach().cpu().float(), delta.v.detach().cpu().float()
            return cls(u.shape[0], v.shape[1], lambda at: u[at[0]] @ v[:, at[1]])
        return cls.held(delta.full())

    @classmethod
    def held(cls, tensor: Tensor) -> Pieces:
        """The entries of a tensor in hand."""
        matrix = as_matrix(tensor.detach())
        return cls(matrix.shape[0], matrix.shape[1], lambda at: matrix[at].cpu())

    @property
    def tall(self) -> bool:
        """Whether it is cut along its rows, not its columns: along the longer side."""
        return self.rows >= self.cols

    @property
    def squares(self) -> float:
        """The sum of squares of the entries that are finite."""
        read = (self.read(at).double().nan_to_num(0, 0, 0) for at in self)
        return sum(float(piece.square().sum()) for piece in read)

    def __iter__(self) -> Iterator[Index]:
        """Where the pieces lie; the same for all matrices of one shape."""
        long, short = max(self.rows, self.cols), max(1, min(self.rows, self.cols))
        step = max(1, _PIECE // short)
        for start in range(0, long, step):
            own, whole = slice(start, min(long, start + step)), slice(0, min(self.rows, self.cols))
            yield (own, whole) if self.tall else (whole, own)


def as_matrix(tensor: Tensor) -> Tensor:
    """A vector as one row; of more than two dimensions all but the last are rows, as in stacks of experts."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(0, -2)


def eps_of(dtype: torch.dtype) -> float:
    """The spacing of numbers of a type just above 1; 0 for whole numbers, which are exact."""
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def rounding_noise(change: Pieces, rounded: Sequence[tuple[Pieces, float]]) -> float:
    """About the greatest singular value that rounding alone would put into a change: what lies below is not counted as rank.

    Rounding moves an entry `w` by up to `eps |w| / 2`, with a variance of at most `(eps w)² / 12`, and entries independently.
    The norm of such a matrix is near the root of the greatest row sum of variances plus that of the greatest column sum, with
    a term for a single large entry (Bandeira and van Handel 2016, arXiv 1408.6185, theorem 3.1). Rows and columns in which
    nothing differs do not count. A change that is itself smaller than the rounding is noise to this rule, which is right, but
    one of about its size has entries cut off and may seem of higher rank than it was made with.

    rounded  the matrices whose entries were rounded, and the eps of the type each was rounded to
    """
    rows = torch.zeros(change.rows, dtype=torch.bool)
    cols = torch.zeros(change.cols, dtype=torch.bool)
    for at in change:
        differs = change.read(at) != 0
        rows[at[0]] |= differs.any(1)
        cols[at[1]] |= differs.any(0)
    by_row, by_col = torch.zeros(change.rows, dtype=torch.float64), torch.zeros(change.cols, dtype=torch.float64)
    most = 0.0
    for at in change:
        variance = sum((weight.read(at).double() * eps) ** 2 / 12 for weight, eps in rounded)
        assert isinstance(variance, Tensor)
        variance = variance.nan_to_num(0, 0, 0) * rows[at[0]][:, None] * cols[at[1]]
        by_row[at[0]] += variance.sum(1)
        by_col[at[1]] += variance.sum(0)
        most = max(most, float(variance.max()))
    spread = 2 * math.sqrt(most * math.log(change.rows + change.cols))
    return float(by_row.max().sqrt() + by_col.max().sqrt()) + spread


@dataclass(frozen=True, eq=False, slots=True)
class Spectrum:
    """Singular values of a change, falling, and its leading singular vectors as columns.

    floor    below it a value is not to be told from zero in the arithmetic used
    left     of the rows as stored
    right    of the columns
    factors  of a change that is written out: itself without what is noise, where that takes less room; else None
    """

    values: Float[Tensor, " values"]
    floor: float
    left: Float[Tensor, "rows leading"]
    right: Float[Tensor, "cols leading"]
    factors: LowRank | None = None


def spectrum(delta: Delta, energy: float = ENERGY, noise: float = 0.0) -> Spectrum:
    """Of any change, in float64; of a low-rank one exactly, from its factors.

    energy  the share of the squared norm that the leading vectors hold
    noise   singular values of no more than this are left out of the factors
    """
    if isinstance(delta, LowRank):
        u, v = delta.u.detach().cpu().double(), delta.v.detach().cpu().double()
        (q, r), (p, s) = torch.linalg.qr(u), torch.linalg.qr(v.T)
        a, values, b = torch.linalg.svd(r @ s.T, full_matrices=False)
        k = _leading(values, energy)
        # As far as the factors' own rounding, each entry by half its spacing, can move a singular value.
        floor = eps_of(delta.u.dtype) * float(u.norm() * v.norm())
        return Spectrum(values, floor, q @ a[:, :k], p @ b[:k].T)
    pieces = Pieces.of(delta)
    squares, vectors = torch.linalg.eigh(_gram(pieces))
    values = squares.flip(0).clamp(min=0).sqrt()
    k, floor = _leading(values, energy), _gram_floor(values)
    rank = int((values > max(floor, noise)).sum())
    is_short = rank * (pieces.rows + pieces.cols) < pieces.rows * pieces.cols
    near = vectors.flip(1)[:, : max(k, rank if is_short else 0)]
    read = (pieces.read(at).double() for at in pieces)
    far = torch.cat([(piece if pieces.tall else piece.T) @ near for piece in read])
    factors = None
    if is_short:
        u, v = far[:, :rank].float(), near[:, :rank].float()
        factors = LowRank(u, v.T.contiguous()) if pieces.tall else LowRank(v, u.T.contiguous())
    near, far = near[:, :k].contiguous(), far[:, :k] / values[:k]
    return Spectrum(values, floor, *((far, near) if pieces.tall else (near, far)), factors)


def gram_values(pieces: Pieces) -> tuple[Float[Tensor, " values"], float]:
    """The singular values of a matrix, falling, and below what they are not to be told from zero."""
    values = torch.linalg.eigvalsh(_gram(pieces)).flip(0).clamp(min=0).sqrt()
    return values, _gram_floor(values)


def _gram(pieces: Pieces) -> Float[Tensor, "short short"]:
    short = min(pieces.rows, pieces.cols)
    gram = torch.zeros(short, short, dtype=torch.float64)
    for at in pieces:
        piece = pieces.read(at).double()
        gram += piece.T @ piece if pieces.tall else piece @ piece.T
    return gram


def _gram_floor(values: Float[Tensor, " values"]) -> float:
    """A Gram matrix holds squares: what is below the root of float64's eps, times the greatest, is lost in it."""
    return float(values[0]) * math.sqrt(len(values) * torch.finfo(torch.float64).eps)


def _leading(values: Float[Tensor, " values"], energy: float) -> int:
    """How many of the greatest values hold `energy` of the sum of squares; none of a change that is zero."""
    held = values.square().cumsum(0)
    if not len(values) or held[-1] == 0:
        return 0
    return min(len(values), int((held < energy * held[-1] * (1 - 1e-12)).sum()) + 1)


def mean_squared_cosine(one: Float[Tensor, "n k"], other: Float[Tensor, "n l"]) -> float:
    """Of the principal angles between two spaces, given by orthonormal columns: `||AᵀB||² / min(k, l)`, 0 to 1.

    The subspace similarity of Hu et al. 2022 (arXiv 2106.09685), section 7.2. Random spaces have max(k, l) / n.
    """
    least = min(one.shape[1], other.shape[1])
    return min(1.0, float((one.T @ other).square().sum()) / least) if least else 0.0
