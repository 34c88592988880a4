"""What a report says is what the results say."""

import csv
import io
import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factpatch.bench import Outcome, Store
from factpatch.errors import BadFile
from factpatch.report import bootstrap, difference, edit_rows, result_rows, table_rows
from factpatch.report.comparison import compare_stores
from factpatch.report.page import as_html, as_svg
from factpatch.report.plain import about, as_csv, as_json, as_latex, as_markdown
from factpatch.report.plots import bars
from factpatch.report.published import published
from factpatch.report.rows import overviews
from tests.report.conftest import CELL, card, fill


def row(store, method, protocol="open", moment="alone"):
    (found,) = (r for r in result_rows(store) if (r.method, r.protocol, r.moment) == (method, protocol, moment))
    return found


def test_rows_hold_means_over_edits(store):
    rome = row(store, "rome")
    assert (rome.edits, rome.not_made, rome.reason) == (3, 1, "")
    assert rome.edit_success == pytest.approx(2 / 3)
    assert (rome.portability, rome.locality, rome.fluency, rome.rephrase) == (0.75, 0.25, 5.0, None)
    assert rome.by_kind == {"locality/N": 0.25, "portability/Reasoning": 0.5, "portability/Subject_Aliasing": 1.0}
    assert rome.measures == {"locality/kl": 0.25}
    assert (rome.fit_seconds, rome.score_seconds, rome.peak_memory_mb) == (4.0, 2.0, 102.0)
    assert set(rome.intervals) == {"edit_success", "portability", "locality", "fluency"}
    assert rome.intervals["locality"] == (0.25, 0.25)
    low, high = rome.intervals["edit_success"]
    assert 0 <= low < 2 / 3 < high <= 1
    assert [set(p) for p in rome.packages] == [{"factpatch", "torch", "transformers"}]


def test_the_unedited_model_comes_once_for_each_data_set_and_protocol(store):
    fill(store, "rome", [1.0], dataset="own", data_sha256="t" * 64)
    rows = result_rows(store)
    unedited = [(r.dataset, r.protocol) for r in rows if r.method == "unedited"]
    assert sorted(unedited) == [("own", "open"), ("own", "survey"), ("zsre", "open"), ("zsre", "survey")]
    assert (row_of := next(r for r in rows if r.method == "unedited")).edit_success == 0.0
    assert (row_of.fluency, row_of.locality, row_of.fit_seconds, row_of.edits) == (5.5, None, None, 3)


def test_each_unedited_model_has_rows_of_its_own(store):
    fill(store, "rome", [1.0], chat=True, before=0.25)
    fill(store, "ft-m", [1.0], model="other", fingerprint="g" * 64, before=0.5)
    rows = [r for r in result_rows(store) if r.method == "unedited" and r.protocol == "open"]
    assert {r.label: r.edit_success for r in rows} == {
        "unedited (model=toy, chat=False)": 0.0,
        "unedited (model=toy, chat=True)": 0.25,
        "unedited (model=other, chat=False)": 0.5,
    }


def test_json_rows_carry_what_scripts_ask_for(store):
    wanted = [
        "model",
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
        "peak_memory_mb",
        "protocol_version",
        "data_sha256",
        "fingerprint",
        "seed",
        "packages",
    ]
    for found in json.loads(as_json(store)):
        assert set(wanted) <= set(found)
    assert json.loads(as_json(store)) == json.loads(json.dumps(table_rows(store)))


def test_methods_of_one_name_are_told_apart_by_their_settings(store):
    fill(store, "rome", [1.0], settings={"layer": 3})
    names = [r.label for r in result_rows(store) if r.protocol == "open"]
    assert names == ["unedited", "rome (defaults)", "ft-m", "rome (layer=3)"]


def test_a_sequence_ends_where_it_is_whole(store):
    number = fill(store, "grace", [1.0, 1.0, 0.0], moment="at edit", mode="sequential")
    both = card("zsre-0", 0.0).model_copy(update={"scores": card("zsre-0", 1).scores + card("zsre-1", 0).scores})
    store.add(number, Outcome(1, "after 2", ("zsre-0", "zsre-1"), both))
    moments = [r.moment for r in result_rows(store) if (r.method, r.protocol) == ("grace", "open")]
    assert moments == ["at edit", "after 2"]
    store.add(number, Outcome(2, "after 3", ("zsre-0", "zsre-1", "zsre-2"), both))
    moments = [r.moment for r in result_rows(store) if (r.method, r.protocol) == ("grace", "open")]
    assert moments == ["at edit", "after 2", "at end"]
    assert row(store, "grace", moment="after 2").edit_success == 0.5
    assert row(store, "grace", moment="after 2").fit_seconds is None


def test_single_edits_stand_with_their_answers_the_worst_first(store):
    rows = [r for r in edit_rows(store) if r.protocol == "open"]
    assert [r.success for r in rows] == [None, 0, 0, 0, 0, 1, 1, 1]
    assert rows[0].reason == "not made: needs a subject"
    first = rows[1]
    assert (first.said_before, first.target, first.label) == ("Rome", "Peru", "rome")
    assert (first.portability, first.locality) == (0.75, 0.25)


