"""GRACE's codebook, rule by rule, and where its entries act."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factpatch.edits import Edit
from factpatch.errors import BadPatch, WrongBase
from factpatch.lm.batches import Batch
from factpatch.lm.predictions import predict
from factpatch.lm.run import input_of
from factpatch.lm.writing import generate
from factpatch.methods import create
from factpatch.patches import Patch, Provenance
from factpatch.patches.codebook import UNMOVED, CodebookPatch, nearest, radii
from factpatch.testing import Snapshot, logits_of, tiny_edits, tiny_lm

LAYER = {"layer": 1}
SITE = "model.layers.1.mlp.down_proj"


def edit(prompt, target, name=None):
    return Edit(id=name or prompt, prompt=prompt, target=target)


def key_of(lm, prompt):
    """What the module reads at a prompt's last token, straight from the model."""
    ids = lm.tokens.encode(prompt).ids
    return input_of(lm, lm.anatomy.mlp_out(1).module, Batch.of([ids], lm.device))[0, -1]


def distance(lm, one, other):
    return float((key_of(lm, one) - key_of(lm, other)).norm())


def fit(lm, edits, radius=0.3, **more):
    return create("grace", LAYER | {"radius": radius, "steps": 30, **more}).fit(lm, edits)


@pytest.fixture
def lm():
    return tiny_lm()


A, B = "Rome lies in", "Rome lies on"


def test_an_edit_adds_its_key_and_a_value_that_says_the_target(lm):
    (first, _) = tiny_edits()
    patch = fit(lm, [first], steps=300)
    assert patch.labels == ("Peru",)
    torch.testing.assert_close(patch.keys[0], key_of(lm, first.prompt))
    (text,) = lm.encode([first.prompt], ["Peru"])
    (before,) = predict(lm, [text])
    with lm.patched(patch):
        (after,) = predict(lm, [text])
    assert after.logprobs[0] > before.logprobs[0] + 1
    (note,) = patch.provenance.notes
    assert note["codebook"] == "added"
    assert note["last_loss"] < note["first_loss"]


def test_what_is_far_stays_to_the_bit(lm):
    patch = fit(lm, [edit(A, "Peru")], radius=1e-4)
    before = logits_of(lm, "A quite different text")
    with lm.patched(patch):
        assert torch.equal(logits_of(lm, "A quite different text"), before)
        assert not torch.equal(logits_of(lm, A), logits_of(tiny_lm(), A))


def test_far_queries_are_added(lm):
    patch = fit(lm, [edit(A, "Peru"), edit("Who is Ann Lee?", "a pilot")], radius=1e-4)
    assert patch.labels == ("Peru", "a pilot")
    assert torch.allclose(patch.radii, patch.radii[:1].expand(2))


def test_a_near_query_of_another_target_splits_the_distance(lm):
    patch = fit(lm, [edit(A, "Peru"), edit(B, "Chad")], radius=50.0)
    d = distance(lm, A, B)
    torch.testing.assert_close(patch.radii, torch.tensor([d / 2 - 1e-5, d / 2]), rtol=1e-4, atol=1e-5)
    assert [note["codebook"] for note in patch.provenance.notes] == ["added", "split"]
    with lm.patched(patch):
        assert not torch.equal(logits_of(lm, A)[-1], logits_of(lm, B)[-1])


def test_a_prompt_edited_again_is_as_if_it_had_been_edited_so_alone(lm):
    peru, chad = edit(A, "Peru", "first"), edit(A, "Chad", "second")
    lower = fit(lm, [peru])
    with lm.patched(lower):
        upper, says_peru = fit(lm, [chad]), logits_of(lm, A)
    with lm.patched(fit(lm, [chad])):
        says_chad = logits_of(lm, A)
    assert not torch.equal(says_chad, says_peru)
    batch = fit(lm, [peru, chad])
    assert [note["codebook"] for note in batch.provenance.notes] == ["added", "replaced"]
    assert batch.radii[1] == lower.radii[0]
    with lm.patched(batch):
        assert torch.equal(logits_of(lm, A), says_chad)
    with lm.patched(lower, upper):
        assert torch.equal(logits_of(lm, A), says_chad)
        lm.remove(upper)
        assert torch.equal(logits_of(lm, A), says_peru)


