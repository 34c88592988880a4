"""MELO: clusters by GRACE's rules, a slice for each, and nothing else changed."""

import pytest
import torch

from factpatch.edits import Edit
from factpatch.errors import BadConfig, BadPatch
from factpatch.lm.batches import Batch, Places
from factpatch.lm.run import logits_at
from factpatch.methods import create
from factpatch.methods.placing import spacing
from factpatch.patches import Patch, WeightPatch
from factpatch.patches.delta import LowRank
from factpatch.patches.slices import SlicePatch
from factpatch.testing import ARCHITECTURES, logits_of, tiny_edits, tiny_lm
from tests.reference import plain

QUICK = {"layer": 0, "layers": (1, 2), "steps": 30, "lr": 0.1}
ROME, ANN = tiny_edits()


def fit(lm, edits, **more):
    return create("melo", QUICK | more).fit(lm, edits)


@pytest.mark.parametrize(
    ("places", "said"), [({"layer": 2}, "above block 2, the last"), ({"layers": (0, 1)}, "block 0")]
)
def test_slices_stand_above_what_turns_them_on(places, said):
    lm = tiny_lm()
    assert lm.anatomy.n_layers == 3
    with pytest.raises(BadConfig, match=said):
        create("melo", {"layer": 0, "steps": 1} | places).fit(lm, [ROME])


def distance(lm, one, other):
    """Between the keys of two prompts."""
    module = lm.anatomy.mlp_out(0).module
    keys = []
    for prompt in (one, other):
        handle = module.register_forward_pre_hook(
            lambda _, args: keys.append(args[0].reshape(-1, args[0].shape[-1])[-1])
        )
        with torch.no_grad():
            lm.model(torch.tensor([lm.tokens.encode(prompt, "x").prompt_ids]))
        handle.remove()
    return float((keys[0] - keys[1]).norm())


def nll(lm, edit):
    """Under the patches that lie on the model, the prompt being known as the prompt."""
    ids, n = plain.encode(lm, edit.prompt, edit.target)
    batch = Batch.of([ids[0].tolist()], lm.device, prompts=[n])
    with torch.no_grad():
        rows = logits_at(lm, batch, Places.of([range(n - 1, ids.shape[1] - 1)], lm.device)).log_softmax(-1)
    return -rows.gather(1, ids[0, n:, None]).mean().item()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_new_clusters_radius_is_in_units_of_the_usual_distance_between_keys(seed):
    lm = tiny_lm(seed=seed)
    unit = spacing(lm, lm.anatomy.mlp_out(0), seed=0)
    assert fit(lm, [ROME], radius=0.7).radii.item() == pytest.approx(0.7 * unit, rel=1e-5)
    assert abs(unit - 1) > 0.05


def test_clusters_are_added_split_and_widened():
    lm = tiny_lm()
    near = Edit(id="near", prompt="Rome lies on", target="Peru")
    d = distance(lm, ROME.prompt, near.prompt)
    unit = fit(lm, [ROME], radius=1.0).radii.item()
    wide, narrow = 1.1 * d / unit, 0.4 * d / unit
    assert [n["codebook"] for n in fit(lm, [ROME, near], radius=narrow).provenance.notes] == ["added", "added"]
    widened = fit(lm, [ROME, near], radius=0.6 * d / unit)
    assert [n["codebook"] for n in widened.provenance.notes] == ["added", "widened"]
    assert len(widened.keys) == 1
    assert widened.radii.item() == pytest.approx(max(0.6 * d, d), rel=1e-3)
    split = fit(lm, [ROME, near.model_copy(update={"target": "Chad"})], radius=wide)
    assert [n["codebook"] for n in split.provenance.notes] == ["added", "split"]
    assert split.radii.tolist() == pytest.approx([d / 2 - 1e-5, d / 2], rel=1e-3)