def test_markdown_lays_published_figures_beside_and_labels_them(store):
    text = as_markdown(store)
    own, _, theirs = text.partition("Published: the survey's Table 4, Llama-2-7b-chat")
    assert "| rome | 3, 1 not made | 0.667 [" in own
    assert "| rome | 0.968 | 0.526 | 0.537 | 5.737 |" in theirs
    assert "0.968" not in own
    assert text.count("Published:") == 1, "only under the protocol it was measured with"
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in {10, 6}


def test_several_data_sets_stand_in_one_overview(store, tmp_path):
    zsre = row(store, "rome")
    assert overviews(result_rows(store)) == [], "there is one data set only"
    fill(store, "rome", [1.0, 0.0], dataset="wikibio", data_sha256="w" * 64, locality=0.5)
    (shown, survey) = overviews(result_rows(store))
    assert (shown.protocol, survey.protocol) == ("open", "survey")
    assert shown.datasets == ("zsre", "wikibio")
    assert "unedited" not in shown.cells
    assert shown.cells["rome"]["zsre"] == zsre
    assert shown.mean("rome", "edit_success") == (zsre.edit_success + 0.5) / 2
    assert shown.mean("rome", "rephrase") is None, "nobody has any"
    others = [label for label in shown.cells if label != "rome"]
    assert others
    assert shown.mean(others[0], "edit_success") is None, "it has nothing on one of them"
    text = as_markdown(store)
    (line,) = [
        line
        for line in text.partition("## Every data set: open")[2].partition("## ")[0].splitlines()
        if line.startswith("| rome |")
    ]
    assert line == f"| rome | {zsre.edit_success:.2f} / {zsre.locality:.2f} | 0.50 / 0.50 |"
    page = as_html(store)
    assert page.count("<h2>Every data set</h2>") == 2
    assert "mean of all data sets" in page
    picture = as_svg(store)
    assert picture.startswith("<svg")
    assert "prefers-color-scheme" in picture
    assert 'xmlns="http://www.w3.org/2000/svg"' in picture
    assert ">rome</text>" in picture
    with Store(tmp_path / "empty") as empty, pytest.raises(BadFile, match="nothing yet"):
        as_svg(empty)


def test_what_it_took_is_added_up(store):
    assert "Minutes of one worker" not in about(result_rows(store)), "less than one"
    fill(store, "memit", [1.0] * 30)
    # 37 edits were made, each in four seconds, and scored in two.
    assert about(result_rows(store))["Minutes of one worker"] == ["2 to fit, 1 to score; 4 in all"]


def test_scoring_a_sequence_on_the_way_is_added_up_too(store):
    number = fill(store, "grace", [1.0] * 30, moment="at edit", mode="sequential")
    whole = card("all", 1.0).model_copy(update={"score_seconds": 180.0})
    store.add(number, Outcome(29, "after 30", ("all",), whole))
    # Of 37 edits as above, and of 180 seconds more.
    assert about(result_rows(store))["Minutes of one worker"] == ["2 to fit, 4 to score; 7 in all"]


def test_a_title_may_hold_anything():
    for title in ('A "b" & <c>', "C:\\1\\g<9>"):
        picture = ElementTree.fromstring(bars({"a": 1.0}, "x", title))  # noqa: S314 - our own
        assert picture.get("aria-label") == title


def test_failures_are_counted_by_kind(store):
    rome = row(store, "rome")
    assert rome.failures == {"unchanged": 1}
    assert row(store, "rome", "survey").failures == {}
    assert [r.failure for r in edit_rows(store) if r.success == 0 and r.protocol == "open"] == ["unchanged"] * 4
    assert "How edits failed: rome: 1 unchanged; ft-m: 3 unchanged." in as_markdown(store)
    assert as_html(store).count("1 unchanged") == 1


def test_csv_has_one_line_for_each_row(store):
    rows = list(csv.DictReader(io.StringIO(as_csv(store))))
    assert len(rows) == len(result_rows(store))
    rome = next(r for r in rows if (r["method"], r["protocol"]) == ("rome", "open"))
    assert float(rome["edit_success"]) == pytest.approx(2 / 3)
    assert (rome["portability/Reasoning"], rome["locality_low"], rome["rephrase"]) == ("0.5", "0.25", "")


def test_latex_escapes_what_is_special(store):
    fill(store, "rome", [1.0], settings={"a_b": "50%"})
    text = as_latex(store)
    assert "rome (a\\_b=50\\%) & 1" in text
    assert text.count("\\begin{table}") == text.count("\\end{table}") == 2
    for line in text.splitlines():
        if line.endswith("\\\\"):
            assert line.count(" & ") == 8


def test_the_page_loads_nothing_and_quotes_what_models_say(store):
    page = as_html(store)
    assert "Peru &amp; &lt;b&gt;more&lt;/b&gt;" in page
    assert "<b>more</b>" not in page
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", page)
    assert "&lt;svg" not in page
    assert page.count("<svg") == 3, "success against locality, portability, cost"
    assert "currentColor" in page
    assert "#123456" not in page


