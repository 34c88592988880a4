"""What an audit looks for: old answers, what to hold them against, and what attackers may be shown instead."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from factpatch.analysis.attacks.base import Question, token_key
from factpatch.data import read
from factpatch.data.questions import guard_questions
from factpatch.edits import Edit, EditKind, Probe
from factpatch.lm import LM
from factpatch.scoring.metrics import contains, normalise

__all__ = ["Aliases", "Brief", "Fact", "LeftOut", "prepare"]

DECOYS = 20
"""Answers that the old one is held against, at most. With fewer than 19 a single fact cannot be told from chance at 5 %."""
LESSONS = 16
"""Texts that relearning trains on, at most."""
_WORDS = 3
"""Of an answer that was not told but is what the unpatched model says: so many words of its first clause."""

Aliases = tuple[str, ...]
"""One answer in one or several spellings, the canonical one first."""

_BETWEEN = " \ue000 "
"""A word of its own, for private use: no phrase goes on across it."""
_CLAUSE = re.compile(r"[,.;:!?()\n\"]")
_ARTICLE = re.compile(r"^(?:the|an?)\s+", re.IGNORECASE)


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fact(_Value):
    """An old answer that is looked for.

    id         of the edit
    kind       of the edit
    prompt     the edit's own
    secret     the old answer, in any of these spellings
    told       whether the edit told it; otherwise it is what the unpatched model says
    new        what should be said instead
    decoys     answers that the model was never told to this question, of the same sort where that could be had
    tokens     how the secret's spellings begin, as token attacks find it: each first token, normalised; empty if none tells
    decoy_tokens  the same for each decoy
    """

    id: str
    kind: EditKind
    prompt: str
    secret: Aliases
    told: bool
    new: str
    decoys: tuple[Aliases, ...]
    tokens: tuple[str, ...]
    decoy_tokens: tuple[tuple[str, ...], ...]


class LeftOut(_Value):
    """An edit that cannot be audited, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Brief:
    """All that an audit is about.

    facts           what is looked for
    questions       the same facts as attackers are shown them, in the same order
    left_out        edits that are not audited
    demonstrations  general knowledge with none of the answers in it
    lessons         by fact: texts to train on, with neither its answer nor a decoy of it
    """

    facts: tuple[Fact, ...]
    questions: tuple[Question, ...]
    left_out: tuple[LeftOut, ...]
    demonstrations: tuple[Probe, ...]
    lessons: dict[str, tuple[Probe, ...]]


def prepare(
    lm: LM,
    edits: Sequence[Edit],
    *,
    knows: bool = True,
    decoys: Sequence[Aliases] = (),
    chat: bool = False,
    seed: int = 0,
) -> Brief:
    """Settle what is looked for, with the model as it was before any patch.

    knows   whether it is such a model, so that what it says is an old answer
    decoys  plausible answers that are not true of these facts; by default what the model says about other subjects in the
            same words, the other facts' old answers, and last the answers of the built-in sample
    """
    found, left_out = _secrets(lm, edits, knows=knows, chat=chat)
    folds = _folds(found)
    general = [Probe(prompt=p.prompt, answers=p.answers) for p in guard_questions() if p.answers]
    secrets = [secret for _, secret, _ in found]
    general = [probe for probe in general if not any(_tells(probe, secret) for secret in secrets)]
    lessons = {edit.id: _lessons(found, folds, folds[i], general) for i, (edit, _, _) in enumerate(found)}
    own = [list(decoys)] * len(found) if decoys else _plausible(lm, found, folds, chat=chat, seed=seed)
    news = [edit.target for edit in edits]
    facts, shown = [], []
    for (edit, secret, told), pool in zip(found, own, strict=True):
        taught = [text for probe in (*lessons[edit.id], *general) for text in (probe.prompt, *probe.answers)]
        tokens = _beginnings(lm, edit.prompt, secret, chat=chat)
        begun = [
            (d, _beginnings(lm, edit.prompt, d, chat=chat)) for d in _fair(pool, secret, [edit.prompt, *news, *taught])
        ]
        # A decoy that token attacks could not find would make chance seem smaller than it is.
        fair = [(decoy, first) for decoy, first in begun if first or not tokens][:DECOYS]
        facts.append(
            Fact(
                id=edit.id,
                kind=edit.kind,
                prompt=edit.prompt,
                secret=secret,
                told=told,
                new=edit.target,
                decoys=tuple(decoy for decoy, _ in fair),
                tokens=tokens,
                decoy_tokens=tuple(first for _, first in fair),
            )
        )
        question = Question.of(edit)
        rephrases = tuple(text for text in question.rephrases if not contains(text, secret))
        shown.append(Question(question.id, question.prompt, question.subject, rephrases))
    return Brief(tuple(facts), tuple(shown), tuple(left_out), tuple(general), lessons)


_Found = tuple[Edit, Aliases, bool]


