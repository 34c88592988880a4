"""Whether a workspace is as it was written, and whether its stack gives the model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from factpatch.errors import FactpatchError
from factpatch.files import sha256_of
from factpatch.lm import LM, load
from factpatch.lm.model import checksum
from factpatch.patches import Patch
from factpatch.progress import Progress, silent
from factpatch.workspace.entry import replay
from factpatch.workspace.ledger import Damage, Ledger, entry_file
from factpatch.workspace.store import Store

__all__ = ["CHECKOUT", "Fault", "ModelCheck", "Report", "verify"]

CHECKOUT = "checkout.json"
"""What says of a checkpoint which entry it was made at."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fault(_Value):
    """A file that is not as it should be."""

    path: str
    problem: str


class ModelCheck(_Value):
    """A checkpoint beside what the stack gives.

    entry     the number of the entry whose stack it was compared with
    expected  SHA-256 over all weights of the base model with that stack
    found     of the checkpoint as it loads; None if it does not
    """

    folder: str
    entry: int | None
    expected: str | None
    found: str | None
    faults: tuple[Fault, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the weights are the same to the bit, and the files those that were written."""
        return self.expected is not None and self.expected == self.found and not self.faults


class Report(_Value):
    """What was looked at and what was found.

    entries  sound entries, `last` is the number of the last one
    head     hash of the last entry, if all are sound: who has noted it can tell a ledger that was cut off
    patches  in the stack now; None if it cannot be known
    faults   damaged and missing files, each named
    unknown  files that nothing in the ledger knows of; the next accept or revert removes patches among them
    model    of the checkpoint that was compared
    """

    entries: int
    last: int
    head: str | None
    patches: int | None
    faults: tuple[Fault, ...]
    unknown: tuple[str, ...]
    model: ModelCheck | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults and (self.model is None or self.model.passed)


def verify(
    store: Store,
    model_folder: Path | None = None,
    lm: LM | None = None,
    *,
    device: str | None = None,
    progress: Progress = silent,
) -> Report:
    """Look at every file of a workspace, and at a checkpoint if one is named; then the base model must be given."""
    ledger = store.ledger()
    damage = [*ledger.damage, *store.differing(ledger.files())]
    if ledger.last == 0:
        damage.append(Damage("ledger", "is empty"))
    named = {fault.path for fault in damage}
    patches = sorted({path.split("/")[1] for path in ledger.files() if path.startswith("patches/")})
    for i, patch_id in enumerate(patches):
        progress("Reading patches", i, len(patches))
        if not any(path.startswith(f"patches/{patch_id}/") for path in named):
            damage += _patch(store.folder / "patches" / patch_id, patch_id)
    damage += store.proposals()[1]
    for pending in store.proposals()[0]:
        damage += _patch(store.folder / "proposals" / str(pending.number) / "patch", pending.patch)
    sound = not ledger.damage and ledger.last > 0
    return Report(
        entries=len(ledger.entries),
        last=ledger.last,
        head=ledger.entries[-1].hash if sound else None,
        patches=len(replay(ledger.entries)) if sound else None,
        faults=tuple(Fault(path=each.path, problem=each.problem) for each in damage),
        unknown=tuple(_unknown(store, ledger)),
        model=None if model_folder is None or lm is None else _model(store, ledger, model_folder, lm, device, progress),
    )


def _patch(folder: Path, patch_id: str) -> list[Damage]:
    """What is wrong with a patch beyond its files' sums."""
    path = "/".join(folder.parts[-2:])
    try:
        found = Patch.load(folder)
    except FactpatchError as error:
        return [Damage(path, str(error).splitlines()[0])]
    return [] if found.id == patch_id else [Damage(path, f"holds the patch {found.id}")]


def _unknown(store: Store, ledger: Ledger) -> list[str]:
    known = {*ledger.files(), "workspace.json", ".lock", *(entry_file(each.number) for each in ledger.entries)}
    known |= {each.path for each in ledger.damage}
    waiting = tuple(f"proposals/{pending.number}/" for pending in store.proposals()[0])
    found = (path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file())
    return sorted(path for path in found if path not in known and not path.startswith(waiting))


def _model(store: Store, ledger: Ledger, folder: Path, lm: LM, device: str | None, progress: Progress) -> ModelCheck:
    described, faults = _described(folder)
    entry, at = None, None
    if described is not None:
        entry = next((each for each in ledger.entries if each.hash == described.get("hash")), None)
        if entry is None:
            problem = f"made at an entry that is not in this ledger ({str(described.get('hash'))[:8]}…)"
            return ModelCheck(
                folder=str(folder),
                entry=None,
                expected=None,
                found=None,
                faults=(*faults, Fault(path=CHECKOUT, problem=problem)),
            )
        at = entry.number
        faults += _differing(folder, described)
    try:
        places = ledger.stack(at)
        stack = [store.patch(ledger, place.patch) for place in places]
        with lm.unpatched(), lm.patched(*stack):
            expected, dtype = checksum(lm.model), store.settings().dtype
        own = load(folder, dtype=dtype, device=device, progress=progress)
        found: str | None = checksum(own.model)
    except FactpatchError as error:
        problem = str(error).splitlines()[0]
        return ModelCheck(
            folder=str(folder), entry=at, expected=None, found=None, faults=(*faults, Fault(path="", problem=problem))
        )
    return ModelCheck(folder=str(folder), entry=at or ledger.last, expected=expected, found=found, faults=tuple(faults))


def _described(folder: Path) -> tuple[dict[str, Any] | None, list[Fault]]:
    """What `checkout.json` says; None if there is none, or it cannot be read."""
    path = folder / CHECKOUT
    if not path.is_file():
        return None, []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, [Fault(path=CHECKOUT, problem=f"cannot be read ({error})")]
    return (found, []) if isinstance(found, dict) else (None, [Fault(path=CHECKOUT, problem="is no object")])


def _differing(folder: Path, described: dict[str, Any]) -> list[Fault]:
    files = described.get("files")
    if not isinstance(files, dict):
        return [Fault(path=CHECKOUT, problem="names no files")]
    found = []
    for name, digest in files.items():
        path = folder / Path(str(name)).name
        if not path.is_file():
            found.append(Fault(path=path.name, problem="missing"))
        elif sha256_of(path) != digest:
            found.append(Fault(path=path.name, problem="changed since the checkout (SHA-256 differs)"))
    return found
