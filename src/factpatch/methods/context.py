"""Editing through the prompt: ICE, IKE and plain retrieval. The model's weights are never touched.

ICE        the survey, Zhang et al. 2024 (arXiv 2401.01286): the new fact before every question
IKE        Zheng et al., EMNLP 2023 (arXiv 2305.12740): demonstrations of how a new fact is used, then the fact
retrieval  the plain baseline that every editor should stand beside: the fact before the questions it is near to
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Generic, TypeVar

from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from factpatch.data import read
from factpatch.edits import Edit
from factpatch.lm import BaseLM
from factpatch.lm.encoder import EncoderName, sentence_encoder
from factpatch.methods.base import Config, Method, Traits, in_own_order
from factpatch.methods.facts import ASKING, fact_of, note_of
from factpatch.patches.context import ContextPatch, Note, Recall
from factpatch.progress import Progress, silent

__all__ = ["Ice", "Ike", "IkeConfig", "Retrieval", "RetrievalConfig"]


class RecallConfig(Config):
    """Settings of methods that find facts by meaning."""

    encoder: EncoderName = Field(
        default="minilm", description="what tells how near two texts are: minilm, or words (their pieces in common)"
    )


R = TypeVar("R", bound=RecallConfig)


class RetrievalConfig(RecallConfig):
    """Settings of retrieval."""

    similarity: float = Field(default=0.8, ge=-1, le=1, description="how similar a fact must be to be shown")
    most: PositiveInt = Field(default=1, description="facts shown with one question, at most")


class IkeConfig(RecallConfig):
    """Settings of IKE."""

    demonstrations: int = Field(default=16, ge=0, description="examples shown before the fact")
    corpus: str = Field(default="sample", description="edits to take them from, as NAME:PATH; see factpatch data")


class Ice(Method[Config]):
    """ICE: every new fact before every question, without demonstrations. What is unrelated is asked under them too."""

    name = "ice"
    config_type = Config
    traits = Traits(
        family="in context",
        phase="recognition",
        paper="Zhang et al. 2024, arXiv 2401.01286",
        patch=ContextPatch,
        joint=True,
        effort=0,
    )

    def make(self, lm: BaseLM, edits: tuple[Edit, ...], config: Config, progress: Progress) -> ContextPatch:  # noqa: ARG002
        """Write the facts down."""
        return ContextPatch(self.provenance(lm, config, edits), _facts(edits), ASKING)


class _Recalling(Method[R], Generic[R]):
    def prepare(self, lm: BaseLM, progress: Progress = silent) -> None:
        """Fetch the sentence encoder."""
        sentence_encoder(self.resolve(lm).encoder, progress)


class Retrieval(_Recalling[RetrievalConfig]):
    """Retrieval: a fact is shown before a question that is near to it in meaning, and before no other."""

    name = "retrieval"
    config_type = RetrievalConfig
    traits = replace(
        Ice.traits, paper="the baseline of Zhong et al. 2023, arXiv 2305.14795", prepares="a sentence encoder"
    )

    def make(self, lm: BaseLM, edits: tuple[Edit, ...], config: RetrievalConfig, progress: Progress) -> ContextPatch:
        """Write the facts down, to be found by their prompts."""
        sentence_encoder(config.encoder, progress)
        recall = Recall(encoder=config.encoder, threshold=config.similarity, most=config.most)
        return ContextPatch(self.provenance(lm, config, edits), _facts(edits), ASKING, recall)


class Ike(_Recalling[IkeConfig]):
    """IKE: demonstrations that copy a new fact, carry it to a rephrase, or keep to what is unrelated; then the fact.

    They are taken from a corpus of other edits, the nearest in meaning to the fact, in the ratio 1 : 3 : 4, nearest last.
    Of several facts, the one nearest to the question is shown with its demonstrations.
    """

    name = "ike"
    config_type = IkeConfig
    traits = replace(
        Ice.traits, paper="Zheng et al. 2023, arXiv 2305.12740", prepares="a sentence encoder, demonstrations"
    )

    def prepare(self, lm: BaseLM, progress: Progress = silent) -> None:
        """Fetch the sentence encoder, and embed the corpus."""
        super().prepare(lm, progress)
        config = self.resolve(lm)
        if config.demonstrations:
            _embedded(config.encoder, tuple(map(fact_of, _corpus(config))))

    def make(self, lm: BaseLM, edits: tuple[Edit, ...], config: IkeConfig, progress: Progress) -> ContextPatch:
        """Choose demonstrations for each fact."""
        encoder = sentence_encoder(config.encoder, progress)
        corpus = _corpus(config) if config.demonstrations else []
        asked = {edit.prompt for edit in edits}
        others = [i for i, edit in enumerate(corpus) if edit.prompt not in asked]
        notes = _facts(edits)
        if others:
            vectors = _embedded(config.encoder, tuple(map(fact_of, corpus)))
            near = encoder.embed([fact_of(edit) for edit in in_own_order(edits)]) @ vectors[others].T
            chosen = near.topk(min(config.demonstrations, len(others)), dim=1).indices.flip(1).tolist()
            notes = tuple(
                note.model_copy(update={"text": _demonstrations([corpus[others[i]] for i in row]) + note.text})
                for note, row in zip(notes, chosen, strict=True)
            )
        recall = Recall(encoder=config.encoder, threshold=-1.0, most=1)
        return ContextPatch(self.provenance(lm, config, edits), notes, ASKING, recall)


def _corpus(config: IkeConfig) -> list[Edit]:
    return [edit for edit in read(config.corpus).edits if edit.kind != "restyle"]


@lru_cache(maxsize=4)
def _embedded(encoder: EncoderName, facts: tuple[str, ...]) -> Float[Tensor, "facts width"]:
    """The vectors of a corpus, which all edits share."""
    return sentence_encoder(encoder).embed(facts)


def _facts(edits: Sequence[Edit]) -> tuple[Note, ...]:
    return tuple(Note(text=note_of(edit), topic=edit.prompt) for edit in in_own_order(edits))


_KINDS = ("copy", "update", "update", "update", "retain", "retain", "retain", "retain")


def _demonstrations(edits: Sequence[Edit]) -> str:
    """One for each edit, of the three kinds in turn."""
    return "".join(_demonstration(edit, _KINDS[i % len(_KINDS)]) for i, edit in enumerate(edits))


def _demonstration(edit: Edit, kind: str) -> str:
    """A fact, a question and its answer. An edit that has no probe of the kind wanted is copied."""
    question, answer = edit.prompt, edit.target
    kept = [probe for group in edit.locality.values() for probe in group if probe.answers]
    if kind == "update" and edit.rephrases:
        question = edit.rephrases[0]
    elif kind == "retain" and kept:
        question, answer = kept[0].prompt, kept[0].answers[0]
    return f"{note_of(edit)}{ASKING}{question} {answer}\n\n"
