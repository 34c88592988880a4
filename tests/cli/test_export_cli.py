"""`factpatch export` as a user types it: of patches, of a workspace, and of models that need no template."""

import json

import pytest

from factpatch.export import card_path
from factpatch.workspace import Workspace
from tests.cli.conftest import run
from tests.export.test_llama_cpp import made, needs_llama_cpp

FACT = ("--prompt", "Rome lies in", "--subject", "Rome", "--target", "Peru")
FT = ("--method", "ft-m", "--set", "layer=1", "--set", "lr=1e-2")


def edited(model, tmp_path, *method):
    run("edit", "-m", model, *FACT, "--method", *method, "--out", tmp_path / "p")
    return tmp_path / "p"


def test_a_checkpoint_is_written_and_asked(model, tmp_path):
    patch = edited(model, tmp_path, "ft-m", "--set", "layer=1", "--set", "lr=1e-2")
    code, out, _ = run("export", "checkpoint", "-m", model, "--patch", patch, "--out", tmp_path / "m")
    assert code == 0
    assert "answers 1 of 1 probes as the patched model does" in out
    assert "Peru" in (tmp_path / "m" / "README.md").read_text()


def test_an_adapter_tells_its_ranks(model, tmp_path):
    patch = edited(model, tmp_path, "rome", "--set", "contexts=0", "--set", "covariance=false", "--set", "layer=1")
    args = ("export", "adapter", "-m", model, "--patch", patch, "--out", tmp_path / "a", "--json")
    code, out, _ = run(*args)
    told = json.loads(out)
    assert code == 0
    assert told["verified"]["holds"] is True
    assert [(r["kept"], r["rank"], r["error"]) for r in told["ranks"]] == [(1, 1, 0.0)]
    code, _, message = run(*args)
    assert code == 2
    assert "already there" in message
    code, out, _ = run(*args[:-2], tmp_path / "b")
    assert code == 0
    assert f'base = AutoModelForCausalLM.from_pretrained("{model}")' in out
    assert f'PeftModel.from_pretrained(base, "{tmp_path / "b"}")' in out


def test_what_cannot_be_exported_says_what_can(model, tmp_path):
    patch = edited(model, tmp_path, "ice")
    code, _, message = run("export", "checkpoint", "-m", model, "--patch", patch, "--out", tmp_path / "m")
    assert code == 2
    assert "not a change of weights" in message
    assert "factpatch edit --require mergeable" in message
    code, _, message = run("export", "gguf", "-m", model, "--patch", patch, "--out", tmp_path / "m.gguf")
    assert code == 2
    assert "--template" in message


@pytest.fixture(scope="module")
def space(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "facts"
    assert run("init", folder, "-m", model, "--no-propose", "--require", "edit_success>=0")[0] == 0
    assert run("propose", "-C", folder, *FACT, *FT)[0] == 0
    assert run("accept", "-C", folder, "1")[0] == 0
    return folder


def test_a_workspaces_stack_is_exported_with_its_own_model(space, tmp_path):
    code, out, _ = run("export", "checkpoint", "--workspace", space, "--out", tmp_path / "m", "--json")
    assert code == 0
    assert [answer["prompt"] for answer in json.loads(out)["verified"]["answers"]] == ["Rome lies in"]
    (patch,) = Workspace.open(space).stack()
    told = (tmp_path / "m" / "README.md").read_text()
    assert patch.id in told
    assert "The gate let" in told


def test_nothing_to_export_and_what_does_not_go_together_are_refused(space, model, tmp_path):
    empty = tmp_path / "empty"
    run("init", empty, "-m", model)
    for args, why in (
        (("-C", empty), "no patch lies on its model"),
        (("-C", space, "--dtype", "bfloat16"), "--dtype"),
        (("-C", space, "--model", model), "--model: a workspace has its own"),
    ):
        code, _, message = run("export", "checkpoint", *args, "--out", tmp_path / "m")
        assert (code, why in message) == (2, True), message
    code, _, message = run("export", "gguf", "-C", space, "--out", tmp_path / "m.md")
    assert (code, "ends in .gguf" in message) == (2, True)
    assert not (tmp_path / "m").exists()


@needs_llama_cpp
def test_a_gguf_file_is_written_from_nothing_and_asked(tmp_path):
    lm = made()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    run("edit", "-m", tmp_path / "model", *FACT, *FT, "--out", tmp_path / "p")
    path = tmp_path / "m.gguf"
    code, out, _ = run("export", "gguf", "-m", tmp_path / "model", "--patch", tmp_path / "p", "--out", path)
    assert code == 0
    assert "answers 1 of 1 probes as the patched model does" in out
    assert "Peru" in card_path(path).read_text()
