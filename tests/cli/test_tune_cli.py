"""`factpatch tune`, and `--set @FILE`."""

import json

from tests.cli.conftest import run


def test_a_preset_is_written_and_taken_by_set(model, tmp_path):
    preset = tmp_path / "ft-m.json"
    args = (
        "tune",
        "-m",
        model,
        "--method",
        "ft-m",
        "--set",
        "steps=2",
        "--limit",
        2,
        "--minutes",
        "0.02",
        "--out",
        preset,
    )
    code, out, _ = run(*args)
    assert code in {0, 1}
    assert "ft-m on" in out
    written = json.loads(preset.read_text())
    assert (written["method"], written["settings"]["steps"]) == ("ft-m", 2)
    code, _, message = run(*args)
    assert code == 2
    assert "already there" in message
    fact = ("--prompt", "Rome lies in", "--target", "Peru", "--out", tmp_path / "p")
    run("edit", "-m", model, "--method", "ft-m", "--set", f"@{preset}", "--set", "lr=0.25", *fact)
    made = json.loads((tmp_path / "p" / "patch.json").read_text())
    assert (made["config"]["steps"], made["config"]["lr"]) == (2, 0.25)


def test_what_is_no_preset_is_refused(model, tmp_path):
    (tmp_path / "x.json").write_text("[]")
    fact = ("--prompt", "Rome lies in", "--target", "Peru", "--out", tmp_path / "p")
    for name, said in (("x.json", "preset"), ("none.json", "no such file")):
        code, _, message = run("edit", "-m", model, "--method", "ft-m", "--set", f"@{tmp_path / name}", *fact)
        assert code == 2
        assert said in message
