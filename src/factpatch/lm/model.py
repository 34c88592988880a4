"""`LM`: one language model in hand, with the patches that lie on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factpatch.lm.anatomy import find_anatomy
from factpatch.lm.run import generate
from factpatch.lm.sentences import first_sentence, has_ended
from factpatch.lm.tokens import Encoded, Tokens

__all__ = ["LM", "Attachable", "Context", "checksum", "fingerprint", "raw_bytes"]


T = TypeVar("T")

_CONFIG_NAMES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""What a config holds that changes no activation, or is told otherwise."""


@runtime_checkable
class Attachable(Protocol):
    """Anything that can be laid on a model and taken off again; every patch is one."""

    def attach(self, lm: LM) -> Callable[[], None]:
        """Change `lm`'s behaviour and return what undoes exactly that; on an error, change nothing."""
        ...


@runtime_checkable
class Context(Protocol):
    """Text put before what the model is asked; patches that work through the prompt add one to `LM.contexts`."""

    def before(self, prompts: Sequence[str]) -> list[str]:
        """The text for each prompt, with its own final space; empty for none."""
        ...


class LM:
    """A causal language model, its tokenizer, its anatomy, and a stack of patches.

    model      the transformers model; its weights are the base's plus what the stack says
    tokenizer  its fast tokenizer
    tokens     the rules from text to tokens
    anatomy    where its parts are
    name       what the user called it; for people, never for decisions
    contexts   what patches put before everything that is asked through `encode`
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "model",
        anatomy: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tokens = Tokens(tokenizer, getattr(model.config, "max_position_embeddings", None))
        self.anatomy = find_anatomy(model, anatomy)
        self.name = name
        self.contexts: list[Context] = []
        self._stack: list[tuple[Attachable, Callable[[], None]]] = []
        self._memory: dict[Hashable, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the token embedding lies, hence where inputs go."""
        weight = self.anatomy.embedding.weight
        assert isinstance(weight, Tensor)
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.anatomy.head.weight.dtype

    @cached_property
    def fingerprint(self) -> str:
        """The base model's fingerprint: the same with and without patches, in float32 and in bfloat16.

        It is taken once, at the latest before the first patch is laid on. Changing weights by other means than
        patches after that goes unnoticed.
        """
        assert not self._stack, "apply() takes the fingerprint before the first patch"
        return fingerprint(self.model)

    @cached_property
    def surroundings(self) -> str:
        """A hash of what its activations depend on beside the weights: the config and the tokenizer."""
        config = {k: v for k, v in self.model.config.to_diff_dict().items() if k not in _CONFIG_NAMES}
        tokenizer = getattr(self.tokenizer, "backend_tokenizer").to_str()  # noqa: B009
        text = json.dumps(config, sort_keys=True, default=str) + tokenizer
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text."""
        config = self.model.generation_config
        ids = [getattr(config, "eos_token_id", None), self.tokenizer.eos_token_id]
        flat = [i for item in ids for i in (item if isinstance(item, list) else [item])]
        return frozenset(int(i) for i in flat if i is not None)

    @property
    def patches(self) -> tuple[Attachable, ...]:
        """The patches that lie on the model, first to last."""
        return tuple(patch for patch, _ in self._stack)

    def apply(self, patch: Attachable) -> None:
        """Lay a patch on top. Raises WrongBase if it was made for another model; then nothing changes."""
        _ = self.fingerprint
        self._stack.append((patch, patch.attach(self)))

    def remove(self, patch: Attachable) -> None:
        """Take a patch off, wherever in the stack it lies; the model is bit for bit as if it had never been there.

        Raises ValueError if it does not lie on the model.
        """
        index = max((i for i, (p, _) in enumerate(self._stack) if p is patch), default=None)
        if index is None:
            raise ValueError("this patch does not lie on the model")
        above = [p for p, _ in self._stack[index + 1 :]]
        while len(self._stack) > index:
            self._stack.pop()[1]()
        for later in above:
            self.apply(later)

    @contextmanager
    def patched(self, *patches: Attachable) -> Iterator[LM]:
        """Lay patches on in order for the length of a `with`, and take them off whatever happens inside."""
        laid: list[Attachable] = []
        try:
            for patch in patches:
                self.apply(patch)
                laid.append(patch)
            yield self
        finally:
            for patch in reversed(laid):
                if any(p is patch for p in self.patches):  # it may have been taken off inside
                    self.remove(patch)

    @contextmanager
    def unpatched(self) -> Iterator[LM]:
        """The base model for the length of a `with`; afterwards the same patches lie on it again."""
        with self.without(*self.patches):
            yield self

    @contextmanager
    def without(self, *patches: Attachable) -> Iterator[LM]:
        """These patches off for the length of a `with`; afterwards the same stack lies on the model again."""
        stack = self.patches
        for patch in reversed(patches):  # from the top, so that little has to be lifted and laid on again
            self.remove(patch)
        try:
            yield self
        finally:
            for patch in reversed(self.patches):
                self.remove(patch)
            for patch in stack:
                self.apply(patch)

    def encode(
        self, prompts: Sequence[str], targets: Sequence[str] | None = None, *, chat: bool = False
    ) -> list[Encoded]:
        """What the model is given when it is asked: the patches' contexts, then each prompt, and a target after it."""
        wanted = list(dict.fromkeys(prompts))
        before = dict.fromkeys(wanted, "")
        for context in self.contexts:
            for prompt, text in zip(wanted, context.before(wanted), strict=True):
                before[prompt] += text
        pairs = zip(prompts, targets or [""] * len(prompts), strict=True)
        return [self.tokens.encode(prompt, target, prefix=before[prompt], chat=chat) for prompt, target in pairs]

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What depends on the base model alone, computed once while it is in hand; `key` holds all else it depends on."""
        if key not in self._memory:
            with self.unpatched():
                self._memory[key] = compute()
        found: T = self._memory[key]
        return found

    def answer(self, prompts: Sequence[str], *, chat: bool = False, max_new: int = 64) -> list[str]:
        """What the model says by itself: greedy, until it ends, a new line or the end of a sentence."""
        written = generate(
            self,
            [text.ids for text in self.encode(prompts, chat=chat)],
            max_new=max_new,
            stop=lambda ids: has_ended(self.tokens.decode(ids)),
            end=self.end_tokens,
        )
        return [first_sentence(self.tokens.decode(ids)) for ids in written]

    def ask(self, prompt: str, *, chat: bool = False) -> str:
        """The model's own answer to one prompt."""
        return self.answer([prompt], chat=chat)[0]

    def describe(self) -> dict[str, Any]:
        """Name, fingerprint and parts, JSON-ready."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "chat_template": self.tokens.has_chat,
            **self.anatomy.describe(),
        }


def checksum(model: nn.Module) -> str:
    """SHA-256 over every weight and buffer, bit for bit: equal before and after means that nothing has changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(name.encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the architecture and all weights, rounded to bfloat16.

    Rounding lets a checkpoint have one fingerprint in float32 and in bfloat16; tied weights count once.
    """
    digest = hashlib.sha256(str(getattr(getattr(model, "config", None), "model_type", "")).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(raw_bytes(parameter.to(torch.bfloat16)))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values, bit for bit, in row-major order."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
