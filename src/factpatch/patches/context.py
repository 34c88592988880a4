"""`ContextPatch`: text put before what the model is asked. The weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeGuard

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from factpatch.lm import BaseLM
from factpatch.lm.encoder import EncoderName, sentence_encoder
from factpatch.patches.base import Patch, Provenance
from factpatch.patches.parts import Spec
from factpatch.words import counted

__all__ = ["Context", "ContextPatch", "Note", "Recall"]


class Note(Spec):
    """Something to be read before a question, and what it is about: the text it is found by."""

    text: str
    topic: str


class Recall(Spec):
    """Which notes are read before a question: the `most` nearest in meaning, of those at least `threshold` similar.

    Similarity is the cosine of sentence vectors, from -1 to 1.
    """

    encoder: EncoderName
    threshold: float
    most: PositiveInt


class _Spec(Spec):
    notes: tuple[Note, ...] = Field(min_length=1)
    asking: str
    recall: Recall | None = None


@dataclass(frozen=True, eq=False)
class ContextPatch(Patch):
    """Notes, each ending its own line, that are put before a question; then `asking`, then the question.

    Patches that ask and recall alike act as one where they lie on one model: of all their notes the nearest are read.

    recall  which notes; None for all, in their order. Where none is near enough, the question is put as it is.
    """

    kind: ClassVar[str] = "context"
    needs_weights: ClassVar[bool] = False
    notes: tuple[Note, ...]
    asking: str
    recall: Recall | None = None

    def attach(self, lm: BaseLM) -> Callable[[], None]:
        """Add itself to the model's contexts."""
        self.check_base(lm)
        context = Context(self, lm)
        lm.contexts.append(context)
        return lambda: lm.contexts.remove(context)

    def acts_with(self, other: ContextPatch) -> bool:
        """Whether the two act as one."""
        return type(other) is type(self) and (other.asking, other.recall) == (self.asking, self.recall)

    def similarity(self, asked: Float[Tensor, "prompts width"]) -> Float[Tensor, "prompts notes"]:
        """Cosine of each prompt, of which the sentence vector is given, with each note's topic."""
        return asked @ self._topics.T

    @cached_property
    def _topics(self) -> Float[Tensor, "notes width"]:
        assert self.recall is not None
        return sentence_encoder(self.recall.encoder).embed([note.topic for note in self.notes])

    def tensors(self) -> dict[str, Tensor]:
        """None of weight; safetensors wants one."""
        return {"none": torch.zeros(1)}

    def spec(self) -> dict[str, Any]:
        """Notes and how they are recalled."""
        return _Spec(notes=self.notes, asking=self.asking, recall=self.recall).model_dump(mode="json")

    @classmethod
    def from_parts(
        cls,
        provenance: Provenance,
        spec: Mapping[str, Any],
        tensors: Mapping[str, Tensor],  # noqa: ARG003
    ) -> ContextPatch:
        """From what `spec` gave."""
        read = _Spec.read(spec)
        return ContextPatch(provenance, read.notes, read.asking, read.recall)

    def changes(self) -> list[dict[str, Any]]:
        """One row: the prompt."""
        which = "all" if self.recall is None else f"up to {self.recall.most} by meaning"
        return [{"part": "what is asked", "form": f"{counted(len(self.notes), 'note')} before it, {which}"}]


class Context:
    """A patch among the contexts of a model; the uppermost of those that act as one writes for all of them."""

    def __init__(self, patch: ContextPatch, lm: BaseLM) -> None:
        self.patch, self.lm = patch, lm

    def before(self, prompts: Sequence[str]) -> list[str]:
        """The text for each prompt; the nearest note stands last, next to the question. Of equals the later is nearer."""
        if not self.is_uppermost:
            return [""] * len(prompts)
        patches = [context.patch for context in self.together()]
        notes, asking, recall = [n for patch in patches for n in patch.notes], self.patch.asking, self.patch.recall
        if recall is None:
            return ["".join(note.text for note in notes) + asking] * len(prompts)
        asked = sentence_encoder(recall.encoder).embed(prompts)
        similarity = torch.cat([patch.similarity(asked) for patch in patches], dim=1)
        # Notes on one topic are equally near, which vectors that were made at another time are only but for rounding.
        first: dict[str, int] = {}
        similarity = similarity[:, [first.setdefault(note.topic, i) for i, note in enumerate(notes)]]
        texts = []
        for scores in similarity.tolist():
            nearest = sorted(range(len(notes)), key=lambda i: (scores[i], i))[-recall.most :]
            near = [notes[i].text for i in nearest if scores[i] >= recall.threshold]
            texts.append("".join(near) + asking if near else "")
        return texts

    @property
    def is_uppermost(self) -> bool:
        """Whether none that lies above this acts as one with it."""
        return next(context for context in reversed(self.lm.contexts) if self._acts_with(context)) is self

    def together(self) -> list[Context]:
        """The contexts that act as one with this, itself included, first to last."""
        return [context for context in self.lm.contexts if self._acts_with(context)]

    def _acts_with(self, other: object) -> TypeGuard[Context]:
        return isinstance(other, Context) and other.patch.acts_with(self.patch)
