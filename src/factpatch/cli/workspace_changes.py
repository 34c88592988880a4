"""`factpatch propose`, `accept`, `discard`, `revert`: the commands that change a workspace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factpatch.cli import options as opt
from factpatch.cli.edit import edits_of, one_edit, wrong
from factpatch.cli.gating import AUTO, say_attempt, tell_beside
from factpatch.cli.terminal import if_interrupted, line, method_settings, print_json, progress, typed_in
from factpatch.cli.workspace_shown import outcome_json, show_outcome
from factpatch.words import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from factpatch.workspace import Outcome, Workspace


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(name="propose", epilog=PROPOSE)(propose)
    app.command(name="accept", epilog=ACCEPT)(accept)
    app.command(name="discard", epilog=DISCARD)(discard)
    app.command(name="revert", epilog=REVERT)(revert)


PROPOSE = """
[bold]Examples[/bold]

  factpatch propose --subject France --prompt "The capital of France is" --target Lyon
  factpatch propose -C facts --edits facts.jsonl --method auto --message "ticket 12"
  factpatch propose --patch lyon
"""


def propose(
    prompt: opt.Prompt = None,
    target: opt.Target = None,
    subject: opt.Subject = None,
    rephrase: opt.Rephrase = None,
    unrelated: opt.Unrelated = None,
    edits: opt.Edits = None,
    limit: opt.Limit = None,
    patch: Annotated[Path | None, typer.Option(help="A patch that was made already, instead of edits.")] = None,
    method: Annotated[
        str | None, typer.Option(help="How to edit; default: the workspace's. auto: the cheapest that passes.")
    ] = None,
    settings: opt.Settings = None,
    minutes: opt.Minutes = None,
    allow_conflicts: opt.AllowConflicts = False,
    author: opt.Author = None,
    message: opt.Message = "",
    workspace: opt.Workspace = Path(),
    device: opt.Device = None,
    skip_invalid: opt.SkipInvalid = False,
    as_json: opt.Json = False,
) -> None:
    """Make a patch on top of the stack and put it before the gate; what is let through waits to be accepted.

    Exits with 1 if it is refused: by the gate, with the probes that failed, or because of a conflict. Then nothing is kept.
    """
    from factpatch.patches import Patch
    from factpatch.workspace import Workspace

    one = one_edit(prompt, target, subject, rephrase, unrelated)
    space = Workspace.open(workspace, device=device)
    more: dict[str, Any] = {"allow_conflicts": allow_conflicts, "author": author, "message": message}
    if patch is not None:
        if one or edits is not None or method is not None or settings or minutes is not None:
            raise wrong("--patch", "takes the place of an edit and a method; give one or the other.")
        made = Patch.load(patch)
        with if_interrupted(_left(space)), progress() as report:
            outcome = space.propose_patch(made, **more, progress=report)
    else:
        wanted = edits_of(one, edits, limit, skip_invalid)
        config = method_settings(settings, chat=False) if settings else None
        if is_auto := (method or space.settings.method) == AUTO:
            more |= {"minutes": minutes, "watch": say_attempt}
        elif minutes is not None:
            raise wrong("--minutes", "belongs to --method auto; leave it out.")
        with if_interrupted(_left(space)), progress() as report:
            outcome = space.propose(wanted, method, config, **more, progress=report)
        if is_auto and not as_json and outcome.choice and outcome.choice.patch:
            tell_beside(outcome.choice.patch)
    _tell(outcome, as_json=as_json)
    if not as_json and outcome.proposal is not None:
        number = outcome.proposal.number
        line((f"Proposal {number}", "bold"), f" waits. Next:  {typed_in(workspace, 'accept', number)}")


ACCEPT = """
[bold]Examples[/bold]

  factpatch accept
  factpatch accept 3
  factpatch accept -C facts 3 --strict
  factpatch accept -C facts 3 --message "checked by hand" --json
"""


def accept(
    number: Annotated[
        int | None, typer.Argument(metavar="N", min=1, help="Number of the proposal; default: the only one that waits.")
    ] = None,
    allow_conflicts: opt.AllowConflicts = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse it if an earlier edit is lost by it.")] = False,
    author: opt.Author = None,
    message: opt.Message = "",
    workspace: opt.Workspace = Path(),
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Lay a proposal on the stack for good, and ask all earlier edits again.

    If the stack has changed since it was proposed, the gate is asked again; it exits with 1 if that, or a conflict, refuses it.
    What earlier edits lose is shown and written into the ledger; with --strict a lost edit refuses the proposal, too.
    """
    from factpatch.workspace import Workspace

    space = Workspace.open(workspace, device=device)
    with if_interrupted(_left(space)), progress() as report:
        more: dict[str, Any] = {"allow_conflicts": allow_conflicts, "strict": strict, "author": author}
        outcome = space.accept(number, **more, message=message, progress=report)
    _tell(outcome, as_json=as_json)
    if not as_json and outcome.entry is not None:
        entry = outcome.entry.number
        if outcome.held:
            line(counted(outcome.held, "earlier edit still holds", "earlier edits still hold"))
        line((f"Accepted as entry {entry}", "bold"), f". Take it out with:  {typed_in(workspace, 'revert', entry)}")


DISCARD = """
[bold]Examples[/bold]

  factpatch discard 3
  factpatch discard -C facts 3 --json
"""


def discard(
    number: Annotated[int, typer.Argument(metavar="N", min=1, help="Number of the proposal.")],
    workspace: opt.Workspace = Path(),
    as_json: opt.Json = False,
) -> None:
    """Throw a proposal away that waits, also one whose files are damaged. Its number is not given again."""
    from factpatch.workspace import Workspace

    with progress() as report:
        Workspace.open(workspace).discard(number, report)
    if as_json:
        print_json({"discarded": number})
    else:
        line((f"Proposal {number}", "bold"), " was thrown away.")


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
    author: opt.Author = None,
    message: opt.Message = "",
    workspace: opt.Workspace = Path(),
    device: opt.Device = None,
    as_json: opt.Json = False,
) -> None:
    """Take a patch out, wherever in the stack it lies.

    Edits of later patches are asked without it. If one of them is lost, it exits with 1 and changes nothing unless told to.
    While several patches are damaged it takes --force, and asks the edits of the sound ones.
    """
    from factpatch.workspace import Workspace

    space = Workspace.open(workspace, device=device)
    with if_interrupted(_left(space)), progress() as report:
        outcome = space.revert(number, refit=refit, force=force, author=author, message=message, progress=report)
    _tell(outcome, as_json=as_json)
    if not as_json and outcome.entry is not None:
        made = f"; made anew: {', '.join(outcome.entry.replaced.values())}" if outcome.entry.replaced else ""
        line((f"Reverted entry {number}", "bold"), f" as entry {outcome.entry.number}{made}.")


def _left(space: Workspace) -> Callable[[], str]:
    """What an interruption leaves of a workspace, beside how it was when this was called."""

    def found() -> tuple[int, list[int]]:
        return space.log().last, [pending.number for pending in space.proposals()]

    before = found()

    def kept() -> str:
        if found() != before:
            return f"the workspace has changed already. See how it stands: {typed_in(space.store.folder, 'list')}"
        waiting = before[1]
        if not waiting:
            return "the workspace is as it was."
        if len(waiting) > 1:
            return f"the workspace is as it was, proposals {', '.join(map(str, waiting))} still wait."
        return f"the workspace is as it was, proposal {waiting[0]} still waits."

    return kept


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
