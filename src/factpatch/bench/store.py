"""`Store`: the results of a benchmark in one SQLite file, which a killed run leaves whole.

A *cell* is a method with its settings on a data set, under all that decides its numbers. Its outcomes are written one
transaction each, so that what is there is complete and what is missing can be told. Several processes may write at once.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from factpatch.bench.outcome import Moment, Outcome
from factpatch.errors import BadFile, OutputError
from factpatch.files import make_folder
from factpatch.scoring import ProbeScore, ProtocolName, Retained, Scorecard

__all__ = ["Cell", "Store", "StoredOutcome"]

FORMAT = "1"
_FILE = "results.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS format (version TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS cells (
    id INTEGER PRIMARY KEY,
    identity TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    data_file TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    prepare_seconds REAL
);
CREATE TABLE IF NOT EXISTS environments (id INTEGER PRIMARY KEY, packages TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS outcomes (
    cell INTEGER NOT NULL REFERENCES cells,
    moment TEXT NOT NULL,
    number INTEGER NOT NULL,
    edits TEXT NOT NULL,
    reason TEXT NOT NULL,
    fit_seconds REAL,
    score_seconds REAL,
    peak_memory_mb REAL,
    environment INTEGER NOT NULL REFERENCES environments,
    PRIMARY KEY (cell, moment, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
    cell INTEGER NOT NULL,
    moment TEXT NOT NULL,
    number INTEGER NOT NULL,
    position INTEGER NOT NULL,
    edit TEXT NOT NULL,
    protocol TEXT NOT NULL,
    role TEXT NOT NULL,
    kind TEXT NOT NULL,
    prompt TEXT NOT NULL,
    answers TEXT NOT NULL,
    before REAL,
    after REAL,
    measures TEXT NOT NULL,
    said_before TEXT NOT NULL,
    said_after TEXT NOT NULL,
    unscored TEXT NOT NULL,
    failure TEXT,
    PRIMARY KEY (cell, moment, number, position)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS retained (
    cell INTEGER NOT NULL,
    moment TEXT NOT NULL,
    number INTEGER NOT NULL,
    position INTEGER NOT NULL,
    question TEXT NOT NULL,
    PRIMARY KEY (cell, moment, number, position)
) WITHOUT ROWID;
"""
_JSON = ("answers", "measures")


