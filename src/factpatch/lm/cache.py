"""Costly statistics of a model, kept on disk under everything they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from factpatch.files import cache_root, locked, make_folder, whole_file

__all__ = ["cached_tensors", "save_tensors"]


def cached_tensors(kind: str, key: Mapping[str, object], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors computed once for each `key`, then read from `<cache>/statistics/<kind>/`; on the CPU.

    `key` must hold all that the result depends on, the model's fingerprint above all; it is stored with the tensors.
    A damaged file is computed again. Several processes may ask at once; one computes, the others wait.
    """
    described = json.dumps(key, sort_keys=True)
    name = hashlib.sha256(described.encode()).hexdigest()[:32]
    path = cache_root() / "statistics" / kind / f"{name}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    with locked(make_folder(path.parent) / f"{name}.lock"):
        found = _read(path)
        if found is not None:
            return found
        # In the order in which they will be read from the file, so that products of them are the same to the bit.
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
        with whole_file(path) as draft:
            save_tensors(tensors, draft, {"key": described})
        return tensors


def _read(path: Path) -> dict[str, Tensor] | None:
    """What is stored; None if nothing is, or it is damaged."""
    try:
        return load_file(path) if path.is_file() else None
    except safetensors.SafetensorError:
        return None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError if it cannot be written."""
    # Copied, because safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(copies, path, metadata=dict(metadata or {}))
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
