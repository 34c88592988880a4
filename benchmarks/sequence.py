"""Edits made one after the other and all kept: at edit and at end, as they accumulate, as a Markdown page.

    python benchmarks/sequence.py memit alphaedit ft-m ft-bf retrieval \
        --data wiki_counterfact:../shared/knowedit/wiki_counterfact/train_cf.json --limit 100 --at 1,10,30,100 \
        --out docs/results/sequence.md
"""

from __future__ import annotations

import shlex
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from factpatch.bench import score_sequence
from factpatch.cli.terminal import number, progress
from factpatch.data import read
from factpatch.files import whole_file
from factpatch.lm import load
from factpatch.methods import create, parse_settings
from factpatch.scoring import Scorecard, Scorer

COLUMNS = ("edits", "open edit success", "edit success", "rephrase", "portability", "locality", "fluency")


def main(
    methods: Annotated[list[str], typer.Argument(help="METHOD, or METHOD,key=value,... to change its settings")],
    data: Annotated[str, typer.Option()],
    out: Annotated[Path, typer.Option()],
    limit: int = 100,
    at: Annotated[str, typer.Option(help="after how many edits to score them all")] = "1,10,30,100",
    model: str = "smollm2-135m",
) -> None:
    """Write a table, after each method anew, so that a run that is stopped leaves what it had."""
    dataset = read(data, limit=limit)
    with progress() as report:
        lm = load(model, progress=report)
        scorer = Scorer(lm)
        lines = [
            f"# Sequences of edits on {dataset.name}",
            "",
            f"The first {len(dataset)} records of `{dataset.path.name}` (SHA-256 {dataset.sha256[:16]}…), each kept while the "
            f"next is made. Survey protocol unless said. Model {lm.name} ({lm.fingerprint[:16]}…), seed 0. "
            f"factpatch {version('factpatch')}, torch {version('torch')}. {date.today()}.",
            "",
            f"    python benchmarks/sequence.py {shlex.join(sys.argv[1:])}",
            "",
            f"| method | {' | '.join(COLUMNS)} |",
            f"| --- |{' ---: |' * len(COLUMNS)}",
        ]
        for spec in methods:
            name, *pairs = spec.split(",")
            method = create(name, parse_settings(pairs))
            done = score_sequence(lm, method, dataset.edits, scorer, [int(n) for n in at.split(",")], report)
            if done.at_edit is not None:
                lines.append(_row(f"{spec}, at edit", len(dataset), done.at_edit))
            lines += [_row(f"{spec}, at end", count, card) for count, card in done.at_end.items()]
            lines += [f"| {spec}: {len(done.failures)} not made |{' |' * len(COLUMNS)}"] if done.failures else []
            with whole_file(out) as draft:
                draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(label: str, count: int, card: Scorecard) -> str:
    free, survey = card.summary("open"), card.summary("survey")
    scores = [
        free.edit_success,
        survey.edit_success,
        survey.rephrase,
        survey.portability,
        survey.locality,
        free.fluency,
    ]
    return f"| {label} | {count} | {' | '.join(number(value) for value in scores)} |"


if __name__ == "__main__":
    typer.run(main)
