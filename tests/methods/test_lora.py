"""Adapters: PEFT's own reading of the folder, merging by hand, and training."""

import pytest
import torch
from peft import PeftModel

from factpatch.errors import BadPatch, MissingExtra, WrongBase
from factpatch.lm.predictions import predict
from factpatch.methods import create
from factpatch.patches import Patch, adapter
from factpatch.testing import Snapshot, logits_of, tiny_edits, tiny_lm

NAMES = ["lora", "dora", "adalora"]
QUICK = {"steps": 12, "rank": 4, "alpha": 8, "lr": 2e-2}


def target_logprob(lm):
    texts = [lm.tokens.encode(edit.prompt, edit.target) for edit in tiny_edits()]
    return [sum(prediction.logprobs) for prediction in predict(lm, texts)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "phi3"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_the_folder_and_gives_the_same_model(name, architecture, tmp_path):
    lm = tiny_lm(architecture)
    patch = create(name, QUICK).fit(lm, tiny_edits())
    folder = patch.save(tmp_path / "patch")
    with lm.patched(patch):
        expected = logits_of(lm, "Rome lies in Peru")
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr("warnings.warn", lambda *_, **__: None)  # PEFT's own, about names
        theirs = PeftModel.from_pretrained(lm.model, folder)
    ids = torch.tensor([lm.tokens.encode("Rome lies in Peru").ids])
    with torch.no_grad():
        found = theirs(ids).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, logits_of(tiny_lm(architecture), "Rome lies in Peru"), atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_the_merged_weight_is_the_papers(name, architecture):
    lm = tiny_lm(architecture)
    patch = create(name, QUICK | {"layers": (1,)}).fit(lm, tiny_edits())
    merged = patch.merged(lm.model)
    for projection in lm.anatomy.queries_and_values(1):
        part = {
            key.removeprefix("base_model.model." + projection.parameter.removesuffix("weight")): value
            for key, value in patch.weights.items()
            if projection.parameter.removesuffix("weight") in key
        }
        W = projection.matrix.double()
        if name == "adalora":
            A, B, E = (part[key].double() for key in ("lora_A", "lora_B", "lora_E"))
            expected = W + B @ (A * E) * 8 / (4 + 1e-5)
        else:
            expected = W + part["lora_B.weight"].double() @ part["lora_A.weight"].double() * 8 / 4
        if name == "dora":
            length = expected.norm(dim=1, keepdim=True)
            expected = part["lora_magnitude_vector"].double()[:, None] * expected / length
        found = merged[projection.parameter]
        found = found.T if projection.transposed else found
        assert (expected - W).norm() > 1e-3
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_training_makes_the_targets_likelier(name):
    lm = tiny_lm()
    before = target_logprob(lm)
    patch = create(name, QUICK | {"steps": 30}).fit(lm, tiny_edits())
    with lm.patched(patch):
        assert all(new > old + 1 for new, old in zip(target_logprob(lm), before, strict=True))
    (note,) = patch.provenance.notes
    assert note["last_loss"] < note["first_loss"]


def test_adalora_masks_the_weakest_values():
    patch = create("adalora", QUICK | {"steps": 20}).fit(tiny_lm(), tiny_edits())
    values = torch.cat([t for key, t in patch.weights.items() if key.endswith("lora_E")])
    assert (values == 0).sum() >= len(values) // 2
    assert (values != 0).any()


def test_it_stops_when_the_loss_is_low():
    patch = create("lora", QUICK | {"steps": 200, "stop_loss": 2.0}).fit(tiny_lm(), tiny_edits())
    (note,) = patch.provenance.notes
    assert note["steps"] < 200
    assert note["last_loss"] < 2.0


def test_it_lies_below_and_above_other_patches():
    lm = tiny_lm()
    before = Snapshot.of(lm)
    lower = create("ft-m", {"layer": 1, "steps": 4, "lr": 1e-2}).fit(lm, tiny_edits())
    with lm.patched(lower):
        adapter_patch = create("lora", QUICK).fit(lm, tiny_edits())
        with lm.patched(adapter_patch):
            both = logits_of(lm, "Rome lies in")
            create("ft-m", {"layer": 1, "steps": 2}).fit(lm, tiny_edits())
    with lm.patched(lower, adapter_patch):
        assert torch.equal(logits_of(lm, "Rome lies in"), both)
    assert before.differences(lm) == []


def test_a_failure_while_training_leaves_the_model_as_it_was(monkeypatch):
    lm = tiny_lm()
    before = Snapshot.of(lm)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        create("lora", QUICK).fit(lm, tiny_edits())
    assert before.differences(lm) == []


def test_a_module_that_is_not_there_is_refused(tmp_path):
    lm = tiny_lm()
    patch = create("lora", QUICK | {"layers": (1,)}).fit(lm, tiny_edits())
    config = dict(patch.config) | {"target_modules": ["model.layers.9.self_attn.q_proj"]}
    with pytest.raises(WrongBase, match=r"the adapter changes model\.layers\.9"):
        lm.apply(adapter.AdapterPatch(patch.provenance, config, patch.weights))
    with pytest.raises(BadPatch, match="holds tensors of no module that the config names"):
        adapter.AdapterPatch.from_parts(patch.provenance, config, patch.weights)
    folder = patch.save(tmp_path / "patch")
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(BadPatch, match=r"adapter_model\.safetensors: damaged"):
        Patch.load(folder)


def test_without_peft_what_to_install_is_said(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(adapter, "import_module", missing)
    with pytest.raises(MissingExtra, match=r'pip install "factpatch\[adapters\]"'):
        create("lora", QUICK).fit(tiny_lm(), tiny_edits())


@pytest.mark.parametrize("name", NAMES)
def test_a_long_list_of_modules_is_kept_by_its_whole_names(name, tmp_path, monkeypatch):
    """PEFT writes the endings that the modules share, once there are many; a patch tells which modules it changes."""
    monkeypatch.setattr("peft.tuners.tuners_utils.MIN_TARGET_MODULES_FOR_OPTIMIZATION", 2)
    lm = tiny_lm()
    patch = create(name, QUICK | {"layers": (0, 2)}).fit(lm, tiny_edits())
    names = [f"model.layers.{n}.self_attn.{m}_proj" for n in (0, 2) for m in "qv"]
    assert patch.config["target_modules"] == names
    before = target_logprob(lm)
    patch.save(tmp_path / "p")
    with lm.patched(Patch.load(tmp_path / "p")):
        assert min(after - b for after, b in zip(target_logprob(lm), before, strict=True)) > 1
