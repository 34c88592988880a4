"""Every command over a tiny model on disk, and what is said and left behind when the input is bad."""

import io
import json
import os
import subprocess
import sys

import pytest
import typer
from rich.console import Console

from factpatch.cli import options, terminal
from factpatch.cli.app import app
from factpatch.cli.terminal import print_json
from factpatch.lm.catalog import DEFAULT_MODEL
from factpatch.patches import Patch
from factpatch.testing import tiny_lm
from factpatch.workspace import Workspace
from tests.cli.conftest import run

EDIT = ["--subject", "Rome", "--prompt", "Rome lies in", "--target", "Peru"]
QUICK = ["--set", "steps=2", "--set", "layer=1"]


@pytest.fixture(scope="module")
def patch(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches") / "peru"
    code, out, _ = run("edit", "-m", model, "--method", "ft-m", *QUICK, *EDIT, "--out", folder)
    assert code in {0, 1}
    assert "model.layers.1.mlp.down_proj.weight" in out
    assert "Rome lies in" in out
    return folder


def test_edit_takes_a_file_and_prints_json(model, facts, tmp_path):
    code, out, _ = run(
        "edit", "-m", model, "--method", "ft-l", *QUICK, "--edits", facts, "--out", tmp_path / "p", "--json"
    )
    described = json.loads(out)
    assert code in {0, 1}
    assert [edit["id"] for edit in described["edits"]] == ["a", "b"]
    assert {s["protocol"] for s in described["scorecard"]["summaries"]} == {"open", "survey"}
    assert (tmp_path / "p" / "patch.safetensors").is_file()


def test_edit_exits_with_1_when_the_answer_is_not_the_target(model, tmp_path):
    code, _, _ = run(
        "edit", "-m", model, "--method", "ft-m", "--set", "steps=1", "--set", "lr=1e-9", *EDIT, "--out", tmp_path / "p"
    )
    assert code == 1
    assert (tmp_path / "p" / "patch.json").is_file()


def test_ask_shows_both_answers(model, patch):
    code, out, _ = run("ask", "-m", model, "--patch", patch, "Rome lies in")
    assert code == 0
    assert "without" in out
    assert "with " in out
    _, out, _ = run("ask", "-m", model, "--patch", patch, "Rome lies in", "--json")
    assert set(json.loads(out)) == {"prompt", "chat", "without", "with"}


def test_ask_takes_a_workspace_for_the_model(model, patch, tmp_path):
    space = Workspace.init(tmp_path / "w", model, ["survey.edit_success>=0"], proposes=False)
    assert space.propose_patch(Patch.load(patch)).done
    assert space.accept().done
    _, out, _ = run("ask", "-C", tmp_path / "w", "Rome lies in", "--json")
    assert json.loads(out) == json.loads(run("ask", "-m", model, "--patch", patch, "Rome lies in", "--json")[1])
    stacked = json.loads(run("ask", "-C", tmp_path / "w", "--patch", patch, "Rome lies in", "--json")[1])
    twice = run("ask", "-m", model, "--patch", patch, "--patch", patch, "Rome lies in", "--json")[1]
    assert stacked == json.loads(twice)
    code, _, message = run("ask", "-C", tmp_path / "w", "-m", model, "Rome lies in")
    assert (code, "--model: a workspace has its own model" in message) == (2, True)


def test_ask_in_a_workspace_takes_its_chat_template(tmp_path):
    lm, model = tiny_lm(), str(tmp_path / "model")
    lm.tokenizer.chat_template = "{% for m in messages %}is {{ m.content }} a city in{% endfor %}"
    lm.model.save_pretrained(model)
    lm.tokenizer.save_pretrained(model)
    answers = []
    for chat in (True, False):
        space = tmp_path / str(chat)
        Workspace.init(space, model, ["survey.edit_success>=0"], proposes=False, chat=chat)
        answers.append(json.loads(run("ask", "-C", space, "Rome lies in", "--json")[1]))
        plain = run("ask", "-m", model, "Rome lies in", "--json", *(["--chat"] if chat else []))[1]
        assert answers[-1] == json.loads(plain)
    assert answers[0]["without"] != answers[1]["without"]


@pytest.mark.parametrize(("columns", "width"), [(None, 160), ("57", 57)])
def test_tables_in_a_pipe_are_as_wide_as_columns_says_or_wide_enough(columns, width):
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    asked = "from factpatch.cli.terminal import err, out; print(out.width, err.width)"
    told = subprocess.run(
        [sys.executable, "-c", asked],
        env=environment | ({"COLUMNS": columns} if columns else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == [str(width)] * 2


def test_patch_show(patch):
    code, out, _ = run("patch", "show", patch)
    assert code == 0
    assert "Rome lies in → Peru" in out
    _, out, _ = run("patch", "show", patch, "--json")
    assert json.loads(out)["method"] == "ft-m"


def test_patch_merge_writes_a_checkpoint_that_answers_as_the_patched_model(model, patch, tmp_path):
    code, _, _ = run("patch", "merge", patch, "-m", model, "--out", tmp_path / "merged")
    assert code == 0
    merged = json.loads(run("ask", "-m", tmp_path / "merged", "Rome lies in", "--json")[1])["without"]
    patched = json.loads(run("ask", "-m", model, "--patch", patch, "Rome lies in", "--json")[1])["with"]
    assert merged == patched


ROW = {
    "method",
    "dataset",
    "protocol",
    "edits",
    "edit_success",
    "rephrase",
    "portability",
    "locality",
    "fluency",
    "fit_seconds",
    "score_seconds",
}


def test_score_with_a_method_prints_one_row_for_each_protocol(model, facts):
    code, out, _ = run("score", "-m", model, "--method", "ft-m", *QUICK, "--data", facts, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["protocol"] for row in rows] == ["open", "survey"]
    assert all(set(row) >= ROW for row in rows)
    assert rows[0]["edits"] == 2
    assert rows[0]["portability"] is None
    assert 0 <= rows[1]["locality"] <= 1
    assert {detail["role"] for detail in rows[0]["detail"]} == {"edit", "rephrase", "locality", "fluency"}


def test_score_with_a_patch_and_with_neither(model, facts, patch):
    code, out, _ = run("score", "-m", model, "--patch", patch, "--data", facts, "--limit", 1)
    assert code == 0
    assert "1 edit," in out
    rows = json.loads(run("score", "-m", model, "--data", facts, "--json")[1])
    assert rows[0]["method"] == "none"
    assert rows[0]["locality"] == 1


def test_score_lists_edits_that_could_not_be_made_and_exits_with_1(model, tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "Rome lies in", "target": "Peru"}')
    settings = ["--set", "contexts=0", "--set", "moment_tokens=300", "--set", "moment_length=20"]
    code, out, _ = run("score", "-m", model, "--method", "rome", *QUICK, *settings, "--data", path, "--json")
    assert code == 1
    assert "needs to know the subject" in json.loads(out)[0]["not_made"][0]["reason"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["methods"], "r-rome"),
        (["models"], "gemma3-270m"),
        (["data"], "wiki_counterfact"),
        (["methods", "rome"], "kl_factor"),
    ],
)
def test_lists(args, words):
    code, out, _ = run(*args)
    assert code == 0
    assert words in out
    assert json.loads(run(*args, "--json")[1])


def test_models_show_prints_the_anatomy(model):
    out = run("models", "show", model)[1]
    assert "mlp.down_proj" in out
    assert f"folder  {model}\n" in out
    assert json.loads(run("models", "show", model, "--json")[1])["layers"] == 3


def test_data_show(facts):
    code, out, _ = run("data", "show", facts, "--record", "1")
    assert code == 0
    assert "Who is Ann?" in out


def damaged(patch, tmp_path, name, content):
    """A copy of a patch with one file overwritten."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in patch.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).write_bytes(content)
    return folder


def test_bad_patches_are_refused(model, patch, tmp_path):
    weights = (patch / "patch.safetensors").read_bytes()
    cases = [
        (
            damaged(patch, tmp_path, "patch.safetensors", weights[:-5]),
            "damaged, or not the file that patch.json was written with",
        ),
        (tmp_path, "not a patch; expected a folder with patch.json"),
    ]
    for folder, words in cases:
        code, _, message = run("ask", "-m", model, "--patch", folder, "Rome lies in")
        assert code == 2
        assert words in message


def test_broken_patch_json_is_refused(model, patch, tmp_path):
    code, _, message = run("patch", "show", damaged(patch, tmp_path, "patch.json", b'{"format": 1, '))
    assert code == 2
    assert "not JSON" in message
    assert "make the patch again" in message


def test_wrong_base_is_refused(patch, tmp_path):
    other = tiny_lm(seed=9)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    code, _, message = run("ask", "-m", tmp_path / "other", "--patch", patch, "Rome lies in")
    assert code == 2
    assert "this patch was made for tiny" in message
    assert "the model in hand is other" in message


BAD_EDITS = [
    (
        ["--subject", "Oslo", "--prompt", "Rome lies in", "--target", "Peru"],
        'expected a part of the prompt, found "Oslo"',
    ),
    (["--subject", "Rome", "--prompt", "Rome lies in", "--target", " "], '"--target": expected some text, found none'),
    (["--prompt", "Rome lies in"], '"--target": is missing.'),
    (["--prompt", "Rome lies in", "--target", "Peru"], "rome needs to know the subject"),
    ([*EDIT, "--method", "rme"], 'no method "rme". Did you mean "rome"?'),
    ([*EDIT, "--set", "layr=3"], 'rome has no setting "layr". Did you mean "layer"?'),
    ([*EDIT, "--set", "layer"], '"layer": expected key=value'),
    ([*EDIT, "--set", "lr=fast"], 'rome, setting "lr" (learning rate of Adam): expected'),
    ([*EDIT, "--set", "layer=77"], "there is no block 77: the model has 3"),
    ([*EDIT, "--edits", "x.jsonl"], "give one or the other"),
    (["--edits", "x.jsonl", "--subject", "Rome"], "give one or the other"),
    ([*EDIT, "--limit", "3"], "belong to --edits; leave them out"),
    ([*EDIT, "--skip-invalid"], "belong to --edits; leave them out"),
    (["--edits", "no-such.jsonl"], "no such file"),
    ([*EDIT, "--device", "cuda:99"], 'device "cuda:99": not here'),
    ([*EDIT, "--chat"], "no chat template"),
]


@pytest.mark.parametrize(("args", "words"), BAD_EDITS)
def test_bad_edits_are_refused_with_a_message_and_leave_nothing(model, tmp_path, args, words):
    code, out, message = run("edit", "-m", model, *args, "--out", tmp_path / "patch")
    assert code == 2
    assert words in message
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_taken_or_unwritable_folder_is_refused_before_any_work(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, message = run("edit", "-m", model, *EDIT, "--out", tmp_path / "file" / "patch")
    assert code == 2
    assert "cannot be written" in message
    code, _, message = run("edit", "-m", model, *EDIT, "--out", tmp_path)
    assert code == 2
    assert "already there, and it is not overwritten" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_broken_json_is_refused_or_skipped_and_counted(model, tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "Rome lies in", "subject": "Rome", "target": "Peru"}\n{"prompt": "Ann is", "target": ')
    code, _, message = run("score", "-m", model, "--data", path)
    assert code == 2
    assert "record 1" in message
    assert "expected one JSON object" in message
    rows = json.loads(run("score", "-m", model, "--data", path, "--skip-invalid", "--json")[1])
    assert rows[0]["skipped_records"] == 1
    assert rows[0]["edits"] == 1


def test_options_that_contradict_each_other_are_refused(facts, patch):
    code, _, message = run("score", "--data", facts, "--method", "rome", "--patch", patch)
    assert code == 2
    assert "give one or the other" in message
    code, _, message = run("score", "--data", facts, "--set", "layer=1")
    assert code == 2
    assert "Give --method too" in message


def test_a_mixture_of_experts_is_refused_with_what_still_works(tmp_path):
    lm = tiny_lm("mixtral")
    lm.model.save_pretrained(tmp_path / "moe")
    lm.tokenizer.save_pretrained(tmp_path / "moe")
    code, _, message = run("edit", "-m", tmp_path / "moe", "--method", "ft-m", *EDIT, "--out", tmp_path / "patch")
    assert code == 2
    assert "mixture of experts" in message
    assert "Methods that change no MLP projection still work" in message


def test_an_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no-such-architecture"}')
    code, _, message = run("ask", "-m", tmp_path / "odd", "hello")
    assert code == 2
    assert "no model could be loaded from there" in message


def test_errors_leave_the_command_as_one_message_on_stderr():
    done = subprocess.run(
        [sys.executable, "-m", "factpatch", "methods", "rme"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith('error: no method "rme". Did you mean "rome"?')
    assert "Traceback" not in done.stderr


def commands(command, path=()):
    """The words of every command that does something."""
    beneath = getattr(command, "commands", {})
    if not beneath:
        yield path
    for name, each in beneath.items():
        yield from commands(each, (*path, name))


def test_every_command_has_help_with_an_example_and_can_print_json():
    for command in commands(typer.main.get_command(app)):
        code, out, _ = run(*command, "--help")
        assert code == 0
        assert "Example" in out
        assert f"factpatch {' '.join(command)}" in out
        assert "--json" in out


def test_help_needs_no_torch():
    code = "import sys; from factpatch.cli.app import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_brackets_in_what_is_asked_and_answered_are_shown_as_they_are(model, tmp_path):
    prompt = "[/INST] Rome [citation needed] lies in [bold]"
    code, out, err = run("ask", "-m", model, prompt)
    assert code == 0, err
    args = ["--subject", "Rome", "--prompt", prompt, "--target", "[/x]", "--method", "ft-m", "--set", "steps=2"]
    _, out, err = run("edit", "-m", model, *args, "--out", tmp_path / "patch")
    assert "[citation" in out
    _, out, err = run("patch", "show", tmp_path / "patch")
    assert f"{prompt} → [/x]" in out


def test_nothing_to_score_is_refused(model, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    for extra in ([], ["--method", "ft-m"]):
        code, out, err = run("score", "-m", model, "--data", tmp_path / "none.jsonl", *extra)
        assert (code, out) == (2, "")
        assert "holds no edit that could be scored" in err


def test_a_sequence_is_scored_at_edit_and_at_end(model, facts):
    code, out, err = run("score", "-m", model, "--method", "ft-m", *QUICK, "--data", facts, "--sequence", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["moment"], row["protocol"]) for row in rows] == [
        ("at edit", "open"),
        ("at edit", "survey"),
        ("at end", "open"),
        ("at end", "survey"),
    ]
    assert {row["edits"] for row in rows} == {2}
    code, out, err = run("score", "-m", model, "--method", "ft-m", *QUICK, "--data", facts, "--sequence")
    assert ", at edit\n" in out
    assert ", at end\n" in out
    code, _, err = run("score", "-m", model, "--data", facts, "--sequence")
    assert code == 2
    assert "they belong to a method" in err


def test_chat_is_no_setting_on_the_command_line(model, facts, tmp_path):
    for args in (["score", "--data", facts], ["edit", *EDIT, "--out", tmp_path / "patch"]):
        code, _, err = run(*args, "-m", model, "--method", "ft-m", "--set", "chat=true")
        assert code == 2
        assert "Give --chat instead." in err


TRAIN = ["--set", "steps=2", "--set", "rank=2", "--set", "layers=2", "--set", "batch_size=2", "--set", "check_every=1"]


def test_train_shows_the_curve_and_the_editor_edits(model, facts, tmp_path):
    code, out, err = run("train", "mend", "-m", model, "--data", facts, *TRAIN, "--out", tmp_path / "editor")
    assert code == 0
    assert [line.split(":")[0] for line in err.splitlines() if line.startswith("step")] == [
        "step 0",
        "step 1",
        "step 2",
    ]
    assert "best look at held-out edits: step" in out
    use = ["--method", "mend", "--set", f"editor={tmp_path / 'editor'}"]
    code, out, _ = run("edit", "-m", model, *use, *EDIT, "--out", tmp_path / "patch")
    assert code in {0, 1}
    assert "mlp.gate_proj.weight" in out


def test_train_in_json_from_some_of_the_records(model, facts, tmp_path):
    args = ("train", "malmen", "-m", model, "--data", "sample", "--start", "3", "--limit", "4", *TRAIN)
    code, out, _ = run(*args, "--out", tmp_path / "editor", "--json")
    about = json.loads(out)
    assert code == 0
    assert about["edits"] == 4
    assert about["source"] == "sample:sample.jsonl, records 3 to 6"
    assert about["id"] == about["tensors_sha256"][:16]


def test_train_refuses_a_method_that_needs_none(model, facts, tmp_path):
    code, _, err = run("train", "rome", "-m", model, "--data", facts, "--out", tmp_path / "editor")
    assert code == 2
    assert err.startswith("rome needs no training.\n  Methods that are trained: malmen, mend")
    assert not (tmp_path / "editor").exists()


def test_train_refuses_a_setting_that_belongs_to_the_use_of_an_editor(model, facts, tmp_path):
    code, _, err = run(
        "train", "serac", "-m", model, "--data", facts, "--out", tmp_path / "editor", "--set", "threshold=0.8"
    )
    assert code == 2
    assert err.startswith("serac: threshold is chosen when the editor is used.\n  Give it to factpatch edit instead.")


def test_one_edit_on_the_command_line_can_bring_its_probes(model, tmp_path):
    probes = ["--rephrase", "Find Rome in", "--rephrase", "Rome is in", "--unrelated", "Oslo lies in"]
    code, out, _ = run(
        "edit", "-m", model, "--method", "ft-m", *QUICK, *EDIT, *probes, "--out", tmp_path / "p", "--json"
    )
    assert code in {0, 1}
    (edit,) = json.loads(out)["edits"]
    assert edit["rephrases"] == ["Find Rome in", "Rome is in"]
    assert edit["locality"] == {"Unrelated": [{"prompt": "Oslo lies in", "answers": []}]}
    code, _, err = run("edit", "-m", model, "--edits", "sample", "--rephrase", "x", "--out", tmp_path / "q")
    assert code == 2
    assert "takes the place of --prompt, --target and all that belongs to one edit" in err


def test_an_edit_that_does_not_take_comes_with_advice(model, tmp_path):
    code, out, _ = run("edit", "-m", model, "--method", "ft-m", *QUICK, *EDIT, "--out", tmp_path / "p")
    assert code == 1
    assert "'Rome lies in'" in out, "the next command asks what was edited"
    assert "Try other settings (factpatch methods ft-m)" in out


def test_score_says_how_many_of_the_edits_are_in_the_patches(model, patch, facts):
    _, out, _ = run("score", "-m", model, "--patch", patch, "--data", facts)
    assert "1 of these 2 edits are in the patches given" in out
    assert "fluency (bits)" in out


def test_an_answer_that_ends_at_once_comes_with_a_hint(model, monkeypatch):
    monkeypatch.setattr("factpatch.lm.LM.answer", lambda *_, **__: [""])
    _, out, err = run("ask", "-m", model, "Rome")
    assert out == "(nothing)\n"
    assert "Ask with --chat, or give the beginning of a sentence" in err
    assert "Ask with" not in run("ask", "-m", model, "--patch", "nothing", "Rome")[1]


def test_the_version_is_printed():
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("factpatch 0.")


def test_a_trained_editor_is_not_taken_for_a_patch(tmp_path):
    (tmp_path / "editor.json").write_text("{}")
    code, _, err = run("patch", "show", tmp_path)
    assert code == 2
    assert "a trained editor, not a patch.\n  Make a patch with it: factpatch edit --method METHOD --set editor=" in err


def test_a_patch_that_cannot_be_merged_is_named_before_any_work(model, tmp_path):
    run("edit", "-m", model, "--method", "ice", *EDIT, "--out", tmp_path / "ice")
    code, _, err = run("patch", "merge", tmp_path / "ice", "-m", "no-such-model", "--out", tmp_path / "merged")
    assert code == 2
    assert "(context, by ice) is not a change of weights" in err


def test_a_merged_adapter_answers_as_the_adapter_does(model, tmp_path):
    run("edit", "-m", model, "--method", "lora", "--set", "steps=20", *EDIT, "--out", tmp_path / "lora")
    code, _, _ = run("patch", "merge", tmp_path / "lora", "-m", model, "--out", tmp_path / "merged")
    assert code == 0
    patched = json.loads(run("ask", "-m", model, "--patch", tmp_path / "lora", "--json", "Rome lies in")[1])
    merged = json.loads(run("ask", "-m", tmp_path / "merged", "--json", "Rome lies in")[1])
    assert patched["with"] == merged["without"] != patched["without"]


def test_a_misspelt_field_is_named(tmp_path):
    (tmp_path / "facts.jsonl").write_text('{"prompt": "Rome lies in", "targett": "Peru"}')
    for more in ([], ["--json"]):
        code, out, err = run("data", "show", tmp_path / "facts.jsonl", *more)
        assert code == 2
        assert '"targett"' in err
    assert '"targett"' in json.loads(out)["problem"]


def test_a_merge_tells_scripts_what_it_wrote(model, patch, tmp_path):
    code, out, _ = run("patch", "merge", patch, "-m", model, "--out", tmp_path / "merged", "--json")
    told = json.loads(out)
    assert (code, told["out"]) == (0, str(tmp_path / "merged"))
    assert told["patches"] == [json.loads(run("patch", "show", patch, "--json")[1])["id"]]


def test_the_demo_tells_scripts_what_it_saw(model, tmp_path):
    code, out, _ = run("demo", "-m", model, "--method", "ft-m", "--out", tmp_path / "demo", "--json")
    told = json.loads(out)
    assert code == 1 - int(told["scorecard"]["summaries"][0]["edit_success"])
    assert told["said"]["before"] == told["said"]["undone"] != told["said"]["patched"]
    assert told["patch"]["id"] == json.loads(run("patch", "show", tmp_path / "demo", "--json")[1])["id"]
    assert run("methods", "rome")[1], "people are told again"


def test_numbers_that_json_does_not_have_are_texts(capsys):
    print_json({"a": [float("inf"), -float("inf"), (float("nan"), 1.5)], "b": {"c": True, "d": None}})
    assert json.loads(capsys.readouterr().out) == {
        "a": ["Infinity", "-Infinity", ["NaN", 1.5]],
        "b": {"c": True, "d": None},
    }


def test_the_default_model_is_the_catalogues():
    assert options.DEFAULT_MODEL == DEFAULT_MODEL


def test_data_list_points_at_what_lists_them():
    code, _, message = run("data", "list")
    assert code == 2
    assert "They are listed by:  factpatch data" in message


@pytest.mark.parametrize("width", [80, 200])
def test_long_texts_stand_in_blocks_where_the_terminal_is_narrow(monkeypatch, width):
    shown = Console(width=width, file=io.StringIO())
    monkeypatch.setattr(terminal, "out", shown)
    row = (
        "✓ edit",
        "The official language of the country of France is",
        "French, which is spoken by all",
        "Basque, of course",
    )
    shown.print(terminal.probe_lines(("  probe", "prompt", "before", "after"), [row, row]))
    lines = shown.file.getvalue().splitlines()
    assert all(any(text in line for line in lines) for text in row), "no text is broken"
    assert len(lines) == (8 if width == 80 else 3)


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore it
{before}
from factpatch.cli import main
sys.argv = ["factpatch", *sys.argv[1:]]
main()
"""
ON_IMPORT = """
import importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                while True:
                    pass
            except KeyboardInterrupt:
                if {hidden}:
                    raise SystemError("a library made this of it")
                raise
sys.meta_path.insert(0, Finder())
"""


def interrupted(before, *args):
    command = [sys.executable, "-c", INTERRUPTED.format(before=before), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(("name", "hidden"), [("typer", False), ("torch", False), ("torch", True)])
def test_an_interruption_in_the_first_moments_is_one_line(name, hidden):
    found = interrupted(ON_IMPORT.format(name=name, hidden=hidden), "ask", "x")
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "Interrupted.\n")


def test_an_interrupted_edit_says_that_nothing_was_written(model, tmp_path):
    args = ("edit", "-m", model, "--method", "ft-m", *EDIT, "--out", tmp_path / "p")
    found = interrupted(
        ON_IMPORT.format(name="factpatch.data.questions", hidden=False), *args, "--require", "mergeable"
    )
    assert (found.returncode, found.stdout) == (130, "")
    assert found.stderr.splitlines()[-1] == "Interrupted."
    patched = (
        "import factpatch.lm as lm\nwas = lm.load_or_connect\n"
        "def load(*args, **more):\n    os.kill(os.getpid(), signal.SIGINT)\n    return was(*args, **more)\n"
        "lm.load_or_connect = load"
    )
    found = interrupted(patched, *args)
    assert (found.returncode, found.stdout) == (130, "")
    assert found.stderr.splitlines() == [f"Interrupted; nothing was written to {tmp_path / 'p'}."]
    assert not (tmp_path / "p").exists()


def test_an_interrupted_accept_says_what_still_waits(model, tmp_path):
    space = tmp_path / "w"
    assert (
        run("init", space, "-m", model, "--require", "edit_success>=0", "--no-propose", "--method", "ft-m", *QUICK)[0]
        == 0
    )
    assert run("propose", "-C", space, *EDIT)[0] == 0
    patched = (
        "from factpatch.workspace.store import Store\n"
        "def proposal(*_):\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "Store.proposal = proposal"
    )
    found = interrupted(patched, "accept", "-C", space)
    assert (found.returncode, found.stdout) == (130, "")
    told = "Interrupted; the workspace is as it was, proposal 1 still waits."
    assert found.stderr.splitlines()[-1] == told
    assert run("accept", "-C", space)[0] == 0
