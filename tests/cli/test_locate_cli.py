"""`factpatch locate` over a tiny model on disk: what it prints, keeps and draws, and its picture."""

import csv
import json
import sys
import xml.etree.ElementTree as ET

import pytest

from factpatch.analysis.locate import Located, Measures, Place, Traced
from factpatch.cli.locate import _blocks
from factpatch.files import cache_root
from factpatch.report.layers import layer_rows, layers_picture
from factpatch.testing import tiny_lm
from tests.cli.conftest import run

QUICK = ["--method", "ft-m", "--set", "steps=25", "--set", "lr=0.01"]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "cache"))


def test_it_prints_the_blocks_and_the_choice_keeps_it_and_draws_it(model, facts, tmp_path):
    folder = tmp_path / "picture"
    code, out, _ = run("locate", "-m", model, *QUICK, "--data", facts, "--layers", "0,2", "--out", folder)
    assert code == 0
    assert "survey protocol" in out
    assert "open protocol" in out
    assert "no causal tracing: the model knows none of the 0 facts" in out
    (kept,) = (cache_root() / "located").glob("*.json")
    assert f"kept in {kept}" in out
    chosen = json.loads(kept.read_text())["choices"]["ft-m"]["layers"]
    assert f"chosen: block {chosen[0]}, score 0." in out
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["block"] for row in rows] == ["0", "2"]
    assert [row["block"] for row in rows if row["chosen"] == "True"] == [str(chosen[0])]
    assert (folder / "layers.svg").read_text().startswith("<svg")

    code, out, _ = run("edit", "-m", model, *QUICK, "--prompt", "Rome is", "--target", "a pie", "--out", tmp_path / "p")
    assert f"model.layers.{chosen[0]}.mlp.down_proj.weight" in out, "edits are made there from now on"


def test_json_and_nothing_kept(model, facts):
    args = ("locate", "-m", model, *QUICK, "--data", facts, "--layers", "2", "--no-trace", "--no-keep", "--json")
    code, out, _ = run(*args)
    found = json.loads(out)
    assert code == 0
    assert [found.pop(name) for name in ("kept", "preset", "written", "skipped_records")] == [None, None, [], 0]
    assert found.pop("preliminary") is True, "a single place was tried"
    assert found.pop("complete") is True
    assert Located.model_validate(found).chosen == (2,)
    assert found["untraced"] == "not asked for"
    assert not list((cache_root() / "located").glob("*.json"))


