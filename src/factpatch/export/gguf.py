"""A GGUF file that llama.cpp runs.

Out of the unpatched model's own file everything is kept, metadata and tensors, byte for byte; only tensors that patches change
are written anew, unquantised. So what was not edited is exactly what it was, and the tokenizer is the one that llama.cpp knows.
Without such a file one is written from nothing, for models of the Llama family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor

from factpatch.errors import BadFile, PatchError
from factpatch.export.card import card
from factpatch.export.description import TEMPLATE, architecture_of, check_describable, describe, rotary_factors
from factpatch.export.layout import found_layout, known_layout
from factpatch.export.stack import stack_of
from factpatch.files import refuse_taken, whole_file
from factpatch.lm import LM
from factpatch.patches import Patch
from factpatch.progress import Progress, silent

__all__ = ["NumberType", "card_path", "export_gguf"]

NumberType = Literal["f32", "f16", "bf16"]


@dataclass(frozen=True, slots=True)
class _Number:
    """A type of number: of one tensor, of a file, and as torch has it."""

    tensor: Any
    file: Any
    dtype: torch.dtype


_NUMBERS: dict[NumberType, _Number] = {
    "f32": _Number(gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32, torch.float32),
    "f16": _Number(gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16, torch.float16),
    "bf16": _Number(gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16, torch.bfloat16),
}
_FILE_TYPE = "general.file_type"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file to come: numbers that are copied, or a tensor of the model laid out as llama.cpp has it."""

    name: str
    data: Any
    kind: Any = None


