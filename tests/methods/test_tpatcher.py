"""T-Patcher: neurons beside the last MLP."""

import pytest
import torch

from factpatch.errors import BadPatch, WrongBase
from factpatch.lm.hooks import reading
from factpatch.lm.predictions import predict
from factpatch.methods import create
from factpatch.patches import Patch, Provenance
from factpatch.patches.neurons import NeuronPatch, fired
from factpatch.testing import ARCHITECTURES, Snapshot, logits_of, tiny_edits, tiny_lm

QUICK = {"steps": 60, "lr": 3e-2, "texts": 8}


def sites(lm, layer):
    return [p.parameter.removesuffix(".weight") for p in (lm.anatomy.mlp_in(layer)[0], lm.anatomy.mlp_out(layer))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_added_is_the_formula(architecture):
    lm = tiny_lm(architecture)
    generator = torch.Generator().manual_seed(0)
    keys, biases, values = (torch.randn(shape, generator=generator) for shape in ((3, 32), (3,), (3, 32)))
    patch = NeuronPatch(Provenance.of(lm, "random", {}, tiny_edits()), *sites(lm, 1), keys, biases, values)
    x, out, patched = [], [], []
    reads, writes = lm.anatomy.mlp_in(1)[0].module, lm.anatomy.mlp_out(1).module
    with reading(reads, lambda a, _: x.append(a.clone())), reading(writes, lambda _, b: out.append(b.clone())):
        logits_of(lm, "Rome lies in")
    with lm.patched(patch), reading(writes, lambda _, b: patched.append(b.clone())):
        logits_of(lm, "Rome lies in")
    added = torch.relu(x[0].reshape(-1, 32) @ keys.T + biases) @ values
    assert added.abs().max() > 0.1
    torch.testing.assert_close(patched[0].reshape(-1, 32), out[0].reshape(-1, 32) + added, rtol=1e-4, atol=1e-5)


def test_a_neuron_that_does_not_fire_changes_nothing():
    assert fired(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]), torch.zeros(1)).tolist() == [[0.0]]
    lm = tiny_lm()
    before = logits_of(lm, "Rome lies in")
    quiet = NeuronPatch(
        Provenance.of(lm, "x", {}, tiny_edits()), *sites(lm, 2), torch.zeros(1, 32), -torch.ones(1), torch.ones(1, 32)
    )
    with lm.patched(quiet):
        assert torch.equal(logits_of(lm, "Rome lies in"), before)


def test_the_targets_become_likelier_by_a_neuron_for_each_wrong_token():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    (text,) = lm.encode([edit.prompt], [edit.target])
    (before,) = predict(lm, [text])
    patch = create("t-patcher", QUICK).fit(lm, [edit])
    wrong = sum(a != b for a, b in zip(before.best, before.target, strict=True))
    assert len(patch.keys) == wrong == patch.provenance.notes[0]["neurons"]
    with lm.patched(patch):
        (after,) = predict(lm, [text])
    assert sum(after.logprobs) > sum(before.logprobs) + 2


def test_what_is_right_already_gets_no_neuron():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    lower = create("ft-m", {"layer": 1, "steps": 200, "lr": 1e-2}).fit(lm, [edit])
    with lm.patched(lower):
        patch = create("t-patcher", QUICK).fit(lm, [edit])
    assert len(patch.keys) == 0
    assert patch.provenance.notes == ({"edit": "rome", "neurons": 0, "steps": 0},)


def test_the_memory_keeps_neurons_quiet_on_other_texts():
    lm, (edit, _) = tiny_lm(), tiny_edits()
    other, moved = "Some other text about nothing", {}
    before = logits_of(lm, other)
    for memory in (0.0, 100.0):
        with lm.patched(create("t-patcher", QUICK | {"memory": memory, "texts": 40}).fit(lm, [edit])):
            moved[memory] = (logits_of(lm, other) - before).abs().mean()
    assert moved[100.0] < 0.7 * moved[0.0]


def test_save_load_damage_and_undo(tmp_path):
    lm = tiny_lm()
    before = Snapshot.of(lm)
    patch = create("t-patcher", QUICK).fit(lm, tiny_edits())
    loaded = Patch.load(patch.save(tmp_path / "patch"))
    assert loaded.id == patch.id
    with lm.patched(patch, loaded):
        pass
    assert before.differences(lm) == []
    with pytest.raises(BadPatch, match="as many keys, biases and values"):
        NeuronPatch.from_parts(patch.provenance, patch.spec(), {"keys": patch.keys})
    stray = NeuronPatch.from_parts(patch.provenance, {"reads": "no.where", "writes": "x"}, patch.tensors())
    with pytest.raises(WrongBase, match=r"the neurons lie beside no\.where"):
        lm.apply(stray)
