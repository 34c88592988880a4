"""The gate over tiny models: what is proposed, what is judged, and which method is chosen."""

import json
from typing import ClassVar

import pytest

from factpatch.edits import Edit, Probe
from factpatch.errors import BadConfig, FetchError
from factpatch.gate import AutoChoice, Finding, Gate, Judgement, Proposal, Requirement, Verdict, choose, propose
from factpatch.gate.auto import Attempt, attempt
from factpatch.gate.propose import GENERAL, NEIGHBOURS, SAME_SUBJECT, rewordings
from factpatch.methods import create, find
from factpatch.scoring import Scorecard
from factpatch.testing import Snapshot, tiny_edits, tiny_lm

FRANCE = Edit(id="france", prompt="The capital of France is", subject="France", target="Lyon")
FTM = {"steps": 60, "layer": 1, "lr": 1e-2}


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ("The capital of France is", "France's capital is"),
        ("What is the capital of France?", "What is France's capital?"),
        ("France's capital was", "The capital of France was"),
        ("Who is France's leader?", "Who is the leader of France?"),
        ("Who was the king of France?", "Who was France's king?"),
        ("In France people drink", "It is well known that in France people drink"),
        ("France lies in", "It is well known that France lies in"),
        ("Does France have a king?", "Question: Does France have a king? Answer:"),
        ("The France lies in", "It is well known that the France lies in"),
    ],
)
def test_prompts_are_reworded_by_rule(prompt, first):
    made = rewordings(Edit(id="1", prompt=prompt, subject="France", target="x"))
    assert made[0] == first
    assert len(made) == len(set(made)) == 3
    assert prompt not in made


def test_a_name_keeps_its_article_as_it_is_written():
    moon = Edit(id="1", prompt="The Moon goes around", subject="The Moon", target="Mars")
    assert all("The Moon" in text for text in rewordings(moon))


def test_what_is_lacking_is_proposed_and_what_was_written_is_left():
    lm = tiny_lm()
    before = Snapshot.of(lm)
    rome = tiny_edits()[0]
    told = propose(lm, [FRANCE, rome])
    assert before.differences(lm) == []
    france, kept = told.edits
    assert kept == rome
    assert {NEIGHBOURS, GENERAL} <= set(france.locality) <= {NEIGHBOURS, SAME_SUBJECT, GENERAL}
    assert all("France" not in probe.prompt for probe in france.locality[NEIGHBOURS])
    prompts = {*france.rephrases, *(probe.prompt for group in france.locality.values() for probe in group)}
    assert told.added == {("france", prompt) for prompt in prompts}


class Says:
    """A model that knows what is of a kind, and answers everything else with the same words."""

    KINDS: ClassVar = {
        "France": "a country",
        "Spain": "A country.",
        "Italy": "a country",
        "Chad": "country",
        "Peru": "a river",
    }

    def __init__(self, rest):
        self.rest = rest

    def answer(self, prompts, **_):
        return [self.say(*prompt.splitlines()[:: prompt.count("\n")]) for prompt in prompts]

    def say(self, task, last):
        if task.startswith("Each line names things"):
            return (
                " the sea, Spain, France, Lyon itself, Italy, Spain, Peru, more than anybody has ever known, Chad, Mali"
            )
        kind = task.startswith("Each line says what something is")
        return self.KINDS.get(last.removesuffix(":"), "") if kind else self.rest


ANTHEM = FRANCE.model_copy(update={"prompt": "The anthem of France is"})


def test_the_model_names_others_of_a_subjects_kind():
    (edit,) = propose(Says(""), [ANTHEM]).edits
    assert [probe.prompt for probe in edit.locality[NEIGHBOURS]] == [
        f"The anthem of {name} is" for name in ("Spain", "Italy", "Chad")
    ]


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("Europe", 3),
        ("", 1),
        ("a place that everybody in the world knows", 1),
        ("in France", 1),
        ("It is Lyon.", 1),
        ("near Paris", 1),
    ],
)
def test_of_the_subject_only_what_the_model_says_in_a_few_words_is_held(said, count):
    edit = ANTHEM.model_copy(update={"ground_truth": ("Paris",)})
    (proposed,) = propose(Says(said), [edit]).edits
    held = proposed.locality[SAME_SUBJECT]
    assert [probe.answers for probe in held] == [()] * count
    assert all(probe.prompt.endswith("\nFrance:") for probe in held)


def test_general_knowledge_is_of_several_sorts():
    (edit,) = propose(tiny_lm(), [ANTHEM]).edits
    starts = {probe.prompt.partition(" of ")[0] for probe in edit.locality[GENERAL]}
    assert len(starts) == len(edit.locality[GENERAL]) == 3


def test_where_the_sample_asks_the_same_its_subjects_are_neighbours():
    (edit,) = propose(tiny_lm(), [FRANCE]).edits
    assert [probe.prompt for probe in edit.locality[NEIGHBOURS]][:2] == [
        "The capital of Cuba is",
        "The capital of Kenya is",
    ]


