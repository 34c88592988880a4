"""`factpatch data`: the data sets that can be read, and how a record is read."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from factpatch.cli import options as opt
from factpatch.cli.terminal import line, print_json, typed
from factpatch.data import readers, show
from factpatch.errors import BadConfig


class _Readers(TyperGroup):
    """Of whom `list` is asked, as of others: to be told that the name alone lists them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] == "list":
            raise BadConfig(
                f"{ctx.command_path} list: there is no such command.\n  They are listed by:  {typed('data')}"
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Readers, help="Data sets that can be read, and how a record is read.", invoke_without_command=True
)


@app.callback()
def list_readers(context: typer.Context, as_json: opt.Json = False) -> None:
    """Readers by name, one line each; NAME:PATH chooses reader and file."""
    if context.invoked_subcommand is not None:
        return
    rows = {name: reader.description for name, reader in readers().items()}
    if as_json:
        print_json(rows)
        return
    for name, description in rows.items():
        line((f"{name:<18}", "bold"), f" {description}")


@app.command(name="show", epilog="[bold]Example[/bold]\n\n  factpatch data show sample --record 3")
def show_record(
    data: Annotated[str, typer.Argument(help="NAME:PATH, the path of a file of your own, or sample.")],
    record: Annotated[int, typer.Option(min=0, help="Which record, counted from 0.")] = 0,
    as_json: opt.Json = False,
) -> None:
    """A record as it stands in the file, and the edit it is read as."""
    shown = show(data, record)
    if as_json:
        edit = shown.edit.to_json() if shown.edit else None
        print_json({"raw": shown.raw, "edit": edit, "problem": str(shown.problem) if shown.problem else None})
    else:
        line(("in the file", "bold"))
        line(json.dumps(shown.raw, indent=2, ensure_ascii=False))
    if shown.problem is not None:
        raise shown.problem
    if shown.edit is not None and not as_json:
        line(("\nread as", "bold"))
        line(json.dumps(shown.edit.to_json(), indent=2, ensure_ascii=False))
