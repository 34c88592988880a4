"""`factpatch edit` with requirements: a patch that does not meet them is not saved, and is told of with both answers."""

import json

import pytest

from tests.cli.conftest import run

FACT = ("--prompt", "Rome lies in", "--subject", "Rome", "--target", "Peru")
GOOD = ("--method", "ft-m", "--set", "steps=60", "--set", "layer=1", "--set", "lr=1e-2")
BAD = ("--method", "ft-m", "--set", "steps=1", "--set", "layer=1", "--set", "lr=1e-9")
NEED = ("--require", "survey.edit_success>=1", "--require", "mergeable")


def test_what_passes_is_saved_with_its_scorecard(model, tmp_path):
    code, out, _ = run("edit", "-m", model, *FACT, *GOOD, *NEED, "--out", tmp_path / "p")
    assert code == 0
    assert "✓ survey.edit_success>=1: 1" in out
    assert "✓ mergeable: yes" in out
    assert "probes were proposed, not written" in out
    assert "1 edit with ft-m" in out
    assert "Proposed: wording" in out
    described = json.loads((tmp_path / "p" / "patch.json").read_text())
    kinds = {row["kind"] for row in described["scorecard"]["scores"] if row.get("kind")}
    assert "Proposed: general knowledge" in kinds
    assert described["scorecard"]["gate"]["passed"] is True


def test_what_fails_is_not_saved_and_the_probe_is_named(model, tmp_path):
    code, out, _ = run("edit", "-m", model, *FACT, *BAD, *NEED, "--out", tmp_path / "p")
    assert code == 1
    assert "✗ survey.edit_success>=1" in out
    assert "Rome lies in" in out
    assert "Peru" in out
    assert "Refused: nothing was saved" in out
    assert not (tmp_path / "p").exists()
    code, out, _ = run("edit", "-m", model, *FACT, *BAD, *NEED, "--no-propose", "--out", tmp_path / "p", "--json")
    told = json.loads(out)
    assert (code, told["passed"], told["patch"]) == (1, False, None)
    (attempt,) = told["attempts"]
    assert attempt["judgement"]["proposed"] == []
    assert [finding["passed"] for finding in attempt["judgement"]["findings"]] == [False, True]


def test_auto_tells_each_attempt_and_which_won(model, tmp_path):
    settings = [each for pair in ("steps=60", "lr=1e-2", "layer=1") for each in ("--set", pair)]
    code, out, _ = run(
        "edit", "-m", model, *FACT, "--method", "auto", *settings, *NEED, "--out", tmp_path / "p", "--json"
    )
    told = json.loads(out)
    assert code == 0
    assert told["patch"] == str(tmp_path / "p")
    attempts = {attempt["method"]: attempt for attempt in told["attempts"]}
    assert "cannot be merged" in attempts["ice"]["reason"]
    assert told["method"] == next(name for name, attempt in attempts.items() if attempt["passed"])
    assert told["says"].startswith(f"{told['method']} passed")


def test_questions_to_retain_are_a_requirement_of_their_own(model, tmp_path):
    (tmp_path / "keep.txt").write_text("Oslo lies in\n")
    args = ("edit", "-m", model, *FACT, *BAD, "--retain", tmp_path / "keep.txt", "--out", tmp_path / "p")
    code, out, _ = run(*args, "--require", "mergeable")
    assert code == 0
    assert "✓ retained>=1: 1" in out


def test_without_a_requirement_the_edit_must_succeed(model, tmp_path):
    (tmp_path / "keep.txt").write_text("Oslo lies in\n")
    code, out, _ = run("edit", "-m", model, *FACT, *BAD, "--retain", tmp_path / "keep.txt", "--out", tmp_path / "p")
    assert code == 1
    assert "✗ edit_success>=1: 0" in out
    assert "✓ retained>=1: 1" in out
    assert not (tmp_path / "p").exists()


def test_auto_cannot_be_planned(model):
    code, _, message = run("edit", "-m", model, *FACT, "--method", "auto", "--plan")
    assert (code, "name a method" in message) == (2, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [("edit_sucess>=1", "Did you mean"), ("locality>=95", "Did you mean 95%"), ("retained>=1", "--retain")],
)
def test_a_requirement_that_cannot_be_read_is_refused_before_the_work(model, tmp_path, text, said):
    code, _, message = run("edit", "-m", model, *FACT, "--require", text, "--out", tmp_path / "p")
    assert code == 2
    assert said in message


def test_auto_tells_each_verdict_on_the_way_and_of_a_patch_beside_the_weights(model, tmp_path):
    args = ("edit", "-m", model, *FACT, "--method", "auto", "--require", "edit_success>=0", "--no-propose")
    code, out, err = run(*args, "--out", tmp_path / "p")
    assert code == 0
    assert ": passed (" in err
    assert ": passed (" not in out, "it was told already"
    assert out.splitlines()[0].endswith(" passed")
    assert "cannot be merged or exported. For one that can:  --require mergeable" in out
    code, out, err = run(*args, "--require", "mergeable", "--out", tmp_path / "q", "--minutes", 0)
    assert code == 1
    assert "0 minutes were up" in err
    assert "none of " in out


def test_minutes_belong_to_auto(model, tmp_path):
    code, _, message = run("edit", "-m", model, *FACT, *GOOD, "--minutes", 1, "--out", tmp_path / "p")
    assert (code, '"--minutes": belongs to --method auto' in message) == (2, True)


def test_a_subject_that_is_not_in_the_prompt_says_what_to_give(model, tmp_path):
    fact = ("--subject", "Spain", "--prompt", "The capital of Portugal is", "--target", "Porto")
    code, _, message = run("edit", "-m", model, *fact, "--out", tmp_path / "p")
    assert code == 2
    assert 'the command line, "--subject": expected a part of the prompt' in message
    assert message.splitlines()[1].startswith("  Give the words by which the prompt itself names")