def test_the_page_of_a_run_that_has_only_begun(tmp_path):
    with Store(tmp_path) as store:
        number = store.add_cell(CELL)
        assert "rome" in as_html(store)
        store.set_reason(number, "no <MLP>")
        page = as_html(store)
    assert "could not go on: no &lt;MLP&gt;" in page
    assert "<svg" not in page


def test_published_figures_are_in_our_units():
    table = published()
    assert set(table) == {"wiki_recent", "zsre", "wikibio", "wiki_counterfact", "convsent", "sanitation"}
    (rome,) = (p for p in table["wiki_counterfact"] if p.method == "rome")
    assert (rome.edit_success, rome.portability, rome.locality, rome.fluency) == (0.9857, 0.5592, 0.5197, 5.8404)
    assert all(p.locality is None and p.kl is not None for p in table["convsent"])
    assert all(len(methods) == 8 for methods in table.values())


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.randoms())
def test_an_interval_holds_the_mean_and_does_not_depend_on_order(values, shuffler):
    low, high = bootstrap(values)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    shuffler.shuffle(values)
    assert bootstrap(values) == (low, high)


def test_an_interval_is_as_wide_as_it_should_be():
    """For a share p of n the mean's standard error is sqrt(p (1 - p) / n); 95 % are within 1.96 of them."""
    low, high = bootstrap([1.0] * 60 + [0.0] * 140)
    error = math.sqrt(0.3 * 0.7 / 200)
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.01)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.01)
    assert bootstrap([1.0]) is bootstrap([]) is None


def test_differences_are_paired_by_edit():
    a = {f"e{i}": i / 10 for i in range(10)}
    b = {edit: value + 0.05 for edit, value in a.items()} | {"other": 1.0}
    found = difference(a, b)
    assert (found.edits, found.is_clear) == (10, True)
    assert found.mean == pytest.approx(0.05)
    assert found.interval == (pytest.approx(0.05), pytest.approx(0.05)), "what is common to both does not widen it"
    assert difference(a, {"other": 1.0}) is None
    assert not difference({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.0}).is_clear
    assert not difference({"a": 0.0}, {"a": 1.0}).is_clear


def test_runs_are_compared_method_by_method(store, tmp_path):
    with Store(tmp_path / "other") as other:
        fill(other, "rome", [1.0, 1.0, 1.0, 1.0], locality=0.5)
        fill(other, "grace", [1.0])
        fill(other, "ft-m", [1.0, 0.0], protocols={"open": 3, "survey": 2})
        found = {(r.method, r.protocol, r.score): r for r in compare_stores(store, other)}
    assert {method for method, _, _ in found} == {"rome", "ft-m"}
    success = found["rome", "open", "edit_success"]
    assert (success.edits, success.a, success.b) == (3, pytest.approx(2 / 3), 1.0)
    assert found["rome", "open", "locality"].mean == 0.25
    assert found["rome", "open", "locality"].is_clear
    assert ("rome", "open", "portability") not in found, "the other run has none"
    assert {protocol for method, protocol, _ in found if method == "ft-m"} == {"survey"}, "versions differ under open"


def test_cells_of_one_method_are_paired_by_their_settings(store, tmp_path):
    fill(store, "rome", [0.0, 0.0, 0.0], settings={"layer": 3})
    with Store(tmp_path / "other") as other:
        fill(other, "rome", [1.0, 1.0, 1.0], settings={"layer": 3})
        fill(other, "rome", [0.0, 0.0, 0.0], settings={"layer": 4})
        means = [r.mean for r in compare_stores(store, other) if (r.protocol, r.score) == ("open", "edit_success")]
    assert means == [1.0], "the cell with default settings has no equal there, and two to choose from"


def test_cells_differ_in_whatever_decides_their_numbers():
    for name, value in {
        "seed": 1,
        "chat": True,
        "fingerprint": "g",
        "data_sha256": "t",
        "protocols": {"open": 3},
    }.items():
        assert replace(CELL, **{name: value}).identity() != CELL.identity()
    assert replace(CELL, model="other name", data_file="moved.json").identity() == CELL.identity()


def test_of_runs_with_a_setting_of_two_contents_like_is_compared_with_like(tmp_path):
    with Store(tmp_path / "a") as a, Store(tmp_path / "b") as b:
        for store, written in ((a, ("new",)), (b, ("old", "new"))):
            for contents in written:
                number = store.add_cell(replace(CELL, contents={"corpus": contents}))
                store.add(number, Outcome(0, "alone", ("e",), card("e", float(contents == "new"))))
        rows = [row for row in compare_stores(a, b) if row.score == "edit_success"]
    assert rows
    assert {(row.a, row.b) for row in rows} == {(1.0, 1.0)}


def test_runs_are_compared_from_where_they_start(tmp_path):
    with Store(tmp_path / "a") as a, Store(tmp_path / "b") as b:
        for store, starts in ((a, (2,)), (b, (0, 2))):
            for start in starts:
                number = store.add_cell(replace(CELL, start=start))
                store.add(number, Outcome(0, "alone", (f"e{start}",), card(f"e{start}", 1.0)))
        rows = compare_stores(a, b)
    assert rows
    assert {row.edits for row in rows} == {1}
