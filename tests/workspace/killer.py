"""Kill accept, revert, propose and discard at every step that touches the disk, and see what is left.

Run as a program of its own: `python -m tests.workspace.killer FOLDER` prints JSON. The work is done in forked children, which have
the model already and never run it. A child counts its steps (files opened to be written, renames, removals, new folders,
what is brought to the disk) and dies before the one it is told, as by `kill -9`; or as by power loss: then what was not
brought to the disk by then is cut off at some length, and renames whose folder was not are perhaps undone.
"""

import json
import os
import random
import shutil
import stat
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

import factpatch.methods
import factpatch.patches.folder as folder_of_patches
from factpatch.testing import tiny_lm
from factpatch.workspace import Workspace
from tests.workspace.planted import BONN, OSLO, ROME, Tell, make, said, take, tree

STEPS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
NEVER = -1


class Steps:
    """Counts them, and dies before the one it is told."""

    def __init__(self, folder, at, loss):
        self.folder, self.at, self.loss, self.count, self.on = folder, at, loss, 0, True
        self.old = {path.stat().st_ino for path in folder.rglob("*")}
        self.synced, self.renames = set(), []
        sys.addaudithook(self.hook)
        os.fsync = self.fsync  # noted, and not done: what is lost is decided here

    def hook(self, event, args):
        if not self.on or not (event in STEPS or (event == "open" and isinstance(args[2], int) and args[2] & WRITES)):
            return
        self.step()
        if event == "os.rename":
            self.renames.append((Path(args[0]), Path(args[1])))

    def fsync(self, handle):
        self.step()
        found = os.fstat(handle)
        self.synced.add(found.st_ino)
        if stat.S_ISDIR(found.st_mode):
            here = Path(f"/proc/self/fd/{handle}").readlink()
            # On the disk it is then no more under its old name, or already under its new one.
            self.renames = [each for each in self.renames if here not in {each[0].parent, each[1].parent}]

    def step(self):
        if self.count == self.at:
            self.on = False
            if self.loss is not None:
                self.lose(random.Random(self.loss))
            os._exit(9)
        self.count += 1

    def lose(self, rng):
        for one, other in reversed(self.renames):
            if rng.random() < 0.5 and other.exists():
                if one.parent.exists():
                    other.rename(one)
                else:
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
        for path in self.folder.rglob("*"):
            found = path.stat()
            if path.is_file() and found.st_ino not in self.old | self.synced:
                os.truncate(path, rng.randint(0, found.st_size))


def child(work, folder, at=NEVER, loss=None):
    """Do it in a child; how many steps it took, or None if it was killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            space = Workspace.open(folder, LM)
            steps = Steps(folder, at, loss)
            work(space)
            steps.on = False
            os.write(write, str(steps.count).encode())
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    os.close(write)
    told = os.read(read, 100)
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 9:
        return None
    assert code == 0, f"the work itself failed ({code})"
    return int(told)


def accept(space):
    assert space.accept(1).done


def revert(space):
    assert space.revert(2, refit=True).entry.replaced


def propose(space):
    assert space.propose([OSLO]).done


def discard(space):
    space.discard(2)
    assert space.proposals() == ()


def prepared(folder, work):
    """A workspace in which the work can be done."""
    space = make(folder, LM)
    if work is accept:
        space.propose([BONN])
        take(space, ROME)  # the proposal is judged again, and an earlier edit asked again
    else:
        take(space, ROME)
    if work is revert:
        take(space, OSLO, {"leans": True})
    if work is discard:
        space.propose([BONN])
    return space


def check(folder, before, work):
    """What must hold after a kill. Returns what does not."""
    wrong = []
    space = Workspace.open(folder, LM)
    ledger, report = space.log(), space.verify()
    entries = sum(name.startswith("ledger/0") for name in before)
    if ledger.damage or not report.passed:
        wrong.append(f"damaged: {report.faults}")
        return wrong
    if ledger.good not in {entries, entries + (work not in {propose, discard})}:
        wrong.append(f"{ledger.good} entries after {entries}")
    now = tree(folder)
    kept = [name for name in before if not name.startswith("proposals/")]
    wrong += [f"{name} changed" for name in kept if now.get(name) != before[name]]
    done = ledger.good > entries
    expected = {accept: [ROME, BONN] if done else [ROME], revert: [OSLO] if done else [ROME, OSLO]}.get(work, [ROME])
    if said(space, *expected) != [edit.target for edit in expected]:
        wrong.append(f"answers: {said(space, *expected)}")
    # Whoever comes next finds all in order, and cleans up.
    if done or (work is propose and space.proposals()) or (work is discard and not space.proposals()):
        take(space, ROME.model_copy(update={"prompt": "Rome is in"}))
    else:
        work(space)
        if work in {propose, discard}:
            take(space, BONN)
    left = [name for name in tree(folder) if any(part.startswith(".") for part in Path(name).parts)]
    after = Workspace.open(folder, LM).verify()
    if left or after.unknown or not after.passed:
        wrong.append(f"left behind: {left} {after.unknown} {after.faults}")
    return wrong


def kill_everywhere(folder):
    kills, wrong, steps = 0, [], {}
    for work in (accept, revert, propose, discard):
        start = folder / work.__name__
        prepared(start, work)
        before = tree(start)
        number = child(work, shutil.copytree(start, folder / "whole"))
        shutil.rmtree(folder / "whole")
        steps[work.__name__] = number
        for at in range(number):
            for loss in (None, at, at + 1000)[: 1 if work is propose else 3]:
                place = shutil.copytree(start, folder / "copy")
                kills += child(work, place, at, loss) is None
                wrong += [f"{work.__name__}, step {at}, {loss}: {each}" for each in check(place, before, work)]
                shutil.rmtree(place)
    return {"kills": kills, "steps": steps, "wrong": wrong}


def side_by_side(folder):
    """Four processes accept and take back at once, three times."""
    space = make(folder / "many", LM)
    edits = [
        ROME.model_copy(update={"prompt": f"{word} lies in", "subject": word})
        for word in ("Rome", "Oslo", "Bonn", "Kyiv")
    ]
    for _ in range(3):
        numbers = [space.propose([edit]).proposal.number for edit in edits]
        pids = []
        for number in numbers:
            pid = os.fork()
            if pid == 0:
                own = Workspace.open(folder / "many", LM)
                entry = own.accept(number).entry
                own.revert(entry.number)
                os._exit(0)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes == [0] * 4, codes
    ledger, report = space.log(), space.verify()
    return {
        "entries": ledger.good,
        "stack": len(ledger.stack()),
        "passed": report.passed,
        "unknown": list(report.unknown),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    factpatch.methods._foreign = lambda: (SimpleNamespace(name="tell", load=lambda: Tell),)
    folder_of_patches._kinds = cache(folder_of_patches._kinds)  # asks for installed packages each time
    os.fsync = lambda handle: None
    LM = tiny_lm()
    _ = LM.fingerprint
    LM.answer = lambda prompts, **_: ["nothing"] * len(prompts)
    root = Path(sys.argv[1])
    sys.stdout.write(json.dumps({"killed": kill_everywhere(root), "side": side_by_side(root)}))
