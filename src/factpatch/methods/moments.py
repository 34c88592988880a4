"""Second moments of keys: `C = E[k kᵀ]` at a block's MLP output projection, uncentred, over many tokens.

ROME measures how much a change disturbs other keys in the metric of `C` (arXiv 2202.05262, equation 2). A few ten
thousand tokens serve where the reference takes 100,000 documents (arXiv 2506.04226). By default they are of text that the
model itself writes, so that nothing need be fetched.

What is slow is done once: moments and directions on disk, for each model; the matrices that solves need of them in memory,
while the model is in hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from factpatch.errors import BadConfig, OutputError, SingularMoment
from factpatch.files import cache_root
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.batches import BATCH_TOKENS, Batch, by_rows, length_batches
from factpatch.lm.cache import Unfinished, cached_each, cached_tensors
from factpatch.lm.hooks import reading
from factpatch.lm.run import input_of
from factpatch.lm.writing import Sampler, generate
from factpatch.methods.base import Config
from factpatch.methods.insertion import with_room
from factpatch.methods.needs import Held, Preparation, Stage, kept_keys, widest_pass
from factpatch.progress import Progress
from factpatch.words import counted

__all__ = [
    "MomentConfig",
    "directions",
    "directions_needed",
    "factorised",
    "factors_held",
    "least_used",
    "making_factor",
    "metric_factor",
    "moments_needed",
    "packed",
    "second_moment",
    "second_moments",
    "unpacked",
]

_KEEP_EVERY = 20.0
"""Seconds between two times at which unfinished sums are kept."""

_MOST_AT_HAND = 8 << 30
"""Bytes that the matrices kept with one model may take together: MEMIT's five of Llama-2-7B take 2.4 GB."""

_OPENINGS = (
    "The history of", "The city of", "The capital of", "The president of", "The author of", "The novel", "The film",
    "The river", "The company", "The university", "The language", "The species", "The theory of", "The battle of",
    "The king of", "The album", "The team", "The museum", "The museum of", "The mountain", "Born in", "In the year",
    "In 1990,", "In the 19th century,", "During the war,", "According to", "Researchers at", "Scientists have",
    "One of the most famous", "The first", "The largest", "The name of", "My name is", "Dear", "Question:", "How to",
    "What is", "Once upon a time", "She was", "He was", "They are", "This article", "The following", "Chapter 1",
    "The purpose of", "The government of", "An important", "The main", "Some people", "Many of the", "It is located in",
    "The word", "A recipe for", "The law of", "Music by", "The plays of", "The population of", "The economy of",
    "The church of", "The school", "The game", "The island of", "The art of", "The sister of",
)  # fmt: skip


class MomentConfig(Config):
    """Settings of the second moment."""

    corpus: str | None = Field(
        default=None,
        description="text file to read, or hub:NAME for a data set of the hub; default: text the model writes",
    )
    moment_tokens: PositiveInt = Field(default=16_384, description="tokens to average over")
    moment_length: PositiveInt = Field(default=128, description="longest text, in tokens")
    damping: PositiveFloat = Field(default=1e-3, description="added to the diagonal of C, in units of its mean")


