"""Whether a workspace is as it was written, and whether its stack gives the model on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from factpatch.commands import typed_in
from factpatch.errors import FactpatchError, PatchError
from factpatch.lm import LM, load
from factpatch.lm.model import checksum
from factpatch.patches import Patch
from factpatch.progress import Progress, silent
from factpatch.workspace.entry import replay
from factpatch.workspace.ledger import Damage, Ledger, entry_file
from factpatch.workspace.store import Pending, Store, differing

__all__ = ["CHECKOUT", "ModelCheck", "Report", "compare", "verify"]

CHECKOUT = "checkout.json"
"""What says of a checkpoint which entry it was made at."""


_BACK = "Put the file back from a copy."
_LEAST = 12
"""Figures of a hash by which an entry may be named."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
    faults: tuple[Damage, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the weights are the same to the bit, and the files those that were written."""
        return self.expected is not None and self.expected == self.found and not self.faults


class Report(_Value):
    """What was looked at and what was found.

    entries  sound entries, `last` is the number of the last one
    head     hash of the last entry, if all are sound: who has noted it can tell a ledger that was cut off
    patches  in the stack now; None if it cannot be known
    faults   damaged and missing files, each named, with what to do
    past     the same of patches that were taken out: the model as it is now does not depend on them, though what it was at
             an earlier entry does; among the faults if all of the history is asked for
    unknown  files that nothing in the ledger knows of; the next accept or revert removes patches among them. While an entry
             is damaged, what it knew of is not told
    model    of the checkpoint that was compared
    """

    entries: int
    last: int
    head: str | None
    patches: int | None
    faults: tuple[Damage, ...]
    past: tuple[Damage, ...] = ()
    unknown: tuple[str, ...]
    model: ModelCheck | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults and (self.model is None or self.model.passed)


def verify(store: Store, progress: Progress = silent, *, expect: str | None = None, history: bool = False) -> Report:
    """Look at every file of a workspace. Raises PatchError if it is none, not even a damaged one.

    expect, history  see `Workspace.verify`
    """
    store.check()
    ledger = store.ledger()
    damage = [*ledger.damage, *store.differing(ledger.files())]
    if ledger.last == 0:
        damage.append(Damage("ledger", "is empty"))
    if expect and len(expect) < _LEAST:
        raise PatchError(f'"{expect}": too short for a hash.\n  Give {_LEAST} of its figures at least, better all 64.')
    if expect and not any(entry.hash.startswith(expect.lower()) for entry in ledger.entries):
        damage.append(Damage("ledger", f"has no entry {expect}: it was cut short, or it is another", _BACK))
    named = {fault.path for fault in damage}
    patches = sorted({path.split("/")[1] for path in ledger.files() if path.startswith("patches/")})
    for i, patch_id in enumerate(patches):
        progress("Reading patches", i, len(patches))
        if not any(path.startswith(f"patches/{patch_id}/") for path in named):
            damage += _patch(store.folder / "patches" / patch_id, patch_id)
    waiting, unreadable = store.proposals()
    damage += unreadable
    for pending in waiting:
        damage += _patch(store.folder / "proposals" / str(pending.number) / "patch", pending.patch)
    sound = not ledger.damage and ledger.last > 0
    standing = {place.patch for place in replay(ledger.entries)} if sound else set(patches)
    told = [replace(each, then=each.then or _then(store, ledger, each)) for each in damage]
    past = [] if history else [each for each in told if _is_past(each.path, standing)]
    return Report(
        entries=len(ledger.entries),
        last=ledger.last,
        head=ledger.entries[-1].hash if sound else None,
        patches=len(replay(ledger.entries)) if sound else None,
        faults=tuple(each for each in told if each not in past),
        past=tuple(past),
        unknown=tuple(_unknown(store, ledger, waiting)),
    )


def _is_past(path: str, standing: set[str]) -> bool:
    kind, _, rest = path.partition("/")
    return kind == "patches" and rest.split("/")[0] not in standing


def _then(store: Store, ledger: Ledger, damage: Damage) -> str:
    """What to do about it; of a patch, which entry brought it in."""
    kind, _, rest = damage.path.partition("/")
    if kind == "proposals":
        return f"Throw it away: {typed_in(store.folder, 'discard', rest.split('/')[0])}"
    number = next(iter(_brought(ledger, rest.split("/")[0])), None) if kind == "patches" else None
    if number is None:
        return _BACK
    if not ledger.damage and rest.split("/")[0] not in {place.patch for place in replay(ledger.entries)}:
        return (
            f"It belongs to entry {number}, which was taken out: only what the model was before that needs it. {_BACK}"
        )
    out = typed_in(store.folder, "revert", number)
    return f"It belongs to entry {number}. {_BACK.removesuffix('.')}, or take the patch out: {out}"


def _brought(ledger: Ledger, patch_id: str) -> Iterator[int]:
    """The numbers of the entries by which a patch lies there, or came in: made anew, it has the place of the one before."""
    if not ledger.damage:
        yield from (place.number for place in replay(ledger.entries) if place.patch == patch_id)
    yield from (each.number for each in ledger.entries if patch_id in {each.patch, *each.replaced.values()})


def _patch(folder: Path, patch_id: str) -> list[Damage]:
    """What is wrong with a patch beyond its files' sums."""
    path = "/".join(folder.parts[-2:])
    try:
        found = Patch.load(folder)
    except FactpatchError as error:
        return [Damage(path, str(error).splitlines()[0])]
    return [] if found.id == patch_id else [Damage(path, f"holds the patch {found.id}")]


def _unknown(store: Store, ledger: Ledger, waiting: Sequence[Pending]) -> list[str]:
    known = {*ledger.files(), "workspace.json", ".lock", *(entry_file(each.number) for each in ledger.entries)}
    known |= {each.path for each in ledger.damage}
    theirs = tuple(f"proposals/{pending.number}/" for pending in waiting)
    if ledger.damage:
        theirs = (*theirs, "patches/")
    found = (path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file())
    return sorted(path for path in found if path not in known and not path.startswith(theirs))


def compare(store: Store, folder: Path, lm: LM, *, device: str | None, progress: Progress) -> ModelCheck:
    """A checkpoint beside what the stack gives: that of the entry it was checked out at, or else of the last.

    lm  the base model
    """
    described, faults = _described(folder)
    if not folder.exists():
        told = Damage("", "there is no such folder", "Name one that factpatch checkout has written.")
        return ModelCheck(folder=str(folder), entry=None, expected=None, found=None, faults=(told,))
    ledger = store.ledger()
    at, entry, expected, found = None, None, None, None
    try:
        if described is not None:
            at = next((each.number for each in ledger.entries if each.hash == described.get("hash")), None)
            if at is None:
                raise PatchError(f"made at an entry that is not in this ledger ({str(described.get('hash'))[:8]}…)")
            faults += _differing(folder, described)
        stack = [store.patch(ledger, place.patch) for place in ledger.stack(at)]
        with lm.unpatched(), lm.patched(*stack):
            entry, expected = at or ledger.last, checksum(lm.model)
        found = checksum(load(folder, dtype=store.settings().dtype, device=device, progress=progress).model)
    except FactpatchError as error:
        faults.append(Damage(CHECKOUT if at is None and described else "", str(error).splitlines()[0]))
    return ModelCheck(folder=str(folder), entry=entry, expected=expected, found=found, faults=tuple(faults))


def _described(folder: Path) -> tuple[dict[str, Any] | None, list[Damage]]:
    """What `checkout.json` says; None if there is none, or it cannot be read."""
    path = folder / CHECKOUT
    if not path.is_file():
        return None, []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, [Damage(CHECKOUT, f"cannot be read ({error})")]
    return (found, []) if isinstance(found, dict) else (None, [Damage(CHECKOUT, "is no object")])


def _differing(folder: Path, described: dict[str, Any]) -> list[Damage]:
    files = described.get("files")
    if not isinstance(files, dict):
        return [Damage(CHECKOUT, "names no files")]
    # A checkpoint may come from elsewhere: what it names must not lead out of its folder.
    inside = {Path(name).name: str(digest) for name, digest in files.items()}
    return differing(folder, inside, "changed since the checkout")
