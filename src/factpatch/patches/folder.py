"""A patch on disk: `patch.json` beside `patch.safetensors`. No pickle, ever.

`patch.json` holds the format's version, the patch's kind and id, its provenance, and the SHA-256 of the tensor file;
so a file that was damaged, swapped or half copied is refused before it can reach a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import safetensors
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from factpatch.edits import first_problem
from factpatch.errors import BadPatch
from factpatch.files import parse_json, read_whole, sha256_of, whole_folder
from factpatch.lm.cache import save_tensors
from factpatch.patches.base import Patch, Provenance

__all__ = ["FORMAT", "load_patch", "save_patch"]

FORMAT = 1
MOST = 1 << 26
"""Bytes of a patch.json that are read, at most: some ten thousand edits with all their probes."""
DEEPEST = 64
"""Lists and objects within one another in a patch.json."""
_AGAIN = "Copy the whole folder again from where it was made, or make the patch again: factpatch edit"


def save_patch(patch: Patch, folder: Path, *, replace: bool = False) -> Path:
    """Write a new folder, whole or not at all; `replace` lets it take the place of another patch. Raises OutputError."""
    with whole_folder(folder, replace=replace and (folder / "patch.json").is_file()) as draft:
        save_tensors(patch.tensors(), draft / patch.tensor_file)
        for name, content in patch.files().items():
            (draft / name).write_text(content, encoding="utf-8")
        head = {
            "format": FORMAT,
            "kind": patch.kind,
            "id": patch.id,
            "tensors_sha256": sha256_of(draft / patch.tensor_file),
        }
        head |= {"spec": patch.spec()} if patch.spec() else {}
        body = patch.provenance.model_dump(mode="json", exclude={"edits"})
        edits = [edit.to_json() for edit in patch.provenance.edits]
        text = json.dumps(head | body | {"edits": edits}, indent=2, ensure_ascii=False)
        (draft / "patch.json").write_text(text + "\n", encoding="utf-8")
    return folder


def load_patch(folder: Path) -> Patch:
    """Read a patch of any kind. Raises BadPatch, naming the file and what is wrong with it."""
    described = _read_json(folder)
    known = _kinds()
    kind = known.get(str(described.pop("kind", "")))
    if kind is None:
        raise BadPatch(
            f"{folder / 'patch.json'}: an unknown kind of patch; known: {', '.join(known)}.\n"
            "  Update factpatch, or install the package that made it."
        )
    expected, claimed = described.pop("tensors_sha256", ""), described.pop("id", "")
    spec = described.pop("spec", {})
    tensors = _read_tensors(folder / kind.tensor_file, expected, kind)
    try:
        provenance = Provenance.model_validate(described)
    except ValidationError as error:
        field, problem = first_problem(error)
        raise BadPatch(f'{folder / "patch.json"}, "{field}": {problem}\n  {_AGAIN}') from None
    try:
        patch = kind.from_parts(provenance, spec, tensors)
        found = patch.id
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # What is wrong with parts that fit neither one another nor their kind cannot be foreseen in full.
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadPatch(f"{folder}: its parts do not make a {kind.kind} patch ({told}).\n  {_AGAIN}") from None
    # Nothing is passed over: what a kind does not know of it would neither use nor count into the id.
    if _shapes(patch.tensors()) != _shapes(tensors):
        raise BadPatch(
            f"{folder / kind.tensor_file}: holds tensors that are no part of a {kind.kind} patch.\n  {_AGAIN}"
        )
    if found != claimed:
        raise BadPatch(
            f"{folder / 'patch.json'}: was changed after it was written (id {claimed} is now {found}).\n  {_AGAIN}"
        )
    return patch


def _read_tensors(path: Path, sha256: object, kind: type[Patch]) -> dict[str, Tensor]:
    """Finite numbers of the types a patch may hold, from a file with this SHA-256. Raises BadPatch."""
    if not path.is_file():
        raise BadPatch(f"{path}: missing.\n  {_AGAIN}")
    try:
        if sha256_of(path) != sha256:
            raise BadPatch(
                f"{path}: damaged, or not the file that patch.json was written with (SHA-256 differs).\n  {_AGAIN}"
            )
        tensors = load_file(path)
    except (safetensors.SafetensorError, LookupError, OSError, TypeError, ValueError) as error:
        raise BadPatch(f"{path}: not a safetensors file that can be read ({error}).\n  {_AGAIN}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in _types(kind, name):
            raise BadPatch(f"{path}: {name} is of type {tensor.dtype}, which it cannot be.\n  {_AGAIN}")
        if not tensor.isfinite().all():
            raise BadPatch(f"{path}: {name} holds values that are not finite.\n  {_AGAIN}")
    return tensors


def _types(kind: type[Patch], name: str) -> tuple[torch.dtype, ...]:
    """What a tensor of this name may hold."""
    if name.rpartition(".")[2] in kind.whole:
        return torch.int32, torch.int64
    if kind.exact is not None and name.startswith(kind.exact):
        return torch.float32, torch.float64
    return (torch.float32,)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _kinds() -> dict[str, type[Patch]]:
    """Kinds by name: those of this package's files, and those other packages add by the group `factpatch.patches`."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")
    for point in entry_points(group="factpatch.patches"):
        point.load()
    return {kind.kind: kind for kind in sorted(_under(Patch), key=lambda kind: kind.__name__) if hasattr(kind, "kind")}


def _under(kind: type[Any]) -> set[type[Patch]]:
    """All classes derived from one."""
    return {each for own in kind.__subclasses__() for each in (own, *_under(own))}


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "patch.json"
    try:
        is_editor, is_patch = ((folder / name).is_file() for name in ("editor.json", "patch.json"))
    except OSError as error:  # such as a name too long for a file
        raise BadPatch(f"{folder}: cannot be read ({error.strerror}).\n  Name a folder that you may read.") from None
    if is_editor:
        raise BadPatch(
            f"{folder}: a trained editor, not a patch.\n"
            f"  Make a patch with it: factpatch edit --method METHOD --set editor={folder}"
        )
    if not is_patch:
        raise BadPatch(
            f"{folder}: not a patch; expected a folder with patch.json and patch.safetensors.\n"
            "  Name the folder given to --out when the patch was made."
        )
    try:
        described = parse_json(read_whole(path, MOST).decode("utf-8"))
    except (ValueError, OSError) as error:
        raise BadPatch(f"{path}: not JSON ({error}).\n  {_AGAIN}") from None
    if _depth(described) > DEEPEST:
        raise BadPatch(f"{path}: nested deeper than {DEEPEST} levels, as no patch is.\n  {_AGAIN}")
    try:
        json.dumps(described, ensure_ascii=False).encode("utf-8")
    except ValueError:  # half of a surrogate pair can be written down in JSON, and is no text
        raise BadPatch(f"{path}: holds half a letter, which no text may.\n  {_AGAIN}") from None
    if not isinstance(described, dict):
        raise BadPatch(f"{path}: expected an object.\n  {_AGAIN}")
    if described.pop("format", None) != FORMAT:
        raise BadPatch(
            f"{path}: written in another format than {FORMAT}, the one this factpatch reads.\n  Update factpatch."
        )
    return described


def _depth(value: Any) -> int:
    """How many lists and objects lie within one another; counted no further than is allowed."""
    depth, level = 0, [value]
    while depth <= DEEPEST and (level := [inner for each in level for inner in _inside(each)]):
        depth += 1
    return depth


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