def export_gguf(
    lm: LM,
    patches: Sequence[Patch],
    path: str | Path,
    template: str | Path | None = None,
    *,
    number: NumberType = "f32",
    everything: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write the model, with what lies on it and these patches, as a GGUF file, and its card beside it (`card_path`).

    template    a GGUF file of the unpatched model; without one everything is written from the model in hand
    number      type of the matrices that are written anew; what is no matrix is written in float32, as llama.cpp needs it
    everything  write all matrices anew, unquantised, so that llama.cpp rounds nothing that transformers does not

    Raises BadFile if the template is no GGUF file or of another model, or there is none and the model is not of the Llama
    family or has a tokenizer that is not known; PatchError for a patch that is more than a change of weights or changes a
    tensor that the template lacks; WrongBase, OutputError.
    """
    path = Path(path)
    reader = None if template is None else _read(Path(template))
    if reader is None:
        check_describable(lm)
    stack = stack_of(lm, patches)
    for taken in (path, card_path(path)):
        refuse_taken(taken)
    with lm.unpatched():
        base = {name: parameter.data for name, parameter in _parameters(lm)}
    with lm.patched(*patches):
        if reader is None:
            architecture, entries = architecture_of(lm), list(_all(lm))
        else:
            architecture, entries = _architecture(reader), _patched(lm, reader, base, everything=everything)

        def tell(writer: Any) -> None:
            if reader is None:
                describe(writer, lm)
                writer.add_file_type(_NUMBERS[number].file)
            else:
                _copy_metadata(reader, writer, _NUMBERS[number].file if everything else None)

        with whole_file(path) as draft:
            _write(draft, architecture, tell, entries, number, progress)
    with whole_file(card_path(path)) as draft:
        draft.write_text(card(lm, stack, "gguf"), encoding="utf-8")
    return path


def card_path(path: Path) -> Path:
    """Where the card of a GGUF file lies: `lyon.md` beside `lyon.gguf`."""
    return path.with_suffix(".md")


def _read(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file.\n  {TEMPLATE}") from None
    except Exception as error:  # the reader raises kinds of its own, NumPy's among them
        raise BadFile(f"{path}: not a GGUF file that can be read ({error}).\n  {TEMPLATE}") from None


def _architecture(reader: Any) -> str:
    field = reader.fields.get("general.architecture")
    if field is None:
        raise BadFile(f"the template does not say of what architecture it is.\n  {TEMPLATE}")
    return str(field.contents())


def _parameters(lm: LM) -> Iterator[tuple[str, Tensor]]:
    """By name, tied ones under each of theirs."""
    return lm.model.named_parameters(remove_duplicate=False)


def _names(lm: LM, architecture: str) -> Callable[[str], str | None]:
    """From the model's names to llama.cpp's."""
    kind = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise BadFile(
            f'the template is of an architecture "{architecture}" that the gguf library does not know.\n'
            "  Update it: pip install --upgrade gguf"
        )
    table = gguf.get_tensor_name_map(kind, lm.anatomy.n_layers)
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))


def _patched(lm: LM, reader: Any, base: Mapping[str, Tensor], *, everything: bool) -> list[_Entry]:
    """The template's tensors, with those that patches change, or all matrices, from the model instead."""
    architecture = _architecture(reader)
    name_of = _names(lm, architecture)
    there = {tensor.name: tensor for tensor in reader.tensors}
    new: dict[str, Tensor] = {}
    written, lost = set(), {}
    for name, parameter in _parameters(lm):
        is_changed = parameter.data_ptr() != base[name].data_ptr()
        if not is_changed and not (everything and parameter.ndim > 1):
            continue
        own = name_of(name)
        if own is not None and own in there:
            new[own] = found_layout(lm, architecture, there[own], base[name])(parameter.detach())
            written.add(parameter.data_ptr())
        elif is_changed:
            lost[parameter.data_ptr()] = name
    missing = [name for place, name in lost.items() if place not in written]
    if missing:
        raise PatchError(
            f"the template has no tensor for {missing[0]}, which the patches change.\n"
            "  Export a checkpoint: factpatch export checkpoint"
        )
    return [
        _Entry(t.name, new[t.name]) if t.name in new else _Entry(t.name, t.data, t.tensor_type) for t in reader.tensors
    ]


def _all(lm: LM) -> Iterator[_Entry]:
    """All tensors of a model of the Llama family, tied ones once."""
    architecture = architecture_of(lm)
    name_of = _names(lm, architecture)
    for name, parameter in lm.model.named_parameters():
        own = name_of(name)
        if own is None:
            raise BadFile(f"{lm.name}: llama.cpp has no tensor for {name}.\n  {TEMPLATE}")
        yield _Entry(own, known_layout(lm, architecture, own)(parameter.detach()))
    factors = rotary_factors(lm)
    if factors is not None:
        yield _Entry("rope_freqs.weight", factors)


def _write(
    path: Path,
    architecture: str,
    tell: Callable[[Any], None],
    entries: Sequence[_Entry],
    number: NumberType,
    progress: Progress,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    tell(writer)
    for entry in entries:
        if entry.kind is not None:
            writer.add_tensor_info(entry.name, entry.data.shape, entry.data.dtype, entry.data.nbytes, entry.kind)
            continue
        form = _NUMBERS[number if entry.data.ndim > 1 else "f32"]
        shape, count = tuple(entry.data.shape), entry.data.numel() * form.dtype.itemsize
        writer.add_tensor_info(entry.name, shape, np.dtype(np.float32), count, form.tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, entry in enumerate(entries):
        progress("Writing GGUF", i, len(entries))
        is_new = entry.kind is None  # made one by one, so that a second model is never held
        writer.write_tensor_data(_as_bytes(entry.data, number) if is_new else entry.data)
    writer.close()
    progress("Writing GGUF", len(entries), len(entries))


def _as_bytes(tensor: Tensor, number: NumberType) -> Any:
    """As NumPy has them, which knows no bfloat16."""
    dtype = _NUMBERS[number].dtype if tensor.ndim > 1 else torch.float32
    return tensor.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy()


def _copy_metadata(reader: Any, writer: Any, file_type: Any | None) -> None:
    """All that the template says; what it says of its numbers as a whole only where that still holds."""
    writer.data_alignment = reader.alignment
    for key, field in reader.fields.items():
        # The writer adds these by itself.
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = field.contents() if key != _FILE_TYPE or file_type is None else int(file_type)
        writer.add_key_value(key, value.tolist() if isinstance(value, np.ndarray) else value, field.types[0], inner)
