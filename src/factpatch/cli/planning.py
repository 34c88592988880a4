"""How `factpatch edit --plan` tells what an edit will need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import line, new_table, number, out, print_json, progress
from factpatch.edits import Edit
from factpatch.words import counted

if TYPE_CHECKING:
    from factpatch.methods.needs import Preparation, Stage
    from factpatch.methods.plan import Plan


def tell_plan(
    model: str,
    method: str,
    edits: tuple[Edit, ...],
    settings: Mapping[str, str],
    dtype: opt.DTypeName | None,
    device: str | None,
    *,
    as_json: bool,
) -> None:
    """Print what making these edits is expected to take; exit with 1 if that is more than is free."""
    from factpatch.methods import create
    from factpatch.methods.plan import outline, plan

    maker = create(method, settings)
    maker.check(edits)
    with progress() as report:
        planned = plan(maker, outline(model, device=device, dtype=dtype, progress=report), edits)
    if as_json:
        print_json(planned.model_dump(mode="json") | {"ratio": round(planned.ratio, 3), "fits": planned.fits})
    else:
        _show_plan(planned)
    if planned.fits is False:
        raise typer.Exit(1)


def _show_plan(plan: Plan) -> None:
    line(
        (f"{counted(plan.edits, 'edit')} with {plan.method} on {plan.model}", "bold"),
        " (estimated; no weights were read)",
    )
    size = f"{plan.parameters / 1e6:,.1f} million parameters, {_mb(plan.model_bytes)} in {plan.dtype} on {plan.device}"
    line(f"  model     {plan.architecture}, {plan.blocks} blocks of {plan.hidden_size}, {size}")
    for preparation in plan.preparations:
        line(f"  prepares  {_preparation_line(preparation)}")
    for change in plan.changes:
        line(f"  changes   {change.part} ({' × '.join(map(str, change.shape))}, {change.form})")
    line(
        f"  patch     {'size not known beforehand' if plan.patch_bytes is None else f'{_mb(plan.patch_bytes)} on disk'}"
    )
    for text in plan.unknown:
        line(f"  unknown   {text}")
    apart = plan.host_bytes is not None
    table = new_table("beside the weights", ">MB", *([">MB main memory"] if apart else []))
    for stage in plan.stages:
        table.add_row(stage.doing, *_cells(stage, apart), style="bold")
        for held in stage.held:
            cells = (held.bytes * (not held.host), held.bytes * held.host) if apart else (held.bytes,)
            table.add_row(f"  {held.what}", *(_number(cell) for cell in cells), style="dim")
    out.print()
    out.print(table)
    out.print()
    line((f"peak {_mb(plan.peak_bytes)}", "bold"), f", {plan.ratio:.2f} times the model; {_free(plan.free_bytes)}")
    if plan.host_bytes is not None:
        line((f"and {_mb(plan.host_bytes)} of main memory", "bold"), f"; {_free(plan.free_host_bytes)}")
    if plan.fits is not None:
        line(
            "It fits."
            if plan.fits
            else "It does not fit. Try --dtype bfloat16, fewer edits at once, or another machine."
        )


def _preparation_line(preparation: Preparation) -> str:
    blocks = f" of block{'s' * (len(preparation.blocks) > 1)} {', '.join(map(str, preparation.blocks))}"
    what = preparation.what + (blocks if preparation.blocks else "")
    size = f" ({_mb(preparation.bytes)} on disk)" if preparation.bytes else ""
    if preparation.missing is None:
        return f"{what}{size}: whether that was done is not known"
    tokens = f", {preparation.tokens:,} tokens" if preparation.tokens else ""
    if preparation.missing or not preparation.blocks:
        some = preparation.blocks and preparation.missing != preparation.blocks
        which = f" for {', '.join(map(str, preparation.missing))}" if some else ""
        return f"{what}{size}: once{which}{tokens}"
    return f"{what}{size}: in the cache already"


def _cells(stage: Stage, apart: bool) -> tuple[str, ...]:
    host = sum(held.bytes for held in stage.held if held.host)
    rest = sum(held.bytes for held in stage.held) - host
    return (_number(rest), _number(host)) if apart else (_number(rest + host),)


def _number(size: int) -> str:
    return number(size / 1e6, 1) if size else "–"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.{0 if size >= 1e7 else 3}f} MB"


def _free(size: int | None) -> str:
    return "what is free cannot be told" if size is None else f"{_mb(size)} are free"
