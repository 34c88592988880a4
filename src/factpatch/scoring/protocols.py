"""The two protocols, `open` and `survey`: what is asked of the model, and what counts.

open    what the model says by itself: greedy, until a line or sentence ends. The headline.
survey  KnowEdit's teacher-forced token agreement, for comparison with published tables (arXiv 2401.01286, section 5).

Each has a version; a number is comparable only with numbers of the same protocol and version.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from factpatch.edits import Edit, LabelledProbe, Probe
from factpatch.lm import LM, BaseLM
from factpatch.lm.run import Noting, predict
from factpatch.scoring.metrics import (
    agreement,
    begins_with,
    contains,
    divergence,
    exactly,
    normalise,
    rouge1,
    same_answer,
)

__all__ = ["PROTOCOLS", "Protocol", "ProtocolName", "Seen"]

ProtocolName = Literal["open", "survey"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the model did with one probe.

    text            that it gave
    tokens, target  its tokens beside the target's, under teacher forcing
    first           of a free answer: log-probabilities of the first token, in nats, where they were asked for
    """

    text: str
    tokens: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    first: Float[Tensor, " vocab"] | None = field(default=None, compare=False)


class Protocol(ABC):
    """How to ask and how to judge."""

    name: ClassVar[ProtocolName]
    version: ClassVar[int]
    needs_weights: ClassVar[bool] = False

    @abstractmethod
    def observe(
        self,
        lm: Any,
        probes: Sequence[Probe],
        *,
        chat: bool,
        lanes: Sequence[int] | None = None,
        compared: Collection[Probe] = (),
    ) -> list[Seen | None]:
        """What the model does with each probe; None where the probe cannot be asked in this protocol.

        lanes     which lane each probe is for, inside `LM.side_by_side`
        compared  probes whose answers will be compared with another model's in every measure there is
        """

    def cannot_judge(self, edit: Edit, labelled: LabelledProbe) -> str:  # noqa: ARG002
        """Why a probe of the edit, its rephrases or its portability cannot be scored; empty if it can."""
        return "" if labelled.probe.answers else "the data set gives no answer to compare with"

    @abstractmethod
    def correct(self, edit: Edit, labelled: LabelledProbe, seen: Seen, *, chat: bool) -> float:
        """How well the model did on a probe of the edit, its rephrases or its portability, from 0 to 1."""

    @abstractmethod
    def unchanged(self, before: Seen, after: Seen) -> float:
        """How far a locality probe is answered as before the edit, right or wrong, from 0 to 1."""

    def measures(self, labelled: LabelledProbe, before: Seen, after: Seen, *, chat: bool) -> dict[str, float]:  # noqa: ARG002
        """What else there is to say of the answer after the edit, by name."""
        return {}


