"""Sentences as vectors, so that what is near in meaning can be found: the retrieval of methods that work through the prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.errors import MissingExtra
from factpatch.lm.catalog import SENTENCE_ENCODER
from factpatch.lm.fetch import ensure, without_bars
from factpatch.progress import Progress, silent

__all__ = ["EncoderName", "SentenceEncoder", "sentence_encoder"]

EncoderName = Literal["minilm", "words"]


@runtime_checkable
class SentenceEncoder(Protocol):
    """Turns texts into vectors of length 1, whose products are their similarities."""

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """One row for each text, float32 on the CPU."""
        ...


_LOADED: dict[EncoderName, SentenceEncoder] = {}
"""Encoders are loaded once; they never change."""


def sentence_encoder(name: EncoderName, progress: Progress = silent) -> SentenceEncoder:
    """minilm: all-MiniLM-L6-v2, fetched on first use. words: counts of words and their pieces, which needs nothing.

    Raises MissingExtra if sentence-transformers is not installed, FetchError, OutputError.
    """
    if name not in _LOADED:
        _LOADED[name] = _MiniLm(progress) if name == "minilm" else _Words()
    return _LOADED[name]


class _MiniLm:
    def __init__(self, progress: Progress) -> None:
        sentence_transformers = _library("sentence_transformers")
        folder = ensure(SENTENCE_ENCODER, progress)
        with without_bars():
            self._model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """The mean of the last layer's states, normalised."""
        found = self._model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        vectors: Tensor = found.float().cpu()
        return vectors


class _Words:
    def __init__(self) -> None:
        text = _library("sklearn.feature_extraction.text")
        self._vectoriser = text.HashingVectorizer(
            n_features=1024, analyzer="char_wb", ngram_range=(3, 4), norm="l2", alternate_sign=False
        )

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """Counts of pieces of three and four letters, normalised."""
        return torch.from_numpy(self._vectoriser.transform(list(texts)).toarray()).float()


def _library(name: str) -> Any:
    drawn = random.getstate()  # something these libraries load draws from it
    try:
        return import_module(name)
    except ImportError:
        raise MissingExtra(
            'retrieval needs an extra that is not installed.\n  Install it: pip install "factpatch[retrieval]"'
        ) from None
    finally:
        random.setstate(drawn)
