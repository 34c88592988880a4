"""Costly statistics of a model, kept on disk under everything they depend on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from factpatch.files import cache_root, locked, make_folder, whole_file

__all__ = ["Unfinished", "cached_each", "cached_tensors", "save_tensors"]

N = TypeVar("N", bound=Hashable)


def cached_tensors(kind: str, key: Mapping[str, object], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors computed once for each `key`, then read from `<cache>/statistics/<kind>/`; on the CPU.

    `key` must hold all that the result depends on, the model's fingerprint above all; it is stored with the tensors.
    A damaged file is computed again. Several processes may ask at once; one computes, the others wait.
    """
    return cached_each(kind, {"": key}, lambda _: [compute()])[""]


def cached_each(
    kind: str,
    keys: Mapping[N, Mapping[str, object]],
    compute: Callable[[Sequence[N]], Iterable[dict[str, Tensor]]],
) -> dict[N, dict[str, Tensor]]:
    """As `cached_tensors`, for several keys that are computed together; each has a name of the caller's.

    `compute` is given the names of what is missing and yields the tensors of each in that order; each is stored as it
    comes. It is not called if nothing is missing.
    """
    paths = {name: _path(kind, key) for name, key in keys.items()}
    found = _stored(paths)
    missing = [name for name in paths if name not in found]
    with ExitStack() as locks:
        # In one order everywhere, so that no two processes ever wait for each other.
        for path in sorted({paths[name] for name in missing}):
            locks.enter_context(locked(make_folder(path.parent) / f"{path.stem}.lock"))
        found |= _stored({name: paths[name] for name in missing})  # somebody else may have been quicker
        missing = [name for name in missing if name not in found]
        for name in missing:
            _sweep(paths[name])
        for name, computed in zip(missing, compute(missing) if missing else (), strict=True):
            # In the order in which they will be read from the file, so that products of them are the same to the bit.
            found[name] = {each: tensor.detach().cpu().contiguous() for each, tensor in computed.items()}
            with whole_file(paths[name]) as draft:
                save_tensors(found[name], draft, {"key": _described(keys[name])})
            Unfinished(kind, keys[name]).drop()
    return {name: found[name] for name in keys}


class Unfinished:
    """How far long work on the result for `key` has come, kept beside the result's place until that is stored.

    Only for use inside `compute`, while nobody else works on the same key.

    work  what else must be the same for the work to be gone on with, beside the key
    """

    def __init__(self, kind: str, key: Mapping[str, object], work: str = "") -> None:
        self._path = _path(kind, key).with_suffix(".unfinished")
        self._about = {"key": _described(key), "work": work}

    def read(self) -> dict[str, Tensor] | None:
        """What was kept last; None if nothing was, it is damaged, or it is of other work."""
        tensors = _read(self._path, self._about)
        # Copied, because what is read is a view of the file, which is soon to be replaced.
        return None if tensors is None else {name: tensor.clone() for name, tensor in tensors.items()}

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this in place of what was kept, whole or not at all. Raises OutputError."""
        with whole_file(self._path) as draft:
            save_tensors(tensors, draft, self._about)

    def drop(self) -> None:
        """Forget what was kept."""
        self._path.unlink(missing_ok=True)


def _path(kind: str, key: Mapping[str, object]) -> Path:
    name = hashlib.sha256(_described(key).encode()).hexdigest()[:32]
    return cache_root() / "statistics" / kind / f"{name}.safetensors"


def _described(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)


def _sweep(path: Path) -> None:
    """Remove what a process that was killed has left half written of this file and its unfinished work."""
    for left in path.parent.glob(f".{path.stem}.*-*"):
        shutil.rmtree(left, ignore_errors=True)


def _stored(paths: Mapping[N, Path]) -> dict[N, dict[str, Tensor]]:
    """Those of them that are there and whole."""
    read = {name: _read(path) for name, path in paths.items()}
    return {name: tensors for name, tensors in read.items() if tensors is not None}


def _read(path: Path, about: Mapping[str, str] | None = None) -> dict[str, Tensor] | None:
    """What is stored; None if nothing is, it is damaged, or it is about something else."""
    if not path.is_file():
        return None
    try:
        if about is not None:
            with safetensors.safe_open(path, "pt") as file:
                if file.metadata() != about:
                    return None
        return load_file(path)
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
