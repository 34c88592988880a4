"""Probes that the user did not write: other wordings, the same question about others, other questions about the same.

They are proposed by rules and by the model itself, so each is told from a written one wherever it is shown. Locality is asked
as "did the answer change", so that it needs no truth: what the model says of a neighbour may be wrong, and must stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from factpatch.data import read
from factpatch.data.questions import guard_questions
from factpatch.edits import Edit, Probe
from factpatch.lm import BaseLM
from factpatch.progress import Progress, silent
from factpatch.scoring.metrics import contains, normalise

__all__ = ["GENERAL", "NEIGHBOURS", "SAME_SUBJECT", "Proposal", "propose", "rewordings"]

NEIGHBOURS = "Proposed: others of its kind"
SAME_SUBJECT = "Proposed: same subject"
GENERAL = "Proposed: general knowledge"

_MOST = 3
"""Probes of one sort for one edit."""
_DEFINITE = 5
"""Words that an answer has at most, if it is to stay: how a longer one is put changes with anything."""
_LIST = (
    "Each line names things of one kind.\nApple: Pear, Cherry, Plum, Orange\nMozart: Haydn, Bach, Schubert, Verdi\n"
    "The Nile: The Rhine, The Amazon, The Danube, The Volga\n{}:"
)
_KIND = (
    "Each line says what something is.\nApple: a fruit\nMozart: a composer\nThe Nile: a river\nToyota: a company\n"
    "Hamlet: a play\n{}:"
)
_STEMS = (
    _KIND,
    "Each line says in one word what something has to do with.\nApple: food\nMozart: music\nThe Nile: water\n"
    "Toyota: cars\nHamlet: theatre\n{}:",
    "Each line says where something comes from.\nApple: Asia\nMozart: Austria\nThe Nile: Africa\nToyota: Japan\n"
    "Hamlet: England\n{}:",
)
_OF = re.compile(
    r"^(?:the|(?P<lead>(?:what|who) (?:is|was)) the) (?P<what>.+?) of \{\} ?(?P<verb>is|was|are|were)?\??$", re.I
)
_ITS = re.compile(
    r"^(?:(?P<lead>(?:what|who) (?:is|was)) )?\{\}['’]s (?P<what>.+?) ?(?P<verb>is|was|are|were)?\??$", re.I
)
_LEADS = frozenset({"The", "A", "An", "In", "On", "At", "By", "Its", "One"})


@dataclass(frozen=True, slots=True)
class Proposal:
    """Edits with the probes they had, and those proposed for what they lacked.

    added  edit and prompt of each proposed probe
    """

    edits: tuple[Edit, ...]
    added: frozenset[tuple[str, str]]


def propose(lm: BaseLM, edits: Sequence[Edit], progress: Progress = silent) -> Proposal:
    """Give edits that have no rephrases, or no locality, some; what the user wrote is never added to.

    The model is asked, as it stands, what else is of a subject's kind, and what it holds for sure of the subject. An erased
    fact and a manner of speaking get no other wordings: how these are asked for is part of the edit. What one edit changes is
    nothing that must stay for another of the same batch: neither their prompts nor their subjects are proposed as locality.
    """
    bare = [edit for edit in edits if not edit.locality]
    groups = dict(zip((edit.id for edit in bare), _locality(lm, bare, edits, progress), strict=True))
    found: list[Edit] = []
    added: set[tuple[str, str]] = set()
    for edit in edits:
        more: dict[str, object] = {}
        if not edit.rephrases and edit.kind in {"insert", "modify"}:
            more["rephrases"] = texts = rewordings(edit)
            added |= {(edit.id, text) for text in texts}
        if edit.id in groups:
            more["locality"] = groups[edit.id]
            added |= {(edit.id, probe.prompt) for group in groups[edit.id].values() for probe in group}
        found.append(edit.model_copy(update=more))
    return Proposal(tuple(found), frozenset(added))


def rewordings(edit: Edit) -> tuple[str, ...]:
    """The prompt in other words, made by rule: "the X of S is" and "S's X is" stand for one another, and others are framed.

    >>> rewordings(Edit(id="1", prompt="The capital of France is", target="Lyon", subject="France"))[0]
    "France's capital is"
    """
    texts = [*_turned(edit), *_framed(edit.prompt, edit.subject)]
    return tuple(dict.fromkeys(text for text in texts if text != edit.prompt))[:_MOST]


def _turned(edit: Edit) -> list[str]:
    if not edit.subject:
        return []
    pattern, subject = edit.prompt.replace(edit.subject, "{}", 1), edit.subject
    asks = edit.prompt.endswith("?")
    if found := _OF.match(pattern):
        verb, lead = found["verb"] or "is", (found["lead"] or "what is").capitalize()
        return [f"{lead} {subject}'s {found['what']}?" if asks else f"{subject}'s {found['what']} {verb}"]
    if found := _ITS.match(pattern):
        verb, lead = found["verb"] or "is", (found["lead"] or "what is").capitalize()
        return [f"{lead} the {found['what']} of {subject}?" if asks else f"The {found['what']} of {subject} {verb}"]
    return []


def _framed(prompt: str, subject: str | None) -> list[str]:
    if prompt.endswith("?"):
        return [f"Question: {prompt} Answer:", f"Please tell me: {prompt}", f"I have a question. {prompt}"]
    first, _, rest = prompt.partition(" ")
    # A name keeps its article as it is written: methods look for the subject letter for letter.
    is_name = bool(subject) and prompt.startswith(str(subject))
    inside = f"{first.lower()} {rest}" if first in _LEADS and not is_name else prompt
    return [f"It is well known that {inside}", f"Here is a fact. {prompt}", f"As everybody can read, {inside}"]


def _locality(
    lm: BaseLM, bare: Sequence[Edit], batch: Sequence[Edit], progress: Progress
) -> list[dict[str, tuple[Probe, ...]]]:
    """For each bare edit, prompts whose answers must stay, by kind."""
    changed = {normalise(text) for edit in batch for text in (edit.prompt, *edit.rephrases)}
    names = tuple({edit.subject or edit.target for edit in batch})
    spared = [probe.prompt for probe in guard_questions() if not contains(probe.prompt, names)]
    # Neighbours in the file are alike.
    general = [*spared[:: len(spared) // _MOST or 1], *spared]
    about = [edit for edit in bare if edit.subject]
    neighbours = dict(zip((edit.id for edit in about), _neighbours(lm, about, names, progress), strict=True))
    known = dict(zip((edit.id for edit in about), _known(lm, about, progress), strict=True))
    groups = []
    for edit in bare:
        alike = [edit.prompt.replace(edit.subject, other) for other in neighbours.get(edit.id, ()) if edit.subject]
        own = {NEIGHBOURS: alike, SAME_SUBJECT: known.get(edit.id, ()), GENERAL: general}
        kept = {kind: [text for text in texts if normalise(text) not in changed] for kind, texts in own.items()}
        groups.append(
            {
                kind: tuple(Probe(prompt=text) for text in dict.fromkeys(texts))[:_MOST]
                for kind, texts in kept.items()
                if texts
            }
        )
    return groups


def _known(lm: BaseLM, edits: Sequence[Edit], progress: Progress) -> list[list[str]]:
    """For each edit, questions about its subject to which the model gives a definite answer that is not the fact itself."""
    prompts = [stem.format(edit.subject) for edit in edits for stem in _STEMS]
    said = iter(_answers(lm, prompts, progress))
    told = [[(stem.format(edit.subject), next(said)) for stem in _STEMS] for edit in edits]
    return [
        [
            prompt
            for prompt, answer in own
            if 0 < len(normalise(answer).split()) <= _DEFINITE
            and not contains(answer, (str(edit.subject), edit.target, *edit.ground_truth))
        ]
        for edit, own in zip(edits, told, strict=True)
    ]


def _neighbours(lm: BaseLM, edits: Sequence[Edit], taken: Sequence[str], progress: Progress) -> list[tuple[str, ...]]:
    """For each edit, others of its subject's kind: those of which the sample asks the same, then those the model lists.

    Of the latter, those that it calls by the same name as the subject, such as "a country".
    """
    asked_alike: dict[str, list[str]] = {}
    for each in read("sample").edits:
        asked_alike.setdefault(_relation(each), []).append(each.subject or "")
    lists = _answers(lm, [_LIST.format(edit.subject) for edit in edits], progress)
    listed = [_names(text.split(","), edit, taken) for edit, text in zip(edits, lists, strict=True)]
    subjects = list(dict.fromkeys([*(str(edit.subject) for edit in edits), *(n for names in listed for n in names)]))
    kinds = dict(zip(subjects, map(normalise, _answers(lm, map(_KIND.format, subjects), progress)), strict=True))
    found = []
    for edit, names in zip(edits, listed, strict=True):
        alike = [name for name in names if kinds[name] == kinds[str(edit.subject)]]
        found.append(_names([*asked_alike.get(_relation(edit), ()), *alike], edit, taken)[:_MOST])
    return found


def _answers(lm: BaseLM, prompts: Iterable[str], progress: Progress) -> list[str]:
    asked = list(prompts)
    if not asked:
        return []
    progress("Proposing probes", 0, 1)
    said = lm.answer(asked, max_new=40)
    progress("Proposing probes", 1, 1)
    return said


def _relation(edit: Edit) -> str:
    """The prompt without its subject."""
    return normalise(edit.prompt.replace(edit.subject, " ")) if edit.subject else ""


def _names(candidates: Iterable[str], edit: Edit, taken: Sequence[str]) -> tuple[str, ...]:
    """Those that may be names: short, of the subject's case, and neither a subject of the batch nor the answer."""
    subject = str(edit.subject)
    found: dict[str, str] = {}
    for each in candidates:
        name = each.strip(" .\"'")
        words = name.split()
        fits = 0 < len(words) <= max(3, len(subject.split())) and name[:1].isupper() == subject[:1].isupper()
        if fits and not contains(name, (*taken, edit.target)) and not contains(subject, (name,)):
            found.setdefault(normalise(name), name)
    return tuple(name for key, name in found.items() if key)
