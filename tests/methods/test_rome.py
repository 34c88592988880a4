"""ROME and r-ROME, its keys, values and moments, against the papers' equations in plain lines."""

import pytest
import torch

from factpatch.errors import BadConfig, SingularMoment
from factpatch.methods import create
from factpatch.methods.insertion import insert
from factpatch.methods.keys import context_keys, context_prefixes
from factpatch.methods.moments import MomentConfig, factorised, second_moment
from factpatch.methods.values import ValueConfig, target_values
from factpatch.progress import silent
from factpatch.testing import ARCHITECTURES, tiny_edits, tiny_lm
from tests.reference import plain

PREFIXES = ("", "Some time ago. ", "As it is. ")


def values(lm, edits, layer, prefixes, config):
    """ROME's: of the MLP's output at one block."""
    return target_values(lm, edits, lm.anatomy.mlp_out(layer).module, layer, prefixes, config, silent)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_value_equals_plain_optimisation(architecture):
    lm, (edit, _) = tiny_lm(architecture), tiny_edits()
    config = ValueConfig(steps=6, stop_loss=0, weight_decay=0.5, clamp=3.0, kl_factor=8.0)
    (value,) = values(lm, [edit], 1, PREFIXES, config)
    module = lm.anatomy.mlp_out(1).module
    old, delta = plain.optimise_value(
        lm, module, edit, PREFIXES, lr=0.5, steps=6, kl_factor=8.0, weight_decay=0.5, clamp=3.0
    )
    torch.testing.assert_close(value.old, old, rtol=1e-4, atol=1e-5)
    assert delta.norm() > 0.1
    torch.testing.assert_close(value.delta, delta, rtol=2e-2, atol=2e-3)
    assert len(value.losses) == 6


def test_values_in_a_batch_equal_values_one_by_one():
    lm, edits = tiny_lm(), tiny_edits()
    config = ValueConfig(steps=8, stop_loss=5.5, clamp=2.0)
    together = values(lm, edits, 0, PREFIXES, config)
    for edit, value in zip(edits, together, strict=True):
        (alone,) = values(lm, [edit], 0, PREFIXES, config)
        torch.testing.assert_close(value.delta, alone.delta, rtol=1e-2, atol=1e-3)
        assert len(value.losses) == len(alone.losses)


def test_clamp_bounds_the_change():
    lm, edits = tiny_lm(), tiny_edits()
    for value in values(lm, edits, 0, PREFIXES, ValueConfig(steps=10, clamp=0.5, stop_loss=0)):
        assert value.delta.norm() == pytest.approx(0.5 * value.old.norm().item(), rel=1e-4)


def test_the_loss_falls():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    (value,) = values(lm, [edit], 0, ("",), ValueConfig(steps=25, clamp=100))
    assert value.losses[-1] < value.losses[0] - 0.1


@pytest.mark.parametrize("direction_differs", [False, True])
def test_insert_equals_the_dense_solution(direction_differs):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 7, generator=generator)
    keys = torch.randn(40, 7, generator=generator)
    k, v = torch.randn(7, generator=generator), torch.randn(5, generator=generator)
    d = k + 0.3 * torch.randn(7, generator=generator) if direction_differs else k
    C = keys.T @ keys / 40
    change = insert((v - W @ k)[:, None], k[:, None], factorised(C, 1e-12), directions=d[:, None])
    expected = plain.rank_one_insert(W, k, v, C, d)
    torch.testing.assert_close(W.double() + change.full().double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((W + change.full()) @ k, v, rtol=1e-4, atol=1e-4)


def test_insert_is_the_smallest_change_in_the_metric_of_c():
    generator = torch.Generator().manual_seed(1)
    W, k, v = (
        torch.randn(4, 6, generator=generator),
        torch.randn(6, generator=generator),
        torch.randn(4, generator=generator),
    )
    keys = torch.randn(50, 6, generator=generator) * torch.linspace(0.2, 3, 6)
    C = keys.T @ keys / 50
    change = insert((v - W @ k)[:, None], k[:, None], factorised(C, 1e-12)).full()

    def cost(delta):
        return torch.trace(delta @ C @ delta.T)

    for _ in range(20):
        other = torch.randn(4, 6, generator=generator)
        other -= torch.outer(other @ k, k) / (k @ k)  # any change that leaves the constraint alone
        assert cost(change + 0.1 * other) > cost(change)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_second_moment_equals_a_plain_sum(architecture, tmp_path):
    lm = tiny_lm(architecture)
    corpus = tmp_path / "corpus.txt"
    documents = ["A first text, rather short.", "A second one.", "x" * 90]
    corpus.write_text("\n\n".join(documents))
    config = MomentConfig(corpus=str(corpus), moment_tokens=100, moment_length=30)
    found = second_moment(lm, 1, config, silent)
    rows, left = [], 100
    for document in documents:
        ids = lm.tokenizer(document)["input_ids"]
        for start in range(0, len(ids), 30):
            rows.append(ids[start : start + min(30, left)])
            left -= len(rows[-1])
            if left == 0:
                break
    assert sum(map(len, rows)) == 100
    expected = plain.second_moment(lm, lm.anatomy.mlp_out(1).module, [row for row in rows if row])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_second_moment_is_cached_under_all_it_depends_on(monkeypatch, tmp_path):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path))
    lm = tiny_lm()
    config = MomentConfig(moment_tokens=300, moment_length=30)
    first = second_moment(lm, 1, config, silent)
    calls = []

    def seen(*_):
        calls.append(1)

    assert torch.equal(second_moment(lm, 1, config, seen), first)
    assert not calls, "computed again"
    for other in (config.model_copy(update={"seed": 1}), config.model_copy(update={"moment_tokens": 301})):
        assert not torch.equal(second_moment(lm, 1, other, silent), first)
    assert not torch.equal(second_moment(lm, 0, config, silent), first)
    assert not torch.equal(second_moment(tiny_lm(seed=5), 1, config, silent), first)


