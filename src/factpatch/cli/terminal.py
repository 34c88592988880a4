"""What the commands share: consoles, progress, options, errors, and how a scorecard is shown."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from factpatch.errors import BadConfig
from factpatch.progress import Progress as Report

if TYPE_CHECKING:
    from factpatch.scoring import Retained, Scorecard, Summary

# Without markup: what a model or a user writes may hold brackets.
out = Console(highlight=False, markup=False)
err = Console(stderr=True, highlight=False, markup=False)

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Short name, folder with a checkpoint, .gguf file, hub id, or openai:NAME.",
        show_default=True,
    ),
]
BaseUrlOption = Annotated[
    str | None, typer.Option("--base-url", help="Of --model openai:NAME: where the server is, up to /v1.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]
RetainOption = Annotated[
    Path | None,
    typer.Option(
        help="Questions that must be answered as before, asked after each patch: .txt, .jsonl, .json or .csv."
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(help="openai:NAME of a model that says which free answers are right, however they are put."),
]
JudgeUrlOption = Annotated[
    str | None, typer.Option(help="Address of the judge, such as http://localhost:8000/v1; default: OpenAI's own.")
]
ChatOption = Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")]
DTypeName = Literal["float32", "bfloat16", "float16"]  # as in factpatch.lm.load, which takes torch
DTypeOption = Annotated[
    DTypeName | None, typer.Option("--dtype", help="Type of the weights; default: float32 on a CPU.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the method, such as --set layer=8, or @FILE for a preset; may be repeated.",
    ),
]
SkipOption = Annotated[bool, typer.Option("--skip-invalid", help="Count and leave out records that cannot be read.")]


def fail(message: str, code: int = 2) -> NoReturn:
    """One clear message on stderr, then the exit."""
    err.print(Text("error: ", style="bold red") + Text(message), soft_wrap=True)
    sys.exit(code)


def line(*parts: str | tuple[str, str]) -> None:
    """A line of text on stdout, as long as it is; a part given as (text, style) is styled."""
    out.print(Text.assemble(*parts), soft_wrap=True)


@contextmanager
def telling(wanted: bool) -> Iterator[None]:
    """Whether what is meant for people is printed on stdout in the meantime."""
    out.quiet = not wanted
    try:
        yield
    finally:
        out.quiet = False


def print_json(value: Any) -> None:
    """JSON on stdout and nothing else; numbers that JSON does not have, such as a perplexity without bound, as texts."""
    sys.stdout.write(json.dumps(_told(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _told(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_told(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


@contextmanager
def progress() -> Iterator[Report]:
    """A bar on stderr for work that takes more than a moment; plain lines where there is no terminal."""
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(doing: str, done: int, total: int | None) -> None:
            if doing not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[doing] = bars.add_task(doing, total=total)
            bars.update(tasks[doing], completed=done, total=total, visible=total is None or done < total)

        yield report


class _Lines:
    """A line for each thing begun, where a bar cannot be drawn, and one every half minute while it goes on."""

    def __init__(self) -> None:
        self._doing, self._last = "", 0.0

    def __call__(self, doing: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if done == total or (doing == self._doing and now - self._last < 30):
            return
        self._doing, self._last = doing, now
        err.print(f"{doing} … {done} of {total}" if done else f"{doing} …", soft_wrap=True)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def method_settings(pairs: Sequence[str] | None, *, chat: bool) -> dict[str, Any]:
    """A method's settings from `--set` and `--chat`; `@FILE` stands for those of a preset, which later ones override.

    Raises BadConfig for chat among the former, since scoring needs it too, and BadFile for what is no preset.
    """
    from factpatch.methods import parse_settings

    settings: dict[str, Any] = {}
    for pair in pairs or []:
        if pair.startswith("@"):
            from factpatch.analysis.tuning import read_preset

            settings |= read_preset(Path(pair[1:])).settings
        else:
            settings |= parse_settings([pair])
    if "chat" in settings:
        raise BadConfig(
            "--set chat: prompts are put into the chat template for scoring as well.\n  Give --chat instead."
        )
    return settings | ({"chat": "true"} if chat else {})


def change_line(change: Mapping[str, Any]) -> str:
    """One row of `Patch.changes()` in words."""
    shape = [" × ".join(map(str, change["shape"]))] if "shape" in change else []
    norm = [f"norm {number(change['norm'])}"] if "norm" in change else []
    return f"changes {change['part']} ({', '.join([*shape, change['form'], *norm])})"


def summary_table(summaries: Sequence[Summary]) -> Table:
    """Before and after, one row for each protocol and moment."""
    table = Table(title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in ("protocol", "", "edit success", "rephrase", "portability", "locality", "fluency (bits)"):
        table.add_column(name, justify="left" if name in {"protocol", ""} else "right")
    for s in summaries:
        before = [s.edit_success_before, s.rephrase_before, s.portability_before, None, s.fluency_before]
        after = [s.edit_success, s.rephrase, s.portability, s.locality, s.fluency]
        table.add_row(s.protocol, "before", *(number(v) for v in before), style="dim")
        table.add_row("", "after", *(number(v) for v in after))
    return table


def show_retained(questions: Sequence[Retained], *, strict: bool = False) -> None:
    """How many of the questions changed their answer, and each that did, with both answers.

    strict  whether every change is bad; otherwise those of right answers are
    """
    changed = [question for question in questions if question.changed]
    lost = sum(question.lost for question in questions)
    told = f"; {lost} right ones were lost, which come first" if lost else ""
    line((f"{len(changed)} of {len(questions)} answers changed", "bold"), f" that should have stayed{told}")
    if changed:
        several = len({question.edits for question in questions}) > 1
        table = Table(header_style="bold", box=None, pad_edge=False)
        for name in (*(["after editing"] if several else []), "question", "before", "after"):
            table.add_column(name)
        for q in sorted(changed, key=lambda q: not q.lost):
            which = [_short(", ".join(q.edits), 30)] if several else []
            table.add_row(*which, q.prompt, q.before, q.after, style="red" if strict or q.lost else "")
        out.print(table)


def _short(text: str, width: int = 70) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def probe_table(card: Scorecard, *, protocol: str = "open", limit: int = 40) -> Table:
    """What the model said to each probe, before and after."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("", width=1)
    table.add_column("probe", style="dim", no_wrap=True)
    table.add_column("prompt", ratio=4)
    table.add_column("before", ratio=3)
    table.add_column("after", ratio=3)
    rows = [row for row in card.scores if row.protocol == protocol and row.role != "fluency"]
    for row in rows[:limit]:
        mark = "·" if row.after is None else ("✓" if row.after >= 1 else "✗")
        style = {"✓": "green", "✗": "red", "·": "dim"}[mark]
        table.add_row(
            Text(mark, style=style), row.kind or row.role, row.prompt, _short(row.said_before), _short(row.said_after)
        )
    return table
