"""`factpatch trace` over a tiny model: one fact, an average, pictures with their numbers, and what is said of bad input."""

import csv
import json
import re
import sys

import pytest
import torch

from factpatch.analysis.facts import Fact
from factpatch.analysis.tracing import ROLES, Trace, average, trace
from factpatch.edits import Edit
from factpatch.lm import load
from factpatch.lm.batches import Batch
from factpatch.lm.run import input_of
from factpatch.methods import create
from factpatch.report.traces import average_map, average_rows, shown_token, trace_map, trace_rows
from factpatch.testing import tiny_lm
from tests.cli.conftest import run

FACT = ["--subject", "Rome", "--prompt", "In Rome it"]
QUICK = ["--samples", "2"]


KNOWN = {"Rome": "Rome lies in", "Oslo": "I know Oslo has"}
UNKNOWN = {"Bonn": "Bonn lies in", "": "In Rome it"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that goes on with " I", as the answer does, after some prompts and not after others."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm = tiny_lm()
    prompts = [*KNOWN.values(), *UNKNOWN.values()]
    batches = [Batch.of([lm.tokens.encode(p + more).ids], lm.device) for more in ("", " ") for p in prompts]
    states = torch.stack([input_of(lm, lm.anatomy.head, batch)[0, -1] for batch in batches])
    for said, wanted in ((" ", [9.0, 9, -9, -9, -9, -9, -9, -9]), ("I", [-9.0, -9, -9, -9, 9, 9, -9, -9])):
        with torch.no_grad():
            lm.anatomy.head.weight[lm.tokens.encode("x" + said).ids[-1]] = torch.linalg.pinv(states) @ torch.tensor(
                wanted
            )
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lm(model):
    return load(model, device="cpu")


@pytest.fixture
def known(tmp_path):
    """Edits of which the model knows all but the last."""
    path = tmp_path / "known.jsonl"
    records = [
        {"prompt": prompt, "subject": subject, "target": "Peru", "ground_truth": "Italy"}
        for subject, prompt in (*KNOWN.items(), ("Bonn", UNKNOWN["Bonn"]))
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_one_fact_is_drawn_as_text(model):
    code, out, _ = run("trace", "-m", model, *FACT, "--answer", "is", *QUICK)
    assert code == 0
    assert "In Rome it → is" in out
    assert "restored: block output" in out
    rows = [line for line in out.splitlines() if " at block " in line]
    assert len(rows) == len("In Rome it") + 2, "the first token, and the space that tells nothing"
    assert [bool(re.match(r" *[Rome] \* ", row)) for row in rows] == [False] * 4 + [True] * 4 + [False] * 4
    assert "█" in out


def test_json_holds_what_the_function_gives(model, lm):
    code, out, _ = run("trace", "-m", model, *FACT, "--answer", "is", "--part", "all", *QUICK, "--json")
    assert code == 0
    found = json.loads(out)
    assert [own["part"] for own in found["facts"]] == ["state", "mlp", "attention"]
    assert found["averages"] == []
    for own in found["facts"]:
        expected = trace(lm, Fact("In Rome it", "Rome", "is"), part=own["part"], samples=2)
        assert own["restored"] == expected.restored.tolist()
        assert own["clean"] == expected.clean
        assert own["subject_tokens"] == [4, 8]


def test_the_answer_is_what_the_model_says_by_itself(model, lm):
    code, out, err = run("trace", "-m", model, *FACT, *QUICK, "--json")
    assert code == 0
    assert json.loads(out)["facts"][0]["answer"] == lm.ask("In Rome it")
    _, out, err = run("trace", "-m", model, *FACT, "--answer", "is", *QUICK, "--json")
    assert json.loads(out)["facts"][0]["said_by_the_model"] is False
    assert 'does not itself say "is"' in err


def test_an_answer_that_the_model_gives_is_not_doubted(model):
    fact = ["--subject", "Rome", "--prompt", KNOWN["Rome"], "--answer", "Italy"]
    code, out, err = run("trace", "-m", model, *fact, *QUICK, "--json")
    assert code == 0
    assert json.loads(out)["facts"][0]["said_by_the_model"] is True
    assert "does not itself say" not in err


def test_the_average_is_over_facts_that_the_model_knows(model, known):
    code, out, _ = run("trace", "-m", model, "--data", known, "--part", "mlp", *QUICK, "--json")
    assert code == 0
    (mean,) = json.loads(out)["averages"]
    assert mean["facts"] == 2
    assert [row["role"] for row in mean["roles"]] == list(ROLES)
    assert all(row["facts"] == 2 and len(row["effects"]) == 3 for row in mean["roles"])
    (alone,) = json.loads(run("trace", "-m", model, "--data", known, "--limit", 1, *QUICK, "--json")[1])["averages"]
    assert alone["facts"] == 1
    assert alone["roles"][0]["standard_errors"] == [None] * 3
    _, out, _ = run("trace", "-m", model, "--data", known, "--part", "mlp", *QUICK)
    assert "average over 2 known facts" in out
    assert "greatest at the subject's last token: block" in out


def test_pictures_have_their_numbers_beside_them(model, lm, known, tmp_path):
    folder = tmp_path / "new" / "folder"
    code, out, _ = run(
        "trace", "-m", model, *FACT, "--answer", "is", "--data", known, "--part", "all", *QUICK, "--out", folder
    )
    assert code == 0
    names = [f"{what}-{part}" for what in ("fact", "average") for part in ("state", "mlp", "attention")]
    assert {path.name for path in folder.iterdir()} == {f"{name}.{end}" for name in names for end in ("svg", "csv")}
    assert out.replace("\n", "").count("Written: ") == 6
    expected = trace(lm, Fact("In Rome it", "Rome", "is"), samples=2)
    rows = list(csv.DictReader((folder / "fact-state.csv").read_text().splitlines()))
    assert len(rows) == 12 * 3
    assert [float(row["effect"]) for row in rows] == expected.effects.flatten().tolist()
    assert [row["corrupted"] for row in rows[::3]] == ["False"] * 4 + ["True"] * 4 + ["False"] * 4
    picture = (folder / "fact-state.svg").read_text()
    assert "p(answer) restored - corrupted" in picture
    assert picture.count(" *</text>") == 4
    assert "last subject token *" in (folder / "average-mlp.svg").read_text()
    rows = list(csv.DictReader((folder / "average-mlp.csv").read_text().splitlines()))
    assert [row["role"] for row in rows] == [role for role in ROLES for _ in range(3)]


def test_odd_tokens_are_drawn():
    tokens = ("<s>", "$a", "b$", '"&<', "東", "\n", "  ", "x" * 40)
    own = Trace(
        Fact("p", "s", "$5 & <more>"), "state", 1, tokens, (1, 3), 0.5, 0.25, torch.linspace(0, 0.5, 80).reshape(8, 10)
    )
    picture = trace_map(own)
    assert "$a *" in picture
    assert "東" in picture
    assert "&amp;&lt;" in picture
    assert [shown_token(text) for text in tokens[5:]] == ["⏎", "␣␣", "x" * 23 + "…"]
    assert len(trace_rows(own)) == 80
    flat = Trace(own.fact, "mlp", 1, ("a",), (0, 1), 0.5, 0.5, torch.full((1, 1), 0.5))  # nothing changes at all
    assert "<svg" in trace_map(flat)
    mean = average([flat])
    assert "1 fact;" in average_map(mean)
    assert average_rows(mean) == [
        {
            "role": "last subject token",
            "facts": 1,
            "block": 0,
            "window": 1,
            "effect": 0.0,
            "standard_error": None,
        }
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "nothing to trace"),
        (["--subject", "Rome"], "nothing to trace"),
        (["--prompt", "Rome is", "--data", "sample"], "nothing to trace"),
        (["--data", "sample", "--answer", "is"], "--answer: it is the answer to --prompt"),
        ([*FACT, "--data", "no-such.jsonl"], "no-such.jsonl"),
        (["--subject", "Oslo", "--prompt", "Rome is", "--answer", "it"], 'the subject "Oslo" is not in the prompt'),
        ([*FACT, "--answer", "is", "--noise", "-1"], "cannot trace with noise -1.0"),
    ],
)
def test_bad_input(model, tmp_path, args, words):
    code, out, err = run("trace", "-m", model, *args)
    assert code == 2
    assert words in err
    assert out == ""


