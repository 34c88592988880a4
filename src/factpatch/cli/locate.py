"""`factpatch locate`: the block to edit, found by editing at each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from factpatch.cli import options as opt
from factpatch.cli.terminal import err, line, method_settings, new_table, number, out, print_json, progress
from factpatch.errors import BadConfig
from factpatch.words import counted

if TYPE_CHECKING:
    from factpatch.analysis.locate import Located

EXAMPLES = """
[bold]Examples[/bold]

  factpatch locate --model my-model
  factpatch locate --model my-model --method memit --limit 12 --out layers
  factpatch locate --layers 4,6,8,10 --no-trace --no-keep
  factpatch locate --model my-model --minutes 20 --json > layers.json
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="locate", epilog=EXAMPLES)(locate)


def locate(
    model: opt.Model = opt.DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="The method that is to edit; see: factpatch methods")] = "rome",
    data: Annotated[
        str, typer.Option(help="What facts are drawn from: NAME:PATH, a file of your own, or sample.")
    ] = "sample",
    limit: Annotated[int, typer.Option(min=1, help="Facts that are edited at each block.")] = 8,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Blocks to try, such as 0,4,8; of a method of several, the first of each window. "
            "Default: every second, then those around the best."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="End at the first step after so long, loading and tracing included; what was found by then is kept.",
        ),
    ] = None,
    trace: Annotated[bool, typer.Option(help="Ask causal tracing too, for comparison.")] = True,
    settings: opt.Settings = None,
    chat: opt.Chat = False,
    skip_invalid: opt.SkipInvalid = False,
    seed: Annotated[int, typer.Option(help="Decides which facts are drawn, and the noise of tracing.")] = 0,
    dtype: opt.DType = None,
    device: opt.Device = None,
    output: Annotated[Path | None, typer.Option("--out", help="Folder for the picture and its numbers.")] = None,
    keep: Annotated[
        bool,
        typer.Option(
            help="Keep the choice for this model: where no preset fits, the method edits there. One that rests on little "
            "takes no other's place."
        ),
    ] = True,
    as_json: opt.Json = False,
) -> None:
    """Find the block at which a method edits a model best, and show it beside what causal tracing suggests.

    Facts of the sample, or of --data, are edited one at a time at every second block, then around the best. With --chat
    tracing asks in the chat template too. The score under the open protocol decides, and among equals that under the survey
    protocol. It takes minutes to hours: --minutes sets a limit, of which tracing takes a quarter at most, and Ctrl-C ends it
    with what was found. A run that was stopped goes on where it was. Exits with 1 if no block did any good, or none was tried.
    """
    begun = time.monotonic()

    from factpatch.analysis.locate import TRACED, locate, outline
    from factpatch.analysis.locate import keep as keep_choice
    from factpatch.data import read
    from factpatch.lm import load
    from factpatch.methods import create

    wanted = None if layers is None else _numbers(layers)
    dataset = read(data, skip_invalid=skip_invalid)
    maker = create(method, method_settings(settings, chat=chat))
    folder = _folder(output)
    with progress() as report:
        lm = load(model, dtype=dtype, device=device, progress=report)
        seconds = None if minutes is None else max(0.0, 60 * minutes - (time.monotonic() - begun))
        asked: dict[str, Any] = {
            "layers": wanted, "limit": limit, "traced": TRACED if trace else 0, "seconds": seconds
        }  # fmt: skip
        err.print(outline(lm, maker, **asked), style="dim", soft_wrap=True)
        found = locate(lm, maker, edits=dataset.edits, **asked, seed=seed, interruptible=True, progress=report)
    kept = keep_choice(lm, found) if keep else None
    preset = next((preset for preset in maker.presets if preset.shape == lm.shape), None)
    picture = _drawn(found, folder) if folder else None
    if as_json:
        more = {
            "kept": kept and str(kept),
            "complete": found.complete,
            "preliminary": found.preliminary,
            "preset": preset and preset.source,
            "written": [str(picture), str(picture.with_suffix(".csv"))] if picture else [],
            "skipped_records": len(dataset.skipped),
        }
        print_json(more | found.model_dump(mode="json"))
    else:
        _show(found)
        if dataset.skipped:
            line((f"{counted(len(dataset.skipped), 'record')} could not be read, left out", "dim"))
        if kept:
            line("kept in ", (str(kept), "bold"), ", as preliminary: it rests on little" if found.preliminary else "")
        elif keep and found.chosen is not None:
            line(("not kept: it is preliminary, and an earlier choice is kept for this model", "yellow"))
        if kept and preset:
            line(
                f"but a preset fits this model and goes before it ({preset.source}); to use what was found: --set {_set(found)}"
            )
        if picture:
            line("drawn in ", (str(picture), "bold"), ", with its numbers beside it")
    for place in found.places:
        for fact, reason in place.refused.items():
            err.print(
                Text(f"not made at {_blocks(place.layers)}, {fact}: ", style="yellow") + Text(reason), soft_wrap=True
            )
    if found.stopped == "interrupt":
        raise typer.Exit(130)
    if found.chosen is None:
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    parts = [each.strip() for each in text.split(",")]
    if not all(each.isdecimal() for each in parts):
        raise BadConfig(f'--layers "{text}": expected numbers of blocks, such as 0,4,8.')
    return [int(each) for each in parts]


