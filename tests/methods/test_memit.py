"""MEMIT, PMET, AlphaEdit and EMMET against their papers in plain lines."""

from dataclasses import replace

import pytest
import torch

from factpatch.errors import BadConfig, BadPatch
from factpatch.lm.batches import Batch
from factpatch.lm.run import input_of
from factpatch.methods import create
from factpatch.methods.keys import context_keys, context_prefixes
from factpatch.methods.moments import MomentConfig, factorised, least_used, second_moment
from factpatch.progress import silent
from factpatch.testing import logits_of, tiny_edits, tiny_lm
from tests.reference import plain
from tests.reference.memory import peak

QUICK = {"contexts": 2, "steps": 4, "moment_tokens": 600, "moment_length": 30}
MOMENT = MomentConfig(moment_tokens=600, moment_length=30)
LAYERS = {"layers": (0, 1)}


def change(lm, patch, layer):
    projection = lm.anatomy.mlp_out(layer)
    full = patch.deltas[projection.parameter].full()
    return full.T if projection.transposed else full


def metric(lm, layer):
    """The second moment as the methods use it, damping included."""
    factor = factorised(second_moment(lm, layer, MOMENT, silent), 1e-3)
    return factor @ factor.T


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon", "gemma3_text", "opt", "bloom"])
@pytest.mark.parametrize("name", ["memit", "pmet"])
def test_the_whole_update_equals_the_plain_one(name, architecture):
    lm, edits = tiny_lm(architecture), tiny_edits()
    patch = create(name, {**QUICK, **LAYERS, "prior": 3.0, "stop_loss": 0}).fit(lm, edits)
    prefixes = context_prefixes(lm, 2, 0, lengths=(10,))
    sites = (
        [lm.anatomy.block(1)] if name == "memit" else [lm.anatomy.mlp_out(1).module, lm.anatomy.attention_out(1).module]
    )
    deltas = plain.spread(
        lm,
        edits,
        [0, 1],
        sites,
        prefixes,
        [metric(lm, layer) for layer in (0, 1)],
        prior=3.0,
        share=(lambda left: 1 / left) if name == "memit" else (lambda left: left**-0.5),
        lr=0.5,
        steps=4,
        kl_factor=0.0625,
        weight_decay=1e-3,
        clamp=4.0,
    )
    for layer, expected in zip((0, 1), deltas, strict=True):
        found = change(lm, patch, layer)
        assert expected.norm() > 1e-3
        torch.testing.assert_close(found.double(), expected, rtol=3e-2, atol=2e-3 * expected.abs().max().item() + 1e-6)


def test_blue_changes_the_two_ends_alone():
    lm = tiny_lm()
    patch = create("memit", QUICK | {"layers": (0, 1, 2), "ends_only": True}).fit(lm, tiny_edits())
    assert list(patch.deltas) == [lm.anatomy.mlp_out(layer).parameter for layer in (0, 2)]
    alone = create("memit", QUICK | {"layers": (2,), "ends_only": True}).fit(lm, tiny_edits())
    assert list(alone.deltas) == [lm.anatomy.mlp_out(2).parameter]


