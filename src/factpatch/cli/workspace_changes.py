"""`factpatch propose`, `accept`, `revert`: the commands that change a workspace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factpatch.cli.edit import edits_of
from factpatch.cli.terminal import DeviceOption, JsonOption, SetOption, SkipOption, line, print_json, progress
from factpatch.cli.workspace_shown import WorkspaceOption, outcome_json, show_outcome
from factpatch.errors import BadConfig, BadRecord

if TYPE_CHECKING:
    from factpatch.workspace import Outcome

AuthorOption = Annotated[str | None, typer.Option(help="Who does it; default: the user.")]
MessageOption = Annotated[str, typer.Option("--message", help="Why; goes into the ledger.")]
AllowOption = Annotated[
    bool,
    typer.Option(
        "--allow-conflicts", help="Even if an edit is there already, or contradicts or takes back one that is."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(name="propose", epilog=PROPOSE)(propose)
    app.command(name="accept", epilog=ACCEPT)(accept)
    app.command(name="revert", epilog=REVERT)(revert)


PROPOSE = """
[bold]Examples[/bold]

  factpatch propose --subject France --prompt "The capital of France is" --target Lyon
  factpatch propose -C facts --edits facts.jsonl --method auto --message "ticket 12"
  factpatch propose --patch lyon
"""


def propose(
    prompt: Annotated[str | None, typer.Option(help="What the model is asked, without the answer.")] = None,
    target: Annotated[str | None, typer.Option(help="What it should say.")] = None,
    subject: Annotated[str | None, typer.Option(help="The part of the prompt the fact is about.")] = None,
    rephrase: Annotated[
        list[str] | None, typer.Option(help="Another wording to test it with; may be repeated.")
    ] = None,
    unrelated: Annotated[
        list[str] | None, typer.Option(help="A prompt whose answer must stay as it is; may be repeated.")
    ] = None,
    edits: Annotated[
        str | None, typer.Option(help="Many edits, one patch: a .jsonl or .csv file, or NAME:PATH.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many edits of the file.")] = None,
    patch: Annotated[Path | None, typer.Option(help="A patch that was made already, instead of edits.")] = None,
    method: Annotated[
        str | None, typer.Option(help="How to edit; default: the workspace's. auto: the cheapest that passes.")
    ] = None,
    settings: SetOption = None,
    allow_conflicts: AllowOption = False,
    author: AuthorOption = None,
    message: MessageOption = "",
    workspace: WorkspaceOption = Path(),
    device: DeviceOption = None,
    skip_invalid: SkipOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a patch on top of the stack and put it before the gate; what is let through waits to be accepted.

    Exits with 1 if it is refused: by the gate, with the probes that failed, or because of a conflict. Then nothing is kept.
    """
    from factpatch.methods import parse_settings
    from factpatch.patches import Patch
    from factpatch.workspace import Workspace

    one: dict[str, Any] = {"prompt": prompt, "target": target, "subject": subject, "rephrases": rephrase or None}
    one["locality"] = {"Unrelated": [{"prompt": text} for text in unrelated]} if unrelated else None
    space = Workspace.open(workspace, device=device)
    more: dict[str, Any] = {"allow_conflicts": allow_conflicts, "author": author, "message": message}
    if patch is not None:
        if edits is not None or method is not None or settings or any(value is not None for value in one.values()):
            problem = "takes the place of an edit and a method; give one or the other."
            raise BadRecord("the command line", None, "--patch", problem)
        made = Patch.load(patch)
        with progress() as report:
            outcome = space.propose_patch(made, **more, progress=report)
    else:
        wanted = edits_of(one, edits, limit, skip_invalid)
        config = parse_settings(list(settings)) if settings else None
        with progress() as report:
            outcome = space.propose(wanted, method, config, **more, progress=report)
    _tell(outcome, as_json=as_json)
    if not as_json and outcome.proposal is not None:
        line(
            (f"Proposal {outcome.proposal.number}", "bold"),
            f" waits. Next:  factpatch accept {outcome.proposal.number}",
        )


ACCEPT = """
[bold]Examples[/bold]

  factpatch accept
  factpatch accept 3
  factpatch accept -C facts 3 --message "checked by hand" --json
"""


def accept(
    number: Annotated[
        int | None, typer.Argument(metavar="N", min=1, help="Number of the proposal; default: the last.")
    ] = None,
    allow_conflicts: AllowOption = False,
    author: AuthorOption = None,
    message: MessageOption = "",
    workspace: WorkspaceOption = Path(),
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lay a proposal on the stack for good, and ask all earlier edits again.

    If the stack has changed since it was proposed, the gate is asked again; it exits with 1 if that, or a conflict, refuses it.
    What earlier edits lose is shown and written into the ledger.
    """
    from factpatch.workspace import Workspace

    space = Workspace.open(workspace, device=device)
    if number is None:
        waiting = space.proposals()
        if not waiting:
            raise BadConfig("nothing waits to be accepted.\n  Make a patch: factpatch propose")
        number = max(pending.number for pending in waiting)
    with progress() as report:
        outcome = space.accept(number, allow_conflicts=allow_conflicts, author=author, message=message, progress=report)
    _tell(outcome, as_json=as_json)
    if not as_json and outcome.entry is not None:
        line(
            (f"Accepted as entry {outcome.entry.number}", "bold"),
            f". Take it out with:  factpatch revert {outcome.entry.number}",
        )


REVERT = """
[bold]Examples[/bold]

  factpatch revert 4
  factpatch revert 4 --refit
  factpatch revert 4 --force --message "wrong from the start"
"""


def revert(
    number: Annotated[int, typer.Argument(metavar="N", min=1, help="Number of the entry that brought the patch in.")],
    refit: Annotated[
        bool, typer.Option("--refit", help="Make later patches anew that would be lost without it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Take it out even if later edits are lost.")] = False,
    author: AuthorOption = None,
    message: MessageOption = "",
    workspace: WorkspaceOption = Path(),
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a patch out, wherever in the stack it lies.

    Edits of later patches are asked without it. If one of them is lost, it exits with 1 and changes nothing unless told to.
    """
    from factpatch.workspace import Workspace

    space = Workspace.open(workspace, device=device)
    with progress() as report:
        outcome = space.revert(number, refit=refit, force=force, author=author, message=message, progress=report)
    _tell(outcome, as_json=as_json)
    if not as_json and outcome.entry is not None:
        made = f"; made anew: {', '.join(outcome.entry.replaced.values())}" if outcome.entry.replaced else ""
        line((f"Reverted entry {number}", "bold"), f" as entry {outcome.entry.number}{made}.")


def _tell(outcome: Outcome, *, as_json: bool) -> None:
    """What came of it. Exits with 1 if it was refused."""
    if as_json:
        print_json(outcome_json(outcome))
    else:
        show_outcome(outcome)
        if not outcome.done:
            line(("Refused, and nothing was changed: ", "bold red"), outcome.refused)
    if not outcome.done:
        raise typer.Exit(1)
