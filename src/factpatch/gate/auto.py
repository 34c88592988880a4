"""Which method to use: from cheap to dear, the first whose patch passes the gate."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from factpatch.edits import Edit
from factpatch.errors import AnatomyError, BadConfig, CannotEdit, MissingExtra, SingularMoment
from factpatch.gate.gate import Gate, Judgement
from factpatch.lm import LM, BaseLM
from factpatch.methods import Method, create, find, names
from factpatch.methods.learning import Learned
from factpatch.patches import Patch
from factpatch.progress import Progress, silent

__all__ = ["Attempt", "AutoChoice", "attempt", "choose"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One method's turn.

    judgement  what came of its patch; None if it made none
    reason     why it was passed over, or could not make the edits; empty if it was judged
    seconds    of making the patch
    """

    method: str
    judgement: Judgement | None = None
    reason: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether its patch was let through."""
        return self.judgement is not None and self.judgement.passed

    @property
    def says(self) -> str:
        """In a line."""
        if self.judgement is None:
            return f"{self.method}: {self.reason}"
        failed = "; ".join(finding.says for finding in self.judgement.verdict.failed)
        return f"{self.method}: {f'failed {failed}' if failed else 'passed'} ({self.seconds:.1f} s)"


@dataclass(frozen=True, slots=True)
class AutoChoice:
    """All attempts in the order they were made, and the patch that won; None if none did."""

    attempts: tuple[Attempt, ...]
    patch: Patch | None

    @property
    def judgement(self) -> Judgement | None:
        """Of the patch that won; if none did, of the attempt that failed the fewest requirements, the cheapest of these."""
        judged = [each.judgement for each in self.attempts if each.judgement is not None]
        return min(judged, key=lambda judgement: len(judgement.verdict.failed), default=None)

    @property
    def says(self) -> str:
        """Which won and why, in a line."""
        if self.patch is None:
            return f"none of {len(self.attempts)} methods passed"
        tried = [each.method for each in self.attempts if each.judgement is not None and not each.passed]
        after = f"; {', '.join(tried)} cost less and failed" if tried else ", the cheapest that can make these edits"
        return f"{self.patch.provenance.method} passed{after}"


def choose(
    lm: BaseLM,
    edits: Sequence[Edit],
    gate: Gate,
    methods: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> AutoChoice:
    """Try methods from cheap to dear (`Traits.effort`) until a patch passes the gate.

    methods   names to choose from, in this order; by default all that are registered, by effort
    settings  for each of them that knows the setting

    Methods that learn an editor first are passed over, as are those that cannot make the edits, fit the model, or give the
    kind of patch that is required; each says why.
    """
    proposal, scorer = gate.proposal(lm, edits, progress), gate.scorer(lm)
    attempts: list[Attempt] = []
    for name in methods or sorted(names(), key=lambda name: find(name).traits.effort):
        made = _able(name, lm, edits, gate, settings or {})
        if isinstance(made, str):
            attempts.append(Attempt(name, reason=made))
            continue
        started = time.perf_counter()
        try:
            patch = made.fit(lm, edits, progress)
        except (AnatomyError, BadConfig, CannotEdit, MissingExtra, SingularMoment) as error:
            attempts.append(Attempt(name, reason=str(error).splitlines()[0]))
            continue
        seconds = time.perf_counter() - started
        judgement = gate.judge(lm, edits, patch, progress, proposal=proposal, scorer=scorer)
        attempts.append(Attempt(name, judgement, seconds=seconds))
        if judgement.passed:
            return AutoChoice(tuple(attempts), patch)
    return AutoChoice(tuple(attempts), None)


def attempt(
    lm: BaseLM, edits: Sequence[Edit], gate: Gate, method: Method[Any], progress: Progress = silent
) -> AutoChoice:
    """One method before the gate; what it raises is raised."""
    method.check(edits)
    proposal, scorer = gate.proposal(lm, edits, progress), gate.scorer(lm)
    started = time.perf_counter()
    patch = method.fit(lm, edits, progress)
    seconds = time.perf_counter() - started
    judgement = gate.judge(lm, edits, patch, progress, proposal=proposal, scorer=scorer)
    return AutoChoice((Attempt(method.name, judgement, seconds=seconds),), patch if judgement.passed else None)


def _able(name: str, lm: BaseLM, edits: Sequence[Edit], gate: Gate, settings: Mapping[str, Any]) -> Method[Any] | str:
    """The method, or why it is passed over."""
    kind = find(name)
    traits = kind.traits
    if issubclass(kind, Learned):
        return "must be trained first"
    if traits.patch.needs_weights and not isinstance(lm, LM):
        return "needs the model's weights"
    if any(need.measure == "mergeable" for need in gate.requirements) and not traits.patch.mergeable:
        return f"makes {traits.patch.kind} patches, which cannot be merged"
    try:
        method = create(name, {key: value for key, value in settings.items() if key in kind.config_type.model_fields})
        method.check(edits)
    except (BadConfig, CannotEdit, MissingExtra) as error:
        return str(error).splitlines()[0]
    return method
