"""`factpatch patch`: look at patches on disk, and merge them into a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import change_line, if_interrupted, is_written, line, number, print_json, progress, typed

app = typer.Typer(help="Look at patches, and merge them into a plain checkpoint.", no_args_is_help=True)


@app.command(name="show", epilog="[bold]Example[/bold]\n\n  factpatch patch show lyon")
def show(
    folder: Annotated[Path, typer.Argument(help="Patch folder.")],
    as_json: opt.Json = False,
) -> None:
    """What a patch changes, how it was made, and how it scored."""
    from factpatch.patches import Patch

    described = Patch.load(folder).describe()
    if as_json:
        print_json(described)
        return
    line((str(folder), "bold"), f"  {described['kind']} patch {described['id']}, {described['bytes'] / 1024:.0f} KiB")
    line(f"made by {described['method']} for {described['base_name']} ({described['base_fingerprint'][:16]}…)")
    if described["fitted_on"]:
        line(f"on top of {', '.join(described['fitted_on'])}")
    for change in described["changes"]:
        line(change_line(change))
    for edit in described["edits"]:
        line(f"  {edit['kind']}: {edit['prompt']} → ", (edit["target"], "bold"))
    for summary in (described["scorecard"] or {}).get("summaries", []):
        names = ("edit_success", "rephrase", "portability", "locality", "fluency")
        line((f"{summary['protocol']}: " + ", ".join(f"{n} {number(summary[n])}" for n in names), "dim"))


@app.command(name="merge", epilog="[bold]Example[/bold]\n\n  factpatch patch merge lyon acme --out patched-model")
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Patch folders, in the order they are laid on.")],
    output: Annotated[Path, typer.Option("--out", help="New folder for the checkpoint.")],
    model: opt.Model = opt.DEFAULT_MODEL,
    dtype: opt.DType = None,
    as_json: opt.Json = False,
) -> None:
    """Write the model with its patches as a plain Hugging Face checkpoint, which needs no factpatch."""
    from factpatch.files import check_output
    from factpatch.lm import load
    from factpatch.patches import Patch
    from factpatch.patches import merge as merge_into
    from factpatch.patches.merge import check_mergeable

    check_output(output)
    patches = [Patch.load(folder) for folder in folders]
    check_mergeable(patches)
    with if_interrupted(lambda: is_written(output)), progress() as report:
        lm = load(model, dtype=dtype, progress=report)
        report("Writing the checkpoint", 0, 1)
        merge_into(lm, patches, output)
    if as_json:
        print_json(
            {"out": str(output), "model": lm.name, "fingerprint": lm.fingerprint, "patches": [p.id for p in patches]}
        )
        return
    again = typed("ask", "--model", output, "a question")
    line("Wrote ", (str(output), "bold"), f". Load it as any model:  {again}")