class OpenProtocol(Protocol):
    """Free greedy answers of at most 64 tokens.

    A completion counts if the answer begins with an alias, an answer to a question if it has one in it, in whole words
    after normalisation. An erased fact counts if the refusal is there and the secret is not. Locality: the same answer.

    Beside it `exact` (an alias and nothing more) and `rouge1` (the share of an alias's words). For locality `truth_kept`, over
    the probes that were answered rightly before, since an answer may change and stay true, or stay and be false; and `kl`,
    the divergence of what is predicted right after the prompt, before || after, in nats, of a model in hand.
    """

    name = "open"
    version = 2

    def observe(
        self,
        lm: BaseLM,
        probes: Sequence[Probe],
        *,
        chat: bool,
        lanes: Sequence[int] | None = None,
        compared: Collection[Probe] = (),
    ) -> list[Seen | None]:
        """Let the model answer."""
        prompts = [probe.prompt for probe in probes]
        if not isinstance(lm, LM):
            return [Seen(text) for text in lm.answer(prompts, chat=chat)]
        texts = lm.encode(prompts, chat=chat, lanes=lanes)
        rows = [(text.lane, text.ids) for text in texts]
        noting = Noting([row for row, probe in zip(rows, probes, strict=True) if probe in compared])
        said = lm.answer(prompts, chat=chat, lanes=lanes, choose=noting)
        return [Seen(text, first=noting.first.get(row)) for text, row in zip(said, rows, strict=True)]

    def cannot_judge(self, edit: Edit, labelled: LabelledProbe) -> str:
        """Also where no alias has a letter or digit left, and where a manner of speaking is wanted."""
        if edit.kind == "restyle" and labelled.role in {"edit", "rephrase"}:
            return "a manner of speaking cannot be judged by comparing answers"
        if labelled.probe.answers and not any(map(normalise, labelled.probe.answers)):
            return "nothing is left of the answers once they are normalised"
        return super().cannot_judge(edit, labelled)

    def correct(self, edit: Edit, labelled: LabelledProbe, seen: Seen, *, chat: bool) -> float:
        """1 or 0."""
        found = _says(labelled.probe, seen, chat=chat)
        if edit.kind == "erase" and labelled.role in {"edit", "rephrase"}:
            found = found and not contains(seen.text, edit.ground_truth)
        return float(found)

    def unchanged(self, before: Seen, after: Seen) -> float:
        """1 or 0."""
        return float(same_answer(before.text, after.text))

    def measures(self, labelled: LabelledProbe, before: Seen, after: Seen, *, chat: bool) -> dict[str, float]:
        """`exact` and `rouge1`, or `truth_kept` and `kl`."""
        probe = labelled.probe
        if labelled.role == "locality":
            was_true = probe.answers and _says(probe, before, chat=chat)
            kept = {"truth_kept": float(_says(probe, after, chat=chat))} if was_true else {}
            if before.first is None or after.first is None:
                return kept
            return kept | {"kl": divergence(before.first, after.first)}
        return {"exact": float(exactly(after.text, probe.answers)), "rouge1": rouge1(after.text, probe.answers)}


def _says(probe: Probe, seen: Seen, *, chat: bool) -> bool:
    is_question = chat or probe.prompt.endswith("?")
    return (contains if is_question else begins_with)(seen.text, probe.answers)


class SurveyProtocol(Protocol):
    """Teacher-forced token agreement on the first answer.

    Success and portability: the share of the answer's tokens that are the most likely ones, given all before them.
    Locality: the share of the answer's positions at which the most likely token is the same as before the edit.
    """

    name = "survey"
    version = 1
    needs_weights = True

    def observe(
        self,
        lm: LM,
        probes: Sequence[Probe],
        *,
        chat: bool,
        lanes: Sequence[int] | None = None,
        compared: Collection[Probe] = (),  # noqa: ARG002
    ) -> list[Seen | None]:
        """Show the model each answer and read its guesses; a probe without answers cannot be asked."""
        places = [i for i, probe in enumerate(probes) if probe.answers]
        askable = [probes[i] for i in places]
        prompts, targets = [probe.prompt for probe in askable], [probe.answers[0] for probe in askable]
        texts = lm.encode(prompts, targets, chat=chat, lanes=None if lanes is None else [lanes[i] for i in places])
        seen: list[Seen | None] = [None] * len(probes)
        for i, found in zip(places, predict(lm, texts), strict=True):
            seen[i] = Seen(lm.tokens.decode(found.best).strip(), found.best, found.target)
        return seen

    def correct(self, edit: Edit, labelled: LabelledProbe, seen: Seen, *, chat: bool) -> float:  # noqa: ARG002
        """Agreement with the target's tokens."""
        return agreement(seen.tokens, seen.target)

    def unchanged(self, before: Seen, after: Seen) -> float:
        """Agreement with the tokens before the edit."""
        return agreement(after.tokens, before.tokens)


PROTOCOLS: dict[ProtocolName, Protocol] = {"open": OpenProtocol(), "survey": SurveyProtocol()}
