"""`WeightPatch`: changes of weights, low-rank or dense, undone from the kept originals and never by subtracting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from factpatch.errors import BadPatch
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.patches.base import Patch, Provenance
from factpatch.patches.delta import Delta, deltas_of, moved, smaller, tensors_of
from factpatch.patches.parts import Spec, damaged, misfit

__all__ = ["WeightPatch", "check_finite", "point"]


_STATE = "state:"


@dataclass(frozen=True, eq=False)
class WeightPatch(Patch):
    """`W' = W + delta` for each named parameter, in the orientation in which the parameter is stored.

    `state` is what the method needs of this patch to make the next edits of a sequence, such as AlphaEdit's keys; it
    changes nothing in the model.
    """

    kind: ClassVar[str] = "weight"
    mergeable: ClassVar[bool] = True
    whole: ClassVar[frozenset[str]] = frozenset({"places", "size"})
    exact: ClassVar[str | None] = _STATE
    deltas: Mapping[str, Delta]
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, provenance: Provenance, changes: Mapping[Projection, Delta], state: Mapping[str, Tensor] | None = None
    ) -> WeightPatch:
        """A patch of changes of `W` as in `y = W x`, each turned the way its parameter is stored and in its smaller form.

        They wait in main memory: the model gets copies of its own of what they change.
        """
        turned = {p.parameter: smaller(delta.T if p.transposed else delta) for p, delta in changes.items()}
        deltas = {name: moved(delta, torch.device("cpu")) for name, delta in turned.items()}
        return cls(provenance, deltas, {name: tensor.cpu() for name, tensor in (state or {}).items()})

    def attach(self, lm: LM) -> Callable[[], None]:
        """Point each touched parameter at a changed copy; undoing points it back at the very tensor it had."""
        self.check_base(lm)
        parameters = dict(lm.model.named_parameters())
        for name, delta in self.deltas.items():
            if name not in parameters or parameters[name].shape != delta.shape:
                has = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise misfit(f"the patch changes {name} of shape {tuple(delta.shape)}; {lm.name} has {has}.")
        changed = {name: _plus(parameters[name].data, delta) for name, delta in self.deltas.items()}
        check_finite(changed, lm)
        kept = {name: parameters[name].data for name in self.deltas}
        point(parameters, changed)
        return partial(point, parameters, kept)

    def tensors(self) -> dict[str, Tensor]:
        """`<parameter>.u` and `.v`, or `<parameter>.dense`; `state:<name>` for state."""
        return tensors_of(self.deltas) | {f"{_STATE}{name}": t for name, t in self.state.items()}

    @classmethod
    def from_parts(
        cls,
        provenance: Provenance,
        spec: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> WeightPatch:
        """Group tensors by parameter."""
        Spec.read(spec)
        deltas = deltas_of({key: tensor for key, tensor in tensors.items() if not key.startswith(_STATE)})
        if not deltas:
            raise damaged("patch.safetensors: changes no weight.")
        state = {key.removeprefix(_STATE): tensor for key, tensor in tensors.items() if key.startswith(_STATE)}
        return WeightPatch(provenance, deltas, state)

    def changes(self) -> list[dict[str, Any]]:
        """Parameter, shape, form and Frobenius norm of each change."""
        return [
            {
                "part": name,
                "form": delta.form,
                "shape": list(delta.shape),
                "norm": round(delta.norm(), 6),
            }
            for name, delta in self.deltas.items()
        ]


def _plus(weight: Tensor, delta: Delta) -> Tensor:
    """The sum in float32, rounded once to the weight's type, without a copy of the weight in float32."""
    full = delta.full().to(weight.device, torch.float32)  # multiplied where it lies: the same on every device
    return torch.add(weight, full, out=torch.empty_like(weight))


def check_finite(changed: Mapping[str, Tensor], lm: LM) -> None:
    """Raise BadPatch if a weight would hold what is no number: finite changes may add up or multiply to more than it holds."""
    for name, weight in changed.items():
        ends = torch.stack(weight.aminmax())  # asking each number would take a copy of the weight
        if not ends.isfinite().all():
            raise BadPatch(
                f"the patch would give {name} of {lm.name} values that are not finite.\n"
                "  Its changes are too great for this model and those beneath; make it again with: factpatch edit"
            )


def point(parameters: Mapping[str, Tensor], at: Mapping[str, Tensor]) -> None:
    """Let each named parameter hold another tensor."""
    for name, tensor in at.items():
        parameters[name].data = tensor
