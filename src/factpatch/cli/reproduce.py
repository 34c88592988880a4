"""`factpatch reproduce`: published tables, run again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from factpatch.cli import options as opt
from factpatch.cli.terminal import err, line, new_table, number, out, print_json, progress
from factpatch.errors import BadConfig, BadFile, FactpatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from factpatch.bench import Grid
    from factpatch.bench.reproduce import Recipe
    from factpatch.report.reproduction import Reproduced

EXAMPLES = """
[bold]Examples[/bold]

  factpatch reproduce --list
  factpatch reproduce KnowEdit --out table4                                  the survey's whole Table 4
  factpatch reproduce KnowEdit --recipe zsre --recipe wikibio-rome --limit 100 --out table4
  factpatch reproduce KnowEdit --recipe rome --model smollm2-135m --limit 2 --out small
  factpatch report table4 --out table4.html
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="reproduce", epilog=EXAMPLES)(reproduce)


def reproduce(
    knowedit: Annotated[
        Path | None, typer.Argument(help="Folder of KnowEdit, with a folder for each data set.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder of results; a run there is gone on with.")
    ] = None,
    chosen: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="A name, or its first or last part, such as zsre or rome; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many records of each file.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Another model than the recipes'; it brings its own settings.")
    ] = None,
    dtype: opt.DType = None,
    device: opt.Device = None,
    listed: Annotated[bool, typer.Option("--list", help="Say what recipes there are, and stop.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Run rows of the survey's Table 4 again, and show what comes out beside what was published.

    A recipe names model, method, settings, data and protocol. All are run, one after the other; a run that was stopped goes
    on when the same command is given again. Exits with 1 if a recipe could not be run.
    """
    from factpatch.bench.reproduce import grids_of, recipes_named

    taken = recipes_named(chosen or [])
    if listed:
        _list(taken, as_json=as_json)
        return
    if knowedit is None or output is None:
        raise BadConfig("KNOWEDIT, --out: both are needed.\n  For example: factpatch reproduce KnowEdit --out table4")
    if not knowedit.is_dir():
        raise BadFile(f"{knowedit}: no such folder.\n  Name the one that holds KnowEdit's folders, such as ZsRE.")
    given = {"limit": limit, "model": model, "dtype": dtype, "device": device}
    changed = {key: value for key, value in given.items() if value is not None}
    found, failed = _run(grids_of(taken, knowedit, **changed), output)
    if as_json:
        print_json([row.model_dump(mode="json") for row in found])
    else:
        _show(found)
        if model is not None and not taken[0].is_for(model):
            line((f"{model} brought its own settings; the recipes' are for {taken[0].model}.", "dim"))
    for name, reason in failed.items():
        err.print(Text("failed: ", style="yellow") + Text(f"{name}: {reason}"), soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _run(grids: Sequence[tuple[Grid, list[Recipe]]], output: Path) -> tuple[list[Reproduced], dict[str, str]]:
    """What came of the recipes, and why some could not be run."""
    from factpatch.bench import Run, Worker
    from factpatch.lm import load_or_connect
    from factpatch.report.reproduction import reproduced

    found: list[Reproduced] = []
    failed: dict[str, str] = {}
    with progress() as report:
        first, _ = grids[0]  # all recipes that there are name one model
        lm = load_or_connect(first.model, dtype=first.dtype, device=first.device, progress=report)
        for grid, own in grids:
            try:
                run = Run(grid, output, Worker(grid, report, lm=lm))
            except FactpatchError as error:  # such as a file that is not there; the others go on
                failed |= {recipe.name: str(error) for recipe in own}
                continue
            with run.store:
                run.go(report)
                for recipe, cell in zip(own, run.numbers, strict=True):
                    found += reproduced(recipe, run.store, cell)
                    if cell in run.failed:
                        failed[recipe.name] = run.failed[cell]
    return found, failed


def _list(recipes: Sequence[Recipe], *, as_json: bool) -> None:
    if as_json:
        print_json([{"name": r.name, **r.fields, "expected": dict(r.expected)} for r in recipes])
        return
    table = new_table("recipe", "model", "method", "data", "expected")
    for recipe in recipes:
        expected = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in recipe.expected.items())
        table.add_row(recipe.name, recipe.model.rpartition("/")[2], recipe.method, recipe.dataset, expected)
    out.print(table)


def _show(rows: Iterable[Reproduced]) -> None:
    table = new_table("recipe", "model", ">edits", "score", ">published", ">measured", ">95 % interval")
    for row in rows:
        interval = "–" if row.interval is None else f"{row.interval[0]:.2f} to {row.interval[1]:.2f}"
        values = (number(row.expected, 2), number(row.measured, 2), interval)
        table.add_row(row.recipe, row.model, str(row.edits), row.score.replace("_", " "), *values)
    out.print(table)
    line(("In percent; fluency in hundredths of a bit; kl in nats, lower being better.", "dim"))
