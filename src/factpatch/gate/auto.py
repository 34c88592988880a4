"""Which method to use: from cheap to dear, the first whose patch passes the gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from factpatch.edits import Edit
from factpatch.errors import (
    AnatomyError,
    BadConfig,
    CannotEdit,
    FetchError,
    MissingExtra,
    SingularMoment,
    did_you_mean,
)
from factpatch.gate.gate import Gate, Judgement
from factpatch.lm import LM, BaseLM
from factpatch.methods import Method, create, find, names
from factpatch.methods.learning import Learned
from factpatch.patches import Patch
from factpatch.progress import Progress, silent

__all__ = ["Attempt", "AutoChoice", "attempt", "choose"]

_UNABLE = (AnatomyError, BadConfig, CannotEdit, FetchError, MissingExtra, SingularMoment, torch.OutOfMemoryError)
"""What keeps one method from these edits on this model and machine, but not another."""

_UNMERGED = "which cannot be merged"


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
    def best(self) -> Attempt | None:
        """The one that won; if none did, the one that failed the fewest requirements, by least, the cheapest of these."""
        judged = [(each, each.judgement.verdict.failed) for each in self.attempts if each.judgement is not None]
        nearest = min(judged, key=lambda one: (len(one[1]), sum(f.shortfall for f in one[1])), default=None)
        return nearest[0] if nearest else None

    @property
    def judgement(self) -> Judgement | None:
        """Of the best attempt."""
        return self.best.judgement if self.best else None

    @property
    def hopeless(self) -> str:
        """Why no patch could pass, where that was seen: nothing there is to hold a requirement against; else empty."""
        failed = self.judgement.verdict.failed if self.judgement else ()
        return next((finding.says for finding in failed if finding.value is None), "")

    @property
    def advice(self) -> str:
        """What would help where no patch passed, in a line; empty where nothing is known that would."""
        if self.patch is not None or self.hopeless or self.best is None or self.best.judgement is None:
            return self._fewer()
        failed = self.best.judgement.verdict.failed
        weaker = [(str(finding.requirement), finding.would_pass) for finding in failed]
        told = ""
        if all(passing for _, passing in weaker):
            instead = " and ".join(f"{passing} in place of {needed}" for needed, passing in weaker)
            told = f"With {instead}, {self.best.method} would pass."
        return " ".join(filter(None, (told, self._fewer())))

    def _fewer(self) -> str:
        """What leaving a requirement out would do."""
        beside = [each.method for each in self.attempts if each.reason.endswith(_UNMERGED)]
        if self.patch is not None or self.hopeless or not beside:
            return ""
        return f"Without mergeable, {', '.join(beside)} could be tried too; their patches stay beside the weights."

    @property
    def says(self) -> str:
        """Which won and why, in a line."""
        if self.patch is None:
            if self.hopeless:
                return f"no patch could pass; {self.hopeless}"
            if len(self.attempts) == 1:
                return f"{self.attempts[0].method} has not passed"
            nearest = f"; {self.best.method} came nearest" if self.best else ""
            return f"none of {len(self.attempts)} methods passed{nearest}"
        if len(self.attempts) == 1:
            return f"{self.patch.provenance.method} passed"
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
    *,
    minutes: float | None = None,
    watch: Callable[[Attempt], None] | None = None,
) -> AutoChoice:
    """Try methods from cheap to dear (`Traits.effort`) until a patch passes the gate.

    methods   names to choose from, in this order; by default all that are registered, by effort
    settings  for each of them that knows the setting
    minutes   how long it may take; a method that is at work then is stopped where it next reports how far it is
    watch     is told each attempt as soon as it is known

    Methods that learn an editor first are passed over, as are those that cannot make the edits, fit the model, or give the
    kind of patch that is required; each says why. Where a requirement finds nothing to be scored, the first attempt is the
    last, since no other patch could do better.

    Raises BadConfig for a setting that none of the methods knows, and for a requirement that cannot be scored on this model.
    """
    tried = list(methods or sorted(names(), key=lambda name: find(name).traits.effort))
    known = {field for name in tried for field in find(name).config_type.model_fields}
    for key in settings or {}:
        if key not in known:
            raise BadConfig(f'no method to be tried has a setting "{key}".{did_you_mean(key, known)}')
    proposal, scorer = gate.proposal(lm, edits, progress), gate.scorer(lm)
    attempts: list[Attempt] = []
    end = None if minutes is None else time.perf_counter() + 60 * minutes

    def turn(name: str) -> tuple[Attempt, Patch | None]:
        if end is not None and time.perf_counter() > end:
            return Attempt(name, reason=f"not tried: {minutes:g} minutes were up"), None
        made = _able(name, lm, edits, gate, settings or {})
        if isinstance(made, str):
            return Attempt(name, reason=made), None
        started, report = time.perf_counter(), _of(name, progress, end)
        try:
            try:
                patch = made.fit(lm, edits, report)
            except _UNABLE as error:
                return Attempt(name, reason=str(error).splitlines()[0]), None
            seconds = time.perf_counter() - started
            judgement = gate.judge(lm, edits, patch, report, proposal=proposal, scorer=scorer)
        except _TimeUp:
            return Attempt(name, reason=f"stopped: {minutes:g} minutes were up"), None
        return Attempt(name, judgement, seconds=seconds), patch

    for name in tried:
        made, patch = turn(name)
        attempts.append(made)
        if watch is not None:
            watch(made)
        if made.passed:
            return AutoChoice(tuple(attempts), patch)
        if made.judgement and any(finding.value is None for finding in made.judgement.verdict.failed):
            break
    return AutoChoice(tuple(attempts), None)


class _TimeUp(Exception):
    """What stops a method at work; it is raised where that reports how far it is."""


def _of(name: str, progress: Progress, end: float | None) -> Progress:
    """Progress that says whose it is, until the end."""

    def report(doing: str, done: int, total: int | None) -> None:
        if end is not None and time.perf_counter() > end:
            raise _TimeUp
        progress(f"{name}: {doing}", done, total)

    return report


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
        return f"makes {traits.patch.kind} patches, {_UNMERGED}"
    try:
        method = create(name, {key: value for key, value in settings.items() if key in kind.config_type.model_fields})
        method.check(edits)
    except (BadConfig, CannotEdit, MissingExtra) as error:
        return str(error).splitlines()[0]
    return method
