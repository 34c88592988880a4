"""Two checkpoints compared, tensor by tensor: what differs, by how much, and at what rank; no model is run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from factpatch.analysis.base import Result
from factpatch.analysis.spectra import Pieces, eps_of, gram_values, rounding_noise
from factpatch.analysis.weights import Change, MatrixChange, block_totals, in_words, matrix_change
from factpatch.errors import BadFile
from factpatch.lm import load
from factpatch.lm.catalog import CATALOG
from factpatch.lm.fetch import ensure, ensure_gguf
from factpatch.progress import Progress, silent

__all__ = ["Comparison", "Mismatch", "TensorDifference", "compare", "inspect", "open_checkpoint"]


class Mismatch(Result):
    """A tensor that is of another shape, or another type, in the second checkpoint."""

    name: str
    a: str
    b: str


class TensorDifference(MatrixChange):
    """One tensor that differs: `D = B - A`, and `relative` is to A.

    dtypes      in A and in B
    not_finite  entries that differ and are NaN or infinite in either; they count in nothing else
    """

    dtypes: tuple[str, str]
    not_finite: int


class Comparison(Change):
    """Checkpoint B compared with checkpoint A.

    compared    tensors that are in both with one shape
    equal       of these, the ones with equal values, whatever their types
    parameters  how many entries were compared
    rounded     equal once both are rounded to the coarser of their types
    only_a      tensors that A alone has, and B alone
    tied        tensors that one has alone and that are a copy of one that both have, such as a tied head: {name: its twin}
    prefix      what one side's names were given in front so that they are those of the other
    matrices    the tensors that differ
    """

    matrices: tuple[TensorDifference, ...]
    a: str
    b: str
    compared: int
    equal: int
    parameters: int
    rounded: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    tied: dict[str, str]
    prefix: str
    shapes: tuple[Mismatch, ...]
    dtypes: tuple[Mismatch, ...]

    @property
    def alike(self) -> bool:
        """Whether both hold the same tensors with the same values, up to rounding."""
        return not (self.matrices or self.shapes or self.only_a or self.only_b)


class _Files(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, where: Mapping[str, Path]) -> None:
        self._where = where
        self._open = {path: _opened(path) for path in dict.fromkeys(where.values())}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self._where[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class _Renamed(Mapping[str, Tensor]):
    """The same tensors under longer names."""

    def __init__(self, of: Mapping[str, Tensor], prefix: str) -> None:
        self._of, self._prefix = of, prefix

    def __getitem__(self, name: str) -> Tensor:
        if not name.startswith(self._prefix):
            raise KeyError(name)
        return self._of[name.removeprefix(self._prefix)]

    def __iter__(self) -> Iterator[str]:
        return (f"{self._prefix}{name}" for name in self._of)

    def __len__(self) -> int:
        return len(self._of)


def open_checkpoint(source: str | Path, *, progress: Progress = silent) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by name, read one at a time where it is made of safetensors.

    source  a `.safetensors` file, a folder of them with or without an index, a short name, or whatever else `load` takes:
            other checkpoints are loaded as a model, in float32

    Raises BadFile for a file that is damaged or missing, and for a patch; and what `load` raises.
    """
    path = Path(source).expanduser()
    if str(source) in CATALOG:
        path = ensure(CATALOG[str(source)], progress)
    elif path.suffix == ".gguf" and path.is_file():
        path = ensure_gguf(path, progress)
    if (path / "patch.json").is_file():
        raise BadFile(
            f"{path}: a patch, not a checkpoint.\n"
            f"  See what it changes: factpatch analyse weights {path}\n"
            f"  Or make a checkpoint of it first: factpatch patch merge {path} --out FOLDER"
        )
    if path.suffix == ".safetensors" and path.is_file():
        return _Files(dict.fromkeys(_opened(path).keys(), path))
    found = _in_folder(path) if path.is_dir() else {}
    if found:
        return _Files(found)
    return {name: p.detach() for name, p in load(source, device="cpu", progress=progress).model.named_parameters()}


