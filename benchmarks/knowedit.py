"""KnowEdit whole: every method on all six data sets, each edit made and scored alone, under both protocols.

    python benchmarks/knowedit.py ../shared/knowedit --run knowedit-run --out docs/results/knowedit

This writes a grid into the run's folder, gives it to `factpatch bench`, and makes the report of what came of it: a page, its
tables as Markdown, and a plot. A run that was stopped goes on when the same command is given again. What is
scored are the first records of each file; of Sanitation, where all questions about one secret go into one patch, four for
each edit of the others. Methods that learn, or show examples, take later records.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml
from lessons import lessons_of

from factpatch.data import write_jsonl
from factpatch.methods import find, names
from factpatch.methods.context import Ike
from factpatch.methods.learning import Learned

FACTS = {
    "wiki_recent": "wiki_recent/recent_train.json",
    "zsre": "ZsRE/ZsRE-test-all.json",
    "wiki_counterfact": "wiki_counterfact/train_cf.json",
}
OTHERS = {
    "wikibio": "WikiBio/wikibio-train-all.json",
    "convsent": "Convsent/blender_val.json",
    "sanitation": "Sanitation/trivia_qa_train.json",
}
STEPS, FEWER = 150, {"serac": 50}
"""Of training; fewer where a step costs more, so that each takes about a quarter of an hour on one core."""
QUESTIONS = 4  # about a secret
LESSONS = dict.fromkeys(FACTS | OTHERS, range(100, 150)) | {"sanitation": range(32, 80)}


def main(
    folder: Annotated[Path, typer.Argument(help="KnowEdit's files, in folders named by data set")],
    run: Annotated[Path, typer.Option(help="folder of results")],
    out: Annotated[Path, typer.Option(help="the reports to write, without an ending")],
    facts: Annotated[int, typer.Option(min=1, max=100, help="edits of each data set of facts")] = 3,
    others: Annotated[int, typer.Option(min=1, max=8, help="of each other one; they take longer")] = 1,
    methods: Annotated[str, typer.Option(help="some of them, separated by commas; default: all")] = "",
    model: str = "smollm2-135m",
    workers: int = 2,
) -> None:
    """Make what is missing, and the report."""
    run.mkdir(parents=True, exist_ok=True)
    learned = run / "lessons.jsonl"
    scored = dict.fromkeys(FACTS, facts) | dict.fromkeys(OTHERS, others)
    scored["sanitation"] = others * QUESTIONS
    data = {name: f"{name}:{folder / file}" for name, file in (FACTS | OTHERS).items()}
    write_jsonl(lessons_of({data[name]: records for name, records in LESSONS.items()}), draft := run / "new.jsonl")
    if learned.exists() and learned.read_bytes() != draft.read_bytes():
        raise typer.BadParameter(f"{run} was begun with other lessons; name another folder", param_hint="--run")
    draft.replace(learned)
    grid = {
        "model": model,
        "methods": [_method(name, f"own:{learned}") for name in (methods.split(",") if methods else names())],
        "data": [{"file": data[name], "limit": limit} for name, limit in scored.items()],
    }
    (run / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    began = time.monotonic()
    # A method that fails on a data set, and so ends the command with 1, is in the report, with its reason.
    _factpatch("bench", "--grid", run / "grid.yaml", "--out", run, "--engine", "ray", "--workers", workers)
    typer.echo(f"This took {(time.monotonic() - began) / 60:.0f} minutes.")
    for ending in ("html", "md", "svg"):
        _factpatch("report", run, "--out", out.with_suffix(f".{ending}"))
    page = out.with_suffix(".md")
    title, text = page.read_text(encoding="utf-8").split("\n", 1)
    command = f"    python benchmarks/knowedit.py {shlex.join(sys.argv[1:])}"
    page.write_text(f"{title}\n\n{command}\n{text}", encoding="utf-8")


def _method(name: str, lessons: str) -> dict[str, object]:
    kind = find(name)
    if issubclass(kind, Learned):
        return {"name": name, "settings": {"data": lessons, "steps": FEWER.get(name, STEPS)}}
    return {"name": name, "settings": {"corpus": lessons}} if issubclass(kind, Ike) else {"name": name}


def _factpatch(*words: object) -> None:
    code = subprocess.run([sys.executable, "-m", "factpatch", *map(str, words)], check=False).returncode  # noqa: S603
    if code > 1:
        raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
