"""`factpatch ask`: answers side by side, without and with patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import err, line, print_json, progress
from factpatch.cli.workspace_shown import opened

if TYPE_CHECKING:
    from factpatch.lm import BaseLM

EXAMPLES = """
[bold]Examples[/bold]

  factpatch ask "The capital of France is"
  factpatch ask --patch lyon "The capital of France is"
  factpatch ask --model openai:my-model --base-url http://localhost:8000/v1 --chat "Who leads Acme?"
  factpatch ask --workspace facts "The capital of France is"
  factpatch ask --patch lyon --patch acme --chat "What is the capital of France?"
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="ask", epilog=EXAMPLES)(ask)


def ask(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    model: opt.OptionalModel = None,
    base_url: opt.BaseUrl = None,
    patch: opt.Patches = None,
    workspace: opt.Stack = None,
    chat: opt.Chat = False,
    dtype: opt.DType = None,
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Ask the model, without and with patches; greedy, up to the end of a line or sentence.

    With --workspace the model as it stands there, through the chat template if the workspace has --chat; a --patch lies on top.
    """
    from factpatch.lm import load_or_connect
    from factpatch.patches import Patch

    patches = [Patch.load(folder) for folder in patch or []]
    with progress() as report:
        lm: BaseLM
        if workspace is not None:
            space = opened(workspace, device, model=model, base_url=base_url, dtype=dtype)
            patches, chat = [*space.stack(), *patches], chat or space.settings.chat
            lm = space.model(report)
        else:
            lm = load_or_connect(
                model or opt.DEFAULT_MODEL, base_url=base_url, dtype=dtype, device=device, progress=report
            )
        with lm.patched(*patches):
            after = lm.ask(prompt, chat=chat)
        before = lm.ask(prompt, chat=chat) if patches else after
    if as_json:
        print_json({"prompt": prompt, "chat": chat, "without": before, "with": after if patches else None})
        return
    line("without  " if patches else "", before or "(nothing)")
    if patches:
        line("with     ", (after or "(nothing)", "bold"))
    if not (before and after) and not chat:
        err.print("It ended at once. Ask with --chat, or give the beginning of a sentence to finish.")
