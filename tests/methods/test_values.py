"""The search for values: against the plain path in `benchmarks`, edits that leave their batch, and texts in parts."""

import pytest
import torch
from benchmarks import plain

from factpatch.lm.run import UpperRun
from factpatch.methods import values
from factpatch.methods.targets import cross_entropy, tokens_at_once
from factpatch.methods.values import ValueConfig, target_values
from factpatch.progress import silent
from factpatch.testing import ARCHITECTURES, tiny_edits, tiny_lm

PREFIXES = ("", "Some time ago. ", "As it is. ")


def found(lm, edits, config, prefixes=PREFIXES, layer=1, progress=silent):
    return target_values(lm, edits, lm.anatomy.mlp_out(layer).module, layer, prefixes, config, progress)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_value_equals_that_of_the_plain_path(architecture):
    lm, edits = tiny_lm(architecture), tiny_edits()
    config = ValueConfig(steps=6, stop_loss=0, weight_decay=0.5, clamp=3.0, kl_factor=8.0)
    for edit, value in zip(edits, found(lm, edits, config), strict=True):
        old, delta, losses = plain.value(lm, lm.anatomy.mlp_out(1).module, edit, PREFIXES, config)
        torch.testing.assert_close(value.old, old, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value.delta, delta, rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(value.losses, tuple(losses), rtol=1e-3, atol=1e-4)


def test_an_edit_that_is_done_leaves_the_batch(monkeypatch):
    lm, edits = tiny_lm(), tiny_edits()
    config = ValueConfig(steps=12, clamp=4.0, stop_loss=0)
    losses = [value.losses for value in found(lm, edits, config)]
    early = min(range(len(edits)), key=lambda i: losses[i][3])
    at = losses[early][3] + 1e-4
    late = [own for i, own in enumerate(losses) if i != early]
    assert all(min(own[:9]) > at for own in late), "the others go on for longer"
    rows = []
    run = UpperRun.logits_at
    monkeypatch.setattr(
        UpperRun, "logits_at", lambda self, places: rows.append(len(self.batch.ids)) or run(self, places)
    )
    values = found(lm, edits, config.model_copy(update={"stop_loss": at}))
    each = len(PREFIXES) + 1
    assert rows[: 1 + len(values[early].losses)] == [len(edits) * each] * (1 + len(values[early].losses))
    assert set(rows[1 + len(values[early].losses) :]) == {(len(edits) - 1) * each}
    for i, edit in enumerate(edits):
        (alone,) = found(lm, [edit], config.model_copy(update={"stop_loss": at}))
        assert len(alone.losses) == len(values[i].losses)
        torch.testing.assert_close(values[i].delta, alone.delta, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("budget", [1, 25])
def test_texts_in_parts_give_the_same_value(monkeypatch, budget):
    lm, edits = tiny_lm(), tiny_edits()
    config = ValueConfig(steps=6, stop_loss=0, weight_decay=0.5, kl_factor=8.0)
    whole = found(lm, edits, config)
    monkeypatch.setattr(values, "tokens_at_once", lambda *_: budget)
    rows = []
    run = UpperRun.logits_at
    monkeypatch.setattr(
        UpperRun, "logits_at", lambda self, places: rows.append(len(self.batch.ids)) or run(self, places)
    )
    for one, other in zip(whole, found(lm, edits, config), strict=True):
        torch.testing.assert_close(one.delta, other.delta, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-3, atol=1e-4)
    assert max(rows) < len(PREFIXES) + 1


def test_no_weight_is_given_a_gradient():
    lm, edits = tiny_lm(), tiny_edits()
    weights = list(lm.model.parameters())
    for parameter in weights:
        parameter.requires_grad = True
    flags = []
    found(
        lm,
        edits,
        ValueConfig(steps=3, stop_loss=0),
        progress=lambda *_: flags.append({p.requires_grad for p in weights}),
    )
    assert all(parameter.grad is None for parameter in weights)
    assert set.union(*flags) == {False}, "nor is anything kept for one"
    assert all(parameter.requires_grad for parameter in weights), "and afterwards the flags are as they were"


def test_cross_entropy_and_its_gradient_equal_the_formula():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, 11, generator=generator)).double().requires_grad_()
    tokens = torch.tensor([3, 0, 10])
    wanted = torch.randn(2, 11, generator=generator).double().softmax(-1)
    logprobs = logits.log_softmax(-1)
    expected = torch.cat([-logprobs[:3].gather(-1, tokens[:, None])[:, 0], -(wanted * logprobs[3:]).sum(-1)])
    got = cross_entropy(logits, tokens, wanted)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(5, generator=generator).double()
    (ours,), (theirs,) = (torch.autograd.grad((x * weights).sum(), [logits]) for x in (got, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_batch_is_bounded_by_the_models_size_and_never_without_bound():
    lm = tiny_lm()
    n = lm.anatomy.n_layers
    assert [tokens_at_once(lm, first) for first in (0, n)] == [128, 128], "a tiny model runs the fewest"
    lm.model.register_parameter("ballast", torch.nn.Parameter(torch.empty(10**7)))
    size = sum(p.numel() for p in lm.model.parameters())
    blocks = sum(p.numel() for block in lm.anatomy.blocks for p in block.parameters())
    kept = 2 * blocks // lm.anatomy.hidden_size + len(lm.anatomy.head.weight)
    assert tokens_at_once(lm, 0) == min(4096, size // 4 // kept)
    assert tokens_at_once(lm, n) == 4096
