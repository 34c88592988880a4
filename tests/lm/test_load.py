"""From what a user types to a model: what loads, and what is said where nothing does."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from factpatch.errors import BadFile, FactpatchError, UnknownDevice, UnknownModel
from factpatch.files import whole_folder
from factpatch.lm import fetch, load
from factpatch.lm.catalog import CATALOG
from factpatch.lm.model import checksum, fingerprint
from factpatch.testing import ARCHITECTURES, logits_of, tiny_lm


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(lm, folder):
    with fetch.without_bars():
        lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny model, to copy and to damage."""
    return save(tiny_lm(), tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def tiny(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_loads_as_it_was_saved(architecture, tmp_path):
    lm = tiny_lm(architecture)
    loaded = load(save(lm, tmp_path / "tiny"))
    assert loaded.fingerprint == lm.fingerprint
    assert torch.equal(logits_of(loaded, "Rome lies in"), logits_of(lm, "Rome lies in"))
    assert loaded.name == "tiny"
    assert not any(module.training for module in loaded.model.modules())


def test_a_folder_loads_with_its_fingerprint_in_every_type(tiny):
    lm = tiny_lm()
    for dtype in ("float32", "bfloat16"):
        loaded = load(tiny, dtype=dtype)
        assert loaded.fingerprint == lm.fingerprint
        assert str(loaded.dtype) == f"torch.{dtype}"
        assert loaded.name == "tiny"
    assert str(load(tiny, dtype="float16").dtype) == "torch.float16"
    parameter = lm.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    parameter.data[0, 0] *= 1.05
    assert fingerprint(lm.model) != lm.fingerprint


def test_on_a_cpu_a_checkpoint_in_bfloat16_is_computed_in_float32(tmp_path):
    lm = tiny_lm()
    lm.model.to(torch.bfloat16)
    loaded = load(save(lm, tmp_path / "tiny"), device="cpu")
    assert loaded.dtype == torch.float32
    assert loaded.fingerprint == lm.fingerprint


def test_a_path_may_be_relative_or_below_home(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (tiny, str(tiny), "tiny", "./tiny", "~/tiny"):
        assert load(source).anatomy.n_layers == 3


def test_a_part_can_be_named(tiny):
    loaded = load(tiny, anatomy={"mlp_out": "self_attn.o_proj"})
    assert loaded.anatomy.mlp_out(0).parameter == "model.layers.0.self_attn.o_proj.weight"


def test_progress_is_told(tiny):
    told = []
    load(tiny, progress=lambda *step: told.append(step))
    assert told == [("Loading the model", 0, 1), ("Loading the model", 1, 1)]


def test_transformers_progress_bars_are_as_they_were(tiny):
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        load(tiny)
        assert logging.is_progress_bar_enabled()
        with pytest.raises(ZeroDivisionError), fetch.without_bars():
            assert not logging.is_progress_bar_enabled()
            raise ZeroDivisionError
        assert logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        load(tiny)
        assert not logging.is_progress_bar_enabled()
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("smolm2", 'no model "smolm2". Did you mean "smollm2-135m"?  All short names: factpatch models'),
        ("SmolLM2-135m", 'Did you mean "smollm2-135m"?'),
        ("gemma3-270", 'Did you mean "gemma3-270m"?'),
        ("./no/such/folder", "./no/such/folder: there is no such folder.\n  Check the path"),
        ("/no/such", "/no/such: there is no such folder"),
        ("~/no-such-folder-here", "there is no such folder"),
        ("a/b/c", "a/b/c: there is no such folder"),
        ("", "the model's name is empty.\n  See the short names: factpatch models"),
        ("no-such.gguf", "no-such.gguf: there is no such GGUF file.\n  Check the path."),
        ("no/such/file.gguf", "there is no such GGUF file"),
    ],
)
def test_what_is_no_model_is_refused(source, words, cache):
    with pytest.raises(UnknownModel) as caught:
        load(source)
    assert words in str(caught.value)
    assert not cache.exists(), "something was made before the name was looked at"


def test_a_hub_id_that_cannot_be_reached_is_refused():
    with pytest.raises(UnknownModel) as caught:
        load("no-such-owner/no-such-model")  # the tests are offline
    message = str(caught.value)
    assert message.startswith('"no-such-owner/no-such-model": no model could be loaded from there (')
    assert "a folder with config.json, weights and tokenizer.json, a .gguf file, or the id of a model" in message
    for name in CATALOG:
        assert name in message


def damage(folder, name, keep=None, data=b""):
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep] if keep is not None else data)


