"""Causal tracing: where in a model a fact passes from the subject to the answer.

ROME, section 2 (Meng et al., NeurIPS 2022, arXiv 2202.05262). Three kinds of run: clean; corrupted, with noise on the
embeddings of the subject's tokens; and corrupted with something restored, at one token and one block, to what it was in the
clean run. How much of the answer's probability comes back is the indirect effect of that place.

All places of one block share the corrupted run beneath it, places at one token the keys and values of the columns before,
and all samples of noise one batch; the head reads the last column alone.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from factpatch.analysis.facts import Fact, from_telling
from factpatch.data import read
from factpatch.errors import AnatomyError, BadConfig
from factpatch.lm import LM
from factpatch.lm.batches import BATCH_TOKENS, Pass, by_rows, passing
from factpatch.lm.hooks import reading, recording, replacing_input, replacing_output, resuming
from factpatch.lm.kv import begun, roomy
from factpatch.lm.run import can_resume, evaluating, of_any_shape
from factpatch.lm.tokens import Encoded
from factpatch.progress import Progress, silent
from factpatch.progress import part as part_of

__all__ = [
    "PARTS",
    "ROLES",
    "AverageTrace",
    "Part",
    "Trace",
    "average",
    "encoded_fact",
    "shares",
    "subject_noise",
    "suggested_layer",
    "trace",
    "trace_all",
    "usual_window",
    "window_at",
]

Part = Literal["state", "mlp", "attention"]
"""What is restored: what a block puts out, or what its MLP or its attention adds to the residual stream."""

PARTS: tuple[Part, ...] = get_args(Part)

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)
"""What a token can be in a prompt. Each has one role; those before the subject, where nothing is harmed, have none.

A subject of one token has a last token only, and a prompt that ends with its subject has no last token beside that.
"""

_WINDOW = 10
_ENOUGH_TOKENS = 128
"""In a batch on a CPU; with more, products take no less time for each."""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Where one fact is, by one part; probabilities of the first token of the answer that tells something.

    window     how many blocks are restored together, those centred on one; clipped to the stack
    tokens     the prompt's tokens as text; those of the answer before the one asked for, such as a bare space, are the last
    subject    index of the subject's first token, and one past its last
    clean      unharmed
    corrupted  with noise, mean over samples
    restored   with noise, but for that token and block, mean over the same samples; float32 on the CPU
    asked      the token whose probability it is, as text
    """

    fact: Fact
    part: Part
    window: int
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    clean: float
    corrupted: float
    restored: Float[Tensor, "tokens layers"]
    asked: str = ""

    @property
    def effects(self) -> Float[Tensor, "tokens layers"]:
        """The indirect effect of each place: restored less corrupted."""
        return self.restored - self.corrupted


@dataclass(frozen=True, slots=True, eq=False)
class AverageTrace:
    """The mean over facts, with a row for each of `ROLES`; each fact counts once, whatever the number of its tokens.

    facts      how many there are
    clean      mean probability, unharmed
    corrupted  mean probability with noise
    effects    average indirect effect; nan where no fact has a token of that role
    errors     its standard error over facts; nan where fewer than two have one
    counts     how many facts have a token of each role
    """

    part: Part
    window: int
    facts: int
    clean: float
    corrupted: float
    effects: Float[Tensor, "roles layers"]
    errors: Float[Tensor, "roles layers"]
    counts: tuple[int, ...]


