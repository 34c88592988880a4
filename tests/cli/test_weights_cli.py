"""`factpatch analyse weights` and `factpatch inspect` over a tiny model on disk."""

import json
from pathlib import Path

import pytest

from factpatch.errors import MissingExtra
from factpatch.report import plots
from factpatch.testing import tiny_lm
from tests.cli.conftest import run

QUICK = ["--set", "steps=2", "--set", "layer=1"]
PART = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def patches(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    edit = ["--subject", "Rome", "--prompt", "Rome lies in", "--target", "Peru"]
    few = ["--set", "contexts=0", "--set", "moment_tokens=300", "--set", "moment_length=20"]
    for method, settings in (("rome", [*QUICK, *few]), ("ft-m", QUICK), ("ice", [])):
        code, _, _ = run("edit", "-m", model, "--method", method, *settings, *edit, "--out", folder / method)
        assert code in {0, 1}
    return folder


def test_patches_side_by_side(model, patches, tmp_path):
    folders = [patches / name for name in ("rome", "ft-m", "ice")]
    code, out, _ = run("analyse", "weights", *folders, "-m", model, "--out", tmp_path / "pictures")
    assert code == 0
    assert "rome, weight patch: rank 1 in one matrix (block 1)" in out
    assert "ft-m, weight patch: dense in one matrix (block 1)" in out
    assert "ice, context patch: changes no weights" in out
    assert "adds what is asked: 1 note before it, all" in out
    assert "rome, ft-m" in out  # and ice, which has no weights, is in no pair
    assert "ice," not in out.replace("ice, context", "")
    assert (tmp_path / "pictures" / "by-block.svg").is_file()
    assert (tmp_path / "pictures" / "overlap-cosine.csv").is_file()


def test_patches_as_json(model, patches):
    code, out, _ = run("analyse", "weights", patches / "rome", patches / "ft-m", "-m", model, "--json")
    found = json.loads(out)
    assert code == 0
    assert "pictures" not in found, "none was asked for"
    assert [p["name"] for p in found["patches"]] == ["rome", "ft-m"]
    assert found["patches"][0]["matrices"][0]["rank"] == 1
    assert found["overlaps"][0]["matrices"][0]["parameter"] == PART


def test_json_names_the_pictures(model, patches, tmp_path):
    two = (patches / "rome", patches / "ft-m")
    found = json.loads(run("analyse", "weights", *two, "-m", model, "--json", "--out", tmp_path / "a")[1])
    assert sorted(map(Path, found["pictures"])) == sorted((tmp_path / "a").glob("*.svg"))
    assert len(found["pictures"]) == 7, "three of the patches, four of their overlap"
    tiny_lm(seed=1).model.save_pretrained(tmp_path / "other")
    found = json.loads(run("inspect", model, tmp_path / "other", "--json", "--out", tmp_path / "b")[1])
    assert sorted(map(Path, found["pictures"])) == sorted((tmp_path / "b").glob("*.svg"))
    assert len(found["pictures"]) == 3


def test_that_nothing_can_be_drawn_is_said_before_the_work(model, patches, tmp_path, monkeypatch):
    def missing():
        raise MissingExtra("needs Matplotlib")

    monkeypatch.setattr(plots, "_matplotlib", missing)
    monkeypatch.setattr("factpatch.lm.load", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr("factpatch.analysis.checkpoints.compare", lambda *_, **__: pytest.fail("it was compared"))
    for args in (("analyse", "weights", patches / "rome", "-m", model), ("inspect", model, model)):
        code, _, message = run(*args, "--out", tmp_path / "pictures")
        assert (code, message) == (2, "needs Matplotlib")
        assert not (tmp_path / "pictures").exists()


def test_the_same_patch_twice_is_told_apart_by_name(model, patches, tmp_path):
    (tmp_path / "rome").symlink_to(patches / "rome")
    rome = patches / "rome"
    found = json.loads(run("analyse", "weights", rome, rome, patches / "ft-m", "-m", model, "--json")[1])
    assert len({p["name"] for p in found["patches"]}) == 3
    assert found["overlaps"][0]["cosine"] == pytest.approx(1)


def test_a_patch_of_another_model_is_refused(patches, tmp_path):
    other = tiny_lm(seed=9)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    code, _, message = run("analyse", "weights", patches / "rome", "-m", tmp_path / "other")
    assert code == 2
    assert "this patch was made for tiny" in message
    code, _, message = run("analyse", "weights", tmp_path, "-m", tmp_path / "other")
    assert code == 2
    assert "not a patch" in message


def test_inspect_finds_what_was_merged(model, patches, tmp_path):
    assert run("patch", "merge", patches / "rome", "-m", model, "--out", tmp_path / "merged")[0] == 0
    code, out, _ = run("inspect", model, tmp_path / "merged", "--out", tmp_path / "pictures")
    assert code == 1, "they differ"
    assert "29 of 30 tensors in both are equal, 1 differs: rank 1 in one matrix (block 1)" in out
    assert "mlp.down_proj" in out
    assert (tmp_path / "pictures" / "spectra.csv").is_file()
    found = json.loads(run("inspect", model, tmp_path / "merged", "--json")[1])
    assert [(m["parameter"], m["rank"]) for m in found["matrices"]] == [(PART, 1)]
    assert found["alike"] is False
    assert "pictures" not in found
    assert found["equal"] == found["compared"] - 1


def test_inspect_tells_of_types_and_refuses_patches(model, patches, tmp_path):
    tiny_lm().model.bfloat16().save_pretrained(tmp_path / "half")
    code, out, _ = run("inspect", model, tmp_path / "half")
    assert code == 0
    assert "30 of 30 tensors in both are equal, 0 differ" in out
    assert "of another type: 30 tensors, float32, then bfloat16" in out
    code, out, _ = run("inspect", model, tmp_path / "half", "--json")
    assert (code, json.loads(out)["alike"]) == (0, True)
    code, out, _ = run("inspect", model, tmp_path / "half", "--exact")
    assert code == 1
    assert "no more than rounding" in out
    strict = json.loads(run("inspect", model, tmp_path / "half", "--exact", "--rank-tol", "0", "--json")[1])
    assert all(m["rank"] == min(m["shape"]) for m in strict["matrices"])
    code, _, message = run("inspect", model, patches / "rome")
    assert code == 2
    assert "a patch, not a checkpoint" in message


def test_inspect_draws_by_the_names_of_the_two():
    from factpatch.cli.inspect import _difference

    assert _difference("base/model.safetensors", "tuned.safetensors") == "tuned.safetensors − model.safetensors"
    assert _difference("runs/one", "runs/two/") == "two − one"
    assert _difference("a/model", "b/model") == "b/model − a/model"
