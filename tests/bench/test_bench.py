"""Loops over edits: each alone, and one after the other."""

import pytest

from factpatch.bench import score_sequence, score_singly
from factpatch.edits import Edit
from factpatch.errors import OutputError
from factpatch.methods import create
from factpatch.scoring import Scorer
from factpatch.testing import Snapshot, tiny_edits, tiny_lm
from tests.cards import rows

SETTINGS = {"layer": 1, "steps": 30, "lr": 1e-2}


@pytest.fixture
def lm():
    return tiny_lm()


@pytest.fixture
def scorer(lm):
    return Scorer(lm, fluency=False)


def three():
    return [*tiny_edits(), Edit(id="oslo", prompt="Oslo lies in", target="Chad")]


def test_singles_are_what_each_edit_gives_by_itself(lm, scorer):
    method = create("ft-m", SETTINGS)
    done = score_singly(lm, method, three(), scorer)
    expected = [
        row for edit in three() for row in rows(Scorer(lm, fluency=False).score([edit], method.fit(lm, [edit])))
    ]
    assert rows(done.card) == expected
    assert done.failures == ()
    assert done.card.fit_seconds > 0
    assert done.card.baseline_seconds > 0


def test_a_sequence_has_two_clocks(lm, scorer):
    method = create("ft-m", SETTINGS)
    before = Snapshot.of(lm)
    done = score_sequence(lm, method, three(), scorer, checkpoints=(1, 2))
    assert before.differences(lm) == []
    assert sorted(done.at_end) == [1, 2, 3]
    # By hand.
    laid, at_edit = [], []
    for edit in three():
        with lm.patched(*laid):
            laid.append(method.fit(lm, [edit]))
        at_edit += rows(Scorer(lm, fluency=False).score([edit], *laid))
        expected = rows(Scorer(lm, fluency=False).score(three()[: len(laid)], *laid))
        assert rows(done.at_end[len(laid)]) == expected
    assert rows(done.at_edit) == at_edit
    assert rows(done.at_end[3]) != at_edit, "later edits change what earlier ones gave"


def refusing(lm):
    return [tiny_edits()[0], Edit(id="none", prompt="Oslo lies in", target="Chad"), tiny_edits()[1]]


def test_an_edit_that_is_refused_is_listed_and_the_rest_goes_on(lm, scorer):
    method = create("rome", {"layer": 1, "steps": 2, "contexts": 1, "moment_tokens": 300, "moment_length": 30})
    edits = refusing(lm)
    for done, cards in (
        (single := score_singly(lm, method, edits, scorer), [single.card]),
        (line := score_sequence(lm, method, edits, scorer), [line.at_edit, *line.at_end.values()]),
    ):
        assert [(failure.edit, "needs to know the subject" in failure.reason) for failure in done.failures] == [
            ("none", True)
        ]
        for card in cards:
            assert {row.edit for row in card.scores} == {"rome", "ann"}


def test_nothing_made_gives_no_card(lm, scorer):
    method = create("rome", {"steps": 2, "moment_tokens": 300, "moment_length": 30})
    edits = refusing(lm)[1:2]
    assert score_singly(lm, method, edits, scorer).card is None
    done = score_sequence(lm, method, edits, scorer)
    assert (done.at_edit, done.at_end, len(done.failures)) == (None, {}, 1)


def test_what_is_wrong_beyond_one_edit_is_raised_and_the_model_is_as_it_was(lm, scorer, monkeypatch):
    method, made = create("ft-m", SETTINGS), []
    before = Snapshot.of(lm)

    def fit(*args):
        if made:
            raise OutputError("the disk is full")
        made.append(1)
        return type(method).fit(method, *args)

    monkeypatch.setattr(method, "fit", fit, raising=False)
    for loop in (score_singly, score_sequence):
        made.clear()
        with pytest.raises(OutputError, match="the disk is full"):
            loop(lm, method, three(), scorer)
        assert before.differences(lm) == []
