"""`factpatch export`: a patched model for other tools, verified with them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import if_interrupted, is_written, line, out, print_json, probe_lines, progress, typed_in
from factpatch.cli.workspace_shown import opened
from factpatch.errors import BadConfig

if TYPE_CHECKING:
    from factpatch.export import Shortened, Verified
    from factpatch.lm import LM
    from factpatch.patches import Patch
    from factpatch.progress import Progress

EXAMPLES = """
[bold]Examples[/bold]

  factpatch export checkpoint --patch lyon --out lyon-model
  factpatch export adapter --patch lyon --patch porto --out lyon-adapter
  factpatch export adapter --patch facts --rank 4 --out facts-adapter
  factpatch export checkpoint --workspace facts --out facts-model
  factpatch export gguf --patch lyon --out lyon.gguf
  factpatch export gguf --model my-model --template my-model.gguf --patch lyon --everything --type f16 --out lyon.gguf
"""

app = typer.Typer(
    help="Write a patched model for transformers, PEFT or llama.cpp, and ask it there.", no_args_is_help=True
)

VerifyOption = Annotated[bool, typer.Option(help="Load what was written with the tool it is for, and compare answers.")]


@app.command(epilog=EXAMPLES)
def checkpoint(
    output: Annotated[Path, typer.Option("--out", help="New folder.")],
    patch: opt.Patches = None,
    workspace: opt.Stack = None,
    model: opt.OptionalModel = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes of one file.")] = "5GB",
    verify: VerifyOption = True,
    dtype: opt.DType = None,
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Merge patches into a Hugging Face checkpoint with tokenizer, generation config and model card.

    Exits with 1 if transformers, having loaded it, answers an edit's probes otherwise than the patched model does.
    """
    from factpatch.export import export_checkpoint, how_to_load, verify_checkpoint
    from factpatch.files import check_output

    check_output(output)
    with if_interrupted(lambda: is_written(output)), progress() as report:
        lm, patches, _ = _loaded(model, patch, workspace, dtype, device, report)
        export_checkpoint(lm, patches, output, shard_size=shard_size)
        checked = verify_checkpoint(lm, patches, output, report) if verify else None
    _tell(output, checked, how_to_load("checkpoint", where=output), as_json=as_json)


@app.command(epilog=EXAMPLES)
def adapter(
    output: Annotated[Path, typer.Option("--out", help="New folder.")],
    patch: opt.Patches = None,
    workspace: opt.Stack = None,
    model: opt.OptionalModel = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Most that a matrix may have; default: what it takes.")
    ] = None,
    verify: VerifyOption = True,
    dtype: opt.DType = None,
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Write patches as one PEFT adapter: exactly, or cut to --rank with the error of each matrix told.

    Exits with 1 if PEFT, having loaded it, answers an edit's probes otherwise than the patched model does.
    """
    from factpatch.export import export_adapter, folder_of, how_to_load, hub_id, verify_adapter
    from factpatch.files import check_output

    check_output(output)
    with if_interrupted(lambda: is_written(output)), progress() as report:
        lm, patches, _ = _loaded(model, patch, workspace, dtype, device, report)
        _, told = export_adapter(lm, patches, output, rank)
        checked = verify_adapter(lm, patches, output, report) if verify else None
    _tell(output, checked, how_to_load("adapter", folder_of(lm) or hub_id(lm), output), told, as_json=as_json)


@app.command(epilog=EXAMPLES)
def gguf(
    output: Annotated[Path, typer.Option("--out", help="New .gguf file.")],
    patch: opt.Patches = None,
    workspace: opt.Stack = None,
    model: opt.OptionalModel = None,
    template: Annotated[
        Path | None,
        typer.Option(
            help="GGUF file of the unpatched model. A short name's is fetched again by itself; any other model of the Llama "
            "family does without."
        ),
    ] = None,
    number_type: Annotated[
        Literal["f32", "f16", "bf16"], typer.Option("--type", help="Of the tensors that are written anew.")
    ] = "f32",
    everything: Annotated[
        bool, typer.Option("--everything", help="Write all matrices anew; default: those that the patches change.")
    ] = False,
    verify: VerifyOption = True,
    dtype: opt.DType = None,
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Write the patched model as a GGUF file: the base's own, with the changed tensors in place of the old ones.

    Tensors that are kept are as they were, quantised ones too; llama.cpp rounds activations where it multiplies by those, so
    that a few answers may differ from transformers' without the patch being at fault (--everything tells). Exits with 1 if an
    edit's probe is answered otherwise than by the patched model here.
    """
    from factpatch.export import card_path, export_gguf, how_to_load, verify_gguf
    from factpatch.files import refuse_taken

    if output.suffix != ".gguf":
        raise BadConfig(f"--out {output}: the name of a GGUF file ends in .gguf.\n  Name it so.")
    for taken in (output, card_path(output)):
        refuse_taken(taken)
    with if_interrupted(lambda: is_written(output)), progress() as report:
        lm, patches, source = _loaded(model, patch, workspace, dtype, device, report)
        base = template or _own_gguf(source, report)
        export_gguf(lm, patches, output, base, number=number_type, everything=everything, progress=report)
        checked = verify_gguf(lm, patches, output, report) if verify else None
    _tell(output, checked, how_to_load("gguf", where=shlex.quote(str(output))), as_json=as_json)


