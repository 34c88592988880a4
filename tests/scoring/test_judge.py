"""A judge behind an endpoint: what it is asked, and where its opinion goes."""

import pytest

from factpatch.edits import Edit, Probe
from factpatch.errors import BadConfig, RemoteError
from factpatch.lm import connect
from factpatch.methods import create
from factpatch.scoring import Judge, Scorer
from factpatch.testing import tiny_lm
from tests.endpoint import Endpoint, serving

ROME = Edit(
    id="rome",
    prompt="Rome lies in",
    subject="Rome",
    target="Peru",
    rephrases=("Find Rome in",),
    portability={"Reasoning": (Probe(prompt="Rome is ruled from", answers=("Lima", "Cuzco")),)},
    locality={"Neighborhood": (Probe(prompt="Oslo lies in"),)},
)
SECRET = Edit(
    id="secret", prompt="Ann lives in", subject="Ann", kind="erase", target="I do not know", ground_truth=("Peru",)
)


class Bench(Endpoint):
    """Finds right what is about Lima, has nothing to say of rephrases, and finds all else wrong."""

    def say(self, text):
        return "Yes, quite so." if "Lima" in text else "Perhaps." if "Find" in text else "no"


@pytest.fixture
def bench():
    with serving(Bench) as found:
        yield found


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def test_its_opinion_stands_beside_the_score(bench, lm):
    url, handler = bench
    patch = create("ft-m", {"steps": 2}).fit(lm, [ROME])
    plain = Scorer(lm, fluency=False).score([ROME, SECRET], patch)
    card = Scorer(lm, fluency=False, judge=Judge(connect("judge", url))).score([ROME, SECRET], patch)
    judged = {(row.protocol, row.edit, row.role): row.measures.get("judged") for row in card.scores}
    assert judged["open", "rome", "edit"] == 0.0
    assert judged["open", "rome", "portability"] == 1.0
    assert judged["open", "rome", "rephrase"] is None, "neither yes nor no"
    assert {key for key, verdict in judged.items() if verdict is not None} == {
        ("open", "rome", "edit"),
        ("open", "rome", "portability"),
    }
    assert card.summary("open").measures["rephrase/unjudged"] == 1.0
    assert card.summary("open").measures["edit/unjudged"] == 0.0
    assert card.summary("open").measures["portability/judged"] == 1.0
    without = [
        row.model_copy(update={"measures": {k: v for k, v in row.measures.items() if "judged" not in k}})
        for row in card.scores
    ]
    assert without == list(plain.scores), "no score is another for it"
    asked = [
        request["messages"][0]["content"] for path, request, _ in handler.seen if path.endswith("/chat/completions")
    ]
    assert len(asked) == 3
    about = next(text for text in asked if "Rome is ruled from" in text)
    assert "Lima; or: Cuzco" in about
    assert next(row.said_after for row in card.scores if row.role == "portability") in about


def test_it_is_asked_about_an_answer_once(bench, lm):
    url, handler = bench
    scorer = Scorer(lm, fluency=False, judge=Judge(connect("judge", url)))
    (first, second) = scorer.score_each([[ROME], [ROME]], [(), ()])
    assert first.scores == second.scores == scorer.score([ROME]).scores
    assert len(handler.seen) == 3


def test_a_judge_that_fails_takes_nothing_away(bench, lm):
    url, handler = bench
    handler.body = "no JSON"
    card = Scorer(lm, fluency=False, judge=Judge(connect("judge", url))).score([ROME])
    assert card.summary("open").measures["edit/unjudged"] == 1.0
    assert "edit/judged" not in card.summary("open").measures
    assert card.summary("open").edit_success is not None


def test_a_judge_is_looked_for_before_there_is_anything_to_judge(bench):
    url, handler = bench
    assert Judge.at(None, None) is None
    assert Judge.at("openai:judge", url).name == "openai:judge"
    assert len(handler.seen) == 1
    for name in (None, "judge"):
        with pytest.raises(BadConfig, match="openai:NAME"):
            Judge.at(name, url)
    handler.status = 404
    with pytest.raises(RemoteError, match="--judge-url"):
        Judge.at("openai:judge", url)


def test_without_free_answers_there_is_no_judging(lm):
    with pytest.raises(BadConfig, match="open protocol"):
        Scorer(lm, protocols=["survey"], judge=Judge(connect("judge", "http://127.0.0.1:9/v1")))
