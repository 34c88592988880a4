"""The parts of a decoder are found in every architecture, and what cannot be found is named."""

import pytest
import torch
from torch import nn

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
            assert projection.as_stored(projection.matrix).shape == projection.module.weight.shape
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
