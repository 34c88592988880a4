"""Which edits and patches stand against each other."""

import pytest
import torch

from factpatch.edits import Edit
from factpatch.patches import Dense, LowRank, Sparse, WeightPatch
from factpatch.patches.base import Provenance
from factpatch.workspace import Standing, conflicts


def patch(*edits, deltas=None):
    source = Provenance(method="m", config={}, edits=edits, base_name="b", base_fingerprint="f", versions={})
    return WeightPatch(source, deltas or {"w": LowRank(torch.zeros(4, 1), torch.zeros(1, 4))})


def edit(prompt, target, subject=None, **more):
    return Edit(id="new", prompt=prompt, target=target, subject=subject, **more)


OLD = Edit(
    id="old", prompt="The capital of France is", target="Lyon", subject="France", ground_truth=("Paris", "City of Paris"),
    rephrases=("Tell me where France is ruled from",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("new", "kind"),
    [
        (edit("The capital of France is", "Lyon"), "duplicate"),
        (edit("the capital of  France is…", "lyon"), "duplicate"),
        (edit("The capital of France is", "Nice"), "contradiction"),
        (edit("The capital of France is", "Paris"), "reversal"),
        (edit("The capital of France is", "the city of Paris"), "reversal"),
        (edit("Tell me where France is ruled from", "Nice"), "rewording"),
        (edit("What is the capital of France?", "Nice", "France"), "rewording"),
        (edit("What is the capital of France?", "Nice"), "rewording"),
        (edit("France's capital is", "Nice", "France"), "rewording"),
        (edit("The capital of the Republic of France is", "Nice", "Republic of France"), "rewording"),
        (edit("Rouen is it?", "Lyon", "Rouen", rephrases=("The capital of France is",)), "rewording"),
        (edit("The capital of Spain is", "Lyon", "Spain"), None),
        (edit("The anthem of France is", "Nice", "France"), None),
        (edit("France is", "nice", "France"), None),
        (edit("The capital of fashion is", "Milan"), None),
    ],
)
def test_kinds(new, kind):
    found = conflicts([Standing(4, patch(OLD))], [new])
    assert [each.kind for each in found] == ([kind] if kind else [])
    for each in found:
        assert (each.number, each.earlier, each.edit) == (4, "old", "new")
        assert each.blocks == (kind != "rewording")
        assert "entry 4" in each.says
        assert new.target in each.says


def test_prompts_of_marks_alone_are_told_apart():
    assert not conflicts([Standing(1, patch(edit("?!", "a")))], [edit("...", "b")])


def test_every_earlier_edit_counts():
    again = OLD.model_copy(update={"target": "Nice", "ground_truth": ("Lyon",)})
    found = conflicts([Standing(2, patch(OLD)), Standing(3, patch(again))], [edit(OLD.prompt, "Lyon")])
    assert [(each.number, each.kind) for each in found] == [(2, "duplicate"), (3, "reversal")]


def test_edits_of_one_proposal_are_held_against_each_other():
    (found,) = conflicts([], [OLD, edit(OLD.prompt, "Nice")])
    assert (found.kind, found.number) == ("contradiction", None)
    assert "the same proposal" in found.says


def rows(*numbers, size=8):
    return torch.eye(size)[list(numbers)]


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        (LowRank(rows(0).T, rows(1)), LowRank(rows(0).T, rows(1)), 1.0),
        (LowRank(rows(0).T, rows(1)), LowRank(rows(2).T, rows(1)), 1.0),  # they read the same
        (LowRank(rows(0).T, rows(1)), LowRank(rows(0).T, rows(3)), 1.0),  # they write the same
        (LowRank(rows(0, 1).T, rows(2, 3)), LowRank(rows(4, 5).T, rows(3, 6)), 0.5),
        (LowRank(rows(0).T, rows(1)), LowRank(rows(2).T, rows(3)), None),
        (Dense(rows(0).T @ rows(1)), LowRank(rows(0).T, rows(1)), 1.0),
        (Dense(-rows(0).T @ rows(1)), Sparse.of(rows(0).T @ rows(1)), 1.0),
        (Dense(rows(0).T @ rows(1)), Dense(rows(0).T @ rows(2)), None),
        (Dense(torch.zeros(8, 8)), Dense(torch.ones(8, 8)), None),
        (LowRank(torch.zeros(8, 1), torch.zeros(1, 8)), LowRank(rows(2).T, rows(3)), None),
    ],
)
def test_overlap_of_weights(one, other, share):
    found = conflicts([Standing(2, patch(deltas={"w": one}))], [], patch(deltas={"w": other, "v": other}))
    assert [each.share for each in found] == ([pytest.approx(share)] if share else [])
    assert all(each.kind == "overlap" and each.parameter == "w" and not each.blocks for each in found)


def test_other_matrices_do_not_overlap_and_the_worst_is_told():
    same, apart = LowRank(rows(0).T, rows(1)), LowRank(rows(2).T, rows(3))
    below = Standing(2, patch(deltas={"a": same, "b": apart}))
    assert not conflicts([below], [], patch(deltas={"c": same}))
    (found,) = conflicts([below], [], patch(deltas={"a": apart, "b": apart}))
    assert found.parameter == "b"
    assert "b, 100 %" in found.says
