"""`factpatch harness`: tasks of the evaluation harness, before and after a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import line, new_table, number, out, print_json, progress

EXAMPLES = """
[bold]Examples[/bold]

  factpatch harness --patch lyon --task lambada_openai --limit 200
  factpatch harness --patch lyon --patch oslo --task arc_easy --task hellaswag --json
  factpatch harness --patch lyon --task my_task --tasks-folder my-tasks
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="harness", epilog=EXAMPLES)(harness)


def harness(
    task: Annotated[list[str], typer.Option(help="Name of a task or group of the harness; may be repeated.")],
    patch: opt.Patches = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples shown before each; default: as the task says.")
    ] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    model: opt.Model = opt.DEFAULT_MODEL,
    chat: Annotated[bool, typer.Option("--chat", help="Put what is asked into the model's chat template.")] = False,
    dtype: opt.DType = None,
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness on the model without and with patches.

    Needs the extra: pip install "factpatch\\[harness]". The harness fetches a task's data from the hub on first use.
    """
    from factpatch.lm import load
    from factpatch.patches import Patch
    from factpatch.scoring.harness import HarnessLM, evaluate

    patches = [Patch.load(folder) for folder in patch or []]
    with progress() as report:
        lm = load(model, dtype=dtype, device=device, progress=report)
    wanted: dict[str, Any] = {"limit": limit, "num_fewshot": shots, "apply_chat_template": chat}
    before = evaluate(HarnessLM(lm), task, folder=tasks_folder, **wanted)
    with lm.patched(*patches):
        after = evaluate(HarnessLM(lm), task, folder=tasks_folder, **wanted) if patches else {}
    rows: list[dict[str, Any]] = [
        {
            "task": name,
            "metric": metric,
            "before": own.value,
            "before_stderr": own.stderr,
            "after": after[name, metric].value if patches else None,
            "after_stderr": after[name, metric].stderr if patches else None,
        }
        for (name, metric), own in before.items()
    ]
    if as_json:
        print_json(rows)
        return
    table = new_table("task", "metric", ">before", ">±", ">after", ">±")
    for row in rows:
        values = (number(row[name]) for name in ("before", "before_stderr", "after", "after_stderr"))
        table.add_row(row["task"], row["metric"], *values)
    out.print(table)
    line(("±: standard errors.", "dim"))
