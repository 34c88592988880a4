"""`LM`: one language model in hand, with the patches that lie on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factpatch.lm.anatomy import find_anatomy
from factpatch.lm.base import Attachable, BaseLM
from factpatch.lm.lanes import Lane, laid
from factpatch.lm.sentences import first_sentence, has_ended
from factpatch.lm.tokens import Encoded, Tokens
from factpatch.lm.writing import Chooser, generate, greedy

__all__ = ["LM", "checksum", "fingerprint", "raw_bytes"]

ROOM_FOR_LANES = 1 << 31
"""Bytes that copies of weights for patches side by side may take, however small the model; beside a great one half its size."""
_CONFIG_NAMES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""What a config holds that changes no activation, or is told otherwise."""


class LM(BaseLM):
    """A causal language model, its tokenizer, its anatomy, and a stack of patches.

    model      the transformers model; its weights are the base's plus what the stack says
    tokenizer  its fast tokenizer
    tokens     the rules from text to tokens
    anatomy    where its parts are
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
        self._lanes: list[Lane] = []
        super().__init__(name)

    @property
    def device(self) -> torch.device:
        """Where the token embedding lies, hence where inputs go."""
        weight = self.anatomy.embedding.weight
        assert isinstance(weight, Tensor)
        return weight.device

    @property
    def shape(self) -> tuple[int, int]:
        """Number of blocks and hidden size."""
        return self.anatomy.n_layers, self.anatomy.hidden_size

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

    @contextmanager
    def side_by_side(self, stacks: Sequence[Sequence[Attachable]]) -> Iterator[None]:
        """Lay each stack of patches on a lane of its own for the length of a `with`; lanes are numbered as they are given.

        Texts of many lanes run in one batch, each as if its stack alone lay on the model, above what lies there already.
        Texts without a lane are read by the model as it was. Raises what laying the patches on raises.
        """
        with laid(self, self.model, stacks) as lanes:
            kept, self._lanes = self._lanes, lanes
            try:
                yield
            finally:
                self._lanes = kept

    def abreast(self, stacks: Sequence[Sequence[Attachable]]) -> Iterator[range]:
        """Which of these, in their order, may lie side by side: as many as have room for the weights they change.

        One that takes more by itself is alone. Raises what laying the patches on raises.
        """
        if len(stacks) == 1:
            yield range(1)
            return
        room = max(ROOM_FOR_LANES, sum(parameter.nbytes for parameter in self.model.parameters()) // 2)
        start, taken = 0, 0
        for i, stack in enumerate(stacks):
            own = self._copied(stack)
            if i > start and taken + own > room:
                yield range(start, i)
                start, taken = i, 0
            taken += own
        if stacks:
            yield range(start, len(stacks))

    def _copied(self, stack: Sequence[Attachable]) -> int:
        """Bytes of the weights that these patches put others in place of."""
        before = {parameter: parameter.data_ptr() for parameter in self.model.parameters()}
        with self.patched(*stack):
            return sum(parameter.nbytes for parameter, was in before.items() if parameter.data_ptr() != was)

    def encode(
        self,
        prompts: Sequence[str],
        targets: Sequence[str] | None = None,
        *,
        chat: bool = False,
        lanes: Sequence[int] | None = None,
    ) -> list[Encoded]:
        """What the model is given when it is asked: the patches' contexts, then each prompt, and a target after it.

        lanes  which lane each prompt is for, inside `side_by_side`
        """
        own: Sequence[int | None] = lanes or [None] * len(prompts)
        asked = list(zip(own, prompts, targets or [""] * len(prompts), strict=True))
        before: dict[tuple[int | None, str], str] = {}
        for lane in dict.fromkeys(lane for lane, _, _ in asked):
            with nullcontext() if lane is None else self._lanes[lane].alone():
                found = self.before([prompt for its, prompt, _ in asked if its == lane])
            before |= {(lane, prompt): text for prompt, text in found.items()}
        return [
            replace(self.tokens.encode(prompt, target, prefix=before[lane, prompt], chat=chat), lane=lane)
            for lane, prompt, target in asked
        ]

    def answer(
        self,
        prompts: Sequence[str],
        *,
        chat: bool = False,
        max_new: int = 64,
        lanes: Sequence[int] | None = None,
        choose: Chooser = greedy,
    ) -> list[str]:
        """What the model says by itself, until it ends, a new line or the end of a sentence.

        lanes   which lane each prompt is for, inside `side_by_side`
        choose  picks each token; the most likely one by default
        """
        written = generate(
            self,
            [text.ids for text in self.encode(prompts, chat=chat, lanes=lanes)],
            max_new=max_new,
            choose=choose,
            stop=lambda ids: has_ended(self.tokens.decode(ids)),
            end=self.end_tokens,
            lanes=lanes,
        )
        return [first_sentence(self.tokens.decode(ids)) for ids in written]

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
