"""`factpatch bench`: every method on every data set, into a folder of results that can be gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from factpatch.cli import options as opt
from factpatch.cli.terminal import err, if_interrupted, line, new_table, number, out, print_json, progress, typed
from factpatch.errors import BadConfig

if TYPE_CHECKING:
    from factpatch.bench import Plan

EXAMPLES = """
[bold]Examples[/bold]

  factpatch bench --method ft-m --method grace --data sample --limit 8 --out run
  factpatch bench --method rome --set rome.layer=8 --data zsre:KnowEdit/ZsRE/ZsRE-test-all.json --limit 50 --out run
  factpatch bench --method memit --method alphaedit --data facts.jsonl --mode sequential --out run
  factpatch bench --grid grid.yaml --out run
  factpatch report run --format html --out report.html

A run that was stopped goes on when the same command is given again; more methods, data or records may be added.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="bench", epilog=EXAMPLES)(bench)


def bench(
    output: Annotated[Path, typer.Option("--out", help="Folder of results; a run there is gone on with.")],
    grid_file: Annotated[
        Path | None, typer.Option("--grid", help="A YAML file that says all this; what is given here goes before it.")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="May be repeated; see: factpatch methods")
    ] = None,
    settings: opt.MethodSettings = None,
    data: Annotated[
        list[str] | None, typer.Option(help="NAME:PATH, a file of your own, or sample; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many records of each file.")] = None,
    start: Annotated[int | None, typer.Option(min=0, help="The number of the first record, counted from 0.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="single (each edit alone; the default), batch:K (K edits in a patch), or sequential."),
    ] = None,
    model: opt.OptionalModel = None,
    base_url: opt.BaseUrl = None,
    seed: Annotated[int | None, typer.Option(help="Of the methods and of sampled text; default: 0.")] = None,
    chat: opt.Chat = False,
    fluency: Annotated[
        bool | None, typer.Option("--fluency/--no-fluency", help="Whether to measure it, which takes half the time.")
    ] = None,
    retain: opt.Retain = None,
    judge: opt.Judge = None,
    judge_url: opt.JudgeUrl = None,
    dtype: opt.DType = None,
    device: opt.Device = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where to work: here, or on a Ray cluster.")
    ] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; default: one is started here.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --engine ray: how many.")] = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="Say what would be done, and stop.")] = False,
    skip_invalid: opt.SkipInvalid = False,
    as_json: opt.Json = False,
) -> None:
    """Make and score every edit of every data set with every method, under both protocols.

    Each outcome is written as soon as it is there, so that a run may be stopped or killed at any moment. Several processes
    may work on one folder. Exits with 1 if a method failed on a data set; what failed is tried again by the next run.
    """
    if engine == "local" and (address or workers):
        raise BadConfig("--address, --workers: they belong to --engine ray.\n  Leave them out, or give it.")

    from factpatch.bench import Run, Worker
    from factpatch.bench.cluster import go_on_cluster

    given = {
        "methods": [{"name": name} for name in methods] if methods else None,
        "data": data or None,
        "limit": limit,
        "start": start,
        "mode": mode,
        "model": model,
        "base_url": base_url,
        "seed": seed,
        "chat": chat or None,
        "fluency": fluency,
        "retain": retain,
        "judge": judge,
        "judge_url": judge_url,
        "dtype": dtype,
        "device": device,
    }
    grid = _grid(grid_file, {key: value for key, value in given.items() if value is not None}, settings or [])
    with progress() as report:
        run = Run(grid, output, Worker(grid, report), skip_invalid=skip_invalid)
    plan = run.plan()
    if plan_only and as_json:
        print_json(_planned(plan))
    elif not as_json:
        _show(plan, run.grid.mode)
    if plan_only:
        return
    goes_on = f"what is done is kept in {output}, and the same command goes on with it."
    with if_interrupted(lambda: goes_on), progress() as report:
        if engine == "ray":
            go_on_cluster(run, report, address=address, workers=workers)
        else:
            run.go(report)
    if as_json:
        from factpatch.report import table_rows

        print_json(table_rows(run.store))
    else:
        from factpatch.cli.report import show_tables

        show_tables(run.store)
        line((f"All of it as a page: {typed('report', output, '--format', 'html', '--out', 'report.html')}", "dim"))
    for cell, reason in run.failed.items():
        about = run.store.cells()[cell]
        err.print(
            Text("failed: ", style="yellow") + Text(f"{about.method} on {about.dataset}: {reason}"), soft_wrap=True
        )
    if run.failed:
        raise typer.Exit(1)


