"""Recipes: whole, right, and run at a small size."""

import json
from pathlib import Path

import pytest

from factpatch.bench.reproduce import grids_of, recipes, recipes_named
from factpatch.data import readers
from factpatch.errors import BadConfig
from factpatch.methods import create
from factpatch.report.published import published
from tests.cli.conftest import model, run  # noqa: F401

METHODS = {"serac", "ice", "adalora", "mend", "rome", "memit", "ft-l", "ft-m"}
SCORES = {
    "wiki_recent": {"edit_success", "portability", "locality", "fluency"},
    "zsre": {"edit_success", "portability", "locality", "fluency"},
    "wiki_counterfact": {"edit_success", "portability", "locality", "fluency"},
    "wikibio": {"edit_success", "locality", "fluency"},
    "convsent": {"edit_success", "kl", "fluency"},
    "sanitation": {"edit_success", "locality", "fluency"},
}


def test_there_is_one_for_each_row_of_the_table():
    found = recipes()
    assert set(found) == {f"{data}-{method}" for data in SCORES for method in METHODS}
    for name, recipe in found.items():
        assert name == f"{recipe.dataset}-{recipe.method}"
        assert set(recipe.expected) == SCORES[recipe.dataset]
        assert recipe.dataset in readers()
    assert found["zsre-rome"].expected == {
        "edit_success": 96.77,
        "portability": 52.63,
        "locality": 53.67,
        "fluency": 573.75,
    }
    assert found["convsent-ice"].expected["kl"] == 49.73
    assert next(row for row in published()["sanitation"] if row.method == "rome").locality == 0.5031


@pytest.mark.parametrize("name", sorted(recipes()))
def test_each_is_a_grid_with_settings_that_the_method_has(name, tmp_path):
    recipe = recipes()[name]
    grid = recipe.grid(tmp_path)
    assert grid.model == "meta-llama/Llama-2-7b-chat-hf"
    assert grid.protocols == ("survey",)
    assert grid.mode == "single"
    (spec,) = grid.methods
    create(spec.name, spec.settings)
    assert "{" not in grid.model_dump_json().replace('{"', "").replace("{}", ""), "every place is filled in"
    assert Path(grid.data[0].file.partition(":")[2]).is_relative_to(tmp_path)
    own = recipe.grid(tmp_path, model="smollm2-135m", limit=2)
    assert (own.model, own.limit) == ("smollm2-135m", 2)
    assert set(own.methods[0].settings) <= {"data"}, "layers of one model mean nothing in another"
    where = own.methods[0].settings.get("data", f"{recipe.dataset}:{tmp_path}")
    assert str(tmp_path) in where
    assert where.partition(":")[2] != grid.data[0].file.partition(":")[2], "what is scored is not learned from"


def test_they_are_chosen_by_name_method_or_data():
    assert [recipe.name for recipe in recipes_named(["zsre-ft-m"])] == ["zsre-ft-m"]
    assert {recipe.dataset for recipe in recipes_named(["ft-m"])} == set(SCORES)
    assert {recipe.method for recipe in recipes_named(["wiki_recent"])} == METHODS
    assert len(recipes_named([])) == 48
    with pytest.raises(BadConfig, match="--list"):
        recipes_named(["rom"])


@pytest.fixture
def knowedit(tmp_path):
    """Two data sets of three records each, where the recipes look for them."""
    records = [
        {
            "subject": name,
            "prompt": f"{name} lies in",
            "target_new": "Peru",
            "ground_truth": ["Chad"],
            "rephrase_prompt": f"Find {name} in",
            "locality": {"Relation_Specificity": [{"prompt": "Oslo lies in", "ground_truth": ["Norway"]}]},
            "portability": {"Reasoning": [{"prompt": f"{name} is ruled from", "ground_truth": "Lima"}]},
        }
        for name in ("Rome", "Ulm", "Bern")
    ]
    for place in ("ZsRE/ZsRE-test-all.json", "wiki_counterfact/test_cf.json", "wiki_counterfact/train_cf.json"):
        file = tmp_path / "KnowEdit" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(records))
    return tmp_path / "KnowEdit"


def test_they_run_at_a_small_size_and_go_on(model, knowedit, tmp_path):  # noqa: F811
    small = ["reproduce", knowedit, "-m", model, "--limit", "2", "--out", tmp_path / "run"]
    code, out, _ = run(*small, "--recipe", "zsre-ice", "--recipe", "wiki_counterfact-ft-m", "--json")
    assert code == 0
    rows = {(row["recipe"], row["score"]): row for row in json.loads(out)}
    assert len(rows) == 8
    assert rows["zsre-ice", "edit_success"]["expected"] == 66.01
    assert all(0 <= row["measured"] <= 100 for row in rows.values() if row["score"] != "fluency")
    assert all(row["edits"] == 2 and row["model"] == "tiny" for row in rows.values())
    report = json.loads(run("report", tmp_path / "run", "--json")[1])
    success = next(row for row in report if row["method"] == "ft-m")["edit_success"]
    assert rows["wiki_counterfact-ft-m", "edit_success"]["measured"] == round(100 * success, 2)
    # Again, with what is missing; and what cannot be had is told, while the rest goes on.
    code, out, problems = run(*small, "--recipe", "ice")
    assert code == 1
    assert "zsre-ice" in out
    assert "wikibio-test-all.json" in problems
    assert run("reproduce", tmp_path / "nowhere", "--out", tmp_path / "run")[0] == 2


def test_the_unedited_model_is_asked_once_about_each_data_set(tmp_path):
    found = grids_of(recipes_named(["zsre", "ice"]), tmp_path, limit=1)
    assert [len(own) for _, own in found] == [1, 1, 1, 1, 1, 8]
    for grid, own in found:
        assert [spec.name for spec in grid.methods] == [recipe.method for recipe in own]
        assert {recipe.dataset for recipe in own} == {grid.data[0].file.partition(":")[0]}


def test_a_copy_of_the_model_is_the_model(tmp_path):
    rome = recipes()["zsre-rome"]
    assert rome.grid(tmp_path, model="/models/Llama-2-7b-chat-hf").methods[0].settings["layer"] == 5
    assert rome.grid(tmp_path, model="/models/Llama-3-8b").methods[0].settings == {}


def test_without_a_folder_they_can_only_be_listed(knowedit):
    code, out, _ = run("reproduce", "--list", "--recipe", "mend", "--json")
    assert code == 0
    assert {row["methods"][0]["name"] for row in json.loads(out)} == {"mend"}
    assert "96.77" in run("reproduce", "--list")[1].replace("\n", " ")
    assert run("reproduce", knowedit)[0] == 2


@pytest.mark.real
def test_they_run_on_the_default_model(knowedit, tmp_path):
    small = ["-m", "smollm2-135m", "--limit", "1", "--recipe", "zsre-ft-m", "--recipe", "zsre-ice"]
    code, out, _ = run("reproduce", knowedit, *small, "--out", tmp_path / "run", "--json")
    assert code == 0
    rows = {(row["recipe"], row["score"]): row for row in json.loads(out)}
    assert {row["model"] for row in rows.values()} == {"smollm2-135m"}
    assert rows["zsre-ft-m", "edit_success"]["measured"] == 100.0
    assert 0 < rows["zsre-ice", "fluency"]["measured"] < 700
