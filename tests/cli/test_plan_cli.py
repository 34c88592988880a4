"""`factpatch edit --plan`."""

import json

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from factpatch.methods import plan as planning
from tests.cli.conftest import run

EDIT = ["--subject", "Rome", "--prompt", "Rome lies in", "--target", "Peru"]


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    """A plan that loads the model fails."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))


def test_a_plan_tells_what_is_needed_and_makes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("edit", "--plan", "-m", model, "--method", "memit", "--set", "layers=0,2", *EDIT)
    assert code == 0
    for words in (
        "1 edit with memit on tiny",
        "model.layers.2.mlp.down_proj.weight (32 × 48, rank 1)",
        "second moments of keys of blocks 0, 2 (0.018 MB on disk): once, 16,384 tokens",
        "Optimising values",
        "times the model",
        "It fits.",
    ):
        assert words in out
    assert list(tmp_path.iterdir()) == []


def test_a_plan_in_json(model, facts):
    code, out, _ = run("edit", "--plan", "-m", model, "--method", "ft-m", "--edits", facts, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["method"], told["edits"], told["dtype"], told["fits"]) == ("ft-m", 2, "float32", True)
    assert told["ratio"] == pytest.approx(told["peak_bytes"] / told["model_bytes"], abs=1e-3)
    assert told["changes"] == [{"part": "model.layers.2.mlp.down_proj.weight", "shape": [32, 48], "form": "dense"}]
    with safe_open(f"{model}/model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - not a dict
    assert told["model_bytes"] == stored


def test_without_an_edit_it_plans_for_one_short_fact(model):
    code, out, _ = run("edit", "--plan", "-m", model, "--dtype", "bfloat16")
    assert code == 0
    assert "1 edit with rome" in out
    assert "in bfloat16 on cpu" in out


def test_it_exits_with_1_where_memory_is_short(model, monkeypatch):
    monkeypatch.setattr(planning, "_free", lambda _: (1000, None))
    code, out, _ = run("edit", "--plan", "-m", model, "--method", "ft-m", *EDIT)
    assert code == 1
    assert "It does not fit." in out


def test_main_memory_is_told_apart_from_a_gpus(model, monkeypatch):
    monkeypatch.setattr(planning, "find_device", lambda _: planning.torch.device("cuda"))
    code, out, _ = run("edit", "--plan", "-m", model, "--dtype", "float32", *EDIT)
    assert code == 0
    assert "MB main memory" in out
    assert "what is free cannot be told" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([*EDIT], '"--out": is missing'),
        (["--plan", "--prompt", "Rome lies in"], '"--target": is missing'),
        (["--plan", "--limit", "1"], "belong to --edits"),
        (["--plan", "--out", "patch"], '"--out": does not belong to --plan'),
        (["--plan", "--base-url", "http://localhost"], '"--base-url": does not belong to --plan'),
        (["--plan", "--method", "rone"], 'no method "rone". Did you mean "rome"?'),
        (["--plan", "--set", "steps=0"], "steps"),
        (["--plan", "--model", "openai:gpt"], "a model behind an endpoint"),
        (["--plan", "--prompt", "Rome lies in", "--target", "Peru"], "needs to know the subject"),
    ],
)
def test_bad_input_is_told(model, args, words):
    where = [] if "--model" in args else ["-m", model]
    code, _, message = run("edit", *where, *args)
    assert code == 2
    assert words in message
