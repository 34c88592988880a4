"""The forms that a change of one parameter may take: low-rank, sparse, or written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from factpatch.patches.parts import damaged

__all__ = ["Delta", "Dense", "LowRank", "Sparse", "deltas_of", "joinable", "moved", "smaller", "tensors_of"]


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """`u @ v`, never multiplied out before it must be."""

    u: Float[Tensor, "rows rank"]
    v: Float[Tensor, "rank cols"]

    @property
    def shape(self) -> torch.Size:
        """Of the matrix it stands for."""
        return torch.Size((self.u.shape[0], self.v.shape[1]))

    @property
    def form(self) -> str:
        """What kind of change it is, in words."""
        return f"rank {self.u.shape[1]}"

    def full(self) -> Float[Tensor, "rows cols"]:
        """The matrix itself."""
        return self.u @ self.v

    @property
    def T(self) -> LowRank:  # noqa: N802
        """The transpose."""
        return LowRank(self.v.T, self.u.T)

    def __add__(self, other: LowRank) -> LowRank:
        """The sum, of rank at most the sum of ranks."""
        return LowRank(torch.cat([self.u, other.u], 1), torch.cat([self.v, other.v], 0))

    def added(self, x: Float[Tensor, "*batch cols"], out: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
        """What a map puts out with this change of its matrix, `x` being what it reads and `out` what it puts out without."""
        u, v = self.u.to(x.device, torch.float32), self.v.to(x.device, torch.float32)
        return out + (x.float() @ v.T @ u.T).to(out.dtype)

    def after(self, reading: Float[Tensor, "cols inner"]) -> LowRank:
        """Of the matrix that reads what `reading` puts out, seen as a change of both together."""
        return LowRank(self.u, self.v @ reading.to(self.v))

    def parts(self) -> dict[str, Tensor]:
        """Its tensors, by the suffix they are saved under."""
        return {"u": self.u, "v": self.v}

    def norm(self) -> float:
        """Frobenius norm: `||u v||² = tr((uᵀu)(v vᵀ))`."""
        u, v = self.u.double(), self.v.double()
        return float(((u.T @ u) * (v @ v.T)).sum().clamp(min=0).sqrt())


@dataclass(frozen=True, eq=False, slots=True)
class Dense:
    """Any change, written out."""

    dense: Float[Tensor, "*shape"]

    @property
    def shape(self) -> torch.Size:
        """Of the parameter it changes."""
        return self.dense.shape

    @property
    def T(self) -> Dense:  # noqa: N802
        """The transpose of a matrix."""
        return Dense(self.dense.T.contiguous())

    @property
    def form(self) -> str:
        """What kind of change it is, in words."""
        return "dense"

    def full(self) -> Float[Tensor, "*shape"]:
        """The change itself."""
        return self.dense

    def added(self, x: Float[Tensor, "*batch cols"], out: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
        """As `LowRank.added`."""
        return out + (x.float() @ self.dense.to(x.device, torch.float32).T).to(out.dtype)

    def after(self, reading: Float[Tensor, "cols inner"]) -> Dense:
        """As `LowRank.after`."""
        return Dense(self.dense @ reading.to(self.dense))

    def parts(self) -> dict[str, Tensor]:
        """Its tensors, by the suffix they are saved under."""
        return {"dense": self.dense}

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.dense.double().norm())


@dataclass(frozen=True, eq=False, slots=True)
class Sparse:
    """A change of some entries of a matrix; the others stay as they are.

    places  their numbers, counted along rows, from the least on
    size    of the matrix: rows, columns
    """

    places: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    size: Int[Tensor, " 2"]

    @classmethod
    def of(cls, matrix: Float[Tensor, "rows cols"]) -> Sparse:
        """The entries of a matrix that are not zero."""
        flat = matrix.reshape(-1)
        places = flat.nonzero()[:, 0]
        return cls(places.int().cpu(), flat[places].cpu(), torch.tensor(matrix.shape))

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return torch.Size(self.size.tolist())

    @property
    def fits(self) -> bool:
        """Whether it is a matrix, with a value for each place, every place in it and none there twice."""
        if self.size.shape != (2,) or self.places.ndim != 1 or self.places.shape != self.values.shape:
            return False
        rows, cols = self.size.tolist()
        if rows < 1 or cols < 1 or not len(self.places):
            return bool(rows > 0 and cols > 0)
        first, last = int(self.places[0]), int(self.places[-1])
        return first >= 0 and last < rows * cols and bool((self.places[1:] > self.places[:-1]).all())

    @property
    def T(self) -> Sparse:  # noqa: N802
        """The transpose."""
        return Sparse.of(self.full().T)

    @property
    def form(self) -> str:
        """What kind of change it is, in words."""
        return f"{len(self.values)} entries"

    def full(self) -> Float[Tensor, "rows cols"]:
        """The matrix itself."""
        flat = torch.zeros(self.shape.numel(), dtype=self.values.dtype, device=self.values.device)
        return flat.index_put((self.places.long(),), self.values).reshape(self.shape)

    def parts(self) -> dict[str, Tensor]:
        """Its tensors, by the suffix they are saved under."""
        return {"places": self.places, "values": self.values, "size": self.size}

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.values.double().norm())


Delta = LowRank | Sparse | Dense


D = TypeVar("D", bound=Delta)


def moved(delta: D, device: torch.device) -> D:
    """The same on another device, row by row, as a file holds it: products of other layouts round otherwise."""
    return type(delta)(*(tensor.to(device).contiguous() for tensor in delta.parts().values()))


def smaller(delta: D) -> D | Dense:
    """The same change, written out where that takes less room than its factors."""
    if isinstance(delta, LowRank) and delta.u.numel() + delta.v.numel() > delta.shape.numel():
        return Dense(delta.full())
    return delta


_FORMS: dict[frozenset[str], Callable[..., Delta]] = {
    frozenset({"u", "v"}): LowRank,
    frozenset({"dense"}): Dense,
    frozenset({"places", "values", "size"}): Sparse,
}


def tensors_of(deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    """The tensors of changes by name, as they are saved: `<name>.u` and `.v`, or whatever the form has."""
    return {f"{name}.{part}": tensor for name, delta in deltas.items() for part, tensor in delta.parts().items()}


def deltas_of(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """From what `tensors_of` gave. Raises BadPatch for what is no change of any form."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        grouped.setdefault(name, {})[part] = tensor
    deltas: dict[str, Delta] = {}
    for name, parts in grouped.items():
        form = _FORMS.get(frozenset(parts))
        if form is None or ("u" in parts and not joinable(parts["u"], parts["v"])):
            shapes = {part: tuple(t.shape) for part, t in parts.items()}
            raise damaged(
                f"patch.safetensors: {name} has {shapes}; expected u (rows, rank) with v (rank, cols), or dense."
            )
        deltas[name] = form(**parts)
        if isinstance(own := deltas[name], Sparse) and not own.fits:
            raise damaged(f"patch.safetensors: {name} has entries outside of the matrix it tells of.")
    return deltas


def joinable(u: Tensor, v: Tensor) -> bool:
    """Whether these are two matrices that can be multiplied."""
    return u.ndim == v.ndim == 2 and u.shape[1] == v.shape[0]
