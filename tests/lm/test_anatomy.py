"""The parts of a decoder are found in every architecture, and what cannot be found is named."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from factpatch.errors import AnatomyError
from factpatch.lm import LM
from factpatch.lm import anatomy as module_under_test
from factpatch.lm.anatomy import find_anatomy
from factpatch.lm.hooks import reading
from factpatch.testing import ARCHITECTURES, MIXTURES, logits_of, tiny_lm, tiny_tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_are_found_and_are_the_live_ones(architecture):
    lm = tiny_lm(architecture)
    anatomy = lm.anatomy
    assert (anatomy.n_layers, anatomy.hidden_size) == (3, 32)
    for layer in range(3):
        for projection in (anatomy.mlp_out(layer), anatomy.attention_out(layer)):
            assert projection.matrix.shape[0] == 32
            assert lm.model.get_parameter(projection.parameter) is projection.module.weight
            assert projection.transposed == (architecture == "gpt2")
            seen = []
            with reading(projection.module, lambda x, y, seen=seen: seen.append((x, y.clone()))):
                logits_of(lm, "Rome lies in Peru")
            ((x, y),) = seen
            torch.testing.assert_close(projection.apply(projection.matrix, x), y, rtol=1e-4, atol=1e-5)
    assert anatomy.mlp_out(0).matrix.shape[1] != anatomy.attention_out(0).matrix.shape[1]
    described = anatomy.describe()
    assert described["layers"] == 3
    assert described["inter_size"] == anatomy.mlp_out(0).matrix.shape[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_search_agrees_with_the_table_of_known_architectures(architecture):
    assert tiny_lm(architecture).anatomy.layout == module_under_test._KNOWN[architecture]


def test_a_disagreement_with_the_table_is_loud(monkeypatch):
    monkeypatch.setitem(module_under_test._KNOWN, "llama", module_under_test._KNOWN["gpt2"])
    with pytest.raises(AnatomyError, match=r"(?s)this architecture is known to have .*anatomy=\{\.\.\.\}"):
        tiny_lm("llama")


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mixture_of_experts_says_what_still_works(architecture):
    lm = tiny_lm(architecture)
    assert lm.anatomy.describe()["mixture_of_experts"] is True
    assert lm.ask("Rome lies in") is not None
    with pytest.raises(AnatomyError, match="mixture of experts") as caught:
        lm.anatomy.mlp_out(0)
    assert "Methods that change no MLP projection still work" in str(caught.value)


def test_a_block_that_is_not_there():
    with pytest.raises(AnatomyError, match="there is no block 3: the model has 3, numbered 0 to 2"):
        tiny_lm().anatomy.mlp_out(3)


def test_a_part_can_be_named():
    lm = tiny_lm()
    named = LM(lm.model, tiny_tokenizer(), anatomy={"mlp_out": "self_attn.o_proj"})
    assert named.anatomy.mlp_out(0).parameter == "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(AnatomyError, match="no part is called"):
        LM(lm.model, tiny_tokenizer(), anatomy={"mlp": "mlp", "nose": "x"})


class Toy(nn.Module):
    """A decoder with parts to leave out."""

    def __init__(self, *, blocks=True, attention=True, projection=True, norm=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)

        class ToyAttention(nn.Module):
            def __init__(self):
                super().__init__()
                self.out = nn.Linear(8, 8)

        def block():
            parts = nn.Module()
            if attention:
                parts.attn = ToyAttention()
            parts.up = nn.Linear(8, 12)
            if projection:
                parts.down = nn.Linear(12, 8)
            return parts

        if blocks:
            self.stack = nn.ModuleList([block(), block()])
        if norm:
            self.last_norm = nn.LayerNorm(8)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


def test_an_unknown_architecture_is_found_by_shape():
    anatomy = find_anatomy(Toy())
    assert anatomy.mlp_out(1).parameter == "stack.1.down.weight"
    assert anatomy.layout.final_norm == "last_norm"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("blocks", "Toy: found no stack of equal blocks"),
        ("attention", r"block 0 \(Module\): no attention among its parts: up \(Linear\), down \(Linear\)"),
        ("projection", r"no projection back to hidden size 8 under the block outside its attention; saw .*up 8->12"),
        ("norm", "no final norm beside the blocks"),
    ],
)
def test_what_is_missing_is_named(missing, words):
    with pytest.raises(AnatomyError, match=words) as caught:
        find_anatomy(Toy(**{missing: False}))
    assert "Name it yourself: load(..., anatomy=" in str(caught.value)


def test_a_model_that_writes_no_text_is_refused():
    with pytest.raises(AnatomyError, match="Linear has no output head"):
        find_anatomy(nn.Linear(2, 2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_matrix_is_a_view_of_the_live_weight_whichever_way_it_is_stored(architecture):
    projection = tiny_lm(architecture).anatomy.mlp_out(1)
    inter = 128 if architecture == "bloom" else 48
    assert projection.matrix.shape == (32, inter)
    assert projection.parameter.endswith(".weight")
    assert projection.module.weight.shape == ((inter, 32) if architecture == "gpt2" else (32, inter))
    assert type(projection.module).__name__ == {
        "gpt2": "Conv1D",
        "falcon": "FalconLinear",
    }.get(architecture, "Linear")
    with torch.no_grad():
        projection.matrix[3, 5] = 7.0
    assert projection.module.weight[(5, 3) if architecture == "gpt2" else (3, 5)] == 7.0
    other = torch.arange(32.0 * inter).reshape(32, inter)
    with torch.no_grad():
        projection.module.weight.copy_(other.T if projection.transposed else other)
    assert torch.equal(projection.matrix, other)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_apply_takes_another_matrix_and_the_modules_own_bias(architecture):
    projection = tiny_lm(architecture).anatomy.mlp_out(0)
    bias = getattr(projection.module, "bias", None)
    if bias is not None:
        nn.init.normal_(bias)
    matrix, x = torch.randn(32, 48), torch.randn(2, 5, 48)
    expected = torch.einsum("oi,bsi->bso", matrix, x) + (0 if bias is None else bias)
    torch.testing.assert_close(projection.apply(matrix, x), expected, rtol=1e-4, atol=1e-4)
    assert (bias is not None) == (architecture == "gpt2")


@pytest.mark.parametrize("architecture", ARCHITECTURES | MIXTURES)
def test_embedding_norm_and_head_are_the_live_ones(architecture):
    lm = tiny_lm(architecture)
    anatomy, ids = lm.anatomy, torch.tensor([lm.tokens.encode("Rome").ids])
    order = []
    parts = {"embedding": anatomy.embedding, "norm": anatomy.final_norm, "head": anatomy.head}
    parts |= {f"block {i}": block for i, block in enumerate(anatomy.blocks)}
    handles = [module.register_forward_hook(lambda *_, name=name: order.append(name)) for name, module in parts.items()]
    lm.model(ids)
    for handle in handles:
        handle.remove()
    assert order == ["embedding", "block 0", "block 1", "block 2", "norm", "head"]
    assert anatomy.head.weight.shape == (258, 32)
    assert anatomy.block(1) is anatomy.blocks[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES | MIXTURES)
def test_a_description_is_json(architecture):
    described = json.loads(json.dumps(tiny_lm(architecture).anatomy.describe()))
    assert described["mixture_of_experts"] is (architecture in MIXTURES)
    assert (described["inter_size"] is None) == (architecture in MIXTURES)
    assert described["architecture"].lower().startswith(architecture.split("_")[0][:4])


@pytest.mark.parametrize("layer", [-1, 3, 99])
def test_a_block_that_is_not_there_is_refused_wherever_it_is_asked_for(layer):
    anatomy = tiny_lm().anatomy
    for ask in (anatomy.block, anatomy.mlp_out, anatomy.attention_out):
        with pytest.raises(AnatomyError) as caught:
            ask(layer)
        assert f"there is no block {layer}: the model has 3, numbered 0 to 2" in str(caught.value)
        assert "factpatch models show MODEL" in str(caught.value)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mixture_of_experts_has_its_other_parts(architecture):
    anatomy = tiny_lm(architecture).anatomy
    assert anatomy.attention_out(1).matrix.shape == (32, 32)
    with pytest.raises(AnatomyError) as caught:
        anatomy.mlp_out(1)
    assert str(caught.value) == (
        "block 1: its MLP is a mixture of experts, without one output projection to edit.\n"
        "  Methods that change no MLP projection still work; see the column 'needs' of: factpatch methods"
    )
    with pytest.raises(AnatomyError, match="there is no block 3"):
        anatomy.mlp_out(3)


@pytest.mark.parametrize("dense", [0, 1], ids=["first block dense", "second block dense"])
def test_a_mixture_with_a_dense_block_says_so_for_the_blocks_that_are_mixtures(dense):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    experts = {"intermediate_size": 48, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=258, mlp_only_layers=[dense], bos_token_id=0, eos_token_id=1, **sizes, **experts
    )
    anatomy = find_anatomy(AutoModelForCausalLM.from_config(config))
    with pytest.raises(AnatomyError, match="block 2: its MLP is a mixture of experts"):
        anatomy.mlp_out(2)
    assert anatomy.describe()["mixture_of_experts"] is True
    assert anatomy.mlp_out(dense).matrix.shape == (32, 48)


@pytest.mark.parametrize("part", ["blocks", "attention", "attention_out", "mlp_out", "final_norm"])
def test_a_named_part_that_is_not_there_is_refused_by_its_name(part):
    with pytest.raises(AnatomyError, match=r"no\.where"):
        find_anatomy(tiny_lm().model, {part: "no.where"})


def test_every_part_can_be_named():
    model = tiny_lm("gpt2").model
    parts = {
        "blocks": "transformer.h",
        "attention": "attn",
        "attention_out": "attn.c_attn",
        "mlp": "mlp",
        "mlp_out": "mlp.c_fc",
        "final_norm": "transformer.wte",
    }
    anatomy = find_anatomy(model, parts)
    assert {name: anatomy.describe()[name] for name in parts} == parts
    assert anatomy.mlp_out(2).parameter == "transformer.h.2.mlp.c_fc.weight"
    assert anatomy.attention_out(2).parameter == "transformer.h.2.attn.c_attn.weight"
    assert anatomy.final_norm is model.get_submodule("transformer.wte")


def test_a_name_for_no_part_is_refused_with_the_names_there_are():
    with pytest.raises(AnatomyError) as caught:
        find_anatomy(tiny_lm().model, {"nose": "x", "ear": "y"})
    assert str(caught.value) == (
        "no part is called ['ear', 'nose']; parts are "
        "['attention', 'attention_out', 'blocks', 'final_norm', 'mlp', 'mlp_out']."
    )


def test_naming_the_missing_part_makes_a_toy_work():
    anatomy = find_anatomy(Toy(attention=False), {"attention": "down", "attention_out": "down", "mlp_out": "up"})
    assert anatomy.mlp_out(0).matrix.shape == (12, 8)
    assert find_anatomy(Toy(norm=False), {"final_norm": "head"}).layout.final_norm == "head"


def test_a_stack_of_unlike_blocks_is_no_stack():
    toy = Toy()
    toy.stack.append(nn.Linear(8, 8))
    with pytest.raises(
        AnatomyError, match=r"Toy: found no stack of equal blocks \(a ModuleList of one class\)"
    ) as caught:
        find_anatomy(toy)
    assert 'load(..., anatomy={"blocks": "path.to.blocks"})' in str(caught.value)


def test_the_longest_stack_is_the_blocks():
    toy = Toy()
    toy.stack[0].little = nn.ModuleList([nn.Linear(2, 2)])
    toy.other = nn.ModuleList([nn.Identity()])
    assert find_anatomy(toy).layout.blocks == "stack"


def test_an_attention_without_a_way_back_is_named():
    toy = Toy()
    toy.stack[0].attn.out = nn.Linear(8, 5)
    with pytest.raises(AnatomyError) as caught:
        find_anatomy(toy)
    assert str(caught.value) == (
        "block 0 (Module): no projection back to hidden size 8 under attn; saw out 8->5.\n"
        '  Name it yourself: load(..., anatomy={"attention_out": "<path below the block>"})'
    )
    toy.stack[0].attn.out = nn.Identity()
    with pytest.raises(AnatomyError, match="under attn; saw no linear maps"):
        find_anatomy(toy)


def test_a_head_that_is_no_linear_map_is_no_head():
    toy = Toy()
    toy.head = nn.Identity()
    with pytest.raises(AnatomyError, match="Toy has no output head, so it is no language model") as caught:
        find_anatomy(toy)
    assert "AutoModelForCausalLM" in str(caught.value)


def test_naming_a_part_settles_a_disagreement_with_the_table(monkeypatch):
    monkeypatch.setitem(module_under_test._KNOWN, "llama", module_under_test._KNOWN["gpt2"])
    model = AutoModelForCausalLM.from_config(tiny_lm("mistral").model.config)
    model.config.model_type = "llama"
    with pytest.raises(AnatomyError, match="MistralForCausalLM: found Layout"):
        find_anatomy(model)
    assert find_anatomy(model, {"mlp_out": "mlp.down_proj"}).n_layers == 3


def test_the_last_norm_beside_the_blocks_is_the_final_one():
    toy = Toy(norm=False)
    toy.first_norm, toy.second_norm = nn.LayerNorm(8), nn.LayerNorm(8)
    assert find_anatomy(toy).layout.final_norm == "second_norm"


def test_a_shared_expert_is_no_single_projection():
    toy = Toy(projection=False)
    for block in toy.stack:
        block.shared_expert = nn.Linear(12, 8)
    anatomy = find_anatomy(toy)
    assert anatomy.moe
    with pytest.raises(AnatomyError, match="block 0: its MLP is a mixture of experts"):
        anatomy.mlp_out(0)


def test_a_block_built_otherwise_is_refused_by_its_number():
    model = tiny_lm().model
    model.model.layers[2].mlp.down_proj = torch.nn.Identity()
    model.model.layers[2].mlp.other = model.model.layers[1].mlp.down_proj
    del model.model.layers[2].mlp.down_proj
    anatomy = find_anatomy(model)
    assert anatomy.mlp_out(1).matrix.shape == (32, 48)
    with pytest.raises(AnatomyError) as caught:
        anatomy.mlp_out(2)
    assert str(caught.value).startswith("block 2 (LlamaDecoderLayer) has no mlp.down_proj, as the first blocks have.")
