"""`NeuronPatch`: a few neurons added beside an MLP, each with a key that fires it and a value that it puts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from factpatch.lm import LM
from factpatch.patches.base import Patch, Provenance
from factpatch.patches.parts import Spec, damaged, is_beside, linear_map, misfit

__all__ = ["NeuronPatch", "fired"]


class _Spec(Spec):
    reads: str
    writes: str


@dataclass(frozen=True, eq=False)
class NeuronPatch(Patch):
    """`out' = out + relu(x Kᵀ + b) V`: x is what the MLP reads, out what it puts out, everywhere in the text.

    reads   the module whose input is x
    writes  the module whose output is added to
    """

    kind: ClassVar[str] = "neurons"
    reads: str
    writes: str
    keys: Float[Tensor, "neurons hidden"]
    biases: Float[Tensor, " neurons"]
    values: Float[Tensor, "neurons hidden"]

    def attach(self, lm: LM) -> Callable[[], None]:
        """Hook onto both modules."""
        self.check_base(lm)
        reading = linear_map(lm, self.reads, "the neurons lie beside", reads=self.keys.shape[1]).module
        writing = linear_map(lm, self.writes, "the neurons lie beside", writes=self.values.shape[1]).module
        if not is_beside(lm, self.reads, self.writes):
            raise misfit(
                f"the neurons lie beside {self.reads} and {self.writes}; in {lm.name} these are not the ways into and out "
                "of one MLP."
            )
        seen: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[:] = args[:1]

        def add(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            x = seen.pop().float()
            added = fired(x, self.keys.to(x), self.biases.to(x)) @ self.values.to(x)
            return out + added.reshape(out.shape).to(out.dtype)

        handles = [reading.register_forward_pre_hook(see), writing.register_forward_hook(add)]

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo

    def tensors(self) -> dict[str, Tensor]:
        """Keys, biases and values."""
        return {"keys": self.keys, "biases": self.biases, "values": self.values}

    def spec(self) -> dict[str, Any]:
        """Where they lie."""
        return {"reads": self.reads, "writes": self.writes}

    @classmethod
    def from_parts(cls, provenance: Provenance, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NeuronPatch:
        """From what `spec` and `tensors` gave."""
        read = _Spec.read(spec)
        shapes = [tuple(tensors[name].shape) if name in tensors else () for name in ("keys", "biases", "values")]
        if [len(shape) for shape in shapes] != [2, 1, 2] or len({shape[0] for shape in shapes}) > 1:
            raise damaged("patch.safetensors: expected as many keys, biases and values, and where they lie.")
        return NeuronPatch(provenance, read.reads, read.writes, tensors["keys"], tensors["biases"], tensors["values"])

    def changes(self) -> list[dict[str, Any]]:
        """One row: the MLP."""
        return [{"part": self.writes, "form": f"{len(self.keys)} neurons beside it"}]


def fired(
    x: Float[Tensor, "*batch hidden"], keys: Float[Tensor, "neurons hidden"], biases: Float[Tensor, " neurons"]
) -> Float[Tensor, "*batch neurons"]:
    """How strongly each neuron fires."""
    return (x @ keys.T + biases).relu()
