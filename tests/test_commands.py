"""Commands that messages tell of."""

from pathlib import Path

import pytest

from factpatch import commands


@pytest.mark.parametrize(
    ("found", "argv", "words"),
    [
        (True, "/venv/bin/factpatch", "factpatch"),
        (False, ".venv/bin/factpatch", ".venv/bin/factpatch"),
        (False, "-c", "factpatch"),
    ],
)
def test_a_command_is_told_as_it_can_be_typed(monkeypatch, found, argv, words):
    monkeypatch.setattr(commands.shutil, "which", lambda _: argv if found else None)
    monkeypatch.setattr(commands.sys, "argv", [argv])
    assert commands.typed("ask", "--patch", "my patch", "Why?") == f"{words} ask --patch 'my patch' 'Why?'"


@pytest.mark.parametrize(("folder", "where"), [(".", ""), ("my facts", " -C 'my facts'")])
def test_a_command_about_a_workspace_names_it_where_one_is_not_in_it(monkeypatch, folder, where):
    monkeypatch.setattr(commands.sys, "argv", ["-c"])
    assert commands.typed_in(Path(folder), "accept", 1) == f"factpatch accept{where} 1"
