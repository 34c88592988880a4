"""`factpatch ask`: answers side by side, without and with patches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factpatch.cli.terminal import (
    ChatOption,
    DeviceOption,
    DTypeOption,
    JsonOption,
    ModelOption,
    line,
    print_json,
    progress,
)

EXAMPLES = """
[bold]Examples[/bold]

  factpatch ask "The capital of France is"
  factpatch ask --patch lyon "The capital of France is"
  factpatch ask --patch lyon --patch acme --chat "What is the capital of France?"
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="ask", epilog=EXAMPLES)(ask)


def ask(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    model: ModelOption = "smollm2-135m",
    patch: Annotated[list[Path] | None, typer.Option(help="Patch folder; may be repeated, in order.")] = None,
    chat: ChatOption = False,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the model, without and with patches; greedy, up to the end of a line or sentence."""
    from factpatch.lm import load
    from factpatch.patches import Patch

    patches = [Patch.load(folder) for folder in patch or []]
    with progress() as report:
        lm = load(model, dtype=dtype, device=device, progress=report)
        with lm.patched(*patches):
            after = lm.ask(prompt, chat=chat)
        before = lm.ask(prompt, chat=chat) if patches else after
    if as_json:
        print_json({"prompt": prompt, "chat": chat, "without": before, "with": after if patches else None})
        return
    line("without  " if patches else "", before or "(nothing)")
    if patches:
        line("with     ", (after or "(nothing)", "bold"))
