"""What a GGUF file says of a model of the Llama family, where there is no file of the unpatched model to copy it from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from factpatch.errors import BadFile
from factpatch.lm import LM

__all__ = ["TEMPLATE", "architecture_of", "check_describable", "describe", "rotary_factors"]

# By transformers' type of model, llama.cpp's architecture: those that differ in nothing but names and the order of rotary pairs.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TEMPLATE = "Name a GGUF file of the unpatched model to start from: --template"

# How a text is cut before merges, as llama.cpp names it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
}


def architecture_of(lm: LM) -> str:
    """llama.cpp's name for the architecture. Raises BadFile if it is not of the Llama family."""
    kind = lm.model.config.model_type
    if kind not in _ARCHITECTURES:
        raise BadFile(
            f"{lm.name}: a GGUF file of a {kind} model cannot be written from nothing, only of {', '.join(_ARCHITECTURES)}.\n"
            f"  {TEMPLATE}"
        )
    return _ARCHITECTURES[kind]


def check_describable(lm: LM) -> None:
    """Raise BadFile if `describe` or `rotary_factors` would: asked before anything is written."""
    architecture_of(lm)
    _tokens(lm)
    rotary_factors(lm)


def describe(writer: Any, lm: LM) -> None:
    """Sizes and tokenizer. Raises BadFile for a tokenizer that llama.cpp is not known to have."""
    config = lm.model.config
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_type("model")
    writer.add_name(lm.name)
    writer.add_block_count(lm.anatomy.n_layers)
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.num_key_value_heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_rope_freq_base(_theta(config))
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(_rows(lm))
    for add, value in _tokens(lm).items():
        getattr(writer, f"add_{add}")(value)


def rotary_factors(lm: LM) -> Float[Tensor, " half"] | None:
    """By how much each rotary frequency is slowed down, as llama.cpp reads it; None where none is.

    Raises BadFile for frequencies that change with the length of the text, or come with a scale of their own.
    """
    config = lm.model.config
    kind = _rope(config).get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in {"linear", "llama3"} or architecture_of(lm) != "llama":  # the others have no tensor for it
        raise BadFile(f"{lm.name}: rotary positions of kind {kind} cannot be told to llama.cpp here.\n  {TEMPLATE}")
    slowed, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    places = torch.arange(len(slowed), dtype=torch.float32) / len(slowed)
    return _theta(config) ** -places / slowed.float()


def _rope(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _theta(config: Any) -> float:
    return float(_rope(config).get("rope_theta") or 10000.0)


def _rows(lm: LM) -> int:
    """Of the embedding: some models have more than their tokenizer has tokens."""
    weight = lm.anatomy.embedding.weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _tokens(lm: LM) -> dict[str, Any]:
    """What is said of the tokenizer, by the writer's own names."""
    tokenizer = lm.tokenizer
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    model = made["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    cut = _cut(made.get("pre_tokenizer"))
    whole = model.get("ignore_merges") and cut != "llama-bpe"
    if (
        model["type"] != "BPE"
        or not merges
        or cut is None
        or whole
        or model.get("byte_fallback")
        or (made.get("normalizer") or {}).get("type", "NFC") != "NFC"
    ):
        raise BadFile(
            f"{lm.name}: its tokenizer is none of the byte-level ones that are known to be llama.cpp's too.\n  {TEMPLATE}"
        )
    size = _rows(lm)
    names = [f"[PAD{i}]" for i in range(size)]  # rows of the embedding that no token has
    kinds = [gguf.TokenType.UNUSED] * size
    for token, i in model["vocab"].items():
        names[i], kinds[i] = token, gguf.TokenType.NORMAL
    for added in made["added_tokens"]:
        names[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    ids = tokenizer("a").input_ids
    ends = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_token_id")
        for role in ("bos", "eos", "pad", "unk")
        if getattr(tokenizer, f"{role}_token_id") is not None
    }
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": cut,
        "token_list": names,
        "token_types": kinds,
        "token_merges": merges,
        **ends,
        "add_bos_token": ids[0] == tokenizer.bos_token_id,
        "add_eos_token": ids[-1] == tokenizer.eos_token_id,
        **({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
    }


def _cut(told: Mapping[str, Any] | None) -> str | None:
    """llama.cpp's name for how a text is cut before merges, or None."""
    if told is None:
        return None
    parts = told["pretokenizers"] if told["type"] == "Sequence" else [told]
    *before, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if not before:
        return "gpt-2" if last["use_regex"] else None
    (first,) = before
    if first["type"] == "Digits" and first["individual_digits"] and last["use_regex"]:
        return "smollm"
    if first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"] and not last["use_regex"]:
        return _SPLITS.get(first["pattern"].get("Regex", ""))
    return None
