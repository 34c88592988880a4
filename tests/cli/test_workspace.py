"""The workspace's commands over a tiny model on disk."""

import json
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

import factpatch.methods
from factpatch.cli import workspace
from factpatch.errors import FactpatchError
from factpatch.workspace import Workspace
from tests.workspace import planted

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
    assert "0 patches, 1 proposal\n" in out
    assert "Rome lies in → Peru" in out
    assert "ticket 12" in out
    code, out, _ = run("accept", "--message", "checked by hand")
    assert code == 0
    assert "Accepted as entry 2" in out
    assert "earlier" not in out
    _, out, _ = run("log")
    assert out.index("accept") < out.index("init")
    assert "    Rome lies in → Peru\n    ticket 12\n    checked by hand\n" in out
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
    assert f"factpatch verify --expect {done('log')['entries'][-1]['hash']}\n" in out


def test_json_of_everything(two, tmp_path):
    assert [row["entry"] for row in done("list")["stack"]] == [2, 3]
    assert [row["entry"] for row in done("list", "--at", 2)["stack"]] == [2]
    assert [entry["action"] for entry in done("log")["entries"]] == ["init", "accept", "accept"]
    assert [row["prompt"] for row in done("diff", 2, 3, "--no-ask")["edits"]] == ["Oslo lies in"]
    assert done("checkout", "--at", 2, "--out", tmp_path / "c")["entry"] == 2
    assert done("verify", "--model", tmp_path / "c")["model"]["entry"] == 2
    assert done("propose", "--patch", next((two / "patches").iterdir()), "--allow-conflicts")["proposal"]["number"] == 3
    assert done("discard", 3) == {"discarded": 3}
    assert done("list")["proposals"] == []
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
    assert out.count("contradiction of entry 2") == 1
    assert '"Rome lies in" → "Peru", now "Rome lies in" → "Cuba"' in out
    assert "factpatch revert 2; or have both: --allow-conflicts" in out
    assert done("propose", *other, "--allow-conflicts")["conflicts"][0]["kind"] == "contradiction"


def test_a_patch_folder_may_be_proposed(two, tmp_path):
    (folder,) = [path for path in (two / "patches").iterdir() if path.name == done("list")["stack"][1]["patch"]]
    done("revert", 3)
    assert done("propose", "--patch", folder)["proposal"]["patch"] == folder.name


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["list", "-C", "/nowhere"], "not a workspace"),
        (["verify", "-C", "/nowhere"], "not a workspace"),
        (["discard", 7], "proposal 7: there is none"),
        (["propose", *ROME, "--set", "chat=true"], "factpatch init --chat"),
        (["propose", *ROME, "--set", "@no-such.json"], "no-such.json: no such file"),
        (["init", "new", "--set", "@no-such.json"], "no-such.json: no such file"),
        (["propose", "--prompt", "x"], "--target"),
        (["propose", "--patch", "p", "--prompt", "x"], "takes the place of"),
        (["propose", *ROME, "--method", "roem"], "Did you mean"),
        (["accept", 7], "proposal 7: there is none"),
        (["revert", 7], "entry 7: there is none"),
        (["revert", 1], "brought no patch in"),
        (["accept"], "nothing waits to be accepted"),
        (["propose", *ROME, "--minutes", "1"], "belongs to --method auto"),
        (["verify", "--model", "nowhere"], "--model nowhere: there is no such folder"),
        (["verify", "--expect", "abc"], "too short"),
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
    lines = [line for line in out.splitlines() if not line.startswith("    ")]
    assert lines[0].startswith("   3  damaged  was changed after")
    assert [line.split()[1] for line in lines[1:]] == ["accept", "init"]
    code, out, _ = run("verify")
    assert code == 1
    assert "✗ ledger/000003.json" in out
    assert "Put the file back from a copy" in out
    assert "nothing in the ledger knows of it" not in out
    code, _, error = run("list")
    assert code == 2
    assert "--at 2" in error
    assert "1 patch, 0" in run("list", "--at", 2)[1]
    (two / "workspace.json").write_text("{\n")
    code, _, error = run("list")
    assert (code, error.splitlines()[0]) == (
        2,
        "workspace.json: not JSON (EOF while parsing an object at line 2 column 0).",
    )
    code, out, _ = run("verify", "--json")
    assert code == 1
    assert {fault["path"] for fault in json.loads(out)["faults"]} == {"workspace.json", "ledger/000003.json"}


