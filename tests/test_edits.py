"""`Edit` and `Probe`: what is accepted, what is refused and in which words."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from factpatch.edits import KINDS, Edit, Probe
from factpatch.errors import BadRecord

texts = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)
probes = st.builds(Probe, prompt=texts, answers=st.lists(texts, max_size=3).map(tuple))
groups = st.dictionaries(texts, st.lists(probes, min_size=1, max_size=2).map(tuple), max_size=2)


@st.composite
def edits(draw):
    subject = draw(texts)
    return Edit(
        id=draw(texts),
        kind=draw(st.sampled_from(KINDS)),
        prompt=f"{draw(texts)}{subject}{draw(texts)}",
        target=draw(texts),
        subject=draw(st.sampled_from([None, subject])),
        ground_truth=draw(st.lists(texts, max_size=2)),
        rephrases=draw(st.lists(texts, max_size=2)),
        portability=draw(groups),
        locality=draw(groups),
        wanted=draw(st.lists(texts, max_size=2)),
    )


@given(edits())
def test_round_trips(edit):
    assert Edit.from_json(edit.to_json()) == edit
    assert pickle.loads(pickle.dumps(edit)) == edit  # noqa: S301
    assert copy.deepcopy(edit) == edit
    assert hash(pickle.loads(pickle.dumps(edit))) == hash(edit)  # noqa: S301


@given(edits())
def test_probes_lists_the_edit_first_and_every_probe_once(edit):
    found = list(edit.probes())
    assert found[0].probe == Probe(prompt=edit.prompt, answers=(edit.target,))
    counted = 1 + len(edit.rephrases) + sum(map(len, edit.portability.values())) + sum(map(len, edit.locality.values()))
    assert len(found) == counted
    assert all((role in {"portability", "locality"}) == bool(kind) for role, kind, _ in found)


def test_white_space_is_trimmed_single_texts_are_lists_and_repeats_fall_away():
    edit = Edit.from_json(
        {"id": "1", "prompt": " Rome is ", "target": " big\n", "ground_truth": "old", "rephrases": ["a", "a "]}
    )
    assert (edit.prompt, edit.target, edit.ground_truth, edit.rephrases) == ("Rome is", "big", ("old",), ("a",))


def test_edits_are_frozen_all_the_way_down():
    edit = Edit(id="1", prompt="a", target="b", locality={"N": [Probe(prompt="c")]})
    with pytest.raises(ValidationError):
        edit.target = "d"
    with pytest.raises(TypeError):
        edit.locality["M"] = ()


GOOD = {"id": "1", "prompt": "Rome is", "target": "big"}


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"target": "  "}, "target", "expected some text, found none"),
        ({"prompt": None}, "prompt", "expected a text, found null"),
        ({"prompt": 3}, "prompt", "expected a text, found the number 3"),
        ({"subject": "Oslo"}, "subject", 'expected a part of the prompt, found "Oslo"'),
        ({"kind": "forget"}, "kind", "expected 'insert', 'modify', 'erase' or 'restyle', found the text \"forget\""),
        ({"locality": "Paris"}, "locality", 'expected an object, found the text "Paris"'),
        ({"locality": {"N": ["x"]}}, "locality.N.0", "expected an object with fields"),
        (
            {"locality": {"N": [{"prompt": "x", "answers": [1]}]}},
            "locality.N.0.answers.0",
            "expected a text, found the number 1",
        ),
        ({"colour": "red"}, "colour", "is not a field that is known here"),
    ],
)
def test_bad_fields_are_named(change, field, words):
    with pytest.raises(BadRecord) as caught:
        Edit.from_json(GOOD | change, source="facts.jsonl", number=7)
    assert caught.value.field == field
    assert words in caught.value.problem
    assert str(caught.value).startswith(f'facts.jsonl, record 7, "{field}": ')


@pytest.mark.parametrize(
    ("record", "words"), [([1], "found a list of 1"), ("x", 'found the text "x"'), (None, "found null")]
)
def test_anything_but_an_object_is_refused(record, words):
    with pytest.raises(BadRecord, match="expected an object with fields") as caught:
        Edit.from_json(record)
    assert words in str(caught.value)


def test_a_message_that_quotes_broken_text_can_be_printed():
    with pytest.raises(BadRecord) as caught:
        Edit.from_json({"id": "1", "prompt": "a", "target": "b", "\ud800": 1})
    assert "\\ud800" in str(caught.value)
    assert str(caught.value).encode("utf-8")


def test_a_missing_field_is_named():
    with pytest.raises(BadRecord, match='"target": expected a value, found nothing'):
        Edit.from_json({"id": "1", "prompt": "a"})
