"""Training an editor: it can be killed at any moment, its editor is checked, and what is wrong is said."""

import json

import pytest
import torch

from factpatch.errors import BadConfig, BadEditor, CannotEdit, OutputError, WrongBase
from factpatch.methods import create
from factpatch.methods.editors import Editor
from factpatch.testing import Snapshot, tiny_edits, tiny_lm

SETTINGS = {"layers": (2,), "rank": 4, "steps": 6, "check_every": 2, "batch_size": 2}


class Killed(BaseException):
    """As if the process had been ended."""


def lessons():
    return [e.model_copy(update={"id": f"{e.id}{i}", "target": t}) for i, t in enumerate("abc") for e in tiny_edits()]


def train(folder, *, lm=None, stop_at=None, **more):
    """Train; killed when the look at step `stop_at` has been seen, or in the step after it."""

    def watch(look):
        if look["step"] == stop_at:
            raise Killed

    return create("mend", SETTINGS | more).train(lm or tiny_lm(), lessons(), folder=folder, watch=watch)


def test_training_leaves_the_model_as_it_was(tmp_path):
    lm = tiny_lm()
    before = Snapshot.of(lm)
    train(tmp_path / "a", lm=lm)
    assert not before.differences(lm)


@pytest.mark.parametrize("stop_at", [0.0, 2.0, 4.0, 6.0])
def test_a_training_that_was_killed_ends_with_the_same_editor(tmp_path, stop_at):
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", stop_at=stop_at)
    again = train(tmp_path / "killed")
    assert again.id == whole.id
    assert again.about.curve == whole.about.curve
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {"editor.json", "editor.safetensors"}


def test_a_training_killed_between_two_looks_goes_on_from_the_last(tmp_path, monkeypatch):
    from factpatch.methods.mend import _HyperCourse

    whole = train(tmp_path / "whole")
    study, calls = _HyperCourse.study, []

    def dies(self, chosen):
        calls.append(chosen)
        if len(calls) == 4:  # the second step after the look at step 2
            raise Killed
        return study(self, chosen)

    monkeypatch.setattr(_HyperCourse, "study", dies)
    with pytest.raises(Killed):
        train(tmp_path / "killed")
    assert train(tmp_path / "killed").id == whole.id
    assert len(calls) == 4 + 4, "steps 3 to 6 again"


def test_a_training_can_be_made_longer(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path / "a", stop_at=4.0)
    longer = train(tmp_path / "a", steps=8)
    assert [look["step"] for look in longer.about.curve] == [0, 2, 4, 6, 8]
    assert longer.id == train(tmp_path / "b", steps=8).id


@pytest.mark.parametrize("losses", [(3.0, 1.0, 2.0, 2.0), (3.0, 2.0, 1.0, 2.0), (1.0, 2.0, 3.0, 2.0)])
def test_the_editor_is_the_one_of_the_lowest_loss(tmp_path, monkeypatch, losses):
    from factpatch.methods.mend import _HyperCourse

    looks, seen = iter(losses), []

    def look(self, _):
        seen.append({name: value.detach().clone() for name, value in self.network.state_dict().items()})
        return {"loss": next(looks)}

    monkeypatch.setattr(_HyperCourse, "look", look)
    editor = train(tmp_path / "a")
    best = losses.index(1.0)
    assert editor.best["step"] == 2 * best
    same = [all(torch.equal(editor.tensors[name], value) for name, value in network.items()) for network in seen]
    assert same == [i == best for i in range(len(seen))]


def test_patience_ends_a_training(tmp_path, monkeypatch):
    from factpatch.methods.mend import _HyperCourse

    looks = iter((3.0, 1.0, 2.0, 1.0, 2.0, 2.0))
    monkeypatch.setattr(_HyperCourse, "look", lambda *_: {"loss": next(looks)})
    editor = train(tmp_path / "a", steps=40, patience=2)
    assert [look["loss"] for look in editor.about.curve] == [3.0, 1.0, 2.0, 1.0]


def test_held_out_edits_are_never_studied(monkeypatch, tmp_path):
    from factpatch.methods.mend import _HyperCourse

    studied, looked = set(), set()
    monkeypatch.setattr(_HyperCourse, "study", lambda self, chosen: studied.update(chosen) or {})
    monkeypatch.setattr(_HyperCourse, "look", lambda self, chosen: looked.update(chosen) or {"loss": 1.0})
    train(tmp_path / "a", held_out=0.4)
    assert len(looked) == 2
    assert studied == set(range(6)) - looked


def test_each_round_goes_through_all_edits_in_an_order_of_its_own(monkeypatch, tmp_path):
    from factpatch.methods.mend import _HyperCourse

    studied = []
    monkeypatch.setattr(_HyperCourse, "study", lambda self, chosen: studied.extend(chosen) or {})
    train(tmp_path / "a", held_out=0.01, steps=20, batch_size=2, patience=50)
    rounds = [tuple(studied[i : i + 5]) for i in range(0, 40, 5)]
    assert len({frozenset(each) for each in rounds}) == 1
    assert all(len(set(each)) == 5 for each in rounds)
    assert len(set(rounds)) > 1


def test_an_editor_says_where_it_comes_from(tmp_path):
    train(tmp_path / "a")
    about = json.loads((tmp_path / "a" / "editor.json").read_text())
    assert about["method"] == "mend"
    assert about["base_fingerprint"] == tiny_lm().fingerprint
    assert about["config"]["rank"] == 4
    assert about["edits"] == 6
    assert [look["step"] for look in about["curve"]] == [0, 2, 4, 6]
    patch = create("mend", {"editor": str(tmp_path / "a")}).fit(tiny_lm(), tiny_edits()[:1])
    assert patch.provenance.notes[0]["editor"] == Editor.load(tmp_path / "a").id
    assert patch.provenance.config["rank"] == 4, "the settings of the training"


