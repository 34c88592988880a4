"""`factpatch init`, `list`, `log`, `diff`, `checkout`, `verify`: a workspace, and what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from factpatch.cli import workspace_changes
from factpatch.cli.gating import ProposeOption, RequireOption
from factpatch.cli.terminal import (
    ChatOption,
    DeviceOption,
    DTypeOption,
    JsonOption,
    ModelOption,
    RetainOption,
    SetOption,
    err,
    line,
    number,
    out,
    print_json,
    progress,
)
from factpatch.cli.workspace_shown import WorkspaceOption, action_line, show_regressions

_AT = typer.Option("--at", min=1, metavar="N", help="As it was after entry N; default: the last.")


def register(app: typer.Typer) -> None:
    """Add the commands, those that change a workspace included."""
    app.command(name="init", epilog=INIT)(init)
    workspace_changes.register(app)
    app.command(name="list", epilog=LIST)(list_)
    app.command(name="log", epilog=LOG)(log)
    app.command(name="diff", epilog=DIFF)(diff)
    app.command(name="checkout", epilog=CHECKOUT)(checkout)
    app.command(name="verify", epilog=VERIFY)(verify)


INIT = """
[bold]Examples[/bold]

  factpatch init facts
  factpatch init facts --model my-model --require "edit_success>=1" --require "locality>=0.95" --method auto
  factpatch init facts --require mergeable --require "edit_success>=1" --retain must-not-change.txt
"""


def init(
    folder: Annotated[Path, typer.Argument(help="New folder, or an empty one.")],
    model: ModelOption = "smollm2-135m",
    require: RequireOption = None,
    propose: ProposeOption = True,
    retain: RetainOption = None,
    method: Annotated[
        str, typer.Option(help="How edits are made unless it is said; auto: the cheapest that passes.")
    ] = "rome",
    settings: SetOption = None,
    chat: ChatOption = False,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    author: Annotated[str | None, typer.Option(help="Who does it; default: the user.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a workspace: a folder with a ledger of patches for one model, and the gate each of them must pass.

    Without --require a patch must make its edits (edit_success>=1).
    """
    from factpatch.cli.gating import gate_of
    from factpatch.methods import parse_settings
    from factpatch.workspace import Workspace

    gate = gate_of(require or (), retain, proposes=propose, chat=chat)
    needs = [str(need) for need in gate.requirements]
    with progress() as report:
        made = Workspace.init(
            folder,
            model,
            needs,
            proposes=propose,
            chat=chat,
            retain=gate.retain,
            method=method,
            config=parse_settings(list(settings or [])),
            dtype=dtype,
            device=device,
            author=author,
            progress=report,
        )
    if as_json:
        print_json({"workspace": str(folder), **made.settings.model_dump(mode="json")})
        return
    line("Made ", (str(folder), "bold"), f" for {made.settings.model} ({made.settings.fingerprint[:16]}…)")
    line(f"Each patch must show: {', '.join(needs)}")
    line(f'Next:  factpatch propose -C {folder} --subject France --prompt "The capital of France is" --target Lyon')


LIST = """
[bold]Examples[/bold]

  factpatch list
  factpatch list -C facts --at 5 --json
"""


def list_(
    workspace: WorkspaceOption = Path(),
    at: Annotated[int | None, _AT] = None,
    as_json: JsonOption = False,
) -> None:
    """The patches that lie on the model, first to last, and the proposals that wait."""
    from factpatch.workspace import Workspace

    space = Workspace.open(workspace)
    ledger = space.log()
    entries = {entry.number: entry for entry in ledger.entries}
    stack = list(zip(ledger.stack(at), space.stack(at), strict=True))
    waiting = space.proposals()
    if as_json:
        print_json(
            {
                "model": space.settings.model,
                "stack": [
                    {
                        "entry": place.number,
                        "patch": place.patch,
                        "method": patch.provenance.method,
                        "edits": [edit.to_json() for edit in patch.provenance.edits],
                        "scores": entries[place.number].scores,
                    }
                    for place, patch in stack
                ],
                "proposals": [each.model_dump(mode="json", exclude={"judgement"}) for each in waiting],
            }
        )
        return
    line((str(workspace), "bold"), f"  {space.settings.model}, {len(stack)} patches, {len(waiting)} proposals")
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("entry", "patch", "method", "edit"):
        table.add_column(name, overflow="fold")
    for place, patch in stack:
        source = patch.provenance
        for i, edit in enumerate(source.edits):
            head = (str(place.number), place.patch, source.method) if i == 0 else ("", "", "")
            table.add_row(*head, f"{edit.prompt} → {edit.target}")
    for each in waiting:
        for i, (prompt, target) in enumerate(each.edits):
            head = (f"proposal {each.number}", each.patch, each.method) if i == 0 else ("", "", "")
            table.add_row(*head, f"{prompt} → {target}", style="dim")
    if stack or waiting:
        out.print(table)


LOG = """
[bold]Examples[/bold]

  factpatch log
  factpatch log -C facts --json
"""


