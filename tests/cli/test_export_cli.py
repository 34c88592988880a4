"""`factpatch export` as a user types it, over a tiny model."""

import json

from tests.cli.conftest import run

FACT = ("--prompt", "Rome lies in", "--subject", "Rome", "--target", "Peru")


def made(model, tmp_path, *method):
    run("edit", "-m", model, *FACT, "--method", *method, "--out", tmp_path / "p")
    return tmp_path / "p"


def test_a_checkpoint_is_written_and_asked(model, tmp_path):
    patch = made(model, tmp_path, "ft-m", "--set", "layer=1", "--set", "lr=1e-2")
    code, out, _ = run("export", "checkpoint", "-m", model, "--patch", patch, "--out", tmp_path / "m")
    assert code == 0
    assert "answers 1 of 1 probes as the patched model does" in out
    assert "Peru" in (tmp_path / "m" / "README.md").read_text()


def test_an_adapter_tells_its_ranks(model, tmp_path):
    patch = made(model, tmp_path, "rome", "--set", "contexts=0", "--set", "covariance=false", "--set", "layer=1")
    args = ("export", "adapter", "-m", model, "--patch", patch, "--out", tmp_path / "a", "--json")
    code, out, _ = run(*args)
    told = json.loads(out)
    assert code == 0
    assert told["verified"]["holds"] is True
    assert [(r["kept"], r["rank"], r["error"]) for r in told["ranks"]] == [(1, 1, 0.0)]
    code, _, message = run(*args)
    assert code == 2
    assert "already there" in message


def test_what_cannot_be_exported_says_what_can(model, tmp_path):
    patch = made(model, tmp_path, "ice")
    code, _, message = run("export", "checkpoint", "-m", model, "--patch", patch, "--out", tmp_path / "m")
    assert code == 2
    assert "not a change of weights" in message
    code, _, message = run("export", "gguf", "-m", model, "--patch", patch, "--out", tmp_path / "m.gguf")
    assert code == 2
    assert "--template" in message


def test_a_workspace_stands_for_its_model_and_patches(model, tmp_path):
    patch = made(model, tmp_path, "ft-m", "--set", "layer=1", "--set", "lr=1e-2")
    space = tmp_path / "w"
    assert run("init", space, "-m", model, "--require", "mergeable")[0] == 0
    assert run("propose", "-C", space, "--patch", patch)[0] == 0
    assert run("accept", "-C", space)[0] == 0
    code, out, _ = run("export", "checkpoint", "-C", space, "--out", tmp_path / "m")
    assert code == 0
    assert "answers 1 of 1 probes" in out
    for more in ((), ("-C", space, "--patch", patch)):
        code, _, message = run("export", "checkpoint", "-m", model, *more, "--out", tmp_path / "n")
        assert code == 2
        assert "not both" in message
