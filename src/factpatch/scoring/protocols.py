"""The two protocols, `open` and `survey`: what is asked of the model, and what counts.

open    what the model says by itself: greedy, until a line or sentence ends. The headline.
survey  KnowEdit's scores as the survey computes them, mostly teacher-forced (arXiv 2401.01286, section 5).

Each has a version; a number is comparable only with numbers of the same protocol and version.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from factpatch.edits import Edit, LabelledProbe, Probe
from factpatch.lm import LM, Attachable, BaseLM
from factpatch.lm.predictions import Prediction, predict, target_logprobs
from factpatch.lm.tokens import Encoded
from factpatch.lm.writing import Noting
from factpatch.scoring.failures import FailureMode, failure_mode
from factpatch.scoring.metrics import (
    agreement,
    begins_with,
    contains,
    divergence,
    exactly,
    normalise,
    rouge1,
    same_answer,
    sentiment_shift,
)

__all__ = ["PROTOCOLS", "Ask", "Protocol", "ProtocolName", "Seen", "says"]

ProtocolName = Literal["open", "survey"]

Way = Literal["freely", "briefly", "shown", "weighed"]
"""How a probe is put: the model answers, or answers in a few words; is shown the first answer; or weighs all of them."""

_CHANGED = frozenset({"edit", "rephrase"})

ROOM = 1 << 28
"""Bytes that distributions may take until they are compared; those before and after take it twice."""


class Ask(NamedTuple):
    """A probe, and how it is put to the model."""

    way: Way
    probe: Probe


@dataclass(frozen=True, slots=True)
class Seen:
    """What the model did with one probe.

    text            that it gave
    tokens, target  its tokens beside the target's, under teacher forcing
    replies         of weighed answers: the mean log-probability of each one's tokens, in nats
    kl              of weighed answers: how far predictions on them are from the unpatched model's, in nats, if asked for
    first           of a free answer: log-probabilities of the first token, in nats, where they were asked for
    """

    text: str
    tokens: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    replies: tuple[float, ...] = ()
    kl: float | None = None
    first: Float[Tensor, " vocab"] | None = field(default=None, compare=False)


class Protocol(ABC):
    """How to ask and how to judge."""

    name: ClassVar[ProtocolName]
    version: ClassVar[int]
    longest: ClassVar[int]
    """How many tokens an answer has at most, where the model gives one."""
    needs_weights: ClassVar[bool] = False

    @abstractmethod
    def ask(self, edit: Edit, labelled: LabelledProbe) -> Ask:
        """How this probe of the edit is put."""

    @abstractmethod
    def observe(
        self,
        lm: Any,
        asks: Sequence[Ask],
        *,
        chat: bool,
        lanes: Sequence[int] | None = None,
        compared: Collection[Ask] = (),
        beneath: Sequence[Attachable] = (),
    ) -> list[Seen | None]:
        """What the model does with each; None where it cannot be asked in this protocol.

        lanes     which lane each is for, inside `LM.side_by_side`
        compared  those whose answers will be compared with the unpatched model's in every measure there is
        beneath   patches that count as part of the unpatched model
        """

    def cannot_judge(self, edit: Edit, labelled: LabelledProbe) -> str:  # noqa: ARG002
        """Why a probe of the edit, its rephrases or its portability cannot be scored; empty if it can."""
        return "" if labelled.probe.answers else "the data set gives no answer to compare with"

    @abstractmethod
    def correct(self, edit: Edit, labelled: LabelledProbe, seen: Seen, before: Seen, *, chat: bool) -> float:
        """How well the model did on a probe of the edit, its rephrases or its portability, from 0 to 1.

        before  what the unpatched model did with it
        """

    @abstractmethod
    def unchanged(self, before: Seen, after: Seen) -> float:
        """How far a locality probe is answered as before the edit, right or wrong, from 0 to 1."""

    def measures(
        self,
        edit: Edit,  # noqa: ARG002
        labelled: LabelledProbe,  # noqa: ARG002
        before: Seen,  # noqa: ARG002
        after: Seen,  # noqa: ARG002
        *,
        chat: bool,  # noqa: ARG002
    ) -> dict[str, float]:
        """What else there is to say of the answer after the edit, by name."""
        return {}

    def failure(self, edit: Edit, labelled: LabelledProbe, before: Seen, after: Seen) -> FailureMode | None:  # noqa: ARG002
        """What kind of wrong answer this is, if the protocol can tell."""
        return None


class OpenProtocol(Protocol):
    """Free greedy answers of at most 64 tokens.

    A completion counts if the answer begins with an alias, an answer to a question if it has one in it, in whole words
    after normalisation. An erased fact counts if the refusal is there and the secret is not. Locality: the same answer.

    Beside it `exact` (an alias and nothing more) and `rouge1` (the share of an alias's words), and of an erased fact whether
    it `refused` and whether the `secret_absent`. For locality `truth_kept`, over the probes that were answered rightly
    before, since an answer may change and stay true, or stay and be false; and `kl`, the divergence of what is predicted
    right after the prompt, before || after, in nats, of a model in hand.
    """

    name = "open"
    version = 2
    longest = 64

    def ask(self, edit: Edit, labelled: LabelledProbe) -> Ask:  # noqa: ARG002
        """Freely, always."""
        return Ask("freely", labelled.probe)

    def observe(
        self,
        lm: BaseLM,
        asks: Sequence[Ask],
        *,
        chat: bool,
        lanes: Sequence[int] | None = None,
        compared: Collection[Ask] = (),
        beneath: Sequence[Attachable] = (),  # noqa: ARG002
    ) -> list[Seen | None]:
        """Let the model answer."""
        prompts = [ask.probe.prompt for ask in asks]
        if not isinstance(lm, LM):
            return [Seen(text) for text in lm.answer(prompts, chat=chat, max_new=self.longest)]
        texts = lm.encode(prompts, chat=chat, lanes=lanes)
        rows = [(text.lane, text.ids) for text in texts]
        noting = Noting([row for row, ask in zip(rows, asks, strict=True) if ask in compared])
        said = lm.answer(prompts, chat=chat, max_new=self.longest, lanes=lanes, choose=noting)
        return [Seen(text, first=noting.first.get(row)) for text, row in zip(said, rows, strict=True)]

    def cannot_judge(self, edit: Edit, labelled: LabelledProbe) -> str:
        """Also where no alias has a letter or digit left, and where a manner of speaking is wanted."""
        if edit.kind == "restyle" and labelled.role in _CHANGED:
            return "a manner of speaking cannot be judged by comparing answers"
        if labelled.probe.answers and not any(map(normalise, labelled.probe.answers)):
            return "nothing is left of the answers once they are normalised"
        return super().cannot_judge(edit, labelled)

    def correct(self, edit: Edit, labelled: LabelledProbe, seen: Seen, before: Seen, *, chat: bool) -> float:  # noqa: ARG002
        """1 or 0."""
        found = says(labelled.probe, seen.text, chat=chat)
        if edit.kind == "erase" and labelled.role in _CHANGED:
            found = found and not contains(seen.text, edit.ground_truth)
        return float(found)

    def unchanged(self, before: Seen, after: Seen) -> float:
        """1 or 0."""
        return float(same_answer(before.text, after.text))

    def measures(
        self, edit: Edit, labelled: LabelledProbe, before: Seen, after: Seen, *, chat: bool
    ) -> dict[str, float]:
        """`exact` and `rouge1`, of an erased fact `refused` and `secret_absent`; or `truth_kept` and `kl`."""
        probe = labelled.probe
        if labelled.role == "locality":
            was_true = probe.answers and says(probe, before.text, chat=chat)
            kept = {"truth_kept": float(says(probe, after.text, chat=chat))} if was_true else {}
            if before.first is None or after.first is None:
                return kept
            return kept | {"kl": divergence(before.first, after.first)}
        close = {"exact": float(exactly(after.text, probe.answers)), "rouge1": rouge1(after.text, probe.answers)}
        return close | _forgotten(edit, labelled, after)

    def failure(self, edit: Edit, labelled: LabelledProbe, before: Seen, after: Seen) -> FailureMode | None:
        """As `failure_mode`; what was true before is known of the edit itself and its rephrases."""
        old = edit.ground_truth if labelled.role in _CHANGED else ()
        return failure_mode(after.text, wanted=labelled.probe.answers, old=old, before=before.text)


def says(probe: Probe, answer: str, *, chat: bool) -> bool:
    """Whether a free answer counts: a completion begins with an alias, the answer to a question has one in it."""
    is_question = chat or probe.prompt.endswith("?")
    return (contains if is_question else begins_with)(answer, probe.answers)


def _forgotten(edit: Edit, labelled: LabelledProbe, after: Seen) -> dict[str, float]:
    """Of a question about an erased fact: is the refusal given, and is the secret not?"""
    if edit.kind != "erase" or labelled.role not in _CHANGED:
        return {}
    refused, told = contains(after.text, labelled.probe.answers), contains(after.text, edit.ground_truth)
    return {"refused": float(refused), "secret_absent": float(not told)}


class SurveyProtocol(Protocol):
    """The scores of KnowEdit.

    Facts: teacher-forced token agreement on the first answer. Success and portability: the share of its tokens that are the
    most likely ones, given all before them. Locality: the share of positions at which the most likely token is as before.

    A manner of speaking (ConvSent), by the log-probability of sample replies to the bare question: see `sentiment_shift`.
    Locality: agreement with the unpatched model on replies about something else, and `kl`, the mean divergence on them,
    before || after, in nats a token, which is what the survey prints.

    An erased fact (Sanitation), by greedy answers of at most ten tokens: the refusal is there and the secret is not; how
    often each of these holds stands beside it. Locality: the same answer.
    """

    name = "survey"
    version = 2
    longest = 10
    needs_weights = True

    def ask(self, edit: Edit, labelled: LabelledProbe) -> Ask:
        """By the kind of edit; what follows from an edit is always asked for as a fact."""
        role, _, probe = labelled
        if role == "portability":
            return Ask("shown", probe)
        if edit.kind == "erase":
            return Ask("briefly", probe)
        if edit.kind != "restyle" or not (edit.wanted and edit.unwanted):
            return Ask("shown", probe)
        if role == "locality":
            return Ask("weighed", probe)
        prompt = edit.question if edit.question and role == "edit" else probe.prompt
        return Ask("weighed", Probe(prompt=prompt, answers=edit.wanted + edit.unwanted))

    def observe(
        self,
        lm: LM,
        asks: Sequence[Ask],
        *,
        chat: bool,
        lanes: Sequence[int] | None = None,
        compared: Collection[Ask] = (),
        beneath: Sequence[Attachable] = (),
    ) -> list[Seen | None]:
        """A probe without answers cannot be asked, unless the model is to answer itself."""
        seen: list[Seen | None] = [None] * len(asks)
        ways: dict[Way, Callable[..., list[Seen]]] = {
            "briefly": self._briefly,
            "shown": self._shown,
            "weighed": partial(_weighed, compared=compared, beneath=beneath),
        }
        for way, observe in ways.items():
            places = [i for i, ask in enumerate(asks) if ask.way == way and (ask.probe.answers or way == "briefly")]
            if places:
                own = None if lanes is None else [lanes[i] for i in places]
                for i, one in zip(places, observe(lm, [asks[i] for i in places], chat=chat, lanes=own), strict=True):
                    seen[i] = one
        return seen

    def _briefly(self, lm: LM, asks: Sequence[Ask], *, chat: bool, lanes: Sequence[int] | None) -> list[Seen]:
        prompts = [ask.probe.prompt for ask in asks]
        return [Seen(text) for text in lm.answer(prompts, chat=chat, max_new=self.longest, lanes=lanes)]

    def _shown(self, lm: LM, asks: Sequence[Ask], *, chat: bool, lanes: Sequence[int] | None) -> list[Seen]:
        prompts, targets = [ask.probe.prompt for ask in asks], [ask.probe.answers[0] for ask in asks]
        found = predict(lm, lm.encode(prompts, targets, chat=chat, lanes=lanes))
        return [Seen(lm.tokens.decode(one.best).strip(), one.best, one.target) for one in found]

    def correct(self, edit: Edit, labelled: LabelledProbe, seen: Seen, before: Seen, *, chat: bool) -> float:  # noqa: ARG002
        """Agreement with the target's tokens; or `sentiment_shift`; or 1 or 0."""
        way = self.ask(edit, labelled).way
        if way == "briefly":
            return float(all(_forgotten(edit, labelled, seen).values()))
        if way == "weighed":
            return math.prod(_shift(edit, before, seen))
        return agreement(seen.tokens, seen.target)

    def unchanged(self, before: Seen, after: Seen) -> float:
        """Agreement with the tokens before the edit, or 1 or 0 for brief answers."""
        return agreement(after.tokens, before.tokens) if before.tokens else float(same_answer(before.text, after.text))

    def measures(
        self,
        edit: Edit,
        labelled: LabelledProbe,
        before: Seen,
        after: Seen,
        *,
        chat: bool,  # noqa: ARG002
    ) -> dict[str, float]:
        """Of a manner of speaking the two factors `sentiment` and `topic`, and `kl`; of erased facts what `open` tells too."""
        if self.ask(edit, labelled).way != "weighed":
            return _forgotten(edit, labelled, after)
        if labelled.role == "locality":
            return {} if after.kl is None else {"kl": after.kl}
        sentiment, topic = _shift(edit, before, after)
        return {"sentiment": sentiment, "topic": topic}


def _weighed(
    lm: LM,
    asks: Sequence[Ask],
    *,
    chat: bool,
    lanes: Sequence[int] | None,
    compared: Collection[Ask],
    beneath: Sequence[Attachable],
) -> list[Seen]:
    texts = _with_answers(lm, asks, chat=chat, lanes=lanes)
    found = iter(predict(lm, [text for own in texts for text in own]))
    is_patched = lanes is not None or [*map(id, lm.patches)] != [*map(id, beneath)]
    wanted = [i for i, ask in enumerate(asks) if is_patched and ask in compared]
    apart: dict[int, float] = {}
    for some in _held_at_once(lm, {i: texts[i] for i in wanted}):
        # Patches are taken off once for all of these: of a long stack that takes longer than the passes.
        after = [dict(target_logprobs(lm, texts[i])) for i in some]
        with lm.unpatched(), lm.patched(*beneath):
            base = _with_answers(lm, [asks[i] for i in some], chat=chat, lanes=None)
            before = [dict(target_logprobs(lm, own)) for own in base]
        apart |= dict(zip(some, map(_divergence, before, after), strict=True))
    return [_weights(lm, [next(found) for _ in own], apart.get(i)) for i, own in enumerate(texts)]


def _with_answers(lm: LM, asks: Sequence[Ask], *, chat: bool, lanes: Sequence[int] | None) -> list[list[Encoded]]:
    """For each of these, its prompt with each of its answers."""
    each = [(ask.probe.prompt, answer, i) for i, ask in enumerate(asks) for answer in ask.probe.answers]
    prompts, answers, whose = zip(*each, strict=True)
    texts = iter(lm.encode(prompts, answers, chat=chat, lanes=None if lanes is None else [lanes[i] for i in whose]))
    return [[next(texts) for _ in ask.probe.answers] for ask in asks]


def _held_at_once(lm: LM, texts: Mapping[int, Sequence[Encoded]]) -> Iterator[list[int]]:
    """In turns, with as many distributions before the texts' targets as have room, or those of one."""
    each = 4 * len(lm.anatomy.head.weight)
    some: list[int] = []
    held = 0
    for i, own in texts.items():
        size = each * sum(len(text.target_ids) for text in own)
        if some and held + size > ROOM:
            yield some
            some, held = [], 0
        some, held = [*some, i], held + size
    if some:
        yield some


def _divergence(before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> float:
    """Mean over texts of the mean over their tokens of KL(before || after), in nats."""
    return fmean(fmean(divergence(b, a) for b, a in zip(before[i], after[i], strict=True)) for i in sorted(before))


def _weights(lm: LM, found: Sequence[Prediction], kl: float | None) -> Seen:
    tokens, target = (tuple(t for one in found for t in getattr(one, name)) for name in ("best", "target"))
    return Seen(
        lm.tokens.decode(found[0].best).strip(), tokens, target, tuple(fmean(one.logprobs) for one in found), kl
    )


def _shift(edit: Edit, before: Seen, after: Seen) -> tuple[float, float]:
    """The two factors of a restyle's success."""
    n = len(edit.wanted)
    return sentiment_shift(
        before=fmean(before.replies[:n]), after=fmean(after.replies[:n]), other_after=fmean(after.replies[n:])
    )


PROTOCOLS: dict[ProtocolName, Protocol] = {"open": OpenProtocol(), "survey": SurveyProtocol()}
