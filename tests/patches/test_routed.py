"""Routed patches: what is in scope goes to the second model, row by row; the rest stays to the bit."""

from dataclasses import replace

import pytest
import torch

from factpatch.errors import BadPatch, WrongBase
from factpatch.lm.encoder import sentence_encoder
from factpatch.lm.predictions import predict
from factpatch.patches import LowRank, Patch, Provenance, WeightPatch
from factpatch.patches.context import ContextPatch, Note, Recall
from factpatch.patches.routed import RoutedPatch, Scope
from factpatch.testing import ARCHITECTURES, logits_of, tiny_edits, tiny_lm

WIDTH = sentence_encoder("words").embed(["a"]).shape[1]


def by_overlap(bias):
    """A scope that is the cosine of the two vectors, times ten, plus a bias."""
    hidden = torch.zeros(1, 2 * WIDTH)
    hidden[0, :WIDTH] = 1.0
    return Scope(hidden, torch.zeros(1), torch.tensor([10.0]), torch.tensor(bias))


def routed(lm, *edits, bias=-5.0, strength=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for projection in lm.anatomy.queries_and_values(1):
        out, width = projection.matrix.shape
        u, v = (torch.randn(shape, generator=generator) for shape in ((out, 2), (2, width)))
        adapter[projection.parameter.removesuffix(".weight")] = LowRank(strength * u, v)
    notes = tuple(Note(text=f"New Fact: {e.prompt} {e.target}\n", topic=e.prompt) for e in edits)
    recall = Recall(encoder="words", threshold=0.5, most=1)
    provenance = Provenance.of(lm, "test", {}, edits)
    return RoutedPatch(provenance, notes, "Prompt: ", recall, scope=by_overlap(bias), adapter=adapter)


def as_weights(lm, patch):
    """The adapter as a change of the weights themselves."""
    deltas = {}
    for projection in lm.anatomy.queries_and_values(1):
        change = patch.adapter[projection.parameter.removesuffix(".weight")]
        deltas[projection.parameter] = change.T if projection.transposed else change
    return WeightPatch(patch.provenance, deltas)


def test_the_scope_is_a_small_network_of_product_and_distance():
    generator = torch.Generator().manual_seed(0)
    hidden, bias, out = (torch.randn(*shape, generator=generator) for shape in ((3, 8), (3,), (3,)))
    edits, questions = (torch.randn(2, 4, generator=generator) for _ in range(2))
    found = Scope(hidden, bias, out, torch.tensor(0.7)).logits(edits, questions)
    for e, q, logit in zip(edits, questions, found, strict=True):
        pair = [a * b for a, b in zip(e, q, strict=True)] + [abs(a - b) for a, b in zip(e, q, strict=True)]
        units = [
            max(0.0, sum(w * p for w, p in zip(row, pair, strict=True)) + b)
            for row, b in zip(hidden, bias, strict=True)
        ]
        assert logit.item() == pytest.approx(float(sum(o * u for o, u in zip(out, units, strict=True)) + 0.7), rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_scope_the_second_model_answers_and_beyond_it_the_base_to_the_bit(architecture):
    lm = tiny_lm(architecture)
    edit = tiny_edits()[0]
    patch = routed(lm, edit)
    other = "Zurich is by a lake"
    plain = logits_of(lm, other)
    with lm.patched(ContextPatch(patch.provenance, patch.notes, patch.asking), as_weights(lm, patch)):
        expected = logits_of(lm, edit.prompt)
    with lm.patched(patch):
        assert torch.equal(logits_of(lm, other), plain)
        found = logits_of(lm, edit.prompt)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with lm.patched(replace(patch, adapter={})):
        assert (logits_of(lm, edit.prompt) - expected).abs().max() > 1e-2, "the adapter does something"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
def test_one_batch_holds_rows_of_both_models(architecture):
    lm = tiny_lm(architecture)
    edit = tiny_edits()[0]
    prompts, targets = [edit.prompt, "Zurich is by", "Rome lies in a"], ["Peru", "a lake", "land"]
    with lm.patched(routed(lm, edit)):
        together = predict(lm, lm.encode(prompts, targets))
        alone = [predict(lm, lm.encode([p], [t]))[0] for p, t in zip(prompts, targets, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_what_is_written_after_the_prompt_comes_from_the_same_model():
    lm = tiny_lm()
    edit = tiny_edits()[0]
    patch = routed(lm, edit, strength=2.0)
    prompts = [edit.prompt, "Zurich is by a lake", "Rome lies in the"]
    plain = lm.answer(prompts, max_new=12)
    with lm.patched(ContextPatch(patch.provenance, patch.notes, patch.asking), as_weights(lm, patch)):
        second = lm.answer(prompts, max_new=12)
    assert plain[0] != second[0]
    with lm.patched(patch):
        assert lm.answer(prompts, max_new=12) == [second[0], plain[1], second[2]]


def test_patches_of_one_editor_act_as_one():
    lm = tiny_lm()
    rome, ann = tiny_edits()
    first, second, both = routed(lm, rome), routed(lm, ann), routed(lm, rome, ann)
    prompts = [rome.prompt, ann.prompt, "Zurich is by a lake"]
    with lm.patched(both):
        expected = [logits_of(lm, prompt) for prompt in prompts]
    with lm.patched(first, second):
        for prompt, logits in zip(prompts, expected, strict=True):
            assert torch.equal(logits_of(lm, prompt), logits)
        lm.remove(first)
        assert torch.equal(logits_of(lm, ann.prompt), expected[1])
        lm.remove(second)
    assert not lm.contexts
    wide = [routed(lm, edit, bias=5.0) for edit in (rome, ann)]
    bolder = replace(wide[1], recall=Recall(encoder="words", threshold=0.1, most=1))
    with lm.patched(wide[0], bolder):
        (text,) = lm.before([rome.prompt]).values()
        assert text.count("New Fact") == 1, "they act once, whatever their thresholds"
    with lm.patched(first, routed(lm, ann, seed=1)):
        assert torch.equal(logits_of(lm, rome.prompt), expected[0]), "another editor's patch does not act here"


def test_the_model_called_by_itself_is_routed_by_what_its_text_holds():
    lm = tiny_lm()
    edit = tiny_edits()[0]
    patch = routed(lm, edit)
    (asked,) = (lm.tokens.encode(edit.prompt, prefix=patch.notes[0].text + patch.asking).ids,)
    ids = torch.tensor([asked])
    with torch.no_grad():
        plain = lm.model(ids).logits
        with lm.patched(as_weights(lm, patch)):
            changed = lm.model(ids).logits
        with lm.patched(patch):
            torch.testing.assert_close(lm.model(ids).logits, changed, rtol=1e-3, atol=1e-3)
            unrelated = torch.tensor([lm.tokens.encode("Zurich").ids])
            routed_there = lm.model(unrelated).logits
        assert torch.equal(lm.model(unrelated).logits, routed_there)
        assert torch.equal(lm.model(ids).logits, plain)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    lm = tiny_lm()
    patch = routed(lm, *tiny_edits())
    patch.save(tmp_path / "p")
    again = Patch.load(tmp_path / "p")
    assert isinstance(again, RoutedPatch)
    assert again.id == patch.id
    with lm.patched(patch):
        expected = logits_of(lm, "Rome lies in")
    with lm.patched(again):
        assert torch.equal(logits_of(lm, "Rome lies in"), expected)
    assert "up to 1 of 2 notes" in patch.changes()[0]["form"]


def test_missing_tensors_and_modules_are_said():
    lm = tiny_lm()
    patch = routed(lm, tiny_edits()[0])
    short = {name: t for name, t in patch.tensors().items() if name != "scope:out"}
    with pytest.raises(BadPatch, match=r"'scope:out' is missing"):
        RoutedPatch.from_parts(patch.provenance, patch.spec(), short)
    lost = replace(patch, adapter={"nowhere": next(iter(patch.adapter.values()))})
    with pytest.raises(WrongBase, match="no such module"):
        lm.apply(lost)
    assert not lm.contexts
    assert not lm.model._forward_pre_hooks
