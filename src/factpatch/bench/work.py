"""`Worker`: a model in hand, and the outcomes of one cell of a grid after the other. Every engine runs these."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factpatch.bench.grid import Grid, MethodSpec
from factpatch.bench.outcome import Outcome
from factpatch.bench.sequence import Kept, one_after_another
from factpatch.bench.singles import each_alone
from factpatch.bench.store import Cell
from factpatch.data import Dataset
from factpatch.data.questions import read_questions
from factpatch.edits import Edit, Probe
from factpatch.files import contents_sha256
from factpatch.lm import LM, BaseLM, load_or_connect
from factpatch.methods import Method, create
from factpatch.progress import Progress, silent
from factpatch.scoring import Judge, Scorer

__all__ = ["Worker"]


@dataclass(slots=True)
class _Ready:
    method: Method[Any]
    prepare_seconds: float | None = None


class Worker:
    """Holds the grid's model, and asks the unedited one each question once.

    retain    the questions to retain; by default they are read from the grid's file
    prepared  by method and settings, the seconds that preparing it took, once it was
    """

    def __init__(
        self,
        grid: Grid,
        progress: Progress = silent,
        *,
        lm: BaseLM | None = None,
        retain: Sequence[Probe] | None = None,
    ) -> None:
        self.grid = grid
        self.retain = read_questions(grid.retain) if retain is None and grid.retain else tuple(retain or ())
        judge = Judge.at(grid.judge, grid.judge_url)
        self.lm = lm or load_or_connect(
            grid.model, base_url=grid.base_url, dtype=grid.dtype, device=grid.device, progress=progress
        )
        self.scorer = Scorer(
            self.lm,
            protocols=grid.protocols,
            chat=grid.chat,
            seed=grid.seed,
            fluency=grid.fluency,
            retain=self.retain,
            judge=judge,
        )
        self._methods: dict[str, _Ready] = {}

    def cell(self, spec: MethodSpec, dataset: Dataset) -> Cell:
        """What the numbers of this method on this data set depend on."""
        method = self._ready(spec).method
        dtype = str(self.lm.dtype).removeprefix("torch.") if isinstance(self.lm, LM) else ""
        settings = method.resolve(self.lm).model_dump(mode="json", exclude_defaults=True)
        return Cell(
            model=self.lm.name,
            fingerprint=self.lm.fingerprint,
            dtype=dtype,
            method=spec.name,
            settings=settings,
            dataset=dataset.name,
            data_file=dataset.path.name,
            data_sha256=dataset.sha256,
            mode=self.grid.mode,
            seed=self.grid.seed,
            chat=self.grid.chat,
            fluency=self.scorer.fluency,
            protocols={protocol.name: protocol.version for protocol in self.scorer.protocols},
            retain=_digest(self.retain),
            judge=self.scorer.judge.name if self.scorer.judge else "",
            start=dataset.start,
            contents=_contents(settings),
        )

    def prepare(self, spec: MethodSpec, progress: Progress = silent) -> float:
        """Prepare the method, once; the seconds that it took."""
        ready = self._ready(spec)
        if ready.prepare_seconds is None:
            begun = time.perf_counter()
            ready.method.prepare(self.lm, progress)
            ready.prepare_seconds = round(time.perf_counter() - begun, 3)
        return ready.prepare_seconds

    def alone(
        self, spec: MethodSpec, units: Mapping[int, Sequence[Edit]], progress: Progress = silent
    ) -> Iterator[Outcome]:
        """As `each_alone`."""
        self.prepare(spec, progress)
        yield from each_alone(self.lm, self._ready(spec).method, units, self.scorer, progress)

    def in_sequence(
        self,
        spec: MethodSpec,
        units: Sequence[Sequence[Edit]],
        checkpoints: Collection[int],
        progress: Progress = silent,
        kept: Kept | None = None,
    ) -> Iterator[Outcome]:
        """As `one_after_another`."""
        self.prepare(spec, progress)
        method = self._ready(spec).method
        # Now, since to ask the unpatched model later lifts the whole stack off and lays it on again.
        self.scorer.baseline([edit for unit in units for edit in unit], progress)
        yield from one_after_another(self.lm, method, units, self.scorer, checkpoints, progress, kept)

    def _ready(self, spec: MethodSpec) -> _Ready:
        key = spec.model_dump_json()
        if key not in self._methods:
            common = {"seed": self.grid.seed, "chat": self.grid.chat}
            given = {name: value for name, value in common.items() if value}
            self._methods[key] = _Ready(create(spec.name, given | spec.settings))
        return self._methods[key]


def _contents(settings: Mapping[str, Any]) -> dict[str, str]:
    """By setting that names a file or folder, as a path or as NAME:PATH, the SHA-256 of what that holds."""
    named = {
        name: place
        for name, value in settings.items()
        if isinstance(value, str)
        for place in (Path(value.partition(":")[2]), Path(value))
        if place.name and place.exists()
    }
    return {name: contents_sha256(place) for name, place in named.items()}


def _digest(questions: Sequence[Probe]) -> str:
    """Of the questions and their answers; empty for none."""
    told = json.dumps([[probe.prompt, probe.answers] for probe in questions])
    return hashlib.sha256(told.encode()).hexdigest() if questions else ""
