"""How a GGUF file has a tensor laid out: as the model has it, or turned, or with rotary pairs side by side.

Where there is a file of the unpatched model, its own numbers tell; so a file of another model is found out too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from factpatch.errors import BadFile
from factpatch.lm import LM

__all__ = ["Layout", "found_layout", "known_layout"]

Layout = Callable[[Tensor], Tensor]

# Of these llama.cpp has queries and keys in the order in which rotary pairs lie side by side.
_PAIRED = frozenset({"llama"})
# Of these it has norms with the 1 added that the model adds by itself.
_OFFSET = frozenset({"gemma", "gemma2", "gemma3"})

_NEARLY_WHOLE = frozenset({"F32", "F16", "BF16", "Q8_0"})
_NEAR, _ROUGHLY = 0.03, 0.75
"""How far a tensor may be from the model's, as a share of its norm: unquantised, and quantised to few bits. Unrelated ones are
about 1.4 apart."""


def known_layout(lm: LM, architecture: str, name: str) -> Layout:
    """The layout of a tensor that llama.cpp calls `name`, from what is known of the architecture."""
    heads = _heads(lm, name)
    if heads and architecture in _PAIRED:
        return _paired(heads)
    return _offset if architecture in _OFFSET and name.endswith("norm.weight") else _same


def found_layout(lm: LM, architecture: str, tensor: Any, base: Tensor) -> Layout:
    """The layout that brings the unpatched model's `base` nearest to the file's `tensor`.

    Raises BadFile if none brings it near: then the file is of another model.
    """
    likely = known_layout(lm, architecture, tensor.name)
    try:
        there = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    except NotImplementedError:  # a type that the library can write through but not read
        return likely
    layouts: list[Layout] = [likely, _same]
    layouts += [_paired(heads)] if (heads := _heads(lm, tensor.name)) else []
    layouts += [_turned] if base.ndim == 2 else [_offset]
    own = base.detach().cpu().float()
    tried = [(layout, made) for layout in layouts if (made := layout(own)).shape == there.shape]
    if not tried:
        raise BadFile(
            f"the template's {tensor.name} has shape {tuple(there.shape)}, {lm.name}'s {tuple(base.shape)}.\n"
            "  Name a GGUF file of the very model that was patched."
        )
    # The first of equals, so that what is known decides where numbers do not.
    far, _, layout = min((float((made - there).norm()), i, layout) for i, (layout, made) in enumerate(tried))
    if far > (_NEAR if tensor.tensor_type.name in _NEARLY_WHOLE else _ROUGHLY) * float(own.norm()):
        raise BadFile(
            f"the template's {tensor.name} does not hold what the unpatched {lm.name} has there.\n"
            "  Name a GGUF file of the very model that was patched."
        )
    return layout


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _turned(tensor: Tensor) -> Tensor:
    return tensor.T


def _offset(tensor: Tensor) -> Tensor:
    return tensor + 1


def _paired(heads: int) -> Layout:
    """From halves, as transformers rotates, to pairs: (heads, 2, half, ...) to (heads, half, 2, ...)."""

    def lay(tensor: Tensor) -> Tensor:
        if tensor.shape[0] % (2 * heads):
            return tensor
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return lay


def _heads(lm: LM, name: str) -> int:
    """Of queries or keys, how many heads; 0 of anything else."""
    config = lm.model.config
    part = name.split(".")[-2] if "." in name else name
    count = int(getattr(config, "num_attention_heads", 0))
    return {"attn_q": count, "attn_k": int(getattr(config, "num_key_value_heads", None) or count)}.get(part, 0)
