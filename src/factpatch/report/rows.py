"""What a store of results says, as rows: one for each cell, moment and protocol; and one for each edit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from factpatch.bench.outcome import ALONE, AT_EDIT, Moment, after
from factpatch.bench.store import Cell, Store, StoredOutcome
from factpatch.report.stats import Interval, bootstrap
from factpatch.scoring import ProtocolName, Scorecard, ScoreRole
from factpatch.scoring.failures import FailureMode

__all__ = [
    "SCORES",
    "EditRow",
    "Overview",
    "ResultRow",
    "RetainedRow",
    "edit_rows",
    "labels",
    "overviews",
    "result_rows",
    "retained_rows",
    "table_rows",
]

SCORES: dict[str, ScoreRole] = {
    "edit_success": "edit",
    "rephrase": "rephrase",
    "portability": "portability",
    "locality": "locality",
    "fluency": "fluency",
}
AT_END = "at end"
UNEDITED = "unedited"


class ResultRow(BaseModel):
    """The numbers of one cell under one protocol.

    label         the method, with what tells it from others of its name
    moment        alone, at edit, after N patches of a sequence, or at end (after the last)
    edits         that were scored; `not_made` were refused
    edit_success ... fluency   means over edits, as in a `Summary`; None where nothing could be scored
    intervals     of these means, at 95 %, by bootstrap over edits
    by_kind, measures, failures  as in a `Summary`
    retained        over all patches, questions that should have been answered as before: how often they were asked, how
                    often the answer changed, and how often a right one was lost; under the open protocol, if there were any
    fit_seconds, score_seconds  wall time for each edit, on average
    peak_memory_mb  the most the process held while a patch was made, in units of 10^6 bytes
    prepare_seconds  what the method computed once for the model
    packages      versions the outcomes were made with; several if they changed in between
    reason        why the cell failed, if it did
    """

    model_config = ConfigDict(frozen=True)

    model: str
    fingerprint: str
    dtype: str
    method: str
    label: str
    settings: dict[str, Any]
    dataset: str
    data_file: str
    data_sha256: str
    mode: str
    moment: Moment
    seed: int
    chat: bool
    judge: str
    protocol: ProtocolName
    protocol_version: int
    edits: int
    not_made: int
    edit_success: float | None = None
    rephrase: float | None = None
    portability: float | None = None
    locality: float | None = None
    fluency: float | None = None
    intervals: dict[str, Interval] = {}
    by_kind: dict[str, float] = {}
    measures: dict[str, float] = {}
    failures: dict[FailureMode, int] = {}
    unscored: int = 0
    retained: dict[Literal["asked", "changed", "lost"], int] = {}
    fit_seconds: float | None = None
    score_seconds: float | None = None
    peak_memory_mb: float | None = None
    prepare_seconds: float | None = None
    packages: tuple[dict[str, str], ...] = ()
    reason: str = ""


class EditRow(BaseModel):
    """One edit of one cell under one protocol, with what was said.

    success  of the edit's own prompt; None if it could not be scored or made, and `reason` says why
    said_before, said_after  to the edit's own prompt
    failure  what kind of wrong answer it is
    """

    model_config = ConfigDict(frozen=True)

    label: str
    dataset: str
    moment: Moment
    protocol: ProtocolName
    edit: str
    prompt: str
    target: str
    success: float | None
    rephrase: float | None = None
    portability: float | None = None
    locality: float | None = None
    said_before: str = ""
    said_after: str = ""
    failure: FailureMode | None = None
    reason: str = ""


class RetainedRow(BaseModel):
    """A question that should have been answered as before, and was not."""

    model_config = ConfigDict(frozen=True)

    label: str
    dataset: str
    moment: Moment
    edits: tuple[str, ...]
    prompt: str
    before: str
    after: str
    lost: bool


def labels(store: Store) -> dict[int, str]:
    """By cell, the method's name, with what tells it from other cells of that method on the same data."""
    cells = store.cells()
    alike: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells.values():
        alike.setdefault((cell.method, *_data(cell)), []).append(cell)
    return {number: f"{cell.method}{_apart(cell, alike[cell.method, *_data(cell)])}" for number, cell in cells.items()}


def _data(cell: Cell) -> tuple[str, str]:
    return cell.dataset, cell.data_sha256


def _told_apart(cell: Cell, others: Collection[Cell], names: Sequence[str]) -> list[str]:
    """What this cell has under those of the names under which some of the others have something else."""
    differing = (name for name in names if len({getattr(other, name) for other in others}) > 1)
    return [f"{name}={getattr(cell, name)}" for name in differing]


