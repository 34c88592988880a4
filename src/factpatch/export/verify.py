"""Whether what was exported says what the patched model says, asked by the tool it was made for.

Each edit's own probes are put to it: the prompt, other wordings, and questions whose answers must stay.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from factpatch.errors import BadFile, MissingExtra
from factpatch.export.stack import stack_of
from factpatch.lm import LM
from factpatch.lm.fetch import without_bars
from factpatch.lm.sentences import first_sentence
from factpatch.patches import Patch
from factpatch.patches.adapter import peft_library
from factpatch.progress import Progress, silent
from factpatch.scoring.metrics import same_answer

__all__ = ["Answered", "Verified", "verify_adapter", "verify_checkpoint", "verify_gguf"]

_TOKENS = 24
"""Of an answer."""
_MOST = 60
"""Probes that are put, at most."""

Say = Callable[[str], str]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Answered(_Value):
    """One probe: what the patched model says, and what the exported one does."""

    prompt: str
    patched: str
    exported: str
    same: bool


class Verified(_Value):
    """What a tool said when it ran what was exported."""

    tool: str
    version: str
    answers: tuple[Answered, ...]

    @property
    def differing(self) -> tuple[Answered, ...]:
        """Probes that are answered otherwise."""
        return tuple(answer for answer in self.answers if not answer.same)

    @property
    def holds(self) -> bool:
        """Whether all are answered as by the patched model; where nothing was asked, nothing is shown to hold."""
        return bool(self.answers) and not self.differing


def verify_checkpoint(lm: LM, patches: Sequence[Patch], folder: str | Path, progress: Progress = silent) -> Verified:
    """Load a checkpoint with transformers alone, and ask it."""
    with without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=lm.dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model.to(lm.device)
    return _verify(lm, patches, "transformers", _transformers(model, tokenizer), progress)


def verify_adapter(lm: LM, patches: Sequence[Patch], folder: str | Path, progress: Progress = silent) -> Verified:
    """Put an adapter on a copy of the base model with PEFT, and ask it. Raises MissingExtra."""
    peft = peft_library()
    with lm.unpatched():
        base = copy.deepcopy(lm.model)
    # PEFT draws numbers for factors that it then replaces.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going out of use
        model = peft.PeftModel.from_pretrained(base, str(folder))
    return _verify(lm, patches, "peft", _transformers(model, lm.tokenizer), progress)


def verify_gguf(lm: LM, patches: Sequence[Patch], path: str | Path, progress: Progress = silent) -> Verified:
    """Run a GGUF file with llama.cpp, and ask it. Raises MissingExtra if that is not installed, BadFile if it cannot load it."""
    try:
        library = import_module("xllamacpp")
    except ImportError:
        raise MissingExtra(
            "llama.cpp is not installed, so the file cannot be run.\n"
            '  Install it: pip install "factpatch[llama-cpp]"; or leave it out: --no-verify'
        ) from None
    settings = library.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.verbosity = 1024, 1, 0
    # The file is put to the test, not how llama.cpp rounds by default: then near ties fall as they do here.
    settings.cache_type_k = settings.cache_type_v = library.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = library.Server(settings)
        # One that is dropped before its loop runs is waited for without end; an answer shows that it runs.
        server.handle_completions({"prompt": "a", "n_predict": 1})
    except Exception as error:
        raise BadFile(
            f"{path}: llama.cpp cannot load it ({error}).\n"
            "  Write it from another template, --template, or leave the question out: --no-verify"
        ) from None

    def say(prompt: str) -> str:
        reply = server.handle_completions({"prompt": prompt, "n_predict": _TOKENS, "temperature": 0.0})
        return str(reply["choices"][0]["text"])

    return _verify(lm, patches, "xllamacpp", say, progress)


def _transformers(model: Any, tokenizer: Any) -> Say:
    model.train(mode=False)

    @torch.no_grad()
    def say(prompt: str) -> str:
        given = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids = model.generate(
            **given, max_new_tokens=_TOKENS, do_sample=False, num_beams=1, pad_token_id=tokenizer.eos_token_id
        )
        return str(tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True))

    return say


def _verify(lm: LM, patches: Sequence[Patch], tool: str, say: Say, progress: Progress) -> Verified:
    edits = [edit for patch in stack_of(lm, patches) for edit in patch.provenance.edits]
    prompts = [edit.prompt for edit in edits] + [text for edit in edits for text in edit.rephrases]
    prompts += [probe.prompt for edit in edits for group in edit.locality.values() for probe in group]
    prompts = list(dict.fromkeys(prompts))[:_MOST]
    with lm.patched(*patches):
        wanted = lm.answer(prompts, max_new=_TOKENS)
    answers = []
    for i, (prompt, patched) in enumerate(zip(prompts, wanted, strict=True)):
        progress(f"Asking {tool}", i, len(prompts))
        exported = first_sentence(say(prompt))
        answers.append(Answered(prompt=prompt, patched=patched, exported=exported, same=same_answer(patched, exported)))
    progress(f"Asking {tool}", len(prompts), len(prompts))
    return Verified(tool=tool, version=version(tool), answers=tuple(answers))