def _grid(path: Path | None, given: dict[str, Any], settings: list[str]) -> Any:
    from factpatch.bench.grid import Grid, read_yaml
    from factpatch.methods import parse_settings

    said = read_yaml(path) if path else {}
    if not isinstance(said, dict):
        return Grid.make(said, str(path))
    values = {**said, **given}
    # A range given here counts for every file, also for those that have one of their own.
    ranges = {"start", "limit"} & given.keys()
    values["data"] = [
        {key: value for key, value in spec.items() if key not in ranges} if isinstance(spec, dict) else spec
        for spec in values.get("data") or []
    ]
    if not path and not (values.get("methods") and values["data"]):
        raise BadConfig("--method, --data: at least one of each is needed, or a --grid.\n  See: factpatch bench --help")
    for pair in settings:
        method, dot, rest = pair.partition(".")
        specs = [spec if isinstance(spec, dict) else {"name": spec} for spec in values.get("methods") or []]
        own = [i for i, spec in enumerate(specs) if spec.get("name") == method]
        if not dot or not own:
            raise BadConfig(
                f'--set "{pair}": expected METHOD.KEY=VALUE with one of the methods given, such as --set rome.layer=8'
            )
        for i in own:
            specs[i] = specs[i] | {"settings": specs[i].get("settings", {}) | parse_settings([rest])}
        values["methods"] = specs
    return Grid.make(values, str(path) if path else "the command line")


def _planned(plan: Plan) -> dict[str, Any]:
    cells = [
        {
            "method": cell.spec.name,
            "settings": cell.spec.settings,
            "dataset": cell.dataset.name,
            "edits": len(cell.dataset),
            "patches": len(cell.units),
            "done": cell.done,
            "seconds_left": cell.seconds_left,
            "memory_mb": cell.cost.memory_mb if cell.cost else None,
        }
        for cell in plan.cells
    ]
    return {"cells": cells, "patches_left": plan.left, "seconds_left": plan.seconds_left, "memory_mb": plan.memory_mb}


def _show(plan: Plan, mode: str) -> None:
    from factpatch.bench.run import duration

    table = new_table("method", "data", ">edits", ">patches", ">done", ">about", ">memory (MB)")
    for cell in plan.cells:
        settings = "".join(f" {key}={value}" for key, value in cell.spec.settings.items())
        about = "not known" if cell.seconds_left is None else duration(cell.seconds_left) if cell.seconds_left else "–"
        memory = number(cell.cost.memory_mb if cell.cost else None, 0)
        counts = (str(len(cell.dataset)), str(len(cell.units)), str(cell.done))
        table.add_row(cell.spec.name + settings, cell.dataset.name, *counts, about, memory)
    line(("The plan", "bold"), f", {mode}")
    out.print(table)
    unknown = sum(cell.cost is None for cell in plan.cells)
    if not plan.left:
        line("Everything is on record.")
    elif plan.seconds_left is None:
        line(f"{plan.left} patches to make. How long one takes on this machine is known after the first ones.")
    else:
        guessed = f", {unknown} of {len(plan.cells)} cells guessed from the others" if unknown else ""
        line(f"{plan.left} patches to make, in about {duration(plan.seconds_left)}{guessed}.")