def _apart(cell: Cell, others: Sequence[Cell]) -> str:
    """In what this cell differs from some of the others."""
    told = _told_apart(cell, others, ("model", "dtype", "mode", "start", "seed", "chat", "fluency", "judge"))
    if len({other.retain for other in others}) > 1:
        told.append(f"questions {cell.retain[:8] or 'none'}")
    if len({json.dumps(dict(other.settings), sort_keys=True, default=str) for other in others}) > 1:
        told += [f"{key}={value}" for key, value in sorted(cell.settings.items())] or ["defaults"]
    for name in sorted({name for other in others for name in other.contents}):
        if len({other.contents.get(name) for other in others if other.settings == cell.settings}) > 1:
            told.append(f"{name} as of {cell.contents.get(name, '')[:8]}")
    return f" ({', '.join(told)})" if told else ""


def result_rows(store: Store, cells: Collection[int] | None = None) -> list[ResultRow]:
    """All numbers, cell by cell, `open` before `survey`; before each data set's first, those of the unedited model.

    It is told apart by its name, type and whether it was asked in a chat, where that makes a difference.

    cells  only these, by number
    """
    named, every = labels(store), store.cells().values()
    found: list[ResultRow] = []
    told: set[tuple[str, ...]] = set()
    for number, cell in store.cells().items():
        if cells is not None and number not in cells:
            continue
        outcomes = store.outcomes(number)
        for moment in _moments(outcomes) or [ALONE]:
            card = store.card(number, moment)
            mine = [outcome for outcome in outcomes if outcome.moment == moment]
            shown = AT_END if moment == _last(outcomes) else moment
            for protocol in cell.protocols:
                common = _common(store, number, cell, named[number], mine, shown, protocol)
                model = _told_apart(
                    cell, [c for c in every if _data(c) == _data(cell)], ("model", "dtype", "chat", "start")
                )
                key = (cell.fingerprint, *_data(cell), cell.mode, protocol, *model)
                if card is not None and key not in told and moment in {ALONE, AT_EDIT}:
                    told.add(key)
                    found.append(_unedited(card, common, protocol, f" ({', '.join(model)})" if model else ""))
                found.append(common if card is None else _scored(card, common, protocol))
    return found


class Overview(BaseModel):
    """Every method on every data set, under one protocol.

    cells  by method, then by data set; in the order of the store
    """

    model_config = ConfigDict(frozen=True)

    protocol: ProtocolName
    datasets: tuple[str, ...]
    cells: dict[str, dict[str, ResultRow]]

    def mean(self, label: str, score: str) -> float | None:
        """Over data sets, each counting as much; None if it is missing on one that others of these methods have."""
        values = [
            getattr(self.cells[label].get(dataset), score, None)
            for dataset in self.datasets
            if any(getattr(cells.get(dataset), score, None) is not None for cells in self.cells.values())
        ]
        known = [value for value in values if value is not None]
        return fmean(known) if known and len(known) == len(values) else None


def overviews(rows: Sequence[ResultRow]) -> list[Overview]:
    """One for each protocol, where there are several data sets; of sequences, how things are at their end."""
    found = []
    files = dict.fromkeys((row.dataset, row.data_sha256, row.data_file) for row in rows)
    names = Counter(dataset for dataset, _, _ in files)
    columns = {
        (dataset, sha256): dataset if names[dataset] == 1 else f"{dataset}: {file}" for dataset, sha256, file in files
    }
    for protocol in dict.fromkeys(row.protocol for row in rows):
        own = [r for r in rows if r.protocol == protocol and r.moment in {ALONE, AT_END} and r.method != UNEDITED]
        datasets = tuple(dict.fromkeys(columns[row.dataset, row.data_sha256] for row in own))
        cells: dict[str, dict[str, ResultRow]] = {}
        for row in own:
            cells.setdefault(row.label, {})[columns[row.dataset, row.data_sha256]] = row
        if len(datasets) > 1:
            found.append(Overview(protocol=protocol, datasets=datasets, cells=cells))
    return found


def table_rows(store: Store) -> list[dict[str, Any]]:
    """`result_rows`, JSON-ready."""
    return [row.model_dump(mode="json") for row in result_rows(store)]


def edit_rows(store: Store) -> list[EditRow]:
    """Every edit of every cell, the worst first."""
    named = labels(store)
    found = [row for number, cell in store.cells().items() for row in _of_cell(store, number, cell, named[number])]
    return sorted(found, key=lambda row: (row.success is not None, row.success or 0.0))


def retained_rows(store: Store) -> list[RetainedRow]:
    """Every question that should have been answered as before and was not, under every patch; right answers lost first."""
    named = labels(store)
    found = [
        RetainedRow(
            label=named[number],
            dataset=cell.dataset,
            moment=moment,
            edits=question.edits,
            prompt=question.prompt,
            before=question.before,
            after=question.after,
            lost=question.lost,
        )
        for number, cell in store.cells().items()
        if cell.retain
        for moment in _moments(store.outcomes(number))
        if (card := store.card(number, moment)) is not None
        for question in card.retained
        if question.changed
    ]
    return sorted(found, key=lambda row: not row.lost)


