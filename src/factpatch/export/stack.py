"""What is exported: all that lies on the model, and what is laid on it besides."""

from __future__ import annotations

from collections.abc import Sequence

from factpatch.lm import LM
from factpatch.patches import Patch, check_mergeable

__all__ = ["stack_of"]


def stack_of(lm: LM, patches: Sequence[Patch]) -> tuple[Patch, ...]:
    """The patches that lie on `lm`, then these, first to last: every export holds them all.

    Raises PatchError if one is more than a change of weights.
    """
    check_mergeable([*lm.patches, *patches])
    return (*(patch for patch in lm.patches if isinstance(patch, Patch)), *patches)
