"""Weight patches: forms, exact undo, merging, and the folder they are kept in."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from factpatch.errors import BadPatch, OutputError, PatchError, WrongBase
from factpatch.files import sha256_of
from factpatch.lm import LM
from factpatch.patches import Dense, LowRank, Patch, Provenance, WeightPatch, merge
from factpatch.testing import Snapshot, logits_of, tiny_edits, tiny_lm

NAMES = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def make(lm, seed=0, names=NAMES[:1], scale=0.1, dense=False):
    """A random patch."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in names:
        rows, cols = lm.model.get_parameter(name).shape
        low = LowRank(torch.randn(rows, 2, generator=generator) * scale, torch.randn(2, cols, generator=generator))
        deltas[name] = Dense(low.full()) if dense else low
    return WeightPatch(Provenance.of(lm, "random", {"seed": seed}, tiny_edits()), deltas)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_low_rank_is_the_matrix_it_stands_for(rows, cols, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    one, other = (
        LowRank(torch.randn(rows, rank, generator=generator), torch.randn(rank, cols, generator=generator))
        for _ in range(2)
    )
    assert one.shape == one.full().shape
    torch.testing.assert_close(one.T.full(), one.full().T)
    torch.testing.assert_close((one + other).full(), one.full() + other.full())
    assert one.norm() == pytest.approx((one.u.double() @ one.v.double()).norm().item(), rel=1e-6)
    assert Dense(one.full()).norm() == pytest.approx(one.norm(), rel=1e-4, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(NAMES), st.booleans()), min_size=1, max_size=4), st.randoms()
)
def test_a_stack_undone_in_any_order_gives_the_base(made, shuffler):
    lm = tiny_lm()
    before = Snapshot.of(lm)
    patches = [make(lm, seed, [name], dense=dense) for seed, name, dense in made]
    for patch in patches:
        lm.apply(patch)
    assert before.differences(lm)
    order = list(patches)
    shuffler.shuffle(order)
    for patch in order:
        lm.remove(patch)
    assert before.differences(lm) == []


def test_the_weight_is_the_old_one_plus_the_change(lm):
    patch = make(lm)
    old = lm.model.get_parameter(NAMES[0]).detach().clone()
    with lm.patched(patch):
        torch.testing.assert_close(lm.model.get_parameter(NAMES[0]).data, old + patch.deltas[NAMES[0]].full())
    assert torch.equal(lm.model.get_parameter(NAMES[0]), old)


def test_patches_add_up_in_order(lm):
    one, other = make(lm, 1), make(lm, 2)
    old = lm.model.get_parameter(NAMES[0]).detach().clone()
    with lm.patched(one, other):
        expected = (old + one.deltas[NAMES[0]].full()) + other.deltas[NAMES[0]].full()
        assert torch.equal(lm.model.get_parameter(NAMES[0]).data, expected)


def test_bfloat16_undo_is_exact_and_the_fingerprint_fits():
    small = tiny_lm()
    patch = make(small)
    small.model.to(torch.bfloat16)
    half = LM(small.model, small.tokenizer)
    before = Snapshot.of(half)
    with half.patched(patch):
        assert before.differences(half) == [NAMES[0], "patches"]
    assert before.differences(half) == []


def test_a_failing_patch_in_a_stack_takes_the_others_off_again(lm):
    before = Snapshot.of(lm)
    wrong = WeightPatch(make(lm).provenance, {NAMES[0]: Dense(torch.zeros(2, 2))})
    with pytest.raises(WrongBase, match=r"of shape \(2, 2\); tiny-llama has \(32, 48\)"), lm.patched(make(lm), wrong):
        pass
    assert before.differences(lm) == []


def test_an_unknown_parameter_is_refused_before_anything_changes(lm):
    before = Snapshot.of(lm)
    good, bad = make(lm).deltas[NAMES[0]], Dense(torch.zeros(2, 2))
    with pytest.raises(WrongBase, match="no such parameter"):
        lm.apply(WeightPatch(make(lm).provenance, {NAMES[0]: good, "model.nothing": bad}))
    assert before.differences(lm) == []


def test_remembers_what_it_was_fitted_on(lm):
    below = make(lm, 3)
    with lm.patched(below):
        assert make(lm, 4).provenance.fitted_on == (below.id,)