def test_second_moment_is_the_base_models_whatever_patches_lie_on_it(monkeypatch, tmp_path):
    lm, edits = tiny_lm(), tiny_edits()
    patch = create("ft-m", {"layer": 0, "steps": 20, "lr": 1e-2}).fit(lm, edits)
    config = MomentConfig(moment_tokens=300, moment_length=30)
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "one"))
    bare = second_moment(lm, 1, config, silent)
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "two"))
    with lm.patched(patch):
        assert torch.equal(second_moment(lm, 1, config, silent), bare)


def test_singular_moment_is_refused():
    with pytest.raises(SingularMoment, match="Raise the setting damping, or moment_tokens"):
        factorised(torch.zeros(3, 3), 1e-3)


@pytest.mark.parametrize(
    ("corpus", "words"), [("missing.txt", "cannot be read as UTF-8 text"), ("empty.txt", "holds no text")]
)
def test_bad_corpus_is_refused(tmp_path, corpus, words):
    (tmp_path / "empty.txt").write_text(" \n\n ")
    with pytest.raises(BadConfig, match=words):
        second_moment(tiny_lm(), 0, MomentConfig(corpus=str(tmp_path / corpus), moment_tokens=77), silent)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "falcon", "opt"])
def test_rome_inserts_the_pair_it_promises(architecture):
    """After r-ROME the projection gives `v0 + delta` for the mean key; after ROME for the bare prompt's key."""
    lm, (edit, _) = tiny_lm(architecture), tiny_edits()
    settings = {"layer": 1, "contexts": 4, "steps": 4, "moment_tokens": 600, "moment_length": 30}
    for name in ("rome", "r-rome"):
        method = create(name, settings)
        patch = method.fit(lm, [edit])
        prefixes = context_prefixes(lm, 4, 0)
        keys = context_keys(lm, 1, [edit], prefixes, chat=False)[0]
        key = keys.mean(0) if name == "r-rome" else keys[0]
        (value,) = values(lm, [edit], 1, prefixes, method.config)
        projection = lm.anatomy.mlp_out(1)
        with lm.patched(patch), torch.no_grad():
            output = projection.apply(projection.matrix, key)
        torch.testing.assert_close(output, value.old + value.delta, rtol=1e-3, atol=1e-3)


def test_rome_and_r_rome_differ_only_when_keys_do():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    settings = {"layer": 1, "steps": 3, "moment_tokens": 600, "moment_length": 30}

    def change(name, contexts, **more):
        return next(iter(create(name, settings | {"contexts": contexts} | more).fit(lm, [edit]).deltas.values())).full()

    torch.testing.assert_close(change("rome", 0), change("r-rome", 0))
    assert not torch.allclose(change("rome", 4), change("r-rome", 4))
    torch.testing.assert_close(change("rome", 4, consistent_keys=True), change("r-rome", 4))


def test_context_prefixes_are_seeded_and_of_the_base_model():
    lm = tiny_lm()
    patch = create("ft-m", {"layer": 0, "steps": 20, "lr": 1e-2}).fit(lm, tiny_edits())
    prefixes = context_prefixes(lm, 6, 0)
    assert prefixes[0] == ""
    assert len(prefixes) == 7
    assert all(prefix.endswith(". ") for prefix in prefixes[1:])
    with lm.patched(patch):
        assert context_prefixes(lm, 6, 0) == prefixes
    assert context_prefixes(lm, 6, 1) != prefixes
