"""The ledger on disk: one file for each entry. The rename that gives an entry its name is what makes it so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import ValidationError

from factpatch.commands import typed_in
from factpatch.edits import first_problem
from factpatch.errors import PatchError
from factpatch.files import whole_file
from factpatch.workspace.entry import Entry, Place, replay

__all__ = ["Damage", "Ledger", "append", "entry_file", "read_ledger"]


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not as it should be.

    path     within the workspace
    problem  what is wrong with it
    then     what to do about it
    """

    path: str
    problem: str
    then: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Ledger:
    """What could be read.

    entries  all that are sound by themselves, in their order
    last     the number of the last entry, readable or not
    good     how many from the first on are sound and follow one another
    damage   the files that are not, named
    folder   of the workspace
    """

    entries: tuple[Entry, ...]
    last: int
    good: int
    damage: tuple[Damage, ...] = ()
    folder: Path = Path()

    @property
    def head(self) -> Entry:
        """The last entry. Raises PatchError if an entry is damaged."""
        return self.up_to(None)[-1]

    def up_to(self, at: int | None) -> tuple[Entry, ...]:
        """The entries as far as this number, by default all.

        Raises PatchError if there is no such entry, or one of these is damaged.
        """
        if self.last == 0:
            raise PatchError(
                "the ledger is empty: making the workspace was broken off.\n  Make it again: factpatch init DIR"
            )
        if at is not None and not 1 <= at <= self.last:
            see = typed_in(self.folder, "log")
            raise PatchError(f"entry {at}: there is none; the ledger has 1 to {self.last}.\n  See them: {see}")
        wanted = at or self.last
        if wanted > self.good or (at is None and self.damage):
            raise PatchError(
                f"{self.damage[0]}\n  What came of it cannot be known; all up to entry {self.good} is sound "
                f"(--at {self.good}). Put the file back from a copy."
            )
        return self.entries[:wanted]

    def stack(self, at: int | None = None) -> tuple[Place, ...]:
        """The patches that lie on the model after entry `at`. Raises PatchError as `up_to`."""
        return replay(self.up_to(at))

    def files(self) -> dict[str, str]:
        """The SHA-256 of every file that any entry brought in, by path."""
        return {path: digest for entry in self.entries for path, digest in entry.files.items()}


def read_ledger(folder: Path) -> Ledger:
    """All entries in a workspace's ledger; whatever is wrong with a file is told and not raised."""
    found_files = (folder / "ledger").glob("*.json")
    paths = {int(p.stem): p for p in found_files if p.stem.isdecimal() and p.name == Path(entry_file(int(p.stem))).name}
    entries: list[Entry] = []
    damage: list[Damage] = []
    good, known = 0, {0: ""}
    for before, number in pairwise(sorted({0, *paths})):
        if before < number - 1:
            more = f", as are all up to entry {number - 1}" if number - before > 2 else ""
            damage.append(Damage(entry_file(before + 1), f"missing{more}"))
        found = _read(paths[number])
        if isinstance(found, Entry) and found.number != number:
            found = f"holds entry {found.number}"
        if isinstance(found, Entry) and found.previous != known.get(number - 1, found.previous):
            found = f"does not follow entry {number - 1}: one of the two is not what was written"
        if isinstance(found, Entry) and good == number - 1:
            try:
                replay([*entries, found])
            except PatchError as error:
                found = str(error).splitlines()[0]
        if not isinstance(found, Entry):
            damage.append(Damage(entry_file(number), found))
            continue
        entries.append(found)
        known[number] = found.hash
        good += good == number - 1
    return Ledger(tuple(entries), max(paths, default=0), good, tuple(damage), folder)


def append(folder: Path, entry: Entry) -> None:
    """Write the next entry: until its file has its name nothing has happened, from then on all of it has."""
    with whole_file(folder / entry_file(entry.number)) as draft:
        draft.write_text(json.dumps(entry.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def entry_file(number: int) -> str:
    """Where an entry lies in the workspace."""
    return f"ledger/{number:06d}.json"


def _read(path: Path) -> Entry | str:
    """The entry, or what is wrong with the file."""
    try:
        entry = Entry.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        field, problem = first_problem(error)
        return f'"{field}": {problem}'
    except (ValueError, OSError, RecursionError) as error:
        return f"not JSON ({error})" if isinstance(error, ValueError) else f"cannot be read ({error})"
    return entry if entry.digest == entry.hash else "was changed after it was written (its hash is another)"
