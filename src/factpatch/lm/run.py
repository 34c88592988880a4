"""Run the model over many texts at once: read its predictions at chosen places, or let it write.

Texts are sorted by length and run in batches bounded by tokens; the head is computed only where it is read. No result
depends on batch order or size beyond float tolerance, and sampling is seeded by each text alone.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from factpatch.lm.anatomy import Anatomy
from factpatch.lm.hooks import reading, recording, replacing_input, resuming, until
from factpatch.lm.tokens import Encoded

__all__ = [
    "Batch",
    "Chooser",
    "Noting",
    "Pass",
    "Places",
    "Prediction",
    "Sampler",
    "UpperRun",
    "by_rows",
    "can_resume",
    "current_pass",
    "evaluating",
    "generate",
    "greedy",
    "input_of",
    "length_batches",
    "logits_at",
    "output_of",
    "passing",
    "predict",
    "target_logprobs",
]

BATCH_TOKENS = 4096
"""How many tokens, padding included, one batch holds at most. Bounds memory; does not change results."""


@runtime_checkable
class Runnable(Protocol):
    """What is needed of a model here; `LM` is one."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def anatomy(self) -> Anatomy: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded token ids, and what goes with them.

    mask   1 where there is a token
    ends   the column where each prompt ends
    lanes  the lane of each row, -1 for none; None if no row has one
    """

    ids: Int[Tensor, "batch seq"]
    mask: Int[Tensor, "batch seq"]
    ends: Int[Tensor, " batch"]
    lanes: Int[Tensor, " batch"] | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[int]],
        device: torch.device,
        *,
        left: bool = False,
        prompts: Sequence[int] | None = None,
        lanes: Sequence[int | None] | None = None,
        align: Sequence[int] | None = None,
    ) -> Batch:
        """Pad rows to one length: on the right for reading, on the left for writing on.

        prompts  how many tokens of each row are its prompt; all by default
        align    a token of each row; these come to stand in one column, and rows are padded on both sides
        lanes    the lane of each row, as in `LM.side_by_side`; none by default
        """
        longest = max(len(row) for row in rows)
        starts = [longest - len(row) if left else 0 for row in rows]
        if align is not None:
            starts = [max(align) - token for token in align]
        width = max(start + len(row) for start, row in zip(starts, rows, strict=True))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (start, row) in enumerate(zip(starts, rows, strict=True)):
            ids[i, start : start + len(row)] = torch.tensor(list(row), dtype=torch.long)
            mask[i, start : start + len(row)] = 1
        lengths = prompts or [len(row) for row in rows]
        ends = torch.tensor([start + n - 1 for start, n in zip(starts, lengths, strict=True)])
        has_lanes = any(lane is not None for lane in lanes or ())
        own = torch.tensor([-1 if lane is None else lane for lane in lanes or ()], device=device) if has_lanes else None
        return cls(ids.to(device), mask.to(device), ends.to(device), own)

    @classmethod
    def of_texts(cls, texts: Sequence[Encoded], device: torch.device, *, align: Sequence[int] | None = None) -> Batch:
        """Texts with their targets, padded on the right, or aligned at a token of each."""
        prompts, lanes = [text.target for text in texts], [text.lane for text in texts]
        return cls.of([text.ids for text in texts], device, prompts=prompts, lanes=lanes, align=align)


@dataclass(slots=True)
class Pass:
    """What a patch inside the model may know of the forward pass it takes part in; see `current_pass`.

    mask   1 where there is a token, of all columns so far
    ends   the column of each row's last prompt token; None in passes that write on after the prompt was read
    notes  what patches keep from the pass that reads the prompt to those that write on; tensors have a row for each text
    lanes  the lane that each row belongs to, -1 for none; None if no row has one
    """

    mask: Int[Tensor, "batch seq"]
    ends: Int[Tensor, " batch"] | None
    notes: dict[Any, Tensor] = field(default_factory=dict)
    lanes: Int[Tensor, " batch"] | None = None


_PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)


def current_pass() -> Pass | None:
    """The forward pass that is going on; None if the model was called from elsewhere."""
    return _PASS.get()


def by_rows(activation: Tensor) -> Float[Tensor, "rows seq width"]:
    """What a module reads or puts out, with a row for each text; some blocks flatten the first two axes."""
    now = current_pass()
    rows = len(now.mask) if now is not None else (len(activation) if activation.ndim == 3 else 1)
    return activation.reshape(rows, -1, activation.shape[-1])


@contextmanager
def passing(now: Pass) -> Iterator[None]:
    """Let `current_pass` tell of this pass."""
    token = _PASS.set(now)
    try:
        yield
    finally:
        _PASS.reset(token)


def _forward(lm: Runnable, batch: Batch) -> Any:
    with passing(Pass(batch.mask, batch.ends, lanes=batch.lanes)):
        return lm.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)


@dataclass(frozen=True, slots=True)
class Places:
    """Positions in a batch: row and column of each."""

    rows: Int[Tensor, " reads"]
    cols: Int[Tensor, " reads"]

    @classmethod
    def of(cls, columns: Sequence[Sequence[int]], device: torch.device) -> Places:
        """For each row of a batch, the columns to read."""
        rows = [row for row, cols in enumerate(columns) for _ in cols]
        flat = [col for cols in columns for col in cols]
        return cls(
            torch.tensor(rows, dtype=torch.long, device=device), torch.tensor(flat, dtype=torch.long, device=device)
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, and every module back to the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def input_of(lm: Runnable, module: nn.Module, batch: Batch) -> Float[Tensor, "batch seq width"]:
    """What a module reads, everywhere in the batch; the model runs no further than that."""
    return _seen_at(lm, module, batch)[0]


@torch.no_grad()
def output_of(lm: Runnable, module: nn.Module, batch: Batch) -> Float[Tensor, "batch seq width"]:
    """What a module puts out, everywhere in the batch; the model runs no further than that."""
    return _seen_at(lm, module, batch)[1]


def _seen_at(lm: Runnable, module: nn.Module, batch: Batch) -> list[Tensor]:
    # Copied, because some blocks go on to add to the very tensor they were given.
    seen: list[Tensor] = []
    with evaluating(lm.model), reading(module, lambda x, out: seen.extend((x, out.clone()))), until(module):
        _forward(lm, batch)
    return [tensor.reshape(*batch.ids.shape, -1) for tensor in seen]  # some blocks flatten the first two axes


@contextmanager
def _only_at(lm: Runnable, places: Places) -> Iterator[None]:
    """Let the head read the given places alone, as one row."""
    with replacing_input(lm.anatomy.head, lambda hidden: hidden[places.rows, places.cols].unsqueeze(0)):
        yield


def logits_at(lm: Runnable, batch: Batch, places: Places) -> Float[Tensor, "reads vocab"]:
    """Logits at the given places only, in float32; keeps the graph if gradients are on."""
    with evaluating(lm.model), _only_at(lm, places):
        out = _forward(lm, batch)
    logits: Tensor = out.logits[0]
    return logits.float()


class UpperRun:
    """The forward pass from block `layer` and column `since` on, over one batch, as often as wanted.

    The blocks beneath run once and are then skipped, and so do the columns before, whose keys and values are kept; which
    changes nothing as long as nothing changes there. Only a model without hooks can be given `since`; see `can_resume`.
    """

    def __init__(self, lm: Runnable, batch: Batch, layer: int, *, since: int = 0) -> None:
        self.lm, self.batch, self.since = lm, batch, since
        self._below = lm.anatomy.blocks[:layer]
        self._output: Any = None
        self._past: Any = None
        # What these hooks do is in the output already; those that are added later act on it.
        self._acted = [{*block._forward_hooks, *block._forward_pre_hooks} for block in self._below]
        with torch.no_grad(), evaluating(lm.model):
            if since:
                self._past = self._read_past()
            if self._below:
                with recording(self._below[-1]) as kept, until(self._below[-1]):
                    self._run()
                self._output = kept[0]

    def logits_at(self, places: Places) -> Float[Tensor, "reads vocab"]:
        """As the function of this name, without running again what does not change; no place may lie before `since`."""
        here = Places(places.rows, places.cols - self.since)
        with resuming(self._below, self._output, self._acted), evaluating(self.lm.model), _only_at(self.lm, here):
            out = self._run()
        logits: Tensor = out.logits[0]
        return logits.float()

    def _run(self) -> Any:
        if not self.since:
            return _forward(self.lm, self.batch)
        # Of its own for each run, which adds its keys and values to it.
        past = copy.deepcopy(self._past)
        return self._columns(slice(self.since, None), self.batch.mask, past)

    def _read_past(self) -> Any:
        """Keys and values of all blocks in the columns before; nothing reads what is predicted there."""
        with _only_at(self.lm, Places.of([[]], self.lm.device)):
            out = self._columns(slice(0, self.since), self.batch.mask[:, : self.since], None)
        return out.past_key_values

    def _columns(self, columns: slice, mask: Tensor, past: Any) -> Any:
        ids = self.batch.ids[:, columns]
        positions = _positions(self.lm, mask, ids.shape[1])
        with passing(Pass(mask, self.batch.ends)):
            return self.lm.model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, **positions)


def can_resume(lm: Runnable) -> bool:
    """Whether the columns of a batch may run one after the other: hooks may want to see them all."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def _positions(lm: Runnable, mask: Int[Tensor, "batch seq"], last: int) -> dict[str, Tensor]:
    """The positions of the last so many columns, counted from each row's first token, if the model wants to be told."""
    if "position_ids" not in inspect.signature(lm.model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -last:]}


