"""The workspace's commands over a tiny model on disk."""

import json

import pytest
import typer
from typer.testing import CliRunner

from factpatch.cli import workspace
from factpatch.errors import FactpatchError

FT = ["--method", "ft-m", "--set", "steps=40", "--set", "lr=0.03", "--set", "layer=1"]
NEEDS = ["--require", "survey.edit_success>=0.9", "--no-propose"]
ROME = ["--subject", "Rome", "--prompt", "Rome lies in", "--target", "Peru"]
OSLO = ["--subject", "Oslo", "--prompt", "Oslo lies in", "--target", "Chad"]

app = typer.Typer(rich_markup_mode="rich")
workspace.register(app)


def run(*args):
    """Exit code, stdout and the error message of one command, as `main` would report them."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if isinstance(result.exception, FactpatchError):
        return 2, result.stdout, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def done(*args):
    """The JSON of a command that must succeed."""
    code, out, error = run(*args, "--json")
    assert code == 0, (out, error)
    return json.loads(out)


@pytest.fixture
def space(model, tmp_path, monkeypatch):
    done("init", tmp_path / "w", "-m", model, *FT, *NEEDS, "--author", "Ann")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def two(space):
    for number, fact in enumerate((ROME, OSLO), 1):
        assert done("propose", *fact)["proposal"]["number"] == number
        assert done("accept", number)["entry"]["number"] == number + 1
    return space


def test_the_whole_loop(space, tmp_path):
    code, out, _ = run("propose", *ROME, "--message", "ticket 12")
    assert code == 0
    assert "✓ survey.edit_success>=0.9: 1" in out
    assert "factpatch accept 1" in out
    _, out, _ = run("list")
    assert "0 patches, 1 proposals" in out
    assert "Rome lies in → Peru" in out
    code, out, _ = run("accept", 1)
    assert code == 0
    assert "Accepted as entry 2" in out
    _, out, _ = run("log")
    assert out.index("accept") < out.index("init")
    assert "ticket 12" in out
    code, out, _ = run("diff", 1)
    assert code == 0
    assert "+ Rome lies in → Peru" in out
    assert "model.layers.1.mlp.down_proj.weight" in out
    code, out, _ = run("checkout", "--out", tmp_path / "c")
    assert code == 0
    code, out, _ = run("verify", "--model", tmp_path / "c")
    assert code == 0
    assert "to the bit the base with the stack of entry 2" in out
    code, out, _ = run("revert", 2, "--message", "enough")
    assert code == 0
    assert "Reverted entry 2 as entry 3" in out
    assert "0 patches, 0 proposals" in run("list")[1]
    code, out, _ = run("verify")
    assert code == 0
    assert "3 entries" in out


def test_json_of_everything(two, tmp_path):
    assert [row["entry"] for row in done("list")["stack"]] == [2, 3]
    assert [row["entry"] for row in done("list", "--at", 2)["stack"]] == [2]
    assert [entry["action"] for entry in done("log")["entries"]] == ["init", "accept", "accept"]
    assert [row["prompt"] for row in done("diff", 2, 3, "--no-ask")["edits"]] == ["Oslo lies in"]
    assert done("checkout", "--at", 2, "--out", tmp_path / "c")["entry"] == 2
    assert done("verify", "--model", tmp_path / "c")["model"]["entry"] == 2
    assert done("revert", 3)["entry"]["reverts"] == 3


def test_what_the_gate_refuses_exits_with_1_and_tells_both_answers(space):
    code, out, _ = run("propose", *ROME, "--method", "ft-m", "--set", "steps=1", "--set", "lr=1e-9")
    assert code == 1
    assert "✗ survey.edit_success>=0.9" in out
    assert "Rome lies in" in out
    assert "Refused, and nothing was changed" in out
    told = json.loads(run("propose", *ROME, "--method", "ft-m", "--set", "steps=1", "--set", "lr=1e-9", "--json")[1])
    assert not told["done"]
    assert told["judgement"]["findings"][0]["lost"][0]["prompt"] == "Rome lies in"
    assert not list((space / "proposals").iterdir())


def test_a_conflict_exits_with_1_unless_it_is_allowed(two):
    other = [*ROME[:-1], "Cuba"]
    code, out, _ = run("propose", *other)
    assert code == 1
    assert "! contradiction of edit" in out
    assert done("propose", *other, "--allow-conflicts")["conflicts"][0]["kind"] == "contradiction"


def test_a_patch_folder_may_be_proposed(two, tmp_path):
    (folder,) = [path for path in (two / "patches").iterdir() if path.name == done("list")["stack"][1]["patch"]]
    done("revert", 3)
    assert done("propose", "--patch", folder)["proposal"]["patch"] == folder.name


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["list", "-C", "/nowhere"], "not a workspace"),
        (["propose", "--prompt", "x"], "--target"),
        (["propose", "--patch", "p", "--prompt", "x"], "takes the place of"),
        (["propose", *ROME, "--method", "roem"], "Did you mean"),
        (["accept", 7], "proposal 7: there is none"),
        (["revert", 7], "entry 7: there is none"),
        (["revert", 1], "brought no patch in"),
        (["diff", 9], "the ledger has 1 to 1"),
        (["list", "--at", 9], "the ledger has 1 to 1"),
        (["checkout", "--out", "."], "already there"),
        (["init", "."], "already a workspace"),
        (["init", "new", "--require", "edit_sucess>=1"], "Did you mean"),
    ],
)
def test_bad_input_is_told_and_nothing_is_left(space, model, args, words):
    code, _, error = run(*args, *(["-m", model] if args[0] == "init" else []))
    assert code == 2
    assert words in error
    assert not (space / "new").exists()


def test_damage_is_named_with_exit_1_and_the_rest_is_shown(two, tmp_path):
    path = two / "ledger" / "000003.json"
    path.write_text(path.read_text().replace('"proposal": 2', '"proposal": 9'))
    code, out, error = run("log")
    assert code == 1
    assert "ledger/000003.json: was changed after it was written" in error
    assert "accept" in out
    code, out, _ = run("verify")
    assert code == 1
    assert "✗ ledger/000003.json" in out
    code, _, error = run("list")
    assert code == 2
    assert "--at 2" in error
    assert "1 patches" in run("list", "--at", 2)[1]
    (two / "workspace.json").write_text("{")
    code, out, _ = run("verify", "--json")
    assert code == 1
    assert {fault["path"] for fault in json.loads(out)["faults"]} == {"workspace.json", "ledger/000003.json"}


@pytest.mark.parametrize(
    "command", ["init", "propose", "accept", "list", "diff", "revert", "log", "checkout", "verify"]
)
def test_help_has_examples(command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"factpatch {command}" in out