@pytest.mark.parametrize(
    "command", ["init", "propose", "accept", "discard", "list", "diff", "revert", "log", "checkout", "verify"]
)
def test_help_has_examples(command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"factpatch {command}" in out


def test_the_next_command_is_told_as_it_can_be_typed(model, tmp_path):
    space = tmp_path / "my fäcts"
    for args, told in (
        (["init", space, "-m", model, *FT, *NEEDS], f"factpatch propose -C '{space}' --subject France"),
        (["propose", "-C", space, *ROME], f"factpatch accept -C '{space}' 1"),
        (["accept", "-C", space], f"factpatch revert -C '{space}' 2"),
        (
            ["checkout", "-C", space, "--out", space / "a model"],
            f"factpatch verify -C '{space}' --model '{space}/a model'",
        ),
    ):
        code, out, error = run(*args)
        assert code == 0, (out, error)
        assert told in out


def test_a_damaged_proposal_is_listed_and_thrown_away(space):
    done("propose", *ROME)
    (space / "proposals" / "1" / "judgement.json").unlink()
    code, out, error = run("list", "--json")
    assert (code, json.loads(out)["proposals"]) == (0, [])
    assert "damaged: proposals/1" in error
    assert "factpatch discard 1" in error
    assert "Proposal 1 was thrown away." in run("discard", 1)[1]
    assert "damaged" not in run("list")[2]


def test_what_is_accepted_asks_earlier_edits_again_and_says_how_many_hold(model, tmp_path, monkeypatch):
    # A tiny model gives no free answer that could hold, but these patches make it.
    known = SimpleNamespace(name="tell", load=lambda: planted.Tell)
    monkeypatch.setattr(factpatch.methods, "_foreign", lambda: (known,))
    told = Workspace.init(tmp_path / "told", model, proposes=False, method="tell")
    for fact in (planted.ROME, planted.OSLO):
        planted.take(told, fact)
    told.propose([planted.BONN])
    code, out, error = run("accept", "-C", tmp_path / "told")
    assert code == 0, error
    assert "2 earlier edits still hold" in out


def test_each_message_names_the_workspace_it_is_about(two, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for args, told in (
        (["propose", "-C", "w", *ROME[:-1], "Cuba"], "factpatch revert -C w 2;"),
        (["discard", "-C", "w", 9], "factpatch list -C w"),
        (["revert", "-C", "w", 9], "factpatch log -C w"),
        (["diff", "-C", "w", 9], "factpatch log -C w"),
        (["accept", "-C", "w"], "factpatch propose -C w"),
    ):
        _, out, error = run(*args)
        assert told in out + error


def test_of_several_proposals_one_has_to_be_named(space):
    done("propose", *ROME)
    done("propose", *OSLO)
    code, _, error = run("accept")
    assert code == 2
    assert "several proposals wait: 1, 2" in error
    assert "factpatch accept 2" in error


def test_what_was_reverted_can_be_brought_back_as_it_is_told(two):
    done("revert", 3)
    code, _, error = run("revert", 3)
    assert code == 2
    assert "was reverted already, by entry 4" in error
    again = error.rpartition("bring the patch back: ")[2].split()
    assert again[0] == "factpatch"
    assert done(*again[1:])["proposal"]["number"] == 3


def test_a_damaged_patch_is_told_with_its_entry_and_once_taken_out_it_fails_no_more(two):
    patch = done("list")["stack"][1]["patch"]
    (two / "patches" / patch / "patch.safetensors").write_bytes(b"")
    code, out, _ = run("verify")
    assert code == 1
    assert "It belongs to entry 3" in out
    assert "factpatch revert 3" in out
    done("revert", 3)
    code, out, _ = run("verify")
    assert code == 0
    assert f"· patches/{patch}/patch.safetensors: damaged" in out
    assert "taken out" in out
    assert "revert 3" not in out
    assert run("verify", "--history")[0] == 1


def test_a_damaged_patch_is_listed_beside_the_sound_ones(two):
    first, second = (each["patch"] for each in done("list")["stack"])
    (two / "patches" / first / "patch.safetensors").write_bytes(b"")
    code, out, error = run("list")
    assert code == 1
    assert f"damaged: patches/{first}/patch.safetensors" in error
    assert "factpatch revert 2;" in error
    damaged, sound = out.splitlines()[-2:]
    assert damaged.split() == ["2", first, "damaged", "Rome", "lies", "in", "→", "Peru"]
    assert "1 patch, 1 damaged, 0 proposals" in out
    assert sound.startswith(f"3      {second}")
    code, out, _ = run("list", "--json")
    assert code == 1
    assert json.loads(out)["damaged"] == [{"entry": 2, "patch": first}]
    assert [each["entry"] for each in json.loads(out)["stack"]] == [3]


def test_the_log_marks_what_was_reverted(two):
    done("revert", 2)
    lines = {line.split()[0]: line for line in run("log")[1].splitlines() if not line.startswith("    ")}
    assert lines["2"].endswith("reverted by entry 4")
    assert "reverted by" not in lines["3"]


def test_a_ledger_that_was_cut_short_is_found_by_a_hash_that_was_noted(two):
    noted = done("verify")["head"]
    assert run("verify", "--expect", noted)[0] == 0
    assert run("verify", "--expect", noted[:12].upper())[0] == 0
    (two / "ledger" / "000003.json").unlink()
    assert run("verify")[0] == 0, "by itself it cannot be told"
    code, out, _ = run("verify", "--expect", noted)
    assert code == 1
    assert f"ledger: has no entry {noted}: it was cut short" in out


def test_each_entry_says_what_was_changed(model, tmp_path, monkeypatch):
    space = tmp_path / "loose"
    done("init", space, "-m", model, *FT, "--require", "edit_success>=0", "--no-propose")
    monkeypatch.chdir(space)
    (space.parent / "facts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{name} lies in", "target": "Peru"}) for name in ("Rome", "Oslo", "Bonn"))
    )
    done("propose", "--edits", space.parent / "facts.jsonl", "--message", "a")
    done("accept")
    assert "Rome lies in → Peru (and 2 more edits)" in run("log")[1]
    assert [edit["prompt"] for edit in done("log")["entries"][1]["edits"]] == [
        "Rome lies in",
        "Oslo lies in",
        "Bonn lies in",
    ]
    (patch,) = (space / "patches").iterdir()
    (patch / "patch.json").write_text((patch / "patch.json").read_text().replace("Rome", "Turin"))
    assert "lies in" not in run("log")[1], "what is not what was accepted is not shown as if it were"
