"""What the documentation says is run, so that it cannot rot."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import factpatch
from factpatch.cli.app import app
from factpatch.methods import names
from factpatch.testing import contract

ROOT = Path(__file__).parents[1]


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_method_in_contributing_keeps_the_contract():
    source, _ = blocks("CONTRIBUTING.md", "python")
    space = {"__name__": "nudge"}
    exec(compile(source, "CONTRIBUTING.md", "exec"), space)  # noqa: S102
    for check in contract(space["Nudge"], ["llama", "gpt2", "opt"], step=0.1):
        check()


@pytest.mark.real
def test_the_readmes_python_runs_and_gives_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (source,) = blocks("README.md", "python")
    exec(compile(source, "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.startswith("Lyon")
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
