"""GGUF: what is not edited stays byte for byte, what is edited is laid out as llama.cpp has it, and llama.cpp says it."""

import gguf
import numpy as np
import pytest
import torch

from factpatch.edits import Edit, Probe
from factpatch.errors import BadFile, OutputError, PatchError
from factpatch.export import card_path, export_gguf, verify_gguf
from factpatch.lm import load
from factpatch.lm.catalog import CATALOG
from factpatch.lm.fetch import original_gguf
from factpatch.methods import create
from factpatch.patches import Dense, Provenance, WeightPatch
from factpatch.testing import tiny_edits, tiny_lm

NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)


def template(lm, path, *, kind=None, order=None, leave_out=None, alignment=None):
    """A GGUF file of a tiny Llama, matrices in Q8_0 where their rows can be."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(3)
    writer.add_string("note", "kept")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    config = lm.model.config
    for name, parameter in lm.model.named_parameters():
        own = NAMES.get_name(name, try_suffixes=(".weight",))
        data = parameter.detach()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if own == leave_out:
            continue
        if order == "turned" and data.ndim == 2:
            data = data.T.contiguous()
        if heads and order is None:  # each head's halves, interleaved
            halves = data.reshape(heads, 2, -1, data.shape[-1])
            data = torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(data.shape)
        data = data.numpy()
        if kind and data.ndim == 2 and data.shape[-1] % 32 == 0:
            writer.add_tensor(own, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def patch_of(lm, *names):
    changes = {name: Dense(torch.full(lm.model.get_parameter(name).shape, 0.25)) for name in names}
    return WeightPatch(Provenance.of(lm, "made", {}, tiny_edits()), changes)


DOWN, QUERY = "model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def test_only_what_is_edited_is_written_anew(lm, tmp_path):
    base = template(lm, tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    path = export_gguf(lm, [patch_of(lm, DOWN)], tmp_path / "new.gguf", base)
    before, after = tensors(base), tensors(path)
    assert list(before) == list(after)
    changed = [name for name in before if before[name].data.tobytes() != after[name].data.tobytes()]
    assert changed == ["blk.1.ffn_down.weight"]
    assert all(before[name].tensor_type == after[name].tensor_type for name in before if name not in changed)
    expected = lm.model.get_parameter(DOWN).detach() + 0.25
    np.testing.assert_array_equal(after["blk.1.ffn_down.weight"].data, expected.numpy())
    fields = gguf.GGUFReader(path).fields
    assert fields["note"].contents() == "kept"
    assert fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]


def test_all_of_it_written_anew_is_the_patched_model(lm, tmp_path):
    base = template(lm, tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    patched = patch_of(lm, DOWN, QUERY)
    path = export_gguf(lm, [patched], tmp_path / "new.gguf", base, everything=True)
    with lm.patched(patched):
        expected = tensors(template(lm, tmp_path / "expected.gguf"))
    for name, tensor in tensors(path).items():
        np.testing.assert_array_equal(tensor.data, expected[name].data, err_msg=name)


@pytest.mark.parametrize(("number", "tolerance"), [("f16", 1e-3), ("bf16", 1e-2)])
def test_numbers_may_be_rounded(lm, tmp_path, number, tolerance):
    base = template(lm, tmp_path / "base.gguf")
    path = export_gguf(lm, [patch_of(lm, QUERY)], tmp_path / "new.gguf", base, number=number)
    exact = export_gguf(lm, [patch_of(lm, QUERY)], tmp_path / "exact.gguf", base)
    found = tensors(path)["blk.2.attn_q.weight"]
    assert found.tensor_type.name == number.upper()
    plain = gguf.quants.dequantize(found.data, found.tensor_type)
    np.testing.assert_allclose(plain, tensors(exact)["blk.2.attn_q.weight"].data, rtol=tolerance, atol=1e-6)


def test_what_cannot_be_is_refused_and_leaves_nothing(lm, tmp_path):
    base = template(lm, tmp_path / "base.gguf")
    (tmp_path / "taken.gguf").write_text("x")
    (tmp_path / "text.gguf").write_text("no GGUF")
    patch = patch_of(lm, DOWN)
    with pytest.raises(OutputError, match="already there"):
        export_gguf(lm, [patch], tmp_path / "taken.gguf", base)
    with pytest.raises(BadFile, match="not a GGUF file"):
        export_gguf(lm, [patch], tmp_path / "new.gguf", tmp_path / "text.gguf")
    with pytest.raises(BadFile, match="no such file"):
        export_gguf(lm, [patch], tmp_path / "new.gguf", tmp_path / "none.gguf")
    with pytest.raises(PatchError, match="not a change of weights"):
        export_gguf(lm, [create("ice").fit(lm, tiny_edits())], tmp_path / "new.gguf", base)
    other = template(tiny_lm(seed=1), tmp_path / "other.gguf")
    for everything in (False, True):
        with pytest.raises(BadFile, match="does not hold what the unpatched"):
            export_gguf(lm, [patch], tmp_path / "new.gguf", other, everything=everything)
    wide = patch_of(lm, "lm_head.weight")
    with pytest.raises(PatchError, match="no tensor for lm_head"):
        export_gguf(lm, [wide], tmp_path / "new.gguf", template(lm, tmp_path / "tied.gguf", leave_out="output.weight"))
    (tmp_path / "new.md").write_text("mine")
    with pytest.raises(OutputError, match=r"new\.md"):
        export_gguf(lm, [patch], tmp_path / "new.gguf", base)
    assert not (tmp_path / "new.gguf").exists()


@pytest.mark.parametrize("kind", [None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0], ids=str)
@pytest.mark.parametrize("order", [None, "plain", "turned"])
def test_the_templates_own_numbers_tell_how_it_is_laid_out(lm, tmp_path, kind, order):
    """Files of other architectures have queries and keys otherwise, or matrices turned: square ones would fit either way."""
    names = (QUERY, QUERY.replace("q_proj", "k_proj"), QUERY.replace("q_proj", "o_proj"))
    patch = patch_of(lm, *names)
    base = template(lm, tmp_path / "base.gguf", kind=kind, order=order)
    found = tensors(export_gguf(lm, [patch], tmp_path / "new.gguf", base))
    with lm.patched(patch):
        expected = tensors(template(lm, tmp_path / "expected.gguf", order=order))
    for name in names:
        own = NAMES.get_name(name, try_suffixes=(".weight",))
        np.testing.assert_array_equal(found[own].data, expected[own].data, err_msg=own)


def test_what_lies_on_the_model_is_written_too(lm, tmp_path):
    base = template(lm, tmp_path / "base.gguf")
    below, above = patch_of(lm, DOWN), patch_of(lm, QUERY)
    with lm.patched(below):
        path = export_gguf(lm, [above], tmp_path / "new.gguf", base)
    before, after = tensors(base), tensors(path)
    assert {name for name in before if before[name].data.tobytes() != after[name].data.tobytes()} == {
        "blk.1.ffn_down.weight",
        "blk.2.attn_q.weight",
    }
    assert all(patch.id in card_path(path).read_text() for patch in (below, above))


def test_a_changed_norm_is_written_in_float32_whatever_the_type(lm, tmp_path):
    base = template(lm, tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    for everything in (False, True):
        path = tmp_path / f"{everything}.gguf"
        export_gguf(lm, [patch_of(lm, NORM)], path, base, number="f16", everything=everything)
        found = tensors(path)
        assert found["blk.1.attn_norm.weight"].tensor_type.name == "F32"
        np.testing.assert_array_equal(
            found["blk.1.attn_norm.weight"].data, lm.model.get_parameter(NORM).detach().numpy() + 0.25
        )
        assert (found["blk.0.ffn_up.weight"].tensor_type.name == "F16") == everything


def test_another_alignment_is_kept(lm, tmp_path):
    base = template(lm, tmp_path / "base.gguf", alignment=128)
    found = gguf.GGUFReader(export_gguf(lm, [patch_of(lm, DOWN)], tmp_path / "new.gguf", base))
    assert found.alignment == 128
    before = tensors(base)
    for tensor in found.tensors:
        assert tensor.data_offset % 128 == 0
        if tensor.name != "blk.1.ffn_down.weight":
            assert tensor.data.tobytes() == before[tensor.name].data.tobytes()


@pytest.mark.real
def test_llama_cpp_says_what_the_patched_model_says(tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    real = load("smollm2-135m")
    edit = Edit(
        id="lyon",
        prompt="The capital of France is",
        subject="France",
        target="Lyon",
        locality={"Other": (Probe(prompt="The capital of Japan is"),)},
    )
    patch = create("rome").fit(real, [edit])
    base = original_gguf(CATALOG["smollm2-135m"])
    path = export_gguf(real, [patch], tmp_path / "lyon.gguf", base)
    found = verify_gguf(real, [patch], path)
    assert found.answers[0].exported.startswith("Lyon")
    assert found.holds
    assert not verify_gguf(real, [patch], base).holds, "the base does not say it"
