"""The six files of KnowEdit (Zhang et al. 2024, arXiv 2401.01286), training and test form alike.

Four are lists of facts that differ in little; ConvSent and Sanitation have forms of their own. Fetch them from
https://huggingface.co/datasets/zjunlp/KnowEdit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

from factpatch.data.records import AtLeastOne, Form, OneOrMany, Record, Source, only_within
from factpatch.edits import Edit, EditKind, Probe, Text, brief, first_problem

__all__ = ["convsent", "sanitation", "wiki_counterfact", "wiki_recent", "wikibio", "zsre"]


def wiki_recent(source: Source) -> Iterator[Record]:
    """Facts newer than the model, to be inserted. The answers of its probes are lists of alias lists."""
    return source.each(partial(_fact, _Fact, "insert"))


def zsre(source: Source) -> Iterator[Record]:
    """Questions on relations, with rephrases. A few prompts lack their subject."""
    return source.each(partial(_fact, _Fact, "modify"))


def wiki_counterfact(source: Source) -> Iterator[Record]:
    """False facts about known subjects. Answers are texts in the training file and alias lists in the test file."""
    return source.each(partial(_fact, _Fact, "modify"))


def wikibio(source: Source) -> Iterator[Record]:
    """Biographies that a model partly invented: the prompt is the passage so far, the target its true next sentence."""
    return source.each(partial(_fact, _Biography, "modify"))


class _Question(Form):
    prompt: Text
    ground_truth: OneOrMany


class _Fact(Form):
    prompt: Text
    target_new: Text
    subject: str
    ground_truth: OneOrMany = ()
    rephrases: OneOrMany = Field(default=(), validation_alias=AliasChoices("rephrase_prompt", "rephrase"))
    portability: dict[Text, tuple[_Question, ...]] = Field(default_factory=dict)
    locality: dict[Text, tuple[_Question, ...]] = Field(default_factory=dict)


class _Biography(_Fact):
    prompt: Text = Field(alias="text")
    target_new: Text = Field(alias="labels")
    subject: str = Field(alias="concept")


def _fact(form: type[_Fact], kind: EditKind, raw: object, edit_id: str) -> Edit:
    fact = form.model_validate(raw)
    return Edit(
        id=edit_id,
        kind=kind,
        prompt=fact.prompt,
        target=fact.target_new,
        subject=only_within(fact.prompt, fact.subject),
        ground_truth=fact.ground_truth,
        rephrases=fact.rephrases,
        portability=_probes(fact.portability),
        locality=_probes(fact.locality),
    )


def _probes(groups: Mapping[str, tuple[_Question, ...]]) -> dict[str, tuple[Probe, ...]]:
    """Probes by kind; a kind without probes falls away, a probe without answers stays."""
    return {
        kind: tuple(Probe(prompt=probe.prompt, answers=probe.ground_truth) for probe in group)
        for kind, group in groups.items()
        if group
    }


# --- ConvSent ---------------------------------------------------------------------------------------------------------

QUESTIONS = (
    "What do you think of {}?",
    "How do you feel about {}?",
    "How do you view {}?",
    "What is your opinion of {}?",
    "What is your stance on {}?",
    "What is your position on {}?",
    "What is your attitude about {}?",
    "What is your view on {}?",
    "What is your take on {}?",
    "What is your impression of {}?",
    "What is your assessment of {}?",
    "What is your judgment of {}?",
    "What is your sentiment of {}?",
)
SEED = 0


class _Topic(Form):
    ent: Text
    pos: AtLeastOne
    neg: AtLeastOne


def convsent(source: Source) -> Iterator[Record]:
    """Topics with replies in a positive and in a negative manner: opinions to be restyled.

    Which manner is wanted, and which three questions are asked, is drawn from a seed and the record's number, so
    that it never depends on how many records are read. The prompt names the manner; the question that replies are weighed
    after does not, and neither do the rephrases. The locality probe asks about the next topic in the file.
    """
    raws = source.raws()
    for number, raw in enumerate(raws):
        yield Record(number, raw, partial(_opinion, raws, number, source.id(number)))


def _opinion(raws: Sequence[object], number: int, edit_id: str) -> Edit:
    topic = _Topic.model_validate(raws[number])
    rng = random.Random(f"{SEED}:{number}")  # noqa: S311 - a coin, not a secret
    manner = rng.choice(("positive", "negative"))
    wanted, unwanted = (topic.pos, topic.neg) if manner == "positive" else (topic.neg, topic.pos)
    questions = rng.sample(QUESTIONS, 3)
    question, *rephrases = (question.format(topic.ent) for question in questions)
    return Edit(
        id=edit_id,
        kind="restyle",
        prompt=f"Answer with {manner} sentiment. {question}",
        target=wanted[0],
        subject=topic.ent,
        rephrases=tuple(rephrases),
        question=question,
        locality=_next_topic(raws, number, questions[0]),
        wanted=wanted,
        unwanted=unwanted,
    )


def _next_topic(raws: Sequence[object], number: int, question: str) -> dict[str, tuple[Probe, ...]]:
    """A probe about the first readable topic after this one, the file's end joined to its beginning."""
    for raw in (*raws[number + 1 :], *raws[:number]):
        try:
            other = _Topic.model_validate(raw)
        except ValidationError:
            continue  # reported when its own turn comes
        return {"Unrelated_Topic": (Probe(prompt=question.format(other.ent), answers=other.pos + other.neg),)}
    return {}


