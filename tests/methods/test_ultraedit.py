"""UltraEdit and the factors of gradients, against autograd and the plain formulas."""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factpatch.errors import AnatomyError, BadPatch, CannotEdit
from factpatch.methods import create, ultraedit
from factpatch.methods.gradients import Moments, gradients
from factpatch.progress import silent
from factpatch.testing import ARCHITECTURES, tiny_edits, tiny_lm
from tests.reference import plain
from tests.reference.memory import peak

SETTINGS = {"layers": (1, 2), "lr": 1e-2}


def change(patch, projection):
    full = patch.deltas[projection.parameter].full()
    return full.T if projection.transposed else full


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_factors_multiply_to_autograds_gradient_of_the_weight(architecture):
    """At the last block a target token's place is the only one that its loss can reach."""
    lm, edits = tiny_lm(architecture), tiny_edits()
    last = lm.anatomy.n_layers - 1
    modules = [*lm.anatomy.mlp_in(last), lm.anatomy.mlp_out(last)]
    found = gradients(lm, modules, last, edits, chat=False, progress=silent)
    loss = len(edits) * plain.ft_m_loss(lm.model, lm, edits)
    weights = [projection.module.weight for projection in modules]
    for projection, gradient in zip(modules, torch.autograd.grad(loss, weights), strict=True):
        pair = found[projection]
        product = pair.outputs.T @ pair.inputs
        expected = gradient.T if projection.transposed else gradient
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_maps_into_the_mlp_are_found(architecture):
    lm = tiny_lm(architecture)
    gated = architecture not in {"bloom", "falcon", "gpt2", "gpt_neox", "gptj", "opt", "phi3"}
    found = lm.anatomy.mlp_in(1)
    assert len(found) == (2 if gated else 1)
    for projection in found:
        assert projection.matrix.shape[1] == 32
        assert "attn" not in projection.parameter
        assert "attention" not in projection.parameter
        assert lm.model.get_parameter(projection.parameter) is projection.module.weight


