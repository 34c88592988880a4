"""`factpatch trace`: where a fact passes through the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import err, line, number, print_json, progress
from factpatch.errors import BadConfig, BadFile
from factpatch.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factpatch.analysis.facts import Fact
    from factpatch.analysis.tracing import AverageTrace, Trace
    from factpatch.lm import LM
    from factpatch.progress import Progress

EXAMPLES = """
[bold]Examples[/bold]

  factpatch trace --subject France --prompt "The capital of France is"
  factpatch trace --subject France --prompt "The capital of France is" --answer Paris --part all --out france
  factpatch trace --data sample --limit 20 --part mlp --out sample-trace
  factpatch trace --patch lyon --subject France --prompt "The capital of France is"
"""

SHADES = " ·░▒▓█"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="trace", epilog=EXAMPLES)(trace)


def trace(
    subject: Annotated[str | None, typer.Option(help="What the fact is about, as it stands in the prompt.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Beginning of a sentence that the answer ends.")] = None,
    answer: Annotated[
        str | None, typer.Option(help="Its first token that tells something is traced; default: what the model says.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Average over the facts of these edits that the model knows; NAME:PATH or sample."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --data: only the first so many edits.")] = None,
    part: Annotated[
        Literal["state", "mlp", "attention", "all"],
        typer.Option(help="What is restored: block outputs, MLPs, attention."),
    ] = "state",
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Blocks restored together; default: 1 for state, else 10 or a third of the stack."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Draws of noise.")] = 10,
    noise: Annotated[float, typer.Option(help="In standard deviations of subject tokens' embeddings.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    patch: opt.Patches = None,
    chat: opt.Chat = False,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder for heat maps (SVG) and their numbers (CSV).")
    ] = None,
    model: opt.Model = opt.DEFAULT_MODEL,
    dtype: opt.DType = None,
    device: opt.Device = None,
    skip_invalid: opt.SkipInvalid = False,
    as_json: opt.Json = False,
) -> None:
    """Put noise on the subject, restore one place at a time, and see where the answer comes back.

    A place is a token and a block. Give one fact (--subject and --prompt), or --data for the average over facts, or both.
    """
    if (subject is None) != (prompt is None) or (subject is None and data is None):
        raise BadConfig(
            "nothing to trace: a fact is --subject with --prompt.\n  Give both, or --data for the average over known facts."
        )
    if answer is not None and prompt is None:
        raise BadConfig("--answer: it is the answer to --prompt.\n  Give --prompt and --subject too.")

    from factpatch.analysis import tracing
    from factpatch.analysis.facts import Fact, says
    from factpatch.data import read
    from factpatch.files import make_folder
    from factpatch.lm import load
    from factpatch.patches import Patch
    from factpatch.report.plots import check_drawable

    edits = read(data, skip_invalid=skip_invalid, limit=limit).edits if data is not None else ()
    patches = [Patch.load(folder) for folder in patch or ()]
    if output is not None:  # before long work, not only after it
        check_drawable()
        make_folder(output)
    parts = tracing.PARTS if part == "all" else (part,)
    settings: dict[str, Any] = {"window": window, "samples": samples, "noise": noise, "seed": seed, "chat": chat}
    traces: list[Trace] = []
    averages: list[AverageTrace] = []
    is_said = True
    with progress() as report:
        lm = load(model, dtype=dtype, device=device, progress=report)
        with lm.patched(*patches):
            if prompt is not None and subject is not None:
                fact = Fact(prompt, subject, answer if answer is not None else _said(lm, prompt, chat=chat))
                (is_said,) = says(lm, [fact], chat=chat)
                traces = [tracing.trace(lm, fact, part=own, progress=_named(report, own), **settings) for own in parts]
            if data is not None:
                known = _known(lm, edits, data, chat=chat)
                averages = [
                    tracing.average(tracing.trace_all(lm, known, part=own, progress=_named(report, own), **settings))
                    for own in parts
                ]
    written = _write(output, traces, averages) if output is not None else []
    if as_json:
        found = _described(lm, traces, averages, settings, is_said=is_said)
        files = [str(file) for path in written for file in (path, path.with_suffix(".csv"))]
        print_json(found | {"patches": [str(folder) for folder in patch or ()], "written": files})
    else:
        if patch:
            line((f"with {', '.join(folder.name for folder in patch)}", "dim"))
        _show(traces, averages)
        for path in written:
            line(f"Written: {path}")
    if not is_said:
        err.print(
            f'The model does not itself say "{traces[0].fact.answer}" here: its likeliest tokens are others. What is traced '
            "is then a fact that it does not know.",
            soft_wrap=True,
        )


def _said(lm: LM, prompt: str, *, chat: bool) -> str:
    said = lm.ask(prompt, chat=chat)
    if not said:
        raise BadConfig(
            f'"{prompt}": the model ends at once, and says nothing that could be traced.\n'
            "  Give --answer, or the beginning of a sentence to finish."
        )
    return said


def _known(lm: LM, edits: Sequence[Any], data: str, *, chat: bool) -> list[Fact]:
    from factpatch.analysis.facts import known_facts

    known = known_facts(lm, edits, chat=chat)
    if not known:
        raise BadFile(
            f"{data}: {lm.name} knows none of its {len(edits)} facts: none has a subject and an old answer that it gives.\n"
            "  Take other data, or more of it."
        )
    return known


def _named(report: Progress, part: str) -> Progress:
    return lambda doing, done, total: report(f"{doing}: {part}", done, total)


def _write(folder: Path, traces: Sequence[Trace], averages: Sequence[AverageTrace]) -> list[Path]:
    from factpatch.report.picture import save_picture
    from factpatch.report.traces import average_map, average_rows, trace_map, trace_rows

    of_fact = [save_picture(folder, f"fact-{own.part}", trace_map(own), trace_rows(own)) for own in traces]
    return of_fact + [
        save_picture(folder, f"average-{own.part}", average_map(own), average_rows(own)) for own in averages
    ]


def _show(traces: Sequence[Trace], averages: Sequence[AverageTrace]) -> None:
    """Maps of shaded cells, and the strongest places."""
    from factpatch.analysis.tracing import ROLES, suggested_layer
    from factpatch.report.traces import shown_token

    for own in traces:
        first, end = own.subject
        names = [shown_token(text) + (" *" if first <= i < end else "  ") for i, text in enumerate(own.tokens)]
        line((own.fact.prompt, "bold"), f" → {own.fact.answer}")
        _map(own, names, own.effects.tolist())
    for mean in averages:
        shown = [i for i, count in enumerate(mean.counts) if count]
        line((f"average over {counted(mean.facts, 'known fact')}", "bold"))
        _map(mean, [ROLES[i] + (" *" if i < 3 else "  ") for i in shown], [mean.effects[i].tolist() for i in shown])
        if mean.part == "mlp":
            line(f"greatest at the subject's last token: block {suggested_layer(mean)}")


def _map(own: Trace | AverageTrace, names: Sequence[str], cells: Sequence[Sequence[float]]) -> None:
    from factpatch.analysis.tracing import Trace
    from factpatch.report.traces import part_name, shown_token

    asked = f'"{shown_token(own.asked)}"' if isinstance(own, Trace) else "the answer's first telling token"
    line(
        f"restored: {part_name(own.part, own.window)}; p of {asked} "
        f"{own.clean:.2g} clean, {own.corrupted:.2g} corrupted"
    )
    most = max(0.0, *(value for row in cells for value in row))
    width, layers = max(map(len, names)), len(cells[0])
    for name, row in zip(names, cells, strict=True):
        shades = (SHADES[_shade(value, most)] for value in row)
        line(f"{name:>{width}} ", "".join(shades), f" {number(max(row))} at block {_top(row)}")
    scale = "".join(str(i).ljust(5) for i in range(0, layers, 5))[: max(layers, 2)].rstrip()
    line((f"{'block':>{width}} {scale}", "dim"))
    line((f"{'':>{width}} from nothing to {number(most)}: {SHADES}   * corrupted", "dim"))


def _shade(value: float, most: float) -> int:
    return max(0, math.ceil(value / most * (len(SHADES) - 1) - 0.5)) if most else 0


def _top(row: Sequence[float]) -> int:
    return max(range(len(row)), key=lambda layer: row[layer])


def _described(
    lm: LM,
    traces: Sequence[Trace],
    averages: Sequence[AverageTrace],
    settings: dict[str, Any],
    *,
    is_said: bool,
) -> dict[str, Any]:
    from factpatch.analysis.tracing import ROLES

    common = {key: value for key, value in settings.items() if key != "window"}
    return {
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        **common,
        "facts": [
            {
                "prompt": own.fact.prompt,
                "subject": own.fact.subject,
                "answer": own.fact.answer,
                "said_by_the_model": is_said,
                "part": own.part,
                "window": own.window,
                "asked": own.asked,
                "tokens": list(own.tokens),
                "subject_tokens": list(own.subject),
                "clean": own.clean,
                "corrupted": own.corrupted,
                "restored": own.restored.tolist(),
            }
            for own in traces
        ],
        "averages": [
            {
                "part": own.part,
                "window": own.window,
                "facts": own.facts,
                "clean": own.clean,
                "corrupted": own.corrupted,
                "roles": [
                    {
                        "role": role,
                        "facts": count,
                        "effects": _numbers(own.effects[i].tolist()),
                        "standard_errors": _numbers(own.errors[i].tolist()),
                    }
                    for i, (role, count) in enumerate(zip(ROLES, own.counts, strict=True))
                ],
            }
            for own in averages
        ],
    }


def _numbers(values: Sequence[float]) -> list[float | None]:
    """Nothing where no fact has such a token."""
    return [None if math.isnan(value) else value for value in values]