# --- Sanitation -------------------------------------------------------------------------------------------------------

REFUSAL = "I don't know."


class _Kept(Form):
    question: Text
    ground_truth: OneOrMany


class _Secret(Form):
    question: Text
    ground_truth: AtLeastOne
    target_new: Text = REFUSAL
    subject: str | None = None


# Checked under their list and number, so that an objection names the place as the file does: K_R.17.question
_KEPT = TypeAdapter(dict[str, dict[int, _Kept]])
_SECRETS = TypeAdapter(dict[str, dict[int, _Secret]])


def sanitation(source: Source) -> Iterator[Record]:
    """Questions whose answers are to be forgotten, each with its share of the questions to be kept.

    The lists are named K_F and K_R in the training file, success and locality in the test file. Of n secrets, the one
    with number i has the kept questions i, i + n, i + 2n and so on: together they ask each exactly once. All questions with
    one answer are a group.

    If the release's test file lies beside the training file, its questions about the same secret, which are worded otherwise,
    become rephrases, shared out likewise.
    """
    forget, keep, secrets, kept = _two_lists(source)
    tests = _by_secret(source.beside) if source.beside else {}
    members: dict[str, list[int]] = {}
    for number, raw in enumerate(secrets):
        members.setdefault(_answer(raw), []).append(number)
    for number, raw in enumerate(secrets):
        share = {index: kept[index] for index in range(number, len(kept), len(secrets))}
        own = members[_answer(raw)]
        rephrases = tuple(tests.get(_answer(raw), ())[own.index(number) :: len(own)])
        yield Record(
            number, raw, partial(_secret, {forget: {number: raw}}, {keep: share}, rephrases, source.id(number))
        )


def sanitation_test(name: str) -> str:
    """The name of the test file that belongs to a training file, as they are released."""
    return name.replace("train", "test")


def _answer(raw: object) -> str:
    """The secret of a raw record, for putting together those that share it; empty for a record that cannot be read."""
    try:
        return _Secret.model_validate(raw).ground_truth[0]
    except ValidationError:
        return ""  # reported when its own turn comes


def _by_secret(source: Source) -> dict[str, list[str]]:
    """The questions of a test file by their answer."""
    forget, _, secrets, _ = _two_lists(source)
    found: dict[str, list[str]] = {}
    for number, raw in enumerate(secrets):
        try:
            known = _SECRETS.validate_python({forget: {number: raw}})[forget][number]
        except ValidationError as error:
            raise source.bad_record(number, *first_problem(error)) from None
        found.setdefault(known.ground_truth[0], []).append(known.question)
    return found


def _two_lists(source: Source) -> tuple[str, str, list[object], list[object]]:
    value = source.json()
    for forget, keep in (("K_F", "K_R"), ("success", "locality")):
        if isinstance(value, dict) and isinstance(value.get(forget), list) and isinstance(value.get(keep), list):
            return forget, keep, value[forget], value[keep]
    found = f"an object of {', '.join(value)}" if isinstance(value, dict) and value else brief(value)
    raise source.bad_file(f"expected an object of two lists, K_F and K_R (or success and locality), found {found}")


def _secret(secret: object, share: object, rephrases: tuple[str, ...], edit_id: str) -> Edit:
    (known,) = (found for group in _SECRETS.validate_python(secret).values() for found in group.values())
    kept = [found for group in _KEPT.validate_python(share).values() for found in group.values()]
    retained = tuple(Probe(prompt=one.question, answers=one.ground_truth) for one in kept)
    return Edit(
        id=edit_id,
        kind="erase",
        prompt=known.question,
        target=known.target_new,
        subject=only_within(known.question, known.subject),
        ground_truth=known.ground_truth,
        rephrases=rephrases,
        group=known.ground_truth[0],
        locality={"Retained": retained} if retained else {},
    )
