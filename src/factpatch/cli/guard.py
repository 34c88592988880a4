"""`factpatch guard`: what a patch changed that it should have left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import line, number, print_json, progress, show_retained

EXAMPLES = """
[bold]Examples[/bold]

  factpatch guard --patch lyon
  factpatch guard --patch lyon --retain must-not-change.txt
  factpatch guard --patch lyon --patch oslo --json
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="guard", epilog=EXAMPLES)(guard)


def guard(
    patch: Annotated[list[Path], typer.Option(help="Patch folder; may be repeated, in order.")],
    retain: Annotated[
        Path | None,
        typer.Option(help="Questions that must not change, instead of the built-in ones: .txt, .jsonl, .json or .csv."),
    ] = None,
    model: opt.Model = opt.DEFAULT_MODEL,
    base_url: opt.BaseUrl = None,
    chat: opt.Chat = False,
    dtype: opt.DType = None,
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Ask general questions and read neutral texts before and after a patch, and list every answer that changed.

    Exits with 1 if one of the questions given with --retain is answered otherwise than before; of the built-in ones, if one
    that was answered rightly no longer is.
    """
    from factpatch.data.questions import read_questions
    from factpatch.lm import load_or_connect
    from factpatch.patches import Patch
    from factpatch.scoring import run_guard

    questions = read_questions(retain) if retain else None
    patches = [Patch.load(folder) for folder in patch]
    with progress() as report:
        lm = load_or_connect(model, base_url=base_url, dtype=dtype, device=device, progress=report)
        found = run_guard(lm, *patches, questions=questions, chat=chat, progress=report)
    bad = found.changed if retain else found.lost
    if as_json:
        summary = {"asked": len(found.questions), "changed": len(found.changed), "lost": len(found.lost)}
        print_json(summary | found.model_dump(mode="json"))
    else:
        known = [q for q in found.questions if q.was_right is not None]
        if known:
            line(
                f"right before: {sum(bool(q.was_right) for q in known)}, right after: {sum(bool(q.is_right) for q in known)}"
            )
        if found.perplexity_before is not None:
            line(
                f"perplexity on neutral texts: {number(found.perplexity_before, 2)}, then {number(found.perplexity_after, 2)}"
            )
        show_retained(found.questions, strict=retain is not None)
    if bad:
        raise typer.Exit(1)
