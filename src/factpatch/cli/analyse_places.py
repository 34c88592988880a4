"""`factpatch analyse places`: whether locating methods find the fact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from factpatch.cli import options as opt
from factpatch.cli.terminal import err, line, new_table, number, out, print_json, progress
from factpatch.words import counted

if TYPE_CHECKING:
    from factpatch.analysis.places import PlacesReport

EXAMPLES = """
[bold]Examples[/bold]

  factpatch analyse places --out places
  factpatch analyse places --limit 120 --wordings 3 --part state
  factpatch analyse places --facts mine.json --method memit --json > places.json
  factpatch analyse places --patch lyon --edits 0
"""

METHODS = ("kn", "rome")
"""The two whose way of locating is compared."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="places", epilog=EXAMPLES)(places)


def places(
    model: opt.Model = opt.DEFAULT_MODEL,
    facts: Annotated[
        Path | None,
        typer.Option(help="JSON file with relations, facts and chains, instead of the built-in countries and cities."),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            min=2, help="So many of the facts that the model knows: the first, and some to compare them with."
        ),
    ] = 40,
    wordings: Annotated[int, typer.Option(min=1, help="Of each fact, the first so many that the model knows.")] = 2,
    part: Annotated[Literal["state", "mlp", "attention"], typer.Option(help="What causal tracing restores.")] = "mlp",
    top: Annotated[int, typer.Option(min=1, help="So many layers count as found by tracing.")] = 5,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="A neuron counts above this share of the greatest attribution.")
    ] = 0.2,
    steps: Annotated[int, typer.Option(min=1, help="Of the integral of attribution.")] = 20,
    samples: Annotated[int, typer.Option(min=1, help="Of the noise in tracing.")] = 10,
    method: Annotated[
        list[str] | None, typer.Option(help="Read what this method changes; may be repeated. Default: kn and rome.")
    ] = None,
    edits: Annotated[int, typer.Option(min=0, help="So many edits are made with each method to read.")] = 10,
    patch: opt.Patches = None,
    seed: Annotated[int, typer.Option(help="Of the noise in tracing.")] = 0,
    output: Annotated[Path | None, typer.Option("--out", help="New folder for pictures, with their numbers.")] = None,
    dtype: opt.DType = None,
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Compare the places that knowledge neurons and causal tracing find for facts that belong together, and for unrelated ones.

    A method that finds facts finds one place for all wordings of a fact, and others for other facts of the same entity or
    relation. Also whether an edit's target can be read off the values it changed (Hit@10, Hit@50), before and after.

    Attribution takes most of the time: on a CPU some ten seconds for each wording in a model of 135 million parameters.
    """
    from factpatch.analysis.places import compare_places, read_triples
    from factpatch.files import check_output, whole_folder
    from factpatch.lm import load
    from factpatch.methods import create
    from factpatch.patches import Patch
    from factpatch.report.places import hit_rows, place_rows, save_places, sentences
    from factpatch.report.plots import check_drawable

    if output is not None:
        check_drawable()
        check_output(output)
    triples = read_triples(facts)
    patches = [Patch.load(folder) for folder in patch or ()]
    makers = [create(name) for name in dict.fromkeys(method or METHODS)] if edits else []
    with progress() as report:
        lm = load(model, dtype=dtype, device=device, progress=report)
        with lm.patched(*patches):
            found = compare_places(
                lm, triples, methods=makers, edits=edits, limit=limit, wordings=wordings, traced=part, steps=steps,
                threshold=threshold, top=top, samples=samples, seed=seed, progress=report,
            )  # fmt: skip
    rows, hits = place_rows(found), hit_rows(found)
    named = {"patches": [str(folder) for folder in patch or ()]}
    written: list[str] = []
    if output is not None:
        with whole_folder(output) as draft:
            save_places(draft, found)
            text = json.dumps(found.model_dump(mode="json") | named, indent=2, ensure_ascii=False)
            (draft / "places.json").write_text(text + "\n", encoding="utf-8")
        written = [str(path) for path in sorted(output.iterdir())]
    if as_json:
        told = {"levels": rows, "hits": hits, "sentences": sentences(found), "written": written}
        print_json(found.model_dump(mode="json") | named | told)
    else:
        if patch:
            line((f"with {', '.join(folder.name for folder in patch)}", "dim"))
        _show(found, rows, hits, sentences(found))
        if output is not None:
            line("Wrote ", (str(output), "bold"))
    for each in found.unread:
        err.print(Text(f"not read, {each.method}, {each.edit}: ", style="yellow") + Text(each.reason), soft_wrap=True)


def _show(
    found: PlacesReport, rows: Sequence[Mapping[str, Any]], hits: Sequence[Mapping[str, Any]], told: Sequence[str]
) -> None:
    line(
        ("places", "bold"),
        f" of {counted(found.facts, 'fact')} about {counted(found.entities, 'entity', 'entities')}, "
        f"in {counted(found.wordings, 'wording')}, that {found.model} knows "
        f"(of {found.asked} asked)",
    )
    out.print(_level_table(rows))
    line(
        (
            "intervals at 95 % over groups, where there are six or more; alike and unrelated: how far what is found for",
            "dim",
        )
    )
    line(("two facts overlaps", "dim"))
    for sentence in told:
        line(sentence)
    if hits:
        line()
        line(("targets in the changed values", "bold"), ", read through the final norm and the head")
        out.print(_hit_table(hits))


def _level_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table("measure", "level", ">groups", ">pairs", ">alike", ">unrelated", ">RSim", ">interval")
    for row in rows:
        interval = "–" if row["rsim_low"] is None else f"{number(row['rsim_low'], 2)} to {number(row['rsim_high'], 2)}"
        numbers = (number(row["inside"]), number(row["outside"]), number(row["rsim"]), interval)
        table.add_row(row["measure"], row["level"], str(row["groups"]), str(row["pairs"]), *numbers)
    return table


def _hit_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "method", "read", "over", ">edits", ">made", ">Hit@10 before", ">after", ">Hit@50 before", ">after"
    )
    for row in rows:
        shares = (number(row[f"hit{most}_{moment}"], 2) for most in (10, 50) for moment in ("before", "after"))
        table.add_row(row["method"], row["read"], row["over"], str(row["edits"]), str(row["made"]), *shares)
    return table
