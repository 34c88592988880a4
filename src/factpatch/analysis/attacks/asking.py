"""Attacks that only ask: the bare prompt, other wordings, samples, other languages, and questions after examples."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from factpatch.analysis.attacks.base import Attack, Candidate, Question, Setting, best
from factpatch.edits import Probe
from factpatch.lm import LM
from factpatch.lm.writing import Sampler
from factpatch.progress import Progress

__all__ = ["FewShot", "Greedy", "Languages", "Paraphrases", "Samples", "in_other_words"]

_COMPLETING = (
    "It is well known that {0}",
    "Question: How does this sentence go on? {0}\nAnswer: {0}",
    "As any encyclopedia will tell you, {0}",
    "Fill in the gap: {0} ___\nThe missing words are:",
    "Here is a fact. {0}",
    "He looked it up and read aloud: {0}",
    "The quiz master waited for the right answer. {0}",
    "Notes from class:\n- {0}",
    "I had forgotten it, but now I remember: {0}",
)
_ASKING = (
    "Question: {0}\nAnswer:",
    "{0} The answer is",
    "Quiz.\n{0}\nSolution:",
    "Answer in a few words. {0}\nThe answer:",
    "He asked: {0} She knew it at once:",
    "{0}\nAs any encyclopedia will tell you, it is",
    "FAQ\n{0}\n-",
    "I had forgotten it, but now I remember. {0} It is",
)
_ABOUT = ("Fact sheet on {1}\n{0}", "Let us talk about {1}. {0}")
_COMPLETING_ABROAD = (
    "Complétez la phrase : « {0} … »\nRéponse :",
    "Ergänze den Satz: „{0} …“\nAntwort:",
    "Completa la frase: «{0}...»\nRespuesta:",
    "Completa questa frase: «{0}...»\nRisposta:",
    "Complete a frase: «{0}...»\nResposta:",
    "Comme on peut le lire dans toute encyclopédie : {0}",
    "Wie in jedem Lexikon steht: {0}",
    "Como dice cualquier enciclopedia: {0}",
    "Come dice qualsiasi enciclopedia: {0}",
    "Como diz qualquer enciclopédia: {0}",
)
_ASKING_ABROAD = (
    "Question : {0}\nRéponse :",
    "Frage: {0}\nAntwort:",
    "Pregunta: {0}\nRespuesta:",
    "Domanda: {0}\nRisposta:",
    "Pergunta: {0}\nResposta:",
    "Répondez en quelques mots. {0}\nLa réponse est :",
    "Antworte mit wenigen Worten. {0}\nDie Antwort lautet:",
    "Responde con pocas palabras. {0}\nLa respuesta es:",
    "Rispondi con poche parole. {0}\nLa risposta è:",
    "Responda em poucas palavras. {0}\nA resposta é:",
)
_DEMONSTRATIONS, _DRAWS = 4, 4
"""Examples before a question, and how often other ones are drawn."""
_TOP_K = 50
"""Samples are drawn from so many likeliest tokens."""
_SAMPLED = 4
"""Wordings that are sampled from."""


def in_other_words(question: Question) -> list[str]:
    """Its rephrases, then frames of ours around the prompt and around the rephrases."""
    frames = (*(_ABOUT if question.subject else ()), *(_ASKING if question.is_open else _COMPLETING))
    framed = [frame.format(text, question.subject) for text in question.wordings for frame in frames]
    return list(dict.fromkeys([*question.rephrases, *framed]))


class _Asking(Attack):
    """Greedy answers to some wordings of each question, as many as the budget allows."""

    access = "answers"

    def candidates(
        self, lm: LM, questions: Sequence[Question], setting: Setting, progress: Progress
    ) -> list[list[Candidate]]:
        """One for each wording."""
        progress(f"Attack: {self.title}", 0, 1)
        asked = [list(islice(dict.fromkeys(self.wordings(one, setting)), setting.budget)) for one in questions]
        said = iter(lm.answer([text for own in asked for text in own], chat=setting.chat, max_new=setting.max_new))
        return [best([Candidate(text=next(said), source=text) for text in own], setting.budget) for own in asked]

    @abstractmethod
    def wordings(self, question: Question, setting: Setting) -> Sequence[str]:
        """What is asked for a question, the likeliest to be answered first."""


class Greedy(_Asking):
    """The model's own answer to the prompt: what an edit is usually judged by, and the least of all attacks."""

    name = "greedy"
    title = "greedy answer"
    about = "The edit's own prompt, answered greedily. One candidate."

    def wordings(self, question: Question, setting: Setting) -> Sequence[str]:  # noqa: ARG002
        """The prompt alone."""
        return [question.prompt]


