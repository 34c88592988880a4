"""`SlicePatch`: low-rank slices of some modules, each turned on where a prompt comes near to its key (MELO, 2312.11795)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from factpatch.lm import LM
from factpatch.lm.batches import by_rows, current_pass
from factpatch.lm.hooks import reading, replacing_output
from factpatch.patches.base import Provenance
from factpatch.patches.codebook import Codebook
from factpatch.patches.parts import block_of, damaged, misfit

__all__ = ["SlicePatch", "Slices"]


@dataclass(frozen=True, eq=False)
class Slices:
    """For each entry of a codebook the change `u v` of one module's map `y = W x`."""

    u: Float[Tensor, "entries out rank"]
    v: Float[Tensor, "entries rank in"]

    def joined(self, other: Slices) -> Slices:
        """The entries of both."""
        return Slices(torch.cat([self.u, other.u]), torch.cat([self.v, other.v]))

    def added(self, x: Float[Tensor, "rows seq in"], entry: Tensor) -> Float[Tensor, "rows seq out"]:
        """What the slice of each row's entry adds."""
        u, v = self.u.to(x)[entry], self.v.to(x)[entry]
        return x @ v.mT @ u.mT


@dataclass(frozen=True, eq=False)
class SlicePatch(Codebook):
    """Where an entry acts, its slices change the later modules, for the prompt and for all that is written after it.

    slices  by name of the module, all of them beyond the site
    """

    kind: ClassVar[str] = "slices"
    slices: Mapping[str, Slices] = field(kw_only=True)

    def attach(self, lm: LM) -> Callable[[], None]:
        """Hook onto the site, where entries are looked up, and onto the modules; the uppermost patch there acts for all."""
        self.check_base(lm)
        self.check_moved(lm)
        site = self.module(lm, self.site, reads=self.keys.shape[1])
        modules = {
            name: self.module(lm, name, reads=s.v.shape[2], writes=s.u.shape[1]) for name, s in self.slices.items()
        }
        if any(block_of(lm, name) <= block_of(lm, self.site) for name in modules):
            raise misfit(f"the slices must lie in blocks above that of {self.site}, which turns them on.")
        turned_on: list[Tensor] = []  # the entry of each row, -1 for none, while the model is called by itself

        def look(read: Tensor, _: Tensor) -> None:
            now = current_pass()
            if now is not None and now.ends is None:
                return
            entry = torch.full((len(by_rows(read)),), -1, device=read.device)
            hits = self.hits(lm, read)
            if hits is not None:
                entry[hits.rows] = hits.entry
            if now is None:
                turned_on[:] = [entry]
            else:
                now.notes[self] = entry

        def adding(name: str) -> Callable[[Tensor, Tensor], Tensor]:
            def add(x: Tensor, out: Tensor) -> Tensor:
                now = current_pass()
                entry = now.notes[self] if now is not None else turned_on[0]
                at = (entry >= 0).nonzero()[:, 0]
                books = self.books(lm)
                uppermost = [book for book in books if name in book.slices][-1]
                if uppermost is not self or not len(at):
                    return out
                rows = by_rows(out)
                more = _joined(books, name).added(by_rows(x)[at].float(), entry[at])
                return rows.index_put((at,), rows[at] + more.to(rows.dtype)).reshape(out.shape)

            return add

        with ExitStack() as stack:
            stack.enter_context(reading(site, look))
            for name, module in modules.items():
                stack.enter_context(replacing_output(module, adding(name)))
            return stack.pop_all().close

    def tensors(self) -> dict[str, Tensor]:
        """Keys and radii, and each module's slices."""
        own = {f"{name}.{part}": getattr(s, part) for name, s in self.slices.items() for part in ("u", "v")}
        return super().tensors() | own

    @classmethod
    def from_parts(cls, provenance: Provenance, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SlicePatch:
        """From what `spec` and `tensors` gave."""
        names = sorted(key.removesuffix(".u") for key in tensors if key.endswith(".u"))
        axes = {f"{name}.{part}": 3 for name in names for part in ("u", "v")}
        site, labels, moved = cls.check_parts(spec, tensors, {"keys": 2, "radii": 1, **axes})
        pairs = {name: (tensors[f"{name}.u"], tensors[f"{name}.v"]) for name in names}
        if any(u.shape[2] != v.shape[1] for u, v in pairs.values()):
            raise damaged("patch.safetensors: slices that cannot be multiplied.")
        slices = {name: Slices(*pair) for name, pair in pairs.items()}
        return SlicePatch(provenance, site, tensors["keys"], tensors["radii"], labels, slices=slices, moved=moved)

    def changes(self) -> list[dict[str, Any]]:
        """The site, and each module."""
        count = len(self.keys)
        return [
            {"part": self.site, "form": f"a codebook of {count} entries"},
            *({"part": name, "form": f"{count} slices of rank {s.u.shape[2]}"} for name, s in self.slices.items()),
        ]


def _joined(books: Sequence[SlicePatch], name: str) -> Slices:
    """One module's slices, in the order in which the entries of all books are counted; zero where a book leaves it alone."""
    there = [book.slices[name] for book in books if name in book.slices]
    rank = max(slices.u.shape[2] for slices in there)
    out, width = there[0].u.shape[1], there[0].v.shape[2]
    joined = []
    for book in books:
        own = book.slices.get(name, Slices(torch.zeros(len(book.keys), out, 0), torch.zeros(len(book.keys), 0, width)))
        more = rank - own.u.shape[2]
        joined.append(Slices(pad(own.u, (0, more)), pad(own.v, (0, 0, 0, more))))
    return Slices(torch.cat([s.u for s in joined]), torch.cat([s.v for s in joined]))
