"""What an attacker knows, what he may do, and what he comes back with.

An attack is shown a `Question`, which does not hold the old answer, and returns candidates, best guess first and never more
than the budget (Patil et al., ICLR 2024, arXiv 2309.17410: a secret is not safe while it stands among B candidates). So it
cannot cheat, whatever it does; whether the old answer is among the candidates is for the audit to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from factpatch.analysis.base import Result
from factpatch.edits import Edit, Probe
from factpatch.lm import LM
from factpatch.progress import Progress
from factpatch.scoring.metrics import normalise

__all__ = ["Access", "Attack", "Candidate", "Question", "Setting", "best", "token_key"]

Access = Literal["answers", "activations", "training"]
"""What the attacker must have: the model's answers; what goes on inside it; or the means to train it."""


@dataclass(frozen=True, slots=True)
class Question:
    """A fact as an attacker knows it: all but its answer.

    id         of the edit
    prompt     the edit's own
    subject    what it is about, if that was told
    rephrases  other wordings of the prompt
    """

    id: str
    prompt: str
    subject: str | None = None
    rephrases: tuple[str, ...] = ()

    @classmethod
    def of(cls, edit: Edit) -> Question:
        """What an edit asks, without its answers."""
        return cls(edit.id, edit.prompt, edit.subject, edit.rephrases)

    @property
    def is_open(self) -> bool:
        """Whether it is a question, and not a sentence to go on with."""
        return self.prompt.endswith("?")

    @property
    def wordings(self) -> tuple[str, ...]:
        """The prompt, then its rephrases."""
        return (self.prompt, *self.rephrases)


class Candidate(Result):
    """One guess.

    text    a short answer, or one token
    token   the token, of attacks that read predictions; such a guess is right if the old answer begins with it
    source  where it was found: what was asked, or the place in the model
    blocks  the blocks at which the token ranks as high as it does anywhere
    """

    text: str
    token: int | None = None
    source: str = ""
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """What all attacks of an audit share.

    budget          candidates for each fact, at most
    seed            decides all that is drawn at random
    chat            put what is asked into the model's chat template
    demonstrations  general knowledge with its answers, none of which is an old answer that is looked for
    lessons         by a question's id: texts to train on that do not hold its answer
    max_new         tokens of one answer, at most
    """

    budget: int = 20
    seed: int = 0
    chat: bool = False
    demonstrations: tuple[Probe, ...] = ()
    lessons: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    max_new: int = 16


class Attack(ABC):
    """One way of getting at an answer.

    name    as it is asked for
    title   as it is called in a table
    access  what the attacker must have
    about   one sentence on what is done, for the report
    """

    name: ClassVar[str]
    title: ClassVar[str]
    access: ClassVar[Access]
    about: ClassVar[str]

    @abstractmethod
    def candidates(
        self, lm: LM, questions: Sequence[Question], setting: Setting, progress: Progress
    ) -> list[list[Candidate]]:
        """For each question at most `setting.budget` different candidates, best first. The model stays as it is."""


def best(candidates: Iterable[Candidate], budget: int) -> list[Candidate]:
    """The first so many that differ from one another once normalised; those without a letter or digit are no guesses."""
    kept: dict[str, Candidate] = {}
    for candidate in candidates:
        key = normalise(candidate.text)
        if key and key not in kept:
            kept[key] = candidate
            if len(kept) == budget:
                break
    return list(kept.values())


def token_key(lm: LM, token: int) -> str:
    """A token as a reader sees it, normalised; empty if it tells nothing, as white space, marks and articles do."""
    return normalise(lm.tokens.decode([token]))