@pytest.mark.parametrize(
    ("other", "lost"),
    [
        ({"prompt": "The anthem of Spain is"}, "The anthem of Spain is"),
        ({"prompt": "They sing", "rephrases": ["The anthem of Italy is"]}, "The anthem of Italy is"),
        ({"prompt": "Chad exports", "subject": "Chad"}, "The anthem of Chad is"),
        ({"prompt": "The capital of Germany is"}, "The capital of Germany is"),
        ({"prompt": "Germany exports", "subject": "Germany"}, "The capital of Germany is"),
    ],
)
def test_what_another_edit_of_the_batch_changes_is_not_asked_to_stay(other, lost):
    def asked(*edits):
        (first, *_) = propose(Says("Europe"), edits).edits
        return {probe.prompt for group in first.locality.values() for probe in group}

    assert lost in asked(ANTHEM)
    assert lost not in asked(ANTHEM, Edit.from_json({"id": "other", "target": "nothing", **other}))


def test_without_a_subject_general_knowledge_is_asked():
    (edit,) = propose(tiny_lm(), [FRANCE.model_copy(update={"subject": None})]).edits
    assert set(edit.locality) == {GENERAL}


def test_an_erased_fact_gets_no_other_wordings():
    (edit,) = propose(tiny_lm(), [FRANCE.model_copy(update={"kind": "erase"})]).edits
    assert edit.rephrases == ()


def test_a_good_patch_passes_and_a_bad_one_is_told_apart():
    lm, edits = tiny_lm(), tiny_edits()[:1]
    gate = Gate.of("survey.edit_success>=1", "mergeable")
    good = create("ft-m", FTM).fit(lm, edits)
    judged = gate.judge(lm, edits, good)
    assert judged.passed
    assert judged.to_json()["passed"] is True
    idle = create("ft-m", {"steps": 1, "lr": 1e-9, "layer": 1}).fit(lm, edits)
    judged = gate.judge(lm, edits, idle)
    assert not judged.passed
    (finding,) = judged.verdict.failed
    (lost,) = finding.lost
    assert (lost.prompt, lost.answers, lost.proposed) == ("Rome lies in", ("Peru",), False)
    judged = Gate.of("rephrase>=1").judge(lm, [FRANCE], idle)
    assert [lost.proposed for lost in judged.verdict.failed[0].lost] == [True] * 3


def test_only_what_a_patch_adds_is_held_against_it():
    lm = tiny_lm()
    rome, ann = tiny_edits()
    wrecked = create("ft-m", FTM | {"lr": 1.0, "steps": 5}).fit(lm, [rome])
    ann = ann.model_copy(update={"locality": {"Other": (Probe(prompt="In Oslo they"), Probe(prompt="We like"))}})
    with lm.patched(wrecked):
        idle = create("ft-m", {"steps": 1, "lr": 1e-12, "layer": 2}).fit(lm, [ann])
        judged = Gate.of("locality>=1").judge(lm, [ann], idle)
    assert judged.passed, "the earlier patch changed these answers, not this one"
    rows = [row for row in judged.scorecard.scores if row.role == "locality"]
    assert rows[0].said_before != lm.ask(rows[0].prompt)


def test_retained_without_questions_is_refused():
    with pytest.raises(BadConfig, match="no questions to retain"):
        Gate.of("retained>=1")


def test_the_cheapest_that_passes_wins_and_the_others_say_why():
    lm, edits = tiny_lm(), tiny_edits()[:1]
    gate = Gate.of("survey.edit_success>=1", "mergeable")
    names = ["ice", "mend", "ultraedit", "ft-m", "rome"]
    # Of the names that are given, each is tried in turn; by itself it goes by effort.
    found = choose(lm, edits, gate, names, {"steps": "60", "lr": "1e-2", "layer": "1"})
    told = {attempt.method: attempt for attempt in found.attempts}
    assert list(told) == ["ice", "mend", "ultraedit", "ft-m"], "what is dearer is not tried"
    assert "cannot be merged" in told["ice"].reason
    assert "trained" in told["mend"].reason
    assert not told["ultraedit"].passed
    assert found.patch.provenance.method == "ft-m"
    assert found.says == "ft-m passed; ultraedit cost less and failed"
    assert found.judgement.passed


def test_if_none_passes_the_best_attempt_is_told():
    lm, edits = tiny_lm(), tiny_edits()[:1]
    found = choose(lm, edits, Gate.of("edit_success>=1"), ["ft-l", "wise"], {"steps": "1", "lr": "1e-9"})
    assert found.patch is None
    assert not found.judgement.passed
    assert found.says == "none of 2 methods passed; ft-l came nearest"


