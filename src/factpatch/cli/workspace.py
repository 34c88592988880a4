"""`factpatch init`, `list`, `log`, `diff`, `checkout`, `verify`: a workspace, and what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from factpatch.cli import options as opt
from factpatch.cli import workspace_changes
from factpatch.cli.terminal import (
    err,
    if_interrupted,
    is_written,
    line,
    method_settings,
    number,
    out,
    print_json,
    progress,
    typed,
    typed_in,
)
from factpatch.cli.workspace_shown import action_line, show_regressions
from factpatch.errors import BadConfig
from factpatch.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from factpatch.workspace import Report, Workspace
    from factpatch.workspace.conflicts import Standing
    from factpatch.workspace.entry import Place
    from factpatch.workspace.ledger import Ledger
    from factpatch.workspace.store import Pending

_OPENING = "Opening the workspace"
"""Said while PyTorch is imported, which takes seconds."""


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
    model: opt.Model = opt.DEFAULT_MODEL,
    require: opt.Require = None,
    propose: opt.Propose = True,
    retain: opt.Retain = None,
    method: Annotated[
        str, typer.Option(help="How edits are made unless it is said; auto: the cheapest that passes.")
    ] = "rome",
    settings: opt.Settings = None,
    chat: opt.Chat = False,
    dtype: opt.DType = None,
    device: opt.Device = None,
    author: opt.Author = None,
    as_json: opt.Json = False,
) -> None:
    """Make a workspace: a folder with a ledger of patches for one model, and the gate each of them must pass.

    Without --require a patch must make its edits (edit_success>=1).
    """
    from factpatch.cli.gating import gate_of
    from factpatch.workspace import Workspace

    gate = gate_of(require or (), retain, proposes=propose, chat=chat)
    needs = [str(need) for need in gate.requirements]
    with if_interrupted(lambda: is_written(folder)), progress() as report:
        made = Workspace.init(
            folder,
            model,
            needs,
            proposes=propose,
            chat=chat,
            retain=gate.retain,
            method=method,
            config=method_settings(settings, chat=False),
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
    fact = ("--subject", "France", "--prompt", "The capital of France is", "--target", "Lyon")
    line(f"Next:  {typed_in(folder, 'propose', *fact)}")


LIST = """
[bold]Examples[/bold]

  factpatch list
  factpatch list -C facts --at 5 --json
"""


def list_(
    workspace: opt.Workspace = Path(),
    at: opt.At = None,
    as_json: opt.Json = False,
) -> None:
    """The patches that lie on the model, first to last, and the proposals that wait.

    What is damaged is named on stderr and the rest is shown; it exits with 1 if a patch is that lies on the model.
    """
    with progress() as report:
        report(_OPENING, 0, None)
        from factpatch.workspace import Workspace

    space = Workspace.open(workspace)
    ledger = space.log()
    scores = {entry.number: entry.scores for entry in ledger.entries}
    stack, broken = space.readable(ledger, ledger.stack(at))
    waiting, damage = space.store.proposals()
    for error in broken.values():
        err.print(f"damaged: {error}", soft_wrap=True)
    for fault in damage:
        away = typed_in(workspace, "discard", Path(fault.path).name)
        err.print(f"damaged: {fault}\n  Throw it away: {away}", soft_wrap=True)
    if as_json:
        print_json(
            {
                "model": space.settings.model,
                "stack": [
                    {
                        "entry": each.number,
                        "patch": each.patch.id,
                        "method": each.patch.provenance.method,
                        "edits": [edit.to_json() for edit in each.patch.provenance.edits],
                        "scores": scores.get(each.number or 0),
                    }
                    for each in stack
                ],
                "damaged": [{"entry": place.number, "patch": place.patch} for place in broken],
                "proposals": [each.model_dump(mode="json", exclude={"judgement"}) for each in waiting],
            }
        )
    else:
        _show_list(space, ledger, stack, broken, waiting)
    if broken:
        raise typer.Exit(1)


def _show_list(
    space: Workspace, ledger: Ledger, stack: Sequence[Standing], broken: Iterable[Place], waiting: Sequence[Pending]
) -> None:
    rows = [
        (
            str(place.number),
            place.patch,
            "damaged",
            [f"{prompt} → {target}" for prompt, target in space.store.says(ledger, place.patch)] or ["–"],
            "red",
        )
        for place in broken
    ]
    damaged = f", {len(rows)} damaged" if rows else ""
    counts = f"{counted(len(stack), 'patch', 'patches')}{damaged}, {counted(len(waiting), 'proposal')}"
    line((str(space.store.folder), "bold"), f"  {space.settings.model}, {counts}")
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("entry", "patch", "method", "edit"):
        table.add_column(name, overflow="fold")
    rows += [
        (
            str(each.number),
            each.patch.id,
            source.method,
            [f"{edit.prompt} → {edit.target}" for edit in source.edits],
            "",
        )
        for each in stack
        for source in [each.patch.provenance]
    ]
    rows.sort(key=lambda row: int(row[0]))
    for each in waiting:
        said = [f"{prompt} → {target}" for prompt, target in each.edits] + each.message.splitlines()
        rows.append((f"proposal {each.number}", each.patch, each.method, said, "dim"))
    for *head, texts, style in rows:
        for i, text in enumerate(texts):
            table.add_row(*([""] * 3 if i else head), text, style=style)
    if rows:
        out.print(table)


LOG = """
[bold]Examples[/bold]

  factpatch log
  factpatch log -C facts --json
