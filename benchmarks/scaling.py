"""How the cost of a batch of edits grows with their number: seconds, edits a minute, memory.

    python benchmarks/scaling.py --out docs/results/scaling.md

A run that is stopped leaves the rows it has; with `--methods` and `--sizes` a part of them is made. The search for values goes
edit by edit, so its cost is known from a hundred of them; `--steps 2` cuts it short, to see in minutes how all else grows
up to thousands. The facts are made up, so that there are enough of them. Nothing else should run meanwhile.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from facts import made_up

from factpatch.bench.outcome import watching_memory
from factpatch.cli.terminal import number, progress
from factpatch.files import whole_file
from factpatch.lm import LM, load
from factpatch.methods import create

Row = dict[str, Any]

HEAD = (
    "| method | edits | steps at most | s | of it in the search | s per edit | edits a minute | MB beyond the model |",
    "| --- |" + " ---: |" * 7,
)


def main(
    out: Annotated[Path, typer.Option(help="the page to write; its rows are kept beside it")],
    methods: Annotated[str, typer.Option(help="separated by commas")] = "memit,alphaedit,ultraedit",
    sizes: Annotated[str, typer.Option(help="numbers of edits in one batch, separated by commas")] = "10,100,1000,5000",
    steps: Annotated[int | None, typer.Option(help="of the search for values, at most; default: the preset's")] = None,
    model: str = "smollm2-135m",
) -> None:
    """Add the rows that are missing, and write the page anew after each."""
    kept = out.with_suffix(".jsonl")
    rows: list[Row] = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    with progress() as report:
        lm = load(model, device="cpu", progress=report)
        where = {
            "model": lm.fingerprint[:16],
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("factpatch", "torch", "transformers")},
        }
        # Rows of another model or machine stay in the file, and out of the page.
        own = [row for row in rows if where.items() <= row.items()]
        done = {(row["method"], row["edits"], row["steps"]) for row in own}
        settings = {} if steps is None else {"steps": steps}
        for name in methods.split(","):
            for size in map(int, sizes.split(",")):
                if (name, size, steps) in done:
                    continue
                report(f"{size} edits with {name}", 0, None)
                command = f"python benchmarks/scaling.py {shlex.join(sys.argv[1:])}"
                own.append(measure(lm, name, size, settings) | where | {"command": command})
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(own[-1]) + "\n")
                typer.echo(table(own[-1:])[-1])
                _write(out, own, lm)


def measure(lm: LM, name: str, size: int, settings: dict[str, Any] | None = None) -> Row:
    """One batch of so many edits, once all that the method prepares is at hand."""
    method = create(name, settings or {})
    method.prepare(lm)
    method.fit(lm, made_up(1, seed=1))  # what is made once for a model in hand
    edits, search = made_up(size), _Search()
    with watching_memory(lm.device) as memory:
        started = time.perf_counter()
        method.fit(lm, edits, search)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        seconds = time.perf_counter() - started
    return {
        "method": name,
        "edits": size,
        "steps": (settings or {}).get("steps"),
        "seconds": round(seconds, 2),
        "search": round(search.seconds, 2),
        "grown_mb": round((memory.peak - memory.start) / 1e6),
        "peak_mb": round(memory.peak / 1e6),
    }


class _Search:
    """Told how far a method is, it adds up the seconds that it searches for values."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def __call__(self, doing: str, done: int, total: int | None) -> None:  # noqa: ARG002
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
        self._since = now if doing == "Optimising values" else None


def table(rows: Iterable[Row]) -> list[str]:
    """As Markdown."""
    lines = list(HEAD)
    for row in rows:
        each = row["seconds"] / row["edits"]
        cells = (
            str(row["edits"]),
            number(row["steps"], 0),
            number(row["seconds"], 1),
            number(row["search"], 1),
            number(each, 3),
            number(60 / each, 0),
            str(row["grown_mb"]),
        )
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return lines


def _write(out: Path, rows: Sequence[Row], lm: LM) -> None:
    names = list(dict.fromkeys(row["method"] for row in rows))
    in_order = sorted(rows, key=lambda row: (names.index(row["method"]), -(row["steps"] or 0), row["edits"]))
    lines = [
        "# What a batch of edits costs, by their number",
        "",
        f"Model {lm.name} ({lm.fingerprint[:16]}…), presets, made-up facts, one batch; {psutil.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads. factpatch {version('factpatch')}, torch {version('torch')}. {date.today()}.",
        "",
        *(f"    {command}" for command in dict.fromkeys(row["command"] for row in rows)),
        "",
        "What a method prepares once for a model is not in it. Memory is how far the process grew beyond what it held before.",
        "The search for values goes edit by edit; where its steps are cut short, it is to see how all else grows.",
        "",
        *table(in_order),
    ]
    with whole_file(out) as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
