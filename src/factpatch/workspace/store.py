"""The folder of a workspace: what lies in it, and the few steps in which it changes.

    workspace.json           the model and the gate
    ledger/000001.json …     one file for each entry; see `factpatch.workspace.ledger`
    patches/<patch id>/      every patch that was ever accepted, or made anew
    proposals/<number>/      `patch/` and `judgement.json` of what passed the gate and waits
    .lock                    held by whoever writes

Whatever a process that was killed has left is in no entry, and is removed by the next that writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from factpatch.edits import Probe, first_problem
from factpatch.errors import BadPatch, OutputError, PatchError
from factpatch.files import locked, make_folder, remove_drafts, sha256_of, whole_file, whole_folder
from factpatch.patches import Patch
from factpatch.progress import Progress
from factpatch.workspace.conflicts import Conflict
from factpatch.workspace.entry import Entry
from factpatch.workspace.ledger import Damage, Ledger, append, read_ledger

__all__ = ["Pending", "Settings", "Store"]

WAIT = 600.0
"""Seconds to wait for another process that writes."""
_FOLDERS = ("ledger", "patches", "proposals")

V = TypeVar("V", bound=BaseModel)


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Settings(_Value):
    """What a workspace is about; fixed when it is made.

    model         where the base model comes from: a short name, a folder, a hub id
    fingerprint   of the base model; see `lm.fingerprint`
    shape         number of blocks and hidden size
    dtype         of its weights; the sum of a weight and a change depends on it
    requirements  what a patch must show
    proposes      whether probes are made up where the edits have none
    chat          put prompts into the chat template
    retain        questions that must be answered as before
    method        how edits are made, if it is not said; "auto" for the cheapest that passes
    config        settings of that method
    created       UTC, ISO 8601
    """

    format: Literal[1] = 1
    model: str
    fingerprint: str
    shape: tuple[int, int]
    dtype: Literal["float32", "bfloat16", "float16"]
    requirements: tuple[str, ...]
    proposes: bool = True
    chat: bool = False
    retain: tuple[Probe, ...] = ()
    method: str
    config: dict[str, Any] = {}
    created: str


class Pending(_Value):
    """A proposal that passed the gate and waits to be accepted.

    on         hash of the entry it was made on
    author     who proposed it, and why (`message`)
    patch      id of the patch
    edits      what it does, for people: prompt and target
    scores     summary of its scorecard under the open protocol
    judgement  what the gate said; see `Judgement.to_json`
    conflicts  with what lay there, which were allowed
    """

    number: PositiveInt
    on: str
    author: str
    time: str
    message: str = ""
    patch: str
    method: str
    edits: tuple[tuple[str, str], ...]
    scores: dict[str, float | None]
    judgement: dict[str, Any]
    conflicts: tuple[Conflict, ...] = ()


class Store:
    """One workspace's folder. Reading takes no lock: what has a name is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, Patch] = {}

    def settings(self) -> Settings:
        """What the workspace is about. Raises PatchError if this is no workspace, or the file is damaged."""
        if not (self.folder / "ledger" / "000001.json").is_file() and not (self.folder / "workspace.json").is_file():
            raise PatchError(
                f"{self.folder}: not a workspace.\n  Name one (--workspace DIR), or make one: factpatch init DIR"
            )
        return _read(self.folder / "workspace.json", Settings)

    def ledger(self) -> Ledger:
        """The entries, as far as they can be read."""
        return read_ledger(self.folder)

    @contextmanager
    def writing(self, progress: Progress) -> Iterator[Ledger]:
        """Hold the lock, with what killed processes left removed; yields the ledger.

        Raises PatchError if the ledger is damaged, OutputError if another process goes on writing.
        """
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.folder / ".lock", wait=0))
            except OutputError:
                progress("Waiting for another process that writes here", 0, None)
                held.enter_context(locked(self.folder / ".lock", wait=WAIT))
            ledger = self.ledger()
            ledger.up_to(None)
            self._sweep(ledger)
            yield ledger

    def create(self, settings: Settings, entry: Entry) -> None:
        """Make a workspace of an empty or new folder; the first entry's rename makes it one.

        Raises OutputError if there is something else.
        """
        make_folder(self.folder)
        ours = {*_FOLDERS, "workspace.json", ".lock"}
        others = [
            p.name for p in self.folder.iterdir() if p.name not in ours and not p.name.startswith(".workspace.json-")
        ]
        if others or (self.folder / "ledger" / "000001.json").exists():
            raise OutputError(
                f"{self.folder}: already {'has ' + others[0] if others else 'a workspace'}.\n  Name a new or an empty folder."
            )
        with locked(self.folder / ".lock", wait=WAIT):
            remove_drafts(self.folder)
            for name in _FOLDERS:
                make_folder(self.folder / name)
            with whole_file(self.folder / "workspace.json") as draft:
                draft.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
            files = {"workspace.json": sha256_of(self.folder / "workspace.json")}
            append(self.folder, entry.model_copy(update={"files": files}).sealed())

    def _sweep(self, ledger: Ledger) -> None:
        """Remove what no entry knows of: drafts, patches that were not accepted after all, proposals that were."""
        known = {path.split("/")[1] for path in ledger.files() if path.startswith("patches/")}
        accepted = {entry.proposal for entry in ledger.entries} - {None}
        for folder in (self.folder, *(self.folder / name for name in _FOLDERS)):
            remove_drafts(folder)
        for path in (self.folder / "patches").glob("*"):
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
        for number in accepted:
            shutil.rmtree(self.folder / "proposals" / str(number), ignore_errors=True)

    def commit(self, ledger: Ledger, entry: Entry, patches: tuple[Patch, ...] = ()) -> Entry:
        """Keep the patches, then the entry that brings them in; only inside `writing`.

        Raises OutputError if something cannot be written; then nothing has happened.
        """
        files = {path: digest for patch in patches for path, digest in self._keep(ledger, patch).items()}
        before = ledger.head
        update = {"number": before.number + 1, "previous": before.hash, "files": files}
        sealed = Entry.model_validate(entry.model_copy(update=update).model_dump()).sealed()
        append(self.folder, sealed)
        if sealed.proposal is not None:
            shutil.rmtree(self.folder / "proposals" / str(sealed.proposal), ignore_errors=True)
        return sealed

    def _keep(self, ledger: Ledger, patch: Patch) -> dict[str, str]:
        """The patch in its folder, and the SHA-256 of its files. One that was there before stays, and must be whole."""
        folder = self.folder / "patches" / patch.id
        known = {path: digest for path, digest in ledger.files().items() if path.startswith(f"patches/{patch.id}/")}
        if known:
            self._check(known)
            return known
        patch.save(folder)
        return {f"patches/{patch.id}/{path.name}": sha256_of(path) for path in sorted(folder.iterdir())}

    def patch(self, ledger: Ledger, patch_id: str) -> Patch:
        """A patch that was accepted. Raises BadPatch, naming the file, if it is not what the ledger says."""
        self._check({p: d for p, d in ledger.files().items() if p.startswith(f"patches/{patch_id}/")})
        if patch_id not in self._read:
            self._read[patch_id] = Patch.load(self.folder / "patches" / patch_id)
        return self._read[patch_id]

    def _check(self, files: dict[str, str]) -> None:
        damage = self.differing(files)
        if damage:
            raise BadPatch(
                f"{self.folder / damage[0].path}: {damage[0].problem}.\n  Put the file back from a copy, or take the patch "
                "out: factpatch revert"
            )

    def differing(self, files: dict[str, str]) -> list[Damage]:
        """Those of these files that are missing or have another SHA-256."""
        found = []
        for path, digest in files.items():
            place = self.folder / path
            if not place.is_file():
                found.append(Damage(path, "missing"))
            elif sha256_of(place) != digest:
                found.append(Damage(path, "damaged, or not the file that was accepted (SHA-256 differs)"))
        return found

    def proposals(self) -> tuple[list[Pending], list[Damage]]:
        """Those that wait, by number, and those that cannot be read."""
        accepted = {entry.proposal for entry in self.ledger().entries}
        numbers = sorted(int(p.name) for p in (self.folder / "proposals").glob("*") if p.name.isdecimal())
        found, damage = [], []
        for number in numbers:
            if number not in accepted:
                try:
                    found.append(_read(self.folder / "proposals" / str(number) / "judgement.json", Pending))
                except PatchError as error:
                    damage.append(Damage(f"proposals/{number}", str(error).splitlines()[0]))
        return found, damage

    def proposal(self, number: int) -> tuple[Pending, Patch]:
        """One that waits, and its patch. Raises PatchError, BadPatch."""
        folder = self.folder / "proposals" / str(number)
        if not folder.is_dir() or any(entry.proposal == number for entry in self.ledger().entries):
            raise PatchError(f"proposal {number}: there is none.\n  See those that wait: factpatch list")
        pending, patch = _read(folder / "judgement.json", Pending), Patch.load(folder / "patch")
        if patch.id != pending.patch or pending.number != number:
            raise BadPatch(f"{folder}: not the patch that was judged.\n  Propose it again: factpatch propose")
        return pending, patch

    def propose(self, ledger: Ledger, pending: Pending, patch: Patch) -> Pending:
        """Keep a proposal under the next number; only inside `writing`."""
        taken = [int(p.name) for p in (self.folder / "proposals").glob("*") if p.name.isdecimal()]
        number = 1 + max([0, *taken, *(entry.proposal or 0 for entry in ledger.entries)])
        kept = pending.model_copy(update={"number": number})
        with whole_folder(self.folder / "proposals" / str(number)) as draft:
            patch.save(draft / "patch")
            (draft / "judgement.json").write_text(kept.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return kept


def _read(path: Path, kind: type[V]) -> V:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        field, problem = first_problem(error)
        raise PatchError(f'{path}, "{field}": {problem}\n  Put the file back from a copy.') from None
    except (OSError, ValueError) as error:
        raise PatchError(f"{path}: cannot be read ({error}).\n  Put the file back from a copy.") from None
