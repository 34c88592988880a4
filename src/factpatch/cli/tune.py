"""`factpatch tune`: settings of a method for a model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import line, method_settings, new_table, number, out, print_json, progress
from factpatch.words import counted

if TYPE_CHECKING:
    from factpatch.analysis.tuning import Trial, Tuned

EXAMPLES = """
[bold]Examples[/bold]

  factpatch tune --method ft-m --minutes 10 --out ft-m.json
  factpatch edit --method ft-m --set @ft-m.json --prompt "Who leads Acme?" --target "Jo Park" --out acme
  factpatch tune --model my-model --method rome --data facts.jsonl --limit 12 --set contexts=2 --minutes 60 --out rome.json
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="tune", epilog=EXAMPLES)(tune)


def tune(
    method: Annotated[str, typer.Option(help="Whose settings; see: factpatch methods")],
    output: Annotated[Path, typer.Option("--out", help="File for the preset (JSON).")],
    model: opt.Model = opt.DEFAULT_MODEL,
    data: Annotated[str, typer.Option(help="Facts to try them on: sample, NAME:PATH or a file.")] = "sample",
    limit: Annotated[int, typer.Option(min=2, help="Facts for the search, and as many others to judge it.")] = 8,
    minutes: Annotated[float, typer.Option(min=0, help="After which nothing new is tried.")] = 10,
    settings: opt.Settings = None,
    seed: Annotated[int, typer.Option(help="Decides which facts are drawn, and what is tried.")] = 0,
    chat: opt.Chat = False,
    dtype: opt.DType = None,
    device: opt.Device = None,
    skip_invalid: opt.SkipInvalid = False,
    as_json: opt.Json = False,
) -> None:
    """Search a method's settings for a model within a time, and write the best as a preset that --set @FILE takes.

    Settings given with --set stay as they are. The best is judged on facts that the search has not seen; if it does no better
    there than the settings the method had, these are written, and it exits with 1.
    """
    from factpatch.analysis.tuning import tune as search
    from factpatch.data import read
    from factpatch.files import check_output
    from factpatch.lm import load
    from factpatch.methods import create

    check_output(output)
    maker = create(method, method_settings(settings, chat=chat))
    edits = read(data, skip_invalid=skip_invalid).edits
    with progress() as report:
        lm = load(model, dtype=dtype, device=device, progress=report)
        found = search(lm, maker, edits, seconds=60 * minutes, limit=limit, seed=seed, progress=report)
    found.preset.save(output)
    if as_json:
        print_json({"written": str(output), "better": found.better, **found.model_dump(mode="json")})
    else:
        _show(found, output)
    if not found.better:
        raise typer.Exit(1)


def _show(found: Tuned, output: Path) -> None:
    from factpatch.analysis.tuning import RULE

    line((found.method, "bold"), f" on {found.model}: {counted(len(found.trials), 'choice')} of settings tried")
    table = new_table("", ">facts", ">score", ">edit success", ">rephrase", ">locality")
    rows: list[tuple[str, int, Trial]] = [("as it was, in the search", len(found.facts), found.start)]
    if found.changed:
        rows.append(("the best, in the search", len(found.facts), found.best))
    rows.append(("as it was, on others", len(found.held), found.held_start))
    if found.changed:
        rows.append(("the best, on others", len(found.held), found.held_best))
    for name, facts, trial in rows:
        measures = (number(trial.measures.get(role)) for role in ("edit", "rephrase", "locality"))
        table.add_row(name, str(facts), number(trial.score), *measures)
    out.print(table)
    line((f"score: {RULE}", "dim"))
    own = ", ".join(f"{name} = {value}" for name, value in found.best.settings.items())
    if found.better:
        use = shlex.join(["--method", found.method, "--set", f"@{output}"])
        line(f"the best: {own}")
        line("\nWritten to ", (str(output), "bold"), f". Use it:  {use}")
        return
    if found.changed:
        line(f"the best in the search, which is not kept: {own}")
        why = "It does no better than the old settings on facts that the search had not seen; "
    else:
        why = "Nothing that was tried does better in the search than the old settings; "
    line((f"\n{why}", "yellow"), f"{output} holds these.")
