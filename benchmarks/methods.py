"""Every method on the same edits, each made and scored alone, under both protocols: a Markdown page and its rows.

    python benchmarks/methods.py --limit 50 --out docs/results/methods.md \
        --data wiki_recent:../shared/knowedit/wiki_recent/recent_train.json \
        --data wiki_counterfact:../shared/knowedit/wiki_counterfact/train_cf.json \
        --data zsre:../shared/knowedit/ZsRE/ZsRE-test-all.json

Each edit of each method is a row of the .jsonl file beside the page; `--timed 3` adds what so many edits cost, in a file of
its own. A run that is stopped, or given more records, goes on where the rows end; a row counts only for the model, the
settings and the protocols it was made with. A few records at a time all methods get their turn, so that every page compares
them on the same records; the edits of one turn are made one by one and scored side by side. Methods that learn, or show
examples, take records 100 to 199 of each file, which are never scored here.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import shlex
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import psutil
import torch
import typer
from lessons import lessons_of

from factpatch.bench.outcome import watching_memory
from factpatch.bench.singles import ABREAST
from factpatch.cli.terminal import number, progress
from factpatch.data import Dataset, read, write_jsonl
from factpatch.edits import Edit
from factpatch.errors import CannotEdit, TokenizerError
from factpatch.files import cache_root, whole_file
from factpatch.lm import LM, load
from factpatch.methods import Method, create, find, names
from factpatch.methods.context import Ike
from factpatch.methods.learning import Learned
from factpatch.patches import Patch
from factpatch.scoring import Scorer

SCORES = ("edit_success", "rephrase", "portability", "locality", "fluency")
COSTS = {"seconds": "s to fit", "memory_mb": "MB to fit", "disk_kb": "KB on disk"}
TITLES = {
    "open": "Open protocol: the model's own free answers",
    "survey": "Survey protocol: teacher-forced token agreement",
}
TRAIN = range(100, 200)
PEER = Path(__file__).with_name("easyedit.csv")
REMARKS = Path(__file__).with_name("remarks.toml")
BESIDE = ("edit_success", "portability", "locality")

Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """A method, and the settings for the model that tell its rows from others."""

    method: Method[Any]
    config: dict[str, Any]


def main(
    data: Annotated[list[str], typer.Option()],
    out: Annotated[Path, typer.Option()],
    limit: int = 50,
    methods: Annotated[str, typer.Option(help="some of them, separated by commas; default: all")] = "",
    minutes: Annotated[float, typer.Option(help="stop after so long; the next run goes on")] = float("inf"),
    timed: Annotated[int, typer.Option(help="measure what so many edits cost instead; nothing else should run")] = 0,
    model: str = "smollm2-135m",
) -> None:
    """Add the rows that are missing, and write the page anew after each turn."""
    ends = time.monotonic() + 60 * minutes
    datasets = [read(spec, limit=limit) for spec in data]
    scored, costs = Rows(out.with_suffix(".jsonl")), Rows(out.with_suffix(".costs.jsonl"))
    with progress() as report:
        lm = load(model, progress=report)
        scorer = Scorer(lm)
        lessons = _lessons(data)
        contenders = [_contender(lm, name, lessons) for name in (methods.split(",") if methods else names())]
        wanted: list[str] = []
        for start in range(0, limit, ABREAST):
            for dataset, contender in itertools.product(datasets, contenders):
                keys = {
                    _key(lm, contender, dataset, edit, scorer): edit for edit in dataset.edits[start : start + ABREAST]
                }
                wanted += keys
                missing = {key: edit for key, edit in keys.items() if key not in scored}
                if timed or not missing or time.monotonic() > ends:
                    continue
                contender.method.prepare(lm, report)
                report(f"Records from {start} on: {contender.method.name} on {dataset.name}", 0, None)
                made = _rows(lm, contender, dataset, list(missing.values()), scorer)
                scored.add({key: {"key": key} | row for key, row in zip(missing, made, strict=True)})
        for dataset, contender in itertools.product(datasets, contenders):
            keys = {_key(lm, contender, dataset, edit, scorer): edit for edit in dataset.edits[:timed]}
            missing = {key: edit for key, edit in keys.items() if key not in costs}
            if missing:
                contender.method.prepare(lm, report)
            for key, edit in missing.items():
                report(f"Timing {contender.method.name} on {dataset.name}", 0, None)
                costs.add({key: {"key": key} | _cost(lm, contender, dataset, edit)})
        held = [scored[key] for key in wanted if key in scored]
        _write(out, held, [costs[key] for key in wanted if key in costs], lm, datasets, contenders)


class Rows(dict[str, Row]):
    """Rows by key, and the file they are kept in."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if path.exists():
            self.update((row["key"], row) for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()))

    def add(self, rows: Mapping[str, Row]) -> None:
        """Keep these too."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
        self.update(rows)


def _lessons(data: Sequence[str]) -> tuple[str, int]:
    """The records that may be learned from, of all files, as one file: how to name it, and how many they are."""
    lessons = lessons_of(dict.fromkeys(data, TRAIN))
    told = json.dumps([lesson.to_json() for lesson in lessons])
    path = cache_root() / "benchmarks" / f"lessons-{hashlib.sha256(told.encode()).hexdigest()[:16]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(lessons, path)
    return f"own:{path}", len(lessons)


def _contender(lm: LM, name: str, lessons: tuple[str, int]) -> Contender:
    spec, count = lessons
    kind = find(name)
    learning = {"data": spec} if issubclass(kind, Learned) else {"corpus": spec} if issubclass(kind, Ike) else {}
    method = create(name, learning)
    config = method.resolve(lm).model_dump(mode="json", exclude_defaults=True, exclude={*learning})
    if learning:
        config |= {"learns from": f"{count} records"}
    return Contender(method, config)


def _key(lm: LM, contender: Contender, dataset: Dataset, edit: Edit, scorer: Scorer) -> str:
    protocols = {protocol.name: protocol.version for protocol in scorer.protocols}
    what = [contender.method.name, contender.config, dataset.name, dataset.sha256[:16], edit.id]
    return json.dumps([*what, lm.fingerprint[:16], protocols])


def _rows(lm: LM, contender: Contender, dataset: Dataset, edits: Sequence[Edit], scorer: Scorer) -> list[Row]:
    """Each edit made by itself and weighed; then all of them scored side by side, each under its own patch."""
    rows: list[Row] = []
    patches: list[tuple[Row, Edit, Patch]] = []
    for edit in edits:
        rows.append({"method": contender.method.name, "data": dataset.name, "edit": edit.id})
        try:
            patches.append((rows[-1], edit, contender.method.fit(lm, [edit])))
        except (CannotEdit, TokenizerError) as error:
            rows[-1]["not_made"] = str(error).splitlines()[0]
    cards = scorer.score_each([[edit] for _, edit, _ in patches], [(patch,) for _, _, patch in patches])
    for (row, _, _), card in zip(patches, cards, strict=True):
        row["scores"] = {
            s.protocol: {name: getattr(s, name) for name in SCORES}
            | {f"{name}_before": getattr(s, f"{name}_before") for name in SCORES if name != "locality"}
            for s in card.summaries()
        }
    return rows


def _cost(lm: LM, contender: Contender, dataset: Dataset, edit: Edit) -> Row:
    """What it takes to make one edit."""
    row: Row = {"method": contender.method.name, "data": dataset.name, "edit": edit.id}
    try:
        with watching_memory(lm.device) as memory:
            started = time.perf_counter()
            patch = contender.method.fit(lm, [edit])
            row["seconds"] = round(time.perf_counter() - started, 3)
    except (CannotEdit, TokenizerError):
        return row
    row["memory_mb"] = round((memory.peak - memory.start) / 1e6, 1)
    with tempfile.TemporaryDirectory() as folder:
        saved = patch.save(Path(folder) / "patch")
        row["disk_kb"] = round(sum(file.stat().st_size for file in saved.iterdir()) / 1e3, 1)
    return row


def _write(
    out: Path,
    rows: list[Row],
    costs: list[Row],
    lm: LM,
    datasets: Sequence[Dataset],
    contenders: Sequence[Contender],
) -> None:
    who = "Every method" if len(contenders) == len(names()) else ", ".join(c.method.name for c in contenders)
    packages = ", ".join(f"{package} {version(package)}" for package in ("factpatch", "torch", "transformers"))
    lines = [
        f"# {who} on {', '.join(dataset.name for dataset in datasets)}",
        "",
        f"Each edit made alone, and scored alone on a lane of its own, {ABREAST} at a time. "
        f"Model {lm.name} ({lm.fingerprint[:16]}…), {str(lm.dtype).removeprefix('torch.')}, seed 0. {packages}. {date.today()}.",
        "",
        f"    python benchmarks/methods.py {shlex.join(sys.argv[1:])}",
        "",
        "The first records of each file; `n` says how many were scored, and a refused edit is counted as not made. Fluency is in",
        "bits. Settings that differ from the defaults stand at the end. Rows were made over some days, each with the code of the",
        f"commit that added it to `{out.with_suffix('.jsonl').name}`.",
        "",
        "EasyEdit is a snapshot of July 2026, run once on this model on a machine like ours, with its settings for Llama-2-7B,",
        "blocks and names adapted. They are not tuned for a model this small, and its records are few: its scores only point.",
        "",
    ]
    for dataset in datasets:
        own = [row for row in rows if row["data"] == dataset.name]
        lines += [f"## {dataset.name}", "", f"`{dataset.path.name}`, SHA-256 {dataset.sha256[:16]}…", ""]
        for protocol, title in TITLES.items():
            lines += [f"### {title}", "", *_scores(protocol, own, contenders), ""]
        beside = _beside(dataset, own)
        lines += ["### Beside EasyEdit, survey protocol", "", *beside, ""] if beside else []
    lines += [*_costs(costs, contenders), "## Settings", ""]
    lines += [f"- {c.method.name}: `{json.dumps(c.config)}`" for c in contenders if c.config]
    with whole_file(out) as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _scores(protocol: str, rows: list[Row], contenders: Sequence[Contender]) -> list[str]:
    table = [
        f"| method | n | {' | '.join(map(_title, SCORES))} |",
        "| --- |" + " ---: |" * (1 + len(SCORES)),
    ]
    unedited = {row["edit"]: row["scores"][protocol] for row in rows if "scores" in row}
    before = [_mean(list(unedited.values()), f"{name}_before") for name in SCORES]
    table.append(f"| unedited | {len(unedited)} | {' | '.join(number(value) for value in before)} |")
    for contender in contenders:
        own = [row for row in rows if row["method"] == contender.method.name]
        made = [row["scores"][protocol] for row in own if "scores" in row]
        refused = f", {len(own) - len(made)} not made" if len(own) > len(made) else ""
        values = " | ".join(number(_mean(made, name)) for name in SCORES)
        table.append(f"| {contender.method.name} | {len(made)}{refused} | {values} |")
    return table


def _costs(rows: list[Row], contenders: Sequence[Contender]) -> list[str]:
    """What one edit takes, once what the method prepares is at hand: medians over those that were timed."""
    made = [row for row in rows if "seconds" in row]
    if not made:
        return []
    lines = [
        "## What one edit takes",
        "",
        "Measured apart, with nothing else running; what a method prepares or trains beforehand is not in it. Memory is how far",
        f"the process grew while the patch was made. Medians over the edits that were timed, on {psutil.cpu_count()} cores with",
        f"{torch.get_num_threads()} threads. The last columns are EasyEdit on a machine like ours, and ours on the same file.",
        "",
        f"| method | timed | {' | '.join(COSTS.values())} | EasyEdit s | ours there |",
        "| --- |" + " ---: |" * (3 + len(COSTS)),
    ]
    peer, behind = _peer(), []
    for contender in contenders:
        name = contender.method.name
        own = [row for row in made if row["method"] == name]
        medians = {cost: _median([row[cost] for row in own]) for cost in COSTS}
        theirs = {r["dataset"]: float(r["seconds"]) for r in peer if r["method"] == name}
        there = {data: _median([row["seconds"] for row in own if row["data"] == data]) for data in theirs}
        beside = [", ".join(f"{number(s, 1)} ({data})" for data, s in each.items()) or "–" for each in (theirs, there)]
        lines.append(
            f"| {name} | {len(own)} | {' | '.join(number(m, 1) for m in medians.values())} | {' | '.join(beside)} |"
        )
        for dataset, seconds in theirs.items():
            ours = there[dataset]
            if ours is not None and round(ours, 1) > seconds:
                behind.append(_behind(dataset, name, "seconds", f"{ours:.1f} against {seconds}"))
    return [*lines, "", *(["What falls behind:", "", *behind, ""] if behind else [])]


def _behind(dataset: str, method: str, score: str, numbers: str) -> str:
    """The line of a cell that falls behind the peer's, with what is said of it."""
    remarks = tomllib.loads(REMARKS.read_text(encoding="utf-8")).get("remark", [])
    said = [r["text"] for r in remarks if (r["dataset"], r["method"], r["score"]) == (dataset, method, score)]
    return f"- {method}, {_title(score)}: {numbers}. {said[0] if said else 'Not explained yet.'}"