def second_moments(
    lm: LM, layers: Iterable[int], config: MomentConfig, progress: Progress
) -> dict[int, Float[Tensor, "inter inter"]]:
    """`C` of each of these blocks, float32 on the CPU; computed once for each model, block and corpus, then cached.

    What is missing is gathered in one pass over the text. A pass that was cut off is gone on with where it was, and
    ends with the same numbers to the bit. Raises BadConfig if the corpus cannot be read, AnatomyError.
    """
    keys = _keys(lm, layers, config)

    def compute(missing: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        with lm.unpatched():  # the result is filed under the base model's fingerprint
            sites = {layer: lm.anatomy.mlp_out(layer) for layer in missing}
            texts = _texts(lm, config, progress)
            totals = _accumulate(lm, sites, keys, texts, progress)
        tokens = sum(len(text) for text in texts)
        for layer in missing:
            yield {"C": totals.pop(layer).div_(tokens).float()}

    return {layer: found["C"] for layer, found in cached_each("second-moment", keys, compute).items()}


def second_moment(lm: LM, layer: int, config: MomentConfig, progress: Progress) -> Float[Tensor, "inter inter"]:
    """As `second_moments`, of one block."""
    return second_moments(lm, [layer], config, progress)[layer]


def metric_factor(
    lm: LM, layer: int, config: MomentConfig, progress: Progress, *, beside: Iterable[int] = ()
) -> Float[Tensor, "inter inter"]:
    """`factorised(C, damping)` of block `layer`, where the model lies; computed once while it is in hand.

    beside  blocks whose moments will be wanted too, and are gathered in the same pass if they are missing
    """

    def compute() -> Tensor:
        moment = second_moments(lm, {layer, *beside}, config, progress)[layer]
        return packed(with_room(lm.device, lambda place: factorised(moment.to(place), config.damping))).cpu()

    folded = _at_hand(lm, ("factor", config.damping, _described(lm, layer, config)), compute)
    return with_room(lm.device, lambda place: unpacked(folded.to(place)))


def directions(
    lm: LM, layers: Iterable[int], config: MomentConfig, progress: Progress
) -> dict[int, Float[Tensor, "inter inter"]]:
    """All directions of the keys of each of these blocks, as orthonormal columns, the least used first.

    The eigenvectors of `C`, by eigenvalue; float32 on the CPU, cached. Raises what `second_moments` raises.
    """
    keys = _keys(lm, layers, config)

    def compute(missing: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        moments = second_moments(lm, missing, config, progress)
        for i, layer in enumerate(missing):
            progress(f"Sorting the directions of block {layer} (once)", i, len(missing))
            moment = moments.pop(layer)
            yield {"vectors": with_room(lm.device, partial(_eigenvectors, moment))}

    return {layer: found["vectors"] for layer, found in cached_each("directions", keys, compute).items()}


def _eigenvectors(moment: Float[Tensor, "inter inter"], place: torch.device) -> Float[Tensor, "inter inter"]:
    """By eigenvalue, found in float64."""
    vectors: Tensor
    _, vectors = torch.linalg.eigh(moment.to(place, torch.double))
    return vectors.float()


def least_used(
    lm: LM, layer: int, share: float, config: MomentConfig, progress: Progress, *, beside: Iterable[int] = ()
) -> Float[Tensor, "inter free"]:
    """An orthonormal basis of the directions that keys of block `layer` use least, `share` of them all.

    float64, where the model lies; read once while it is in hand. AlphaEdit (arXiv 2410.02355) takes the directions with
    eigenvalues below a threshold, which depends on the model's scale; a share does not.

    beside  blocks whose directions will be wanted too; their moments are gathered in the same pass if they are missing
    """

    def compute() -> Tensor:
        vectors = directions(lm, {layer, *beside}, config, progress)[layer]
        return vectors[:, : max(1, round(share * len(vectors)))].clone()

    # Kept as they were stored, in half the room.
    kept = _at_hand(lm, ("least used", share, _described(lm, layer, config)), compute)
    return with_room(lm.device, lambda place: kept.to(place, torch.double))


def factorised(moment: Float[Tensor, "inter inter"], damping: float) -> Float[Tensor, "inter inter"]:
    """The lower Cholesky factor of `C + damping mean(diag C) I`, float64.

    Raises SingularMoment if that is not positive definite.
    """
    damped = moment.to(torch.double, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise SingularMoment(
            "the second moment of the keys is not positive definite.\n"
            "  Raise the setting damping, or moment_tokens to average over more text."
        )
    return factor


def moments_needed(
    lm: LM, layers: Iterable[int], config: MomentConfig
) -> tuple[tuple[Preparation, ...], tuple[Stage, ...]]:
    """What `second_moments` will have to make for these blocks, and the stages in which it does; `lm` may lack its weights."""
    keys = _keys(lm, layers, config)
    missing = _missing("second-moment", keys)
    squares = {layer: _width(lm, layer) ** 2 for layer in keys}
    tokens = config.moment_tokens if missing else 0
    preparations = [
        Preparation(
            what="second moments of keys",
            blocks=tuple(keys),
            missing=missing,
            tokens=tokens,
            bytes=4 * sum(squares.values()),
        )
    ]
    if not missing:
        return tuple(preparations), ()
    stages: list[Stage] = []
    batch = min(BATCH_TOKENS, tokens)
    if config.corpus is None and _missing("own-text", {0: _text_key(lm, config)}):
        preparations.insert(0, Preparation(what="text that the model writes", missing=(), tokens=tokens))
        stages.append(Stage(doing="Writing text", held=(kept_keys(lm, batch), widest_pass(lm, len(_OPENINGS)))))
    size = max(squares[layer] for layer in missing)
    sums = 8 * sum(squares[layer] for layer in missing)
    measuring = (
        widest_pass(lm, batch),
        Held(what=f"sums of {counted(len(missing), 'block')}, float64", bytes=sums, host=True),
        Held(what="one batch's products", bytes=4 * size),
        Held(what="the same where they are summed, and what is written to disk", bytes=8 * size, host=True),
    )
    return tuple(preparations), (*stages, Stage(doing="Measuring keys", held=measuring))


def directions_needed(
    lm: LM, layers: Iterable[int], config: MomentConfig
) -> tuple[tuple[Preparation, ...], tuple[Stage, ...]]:
    """As `moments_needed`, for `directions`."""
    keys = _keys(lm, layers, config)
    missing = _missing("directions", keys)
    squares = {layer: _width(lm, layer) ** 2 for layer in keys}
    own = Preparation(what="directions of keys", blocks=tuple(keys), missing=missing, bytes=4 * sum(squares.values()))
    if not missing:
        return (own,), ()
    preparations, stages = moments_needed(lm, missing, config)
    # LAPACK's divide and conquer takes twice the matrix beside the matrix and its vectors.
    sorting = (
        Held(what="second moments", bytes=4 * sum(squares[layer] for layer in missing), host=True),
        Held(
            what="one of them in float64, its eigenvectors and what they are found with",
            bytes=32 * max(squares[layer] for layer in missing),
        ),
    )
    return (*preparations, own), (*stages, Stage(doing="Sorting directions", held=sorting))


def making_factor(width: int, others: int = 0) -> Stage:
    """What `metric_factor` holds when it makes the factor of a block whose keys are so wide, those of others being kept."""
    made = Held(what="a moment, its copy in float64, and the factor", bytes=20 * width**2)
    return Stage(doing="Factorising second moments", held=(made, *_kept(width, others)))


def factors_held(width: int, count: int = 1) -> tuple[Held, ...]:
    """So many factors at hand, and one taken out."""
    return (*_kept(width, count), Held(what="one of them taken out", bytes=8 * width**2))


def _kept(width: int, count: int) -> tuple[Held, ...]:
    kept = min(count * 4 * width * (width + 2), _MOST_AT_HAND)
    return (
        (Held(what=f"factors of {counted(count, 'block')}, float64, packed", bytes=kept, host=True),) if count else ()
    )


def _width(lm: LM, layer: int) -> int:
    return int(lm.anatomy.mlp_out(layer).matrix.shape[1])


def _missing(kind: str, keys: Mapping[int, Mapping[str, object]]) -> tuple[int, ...]:
    """Those of these that are not in the cache. Only the heads of files are read."""
    filed: list[object] = []
    for path in (cache_root() / "statistics" / kind).glob("*.safetensors"):
        with suppress(OSError, SafetensorError, KeyError, TypeError, ValueError), safe_open(path, "pt") as file:
            filed.append(json.loads(file.metadata()["key"]))
    return tuple(layer for layer, key in keys.items() if key not in filed)


def packed(factor: Float[Tensor, "n n"]) -> Float[Tensor, "rows half"]:
    """A lower triangle without the zeros above it: `n + 1` rows of half the width, rounded up.

    The left half of the columns stands one row lower, and the lower right triangle lies turned over above its diagonal.
    """
    n, half = len(factor), (len(factor) + 1) // 2
    folded = factor.new_zeros(n + 1, half)
    folded[1:] = factor[:, :half]
    folded[: n - half, : n - half] += factor[half:, half:].T
    return folded


def unpacked(folded: Float[Tensor, "rows half"]) -> Float[Tensor, "n n"]:
    """The lower triangle that `packed` was given."""
    n, half = len(folded) - 1, folded.shape[1]
    factor = folded.new_zeros(n, n)
    factor[:, :half] = folded[1:]
    factor[:half, :half].tril_()
    factor[half:, half:] = folded[: n - half, : n - half].triu().T
    return factor


class _AtHand:
    """Matrices kept from one fit to the next; those not asked for the longest are dropped when all take too much."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        found = self._kept.pop(key) if key in self._kept else compute()
        self._kept[key] = found  # the last in order
        while sum(tensor.nbytes for tensor in self._kept.values()) > _MOST_AT_HAND:
            del self._kept[next(iter(self._kept))]
        return found


def _at_hand(lm: LM, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """A matrix of the base model, computed once or again where memory was short; `key` holds all else it depends on."""
    return lm.once("matrices at hand", _AtHand).get(key, compute)


def _keys(lm: LM, layers: Iterable[int], config: MomentConfig) -> dict[int, dict[str, object]]:
    """For each block, all that its keys' statistics depend on."""
    shared = {
        "fingerprint": lm.fingerprint,
        "surroundings": lm.surroundings,
        "dtype": str(lm.dtype),
        "source": _source(config),
        "tokens": config.moment_tokens,
        "length": config.moment_length,
        "version": 1,
    }
    return {layer: {**shared, "layer": layer} for layer in sorted(set(layers))}


def _described(lm: LM, layer: int, config: MomentConfig) -> str:
    """The same of one block, in a form that can be a key."""
    return json.dumps(_keys(lm, [layer], config)[layer])


def _source(config: MomentConfig) -> str:
    """What the corpus is, for the cache: a file's contents; the name of a set on the hub."""
    if config.corpus is None:
        return f"self-written, seed {config.seed}"
    if config.corpus.startswith("hub:"):
        return config.corpus
    return hashlib.sha256(_read(config.corpus).encode()).hexdigest()


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(
            f'corpus "{path}": cannot be read as UTF-8 text ({error}).\n'
            "  Give a text file or hub:NAME, or leave the setting out to use text the model writes."
        ) from None


def _texts(lm: LM, config: MomentConfig, progress: Progress) -> list[tuple[int, ...]]:
    """Token rows of at most `moment_length`, `moment_tokens` in all or as many as there are."""
    if config.corpus is None:
        return _cached_own_text(lm, config, progress)
    documents = _hub(config.corpus[4:]) if config.corpus.startswith("hub:") else _read(config.corpus).split("\n\n")
    rows: list[tuple[int, ...]] = []
    left, length = config.moment_tokens, min(config.moment_length, lm.tokens.limit or config.moment_length)
    for document in documents:
        ids = lm.tokens.ids(document) if document.strip() else ()
        for start in range(0, len(ids), length):
            rows.append(ids[start : start + min(length, left)])
            left -= len(rows[-1])
            if left <= 0:
                return rows
    if not rows:
        raise BadConfig(f'corpus "{config.corpus}": holds no text.\n  Give a file with some, or leave the setting out.')
    return rows


def _hub(name: str) -> Iterator[str]:
    """Documents one by one, for a few usually suffice."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadConfig('a corpus from the hub needs an extra: pip install "factpatch[corpus]"') from None
    path, _, subset = name.partition(":")
    try:
        rows = load_dataset(path, subset or None, split="train", streaming=True)
        yield from (str(row["text"]) for row in islice(rows, 5000))
    except Exception as error:  # the hub client raises dozens of kinds
        raise BadConfig(
            f'corpus "hub:{name}": could not be read ({type(error).__name__}: {error}).\n'
            '  Expected a data set with a "text" column, such as hub:wikitext:wikitext-103-raw-v1; or give a text file.'
        ) from error


def _cached_own_text(lm: LM, config: MomentConfig, progress: Progress) -> list[tuple[int, ...]]:
    """As `_self_written`; one text serves all blocks."""
    key = _text_key(lm, config)

    def compute() -> dict[str, Tensor]:
        return _packed(_self_written(lm, config, Unfinished("own-text", key), progress))

    return _rows(cached_tensors("own-text", key, compute))


def _text_key(lm: LM, config: MomentConfig) -> dict[str, object]:
    """All that the text a model writes depends on."""
    return {
        "fingerprint": lm.fingerprint,
        "surroundings": lm.surroundings,
        "dtype": str(lm.dtype),
        "tokens": config.moment_tokens,
        "length": config.moment_length,
        "seed": config.seed,
        "version": 1,
    }


def _packed(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Token rows, to be kept."""
    ids = torch.tensor([token for row in rows for token in row])
    return {"ids": ids, "lengths": torch.tensor([len(row) for row in rows])}


def _rows(packed: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """From what `_packed` gave."""
    return [tuple(row.tolist()) for row in torch.split(packed["ids"], packed["lengths"].tolist())]


def _self_written(lm: LM, config: MomentConfig, unfinished: Unfinished, progress: Progress) -> list[tuple[int, ...]]:
    """Texts the model writes after neutral openings, sampled broadly; all of one length, so none needs padding.

    Each round is kept in `unfinished`, and those that are there already are not written again.
    """
    kept = unfinished.read()
    rows = [] if kept is None else _rows(kept)
    written = sum(len(row) for row in rows)
    while written < config.moment_tokens:
        progress("Writing text to measure the model on (once)", written, config.moment_tokens)
        prompts = [lm.tokens.encode(opening).ids for opening in _OPENINGS]
        # Another seed each round; one sampling stream belongs to one prompt.
        sampler = Sampler(seed=config.seed + len(rows), top_k=200)
        for prompt, ids in zip(
            prompts, generate(lm, prompts, max_new=config.moment_length, choose=sampler), strict=True
        ):
            row = (*prompt, *ids)[: min(config.moment_length, config.moment_tokens - written)]
            if row:
                rows.append(row)
                written += len(row)
        if written < config.moment_tokens:
            unfinished.keep(_packed(rows))
    return rows


@dataclass
class _Sum:
    """The sum of `k kᵀ` at one projection, over the first `done` batches: products in float32, summed in float64."""

    site: Projection
    total: Float[Tensor, "inter inter"]
    done: int
    unfinished: Unfinished

    @classmethod
    def begun(cls, site: Projection, unfinished: Unfinished) -> _Sum:
        """Over those batches that were kept; over none if none were."""
        kept = unfinished.read()
        if kept is None:
            width = site.matrix.shape[1]
            return cls(site, torch.zeros(width, width, dtype=torch.double), 0, unfinished)
        return cls(site, kept["total"], int(kept["done"]), unfinished)

    def add(self, mask: Bool[Tensor, "batch seq"], read: Tensor, _: Tensor) -> None:
        """One batch, while the projection reads it."""
        keys = by_rows(read)[mask].float()
        self.total += (keys.T @ keys).cpu()

    def keep(self) -> None:
        """For when this process is killed; where there is no room for that, the work goes on without."""
        with suppress(OutputError):
            self.unfinished.keep({"total": self.total, "done": torch.tensor(self.done)})


def _accumulate(
    lm: LM,
    sites: Mapping[int, Projection],
    keys: Mapping[int, Mapping[str, object]],
    texts: Sequence[Sequence[int]],
    progress: Progress,
) -> dict[int, Float[Tensor, "inter inter"]]:
    """The sum of `k kᵀ` over all tokens at each of these blocks, in one pass; float64 on the CPU."""
    batches = [[tuple(texts[i]) for i in indices] for indices in length_batches([len(text) for text in texts])]
    # How many batches are done means nothing if the batches are others, such as after an upgrade.
    work = "sums over batches " + hashlib.sha256(repr(batches).encode()).hexdigest()
    sums = {layer: _Sum.begun(site, Unfinished("second-moment", keys[layer], work)) for layer, site in sites.items()}
    doing = f"Measuring keys at block{'s' if len(sums) > 1 else ''} {', '.join(map(str, sums))} (once)"
    tokens, in_all = 0, sum(len(text) for text in texts)
    keep_at = monotonic() + _KEEP_EVERY
    for number, rows in enumerate(batches):
        # Blocks may have come to different batches, if they were not begun or not kept together.
        behind = {layer: each for layer, each in sums.items() if each.done == number}
        if behind:
            _add(lm, behind, Batch.of(rows, lm.device))
        tokens += sum(len(row) for row in rows)
        progress(doing, tokens, in_all)
        now = monotonic()
        if now >= keep_at and tokens < in_all:
            for each in behind.values():
                each.keep()
            # Sums of a large model take a gigabyte for each block; a tenth of the time is enough for writing them.
            keep_at = monotonic() + max(_KEEP_EVERY, 9 * (monotonic() - now))
    return {layer: each.total for layer, each in sums.items()}


def _add(lm: LM, sums: Mapping[int, _Sum], batch: Batch) -> None:
    """One batch to each of the sums; the model runs as far as the highest of these blocks."""
    with ExitStack() as hooks:
        for each in sums.values():
            hooks.enter_context(reading(each.site.module, partial(each.add, batch.mask.bool())))
        input_of(lm, sums[max(sums)].site.module, batch)
    for each in sums.values():
        each.done += 1
