"""Checkpoints: sharded, with tokenizer and card, and answering as the patched model does when transformers alone loads them."""

from itertools import takewhile

import pytest
from safetensors.torch import load_file, save_file

from factpatch.errors import OutputError, PatchError
from factpatch.export import card, export_checkpoint, verify_checkpoint
from factpatch.export.card import _cell
from factpatch.gate import Gate
from factpatch.lm import LM, load
from factpatch.methods import create
from factpatch.scoring import Scorer
from factpatch.testing import Snapshot, tiny_edits, tiny_lm


@pytest.fixture(scope="module")
def made():
    lm = tiny_lm()
    patch = create("ft-m", {"steps": "30", "layer": "1", "lr": "1e-2"}).fit(lm, tiny_edits())
    return lm, patch


def test_it_is_loaded_by_transformers_and_answers_as_the_patched_model(made, tmp_path):
    lm, patch = made
    before = Snapshot.of(lm)
    folder = export_checkpoint(lm, [patch], tmp_path / "m", shard_size="20KB")
    found = verify_checkpoint(lm, [patch], folder)
    assert before.differences(lm) == []
    assert (found.tool, found.holds) == ("transformers", True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert {"config.json", "tokenizer.json", "generation_config.json", "README.md"} <= {
        p.name for p in folder.iterdir()
    }


def test_an_unpatched_checkpoint_is_caught(made, tmp_path):
    lm, patch = made
    folder = export_checkpoint(lm, [], tmp_path / "m")
    found = verify_checkpoint(lm, [patch], folder)
    assert not found.holds
    wrong = found.differing[0]
    assert wrong.patched != wrong.exported


def test_a_damaged_weight_is_caught(made, tmp_path):
    lm, patch = made
    folder = export_checkpoint(lm, [patch], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(patch.deltas))
    save_file(tensors | {name: tensors[name] * 0}, folder / "model.safetensors", metadata={"format": "pt"})
    assert not verify_checkpoint(lm, [patch], folder).holds


def test_where_nothing_was_asked_nothing_is_shown_to_hold(made, tmp_path):
    lm, _ = made
    found = verify_checkpoint(lm, [], export_checkpoint(lm, [], tmp_path / "m"))
    assert found.answers == ()
    assert not found.holds


def test_what_lies_on_the_model_is_exported_and_told_of(made, tmp_path):
    lm, patch = made
    with lm.patched(patch):
        folder = export_checkpoint(lm, [], tmp_path / "m")
        found = verify_checkpoint(lm, [], folder)
    assert found.holds
    assert patch.id in (folder / "README.md").read_text()


@pytest.mark.parametrize(("requirement", "words"), [("edit_success>=0", "let"), ("edit_success>0.9", "did not let")])
def test_the_card_tells_what_the_gate_found(made, requirement, words):
    lm, patch = made
    judged = Gate.of(requirement).judge(lm, tiny_edits(), patch)
    assert judged.passed == (words == "let")
    told = card(lm, [patch.with_scorecard(judged.record())], "checkpoint")
    assert f"The gate {words} `{patch.id}` through: edit\\_success" in told
    assert "made up by factpatch" in told


def test_what_is_no_change_of_weights_or_is_taken_is_refused(made, tmp_path):
    lm, patch = made
    with pytest.raises(PatchError, match="not a change of weights"):
        export_checkpoint(lm, [create("ice").fit(lm, tiny_edits())], tmp_path / "m")
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "x").touch()
    with pytest.raises(OutputError, match="already there"):
        export_checkpoint(lm, [patch], tmp_path / "n")


def test_the_card_tells_edits_settings_scores_and_limits(made):
    lm, patch = made
    scored = patch.with_scorecard(Scorer(lm, fluency=False).score(tiny_edits(), patch).to_json())
    told = card(lm, [scored], "checkpoint")
    for text in ("Rome lies in", "Peru", "ft-m, 2 edits", "| open |", "| survey |", "## Limits", "    - steps: 30"):
        assert text in told
    assert "None were made" in card(lm, [patch], "adapter")
    assert "deleted" not in told.replace("nothing here was deleted", "")


def test_edits_of_one_name_are_numbered_in_the_card(made):
    lm, patch = made
    told = card(lm, [patch, patch], "checkpoint")
    rows = [line.split(" | ")[0] for line in told.splitlines() if "Rome lies in" in line]
    assert rows == ["| 1", "| 3"]
    assert "| rome | " in card(lm, [patch], "checkpoint")


def test_an_edits_text_cannot_break_the_card(made):
    lm, _ = made
    edit = tiny_edits()[1].model_copy(update={"target": "a | <script>x</script>\n# Head"})
    patch = create("ice").fit(lm, [edit])
    told = card(lm, [patch], "gguf")
    assert "<script>" not in told.replace("\\<script\\>", "")
    row = next(line for line in told.splitlines() if "script" in line)
    assert row.count(" | ") == 4


@pytest.mark.parametrize("form", ["checkpoint", "adapter", "gguf"])
def test_each_table_of_a_card_has_as_many_columns_in_its_rule_and_rows_as_in_its_head(made, form):
    lm, patch = made
    scored = patch.with_scorecard(Scorer(lm, fluency=False).score(tiny_edits(), patch).to_json())
    lines = card(lm, [scored], form).splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("|") and not lines[i - 1].startswith("|")]
    assert len(heads) == 2
    for i in heads:
        table = list(takewhile(lambda line: line.startswith("|"), lines[i:]))
        cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table]
        assert len(cells) > 2
        assert {len(row) for row in cells} == {len(cells[0])}
        assert all(set(cell) <= {"-", ":"} and cell for cell in cells[1]), table[1]


def test_the_card_tells_what_the_base_says_whatever_lay_on_it_when_the_patch_was_made(made):
    lm, first = made
    edit = tiny_edits()[0].model_copy(update={"id": "again", "target": "Chad"})
    with lm.patched(first):
        second = create("ft-m", {"steps": "30", "layer": "2", "lr": "1e-2"}).fit(lm, [edit])
        second = second.with_scorecard(Scorer(lm, fluency=False).score([edit], second).to_json())
        told = card(lm, [second], "checkpoint")
    base, then = lm.answer([edit.prompt], max_new=24)[0], second.provenance.scorecard["scores"][0]["said_before"]
    assert base != then, "the earlier patch was heard"
    row = next(line for line in told.splitlines() if line.startswith("| again |"))
    assert row.split(" | ")[-1].removesuffix(" |") == _cell(base)
    assert _cell(then) not in row


def test_the_base_model_has_the_name_that_other_tools_know_and_no_path_of_this_machine(made, tmp_path):
    lm, patch = made
    assert "base_model:" not in card(lm, [patch], "adapter"), "the hub does not know it"
    fetched = LM(lm.model, lm.tokenizer, name="smollm2-135m")
    told = card(fetched, [patch], "adapter")
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"\n' in told
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in told
    lm.model.save_pretrained(tmp_path / "own")
    lm.tokenizer.save_pretrained(tmp_path / "own")
    for form in ("checkpoint", "adapter", "gguf"):
        assert str(tmp_path) not in card(load(tmp_path / "own"), [], form)


def test_the_card_tells_how_to_load_what_it_lies_beside(made, tmp_path):
    lm, patch = made
    folder = export_checkpoint(lm, [patch], tmp_path / "m")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    found = {}
    exec(code.replace("FOLDER OF THIS CARD", str(folder)), found)  # noqa: S102
    assert found["model"].config.num_hidden_layers == 3
    assert found["tokenizer"]("Rome")["input_ids"]