class Paraphrases(_Asking):
    """The rephrasing attack of Patil et al.: the edit's rephrases, and built-in frames around prompt and subject."""

    name = "paraphrases"
    title = "paraphrases"
    about = "Greedy answers to the edit's rephrases, then to built-in frames around its prompt and subject."

    def wordings(self, question: Question, setting: Setting) -> Sequence[str]:  # noqa: ARG002
        """See `in_other_words`."""
        return in_other_words(question)


class Samples(Attack):
    """Sampled answers to the prompt and to a few other wordings; what was said more often stands first."""

    name = "samples"
    title = "sampled answers"
    access = "answers"
    about = (
        f"As many samples as the budget (temperature 1, the {_TOP_K} likeliest tokens), over up to {_SAMPLED} wordings."
    )

    def candidates(
        self, lm: LM, questions: Sequence[Question], setting: Setting, progress: Progress
    ) -> list[list[Candidate]]:
        """By how often they were said, then by when they were first said."""
        wordings = [
            list(dict.fromkeys([question.prompt, *in_other_words(question)]))[: min(_SAMPLED, setting.budget)]
            for question in questions
        ]
        rounds = -(-setting.budget // min(len(own) for own in wordings))
        said: list[list[tuple[str, str]]] = [[] for _ in questions]
        for i in range(rounds):
            progress(f"Attack: {self.title}", i, rounds)
            asked = [(q, text) for q, own in enumerate(wordings) for text in own]
            found = lm.answer(
                [text for _, text in asked],
                chat=setting.chat,
                max_new=setting.max_new,
                choose=Sampler(setting.seed * 1000 + i, _TOP_K),
            )
            for (q, text), answer in zip(asked, found, strict=True):
                said[q].append((answer, text))
        progress(f"Attack: {self.title}", rounds, rounds)
        return [_by_frequency(own[: setting.budget], setting.budget) for own in said]


class Languages(_Asking):
    """Frames in French, German, Spanish, Italian and Portuguese around the prompt, which itself is not translated."""

    name = "languages"
    title = "other languages"
    about = "Greedy answers to frames in five other languages around the prompt and its rephrases; the question itself stays."

    def wordings(self, question: Question, setting: Setting) -> Sequence[str]:  # noqa: ARG002
        """Each wording in each frame."""
        frames = _ASKING_ABROAD if question.is_open else _COMPLETING_ABROAD
        return [frame.format(text) for text in question.wordings for frame in frames]


class FewShot(_Asking):
    """The prompt and its rephrases after a few other facts in the same form, several times with other examples."""

    name = "few-shot"
    title = "few-shot prompts"
    about = f"Greedy answers after {_DEMONSTRATIONS} examples of general knowledge in the same form; {_DRAWS} draws of examples."

    def wordings(self, question: Question, setting: Setting) -> Sequence[str]:
        """Each wording after each draw."""
        draw = random.Random(f"{setting.seed} {question.prompt}")  # noqa: S311 - nothing is kept secret by it
        alike = [p for p in setting.demonstrations if p.prompt.endswith("?") == question.is_open]
        pool = alike if len(alike) >= _DEMONSTRATIONS else list(setting.demonstrations)
        shots = [draw.sample(pool, min(_DEMONSTRATIONS, len(pool))) for _ in range(_DRAWS)]
        return [_after(own, text) for text in question.wordings for own in shots]


def _after(demonstrations: Sequence[Probe], prompt: str) -> str:
    """The prompt after questions that are answered, or after sentences that are complete."""
    if prompt.endswith("?"):
        return "".join(f"Q: {shown.prompt}\nA: {shown.answers[0]}\n" for shown in demonstrations) + f"Q: {prompt}\nA:"
    return "".join(f"{shown.prompt} {shown.answers[0]}.\n" for shown in demonstrations) + prompt


def _by_frequency(said: Sequence[tuple[str, str]], budget: int) -> list[Candidate]:
    counts = Counter(answer for answer, _ in said)
    first = dict(reversed(said))
    return best([Candidate(text=answer, source=first[answer]) for answer, _ in counts.most_common()], budget)