def test_a_prompt_edited_again_says_the_later_target():
    lm = tiny_lm()
    again = ROME.model_copy(update={"id": "again", "target": "Chad"})
    patch = fit(lm, [ROME, again])
    assert [n["codebook"] for n in patch.provenance.notes] == ["added", "replaced"]
    with lm.patched(fit(lm, [again])):
        alone = nll(lm, again)
    with lm.patched(patch):
        assert nll(lm, again) == pytest.approx(alone, abs=1e-4)
        assert nll(lm, again) < nll(lm, ROME)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_near_to_a_key_the_slices_act_as_a_change_of_the_weights_and_elsewhere_nothing_does(architecture):
    lm = tiny_lm(architecture)
    patch = fit(lm, [ROME], radius=0.01)
    other = "Zurich is by a lake"
    before = logits_of(lm, other)
    changes = {
        lm.anatomy.mlp_out(layer): LowRank(s.u[0], s.v[0])
        for layer, s in zip((1, 2), patch.slices.values(), strict=True)
    }
    with lm.patched(WeightPatch.of(patch.provenance, changes)):
        expected, loss = logits_of(lm, ROME.prompt), nll(lm, ROME)
        answer = lm.answer([ROME.prompt], max_new=8)
    with lm.patched(patch):
        assert torch.equal(logits_of(lm, other), before)
        torch.testing.assert_close(logits_of(lm, ROME.prompt), expected, rtol=1e-3, atol=1e-3)
        assert nll(lm, ROME) == pytest.approx(loss, abs=1e-3)
        assert lm.answer([ROME.prompt, other], max_new=8)[0] == answer[0]
    assert loss < 0.6 * nll(lm, ROME)


def test_each_prompt_of_a_batch_has_the_slice_of_its_own_cluster():
    lm = tiny_lm()
    patch = fit(lm, [ROME, ANN], radius=0.01)
    prompts = [ROME.prompt, "Zurich is by a lake", ANN.prompt]
    with lm.patched(patch):
        together = lm.answer(prompts, max_new=8)
        assert together == [lm.answer([prompt], max_new=8)[0] for prompt in prompts]
        edited = [nll(lm, ROME), nll(lm, ANN)]
    assert together[1] == lm.answer([prompts[1]], max_new=8)[0]
    assert edited[0] < 0.6 * nll(lm, ROME)
    assert edited[1] < 0.6 * nll(lm, ANN)


def test_a_sequence_of_patches_does_what_one_batch_does():
    lm = tiny_lm()
    batch, first = fit(lm, [ROME, ANN], radius=0.01), fit(lm, [ROME], radius=0.01)
    with lm.patched(first):
        second = fit(lm, [ANN], radius=0.01)
    for edit in (ROME, ANN):
        with lm.patched(batch):
            expected = logits_of(lm, edit.prompt)
        with lm.patched(first, second):
            assert torch.equal(logits_of(lm, edit.prompt), expected)
    with lm.patched(first, second):
        lm.remove(first)
        assert torch.equal(logits_of(lm, ANN.prompt), expected)


def test_patches_with_slices_in_different_places_and_of_different_ranks_lie_on_one_model():
    lm = tiny_lm()
    first = fit(lm, [ROME], radius=0.01, layers=(1,), rank=3)
    with lm.patched(first):
        second = fit(lm, [ANN], radius=0.01, layers=(2,))
        third = fit(lm, [Edit(id="bo", prompt="Bo is", target="a cook")], radius=0.01, layers=(1, 2), rank=1)
    alone = {}
    for patch, prompt in ((first, ROME.prompt), (second, ANN.prompt), (third, "Bo is")):
        with lm.patched(patch):
            alone[prompt] = logits_of(lm, prompt)
    with lm.patched(first, second, third):
        for prompt, logits in alone.items():
            torch.testing.assert_close(logits_of(lm, prompt), logits, rtol=1e-4, atol=1e-4)


def test_slices_below_the_key_are_refused():
    with pytest.raises(BadConfig, match="slices at block 0, whose keys are read at block 1"):
        create("melo", {"layer": 1, "layers": (0, 2)}).fit(tiny_lm(), [ROME])


def test_saved_and_damaged(tmp_path):
    lm = tiny_lm()
    patch = fit(lm, [ROME, ANN], steps=2)
    patch.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").id == patch.id
    name, slices = next(iter(patch.slices.items()))
    with pytest.raises(BadPatch, match="as many keys, radii, "):
        SlicePatch.from_parts(patch.provenance, patch.spec(), patch.tensors() | {"keys": patch.keys[:1]})
    with pytest.raises(BadPatch, match="cannot be multiplied"):
        SlicePatch.from_parts(patch.provenance, patch.spec(), patch.tensors() | {f"{name}.v": slices.v[:, :1]})
