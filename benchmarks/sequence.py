"""Edits made one after the other and all kept: at edit and at end, as they accumulate, as a Markdown page with pictures.

    python benchmarks/sequence.py --limit 100 --at 1,10,30,100 --kept sequence-run --out docs/results/sequence.md \
        --methods retrieval,ultraedit,ft-m,alphaedit,memit,grace,ft-bf,lora,wise \
        --data wiki_counterfact:../shared/knowedit/wiki_counterfact/train_cf.json

What it shows is what `factpatch analyse sequential --out sequence-run` makes and keeps there; a sequence that is kept is not
made again. The pictures, each with its numbers as CSV, go into a folder beside the page.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from factpatch.analysis.decay import Decay, Rule, breaks, sequential_decay
from factpatch.analysis.health import Monitor
from factpatch.cli.terminal import number, progress
from factpatch.data import Dataset, read
from factpatch.files import whole_file
from factpatch.lm import load
from factpatch.methods import create
from factpatch.report.decay import decay_pictures, decay_rows
from factpatch.report.picture import save_picture, save_table
from factpatch.scoring import ProtocolName, Scorer

SCORES = ("at_edit", "at_end", "rephrase", "portability", "locality", "fluency")
PICTURES = ("success-open", "locality-open", "age-open", "perplexity", "norm")


def main(
    data: Annotated[str, typer.Option()],
    out: Annotated[Path, typer.Option()],
    kept: Annotated[Path, typer.Option(help="folder of the sequences that are done")],
    methods: Annotated[str, typer.Option(help="separated by commas")],
    limit: int = 100,
    at: Annotated[str, typer.Option(help="after how many edits to score them all")] = "1,10,30,100",
    model: str = "smollm2-135m",
) -> None:
    """Make the sequences that are missing, and write the page anew after each."""
    dataset = read(data, limit=limit)
    decays: dict[str, Decay] = {}
    with progress() as report:
        lm = load(model, progress=report)
        scorer, monitor = Scorer(lm), Monitor(lm)
        counts = [int(count) for count in at.split(",")]
        for name in methods.split(","):
            decays[name] = sequential_decay(lm, create(name), dataset.edits, scorer, monitor, counts, kept, report)
            _write(out, decays, dataset)


def _write(out: Path, decays: Mapping[str, Decay], dataset: Dataset) -> None:
    folder, rule = out.with_suffix(""), Rule()
    save_table(folder / "decay.csv", decay_rows(decays))
    pictures = {p.name: save_picture(folder, p.name, p.svg, p.rows) for p in decay_pictures(decays, rule)}
    one = next(iter(decays.values()))
    lines = [
        f"# Sequences of edits on {dataset.name}",
        "",
        f"The first {len(dataset)} records of `{dataset.path.name}` (SHA-256 {dataset.sha256[:16]}…), each kept while the next "
        f"is made. Model {one.model} ({one.fingerprint[:16]}…), seed 0. "
        + ", ".join(f"{name} {version(name)}" for name in one.packages)
        + f". {date.today()}.",
        "",
        f"    python benchmarks/sequence.py {shlex.join(sys.argv[1:])}",
        "",
        "At edit: success of the first n edits, each right after it was made. At end: of the same edits after the n-th; so are",
        "all other columns. Fluency is in bits. What cannot be scored in this data set has a dash.",
    ]
    for protocol in one.protocols:
        lines += ["", f"## {protocol.capitalize()} protocol", "", *_table(decays, protocol)]
    lines += ["", "## The model", "", *_vitals(decays), "", "## Where each breaks", "", rule.says(), ""]
    for name, decay in decays.items():
        found = breaks(decay, rule, one.protocols[0])
        told = "; ".join(f"between {each.after} and {each.at} edits: {each.says}" for each in found)
        lines.append(f"- {name}: {told or f'not within {decay.units} edits'}")
    lines += ["", "## Pictures", ""]
    lines += [f"![{name}]({folder.name}/{pictures[name].name})\n" for name in PICTURES if name in pictures]
    lines += [
        f"Their numbers and those of all checkpoints are in [{folder.name}/]({folder.name}/).",
        "",
        "## Settings",
        "",
    ]
    for name, decay in decays.items():
        plain = create(name).config.model_dump(mode="json")
        lines.append(f"- {name}: `{json.dumps({k: v for k, v in decay.config.items() if v != plain.get(k)})}`")
    with whole_file(out) as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(decays: Mapping[str, Decay], protocol: ProtocolName) -> list[str]:
    lines = [f"| method | n | {' | '.join(name.replace('_', ' ') for name in SCORES)} |"]
    lines.append("| --- |" + " ---: |" * (1 + len(SCORES)))
    for name, decay in decays.items():
        lines += [
            f"| {name} | {point.edits} | {' | '.join(number(getattr(point, s)) for s in SCORES)} |"
            for point in decay.points(protocol)
        ]
    return lines


def _vitals(decays: Mapping[str, Decay]) -> list[str]:
    lines = [
        "| method | n | perplexity, times the unedited | weights moved by | guard questions right | minutes to fit | to score |",
        "| --- |" + " ---: |" * 6,
    ]
    for name, decay in decays.items():
        for look in decay.checkpoints:
            v, is_last = look.vitals, look is decay.checkpoints[-1]
            right = "–" if v.right is None else f"{v.right} of {len(v.questions)}"
            minutes = [decay.fit_seconds / 60, decay.score_seconds / 60] if is_last else [None, None]
            cells = [number(v.perplexity_ratio, 2), number(v.norm, 4), right, *(number(each, 1) for each in minutes)]
            lines.append(f"| {name} | {look.patches} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    typer.run(main)
