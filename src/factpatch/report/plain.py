"""Reports without pictures: Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence

from factpatch.bench.store import Store
from factpatch.report.published import SOURCE, Published, published
from factpatch.report.rows import SCORES, ResultRow, RetainedRow, overviews, result_rows, retained_rows, table_rows
from factpatch.report.template import markdown_table, number

__all__ = [
    "about",
    "as_csv",
    "as_json",
    "as_latex",
    "as_markdown",
    "brief",
    "cell",
    "failures_of",
    "name_of",
    "retained_cells",
    "retained_of",
    "tables",
]

HEADS = ("method", "edits", "edit success", "rephrase", "portability", "locality", "fluency", "s an edit", "MB")
TITLES = {
    "open": "Open protocol: the model's own free answers",
    "survey": "Survey protocol: as published tables score",
}


def tables(rows: Sequence[ResultRow]) -> Iterator[tuple[str, str, list[ResultRow]]]:
    """Data set, protocol and the rows under both; a protocol's rows never stand in another's table."""
    for dataset, digest in dict.fromkeys((row.dataset, row.data_sha256) for row in rows):
        for protocol in TITLES:
            own = [r for r in rows if (r.dataset, r.data_sha256, r.protocol) == (dataset, digest, protocol)]
            if own:
                yield dataset, protocol, own


def cell(row: ResultRow, name: str) -> str:
    """A score with its interval."""
    value, interval = getattr(row, name), row.intervals.get(name)
    return number(value) if interval is None or value is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def name_of(row: ResultRow) -> str:
    """The method, and the moment where there are several."""
    return row.label if row.moment == "alone" else f"{row.label}, {row.moment}"


def failures_of(row: ResultRow) -> str:
    """How many edits failed in which way."""
    return ", ".join(f"{count} {mode}" for mode, count in row.failures.items())


def as_markdown(store: Store) -> str:
    """One table for each data set and protocol; the survey's figures beneath, labelled as published."""
    rows = result_rows(store)
    lines = ["# Results", "", *(f"- {name}: {'; '.join(values)}" for name, values in about(rows).items())]
    lines += ["- Intervals in brackets: 95 %, bootstrap over edits. Shares from 0 to 1, fluency in bits."]
    for overview in overviews(rows):
        lines += ["", f"## Every data set: {TITLES[overview.protocol][0].lower()}{TITLES[overview.protocol][1:]}", ""]
        cells = [
            (label, *(brief(found.get(dataset)) for dataset in overview.datasets))
            for label, found in overview.cells.items()
        ]
        lines += ["Edit success / locality.", "", *markdown_table(("method", *overview.datasets), cells)]
    for dataset, protocol, own in tables(rows):
        lines += ["", f"## {dataset}: {TITLES[protocol][0].lower()}{TITLES[protocol][1:]}", ""]
        lines += markdown_table(HEADS, map(_cells, own))
        lines += [f"\nFailed: {row.label}: {row.reason}" for row in own if row.reason]
        told = [f"{name_of(row)}: {failures_of(row)}" for row in own if row.failures]
        lines += ["", f"How edits failed: {'; '.join(told)}."] if told else []
        told = [
            f"{name_of(row)}: {number(row.measures['edit/judged'])}" for row in own if "edit/judged" in row.measures
        ]
        lines += ["", f"Right in the eyes of the judge: {'; '.join(told)}."] if told else []
        told = [f"{name_of(row)}: {retained_of(row)}" for row in own if row.retained]
        lines += ["", f"Questions to be answered as before: {'; '.join(told)}."] if told else []
        if protocol == "survey" and dataset in published():
            heads = ("method", "edit success", "portability", "locality", "fluency")
            lines += ["", f"{SOURCE}:", "", *markdown_table(heads, map(_published_cells, published()[dataset]))]
    changed = retained_rows(store)
    if changed:
        lines += ["", "## Answers that should not have changed", ""]
        asked = ("method", "data", "edits", "asked", "before", "after")
        lines += markdown_table(asked, map(retained_cells, changed), numbers=False)
    return "\n".join(lines) + "\n"


def brief(row: ResultRow | None) -> str:
    """Success and locality, or that nothing could be made."""
    if row is None or not row.edits:
        return "not made" if row is not None and row.not_made else "–"
    return f"{number(row.edit_success, 2)} / {number(row.locality, 2)}"


def retained_of(row: ResultRow) -> str:
    """How many of the questions that should have been answered as before were not."""
    return "{changed} of {asked} changed, {lost} right ones lost".format(**row.retained)


def retained_cells(row: RetainedRow, most: int = 3) -> tuple[str, ...]:
    """Method, data, edits, question and both answers. Of many edits in one patch the first few are named."""
    edits = ", ".join(row.edits[:most]) + (f" and {len(row.edits) - most} more" if len(row.edits) > most else "")
    label = row.label if row.moment == "alone" else f"{row.label}, {row.moment}"
    return label, row.dataset, edits, row.prompt, row.before, row.after + (" (was right)" if row.lost else "")


