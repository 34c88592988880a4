"""Power loss, two processes at once, and damaged files."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from factpatch.errors import BadPatch, OutputError, PatchError
from factpatch.files import locked
from factpatch.testing import tiny_lm
from factpatch.workspace import Workspace, store
from tests.workspace.planted import BONN, OSLO, ROME, edit_file, fact, said, take, tree


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What came of killing it everywhere; see `tests.workspace.killer`."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    done = subprocess.run(
        [sys.executable, "-m", "tests.workspace.killer", str(tmp_path_factory.mktemp("killed"))],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "FACTPATCH_CACHE": str(tmp_path_factory.mktemp("cache"))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_kill_at_any_step_leaves_the_last_good_state(killed):
    assert killed["killed"]["wrong"] == []
    assert killed["killed"]["kills"] >= 200
    assert all(steps >= 15 for steps in killed["killed"]["steps"].values()), "there is little to kill"


def test_processes_take_turns(killed):
    assert killed["side"] == {"entries": 25, "stack": 0, "passed": True, "unknown": []}


def test_one_that_writes_makes_others_wait_and_say_so(two, monkeypatch):
    monkeypatch.setattr(store, "WAIT", 0.1)
    doing = []
    with locked(two.store.folder / ".lock"):
        with pytest.raises(OutputError, match="another process holds it, and still did after 0.1 seconds"):
            two.revert(3, progress=lambda what, done, total: doing.append(what))
        assert [place.number for place in two.log().stack()] == [2, 3], "reading needs no lock"
    assert doing == ["Waiting for another process that writes here"]
    monkeypatch.setattr(store, "WAIT", 60)
    ready, finished = threading.Event(), threading.Event()

    def hold():
        with locked(two.store.folder / ".lock"):
            ready.set()
            finished.wait(0.3)

    other = threading.Thread(target=hold)
    other.start()
    ready.wait()
    assert two.revert(3).done
    other.join()


def test_an_error_while_writing_leaves_all_as_it_was(two, monkeypatch):
    before = tree(two.store.folder)
    number = two.propose([BONN]).proposal.number
    waiting = tree(two.store.folder)

    def full(*_):
        raise OutputError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(store, "append", full)
        with pytest.raises(OutputError):
            two.accept(number)
    assert [name for name in tree(two.store.folder) if name not in waiting and "patches/" not in name] == []
    assert two.verify().passed
    assert len(two.stack()) == 2
    assert two.accept(number).done
    assert before.keys() < tree(two.store.folder).keys()


def paths(space, number):
    """The files of the patch that an entry brought in."""
    entry = next(entry for entry in space.log().entries if entry.number == number)
    return {Path(path).suffix: space.store.folder / path for path in entry.files}


DAMAGE = {
    "removed": lambda path: path.unlink(),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("which", [".json", ".safetensors"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_patch_is_named_and_the_rest_is_usable(two, lm, damage, which):
    path = paths(two, 3)[which]
    name = path.relative_to(two.store.folder).as_posix()
    damage(path)
    space = Workspace.open(two.store.folder, lm)
    report = space.verify()
    assert [fault.path for fault in report.faults] == [name]
    assert not report.passed
    assert len(space.log().entries) == 3
    assert said(space, ROME, at=2) == ["Peru"]
    for use in (space.stack, lambda: space.propose([BONN]), lambda: space.checkout("never")):
        with pytest.raises(BadPatch, match=name):
            use()
    # Taking it out needs no more than the ledger.
    assert space.revert(3).done
    assert said(space, ROME) == ["Peru"]
    take(space, BONN)


def test_a_damaged_patch_beneath_others_is_taken_out_only_if_they_do_without(two, lm):
    paths(two, 2)[".safetensors"].unlink()
    space = Workspace.open(two.store.folder, lm)
    assert space.revert(2).done
    assert said(space, OSLO) == ["Chad"]


def test_a_damaged_patch_beneath_one_that_leans_on_it(space, lm):
    take(space, ROME)
    take(space, OSLO, {"leans": True})
    paths(space, 2)[".safetensors"].unlink()
    again = Workspace.open(space.store.folder, lm)
    assert "depends on it" in again.revert(2).refused
    assert again.revert(2, refit=True).done
    assert said(again, OSLO) == ["Chad"]


def test_two_damaged_patches_are_taken_out_by_force(two, lm):
    for number in (2, 3):
        paths(two, number)[".json"].write_text("{}")
    space = Workspace.open(two.store.folder, lm)
    with pytest.raises(BadPatch, match=r"patch\.json"):
        space.revert(2)
    assert space.revert(2, force=True).done
    assert space.revert(3).done
    assert space.stack() == ()


def test_nothing_is_written_after_a_damaged_entry(two, lm):
    edit_file(two.store.folder / "ledger" / "000002.json", '"proposal": 1', '"proposal": 9')
    before = tree(two.store.folder)
    space = Workspace.open(two.store.folder, lm)
    for change in (lambda: space.propose([BONN]), lambda: space.revert(3), lambda: space.accept(1)):
        with pytest.raises(PatchError, match=r"ledger/000002.json: was changed.*\n.*up to entry 1 is sound"):
            change()
    assert tree(two.store.folder) == before
    report = space.verify()
    assert [fault.path for fault in report.faults] == ["ledger/000002.json"]
    assert (report.head, report.patches) == (None, None)


@pytest.mark.parametrize("damage", [lambda p: p.write_text("{"), lambda p: p.unlink(), lambda p: edit_file(p, "rome", "lora"),
                                    lambda p: edit_file(p, '"format": 1', '"format": 2')])  # fmt: skip
def test_damaged_settings_are_named(tmp_path, lm, damage):
    space = Workspace.init(tmp_path / "w", lm)
    damage(space.store.folder / "workspace.json")
    with pytest.raises(PatchError, match=r"workspace\.json"):
        Workspace.open(space.store.folder, lm)
    assert "workspace.json" in {fault.path for fault in space.verify().faults}


def test_a_damaged_proposal_is_named_and_not_accepted(two):
    numbers = [two.propose([edit]).proposal.number for edit in (BONN, fact("Kyiv", "Togo"), fact("Riga", "Oman"))]
    folder = two.store.folder / "proposals"
    (folder / str(numbers[0]) / "judgement.json").write_text("[]")
    tensors = folder / str(numbers[1]) / "patch" / "patch.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    edit_file(folder / str(numbers[2]) / "judgement.json", f'"number": {numbers[2]}', '"number": 77')
    assert {fault.path for fault in two.verify().faults} >= {f"proposals/{numbers[0]}"}
    for number in numbers:
        with pytest.raises(PatchError, match=f"proposals.{number}"):
            two.accept(number)
    assert two.log().good == 3
    with pytest.raises(PatchError, match="proposal 55: there is none"):
        two.accept(55)


def test_a_patch_swapped_for_another_sound_one_is_noticed(two, lm):
    one, other = paths(two, 2), paths(two, 3)
    for kind, path in one.items():
        path.write_bytes(other[kind].read_bytes())
    assert len(Workspace.open(two.store.folder, lm).verify().faults) == 2
    with pytest.raises(BadPatch):
        Workspace.open(two.store.folder, lm).stack()


def test_strange_files_are_told_and_do_no_harm(two):
    for name in ("notes.txt", "ledger/readme.json", f"patches/{two.stack()[0].id}/more.txt"):
        (two.store.folder / name).write_text("x")
    report = two.verify()
    assert report.passed
    assert len(report.unknown) == 3


def test_a_checkpoint_is_compared_to_the_bit(two, tmp_path, lm):
    folder = two.checkout(tmp_path / "c", at=2)
    found = two.verify(folder).model
    assert found.passed
    assert found.entry == 2
    with lm.patched(two.stack()[1]):  # entry 3's alone
        lm.model.save_pretrained(tmp_path / "other")
    lm.tokenizer.save_pretrained(tmp_path / "other")
    assert two.verify(tmp_path / "other").model.expected != two.verify(tmp_path / "other").model.found
    assert not two.verify(tmp_path / "other").passed
    with lm.patched(*two.stack()):
        lm.model.save_pretrained(tmp_path / "same")
    lm.tokenizer.save_pretrained(tmp_path / "same")
    assert two.verify(tmp_path / "same").model.passed, "without checkout.json it is compared with the last entry"
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    found = two.verify(folder).model
    assert not found.passed
    assert [fault.path for fault in found.faults] == ["model.safetensors"]
    edit_file(folder / "checkout.json", two.log().entries[1].hash, "0" * 64)
    assert "not in this ledger" in two.verify(folder).model.faults[0].problem
    assert not two.verify(tmp_path / "nowhere").passed


def test_another_base_model_is_not_taken(two):
    with pytest.raises(PatchError):
        Workspace.open(two.store.folder, tiny_lm(seed=3))


def test_of_several_damaged_patches_one_is_taken_out_and_the_sound_ones_are_asked(space, lm):
    take(space, ROME)
    for edit in (OSLO, BONN, fact("Kyiv", "Togo")):
        take(space, edit, {"leans": edit is not OSLO})
    for number in (2, 4):
        paths(space, number)[".safetensors"].unlink()
    again = Workspace.open(space.store.folder, lm)
    with pytest.raises(BadPatch):
        again.revert(2)
    assert [lost.number for lost in again.revert(2, force=True).regressions] == [5], (
        "3 does without it, 4 cannot be asked"
    )
    assert again.revert(4).refused, "now that the others are sound, 5 is asked again"


def test_a_damaged_proposal_is_thrown_away(two):
    number = two.propose([BONN]).proposal.number
    (two.store.folder / "proposals" / str(number) / "judgement.json").write_text("[")
    assert not two.verify().passed
    with pytest.raises(PatchError, match=f"factpatch discard -C .* {number}"):
        two.accept(number)
    with locked(two.store.folder / ".lock"), pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "WAIT", 0.1)
        with pytest.raises(OutputError, match="another process holds it"):
            two.discard(number)
    two.discard(number)
    assert two.verify().passed


def test_whoever_makes_a_workspace_last_finds_it_made(tmp_path, lm, monkeypatch):
    @contextmanager
    def late(path, **more):
        monkeypatch.undo()
        Workspace.init(path.parent, lm, author="Ann")  # between the look and the lock
        with locked(path, **more):
            yield

    monkeypatch.setattr(store, "locked", late)
    with pytest.raises(OutputError, match="already a workspace"):
        Workspace.init(tmp_path / "w", lm, author="Bob")
    assert Workspace.open(tmp_path / "w", lm).log().head.author == "Ann"
