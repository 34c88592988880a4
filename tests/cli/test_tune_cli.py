"""`factpatch tune`, and `--set @FILE`."""

import json
from pathlib import Path

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


def shown(capsys, **changes):
    from factpatch.analysis.tuning import Preset, Trial, Tuned
    from factpatch.cli.tune import _show

    start, best = (Trial(settings=own, score=0.5, measures={}, seconds=1.0) for own in ({}, {"lr": 0.1}))
    made = {"start": start, "best": best, "held_start": start, "held_best": best} | changes
    preset = Preset(method="ft-m", model="tiny", fingerprint="", settings={}, made={})
    found = Tuned(
        method="ft-m", model="tiny", fingerprint="", trials=(start,), facts=("a",), held=("b",), seed=0, preset=preset, **made
    )  # fmt: skip
    _show(found, Path("p.json"))
    return capsys.readouterr().out, start, best


def test_what_is_kept_and_what_is_not_is_told_apart(capsys):
    out, start, best = shown(capsys)
    assert "1 choice of settings tried" in out
    assert "score: harmonic mean of edit success, rephrase and locality" in out
    assert "the best in the search, which is not kept: lr = 0.1" in out
    assert "It does no better than the old settings on facts that the search had not seen; p.json holds these." in out
    out, *_ = shown(capsys, best=start, held_best=start)
    assert "the best" not in out
    assert "Nothing that was tried does better in the search than the old settings; p.json holds these." in out
    out, *_ = shown(capsys, held_best=best.model_copy(update={"score": 0.6}))
    assert "the best: lr = 0.1" in out
    assert "not kept" not in out
