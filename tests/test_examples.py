"""The examples run, at a smaller size."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.real
def test_the_whole_loop_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loop.py", "--out", str(tmp_path / "loop"), "--limit", "2", "--method", "ft-m"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES / "loop.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert left.value.code == 0, told
    assert "checkpoint to the bit: True" in told
    for tool in ("transformers", "peft", "xllamacpp"):
        assert f"{tool} " in told
