"""Codebooks: entries with a key and a radius at one module, and what happens where a prompt comes near to one.

`CodebookPatch` here replaces the module's output (GRACE, arXiv 2211.11031); `SlicePatch` in `patches/slices.py` turns on a
low-rank slice of later modules (MELO, arXiv 2312.11795).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from factpatch.lm import LM
from factpatch.lm.batches import by_rows, current_pass
from factpatch.patches.base import Patch, Provenance
from factpatch.patches.parts import Spec, damaged, linear_map, misfit

__all__ = ["GONE", "UNMOVED", "Codebook", "CodebookPatch", "Nearest", "nearest", "radii"]

B = TypeVar("B", bound="Codebook")


class _Spec(Spec):
    site: str
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Codebook(Patch):
    """Base of patches with a codebook. Those of one kind that lie on one module act as one.

    An entry acts where a prompt's last token comes within its radius of its key, and no key is nearer. A later codebook may
    move the radii of entries beneath it, as long as it lies there.

    site    the module whose input is compared with the keys
    labels  what each entry makes the model say
    radii   how far each entry reaches; `GONE`, which reaches nothing, if another took its place
    moved   by id of a patch beneath: new radii of its entries, `UNMOVED` where they stay
    """

    site: str
    keys: Float[Tensor, "entries in"]
    radii: Float[Tensor, " entries"]
    labels: tuple[str, ...]
    moved: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    @classmethod
    def on(cls: type[B], lm: LM, site: str) -> list[B]:
        """The codebooks of this kind that lie on one module, first to last."""
        return [patch for patch in lm.patches if isinstance(patch, cls) and patch.site == site]

    def module(self, lm: LM, name: str, *, reads: int, writes: int | None = None) -> nn.Module:
        """A linear map by name, of these widths. Raises WrongBase."""
        return linear_map(lm, name, "the codebook belongs to", reads=reads, writes=writes).module

    def check_moved(self, lm: LM) -> None:
        """Raise WrongBase unless radii are moved of as many entries as the codebooks beneath have."""
        for book in self.on(lm, self.site):
            if book.id in self.moved and len(self.moved[book.id]) != len(book.keys):
                raise misfit(
                    f"the codebook moves {len(self.moved[book.id])} radii of patch {book.id}, which has {len(book.keys)}."
                )

    def books(self: B, lm: LM) -> list[B]:
        """The codebooks of this kind on this site, first to last; itself alone while it is being laid on."""
        return self.on(lm, self.site) or [self]

    def hits(self, lm: LM, read: Tensor) -> Hits | None:
        """Which entries are near to the prompts of this pass, counted through all books; `read` is what the site reads.

        None if this pass reads no prompt.
        """
        books = self.books(lm)
        now = current_pass()
        # The passes that write on read what was put at the prompt's end from the cache.
        writing_on = now is not None and now.ends is None
        if writing_on or not any(len(book.keys) for book in books):
            return None
        grid = by_rows(read)
        rows = torch.arange(len(grid), device=grid.device)
        ends = torch.full_like(rows, grid.shape[1] - 1) if now is None or now.ends is None else now.ends
        found = nearest(grid[rows, ends], books)
        return Hits(rows[found.within], ends[found.within], found.entry[found.within])

    def tensors(self) -> dict[str, Tensor]:
        """Keys and radii, and the radii it moves."""
        own = {"keys": self.keys, "radii": self.radii}
        return own | {f"{_MOVED}{name}": radii for name, radii in self.moved.items()}

    def spec(self) -> dict[str, Any]:
        """Site and labels."""
        return {"site": self.site, "labels": list(self.labels)}

    @staticmethod
    def check_parts(
        spec: Mapping[str, Any], tensors: Mapping[str, Tensor], axes: Mapping[str, int]
    ) -> tuple[str, tuple[str, ...], dict[str, Tensor]]:
        """Site, labels, and the radii that are moved.

        Raises BadPatch unless the named tensors have so many axes each, of which the first has as many rows as there are
        labels.
        """
        read = _Spec.read(spec)
        shapes = {name: tuple(tensors[name].shape) if name in tensors else () for name in axes}
        if any(len(shapes[name]) != n or shapes[name][0] != len(read.labels) for name, n in axes.items()):
            *most, last = axes
            raise damaged(
                f"patch.safetensors: expected as many {', '.join(most)} and {last} as the codebook has labels."
            )
        moved = {name.removeprefix(_MOVED): t for name, t in tensors.items() if name.startswith(_MOVED)}
        if any(own.ndim != 1 for own in moved.values()):
            raise damaged("patch.safetensors: radii that are no row of numbers.")
        return read.site, read.labels, moved


@dataclass(frozen=True, slots=True)
class Hits:
    """Rows of a batch that an entry acts in, the column of each row's last prompt token, and the entry's number."""

    rows: Int[Tensor, " hits"]
    ends: Int[Tensor, " hits"]
    entry: Int[Tensor, " hits"]


@dataclass(frozen=True, eq=False)
class CodebookPatch(Codebook):
    """The entry's value takes the place of the module's output at the prompt's last token."""

    kind: ClassVar[str] = "codebook"
    values: Float[Tensor, "entries out"] = field(kw_only=True)

    def attach(self, lm: LM) -> Callable[[], None]:
        """Hook onto the module; of several codebooks there, the uppermost acts for all."""
        self.check_base(lm)
        self.check_moved(lm)
        module = self.module(lm, self.site, reads=self.keys.shape[1], writes=self.values.shape[1])

        def act(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            books = self.books(lm)
            hits = self.hits(lm, args[0]) if books[-1] is self else None
            if hits is None:
                return out
            grid = by_rows(out)
            values = torch.cat([book.values for book in books])
            chosen = values.to(out.device, out.dtype)[hits.entry]
            return grid.index_put((hits.rows, hits.ends), chosen).reshape(out.shape)

        handle = module.register_forward_hook(act)
        return handle.remove

    def tensors(self) -> dict[str, Tensor]:
        """Keys, values and radii, and the radii it moves."""
        return super().tensors() | {"values": self.values}

    @classmethod
    def from_parts(
        cls, provenance: Provenance, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> CodebookPatch:
        """From what `spec` and `tensors` gave."""
        site, labels, moved = cls.check_parts(spec, tensors, {"keys": 2, "values": 2, "radii": 1})
        keys, radii, values = tensors["keys"], tensors["radii"], tensors["values"]
        return CodebookPatch(provenance, site, keys, radii, labels, values=values, moved=moved)

    def changes(self) -> list[dict[str, Any]]:
        """One row: the module."""
        return [{"part": self.site, "form": f"a codebook of {len(self.keys)} entries"}]


_MOVED = "radii of "
UNMOVED, GONE = -1.0, -2.0


@dataclass(frozen=True, slots=True)
class Nearest:
    """For each query the nearest entry, counted through all books, its distance, and whether that is within its radius."""

    entry: Int[Tensor, " queries"]
    distance: Float[Tensor, " queries"]
    within: Tensor


def nearest(queries: Float[Tensor, "queries in"], books: Sequence[Codebook]) -> Nearest:
    """By Euclidean distance, of equals the later; the radii are those that the uppermost book leaves."""
    exact = queries.float()
    keys, reach = torch.cat([book.keys for book in books]).to(exact), radii(books).to(exact)
    distances = torch.cdist(exact, keys, compute_mode="donot_use_mm_for_euclid_dist")
    distance, back = distances.flip(1).min(1)
    entry = len(keys) - 1 - back
    return Nearest(entry, distance, distance <= reach[entry])


def radii(books: Sequence[Codebook]) -> Float[Tensor, " entries"]:
    """Of all entries of all books, as the books above have moved them."""
    now = {book.id: book.radii for book in books}
    for book in books:
        beneath = {name: moved for name, moved in book.moved.items() if name in now}
        now |= {name: torch.where(moved == UNMOVED, now[name], moved) for name, moved in beneath.items()}
    return torch.cat([now[book.id] for book in books])
