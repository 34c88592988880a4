"""What the patches on a model have kept for the next edits of their sequence: `WeightPatch.state`."""

from __future__ import annotations

from torch import Tensor

from factpatch.errors import BadPatch
from factpatch.lm import LM
from factpatch.patches import WeightPatch

__all__ = ["kept"]


def kept(lm: LM, name: str, width: int, rows: int | None = None) -> list[Tensor]:
    """The matrices (rows, width) of this name in the patches that lie on the model, first to last, on the CPU.

    Raises BadPatch if one has another shape.
    """
    found: list[Tensor] = []
    for patch in lm.patches:
        if not isinstance(patch, WeightPatch) or name not in patch.state:
            continue
        matrix = patch.state[name].cpu()
        if matrix.ndim != 2 or matrix.shape[1] != width or rows not in {None, len(matrix)}:
            raise BadPatch(
                f"patch {patch.id[:8]} on {lm.name}: state:{name} has shape {tuple(matrix.shape)}, "
                f"expected ({'rows' if rows is None else rows}, {width}).\n"
                "  Take it off and make it again: factpatch edit"
            )
        found.append(matrix)
    return found
