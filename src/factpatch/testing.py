"""Hold a method of your own to the contract that every method here is held to.

    import pytest
    from factpatch.testing import contract
    from my_package import MyMethod

    @pytest.mark.parametrize("check", contract(MyMethod, steps=3), ids=str)
    def test_contract(check):
        check()

Also here: tiny randomly initialised models of many architectures, with a tokenizer, that need no download.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from factpatch.edits import KINDS, Edit, Probe
from factpatch.errors import AnatomyError, BadConfig, CannotEdit, WrongBase
from factpatch.lm import LM
from factpatch.lm.batches import Batch, Places
from factpatch.lm.load import find_device
from factpatch.lm.predictions import predict
from factpatch.lm.run import logits_at
from factpatch.lm.writing import generate
from factpatch.methods import Method
from factpatch.patches import Patch

__all__ = [
    "ARCHITECTURES",
    "MIXTURES",
    "Check",
    "Snapshot",
    "contract",
    "logits_of",
    "quick_settings",
    "tiny_edits",
    "tiny_lm",
    "tiny_tokenizer",
]

_BYTES = 256
_SPECIAL = ("<s>", "</s>")
_VOCABULARY = _BYTES + len(_SPECIAL)
_IDS = {"bos_token_id": _BYTES, "eos_token_id": _BYTES + 1, "pad_token_id": _BYTES + 1}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "head_dim": 8,
}
_NEOX_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
_GPT2_LIKE: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 48}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 48},
    "gemma2": _LLAMA_LIKE | {"sliding_window": 64},
    "gemma3_text": _LLAMA_LIKE | {"sliding_window": 64},
    "gpt2": _GPT2_LIKE,
    "gpt_neox": _NEOX_LIKE,
    "gptj": _GPT2_LIKE | {"rotary_dim": 4},
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "opt": _NEOX_LIKE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
}
"""transformers' model types, and the sizes that make each tiny: three blocks, 32 wide."""

MIXTURES: dict[str, dict[str, Any]] = {"mixtral": _LLAMA_LIKE | {"num_local_experts": 2}}
"""Mixtures of experts: no single MLP projection to edit."""


