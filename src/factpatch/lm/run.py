"""Run the model over many texts at once: read its predictions at chosen places, or let it write.

Texts are sorted by length and run in batches bounded by tokens; the head is computed only where it is read. No result
depends on batch order or size beyond float tolerance, and sampling is seeded by each text alone. What many texts begin
with runs once for all of them.
"""

from __future__ import annotations

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
from transformers import DynamicCache

from factpatch.lm.anatomy import Anatomy
from factpatch.lm.hooks import reading, recording, replacing_input, resuming, until
from factpatch.lm.kv import adding_to, begun, roomy
from factpatch.lm.prefix import ONE_PASS, Shared, shared_prefixes
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
"""How many tokens, padding included, one batch holds at most, those whose keys and values it is given too.

Bounds memory; does not change results.
"""


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


def _forward_on(lm: Runnable, ids: Int[Tensor, "batch new"], mask: Int[Tensor, "batch seq"], past: Any) -> Any:
    """The last columns, after those whose keys and values are in `past`. The output has them all."""
    positions = _positions(lm, mask, ids.shape[1])
    return lm.model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, **positions)


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
        # Each run adds keys and values of its own.
        past = adding_to(self._past)
        with passing(Pass(self.batch.mask, self.batch.ends)):
            return _forward_on(self.lm, self.batch.ids[:, self.since :], self.batch.mask, past)

    def _read_past(self) -> Any:
        """Keys and values of all blocks in the columns before; nothing reads what is predicted there."""
        ids, mask = self.batch.ids[:, : self.since], self.batch.mask[:, : self.since]
        with _only_at(self.lm, Places.of([[]], self.lm.device)), passing(Pass(mask, self.batch.ends)):
            return _forward_on(self.lm, ids, mask, None).past_key_values


def can_resume(lm: Runnable) -> bool:
    """Whether the columns of a batch may run one after the other: hooks may want to see them all."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def _positions(lm: Runnable, mask: Int[Tensor, "batch seq"], last: int) -> dict[str, Tensor]:
    """The positions of the last so many columns, counted from each row's first token, if the model wants to be told."""
    if "position_ids" not in inspect.signature(lm.model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -last:]}


