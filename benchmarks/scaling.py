"""How the cost of a batch of edits grows with their number: seconds, edits a minute, memory.

    python benchmarks/scaling.py --out docs/results/scaling.md

A run that is stopped leaves the rows it has; with `--methods` and `--sizes` a part of them is made. The facts are made up, so
that there are enough of them. Nothing else should run meanwhile.
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

HEAD = ("| method | edits | s | s per edit | edits a minute | MB beyond the model |", "| --- |" + " ---: |" * 5)


def main(
    out: Annotated[Path, typer.Option(help="the page to write; its rows are kept beside it")],
    methods: Annotated[str, typer.Option(help="separated by commas")] = "memit,alphaedit,ultraedit",
    sizes: Annotated[str, typer.Option(help="numbers of edits in one batch, separated by commas")] = "10,100,1000,5000",
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
        done = {(row["method"], row["edits"]) for row in own}
        for name in methods.split(","):
            for size in map(int, sizes.split(",")):
                if (name, size) in done:
                    continue
                report(f"{size} edits with {name}", 0, None)
                command = f"python benchmarks/scaling.py {shlex.join(sys.argv[1:])}"
                own.append(measure(lm, name, size) | where | {"command": command})
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(own[-1]) + "\n")
                typer.echo(table(own[-1:])[-1])
                _write(out, own, lm)


def measure(lm: LM, name: str, size: int, settings: dict[str, Any] | None = None) -> Row:
    """One batch of so many edits, once all that the method prepares is at hand."""
    method = create(name, settings or {})
    method.prepare(lm)
    method.fit(lm, made_up(1, seed=1))  # what is made once for a model in hand
    edits = made_up(size)
    with watching_memory() as memory:
        started = time.perf_counter()
        method.fit(lm, edits)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        seconds = time.perf_counter() - started
    return {
        "method": name,
        "edits": size,
        "seconds": round(seconds, 2),
        "grown_mb": round((memory.peak - memory.start) / 1e6),
    }


def table(rows: Iterable[Row]) -> list[str]:
    """As Markdown."""
    lines = list(HEAD)
    for row in rows:
        each = row["seconds"] / row["edits"]
        cells = (number(row["seconds"], 1), number(each, 3), number(60 / each, 0), str(row["grown_mb"]))
        lines.append(f"| {row['method']} | {row['edits']} | {' | '.join(cells)} |")
    return lines


def _write(out: Path, rows: Sequence[Row], lm: LM) -> None:
    names = list(dict.fromkeys(row["method"] for row in rows))
    in_order = sorted(rows, key=lambda row: (names.index(row["method"]), row["edits"]))
    lines = [
        "# What a batch of edits costs, by their number",
        "",
        f"Model {lm.name} ({lm.fingerprint[:16]}…), presets, made-up facts, one batch; {psutil.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads. factpatch {version('factpatch')}, torch {version('torch')}. {date.today()}.",
        "",
        *(f"    {command}" for command in dict.fromkeys(row["command"] for row in rows)),
        "",
        "What a method prepares once for a model is not in it. Memory is how far the process grew beyond what it held before.",
        "",
        *table(in_order),
    ]
    with whole_file(out) as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
