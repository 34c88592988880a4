"""The `factpatch` command and the way errors leave it."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version as package_version
from typing import Annotated

import typer

from factpatch.cli import (
    analyse,
    ask,
    audit,
    bench,
    catalog,
    data,
    demo,
    edit,
    export,
    guard,
    harness,
    inspect,
    locate,
    patch,
    report,
    reproduce,
    score,
    trace,
    train,
    tune,
    workspace,
)
from factpatch.cli.terminal import fail
from factpatch.errors import FactpatchError

__all__ = ["app", "run"]

app = typer.Typer(
    name="factpatch",
    help="Patch what a language model knows, prove the patch worked, and undo it any time.",
    epilog="Start with:  factpatch demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (
    edit,
    score,
    guard,
    audit,
    harness,
    bench,
    report,
    reproduce,
    ask,
    train,
    trace,
    locate,
    tune,
    inspect,
    demo,
    catalog,
    workspace,
):
    module.register(app)
app.add_typer(patch.app, name="patch")
app.add_typer(export.app, name="export")
app.add_typer(analyse.app, name="analyse")
app.add_typer(data.app, name="data")
app.add_typer(catalog.models, name="models")


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"factpatch {package_version('factpatch')}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """What stands before any command."""


def run() -> None:
    """Parse the arguments and run the command, as `main` has it."""
    logging.getLogger("factpatch").addHandler(logging.StreamHandler(sys.stderr))
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries; the last one becomes our error
    try:
        app()
    except FactpatchError as error:
        fail(str(error))
