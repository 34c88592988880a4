"""Which settings serve a model best: every combination of a grid, each edit made and scored alone, on held-out records.

    python benchmarks/tune.py rome --data wiki_counterfact:../shared/knowedit/wiki_counterfact/train_cf.json \
        --first 100 --limit 12 --grid layer=4,6,8,10 --grid contexts=5 --out docs/results/tuning/rome-layers.md

Presets in `factpatch.methods` name the table they come from. Records used here must not be used for results.
"""

from __future__ import annotations

import itertools
import json
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from factpatch.bench import score_singly
from factpatch.cli.terminal import number, progress
from factpatch.data import read
from factpatch.lm import load
from factpatch.methods import create
from factpatch.scoring import Scorer

COLUMNS = ("open edit success", "edit success", "rephrase", "portability", "locality", "s per edit")


def main(
    method: str,
    data: Annotated[str, typer.Option()],
    grid: Annotated[list[str], typer.Option(help="setting=value,value,...; all combinations are run")],
    out: Annotated[Path, typer.Option()],
    first: Annotated[int, typer.Option(help="number of the first record")] = 0,
    limit: int = 12,
    model: str = "smollm2-135m",
) -> None:
    """Write a table of scores, best last column first seen; survey protocol unless a column says open."""
    edits = read(data).edits[first : first + limit]
    axes = [(key, values.split(",")) for key, _, values in (axis.partition("=") for axis in grid)]
    rows: list[tuple[str, list[float | None]]] = []
    with progress() as report:
        lm = load(model, progress=report)
        scorer = Scorer(lm, fluency=False)
        for values in itertools.product(*(values for _, values in axes)):
            settings = {key: json.loads(value) for (key, _), value in zip(axes, values, strict=True)}
            card = score_singly(lm, create(method, settings), edits, scorer, report).card
            if card is None:
                continue
            free, survey = card.summary("open"), card.summary("survey")
            shown = ", ".join(f"{key}={value}" for key, value in settings.items())
            scores = [free.edit_success, survey.edit_success, survey.rephrase, survey.portability, survey.locality]
            rows.append((shown, [*scores, (card.fit_seconds or 0) / len(edits)]))
            sys.stdout.write(f"{shown}: {' '.join(number(v) for v in rows[-1][1])}\n")
            sys.stdout.flush()
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# {method} on {lm.name}: {', '.join(key for key, _ in axes)}",
        "",
        f"{limit} records of `{data.rpartition('/')[2]}` from number {first} on, each edited alone; survey protocol "
        f"unless said. {date.today()}.",
        "",
        f"    python benchmarks/tune.py {method} --data {data} --first {first} --limit {limit} "
        + " ".join(f"--grid {axis}" for axis in grid)
        + f" --out {out}",
        "",
        f"| settings | {' | '.join(COLUMNS)} |",
        f"| --- |{' ---: |' * len(COLUMNS)}",
        *(f"| {shown} | {' | '.join(number(v) for v in values)} |" for shown, values in rows),
    ]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
