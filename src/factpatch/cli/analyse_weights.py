"""`factpatch analyse weights`: what patches change in the weights, side by side."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from factpatch.cli import options as opt
from factpatch.cli.terminal import line, new_table, number, out, print_json, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factpatch.analysis.weights import MatrixChange, Overlap, PatchChange

EXAMPLES = """
[bold]Examples[/bold]

  factpatch analyse weights lyon
  factpatch analyse weights lyon-rome lyon-lora lyon-ft --out pictures
  factpatch analyse weights lyon --model my-model --json
"""
MOST = 12
"""Matrices of one patch that are listed on the screen."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="weights", epilog=EXAMPLES)(weights)


def weights(
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH...", help="Patch folders.")],
    model: opt.Model = opt.DEFAULT_MODEL,
    dtype: opt.DType = None,
    folder: opt.Pictures = None,
    as_json: opt.Json = False,
) -> None:
    """What patches change in a model's weights: norm and rank of every matrix, share of entries touched, and overlap.

    The model is the one the patches were made for. It is read, not run. A patch that changes no weights is listed with what
    it adds instead. Entries touched are those that differ once the change is rounded to the model's type, see --dtype; norm
    and rank are of the change as the patch holds it.
    """
    from factpatch.analysis.weights import weight_changes
    from factpatch.files import make_folder
    from factpatch.lm import load
    from factpatch.patches import Patch
    from factpatch.report.plots import check_drawable
    from factpatch.report.weights import save_weight_pictures

    if folder is not None:
        check_drawable()
        make_folder(folder)
    read = dict(zip(_names(patches), map(Patch.load, patches), strict=True))
    with progress() as report:
        lm = load(model, dtype=dtype, device="cpu", progress=report)
        found = weight_changes(lm, read, progress=report)
    pictures = (
        save_weight_pictures(folder, {patch.name: patch for patch in found.patches}, found.overlaps) if folder else []
    )
    if as_json:
        print_json(found.model_dump(mode="json") | ({"pictures": [str(path) for path in pictures]} if folder else {}))
        return
    out.print(_summary(found.patches))
    for patch in found.patches:
        line("")
        line((patch.name, "bold"), f"  {patch.method}, {patch.kind} patch: {patch.words}")
        for added in patch.adds:
            line(f"  adds instead: {added} ({patch.numbers:,} numbers in all)" if patch.numbers else f"  adds {added}")
        if patch.matrices:
            show_matrices(patch.matrices)
    sharing = [overlap for overlap in found.overlaps if overlap.matrices]
    if found.overlaps:
        line("")
        if sharing:
            out.print(_overlap_table(sharing))
        if len(sharing) < len(found.overlaps):
            line(f"{len(found.overlaps) - len(sharing)} of {len(found.overlaps)} pairs of patches share no matrix")
    if sharing:
        line(
            (
                "outputs, inputs: mean squared cosine of the principal angles between the spaces that hold "
                f"{found.energy:.0%} of each change, over shared matrices",
                "dim",
            )
        )
    if folder:
        line("")
        line("Wrote pictures and tables to ", (str(folder), "bold"))


def show_matrices(matrices: Sequence[MatrixChange]) -> None:
    """The matrices that change most, relative to their own norm, and how many more there are."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("block", justify="right")
    table.add_column("matrix", overflow="fold")
    for name in ("shape", "‖Δ‖", "‖Δ‖ / ‖W‖", "rank", "stable rank", "touched"):
        table.add_column(name, justify="right", no_wrap=True)
    chosen = sorted(matrices, key=lambda m: -(m.relative or 0.0))[:MOST]
    for m in (m for m in matrices if m in chosen):
        table.add_row(
            "–" if m.block is None else str(m.block),
            (m.parameter.partition(f".{m.block}.")[2] or m.parameter).removesuffix(".weight"),
            "×".join(map(str, m.shape)),
            short(m.norm),
            short(m.relative),
            "–" if len(m.shape) < 2 else str(m.rank),
            "–" if len(m.shape) < 2 else number(m.stable_rank, 2),
            percent(m.touched / m.entries),
        )
    out.print(table)
    if len(matrices) > MOST:
        line((f"and {len(matrices) - MOST} more that change less; all are in --json and --out", "dim"))


def short(value: float | None) -> str:
    """A number of any size in three digits."""
    return "–" if value is None else f"{value:.3g}"


def percent(share: float) -> str:
    """A share in three digits; exactly all, and exactly none, as such."""
    return f"{100 * share:.3g} %"


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path where that tells them apart, else the whole."""
    last = [folder.resolve().name for folder in folders]
    counts, whole = Counter(last), [str(folder) for folder in folders]
    names = [own if counts[own] == 1 else path for own, path in zip(last, whole, strict=True)]
    again = Counter(names)
    return [name if again[name] == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _summary(patches: Sequence[PatchChange]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("patch", overflow="fold")
    for name in ("matrices", "blocks", "‖Δ‖", "‖Δ‖ / ‖W‖", "rank", "of all entries"):
        table.add_column(name, justify="right", no_wrap=True)
    for patch in patches:
        changed = [m for m in patch.matrices if m.touched]
        if not changed:
            table.add_row(patch.name, "0", "0", "–", "–", "–", percent(0), style="dim")
            continue
        table.add_row(
            patch.name,
            str(len(changed)),
            str(len({m.block for m in changed} - {None})),
            short(patch.norm),
            _span([m.relative or 0.0 for m in changed]),
            _span([m.rank for m in changed]),
            percent(patch.share),
        )
    return table


def _span(values: Sequence[float]) -> str:
    """From the least to the greatest."""
    ends = [short(min(values)), short(max(values))]
    return "–".join(dict.fromkeys(ends))


def _overlap_table(overlaps: Sequence[Overlap]) -> Table:
    table = new_table(
        "overlap", ">shared matrices", ">outputs", ">inputs", ">by chance", ">cosine", ">entries in common"
    )
    for o in overlaps:
        chance = [sum(m.by_chance[i] for m in o.matrices) / len(o.matrices) for i in (0, 1)]
        table.add_row(
            f"{o.one}, {o.other}",
            str(len(o.matrices)),
            number(o.outputs),
            number(o.inputs),
            f"{chance[0]:.3f}, {chance[1]:.3f}",
            number(o.cosine),
            percent(o.jaccard),
        )
    return table
