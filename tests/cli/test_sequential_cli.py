"""`factpatch analyse sequential` over a tiny model on disk."""

import csv
import json
from pathlib import Path

import pytest

from factpatch.errors import MissingExtra
from factpatch.methods import find
from factpatch.patches import Patch
from factpatch.report import plots
from tests.cli.conftest import run

FTM = ["--method", "ft-m", "--set", "ft-m.steps=3", "--set", "ft-m.layer=1"]


@pytest.fixture
def questions(tmp_path):
    """Without answers, so that whatever the model says is to stay."""
    path = tmp_path / "canaries.txt"
    path.write_text("Rome lies in\n")
    return path


def analyse(model, facts, questions, *more):
    return run("analyse", "sequential", "-m", model, "--data", facts, "--no-fluency", "--canaries", questions, *more)


def test_results_pictures_and_a_second_run_that_finds_them(model, facts, questions, tmp_path, monkeypatch):
    folder = tmp_path / "decay"
    more = ["--method", "grace", "--set", "grace.steps=2", "--at", "1", "--out", folder]
    code, out, _ = analyse(model, facts, questions, *FTM, *more)
    assert code == 0
    for word in (
        "ft-m on own",
        "grace on own",
        "open",
        "survey",
        "portability  locality  fluency",
        "perplexity ratio  weights moved by",
        "Where each one breaks",
        "Broken at the first checkpoint",
        "canary facts",
        "the canary facts are left: the questions that the unedited model answers rightly",
        "2 patches asked for",
    ):
        assert word in out.replace("\n", " ") or word in out
    (unedited, *_) = (line.split() for line in out.splitlines() if line.startswith("unedited"))
    assert unedited == ["unedited", "0", "1.00", "0.0000", "–", "1", "of", "1"]
    names = {path.name for path in folder.iterdir()}
    for name in ("success-open", "success-survey", "age-open", "locality-open", "perplexity", "norm", "guard"):
        assert {f"{name}.svg", f"{name}.csv"} <= names
    assert not [name for name in names if "unfinished" in name]
    rows = list(csv.DictReader((folder / "decay.csv").read_text().splitlines()))
    assert [(r["method"], r["protocol"], r["patches"]) for r in rows] == [
        (method, protocol, n) for method in ("ft-m", "grace") for protocol in ("open", "survey") for n in ("1", "2")
    ]
    assert all(float(r["norm"]) > 0 for r in rows if r["method"] == "ft-m")
    assert all(float(r["norm"]) == 0 for r in rows if r["method"] == "grace")

    monkeypatch.setattr(find("ft-m"), "make", lambda *_: pytest.fail("it was made again"))
    code, out, _ = analyse(model, facts, questions, *FTM, *more, "--json")
    assert code == 0
    found = json.loads(out)
    assert [one["method"] for one in found] == ["ft-m", "grace"]
    assert [p["patches"] for p in found[0]["points"]["open"]] == [1, 2]
    assert [b["youngest"] for b in found[0]["ages"]["survey"][-1]["bins"]] == [0, 1]
    assert found[0]["config"]["steps"] == 3
    assert found[0]["vitals"][0]["norm"] == pytest.approx(float(rows[0]["norm"]))
    assert "0.5 times" in found[0]["rule"]
    for one in found:
        assert json.loads(Path(one["kept"]).read_text())["method"] == one["method"]
        assert Path(one["table"]) == folder / "decay.csv"
        assert sorted(map(Path, one["pictures"])) == sorted(folder.glob("*.svg"))


def test_that_nothing_can_be_drawn_is_said_before_the_work(model, facts, questions, tmp_path, monkeypatch):
    def missing():
        raise MissingExtra("needs Matplotlib")

    monkeypatch.setattr(plots, "_matplotlib", missing)
    monkeypatch.setattr("factpatch.lm.load_or_connect", lambda *_, **__: pytest.fail("it was loaded"))
    code, _, message = analyse(model, facts, questions, *FTM, "--out", tmp_path / "decay")
    assert (code, message) == (2, "needs Matplotlib")


def test_no_edit_made_exits_with_1(model, tmp_path, questions):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "Rome lies in", "target": "Peru"}')
    settings = ["--set", "rome.moment_tokens=300", "--set", "rome.moment_length=20", "--set", "rome.layer=1"]
    code, out, told = analyse(model, path, questions, "--method", "rome", *settings, "--out", tmp_path / "o")
    assert code == 1
    assert "no edit was made" in out
    assert "needs to know the subject" in told


def test_a_monitor_that_stops_saves_the_good_patches_and_exits_with_1(model, facts, questions, tmp_path):
    folder, lasting = tmp_path / "good", ["--max-perplexity", "1e9", "--min-canaries", "0", "--every", "2"]
    args = [*FTM, "--monitor", *lasting, "--out", folder]
    code, out, _ = analyse(model, facts, questions, *args, "--max-norm", "1e9", "--json")
    (found,) = json.loads(out)
    assert (code, found["stopped_early"], found["good"], found["asked"]) == (0, False, 2, 2)
    norms = [check["signs"][0]["value"] for check in found["checks"]]
    assert [check["patches"] for check in found["checks"]] == [0, 2]
    patches = [Patch.load(place) for place in found["patches"]]
    assert [p.provenance.edits[0].id for p in patches] == ["a", "b"]
    assert patches[1].provenance.fitted_on == (patches[0].id,)

    code, _, message = analyse(model, facts, questions, *args, "--max-norm", "1e9")
    assert code == 2, "what is there is not overwritten"
    assert "ft-m: already there" in message

    args[-1] = tmp_path / "again"
    code, out, _ = analyse(model, facts, questions, *args, "--max-norm", norms[1] * 0.999)
    assert code == 1
    assert "stopped after 1 of 2 patches, sick with b" in out
    assert "The weights have moved by" in out
    (place,) = (tmp_path / "again" / "ft-m").iterdir()
    assert Patch.load(place).id == patches[0].id
    assert place.name == "0001-a"


def test_what_could_not_be_watched_is_told(model, facts, tmp_path):
    path = tmp_path / "canaries.jsonl"
    path.write_text('{"prompt": "Rome lies in", "answers": ["nowhere at all"]}')
    code, _, told = analyse(
        model, facts, path, *FTM, "--limit", 1, "--monitor", "--max-perplexity", 1e9, "--max-norm", 1e9
    )
    assert code == 0
    assert "not watched with ft-m: canaries" in told


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ([*FTM, "--at", "1,x"], "--at"),
        ([*FTM, "--at", "0"], "--at"),
        ([*FTM, "--set", "grace.steps=1"], "METHOD.KEY=VALUE"),
        ([*FTM, "--set", "ft-m.no_such=1"], "no_such"),
        ([*FTM, "--max-norm", "0"], "above 0"),
        (["--method", "ft-n"], "ft-m"),
        ([*FTM, "--min-canaries", "2"], "min-canaries"),
    ],
)
def test_bad_input_exits_with_2(model, facts, questions, args, problem):
    code, out, message = analyse(model, facts, questions, *args)
    assert code == 2
    assert problem in message
    assert out == ""


def test_help_has_examples():
    code, out, _ = run("analyse", "sequential", "--help")
    assert code == 0
    assert "factpatch analyse sequential --method ft-m" in out
