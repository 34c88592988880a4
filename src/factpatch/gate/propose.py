"""Probes that the user did not write: other wordings, the same question about others, other questions about the same.

They are proposed by rules and by the model itself, so each is told from a written one wherever it is shown. Locality is asked
as "did the answer change", so that it needs no truth: what the model says of a neighbour may be wrong, and must stay.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
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
_LISTS = (
    "Each line names things of one kind.\nApple: Pear, Cherry, Plum, Orange\nMozart: Haydn, Bach, Schubert, Verdi\n{}:"
)
_STEMS = ("{} is known for", "Most people think of {} as", "A short description of {}:")
_OF = re.compile(
    r"^(?:the|what (?:is|was) the|who (?:is|was) the) (?P<what>.+?) of \{\} ?(?P<verb>is|was|are|were)?\??$", re.I
)
_ITS = re.compile(
    r"^(?:what is |who is |what was |who was )?\{\}['’]s (?P<what>.+?) ?(?P<verb>is|was|are|were)?\??$", re.I
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

    The model is asked, as it stands, what else is of a subject's kind. An erased fact and a manner of speaking get no other
    wordings: how these are asked for is part of the edit.
    """
    bare = [edit for edit in edits if not edit.locality and edit.subject]
    listed = dict(zip((edit.id for edit in bare), _neighbours(lm, bare, progress), strict=True))
    found: list[Edit] = []
    added: set[tuple[str, str]] = set()
    for edit in edits:
        more: dict[str, object] = {}
        if not edit.rephrases and edit.kind in {"insert", "modify"}:
            more["rephrases"] = rewordings(edit)
            added |= {(edit.id, text) for text in rewordings(edit)}
        if not edit.locality:
            groups = _locality(edit, listed.get(edit.id, ()))
            more["locality"] = groups
            added |= {(edit.id, probe.prompt) for group in groups.values() for probe in group}
        found.append(edit.model_copy(update=more))
    return Proposal(tuple(found), frozenset(added))


def rewordings(edit: Edit) -> tuple[str, ...]:
    """The prompt in other words, made by rule: "the X of S is" and "S's X is" stand for one another, and others are framed.

    >>> rewordings(Edit(id="1", prompt="The capital of France is", target="Lyon", subject="France"))[0]
    "France's capital is"
    """
    texts = [*_turned(edit), *_framed(edit.prompt)]
    return tuple(dict.fromkeys(text for text in texts if text != edit.prompt))[:_MOST]


def _turned(edit: Edit) -> list[str]:
    if not edit.subject:
        return []
    pattern, subject = edit.prompt.replace(edit.subject, "{}", 1), edit.subject
    asks = edit.prompt.endswith("?")
    if found := _OF.match(pattern):
        verb = found["verb"] or "is"
        return [f"What {verb} {subject}'s {found['what']}?" if asks else f"{subject}'s {found['what']} {verb}"]
    if found := _ITS.match(pattern):
        verb = found["verb"] or "is"
        return [
            f"What {verb} the {found['what']} of {subject}?" if asks else f"The {found['what']} of {subject} {verb}"
        ]
    return []


def _framed(prompt: str) -> list[str]:
    if prompt.endswith("?"):
        return [f"Question: {prompt} Answer:", f"Please tell me: {prompt}", f"I have a question. {prompt}"]
    first, _, rest = prompt.partition(" ")
    inside = f"{first.lower()} {rest}" if first in _LEADS else prompt
    return [f"It is well known that {inside}", f"Here is a fact. {prompt}", f"As everybody can read, {inside}"]


def _locality(edit: Edit, neighbours: Sequence[str]) -> dict[str, tuple[Probe, ...]]:
    groups: dict[str, tuple[Probe, ...]] = {}
    if edit.subject:
        prompts = [edit.prompt.replace(edit.subject, other) for other in neighbours]
        groups[NEIGHBOURS] = tuple(Probe(prompt=prompt) for prompt in prompts)
        groups[SAME_SUBJECT] = tuple(Probe(prompt=stem.format(edit.subject)) for stem in _STEMS)
    general = [p for p in guard_questions() if not contains(p.prompt, (edit.subject or edit.target,))]
    groups[GENERAL] = tuple(Probe(prompt=p.prompt) for p in general[:_MOST])
    return {kind: group for kind, group in groups.items() if group}


def _neighbours(lm: BaseLM, edits: Sequence[Edit], progress: Progress) -> list[tuple[str, ...]]:
    """Of each subject, others of its kind: as the model lists them, and where that gives too few, from the sample."""
    if not edits:
        return []
    progress("Proposing probes", 0, 1)
    said = lm.answer([_LISTS.format(edit.subject) for edit in edits], max_new=40)
    progress("Proposing probes", 1, 1)
    spare = [each.subject for each in read("sample").edits if each.subject]
    return [_names([*text.split(","), *spare], str(edit.subject), edit) for text, edit in zip(said, edits, strict=True)]


def _names(candidates: Collection[str], subject: str, edit: Edit) -> tuple[str, ...]:
    """Those that may be names: short, of the subject's case, and neither the subject nor the answer."""
    found: dict[str, str] = {}
    for each in candidates:
        name = each.strip(" .\"'")
        words = name.split()
        fits = 0 < len(words) <= max(3, len(subject.split())) and name[:1].isupper() == subject[:1].isupper()
        if fits and not contains(name, (subject, edit.target)) and not contains(subject, (name,)):
            found.setdefault(normalise(name), name)
    return tuple(name for key, name in found.items() if key)[:_MOST]
