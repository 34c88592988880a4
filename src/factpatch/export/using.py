"""How other tools load what was exported, and by what name they know the base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from factpatch.lm import LM
from factpatch.lm.catalog import CATALOG

__all__ = ["folder_of", "how_to_load", "hub_id"]

_BASE, _HERE = "BASE MODEL", "FOLDER OF THIS CARD"


def folder_of(lm: LM) -> Path | None:
    """The folder on this machine that a model was loaded from; None if it came from elsewhere."""
    source = _source(lm)
    return Path(source).absolute() if source and Path(source).is_dir() else None


def hub_id(lm: LM) -> str | None:
    """What the Hugging Face hub calls the base model; None if that is not known."""
    if lm.name in CATALOG:
        return CATALOG[lm.name].hub or None
    return lm.name if _source(lm) == lm.name and not Path(lm.name).exists() else None


def how_to_load(
    form: Literal["checkpoint", "adapter", "gguf"], base: str | Path | None = None, where: str | Path | None = None
) -> tuple[str, ...]:
    """Three lines or fewer that load an export: Python, or for llama.cpp commands.

    base   of an adapter: hub id or folder of the base model; by default a word that stands for it, as in what is shipped
    where  the export is; by default a word that stands for it
    """
    if form == "gguf":
        asked = json.dumps({"prompt": "The capital of France is", "n_predict": 16, "temperature": 0})
        return (
            f"llama-server -m {where or 'FILE.gguf'} --port 8080 &",
            f"curl http://localhost:8080/completion -d '{asked}'",
        )
    own = json.dumps(str(where or _HERE), ensure_ascii=False)
    if form == "checkpoint":
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"model = AutoModelForCausalLM.from_pretrained({own})",
            f"tokenizer = AutoTokenizer.from_pretrained({own})",
        )
    return (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(str(base or _BASE), ensure_ascii=False)})",
        f"model = PeftModel.from_pretrained(base, {own})",
    )


def _source(lm: LM) -> str:
    """Where transformers loaded it from; empty if it was made in another way."""
    return str(getattr(lm.model.config, "_name_or_path", "") or "")