def length_batches(lengths: Sequence[int], budget: int | None = None) -> Iterator[list[int]]:
    """Indices sorted by length and cut so that rows times the longest stay within the budget, `BATCH_TOKENS` if none."""
    budget = BATCH_TOKENS if budget is None else budget
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model predicts for a target it is shown token by token (teacher forcing).

    target     the target's tokens
    best       the most likely token at each of their positions
    logprobs   log-probability of each target token, in nats
    """

    target: tuple[int, ...]
    best: tuple[int, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def of(cls, text: Encoded, logprobs: Float[Tensor, "target vocab"]) -> Prediction:
        """From the log-probabilities before each of the target's tokens."""
        target = torch.tensor(text.target_ids, device=logprobs.device)
        own = logprobs.gather(-1, target[:, None])[:, 0]
        return cls(text.target_ids, tuple(logprobs.argmax(-1).tolist()), tuple(own.tolist()))


def target_logprobs(lm: Runnable, texts: Sequence[Encoded]) -> Iterator[tuple[int, Float[Tensor, "target vocab"]]]:
    """By the index of each text, log-probabilities before each token of its target, in nats; in an order of its own."""
    for indices in length_batches([len(text.ids) for text in texts]):
        chosen = [texts[i] for i in indices]
        places = Places.of([range(text.target - 1, len(text.ids) - 1) for text in chosen], lm.device)
        with torch.no_grad():
            logprobs = logits_at(lm, Batch.of_texts(chosen, lm.device), places).log_softmax(-1)
        yield from zip(indices, torch.split(logprobs, [len(text.target_ids) for text in chosen]), strict=True)