def test_of_attempts_that_fail_as_much_the_one_that_lacks_the_least_is_the_best():
    def tried(name, *values):
        need = Requirement.parse("locality>=0.9")
        findings = tuple(Finding(requirement=need, value=value, passed=need.holds(value)) for value in values)
        card = Scorecard(versions={"open": 1}, chat=False, scores=())
        return Attempt(name, Judgement(Proposal((), frozenset()), card, Verdict(findings=findings)))

    found = AutoChoice((tried("two", 0.8, 0.8), tried("far", 0.9, 0.1), tried("near", 0.8, 0.9), Attempt("none")), None)
    assert found.best.method == "near"
    assert found.judgement is found.best.judgement


def test_where_nothing_can_be_scored_no_second_method_is_tried():
    edits = [tiny_edits()[0].model_copy(update={"portability": {}})]
    found = choose(tiny_lm(), edits, Gate.of("portability>=0.5"), ["ice", "ft-m", "rome"], {"steps": "1"})
    assert [each.method for each in found.attempts] == ["ice"]
    assert (
        found.says
        == "no patch could pass; portability>=0.5: no edit has a portability probe; write some into the edits' file"
    )


def test_a_setting_that_no_method_knows_is_refused_before_the_work():
    with pytest.raises(BadConfig, match='Did you mean "threshold"'):
        choose(tiny_lm(), tiny_edits(), Gate.of("mergeable"), settings={"treshold": "1"})


def test_a_method_that_fails_on_this_machine_leaves_the_turn_to_the_next(monkeypatch):
    def offline(*_, **__):
        raise FetchError("no network.\n  Go online.")

    monkeypatch.setattr(find("ft-l"), "make", offline)
    found = choose(tiny_lm(), tiny_edits()[:1], Gate.of("mergeable"), ["ft-l", "ft-m"], {"steps": "1"})
    assert [(each.method, each.reason) for each in found.attempts] == [("ft-l", "no network."), ("ft-m", "")]
    assert found.patch is not None


def test_a_patch_keeps_the_verdict_with_its_scorecard():
    lm, edits = tiny_lm(), tiny_edits()[:1]
    found = attempt(lm, edits, Gate.of("mergeable", full=True), create("ft-m", {"steps": "1"}))
    record = found.judgement.record()
    assert {name: record[name] for name in found.judgement.scorecard.to_json()} == found.judgement.scorecard.to_json()
    assert record["gate"]["findings"][0]["requirement"]["measure"] == "mergeable"
    assert found.says == "ft-m passed"
    assert json.loads(json.dumps(record)) == record


def test_each_attempt_is_told_as_it_is_known_and_progress_says_whose_it_is():
    lm, edits = tiny_lm(), tiny_edits()[:1]
    heard, doing = [], []
    choose(
        lm, edits, Gate.of("survey.edit_success>=1", "mergeable"), ["ice", "ultraedit", "ft-m"],
        {"steps": "60", "lr": "1e-2", "layer": "1"},
        lambda what, done, of: doing.append((what, len(heard))), watch=lambda each: heard.append(each.method),
    )  # fmt: skip
    assert heard == ["ice", "ultraedit", "ft-m"]
    assert {what.partition(": ")[0] for what, known in doing if known == 2} == {"ft-m"}


def test_when_the_time_is_up_what_is_at_work_is_stopped_and_the_rest_is_not_tried(monkeypatch):
    lm, edits = tiny_lm(), tiny_edits()[:1]
    before = Snapshot.of(lm)
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("factpatch.gate.auto.time.perf_counter", lambda: next(clock))
    found = choose(lm, edits, Gate.of("mergeable"), ["ft-m", "ft-l"], {"steps": "50", "layer": "1"}, minutes=0.5)
    assert [each.says for each in found.attempts] == [
        "ft-m: stopped: 0.5 minutes were up", "ft-l: not tried: 0.5 minutes were up",
    ]  # fmt: skip
    assert found.patch is None
    assert before.differences(lm) == []


def test_where_none_passes_it_is_told_what_would_help():
    lm, edits = tiny_lm(), tiny_edits()[:1]
    gate = Gate.of("edit_success>=1", "survey.edit_success>=1.0", "mergeable")
    found = choose(lm, edits, gate, ["ice", "grace", "ft-l"], {"steps": "1", "lr": "1e-9"})
    assert found.patch is None
    assert "Without mergeable, ice, grace could be tried too" in found.advice
    assert "would pass" not in found.advice, "no bound that asks for anything is met"

    def tried(value):
        need = Requirement.parse("locality>=0.9")
        card = Scorecard(versions={"open": 1}, chat=False, scores=())
        finding = Finding(requirement=need, value=value, passed=need.holds(value))
        return Attempt("near", Judgement(Proposal((), frozenset()), card, Verdict(findings=(finding,))))

    assert AutoChoice((tried(0.8),), None).advice == "With locality>=0.8 in place of locality>=0.9, near would pass."
    assert AutoChoice((tried(1.0),), found.patch or object()).advice == ""