def _peer() -> list[dict[str, str]]:
    with PEER.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _beside(dataset: Dataset, rows: list[Row]) -> list[str]:
    """The peer's rows for this model, each above ours on the same records; then every cell that falls behind."""
    peer = [row for row in _peer() if row["dataset"] == dataset.name]
    table = [f"| method | by | n | {' | '.join(map(_title, BESIDE))} |", "| --- | --- |" + " ---: |" * 4]
    behind: list[str] = []
    notes: list[str] = []
    for row in peer:
        first = {edit.id for edit in dataset.edits[: int(row["records"])]}
        own = [r for r in rows if r["method"] == row["method"] and r["edit"] in first and "scores" in r]
        if len(own) < int(row["records"]):
            continue
        scores = {name: _mean([r["scores"]["survey"] for r in own], name) for name in BESIDE}
        theirs = {name: float(row[name]) if row[name] else None for name in BESIDE}
        head = f"| {row['method']} |"
        table.append(f"{head} {row['source']} | {row['records']} | {_cells(theirs.values())} |")
        notes += [f"- {row['method']}, EasyEdit's: {row['note']}."] if row["note"] else []
        table.append(f"{head} factpatch | {len(own)} | {_cells(scores.values())} |")
        for name in BESIDE:
            ours, other = scores[name], theirs[name]
            if ours is not None and other is not None and round(ours, 3) < other:
                behind.append(_behind(dataset.name, row["method"], name, f"{ours:.3f} against {other:.3f}"))
    if len(table) == 2:
        return []
    table += ["", *notes] if notes else []
    return [*table, "", *(["What falls behind:", "", *behind] if behind else ["Nothing falls behind."])]


def _title(name: str) -> str:
    return name.replace("_", " ")


def _cells(values: Iterable[float | None]) -> str:
    return " | ".join(number(value) for value in values)


def _mean(rows: Sequence[Mapping[str, float | None]], name: str) -> float | None:
    values = [value for row in rows if (value := row.get(name)) is not None]
    return fmean(values) if values else None


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


if __name__ == "__main__":
    typer.run(main)