def test_of_three_edits_of_one_prompt_the_last_holds_whichever_is_taken_out(lm):
    stack = []
    for number, target in enumerate(("Peru", "Chad", "Mali")):
        with lm.patched(*stack):
            stack.append(fit(lm, [edit(A, target, str(number))]))
    with lm.patched(*stack):
        says_mali = logits_of(lm, A)
        lm.remove(stack[1])
        assert torch.equal(logits_of(lm, A), says_mali)


def test_a_near_query_of_the_same_target_widens(lm):
    alone = fit(lm, [edit(A, "Peru")], radius=0.001)
    d = distance(lm, A, B)
    reach = float(alone.radii)
    ratio = d / reach  # so wide that the two just reach each other
    patch = fit(lm, [edit(A, "Peru"), edit(B, "Peru")], radius=0.001 * ratio * 0.6)
    assert patch.labels == ("Peru",)
    torch.testing.assert_close(patch.radii, torch.tensor([d]), rtol=1e-4, atol=1e-6)
    assert [note["codebook"] for note in patch.provenance.notes] == ["added", "widened"]


def test_in_a_sequence_the_later_patch_moves_the_earlier_ones_radius_while_it_lies_there(lm):
    lower = fit(lm, [edit(A, "Peru")], radius=50.0)
    with lm.patched(lower):
        upper = fit(lm, [edit(B, "Chad")], radius=50.0)
    batch = fit(lm, [edit(A, "Peru"), edit(B, "Chad")], radius=50.0)
    torch.testing.assert_close(radii([lower, upper]), batch.radii)
    assert len(upper.keys) == 1
    before = Snapshot.of(lm)
    lm.apply(lower)
    alone = logits_of(lm, B)
    lm.apply(upper)
    with lm.patched():
        both = logits_of(lm, B)
    assert not torch.equal(alone, both)
    lm.remove(upper)
    assert torch.equal(logits_of(lm, B), alone), "its radius is as it was"
    lm.remove(lower)
    assert before.differences(lm) == []


def test_an_earlier_entry_can_be_widened_by_a_patch_with_no_entry_of_its_own(lm):
    lower = fit(lm, [edit(A, "Peru")], radius=50.0)
    with lm.patched(lower):
        upper = fit(lm, [edit(B, "Peru")], radius=50.0)
    assert len(upper.keys) == 0
    assert upper.moved[lower.id][0] >= lower.radii[0]


def book(lm, keys, values, radii_, moved=None):
    provenance = Provenance.of(lm, "grace", {}, tiny_edits())
    return CodebookPatch(
        provenance,
        SITE,
        torch.tensor(keys),
        torch.tensor(radii_),
        ("x",) * len(keys),
        values=torch.tensor(values),
        moved=moved or {},
    )


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 5))
def test_the_nearest_entry_of_all_books_counts(seed, n, m):
    lm = tiny_lm()
    generator = torch.Generator().manual_seed(seed)
    keys, queries = torch.randn(n + m, 3, generator=generator), torch.randn(7, 3, generator=generator)
    reach = torch.rand(n + m, generator=generator) * 2
    books = [
        book(lm, keys[part].tolist(), [[0.0]] * len(keys[part]), reach[part].tolist())
        for part in (slice(0, n), slice(n, n + m))
    ]
    found = nearest(queries, books)
    for query, entry, d, within in zip(queries, found.entry, found.distance, found.within, strict=True):
        distances = [(float((query - key).norm()), i) for i, key in enumerate(keys)]
        assert float(d) == pytest.approx(min(distances)[0], rel=1e-4)
        assert float((query - keys[entry]).norm()) == pytest.approx(min(distances)[0], rel=1e-4)
        assert bool(within) == (float(d) <= float(reach[entry]))


