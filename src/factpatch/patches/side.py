"""`SidePatch`: a second copy of one matrix that acts where a prompt is about what was edited (WISE, arXiv 2405.14768)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from factpatch.lm import LM
from factpatch.lm.batches import by_rows, current_pass
from factpatch.patches.base import Patch, Provenance
from factpatch.patches.delta import Sparse, deltas_of, tensors_of
from factpatch.patches.parts import Spec, damaged, linear_map

__all__ = ["SideMemory", "SidePatch", "memories", "routing_activation"]


class _Memory(Spec):
    least: NonNegativeFloat
    edits: PositiveInt


class _Spec(Spec):
    site: str
    ratio: NonNegativeFloat
    merged: bool
    memories: dict[NonNegativeInt, _Memory]


@dataclass(frozen=True, eq=False)
class SideMemory:
    """One side copy of a matrix, as `W' - W` of `y = W x`.

    least  the least routing activation that an edit in it had
    edits  how many are in it
    """

    change: Sparse
    least: float
    edits: int

    def __add__(self, other: SideMemory) -> SideMemory:
        """The same memory with what `other` adds to it."""
        change = Sparse.of(self.change.full() + other.change.full())
        return SideMemory(change, min(self.least, other.least), self.edits + other.edits)


@dataclass(frozen=True, eq=False)
class SidePatch(Patch):
    """What some edits add to the side memories of one matrix, by number.

    A prompt's routing activation under each memory decides: of those where it reaches `ratio` times the least that an edit
    in the memory had, the memory of the greatest takes the matrix's place, in the prompt and in all that is written after.
    Patches that lie on one matrix act as one: what they add to a memory is summed.

    site    the module that holds the matrix
    ratio   how near to the edits' own activation a prompt must come
    merged  the memories beneath were merged into this patch's and act no more
    added   by number of the memory
    """

    kind: ClassVar[str] = "side"
    whole: ClassVar[frozenset[str]] = frozenset({"places", "size"})
    site: str
    ratio: float
    merged: bool
    added: Mapping[int, SideMemory]

    def attach(self, lm: LM) -> Callable[[], None]:
        """Hook onto the module; of several patches there, the uppermost acts for all."""
        self.check_base(lm)
        belongs = "the side memory belongs to"
        module = linear_map(lm, self.site, belongs, kind="matrix").module
        for memory in self.added.values():
            out, width = memory.change.shape
            linear_map(lm, self.site, belongs, reads=width, writes=out)
        activation = lm.anatomy.activation
        held: list[tuple[Float[Tensor, "out in"], float]] = []

        def act(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            patches = self.on(lm, self.site) or [self]
            if patches[-1] is not self:
                return out
            if not held:
                there = memories(patches).values()
                held.extend((memory.change.full().to(out.device), memory.least) for memory in there)
            x, rows = by_rows(args[0]).float(), by_rows(out)
            chosen = self._choose(x, rows.float(), held, activation)
            for number, (change, _least) in enumerate(held):
                at = (chosen == number).nonzero()[:, 0]
                if len(at):
                    rows = rows.index_put((at,), rows[at] + (x[at] @ change.T).to(rows.dtype))
            return rows.reshape(out.shape)

        handle = module.register_forward_hook(act)
        return handle.remove

    def _choose(
        self,
        x: Float[Tensor, "rows seq in"],
        out: Float[Tensor, "rows seq out"],
        held: Sequence[tuple[Float[Tensor, "out in"], float]],
        activation: nn.Module,
    ) -> Int[Tensor, " rows"]:
        """The place in `held` of the memory that acts in each row, -1 for none: decided where the prompt is read, and kept."""
        now = current_pass()
        if now is not None and now.ends is None:
            return now.notes[self]
        prompt = torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
        if now is not None and now.ends is not None:
            prompt = now.mask.bool() & (torch.arange(out.shape[1], device=out.device) <= now.ends[:, None])
        found = torch.stack([routing_activation(out, x @ c.T, prompt, activation) for c, _ in held], 1)
        least = torch.tensor([self.ratio * least for _, least in held], device=out.device)
        best = found.masked_fill(found < least, -1.0).max(1)
        chosen = torch.where(best.values >= 0, best.indices, -1)
        if now is not None:
            now.notes[self] = chosen
        return chosen

    @classmethod
    def on(cls, lm: LM, site: str) -> list[SidePatch]:
        """The side patches that lie on one matrix, first to last."""
        return [patch for patch in lm.patches if isinstance(patch, cls) and patch.site == site]

    def tensors(self) -> dict[str, Tensor]:
        """What is added to each memory."""
        return tensors_of({str(number): memory.change for number, memory in self.added.items()})

    def spec(self) -> dict[str, Any]:
        """Where it lies, and what is known of each memory."""
        known = {str(number): {"least": m.least, "edits": m.edits} for number, m in self.added.items()}
        return {"site": self.site, "ratio": self.ratio, "merged": self.merged, "memories": known}

    @classmethod
    def from_parts(cls, provenance: Provenance, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SidePatch:
        """From what `spec` and `tensors` gave."""
        read, deltas = _Spec.read(spec), deltas_of(tensors)
        if set(deltas) != {str(number) for number in read.memories} or not all(
            isinstance(delta, Sparse) for delta in deltas.values()
        ):
            raise damaged(
                f"patch.json, spec: tells of memories {sorted(read.memories)}, which does not fit the tensors beside it."
            )
        added = {}
        for number, known in read.memories.items():
            change = deltas[str(number)]
            assert isinstance(change, Sparse)
            added[number] = SideMemory(change, known.least, known.edits)
        return SidePatch(provenance, read.site, read.ratio, read.merged, added)

    def changes(self) -> list[dict[str, Any]]:
        """One row for each memory."""
        return [
            {
                "part": self.site,
                "form": f"side memory {number}: {memory.change.form}",
                "shape": list(memory.change.shape),
                "norm": round(memory.change.norm(), 6),
            }
            for number, memory in self.added.items()
        ]


def memories(patches: Sequence[SidePatch]) -> dict[int, SideMemory]:
    """All memories of these patches, first to last, as they are when the patches lie on each other."""
    now: dict[int, SideMemory] = {}
    for patch in patches:
        if patch.merged:
            now = {}
        for number, memory in patch.added.items():
            now[number] = now[number] + memory if number in now else memory
    return now


def routing_activation(
    out: Float[Tensor, "rows seq out"],
    change: Float[Tensor, "rows seq out"],
    prompt: Bool[Tensor, "rows seq"],
    activation: nn.Module,
) -> Float[Tensor, " rows"]:
    """`mean over the prompt's tokens of ‖act(W x) - act(W' x)‖₂`, `out` being `W x` and `change` `(W' - W) x`."""
    norms: Tensor = (activation(out) - activation(out + change)).norm(dim=-1) * prompt
    return norms.sum(1) / prompt.sum(1)
