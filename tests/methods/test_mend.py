"""MEND and MALMEN against autograd, the network written out, and a dense solve."""

import pytest
import torch

from factpatch.lm.batches import Batch
from factpatch.methods import create
from factpatch.methods.gradients import Gradients, gradients
from factpatch.methods.hypernetwork import HyperNetwork
from factpatch.patches import LowRank
from factpatch.testing import ARCHITECTURES, tiny_edits, tiny_lm
from tests.reference import plain


def shaken(network, seed=0):
    """The same network with every parameter away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def matrices_of(lm, layer):
    return [*lm.anatomy.mlp_in(layer), lm.anatomy.mlp_out(layer)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_factors_of_all_tokens_multiply_to_autograds_gradient_at_any_block(architecture):
    lm, edits = tiny_lm(architecture), tiny_edits()
    modules = matrices_of(lm, 0)
    found = gradients(lm, modules, 0, edits, chat=False, everywhere=True)
    loss = len(edits) * plain.ft_m_loss(lm.model, lm, edits)
    weights = [projection.module.weight for projection in modules]
    for projection, gradient in zip(modules, torch.autograd.grad(loss, weights), strict=True):
        expected = gradient.T if projection.transposed else gradient
        product = found[projection].outputs.T @ found[projection].inputs
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-7)


@pytest.fixture
def ready():
    """A tiny model, its last matrices, their gradients, and a network that is not the identity."""
    lm, edits = tiny_lm(), tiny_edits()
    matrices = matrices_of(lm, 2)
    found = gradients(lm, matrices, 2, edits, chat=False, everywhere=True)
    network = HyperNetwork(matrices, rank=4, step=1e-2, seed=0)
    network.normalise_by(found)
    return lm, matrices, found, shaken(network)


def test_at_first_the_network_hands_on_the_normalised_factors():
    lm, edits = tiny_lm(), tiny_edits()
    matrices = matrices_of(lm, 2)
    found = gradients(lm, matrices, 2, edits, chat=False, everywhere=True)
    network = HyperNetwork(matrices, rank=4, step=1e-2, seed=0)
    network.normalise_by(found)
    for shape in {p.matrix.shape for p in matrices}:
        sharing = [p for p in matrices if p.matrix.shape == shape]
        rows = [plain.rows_with_gradient(found[p].inputs, found[p].outputs) for p in sharing]
        everything = torch.cat(rows)
        mean, deviation = everything.mean(0), everything.std(0)
        for projection, own in zip(sharing, rows, strict=True):
            u, delta, keys = network(projection, found[projection])
            expected = (own - mean) / (deviation + 1e-7)
            torch.testing.assert_close(torch.cat([u, delta], 1), expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(keys, own[:, : keys.shape[1]])


def test_the_network_is_two_residual_layers_with_a_scale_and_shift_for_each_matrix(ready):
    _, matrices, found, network = ready
    state = network.state_dict()
    numbers = {}
    for projection in matrices:
        shape = "x".join(map(str, projection.matrix.shape))
        number = numbers[shape] = numbers.get(shape, -1) + 1
        rows = plain.rows_with_gradient(found[projection].inputs, found[projection].outputs)
        part = {k.removeprefix(f"pairs.{shape}."): v for k, v in state.items() if k.startswith(f"pairs.{shape}.")}
        expected = plain.mend_network(part, rows, number)
        u, delta, _ = network(projection, found[projection])
        torch.testing.assert_close(torch.cat([u, delta], 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mends_shift_is_the_sum_of_outer_products(ready):
    _, matrices, found, network = ready
    for i, projection in enumerate(matrices):
        u, delta, _ = network(projection, found[projection])
        step = float(network.log_step[i].exp())
        expected = -step * sum(torch.outer(d, x) for d, x in zip(delta, u, strict=True))
        assert expected.abs().max() > 1e-4
        shift = create("mend").shift(network, projection, found[projection]).full()
        torch.testing.assert_close(shift, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_malmens_shift_is_the_least_squares_merge_solved_densely(ready):
    _, matrices, found, network = ready
    for i, projection in enumerate(matrices):
        pseudo, delta, keys = (tensor.double() for tensor in network(projection, found[projection]))
        step, ridge = float(network.log_step[i].exp()), float(network.log_ridge[i].exp())
        wanted = torch.stack([-step * (k @ p) * d for k, p, d in zip(keys, pseudo, delta, strict=True)], 1)
        dense = keys.T @ keys + ridge * torch.eye(keys.shape[1], dtype=torch.double)
        expected = wanted @ keys @ torch.linalg.inv(dense)
        shift = create("malmen").shift(network, projection, found[projection]).full()
        torch.testing.assert_close(shift.double(), expected, rtol=1e-3, atol=1e-5)


def test_rows_without_a_gradient_count_for_nothing(ready):
    _, matrices, found, network = ready
    own = found[matrices[0]]
    padded = Gradients(
        torch.cat([own.inputs, torch.ones(3, own.inputs.shape[1])]),
        torch.cat([own.outputs, torch.zeros(3, own.outputs.shape[1])]),
    )
    for name in ("mend", "malmen"):
        one, other = (create(name).shift(network, matrices[0], rows).full() for rows in (own, padded))
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["mend", "malmen"])
def test_the_gradient_in_two_stages_is_that_of_the_whole_graph(name):
    lm, edits = tiny_lm(), tiny_edits()
    method = create(name, {"layers": (2,), "rank": 4, "step": 1e-2, "together": 2, "success": 0.7, "locality": 0.4})
    course = method.course(lm, edits, method.resolve(lm), lambda *_: None)
    shaken(course.network)
    seen = course.study([0, 1])
    matrices = matrices_of(lm, 2)
    found = [gradients(lm, matrices, 2, [edit], chat=False, everywhere=True) for edit in edits]
    both = {
        m: Gradients(torch.cat([f[m].inputs for f in found]), torch.cat([f[m].outputs for f in found]))
        for m in matrices
    }
    shifts = {m: method.shift(course.network, m, both[m]).full() for m in matrices}
    loss = plain.editing_loss(lm, edits, {m.parameter: shifts[m] for m in matrices}, success=0.7, locality=0.4)
    assert loss.item() == pytest.approx(seen["loss"], rel=1e-4)
    parameters = list(course.network.parameters())
    whole = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in whole if g is not None) > 1e-4
    for parameter, gradient in zip(parameters, whole, strict=True):
        expected = torch.zeros_like(parameter) if gradient is None else gradient
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["mend", "malmen"])
def test_training_lowers_the_loss_and_the_editor_then_edits(name, tmp_path):
    lm, edits = tiny_lm(), tiny_edits()
    settings = {
        "layers": (1, 2),
        "rank": 8,
        "step": 1e-3,
        "lr": 1e-2,
        "check_every": 10,
        "patience": 100,
        "success": 1.0,
    }
    many = [e.model_copy(update={"id": f"{e.id}{i}"}) for i in range(3) for e in edits]
    looks = []
    create(name, settings | {"steps": 60}).train(lm, many, folder=tmp_path / "editor", watch=looks.append)
    assert looks[-1]["loss"] < 0.7 * looks[0]["loss"]
    patch = create(name, {"editor": str(tmp_path / "editor")}).fit(lm, edits[:1])
    before = plain.ft_m_loss(lm.model, lm, edits[:1]).item()
    with lm.patched(patch):
        assert plain.ft_m_loss(lm.model, lm, edits[:1]).item() < 0.6 * before


def test_a_shift_acts_in_training_as_its_patch_does_after():
    from factpatch.methods.mend import _shifted

    lm = tiny_lm("gpt2")
    projection = lm.anatomy.mlp_out(1)
    out, width = projection.matrix.shape
    change = LowRank(torch.randn(out, 2), torch.randn(2, width) * 0.1)
    batch = Batch.of([[1, 2, 3]], lm.device)
    with torch.no_grad():
        with _shifted({projection: change}):
            beside = lm.model(batch.ids).logits
        projection.module.weight.data += change.full().T
        torch.testing.assert_close(beside, lm.model(batch.ids).logits, rtol=1e-4, atol=1e-4)