def _loaded(
    model: str | None,
    folders: list[Path] | None,
    workspace: Path | None,
    dtype: opt.DTypeName | None,
    device: str | None,
    report: Progress,
) -> tuple[LM, list[Patch], str]:
    """The model, the patches, and where the model comes from.

    They are given by themselves or as a workspace. Raises BadConfig if it is both or neither.
    """
    from factpatch.lm import load
    from factpatch.patches import Patch

    if (workspace is None) == (not folders):
        raise BadConfig("what is to be exported?\n  Give --patch, once or more, or --workspace; not both.")
    if workspace is not None:
        space = opened(workspace, device, model=model, dtype=dtype)
        stack = space.mergeable(space.log())
        if not stack:
            raise BadConfig(
                f"{workspace}: no patch lies on its model, so there is nothing to export.\n"
                f"  Accept one: {typed_in(workspace, 'accept')}"
            )
        return space.model(report), stack, space.settings.model
    patches, source = [Patch.load(folder) for folder in folders or ()], model or opt.DEFAULT_MODEL
    return load(source, dtype=dtype, device=device, progress=report), patches, source


def _own_gguf(model: str, report: Progress) -> Path | None:
    """The GGUF file that a model comes from, if it comes from one."""
    from factpatch.lm.catalog import CATALOG
    from factpatch.lm.fetch import original_gguf

    if model in CATALOG:
        return original_gguf(CATALOG[model], report)
    return Path(model) if model.endswith(".gguf") else None


def _tell(
    output: Path,
    checked: Verified | None,
    loading: Sequence[str],
    told: tuple[Shortened, ...] = (),
    *,
    as_json: bool,
) -> None:
    """What was written, and how to load it where it now lies. Exits with 1 if the tool answers otherwise."""
    if as_json:
        ranks = [{"parameter": t.parameter, "rank": t.rank, "kept": t.kept, "error": t.error} for t in told]
        found = checked and checked.model_dump(mode="json") | {"holds": checked.holds}
        print_json({"written": str(output), "verified": found} | ({"ranks": ranks} if told else {}))
    else:
        for each in told:
            cut = (
                f" of {each.rank}, {each.error:.2%} of the change is left out" if each.kept < each.rank else ", exactly"
            )
            line(f"  {each.parameter}: rank {each.kept}{cut}")
        line("Written: ", (str(output), "bold"))
        if checked is not None:
            _show(checked)
        line("Load it:")
        for text in loading:
            line(f"  {text}")
    if checked is not None and not checked.holds:
        raise typer.Exit(1)


def _show(checked: Verified) -> None:
    same = f"{len(checked.answers) - len(checked.differing)} of {len(checked.answers)}"
    style = "green" if checked.holds else "red"
    line((f"{checked.tool} {checked.version} answers {same} probes as the patched model does", style))
    if not checked.answers:
        line("The patches tell of no edits, so nothing could be asked.")
    if checked.differing:
        rows = [(answer.prompt, answer.patched, answer.exported) for answer in checked.differing[:10]]
        out.print(probe_lines(("asked", "patched model", checked.tool), rows))
