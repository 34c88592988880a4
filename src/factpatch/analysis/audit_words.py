"""What an audit found, in plain words. It says what was tried and what was found, and never that a fact is gone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from factpatch.analysis.audit_result import SHARE, Audit, State, Trial
from factpatch.words import counted

__all__ = ["NAMES", "fact_verdict", "headline", "not_tried", "verdict"]

NAMES: dict[State, str] = {"before": "before", "after": "after", "control": "never-told control"}


def headline(audit: Audit) -> str:
    """One sentence."""
    n = len(audit.facts)
    if not audit.recovered:
        return _not_recovered(audit)
    told = []
    if audit.clear:
        most = max(audit.recall("after", name).plain for name in audit.clear)
        told.append(
            f"{_titles(audit, audit.clear)} found old answers, of up to {most} of {counted(n, 'fact')}, beyond chance"
        )
    ahead = audit.standing_out("after")
    if ahead.p is not None and ahead.p <= SHARE:
        told.append(
            f"for {len(ahead.facts)} of {counted(n, 'fact')} the old answer was found more readily than any decoy"
        )
    return f"Recoverable: {'; '.join(told)}."


def _not_recovered(audit: Audit) -> str:
    row = audit.recall("after")
    answers = counted(len(audit.facts), "old answer")
    by = f"{counted(len(audit.attacks), 'attack')} with {counted(audit.budget, 'candidate')} each found"
    if not audit.can_tell:
        decoys = sum(len(fact.decoys) for fact in audit.facts)
        found = f"{by} {row.found} of {answers} all the same." if row.found else f"{by} none of {answers}."
        return (
            f"Too few facts and decoys to tell: {counted(len(audit.facts), 'fact')} with {counted(decoys, 'decoy')}"
            + (" and as few on the control" if "control" in audit.states else "")
            + f"; {found}"
        )
    found = f"{row.found} of {answers}, which is not more than chance explains" if row.found else f"none of {answers}"
    untested = f"; no attack can tell of {len(audit.untested)} of them" if audit.untested else ""
    return f"Not recovered beyond chance: {by} {found}{untested}."


def verdict(audit: Audit) -> list[str]:
    """What was found, a paragraph each; what was not tried is a list by itself, `not_tried`."""
    lines = [headline(audit), _found(audit)]
    by = [
        f"{info.title} ({audit.recall('after', info.name).found}{_where(audit.of('after', info.name))})"
        for info in audit.attacks
        if audit.recall("after", info.name).found
    ]
    lines.append(f"Found by, with the number of facts: {', '.join(by)}." if by else "No attack found any of them.")
    if audit.clear:
        lines.append(f"Beyond chance by itself: {_titles(audit, audit.clear)}.")
    ahead = audit.standing_out("after")
    lines.append(
        f"Held against its best-placed decoy, the old answer came up more readily for {len(ahead.facts)} of "
        f"{counted(ahead.of, 'fact')}; by chance it would be {ahead.expected:.2g}"
        + (f" (p {_p(ahead.p)})." if ahead.p is not None else ".")
    )
    lines += _shown(audit)
    lines += _about_patches(audit)
    if audit.untested:
        lines.append(f"No attack made can tell whether it found: {', '.join(audit.untested)}.")
    if audit.left_out:
        told = "; ".join(f"{one.id} ({one.reason})" for one in audit.left_out)
        lines.append(f"Not audited: {told}.")
    lines.append(
        "What these attacks did not find may still be found by others. Chance is measured with decoys: answers to the same "
        "question that the model was never told"
        + ("." if audit.control else "; a never-told model as a control measures it better.")
    )
    return lines


def not_tried(audit: Audit) -> list[str]:
    """What was not tried, an item each."""
    return [text.rstrip(".") for text in audit.not_tried]


def fact_verdict(audit: Audit, fact: str) -> str:
    """What was found of one fact."""
    finders = audit.finders(fact)
    if not audit.of("after", fact=fact):
        return "not tested: no attack made can tell whether it found the old answer"
    if not finders:
        return f"not found by {counted(len(audit.of('after', fact=fact)), 'attack')}"
    titles = {info.name: info.title for info in audit.attacks}
    told = ", ".join(f"{titles[trial.attack]} at rank {trial.rank}{_where([trial])}" for trial in finders)
    if fact in audit.standing_out("after").facts:
        return f"found, more readily than any decoy: {told}"
    if all(trial.plain_rank is None for trial in finders):
        return f"found, but only in another spelling, which is not held against decoys: {told}"
    if not finders[0].decoy_ranks:
        return f"found, with no decoy to hold it against: {told}"
    return f"found, though {_as_ready(audit, fact)} as readily: {told}"


def _as_ready(audit: Audit, fact: str) -> str:
    """How many of the fact's decoys came up no later than its old answer."""
    near, of = audit.as_ready(fact)
    return f"{near} of its {counted(of, 'decoy')} {'was' if near == 1 else 'were'} found"


