"""The whole loop: facts before the gate, a ledger, one taken back, all of it verified, exported, and asked in other tools.

    python examples/loop.py --out loop                     # 30 facts of the built-in sample, minutes to an hour on a CPU
    python examples/loop.py --out loop --limit 4           # the same, smaller
    python examples/loop.py --out loop --data wiki_counterfact:../shared/knowedit/wiki_counterfact/train_cf.json

Exits with 1 if anything did not hold that should.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import factpatch as fp
from factpatch.cli.terminal import progress
from factpatch.export import (
    Verified,
    export_adapter,
    export_checkpoint,
    export_gguf,
    verify_adapter,
    verify_checkpoint,
    verify_gguf,
)
from factpatch.lm.catalog import CATALOG
from factpatch.lm.fetch import original_gguf

REQUIREMENTS = ("edit_success>=1", "locality>=0.3", "mergeable")


def main(
    out: Annotated[Path, typer.Option(help="new folder for the workspace and what is exported")],
    data: Annotated[str, typer.Option(help="facts: NAME:PATH, or the built-in sample")] = "sample",
    limit: Annotated[int, typer.Option(help="how many facts")] = 30,
    model: str = "smollm2-135m",
    method: Annotated[str, typer.Option(help="auto tries methods from cheap to dear for each fact")] = "alphaedit",
) -> None:
    """Run it, and tell each step."""
    facts = [edit for edit in fp.read(data).edits if edit.subject and edit.kind in {"insert", "modify"}][:limit]
    held: dict[str, bool] = {}
    with progress() as report:
        space = fp.Workspace.init(out / "workspace", model, REQUIREMENTS, method=method, progress=report)

        # Each fact is made on top of those before it, judged there, and accepted if it passes.
        for edit in facts:
            proposed = space.propose([edit], progress=report)
            if not proposed.done or proposed.proposal is None:
                typer.echo(f"refused   {edit.prompt} → {edit.target}: {proposed.refused}")
                continue
            accepted = space.accept(proposed.proposal.number, message=f"{edit.prompt} {edit.target}", progress=report)
            lost = f", and {len(accepted.regressions)} earlier answers were lost" if accepted.regressions else ""
            typer.echo(f"accepted  {edit.prompt} → {edit.target}{lost}{accepted.refused}")

        # The first of them is taken back; what depends on it is made anew, or it stays.
        entries = [entry for entry in space.log().entries if entry.action == "accept"]
        typer.echo(f"{len(entries)} of {len(facts)} accepted")
        if entries:
            back = space.revert(entries[0].number, refit=True, progress=report)
            typer.echo(
                f"reverted  entry {entries[0].number}"
                if back.done
                else f"kept      entry {entries[0].number}: {back.refused}"
            )

        # The files are those the ledger tells of, and its patches give the checkpoint to the bit.
        checkout = space.checkout(out / "checkout", progress=report)
        checked = space.verify(checkout, progress=report)
        held["verified"] = checked.passed
        typer.echo(f"verified  {checked.entries} entries, checkpoint to the bit: {checked.passed}")

        # What is left is taken to three other tools, and asked there.
        lm, patches = space.model(report), space.stack()
        if patches:
            export_checkpoint(lm, patches, out / "checkpoint")
            export_adapter(lm, patches, out / "adapter")
            found = [
                verify_checkpoint(lm, patches, out / "checkpoint", report),
                verify_adapter(lm, patches, out / "adapter", report),
            ]
            if model in CATALOG:
                base = original_gguf(CATALOG[model], report)
                export_gguf(lm, patches, out / "model.gguf", base, everything=True, progress=report)
                found.append(verify_gguf(lm, patches, out / "model.gguf", report))
            held |= {each.tool: _tell(each) for each in found}
    if not all(held.values()):
        raise typer.Exit(1)


def _tell(found: Verified) -> bool:
    same = len(found.answers) - len(found.differing)
    typer.echo(f"{found.tool} {found.version}: {same} of {len(found.answers)} answers are the patched model's")
    for answer in found.differing:
        typer.echo(f'    "{answer.prompt}": "{answer.patched}", there "{answer.exported}"')
    # A near tie between two tokens may fall otherwise in other arithmetic; the edits' own targets may not.
    return same >= 0.9 * len(found.answers)


if __name__ == "__main__":
    typer.run(main)
