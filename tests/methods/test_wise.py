"""WISE: the routing activation, margins, masks and merging against plain lines, and the route kept while writing."""

from dataclasses import replace

import pytest
import torch
from transformers.activations import ACT2FN

from factpatch.data import write_jsonl
from factpatch.errors import BadConfig, BadPatch, WrongBase
from factpatch.lm.batches import Batch
from factpatch.lm.predictions import predict
from factpatch.lm.run import input_of, output_of
from factpatch.methods import create
from factpatch.methods.wise import WiseConfig, margin_loss, ties
from factpatch.patches import Patch, WeightPatch
from factpatch.patches.delta import Dense, Sparse
from factpatch.patches.side import SideMemory, SidePatch, memories, routing_activation
from factpatch.testing import ARCHITECTURES, logits_of, tiny_edits, tiny_lm
from tests.reference import plain

QUICK = {"layer": 1, "contexts": 2, "steps": 20, "lr": 2.0}


def fit(lm, edits, **more):
    return create("wise", QUICK | more).fit(lm, edits)


def side(lm, change, least, *, ratio=0.88, layer=1, number=0, merged=False):
    site = lm.anatomy.mlp_out(layer).parameter.removesuffix(".weight")
    provenance = fit(lm, tiny_edits()[:1], steps=1).provenance
    return SidePatch(provenance, site, ratio, merged, {number: SideMemory(Sparse.of(change), least, 1)})


