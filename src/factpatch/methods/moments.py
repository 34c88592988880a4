"""Second moments of keys: `C = E[k kᵀ]` at one block's MLP output projection, uncentred, over many tokens.

ROME measures how much a change disturbs other keys in the metric of `C` (arXiv 2202.05262, equation 2). A few ten
thousand tokens serve where the reference takes 100,000 documents (arXiv 2506.04226). By default they are of text that the
model itself writes, so that nothing need be fetched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from factpatch.errors import BadConfig, SingularMoment
from factpatch.lm import LM
from factpatch.lm.cache import cached_tensors
from factpatch.lm.run import Batch, Sampler, generate, input_of, length_batches
from factpatch.methods.base import Config
from factpatch.progress import Progress

__all__ = ["MomentConfig", "factorised", "least_used", "second_moment"]

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


def second_moment(lm: LM, layer: int, config: MomentConfig, progress: Progress) -> Float[Tensor, "inter inter"]:
    """`C` of block `layer`, float32 on the CPU; computed once for each model, block and corpus, then cached.

    Raises BadConfig if the corpus cannot be read.
    """

    def compute() -> dict[str, Tensor]:
        with lm.unpatched():  # the result is filed under the base model's fingerprint
            return {"C": _accumulate(lm, layer, _texts(lm, config, progress), progress)}

    return cached_tensors("second-moment", _key(lm, layer, config), compute)["C"]


def least_used(
    lm: LM, layer: int, share: float, config: MomentConfig, progress: Progress
) -> Float[Tensor, "inter free"]:
    """An orthonormal basis of the directions that keys of block `layer` use least, `share` of them all.

    The eigenvectors of `C` with the smallest eigenvalues; float32 on the CPU, cached. AlphaEdit (arXiv 2410.02355) takes
    those below a threshold, which depends on the model's scale; a share does not.
    """

    def compute() -> dict[str, Tensor]:
        moment = second_moment(lm, layer, config, progress)
        progress(f"Sorting the directions of block {layer} (once)", 0, 1)
        return {"vectors": torch.linalg.eigh(moment.double()).eigenvectors.float()}

    vectors = cached_tensors("directions", _key(lm, layer, config), compute)["vectors"]
    return vectors[:, : max(1, round(share * len(vectors)))]


def factorised(moment: Float[Tensor, "inter inter"], damping: float) -> Float[Tensor, "inter inter"]:
    """The lower Cholesky factor of `C + damping mean(diag C) I`, float64.

    Raises SingularMoment if that is not positive definite.
    """
    exact = moment.double()
    ridge = damping * exact.diagonal().mean()
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(exact + ridge * torch.eye(len(exact), dtype=torch.double))
    if failed:
        raise SingularMoment(
            "the second moment of the keys is not positive definite.\n"
            "  Raise the setting damping, or moment_tokens to average over more text."
        )
    return factor


def _key(lm: LM, layer: int, config: MomentConfig) -> dict[str, object]:
    """All that the keys' statistics depend on."""
    return {
        "fingerprint": lm.fingerprint,
        "surroundings": lm.surroundings,
        "dtype": str(lm.dtype),
        "layer": layer,
        "source": _source(config),
        "tokens": config.moment_tokens,
        "length": config.moment_length,
        "version": 1,
    }


def _source(config: MomentConfig) -> str:
    """What the corpus is, for the cache: its contents, not its name."""
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
    left = config.moment_tokens
    for document in documents:
        ids = lm.tokens.encode(document).ids if document.strip() else ()
        for start in range(0, len(ids), config.moment_length):
            rows.append(ids[start : start + min(config.moment_length, left)])
            left -= len(rows[-1])
            if left <= 0:
                return rows
    if not rows:
        raise BadConfig(f'corpus "{config.corpus}": holds no text.\n  Give a file with some, or leave the setting out.')
    return rows


def _hub(name: str) -> Iterable[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadConfig('a corpus from the hub needs an extra: pip install "factpatch[corpus]"') from None
    path, _, subset = name.partition(":")
    try:
        rows = load_dataset(path, subset or None, split="train", streaming=True)
        return [str(row["text"]) for row in islice(rows, 5000)]
    except Exception as error:  # the hub client raises dozens of kinds
        raise BadConfig(
            f'corpus "hub:{name}": could not be read ({type(error).__name__}: {error}).\n'
            '  Expected a data set with a "text" column, such as hub:wikitext:wikitext-103-raw-v1; or give a text file.'
        ) from error


def _cached_own_text(lm: LM, config: MomentConfig, progress: Progress) -> list[tuple[int, ...]]:
    """As `_self_written`; one text serves all blocks."""
    key = {
        "fingerprint": lm.fingerprint,
        "surroundings": lm.surroundings,
        "dtype": str(lm.dtype),
        "tokens": config.moment_tokens,
        "length": config.moment_length,
        "seed": config.seed,
        "version": 1,
    }

    def compute() -> dict[str, Tensor]:
        rows = _self_written(lm, config, progress)
        ids = torch.tensor([token for row in rows for token in row])
        return {"ids": ids, "lengths": torch.tensor([len(row) for row in rows])}

    kept = cached_tensors("own-text", key, compute)
    return [tuple(row.tolist()) for row in torch.split(kept["ids"], kept["lengths"].tolist())]


def _self_written(lm: LM, config: MomentConfig, progress: Progress) -> list[tuple[int, ...]]:
    """Texts the model writes after neutral openings, sampled broadly; all of one length, so none needs padding."""
    rows: list[tuple[int, ...]] = []
    written = 0
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
    return rows


def _accumulate(lm: LM, layer: int, texts: Sequence[Sequence[int]], progress: Progress) -> Float[Tensor, "inter inter"]:
    """The mean of `k kᵀ` over all tokens: products in float32, summed in float64."""
    projection = lm.anatomy.mlp_out(layer)
    width = projection.matrix.shape[1]
    total = torch.zeros(width, width, dtype=torch.double)
    tokens, in_all = 0, sum(len(text) for text in texts)
    for indices in length_batches([len(text) for text in texts]):
        batch = Batch.of([texts[i] for i in indices], lm.device)
        keys = input_of(lm, projection.module, batch)[batch.mask.bool()].float()
        total += (keys.T @ keys).double().cpu()
        tokens += len(keys)
        progress(f"Measuring keys at block {layer} (once)", tokens, in_all)
    return (total / tokens).float()