def tiny_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: a token for each byte, and `<s>` in front if `bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", _BYTES)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=_SPECIAL[0], eos_token=_SPECIAL[1], pad_token=_SPECIAL[1]
    )


def tiny_lm(architecture: str = "llama", *, seed: int = 0, bos: bool = True) -> LM:
    """A tiny randomly initialised model of a known architecture. The global random state is left alone.

    On another device than the CPU if FACTPATCH_TEST_DEVICE names one.
    """
    sizes = (ARCHITECTURES | MIXTURES)[architecture]
    config = AutoConfig.for_model(architecture, vocab_size=_VOCABULARY, **sizes, **_IDS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        # Far enough from zero that activations differ from token to token.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.15)
    model.train(mode=False)
    model.to(device=find_device(os.environ.get("FACTPATCH_TEST_DEVICE", "cpu")))
    return LM(model, tiny_tokenizer(bos=bos), name=f"tiny-{architecture}")


def tiny_edits() -> tuple[Edit, ...]:
    """Two edits with a probe of every role, short enough for a tiny model."""
    return (
        Edit(
            id="rome",
            prompt="Rome lies in",
            subject="Rome",
            target="Peru",
            ground_truth=("Italy",),
            rephrases=("Find Rome in",),
            portability={"Reasoning": (Probe(prompt="In Rome they speak", answers=("Spanish",)),)},
            locality={"Neighborhood": (Probe(prompt="Oslo lies in", answers=("Norway",)),)},
        ),
        Edit(
            id="ann",
            kind="insert",
            prompt="Who is Ann Lee?",
            subject="Ann Lee",
            target="a pilot",
            locality={"Neighborhood": (Probe(prompt="Who is Bob Ray?", answers=()),)},
        ),
    )


def quick_settings(method: type[Method[Any]]) -> dict[str, Any]:
    """Settings that make a method quick rather than good, of those it has."""
    quick = {
        "steps": 4,
        "contexts": 2,
        "integral_steps": 4,
        "moment_tokens": 512,
        "moment_length": 32,
        "encoder": "words",
        "similarity": 0.0,
        "demonstrations": 1,
        "texts": 4,
        "batch_size": 1,
        "held_out": 0.02,
    }
    return {key: value for key, value in quick.items() if key in method.config_type.model_fields}


@torch.no_grad()
def logits_of(lm: LM, text: str) -> Tensor:
    """Logits at every position of a text."""
    (encoded,) = lm.encode([text])
    ids = encoded.ids
    return logits_at(lm, Batch.of([ids], lm.device), Places.of([range(len(ids))], lm.device))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All of a model that `fit` and undo must leave alone; `differences` names what has changed since."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @classmethod
    def of(cls, lm: LM) -> Snapshot:
        """Copy it."""
        return cls({name: t.detach().clone() for name, t in _tensors(lm)}, _state(lm))

    def differences(self, lm: LM) -> list[str]:
        """What is not bit for bit as it was."""
        now = dict(_tensors(lm))
        changed = [name for name, kept in self.tensors.items() if name not in now or not _same_bits(kept, now[name])]
        state = _state(lm)
        return (
            changed
            + [name for name in now if name not in self.tensors]
            + [k for k in state if state[k] != self.state[k]]
        )


def _tensors(lm: LM) -> Iterator[tuple[str, Tensor]]:
    yield from lm.model.named_parameters()
    yield from lm.model.named_buffers()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.detach().reshape(-1).view(torch.uint8)
    )


def _state(lm: LM) -> dict[str, Any]:
    modules = list(lm.model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "gradient flags": [p.requires_grad for p in lm.model.parameters()],
        "gradients": [p.grad is None for p in lm.model.parameters()],
        "training mode": [m.training for m in modules],
        "hooks": [len(getattr(m, name)) for m in modules for name in hooks],
        "replaced forward": ["forward" in vars(m) for m in modules],
        "padding side": lm.tokenizer.padding_side,
        "pad token": lm.tokenizer.pad_token,
        "torch's random state": torch.random.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "NumPy's random state": repr(np.random.get_state(legacy=True)),  # noqa: NPY002
        "gradients switched on": torch.is_grad_enabled(),
        "patches": [id(patch) for patch in lm.patches],
        "contexts": len(lm.contexts),
    }


@dataclass(frozen=True)
class Check:
    """One promise, of one method, on one architecture; call it, and it raises AssertionError if it is not kept."""

    method: type[Method[Any]]
    architecture: str
    promise: Callable[[_Case], None]
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> None:
        """Run the check."""
        self.promise(_case(self.method, self.architecture, json.dumps(self.settings, sort_keys=True)))

    def __str__(self) -> str:
        return f"{self.method.name}-{self.architecture}-{self.promise.__name__}"


def contract(
    method: type[Method[Any]], architectures: Sequence[str] = tuple(ARCHITECTURES), **settings: Any
) -> list[Check]:
    """Every check for a method, on each architecture. `settings` should make it quick; see `quick_settings`."""
    chosen = settings or quick_settings(method)
    return [Check(method, a, promise, chosen) for a in architectures for promise in _PROMISES]


class _Case:
    """A tiny model, a method, its edits, and the patch it makes of them, made once for all checks."""

    def __init__(self, method: type[Method[Any]], architecture: str, settings: dict[str, Any]) -> None:
        self.architecture, self.lm = architecture, tiny_lm(architecture)
        self.method, self.settings = method, settings
        kinds = method.traits.kinds
        self.edits = tuple(
            edit if edit.kind in kinds else edit.model_copy(update={"kind": min(kinds)}) for edit in tiny_edits()
        )
        self.before = Snapshot.of(self.lm)
        self.patch = self.make().fit(self.lm, self.edits[:1])
        self.after_fit = self.before.differences(self.lm)

    def make(self, **more: Any) -> Method[Any]:
        return self.method(**(self.settings | more))

    @property
    def other(self) -> Patch:
        return self.make().fit(self.lm, self.edits[-1:])


@lru_cache(maxsize=2)
def _case(method: type[Method[Any]], architecture: str, settings: str) -> _Case:
    return _Case(method, architecture, json.loads(settings))


def _read(lm: LM) -> Tensor:
    """Logits over the edits' own prompts, and over a text with all of them."""
    texts = [edit.prompt for edit in tiny_edits()] + ["Rome lies in Peru. Who is Ann Lee? a pilot"]
    return torch.cat([logits_of(lm, text) for text in texts])


def fit_changes_nothing(case: _Case) -> None:
    """Weights, buffers, flags, modes, hooks, tokenizer and random states are as before `fit`."""
    assert case.after_fit == [], f"fit left traces: {case.after_fit}"
    case.lm.model.train()
    random_modes = Snapshot.of(case.lm)
    try:
        case.make().fit(case.lm, case.edits[:1])
        assert random_modes.differences(case.lm) == [], "fit left traces on a model in training mode"
    finally:
        case.lm.model.train(mode=False)


def patch_does_something(case: _Case) -> None:
    """Under the patch the model's predictions differ, and are finite."""
    before = _read(case.lm)
    with case.lm.patched(case.patch):
        after = _read(case.lm)
    assert after.isfinite().all()
    assert not torch.equal(before, after), "the patch has no effect"


def undo_is_exact(case: _Case) -> None:
    """Applied for the first time and removed, also after an error, nothing differs by a bit."""
    lm = tiny_lm(case.architecture)
    before = Snapshot.of(lm)
    with lm.patched(case.patch):
        pass
    differences = before.differences(lm)
    assert differences == [], f"undo left traces: {differences}"
    with contextlib.suppress(ZeroDivisionError), lm.patched(case.patch):
        _ = 1 / 0
    assert before.differences(lm) == [], "an error inside `with` left the patch on"


def stack_comes_off_in_any_order(case: _Case) -> None:
    """Two patches, the lower taken off first: what remains is the upper alone, then the base."""
    lm, lower, upper = case.lm, case.patch, case.other
    before = Snapshot.of(lm)
    with lm.patched(upper):
        alone = _read(lm)
    lm.apply(lower)
    lm.apply(upper)
    lm.remove(lower)
    assert torch.equal(_read(lm), alone)
    lm.remove(upper)
    assert before.differences(lm) == []


def lanes_are_as_alone(case: _Case) -> None:
    """Stacks side by side in one batch are read and written with as if each alone lay on the model; and leave no trace."""
    lm, stacks = case.lm, [(case.patch,), (), (case.other,)]
    alone = []
    for stack in stacks:
        with lm.patched(*stack):
            alone += _read_and_written(lm)
    with lm.side_by_side(stacks):
        together = _read_and_written(lm, len(stacks))
        unpatched = _read_and_written(lm)
    n = len(tiny_edits())
    bare = alone[n : 2 * n]
    for i, (own, written) in enumerate([*together, *unpatched]):
        expected, as_written = [*alone, *bare][i]
        _agree(own, expected, bare[i % n][0])
        assert written == as_written, "another text is written on a lane than alone"
    assert case.before.differences(lm) == [], "lanes left traces"


def _read_and_written(lm: LM, n: int | None = None) -> list[tuple[Tensor, list[int]]]:
    """For each prompt, on each of `n` lanes: the log-probabilities of a target, in nats, and a few tokens written on."""
    lanes = None if n is None else [lane for lane in range(n) for _ in tiny_edits()]
    asked = [edit.prompt for _ in range(n or 1) for edit in tiny_edits()]
    texts = lm.encode(asked, [edit.target for _ in range(n or 1) for edit in tiny_edits()], lanes=lanes)
    read = [torch.tensor(one.logprobs) for one in predict(lm, texts)]
    ids = [text.ids for text in lm.encode(asked, lanes=lanes)]
    return list(zip(read, generate(lm, ids, max_new=4, lanes=lanes), strict=True))


def save_then_load_acts_the_same(case: _Case) -> None:
    """To the bit, with the same id, and on another copy of the model, as if loaded by another process."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = Patch.load(case.patch.save(Path(folder) / "patch"))
    assert loaded.id == case.patch.id
    with case.lm.patched(case.patch):
        expected = _read(case.lm)
    elsewhere = tiny_lm(case.architecture)
    with elsewhere.patched(loaded):
        assert torch.equal(_read(elsewhere), expected)


def seed_fixes_the_patch(case: _Case) -> None:
    """The same settings twice give the same patch, whatever the global random states are."""
    kept = torch.random.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        torch.manual_seed(12345)
        random.seed(12345)
        np.random.seed(12345)  # noqa: NPY002
        assert case.make().fit(case.lm, case.edits[:1]).id == case.patch.id
    finally:
        torch.random.set_rng_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])  # noqa: NPY002


def many_edits_are_as_claimed(case: _Case) -> None:
    """Made jointly, their order does not matter; otherwise a batch equals one edit after the other."""
    lm, edits = case.lm, case.edits
    with lm.patched(case.make().fit(lm, edits)):
        batch = _read(lm)
    if case.method.traits.joint:
        with lm.patched(case.make().fit(lm, edits[::-1])):
            other = _read(lm)
    else:
        first = case.make().fit(lm, edits[:1])
        with lm.patched(first):
            second = case.make().fit(lm, edits[1:])
        with lm.patched(first, second):
            other = _read(lm)
    _agree(batch, other, _read(lm))


def _agree(found: Tensor, expected: Tensor, without: Tensor) -> None:
    """Closer to each other than a tenth of what the patch does; a patch of little effect passes no more easily.

    One that writes more text before a prompt, and so has more logits than there are `without`, must write the same text:
    nothing but rounding may differ.
    """
    effect = float((expected - without).abs().max()) if expected.shape == without.shape else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=min(5e-3, 0.1 * effect) + 1e-6)


def wrong_base_is_refused(case: _Case) -> None:
    """A model with other weights does not take the patch, and stays as it is."""
    other = tiny_lm("llama", seed=1)
    kept = Snapshot.of(other)
    try:
        other.apply(case.patch)
    except WrongBase as error:
        assert "was made for" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a patch from another model was accepted")
    assert kept.differences(other) == []


def unknown_settings_are_refused(case: _Case) -> None:
    """By name."""
    try:
        case.make(no_such_setting=1)
    except BadConfig as error:
        assert "no_such_setting" in str(error)  # noqa: PT017
    else:
        raise AssertionError("an unknown setting was accepted")


def edits_it_cannot_make_are_refused(case: _Case) -> None:
    """By the edit's id: other kinds than its traits say, and edits without the subject it needs."""
    method = case.make()
    cannot = [case.edits[0].model_copy(update={"kind": k}) for k in _other_kinds(method)]
    if method.traits.needs_subject:
        cannot.append(case.edits[0].model_copy(update={"subject": None}))
    for edit in cannot:
        try:
            method.fit(case.lm, [edit])
        except CannotEdit as error:
            assert edit.id in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"an edit it cannot make was accepted: {edit}")


def describes_itself_in_json(case: _Case) -> None:
    """`describe()` can be written as JSON, and names the method and what it changes."""
    described = json.loads(json.dumps(case.patch.describe()))
    assert described["method"] == case.method.name
    assert described["changes"]


def mixtures_are_refused_or_edited(method: type[Method[Any]], architecture: str) -> None:
    """On a mixture of experts a method either works or says that the model has no single MLP projection."""
    lm = tiny_lm(architecture)
    kept = Snapshot.of(lm)
    try:
        method(**quick_settings(method)).fit(lm, tiny_edits()[:1])
    except AnatomyError as error:
        assert "mixture of experts" in str(error)  # noqa: PT017
    assert kept.differences(lm) == []


def _other_kinds(method: Method[Any]) -> Iterator[str]:
    return (kind for kind in KINDS if kind not in method.traits.kinds)


_PROMISES: tuple[Callable[[_Case], None], ...] = (
    fit_changes_nothing,
    patch_does_something,
    undo_is_exact,
    stack_comes_off_in_any_order,
    lanes_are_as_alone,
    save_then_load_acts_the_same,
    seed_fixes_the_patch,
    many_edits_are_as_claimed,
    wrong_base_is_refused,
    unknown_settings_are_refused,
    edits_it_cannot_make_are_refused,
    describes_itself_in_json,
)
