"""`factpatch audit`: can what a model should no longer say still be got out of it?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import line, new_table, out, print_json, progress
from factpatch.errors import BadConfig

if TYPE_CHECKING:
    from factpatch.analysis.audit_result import Audit

EXAMPLES = """
[bold]Examples[/bold]

  factpatch audit --patch forget-cuba
  factpatch audit --patch forget-cuba --out audit            page.html, audit.md, audit.json and pictures
  factpatch audit --patch facts --attacks paraphrases,head-projection --attacks relearning --budget 50
  factpatch audit --patch facts --control ./trained-without  the same attacks on a model that was never told
  factpatch audit --model ./unlearnt --before smollm2-135m --data facts.jsonl
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="audit", epilog=EXAMPLES)(audit)


def audit(
    model: opt.Model = opt.DEFAULT_MODEL,
    patch: opt.Patches = None,
    data: Annotated[
        str | None,
        typer.Option(help="Edits whose old answers are looked for, NAME:PATH or a file; default: the patches' own."),
    ] = None,
    limit: opt.Limit = None,
    before: Annotated[
        str | None, typer.Option(help="A model that still knows; default: --model without its patches.")
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="A model that was never told, such as one trained without the facts.")
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Candidates for each attack and fact, at most.")] = 20,
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated, or name several with commas: greedy, paraphrases, samples, few-shot, languages, "
            "head-projection, update-projection, probability-delta, relearning; default: all."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--out", help="New folder for the page, tables and pictures.")] = None,
    seed: Annotated[int, typer.Option(help="Decides all that is drawn at random.")] = 0,
    chat: opt.Chat = False,
    dtype: opt.DType = None,
    device: opt.Device = None,
    skip_invalid: opt.SkipInvalid = False,
    as_json: opt.Json = False,
) -> None:
    """Attack erased and changed facts as the literature does, and tell what of their old answers can still be got out.

    Each attack may come back with a budget of candidates, and an old answer is found if it is among them. Chance is measured
    with decoys, answers that were never told, and with --control; where old answers turn up like decoys, at most one audit
    in twenty says otherwise. Exits with 1 if more was found than chance would find. Also with 1 if it is open: if anything
    was found where there are too few facts and decoys to tell it from chance (one fact needs 39 decoys; with --control it
    takes three facts), or if no attack could tell of some fact whether it found it. Exits with 0 if not: which says that
    these attacks did not find it, and no more. Facts that cannot be audited, such as one whose old answer is another edit's
    new one, are named and left out.
    """
    if not patch and data is None:
        raise BadConfig(
            "nothing to audit.\n  Give --patch, or a model and the edits it was changed by, --model and --data."
        )
    if data is None and (limit is not None or skip_invalid):
        raise BadConfig("--limit, --skip-invalid: they belong to --data.\n  Leave them out.")

    from factpatch.analysis.attacks import find_attacks
    from factpatch.analysis.audit import audit as run
    from factpatch.data import read
    from factpatch.files import check_output
    from factpatch.lm import load
    from factpatch.patches import Patch
    from factpatch.report.audit import as_json as audit_json
    from factpatch.report.audit import save_audit
    from factpatch.report.plots import check_drawable

    named = [name.strip() for each in attacks or () for name in each.split(",") if name.strip()]
    chosen = find_attacks(named) if attacks else None
    if output:
        check_output(output)
        check_drawable()
    patches = [Patch.load(folder) for folder in patch or ()]
    edits = None if data is None else read(data, skip_invalid=skip_invalid, limit=limit).edits
    with progress() as report:
        lm = load(model, dtype=dtype, device=device, progress=report)
        others = [
            load(name, dtype=dtype, device=device, progress=report) if name else None for name in (before, control)
        ]
        found = run(
            lm,
            patches,
            edits,
            before=others[0],
            control=others[1],
            budget=budget,
            attacks=chosen,
            chat=chat,
            seed=seed,
            progress=report,
        )
    written = save_audit(output, found) if output else []
    if as_json:
        print_json(json.loads(audit_json(found)) | ({"written": [str(path) for path in written]} if output else {}))
    else:
        _show(found)
        for path in written:
            line(f"Written: {path}")
    if found.recovered or found.in_doubt:
        raise typer.Exit(1)


def _show(found: Audit) -> None:
    from factpatch.analysis.audit_words import NAMES, fact_verdict, not_tried, verdict

    head, *rest = verdict(found)
    line((head, "bold red" if found.recovered or found.in_doubt else "bold"))
    table = new_table("attack", *(f">{NAMES[state]}" for state in found.states), ">decoys", ">p")
    for name, title in (("", "all together"), *((info.name, info.title) for info in found.attacks)):
        now = found.recall("after", name or None)
        counts = [
            f"{row.found} of {row.facts}" for row in (found.recall(state, name or None) for state in found.states)
        ]
        chance = "–" if now.chance is None else f"{now.chance:.2f}"
        style = "red" if name in found.clear else ""
        table.add_row(title, *counts, chance, "–" if now.p is None else f"{now.p:.2g}", style=style)
    out.print(table)
    for fact in found.facts:
        line(f"{fact.id}: ", (fact_verdict(found, fact.id), "red" if found.finders(fact.id) else ""))
    for text in rest:
        line(text)
    line("Not tried:")
    for text in not_tried(found):
        line(f"  - {text}")
