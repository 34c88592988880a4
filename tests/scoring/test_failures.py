"""Kinds of wrong answers."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from factpatch.edits import Edit
from factpatch.scoring.failures import FAILURES, failure_mode
from factpatch.scoring.protocols import PROTOCOLS, Seen

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("said", "mode"),
    [
        ("", "meaningless"),
        (" ... !?", "meaningless"),
        ("1234", "meaningless"),
        ("go go go go go", "meaningless"),
        ("the doublet of the doublet of the doublet of the doublet", "meaningless"),
        ("Port Amselelelelelelelelelelelel", "meaningless"),
        ("Rome, the old capital", "unchanged"),
        ("a city on the Tiber", "unchanged"),
        ("It lies in New York, they say", "displaced"),
        ("New York, not Rome", "partial"),
        ("New Orleans", "partial"),
        ("New", "missing"),
        ("Chad", "irrelevant"),
        ("Чад", "irrelevant"),
    ],
)
def test_what_kind_of_wrong_answer_it_is(said, mode):
    assert failure_mode(said, wanted=["New York"], old=["Rome"], before="A city on the Tiber.") == mode


def test_long_words_and_lists_are_not_taken_for_repetition():
    for said in (
        "Donaudampfschifffahrtsgesellschaft",
        "Peru, Chad, Chile and Mali",
        "Llanfairpwllgwyngyllgogerychwyrndrobwll",
    ):
        assert failure_mode(said, wanted=["Rome"]) == "irrelevant"


def test_only_wrong_free_answers_have_a_kind():
    edit = Edit(id="e", prompt="Rome lies in", target="Peru", ground_truth=("Italy",))
    probe = next(edit.probes())
    assert PROTOCOLS["open"].failure(edit, probe, Seen("Spain"), Seen("Italy")) == "unchanged"
    assert PROTOCOLS["survey"].failure(edit, probe, Seen("Spain"), Seen("Italy")) is None


def test_it_agrees_with_labels_given_by_hand():
    spec = importlib.util.spec_from_file_location("failures_page", HERE / "failures.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    rows = page.labelled()
    assert {row["label"] for row in rows} <= set(FAILURES)
    right = Counter(row["set"] for row in rows if row["label"] == row["found"])
    of = Counter(row["set"] for row in rows)
    assert of["held out"] > 50
    assert right["held out"] / of["held out"] > 0.8
    assert right["rules"] / of["rules"] > 0.9