def predict(lm: Runnable, texts: Sequence[Encoded]) -> list[Prediction]:
    """Teacher-forced predictions for each text's target, in the order given."""
    wanted = list(dict.fromkeys(texts))
    done = {wanted[i]: Prediction.of(wanted[i], logprobs) for i, logprobs in target_logprobs(lm, wanted)}
    return [done[text] for text in texts]


Row = tuple[int | None, tuple[int, ...]]
"""The lane, and the tokens of the prompt."""


@runtime_checkable
class Chooser(Protocol):
    """Picks the next token of each row from its logits; `rows` tells whose they are."""

    def __call__(self, logits: Float[Tensor, "batch vocab"], rows: Sequence[Row]) -> Tensor:
        """One token for each row."""
        ...


def greedy(logits: Float[Tensor, "batch vocab"], rows: Sequence[Row]) -> Tensor:  # noqa: ARG001
    """The most likely token."""
    return logits.argmax(-1)


class Noting:
    """The most likely token; of some rows it notes what was predicted right after the prompt.

    first  by row: log-probabilities of the first token, in nats; float32 on the CPU
    """

    def __init__(self, rows: Collection[Row]) -> None:
        self._wanted = frozenset(rows)
        self.first: dict[Row, Float[Tensor, " vocab"]] = {}

    def __call__(self, logits: Float[Tensor, "batch vocab"], rows: Sequence[Row]) -> Tensor:
        """As `greedy`."""
        new = [i for i, row in enumerate(rows) if row in self._wanted and row not in self.first]
        if new:
            logprobs = logits[new].float().log_softmax(-1).cpu()
            self.first |= {rows[i]: own for i, own in zip(new, logprobs.unbind(), strict=True)}
        return greedy(logits, rows)


