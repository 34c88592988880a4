"""`factpatch report` and `factpatch compare`: what a benchmark found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import line, new_table, number, out, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factpatch.bench import Store
    from factpatch.report.comparison import ComparedRow

EXAMPLES = """
[bold]Examples[/bold]

  factpatch report run                                  tables, in the terminal
  factpatch report run --format html --out report.html  one page with plots and every edit; needs no network
  factpatch report run --out plot.svg                   its first plot, success against locality
  factpatch report run --format json | jq '.[0].edit_success'
"""

COMPARE_EXAMPLES = """
[bold]Examples[/bold]

  factpatch compare before-run after-run
  factpatch compare before-run after-run --protocol survey --json
"""

Format = Literal["html", "md", "latex", "csv", "json", "svg"]
RunArgument = Annotated[Path, typer.Argument(help="A folder of results, as given to: factpatch bench --out")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(name="report", epilog=EXAMPLES)(report)
    app.command(name="compare", epilog=COMPARE_EXAMPLES)(compare)


def report(
    run: RunArgument,
    form: Annotated[Format | None, typer.Option("--format", help="By default tables in the terminal.")] = None,
    output: Annotated[Path | None, typer.Option("--out", help="The file to write; default: stdout.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Report on a benchmark, finished or not."""
    from factpatch.bench import Store
    from factpatch.files import whole_file
    from factpatch.report import plain
    from factpatch.report.page import as_html, as_svg

    if as_json and form not in {None, "json"}:
        raise typer.BadParameter(f"it is --format json, and --format {form} is given too", param_hint="--json")
    form = "json" if as_json else form
    with Store(run, make=False) as store:
        if form is None and output is None:
            show_tables(store)
            return
        makers = {
            "html": as_html,
            "md": plain.as_markdown,
            "latex": plain.as_latex,
            "csv": plain.as_csv,
            "json": plain.as_json,
            "svg": as_svg,
        }
        text = makers[form or _by_name(output)](store)
    if output is None:
        sys.stdout.write(text)
        return
    with whole_file(output) as draft:
        draft.write_text(text, encoding="utf-8")
    line(f"Written: {output}")


def _by_name(output: Path | None) -> Format:
    """The format that a file's ending says."""
    endings: dict[str, Format] = {f".{form}": form for form in get_args(Format)} | {".tex": "latex"}
    ending = output.suffix.lower() if output else ""
    if ending not in endings:
        raise typer.BadParameter(f"give --format too, or a file ending in {', '.join(endings)}", param_hint="--out")
    return endings[ending]


def compare(
    a: RunArgument,
    b: RunArgument,
    protocol: Annotated[Literal["open", "survey"] | None, typer.Option(help="By default both.")] = None,
    as_json: opt.Json = False,
) -> None:
    """What changed from one run to another, edit by edit: differences B - A with 95 % intervals.

    Compared are methods of one name, on data of one content, over the edits that both runs have scored. Exits with 1 if there
    are none.
    """
    from factpatch.bench import Store
    from factpatch.report.comparison import compare_stores

    with Store(a, make=False) as one, Store(b, make=False) as other:
        found = [row for row in compare_stores(one, other) if protocol in {None, row.protocol}]
    if as_json:
        print_json([row.model_dump(mode="json") for row in found])
    else:
        _show_compared(found)
    if not found:
        raise typer.Exit(1)


def _show_compared(found: Sequence[ComparedRow]) -> None:
    if not found:
        line("The two runs share no method, data set and moment with edits that both have scored.")
        return
    table = new_table("method", "data", "protocol", "score", ">edits", ">A", ">B", ">B - A", ">95 % interval")
    for row in found:
        interval = f"{row.low:+.3f} to {row.high:+.3f}" if row.low is not None and row.high is not None else "–"
        style = "" if not row.is_clear else ("green" if row.mean > 0 else "red")
        where = (row.method if row.moment == "alone" else f"{row.method}, {row.moment}", row.dataset, row.protocol)
        means = (number(row.a), number(row.b), f"{row.mean:+.3f}", interval)
        table.add_row(*where, row.score.replace("_", " "), str(row.edits), *means, style=style)
    out.print(table)
    line(("Coloured: the interval leaves out zero.", "dim"))


def show_tables(store: Store) -> None:
    """The summary of each data set and protocol."""
    from factpatch.report import result_rows
    from factpatch.report.plain import TITLES, name_of, retained_of, tables
    from factpatch.report.rows import SCORES, UNEDITED

    for dataset, protocol, rows in tables(result_rows(store)):
        line((dataset, "bold"), f", {TITLES[protocol][0].lower()}{TITLES[protocol][1:]}")
        scores = (f">{name.replace('_', ' ')}" for name in SCORES)
        table = new_table("method", ">edits", *scores, ">s an edit")
        for row in rows:
            made = f"{row.edits}" + (f" (-{row.not_made})" if row.not_made else "")
            style = "dim" if row.method == UNEDITED else ""
            values = (number(getattr(row, name)) for name in SCORES)
            table.add_row(name_of(row), made, *values, number(row.fit_seconds, 2), style=style)
        out.print(table)
        for row in rows:
            if "edit/judged" in row.measures:
                line(f"{name_of(row)}, right in the eyes of the judge: {number(row.measures['edit/judged'])}")
            if row.retained:
                line(f"{name_of(row)}, questions to be answered as before: {retained_of(row)}")
