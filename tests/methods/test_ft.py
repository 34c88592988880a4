"""FT-L and FT-M against plain training of a copy of the model."""

import pytest
import torch

from factpatch.methods import create
from factpatch.testing import tiny_edits, tiny_lm
from tests.reference import plain

LOSSES = {"ft-l": plain.ft_l_loss, "ft-m": plain.ft_m_loss}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "opt"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_plain_training(name, architecture):
    lm, edits = tiny_lm(architecture), tiny_edits()
    patch = create(name, {"layer": 1, "steps": 5, "lr": 1e-3, "stop_loss": 0}).fit(lm, edits)
    ((parameter, delta),) = patch.deltas.items()
    expected = plain.fine_tune(lm, parameter, LOSSES[name], edits, lr=1e-3, steps=5)
    assert expected.abs().max() > 1e-3
    with torch.no_grad():
        first = LOSSES[name](lm.model, lm, edits).item()
    assert patch.provenance.notes[0]["first_loss"] == pytest.approx(first, rel=1e-4)
    torch.testing.assert_close(delta.full(), expected, rtol=2e-2, atol=2e-5)


def test_the_two_losses_differ_on_targets_of_several_tokens():
    lm, edits = tiny_lm(), tiny_edits()
    one, other = (create(name, {"steps": 2}).fit(lm, edits) for name in LOSSES)
    assert not torch.equal(next(iter(one.tensors().values())), next(iter(other.tensors().values())))


def test_clamp_holds_and_matches_plain_training():
    lm, edits = tiny_lm(), tiny_edits()
    patch = create("ft-m", {"layer": 2, "steps": 6, "lr": 1e-2, "clamp": 5e-3, "stop_loss": 0}).fit(lm, edits)
    ((parameter, delta),) = patch.deltas.items()
    assert delta.full().abs().max() <= 5e-3 + 1e-7
    expected = plain.fine_tune(lm, parameter, plain.ft_m_loss, edits, lr=1e-2, steps=6, clamp=5e-3)
    torch.testing.assert_close(delta.full(), expected, rtol=2e-2, atol=5e-4)


def test_stops_when_the_loss_is_low_and_says_so():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    patch = create("ft-m", {"steps": 200, "lr": 1e-2, "stop_loss": 2.5}).fit(lm, [edit])
    (note,) = patch.provenance.notes
    assert note["steps"] < 200
    assert note["last_loss"] < 2.5 < note["first_loss"]


def test_small_batches_train_on_every_edit():
    lm, edits = tiny_lm(), tiny_edits()

    def likelihood(edit):
        return plain.target_logprobs(lm.model, *plain.encode(lm, edit.prompt, edit.target)).mean().item()

    before = [likelihood(edit) for edit in edits]
    with lm.patched(create("ft-m", {"steps": 60, "lr": 1e-2, "batch_size": 1}).fit(lm, edits)):
        assert all(likelihood(edit) > old + 2 for edit, old in zip(edits, before, strict=True))