def _in_folder(folder: Path) -> dict[str, Path]:
    """In which file each tensor lies: by the index if there is one."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): folder / str(file) for name, file in named.items()}
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise BadFile(
                f"{index}: not an index of safetensors files ({type(error).__name__}: {error}).\n"
                '  Expected JSON with "weight_map", from tensor to file. Fetch the checkpoint again.'
            ) from None
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    return {name: file for file in files for name in _opened(file).keys()}  # noqa: SIM118


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BadFile(
            f"{path}: not a whole safetensors file ({error}).\n  Fetch or copy the checkpoint again."
        ) from None


def inspect(
    a: str | Path,
    b: str | Path,
    *,
    rank_tol: float | None = None,
    exact: bool = False,
    progress: Progress = silent,
) -> Comparison:
    """Compare two checkpoints by what `open_checkpoint` takes; for the rest see `compare`."""
    first, second = open_checkpoint(a, progress=progress), open_checkpoint(b, progress=progress)
    return compare(first, second, names=(str(a), str(b)), rank_tol=rank_tol, exact=exact, progress=progress)


def compare(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    names: tuple[str, str] = ("A", "B"),
    rank_tol: float | None = None,
    exact: bool = False,
    progress: Progress = silent,
) -> Comparison:
    """Compare two sets of tensors by name; two tensors and one square matrix of the shorter side are in memory at a time.

    names     what the checkpoints are called
    rank_tol  a singular value of a difference counts if it is more than this share of the greatest; by default if it is more
              than the rounding of the tensors' types could make: see `rounding_noise`
    exact     where the types differ, compare the values as they are; else both are first rounded to the coarser type, so that
              a checkpoint equals itself in another type

    The block of a tensor is the first number in its name.
    """
    a, b, prefix = _aligned(a, b)
    shared = [name for name in a if name in b]
    only_a, only_b = [name for name in a if name not in b], [name for name in b if name not in a]
    tied = dict([*_twins(a, only_a, shared), *_twins(b, only_b, shared)])
    shapes, dtypes, rounded, found = [], [], [], []
    entries = compared = 0
    for i, name in enumerate(shared):
        progress("Comparing tensors", i, len(shared))
        old, new = a[name], b[name]
        if old.shape != new.shape:
            shapes.append(Mismatch(name=name, a=_times(old), b=_times(new)))
            continue
        if old.dtype != new.dtype:
            dtypes.append(Mismatch(name=name, a=_plain(old.dtype), b=_plain(new.dtype)))
        compared, entries = compared + 1, entries + old.numel()
        if old.numel() == 0 or (old.dtype == new.dtype and torch.equal(old, new)):
            continue
        differs = _difference(name, old, new, rank_tol, exact=exact)
        if differs is not None:
            found.append(differs)
        elif not exact and _differ(old, new):
            rounded.append(name)
    progress("Comparing tensors", max(1, len(shared)), max(1, len(shared)))
    blocks = {_block(name) for name in a} | {_block(name) for name in b}
    layers = max((block + 1 for block in blocks if block is not None), default=0)
    squares: dict[int | None, float] = dict.fromkeys({m.block for m in found}, 0.0)
    for name in shared:
        if _block(name) in squares and a[name].ndim > 1:
            squares[_block(name)] += Pieces.held(a[name]).squares
    touched = sum(m.touched for m in found)
    return Comparison(
        matrices=tuple(found),
        blocks=block_totals(found, squares),
        layers=layers,
        norm=math.hypot(*(m.norm for m in found)),
        touched=touched,
        share=touched / max(1, entries),
        words=in_words(found, layers),
        a=names[0],
        b=names[1],
        compared=compared,
        equal=compared - len(found) - len(rounded),
        parameters=entries,
        rounded=tuple(rounded),
        only_a=tuple(name for name in only_a if name not in tied),
        only_b=tuple(name for name in only_b if name not in tied),
        tied=tied,
        prefix=prefix,
        shapes=tuple(shapes),
        dtypes=tuple(dtypes),
    )


def _difference(name: str, old: Tensor, new: Tensor, rank_tol: float | None, *, exact: bool) -> TensorDifference | None:
    """What differs between two tensors of one shape; None if nothing does."""
    a, b = Pieces.held(old), Pieces.held(new)
    fine = [eps_of(old.dtype), eps_of(new.dtype)]
    coarse = old.dtype if fine[0] >= fine[1] else new.dtype
    together = not exact and all(fine)

    def values(pieces: Pieces) -> Pieces:
        """As they are compared: rounded to the coarser type, where both are of a floating one."""
        if not together:
            return pieces
        return Pieces(pieces.rows, pieces.cols, lambda at: pieces.read(at).to(coarse))

    a, b = values(a), values(b)
    eps = [max(fine)] * 2 if together else fine

    def minus(at: tuple[slice, slice]) -> Tensor:
        difference = b.read(at).double() - a.read(at).double()
        return difference.nan_to_num(0, 0, 0)

    change = Pieces(a.rows, a.cols, minus)
    odd = sum(_odd(a.read(at).double(), b.read(at).double()) for at in change)
    if not odd and not any(bool(change.read(at).any()) for at in change):
        return None
    singular, floor = gram_values(change)
    tolerance = max(floor, rounding_noise(change, [(a, eps[0]), (b, eps[1])]))
    if rank_tol is not None:
        tolerance = rank_tol * float(singular[0])
    told = matrix_change(name, _block(name), old.shape, a, change, "difference", singular, tolerance)
    return TensorDifference(**told.model_dump(), dtypes=(_plain(old.dtype), _plain(new.dtype)), not_finite=odd)


def _odd(a: Tensor, b: Tensor) -> int:
    """Entries that differ and are not finite in one or both; NaN equals NaN here."""
    odd = ~(a.isfinite() & b.isfinite())
    return int((odd & (a != b) & ~(a.isnan() & b.isnan())).sum())


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether values differ as they are, types aside."""
    one, other = Pieces.held(a), Pieces.held(b)
    return any(not torch.equal(one.read(at).double().nan_to_num(), other.read(at).double().nan_to_num()) for at in one)


