"""The one closed form against the papers' equations, each solved densely in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factpatch.methods import insertion
from factpatch.methods.insertion import insert, insert_needed, set_aside, with_room
from factpatch.methods.moments import factorised
from factpatch.patches import Dense, LowRank
from tests.reference.memory import peak


def problem(seed, out=4, width=7, n=3):
    """Residuals, keys, and a second moment of other keys."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.randn(60, width, generator=generator) * torch.linspace(0.3, 2, width)
    return (
        torch.randn(out, n, generator=generator),
        torch.randn(width, n, generator=generator),
        others.T @ others / 60,
    )


def exact(change):
    return change.dense.double() if isinstance(change, Dense) else change.u.double() @ change.v.double()


@given(st.integers(0, 1000), st.integers(1, 20), st.sampled_from([0.1, 1.0, 50.0]))
def test_memit_equals_the_dense_solve(seed, n, prior):
    R, K, C = problem(seed, n=n)
    R64, K64, C64 = R.double(), K.double(), C.double()
    expected = R64 @ K64.T @ torch.linalg.inv(prior * C64 + K64 @ K64.T)
    found = exact(insert(R, K, factorised(C, 1e-14), ridge=prior))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000), st.integers(1, 5))
def test_emmet_meets_every_value_and_equals_the_dense_solve(seed, n):
    R, K, C = problem(seed, n=n)
    inverse = torch.linalg.inv(C.double())
    expected = R.double() @ torch.linalg.inv(K.double().T @ inverse @ K.double()) @ K.double().T @ inverse
    found = exact(insert(R, K, factorised(C, 1e-14)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found @ K.double(), R.double(), rtol=1e-3, atol=1e-3)


def test_a_ridge_in_no_metric_is_ridge_regression():
    R, K, _ = problem(0)
    R64, K64 = R.double(), K.double()
    expected = R64 @ K64.T @ torch.linalg.inv(K64 @ K64.T + 2.5 * torch.eye(7, dtype=torch.double))
    torch.testing.assert_close(exact(insert(R, K, ridge=2.5)), expected, rtol=1e-4, atol=1e-6)


def test_a_ridge_keeps_two_facts_with_one_key_from_tearing_the_matrix():
    R, K, C = problem(0, n=2)
    K[:, 1] = K[:, 0]
    change = exact(insert(R, K, factorised(C, 1e-6), ridge=0.1))
    assert change.norm() < 10 * R.double().norm()
    torch.testing.assert_close(change @ K[:, 0].double(), R.double().mean(1), rtol=0.1, atol=0.05)


def test_it_is_the_least_change_that_meets_the_values():
    R, K, C = problem(1)
    change = exact(insert(R, K, factorised(C, 1e-14)))
    free = torch.eye(7, dtype=torch.double) - K.double() @ torch.linalg.pinv(K.double())

    def cost(delta):
        return torch.trace(delta @ C.double() @ delta.T)

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.randn(4, 7, generator=generator, dtype=torch.double) @ free  # leaves the values as they are
        assert cost(change + 0.1 * other) > cost(change)


@pytest.mark.parametrize("n", [3, 7, 20])
def test_gradients_pass_through_it(n):
    R, K, C = problem(3, n=n)
    ridge, other = (torch.tensor(0.7, dtype=torch.double, requires_grad=True) for _ in range(2))
    R.requires_grad_()
    insert(R, K, factorised(C, 1e-14), ridge=ridge).full().square().sum().backward()
    R64, K64 = R.detach().double().requires_grad_(), K.double()
    (R64 @ K64.T @ torch.linalg.inv(other * C.double() + K64 @ K64.T)).square().sum().backward()
    torch.testing.assert_close(ridge.grad, other.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(R.grad.double(), R64.grad, rtol=1e-3, atol=1e-4)


def test_its_rank_is_the_number_of_edits():
    R, K, C = problem(2, n=3)
    change = insert(R, K, factorised(C, 1e-6), ridge=1.0)
    assert (change.u.shape, change.v.shape) == ((4, 3), (3, 7))
    assert change.u.dtype == change.v.dtype == torch.float32


def test_of_many_edits_it_is_no_larger_than_the_matrix():
    R, K, C = problem(2, n=50)
    change = insert(R, K, factorised(C, 1e-6), ridge=1.0)
    assert (change.shape, change.dense.dtype) == ((4, 7), torch.float32)


def test_more_edits_than_are_taken_at_a_time_give_the_same(monkeypatch):
    R, K, C = problem(2, n=50)
    at_once = insert(R, K, factorised(C, 1e-6), ridge=1.0, still=2 * K).dense
    monkeypatch.setattr(insertion, "_COLUMNS", 8)
    torch.testing.assert_close(insert(R, K, factorised(C, 1e-6), ridge=1.0, still=2 * K).dense, at_once)


def test_one_new_edit_beside_many_earlier_is_of_rank_one():
    R, K, C = problem(4, n=1)
    others = problem(5, n=30)[1]
    found = insert(R, K, factorised(C, 1e-6), ridge=0.5, still=others)
    assert (found.u.shape, found.v.shape) == ((4, 1), (1, 7))
    every = insert(torch.cat([R, torch.zeros(4, 30)], 1), torch.cat([K, others], 1), factorised(C, 1e-6), ridge=0.5)
    torch.testing.assert_close(exact(found), exact(every), rtol=1e-4, atol=1e-6)


def test_it_is_solved_on_the_cpu_where_the_device_has_no_room():
    def compute(place):
        if place.type == "meta":
            raise torch.OutOfMemoryError
        return place.type

    assert with_room(torch.device("meta"), compute) == "cpu"
    with pytest.raises(torch.OutOfMemoryError):
        with_room(torch.device("cpu"), lambda _: compute(torch.device("meta")))


@pytest.mark.parametrize("n", [3, 20])
def test_further_keys_stay_as_if_they_were_given_what_they_had(n):
    R, K, C = problem(4, n=n)
    others = problem(5, n=2)[1]
    factor = factorised(C, 1e-6)
    every = insert(torch.cat([R, torch.zeros(4, 2)], 1), torch.cat([K, others], 1), factor, ridge=0.5)
    torch.testing.assert_close(exact(insert(R, K, factor, ridge=0.5, still=others)), exact(every))


@pytest.mark.parametrize("exactly", [False, True])
@pytest.mark.parametrize("directions", [False, True])
@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize(
    ("n", "out", "columns"), [(100, 300, 4096), (390, 300, 4096), (1000, 300, 4096), (1000, 100, 64), (1000, 4, 256)]
)
def test_what_a_solve_is_told_to_need_is_what_it_holds(monkeypatch, n, out, columns, metric, directions, exactly):
    """Of many keys each of the three that may take most does so in one of these."""
    monkeypatch.setattr(insertion, "_COLUMNS", columns)
    width = 400
    R, K, C = problem(0, out, width, n)
    factor = torch.linalg.cholesky(C.double() + torch.eye(width)) if metric else None
    along = K + 0.1 if directions else None
    own = K.double() if exactly else K
    held = peak(lambda: insert(R, own, factor, ridge=1.0, directions=along))
    told = insert_needed(out, width, n, metric=metric, directions=directions, exact=exactly).bytes
    assert 0.9 * held < told < 1.1 * held


@pytest.mark.parametrize(("rank", "form"), [(2, LowRank), (5, Dense)])
def test_a_change_is_set_aside_in_its_smaller_form(rank, form):
    change = LowRank(torch.randn(rank, 4).T, torch.randn(6, rank).T)
    aside = set_aside(change)
    assert isinstance(aside, form)
    torch.testing.assert_close(aside.full(), change.full())
    own = {tensor.data_ptr() for tensor in change.parts().values()}
    assert all(part.is_contiguous() and part.data_ptr() not in own for part in aside.parts().values())
