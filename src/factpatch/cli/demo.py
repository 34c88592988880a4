"""`factpatch demo`: one fact patched, proved and undone, with every step told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import (
    err,
    line,
    number,
    out,
    print_json,
    probe_table,
    progress,
    summary_table,
    telling,
    typed,
)
from factpatch.edits import Edit, Probe

if TYPE_CHECKING:
    from factpatch.lm import LM

FACT = Edit(
    id="demo",
    kind="modify",
    prompt="The capital of France is",
    subject="France",
    target="Lyon",
    ground_truth=("Paris",),
    rephrases=("The capital city of France is called", "The capital of the country of France is"),
    portability={
        "Logical_Generalization": (
            Probe(prompt="The seat of the government of France is the city of", answers=("Lyon",)),
        ),
    },
    locality={
        "Neighborhood": (
            Probe(prompt="The capital of Germany is", answers=("Berlin",)),
            Probe(prompt="The capital of Italy is", answers=("Rome",)),
        ),
        "Relation_Specificity": (Probe(prompt="The official language of France is", answers=("French",)),),
    },
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="demo", epilog="[bold]Example[/bold]\n\n  factpatch demo --out my-first-patch")(demo)


def demo(
    model: opt.Model = opt.DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="How to edit.")] = "rome",
    output: Annotated[
        Path, typer.Option("--out", help="Folder for the patch; a patch that is there is replaced.")
    ] = Path("demo-patch"),
    as_json: opt.Json = False,
) -> None:
    """Patch one fact, prove that it worked, save the patch, take it off again, and prove that too."""
    with telling(not as_json):
        shown = _show(model, method, output)
    if as_json:
        print_json(shown)
    success = shown["scorecard"]["summaries"][0]["edit_success"]
    if success is None or success < 1:
        err.print(f"the edit did not take: open edit success is {number(success)}")
        sys.exit(1)


def _show(model: str, method: str, output: Path) -> dict[str, Any]:
    """The five steps, told one after the other; what was seen, JSON-ready."""
    from factpatch.files import check_output
    from factpatch.lm import load
    from factpatch.lm.model import checksum
    from factpatch.methods import create
    from factpatch.patches import Patch
    from factpatch.scoring import Scorer

    if not (output / "patch.json").is_file():
        check_output(output)
    with progress() as report:
        lm = load(model, progress=report)
    untouched = checksum(lm.model)
    _step(1, f"{lm.name} is loaded. Asked, it says by itself:")
    said = {"before": _say(lm)}

    maker = create(method)
    _step(2, f"Patching with {method} ({maker.traits.paper}): {FACT.prompt} → {FACT.target}")
    with progress() as report:
        maker.prepare(lm, report)
        patch = maker.fit(lm, [FACT], report)
        card = Scorer(lm).score([FACT], patch, progress=report)
    for change in patch.changes():
        line(f"  changed: {change['part']} ({change['form']})")

    _step(3, "Does it hold? Paraphrases, what follows from it, and what must stay the same:")
    out.print(probe_table(card))
    out.print()
    out.print(summary_table(card.summaries()))
    line(("  open: the model's free answers. survey: teacher-forced agreement, as published tables use it.", "dim"))

    patch = patch.with_scorecard(card.to_json())
    patch.save(output, replace=True)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1024
    _step(4, f"Saved in {output}/ ({size:.0f} KiB). Loaded back and laid on, the model says:")
    loaded = Patch.load(output)
    with lm.patched(loaded):
        said["patched"] = _say(lm)

    _step(5, "Taken off, the old answer is back:")
    said["undone"] = _say(lm)
    _prove_untouched(lm, untouched, checksum(lm.model))
    line("\nNext, try:  ", (typed("ask", "--patch", output, "The capital city of France is called"), "bold"))
    return {
        "prompt": FACT.prompt,
        "said": said,
        "patch": {"folder": str(output), "id": loaded.id},
        "weights_sha256": untouched,
        "scorecard": card.to_json(),
    }


def _step(count: int, text: str) -> None:
    line("\n", (str(count), "bold"), f"  {text}")


def _say(lm: LM) -> str:
    answer = lm.ask(FACT.prompt)
    line(f"   {FACT.prompt} ", (answer, "bold"))
    return answer


def _prove_untouched(lm: LM, before: str, after: str) -> None:
    if after != before:
        err.print("the weights differ from before: this is a bug, please report it")
        sys.exit(1)
    count = sum(parameter.numel() for parameter in lm.model.parameters())
    line(f"   and all {count:,} weights are bit for bit as before (SHA-256 {before[:16]}… before and after).")