def test_merge_gives_a_plain_checkpoint(lm, tmp_path):
    patches = make(lm, 1), make(lm, 2, NAMES[1:])
    before = Snapshot.of(lm)
    merge(lm, patches, tmp_path / "merged")
    assert before.differences(lm) == []
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with lm.patched(*patches):
        expected = logits_of(lm, "Rome lies in Peru")
    ids = torch.tensor([lm.tokens.encode("Rome lies in Peru").ids])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits[0], expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_merge_refuses_what_is_no_change_of_weights(lm, tmp_path):
    class Other(WeightPatch):
        kind = "other"

    class Beside(Patch):
        kind = "beside"
        attach = tensors = from_parts = changes = None
        id = "x"

    Beside.__abstractmethods__ = frozenset()
    with pytest.raises(PatchError, match="is not a change of weights and cannot be merged"):
        merge(lm, [Beside(make(lm).provenance)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dense", [False, True])
def test_save_then_load(lm, tmp_path, dense):
    patch = make(lm, names=NAMES, dense=dense).with_scorecard({"good": True})
    loaded = Patch.load(patch.save(tmp_path / "patch"))
    assert loaded.id == patch.id
    assert loaded.provenance == patch.provenance
    assert loaded.describe() == json.loads(json.dumps(patch.describe()))
    for name, tensor in patch.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)


def test_saving_over_something_is_refused(lm, tmp_path):
    make(lm).save(tmp_path / "patch")
    with pytest.raises(OutputError, match="already there, and it is not overwritten"):
        make(lm, 1).save(tmp_path / "patch")
    assert Patch.load(tmp_path / "patch").id == make(lm).id


def test_a_crash_while_saving_leaves_nothing(lm, tmp_path, monkeypatch):
    def crash(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("factpatch.patches.folder.sha256_of", crash)
    with pytest.raises(KeyboardInterrupt):
        make(lm).save(tmp_path / "patch")
    assert list(tmp_path.iterdir()) == []


def rewrite(folder, change=lambda d: None, tensors=None):
    """Change a saved patch, keeping its checksums right where they are not the point."""
    described = json.loads((folder / "patch.json").read_text())
    if tensors is not None:
        save_file(tensors, folder / "patch.safetensors")
        described["tensors_sha256"] = sha256_of(folder / "patch.safetensors")
    change(described)
    (folder / "patch.json").write_text(json.dumps(described))


def test_damaged_folders_are_refused_by_name(lm, tmp_path):
    def fresh(name):
        return make(lm).save(tmp_path / name)

    folder = fresh("cut")
    data = (folder / "patch.safetensors").read_bytes()
    (folder / "patch.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadPatch, match=r"damaged, or not the file that patch.json was written with"):
        Patch.load(folder)

    folder = fresh("gone")
    (folder / "patch.safetensors").unlink()
    with pytest.raises(BadPatch, match=r"patch\.safetensors: missing"):
        Patch.load(folder)

    folder = fresh("nan")
    rewrite(folder, tensors={name: t * float("nan") for name, t in load_file(folder / "patch.safetensors").items()})
    with pytest.raises(BadPatch, match="values that are not finite"):
        Patch.load(folder)

    folder = fresh("shapes")
    rewrite(folder, tensors={f"{NAMES[0]}.u": torch.zeros(3, 2), f"{NAMES[0]}.v": torch.zeros(4, 3)})
    with pytest.raises(BadPatch, match=r"expected u \(rows, rank\) with v \(rank, cols\), or dense"):
        Patch.load(folder)

    folder = fresh("tampered")
    rewrite(folder, lambda d: d.update(base_fingerprint="0" * 64))
    with pytest.raises(BadPatch, match="was changed after it was written"):
        Patch.load(folder)

    folder = fresh("newer")
    rewrite(folder, lambda d: d.update(format=99))
    with pytest.raises(BadPatch, match="written in another format than 1"):
        Patch.load(folder)

    folder = fresh("kind")
    rewrite(folder, lambda d: d.update(kind="spell"))
    with pytest.raises(BadPatch, match="an unknown kind of patch"):
        Patch.load(folder)

    folder = fresh("field")
    rewrite(folder, lambda d: d.pop("base_name"))
    with pytest.raises(BadPatch, match='"base_name": expected a value, found nothing'):
        Patch.load(folder)

    folder = fresh("list")
    (folder / "patch.json").write_text("[1]")
    with pytest.raises(BadPatch, match="expected an object"):
        Patch.load(folder)


def test_state_is_kept_and_changes_nothing(lm, tmp_path):
    patch = make(lm)
    keys = torch.arange(6.0).reshape(2, 3)
    stateful = WeightPatch(patch.provenance, patch.deltas, {"keys of a.b": keys})
    loaded = Patch.load(stateful.save(tmp_path / "patch"))
    assert torch.equal(loaded.state["keys of a.b"], keys)
    assert stateful.id != patch.id
    with lm.patched(patch):
        expected = logits_of(lm, "Rome")
    with lm.patched(loaded):
        assert torch.equal(logits_of(lm, "Rome"), expected)


def test_a_change_is_kept_in_its_smaller_form_and_turned_as_the_weight_is_stored():
    for architecture in ("llama", "gpt2"):
        lm = tiny_lm(architecture)
        projection = lm.anatomy.mlp_out(1)
        provenance = Provenance.of(lm, "random", {}, tiny_edits())
        generator = torch.Generator().manual_seed(0)
        for rank, form in ((3, LowRank), (40, Dense)):
            low = LowRank(torch.randn(32, rank, generator=generator), torch.randn(rank, 48, generator=generator))
            for change in (low, Dense(low.full())):
                patch = WeightPatch.of(provenance, {projection: change})
                (delta,) = patch.deltas.values()
                assert isinstance(delta, form if change is low else Dense)
                before = projection.matrix.clone()
                with lm.patched(patch):
                    torch.testing.assert_close(projection.matrix, before + low.full())


def test_the_id_does_not_hang_on_names_versions_or_scores(lm):
    patch = make(lm)
    other = patch.provenance.model_copy(update={"base_name": "else", "versions": {}, "scorecard": {"x": 1}})
    assert WeightPatch(other, patch.deltas).id == patch.id
    for field, value in (("config", {"seed": 7}), ("method", "else"), ("edits", tiny_edits()[:1])):
        other = patch.provenance.model_copy(update={field: value})
        assert WeightPatch(other, patch.deltas).id != patch.id


def test_a_patch_takes_the_place_of_a_patch_and_of_nothing_else(lm, tmp_path):
    old, new = make(lm, 0), make(lm, 1)
    folder = old.save(tmp_path / "patch")
    with pytest.raises(OutputError, match="already there"):
        new.save(folder)
    assert Patch.load(new.save(folder, replace=True)).id == new.id
    assert new.save(tmp_path / "fresh", replace=True).is_dir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError, match="already there"):
        new.save(tmp_path / "mine", replace=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_tensors_that_share_memory_are_saved(lm, tmp_path):
    whole = torch.randn(4, 48)
    names = NAMES[:2]
    u = torch.randn(32, 2)
    patch = WeightPatch(
        make(lm).provenance, {name: LowRank(u, whole[2 * i : 2 * i + 2]) for i, name in enumerate(names)}
    )
    assert Patch.load(patch.save(tmp_path / "patch")).id == patch.id


def test_what_lies_on_the_model_is_merged_too_and_refused_if_it_is_no_change_of_weights(lm, tmp_path):
    class Other:
        id = "other"

        def attach(self, _):
            return lambda: None

    with lm.patched(Other()), pytest.raises(PatchError, match="patch other is not a change of weights"):
        merge(lm, [make(lm)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [True, False])
def test_a_changed_weight_is_the_sum_in_float32_rounded_once(kind, dense):
    model = tiny_lm()
    model.model.to(kind)
    patch = make(model, dense=dense)
    ((name, delta),) = patch.deltas.items()
    weight = model.model.get_parameter(name).detach().clone()
    kept = delta.full().clone()
    with model.patched(patch):
        assert torch.equal(model.model.get_parameter(name), (weight.float() + kept).to(kind))
    assert torch.equal(delta.full(), kept)
    assert torch.equal(model.model.get_parameter(name), weight)
