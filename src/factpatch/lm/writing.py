"""Let the model write: many texts at once, each token chosen greedily or drawn.

No text depends on batch order or size beyond float tolerance, and sampling is seeded by each text alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.lm.batches import Batch, Pass, length_batches, passing
from factpatch.lm.hooks import replacing_input
from factpatch.lm.kv import roomy
from factpatch.lm.prefix import ONE_PASS, Known, shared_batches
from factpatch.lm.run import Runnable, evaluating, forward_on

__all__ = ["Chooser", "Noting", "Sampler", "generate", "greedy"]

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
            for indices, known in shared_batches(
                lm, [text.ids for text in going], [len(text.ids) for text in going], more
            ):
                chosen = [going[i] for i in indices]
                # No row may run past what the model can read, an ended one that is kept neither.
                most = more if room is None else min(more, room - max(len(text.ids) for text in chosen) + 1)
                others = sum(text.left > 0 for text in going) - len(chosen)
                _write(lm, chosen, known, most, choose, stop, end, alone=others == 0)
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
    known: Known | None,
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
                out = forward_on(lm, ids, mask, cache)
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