def test_a_small_prior_closes_the_gap_and_a_large_one_changes_little():
    lm, edits = tiny_lm(), tiny_edits()
    norms = [
        change(lm, create("memit", {**QUICK, "layers": (1,), "prior": prior}).fit(lm, edits), 1).norm().item()
        for prior in (1e-3, 1.0, 1e3, 1e6)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-3 * norms[0]


@pytest.mark.parametrize("given", ["0,2", (2, 0), [0, 2, 2], "[0, 2]"])
def test_blocks_can_be_given_in_many_ways(given):
    lm = tiny_lm()
    patch = create("memit", QUICK | {"layers": given}).fit(lm, tiny_edits())
    assert list(patch.deltas) == [lm.anatomy.mlp_out(layer).parameter for layer in (0, 2)]
    assert patch.provenance.config["layers"] == [0, 2]


@pytest.mark.parametrize("given", ["", "a,b", "-1", ()])
def test_blocks_that_are_none_are_refused(given):
    with pytest.raises(BadConfig, match='memit, setting "layers'):
        create("memit", {"layers": given})


def test_emmet_with_one_edit_and_no_ridge_is_r_rome():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    settings = QUICK | {"layer": 1}
    one = create("emmet", settings | {"ridge": 0}).fit(lm, [edit])
    other = create("r-rome", settings).fit(lm, [edit])
    torch.testing.assert_close(change(lm, one, 1), change(lm, other, 1))


def test_emmet_gives_every_edit_its_value():
    lm, edits = tiny_lm(), tiny_edits()
    patch = create("emmet", QUICK | {"layer": 1, "ridge": 0}).fit(lm, edits)
    keys = context_keys(lm, 1, edits, context_prefixes(lm, 2, 0), chat=False).mean(1)
    delta = change(lm, patch, 1)
    for edit, key in zip(edits, keys, strict=True):
        alone = change(lm, create("r-rome", QUICK | {"layer": 1}).fit(lm, [edit]), 1)
        torch.testing.assert_close(delta @ key, alone @ key, rtol=2e-2, atol=1e-2)


# AlphaEdit.


def test_alphaedit_equals_the_papers_formula():
    """`Δ P = R K1ᵀ P (Kp Kpᵀ P + K1 K1ᵀ P + L2 I)⁻¹`, the projector written out, for the second edit of a sequence."""
    lm, (first, second) = tiny_lm(), tiny_edits()
    settings = QUICK | {"layers": (1,), "free_share": 0.7, "l2": 0.5, "lr": 0.5, "clamp": 4.0}
    lower = create("alphaedit", settings).fit(lm, [first])
    prefixes = context_prefixes(lm, 2, 0, lengths=(10,))
    before = context_keys(lm, 1, [first], prefixes, chat=False).mean(1).T.double()
    free = least_used(lm, 1, 0.7, MOMENT, silent)
    P = free @ free.T
    with lm.patched(lower):
        upper = create("alphaedit", settings).fit(lm, [second])
        K = context_keys(lm, 1, [second], prefixes, chat=False).mean(1).T.double()
    found = change(lm, upper, 1).double()
    inner = before @ before.T @ P + K @ K.T @ P + 0.5 * torch.eye(len(P), dtype=torch.double)
    shape = K.T @ P @ torch.linalg.inv(inner)
    # The residual is one column: what the paper's row direction leaves is a multiple of it.
    residual = found @ shape.T / (shape @ shape.T)
    torch.testing.assert_close(found, residual @ shape, rtol=1e-3, atol=1e-6)
    assert residual.norm() > 1e-3


def test_alphaedit_leaves_the_used_directions_alone():
    lm = tiny_lm()
    patch = create("alphaedit", QUICK | {"layers": (1,), "free_share": 0.5}).fit(lm, tiny_edits())
    _, vectors = torch.linalg.eigh(second_moment(lm, 1, MOMENT, silent).double())
    delta = change(lm, patch, 1).double()
    used, free = vectors[:, 24:], vectors[:, :24]
    assert (delta @ used).norm() < 1e-5 * (delta @ free).norm()


def test_alphaedit_spares_the_keys_of_earlier_edits():
    lm, (first, second) = tiny_lm(), tiny_edits()
    settings = QUICK | {"layers": (1,), "free_share": 1.0, "l2": 1e-4}
    lower = create("alphaedit", settings).fit(lm, [first])
    key = context_keys(lm, 1, [first], context_prefixes(lm, 2, 0, lengths=(10,)), chat=False).mean(1)[0]
    with lm.patched(lower):
        upper = create("alphaedit", settings).fit(lm, [second])
    alone = create("alphaedit", settings).fit(lm, [second])
    assert (change(lm, upper, 1) @ key).norm() < 0.02 * (change(lm, alone, 1) @ key).norm()


def test_alphaedit_remembers_across_saving(tmp_path):
    lm, (first, second) = tiny_lm(), tiny_edits()
    method = create("alphaedit", QUICK | {"layers": (1,)})
    lower = method.fit(lm, [first])
    loaded = type(lower).load(lower.save(tmp_path / "lower"))
    with lm.patched(lower):
        one = method.fit(lm, [second])
    with lm.patched(loaded):
        other = method.fit(lm, [second])
    assert one.id == other.id
    assert one.id != method.fit(lm, [second]).id, "a sequence differs from an edit alone"


def test_keys_of_another_width_are_refused_by_name():
    lm, (first, second) = tiny_lm(), tiny_edits()
    method = create("alphaedit", QUICK | {"layers": (1,)})
    lower = method.fit(lm, [first])
    ((name, keys),) = lower.state.items()
    with lm.patched(replace(lower, state={name: keys[:, :-1]})), pytest.raises(BadPatch, match=f"{name} has shape"):
        method.fit(lm, [second])


def test_directions_are_orthonormal_least_used_first_and_computed_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path))
    lm = tiny_lm()
    basis = least_used(lm, 1, 0.5, MOMENT, silent)
    assert basis.shape == (48, 24)
    torch.testing.assert_close(basis.T @ basis, torch.eye(24).double(), rtol=1e-4, atol=1e-5)
    moment = second_moment(lm, 1, MOMENT, silent).double()
    used = (basis.T @ moment @ basis).diagonal()
    assert (used.diff() > -1e-6).all()
    assert used.max() <= moment.diagonal().max()
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("computed twice"))
    assert torch.equal(least_used(lm, 1, 0.25, MOMENT, silent), basis[:, :12])


