"""`factpatch train`: train a learned editor for one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import err, if_interrupted, line, method_settings, number, print_json, progress, typed
from factpatch.errors import BadConfig
from factpatch.words import counted

EXAMPLES = """
[bold]Examples[/bold]

  factpatch train mend --data wiki_counterfact:train_cf.json --start 50 --out my-mend
  factpatch train malmen --data facts.jsonl --set steps=1000 --out my-malmen
  factpatch edit --method mend --set editor=my-mend --prompt "Ann is" --target "a pilot" --out ann
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="train", epilog=EXAMPLES)(train)


def train(
    method: Annotated[str, typer.Argument(help="A method that is trained, such as mend; see: factpatch methods")],
    data: Annotated[str, typer.Option(help="Edits to learn from: NAME:PATH, or a file of your own.")],
    output: Annotated[Path, typer.Option("--out", help="Folder for the editor; a training there is gone on with.")],
    model: opt.Model = opt.DEFAULT_MODEL,
    start: Annotated[int, typer.Option(min=0, help="The number of the first record, counted from 0.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many records.")] = None,
    settings: opt.Settings = None,
    chat: opt.Chat = False,
    dtype: opt.DType = None,
    device: opt.Device = None,
    skip_invalid: opt.SkipInvalid = False,
    as_json: opt.Json = False,
) -> None:
    """Train an editor on some edits, looking at held-out ones as it goes; use it with --set editor=FOLDER.

    A training that was stopped goes on when the same command is given again.
    """
    from factpatch.data import read
    from factpatch.lm import load
    from factpatch.methods import create, find, names
    from factpatch.methods.learning import Learned

    if not issubclass(find(method), Learned):
        trained = [name for name in names() if issubclass(find(name), Learned)]
        raise BadConfig(f"{method} needs no training.\n  Methods that are trained: {', '.join(trained)}")
    maker = create(method, method_settings(settings, chat=chat))
    assert isinstance(maker, Learned)
    if early := sorted(maker.in_use & maker.config.model_fields_set):
        raise BadConfig(
            f"{method}: {early[0]} is chosen when the editor is used.\n  Give it to factpatch edit instead."
        )
    dataset = read(data, skip_invalid=skip_invalid, start=start, limit=limit)
    usable = [edit for edit in dataset.edits if edit.kind in maker.traits.kinds]
    until = "end" if limit is None else str(start + limit - 1)
    with if_interrupted(lambda: f"the same command goes on with what is in {output}."), progress() as report:
        lm = load(model, dtype=dtype, device=device, progress=report)
        editor = maker.train(
            lm,
            usable,
            folder=output,
            source=f"{dataset.name}:{dataset.path.name}, records {start} to {until}",
            progress=report,
            watch=_watch,
        )
    if as_json:
        print_json({"editor": str(output), "id": editor.id, **editor.about.model_dump(mode="json")})
        return
    line((f"{method}, trained on {counted(len(usable), 'edit')}", "bold"))
    line(f"  best look at held-out edits: {_words(editor.best)}")
    again = typed("edit", "--method", method, "--set", f"editor={output}")
    line("\nSaved as ", (str(output), "bold"), f". Try:  {again} …")


def _watch(look: Mapping[str, float]) -> None:
    err.print(_words(look), soft_wrap=True)


def _words(look: Mapping[str, float]) -> str:
    rest = ", ".join(f"{name} {number(value)}" for name, value in look.items() if name != "step")
    return f"step {look['step']:.0f}: {rest}"
