"""CounterFact and MEND's zsRE, in records of our own that have the released files' form."""

import pytest

from factpatch.data import read
from factpatch.edits import Edit, Probe
from factpatch.errors import BadRecord

COUNTERFACT = {
    "case_id": 12,
    "pararel_idx": 341,
    "requested_rewrite": {
        "prompt": "{} was built in the city of",
        "relation_id": "P131",
        "target_new": {"str": "Lisk", "id": "Q1"},
        "target_true": {"str": "Oskova", "id": "Q2"},
        "subject": "Heron Tower",
    },
    "paraphrase_prompts": ["It rained. Heron Tower stands in", "Heron Tower rises over"],
    "neighborhood_prompts": ["Brel Gate was built in the city of"],
    "attribute_prompts": ["Salt House was built in the city of", "Old Mint was built in the city of"],
    "generation_prompts": ["Around Heron Tower one can eat"],
}
ZSRE = {
    "subject": "Ida Wren",
    "src": "What was Ida Wren's trade?",
    "pred": "painter",
    "rephrase": "Which trade did Ida Wren follow?",
    "alt": "glazier",
    "answers": ["printer", "book printer"],
    "loc": "nq question: how long is the brel river",
    "loc_ans": "212 miles",
    "cond": "printer >> glazier || What was Ida Wren's trade?",
}


def read_one(written, reader, raw):
    (edit,) = read(f"{reader}:{written([raw])}")
    return edit


def test_counterfact(written):
    assert read_one(written, "counterfact", COUNTERFACT) == Edit(
        id="counterfact-0",
        kind="modify",
        prompt="Heron Tower was built in the city of",
        target="Lisk",
        subject="Heron Tower",
        ground_truth=("Oskova",),
        rephrases=("It rained. Heron Tower stands in", "Heron Tower rises over"),
        locality={
            "Neighborhood": (Probe(prompt="Brel Gate was built in the city of", answers=("Oskova",)),),
            "Attribute": (
                Probe(prompt="Salt House was built in the city of", answers=("Lisk",)),
                Probe(prompt="Old Mint was built in the city of", answers=("Lisk",)),
            ),
        },
    )


def test_a_kind_without_prompts_is_left_out(written):
    assert list(read_one(written, "counterfact", COUNTERFACT | {"attribute_prompts": []}).locality) == ["Neighborhood"]


def test_mend_zsre(written):
    assert read_one(written, "mend_zsre", ZSRE) == Edit(
        id="mend_zsre-0",
        prompt="What was Ida Wren's trade?",
        target="glazier",
        subject="Ida Wren",
        ground_truth=("printer", "book printer"),
        rephrases=("Which trade did Ida Wren follow?",),
        locality={"Unrelated": (Probe(prompt="how long is the brel river", answers=("212 miles",)),)},
    )


def test_mend_zsre_leaves_out_a_subject_that_is_not_in_the_question(written):
    assert read_one(written, "mend_zsre", ZSRE | {"subject": "ida wren"}).subject is None


REWRITE = COUNTERFACT["requested_rewrite"]


@pytest.mark.parametrize(
    ("reader", "raw", "field", "problem"),
    [
        (
            "counterfact",
            COUNTERFACT | {"requested_rewrite": 3},
            "requested_rewrite",
            "expected an object with fields, found the number 3",
        ),
        (
            "counterfact",
            COUNTERFACT | {"requested_rewrite": REWRITE | {"prompt": "The tower of"}},
            "requested_rewrite.prompt",
            'expected a text with {} where the subject goes, found "The tower of"',
        ),
        (
            "counterfact",
            COUNTERFACT | {"requested_rewrite": REWRITE | {"target_new": {"id": "Q1"}}},
            "requested_rewrite.target_new.str",
            "expected a value, found nothing",
        ),
        (
            "counterfact",
            COUNTERFACT | {"neighborhood_prompts": [{"prompt": "x"}]},
            "neighborhood_prompts",
            "found an object of 1",
        ),
        ("mend_zsre", ZSRE | {"alt": ""}, "alt", "expected some text, found none"),
        ("mend_zsre", ZSRE | {"loc_ans": None}, "loc_ans", "found null"),
    ],
)
def test_a_bad_record_names_its_field(written, reader, raw, field, problem):
    with pytest.raises(BadRecord) as caught:
        read(f"{reader}:{written([raw])}")
    assert caught.value.field == field
    assert caught.value.problem.endswith(problem)
    assert f"factpatch data show {reader}:" in str(caught.value)