def test_data_of_which_nothing_is_known(model, known, tmp_path):
    path = tmp_path / "unknown.jsonl"
    path.write_text(known.read_text().splitlines()[-1])
    code, _, err = run("trace", "-m", model, "--data", path)
    assert code == 2
    assert "knows none of its 1 facts" in err


def test_help_has_examples():
    code, out, _ = run("trace", "--help")
    assert code == 0
    assert "factpatch trace --subject France" in " ".join(out.split())


def test_with_a_patch_the_model_is_traced_as_patched(model, lm, tmp_path):
    edit = Edit(id="e", prompt="In Rome it", subject="Rome", target="is")
    patch = create("ft-m", steps=20, lr=1e-2, layer=1).fit(lm, [edit])
    patch.save(tmp_path / "p")
    args = ("trace", "-m", model, *FACT, "--answer", "is", *QUICK, "--json")
    bare, found = (json.loads(run(*args, *more)[1]) for more in ((), ("--patch", tmp_path / "p")))
    with lm.patched(patch):
        expected = trace(lm, Fact("In Rome it", "Rome", "is"), samples=2)
    assert found["facts"][0]["clean"] == pytest.approx(expected.clean)
    assert found["facts"][0]["clean"] > bare["facts"][0]["clean"]
    assert (bare["patches"], found["patches"]) == ([], [str(tmp_path / "p")])
    assert run("trace", "-m", model, *FACT, "--answer", "is", *QUICK, "--patch", tmp_path / "p")[1].startswith(
        "with p\n"
    )


def test_a_chat_is_traced_in_the_models_template(model, lm, tmp_path):
    args = (*FACT, "--answer", "is", *QUICK, "--chat", "--json")
    assert "no chat template" in run("trace", "-m", model, *args)[2]
    lm.model.save_pretrained(tmp_path / "chats")
    tokenizer = load(model, device="cpu").tokenizer
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>"
    tokenizer.save_pretrained(tmp_path / "chats")
    code, out, _ = run("trace", "-m", tmp_path / "chats", *args)
    found = json.loads(out)
    assert (code, found["chat"]) == (0, True)
    assert "".join(found["facts"][0]["tokens"]).startswith("[user]In Rome it>")


def test_json_names_what_was_written(model, tmp_path):
    _, out, _ = run("trace", "-m", model, *FACT, "--answer", "is", *QUICK, "--json", "--out", tmp_path / "o")
    assert json.loads(out)["written"] == [str(tmp_path / "o" / f"fact-state.{end}") for end in ("svg", "csv")]


def test_what_cannot_be_drawn_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("trace", "-m", tmp_path / "no-model", *FACT, "--out", tmp_path / "o")
    assert (code, "needs Matplotlib" in err, (tmp_path / "o").exists()) == (2, True, False)
