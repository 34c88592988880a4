"""`factpatch inspect`: two checkpoints compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factpatch.cli import options as opt
from factpatch.cli.analyse_weights import show_matrices
from factpatch.cli.terminal import line, print_json, progress
from factpatch.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factpatch.analysis.checkpoints import Comparison

EXAMPLES = """
[bold]Examples[/bold]

  factpatch inspect smollm2-135m patched-model
  factpatch inspect base/model.safetensors tuned/model.safetensors --out pictures
  factpatch inspect base tuned-bf16 --rank-tol 1e-3 --json
"""
MOST = 8
"""Names of one kind that are listed on the screen."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="inspect", epilog=EXAMPLES)(inspect)


def inspect(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder, .safetensors file, short name, .gguf file or hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    rank_tol: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="A singular value counts if it is more than this share of the greatest; "
            "default: if it is more than rounding to the tensors' type could make.",
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Where types differ, compare values as they are, not rounded to the coarser type."
        ),
    ] = False,
    folder: opt.Pictures = None,
    as_json: opt.Json = False,
) -> None:
    """Which tensors of two checkpoints differ, by how much, and at what rank.

    Safetensors are read tensor by tensor, and no model is loaded. Tensors of different types are compared after rounding
    both to the coarser type, so that a checkpoint equals its own copy in bfloat16. Exits with 0 if the two are alike, holding
    the same tensors with the same values, and with 1 if not.
    """
    from factpatch.analysis.checkpoints import inspect as compare
    from factpatch.files import make_folder
    from factpatch.report.plots import check_drawable
    from factpatch.report.weights import save_weight_pictures

    if folder is not None:
        check_drawable()
        make_folder(folder)
    with progress() as report:
        found = compare(a, b, rank_tol=rank_tol, exact=exact, progress=report)
    pictures = save_weight_pictures(folder, {_difference(a, b): found}) if folder else []
    if as_json:
        files = {"pictures": [str(path) for path in pictures]} if folder else {}
        print_json({"alike": found.alike} | found.model_dump(mode="json") | files)
    else:
        _show(found)
        if folder:
            line("")
            line("Wrote pictures and tables to ", (str(folder), "bold"))
    if not found.alike:
        raise typer.Exit(1)


def _difference(a: str, b: str) -> str:
    """What is drawn, by the last parts of both names, or the whole where these are one."""
    one, other = (Path(name).name or name for name in (a, b))
    return f"{other} − {one}" if one != other else f"{b} − {a}"


def _show(found: Comparison) -> None:
    differ = "1 differs" if len(found.matrices) == 1 else f"{len(found.matrices)} differ"
    line(
        (f"{found.equal + len(found.rounded)} of {found.compared} tensors in both are equal", "bold"),
        f", {differ}" + (f": {found.words}" if found.matrices else ""),
    )
    _tell(found)
    if found.matrices:
        line("")
        show_matrices(found.matrices)
        worst = max(found.matrices, key=lambda m: m.largest)
        line((f"greatest difference of one entry: {worst.largest:.3g}, in {worst.parameter}", "dim"))
        odd = sum(m.not_finite for m in found.matrices)
        if odd:
            line(
                (f"{odd} entries that differ are NaN or infinite in one of the two; they are left out above", "yellow")
            )


def _tell(found: Comparison) -> None:
    """Everything but the differing values."""
    if found.prefix:
        line(f'names were matched by putting "{found.prefix}" before those of one side')
    _list(f"only in {found.a}", found.only_a)
    _list(f"only in {found.b}", found.only_b)
    _list("a copy of another tensor, left out on the other side", [f"{n} (of {t})" for n, t in found.tied.items()])
    _list("of another shape", [f"{m.name} ({m.a}, then {m.b})" for m in found.shapes])
    kinds: dict[tuple[str, str], int] = {}
    for m in found.dtypes:
        kinds[m.a, m.b] = kinds.get((m.a, m.b), 0) + 1
    for (one, other), count in kinds.items():
        line(f"of another type: {counted(count, 'tensor')}, {one}, then {other}")
    if found.rounded:
        line(f"equal only once rounded to the coarser type: {counted(len(found.rounded), 'tensor')} (see --exact)")


def _list(title: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
        line(f"{title}: {', '.join(names[:MOST])}{more}")