def test_radii_are_those_the_uppermost_book_leaves():
    lm = tiny_lm()
    lower = book(lm, [[0.0], [1.0]], [[0.0]] * 2, [1.0, 2.0])
    middle = book(lm, [[2.0]], [[0.0]], [3.0], {lower.id: torch.tensor([5.0, UNMOVED])})
    upper = book(lm, [[3.0]], [[0.0]], [4.0], {lower.id: torch.tensor([UNMOVED, 6.0]), middle.id: torch.tensor([7.0])})
    assert radii([lower]).tolist() == [1, 2]
    assert radii([lower, middle]).tolist() == [5, 2, 3]
    assert radii([lower, middle, upper]).tolist() == [5, 6, 7, 4]
    assert radii([lower, upper]).tolist() == [1, 6, 4], "a patch that is gone moves nothing"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon", "bloom"])
def test_the_value_stands_at_the_prompts_last_token_in_every_row(architecture):
    lm = tiny_lm(architecture)
    patch = fit(lm, [edit(A, "Peru")], radius=1e-3)
    texts = lm.encode([A, "Something else that is longer", A], ["Peru", "x", "a longer target"])
    alone = []
    with lm.patched(patch):
        for text in texts:
            alone += predict(lm, [text])
        batched = predict(lm, texts)
    bare = predict(lm, texts)
    for i, (one, other) in enumerate(zip(alone, batched, strict=True)):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert (other.logprobs == pytest.approx(bare[i].logprobs, abs=1e-6)) == (i == 1)


def test_it_acts_while_the_model_writes(lm):
    first = tiny_edits()[0]
    patch = fit(lm, [first], radius=1e-3, steps=300)
    prompts = [lm.tokens.encode(text).ids for text in (first.prompt, "Something else, and longer than that")]
    before = generate(lm, prompts, max_new=4)
    with lm.patched(patch):
        after = generate(lm, prompts, max_new=4)
        assert after == [generate(lm, [prompt], max_new=4)[0] for prompt in prompts]
    assert after[0] != before[0]
    assert after[0][0] == lm.tokens.encode(first.prompt, "Peru").target_ids[0]
    assert after[1] == before[1]


def test_called_from_elsewhere_the_last_token_is_the_prompts_end(lm):
    patch = fit(lm, [edit(A, "Peru")], radius=1e-3)
    ids = torch.tensor([lm.tokens.encode(A).ids])
    with lm.patched(patch), torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits[0], logits_of(lm, A))


def test_save_then_load_and_damage(lm, tmp_path):
    lower = fit(lm, [edit(A, "Peru")], radius=50.0)
    with lm.patched(lower):
        upper = fit(lm, [edit(B, "Chad")], radius=50.0)
    loaded = Patch.load(upper.save(tmp_path / "patch"))
    assert (loaded.id, loaded.site, loaded.labels) == (upper.id, SITE, ("Chad",))
    assert torch.equal(loaded.moved[lower.id], upper.moved[lower.id])
    with pytest.raises(BadPatch, match="as many keys, values and radii"):
        CodebookPatch.from_parts(upper.provenance, {"site": SITE, "labels": []}, upper.tensors())
    stray = CodebookPatch.from_parts(upper.provenance, {"site": "no.where", "labels": ["Chad"]}, upper.tensors())
    with pytest.raises(WrongBase, match=r"belongs to no\.where"):
        lm.apply(stray)


def test_a_cold_start_is_seeded(lm):
    one, same, other = (fit(lm, [edit(A, "Peru")], start="cold", seed=seed) for seed in (0, 0, 1))
    assert one.id == same.id
    assert not torch.equal(one.values, other.values)
