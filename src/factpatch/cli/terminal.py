"""What the commands share: consoles, progress, errors, and how a scorecard is shown."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from factpatch import commands
from factpatch.errors import BadConfig
from factpatch.files import json_ready
from factpatch.progress import Progress as Report

if TYPE_CHECKING:
    from factpatch.scoring import Retained, Scorecard, Summary

_NO_TERMINAL = 160
"""Columns where no terminal tells how many it has, as in a pipe; enough for most tables."""


def _console(stream: TextIO | None, **more: Any) -> Console:
    """Without markup: what a model or a user writes may hold brackets."""
    wide = None if (stream and stream.isatty()) or os.environ.get("COLUMNS", "").isdecimal() else _NO_TERMINAL
    return Console(highlight=False, markup=False, width=wide, **more)


out = _console(sys.stdout)
err = _console(sys.stderr, stderr=True)
typed, typed_in = commands.typed, commands.typed_in


def fail(message: str) -> NoReturn:
    """One clear message on stderr, then the exit."""
    err.print(Text("error: ", style="bold red") + Text(message), soft_wrap=True)
    sys.exit(2)


@contextmanager
def if_interrupted(kept: Callable[[], str]) -> Iterator[None]:
    """What is said of an interruption: what it left, asked for once all that was begun inside is undone."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept()) from None


def is_written(path: Path) -> str:
    """Whether a file or folder that appears only when it is whole is there, after an interruption."""
    there = path.is_file() or (path.is_dir() and any(path.iterdir()))
    return f"{path} is written and whole." if there else f"nothing was written to {path}."


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
    sys.stdout.write(json.dumps(json_ready(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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


def new_table(*columns: str) -> Table:
    """A plain table; what a column holds whose name begins with ">" is put to the right, as numbers are."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return table


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
            "--set chat: prompts are put into the chat template for scoring as well.\n"
            "  Give --chat instead. A workspace has it for good: factpatch init --chat"
        )
    return settings | ({"chat": "true"} if chat else {})


def change_line(change: Mapping[str, Any]) -> str:
    """One row of `Patch.changes()` in words."""
    shape = [" × ".join(map(str, change["shape"]))] if "shape" in change else []
    norm = [f"norm {number(change['norm'])}"] if "norm" in change else []
    return f"changes {change['part']} ({', '.join([*shape, change['form'], *norm])})"


def summary_table(summaries: Sequence[Summary]) -> Table:
    """Before and after, one row for each protocol and moment."""
    table = new_table("protocol", "", ">edit success", ">rephrase", ">portability", ">locality", ">fluency (bits)")
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
        table = new_table(*(["after editing"] if several else []), "question", "before", "after", "")
        for q in sorted(changed, key=lambda q: not q.lost):
            which = [_short(", ".join(q.edits), 30)] if several else []
            table.add_row(*which, q.prompt, q.before, q.after, _turned(q), style="red" if strict or q.lost else "")
        out.print(table)


def _turned(question: Retained) -> str:
    """What became of the answer, where a right one is known."""
    if question.was_right is None or question.is_right is None:
        return ""
    return " → ".join("right" if right else "wrong" for right in (question.was_right, question.is_right))


def _short(text: str, width: int = 70) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def probe_lines(heads: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> RenderableType:
    """Long texts side by side where there is room for them, else a block of lines for each row, named as the columns are."""
    texts = [[text if isinstance(text, Text) else Text(text) for text in row] for row in rows]
    widths = [max(map(len, (Text(head), *column))) for head, *column in zip(heads, *texts, strict=True)]
    if sum(widths) + len(widths) <= out.width:
        table = new_table(*heads)
        for row in texts:
            table.add_row(*row)
        return table
    most = max(map(len, heads[1:]))
    blocks: list[RenderableType] = []
    for first, *rest in texts:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="dim", width=most + 4, no_wrap=True)
        grid.add_column(overflow="fold")
        for head, text in zip(heads[1:], rest, strict=True):
            grid.add_row(f"    {head}", text)
        blocks += [first, grid]
    return Group(*blocks)


def probe_table(card: Scorecard, *, protocol: str = "open", limit: int = 40) -> RenderableType:
    """What the model said to each probe, before and after."""
    found = []
    rows = [row for row in card.scores if row.protocol == protocol and row.role != "fluency"]
    for row in rows[:limit]:
        mark = "·" if row.after is None else ("✓" if row.after >= 1 else "✗")
        style = {"✓": "green", "✗": "red", "·": "dim"}[mark]
        probe = (Text(mark, style=style), Text(f" {row.kind or row.role}", style="dim"))
        found.append((Text.assemble(*probe), row.prompt, _short(row.said_before), _short(row.said_after)))
    return probe_lines(("  probe", "prompt", "before", "after"), found)
