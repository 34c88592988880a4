"""`WeightPatch`: changes of weights, low-rank or dense, undone from the kept originals and never by subtracting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.errors import BadPatch, WrongBase
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.patches.base import Patch, Provenance

__all__ = ["Delta", "Dense", "LowRank", "WeightPatch", "point"]


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """`u @ v`, never multiplied out before it must be."""

    u: Float[Tensor, "rows rank"]
    v: Float[Tensor, "rank cols"]

    @property
    def shape(self) -> torch.Size:
        """Of the matrix it stands for."""
        return torch.Size((self.u.shape[0], self.v.shape[1]))

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

    def full(self) -> Float[Tensor, "*shape"]:
        """The change itself."""
        return self.dense

    def parts(self) -> dict[str, Tensor]:
        """Its tensors, by the suffix they are saved under."""
        return {"dense": self.dense}

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.dense.double().norm())


Delta = LowRank | Dense
_STATE = "state:"
_FORMS: dict[frozenset[str], Callable[..., Delta]] = {
    frozenset({"u", "v"}): LowRank,
    frozenset({"dense"}): Dense,
}


@dataclass(frozen=True, eq=False)
class WeightPatch(Patch):
    """`W' = W + delta` for each named parameter, in the orientation in which the parameter is stored.

    `state` is what the method needs of this patch to make the next edits of a sequence, such as AlphaEdit's keys; it
    changes nothing in the model.
    """

    kind: ClassVar[str] = "weight"
    deltas: Mapping[str, Delta]
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, provenance: Provenance, changes: Mapping[Projection, Delta], state: Mapping[str, Tensor] | None = None
    ) -> WeightPatch:
        """A patch of changes of `W` as in `y = W x`, each turned the way its parameter is stored and in its smaller form."""
        deltas = {p.parameter: _smaller(delta.T if p.transposed else delta) for p, delta in changes.items()}
        return cls(provenance, deltas, state or {})

    def attach(self, lm: LM) -> Callable[[], None]:
        """Point each touched parameter at a changed copy; undoing points it back at the very tensor it had."""
        self.check_base(lm)
        parameters = dict(lm.model.named_parameters())
        for name, delta in self.deltas.items():
            if name not in parameters or parameters[name].shape != delta.shape:
                has = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise WrongBase(
                    f"the patch changes {name} of shape {tuple(delta.shape)}; {lm.name} has {has}.\n"
                    "  The patch's folder may be damaged; make it again with: factpatch edit"
                )
        changed = {name: _plus(parameters[name].data, delta) for name, delta in self.deltas.items()}
        kept = {name: parameters[name].data for name in self.deltas}
        point(parameters, changed)
        return partial(point, parameters, kept)

    def tensors(self) -> dict[str, Tensor]:
        """`<parameter>.u` and `.v`, or `<parameter>.dense`; `state:<name>` for state."""
        changes = {f"{name}.{part}": t for name, delta in self.deltas.items() for part, t in delta.parts().items()}
        return changes | {f"{_STATE}{name}": t for name, t in self.state.items()}

    @classmethod
    def from_parts(
        cls,
        provenance: Provenance,
        spec: Mapping[str, Any],  # noqa: ARG003
        tensors: Mapping[str, Tensor],
    ) -> WeightPatch:
        """Group tensors by parameter."""
        grouped: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(_STATE):
                continue
            name, _, part = key.rpartition(".")
            grouped.setdefault(name, {})[part] = tensor
        deltas = {}
        for name, parts in grouped.items():
            form = _FORMS.get(frozenset(parts))
            if form is None or ("u" in parts and not _joinable(parts["u"], parts["v"])):
                shapes = {part: tuple(t.shape) for part, t in parts.items()}
                raise BadPatch(
                    f"patch.safetensors: {name} has {shapes}; expected u (rows, rank) with v (rank, cols), or dense.\n"
                    "  The file is damaged; make the patch again with: factpatch edit"
                )
            deltas[name] = form(**parts)
        state = {key.removeprefix(_STATE): tensor for key, tensor in tensors.items() if key.startswith(_STATE)}
        return WeightPatch(provenance, deltas, state)

    def changes(self) -> list[dict[str, Any]]:
        """Parameter, shape, form and Frobenius norm of each change."""
        return [
            {
                "part": name,
                "form": f"rank {delta.u.shape[1]}" if isinstance(delta, LowRank) else "dense",
                "shape": list(delta.shape),
                "norm": round(delta.norm(), 6),
            }
            for name, delta in self.deltas.items()
        ]


def _smaller(delta: Delta) -> Delta:
    """The same change, written out where that takes less room than its factors."""
    if isinstance(delta, LowRank) and delta.u.numel() + delta.v.numel() > delta.shape.numel():
        return Dense(delta.full())
    return delta


def _joinable(u: Tensor, v: Tensor) -> bool:
    return u.ndim == v.ndim == 2 and u.shape[1] == v.shape[0]


def _plus(weight: Tensor, delta: Delta) -> Tensor:
    """The sum in float32, rounded once to the weight's type."""
    return (weight.float() + delta.full().to(weight.device, torch.float32)).to(weight.dtype)


def point(parameters: Mapping[str, Tensor], at: Mapping[str, Tensor]) -> None:
    """Let each named parameter hold another tensor."""
    for name, tensor in at.items():
        parameters[name].data = tensor
