"""`plan`: what an edit will need, told before any weight is read.

The model is built from its config on PyTorch's meta device, where tensors have shapes and no numbers. From it and the
tokenizer come the anatomy, the method's settled settings and the lengths of texts; the method's own `needs` does the rest.
What is expected at the peak is

    the weights  +  the most that any one stage holds beside them

on a GPU apart from what is held in main memory. Left out are what Python and its libraries take before a model is there (300
to 400 MB of main memory) and what an allocator keeps of memory that was given back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from factpatch.edits import Edit, Probe
from factpatch.errors import UnknownModel
from factpatch.files import cache_root
from factpatch.lm import LM
from factpatch.lm.batches import BATCH_TOKENS
from factpatch.lm.fetch import without_bars
from factpatch.lm.load import DTypeName, find_checkpoint, find_device
from factpatch.methods.base import Method
from factpatch.methods.needs import Change, Held, Preparation, Stage, kept_keys, widest_pass
from factpatch.progress import Progress, silent

__all__ = ["Outline", "Plan", "outline", "plan"]

_WRITTEN = 64
"""Tokens that are written on after a prompt when it is scored, as `LM.answer` does at most."""


class Plan(BaseModel):
    """What making some edits is expected to take. Bytes throughout.

    device          where the model will lie
    model_bytes     its weights
    stages          what is held beside the weights, stage by stage; on a GPU, what is not marked `host` lies there
    peak_bytes      expected where the model lies: the weights and the greatest stage
    host_bytes      the same of main memory, where the model lies on a GPU; else None
    free_bytes      free where the model will lie, as this machine tells now; None where it cannot tell
    free_host_bytes the same of main memory, where the model lies on a GPU; else None
    patch_bytes     of the patch's tensors on disk; None where that is not known
    unknown         what this leaves out
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    architecture: str
    blocks: int
    hidden_size: int
    parameters: int
    dtype: str
    device: str
    model_bytes: int
    method: str
    settings: dict[str, Any]
    edits: int
    preparations: tuple[Preparation, ...]
    changes: tuple[Change, ...]
    stages: tuple[Stage, ...]
    peak_bytes: int
    host_bytes: int | None
    free_bytes: int | None
    free_host_bytes: int | None
    patch_bytes: int | None
    unknown: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """The peak over the model's size."""
        return self.peak_bytes / self.model_bytes

    @property
    def fits(self) -> bool | None:
        """Whether what is free now is enough; None where that cannot be told."""
        wanted = [(self.peak_bytes, self.free_bytes)]
        if self.host_bytes is not None:
            wanted.append((self.host_bytes, self.free_host_bytes))
        told = [free >= bytes_ for bytes_, free in wanted if free is not None]
        return all(told) if len(told) == len(wanted) or not all(told) else None

    @property
    def missing(self) -> bool:
        """Whether something has to be prepared first, as far as is known."""
        return any(preparation.missing is None or preparation.missing for preparation in self.preparations)


