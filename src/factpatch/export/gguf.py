"""A GGUF file that llama.cpp runs, made from one of the unpatched model.

Of the base's own file everything is kept, metadata and tensors, byte for byte; only tensors that a patch changes are written
anew, unquantised. So what was not edited is exactly what it was, and the tokenizer is the one that llama.cpp knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor

from factpatch.errors import BadFile, PatchError
from factpatch.files import refuse_taken, whole_file
from factpatch.lm import LM
from factpatch.patches import Patch, check_mergeable
from factpatch.progress import Progress, silent

__all__ = ["NumberType", "export_gguf"]

NumberType = Literal["f32", "f16", "bf16"]
_TYPES: dict[NumberType, tuple[Any, torch.dtype]] = {
    "f32": (gguf.GGMLQuantizationType.F32, torch.float32),
    "f16": (gguf.GGMLQuantizationType.F16, torch.float16),
    "bf16": (gguf.GGMLQuantizationType.BF16, torch.bfloat16),
}
# Of these llama.cpp has queries and keys in the order in which rotary pairs lie side by side.
_PAIRED = frozenset({"llama"})
_OFFSET = frozenset({"gemma", "gemma2", "gemma3"})


def export_gguf(
    lm: LM,
    patches: Sequence[Patch],
    path: str | Path,
    template: str | Path,
    *,
    number: NumberType = "f32",
    everything: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write the patched model as a GGUF file.

    template    a GGUF file of the unpatched model
    number      type of the tensors that are written anew
    everything  write all matrices anew, unquantised, so that llama.cpp rounds nothing that transformers does not

    Raises BadFile if the template is no GGUF file or of another model, PatchError for a patch that is more than a change of
    weights or changes a tensor that the template lacks, WrongBase, OutputError.
    """
    check_mergeable(patches)
    path, reader = Path(path), _read(Path(template))
    refuse_taken(path)
    with lm.patched(*patches):
        changed = _changed(lm, patches)
        new = _tensors(lm, reader, None if everything else changed)
        missing = [name for name in changed if name not in {own for own, _ in new.values()}]
        if missing:
            raise PatchError(f"{template}: has no tensor for {missing[0]}, which the patches change.")
        with whole_file(path) as draft:
            _write(reader, draft, new, number, progress)
    return path


def _read(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file.\n  Name a GGUF file of the unpatched model: --template") from None
    except Exception as error:  # the reader raises kinds of its own, NumPy's among them
        raise BadFile(f"{path}: not a GGUF file that can be read ({error}).") from None


def _changed(lm: LM, patches: Sequence[Patch]) -> list[str]:
    """Names of the parameters that the patches on the model point elsewhere."""
    after = {name: parameter.data_ptr() for name, parameter in lm.model.named_parameters()}
    with lm.without(*patches):
        return [name for name, parameter in lm.model.named_parameters() if parameter.data_ptr() != after[name]]


def _architecture(reader: Any) -> str:
    return str(reader.fields["general.architecture"].contents())


def _tensors(lm: LM, reader: Any, only: Sequence[str] | None) -> dict[str, tuple[str, Tensor]]:
    """By the template's names, the model's name and its tensor as llama.cpp lays it out; of `only` these, or of all matrices."""
    architecture = _architecture(reader)
    arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise BadFile(f'the template is of an architecture "{architecture}" that the gguf library does not know.')
    names = gguf.get_tensor_name_map(arch, lm.anatomy.n_layers)
    there = {tensor.name: tensor for tensor in reader.tensors}
    found: dict[str, tuple[str, Tensor]] = {}
    for name, parameter in lm.model.named_parameters():
        if only is not None and name not in only:
            continue
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None or own not in there or (only is None and parameter.ndim < 2):
            continue
        tensor = _laid_out(lm, architecture, name, parameter.detach())
        shape = tuple(int(n) for n in reversed(there[own].shape))
        if tuple(tensor.shape) != shape:
            raise BadFile(
                f"the template's {own} has shape {shape}, {lm.name}'s {name} {tuple(tensor.shape)}.\n"
                "  Name a GGUF file of the very model that was patched."
            )
        found[own] = name, tensor
    return found


def _laid_out(lm: LM, architecture: str, name: str, tensor: Tensor) -> Tensor:
    if architecture in _OFFSET and name.endswith("norm.weight"):
        return tensor + 1
    heads = _heads(lm, name) if architecture in _PAIRED else 0
    if not heads:
        return tensor
    # From halves, as transformers rotates, to pairs: (heads, 2, half, ...) to (heads, half, 2, ...).
    return (
        tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    )


def _heads(lm: LM, name: str) -> int:
    """Of queries or keys, how many heads; 0 of anything else."""
    config = lm.model.config
    part = name.rsplit(".", 2)[-2] if "." in name else name
    if part == "q_proj":
        return int(config.num_attention_heads)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) if part == "k_proj" else 0


def _write(
    reader: Any, path: Path, new: Mapping[str, tuple[str, Tensor]], number: NumberType, progress: Progress
) -> None:
    writer = gguf.GGUFWriter(path, _architecture(reader))
    for key, value, kind, inner in _metadata(reader):
        writer.add_key_value(key, value, kind, inner)
    arrays = []
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if tensor.name in new:
            kind, dtype = _TYPES[number]
            data = _numbers(new[tensor.name][1], dtype)
        arrays.append(data)
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, data in enumerate(arrays):
        progress("Writing GGUF", i, len(arrays))
        writer.write_tensor_data(data)
    writer.close()
    progress("Writing GGUF", len(arrays), len(arrays))


def _numbers(tensor: Tensor, dtype: torch.dtype) -> Any:
    """As NumPy has them, which knows no bfloat16: those as their bytes."""
    plain = tensor.detach().cpu().to(dtype).contiguous()
    return plain.view(torch.uint8).numpy() if dtype == torch.bfloat16 else plain.numpy()


def _metadata(reader: Any) -> Iterator[tuple[str, Any, Any, Any]]:
    for key, field in reader.fields.items():
        # The writer adds these by itself.
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = field.contents()
        yield key, value.tolist() if isinstance(value, np.ndarray) else value, field.types[0], inner
