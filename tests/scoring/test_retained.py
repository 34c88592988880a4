"""Questions to be answered as before, asked under every patch that is scored."""

import pytest

from factpatch.edits import Probe
from factpatch.errors import BadConfig
from factpatch.methods import create
from factpatch.scoring import Scorecard, Scorer
from factpatch.testing import tiny_edits, tiny_lm

QUESTIONS = (Probe(prompt="Rome lies in", answers=("Peru",)), Probe(prompt="Oslo lies in"))


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def patches(lm):
    method = create("ft-m", {"steps": 30, "lr": 1e-2})
    return [method.fit(lm, [edit]) for edit in tiny_edits()[:2]]


def test_they_are_asked_under_each_patch(lm, patches):
    edits = tiny_edits()[:2]
    scorer = Scorer(lm, fluency=False, retain=QUESTIONS)
    cards = scorer.score_each([[edit] for edit in edits], [(patch,) for patch in patches])
    said = lm.answer([probe.prompt for probe in QUESTIONS])
    for edit, patch, card in zip(edits, patches, cards, strict=True):
        with lm.patched(patch):
            now = lm.answer([probe.prompt for probe in QUESTIONS])
        assert [(q.before, q.after) for q in card.retained] == list(zip(said, now, strict=True))
        assert {q.edits for q in card.retained} == {(edit.id,)}
        assert card.retained == scorer.score([edit], patch).retained
    assert any(q.changed for card in cards for q in card.retained)
    assert Scorecard.join(cards).retained == (*cards[0].retained, *cards[1].retained)


def test_they_change_no_score(lm, patches):
    edits = tiny_edits()[:1]
    plain = Scorer(lm, fluency=False).score(edits, patches[0])
    card = Scorer(lm, fluency=False, retain=QUESTIONS).score(edits, patches[0])
    assert card.scores == plain.scores
    assert plain.retained == ()
    assert all(not q.changed for q in Scorer(lm, fluency=False, retain=QUESTIONS).score(edits).retained)


def test_what_was_right_and_is_no_more_is_lost(lm, patches):
    (said,) = lm.answer(["Rome lies in"])
    knows = (Probe(prompt="Rome lies in", answers=(said,)), Probe(prompt="Rome lies in", answers=("Nowhere",)))
    card = Scorer(lm, fluency=False, retain=knows).score(tiny_edits()[:1], patches[0])
    assert [(q.was_right, q.is_right, q.changed, q.lost) for q in card.retained] == [
        (True, False, True, True),
        (False, False, True, False),
    ]


def test_they_need_free_answers(lm):
    with pytest.raises(BadConfig, match="open protocol"):
        Scorer(lm, protocols=["survey"], retain=QUESTIONS)
