"""What commands with a gate share: the gate itself, and how its verdict is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from factpatch.cli.terminal import err, line, out, probe_lines
from factpatch.words import counted

if TYPE_CHECKING:
    from factpatch.gate import AutoChoice, Gate, Judgement
    from factpatch.gate.auto import Attempt
    from factpatch.patches import Patch
    from factpatch.scoring import Scorecard

__all__ = ["AUTO", "as_shown", "gate_of", "say_attempt", "show_choice", "show_judgement", "tell_beside"]

AUTO = "auto"
"""In the place of a method's name: the cheapest that passes."""

_MOST = 6
"""Lost probes that are shown of each requirement."""


def gate_of(
    requirements: Sequence[str], retain: Path | None, *, proposes: bool, chat: bool, full: bool = False
) -> Gate:
    """The gate that the options ask for: without requirements, that the edits succeed and all questions are retained.

    Raises BadConfig, and what reading the questions raises.
    """
    from factpatch.data.questions import read_questions
    from factpatch.gate import Gate, Requirement

    questions = read_questions(retain) if retain is not None else ()
    wanted = list(requirements) or ["edit_success>=1"]
    if questions and not any(Requirement.parse(text).measure == "retained" for text in wanted):
        wanted.append("retained>=1")
    return Gate.of(*wanted, retain=questions, proposes=proposes, chat=chat, full=full)


def as_shown(judgement: Judgement) -> Scorecard:
    """The scorecard with proposed wordings told from written ones, as the kinds of locality tell it; examples left out."""
    added = judgement.proposal.added
    marked = []
    for row in judgement.scorecard.scores:
        proposed = (row.edit, row.prompt) in added
        kind = "Proposed: wording" if proposed and row.role == "rephrase" else row.kind
        marked.append(
            row.model_copy(update={"kind": kind, "prompt": _in_short(row.prompt) if proposed else row.prompt})
        )
    return judgement.scorecard.model_copy(update={"scores": tuple(marked)})


def _in_short(prompt: str) -> str:
    lines = prompt.splitlines()
    return f"{lines[0]} … {lines[-1]}" if len(lines) > 2 else prompt


def show_judgement(judgement: Judgement, without: str = "--no-propose") -> None:
    """Each requirement with its number, and the probes that speak against those that are not met.

    without  what leaves out the probes that were proposed
    """
    for finding in judgement.verdict.findings:
        line(("✓ " if finding.passed else "✗ ", "green" if finding.passed else "red"), finding.says)
        if finding.passed or not finding.lost:
            continue
        rows = []
        for lost in finding.lost[:_MOST]:
            asked = Text(f"  {_in_short(lost.prompt) if lost.proposed else lost.prompt}") + Text(
                "  (proposed)" if lost.proposed else "", style="dim"
            )
            rows.append((asked, " or ".join(lost.answers) or "as before", lost.before, lost.after))
        out.print(probe_lines(("  asked", "expected", "before", "after"), rows))
        if len(finding.lost) > _MOST:
            line((f"  and {len(finding.lost) - _MOST} more", "dim"))
    proposed = len(judgement.proposal.added)
    if proposed:
        made = counted(proposed, "probe was", "probes were")
        line((f"{made} proposed, not written: {without} leaves them out", "dim"))


def say_attempt(attempt: Attempt) -> None:
    """A method's turn in a line on stderr, as soon as it is known."""
    err.print(attempt.says, soft_wrap=True)


def tell_beside(patch: Patch) -> None:
    """Of a patch that was chosen: whether it acts beside the weights, and what to do for one that can be shipped."""
    if not patch.mergeable:
        line(
            f"{patch.provenance.method} makes {patch.kind} patches, which stay beside the weights: they run in factpatch alone, "
            "and cannot be merged or exported. For one that can:  --require mergeable"
        )


def show_choice(choice: AutoChoice) -> None:
    """Which method won, or that none did; `say_attempt` has told each one's turn."""
    line((choice.says, "bold"))
    if choice.advice:
        line(choice.advice)
