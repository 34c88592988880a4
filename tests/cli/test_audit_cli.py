"""`factpatch audit` over a tiny model on disk."""

import json

import pytest

from factpatch.analysis import audit as analysis
from factpatch.analysis.attacks.relearning import Study
from factpatch.cli.app import app
from factpatch.errors import MissingExtra
from factpatch.methods import create
from factpatch.report import plots
from factpatch.scoring.metrics import contains
from tests.analysis.test_audit import edits, taught
from tests.cli.conftest import run

FEW = ["--attacks", "greedy,head-projection,probability-delta", "--budget", "5"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny model with the planted secrets, and the one trained anew without them."""
    folder = tmp_path_factory.mktemp("models")
    for name, lm in (("told", taught()), ("anew", taught(secrets=False))):
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def patch(models):
    lm = taught()
    made = create("ft-m", {"layer": 3, "steps": 80, "lr": 1e-2}).fit(lm, edits())
    return made.save(models / "patch")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(analysis, "Study", lambda: Study(steps=2))


def test_a_shallow_erasure_is_found_and_exits_with_1(models, patch, tmp_path):
    code, out, _ = run("audit", "-m", models / "told", "--patch", patch, *FEW, "--out", tmp_path / "audit")
    assert code == 1
    assert out.startswith("Recoverable")
    assert "head projection" in out
    assert "Not tried" in out
    for name in ("page.html", "audit.md", "audit.json", "recall.csv", "recall.svg"):
        assert (tmp_path / "audit" / name).is_file()


def test_json_holds_every_candidate(models, patch):
    code, out, _ = run("audit", "-m", models / "told", "--patch", patch, *FEW, "--json", "--control", models / "anew")
    read = json.loads(out)
    assert code == 1
    assert read["recovered"] is True
    assert {trial["state"] for trial in read["trials"]} == {"before", "after", "control"}
    secrets = {fact["id"]: fact["secret"] for fact in read["facts"]}
    for trial in read["trials"]:
        said = [candidate["text"] for candidate in trial["candidates"]]
        assert (trial["rank"] is not None) == any(contains(each, secrets[trial["fact"]]) for each in said)


def test_a_model_that_was_never_told_exits_with_0(models, tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(json.dumps(edit.to_json()) for edit in edits()))
    code, out, _ = run("audit", "-m", models / "anew", "--before", models / "told", "--data", path, *FEW)
    assert code == 0
    assert out.startswith("Not recovered beyond chance")


def test_what_cannot_be_told_exits_with_1_and_says_so(models, tmp_path):
    """One fact, found, beside a control: what a control of one fact does not find says little."""
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(edits()[0].to_json()))
    code, out, _ = run("audit", "-m", models / "told", "--control", models / "anew", "--data", path, *FEW)
    assert code == 1
    assert out.startswith("Too few facts and decoys to tell")


def test_attacks_may_be_repeated_and_files_are_named(models, patch, tmp_path):
    attacks = ["--attacks", "probability-delta,greedy", "--attacks", "head-projection"]
    folder = tmp_path / "audit"
    _, out, _ = run("audit", "-m", models / "told", "--patch", patch, *attacks, "--json", "--out", folder)
    read = json.loads(out)
    assert [info["name"] for info in read["attacks"]] == ["greedy", "head-projection", "probability-delta"]
    assert {str(folder / name) for name in ("page.html", "audit.json", "recall.svg")} <= set(read["written"])


def test_it_is_told_before_the_work_that_nothing_can_be_drawn(monkeypatch, tmp_path):
    def no():
        raise MissingExtra("no Matplotlib")

    monkeypatch.setattr(plots, "check_drawable", no)
    code, _, error = run("audit", "--patch", "nowhere", "--out", tmp_path / "audit")
    assert (code, error) == (2, "no Matplotlib")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "Give --patch"),
        (["--patch", "nowhere"], "nowhere"),
        (["--patch", "nowhere", "--attacks", "telepathy"], "All attacks"),
        (["--patch", "nowhere", "--limit", "1"], "belong to --data"),
    ],
)
def test_bad_input_exits_with_2(args, words):
    code, _, error = run("audit", *args)
    assert code == 2
    assert words in error


def test_help_has_examples():
    assert any(command.name == "audit" and "--control" in (command.epilog or "") for command in app.registered_commands)
