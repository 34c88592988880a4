"""FT-L, FT-M and FT-BF against plain training of a copy of the model."""

import pytest
import torch

from factpatch.errors import BadConfig, CannotEdit
from factpatch.lm.predictions import predict
from factpatch.methods import create, ft
from factpatch.methods.ft import FtConfig, FtM
from factpatch.methods.rome import RomeConfig
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


# FT-BF.

BREADTH = {"layer": 1, "lr": 1e-2, "steps": 40, "batch_size": 1}


def likelihoods(lm):
    return [
        plain.target_logprobs(lm.model, *plain.encode(lm, edit.prompt, edit.target)).mean().item()
        for edit in tiny_edits()
    ]


def test_breadth_first_keeps_the_earlier_edits_of_a_sequence():
    lm, (first, second) = tiny_lm(), tiny_edits()
    kept = {}
    for name in ("ft-m", "ft-bf"):
        method = create(name, BREADTH)
        with lm.patched(method.fit(lm, [first])):
            upper = method.fit(lm, [second])
            with lm.patched(upper):
                kept[name] = likelihoods(lm)
    assert kept["ft-bf"][0] > kept["ft-m"][0] + 0.5, "the first edit is rehearsed"
    assert kept["ft-bf"][1] > kept["ft-m"][1] - 0.5, "and the second is learnt as well"


def test_breadth_first_learns_all_edits_so_far_and_lets_a_new_one_take_the_place_of_its_like():
    lm, (first, second) = tiny_lm(), tiny_edits()
    method = create("ft-bf", BREADTH)
    lower = method.fit(lm, [first, second])
    again = first.model_copy(update={"target": "Chad"})
    with lm.patched(lower):
        learnt = method.learnt(lm, (again,), method.config)
        assert {edit.target for edit in learnt} == {"Chad", "a pilot"}
    assert method.learnt(lm, (again,), method.config) == [again]
    both = (first, again)
    assert set(method.learnt(lm, both, method.config)) == set(both), "two edits given at once are both kept"


def test_breadth_first_stops_when_all_is_said_as_it_should_be():
    lm, edits = tiny_lm(), tiny_edits()
    patch = create("ft-bf", BREADTH | {"steps": 400, "stop_loss": 3.0}).fit(lm, edits)
    (note,) = patch.provenance.notes
    assert note["steps"] < 400
    with lm.patched(patch):
        for edit in edits:
            text = lm.tokens.encode(edit.prompt, edit.target)
            assert predict(lm, [text])[0].best == text.target_ids, "a low loss alone would not do"


def test_what_diverges_is_refused_by_name(monkeypatch):
    lm, edits = tiny_lm(), tiny_edits()
    step = torch.optim.Adam.step

    def diverging(self):
        step(self)
        self.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.Adam, "step", diverging)
    with pytest.raises(CannotEdit, match="edit rome, ann: what ft-m made of it is not finite"):
        create("ft-m", {"steps": 2}).fit(lm, edits)


def test_a_whole_config_is_taken_alone_and_only_of_its_own_class():
    assert FtM(FtConfig(steps=3)).config.steps == 3
    for args, settings in (((FtConfig(),), {"steps": 3}), ((RomeConfig(),), {})):
        with pytest.raises(BadConfig, match="ft-m takes a FtConfig, or single settings by name"):
            FtM(*args, **settings)


@pytest.mark.parametrize("name", ["ft-l", "ft-m", "ft-bf"])
def test_a_batch_in_parts_gives_what_the_whole_gives(name, monkeypatch):
    """Less than 1 % apart after ten steps of Adam: the sum over edits is taken in another order."""
    lm, edits = tiny_lm(), tiny_edits()
    method = create(name, {"layer": 1, "steps": 10, "lr": 1e-3, "stop_loss": 0})
    whole = method.fit(lm, edits)
    rows = []
    monkeypatch.setattr(ft, "_tokens_at_once", lambda *_: 1)
    init = ft.TargetBatch.__init__
    monkeypatch.setattr(
        ft.TargetBatch,
        "__init__",
        lambda self, lm, texts, *args: rows.append(len(texts)) or init(self, lm, texts, *args),
    )
    parts = method.fit(lm, edits)
    assert rows == [1, 1]
    (one,), (other,) = whole.deltas.values(), parts.deltas.values()
    assert (one.full() - other.full()).norm() < 1e-2 * one.full().norm()
    assert parts.provenance.notes[0]["first_loss"] == pytest.approx(whole.provenance.notes[0]["first_loss"], rel=1e-5)


def test_parts_keep_the_order_of_edits_and_are_bounded_by_the_models_size():
    lm, (first, second) = tiny_lm(), tiny_edits()
    edits = [second, first] if len(first.prompt) < len(second.prompt) else [first, second]
    assert ft._parts(lm, 1, edits, FtConfig()) == [edits], "the longer one comes first, as it was given"
    assert ft._tokens_at_once(lm, 1) == 128, "a tiny model runs the fewest"
    lm.model.register_parameter("ballast", torch.nn.Parameter(torch.empty(10**7)))
    size = sum(p.numel() for p in lm.model.parameters())
    weights = sum(p.numel() for block in lm.anatomy.blocks[1:] for p in block.parameters())
    kept = ft._tokens_at_once(lm, 1) * 2 * weights / lm.anatomy.hidden_size
    assert 0.9 * size / 3 < kept <= size / 3


def test_weights_ask_for_no_gradient_while_training_and_do_so_again_afterwards(monkeypatch):
    lm, edits = tiny_lm(), tiny_edits()
    for parameter in lm.model.parameters():
        parameter.requires_grad = True
    seen = []
    loss = FtM.loss
    monkeypatch.setattr(
        FtM,
        "loss",
        lambda self, batch: seen.append([p.requires_grad for p in lm.model.parameters()]) or loss(self, batch),
    )

    def die(doing, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create("ft-m", {"steps": 3}).fit(lm, edits, die)
    assert not any(seen[0])
    assert all(parameter.requires_grad for parameter in lm.model.parameters())
