"""Requirements: how they are read, what they say of a scorecard, and what is told of one that is not met."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factpatch.errors import BadConfig
from factpatch.gate import Finding, Requirement, check
from factpatch.methods import create
from factpatch.scoring import ProbeScore, Retained, Scorecard
from factpatch.testing import tiny_edits, tiny_lm


def row(role, after, *, kind="", prompt="p", edit="e", protocol="open", before=0.0, said="said"):
    return ProbeScore(
        protocol=protocol, edit=edit, role=role, kind=kind, prompt=prompt, answers=("a",), before=before, after=after,
        said_before="was", said_after=said,
    )  # fmt: skip


def card(*rows, retained=()):
    return Scorecard(versions={"open": 1, "survey": 1}, chat=False, scores=rows, retained=retained)


@pytest.fixture(scope="module")
def patches():
    lm = tiny_lm()
    return {
        name: create(name, {"steps": "1"} if name == "ft-m" else {}).fit(lm, tiny_edits()) for name in ("ft-m", "ice")
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("edit_success>=1", "edit_success>=1"),
        (" rephrase  >=  80% ", "rephrase>=0.8"),
        ("fluency_drop<=5%", "fluency_drop<=0.05"),
        ("fluency ≥ 4.5", "fluency>=4.5"),
        ("survey.locality/Forgetfulness > .5", "survey.locality/Forgetfulness>0.5"),
        ("mergeable", "mergeable"),
        ("OPEN.Locality<1", "locality<1"),
        ("locality >= 0.99999999", "locality>=0.99999999"),
        ("fluency_drop <= -2%", "fluency_drop<=-0.02"),
        ("fluency >= 1e-7", "fluency>=1e-07"),
    ],
)
def test_they_are_read_as_people_write_them(text, shown):
    read = Requirement.parse(text)
    assert str(read) == shown
    assert Requirement.parse(shown) == read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("edit_sucess>=1", 'Did you mean "edit_success"'),
        ("locality", "says no bound"),
        ("locality=0.9", "says no bound"),
        ("locality>=95", "Did you mean 95%"),
        ("edit_success>=5", "found 5.\n  Write NAME>=NUMBER or NAME<=NUMBER, such as edit_success>=1"),
        ("fluency_drop<=5", "Did you mean 5%"),
        ("fluency_drop<=95", "Write NAME"),
        ("locality>=500%", "a share from 0 to 1, found 500%.\n  Write NAME"),
        ("locality>=-1", "a share from 0 to 1, found -1.\n  Write NAME"),
        ("fluency>=1e999", "a number of bits"),
        ("rephrase/Reasoning>=1", "has no kinds"),
        ("mergeable>=1", "takes no number"),
        ("locality>=.", "is no number"),
        (">=1", "not a requirement"),
        ("", "not a requirement"),
    ],
)
def test_others_are_refused_with_what_was_expected(text, said):
    with pytest.raises(BadConfig, match=said):
        Requirement.parse(text)


@given(st.text(max_size=20))
def test_no_text_ends_in_anything_but_a_requirement_or_a_clear_error(text):
    try:
        read = Requirement.parse(text)
    except BadConfig:
        return
    assert Requirement.parse(str(read)) == read


def found(patch, text, *rows, **more):
    (finding,) = check(card(*rows, **more), patch, [Requirement.parse(text)], {("e", "p2")}).findings
    return finding


def test_a_bound_is_held_against_the_scorecards_number(patches):
    rows = [
        row("edit", 1.0),
        row("rephrase", 1.0),
        row("rephrase", 0.0, prompt="p2"),
        row("edit", 0.0, protocol="survey"),
    ]
    patch = patches["ft-m"]
    assert found(patch, "edit_success>=1", *rows).passed
    assert not found(patch, "survey.edit_success>=1", *rows).passed
    assert found(patch, "rephrase>=0.5", *rows).passed
    assert not found(patch, "rephrase>0.5", *rows).passed
    (lost,) = found(patch, "rephrase>=0.8", *rows).lost
    assert (lost.prompt, lost.before, lost.after, lost.answers, lost.proposed) == ("p2", "was", "said", ("a",), True)


def test_thirds_reach_what_they_reach_on_paper(patches):
    rows = [row("locality", float(i > 0), kind="k", prompt=str(i)) for i in range(3)]
    assert found(patches["ft-m"], "locality>=0.666666667", *rows).passed


def test_a_kind_counts_alone(patches):
    rows = [row("locality", 1.0, kind="one"), row("locality", 0.0, kind="other", prompt="q")]
    assert found(patches["ft-m"], "locality/one>=1", *rows).passed
    assert not found(patches["ft-m"], "locality/other>=1", *rows).passed
    assert found(patches["ft-m"], "locality>=0.5", *rows).value == 0.5


def test_what_could_not_be_scored_does_not_pass_and_says_so(patches):
    for text in ("rephrase>=0", "locality/none>=0", "fluency>=0", "fluency_drop<=1", "retained>=0"):
        finding = found(patches["ft-m"], text, row("edit", 1.0))
        assert (finding.value, finding.passed) == (None, False)
        assert finding.reason
        assert finding.reason in finding.says


def test_the_reason_says_what_to_do_about_it(patches):
    def why(text, *rows):
        return found(patches["ft-m"], text, *rows).reason

    unscored = row("edit", None).model_copy(update={"unscored": "a manner of speaking"})
    assert why("edit_success>=1", unscored) == (
        "none of 1 probes could be scored: a manner of speaking; try survey.edit_success"
    )
    named = row("locality", 1.0, kind="Neighborhood")
    assert why("locality/Neighbourhood>=1", named) == (
        'no probe is of this kind. Did you mean "Neighborhood"? There are: Neighborhood'
    )
    assert "write some" in why("rephrase>=1", named)


def test_fluency_may_fall_by_a_share_of_what_it_was(patches):
    rows = [row("fluency", 5.4, before=6.0)]
    assert found(patches["ft-m"], "fluency_drop<=10%", *rows).passed
    assert not found(patches["ft-m"], "fluency_drop<=9%", *rows).passed
    assert found(patches["ft-m"], "fluency>=5", *rows).value == 5.4


def test_retained_questions_and_the_kind_of_patch_count(patches):
    questions = [
        Retained(
            prompt="q",
            answers=(),
            before="a",
            after=after,
            changed=after != "a",
            was_right=None,
            is_right=None,
            edits=("e",),
        )
        for after in "ab"
    ]
    finding = found(patches["ft-m"], "retained>=1", retained=questions)
    assert (finding.value, finding.passed, finding.lost[0].after) == (0.5, False, "b")
    assert found(patches["ft-m"], "mergeable").passed
    assert "stay beside the weights" in found(patches["ice"], "mergeable").says


@pytest.mark.parametrize(
    ("text", "value", "nearest"),
    [
        ("locality>=0.9", 2 / 3, "locality>=0.666"),
        ("locality>0.9", 0.9, "locality>=0.9"),
        ("survey.rephrase>=1", 0.5, "survey.rephrase>=0.5"),
        ("fluency_drop<=5%", 0.1234, "fluency_drop<=0.124"),
        ("edit_success>=1", 0.0, ""),
        ("edit_success>=1", None, ""),
        ("edit_success>=1", 1.0, ""),
    ],
)
def test_the_nearest_requirement_that_a_number_meets_is_told(text, value, nearest):
    need = Requirement.parse(text)
    finding = Finding(requirement=need, value=value, passed=need.holds(value))
    assert finding.would_pass == nearest
    assert not nearest or Requirement.parse(nearest).holds(value)