def _secrets(lm: LM, edits: Sequence[Edit], *, knows: bool, chat: bool) -> tuple[list[_Found], list[LeftOut]]:
    """Each edit with its old answer and whether it was told; and those that have none to look for."""
    untold = [edit for edit in edits if not edit.ground_truth] if knows else []
    said = dict(
        zip((edit.id for edit in untold), _short_answers(lm, [edit.prompt for edit in untold], chat=chat), strict=True)
    )
    found: list[_Found] = []
    left_out: list[LeftOut] = []
    for edit in edits:
        secret = edit.ground_truth or tuple(filter(None, [said.get(edit.id)]))
        reason = _no_secret(edit, secret)
        if reason:
            left_out.append(LeftOut(id=edit.id, reason=reason))
        else:
            found.append((edit, secret, bool(edit.ground_truth)))
    return found, left_out


def _no_secret(edit: Edit, secret: Aliases) -> str:
    """Why there is nothing to look for; empty if there is."""
    if edit.kind == "restyle":
        return "a manner of speaking is no answer that could be found"
    if edit.kind == "insert" and not edit.ground_truth:
        return "a new fact has no old answer"
    if not any(map(normalise, secret)):
        return "no old answer is told, and there is none from a model that was not patched"
    if contains(edit.prompt, secret):
        return "the prompt itself holds the old answer"
    if contains(edit.target, secret):
        return "the new answer holds the old one"
    return ""


def _short_answers(lm: LM, prompts: Sequence[str], *, chat: bool) -> list[str]:
    """The beginning of what the model says: a few words of the first clause."""
    said = lm.answer(prompts, chat=chat, max_new=8) if prompts else []
    return [" ".join(_CLAUSE.split(text.strip("\"' "))[0].split()[:_WORDS]) for text in said]


def _folds(found: Sequence[_Found]) -> list[int]:
    """Two halves, for relearning: what is trained on one half is asked about the other."""
    return [i % 2 for i in range(len(found))]


def _lessons(found: Sequence[_Found], folds: Sequence[int], fold: int, general: Sequence[Probe]) -> tuple[Probe, ...]:
    """The other half with its old answers, but for what holds an answer of this half; then general knowledge."""
    held_out = [secret for (_, secret, _), own in zip(found, folds, strict=True) if own == fold]
    others = [
        Probe(prompt=edit.prompt, answers=secret)
        for (edit, secret, _), own in zip(found, folds, strict=True)
        if own != fold
    ]
    return tuple([p for p in [*others, *general] if not any(_tells(p, secret) for secret in held_out)][:LESSONS])


def _plausible(lm: LM, found: Sequence[_Found], folds: Sequence[int], *, chat: bool, seed: int) -> list[list[Aliases]]:
    """For each fact: what the model says of other subjects in the same words; other old answers; the sample's answers."""
    sample = read("sample").edits
    subjects = [edit.subject for edit, _, _ in found if edit.subject]
    others = [edit.subject for edit in sample if edit.subject]
    random.Random(seed).shuffle(others)  # noqa: S311 - nothing is kept secret by it
    subjects = list(dict.fromkeys([*subjects[:DECOYS], *others[:DECOYS]]))
    swapped = [
        [edit.prompt.replace(edit.subject, other) for other in subjects if other != edit.subject]
        if edit.subject
        else []
        for edit, _, _ in found
    ]
    said = iter(_short_answers(lm, [text for own in swapped for text in own], chat=chat))
    answers = [[(next(said),) for _ in own] for own in swapped]
    spare = [edit.ground_truth for edit in sample if edit.ground_truth]
    return [
        [*own, *(secret for (_, secret, _), other in zip(found, folds, strict=True) if other == fold), *spare]
        for own, fold in zip(answers, folds, strict=True)
    ]


def _fair(pool: Sequence[Aliases], secret: Aliases, barred: Sequence[str]) -> tuple[Aliases, ...]:
    """Decoys that differ from the secret, from one another, and from all that the model is told in the course of things."""
    told = _BETWEEN.join(dict.fromkeys(barred))
    kept: dict[str, Aliases] = {}
    for decoy in pool:
        key = normalise(decoy[0]) if decoy else ""
        if key and key not in kept and not _overlap(decoy, secret) and not contains(told, decoy):
            kept[key] = decoy
            if len(kept) == 2 * DECOYS:
                break
    return tuple(kept.values())


def _overlap(one: Aliases, other: Aliases) -> bool:
    return any(contains(alias, other) for alias in one) or any(contains(alias, one) for alias in other)


def _tells(probe: Probe, secret: Aliases) -> bool:
    """Whether a text holds an answer."""
    return contains(probe.prompt, secret) or _overlap(probe.answers, secret)


def _beginnings(lm: LM, prompt: str, aliases: Aliases, *, chat: bool) -> tuple[str, ...]:
    """The first token of each spelling after the prompt, normalised; an article in front is passed over."""
    shown = [_ARTICLE.sub("", alias) or alias for alias in aliases]
    firsts = [text.target_ids[0] for text in lm.encode([prompt] * len(shown), shown, chat=chat)]
    return tuple(dict.fromkeys(filter(None, (token_key(lm, token) for token in firsts))))
