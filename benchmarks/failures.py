"""How well the recogniser of failures does on wrong answers that were labelled by hand: a Markdown page.

    python benchmarks/failures.py --out docs/results/failures.md

The answers in failures.jsonl are the default model's, edited with the built-in sample by several methods, some of them with
settings that do badly. The first set was looked at while the rules were written; the held-out set was labelled afterwards,
before the rules were tried on it, and they were not changed since.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from factpatch.files import whole_file
from factpatch.scoring.failures import FAILURES, failure_mode

LABELLED = Path(__file__).with_name("failures.jsonl")


def labelled() -> list[dict[str, Any]]:
    """Each with its label, and what the recogniser says."""
    rows = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    return [
        row | {"found": failure_mode(row["said"], wanted=row["wanted"], old=row["old"], before=row["before"])}
        for row in rows
    ]


def main(out: Annotated[Path, typer.Option()]) -> None:
    """Write the page."""
    lines = [
        "# How well failures are recognised",
        "",
        "    python benchmarks/failures.py --out docs/results/failures.md",
        "",
    ]
    lines += ["Rows are labels given by hand, columns what the recogniser says.", ""]
    rows = labelled()
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        pairs = Counter((row["label"], row["found"]) for row in own)
        right = sum(count for (label, found), count in pairs.items() if label == found)
        lines += [f"## Set: {name}", "", f"{right} of {len(own)} right ({right / len(own):.3f}).", ""]
        lines += [f"| label | n | {' | '.join(FAILURES)} |", "| --- |" + " ---: |" * (1 + len(FAILURES))]
        for label in FAILURES:
            counts = [pairs[label, found] for found in FAILURES]
            lines.append(f"| {label} | {sum(counts)} | {' | '.join(map(str, counts))} |")
        lines += ["", "Where they differ:", ""]
        lines += [
            f'- {r["label"]}, not {r["found"]}: "{r["prompt"]}" wanted "{r["wanted"][0]}", before "{r["before"]}", '
            f'after "{r["said"][:80]}"'
            for r in own
            if r["label"] != r["found"]
        ]
        lines.append("")
    with whole_file(out) as draft:
        draft.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