def random_change(lm, layer=1, seed=0):
    shape = lm.anatomy.mlp_out(layer).matrix.shape
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activation_of(lm, change, prompt, layer=1):
    """The routing activation of one prompt, token by token."""
    projection = lm.anatomy.mlp_out(layer)
    batch = Batch.of([lm.tokens.encode(prompt).ids], lm.device)
    x, out = (read(lm, projection.module, batch)[0] for read in (input_of, output_of))
    act = lm.anatomy.activation
    return float(sum((act(o) - act(o + change @ k)).norm() for k, o in zip(x, out, strict=True)) / len(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_activation_function_is_the_one_the_mlp_uses(architecture):
    lm = tiny_lm(architecture)
    used = [m for m in lm.anatomy.block(1).modules() if type(m) in {type(f) for f in map(ACT2FN.__getitem__, ACT2FN)}]
    if used:  # some write theirs as a function of their own
        assert type(lm.anatomy.activation) is type(used[0])
    x = torch.linspace(-3, 3, 7)
    assert (lm.anatomy.activation(x) - x.relu()).abs().max() < 0.3


def test_the_routing_activation_is_the_mean_over_the_prompts_tokens():
    out, change = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    prompt = torch.tensor([[True, True, False], [True, True, True]])
    found = routing_activation(out, change, prompt, torch.nn.SiLU())
    silu = torch.nn.functional.silu
    for row, length in ((0, 2), (1, 3)):
        norms = [(silu(out[row, t]) - silu(out[row, t] + change[row, t])).norm() for t in range(length)]
        assert float(found[row]) == pytest.approx(float(sum(norms) / length), rel=1e-5)


def test_the_margins_are_three_hinges():
    config = WiseConfig(quiet=0.1, loud=0.4, gap=0.2)
    inside, outside = torch.tensor([0.3, 0.6]), torch.tensor([0.05, 0.5, 0.2])
    expected = (0 + 0.4 + 0.1) / 3 + (0.1 + 0) / 2
    expected += sum(max(0.0, o - i + 0.2) for o in (0.05, 0.5, 0.2) for i in (0.3, 0.6)) / 6
    assert float(margin_loss(inside, outside, config)) == pytest.approx(expected, rel=1e-5)
    assert float(margin_loss(torch.tensor([0.9]), torch.tensor([0.05]), config)) == 0


def test_ties_trims_elects_and_averages():
    one = torch.tensor([[4.0, -1.0, 2.0, 0.0]])
    two = torch.tensor([[-1.0, -3.0, 6.0, 0.5]])
    # Of one, 2 of 3 entries stay (4, 2); of two, 2 of 4 (-3, 6). Signs: +, -, +, 0.
    assert ties([one, two], 0.5).tolist() == [[4.0, -3.0, 4.0, 0.0]]
    assert ties([torch.tensor([[5.0, 1.0]]), torch.tensor([[-2.0, 1.0]])], 1.0).tolist() == [[5.0, 1.0]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_is_routed_if_its_activation_reaches_the_least_and_else_stays_to_the_bit(architecture):
    lm = tiny_lm(architecture)
    change, prompt = random_change(lm), "Rome lies in"
    projection = lm.anatomy.mlp_out(1)
    before = logits_of(lm, prompt)
    weight = WeightPatch.of(side(lm, change, 1.0).provenance, {projection: Dense(change)})
    with lm.patched(weight):
        expected = logits_of(lm, prompt)
    active = activation_of(lm, change, prompt)
    with lm.patched(side(lm, change, 0.999 * active / 0.88)):
        torch.testing.assert_close(logits_of(lm, prompt), expected, rtol=1e-3, atol=1e-3)
    with lm.patched(side(lm, change, 1.001 * active / 0.88)):
        assert torch.equal(logits_of(lm, prompt), before)
    assert (expected - before).abs().max() > 1e-2


def test_a_target_shown_after_the_prompt_does_not_route():
    lm, change = tiny_lm(), 3 * random_change(tiny_lm())
    text = lm.tokens.encode("Rome lies in", "Peru and Chad and Cuba")
    alone = activation_of(lm, change, "Rome lies in")
    whole = activation_of(lm, change, "Rome lies in Peru and Chad and Cuba")
    assert abs(alone - whole) > 1e-2 * alone
    (plain_guess,) = predict(lm, [text])
    with lm.patched(side(lm, change, 0.0)):
        (changed,) = predict(lm, [text])
    assert changed.logprobs != plain_guess.logprobs
    with lm.patched(side(lm, change, (alone + whole) / 2, ratio=1.0)):
        assert predict(lm, [text]) == [changed if alone > whole else plain_guess]


def test_the_route_is_taken_at_the_prompt_and_kept_in_what_is_written_after():
    lm = tiny_lm()
    change, prompts = 3 * random_change(lm), ["Rome lies in", "Zurich is by a lake"]
    active = [activation_of(lm, change, prompt) for prompt in prompts]
    least = sum(active) / 2 / 0.88
    first = active.index(max(active))
    plain_answers = lm.answer(prompts, max_new=10)
    patch = side(lm, change, least)
    with lm.patched(WeightPatch.of(patch.provenance, {lm.anatomy.mlp_out(1): Dense(change)})):
        changed = lm.answer(prompts, max_new=10)
    assert changed[first] != plain_answers[first]
    expected = [changed[i] if i == first else plain_answers[i] for i in range(2)]
    with lm.patched(patch):
        assert lm.answer(prompts, max_new=10) == expected


def test_of_two_memories_that_a_prompt_reaches_the_more_active_acts():
    lm, prompt = tiny_lm(), "Rome lies in"
    weak, strong = random_change(lm), 3 * random_change(lm, seed=1)
    assert activation_of(lm, weak, prompt) < activation_of(lm, strong, prompt)
    with lm.patched(side(lm, strong, 0.0)):
        expected = logits_of(lm, prompt)
    for order in ((weak, strong), (strong, weak)):
        numbered = [side(lm, change, 0.0, number=i) for i, change in enumerate(order)]
        with lm.patched(*numbered):
            assert torch.equal(logits_of(lm, prompt), expected)


def test_patches_on_one_matrix_sum_in_a_memory_and_the_least_counts():
    lm = tiny_lm()
    one, two = random_change(lm), random_change(lm, seed=1)
    assert memories([side(lm, one, 1.0), side(lm, two, 2.0)])[0].least == 1.0
    both = memories([side(lm, one, 2.0), side(lm, two, 1.0)])
    assert list(both) == [0]
    torch.testing.assert_close(both[0].change.full(), one + two)
    assert (both[0].least, both[0].edits) == (1.0, 2)
    assert list(memories([side(lm, one, 2.0), side(lm, two, 1.0, number=1, merged=True)])) == [1]


def test_only_entries_of_the_mask_change_and_none_by_more_than_the_bound():
    lm = tiny_lm()
    patch = fit(lm, tiny_edits(), lr=50.0, bound=0.3)
    change = patch.added[0].change.full()
    changed = change != 0
    assert 0.1 < changed.float().mean() <= 0.25
    assert change.abs().max() <= 0.3 + 1e-6
    again = fit(lm, tiny_edits()[::-1], lr=50.0, bound=0.3).added[0].change.full() != 0
    assert (changed | again).float().mean() < 0.26, "one mask for one memory"


def test_edits_succeed_and_raise_their_activation():
    lm = tiny_lm()
    edit = tiny_edits()[0]
    before = plain.ft_m_loss(lm.model, lm, [edit]).item()
    patch = fit(lm, [edit], steps=60, lr=5.0, bound=10.0, share=1.0)
    memory = patch.added[0]
    assert memory.least == pytest.approx(activation_of(lm, memory.change.full(), edit.prompt), rel=1e-3)
    ids, n = plain.encode(lm, edit.prompt, edit.target)
    with lm.patched(patch):
        batch = Batch.of([ids[0].tolist()], lm.device, prompts=[n])
        from factpatch.lm.batches import Places
        from factpatch.lm.run import logits_at

        rows = logits_at(lm, batch, Places.of([range(n - 1, ids.shape[1] - 1)], lm.device)).log_softmax(-1)
    after = -rows.gather(1, ids[0, n:, None]).mean().item()
    assert after < 0.6 * before
    assert patch.provenance.notes[0]["last_loss"] < patch.provenance.notes[0]["first_loss"]


def test_a_full_memory_is_followed_by_another_and_they_are_merged_in_time():
    lm = tiny_lm()
    edits = [e.model_copy(update={"id": f"{e.id}{i}"}) for i in range(2) for e in tiny_edits()]
    patch = fit(lm, edits[:3], steps=3, save_every=2)
    assert {n: m.edits for n, m in patch.added.items()} == {0: 2, 1: 1}
    kept = fit(lm, edits, steps=3, save_every=2, merge_every=4, retrieve=True)
    assert not kept.merged
    one, two = (memory.change.full() for memory in kept.added.values())
    assert ((one != 0) & (two != 0)).float().mean() < 0.1, "each memory has a mask of its own"
    merged = fit(lm, edits, steps=3, save_every=2, merge_every=4)
    assert merged.merged
    assert {n: m.edits for n, m in merged.added.items()} == {1: 4}
    torch.testing.assert_close(merged.added[1].change.full(), ties([one, two], 0.53))
    assert merged.added[1].least == min(m.least for m in kept.added.values())


def test_a_sequence_of_patches_does_what_one_batch_does():
    lm, edits = tiny_lm(), tiny_edits()
    batch = fit(lm, edits)
    first = fit(lm, edits[:1])
    with lm.patched(first):
        second = fit(lm, edits[1:])
        assert lm.patches == (first,)
    whole = memories([first, second])
    torch.testing.assert_close(whole[0].change.full(), batch.added[0].change.full(), rtol=1e-4, atol=1e-6)
    with lm.patched(batch):
        expected = logits_of(lm, edits[1].prompt)
    with lm.patched(first, second):
        torch.testing.assert_close(logits_of(lm, edits[1].prompt), expected, rtol=1e-3, atol=1e-3)


def test_what_is_damaged_is_said(tmp_path):
    lm = tiny_lm()
    patch = fit(lm, tiny_edits()[:1], steps=2)
    patch.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").id == patch.id
    with pytest.raises(BadPatch, match="does not fit the tensors"):
        SidePatch.from_parts(patch.provenance, patch.spec(), {})
    with pytest.raises(WrongBase, match="no such matrix"):
        lm.apply(replace(patch, site="nowhere"))


def test_a_corpus_about_the_same_subject_alone_is_refused(tmp_path):
    edit = tiny_edits()[0]
    write_jsonl([edit, edit.model_copy(update={"id": "more", "prompt": "Rome is in"})], tmp_path / "rome.jsonl")
    with pytest.raises(BadConfig, match="no edit about another subject than 'Rome'"):
        fit(tiny_lm(), [edit], corpus=str(tmp_path / "rome.jsonl"))
