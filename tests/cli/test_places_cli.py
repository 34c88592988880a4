"""`factpatch analyse places` over a tiny model that knows a small world."""

import json
import sys

import pytest

from tests.analysis.test_places import WORLD, taught
from tests.cli.conftest import run

QUICK = ("--steps", 2, "--samples", 1, "--top", 1, "--limit", 9)


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small-world"
    taught().model.save_pretrained(folder)
    taught().tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def world(tmp_path):
    path = tmp_path / "world.json"
    path.write_text(json.dumps(WORLD))
    return path


def test_tables_sentences_and_pictures(knowing, world, tmp_path):
    out = tmp_path / "out"
    code, said, _ = run(
        "analyse", "places", "--model", knowing, "--facts", world, "--out", out, "--method", "kn", "--edits", 1, *QUICK
    )
    assert code == 0
    assert "9 facts about 3 entities, in 15 wordings" in said
    assert "Facts of one entity: their neurons" in said
    assert "Hit@10" in said
    names = {"places.svg", "places.csv", "places-alike.svg", "places-alike.csv", "places-hits.svg", "places-hits.csv"}
    assert {path.name for path in out.iterdir()} == names | {"places.json"}
    assert len(json.loads((out / "places.json").read_text())["values"]) == 1


@pytest.mark.parametrize("limit", [2, 4])
def test_few_facts_can_be_compared_too(knowing, world, limit):
    args = ("--facts", world, "--edits", 0, "--json", *QUICK[:-1], limit)
    code, said, _ = run("analyse", "places", "--model", knowing, *args)
    assert code == 0
    assert json.loads(said)["facts"] == limit
    assert json.loads(said)["levels"]


def test_json_alone(knowing, world):
    code, said, _ = run("analyse", "places", "--model", knowing, "--facts", world, "--edits", 0, "--json", *QUICK)
    found = json.loads(said)
    assert code == 0
    assert found["facts"] == 9
    assert found["hits"] == []
    assert {row["level"] for row in found["levels"]} >= {"wording", "chain", "entity", "relation"}
    assert len(found["levels"]) == len(found["comparisons"])


def test_bad_input_is_told_before_the_work(knowing, world, tmp_path, model):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert (
        "already there" in run("analyse", "places", "--model", knowing, "--facts", world, "--out", tmp_path / "full")[2]
    )
    code, _, said = run("analyse", "places", "--model", knowing, "--facts", tmp_path / "none.json")
    assert (code, "no such file" in said) == (2, True)
    code, _, said = run("analyse", "places", "--model", model, "--facts", world)
    assert (code, "nothing can be compared" in said) == (2, True)


def test_json_names_what_was_written(knowing, world, tmp_path):
    args = ("--model", knowing, "--facts", world, "--edits", 0, "--json", "--out", tmp_path / "o", *QUICK)
    found = json.loads(run("analyse", "places", *args)[1])
    assert found["written"] == [str(path) for path in sorted((tmp_path / "o").iterdir())]
    assert str(tmp_path / "o" / "places.json") in found["written"]


def test_what_cannot_be_drawn_is_told_before_the_model_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    args = ("--model", tmp_path / "no-model", "--facts", world, "--out", tmp_path / "o")
    code, _, err = run("analyse", "places", *args)
    assert (code, "needs Matplotlib" in err) == (2, True)