class Sampler:
    """Sample among the `top_k` most likely tokens at temperature 1.

    Each prompt has a random stream of its own, seeded by `seed` and the prompt, so that a text does not depend on what
    it is batched with. The global random state is neither read nor advanced.
    """

    def __init__(self, seed: int, top_k: int) -> None:
        self.seed, self.top_k = seed, top_k
        self._streams: dict[Row, torch.Generator] = {}

    def __call__(self, logits: Float[Tensor, "batch vocab"], rows: Sequence[Row]) -> Tensor:
        """One token a row: the largest of log-probability plus Gumbel noise is a sample of the distribution."""
        top = logits.float().topk(min(self.top_k, logits.shape[-1]), dim=-1)
        uniform = torch.stack([torch.rand(top.values.shape[-1], generator=self._stream(row)) for row in rows])
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        pick = (top.values + noise.to(logits.device)).argmax(-1, keepdim=True)
        return top.indices.gather(-1, pick)[:, 0]

    def _stream(self, row: Row) -> torch.Generator:
        if row not in self._streams:
            digest = hashlib.sha256(repr((self.seed, row[1])).encode()).digest()
            self._streams[row] = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return self._streams[row]


def _goes_on(written: list[int]) -> bool:  # noqa: ARG001
    return False


@torch.no_grad()
def generate(
    lm: Runnable,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    choose: Chooser = greedy,
    stop: Callable[[list[int]], bool] = _goes_on,
    end: frozenset[int] = frozenset(),
    lanes: Sequence[int] | None = None,
) -> list[list[int]]:
    """Write at most `max_new` tokens after each prompt, in the order given; fewer where the model can read no further.

    lanes  the lane of each prompt, as in `LM.side_by_side`; none by default

    A row ends before a token in `end`, or after the token at which `stop(written so far)` is true; rows that have ended
    leave the batch.
    """
    own: Sequence[int | None] = lanes or [None] * len(prompts)
    rows: list[Row] = [(lane, tuple(prompt)) for lane, prompt in zip(own, prompts, strict=True)]
    wanted = list(dict.fromkeys(rows))
    done: dict[Row, list[int]] = {}
    with evaluating(lm.model):
        for indices in length_batches([len(prompt) + max_new for _, prompt in wanted]):
            chosen = [wanted[i] for i in indices]
            room = getattr(lm.model.config, "max_position_embeddings", None)
            most = max_new if room is None else min(max_new, room - max(len(prompt) for _, prompt in chosen) + 1)
            done.update(zip(chosen, _write(lm, chosen, most, choose, stop, end), strict=True))
    return [list(done[row]) for row in rows]


def _write(
    lm: Runnable,
    rows: Sequence[Row],
    max_new: int,
    choose: Chooser,
    stop: Callable[[list[int]], bool],
    end: frozenset[int],
) -> list[list[int]]:
    written: list[list[int]] = [[] for _ in rows]
    live = list(range(len(rows)))
    batch = Batch.of([prompt for _, prompt in rows], lm.device, left=True, lanes=[lane for lane, _ in rows])
    ids, mask, cache = batch.ids, batch.mask, None
    now = Pass(mask, batch.ends, lanes=batch.lanes)
    with replacing_input(lm.anatomy.head, lambda hidden: hidden[:, -1:]):
        for _ in range(max_new):
            positions = _positions(lm, mask, ids.shape[1])
            with passing(now):
                out = lm.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **positions)
            cache = out.past_key_values
            tokens = choose(out.logits[:, -1], [rows[i] for i in live])
            stay = []
            for row, (index, token) in enumerate(zip(live, tokens.tolist(), strict=True)):
                if token in end:
                    continue
                written[index].append(token)
                if not stop(written[index]):
                    stay.append(row)
            if not stay:
                break
            ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            if len(stay) < len(live):
                kept = torch.tensor(stay, device=lm.device)
                ids, mask = ids[kept], mask[kept]
                cache.batch_select_indices(kept)
                live = [live[row] for row in stay]
                now.notes = {key: note[kept] for key, note in now.notes.items()}
                now.lanes = None if now.lanes is None else now.lanes[kept]
            now.mask, now.ends = mask, None
    return written