def test_exits_with_1_where_no_edit_holds(model, facts):
    args = ("--set", "steps=1", "--set", "lr=1e-9", "--data", facts, "--layers", "1", "--minutes", "5")
    code, out, _ = run("locate", "-m", model, "--method", "ft-m", *args)
    assert code == 1
    assert "chosen: none" in out
    assert not list((cache_root() / "located").glob("*.json"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layers", "one"], 'layers "one": expected numbers of blocks'),
        (["--layers", "7"], "no block 7"),
        (["--method", "ice"], "does not choose a block"),
        (["--set", "layer=1"], "what a sweep looks for"),
        (["--set", "nothing=1"], 'no setting "nothing"'),
        (["--out", __file__], "already there"),
        (["--limit", "0"], "greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_told_before_any_work(model, monkeypatch, args, message):
    monkeypatch.setattr("factpatch.analysis.locate.trace", None)
    monkeypatch.setattr("factpatch.analysis.locate.each_alone", None)
    code, out, error = run("locate", "-m", model, *args)
    assert code == 2
    assert message in error
    assert out == ""


@pytest.fixture
def found():
    """Edits do best at block 1, and tracing suggests block 2."""

    def place(layer, success):
        numbers = Measures(edit_success=success, rephrase=None, portability=0.1, locality=0.7)
        return Place(
            layers=(layer,),
            score=success,
            survey_score=success,
            support=success,
            survey=numbers,
            open=numbers,
            refused={},
            seconds=1.0,
            by_fact={},
        )

    return Located(
        model="tiny", fingerprint="f", method="rome", field="layer", config={}, facts=("a",), facts_sha256="", seed=0,
        rule="", places=(place(0, 0.2), place(1, 0.8)), stopped="time", chosen=(1,),
        traced=Traced(part="mlp", window=1, facts=3, of=5, effects=(0.0, 0.01, 0.02), suggested=2), untraced="",
        agree=False, rank_correlation=-0.25, versions={},
    )  # fmt: skip


def test_tracing_s_suggestion_stands_beside_the_choice(found, capsys):
    from factpatch.cli.locate import _show

    _show(found)
    out = capsys.readouterr().out
    assert "chosen: block 1, score 0.800" in out
    assert "tracing suggests: block 2, from 3 known facts (there was no time for 2 more); it was not tried" in out
    assert "they do not agree" in out
    assert "rank correlation of score and tracing's effect over the places tried: -0.25" in out
    assert "stopped, for the time was up, with 2 places tried and others left" in out
    _show(
        found.model_copy(
            update={"chosen": (0,), "agree": True, "traced": found.traced.model_copy(update={"suggested": 0})}
        )
    )
    out = capsys.readouterr().out
    assert (
        "tracing suggests: block 0, from 3 known facts (there was no time for 2 more); edits there score 0.200" in out
    )
    assert "they agree" in out


def test_rows_hold_what_is_drawn(found):
    rows = layer_rows(found)
    assert [row["block"] for row in rows] == [0, 1, 2]
    assert [row["tracing_effect"] for row in rows] == [0.0, 0.01, 0.02]
    assert [row["score"] for row in rows] == [0.2, 0.8, None]
    assert [row["survey_edit_success"] for row in rows] == [0.2, 0.8, None]
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert [row["tracing_suggests"] for row in rows] == [False, False, True]
    assert len({tuple(row) for row in rows}) == 1


@pytest.mark.parametrize("traced", [True, False])
def test_the_picture_has_a_panel_for_each_protocol_and_one_for_tracing(found, traced):
    drawn = layers_picture(found if traced else found.model_copy(update={"traced": None}))
    texts = [each.text for each in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314
    for text in ("survey protocol", "open protocol", "block", "score; the open one decides", "chosen by editing"):
        assert text in texts
    assert ("suggested by tracing" in texts) == traced
    assert ("indirect effect" in texts) == traced


@pytest.mark.parametrize(
    ("layers", "text"), [((4,), "4"), ((4, 5), "4, 5"), ((4, 5, 6), "4 to 6"), ((4, 6, 7), "4, 6, 7")]
)
def test_how_blocks_are_written(layers, text):
    assert _blocks(layers) == text


def test_a_preset_that_goes_before_the_choice_is_told(model, facts, monkeypatch):
    from factpatch.methods import Preset
    from factpatch.methods.ft import FtM

    monkeypatch.setattr(FtM, "presets", (Preset(tiny_lm().shape, {"layer": 0}, "a test"),))
    _, out, _ = run("locate", "-m", model, *QUICK, "--data", facts, "--layers", "2", "--no-trace")
    assert "a preset fits this model and goes before it (a test); to use what was found: --set layer=2" in out


def test_records_that_cannot_be_read_are_left_out_if_wanted(model, facts):
    facts.write_text(facts.read_text() + "\n{}\n")
    args = ("locate", "-m", model, *QUICK, "--data", facts, "--layers", "2", "--no-trace", "--no-keep")
    assert run(*args)[0] == 2
    code, out, _ = run(*args, "--skip-invalid")
    assert (code, "1 record could not be read, left out" in out) == (0, True)
    assert json.loads(run(*args, "--skip-invalid", "--json")[1])["skipped_records"] == 1


def test_json_names_what_was_written(model, facts, tmp_path):
    args = ("--data", facts, "--layers", "2", "--no-trace", "--no-keep", "--json", "--out", tmp_path / "o")
    _, out, _ = run("locate", "-m", model, *QUICK, *args)
    assert json.loads(out)["written"] == [str(tmp_path / "o" / f"layers.{end}") for end in ("svg", "csv")]


def test_a_choice_that_rests_on_little_is_said_to(model, facts):
    args = ("locate", "-m", model, *QUICK, "--data", facts, "--layers", "2", "--no-trace")
    assert "as preliminary: it rests on little" in run(*args)[1].replace("\n", " ")
    assert "not kept: it is preliminary" in run(*args)[1]


def test_what_cannot_be_drawn_is_told_before_the_model_is_loaded(tmp_path, facts, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("locate", "-m", tmp_path / "no-model", "--data", facts, "--out", tmp_path / "o")
    assert (code, "needs Matplotlib" in err) == (2, True)


def test_what_will_be_done_is_told_before_and_both_scores_are_shown(model, facts):
    args = ("--data", facts, "--layers", "2", "--no-trace", "--no-keep", "--minutes", "30")
    _, out, err = run("locate", "-m", model, *QUICK, *args)
    assert "tiny: up to 8 facts edited with ft-m, one at a time, at 1 block. It takes" in err
    first, second = out.split("survey protocol")
    assert "open protocol, which decides" in first
    assert all("score" in part.partition("edit success")[0] for part in (first, second))


def test_loading_counts_for_the_time_and_no_block_at_all_may_be_tried(model, facts):
    code, out, _ = run("locate", "-m", model, *QUICK, "--data", facts, "--no-trace", "--minutes", "0")
    assert code == 1
    assert "stopped, for the time was up, before any place was tried; the same command goes on from here" in out
    assert not list((cache_root() / "located").glob("*.json"))


def test_what_was_found_before_an_interruption_is_told_and_kept(model, facts, monkeypatch):
    from factpatch.methods.ft import FtM

    def make(self, lm, edits, config, progress, of=FtM.make):
        if config.layer == 0:
            raise KeyboardInterrupt
        return of(self, lm, edits, config, progress)

    monkeypatch.setattr(FtM, "make", make)
    args = ("--data", facts, "--layers", "2,0", "--no-trace")
    code, out, _ = run("locate", "-m", model, *QUICK, *args)
    assert code == 130
    assert "chosen: block 2" in out
    assert "stopped, for it was interrupted, with 1 place tried and others left" in out
    assert "as preliminary" in out
