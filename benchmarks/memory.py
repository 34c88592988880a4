"""What an edit takes at its peak, beside what `factpatch edit --plan` says it will.

    python benchmarks/memory.py --methods rome,r-rome,memit,alphaedit,ft-m --steps 3 --out docs/results/memory.md

Each row is made by a process of its own. Searches and training may be cut short by `--steps`: how much is held does not depend
on their number. A run that is stopped leaves the rows it has. `--prepared memit` adds what measuring the model takes, once,
in an empty cache; `--scored rome` what scoring takes after the edits.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from facts import made_up
from transformers import LlamaConfig, LlamaForCausalLM

from factpatch.cli.terminal import progress
from factpatch.files import whole_file
from factpatch.lm import load
from factpatch.methods import create
from factpatch.methods.plan import Outline, outline, plan
from factpatch.scoring import Scorer

Row = dict[str, Any]

LARGE = (
    ("rome", 1),
    ("r-rome", 10),
    ("emmet", 10),
    ("memit", 1),
    ("memit", 100),
    ("alphaedit", 100),
    ("ft-m", 1),
    ("ft-m", 32),
)
"""What is reckoned for a model of Llama-2-7B's shape."""


def main(
    out: Annotated[Path, typer.Option(help="the page to write; its rows are kept beside it")],
    methods: Annotated[str, typer.Option(help="separated by commas")] = "rome,r-rome,memit,alphaedit,ft-m",
    sizes: Annotated[str, typer.Option(help="numbers of edits, separated by commas")] = "1,10",
    prepared: Annotated[str, typer.Option(help="methods to prepare as well, in an empty cache")] = "",
    scored: Annotated[str, typer.Option(help="methods whose edits are scored as well")] = "",
    steps: Annotated[int, typer.Option(help="of searches and training; 0 for the method's own")] = 0,
    model: str = "smollm2-135m",
    device: str = "cpu",
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Add the rows that are missing, and write the page anew."""
    if one:
        typer.echo(json.dumps(_measured(**json.loads(one))))
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = out.with_suffix(".jsonl")
    rows: list[Row] = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    wanted = [("edit", name, int(size)) for name in methods.split(",") for size in sizes.split(",")]
    wanted += [("score", name, int(size)) for name in filter(None, scored.split(",")) for size in sizes.split(",")]
    wanted += [("prepare", name, 1) for name in filter(None, prepared.split(","))]
    with progress() as report:
        for doing, name, size in wanted:
            asked = {"doing": doing, "method": name, "edits": size, "steps": steps, "model": model, "device": device}
            asked |= {"factpatch": version("factpatch"), "torch": version("torch")}
            if any(asked.items() <= row.items() for row in rows):
                continue
            report(f"{doing}: {size} edits with {name}", 0, None)
            command = f"python benchmarks/memory.py {shlex.join(sys.argv[1:])}"
            rows.append(asked | _in_a_process(asked) | {"command": command})
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            typer.echo(_line(rows[-1]))
    _write(out, [row for row in rows if row["model"] == model and row["device"] == device])


def _in_a_process(asked: Row) -> Row:
    """What one row is measured to be, with nothing left over from the others."""
    given = {key: asked[key] for key in ("doing", "method", "edits", "steps", "model", "device")}
    command = [sys.executable, __file__, "--out", "unused", "--one", json.dumps(given)]
    with tempfile.TemporaryDirectory() as folder:
        place = dict(os.environ)
        if given["doing"] == "prepare":
            # The model itself is not fetched again.
            models = outline(given["model"]).model.config._name_or_path
            place["FACTPATCH_CACHE"] = folder
            command[-1] = json.dumps(given | {"model": models})
        result = subprocess.run(command, stdout=subprocess.PIPE, env=place, check=True)  # noqa: S603 - this very file
    found: Row = json.loads(result.stdout.decode().splitlines()[-1])
    return found


def _measured(doing: str, method: str, edits: int, steps: int, model: str, device: str) -> Row:
    """The peak of one piece of work, in this process; and what the plan says of it."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    settings = {"steps": steps, "stop_loss": 0.0} if steps else {}
    if doing == "prepare":
        settings |= {"moment_tokens": 8192}  # a batch is as large as with more
    maker = create(method, settings)
    facts = made_up(edits)
    planned = plan(maker, outline(model, device=device), facts, scores=doing == "score")
    imported = _held(device)
    lm = load(model, device=device)
    size = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    if doing != "prepare":
        with _watching(device) as taken:
            _ = lm.fingerprint
        fingerprint = taken.peak - taken.start
        maker.prepare(lm)
    else:
        fingerprint, _ = 0, lm.fingerprint
    patch = maker.fit(lm, facts) if doing == "score" else None
    with _watching(device) as taken:
        if patch is not None:
            Scorer(lm, keep=False).score(facts, patch, progress=taken.note)
        elif doing == "prepare":
            maker.prepare(lm, taken.note)
        else:
            # Twice, because in a session matrices are at hand from the edits before.
            for _ in range(2):
                maker.fit(lm, facts, taken.note)
    grown = max(taken.peak - taken.start, fingerprint)
    return {
        "overhead_mb": round(imported / 1e6),
        "model_mb": round(size / 1e6),
        "grown_mb": round(grown / 1e6),
        "peak_mb": round((size + grown) / 1e6),
        "ratio": round((size + grown) / size, 3),
        "at": "Taking the fingerprint" if grown == fingerprint else taken.doing_at_peak,
        "planned_mb": round(planned.peak_bytes / 1e6),
        "threads": torch.get_num_threads(),
    }


def _held(device: str) -> int:
    """Memory that is this process's own: files that are mapped, such as weights on disk, do not count."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


class _Taken:
    """What was held at first and at the most, and what was being done then."""

    def __init__(self, start: int) -> None:
        self.start = self.peak = start
        self.doing, self.doing_at_peak = "", ""

    def note(self, doing: str, _: int, __: int | None) -> None:
        """As a `Progress`."""
        self.doing = doing

    def look(self, held: int) -> None:
        """Once more."""
        if held > self.peak:
            self.peak, self.doing_at_peak = held, self.doing


@contextmanager
def _watching(device: str) -> Iterator[_Taken]:
    """Looked at every few milliseconds; on a GPU the most that PyTorch has allocated."""
    taken, done = _Taken(_held(device)), threading.Event()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)

    def watch() -> None:
        while not done.wait(0.003):
            taken.look(_held(device))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield taken
    finally:
        done.set()
        watcher.join()
        if on_gpu:
            taken.peak = max(taken.peak, torch.cuda.max_memory_allocated(device))


def _line(row: Row) -> str:
    cells = (
        row["method"],
        row["edits"],
        row["model_mb"],
        row["peak_mb"],
        f"{row['ratio']:.2f}",
        row["planned_mb"],
        row["at"],
    )
    return f"| {' | '.join(map(str, cells))} |"


def _write(out: Path, rows: Sequence[Row]) -> None:
    steps, threads = sorted({row["steps"] for row in rows}), sorted({row["threads"] for row in rows})
    names = list(dict.fromkeys(row["method"] for row in rows))
    rows = sorted(rows, key=lambda row: (names.index(row["method"]), row["edits"]))
    how = [f"{n} steps" if n else "as many steps as they take" for n in steps]
    lines = [
        "# What an edit takes at its peak",
        "",
        f"Model {rows[0]['model']} on {rows[0]['device']}, presets but for the steps of searches and training, which are "
        f"{' or '.join(how)}: how much is held does not depend on them. Made-up facts; each row in a process of its own, on "
        f"{' or '.join(map(str, threads))} thread(s). factpatch {version('factpatch')}, torch "
        f"{version('torch')}. {date.today()}.",
        "",
        *(f"    {command}" for command in dict.fromkeys(row["command"] for row in rows)),
        "",
        "The peak is the model's weights plus how far the process's own memory grew beyond what it held with the model loaded,",
        "looked at every three milliseconds; the ratio is that over the weights. Weights on a CPU are mapped from their file and",
        "are counted whole. What Python, torch and transformers hold before there is a model, "
        f"{min(row['overhead_mb'] for row in rows)} to {max(row['overhead_mb'] for row in rows)} MB here,",
        "is in neither: with a model this small it would hide the ratio. `planned` is what `factpatch edit --plan` says; it",
        "knows neither of matrices that lie at hand from earlier edits of the session nor of memory that the allocator keeps.",
        "",
    ]
    titles = {
        "edit": "Making the edits, twice in one session; statistics are in the cache",
        "score": "Scoring them afterwards",
        "prepare": "Measuring the model beforehand, once: 8,192 tokens of its own text, cache empty",
    }
    for doing, title in titles.items():
        own = [_line(row) for row in rows if row["doing"] == doing]
        head = [
            "| method | edits | model MB | peak MB | ratio | planned MB | at |",
            "| --- |" + " ---: |" * 5 + " --- |",
        ]
        lines += [f"## {title}", "", *head, *own, ""] if own else []
    with whole_file(out) as draft:
        draft.write_text("\n".join([*lines, *_large()]) + "\n", encoding="utf-8")


def _large() -> list[str]:
    """What the plan says of a model that does not fit here."""
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**sizes, num_attention_heads=32), dtype=torch.bfloat16)
    tokenizer = outline("smollm2-135m").tokenizer
    lines = [
        "## Llama-2-7B's shape in bfloat16, by the plan alone",
        "",
        "Nothing here was measured. GB of 10⁹ bytes, scoring and, where nothing is cached, preparation included; the texts are",
        "counted with the default model's tokenizer.",
        "",
        "| method | edits | CPU: peak GB | ratio | at | GPU: peak GB | ratio | and main memory GB |",
        "| --- |" + " ---: |" * 3 + " --- |" + " ---: |" * 3,
    ]
    for name, count in LARGE:
        plans = [
            plan(create(name), Outline(model, tokenizer, place=torch.device(place), name="7b"), made_up(count))
            for place in ("cpu", "cuda")
        ]
        cpu, gpu = plans
        at = max(cpu.stages, key=lambda stage: sum(held.bytes for held in stage.held)).doing
        assert gpu.host_bytes is not None
        cells = (name, count, f"{cpu.peak_bytes / 1e9:.1f}", f"{cpu.ratio:.2f}", at)
        cells += (f"{gpu.peak_bytes / 1e9:.1f}", f"{gpu.ratio:.2f}", f"{gpu.host_bytes / 1e9:.1f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    typer.run(main)
