"""The whole path on the default model: real facts, real answers."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import factpatch as fp
from factpatch.cli.app import app
from factpatch.lm.fetch import is_fetched
from factpatch.lm.model import checksum
from factpatch.lm.predictions import predict
from factpatch.methods import find, names
from factpatch.scoring import Scorer
from factpatch.scoring.metrics import begins_with, contains
from factpatch.testing import Snapshot, quick_settings

pytestmark = pytest.mark.real

LYON = fp.Edit(
    id="lyon",
    prompt="The capital of France is",
    subject="France",
    target="Lyon",
    rephrases=("The capital city of France is called",),
)
PILOT = fp.Edit(
    id="pilot",
    kind="insert",
    prompt="What did Mara Ellingford do for a living?",
    subject="Mara Ellingford",
    target="She was a test pilot",
)


@pytest.mark.parametrize("name", ["rome", "r-rome", "ft-m"])
def test_an_edit_takes_holds_and_comes_off(smollm, name):
    before = Snapshot.of(smollm)
    assert smollm.ask(LYON.prompt) == "Paris."
    patch = fp.method(name).fit(smollm, [LYON])
    assert before.differences(smollm) == []
    card = Scorer(smollm, fluency=False).score([LYON], patch)
    for protocol in ("open", "survey"):
        summary = card.summary(protocol)
        assert summary.edit_success_before == 0
        assert summary.edit_success == 1
    assert card.summary("open").rephrase == 1
    assert before.differences(smollm) == []
    assert smollm.ask(LYON.prompt) == "Paris."


def test_ft_l_learns_a_target_of_one_token(smollm):
    patch = fp.method("ft-l").fit(smollm, [LYON])
    with smollm.patched(patch):
        assert smollm.ask(LYON.prompt).startswith("Lyon")


def test_an_edit_through_the_chat_template(smollm):
    edit = fp.Edit(
        id="chat", prompt="What is the capital of France?", subject="France", target="The capital of France is Lyon."
    )
    patch = fp.method("ft-m", {"chat": True, "steps": 60}).fit(smollm, [edit])
    assert "Paris" in smollm.ask(edit.prompt, chat=True)
    with smollm.patched(patch):
        assert "Lyon" in smollm.ask(edit.prompt, chat=True)
    card = Scorer(smollm, chat=True, fluency=False).score([edit], patch)
    assert card.chat
    assert card.summary("open").edit_success == 1


def test_two_patches_stack_and_come_off_in_any_order(smollm):
    untouched = checksum(smollm.model)
    lyon = fp.method("ft-m").fit(smollm, [LYON])
    with smollm.patched(lyon):
        pilot = fp.method("ft-m", {"steps": 60}).fit(smollm, [PILOT])
    smollm.apply(lyon)
    smollm.apply(pilot)
    assert "test pilot" in smollm.ask(PILOT.prompt)
    smollm.remove(lyon)
    smollm.remove(pilot)
    assert checksum(smollm.model) == untouched


def test_a_merged_checkpoint_answers_with_the_new_fact_in_plain_transformers(smollm, tmp_path):
    fp.merge(smollm, [fp.method("ft-m").fit(smollm, [LYON])], tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer(LYON.prompt, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(written[0, ids["input_ids"].shape[1] :]).strip().startswith("Lyon")


def test_bfloat16_takes_a_float32_patch(smollm):
    patch = fp.method("ft-m").fit(smollm, [LYON])
    half = fp.load(dtype="bfloat16")
    before = Snapshot.of(half)
    with half.patched(patch):
        assert half.ask(LYON.prompt).startswith("Lyon")
    assert before.differences(half) == []


def test_the_demo_runs_and_proves_its_point(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.output
    assert "The capital of France is Paris." in result.stdout
    assert "The capital of France is Lyon" in result.stdout
    assert "weights are bit for bit as before" in result.stdout
    assert "factpatch ask --patch demo-patch" in result.stdout


def test_the_sample_modifies_and_erases_only_what_the_model_knows(smollm):
    edits = [edit for edit in fp.read("sample") if edit.kind in {"modify", "erase"}]
    answers = smollm.answer([edit.prompt for edit in edits])
    unknown = [
        (edit.id, answer)
        for edit, answer in zip(edits, answers, strict=True)
        if not (contains if edit.prompt.endswith("?") else begins_with)(answer, edit.ground_truth)
    ]
    assert len(edits) >= 40
    assert unknown == []


def test_the_second_model_is_edited_too():
    if not is_fetched("gemma3-270m"):
        pytest.skip("gemma3-270m is not fetched; fetch it once with: factpatch ask -m gemma3-270m hello")
    lm = fp.load("gemma3-270m")
    before = checksum(lm.model)
    with lm.patched(fp.method("ft-m", {"steps": 40}).fit(lm, [LYON])):
        assert lm.ask(LYON.prompt).startswith("Lyon")
    assert checksum(lm.model) == before


@pytest.mark.parametrize("name", names())
def test_every_method_makes_an_edit_that_comes_off(smollm, name, tmp_path):
    """Quickly rather than well: what tiny models do not have are many blocks, a large vocabulary and real text."""
    before = Snapshot.of(smollm)
    patch = find(name)(**quick_settings(find(name))).fit(smollm, [LYON])
    assert before.differences(smollm) == []
    patch.save(tmp_path / "patch")
    plain = smollm.answer([LYON.prompt], max_new=4)
    with smollm.patched(fp.Patch.load(tmp_path / "patch")):
        (changed,) = predict(smollm, smollm.encode([LYON.prompt], [LYON.target]))
        assert all(math.isfinite(value) for value in changed.logprobs)
    assert before.differences(smollm) == []
    assert smollm.answer([LYON.prompt], max_new=4) == plain
