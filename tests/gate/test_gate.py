"""The gate over tiny models: what is proposed, what is judged, and which method is chosen."""

import pytest

from factpatch.edits import Edit, Probe
from factpatch.errors import BadConfig
from factpatch.gate import Gate, choose, propose
from factpatch.gate.propose import GENERAL, NEIGHBOURS, SAME_SUBJECT, rewordings
from factpatch.methods import create
from factpatch.testing import Snapshot, tiny_edits, tiny_lm

FRANCE = Edit(id="france", prompt="The capital of France is", subject="France", target="Lyon")
FTM = {"steps": 60, "layer": 1, "lr": 1e-2}


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ("The capital of France is", "France's capital is"),
        ("What is the capital of France?", "What is France's capital?"),
        ("France's capital was", "The capital of France was"),
        ("Who is France's leader?", "What is the leader of France?"),
        ("In France people drink", "It is well known that in France people drink"),
        ("France lies in", "It is well known that France lies in"),
        ("Does France have a king?", "Question: Does France have a king? Answer:"),
    ],
)
def test_prompts_are_reworded_by_rule(prompt, first):
    made = rewordings(Edit(id="1", prompt=prompt, subject="France", target="x"))
    assert made[0] == first
    assert len(made) == len(set(made)) == 3
    assert prompt not in made


def test_what_is_lacking_is_proposed_and_what_was_written_is_left():
    lm = tiny_lm()
    before = Snapshot.of(lm)
    rome = tiny_edits()[0]
    told = propose(lm, [FRANCE, rome])
    assert before.differences(lm) == []
    france, kept = told.edits
    assert kept == rome
    assert set(france.locality) == {NEIGHBOURS, SAME_SUBJECT, GENERAL}
    assert all("France" not in probe.prompt for probe in france.locality[NEIGHBOURS])
    assert all("France" in probe.prompt for probe in france.locality[SAME_SUBJECT])
    prompts = {*france.rephrases, *(probe.prompt for group in france.locality.values() for probe in group)}
    assert told.added == {("france", prompt) for prompt in prompts}


def test_the_model_names_others_of_a_subjects_kind():
    class Says:
        def answer(self, prompts, **_):
            assert "France:" in prompts[0]
            return ["Spain, France, the Lyon region, Italy, Spain, Peru and more than anybody knows, Chad, Mali"]

    (edit,) = propose(Says(), [FRANCE]).edits
    assert [probe.prompt for probe in edit.locality[NEIGHBOURS]] == [
        f"The capital of {name} is" for name in ("Spain", "Italy", "Chad")
    ]


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
    found = choose(lm, edits, gate, names, {"steps": "60", "lr": "1e-2", "layer": "1", "nothing": "1"})
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
    assert found.says == "none of 2 methods passed"
