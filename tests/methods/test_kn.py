"""Knowledge neurons: attribution against finite differences, and what is done to the neurons found."""

import pytest
import torch

from factpatch.errors import CannotEdit
from factpatch.lm.batches import Batch, Places
from factpatch.lm.hooks import replacing_input
from factpatch.lm.run import input_of, logits_at
from factpatch.methods import create
from factpatch.methods.keys import context_prefixes
from factpatch.methods.kn import attributions
from factpatch.testing import tiny_edits, tiny_lm

QUICK = {"contexts": 1, "integral_steps": 5}


def chance(lm, layer, ids, token, activation):
    """The token's probability with the last token's neurons set by hand."""

    def put(x):
        grid = x.reshape(1, len(ids), -1).clone()
        grid[0, -1] = activation
        return grid.reshape(x.shape)

    batch = Batch.of([ids], lm.device)
    with torch.no_grad(), replacing_input(lm.anatomy.mlp_out(layer).module, put):
        logits = logits_at(lm, batch, Places.of([[len(ids) - 1]], lm.device))
    return logits.double().softmax(-1)[0, token].item()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon", "bloom", "gemma2"])
def test_attribution_equals_finite_differences(architecture):
    lm = tiny_lm(architecture)
    ids, token, steps = lm.tokens.encode("Rome lies in").ids, 40, 4
    actual = input_of(lm, lm.anatomy.mlp_out(1).module, Batch.of([ids], lm.device))[0, -1]
    found = attributions(lm, [2, 1], ids, token, steps)[1]
    for neuron in found.abs().argsort(descending=True)[:6].tolist():
        slope, h = 0.0, 1e-2 * actual[neuron].abs().item() + 1e-4
        for j in range(1, steps + 1):
            nudge = torch.zeros_like(actual)
            nudge[neuron] = h
            up, down = (chance(lm, 1, ids, token, actual * j / steps + sign * nudge) for sign in (1, -1))
            slope += (up - down) / (2 * h) / steps
        assert found[neuron].item() == pytest.approx(actual[neuron].item() * slope, rel=0.05, abs=1e-7)


def test_attributions_sum_to_the_change_of_probability():
    lm = tiny_lm()
    ids, token = lm.tokens.encode("Rome lies in").ids, 40
    actual = input_of(lm, lm.anatomy.mlp_out(2).module, Batch.of([ids], lm.device))[0, -1]
    gap = chance(lm, 2, ids, token, actual) - chance(lm, 2, ids, token, actual * 0)
    errors = [abs(attributions(lm, [2], ids, token, steps).sum().item() - gap) for steps in (2, 100)]
    assert errors[1] < 0.03 * abs(gap)
    assert errors[1] < errors[0]


def fit(lm, edit, **settings):
    return create("kn", QUICK | settings).fit(lm, [edit])


def columns(lm, patch):
    """The changed columns by neuron."""
    found = {}
    for layer in range(3):
        projection = lm.anatomy.mlp_out(layer)
        if projection.parameter in patch.deltas:
            delta = patch.deltas[projection.parameter].full()
            delta = delta.T if projection.transposed else delta
            found |= {(layer, i): delta[:, i] for i in delta.abs().sum(0).nonzero()[:, 0].tolist()}
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_neurons_found_are_turned_from_the_old_answer_to_the_new(architecture):
    lm, (edit, _) = tiny_lm(architecture), tiny_edits()
    patch = fit(lm, edit, suppress=2.0, amplify=5.0)
    neurons = {tuple(neuron) for neuron in patch.provenance.notes[0]["neurons"]}
    changed = columns(lm, patch)
    assert set(changed) == neurons
    embedding = lm.anatomy.embedding.weight.detach()
    old, new = (lm.tokens.encode(edit.prompt, text).target_ids[0] for text in ("Italy", "Peru"))
    for column in changed.values():
        torch.testing.assert_close(column, 5.0 * embedding[new] - 2.0 * embedding[old])


def test_the_old_answer_is_the_models_own_where_none_is_told():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    untold = edit.model_copy(update={"ground_truth": ()})
    ids = lm.tokens.encode(edit.prompt).ids
    first = fit(lm, untold, suppress=1.0, amplify=0.0)
    embedding = lm.anatomy.embedding.weight.detach()
    token = int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())
    for column in columns(lm, first).values():
        torch.testing.assert_close(column, -embedding[token])


def test_an_erased_facts_neurons_are_zero():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    patch = fit(lm, edit.model_copy(update={"kind": "erase"}))
    neurons = patch.provenance.notes[0]["neurons"]
    with lm.patched(patch):
        for layer, i in neurons:
            assert lm.anatomy.mlp_out(layer).matrix[:, i].abs().max() < 1e-6
    assert neurons


def test_fewer_are_kept_the_higher_the_bars_are():
    lm, (edit, _) = tiny_lm(), tiny_edits()

    def count(**settings):
        return len(fit(lm, edit, most=500, **settings).provenance.notes[0]["neurons"])

    low, high = count(threshold=0.1, contexts=0), count(threshold=0.9, contexts=0)
    assert low > high >= 1
    assert count(threshold=0.1, contexts=4, shared=0.9) <= count(threshold=0.1, contexts=4, shared=0.0)
    assert len(fit(lm, edit, threshold=0.05, most=3).provenance.notes[0]["neurons"]) == 3


def test_the_strongest_neurons_of_all_blocks_are_found():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    patch = fit(lm, edit, contexts=0, threshold=0.5, most=500)
    text = lm.tokens.encode(edit.prompt, edit.ground_truth[0])
    table = attributions(lm, range(3), text.prompt_ids, text.target_ids[0], 5)
    expected = {(a, b) for a, b in (table > 0.5 * table.max()).nonzero().tolist()}
    assert {tuple(neuron) for neuron in patch.provenance.notes[0]["neurons"]} == expected
    assert {layer for layer, _ in fit(lm, edit, layers="1").provenance.notes[0]["neurons"]} == {1}


def test_an_edit_without_neurons_is_refused():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    with torch.no_grad():
        for layer in range(3):
            lm.anatomy.mlp_out(layer).matrix.zero_()
    with pytest.raises(CannotEdit, match="finds no neuron"):
        fit(lm, edit)


def test_neurons_are_kept_that_are_found_in_enough_contexts():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    prefixes, token = context_prefixes(lm, 2, 0), lm.tokens.encode(edit.prompt, "Italy").target_ids[0]
    counts = {}
    for prefix in prefixes:
        ids = lm.tokens.encode(edit.prompt, edit.target, prefix=prefix).prompt_ids
        table = attributions(lm, range(3), ids, token, 5)
        for a, b in (table > 0.3 * table.max()).nonzero().tolist():
            counts[a, b] = counts.get((a, b), 0) + 1
    assert {1, 3} <= set(counts.values()), "some are found once alone, some everywhere"
    for shared in (0.0, 0.5, 0.9):
        patch = fit(lm, edit, contexts=2, threshold=0.3, shared=shared, most=500)
        found = {tuple(neuron) for neuron in patch.provenance.notes[0]["neurons"]}
        assert found <= {neuron for neuron, count in counts.items() if count > shared * 3}
        assert found >= {neuron for neuron, count in counts.items() if count == 3}