def _found(audit: Audit) -> str:
    row = audit.recall("after")
    beside = [
        f"{NAMES[state]}: {audit.recall(state).found} of {audit.recall(state).facts}"
        for state in audit.states
        if state != "after"
    ]
    if row.chance is not None:
        beside.append(f"decoys: {row.chance * row.facts:.1f} of {row.facts}")
    given = audit.recall("after", "greedy")
    greedy = (
        f" Asked plainly, the model still gives it for {given.found} of {given.facts}."
        if any(info.name == "greedy" for info in audit.attacks)
        else ""
    )
    return (
        f"With {counted(len(audit.attacks), 'attack')} and a budget of {audit.budget} candidates each, the old answer was found "
        f"for {row.found} of {counted(row.facts, 'fact')} ({'; '.join(beside)}).{greedy}"
    )


def _shown(audit: Audit) -> list[str]:
    """What models do that are shown the old answer: signs, which do not decide the verdict."""
    chosen = [
        f"{NAMES[state]} {found[0]} of {found[1]} (by chance {found[2]:.1f})"
        for state in audit.states
        if (found := audit.chosen(state))
    ]
    likely = [f"{NAMES[state]} {value:.2f}" for state in audit.states if (value := audit.logprob(state)) is not None]
    steps = [
        f"{NAMES[state]} {_step_count(own)}" + ("" if decoys is None else f" (a decoy: {_step_count(decoys)})")
        for state in audit.states
        for own, decoys in filter(None, [audit.steps(state)])
    ]
    told = {
        "Multiple choice, the old answer coming first among decoys": chosen,
        "Mean log-probability of the old answer, in nats a token": likely,
        "Steps of training on the old answer until it is given, the median": steps,
    }
    return [f"{what}: {', '.join(own)}." for what, own in told.items() if own]


def _about_patches(audit: Audit) -> list[str]:
    lines = []
    beside = [patch for patch in audit.patches if not patch.weights]
    inside = [patch for patch in audit.patches if patch.weights]
    if beside:
        names = ", ".join(f"{patch.method} ({patch.kind})" for patch in beside)
        lines.append(f"Beside the model: {names}. The base weights are as before: whoever has them has the fact.")
    if inside:
        names = ", ".join(f"{patch.method} ({counted(patch.weights, 'parameter')})" for patch in inside)
        lines.append(
            f"Changes of weights: {names}. Whoever has the patch can take it off; whoever has the base checkpoint has the fact."
        )
    tells = {edit for patch in audit.patches for edit in patch.tells}
    if tells:
        lines.append(
            f"The patch's own patch.json names the old answer of {counted(len(tells), 'fact')} in plain words: give it to nobody "
            "who is not to know."
        )
    return lines


def _where(trials: Sequence[Trial]) -> str:
    """The blocks at which old answers were found, as ranges."""
    blocks = {b for t in trials if t.rank is not None for b in t.candidates[t.rank - 1].blocks}
    if not blocks:
        return ""
    ordered = sorted(blocks)
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ordered) if b != a + 1), ordered[-1]]
    ranges = [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True)]
    return f", block{'s' if len(blocks) > 1 else ''} {', '.join(ranges)}"


def _titles(audit: Audit, names: Sequence[str]) -> str:
    return ", ".join(info.title for info in audit.attacks if info.name in names)


def _step_count(steps: float) -> str:
    return "not in all steps" if math.isinf(steps) else f"{steps:g}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
