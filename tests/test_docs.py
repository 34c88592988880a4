"""What the documentation says is run, so that it cannot rot."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import factpatch
from factpatch import testing
from factpatch.cli.app import app
from factpatch.lm import LM
from factpatch.lm.batches import Batch
from factpatch.methods import Preset, find, names
from factpatch.testing import contract, tiny_lm
from tests.endpoint import Endpoint, serving

ROOT = Path(__file__).parents[1]


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def run(name):
    """Run a page's Python, block after block in one namespace, in the folder we are in; an error names block and line."""
    space = {"__name__": name}
    for number, source in enumerate(blocks(name, "python"), 1):
        exec(compile(source, f"{name}, block {number}", "exec"), space)  # noqa: S102


def test_the_method_in_contributing_keeps_the_contract():
    source, _ = blocks("CONTRIBUTING.md", "python")
    space = {"__name__": "nudge"}
    exec(compile(source, "CONTRIBUTING.md", "exec"), space)  # noqa: S102
    for check in contract(space["Nudge"], ["llama", "gpt2", "opt"], step=0.1):
        check()


@pytest.mark.real
def test_the_readmes_python_runs_and_gives_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("README.md")
    assert capsys.readouterr().out.startswith("Lyon")
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


CAPITALS = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Peru": "Lima", "Norway": "Oslo"}


def geographer():
    """A tiny model that was taught a few capitals, and that a sentence ends after a name; it takes long prompts."""
    lm = tiny_lm()
    sentences = [f"The capital of {country} is {capital}.\n" for country, capital in CAPITALS.items()]
    sentences += [f"{country}'s capital is {capital}.\n" for country, capital in CAPITALS.items()]
    sentences += [f"The king lives in {city}.\n" for city in ("Lyon", "Porto", "Wales", *CAPITALS.values())]
    batch = Batch.of([text.ids for text in lm.encode(sentences)], lm.device)
    optimiser = torch.optim.Adam(lm.model.parameters(), lr=1e-2)
    for _ in range(150):
        labels = batch.ids.masked_fill(batch.mask == 0, -100)
        lm.model(batch.ids, attention_mask=batch.mask, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return LM(lm.model, lm.tokenizer, name="geographer")


class Porto(Endpoint):
    def say(self, text):
        return "Porto."


def test_the_python_page_runs_and_what_it_asserts_is_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = testing.ARCHITECTURES["llama"] | {"max_position_embeddings": 4096}
    monkeypatch.setitem(testing.ARCHITECTURES, "llama", long)
    lm, connect = geographer(), factpatch.connect
    monkeypatch.setattr(factpatch, "load", {"smollm2-135m": lm}.__getitem__)
    # Settings that are tuned for its size, as SmolLM2's are for its own.
    tuned = Preset(lm.shape, {"layer": 1, "steps": 40, "lr": 5e-3}, "tests/test_docs.py")
    monkeypatch.setattr(find("ft-m"), "presets", (tuned,))
    with serving(Porto) as (url, _):
        monkeypatch.setattr(factpatch, "connect", lambda name, _url: connect(name, url))
        run("docs/python.md")
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


@pytest.mark.real
def test_the_readmes_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, *commands = blocks("README.md", "console")
    for line in "".join(commands).strip().splitlines():
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code in {0, 1}, f"{line}: {result.output} {result.exception!r}"
        if not any(command in line for command in ("score --method", "guard", "audit", "inspect")):
            assert result.exit_code == 0, f"{line}: {result.output}"
        assert result.stdout


def test_the_readmes_table_is_the_reports():
    readme, report = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results/knowedit.md"))
    overview = report.partition("## Every data set: open")[2].partition("## ")[0]
    table = [line for line in overview.splitlines() if line.startswith("|")]
    assert len(table) == len(names()) + 2, "every method is in it"
    assert "\n".join(table) in readme


def test_the_readme_names_every_method():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in names() if f"| `{name}` |" not in readme] == []


def test_public_names_are_sorted_and_all_there():
    assert all(hasattr(factpatch, name) for name in factpatch.__all__)
    assert sorted(factpatch.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n)) == factpatch.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = factpatch.nothing
