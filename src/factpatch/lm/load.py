"""From what a user types to an `LM`: a short name, a folder, a GGUF file or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from factpatch.errors import BadConfig, UnknownDevice, UnknownModel, did_you_mean
from factpatch.lm.base import BaseLM
from factpatch.lm.catalog import CATALOG, DEFAULT_MODEL
from factpatch.lm.fetch import ensure, ensure_gguf, without_bars
from factpatch.lm.model import LM
from factpatch.lm.remote import PREFIX, connect
from factpatch.progress import Progress, silent

__all__ = ["DTypeName", "find_checkpoint", "find_device", "load", "load_or_connect"]

DTypeName = Literal["float32", "bfloat16", "float16"]


def load(
    source: str | Path = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: DTypeName | None = None,
    anatomy: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> LM:
    """Load a causal language model.

    source   a short name (`factpatch models` lists them), a folder with a checkpoint, a `.gguf` file, or a hub id
    device   "cpu", "cuda", "cuda:1"; by default a GPU if there is one
    dtype    by default float32 on a CPU, the checkpoint's own on a GPU
    anatomy  paths of parts the search cannot find; see `find_anatomy`

    Raises UnknownModel, FetchError, AnatomyError, TokenizerError, OutputError (the cache cannot be written).
    """
    place = find_device(device)
    kind = getattr(torch, dtype) if dtype else (torch.float32 if place.type == "cpu" else "auto")
    folder = find_checkpoint(str(source), progress)
    progress("Loading the model", 0, 1)
    try:
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, output_loading_info=True)
            model, found = loaded
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each reader of configs, weights and tokenizers raises kinds of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownModel(
            f'"{source}": no model could be loaded from there ({reason}).\n'
            f"  Expected a short name ({', '.join(CATALOG)}), a folder with config.json, weights and tokenizer.json, a .gguf "
            f"file, or the id of a model on the Hugging Face hub.{did_you_mean(str(source), CATALOG)}"
        ) from error
    assert isinstance(model, PreTrainedModel)
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise UnknownModel(
            f'"{source}": {len(names)} weights are missing from the checkpoint (such as {names[0]}).\n'
            "  Expected a whole checkpoint; with random weights in their place nothing it says would count. Fetch it again."
        )
    model.to(device=place)  # type: ignore[call-arg]
    model.train(mode=False)
    progress("Loading the model", 1, 1)
    return LM(model, tokenizer, name=Path(source).name if Path(source).exists() else str(source), anatomy=anatomy)


def find_device(named: str | torch.device | None) -> torch.device:
    """The device of this name, or the best there is. Raises UnknownDevice."""
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]
    try:
        place = torch.device(named or ("cuda" if "cuda" in here else "cpu"))
    except RuntimeError:
        place = None
    if place is None or place.type not in here or (place.index or 0) >= max(1, torch.cuda.device_count()):
        raise UnknownDevice(
            f'device "{named}": not here; this machine has {" and ".join(here) if here[1:] else "cpu alone"}.\n'
            "  Leave the device out to have the best one chosen."
        )
    return place


def find_checkpoint(source: str, progress: Progress) -> str:
    """A folder or hub id that transformers understands; what has a short name is fetched. Raises UnknownModel, FetchError."""
    if not source.strip():
        raise UnknownModel("the model's name is empty.\n  See the short names: factpatch models")
    if source in CATALOG:
        return str(ensure(CATALOG[source], progress))
    if source.startswith(PREFIX):
        raise UnknownModel(
            f'"{source}": a model behind an endpoint can be edited through its prompt, scored and asked, and nothing else.\n'
            "  From Python it is opened with factpatch.connect; for the rest name a model whose weights you have."
        )
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnknownModel(f"{source}: there is no such GGUF file.\n  Check the path.")
        return str(ensure_gguf(path, progress))
    if path.is_dir():
        return str(path)
    # A hub id is "name" or "owner/name"; anything else was meant as a path.
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise UnknownModel(
            f"{source}: there is no such folder.\n  Check the path, or see the short names: factpatch models"
        )
    if "/" not in source:
        hint = did_you_mean(source, CATALOG)
        if hint:
            raise UnknownModel(f'no model "{source}".{hint}  All short names: factpatch models')
    return source


def load_or_connect(
    name: str,
    *,
    base_url: str | None = None,
    dtype: DTypeName | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> BaseLM:
    """The model in hand, or behind an endpoint if the name says so.

    Raises what `load` and `connect` raise, and BadConfig for arguments of the other sort.
    """
    if not name.startswith(PREFIX):
        if base_url is not None:
            raise BadConfig(f"--base-url: belongs to a model behind an endpoint.\n  Give --model {PREFIX}NAME too.")
        return load(name, dtype=dtype, device=device, progress=progress)
    if dtype is not None or device is not None:
        raise BadConfig(f"--dtype, --device: {name} runs where its server runs.\n  Leave them out.")
    return connect(name, base_url)
