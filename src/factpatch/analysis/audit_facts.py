"""What an audit looks for: old answers, what to hold them against, and what attackers may be shown instead."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from factpatch.analysis.attacks.base import Question, token_key
from factpatch.analysis.base import Result
from factpatch.data import read
from factpatch.data.questions import guard_questions
from factpatch.edits import Edit, EditKind, Probe
from factpatch.lm import LM
from factpatch.progress import Progress, silent
from factpatch.scoring.metrics import contains, normalise

__all__ = ["Aliases", "Brief", "Fact", "LeftOut", "prepare"]

DECOYS = 40
"""Answers that the old one is held against, at most. With fewer than 39 a single fact cannot be told from chance at 2.5 %."""
LESSONS = 16
"""Texts that relearning trains on, at most."""
_SUBJECTS = 20
"""Of the facts, and as many of the sample, whose answers may be decoys; more of the sample where facts are few."""
_ASKED = 256
"""Prompts that are answered before progress is told."""
_WORDS = 3
"""Of an answer that was not told but is what the unpatched model says: so many words of its first clause."""

Aliases = tuple[str, ...]
"""One answer in one or several spellings, the canonical one first."""

_CLAUSE = re.compile(r"[,.;:!?()\n\"]")
_ARTICLE = re.compile(r"^(?:the|an?)\s+", re.IGNORECASE)


class Fact(Result):
    """An old answer that is looked for.

    id         of the edit
    kind       of the edit
    prompt     the edit's own
    secret     the old answer, in any of these spellings
    told       whether the edit told it; otherwise it is what the unpatched model says
    new        what should be said instead
    decoys     answers that the model was never told to this question, of the same sort where that could be had
    tokens     how the secret's spellings begin, as token attacks find it: each first token, normalised, but for one that tells
               nothing or that the new answer begins with too
    first      that of the canonical spelling; empty if it is none of these
    decoy_firsts  the same for each decoy
    """

    id: str
    kind: EditKind
    prompt: str
    secret: Aliases
    told: bool
    new: str
    decoys: tuple[Aliases, ...]
    tokens: tuple[str, ...]
    first: str
    decoy_firsts: tuple[str, ...]


class LeftOut(Result):
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
    progress: Progress = silent,
) -> Brief:
    """Settle what is looked for, with the model as it was before any patch.

    knows   whether it is such a model, so that what it says is an old answer
    decoys  plausible answers that are not true of these facts; by default the other facts' old answers, those to the same
            question about another subject first, what the model says about other subjects in the same words, and the answers
            of the built-in sample; of the latter two none with more words than the old answers to that question
    """
    found, left_out = _secrets(lm, edits, knows=knows, chat=chat)
    folds = _folds(found)
    secrets = [secret for _, secret, _ in found]
    general = [Probe(prompt=p.prompt, answers=p.answers) for p in guard_questions() if p.answers]
    general = [probe for probe in general if not any(_tells(probe, secret) for secret in secrets)]
    lessons = {fold: _lessons(found, folds, fold, general) for fold in set(folds)}
    told = {fold: _Told([*(edit.target for edit in edits), *_texts([*own, *general])]) for fold, own in lessons.items()}
    own = (
        [list(decoys)] * len(found) if decoys else _plausible(lm, found, folds, chat=chat, seed=seed, progress=progress)
    )
    facts, shown = [], []
    for i, ((edit, secret, was_told), pool, fold) in enumerate(zip(found, own, folds, strict=True)):
        progress("Preparing facts", i, len(found))
        fair = _fair(pool, secret, _Told([edit.prompt]), told[fold])
        # A new answer that begins alike is no sign of the old one, nor of a decoy.
        (new,), *begun = _beginnings(lm, edit.prompt, [(edit.target,), secret, *fair], chat=chat)
        firsts, *others = (tuple("" if token == new else token for token in each) for each in begun)
        # A decoy that token attacks could not find would make chance seem smaller than it is.
        kept = [(decoy, first[0]) for decoy, first in zip(fair, others, strict=True) if first[0] or not firsts[0]]
        facts.append(
            Fact(
                id=edit.id,
                kind=edit.kind,
                prompt=edit.prompt,
                secret=secret,
                told=was_told,
                new=edit.target,
                decoys=tuple(decoy for decoy, _ in kept[:DECOYS]),
                tokens=tuple(dict.fromkeys(filter(None, firsts))),
                first=firsts[0],
                decoy_firsts=tuple(first for _, first in kept[:DECOYS]),
            )
        )
        question = Question.of(edit)
        rephrases = tuple(text for text in question.rephrases if not contains(text, secret))
        shown.append(Question(question.id, question.prompt, question.subject, rephrases))
    by_fact = {edit.id: lessons[fold] for (edit, _, _), fold in zip(found, folds, strict=True)}
    return Brief(tuple(facts), tuple(shown), tuple(left_out), tuple(general), by_fact)


_Found = tuple[Edit, Aliases, bool]


def _secrets(lm: LM, edits: Sequence[Edit], *, knows: bool, chat: bool) -> tuple[list[_Found], list[LeftOut]]:
    """Each edit with its old answer and whether it was told; and those that have none to look for."""
    untold = [edit for edit in edits if not edit.ground_truth] if knows else []
    said = dict(
        zip((edit.id for edit in untold), _short_answers(lm, [edit.prompt for edit in untold], chat=chat), strict=True)
    )
    found: list[_Found] = []
    left_out: list[LeftOut] = []
    news = _Told([edit.target for edit in edits])
    for edit in edits:
        secret = tuple(filter(normalise, edit.ground_truth or (said.get(edit.id, ""),)))
        reason = _no_secret(edit, secret, news)
        if reason:
            left_out.append(LeftOut(id=edit.id, reason=reason))
        else:
            found.append((edit, secret, bool(edit.ground_truth)))
    return found, left_out


def _no_secret(edit: Edit, secret: Aliases, news: _Told) -> str:
    """Why there is nothing to look for; empty if there is.

    An old answer that is also taught as another edit's new one may come up here for that reason alone. Decoys of which the
    same is true in the same measure cannot be had, so such a fact is left out rather than counted on an unequal footing.
    """
    reasons = {
        "a manner of speaking is no answer that could be found": edit.kind == "restyle",
        "a new fact has no old answer": edit.kind == "insert" and not edit.ground_truth,
        "no old answer is told, and there is none from a model that was not patched": not secret,
        "the prompt itself holds the old answer": contains(edit.prompt, secret),
        "the new answer holds the old one": contains(edit.target, secret),
        "the old answer is another edit's new answer": news.holds(secret),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


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
    fit = (probe for probe in [*others, *general] if not any(_tells(probe, secret) for secret in held_out))
    return tuple(islice(fit, LESSONS))


def _plausible(
    lm: LM, found: Sequence[_Found], folds: Sequence[int], *, chat: bool, seed: int, progress: Progress
) -> list[list[Aliases]]:
    """For each fact, the likest first: other old answers, what the model says of other subjects, the sample's answers.

    Answers that are longer than the old ones of the same relation are not among them: they come up less by chance.
    """
    sample = read("sample").edits
    subjects = [edit.subject for edit, _, _ in found if edit.subject]
    others = [edit.subject for edit in sample if edit.subject]
    random.Random(seed).shuffle(others)  # noqa: S311 - nothing is kept secret by it
    # The fewer facts, the more decoys it takes to tell them from chance.
    more = max(_SUBJECTS, 2 * DECOYS // max(1, len(found)))
    subjects = list(dict.fromkeys([*subjects[:_SUBJECTS], *others[:more]]))
    swapped = [
        [edit.prompt.replace(edit.subject, other) for other in subjects if other != edit.subject]
        if edit.subject
        else []
        for edit, _, _ in found
    ]
    said = iter(_answers(lm, [text for own in swapped for text in own], chat=chat, progress=progress))
    spare = [edit.ground_truth for edit in sample if edit.ground_truth]
    relations = [_relation(edit) for edit, _, _ in found]
    secrets = [secret for _, secret, _ in found]
    lengths: dict[str, set[int]] = {}
    for relation, secret in zip(relations, secrets, strict=True):
        lengths.setdefault(relation, set()).add(_length(secret))
    by_place: dict[tuple[int, str | None], list[Aliases]] = {}
    for fold, relation, secret in zip(folds, relations, secrets, strict=True):
        by_place.setdefault((fold, relation), []).append(secret)
        by_place.setdefault((fold, None), []).append(secret)
    pools = []
    for fold, relation, own in zip(folds, relations, swapped, strict=True):
        longest, shortest = max(lengths[relation]), min(lengths[relation])
        rest = [*by_place[fold, None], *((next(said),) for _ in own), *spare]
        rest = [answer for answer in rest if _length(answer) <= longest]
        rest.sort(key=lambda answer: _length(answer) < shortest)
        pools.append([*by_place[fold, relation], *rest])
    return pools


def _answers(lm: LM, prompts: Sequence[str], *, chat: bool, progress: Progress) -> list[str]:
    """As `_short_answers`, telling how far it is."""
    found = []
    for start in range(0, len(prompts), _ASKED):
        progress("Choosing decoys", start, len(prompts))
        found += _short_answers(lm, prompts[start : start + _ASKED], chat=chat)
    progress("Choosing decoys", 1, 1)
    return found


def _relation(edit: Edit) -> str:
    """What is asked, without whom or what it is asked about."""
    return edit.prompt.replace(edit.subject, "{}") if edit.subject else edit.prompt


def _length(answer: Aliases) -> int:
    """Words of the canonical spelling."""
    return len(normalise(answer[0]).split())


def _texts(probes: Iterable[Probe]) -> list[str]:
    return [text for probe in probes for text in (probe.prompt, *probe.answers)]


class _Told:
    """Texts that are asked time and again whether one of them holds an answer."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = {text: _squeezed(text) for text in dict.fromkeys(texts)}
        self._all = "\n".join(self._texts.values())

    def holds(self, answer: Aliases) -> bool:
        """As `contains` says of one of the texts, which is read word by word only if the letters are there at all."""
        return any(self._has(alias) for alias in answer)

    def _has(self, alias: str) -> bool:
        letters = _squeezed(alias)
        return letters in self._all and any(
            letters in own and contains(text, (alias,)) for text, own in self._texts.items()
        )


