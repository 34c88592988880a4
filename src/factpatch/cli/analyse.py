"""`factpatch analyse`: what edits change in a model, how they decay, and where facts sit."""

from __future__ import annotations

import typer

from factpatch.cli import analyse_places, analyse_sequential, analyse_weights

app = typer.Typer(
    help="What edits change in a model, how they decay in sequence, and where facts sit.", no_args_is_help=True
)
for module in (analyse_weights, analyse_sequential, analyse_places):
    module.register(app)