def test_a_sequence_keeps_earlier_edits_apart_from_a_batch():
    """Edits made one after the other lie in two patches; taking the first off leaves the second as it was made."""
    lm, (first, second) = tiny_lm(), tiny_edits()
    method = create("memit", QUICK | LAYERS)
    lower = method.fit(lm, [first])
    with lm.patched(lower):
        upper = method.fit(lm, [second])
    with lm.patched(upper):
        alone = logits_of(lm, "Who is Ann Lee?")
    lm.apply(lower)
    lm.apply(upper)
    lm.remove(lower)
    assert torch.equal(logits_of(lm, "Who is Ann Lee?"), alone)
    lm.remove(upper)


def test_what_a_module_puts_out_is_read_where_the_subject_ends():
    from factpatch.lm.run import output_of
    from factpatch.methods.keys import subject_outputs

    lm, edits = tiny_lm("falcon"), tiny_edits()
    module = lm.anatomy.mlp_out(1).module
    found = subject_outputs(lm, module, edits, chat=False)
    for edit, row in zip(edits, found, strict=True):
        text = lm.tokens.encode(edit.prompt, subject=edit.subject)
        batch = Batch.of([text.ids], lm.device)
        torch.testing.assert_close(row, output_of(lm, module, batch)[0, text.subject])
        assert input_of(lm, module, batch).shape[-1] == lm.anatomy.mlp_out(1).matrix.shape[1]


@pytest.mark.parametrize("n", [5, 40, 300])
@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_a_solve_holds_what_the_plan_tells(name, n):
    lm, method = tiny_lm(), create(name, QUICK | LAYERS)
    out, width = shape = tuple(lm.anatomy.mlp_out(1).matrix.shape)
    config = method.resolve(lm)
    residuals, keys = torch.randn(out, n), torch.randn(width, n)

    def solve():
        method.solve(lm, 1, residuals, keys, config, silent)

    solve()  # what it finds at hand from then on
    stages = [
        one for one in method.matrices_needed(lm, shape, n, config)[2] if one.doing != "Factorising second moments"
    ]
    told = max(sum(held.bytes for held in stage.held if not held.host) for stage in stages)
    held = peak(solve)
    assert 0.9 * held < told < 1.1 * held