def length_batches(
    lengths: Sequence[int], budget: int | None = None, *, widths: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Indices sorted by length and cut so that rows times the longest stay within the budget, `BATCH_TOKENS` if none.

    widths  what counts for the budget, where it is not the lengths
    """
    budget = BATCH_TOKENS if budget is None else budget
    widths = lengths if widths is None else widths
    batch: list[int] = []
    widest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        widest = max(widest, widths[index])
        if batch and (len(batch) + 1) * widest > budget:
            yield batch
            batch, widest = [], widths[index]
        batch.append(index)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class _Known:
    """Keys and values of prefixes, and how a batch of texts begins with them.

    prefixes  a row for each prefix
    whose     the prefix of each text
    last      how many columns at the end of the batch, which is padded on the left, must run
    """

    prefixes: DynamicCache
    whose: tuple[int, ...]
    last: int

    def past(self, batch: Batch, more: int = 0) -> tuple[int, DynamicCache]:
        """How many columns of the batch need not run, and their keys and values, with room for all columns and more.

        Texts end in one column, so one with less after its prefix than another runs the end of the prefix again.
        """
        width = batch.ids.shape[1]
        since, starts = width - self.last, (width - batch.mask.sum(-1)).tolist()
        return since, begun(self.prefixes, list(zip(self.whose, starts, strict=True)), since, width + more)


def _batches(
    lm: Runnable, texts: Sequence[Sequence[int]], prompts: Sequence[int], more: int = 0
) -> Iterator[tuple[list[int], _Known | None]]:
    """Batches of texts by index, and what is known of each before it runs.

    prompts  how many tokens of each text stand before all that is read; the last of these is never taken as known
    more     how many tokens will be written after each

    Beside a batch, the keys and values of some prefixes are held, as many as a batch may hold.
    """
    lengths = [len(text) + more for text in texts]
    groups = shared_prefixes([text[: prompt - 1] for text, prompt in zip(texts, prompts, strict=True)])
    alone = sorted({*range(len(texts))}.difference(*(group.texts for group in groups)))
    # Texts that share nothing lose those that do from their batches: at worst there is one more, with all its passes.
    lost = ONE_PASS * more if alone else 0
    if not groups or sum(group.gain for group in groups) < lost or not _can_share(lm):
        groups, alone = [], list(range(len(texts)))
    for bundle in length_batches([group.length for group in groups]):
        own = [groups[i] for i in bundle]
        prefixes = _read_prefixes(lm, [texts[group.texts[0]][: group.length] for group in own])
        if prefixes is None:
            alone += [i for group in own for i in group.texts]
            continue
        yield from _batches_of(own, prefixes, lengths, more)
    for batch in length_batches([lengths[i] for i in alone]):
        yield [alone[i] for i in batch], None


def _batches_of(
    groups: Sequence[Shared], prefixes: DynamicCache, lengths: Sequence[int], more: int
) -> Iterator[tuple[list[int], _Known]]:
    """Batches of the texts of all these groups, sorted by how much of them is left to run."""
    texts = [(i, whose, lengths[i] - more - group.length) for whose, group in enumerate(groups) for i in group.texts]
    for batch in length_batches([left for _, _, left in texts], widths=[lengths[i] for i, _, _ in texts]):
        indices, whose, left = zip(*(texts[i] for i in batch), strict=True)
        yield list(indices), _Known(prefixes, whose, max(left))


@torch.no_grad()
def _read_prefixes(lm: Runnable, prefixes: Sequence[Sequence[int]]) -> DynamicCache | None:
    """Keys and values of all blocks; None if the model does not keep all it knows of a text in such a cache."""
    batch = Batch.of(prefixes, lm.device)
    cache = roomy(lm.model, batch.ids.shape[1])
    if cache is None:
        return None
    with evaluating(lm.model), _only_at(lm, Places.of([[]], lm.device)), passing(Pass(batch.mask, batch.ends)):
        _forward_on(lm, batch.ids, batch.mask, cache)
    is_read = all(cache.get_seq_length(i) == batch.ids.shape[1] for i in range(len(cache.layers)))
    return cache if is_read else None


def _can_share(lm: Runnable) -> bool:
    """Whether a prefix is read alike whatever follows.

    Hooks may see to it that it is not, on any lane; without any, all lanes read alike. Nor is it where a model stretches its
    rotary angles with the length of the text.
    """
    kinds = [getattr(module, "rope_type", None) for module in lm.model.modules()]
    flat = {kind for own in kinds for kind in (own.values() if isinstance(own, dict) else [own])}
    return can_resume(lm) and not flat & {"dynamic", "longrope"}


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
    for indices, known in _batches(lm, [text.ids for text in texts], [text.target for text in texts]):
        chosen = [texts[i] for i in indices]
        logprobs = _target_logits(lm, chosen, known).log_softmax(-1)
        yield from zip(indices, torch.split(logprobs, [len(text.target_ids) for text in chosen]), strict=True)


@torch.no_grad()
def _target_logits(lm: Runnable, texts: Sequence[Encoded], known: _Known | None) -> Float[Tensor, "reads vocab"]:
    columns = [range(text.target - 1, len(text.ids) - 1) for text in texts]
    if known is None:
        return logits_at(lm, Batch.of_texts(texts, lm.device), Places.of(columns, lm.device))
    batch = Batch.of([text.ids for text in texts], lm.device, left=True)
    since, past = known.past(batch)
    shifts = [batch.ids.shape[1] - len(text.ids) - since for text in texts]
    here = Places.of([[c + shift for c in own] for own, shift in zip(columns, shifts, strict=True)], lm.device)
    with evaluating(lm.model), _only_at(lm, here), passing(Pass(batch.mask, batch.ends)):
        out = _forward_on(lm, batch.ids[:, since:], batch.mask, past)
    logits: Tensor = out.logits[0]
    return logits.float()


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

    A row ends before a token in `end`, or after the token at which `stop(written so far)` is true. Rows that have ended
    leave the batch, but for a few where the others would run slower alone. Where rows may end early, most do: batches hold as
    many as have room for a short answer, and the rows of all batches that are not done by then are read again and go on together.
    """
    own: Sequence[int | None] = lanes or [None] * len(prompts)
    rows: list[Row] = [(lane, tuple(prompt)) for lane, prompt in zip(own, prompts, strict=True)]
    room = getattr(lm.model.config, "max_position_embeddings", None)
    texts = {row: _Text(row, max_new if room is None else min(max_new, room - len(row[1]) + 1)) for row in rows}
    going = [text for text in texts.values() if text.left > 0]
    is_one_batch = len([*length_batches([len(text.ids) + text.left for text in going])]) < 2
    columns = max_new if is_one_batch or not (end or stop is not _goes_on) else _SHORT
    with evaluating(lm.model):
        while going:
            more = min(columns, max(text.left for text in going))
            for indices, known in _batches(lm, [text.ids for text in going], [len(text.ids) for text in going], more):
                chosen = [going[i] for i in indices]
                # No row may run past what the model can read, an ended one that is kept neither.
                most = more if room is None else min(more, room - max(len(text.ids) for text in chosen) + 1)
                _write(lm, chosen, known, most, choose, stop, end, alone=len(chosen) == len(going))
            going, columns = [text for text in going if text.left > 0], max_new
    return [list(texts[row].written) for row in rows]


_SHORT = 16
"""Room for so many tokens is made for answers at first: most are over by then."""


@dataclass(slots=True)
class _Text:
    """What is written after a prompt, and how many tokens more it may become; none when it has ended."""

    row: Row
    left: int
    written: list[int] = field(default_factory=list)

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.row[1], *self.written)

    def add(self, token: int, stop: Callable[[list[int]], bool], end: frozenset[int]) -> None:
        if token not in end:
            self.written.append(token)
        self.left = 0 if token in end or stop(self.written) else self.left - 1