def test_what_was_settled_in_the_training_cannot_be_set_beside_the_editor(tmp_path):
    train(tmp_path / "a")
    lm, edit, editor = tiny_lm(), tiny_edits()[:1], {"editor": str(tmp_path / "a")}
    with pytest.raises(BadConfig, match=r"rank was settled .* as 4"):
        create("mend", editor | {"rank": 5}).fit(lm, edit)
    patch = create("mend", editor | {"rank": 4, "seed": 3}).fit(lm, edit)
    again = create("mend", patch.provenance.config).fit(lm, edit)
    assert again.id == patch.id


def test_a_patch_of_an_editor_with_default_blocks_can_be_made_again(tmp_path):
    create("mend", {"steps": 2, "rank": 4}).train(tiny_lm(), lessons(), folder=tmp_path / "a")
    lm, edit = tiny_lm(), tiny_edits()[:1]
    patch = create("mend", {"editor": str(tmp_path / "a")}).fit(lm, edit)
    assert create("mend", patch.provenance.config).fit(lm, edit).id == patch.id


def test_a_loss_that_is_no_number_ends_the_training(tmp_path, monkeypatch):
    from factpatch.methods.mend import _HyperCourse

    monkeypatch.setattr(_HyperCourse, "look", lambda *_: {"loss": float("nan")})
    with pytest.raises(CannotEdit, match="the loss is not finite after 0 steps"):
        train(tmp_path / "a")


def test_what_is_wrong_with_an_editor_is_said(tmp_path):
    lm, edit = tiny_lm(), tiny_edits()[:1]
    folder = tmp_path / "a"
    with pytest.raises(BadEditor, match="not an editor"):
        create("mend", {"editor": str(folder)}).fit(lm, edit)
    with pytest.raises(Killed):
        train(folder, stop_at=2.0)
    with pytest.raises(BadEditor, match="its training has not ended.\n  Run the same factpatch train again"):
        create("mend", {"editor": str(folder)}).fit(lm, edit)
    with pytest.raises(BadEditor, match=r"another rank \(4; now 5\)"):
        train(folder, rank=5)
    train(folder)
    with pytest.raises(BadEditor, match="holds a trained editor already"):
        train(folder)
    with pytest.raises(BadEditor, match="an editor of mend, not of malmen"):
        create("malmen", {"editor": str(folder)}).fit(lm, edit)
    with pytest.raises(WrongBase, match="factpatch train mend"):
        create("mend", {"editor": str(folder)}).fit(tiny_lm(seed=1), edit)
    with (folder / "editor.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\1\2\3")
    with pytest.raises(BadEditor, match="damaged"):
        create("mend", {"editor": str(folder)}).fit(lm, edit)
    (folder / "editor.json").write_text("{")
    with pytest.raises(BadEditor, match=r"editor\.json"):
        create("mend", {"editor": str(folder)}).fit(lm, edit)


def test_a_damaged_training_is_not_gone_on_with(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path / "a", stop_at=2.0)
    (tmp_path / "a" / "training.safetensors").write_bytes(b"half")
    with pytest.raises(BadEditor, match="damaged.\n  Remove it"):
        train(tmp_path / "a")


def test_one_edit_is_too_few(tmp_path):
    with pytest.raises(CannotEdit, match="checked on others"):
        create("mend").train(tiny_lm(), tiny_edits()[:1], folder=tmp_path)


def test_an_editor_is_not_trained_from_another(tmp_path):
    with pytest.raises(BadConfig, match="Leave editor out"):
        create("mend", {"editor": "x"}).train(tiny_lm(), lessons(), folder=tmp_path)


def test_a_folder_that_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        train(tmp_path / "file" / "a")


def test_without_an_editor_one_is_trained_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path))
    quick = SETTINGS | {"steps": 2, "batch_size": 1}
    first = create("mend", quick).fit(tiny_lm(), tiny_edits()[:1])
    monkeypatch.setattr("factpatch.methods.mend._HyperCourse.study", None)
    assert create("mend", quick).fit(tiny_lm(), tiny_edits()[:1]).id == first.id
    with pytest.raises(TypeError):
        create("mend", quick | {"lr": 0.5}).fit(tiny_lm(), tiny_edits()[:1])


def test_without_an_editor_a_training_that_was_killed_is_gone_on_with(tmp_path, monkeypatch):
    from factpatch.methods.mend import _HyperCourse

    study, calls = _HyperCourse.study, []

    def dies(self, chosen):
        calls.append(chosen)
        if len(calls) == 4:
            raise Killed
        return study(self, chosen)

    method = create("mend", SETTINGS | {"steps": 4, "batch_size": 1})
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "whole"))
    whole = method.fit(tiny_lm(), tiny_edits()[:1])
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "killed"))
    monkeypatch.setattr(_HyperCourse, "study", dies)
    with pytest.raises(Killed):
        method.fit(tiny_lm(), tiny_edits()[:1])
    assert method.fit(tiny_lm(), tiny_edits()[:1]).id == whole.id
    assert len(calls) == 4 + 2, "the steps after the look at step 2 again"
    assert not list((tmp_path / "killed" / "training").iterdir())


def test_it_is_trained_on_the_base_model_whatever_lies_on_it(tmp_path):
    lm = tiny_lm()
    patch = create("ft-m", {"layer": 2, "steps": 3}).fit(lm, tiny_edits()[:1])
    with lm.patched(patch):
        over = train(tmp_path / "a", lm=lm)
    assert over.id == train(tmp_path / "b").id
    assert torch.equal(over.tensors["log_step"], Editor.load(tmp_path / "b").tensors["log_step"])