def _aligned(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], str]:
    """Both under the same names, where one was saved without the module that the other has around everything."""
    if any(name in b for name in a):
        return a, b, ""
    for short, long in ((a, b), (b, a)):
        prefixes: Counter[str] = Counter()
        for name in long:
            dots = (i + 1 for i, letter in enumerate(name) if letter == ".")
            prefixes.update(name[:dot] for dot in dots if name[dot:] in short)
        if prefixes:
            best = prefixes.most_common(1)[0][0]
            renamed = _Renamed(short, best)
            return (renamed, b, best) if short is a else (a, renamed, best)
    return a, b, ""


def _twins(own: Mapping[str, Tensor], alone: list[str], shared: list[str]) -> Iterator[tuple[str, str]]:
    """Of tensors that one checkpoint has alone, those that are copies of a matrix that both have."""
    if not alone:
        return
    shapes = {name: own[name].shape for name in shared}
    for name in alone:
        tensor = own[name]
        if tensor.ndim < 2 or not tensor.numel() or tensor.min() == tensor.max():
            continue  # many are equal by chance, such as norms and masks that are all ones
        same = (other for other in shared if shapes[other] == tensor.shape and own[other].dtype == tensor.dtype)
        twin = next((other for other in same if torch.equal(own[other], tensor)), None)
        if twin is not None:
            yield name, twin


def _block(name: str) -> int | None:
    """The first number in a name: stacks of blocks are lists, whose items are numbered."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _times(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape)) or "one number"
