"""Edits made one after the other and all kept: at edit and at end, as they accumulate, as a Markdown page and its rows.

    python benchmarks/sequence.py --limit 100 --at 1,10,30,100 --out docs/results/sequence.md \
        --methods alphaedit,ultraedit,memit,wise,grace,ft-m,ft-bf,lora,retrieval \
        --data wiki_counterfact:../shared/knowedit/wiki_counterfact/train_cf.json

A sequence that is done is kept in the .jsonl file beside the page, and not made again by a run with the same settings; so the
methods of a long run can be given a few at a time.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from factpatch.bench import Sequential, score_sequence
from factpatch.cli.terminal import number, progress
from factpatch.data import Dataset, read
from factpatch.files import whole_file
from factpatch.lm import LM, load
from factpatch.methods import create
from factpatch.scoring import Scorecard, Scorer

COLUMNS = {
    "open at edit": ("at_edit", "open", "edit_success"),
    "open at end": ("at_end", "open", "edit_success"),
    "at edit": ("at_edit", "survey", "edit_success"),
    "at end": ("at_end", "survey", "edit_success"),
    "portability": ("at_end", "survey", "portability"),
    "locality": ("at_end", "survey", "locality"),
    "open locality": ("at_end", "open", "locality"),
    "fluency": ("at_end", "open", "fluency"),
}

Row = dict[str, Any]


def main(
    data: Annotated[str, typer.Option()],
    out: Annotated[Path, typer.Option()],
    methods: Annotated[str, typer.Option(help="separated by commas")],
    limit: int = 100,
    at: Annotated[str, typer.Option(help="after how many edits to score them all")] = "1,10,30,100",
    model: str = "smollm2-135m",
) -> None:
    """Make the sequences that are missing, and write the page anew after each."""
    dataset = read(data, limit=limit)
    counts = sorted({min(int(count), len(dataset)) for count in at.split(",")})
    kept = out.with_suffix(".jsonl")
    done = {row["key"]: row for row in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    shown: list[Row] = []
    with progress() as report:
        lm = load(model, progress=report)
        scorer = Scorer(lm)
        for name in methods.split(","):
            method = create(name)
            config = method.resolve(lm).model_dump(mode="json", exclude_defaults=True)
            key = json.dumps([name, config, dataset.sha256[:16], len(dataset), counts, lm.fingerprint[:16]])
            if key not in done:
                started = time.perf_counter()
                found = score_sequence(lm, method, dataset.edits, scorer, counts, report)
                seconds = round(time.perf_counter() - started, 1)
                done[key] = {"key": key, "method": name, "config": config} | _row(found, dataset, counts, seconds)
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[key]) + "\n")
            shown.append(done[key])
            _write(out, shown, lm, dataset, counts)


def _row(found: Sequential, dataset: Dataset, counts: list[int], seconds: float) -> Row:
    """Scores of the first so many edits, each right after it was made and all at that point."""
    points: dict[str, dict[str, float | None]] = {}
    for count in counts:
        first = {edit.id for edit in dataset.edits[:count]}
        cards = {"at_edit": _of(found.at_edit, first), "at_end": found.at_end.get(count)}
        points[str(count)] = {
            title: getattr(card.summary(protocol), score) if card is not None else None
            for title, (moment, protocol, score) in COLUMNS.items()
            for card in (cards[moment],)
        }
    return {"points": points, "not_made": [failure.edit for failure in found.failures], "seconds": seconds}


def _of(card: Scorecard | None, edits: set[str]) -> Scorecard | None:
    """The part of a card that is of these edits; None if there is none."""
    scores = tuple(row for row in card.scores if row.edit in edits) if card is not None else ()
    return card.model_copy(update={"scores": scores}) if card is not None and scores else None


def _write(out: Path, rows: list[Row], lm: LM, dataset: Dataset, counts: list[int]) -> None:
    lines = [
        f"# Sequences of edits on {dataset.name}",
        "",
        f"The first {len(dataset)} records of `{dataset.path.name}` (SHA-256 {dataset.sha256[:16]}…), each kept while the next "
        f"is made. Model {lm.name} ({lm.fingerprint[:16]}…), seed 0. factpatch {version('factpatch')}, torch {version('torch')}, "
        f"transformers {version('transformers')}. {date.today()}.",
        "",
        f"    python benchmarks/sequence.py {shlex.join(sys.argv[1:])}",
        "",
        "`at edit`: the success of the first n edits, each right after it was made. `at end`: of the same edits after the n-th;",
        "so are all other columns. Survey protocol unless open is said. Fluency is in bits.",
        "",
        f"| method | n | {' | '.join(COLUMNS)} |",
        "| --- |" + " ---: |" * (1 + len(COLUMNS)),
    ]
    for row in rows:
        for count in counts:
            values = " | ".join(number(row["points"][str(count)][title]) for title in COLUMNS)
            lines.append(f"| {row['method']} | {count} | {values} |")
    lines += [
        "",
        "## Minutes, and edits that were not made",
        "",
        "| method | minutes in all | not made |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {row['method']} | {row['seconds'] / 60:.1f} | {len(row['not_made'])} |" for row in rows]
    lines += ["", "## Settings that differ from the defaults", ""]
    lines += [f"- {row['method']}: `{json.dumps(row['config'])}`" for row in rows]
    with whole_file(out) as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