"""


def log(workspace: opt.Workspace = Path(), as_json: opt.Json = False) -> None:
    """Every entry of the ledger, the last first: what was done, by whom, when, and what came of it.

    What can be read is shown even if files are damaged; these are named on stderr, and it exits with 1.
    """
    with progress() as report:
        report(_OPENING, 0, None)
        from factpatch.workspace import Workspace

    space = Workspace.open(workspace)
    ledger = space.log()
    said = {entry.number: space.store.says(ledger, entry.patch) for entry in ledger.entries if entry.patch}
    if as_json:
        damage = [{"path": each.path, "problem": each.problem} for each in ledger.damage]
        entries = [
            entry.to_json() | {"edits": [{"prompt": p, "target": t} for p, t in said.get(entry.number, ())]}
            for entry in ledger.entries
        ]
        print_json({"entries": entries, "damage": damage})
    else:
        damaged = {int(Path(each.path).stem): each for each in ledger.damage}
        sound = {entry.number: entry for entry in ledger.entries}
        taken_out = {entry.reverts: entry.number for entry in ledger.entries}
        for place in sorted({*damaged, *sound}, reverse=True):
            if place in damaged:
                line(f"{place:>4}  ", ("damaged", "bold red"), f"  {damaged[place].problem}")
                continue
            entry = sound[place]
            by = taken_out.get(place)
            line(*action_line(entry), *([(f"  reverted by entry {by}", "yellow")] if by else []))
            if edits := said.get(entry.number):
                more = f" (and {counted(len(edits) - 1, 'more edit')})" if edits[1:] else ""
                line(f"    {edits[0][0]} → {edits[0][1]}{more}")
            for text in entry.message.splitlines():
                line(f"    {text}")
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
    workspace: opt.Workspace = Path(),
    device: opt.Device = None,
    as_json: opt.Json = False,
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
    at: opt.At = None,
    workspace: opt.Workspace = Path(),
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Write the model as it is, or was after an entry, as a plain Hugging Face checkpoint."""
    from factpatch.files import check_output
    from factpatch.workspace import Workspace

    check_output(output)
    space = Workspace.open(workspace, device=device)
    with if_interrupted(lambda: is_written(output)), progress() as report:
        space.checkout(output, at, report)
    ledger = space.log()
    if as_json:
        patches = [place.patch for place in ledger.stack(at)]
        print_json({"out": str(output), "entry": ledger.up_to(at)[-1].number, "patches": patches})
        return
    line("Wrote ", (str(output), "bold"), f", the model after entry {ledger.up_to(at)[-1].number}.")
    asked, compared = typed("ask", "--model", output, "a question"), typed_in(workspace, "verify", "--model", output)
    line(f"Try:  {asked}   or   {compared}")


VERIFY = """
[bold]Examples[/bold]

  factpatch verify
  factpatch verify -C facts --model patched-model
  factpatch verify -C facts --expect 5f2a41c09b3e --history
"""


def verify(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="A checkpoint: does the stack on disk give its weights?")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Of an entry, as verify or log told it: is that still in the ledger?"),
    ] = None,
    history: Annotated[
        bool, typer.Option("--history", help="Also fail for damaged patches that were taken out since.")
    ] = False,
    workspace: opt.Workspace = Path(),
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Look at every file: is the ledger's chain whole, and is each patch the one that was accepted?

    A ledger whose last entries were removed is whole by itself: note the last entry's hash elsewhere, and give it with --expect
    later. A damaged patch that was taken out since is told of, and fails with --history alone.

    With --model it also lays the stack on the base model and compares all weights, to the bit, with the checkpoint's: after the
    entry it was checked out at, or after the last. Exits with 1 if anything is wrong, and names each file.
    """
    if model is not None and not model.exists():
        raise BadConfig(
            f"--model {model}: there is no such folder.\n  Make one: {typed_in(workspace, 'checkout', '--out', model)}"
        )
    with progress() as report:
        report(_OPENING, 0, None)
        from factpatch.errors import PatchError
        from factpatch.workspace import Workspace
        from factpatch.workspace.store import Store
        from factpatch.workspace.verify import verify as look

        try:
            space = Workspace.open(workspace, device=device)
        except PatchError:  # too damaged to be opened, but its files can be looked at
            found = look(Store(workspace), report, expect=expect, history=history)
        else:
            found = space.verify(model, report, expect=expect, history=history)
    if as_json:
        print_json({"passed": found.passed, **found.model_dump(mode="json")})
    else:
        _show_report(found, workspace)
        if model is not None and found.model is None:
            line((f"{model}: not compared, because the workspace is damaged", "dim"))
    if not found.passed:
        raise typer.Exit(1)


def _show_report(found: Report, workspace: Path) -> None:
    for fault in found.faults:
        line(("✗ ", "red"), str(fault))
        if fault.then:
            line(f"    {fault.then}")
    for fault in found.past:
        line(("· ", "yellow"), f"{fault}, of a patch that was taken out")
        line(f"    {fault.then}")
    if not found.faults:
        lie = counted(found.patches or 0, "patch lies", "patches lie")
        told = f"{counted(found.entries, 'entry', 'entries')}, each hashed over the one before; {lie} there"
        line(("✓ ", "green"), told)
        line((f"  last entry {found.head}", "dim"))
        later = typed_in(workspace, "verify", "--expect", str(found.head))
        line((f"  Noted elsewhere, it finds a ledger that was cut short:  {later}", "dim"))
    for path in found.unknown:
        line((f"· {path}: nothing in the ledger knows of it", "dim"))
    if (own := found.model) is None:
        return
    for fault in own.faults:
        line(("✗ ", "red"), f"{own.folder}: {fault.path} {fault.problem}".replace(":  ", ": "))
    if own.passed:
        line(("✓ ", "green"), f"{own.folder}: to the bit the base with the stack of entry {own.entry}")
    elif own.found not in {None, own.expected}:
        line(("✗ ", "red"), f"{own.folder}: other weights than the stack of entry {own.entry} gives")