def _moments(outcomes: Sequence[StoredOutcome]) -> list[Moment]:
    """Those on record: alone; or at edit, then after 1, 10, 30 and so on."""
    found = {outcome.moment for outcome in outcomes}
    return [m for m in (ALONE, AT_EDIT) if m in found] + sorted(found - {ALONE, AT_EDIT}, key=_count)


def _count(moment: Moment) -> int:
    return int(moment.rpartition(" ")[2])


def _last(outcomes: Sequence[StoredOutcome]) -> Moment | None:
    """The moment after the last patch of a sequence that is whole."""
    count = 1 + max((outcome.number for outcome in outcomes if outcome.moment == AT_EDIT), default=-1)
    return next((outcome.moment for outcome in outcomes if outcome.moment == after(count)), None)


def _common(
    store: Store,
    number: int,
    cell: Cell,
    label: str,
    outcomes: Sequence[StoredOutcome],
    moment: Moment,
    protocol: ProtocolName,
) -> ResultRow:
    made = [outcome for outcome in outcomes if not outcome.reason]
    edits = sum(len(outcome.edits) for outcome in made)
    fits = [outcome.fit_seconds for outcome in made if outcome.fit_seconds is not None]
    return ResultRow(
        model=cell.model,
        fingerprint=cell.fingerprint,
        dtype=cell.dtype,
        method=cell.method,
        label=label,
        settings=dict(cell.settings),
        dataset=cell.dataset,
        data_file=cell.data_file,
        data_sha256=cell.data_sha256,
        mode=cell.mode,
        moment=moment,
        seed=cell.seed,
        chat=cell.chat,
        judge=cell.judge,
        protocol=protocol,
        protocol_version=cell.protocols[protocol],
        edits=edits,
        not_made=sum(len(outcome.edits) for outcome in outcomes if outcome.reason),
        fit_seconds=round(sum(fits) / edits, 4) if fits else None,
        score_seconds=round(sum(o.score_seconds or 0.0 for o in made) / edits, 4) if edits else None,
        peak_memory_mb=max((o.peak_memory_mb for o in made if o.peak_memory_mb), default=None),
        prepare_seconds=store.prepare_seconds(number),
        packages=tuple({tuple(sorted(o.packages.items())): dict(o.packages) for o in outcomes}.values()),
        reason=store.reason(number),
    )


def _scored(card: Scorecard, row: ResultRow, protocol: ProtocolName) -> ResultRow:
    summary = card.summary(protocol)
    detail = {name: getattr(summary, name) for name in ("by_kind", "measures", "failures", "unscored")}
    intervals = {
        name: interval
        for name, role in SCORES.items()
        if (interval := bootstrap(list(card.per_edit(protocol, role).values()))) is not None
    }
    if card.retained and protocol == "open":
        counts = {name: sum(getattr(question, name) for question in card.retained) for name in ("changed", "lost")}
        detail["retained"] = {"asked": len(card.retained)} | counts
    return row.model_copy(update={name: getattr(summary, name) for name in SCORES} | {"intervals": intervals} | detail)


def _unedited(card: Scorecard, row: ResultRow, protocol: ProtocolName, model: str) -> ResultRow:
    """What the model without a patch does on the same edits; `model` tells which, where there are several."""
    summary = card.summary(protocol)
    before = {name: getattr(summary, f"{name}_before") for name in SCORES if name != "locality"}
    nothing = {"fit_seconds": None, "score_seconds": None, "peak_memory_mb": None, "prepare_seconds": None}
    about = {"method": UNEDITED, "label": UNEDITED + model, "settings": {}, "not_made": 0, "reason": ""}
    return row.model_copy(update=before | nothing | about | {"moment": ALONE if row.moment == ALONE else AT_EDIT})


def _of_cell(store: Store, number: int, cell: Cell, label: str) -> Iterator[EditRow]:
    for moment in (m for m in _moments(store.outcomes(number)) if m in {ALONE, AT_EDIT}):
        card = store.card(number, moment)
        for protocol in cell.protocols:
            common: dict[str, Any] = {"label": label, "dataset": cell.dataset, "moment": moment, "protocol": protocol}
            scores = {} if card is None else {n: card.per_edit(protocol, role) for n, role in SCORES.items()}
            for row in () if card is None else card.scores:
                if row.protocol == protocol and row.role == "edit":
                    beside: dict[str, Any] = {
                        n: scores[n].get(row.edit) for n in ("rephrase", "portability", "locality")
                    }
                    yield EditRow(
                        **common,
                        edit=row.edit,
                        prompt=row.prompt,
                        target=row.answers[0] if row.answers else "",
                        success=row.after,
                        said_before=row.said_before,
                        said_after=row.said_after,
                        failure=row.failure,
                        reason=row.unscored,
                        **beside,
                    )
            for outcome in store.outcomes(number):
                if outcome.moment == moment and outcome.reason:
                    for edit in outcome.edits:
                        reason = f"not made: {outcome.reason}"
                        yield EditRow(**common, edit=edit, prompt="", target="", success=None, reason=reason)
