"""Costly statistics of a model, kept on disk under everything they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping

import safetensors
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from factpatch.files import cache_root, make_folder, whole_file

__all__ = ["cached_tensors"]


def cached_tensors(kind: str, key: Mapping[str, object], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors computed once for each `key`, then read from `<cache>/statistics/<kind>/`; on the CPU.

    `key` must hold all that the result depends on, the model's fingerprint above all; it is stored with the tensors.
    A damaged file is computed again. Several processes may ask at once; one computes, the others wait.
    """
    described = json.dumps(key, sort_keys=True)
    name = hashlib.sha256(described.encode()).hexdigest()[:32]
    path = cache_root() / "statistics" / kind / f"{name}.safetensors"
    with FileLock(make_folder(path.parent) / f"{name}.lock"):
        if path.is_file():
            try:
                return load_file(path)
            except safetensors.SafetensorError:
                path.unlink()
        # Copied, because safetensors refuses tensors that share memory.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in compute().items()}
        with whole_file(path) as draft:
            save_file(tensors, draft, metadata={"key": described})
        return tensors