def trace(
    lm: LM,
    fact: Fact,
    *,
    part: Part = "state",
    window: int | None = None,
    samples: int = 10,
    noise: float = 3.0,
    seed: int = 0,
    chat: bool = False,
    progress: Progress = silent,
) -> Trace:
    """The answer's probability with each place restored in turn; the model is left as it is.

    part     what is restored; in a mixture of experts "mlp" is the sum of the experts and of what runs beside them
    window   how many blocks together; default: see `usual_window`
    samples  draws of noise, the same for all places
    noise    its standard deviation, in those of subject tokens' embeddings; see `subject_noise`
    chat     put the prompt into the model's chat template

    The fact need not be one that the model knows: `clean` tells. Raises TokenizerError if the subject is not in the prompt or
    the text is too long, BadConfig for settings out of bounds, AnatomyError where a block lacks the part.
    """
    layers = lm.anatomy.n_layers
    window = usual_window(part, layers) if window is None else window
    _check(part, window, samples, noise)
    whole = _encoded(lm, fact, chat=chat)
    text = from_telling(lm, whole)
    first, end = _span(text)
    draws = subject_noise(lm, text, samples=samples, noise=noise, seed=seed)
    sites = [_site(lm, part, layer) for layer in range(layers)]
    tokens = len(text.prompt_ids)
    corrupted, restored = 0.0, torch.zeros(tokens, layers)
    with torch.no_grad(), evaluating(lm.model):
        question = _Question(lm, text, prompt=whole.target, resumes=can_resume(lm))
        clean, kept = question.clean(sites)
        chunks = torch.split(draws, max(1, BATCH_TOKENS // tokens))
        for i, chunk in enumerate(chunks):
            told = part_of(progress, i, len(chunks))
            below = question.corrupted(chunk)
            corrupted += float(below.chances.sum())
            batches = list(question.columns(len(chunk), below))
            for number, columns in enumerate(batches):
                batch = _Restored(question, below, columns)
                for layer in range(layers):
                    told("Tracing", number * layers + layer, len(batches) * layers)
                    blocks = window_at(layer, window, layers)
                    restored[batch.columns, layer] += batch.chances(part, sites, kept, blocks)
                del batch  # each holds keys and values of all its rows: one at a time
        progress("Tracing", 1, 1)
    # What comes before the subject is unharmed, so that nothing is restored there.
    restored[:first] = corrupted
    names = tuple(_as_text(lm, token) for token in text.prompt_ids)
    asked = _as_text(lm, question.token)
    return Trace(fact, part, window, names, (first, end), clean, corrupted / samples, restored / samples, asked)


def trace_all(
    lm: LM,
    facts: Sequence[Fact],
    *,
    part: Part = "state",
    window: int | None = None,
    samples: int = 10,
    noise: float = 3.0,
    seed: int = 0,
    chat: bool = False,
    progress: Progress = silent,
) -> list[Trace]:
    """`trace` for each fact, in the order given; each is what it would be alone."""
    return [
        trace(lm, fact, part=part, window=window, samples=samples, noise=noise, seed=seed, chat=chat, progress=told)
        for fact, told in zip(facts, shares(lm, facts, progress, chat=chat), strict=True)
    ]


def shares(lm: LM, facts: Sequence[Fact], progress: Progress, *, chat: bool = False) -> list[Progress]:
    """For the trace of each fact, what reports on it as a part of them all: in places, of which long prompts have more."""
    layers = lm.anatomy.n_layers
    texts = [encoded_fact(lm, fact, chat=chat) for fact in facts]
    sizes = [(len(text.prompt_ids) - _span(text)[0]) * layers for text in texts]
    starts = [0, *accumulate(sizes)]
    return [_share(progress, start, size, starts[-1]) for start, size in zip(starts, sizes, strict=False)]


def _share(progress: Progress, start: int, size: int, of: int) -> Progress:
    def report(doing: str, done: int, total: int | None) -> None:
        progress(doing, start + (size * done // total if total else 0), of)

    return report


def average(traces: Sequence[Trace]) -> AverageTrace:
    """The mean over facts, traced with one part and window on one model. Raises ValueError if they differ, or there are none."""
    if len({(own.part, own.window, own.restored.shape[1]) for own in traces}) != 1:
        raise ValueError("traces to average must be some, and of one part, one window and one model")
    first = traces[0]
    table = torch.stack([_by_role(own) for own in traces])
    has = ~table[:, :, 0].isnan()
    n = has.sum(0)[:, None]
    mean = table.nansum(0) / n  # 0 / 0 is nan
    spread = (table - mean).nan_to_num().square().sum(0)
    errors = torch.where(n > 1, (spread / (n - 1) / n).sqrt(), torch.nan)
    return AverageTrace(
        part=first.part,
        window=first.window,
        facts=len(traces),
        clean=sum(own.clean for own in traces) / len(traces),
        corrupted=sum(own.corrupted for own in traces) / len(traces),
        effects=mean,
        errors=errors,
        counts=tuple(n[:, 0].tolist()),
    )


def suggested_layer(average_mlp: AverageTrace) -> int:
    """The block with the greatest average indirect effect at the subject's last token: where ROME would edit."""
    effects = average_mlp.effects[ROLES.index("last subject token")]
    return int(effects.nan_to_num(-torch.inf).argmax())


def usual_window(part: Part, layers: int) -> int:
    """One block for states; for MLPs and attention 10 as in the paper, or a third of the stack where that is less."""
    return 1 if part == "state" else max(1, min(_WINDOW, layers // 3))


def window_at(layer: int, window: int, layers: int) -> range:
    """The blocks restored together, `window` of them centred on `layer` and clipped to the stack."""
    return range(max(0, layer - window // 2), min(layers, layer + (window + 1) // 2))


def encoded_fact(lm: LM, fact: Fact, *, chat: bool = False) -> Encoded:
    """Prompt, subject and answer in tokens, after what the patches on the model put before the prompt.

    Tokens of the answer that tell nothing, in front of one that does, are moved into the prompt; see `first_telling`.
    """
    return from_telling(lm, _encoded(lm, fact, chat=chat))


def _encoded(lm: LM, fact: Fact, *, chat: bool) -> Encoded:
    before = lm.before([fact.prompt])[fact.prompt]
    return lm.tokens.encode(fact.prompt, fact.answer, subject=fact.subject, prefix=before, chat=chat)


def subject_noise(
    lm: LM, text: Encoded, *, samples: int, noise: float, seed: int
) -> Float[Tensor, "samples subject width"]:
    """What is added to the embeddings of the subject's tokens: normal, float32 on the CPU.

    `noise` times the standard deviation of all entries of subject tokens' embeddings, over the subjects of the built-in
    sample. The draws depend on the seed and the prompt alone, and the first ones not on how many there are.
    """
    first, end = _span(text)
    deviation = lm.once(("deviation of subjects' embeddings",), lambda: _deviation(lm))
    digest = hashlib.sha256(repr((seed, text.prompt_ids)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    weight = lm.anatomy.embedding.weight
    assert isinstance(weight, Tensor)
    shape = (end - first, weight.shape[1])
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(samples)]) * (noise * deviation)


@torch.no_grad()
def _deviation(lm: LM) -> float:
    """Of what the embedding puts out, since some scale it."""
    subjects = dict.fromkeys(edit.subject for edit in read("sample").edits if edit.subject)
    texts = [lm.tokens.encode(subject, subject=subject) for subject in subjects]
    ids = [token for text in texts for token in text.ids[slice(*_span(text))]]
    embedded: Tensor = lm.anatomy.embedding(torch.tensor([ids], device=lm.device))
    return float(embedded.float().std())


@dataclass(frozen=True, slots=True, eq=False)
class _Corrupted:
    """A run of some samples with noise and nothing restored.

    noise    zero beyond the subject
    states   what each block puts out
    form     what a block returns: `states` in one of them, as `resuming` takes it
    past     keys and values of all columns; None if the model does not keep all it knows in such a cache
    chances  the answer's probability
    """

    noise: Float[Tensor, "samples tokens width"]
    states: list[Tensor]
    form: Any
    past: DynamicCache | None
    chances: Float[Tensor, " samples"]


class _Question:
    """What stands before one token of an answer, whose probability is asked in many runs.

    prompt   how many tokens the prompt has; those of the answer that tell nothing follow
    resumes  whether columns may run one after the other
    """

    def __init__(self, lm: LM, text: Encoded, *, prompt: int, resumes: bool) -> None:
        self.lm, self.ids, self.token = lm, text.prompt_ids, text.target_ids[0]
        self.prompt, self.resumes = prompt, resumes
        self.span = _span(text)
        # What these hooks do is in the states already when blocks are skipped.
        self.acted = [{*block._forward_hooks, *block._forward_pre_hooks} for block in lm.anatomy.blocks]

    def clean(self, sites: Sequence[nn.Module]) -> tuple[float, list[Tensor]]:
        """The probability, and what each site puts out, tokens by width."""
        kept: list[Tensor] = []
        with ExitStack() as stack:
            for site in sites:
                stack.enter_context(reading(site, lambda _, out: kept.append(by_rows(out)[0].clone())))
            chances = self.run(1)
        return float(chances[0]), kept

    def corrupted(self, draws: Float[Tensor, "samples subject width"]) -> _Corrupted:
        """With these draws of noise."""
        samples, tokens = len(draws), len(self.ids)
        noise = draws.new_zeros(samples, tokens, draws.shape[-1])
        noise[:, slice(*self.span)] = draws
        noise = noise.to(self.lm.device)
        states: list[Tensor] = []
        past = roomy(self.lm.model, tokens) if self.resumes else None
        with ExitStack() as stack:
            stack.enter_context(replacing_output(self.lm.anatomy.embedding, _adding(noise)))
            form = stack.enter_context(recording(self.lm.anatomy.block(0)))
            for block in self.lm.anatomy.blocks:
                # Copied, because some blocks go on to add to the very tensor they were given.
                stack.enter_context(reading(block, lambda _, out: states.append(by_rows(out).clone())))
            chances = self.run(samples, past=past)
        if past is not None and any(past.get_seq_length(i) != tokens for i in range(len(past.layers))):
            past = None
        return _Corrupted(noise, states, form[0], past, chances)

    def columns(self, samples: int, below: _Corrupted) -> Iterator[range]:
        """The columns from the subject on in batches: those that run together, each with all its samples."""
        column, tokens = self.span[0], len(self.ids)
        while column < tokens:
            width = tokens if below.past is None else tokens - column
            on_cpu = self.lm.device.type == "cpu" and below.past is not None
            most = min(BATCH_TOKENS // tokens, (_ENOUGH_TOKENS if on_cpu else BATCH_TOKENS) // width) // samples
            yield range(column, min(tokens, column + max(1, most)))
            column += max(1, most)

    def run(self, rows: int, *, since: int = 0, past: DynamicCache | None = None) -> Float[Tensor, " rows"]:
        """The probability in each of so many rows, all of this prompt; in the columns before `since` only `past` is known."""
        ids = torch.tensor([self.ids], device=self.lm.device).expand(rows, -1)
        mask, ends = torch.ones_like(ids), ids.new_full((rows,), self.prompt - 1)
        last = replacing_input(self.lm.anatomy.head, lambda hidden: hidden[:, -1:])
        with passing(Pass(mask, ends)), of_any_shape(), last:
            out = self.lm.model(
                input_ids=ids[:, since:], attention_mask=mask, past_key_values=past, use_cache=past is not None
            )
        logits: Tensor = out.logits[:, -1]
        return logits.float().softmax(-1)[:, self.token]


class _Restored:
    """Runs of all samples with one of these columns restored, from the first of them on where the earlier ones are kept."""

    def __init__(self, question: _Question, below: _Corrupted, columns: range) -> None:
        self.question, self.below = question, below
        self.columns = torch.tensor(list(columns))
        samples, device = len(below.noise), below.noise.device
        self._since = 0 if below.past is None else columns[0]
        self._sample = torch.arange(samples, device=device).repeat(len(columns))
        self._column = self.columns.to(device).repeat_interleave(samples)
        self._past: DynamicCache | None = None
        if below.past is not None:
            starts = [(sample, 0) for sample in self._sample.tolist()]
            self._past = begun(below.past, starts, self._since, len(question.ids))

    def chances(
        self, part: Part, sites: Sequence[nn.Module], clean: Sequence[Tensor], blocks: range
    ) -> Float[Tensor, " columns"]:
        """The probability with each column restored in these blocks, summed over samples."""
        anatomy, since, below = self.question.lm.anatomy, self._since, self.below
        # The first state to be restored need not be computed at all.
        skipped = blocks[0] + (part == "state")
        with ExitStack() as stack:
            if skipped:
                state = below.states[skipped - 1][self._sample, since:]
                if part == "state":
                    state = self._put(state, clean[blocks[0]])
                beneath = anatomy.blocks[:skipped]
                stack.enter_context(resuming(beneath, below.form, self.question.acted[:skipped]))
                stack.enter_context(replacing_output(beneath[-1], lambda *_: state))
            else:
                noise = below.noise[self._sample, since:]
                stack.enter_context(replacing_output(anatomy.embedding, _adding(noise)))
            for layer in range(skipped if part == "state" else blocks[0], blocks[-1] + 1):
                stack.enter_context(replacing_output(sites[layer], self._restoring(clean[layer])))
            rows = len(self._sample)
            found = self.question.run(rows, since=since, past=_lent(self._past))
        return found.reshape(len(self.columns), -1).sum(1).cpu()

    def _restoring(self, clean: Float[Tensor, "tokens width"]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda _, out: self._put(by_rows(out), clean).reshape(out.shape)

    def _put(
        self, out: Float[Tensor, "rows seq width"], clean: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "rows seq width"]:
        rows = torch.arange(len(out), device=out.device)
        return out.index_put((rows, self._column - self._since), clean[self._column])


def _adding(noise: Float[Tensor, "rows seq width"]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda _, out: out + noise.to(out.dtype)


def _lent(past: DynamicCache | None) -> DynamicCache | None:
    """A roomy cache to write into, while the one given goes on to show the columns it has."""
    if past is None:
        return None
    lent = copy.copy(past)
    lent.layers = [copy.copy(layer) for layer in past.layers]
    return lent


def _site(lm: LM, part: Part, layer: int) -> nn.Module:
    """The module whose output is restored.

    Of MLP and attention the output projection, because some architectures add the residual stream before either returns.
    """
    anatomy = lm.anatomy
    if part == "state":
        return anatomy.block(layer)
    if part == "attention":
        return anatomy.attention_out(layer).module
    try:
        return anatomy.mlp_out(layer).module
    except AnatomyError:
        experts: nn.Module | None = dict(anatomy.block(layer).named_modules()).get(anatomy.layout.mlp)
        if experts is None:
            raise
        return experts


def _span(text: Encoded) -> tuple[int, int]:
    assert text.begin is not None and text.subject is not None, "texts here are encoded with their subject"  # noqa: PT018
    return text.begin, text.subject + 1


def _as_text(lm: LM, token: int) -> str:
    """One token, special or not, for people to read."""
    text = lm.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _by_role(own: Trace) -> Float[Tensor, "roles layers"]:
    """The mean effect at this fact's tokens of each role; nan where it has none."""
    (first, end), last = own.subject, len(own.tokens) - 1
    tokens = {
        "first subject token": range(first, first + (end - first > 1)),
        "middle subject tokens": range(first + 1, end - 1),
        "last subject token": range(end - 1, end),
        "first token after": range(end, min(end + 1, last)),
        "further tokens": range(end + 1, last),
        "last token": range(max(end, last), last + 1),
    }
    return torch.stack([own.effects[list(tokens[role])].mean(0) for role in ROLES])  # the mean of none is nan


def _check(part: Part, window: int, samples: int, noise: float) -> None:
    wrong = {
        f'part "{part}"': part not in PARTS,
        f"window {window}": window < 1,
        f"samples {samples}": samples < 1,
        f"noise {noise}": not noise > 0,
    }
    for setting in (name for name, is_wrong in wrong.items() if is_wrong):
        raise BadConfig(
            f"cannot trace with {setting}.\n"
            f"  Parts are {', '.join(PARTS)}; a window and the samples are 1 or more, the noise is more than 0."
        )
