"""The guard: what should have stayed, and what did not."""

import math

import pytest
import torch

from factpatch.data.questions import guard_questions, guard_texts, read_questions
from factpatch.edits import Probe
from factpatch.errors import BadFile, BadRecord
from factpatch.lm.base import BaseLM
from factpatch.lm.predictions import Prediction
from factpatch.methods import create
from factpatch.scoring import guard, run_guard
from factpatch.scoring.guard import ANSWER_TOKENS, perplexity
from factpatch.testing import Snapshot, tiny_edits, tiny_lm
from tests.reference import plain

QUESTIONS = (Probe(prompt="Rome lies in", answers=("Peru",)), Probe(prompt="Oslo lies in"))


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def patch(lm):
    return create("ft-m", {"steps": 30, "lr": 1e-2}).fit(lm, tiny_edits()[:1])


def test_it_tells_what_changed(lm, patch):
    before = Snapshot.of(lm)
    report = run_guard(lm, patch, questions=QUESTIONS, texts=["Rome was a town.", "So it is said."])
    assert before.differences(lm) == []
    said = [lm.answer([probe.prompt], max_new=ANSWER_TOKENS)[0] for probe in QUESTIONS]
    with lm.patched(patch):
        now = [lm.answer([probe.prompt], max_new=ANSWER_TOKENS)[0] for probe in QUESTIONS]
    assert [(q.before, q.after) for q in report.questions] == list(zip(said, now, strict=True))
    assert report.questions[0].changed
    assert report.changed[0] == report.questions[0]
    assert (report.questions[0].was_right, report.questions[0].is_right) == (False, now[0].startswith("Peru"))
    assert (report.questions[1].was_right, report.questions[1].is_right) == (None, None)
    assert report.lost == ()
    assert report.perplexity_after != report.perplexity_before


def test_an_answer_that_was_right_and_no_longer_is_was_lost(lm, patch):
    (said,) = lm.answer(["Rome lies in"], max_new=ANSWER_TOKENS)
    right = Probe(prompt="Rome lies in?", answers=("Peru",))
    with lm.patched(patch):
        undone = run_guard(lm, questions=[right], texts=["So it is."])
    assert undone.questions[0].before == lm.answer(["Rome lies in?"], max_new=ANSWER_TOKENS)[0], "before is unpatched"
    kept = Probe(prompt="Rome lies in", answers=(said,))
    if said.strip() and any(char.isalnum() for char in said):
        report = run_guard(lm, patch, questions=[kept], texts=["So it is."])
        assert report.lost == report.questions


def test_nothing_changes_without_a_patch(lm):
    report = run_guard(lm)
    assert report.changed == report.lost == ()
    assert report.perplexity_before == report.perplexity_after
    assert len(report.questions) == len(guard_questions()) > 30


def test_perplexity_equals_the_plain_definition(lm):
    texts = ["Rome was a town once.", "So it is said of it."]
    logprobs = []
    for text in texts:
        first, rest = text.split(maxsplit=1)
        ids, n = plain.encode(lm, first, rest)
        with torch.no_grad():
            logprobs += plain.target_logprobs(lm.model, ids, n).tolist()
    assert perplexity(lm, texts) == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-4)


def test_a_ruined_models_perplexity_is_infinite(lm, monkeypatch):
    monkeypatch.setattr(guard, "predict", lambda lm, texts: [Prediction((1,), (2,), (-1e4,)) for _ in texts])
    assert perplexity(lm, ["Rome was a town once."]) == math.inf


class _Asked(BaseLM):
    """A model behind a wall that always says the same."""

    fingerprint = "f"

    def answer(self, prompts, *, chat=False, max_new=64):
        return ["Peru"] * len(prompts)

    def describe(self):
        return {}


def test_a_model_that_can_only_be_asked_has_no_perplexity():
    report = run_guard(_Asked("far"), questions=QUESTIONS)
    assert report.perplexity_before is report.perplexity_after is None
    assert [q.was_right for q in report.questions] == [True, None]


def test_what_is_built_in():
    assert all(probe.answers for probe in guard_questions())
    assert len({probe.prompt for probe in guard_questions()}) == len(guard_questions())
    assert all(len(text.split()) > 30 for text in guard_texts())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.txt", "Who?\n\nWhere is it?\nWho?\n"),
        ("q.jsonl", '{"prompt": "Who?"}\n{"prompt": "Where is it?", "note": 3}\n'),
        ("q.json", '[{"prompt": "Who?"}, {"prompt": "Where is it?"}]'),
        ("q.csv", "prompt,answers\nWho?,\nWhere is it?,\n"),
    ],
)
def test_questions_of_ones_own(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_questions(tmp_path / name) == (Probe(prompt="Who?"), Probe(prompt="Where is it?"))


def test_a_cell_holds_several_answers(tmp_path):
    (tmp_path / "q.csv").write_text("prompt,answers\nWho?,Ann|Ann Lee\n")
    assert read_questions(tmp_path / "q.csv") == (Probe(prompt="Who?", answers=("Ann", "Ann Lee")),)


@pytest.mark.parametrize(
    ("name", "text", "error", "problem"),
    [
        ("q.txt", "\n", BadFile, "holds no question"),
        ("q.xml", "<a/>", BadFile, "unknown form"),
        ("q.jsonl", "{", BadFile, "expected JSON"),
        ("q.jsonl", '{"answers": ["a"]}', BadRecord, "record 0.*prompt"),
        ("q.json", "[3]", BadRecord, "expected an object"),
        ("none.txt", None, BadFile, "no such file"),
    ],
)
def test_bad_questions_are_named(tmp_path, name, text, error, problem):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=problem):
        read_questions(tmp_path / name)