def log(workspace: WorkspaceOption = Path(), as_json: JsonOption = False) -> None:
    """Every entry of the ledger, the last first: what was done, by whom, when, and what came of it.

    What can be read is shown even if files are damaged; these are named on stderr, and it exits with 1.
    """
    from factpatch.workspace import Workspace

    ledger = Workspace.open(workspace).log()
    if as_json:
        damage = [{"path": each.path, "problem": each.problem} for each in ledger.damage]
        print_json({"entries": [entry.to_json() for entry in ledger.entries], "damage": damage})
    else:
        for entry in reversed(ledger.entries):
            line(*action_line(entry))
            if entry.message:
                line(f"    {entry.message}")
            scores = ", ".join(f"{name} {number(value)}" for name, value in entry.scores.items())
            if scores:
                line((f"    {scores}", "dim"))
            for old, new in entry.replaced.items():
                line(f"    {new} was made in place of {old}")
            show_regressions(entry.regressions, indent="    ")
        for each in ledger.damage:
            err.print(f"damaged: {each}", soft_wrap=True)
    if ledger.damage:
        raise typer.Exit(1)


DIFF = """
[bold]Examples[/bold]

  factpatch diff 3
  factpatch diff 3 5 --no-ask
"""


def diff(
    a: Annotated[int, typer.Argument(metavar="A", min=1, help="Number of an entry.")],
    b: Annotated[int | None, typer.Argument(metavar="[B]", min=1, help="Of another; default: the last.")] = None,
    ask: Annotated[bool, typer.Option("--ask/--no-ask", help="Load the model, compare its weights and ask it.")] = True,
    workspace: WorkspaceOption = Path(),
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """What is different after entry B from after entry A: edits, parameters, and what the model says to the edits' prompts."""
    from factpatch.workspace import Workspace

    space = Workspace.open(workspace, device=device)
    with progress() as report:
        found = space.diff(a, b, ask=ask, progress=report)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    line((f"entry {found.a} → entry {found.b}", "bold"))
    for row in found.edits:
        mark, style = ("+", "green") if row.in_a is None else ("-", "red") if row.in_b is None else ("~", "yellow")
        line((f"{mark} ", style), f"{row.prompt} → {row.target}", (f"  (entry {row.number})", "dim"))
        if row.said_a is not None:
            line((f"    said {row.said_a!r}, then {row.said_b!r}", "dim"))
    if not found.edits:
        line("the same edits")
    for each in found.parameters or ():
        share = "" if each.relative is None else f", {100 * each.relative:.2g} % of its own norm"
        line(f"  {each.parameter}: {each.entries} entries differ, norm {number(each.norm)}{share}")


CHECKOUT = """
[bold]Examples[/bold]

  factpatch checkout --out patched-model
  factpatch checkout --at 5 --out as-it-was
"""


def checkout(
    output: Annotated[Path, typer.Option("--out", help="New folder for the checkpoint.")],
    at: Annotated[int | None, _AT] = None,
    workspace: WorkspaceOption = Path(),
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the model as it is, or was after an entry, as a plain Hugging Face checkpoint."""
    from factpatch.files import check_output
    from factpatch.workspace import Workspace

    check_output(output)
    space = Workspace.open(workspace, device=device)
    with progress() as report:
        space.checkout(output, at, report)
    ledger = space.log()
    if as_json:
        patches = [place.patch for place in ledger.stack(at)]
        print_json({"out": str(output), "entry": ledger.up_to(at)[-1].number, "patches": patches})
        return
    line("Wrote ", (str(output), "bold"), f", the model after entry {ledger.up_to(at)[-1].number}.")
    line(f'Try:  factpatch ask --model {output} "a question"   or   factpatch verify --model {output}')


VERIFY = """
[bold]Examples[/bold]

  factpatch verify
  factpatch verify -C facts --model patched-model
"""


def verify(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="A checkpoint: does the stack on disk give its weights?")
    ] = None,
    workspace: WorkspaceOption = Path(),
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at every file: is the ledger's chain whole, and is each patch the one that was accepted?

    With --model it also lays the stack on the base model and compares all weights, to the bit, with the checkpoint's: after the
    entry it was checked out at, or after the last. Exits with 1 if anything is wrong, and names each file.
    """
    from factpatch.workspace.store import Store
    from factpatch.workspace.verify import verify as look
    from factpatch.workspace.workspace import Workspace

    with progress() as report:
        # Files are looked at even where the workspace is too damaged to be opened.
        found = look(Store(workspace), progress=report)
        if model is not None and not found.faults:
            found = Workspace.open(workspace, device=device).verify(model, report)
    if as_json:
        print_json({"passed": found.passed, **found.model_dump(mode="json")})
    else:
        for fault in found.faults:
            line(("✗ ", "red"), f"{fault.path}: {fault.problem}")
        if not found.faults:
            line(
                ("✓ ", "green"),
                f"{found.entries} entries, each hashed over the one before; {found.patches} patches lie there",
            )
            line((f"  last entry {found.head}", "dim"))
        for path in found.unknown:
            line((f"· {path}: nothing in the ledger knows of it", "dim"))
        if found.model is not None:
            for fault in found.model.faults:
                line(("✗ ", "red"), f"{found.model.folder}: {fault.path} {fault.problem}")
            if found.model.passed:
                line(
                    ("✓ ", "green"),
                    f"{found.model.folder}: to the bit the base with the stack of entry {found.model.entry}",
                )
            elif found.model.expected != found.model.found:
                line(
                    ("✗ ", "red"),
                    f"{found.model.folder}: other weights than the stack of entry {found.model.entry} gives",
                )
        elif model is not None:
            line((f"{model}: not compared, because the workspace is damaged", "dim"))
    if not found.passed:
        raise typer.Exit(1)
