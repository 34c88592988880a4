"""Which settings serve a model best: every combination of a grid, each edit made and scored alone, on held-out records.

    python benchmarks/tune.py rome --data wiki_counterfact:../shared/knowedit/wiki_counterfact/train_cf.json \
        --first 100 --limit 12 --grid layer=4,6,8,10 --grid contexts=5 --out docs/results/tuning/rome-layers.md

Presets in `factpatch.methods` name the table they come from. Records used here must not be used for results.
"""

from __future__ import annotations

import itertools
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from factpatch.bench import score_singly
from factpatch.cli.terminal import number, progress
from factpatch.data import read
from factpatch.files import whole_file
from factpatch.lm import load
from factpatch.methods import create
from factpatch.scoring import Scorer

COLUMNS = ("open edit success", "edit success", "rephrase", "portability", "locality", "s per edit")


def main(
    method: str,
    data: Annotated[str, typer.Option()],
    grid: Annotated[
        list[str], typer.Option(help="setting=value,value,..., or setting=value/value; all combinations are run")
    ],
    out: Annotated[Path, typer.Option()],
    first: Annotated[int, typer.Option(help="number of the first record")] = 0,
    limit: int = 12,
    model: str = "smollm2-135m",
) -> None:
    """Write a table of scores, after each row anew, so that a run that is stopped leaves what it had."""
    edits = read(data).edits[first : first + limit]
    axes = [_axis(text) for text in grid]
    with progress() as report:
        lm = load(model, progress=report)
        scorer = Scorer(lm, fluency=False)
        head = [
            f"# {method} on {lm.name}: {', '.join(key for key, _ in axes)}",
            "",
            f"{limit} records of `{data.rpartition(chr(47))[2]}` from number {first} on, each edited alone. "
            f"Survey protocol unless said. {date.today()}.",
            "",
            f"    python benchmarks/tune.py {shlex.join(sys.argv[1:])}",
            "",
            f"| settings | {' | '.join(COLUMNS)} |",
            f"| --- |{' ---: |' * len(COLUMNS)}",
        ]
        rows: list[str] = []
        for values in itertools.product(*(values for _, values in axes)):
            settings = {key: value for (key, _), value in zip(axes, values, strict=True)}
            label = ", ".join(f"{key}={value}" for key, value in settings.items())
            done = score_singly(lm, create(method, settings), edits, scorer, report)
            label += f" ({len(done.failures)} not made)" if done.failures else ""
            card = done.card
            if card is None:
                rows.append(f"| {label} |{' |' * len(COLUMNS)}")
                continue
            free, survey = card.summary("open"), card.summary("survey")
            scores = [free.edit_success, survey.edit_success, survey.rephrase, survey.portability, survey.locality]
            numbers = [number(value) for value in (*scores, (card.fit_seconds or 0) / survey.edits)]
            rows.append(f"| {label} | {' | '.join(numbers)} |")
            with whole_file(out) as draft:
                draft.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")


def _axis(text: str) -> tuple[str, list[str]]:
    """A setting and its values; values that hold commas of their own are separated, or a single one ended, by a slash."""
    key, _, values = text.partition("=")
    return key, [value for value in values.split("/" if "/" in values else ",") if value]


if __name__ == "__main__":
    typer.run(main)
