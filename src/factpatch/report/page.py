"""One self-contained HTML page: tables, plots, and every edit with what was said before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from statistics import fmean
from typing import Any

from factpatch.bench.store import Store
from factpatch.errors import BadFile, MissingExtra
from factpatch.report import plots
from factpatch.report.plain import (
    TITLES,
    about,
    brief,
    failures_of,
    name_of,
    number,
    retained_cells,
    retained_of,
    tables,
)
from factpatch.report.published import SOURCE, Published, published
from factpatch.report.rows import AT_END, SCORES, UNEDITED, ResultRow, edit_rows, overviews, result_rows, retained_rows

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
    try:
        jinja: Any = import_module("jinja2")
    except ImportError:
        raise MissingExtra(
            "A page needs Jinja, which is not installed.\n  Install it: pip install 'factpatch[report]'"
        ) from None
    rows = result_rows(store)
    shown = [
        _Table(dataset, protocol, TITLES[protocol], own, published().get(dataset, ()) if protocol == "survey" else ())
        for dataset, protocol, own in tables(rows)
    ]
    environment = jinja.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja.StrictUndefined
    )
    environment.filters |= {"number": number, "title": lambda name: name.replace("_", " ")}
    own_files = files("factpatch.report")
    template = environment.from_string(own_files.joinpath("page.html").read_text(encoding="utf-8"))
    text: str = template.render(
        title=title,
        style=own_files.joinpath("page.css").read_text(encoding="utf-8"),
        script=own_files.joinpath("page.js").read_text(encoding="utf-8"),
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
        made=f"factpatch {version('factpatch')}, {date.today()}",
    )
    return text


def as_svg(store: Store) -> str:
    """The first plot of the page, as a file of its own. Raises MissingExtra without Matplotlib, BadFile without results."""
    for plot in _plots(result_rows(store)):
        return plots.standalone(plot.svg)
    raise BadFile(f"{store.folder}: holds nothing yet that could be drawn.\n  Go on with it: factpatch bench")


def _plots(rows: Sequence[ResultRow]) -> Iterator[_Plot]:
    for overview in overviews(rows):
        both = {
            label: (overview.mean(label, "edit_success"), overview.mean(label, "locality")) for label in overview.cells
        }
        points = {label: found for label, found in both.items() if None not in found}
        if overview.protocol == "open" and points:
            name = "Success against locality, mean of all data sets"
            says = "Up and to the right is better: the edit took, and all else stayed. Open protocol."
            yield _Plot(name, says, plots.scatter(points, "edit success", "locality", name))  # type: ignore[arg-type]
    edited = [row for row in rows if row.method != UNEDITED]
    for dataset, protocol, own in tables([row for row in edited if row.moment in {"alone", AT_END}]):
        points = {r.label: (r.edit_success, r.locality) for r in own if None not in {r.edit_success, r.locality}}
        if protocol == "open" and points:
            name = f"Success against locality, {dataset}"
            says = "Up and to the right is better: the edit took, and all else stayed. Open protocol."
            yield _Plot(name, says, plots.scatter(points, "edit success", "locality", name))  # type: ignore[arg-type]
    for dataset, protocol, own in tables([row for row in edited if row.moment in {"alone", AT_END}]):
        kinds = {
            r.label: {k.partition("/")[2]: v for k, v in r.by_kind.items() if k.startswith("portability")} for r in own
        }
        kinds = {label: found for label, found in kinds.items() if found}
        if protocol == "open" and kinds:
            name = f"Portability by kind, {dataset}"
            yield _Plot(
                name,
                "Does what follows from the edit follow? Open protocol.",
                plots.grouped_bars(kinds, "portability", name),
            )
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
