"""Run a grid into a store: what is there is kept, what is missing is made, by one process or by several.

All methods get their turn on the first edits before any goes on to the next ones, so that a run that is stopped compares
them on the same edits.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from factpatch.bench.grid import Grid, MethodSpec
from factpatch.bench.outcome import ALONE, AT_EDIT, Mode, Moment, Outcome, after
from factpatch.bench.singles import ABREAST
from factpatch.bench.store import Store
from factpatch.bench.work import Worker
from factpatch.data import Dataset
from factpatch.edits import Edit
from factpatch.errors import FactpatchError
from factpatch.files import cache_root, locked, make_folder, whole_file
from factpatch.patches import Patch
from factpatch.progress import Progress, silent

__all__ = ["Plan", "PlannedCell", "Run", "Turn", "duration"]

WAIT = 0.5
"""Seconds between looks at what another process has in hand."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a patch of a method takes on a model, from what was measured on this machine before.

    seconds    wall time to make and score one
    memory_mb  the most the process held, in units of 10^6 bytes
    """

    seconds: float
    memory_mb: float | None


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """One cell as it stands: how many patches it takes, how many are on record, and what one costs, if that is known."""

    number: int
    spec: MethodSpec
    dataset: Dataset
    units: tuple[tuple[Edit, ...], ...]
    done: int
    cost: Cost | None

    @property
    def seconds_left(self) -> float | None:
        """None if it is not known what a patch takes."""
        return None if self.cost is None else self.cost.seconds * (len(self.units) - self.done)


@dataclass(frozen=True, slots=True)
class Plan:
    """All cells of a grid as they stand."""

    cells: tuple[PlannedCell, ...]

    @property
    def left(self) -> int:
        """Patches that are still to be made."""
        return sum(len(cell.units) - cell.done for cell in self.cells)

    @property
    def seconds_left(self) -> float | None:
        """For a cell of unknown cost, that of the average known one is taken; None if none is known."""
        known = [cell.cost.seconds for cell in self.cells if cell.cost is not None]
        if not known:
            return None
        usual = sum(known) / len(known)
        return sum(
            usual * (len(cell.units) - cell.done) if cell.seconds_left is None else cell.seconds_left
            for cell in self.cells
        )

    @property
    def memory_mb(self) -> float | None:
        """The most that a cell of known cost takes."""
        return max((c.cost.memory_mb for c in self.cells if c.cost and c.cost.memory_mb), default=None)


@dataclass(frozen=True, slots=True)
class Turn:
    """A piece of work for one worker: some patches of a cell, each alone; or a whole sequence."""

    cell: int
    spec: MethodSpec
    dataset: str
    units: Mapping[int, tuple[Edit, ...]]
    checkpoints: tuple[int, ...] = ()

    @property
    def doing(self) -> str:
        """In words."""
        return f"{self.spec.name} on {self.dataset}"


class Run:
    """A grid and the folder its results go to.

    failed  by cell, why it could not go on; the others do
    """

    def __init__(self, grid: Grid, folder: Path, worker: Worker, *, skip_invalid: bool = False) -> None:
        self.grid, self.folder, self.worker = grid, folder, worker
        self.mode = Mode.parse(grid.mode)
        self.datasets = grid.read_data(skip_invalid=skip_invalid)
        self.store = Store(folder)
        self.failed: dict[int, str] = {}
        self._cells = [
            (self.store.add_cell(worker.cell(spec, dataset)), spec, dataset, self.mode.units(dataset.edits))
            for dataset in self.datasets
            for spec in grid.methods
        ]

    @property
    def numbers(self) -> list[int]:
        """Of its cells in the store."""
        return [number for number, _, _, _ in self._cells]

    def plan(self) -> Plan:
        """How things stand."""
        costs = _Costs(self.worker.lm.fingerprint)
        return Plan(
            tuple(
                PlannedCell(
                    number,
                    spec,
                    dataset,
                    tuple(units),
                    len(units) - len(self._missing(number, units)),
                    costs.of(self.store, number, spec, dataset),
                )
                for number, spec, dataset, units in self._cells
            )
        )

    def go(self, progress: Progress = silent) -> None:
        """Make what is missing. A cell that fails is noted in `failed` and in the store, and the rest goes on."""
        try:
            while turns := [turn for turn in self.turns() if turn.cell not in self.failed]:
                # A cell that another process works on is passed over, and looked at again at the end.
                if not sum(self._take(turn, progress) for turn in turns):
                    progress("Waiting for another process", 0, None)
                    time.sleep(WAIT)
        finally:
            self.learn_costs()

    def learn_costs(self) -> None:
        """Keep what patches took, for later plans."""
        _Costs(self.worker.lm.fingerprint).learn(self.store, [cell[:3] for cell in self._cells])

    def turns(self) -> Iterator[Turn]:
        """What is still to be done, in the order in which to do it."""
        if self.mode.name == "sequential":
            for number, spec, dataset, units in self._cells:
                checkpoints = tuple(count for count in self.grid.at if count < len(units))
                if self._missing(number, units) or not self._has_ends(number, units, checkpoints):
                    yield Turn(number, spec, dataset.name, dict(enumerate(units)), checkpoints)
            return
        longest = max(len(units) for _, _, _, units in self._cells)
        for start in range(0, longest, ABREAST):
            for number, spec, dataset, units in self._cells:
                missing = [n for n in self._missing(number, units) if start <= n < start + ABREAST]
                if missing:
                    yield Turn(number, spec, dataset.name, {n: units[n] for n in missing})

    def add(self, turn: Turn, prepare_seconds: float, outcomes: Sequence[Outcome]) -> None:
        """Put on record what came of a piece of work that was done elsewhere."""
        self.store.prepared(turn.cell, prepare_seconds)
        for outcome in outcomes:
            self.store.add(turn.cell, outcome)
        self.store.set_reason(turn.cell, "")

    def fail(self, turn: Turn, error: Exception) -> None:
        """Note why a cell could not go on."""
        reason = str(error) if isinstance(error, FactpatchError) else f"{type(error).__name__}: {error}"
        self.failed[turn.cell] = reason
        self.store.set_reason(turn.cell, reason)

    def _missing(self, cell: int, units: Sequence[Sequence[Edit]]) -> list[int]:
        moment = AT_EDIT if self.mode.name == "sequential" else ALONE
        known = {(o.number, o.edits) for o in self.store.outcomes(cell) if o.moment == moment}
        return [n for n, edits in enumerate(units) if (n, tuple(edit.id for edit in edits)) not in known]

    def _has_ends(self, cell: int, units: Sequence[Sequence[Edit]], checkpoints: Sequence[int]) -> bool:
        """Whether a sequence was scored wherever it should be; where every edit was refused, there is nothing to score."""
        outcomes = self.store.outcomes(cell)
        made = {o.number for o in outcomes if o.moment == AT_EDIT and not o.reason}
        known = {o.moment for o in outcomes}
        return all(after(n) in known for n in (*checkpoints, len(units)) if any(number < n for number in made))

    def _take(self, turn: Turn, progress: Progress) -> bool:
        """Do a piece of work, unless another process has the cell in hand; whether it was done."""
        with _holding(self.folder / "locks" / str(turn.cell)) as held:
            if not held:
                return False
            turn = self._still(turn)
            report = self._reporting(turn, progress)
            try:
                self.store.prepared(turn.cell, self.worker.prepare(turn.spec, progress))
                for outcome in self._outcomes(turn, report):
                    self.store.add(turn.cell, outcome)
            except Exception as error:  # whatever goes wrong in one cell, the others go on
                self.fail(turn, error)
            else:
                self.store.set_reason(turn.cell, "")
        return True

    def _still(self, turn: Turn) -> Turn:
        """What of it is still to be done, now that nobody else can do it."""
        if self.mode.name == "sequential":
            return turn
        units = next(units for number, _, _, units in self._cells if number == turn.cell)
        missing = set(self._missing(turn.cell, units))
        left = {n: edits for n, edits in turn.units.items() if n in missing}
        return Turn(turn.cell, turn.spec, turn.dataset, left)

    def _outcomes(self, turn: Turn, progress: Progress) -> Iterator[Outcome]:
        if self.mode.name != "sequential":
            yield from self.worker.alone(turn.spec, turn.units, progress)
            return
        kept = _Folder(self.store, turn.cell, self.folder / "patches" / str(turn.cell), turn.units)
        yield from self.worker.in_sequence(turn.spec, list(turn.units.values()), turn.checkpoints, progress, kept)
        kept.clear()

    def _reporting(self, turn: Turn, progress: Progress) -> Progress:
        """How far the whole run is, and how long it will take by what was measured so far."""
        plan = self.plan()
        every = sum(len(cell.units) for cell in plan.cells)
        about = "" if plan.seconds_left is None else f", about {duration(plan.seconds_left)} left"

        def report(doing: str, done: int, total: int | None) -> None:  # noqa: ARG001
            progress(f"{turn.doing}{about}", every - plan.left + done, every)

        return report


class _Folder:
    """The patches of a sequence that is under way, in a folder of the run; see `Kept`."""

    def __init__(self, store: Store, cell: int, folder: Path, units: Mapping[int, Sequence[Edit]]) -> None:
        self.folder = folder
        known = store.outcomes(cell)
        self._done: set[tuple[Moment, int]] = set()
        for outcome in known:
            if outcome.moment != AT_EDIT:
                self._done.add((outcome.moment, outcome.number))
                continue
            is_of_these = outcome.edits == tuple(edit.id for edit in units.get(outcome.number, ()))
            if is_of_these and (outcome.reason or self._place(outcome.number).is_dir()):
                self._done.add((AT_EDIT, outcome.number))
        self._refused = {o.number for o in known if o.moment == AT_EDIT and o.reason}

    def is_done(self, moment: Moment, number: int) -> bool:
        return (moment, number) in self._done

    def patch(self, number: int) -> Patch | None:
        return None if number in self._refused else Patch.load(self._place(number))

    def keep(self, number: int, patch: Patch) -> None:
        shutil.rmtree(self._place(number), ignore_errors=True)  # of a run that was killed before it could tell of it
        patch.save(self._place(number))

    def clear(self) -> None:
        """The sequence is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, number: int) -> Path:
        return self.folder / f"{number:05d}"


