"""One self-contained HTML page: tables, plots, and every edit with what was said before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from factpatch.bench.store import Store
from factpatch.errors import BadFile
from factpatch.report import plots
from factpatch.report.plain import (
    TITLES,
    about,
    brief,
    failures_of,
    name_of,
    retained_cells,
    retained_of,
    tables,
)
from factpatch.report.published import SOURCE, Published, published
from factpatch.report.rows import AT_END, SCORES, UNEDITED, ResultRow, edit_rows, overviews, result_rows, retained_rows
from factpatch.report.template import rendered

__all__ = ["as_html", "as_svg"]


@dataclass(frozen=True, slots=True)
class _Table:
    """A data set under one protocol."""

    dataset: str
    protocol: str
    title: str
    rows: Sequence[ResultRow]
    published: Sequence[Published]


@dataclass(frozen=True, slots=True)
class _Plot:
    title: str
    about: str
    svg: str


def as_html(store: Store, title: str = "Knowledge editing, measured") -> str:
    """The page, as one text. It loads nothing from anywhere. Raises MissingExtra without Jinja or Matplotlib."""
    rows = result_rows(store)
    shown = [
        _Table(dataset, protocol, TITLES[protocol], own, published().get(dataset, ()) if protocol == "survey" else ())
        for dataset, protocol, own in tables(rows)
    ]
    return rendered(
        "page.html",
        title=title,
        about=about(rows),
        overviews=overviews(rows),
        titles=TITLES,
        brief=brief,
        tables=shown,
        scores=list(SCORES),
        name_of=name_of,
        failures_of=failures_of,
        source=SOURCE,
        plots=list(_plots(rows)),
        edits=edit_rows(store),
        retained=[(row.lost, retained_cells(row)) for row in retained_rows(store)],
        retained_of=retained_of,
        failed=sorted({(row.label, row.dataset, row.reason) for row in rows if row.reason}),
    )


def as_svg(store: Store) -> str:
    """The first plot of the page, as a file of its own. Raises MissingExtra without Matplotlib, BadFile without results."""
    for plot in _plots(result_rows(store)):
        return plots.standalone(plot.svg)
    raise BadFile(f"{store.folder}: holds nothing yet that could be drawn.\n  Go on with it: factpatch bench")


def _plots(rows: Sequence[ResultRow]) -> Iterator[_Plot]:
    for overview in overviews(rows):
        if overview.protocol == "open":
            yield from _against(
                "mean of all data sets",
                {n: (overview.mean(n, "edit_success"), overview.mean(n, "locality")) for n in overview.cells},
            )
    edited = [row for row in rows if row.method != UNEDITED]
    ends = [t for t in tables([row for row in edited if row.moment in {"alone", AT_END}]) if t[1] == "open"]
    for dataset, _, own in ends:
        yield from _against(dataset, {row.label: (row.edit_success, row.locality) for row in own})
    for dataset, _, own in ends:
        kinds = {row.label: _portability(row) for row in own}
        if kinds := {label: found for label, found in kinds.items() if found}:
            name = f"Portability by kind, {dataset}"
            says = "Does what follows from the edit follow? Open protocol."
            yield _Plot(name, says, plots.grouped_bars(kinds, "portability", name))
    seconds: dict[str, list[float]] = {}
    for row in edited:
        if row.fit_seconds:
            seconds.setdefault(row.label, []).append(row.fit_seconds)
    if seconds:
        cost = dict(sorted(((label, fmean(own)) for label, own in seconds.items()), key=lambda item: item[1]))
        says = "Wall time to make one edit, scoring apart, on the machine that ran this; logarithmic."
        yield _Plot("Cost", says, plots.bars(cost, "seconds an edit", "Cost", log=True))
    for dataset, protocol, own in tables([row for row in edited if row.mode == "sequential"]):
        if protocol == "open":
            yield from _decay(dataset, own)


def _against(where: str, both: Mapping[str, tuple[float | None, float | None]]) -> Iterator[_Plot]:
    """Success against locality, of the methods that have both."""
    points = {label: (x, y) for label, (x, y) in both.items() if x is not None and y is not None}
    if points:
        name = f"Success against locality, {where}"
        says = "Up and to the right is better: the edit took, and all else stayed. Open protocol."
        yield _Plot(name, says, plots.scatter(points, "edit success", "locality", name))


def _portability(row: ResultRow) -> dict[str, plots.Bar]:
    """By kind."""
    kinds = {name.partition("/"): value for name, value in row.by_kind.items()}
    return {kind.replace("_", " "): (value, None) for (role, _, kind), value in kinds.items() if role == "portability"}


def _decay(dataset: str, rows: Sequence[ResultRow]) -> Iterator[_Plot]:
    """How the edits of a sequence do after so many of them."""
    for score, name in (("edit_success", "Success of all edits so far"), ("locality", "Locality")):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            value = getattr(row, score)
            if row.moment not in {"alone", "at edit"} and value is not None:
                lines.setdefault(row.label, []).append((row.edits, value))
        if lines:
            title = f"{name}, {dataset}, in sequence"
            says = "Each edit is kept while the next is made. Open protocol."
            yield _Plot(title, says, plots.curves(lines, "edits made", name.lower(), title))