def _squeezed(text: str) -> str:
    """Its letters, normalised, without the spaces."""
    return normalise(text).replace(" ", "")


def _fair(pool: Sequence[Aliases], secret: Aliases, *told: _Told) -> list[Aliases]:
    """Decoys that differ from the secret, from one another, and from all that the model is told in the course of things."""
    kept: dict[str, Aliases] = {}
    for decoy in pool:
        key = normalise(decoy[0]) if decoy else ""
        if key and key not in kept and not any(text.holds(decoy) for text in told) and not _overlap(decoy, secret):
            kept[key] = decoy
            if len(kept) == 2 * DECOYS:
                break
    return list(kept.values())


def _overlap(one: Aliases, other: Aliases) -> bool:
    return any(contains(alias, other) for alias in one) or any(contains(alias, one) for alias in other)


def _tells(probe: Probe, secret: Aliases) -> bool:
    """Whether a text holds an answer."""
    return contains(probe.prompt, secret) or _overlap(probe.answers, secret)


def _beginnings(lm: LM, prompt: str, answers: Sequence[Aliases], *, chat: bool) -> list[tuple[str, ...]]:
    """Of each answer, the first token of each spelling after the prompt, normalised; an article in front is passed over."""
    shown = [[_ARTICLE.sub("", alias) or alias for alias in aliases] for aliases in answers]
    flat = [alias for own in shown for alias in own]
    firsts = iter(lm.encode([prompt] * len(flat), flat, chat=chat))
    return [tuple(token_key(lm, next(firsts).target_ids[0]) for _ in own) for own in shown]