def _write(
    lm: Runnable,
    texts: Sequence[_Text],
    known: _Known | None,
    more: int,
    choose: Chooser,
    stop: Callable[[list[int]], bool],
    end: frozenset[int],
    *,
    alone: bool,
) -> None:
    """Write up to so many tokens more after each; unless they are all there is, the last few may be left for later."""
    live = list(texts)
    prompts, lanes = [len(text.row[1]) for text in texts], [text.row[0] for text in texts]
    batch = Batch.of([text.ids for text in texts], lm.device, left=True, prompts=prompts, lanes=lanes)
    since, cache = known.past(batch, more) if known else (0, roomy(lm.model, batch.ids.shape[1] + more))
    ids, mask = batch.ids[:, since:], batch.mask
    now = Pass(mask, batch.ends, lanes=batch.lanes)
    with replacing_input(lm.anatomy.head, lambda hidden: hidden[:, -1:]):
        for step in range(more):
            with passing(now):
                out = _forward_on(lm, ids, mask, cache)
            cache = out.past_key_values
            tokens = choose(out.logits[:, -1], [text.row for text in live])
            for text, token in zip(live, tokens.tolist(), strict=True):
                if text.left > 0:
                    text.add(token, stop, end)
            stay = _that_stay(live)
            if not stay or not (alone or _worth_while(live, more - step - 1)):
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


_FEW, _ENOUGH = 2, 16
"""Products with more rows than the first and fewer than the second take longer than with the second: twice as long with 8."""


def _that_stay(live: Sequence[_Text]) -> list[int]:
    """Which rows of a batch go on: those that have not ended, and some that have where fewer would take longer."""
    going = [row for row, text in enumerate(live) if text.left > 0]
    spare = _ENOUGH - len(going) if _FEW < len(going) < _ENOUGH else 0
    return sorted([*going, *[row for row, text in enumerate(live) if text.left <= 0][:spare]])


def _worth_while(live: Sequence[_Text], steps: int) -> bool:
    """Whether a batch goes on: it has rows enough, or to read the rest again among others would take as long."""
    going = [len(text.ids) for text in live if text.left > 0]
    return len(going) >= _ENOUGH or 2 * sum(going) >= ONE_PASS * steps