def set_config(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("token*")],
    "config cut short": lambda folder: damage(folder, "config.json", keep=20),
    "tokenizer cut short": lambda folder: damage(folder, "tokenizer.json", keep=200),
    "tokenizer of another form": lambda folder: damage(folder, "tokenizer.json", data=b"{}"),
    "weights cut short": lambda folder: damage(folder, "model.safetensors", keep=-100),
    "weights empty": lambda folder: damage(folder, "model.safetensors", keep=0),
    "weights of another form": lambda folder: damage(folder, "model.safetensors", data=b"x" * 500),
    "weights of another size": lambda folder: set_config(folder, intermediate_size=64),
    "an architecture nobody knows": lambda folder: set_config(folder, model_type="nobody-knows"),
    "a model that writes no text": lambda folder: set_config(folder, model_type="vit"),
    "a size that is no number": lambda folder: set_config(folder, hidden_size="x"),
}


@pytest.mark.parametrize("harm", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_by_its_name(harm, tiny):
    harm(tiny)
    with pytest.raises((UnknownModel, BadFile)) as caught:
        load(tiny)
    assert str(tiny) in str(caught.value)
    assert "xpected" in str(caught.value)


def test_weights_that_are_missing_are_not_made_up(tiny):
    weights = load_file(tiny / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.2.mlp")}
    save_file(kept, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FactpatchError, match=r"model\.layers\.2\.mlp"):
        load(tiny)


@pytest.mark.parametrize("named", ["cuda", "cuda:7", "nonsense", "mps", "xpu"])
def test_a_device_that_is_not_here_is_refused(named, tiny, monkeypatch):
    if named == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is such a device on this machine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnknownDevice) as caught:
        load(tiny, device=named)
    assert str(caught.value) == (
        f'device "{named}": not here; this machine has cpu alone.\n  Leave the device out to have the best one chosen.'
    )


def test_a_device_that_is_here_is_taken(tiny):
    assert load(tiny, device="cpu").device == torch.device("cpu")
    assert load(tiny, device=torch.device("cpu")).device == torch.device("cpu")


@pytest.mark.parametrize("data", [b"GGUF" + bytes(range(200)), b"\x00" * 300, b"", b"\xfe\x13not a model" * 9])
def test_a_broken_gguf_file_is_refused(data, tmp_path, cache):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(BadFile) as caught:
        load(tmp_path / "x.gguf")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x.gguf'}: transformers cannot read this GGUF file (")
    assert "Expected a whole file of an architecture that transformers can de-quantise" in message
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_a_gguf_file_is_converted_once_and_found_by_what_is_in_it(tmp_path, monkeypatch):
    converted = []

    def convert(gguf, folder, progress):
        converted.append(gguf.name)
        with whole_folder(folder) as draft:
            save(tiny_lm(seed=len(converted)), draft)

    monkeypatch.setattr(fetch, "_convert", convert)
    for name, data in (("a.gguf", b"one"), ("b.gguf", b"one"), ("a.gguf", b"other")):
        (tmp_path / name).write_bytes(data)
        load(tmp_path / name)
    assert converted == ["a.gguf", "a.gguf"]


def test_a_real_gguf_file_is_de_quantised_to_the_weights_inside_it(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    lm = tiny_lm()
    path, config = tmp_path / "tiny.gguf", lm.model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = sorted(lm.tokenizer.get_vocab(), key=lm.tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*vocabulary, "ab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    random = torch.Generator().manual_seed(0)
    shapes = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48), "attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {
        f"blk.{i}.{name}": torch.randn(shape, generator=random) for i in range(3) for name, shape in shapes.items()
    }
    tensors |= {"token_embd": torch.randn(259, 32, generator=random), "output": torch.randn(259, 32, generator=random)}
    tensors["output_norm"] = torch.ones(32)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load(path)
    assert "%|" not in "".join(capsys.readouterr()), "a progress bar that nobody asked for"
    assert torch.equal(loaded.anatomy.mlp_out(1).matrix, tensors["blk.1.ffn_down"])
    assert torch.equal(loaded.anatomy.head.weight, tensors["output"])
    assert loaded.name == "tiny.gguf"
    assert loaded.end_tokens == {257}
    ids = loaded.tokens.encode("ab ba").ids
    assert [*loaded.tokenizer.convert_ids_to_tokens(ids)][-4:] == ["ab", "Ġ", "b", "a"]
    first = checksum(loaded.model)
    assert checksum(load(path).model) == first
    assert loaded.ask("Rome") == load(path).ask("Rome")


def test_a_gpu_that_is_not_there_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UnknownDevice, match='device "cuda:2": not here; this machine has cpu and cuda'):
        load(tiny, device="cuda:2")