def _folder(output: Path | None) -> Path | None:
    """The folder for pictures, asked for before the long work; one that is there is used, as a run may be gone on with."""
    if output is None:
        return None
    from factpatch.files import check_output
    from factpatch.report.plots import check_drawable

    check_drawable()
    if output.is_dir():
        return output

    check_output(output)
    return output


def _drawn(found: Located, folder: Path) -> Path:
    from factpatch.files import make_folder
    from factpatch.report.layers import layer_rows, layers_picture
    from factpatch.report.picture import save_picture

    return save_picture(make_folder(folder), "layers", layers_picture(found), layer_rows(found))


def _show(found: Located) -> None:
    """Two tables, for no table mixes the protocols; then the choice beside tracing's."""
    what = "blocks" if found.field == "layers" else "block"
    facts = counted(len(found.facts), "fact") + (", each" if len(found.facts) > 1 else "")
    line((found.method, "bold"), f" on {found.model}, {facts} edited alone at each place")
    for protocol in ("open", "survey") if found.places else ():
        line((f"{protocol} protocol", "bold"), ", which decides" if protocol == "open" else "")
        own = (">support",) if protocol == "open" else ()
        table = new_table(what, ">score", *own, ">edit success", ">rephrase", ">portability", ">locality")
        for place in found.places:
            measures = place.open if protocol == "open" else place.survey
            scores = [number(place.score if protocol == "open" else place.survey_score)]
            scores += [number(place.support, 2)] if own else []
            style = "bold green" if place.layers == found.chosen else ""
            table.add_row(_blocks(place.layers), *scores, *map(number, measures.model_dump().values()), style=style)
        out.print(table)
    if found.places:
        line(
            (
                "score: harmonic mean of edit success, rephrase and locality. Of equals in the open score the survey's decides, "
                "then the lowest wins. Support: how often a place wins when the facts are drawn again from themselves",
                "dim",
            )
        )
    if found.stopped is not None:
        why = "the time was up" if found.stopped == "time" else "it was interrupted"
        tried = (
            f"with {counted(len(found.places), 'place')} tried and others left"
            if found.places
            else "before any place was tried"
        )
        line((f"stopped, for {why}, {tried}; the same command goes on from here", "yellow"))
    if found.best is not None:
        best = found.best
        line("chosen: ", (f"{what} {_blocks(best.layers)}", "bold"), f", score {number(best.score)}")
    elif found.places:
        line(("chosen: none, for no edit held at any of these blocks", "red"))
    else:
        line(("chosen: none", "red"))
    _show_tracing(found)


def _show_tracing(found: Located) -> None:
    if found.traced is None:
        line((f"no causal tracing: {found.untraced}", "dim"))
        return
    traced, near = found.traced, found.at_suggestion
    score = f"; edits there score {number(near.score)}" if near else "; it was not tried"
    facts = counted(traced.facts, "known fact")
    facts += f" (there was no time for {traced.of - traced.facts} more)" if traced.of > traced.facts else ""
    line("tracing suggests: ", (f"block {traced.suggested}", "bold"), f", from {facts}{score}")
    if found.agree is not None:
        line("they agree" if found.agree else ("they do not agree", "yellow"))
    rank = "not to be told" if found.rank_correlation is None else number(found.rank_correlation, 2)
    line(f"rank correlation of score and tracing's effect over the places tried: {rank}")


def _blocks(layers: tuple[int, ...]) -> str:
    """`4`, `4 to 8`, or all of them where some between are missing."""
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _set(found: Located) -> str:
    return f"{found.field}={','.join(map(str, found.chosen or ()))}"
