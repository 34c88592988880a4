"""Methods side by side on one data set, each edit made and scored alone, both protocols, as a Markdown page.

    python benchmarks/compare_methods.py ft-l ft-m rome r-rome \
        --data wiki_counterfact:../shared/knowedit/wiki_counterfact/train_cf.json --limit 20 \
        --out docs/results/wiki_counterfact.md
"""

from __future__ import annotations

import json
import shlex
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from factpatch.bench import Singles, score_singly
from factpatch.cli.terminal import number, progress
from factpatch.data import read
from factpatch.lm import load
from factpatch.methods import create, parse_settings
from factpatch.scoring import ProtocolName, Scorer

COLUMNS = ("edit success", "rephrase", "portability", "locality", "fluency", "s to fit", "s to score")
TITLES: dict[ProtocolName, str] = {
    "open": "Open protocol: the model's own free answers",
    "survey": "Survey protocol: teacher-forced token agreement",
}


def main(
    methods: Annotated[list[str], typer.Argument(help="METHOD, or METHOD,key=value,... to change its settings")],
    data: Annotated[str, typer.Option()],
    out: Annotated[Path, typer.Option()],
    limit: int = 20,
    model: str = "smollm2-135m",
    chat: Annotated[bool, typer.Option("--chat")] = False,
) -> None:
    """Run every method and write the page; the probe scores go beside it as JSON lines."""
    dataset = read(data, limit=limit)
    done: dict[str, Singles] = {}
    settings: dict[str, str] = {}
    with progress() as report:
        lm = load(model, progress=report)
        scorer = Scorer(lm, chat=chat)
        for spec in methods:
            name, *pairs = spec.split(",")
            method = create(name, parse_settings(pairs) | ({"chat": "true"} if chat else {}))
            done[spec] = score_singly(lm, method, dataset.edits, scorer, report)
            settings[spec] = json.dumps(method.resolve(lm).model_dump(exclude_defaults=True))
            sys.stdout.write(f"{spec} done\n")
            sys.stdout.flush()
    lines = [
        f"# {', '.join(methods)} on {dataset.name}",
        "",
        f"The first {len(dataset)} records of `{dataset.path.name}` (SHA-256 {dataset.sha256[:16]}…), each edited alone. "
        f"Model {lm.name} "
        f"({lm.fingerprint[:16]}…), {str(lm.dtype).removeprefix('torch.')}{', chat template' if chat else ''}, seed 0. "
        f"factpatch {version('factpatch')}, torch {version('torch')}, transformers {version('transformers')}. {date.today()}.",
        "",
        f"    python benchmarks/compare_methods.py {shlex.join(sys.argv[1:])}",
        "",
    ]
    for protocol, title in TITLES.items():
        lines += _table(protocol, title, done)
    lines += [
        "Fluency is in bits (the survey prints it times 100). Seconds are means per edit on a shared two-core machine; they",
        "point, they do not prove. Settings that differ from a method's defaults: "
        + "; ".join(f"{spec} `{chosen}`" for spec, chosen in settings.items())
        + ".",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(protocol: ProtocolName, title: str, done: dict[str, Singles]) -> list[str]:
    rows = []
    unedited: list[float | None] = []
    for spec, singles in done.items():
        blank = " |" * (len(COLUMNS) - 1)
        rows += [f"| {spec} | not made: {failure.reason.splitlines()[0]} |{blank}" for failure in singles.failures]
        if singles.card is None:
            continue
        s, edits = singles.card.summary(protocol), singles.card.summary(protocol).edits
        unedited = [s.edit_success_before, s.rephrase_before, s.portability_before, None, s.fluency_before, None, None]
        seconds = [(singles.card.fit_seconds or 0) / edits, singles.card.score_seconds / edits]
        values = [s.edit_success, s.rephrase, s.portability, s.locality, s.fluency, *seconds]
        rows.append(f"| {spec} | {' | '.join(number(v) for v in values)} |")
    rows.insert(0, f"| unedited | {' | '.join(number(v) for v in unedited)} |")
    return [f"## {title}", "", f"| method | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS), *rows, ""]


if __name__ == "__main__":
    typer.run(main)