def about(rows: Sequence[ResultRow]) -> dict[str, list[str]]:
    """What the numbers depend on: model, data, protocols, seed and packages."""
    models = dict.fromkeys(f"{r.model} ({r.fingerprint[:16]}…, {r.dtype or 'remote'})" for r in rows)
    data = dict.fromkeys(f"{r.dataset}: {r.data_file} (SHA-256 {r.data_sha256[:16]}…)" for r in rows)
    packages = dict.fromkeys(", ".join(f"{k} {v}" for k, v in p.items()) for r in rows for p in r.packages)
    versions = dict.fromkeys(f"{r.protocol} {r.protocol_version}" for r in rows)
    seeds = dict.fromkeys(str(r.seed) for r in rows)
    costs = _costs(rows)
    judges = dict.fromkeys(r.judge for r in rows if r.judge)
    lists = {
        "Model": models,
        "Data": data,
        "Protocols": versions,
        "Judge": judges,
        "Seed": seeds,
        "Packages": packages,
    } | costs
    return {name: list(values) for name, values in lists.items() if values}


def _costs(rows: Sequence[ResultRow]) -> dict[str, dict[str, None]]:
    """What it all took, wall time added up; what several cells of a method shared in preparing counts once."""
    made = [r for r in rows if r.protocol == rows[0].protocol]
    fit, score = (sum((getattr(r, name) or 0) * r.edits for r in made) for name in ("fit_seconds", "score_seconds"))
    prepared: dict[str, float] = {}
    for r in made:
        prepared[r.label] = max(prepared.get(r.label, 0.0), r.prepare_seconds or 0.0)
    spent = {"to fit": fit, "to score": score, "to prepare methods": sum(prepared.values())}
    told = ", ".join(f"{seconds / 60:.0f} {what}" for what, seconds in spent.items() if seconds >= 60)
    return {"Minutes of one worker": {f"{told}; {sum(spent.values()) / 60:.0f} in all": None}} if told else {}


def _cells(row: ResultRow) -> list[str]:
    edits = f"{row.edits}" + (f", {row.not_made} not made" if row.not_made else "")
    seconds, memory = number(row.fit_seconds, 2), number(row.peak_memory_mb, 0)
    return [name_of(row), edits, *(cell(row, name) for name in SCORES), seconds, memory]


def _published_cells(row: Published) -> list[str]:
    locality = f"KL {row.kl:.2f}" if row.kl is not None else number(row.locality)
    return [row.method, number(row.edit_success), number(row.portability), locality, number(row.fluency)]


def as_latex(store: Store) -> str:
    """Tables for a paper, in the style of the package booktabs."""
    lines = ["% needs \\usepackage{booktabs}"]
    for dataset, protocol, own in tables(result_rows(store)):
        title = _tex(f"{dataset}, {protocol} protocol, version {own[0].protocol_version}, {own[0].model}")
        lines += ["\\begin{table}", f"\\caption{{{title}}}", f"\\begin{{tabular}}{{l{'r' * (len(HEADS) - 1)}}}"]
        lines += ["\\toprule", " & ".join(map(_tex, HEADS)) + " \\\\", "\\midrule"]
        lines += [" & ".join(map(_tex, _cells(row))) + " \\\\" for row in own]
        lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}", ""]
    return "\n".join(lines) + "\n"


_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "–": "--",
}


def _tex(text: str) -> str:
    return "".join(_SPECIAL.get(char, char) for char in text)


def as_csv(store: Store) -> str:
    """One line for each cell, moment and protocol."""
    rows = table_rows(store)
    plain = [
        name
        for name in ResultRow.model_fields
        if name not in {"intervals", "by_kind", "measures", "failures", "settings", "packages", "retained"}
    ]
    kinds = sorted({kind for row in rows for kind in row["by_kind"]})
    measures = sorted({name for row in rows for name in row["measures"]})
    heads = [
        *plain,
        *(f"{n}_{end}" for n in SCORES for end in ("low", "high")),
        *kinds,
        *measures,
        *(f"retained_{name}" for name in ("asked", "changed", "lost")),
        "failures",
        "settings",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        ends = {
            f"{name}_{end}": row["intervals"][name][i]
            for name in row["intervals"]
            for i, end in enumerate(("low", "high"))
        }
        found = {name: row[name] for name in plain} | ends | row["by_kind"] | row["measures"]
        found |= {f"retained_{name}": count for name, count in row["retained"].items()}
        writer.writerow(found | {name: json.dumps(row[name]) for name in ("failures", "settings")})
    return text.getvalue()


def as_json(store: Store) -> str:
    """`table_rows`."""
    return json.dumps(table_rows(store), indent=2, ensure_ascii=False) + "\n"