class _Costs:
    """What patches took on this machine, by model, method and data set; kept in the cache for later plans."""

    def __init__(self, fingerprint: str) -> None:
        self._path = cache_root() / "benchmarks" / "costs.json"
        self._model = fingerprint[:16]

    def of(self, store: Store, cell: int, spec: MethodSpec, dataset: Dataset) -> Cost | None:
        """From the cell's own outcomes, else from other runs."""
        measured = self._measured(store, cell)
        if measured is not None:
            return measured
        found = self._known().get(self._key(spec, dataset))
        return Cost(**found) if found else None

    def learn(self, store: Store, cells: Sequence[tuple[int, MethodSpec, Dataset]]) -> None:
        """Keep what was measured."""
        found = {self._key(spec, dataset): self._measured(store, cell) for cell, spec, dataset in cells}
        new = {key: {"seconds": c.seconds, "memory_mb": c.memory_mb} for key, c in found.items() if c is not None}
        make_folder(self._path.parent)
        with locked(self._path.with_suffix(".lock")):
            known = self._known() | new
            with whole_file(self._path) as draft:
                draft.write_text(json.dumps(known, indent=1))

    def _key(self, spec: MethodSpec, dataset: Dataset) -> str:
        return json.dumps([self._model, spec.name, spec.settings, dataset.name], default=str)

    def _known(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no plan is worth an error
            return {}
        return found

    @staticmethod
    def _measured(store: Store, cell: int) -> Cost | None:
        made = [o for o in store.outcomes(cell) if o.fit_seconds is not None]
        if not made:
            return None
        seconds = sum((o.fit_seconds or 0.0) + (o.score_seconds or 0.0) for o in made) / len(made)
        return Cost(round(seconds, 3), max((o.peak_memory_mb for o in made if o.peak_memory_mb), default=None))


@contextmanager
def _holding(path: Path) -> Iterator[bool]:
    """Whether a lock could be had at once; it is let go of at the end, or with the process."""
    make_folder(path.parent)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def duration(seconds: float) -> str:
    """In words, such as 3 min or 1 h 20 min."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
