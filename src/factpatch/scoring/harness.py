"""The patched model, handed live to EleutherAI's lm-evaluation-harness.

    from factpatch.scoring.harness import HarnessLM
    with lm.patched(patch):
        lm_eval.simple_evaluate(HarnessLM(lm), tasks=["lambada_openai"])

All its requests go through the model as it is asked here, so that patches inside it see where a prompt ends, and contexts
stand before what is asked. Importing this raises MissingExtra without the harness.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from factpatch.errors import BadConfig, MissingExtra, TokenizerError
from factpatch.lm import LM
from factpatch.lm.predictions import predict
from factpatch.lm.tokens import Encoded
from factpatch.lm.writing import generate

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise MissingExtra(
        'The evaluation harness is not installed.\n  Install it: pip install "factpatch[harness]"'
    ) from None

__all__ = ["HarnessLM", "Measured", "evaluate"]

UNBOUNDED = 2048
"""Longest text, in tokens, for a model that has no limit of its own; the harness wants one."""
NEW_TOKENS = 256
"""How many tokens an answer has at most where a task does not say."""


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """A model under the harness's interface, with whatever patches lie on it when it is asked."""

    def __init__(self, lm: LM) -> None:
        super().__init__()
        self.lm = lm
        self.tokenizer = lm.tokenizer
        self.max_length = lm.tokens.limit or UNBOUNDED
        self.max_gen_toks = NEW_TOKENS
        self._rendered = False  # whether what is asked comes as rendered chats, which have their contexts already

    @property
    def device(self) -> Any:
        """Where inputs go."""
        return self.lm.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self.tokenizer.eos_token_id
        if found is None:
            raise TokenizerError(
                "the tokenizer has no end token, which the harness puts before texts without a context."
            )
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.lm.surroundings[:16]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, with the patches' contexts before what the user says last."""
        if not self.lm.tokens.has_chat:
            self.lm.tokens.render("", chat=True)  # raises
        last = max((i for i, turn in enumerate(chat_history) if turn["role"] == "user"), default=None)
        if last is not None:
            said = self._in_context(chat_history[last]["content"])
            chat_history = [turn | {"content": said} if i == last else turn for i, turn in enumerate(chat_history)]
        self._rendered = True
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        assert isinstance(text, str)
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a rendered chat brings its own special tokens."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
        """Of continuations, and whether they are what the model would say by itself."""
        texts = []
        for request in requests:
            asked, continuation = request.args
            context = asked if self._rendered else self._in_context(asked)
            if context:
                texts.append((request.args, *self._encode_pair(context, continuation)))
            else:
                ids = self.tok_encode(continuation, add_special_tokens=False)
                begin = [] if ids[:1] == [self.prefix_token_id] else [self.prefix_token_id]
                texts.append((request.args, [*begin, *ids][:1], [*begin, *ids][1:]))
        return self._loglikelihood_tokens(texts)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            ids = (*context, *continuation)[-self.max_length :]
            texts.append(Encoded(ids, max(1, len(ids) - len(continuation))))
        return [(sum(one.logprobs), one.best == one.target) for one in predict(self.lm, texts)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Of whole texts, in windows as long as the model reads."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            # A window's first token is read and not predicted, so there is room for one less.
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Greedy answers, each cut before the first of its stop texts. Raises BadConfig if a task wants samples."""
        alike: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[self._until(request.args[1])].append(i)
        said = [""] * len(requests)
        for (stops, most), numbers in alike.items():
            asked = [requests[i].args[0] for i in numbers]
            prompts = [self.tok_encode(text if self._rendered else self._in_context(text)) for text in asked]
            written = generate(
                self.lm,
                [ids[-max(1, self.max_length - most) :] for ids in prompts],
                max_new=most,
                stop=lambda ids, stops=stops: any(stop in self.lm.tokens.decode(ids) for stop in stops),  # type: ignore[misc]
                end=self.lm.end_tokens,
            )
            for i, ids in zip(numbers, written, strict=True):
                text = self.lm.tokens.decode(ids)
                said[i] = text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
        return said

    def _until(self, wanted: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """The stop texts, and how many tokens at most."""
        if wanted.get("do_sample") and wanted.get("temperature", 1.0) > 0:
            raise BadConfig(
                "a task wants sampled answers; the model answers greedily here.\n  Give it do_sample: false."
            )
        stops = wanted.get("until") or []
        most = next((wanted[name] for name in ("max_gen_toks", "max_new_tokens") if name in wanted), self.max_gen_toks)
        room = self.max_length // 2  # what is asked needs the rest
        return tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop), min(int(most), room)

    def _in_context(self, text: str) -> str:
        """What is asked, with the patches' contexts before it."""
        return self.lm.before([text])[text] + text


class Measured(NamedTuple):
    """A task's metric and its standard error, if the harness gives one."""

    value: float
    stderr: float | None


def evaluate(
    model: HarnessLM, tasks: Sequence[str], *, folder: Path | None = None, **options: Any
) -> dict[tuple[str, str], Measured]:
    """By task and metric, what the harness finds; a metric names the filter that answers went through, if there was one.

    folder   with tasks of one's own
    options  as for `lm_eval.simple_evaluate`

    Raises BadConfig for a task that the harness does not know.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise BadConfig(
            f"the harness knows no task {', '.join(unknown)}.\n"
            "  See them all: lm-eval ls tasks. Tasks of your own: give the folder that they are in."
        )
    found = simple_evaluate(model, tasks=list(tasks), task_manager=manager, log_samples=False, **options)
    measured = {}
    for task, own in found["results"].items():
        for name, value in own.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
                error = own.get(f"{metric}_stderr,{kind}")
                measured[task, metric if kind == "none" else f"{metric} ({kind})"] = Measured(
                    float(value), float(error) if isinstance(error, int | float) else None
                )
    return measured
