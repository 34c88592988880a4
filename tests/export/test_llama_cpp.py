"""Files written from nothing, run by llama.cpp itself: tokens and answers are those of the model in hand."""

import json
from http.client import HTTPConnection
from importlib.util import find_spec

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from factpatch.errors import BadFile
from factpatch.export import card_path, export_gguf, verify_gguf
from factpatch.export.description import _SPLITS, _cut, rotary_factors
from factpatch.lm import LM
from factpatch.methods import create
from factpatch.testing import ARCHITECTURES, Snapshot, tiny_edits, tiny_lm

needs_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp (xllamacpp) is not installed")
TEXTS = (
    "Rome lies in Italy, and Oslo lies in Norway; Ann Lee is a pilot.",
    "Who is Bob Ray? They'll know: it's 1984,  12345 or 7.",
    "Ünïcödé, 東京 and  spaces\n\nnew lines\t!!",
)
CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
} | {
    name: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for pattern, name in _SPLITS.items()
}


def made(architecture="llama", cut="gpt-2", **more):
    """A tiny model with a tokenizer that has merges."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer, learned.decoder = CUTS[cut], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learned.train_from_iterator(TEXTS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(architecture, **(ARCHITECTURES[architecture] | {"vocab_size": 324} | ids | more))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Positions must matter, so that a wrong order of rotary pairs is heard; norms and biases too.
                near = name.endswith(("q_proj.weight", "k_proj.weight"))
                if parameter.ndim == 2:
                    parameter.normal_(std=0.6 if near else 0.25)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.train(mode=False)
    return LM(model, tokenizer, name=f"made-{architecture}")


def server_of(path):
    library = pytest.importorskip("xllamacpp")
    settings = library.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = str(path), 256, 1, 0
    server = library.Server(settings)
    server.handle_completions({"prompt": "a", "n_predict": 1})  # its loop runs then: dropped before, it would never end
    return server


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    ),
    "llama 3": (
        "llama",
        {"rope_parameters": LLAMA3 | {"rope_theta": 100.0, "original_max_position_embeddings": 64}},
    ),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@needs_llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_says_what_the_model_says(case, tmp_path):
    architecture, more = CASES[case]
    lm = made(architecture, **more)
    before = Snapshot.of(lm)
    patch = create("ft-m", {"steps": "10", "layer": "1", "lr": "1e-2"}).fit(lm, tiny_edits())
    path = export_gguf(lm, [patch], tmp_path / "m.gguf")
    assert before.differences(lm) == []
    found = verify_gguf(lm, [patch], path)
    assert found.holds, found.differing
    assert any(len(answer.exported) > 10 for answer in found.answers), "answers long enough to tell models apart"
    assert "GGUF file, for llama.cpp" in card_path(path).read_text()
    plain = export_gguf(lm, [], tmp_path / "plain.gguf")
    assert not verify_gguf(lm, [patch], plain).holds


@needs_llama_cpp
@pytest.mark.parametrize("cut", CUTS)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(cut, tmp_path):
    lm = made(cut=cut)
    path = export_gguf(lm, [], tmp_path / "m.gguf", number="f16")
    server = server_of(path)
    for text in TEXTS:
        connection = HTTPConnection(server.listening_address.removeprefix("http://"), timeout=30)
        connection.request("POST", "/tokenize", json.dumps({"content": text, "add_special": True}))
        found = json.load(connection.getresponse())["tokens"]
        connection.close()
        assert found == lm.tokenizer(text).input_ids


def test_each_way_of_cutting_is_known_by_its_own_name():
    for name, cut in CUTS.items():
        learned = Tokenizer(models.BPE())
        learned.pre_tokenizer = cut
        assert _cut(json.loads(learned.to_str())["pre_tokenizer"]) == name
    assert _cut(None) is None
    assert _cut({"type": "Whitespace"}) is None
    assert _cut({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}) is None


def test_rotary_factors_are_those_by_which_the_model_slows_down():
    lm = made(**CASES["llama 3"][1])
    slowed = lm.model.model.rotary_emb.inv_freq
    plain = made(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    torch.testing.assert_close(rotary_factors(lm), plain.model.model.rotary_emb.inv_freq / slowed)
    assert rotary_factors(plain) is None
    assert rotary_factors(lm).max() > 1


@pytest.mark.parametrize(
    ("lm", "why"),
    [
        (lambda: tiny_lm("gpt2"), "of a gpt2 model"),
        (tiny_lm, "its tokenizer"),
        (lambda: made(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "kind dynamic"),
        (lambda: made("qwen2", **CASES["llama, linear"][1]), "kind linear"),
    ],
    ids=["architecture", "tokenizer", "rotary", "rotary of others"],
)
def test_what_cannot_be_written_from_nothing_says_what_can(lm, why, tmp_path):
    with pytest.raises(BadFile, match=why) as caught:
        export_gguf(lm(), [], tmp_path / "m.gguf")
    assert "--template" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