@dataclass(frozen=True, slots=True)
class Cell:
    """One method on one data set, and what its numbers depend on.

    settings     of the method for this model, where they differ from its defaults
    data_file    the file's name; for people
    start        the number of the first record; edits are counted from there
    contents     by setting that names a file or folder, such as a trained editor, the SHA-256 of what that holds
    mode         how edits are put together; see `Mode`
    protocols    by name, their versions
    retain       SHA-256 of the questions that were to be answered as before; empty if there were none
    judge        the model that judged free answers; empty if there was none
    """

    model: str
    fingerprint: str
    dtype: str
    method: str
    settings: Mapping[str, Any]
    dataset: str
    data_file: str
    data_sha256: str
    mode: str
    seed: int
    chat: bool
    fluency: bool
    protocols: Mapping[ProtocolName, int]
    retain: str = ""
    judge: str = ""
    start: int = 0
    contents: Mapping[str, str] = field(default_factory=dict)

    def identity(self) -> str:
        """Equal for cells whose results belong together."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in {"model", "data_file"}}
        for name in ("retain", "judge", "start", "contents"):
            if not fields[name]:
                del fields[name]
        return json.dumps(fields, sort_keys=True)


@dataclass(frozen=True, slots=True)
class StoredOutcome:
    """An outcome on record, without its scores. `packages` are the versions it was made with."""

    moment: Moment
    number: int
    edits: tuple[str, ...]
    reason: str
    fit_seconds: float | None
    score_seconds: float | None
    peak_memory_mb: float | None
    packages: Mapping[str, str]


class Store:
    """The results in a folder. Raises BadFile if it holds those of another format, OutputError if it cannot be written."""

    def __init__(self, folder: Path, *, make: bool = True) -> None:
        self.folder = folder
        path = folder / _FILE
        if not make and not path.is_file():
            raise BadFile(
                f"{folder}: holds no results ({_FILE}).\n  Name the folder that was given to: factpatch bench --out"
            )
        make_folder(folder)
        try:
            self._db = sqlite3.connect(path, timeout=120, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            with self._transaction():
                for statement in _SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO format SELECT ? WHERE NOT EXISTS (SELECT * FROM format)", (FORMAT,))
                if self._db.execute("SELECT version FROM format").fetchall() != [(FORMAT,)]:
                    raise BadFile(f"{path}: results in another format than {FORMAT}.\n  Name another folder.")
        except sqlite3.DatabaseError as error:
            raise OutputError(
                f"{path}: cannot be used as a file of results ({error}).\n  Name another folder, or remove this one."
            ) from None
        self._db.row_factory = sqlite3.Row
        self._environment: int | None = None

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def add_cell(self, cell: Cell) -> int:
        """The number of this cell; a cell of the same identity keeps its number."""
        about = (cell.identity(), cell.model, cell.data_file)
        self._db.execute("INSERT OR IGNORE INTO cells (identity, model, data_file) VALUES (?, ?, ?)", about)
        number: int = self._db.execute("SELECT id FROM cells WHERE identity = ?", about[:1]).fetchone()[0]
        return number

    def cells(self) -> dict[int, Cell]:
        """All cells by number, in the order in which they were added."""
        rows = self._db.execute("SELECT id, identity, model, data_file FROM cells ORDER BY id").fetchall()
        return {row[0]: Cell(model=row[2], data_file=row[3], **json.loads(row[1])) for row in rows}

    def prepared(self, cell: int, seconds: float) -> None:
        """Note how long a method took to prepare; the longest counts, for later ones found it in the cache."""
        self._db.execute(
            "UPDATE cells SET prepare_seconds = MAX(COALESCE(prepare_seconds, 0), ?) WHERE id = ?", (seconds, cell)
        )

    def prepare_seconds(self, cell: int) -> float | None:
        """As noted; None if the method was never prepared."""
        found: float | None = self._db.execute("SELECT prepare_seconds FROM cells WHERE id = ?", (cell,)).fetchone()[0]
        return found

    def set_reason(self, cell: int, reason: str) -> None:
        """Note why the cell failed; empty when it no longer does."""
        self._db.execute("UPDATE cells SET reason = ? WHERE id = ?", (reason, cell))

    def reason(self, cell: int) -> str:
        """Why the cell failed; empty if it did not."""
        found: str = self._db.execute("SELECT reason FROM cells WHERE id = ?", (cell,)).fetchone()[0]
        return found

    def add(self, cell: int, outcome: Outcome) -> bool:
        """Write an outcome with its scores, whole or not at all; false if it was on record, which then stays as it is.

        One on record for other edits is replaced: the data were cut otherwise then.
        """
        edits = json.dumps(outcome.edits)
        where = (cell, outcome.moment, outcome.number)
        card, here = outcome.card, self._here()
        with self._transaction():
            known = self._db.execute(
                "SELECT edits FROM outcomes WHERE cell = ? AND moment = ? AND number = ?", where
            ).fetchone()
            if known is not None and known[0] == edits:
                return False
            for table in ("outcomes", "scores", "retained"):
                self._db.execute(f"DELETE FROM {table} WHERE cell = ? AND moment = ? AND number = ?", where)  # noqa: S608
            seconds = None if card is None else card.score_seconds
            self._db.execute(
                "INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*where, edits, outcome.reason, outcome.fit_seconds, seconds, outcome.peak_memory_mb, here),
            )
            rows = () if card is None else card.scores
            self._db.executemany(
                "INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(*where, position, *_columns(row)) for position, row in enumerate(rows)],
            )
            asked = () if card is None else card.retained
            self._db.executemany(
                "INSERT INTO retained VALUES (?, ?, ?, ?, ?)",
                [(*where, position, question.model_dump_json()) for position, question in enumerate(asked)],
            )
        return True

    def _here(self) -> int:
        """The number of the packages that are installed."""
        if self._environment is None:
            packages = json.dumps({name: version(name) for name in ("factpatch", "torch", "transformers")})
            self._db.execute("INSERT OR IGNORE INTO environments (packages) VALUES (?)", (packages,))
            found = self._db.execute("SELECT id FROM environments WHERE packages = ?", (packages,)).fetchone()
            self._environment = int(found[0])
        return self._environment

    def outcomes(self, cell: int) -> list[StoredOutcome]:
        """What is on record of a cell, by moment and number."""
        rows = self._db.execute(
            "SELECT moment, number, edits, reason, fit_seconds, score_seconds, peak_memory_mb, packages"
            " FROM outcomes JOIN environments ON environment = id WHERE cell = ? ORDER BY moment, number",
            (cell,),
        )
        return [
            StoredOutcome(
                **dict(row) | {"edits": tuple(json.loads(row["edits"])), "packages": json.loads(row["packages"])}
            )
            for row in rows
        ]

    def card(self, cell: int, moment: Moment, number: int | None = None) -> Scorecard | None:
        """All scores of one moment, or of one outcome; None if there are none."""
        chosen = "WHERE cell = ? AND moment = ? AND (? IS NULL OR number = ?) ORDER BY number, position"
        which = (cell, moment, number, number)
        rows = self._db.execute(f"SELECT * FROM scores {chosen}", which).fetchall()  # noqa: S608
        if not rows:
            return None
        about = self.cells()[cell]
        scores = tuple(
            ProbeScore(**{k: json.loads(row[k]) if k in _JSON else row[k] for k in ProbeScore.model_fields})
            for row in rows
        )
        seconds = [o for o in self.outcomes(cell) if o.moment == moment and number in {None, o.number}]
        fits = [o.fit_seconds for o in seconds if o.fit_seconds is not None]
        return Scorecard(
            versions=dict(about.protocols),
            chat=about.chat,
            scores=scores,
            retained=tuple(
                Retained.model_validate_json(row["question"])
                for row in self._db.execute(f"SELECT question FROM retained {chosen}", which)  # noqa: S608
            ),
            fit_seconds=sum(fits) if fits else None,
            score_seconds=sum(o.score_seconds or 0.0 for o in seconds),
        )


def _columns(row: ProbeScore) -> tuple[Any, ...]:
    """In the order of the table."""
    values = (row.edit, row.protocol, row.role, row.kind, row.prompt, json.dumps(row.answers), row.before, row.after)
    return (*values, json.dumps(row.measures), row.said_before, row.said_after, row.unscored, row.failure)
