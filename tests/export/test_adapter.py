"""Adapters: base and adapter give what the patched model gives, whatever the architecture, and what cannot be is refused."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from factpatch.errors import PatchError
from factpatch.export import export_adapter, folder_of, how_to_load, hub_id, to_adapter, verify_adapter
from factpatch.export.adapter import _factors
from factpatch.lm import load
from factpatch.methods import create
from factpatch.patches import Dense, LowRank, Provenance, WeightPatch
from factpatch.testing import ARCHITECTURES, Snapshot, logits_of, tiny_edits, tiny_lm

peft = pytest.importorskip("peft")


def patch_of(lm, changes):
    return WeightPatch(Provenance.of(lm, "made", {}, tiny_edits()), changes)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def with_adapter(lm, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(copy.deepcopy(lm.model), str(folder))
    return model.base_model.model


def logits(model, lm, text="Rome lies in"):
    ids = torch.tensor([lm.tokens.encode(text).ids])
    with torch.no_grad():
        return model(ids).logits[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_base_and_adapter_are_the_patched_model(architecture, tmp_path):
    lm = tiny_lm(architecture)
    before = Snapshot.of(lm)
    patches = [
        create("ft-m", {"steps": "3", "layer": "1", "lr": "1e-2"}).fit(lm, tiny_edits()),
        create("rome", {"steps": "3", "layer": "1", "contexts": "0", "covariance": "false"}).fit(lm, tiny_edits()[:1]),
    ]
    folder, told = export_adapter(lm, patches, tmp_path / "a")
    assert before.differences(lm) == []
    assert all(each.error == pytest.approx(0, abs=1e-5) for each in told)
    with lm.patched(*patches):
        expected = logits(lm.model, lm)
    found = logits(with_adapter(lm, folder), lm)
    assert not torch.allclose(expected, logits(lm.model, lm), atol=1e-3), "the patches do something"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_patches_that_touch_one_matrix_are_added_at_the_rank_of_their_sum():
    lm = tiny_lm()
    name = lm.anatomy.mlp_out(1).parameter
    rows, cols = lm.model.get_parameter(name).shape
    shared = normal(1, cols, seed=9)
    one, other = (patch_of(lm, {name: LowRank(normal(rows, 1, seed=i), shared)}) for i in (1, 2))
    config, tensors, (told,) = to_adapter(lm, [one, other])
    assert (told.rank, told.kept, told.error) == (1, 1, 0.0)
    assert config["r"] == 1
    made = (
        tensors[f"base_model.model.{name.removesuffix('weight')}lora_B.weight"]
        @ tensors[f"base_model.model.{name.removesuffix('weight')}lora_A.weight"]
    )
    torch.testing.assert_close(made, one.deltas[name].full() + other.deltas[name].full(), rtol=1e-4, atol=1e-6)


def test_matrices_keep_ranks_of_their_own(tmp_path):
    lm = tiny_lm()
    names = [lm.anatomy.mlp_out(layer).parameter for layer in range(3)]
    shape = lm.model.get_parameter(names[0]).shape
    ranks = (1, 3, 5)
    patch = patch_of(
        lm,
        {
            n: LowRank(normal(shape[0], r, seed=r), normal(r, shape[1], seed=r + 9))
            for n, r in zip(names, ranks, strict=True)
        },
    )
    folder, told = export_adapter(lm, [patch], tmp_path / "a")
    assert [each.kept for each in told] == [1, 3, 5]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert sorted(config["rank_pattern"].values()) == sorted(config["alpha_pattern"].values()) == [1, 3]
    with lm.patched(patch):
        expected = logits_of(lm, "Rome lies in")
    torch.testing.assert_close(
        logits(with_adapter(lm, folder), lm), expected.reshape(-1, expected.shape[-1]), rtol=1e-4, atol=1e-4
    )


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 50))
def test_what_is_cut_off_is_told(rows, cols, rank, most, seed):
    matrix = normal(rows, cols, seed=seed)
    for change in (
        matrix.double(),
        LowRank(normal(rows, rank, seed=seed).double(), normal(rank, cols, seed=seed + 1).double()),
    ):
        full = change if isinstance(change, torch.Tensor) else change.full()
        found = _factors("w", change, most)
        values = torch.linalg.svdvals(full)
        assert found.told.kept == min(found.told.rank, most)
        expected = float(values[most:].norm() / values.norm())
        assert found.told.error == pytest.approx(expected, abs=1e-5)
        lost = float((full - (found.u @ found.v).double()).norm() / full.norm())
        assert lost == pytest.approx(expected, abs=1e-4)


def test_a_cut_adapter_tells_its_error_in_the_card(tmp_path):
    lm = tiny_lm()
    name = lm.anatomy.mlp_out(1).parameter
    patch = patch_of(lm, {name: Dense(normal(*lm.model.get_parameter(name).shape))})
    folder, (told,) = export_adapter(lm, [patch], tmp_path / "a", rank=2)
    assert told.kept == 2 < told.rank
    assert 0.5 < told.error < 1
    assert f"rank 2 of {told.rank}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("part", ["embed_tokens.weight", "norm.weight"])
def test_what_lora_does_not_adapt_is_refused(part, tmp_path):
    lm = tiny_lm()
    name = next(n for n, _ in lm.model.named_parameters() if n.endswith(part))
    patch = patch_of(lm, {name: Dense(normal(*lm.model.get_parameter(name).shape))})
    with pytest.raises(PatchError, match="export checkpoint"):
        export_adapter(lm, [patch], tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_patches_beside_the_weights_are_refused():
    lm = tiny_lm()
    with pytest.raises(PatchError, match="not a change of weights"):
        to_adapter(lm, [create("ice").fit(lm, tiny_edits())])


def test_an_adapter_patch_is_written_as_what_it_makes_of_the_weights(tmp_path):
    lm = tiny_lm()
    patch = create("lora", {"steps": "4", "rank": "2", "layers": "1,2", "lr": "1e-2"}).fit(lm, tiny_edits())
    folder, told = export_adapter(lm, [patch], tmp_path / "a")
    assert all(each.kept <= 2 for each in told)
    with lm.patched(patch):
        expected = logits(lm.model, lm)
    torch.testing.assert_close(logits(with_adapter(lm, folder), lm), expected, rtol=1e-4, atol=1e-4)


def test_peft_is_asked_and_a_damaged_adapter_is_caught(tmp_path):
    lm = tiny_lm()
    patch = create("ft-m", {"steps": "30", "layer": "1", "lr": "1e-2"}).fit(lm, tiny_edits())
    folder, _ = export_adapter(lm, [patch], tmp_path / "a")
    before = Snapshot.of(lm)
    found = verify_adapter(lm, [patch], folder)
    assert before.differences(lm) == []
    assert found.tool == "peft"
    assert found.holds
    prompts = {answer.prompt for answer in found.answers}
    assert {"Rome lies in", "Find Rome in", "Oslo lies in", "Who is Ann Lee?"} <= prompts
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: tensor * 0 for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    assert not verify_adapter(lm, [patch], folder).holds


def test_what_lies_on_the_model_is_exported_too(tmp_path):
    lm = tiny_lm()
    below = create("ft-m", {"steps": "30", "layer": "1", "lr": "1e-2"}).fit(lm, tiny_edits()[:1])
    with lm.patched(below):
        above = create("ft-m", {"steps": "30", "layer": "2", "lr": "1e-2"}).fit(lm, tiny_edits()[1:])
        folder, told = export_adapter(lm, [above], tmp_path / "a")
        found = verify_adapter(lm, [above], folder)
        with lm.patched(above):
            expected = logits(lm.model, lm)
    assert len(told) == 2
    assert found.holds
    assert {answer.prompt for answer in found.answers} >= {edit.prompt for edit in tiny_edits()}
    torch.testing.assert_close(logits(with_adapter(lm, folder), lm), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by a name that is going out of use
def test_peft_finds_the_base_by_itself_and_the_snippet_loads_both(tmp_path, monkeypatch):
    made = tiny_lm()
    for part in (made.model, made.tokenizer):
        part.save_pretrained(tmp_path / "tiny")
    lm = load(tmp_path / "tiny")
    patch = create("ft-m", {"steps": "30", "layer": "1", "lr": "1e-2"}).fit(lm, tiny_edits())
    folder, _ = export_adapter(lm, [patch], tmp_path / "a")
    assert not any(str(tmp_path) in (folder / name).read_text() for name in ("README.md", "adapter_config.json"))
    assert folder_of(lm) == tmp_path / "tiny"
    code = how_to_load("adapter", folder_of(lm), folder)
    assert len(code) == 3
    found = {}
    exec("\n".join(code), found)  # noqa: S102
    with lm.patched(patch):
        expected = logits(lm.model, lm)
    torch.testing.assert_close(logits(found["model"], lm), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.chdir(tmp_path)  # a base without an id is known by its folder's name
    alone = peft.AutoPeftModelForCausalLM.from_pretrained("a")
    torch.testing.assert_close(logits(alone, lm), expected, rtol=1e-4, atol=1e-4)


def test_the_base_goes_by_its_id_on_the_hub():
    lm = tiny_lm()
    patch = create("ft-m", {"steps": "1", "layer": "1"}).fit(lm, tiny_edits())
    lm.name = "smollm2-135m"
    assert to_adapter(lm, [patch])[0]["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    lm.name = lm.model.config._name_or_path = "someone/some-model"
    assert to_adapter(lm, [patch])[0]["base_model_name_or_path"] == hub_id(lm) == "someone/some-model"
