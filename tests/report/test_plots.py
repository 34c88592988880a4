"""What pictures promise, read off their axes: ticks that tell a scale, names that no line strikes through, marks side by side."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factpatch.analysis.facts import Fact
from factpatch.analysis.tracing import Trace
from factpatch.report import plots
from factpatch.report.traces import trace_map
from factpatch.report.weights import _spaced


def drawn(values):
    """The axes after a line through these was scaled."""
    with plots.figure(3.0, "test") as (axes, _):
        axes.plot(range(len(values)), values)
        plots.scaled(axes)
    return axes


@settings(max_examples=60, deadline=None)
@given(low=st.floats(1e-6, 1e5), factor=st.floats(1, 1e5))
def test_a_logarithmic_axis_of_any_length_has_ticks_and_all_have_names(low, factor):
    axes = drawn([low, low * factor])
    bottom, top = axes.get_ylim()
    assert bottom < low <= low * factor < top
    ticks = axes.get_yticks()
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert 2 <= len(ticks) <= 10
    assert all(bottom <= tick <= top for tick in ticks)
    assert len(set(names)) == len(names) == len(ticks)
    assert all(names)
    assert not len(axes.get_yticks(minor=True))


def test_ticks_are_plain_numbers():
    assert [label.get_text() for label in drawn([0.0038, 0.0077]).get_yticklabels()] == [
        "0.004",
        "0.005",
        "0.006",
        "0.007",
    ]
    assert "0.07" in [label.get_text() for label in drawn([0.05, 0.12]).get_yticklabels()]
    assert [plots._plain(value) for value in (0.06, 1, 3000, 20000, 1e-7, 3e-6)] == [
        "0.06", "1", "3,000", "20,000", "10⁻⁷", "3 × 10⁻⁶",
    ]  # fmt: skip


def test_one_value_stands_in_the_middle():
    axes = drawn([40.0])
    assert axes.get_ylim() == pytest.approx((20, 80))
    assert len(axes.get_yticks()) >= 2


def test_counting_numbers():
    assert plots.round_counts(1) == [1]
    assert plots.round_counts(12) == [1, 2, 5, 10]
    assert plots.round_counts(576)[-2:] == [200, 500]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 57, 576])
def test_the_last_point_has_a_mark(count):
    places = _spaced(count)
    assert places == sorted(set(places))
    assert places[-1:] == ([count - 1] if count else [])


def test_no_leader_strikes_through_a_name():
    # Two marks near the top, whose names would both stand to the left: the farther name's leader once crossed the nearer.
    points = {"melo": (0.88, 0.97), "grace": (0.95, 0.97), "wise": (0.95, 0.92), "serac": (0.88, 0.93)}
    svg = plots.scatter(points, "x", "y", "t")
    assert all(f">{name}<" in svg for name in points)
    box = plots._Box(0.5, 0.5, 0.2, 0.04)
    through, beside = plots._Leader((0.4, 0.52), (0.9, 0.52)), plots._Leader((0.4, 0.6), (0.9, 0.6))
    assert through.meets(box)
    assert not beside.meets(box)
    free = {"side": -1, "others": [], "at": (0.95, 0.52)}
    assert plots._hidden(box, **free, leaders=[through]) == 1
    assert plots._hidden(box, **free, leaders=[beside]) == 0
    far = plots._Box(0.1, 0.5, 0.2, 0.04)
    assert plots._hidden(far, side=-1, at=(0.95, 0.52), others=[box], leaders=[]) == 1, (
        "its own leader crosses the other"
    )


def test_a_trace_names_its_prompt_and_what_the_star_means():
    import torch

    trace = Trace(
        fact=Fact("The capital of France is", "France", "Paris."), part="state", window=1, tokens=("The", "France", "is"),
        subject=(1, 2), clean=0.77, corrupted=0.1, restored=torch.full((3, 4), 0.3), asked=" Paris",
    )  # fmt: skip
    told = " ".join(re.findall(r">([^<>]+)</text>", trace_map(trace)))
    assert "The capital of France is" in told.replace("&quot;", '"')
    assert "Paris." in told
    assert "* with noise" in told
