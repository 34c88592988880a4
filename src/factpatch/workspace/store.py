"""The folder of a workspace: what lies in it, and the few steps in which it changes.

    workspace.json           the model and the gate
    ledger/000001.json …     one file for each entry; see `factpatch.workspace.ledger`
    patches/<patch id>/      every patch that was ever accepted, or made anew
    proposals/<number>/      `patch/` and `judgement.json` of what passed the gate and waits
    .lock                    held by whoever writes

Whatever a process that was killed has left is in no entry, and is removed by the next that writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from factpatch.commands import typed, typed_in
from factpatch.edits import Probe, first_problem
from factpatch.errors import BadPatch, OutputError, PatchError
from factpatch.files import locked, make_folder, remove_drafts, sha256_of, whole_file, whole_folder
from factpatch.patches import Patch
from factpatch.progress import Progress
from factpatch.workspace.conflicts import Conflict
from factpatch.workspace.entry import Entry, replay
from factpatch.workspace.ledger import Damage, Ledger, append, entry_file, read_ledger

__all__ = ["Pending", "Settings", "Store"]

WAIT = 600.0
"""Seconds to wait for another process that writes."""
_NEW = "Name a new or an empty folder."
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

    def check(self) -> None:
        """Raise PatchError if this is no workspace, not even a damaged one."""
        if not (self.folder / entry_file(1)).is_file() and not (self.folder / "workspace.json").is_file():
            raise PatchError(
                f"{self.folder}: not a workspace.\n  Name one (--workspace DIR), or make one: {typed('init', 'DIR')}"
            )

    def settings(self) -> Settings:
        """What the workspace is about. Raises PatchError if this is no workspace, or the file is damaged."""
        self.check()
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
        if others:
            raise OutputError(f"{self.folder}: already has {others[0]}.\n  {_NEW}")
        self._check_unmade()
        with locked(self.folder / ".lock", wait=WAIT):
            self._check_unmade()  # another process may have been faster
            remove_drafts(self.folder)
            for name in _FOLDERS:
                make_folder(self.folder / name)
            with whole_file(self.folder / "workspace.json") as draft:
                draft.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
            files = {"workspace.json": sha256_of(self.folder / "workspace.json")}
            append(self.folder, entry.model_copy(update={"files": files}).sealed())

    def _check_unmade(self) -> None:
        if (self.folder / entry_file(1)).exists():
            raise OutputError(f"{self.folder}: already a workspace.\n  {_NEW}")

    def _sweep(self, ledger: Ledger) -> None:
        """Remove what no entry knows of: drafts, patches that were not accepted after all, proposals that were."""
        known = {path.split("/")[1] for path in ledger.files() if path.startswith("patches/")}
        for folder in (self.folder, *(self.folder / name for name in _FOLDERS)):
            remove_drafts(folder)
        for path in (self.folder / "patches").glob("*"):
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
        for entry in ledger.entries:
            if entry.proposal is not None:
                shutil.rmtree(self._waits_at(entry.proposal), ignore_errors=True)

    def commit(self, ledger: Ledger, patches: Iterable[Patch], **fields: Any) -> Entry:
        """Keep the patches, then the entry that brings them in and has these fields; only inside `writing`.

        Raises OutputError if something cannot be written; then nothing has happened.
        """
        files = {path: digest for patch in patches for path, digest in self._keep(ledger, patch).items()}
        head = ledger.head
        entry = Entry(number=head.number + 1, previous=head.hash, files=files, **fields).sealed()
        append(self.folder, entry)
        if entry.proposal is not None:
            shutil.rmtree(self._waits_at(entry.proposal), ignore_errors=True)
        return entry

    def _keep(self, ledger: Ledger, patch: Patch) -> dict[str, str]:
        """The patch in its folder, and the SHA-256 of its files. One that was there before stays, and must be whole."""
        folder = self.folder / "patches" / patch.id
        if known := _of(ledger, patch.id):
            self._check(ledger, patch.id)
            return known
        patch.save(folder)
        return {f"patches/{patch.id}/{path.name}": sha256_of(path) for path in sorted(folder.iterdir())}

    def patch(self, ledger: Ledger, patch_id: str) -> Patch:
        """A patch that was accepted. Raises BadPatch, naming the file, if it is not what the ledger says."""
        self._check(ledger, patch_id)
        if patch_id not in self._read:
            self._read[patch_id] = Patch.load(self.folder / "patches" / patch_id)
        return self._read[patch_id]

    def _check(self, ledger: Ledger, patch_id: str) -> None:
        if damage := self.differing(_of(ledger, patch_id)):
            lies = replay(ledger.entries[: ledger.good])
            number = next((place.number for place in lies if place.patch == patch_id), None)
            out = "" if number is None else f", or take the patch out: {typed_in(self.folder, 'revert', number)}"
            raise BadPatch(
                f"{self.folder / damage[0].path}: {damage[0].problem}.\n  Put the file back from a copy{out}; "
                f"see what else is wrong: {typed_in(self.folder, 'verify')}"
            )

    def differing(self, files: Mapping[str, str]) -> list[Damage]:
        """Those of these files that are missing or have another SHA-256."""
        return differing(self.folder, files, "damaged, or not the file that was accepted")

    def proposals(self) -> tuple[list[Pending], list[Damage]]:
        """Those that wait, by number, and those that cannot be read."""
        found, damage = [], []
        for number in sorted(self._waiting(self.ledger())):
            try:
                found.append(self._pending(number))
            except PatchError as error:
                if number in self._waiting(self.ledger()):  # nobody has taken it away meanwhile
                    damage.append(Damage(f"proposals/{number}", str(error).splitlines()[0]))
        return found, damage

    def proposal(self, ledger: Ledger, number: int) -> tuple[Pending, Patch]:
        """One that waits, and its patch. Raises PatchError, BadPatch."""
        self._check_waiting(ledger, number)
        folder = self._waits_at(number)
        pending, patch = self._pending(number), Patch.load(folder / "patch")
        if patch.id != pending.patch or pending.number != number:
            raise BadPatch(
                f"{folder}: not the patch that was judged.\n  Throw it away: {typed_in(self.folder, 'discard', number)}"
            )
        return pending, patch

    def propose(self, ledger: Ledger, pending: Pending, patch: Patch) -> Pending:
        """Keep a proposal under the next number; only inside `writing`."""
        number = 1 + max([0, *self._numbers(), *(entry.proposal or 0 for entry in ledger.entries)])
        kept = pending.model_copy(update={"number": number})
        with whole_folder(self._waits_at(number)) as draft:
            patch.save(draft / "patch")
            (draft / "judgement.json").write_text(kept.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return kept

    def discard(self, ledger: Ledger, number: int) -> None:
        """Throw away a proposal that waits, readable or not; only inside `writing`. Raises PatchError if there is none."""
        self._check_waiting(ledger, number)
        # An empty folder stays, so that nobody who has read the number accepts another proposal by it.
        with whole_folder(self._waits_at(number), replace=True):
            pass

    def _pending(self, number: int) -> Pending:
        more = f", or throw the proposal away: {typed_in(self.folder, 'discard', number)}"
        return _read(self._waits_at(number) / "judgement.json", Pending, more)

    def _waits_at(self, number: int) -> Path:
        return self.folder / "proposals" / str(number)

    def _numbers(self) -> list[int]:
        """That proposals have or had, but for those accepted and swept."""
        return [int(path.name) for path in (self.folder / "proposals").glob("*") if path.name.isdecimal()]

    def _waiting(self, ledger: Ledger) -> set[int]:
        accepted = {entry.proposal for entry in ledger.entries}
        return {
            number for number in self._numbers() if number not in accepted and any(self._waits_at(number).glob("*"))
        }

    def _check_waiting(self, ledger: Ledger, number: int) -> None:
        if number not in self._waiting(ledger):
            raise PatchError(
                f"proposal {number}: there is none.\n  See those that wait: {typed_in(self.folder, 'list')}"
            )

    def only_waiting(self, ledger: Ledger) -> int:
        """The number of the one proposal that waits. Raises PatchError if there is none, or more than one."""
        waiting = sorted(self._waiting(ledger))
        if not waiting:
            raise PatchError(
                f"nothing waits to be accepted.\n  Make a patch: {typed_in(self.folder, 'propose', '--help')}"
            )
        if len(waiting) > 1:
            numbers = ", ".join(map(str, waiting))
            raise PatchError(
                f"several proposals wait: {numbers}.\n  Name one, such as {typed_in(self.folder, 'accept', waiting[-1])}; "
                f"see what they are: {typed_in(self.folder, 'list')}"
            )
        return waiting[0]

    def says(self, ledger: Ledger, patch_id: str) -> tuple[tuple[str, str], ...]:
        """Prompt and target of each edit of a patch, for people; empty if its description is not what the ledger says."""
        path = f"patches/{patch_id}/patch.json"
        if self.differing({path: ledger.files().get(path, "")}):
            return ()
        described = json.loads((self.folder / path).read_text(encoding="utf-8"))
        return tuple((edit["prompt"], edit["target"]) for edit in described["edits"])


def differing(folder: Path, files: Mapping[str, str], otherwise: str) -> list[Damage]:
    """Those of these files, given with their SHA-256, that are missing or have another.

    otherwise  what is then said of it
    """
    found = []
    for path, digest in files.items():
        if not (folder / path).is_file():
            found.append(Damage(path, "missing"))
        elif sha256_of(folder / path) != digest:
            found.append(Damage(path, f"{otherwise} (SHA-256 differs)"))
    return found


def _of(ledger: Ledger, patch_id: str) -> dict[str, str]:
    """The SHA-256 of a patch's files, by path."""
    return {path: digest for path, digest in ledger.files().items() if path.startswith(f"patches/{patch_id}/")}


def _read(path: Path, kind: type[V], more: str = "") -> V:
    then = f"Put the file back from a copy{more}."
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise PatchError(f"{path}: not JSON ({error.errors()[0]['ctx']['error']}).\n  {then}") from None
        field, problem = first_problem(error)
        raise PatchError(f'{path}, "{field}": {problem}\n  {then}') from None
    except (OSError, ValueError) as error:
        raise PatchError(f"{path}: cannot be read ({error}).\n  {then}") from None