class Outline(LM):
    """A model without its weights: config, tokenizer and anatomy are there, and nothing can be run.

    place  where the weights would lie
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, place: torch.device, name: str = "model"
    ) -> None:
        super().__init__(model, tokenizer, name=name)
        self.place = place

    @cached_property
    def fingerprint(self) -> str:
        """That of the model with this config and tokenizer whose statistics are cached; a made-up one if none or several are.

        Only the weights could tell for certain.
        """
        found: set[str] = set()
        for path in (cache_root() / "statistics").glob("*/*.safetensors"):
            with suppress(OSError, SafetensorError, KeyError, TypeError, ValueError), safe_open(path, "pt") as file:
                key = json.loads(file.metadata()["key"])
                if key["surroundings"] == self.surroundings:
                    found.add(key["fingerprint"])
        return found.pop() if len(found) == 1 else "not read"


def outline(
    source: str | Path,
    *,
    device: str | None = None,
    dtype: DTypeName | None = None,
    progress: Progress = silent,
) -> Outline:
    """As `factpatch.load`, without reading weights. A short name is fetched, and a GGUF file unpacked, if that was not done.

    Raises UnknownModel, UnknownDevice, FetchError, AnatomyError, TokenizerError, OutputError.
    """
    place = find_device(device)
    folder = find_checkpoint(str(source), progress)
    try:
        with without_bars(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder)
            stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
            kind = getattr(torch, dtype) if dtype else (torch.float32 if place.type == "cpu" else stored)
            model = AutoModelForCausalLM.from_config(config, dtype=kind)  # type: ignore[no-untyped-call]
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each reader of configs and tokenizers raises kinds of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownModel(
            f'"{source}": no config and tokenizer could be read from there ({reason}).\n'
            "  Expected a short name, a folder with config.json and tokenizer.json, a .gguf file, or the id of a model on the "
            "Hugging Face hub."
        ) from error
    model.train(mode=False)
    name = Path(source).name if Path(source).exists() else str(source)
    return Outline(model, tokenizer, place=place, name=name)


def plan(method: Method[Any], lm: LM, edits: Sequence[Edit], *, scores: bool = True) -> Plan:
    """What `method.fit(lm, edits)` is expected to take; `lm` may be an `Outline`, and stays as it is.

    scores  whether the edits are scored afterwards, as `factpatch edit` does

    Raises CannotEdit, BadConfig, AnatomyError, TokenizerError.
    """
    method.check(edits)
    config = method.resolve(lm)
    needs = method.needs(lm, edits, config)
    place = lm.place if isinstance(lm, Outline) else lm.device
    on_gpu = place.type == "cuda"
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    stages = (
        *_before(lm, weights, on_gpu=on_gpu),
        *needs.stages,
        *([_scoring(lm, edits, needs.changes)] if scores else []),
    )
    free, free_host = _free(place)
    return Plan(
        model=lm.name,
        architecture=type(lm.model).__name__,
        blocks=lm.anatomy.n_layers,
        hidden_size=lm.anatomy.hidden_size,
        parameters=sum(p.numel() for p in lm.model.parameters()),
        dtype=str(lm.dtype).removeprefix("torch."),
        device=str(place),
        model_bytes=weights,
        method=method.name,
        settings=config.model_dump(mode="json"),
        edits=len(edits),
        preparations=needs.preparations,
        changes=needs.changes,
        stages=stages,
        peak_bytes=weights + max(_sum(stage, host=False if on_gpu else None) for stage in stages),
        host_bytes=max(_sum(stage, host=True) for stage in stages) if on_gpu else None,
        free_bytes=free,
        free_host_bytes=free_host,
        patch_bytes=needs.patch_bytes,
        unknown=needs.unknown,
    )


def _sum(stage: Stage, *, host: bool | None) -> int:
    """What a stage holds: in main memory, elsewhere, or both."""
    return sum(held.bytes for held in stage.held if host is None or held.host == host)


def _before(lm: LM, weights: int, *, on_gpu: bool) -> tuple[Stage, ...]:
    """Loading, and taking the fingerprint."""
    largest = max(parameter.numel() for parameter in lm.model.parameters())
    rounded = 0 if lm.dtype == torch.bfloat16 else 2 * largest
    taking = [Held(what="the largest weight in bfloat16", bytes=rounded)]
    if not on_gpu:
        return (Stage(doing="Taking the fingerprint", held=tuple(taking)),)
    taking.append(Held(what="the largest weight in bfloat16", bytes=2 * largest, host=True))
    loading = Held(what="the checkpoint, before it is moved", bytes=weights, host=True)
    return Stage(doing="Loading", held=(loading,)), Stage(doing="Taking the fingerprint", held=tuple(taking))


def _scoring(lm: LM, edits: Sequence[Edit], changes: Sequence[Change]) -> Stage:
    """Every probe's prompt in one batch, as far as a batch goes, with what is written after it."""
    prompts = [prompt for edit in edits for prompt in _prompts(edit)]
    read = sum(len(lm.tokens.encode(prompt).ids) for prompt in prompts)
    written = read + len(prompts) * _WRITTEN
    copies = sum(rows * cols for rows, cols in (change.shape for change in changes)) * lm.dtype.itemsize
    held = (
        kept_keys(lm, min(BATCH_TOKENS, written)),
        widest_pass(lm, min(BATCH_TOKENS, read)),
        Held(what="what the patch changes, in copies", bytes=copies),
    )
    return Stage(doing="Scoring", held=held)


def _prompts(edit: Edit) -> list[str]:
    groups: list[Sequence[Probe]] = [*edit.portability.values(), *edit.locality.values()]
    return [edit.prompt, *edit.rephrases, *(probe.prompt for group in groups for probe in group)]


def _free(place: torch.device) -> tuple[int | None, int | None]:
    """Free where the model will lie, and of main memory if that is elsewhere."""
    main = int(psutil.virtual_memory().available)
    if place.type != "cuda":
        return main, None
    return (int(torch.cuda.mem_get_info(place)[0]) if torch.cuda.is_available() else None), main
