"""Activations are read and replaced as said, and no module keeps a trace of it."""

import pytest
import torch
from torch import nn

from factpatch.lm.batches import Batch, Places
from factpatch.lm.hooks import reading, recording, replacing_input, replacing_output, resuming, until
from factpatch.lm.run import UpperRun, input_of, logits_at
from factpatch.testing import ARCHITECTURES, Snapshot, logits_of, tiny_lm

TEXTS = ["Rome lies in Peru", "A", "Where, then, does Oslo lie?"]


def batch_of(lm):
    return Batch.of([lm.tokens.encode(text).ids for text in TEXTS], lm.device)


def run(lm):
    batch = batch_of(lm)
    with torch.no_grad():
        return lm.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits


def everywhere(lm):
    return Places.of([range(len(lm.tokens.encode(text).ids)) for text in TEXTS], lm.device)


USES = {
    "reading": lambda block: reading(block, lambda *_: None),
    "replacing_output": lambda block: replacing_output(block, lambda _, out: out + 1),
    "replacing_input": lambda block: replacing_input(block, lambda x: x + 1),
    "until": until,
    "recording": recording,
    "resuming": lambda block: resuming([block], None),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_nothing_is_left_behind_whatever_happens_inside(use):
    lm = tiny_lm()
    before, block = Snapshot.of(lm), lm.anatomy.blocks[1]
    with use(block):
        assert before.differences(lm) != [], "the test would see nothing"
    assert before.differences(lm) == []
    with pytest.raises(ZeroDivisionError), use(block):
        raise ZeroDivisionError
    assert before.differences(lm) == []


def test_nothing_is_left_behind_when_the_function_given_fails():
    lm = tiny_lm()
    before, block = Snapshot.of(lm), lm.anatomy.blocks[1]

    def fails(*_):
        raise ZeroDivisionError

    for use in (reading, replacing_output, replacing_input):
        with pytest.raises(ZeroDivisionError), use(block, fails):
            run(lm)
    assert before.differences(lm) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_sees_what_goes_in_and_out(architecture):
    lm = tiny_lm(architecture)
    batch, projection = batch_of(lm), lm.anatomy.mlp_out(1)
    seen = []
    with reading(lm.anatomy.final_norm, lambda x, y: seen.append((x.clone(), y.clone()))):
        logits = run(lm)
    ((x, y),) = seen
    torch.testing.assert_close(lm.anatomy.final_norm(x), y)
    if not architecture.startswith("gemma2"):  # it caps its logits after the head
        torch.testing.assert_close(lm.anatomy.head(y), logits)
    width = projection.matrix.shape[1]
    assert input_of(lm, projection.module, batch).shape == (*batch.ids.shape, width)
    for module in (lm.anatomy.embedding, *lm.anatomy.blocks, lm.anatomy.block(0).get_submodule(lm.anatomy.layout.mlp)):
        seen.clear()
        with reading(module, lambda x, y: seen.append(y.shape)):
            run(lm)
        assert len(seen) == 1
        assert seen[0][-1] == 32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_replaced_output_is_what_the_rest_of_the_model_sees(architecture):
    lm = tiny_lm(architecture)
    plain, module = run(lm), lm.anatomy.mlp_out(1).module
    with replacing_output(module, lambda _, out: out):
        assert torch.equal(run(lm), plain)
    with replacing_output(module, lambda _, out: out + 1):
        assert not torch.allclose(run(lm), plain)
    with replacing_output(lm.anatomy.blocks[-1], lambda x, _: torch.ones_like(x)):
        assert run(lm).std(dim=1).max() < 1e-6, "every position ends in the same state"
    with replacing_output(module, lambda x, _: nn.functional.linear(x, torch.zeros(32, x.shape[-1]))):
        ablated = run(lm)
    with torch.no_grad():
        module.weight.zero_()
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
    torch.testing.assert_close(ablated, run(lm))


def test_a_replaced_output_keeps_the_rest_of_a_tuple():
    class Two(nn.Module):
        def forward(self, x):
            return x, "weights", None

    two = Two()
    with replacing_output(two, lambda x, out: x + out):
        assert two(torch.ones(1)) == (torch.tensor([2.0]), "weights", None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_replaced_input_is_what_the_module_sees(architecture):
    lm = tiny_lm(architecture)
    plain, block = run(lm), lm.anatomy.blocks[1]
    seen = []
    with replacing_input(block, lambda x: x * 2), reading(block, lambda x, _: seen.append(x.clone())):
        doubled = run(lm)
    with reading(block, lambda x, _: seen.append(x.clone())):
        assert torch.equal(run(lm), plain)
    assert torch.equal(seen[0], 2 * seen[1])
    assert not torch.allclose(doubled, plain)


def test_replacements_act_one_after_the_other():
    lm = tiny_lm()
    seen, block = [], lm.anatomy.blocks[1]
    with (
        replacing_output(block, lambda _, out: out * 0),
        replacing_output(block, lambda _, out: out + 3),
        reading(block, lambda _, out: seen.append(out)),
    ):
        run(lm)
    assert torch.equal(seen[0], torch.full_like(seen[0], 3))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_until_runs_the_module_and_nothing_after_it(architecture):
    lm = tiny_lm(architecture)
    ran, after = [], []
    blocks = lm.anatomy.blocks
    with (
        reading(blocks[0], lambda *_: ran.append(0)),
        reading(blocks[1], lambda *_: ran.append(1)),
        reading(blocks[2], lambda *_: ran.append(2)),
        until(blocks[1]),
    ):
        run(lm)
        after.append("the body went on")
    assert ran == [0, 1]
    assert after == []
    run(lm)  # it may run again


def test_until_stops_at_its_own_module_alone():
    lm = tiny_lm()
    ran = []
    with until(lm.anatomy.blocks[2]):
        with until(lm.anatomy.blocks[0]):
            run(lm)
        ran.append("inner left")
        run(lm)
        ran.append("not reached")
    assert ran == ["inner left"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_recorded_can_be_resumed_to_the_bit(architecture):
    lm = tiny_lm(architecture)
    before, plain, blocks = Snapshot.of(lm), run(lm), lm.anatomy.blocks
    for layer in range(len(blocks)):
        with recording(blocks[layer]) as kept, until(blocks[layer]):
            run(lm)
        with resuming(blocks[: layer + 1], kept[0]):
            assert torch.equal(run(lm), plain)
    assert before.differences(lm) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_blocks_beneath_run_once_and_are_then_skipped(architecture):
    lm = tiny_lm(architecture)
    batch, places, anatomy = batch_of(lm), everywhere(lm), lm.anatomy
    with torch.no_grad():
        expected = logits_at(lm, batch, places)
        for layer in range(1, 3):
            upper = UpperRun(lm, batch, layer)
            ran = []
            with (
                reading(anatomy.mlp_out(layer - 1).module, lambda *_, ran=ran: ran.append("beneath")),
                reading(anatomy.mlp_out(layer).module, lambda *_, ran=ran: ran.append("above")),
            ):
                torch.testing.assert_close(upper.logits_at(places), expected, rtol=1e-5, atol=1e-5)
            assert ran == ["above"]


def test_gradients_reach_the_blocks_above_alone():
    lm = tiny_lm()
    upper = UpperRun(lm, batch_of(lm), 1)
    upper.logits_at(everywhere(lm)).sum().backward()
    gradients = [lm.anatomy.mlp_out(layer).module.weight.grad is not None for layer in range(3)]
    assert gradients == [False, True, True]


def test_a_change_above_is_seen_and_a_change_beneath_is_not():
    lm = tiny_lm()
    places = everywhere(lm)
    with torch.no_grad():
        upper = UpperRun(lm, batch_of(lm), 1)
        before = upper.logits_at(places)
        lm.anatomy.mlp_out(0).module.weight.mul_(2)
        assert torch.equal(upper.logits_at(places), before)
        lm.anatomy.mlp_out(1).module.weight.mul_(2)
        assert not torch.allclose(upper.logits_at(places), before)


def test_a_forward_that_was_replaced_before_is_put_back():
    lm = tiny_lm()
    block = lm.anatomy.blocks[0]
    plain, own = logits_of(lm, "Rome"), block.forward

    def mine(*args, **more):
        return own(*args, **more)

    block.forward = mine
    with resuming([block], torch.zeros(1, 5, 32)):
        assert not torch.allclose(logits_of(lm, "Rome"), plain)
    assert vars(block)["forward"] is mine
    assert torch.equal(logits_of(lm, "Rome"), plain)


def test_what_a_module_is_given_by_name_is_seen():
    lm, seen = tiny_lm(), []
    attention = lm.anatomy.blocks[1].get_submodule(lm.anatomy.layout.attention)
    with torch.no_grad(), reading(attention, lambda x, _: seen.append(x)), replacing_output(attention, lambda x, _: x):
        lm.model(torch.tensor([[256, 5, 6]]))
    assert [x.shape for x in seen] == [(1, 3, 32)]


def test_a_hook_that_acted_while_the_blocks_beneath_were_recorded_does_not_act_again():
    lm = tiny_lm()
    batch = Batch.of([[256, 5, 6]], lm.device)
    places = Places.of([[2]], lm.device)
    with torch.no_grad(), replacing_output(lm.anatomy.blocks[0], lambda _, out: out + 1):
        expected = logits_at(lm, batch, places)
        upper = UpperRun(lm, batch, 1)
        torch.testing.assert_close(upper.logits_at(places), expected)
        with replacing_output(lm.anatomy.blocks[0], lambda _, out: out * 2):
            assert not torch.allclose(upper.logits_at(places), expected), "one that is added later acts"
        torch.testing.assert_close(upper.logits_at(places), expected)
        torch.testing.assert_close(logits_at(lm, batch, places), expected)
