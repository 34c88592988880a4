"""`CodebookPatch`: a module's output is replaced where its input comes near to a stored key (GRACE, arXiv 2211.11031)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from factpatch.errors import BadPatch, WrongBase
from factpatch.lm import LM
from factpatch.lm.run import current_pass
from factpatch.patches.base import Patch, Provenance

__all__ = ["UNMOVED", "CodebookPatch", "Nearest", "nearest", "radii"]


@dataclass(frozen=True, eq=False)
class CodebookPatch(Patch):
    """Entries of a codebook at one module.

    Where a prompt's last token comes within an entry's radius of its key, and no key is nearer, the entry's value takes the
    place of the module's output there. Codebooks that lie on one module act as one; a later one may move the radii of
    entries beneath it, as long as it lies there.

    site    the module
    labels  what each entry makes the model say
    moved   by id of a patch beneath: new radii of its entries, `UNMOVED` where they stay
    """

    kind: ClassVar[str] = "codebook"
    site: str
    keys: Float[Tensor, "entries in"]
    values: Float[Tensor, "entries out"]
    radii: Float[Tensor, " entries"]
    labels: tuple[str, ...]
    moved: Mapping[str, Tensor] = field(default_factory=dict)

    def attach(self, lm: LM) -> Callable[[], None]:
        """Hook onto the module; of several codebooks there, the uppermost acts for all."""
        self.check_base(lm)
        try:
            module = lm.model.get_submodule(self.site)
        except AttributeError:
            raise WrongBase(
                f"the codebook belongs to {self.site}; {lm.name} has no such module.\n"
                "  The patch's folder may be damaged; make it again with: factpatch edit"
            ) from None

        def act(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            books = self.on(lm, self.site) or [self]
            now = current_pass()
            # The passes that write on read what was put at the prompt's end from the cache.
            writing_on = now is not None and now.ends is None
            if books[-1] is not self or writing_on or not any(len(book.keys) for book in books):
                return out
            shape = out.shape[:-1] if now is None else now.mask.shape
            grid = out.reshape(*shape, -1)
            rows = torch.arange(grid.shape[0], device=out.device)
            ends = torch.full_like(rows, grid.shape[1] - 1) if now is None or now.ends is None else now.ends
            found = nearest(args[0].reshape(*shape, -1)[rows, ends], books)
            hit = found.within
            values = torch.cat([book.values for book in books]).to(out.device, out.dtype)[found.entry]
            return grid.index_put((rows[hit], ends[hit]), values[hit]).reshape(out.shape)

        handle = module.register_forward_hook(act)
        return handle.remove

    @classmethod
    def on(cls, lm: LM, site: str) -> list[CodebookPatch]:
        """The codebooks that lie on one module, first to last."""
        return [patch for patch in lm.patches if isinstance(patch, cls) and patch.site == site]

    def tensors(self) -> dict[str, Tensor]:
        """Keys, values and radii, and the radii it moves."""
        own = {"keys": self.keys, "values": self.values, "radii": self.radii}
        return own | {f"{_MOVED}{name}": radii for name, radii in self.moved.items()}

    def spec(self) -> dict[str, Any]:
        """Site and labels."""
        return {"site": self.site, "labels": list(self.labels)}

    @classmethod
    def from_parts(
        cls, provenance: Provenance, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> CodebookPatch:
        """From what `spec` and `tensors` gave."""
        own = {name: tensors.get(name) for name in ("keys", "values", "radii")}
        counts = {None if tensor is None else len(tensor) for tensor in own.values()} | {len(spec.get("labels", ()))}
        if len(counts) > 1 or "site" not in spec:
            raise BadPatch(
                "patch.safetensors: expected as many keys, values and radii as the codebook has labels.\n"
                "  The file is damaged; make the patch again with: factpatch edit"
            )
        moved = {name.removeprefix(_MOVED): t for name, t in tensors.items() if name.startswith(_MOVED)}
        return CodebookPatch(
            provenance, spec["site"], tensors["keys"], tensors["values"], tensors["radii"], tuple(spec["labels"]), moved
        )

    def changes(self) -> list[dict[str, Any]]:
        """One row: the module."""
        return [{"part": self.site, "form": f"a codebook of {len(self.keys)} entries"}]


_MOVED = "radii of "
UNMOVED = -1.0


@dataclass(frozen=True, slots=True)
class Nearest:
    """For each query the nearest entry, counted through all books, its distance, and whether that is within its radius."""

    entry: Int[Tensor, " queries"]
    distance: Float[Tensor, " queries"]
    within: Tensor


def nearest(queries: Float[Tensor, "queries in"], books: Sequence[CodebookPatch]) -> Nearest:
    """By Euclidean distance; the radii are those that the uppermost book leaves."""
    exact = queries.float()
    keys = torch.cat([book.keys for book in books]).to(exact)
    distance, entry = torch.cdist(exact, keys, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return Nearest(entry, distance, distance <= radii(books).to(exact)[entry])


def radii(books: Sequence[CodebookPatch]) -> Float[Tensor, " entries"]:
    """Of all entries of all books, as the books above have moved them."""
    now = {book.id: book.radii for book in books}
    for book in books:
        beneath = {name: moved for name, moved in book.moved.items() if name in now}
        now |= {name: torch.where(moved == UNMOVED, now[name], moved) for name, moved in beneath.items()}
    return torch.cat([now[book.id] for book in books])