def test_a_mixture_has_no_map_into_its_mlp():
    with pytest.raises(AnatomyError, match="mixture of experts"):
        tiny_lm("mixtral").anatomy.mlp_in(0)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_rows_come_in_the_order_of_the_edits_whatever_their_length_and_batch(monkeypatch, budget, everywhere):
    monkeypatch.setattr("factpatch.methods.gradients.tokens_at_once", lambda *_: budget)
    short, longer = tiny_edits()
    longest = longer.model_copy(
        update={"id": "longest", "prompt": f"Long ago, {longer.prompt}", "target": "a pilot in Peru"}
    )
    lm, edits = tiny_lm(), [longer, longest, short]
    module = lm.anatomy.mlp_out(1)
    take = partial(gradients, lm, [module], 0, chat=False, everywhere=everywhere, progress=silent)
    both, alone = take(edits)[module], [take([edit])[module] for edit in edits]
    torch.testing.assert_close(both.inputs, torch.cat([pair.inputs for pair in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.outputs, torch.cat([pair.outputs for pair in alone]), rtol=1e-3, atol=1e-6)


def by_hand(lm, edits, earlier=()):
    """The release's formula, dense, with moments over all rows at once."""
    modules = [p for layer in (1, 2) for p in lm.anatomy.mlp_in(layer)]
    found = gradients(lm, modules, 1, edits, chat=False, progress=silent)
    rows = torch.cat([*earlier, *[pair.joined for pair in found.values()]]).double()
    mean, deviation = rows.mean(0), rows.std(0, correction=1)
    for projection, pair in found.items():
        normal = (pair.joined.double() - mean) / deviation
        h, g = normal[:, :32], normal[:, 32:]
        V = -1e-2 * (h**2).sum(1, keepdim=True) * g
        H = pair.inputs.double()
        yield projection, (torch.linalg.inv(H.T @ H + torch.eye(32, dtype=torch.double)) @ H.T @ V).T


def test_the_update_equals_the_plain_formula():
    lm, edits = tiny_lm(), tiny_edits()
    patch = create("ultraedit", SETTINGS).fit(lm, edits)
    assert len(patch.deltas) == 4
    for projection, expected in by_hand(lm, edits):
        torch.testing.assert_close(change(patch, projection).double(), expected, rtol=1e-3, atol=1e-6)


def test_a_sequence_normalises_by_all_edits_so_far():
    lm, (first, second) = tiny_lm(), tiny_edits()
    method = create("ultraedit", SETTINGS)
    modules = [p for layer in (1, 2) for p in lm.anatomy.mlp_in(layer)]
    before = [pair.joined for pair in gradients(lm, modules, 1, [first], chat=False, progress=silent).values()]
    lower = method.fit(lm, [first])
    with lm.patched(lower):
        upper = method.fit(lm, [second])
        expected = dict(by_hand(lm, [second], before))
    for projection, delta in expected.items():
        torch.testing.assert_close(change(upper, projection).double(), delta, rtol=2e-3, atol=1e-6)
    assert upper.id != method.fit(lm, [second]).id
    halved = {name: moments[:2] for name, moments in lower.state.items()}
    with lm.patched(replace(lower, state=halved)), pytest.raises(BadPatch, match="ultraedit moments of .* has shape"):
        method.fit(lm, [second])


@given(st.integers(0, 10_000), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_moments_of_parts_join_to_those_of_the_whole(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 3, generator=generator) * 5 + 2 for n in sizes]
    joined = Moments.of(parts[0])
    for rows in parts[1:]:
        joined = joined.joined(Moments.of(rows))
    whole = torch.cat(parts).double()
    torch.testing.assert_close(joined.mean, whole.mean(0))
    torch.testing.assert_close(joined.spread, ((whole - whole.mean(0)) ** 2).sum(0))
    assert joined.count == len(whole)
    again = Moments.unpacked(joined.packed())
    torch.testing.assert_close(again.normalise(whole.float()), joined.normalise(whole.float()))


def test_a_column_that_never_varies_becomes_zero():
    rows = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
    torch.testing.assert_close(Moments.of(rows).normalise(rows), torch.tensor([[-(0.5**0.5), 0.0], [0.5**0.5, 0.0]]))


def test_tokens_taken_in_parts_give_the_same(monkeypatch):
    lm, edits = tiny_lm(), tiny_edits()
    at_once = create("ultraedit", SETTINGS).fit(lm, edits)
    monkeypatch.setattr(ultraedit, "_ROWS", 3)
    in_parts = create("ultraedit", SETTINGS).fit(lm, edits)
    for name, delta in at_once.deltas.items():
        torch.testing.assert_close(in_parts.deltas[name].full(), delta.full(), rtol=1e-4, atol=1e-7)


def test_small_steps_lower_the_loss():
    lm, edits = tiny_lm(), tiny_edits()
    before = plain.ft_m_loss(lm.model, lm, edits)
    with lm.patched(create("ultraedit", SETTINGS | {"lr": 1e-4}).fit(lm, edits)):
        assert plain.ft_m_loss(lm.model, lm, edits) < before


def test_one_token_at_one_module_is_refused():
    lm, edit = tiny_lm(), tiny_edits()[0]
    edit = edit.model_copy(update={"prompt": "Rome lies in ", "target": "x"})
    assert len(lm.tokens.encode(edit.prompt, edit.target).target_ids) == 1
    with pytest.raises(CannotEdit, match="one token at one module"):
        create("ultraedit", {"layers": (1,), "part": "out"}).fit(lm, [edit])


def test_the_order_in_which_blocks_are_named_does_not_matter():
    lm, edits = tiny_lm(), tiny_edits()
    one, other = (create("ultraedit", SETTINGS | {"layers": layers}).fit(lm, edits) for layers in ((1, 2), (2, 1, 2)))
    assert one.id == other.id


def test_rows_go_as_the_changes_come(monkeypatch):
    gone, change_of = [], ultraedit._change

    def watched(rows, *rest):
        assert all(inputs() is None for inputs in gone)
        gone.append(weakref.ref(rows.inputs))
        return change_of(rows, *rest)

    monkeypatch.setattr(ultraedit, "_change", watched)
    patch = create("ultraedit", SETTINGS).fit(tiny_lm(), tiny_edits())
    assert len(gone) == len(patch.deltas) == 4


@pytest.mark.parametrize(("copies", "at_once"), [(1, 1024), (40, 1024), (40, 16)])
def test_normalising_and_solving_hold_what_the_plan_tells(monkeypatch, copies, at_once):
    monkeypatch.setattr(ultraedit, "_ROWS", at_once)
    lm, method = tiny_lm(), create("ultraedit", SETTINGS)
    edits = [edit.model_copy(update={"id": f"{edit.id} {i}"}) for i in range(copies) for edit in tiny_edits()]
    found = gradients(lm, [lm.anatomy.mlp_in(1)[0]], 1, edits, chat=False, progress=silent)
    ((_, rows),) = found.items()
    moments = []
    joining = peak(lambda: moments.extend(ultraedit._by_shape(found, lm.device).values()))
    changing = peak(lambda: ultraedit._change(rows, moments[0], 1e-2, lm.device))
    stages = method.needs(lm, edits, method.resolve(lm)).stages[1:]
    told = max(sum(held.bytes for held in stage.held if not held.host) for stage in stages)
    assert 0.9 * max(joining, changing) < told < 1.15 * max(joining, changing)
