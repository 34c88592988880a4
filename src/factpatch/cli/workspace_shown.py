"""What the workspace's commands share: how entries, conflicts and losses are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from factpatch.cli.gating import show_choice, show_judgement
from factpatch.cli.terminal import line
from factpatch.errors import BadConfig

if TYPE_CHECKING:
    from pathlib import Path

    from factpatch.workspace import Entry, Outcome, Regression, Workspace

__all__ = ["action_line", "opened", "outcome_json", "show_outcome", "show_regressions"]

_AT_INIT = "a workspace made with init --no-propose"


def opened(folder: Path, device: str | None, **given: str | None) -> Workspace:
    """A workspace, where a command can be given a model instead. Raises BadConfig if that is given too."""
    for option, value in given.items():
        if value is not None:
            name = option.replace("_", "-")
            raise BadConfig(f"--{name}: a workspace has its own model, of the type it was made with.\n  Leave it out.")
    from factpatch.workspace import Workspace

    return Workspace.open(folder, device=device)


def action_line(entry: Entry) -> tuple[str | tuple[str, str], ...]:
    """An entry's first line."""
    what = entry.action if entry.reverts is None else f"{entry.action} of entry {entry.reverts}"
    patch = f"  {entry.patch}" if entry.patch else ""
    return (
        f"{entry.number:>4}  ",
        (what, "bold"),
        patch,
        (f"  {entry.author}, {entry.time}  {entry.hash[:12]}", "dim"),
    )


def show_regressions(regressions: Sequence[Regression], indent: str = "") -> None:
    """Each in a line."""
    for each in regressions:
        line((f"{indent}lost  ", "red"), each.says)


def show_outcome(outcome: Outcome) -> None:
    """What stood in the way or came of it, but for what was done."""
    if outcome.choice is not None:
        if len(outcome.choice.attempts) > 1:
            show_choice(outcome.choice)
        if outcome.choice.judgement is not None:
            show_judgement(outcome.choice.judgement, _AT_INIT)
    if outcome.judgement is not None:
        line(("The stack has changed since; asked again:", "bold"))
        show_judgement(outcome.judgement, _AT_INIT)
    for each in outcome.conflicts:
        if each.says in outcome.refused:  # which is shown below
            continue
        line(("! ", "red" if each.blocks else "yellow"), each.says)
    show_regressions(outcome.regressions)


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """JSON-ready."""
    judgement = outcome.judgement or (outcome.choice and outcome.choice.judgement)
    attempts = outcome.choice.attempts if outcome.choice else ()
    return {
        "done": outcome.done,
        "refused": outcome.refused,
        "proposal": outcome.proposal and outcome.proposal.model_dump(mode="json", exclude={"judgement"}),
        "entry": outcome.entry and outcome.entry.to_json(),
        "judgement": judgement and judgement.to_json(),
        "attempts": [{"method": each.method, "passed": each.passed, "says": each.says} for each in attempts],
        "conflicts": [each.model_dump(mode="json") | {"says": each.says} for each in outcome.conflicts],
        "regressions": [each.model_dump(mode="json") for each in outcome.regressions],
    }
