"""Run a grid on a Ray cluster: the same pieces of work, spread over workers that each hold the model.

The process that started it writes all results, so a worker may die at any moment: its piece of work is given to another.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from factpatch.bench.grid import Grid, MethodSpec
from factpatch.bench.outcome import Outcome
from factpatch.bench.run import Run, Turn, duration
from factpatch.bench.work import Worker
from factpatch.edits import Probe
from factpatch.errors import MissingExtra
from factpatch.progress import Progress, silent

__all__ = ["go_on_cluster"]

TRIES = 3
"""How often a piece of work is given to another worker when the one that had it died."""


class _Hand:
    """What runs on a worker."""

    def __init__(self, grid: Grid, retain: Sequence[Probe]) -> None:
        self.worker = Worker(grid, retain=retain)

    def do(self, turn: Turn, sequence: bool) -> tuple[float, list[Outcome]]:
        """A piece of work, whole."""
        prepared = self.worker.prepare(turn.spec)
        if sequence:
            told = self.worker.in_sequence(turn.spec, list(turn.units.values()), turn.checkpoints)
        else:
            told = self.worker.alone(turn.spec, turn.units)
        return prepared, list(told)


def go_on_cluster(
    run: Run, progress: Progress = silent, *, address: str | None = None, workers: int | None = None
) -> None:
    """Make what is missing, as `Run.go` does.

    address  of a cluster; by default one is started on this machine, and stopped again
    workers  how many; by default one for each GPU of the cluster, or each CPU if it has none

    A sequence is one piece of work. Raises MissingExtra without Ray, OutputError if a result cannot be written.
    """
    ray = _library()
    ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    try:
        _Cluster(ray, run, workers).go(progress)
    finally:
        run.learn_costs()
        ray.shutdown()


class _Cluster:
    def __init__(self, ray: Any, run: Run, workers: int | None) -> None:
        self.ray, self.run = ray, run
        has = ray.cluster_resources()
        kind = "GPU" if has.get("GPU") else "CPU"
        self.needs = {"num_gpus": 1, "num_cpus": 1} if kind == "GPU" else {"num_cpus": 1}
        self.workers = workers or max(1, int(has.get(kind, 1)))
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, Turn]] = {}
        self.prepared: list[MethodSpec] = []
        self.tries: Counter[tuple[int, tuple[int, ...]]] = Counter()

    def go(self, progress: Progress) -> None:
        waiting = deque(self.run.turns())
        every = sum(len(turn.units) for turn in waiting)
        left, doing = every, f"Working on {min(self.workers, len(waiting))} workers"
        while waiting or self.busy:
            seconds = self.run.plan().seconds_left
            about = "" if seconds is None else f", about {duration(seconds / self.workers)} left"
            progress(doing + about, every - left, every)
            while waiting and len(self.busy) < self.workers:
                self._give(self._next(waiting))
            if not self.busy:
                continue
            (done,), _ = self.ray.wait(list(self.busy), num_returns=1)
            hand, turn = self.busy.pop(done)
            ended, alive = self._take(done, turn)
            if alive:
                self.idle.append(hand)
            if ended:
                left -= len(turn.units)
            else:
                waiting.appendleft(turn)
        progress(doing, every, every)

    def _next(self, waiting: deque[Turn]) -> Turn:
        """The first, but rather none whose method another worker is still preparing: it would only wait for that."""
        preparing = [turn.spec for _, turn in self.busy.values() if turn.spec not in self.prepared]
        turn = next((turn for turn in waiting if turn.spec not in preparing), waiting[0])
        waiting.remove(turn)
        return turn

    def _give(self, turn: Turn) -> None:
        if turn.cell in self.run.failed:
            return
        hand = self.idle.pop() if self.idle else self._hire()
        self.busy[hand.do.remote(turn, self.run.mode.name == "sequential")] = hand, turn

    def _hire(self) -> Any:
        """A new worker; the questions to retain go along, for it may not see the file they are in."""
        return self.ray.remote(_Hand).options(**self.needs).remote(self.run.grid, self.run.worker.retain)

    def _take(self, done: Any, turn: Turn) -> tuple[bool, bool]:
        """Put what was done on record: whether the turn has ended or another worker shall try, and whether this one lives."""
        try:
            prepared, outcomes = self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:
            self.run.fail(turn, error.cause if isinstance(error.cause, Exception) else error)
        except self.ray.exceptions.RayError as error:
            key = (turn.cell, tuple(turn.units))
            self.tries[key] += 1
            if self.tries[key] == TRIES:
                self.run.fail(turn, error)
            return self.tries[key] == TRIES, False
        else:
            self.run.add(turn, prepared, outcomes)
            self.prepared.append(turn.spec)
        return True, True


def _library() -> Any:
    try:
        return import_module("ray")
    except ImportError:
        raise MissingExtra(
            "--engine ray: needs Ray, which is not installed.\n  Install it: pip install 'factpatch[cluster]'"
        ) from None
