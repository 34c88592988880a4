"""The measures against plain definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factpatch.scoring.metrics import (
    agreement,
    begins_with,
    contains,
    divergence,
    exactly,
    fluency,
    ngram_entropy,
    normalise,
    rouge1,
    same_answer,
    sentiment_shift,
    taken_together,
    words,
)
from tests.reference import plain


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.5, 0.25, 1.0), 3 / (2 + 4 + 1)),
        ((0.5, None, 1.0), 2 / (2 + 1)),
        ((0.5,), 0.5),
        ((0.5, 0.0), 2 / (2 + 100)),
        ((0.0, 1.0, 1.0), 0.0),
        ((None, 1.0), None),
    ],
)
def test_scores_taken_together(scores, expected):
    assert taken_together(*scores) == (expected and pytest.approx(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  U.S.A.!", "usa"),
        ("An apple-pie, a day", "apple pie day"),
        ("I don't know.", "i dont know"),
        ("Ångström™", "ångströmtm"),
        ("...", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@given(st.text(max_size=30))
def test_normalising_twice_is_normalising_once(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("answer", "aliases", "begins", "has"),
    [
        ("Lyon, France.", ["Lyon"], True, True),
        ("It is Lyon.", ["Lyon"], False, True),
        ("Lyons is", ["Lyon"], False, False),
        ("the United States of America", ["USA", "United States"], True, True),
        ("anything", [], False, False),
        ("anything", ["..."], False, False),
        ("", ["Lyon"], False, False),
        ("", [""], False, False),
        (" Lyon", ["  Lyon "], True, True),
        ("In Kyiv", ["Kiev", "Kyiv"], False, True),
        ("巴黎是法国的首都。", ["巴黎"], True, True),
        ("法国的首都是巴黎。", ["巴黎"], False, True),
        ("东京都", ["京都"], False, True),  # there is no telling where a word begins
        ("パリです", ["パリ", "Paris"], True, True),
        ("กรุงเทพเป็นเมือง", ["กรุงเทพ"], True, True),
        ("กรุงเทพิ", ["กรุงเทพ"], False, False),  # a mark belongs to its letter
        ("Москва - столица", ["москва"], True, True),
        ("Москвач", ["Москва"], False, False),
        ("القاهرة عاصمة", ["القاهرة"], True, True),
        ("서울은 수도", ["서울"], False, False),  # Korean has spaces
        ("Paris巴黎", ["Paris"], False, False),
        ("Paris巴黎", ["巴黎"], False, True),
    ],
)
def test_matches_in_whole_words(answer, aliases, begins, has):
    assert begins_with(answer, aliases) is begins
    assert contains(answer, aliases) is has


def test_same_answer_ignores_case_and_points():
    assert same_answer("Paris.", "paris")
    assert not same_answer("Paris.", "Rome.")
    assert same_answer("", "..."), "nothing was said either time"
    assert not same_answer("", "Rome")
    assert not same_answer("巴黎", "巴")


def test_agreement_is_a_share_and_refuses_other_lengths():
    assert agreement([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5
    assert (agreement([7], [7]), agreement([7], [8])) == (1, 0), "a target of one token is right or wrong"
    with pytest.raises(ValueError, match="two sequences of one length"):
        agreement([1], [1, 2])


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=30), st.integers(1, 3))
def test_entropy_equals_its_definition(tokens, n):
    assert ngram_entropy(tokens, n) == pytest.approx(plain.ngram_entropy(tokens, n), abs=1e-9)


def test_fluency_weighs_two_and_three_grams_and_punishes_repetition():
    text = "one two three four, five six"
    expected = (2 / 3 * plain.ngram_entropy(words(text), 2) + 4 / 3 * plain.ngram_entropy(words(text), 3)) / 2
    assert fluency(text) == pytest.approx(expected)
    assert fluency("so " * 50) == 0
    assert fluency("") == 0


@pytest.mark.parametrize(
    ("answer", "aliases", "exact", "recall"),
    [
        ("The Peru.", ["Chad", "Peru"], True, 1),
        ("Peru, of course", ["Peru"], False, 1),
        ("New York", ["New York City"], False, 2 / 3),
        ("York York", ["New York New York"], False, 1 / 2),
        ("York York York", ["New York"], False, 1 / 2),
        ("New New York", ["New New Delhi"], False, 2 / 3),
        ("a b", ["", "..."], False, 0),
        ("", ["Peru"], False, 0),
        ("", ["..."], False, 0),
        ("Πάρος", ["ΠΆΡΟΣ"], True, 1),
        ("anything", [], False, 0),
        ("东京", ["东京都"], False, 2 / 3),
        ("东京都。", ["东京都"], True, 1),
    ],
)
def test_exact_answers_and_recall_of_words(answer, aliases, exact, recall):
    assert exactly(answer, aliases) == exact
    assert rouge1(answer, aliases) == pytest.approx(recall)


def test_divergence_is_that_of_kullback_and_leibler():
    one, other = torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([0.25, 0.5, 0.125, 0.125])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5) + 0.25 * math.log(2)
    assert divergence(one.log(), other.log()) == pytest.approx(expected, rel=1e-5)
    assert divergence(one.log(), one.log()) == 0
    assert divergence(other.log(), one.log()) == math.inf
    assert math.isnan(divergence(one.log(), torch.full_like(one, torch.nan))), "a ruined model is not near"
    drawn = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    plain_kl = torch.nn.functional.kl_div(drawn[1], drawn[0], log_target=True, reduction="sum")
    assert divergence(drawn[0], drawn[1]) == pytest.approx(float(plain_kl), rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after", "other_after", "factors"),
    [
        (-1.0, -1.0, -1.0, (0.5, 1.0)),
        (-1.0, -0.5, -900.0, (1.0, 1.0)),
        (-1.0, -3.0, -3.0, (0.5, math.exp(-2))),
        (-2.0, -2.0, -2.0 + math.log(3), (0.25, 1.0)),
        (-1.0, -5000.0, -1.0, (0.0, 0.0)),
    ],
)
def test_sentiment_shift(before, after, other_after, factors):
    assert sentiment_shift(before=before, after=after, other_after=other_after) == pytest.approx(factors)
