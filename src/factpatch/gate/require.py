"""What a patch must show to be let through, such as `edit_success>=1`, and whether its scorecard shows it."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from factpatch.errors import BadConfig, did_you_mean
from factpatch.patches import Patch
from factpatch.scoring import ProbeScore, ProtocolName, Scorecard, ScoreRole

__all__ = ["MEASURES", "Finding", "Lost", "Requirement", "Verdict", "check"]

Comparison = Literal[">=", "<=", ">", "<"]

_COMPARE: dict[Comparison, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_ROLES: dict[str, ScoreRole] = {
    "edit_success": "edit",
    "rephrase": "rephrase",
    "portability": "portability",
    "locality": "locality",
}
MEASURES: dict[str, str] = {
    "edit_success": "share of edits whose own prompt is answered with the target",
    "rephrase": "the same for other wordings",
    "portability": "share of questions that follow from the edits answered rightly; portability/KIND of one kind",
    "locality": "share of other answers that stayed as they were; locality/KIND of one kind",
    "fluency": "bits of n-gram entropy of text that the patched model writes",
    "fluency_drop": "share by which fluency fell",
    "retained": "share of --retain questions answered as before",
    "mergeable": "the patch is a plain change of weights; takes no number",
}
"""What may be required, and what it is."""

_WHOLE = re.compile(
    r"^(?:(open|survey)\.)?([a-z_]+)(?:/(.+?))?\s*(?:(>=|<=|>|<|=)\s*(-?[0-9.]+(?:e[+-]?[0-9]+)?)\s*(%?))?$", re.I
)
_EXAMPLE = "  Write NAME>=NUMBER or NAME<=NUMBER, such as edit_success>=1, locality>=0.95 or fluency_drop<=5%."
_LIKELY = 50
"""A number from which on a percentage may have been meant; few want a gate that lets half of it pass."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Requirement(_Value):
    """One bound on one number of a scorecard, or on the patch itself.

    measure   one of `MEASURES`
    kind      of portability or locality: the one kind that counts; empty for all
    protocol  whose number it is
    compare, bound  how the number must stand to which; None of what takes no number
    """

    measure: str
    kind: str = ""
    protocol: ProtocolName = "open"
    compare: Comparison | None = None
    bound: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `[PROTOCOL.]NAME[/KIND] >= NUMBER[%]`, or the bare name of what takes no number.

        Raises BadConfig that says what was expected.
        """
        plain = text.strip().replace("≥", ">=").replace("≤", "<=")
        found = _WHOLE.match(plain)
        if not found:
            raise BadConfig(f'"{text}": not a requirement.\n{_EXAMPLE}')
        protocol, name, kind, compare, number, percent = found.groups()
        name = name.lower()
        if name not in MEASURES:
            raise BadConfig(
                f'"{text}": nothing is called "{name}".{did_you_mean(name, MEASURES)}\n'
                f"  What may be required: {', '.join(MEASURES)}"
            )
        if kind and name not in {"portability", "locality"}:
            raise BadConfig(f'"{text}": {name} has no kinds.\n  Leave out "/{kind}".')
        if name == "mergeable":
            if compare or protocol:
                raise BadConfig(f'"{text}": mergeable takes no number.\n  Write mergeable alone.')
            return cls(measure=name)
        how = next((own for own in _COMPARE if own == compare), None)
        if how is None:
            raise BadConfig(f'"{text}": says no bound.\n{_EXAMPLE}')
        try:
            bound = float(number) / (100 if percent else 1)
        except ValueError:
            raise BadConfig(f'"{text}": "{number}" is no number.\n{_EXAMPLE}') from None
        least = -1 if name == "fluency_drop" else 0
        if not (math.isfinite(bound) if name == "fluency" else least <= bound <= 1):
            drop = name == "fluency_drop"  # of which little is wanted, and of all others much
            is_likely = not percent and (1 < bound < _LIKELY if drop else _LIKELY <= bound <= 100)
            meant = f"  Did you mean {number}%?" if is_likely else _EXAMPLE
            kind_of_number = "a number of bits" if name == "fluency" else f"a share from {least} to 1"
            raise BadConfig(f'"{text}": {name} is {kind_of_number}, found {number}{percent}.\n{meant}')
        asked: ProtocolName = "survey" if (protocol or "").lower() == "survey" else "open"
        return cls(measure=name, kind=kind or "", protocol=asked, compare=how, bound=bound)

    def __str__(self) -> str:
        name = self.measure + (f"/{self.kind}" if self.kind else "")
        name = name if self.protocol == "open" else f"{self.protocol}.{name}"
        # All digits, since this is also how a requirement is written down to be read again.
        return name if self.bound is None else f"{name}{self.compare}{repr(self.bound).removesuffix('.0')}"

    def holds(self, value: float | None) -> bool:
        """Whether a number keeps to the bound; what could not be scored does not."""
        if value is None:
            return False
        if self.compare is None or self.bound is None:
            return value >= 1
        # A mean of thirds should not fail a bound that it reaches on paper.
        return _COMPARE[self.compare](round(value, 9), self.bound)


class Lost(_Value):
    """A probe that was not answered as it should be.

    proposed  whether the user did not write it
    """

    edit: str
    role: ScoreRole | Literal["retained"]
    kind: str = ""
    prompt: str
    answers: tuple[str, ...] = ()
    before: str
    after: str
    proposed: bool = False


class Finding(_Value):
    """One requirement, the number that was found, and what spoke against it.

    value   None if there was nothing to score, and `reason` says so
    lost    the probes that were not answered as they should be, whether or not the requirement is met
    """

    requirement: Requirement
    value: float | None
    passed: bool
    reason: str = ""
    lost: tuple[Lost, ...] = ()

    @property
    def shortfall(self) -> float:
        """How far the number is from the bound, as a share of it where that is above 1; 1 if there is no number."""
        if self.passed:
            return 0.0
        if self.value is None or self.requirement.bound is None:
            return 1.0
        return abs(self.value - self.requirement.bound) / max(1.0, abs(self.requirement.bound))

    @property
    def would_pass(self) -> str:
        """The nearest requirement to this one that the number meets, to three digits; empty if it is met, or none would."""
        need = self.requirement
        if self.passed or self.value is None or need.bound is None:
            return ""
        down = need.compare in {">=", ">"}
        bound = (math.floor if down else math.ceil)(round(self.value, 9) * 1000) / 1000
        if down and bound <= 0:  # a bound that everything meets requires nothing
            return ""
        return str(need.model_copy(update={"bound": bound, "compare": ">=" if down else "<="}))

    @property
    def says(self) -> str:
        """In a few words."""
        if self.value is None:
            return f"{self.requirement}: {self.reason}"
        if self.requirement.bound is None:
            return f"{self.requirement}: {'yes' if self.passed else self.reason}"
        return f"{self.requirement}: {self.value:.3g}"


class Verdict(_Value):
    """Whether a patch is let through, requirement by requirement."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether all requirements are met."""
        return all(finding.passed for finding in self.findings)

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings that speak against it."""
        return tuple(finding for finding in self.findings if not finding.passed)


def check(
    card: Scorecard,
    patch: Patch,
    requirements: Sequence[Requirement],
    proposed: Collection[tuple[str, str]] = (),
) -> Verdict:
    """Hold a patch and its scorecard against the requirements.

    proposed  edit and prompt of each probe that the user did not write
    """
    return Verdict(findings=tuple(_finding(card, patch, each, proposed) for each in requirements))


def _finding(card: Scorecard, patch: Patch, need: Requirement, proposed: Collection[tuple[str, str]]) -> Finding:
    if need.measure == "mergeable":
        told = "" if patch.mergeable else f"{patch.kind} patches stay beside the weights"
        return Finding(requirement=need, value=float(patch.mergeable), passed=patch.mergeable, reason=told)
    if need.measure == "retained":
        lost = tuple(
            Lost(
                edit=", ".join(q.edits),
                role="retained",
                prompt=q.prompt,
                answers=q.answers,
                before=q.before,
                after=q.after,
            )
            for q in card.retained
            if q.changed
        )
        value = 1 - len(lost) / len(card.retained) if card.retained else None
        return _told(need, value, lost, "no questions to retain were given")
    if need.protocol not in card.versions:
        return _told(need, None, (), f"was not scored under the {need.protocol} protocol")
    summary = card.summary(need.protocol)
    if need.measure in {"fluency", "fluency_drop"}:
        before, after = summary.fluency_before, summary.fluency
        drop = None if not before or after is None else (before - after) / before
        nothing = "fluency was not measured, which takes a model in hand"
        return _told(need, after if need.measure == "fluency" else drop, (), nothing)
    role = _ROLES[need.measure]
    of_role = [row for row in card.scores if row.protocol == need.protocol and row.role == role]
    rows = [row for row in of_role if not need.kind or row.kind == need.kind]
    value = summary.by_kind.get(f"{need.measure}/{need.kind}") if need.kind else getattr(summary, need.measure)
    lost = tuple(_lost(row, proposed) for row in rows if row.after is not None and row.after < 1)
    return _told(need, value, lost, _why_nothing(need, rows, of_role))


def _why_nothing(need: Requirement, rows: Sequence[ProbeScore], of_role: Sequence[ProbeScore]) -> str:
    """Why no number came of these probes, and what to do; `of_role` are those of other kinds too."""
    if rows:
        ((why, _),) = Counter(row.unscored for row in rows).most_common(1)
        other = "survey" if need.protocol == "open" else "open"
        return f"none of {len(rows)} probes could be scored: {why}; try {other}.{need.measure}"
    if need.kind and of_role:
        kinds = sorted({row.kind for row in of_role})
        return f"no probe is of this kind.{did_you_mean(need.kind, kinds)} There are: {', '.join(kinds)}"
    return f"no edit has a {need.measure} probe; write some into the edits' file"


def _told(need: Requirement, value: float | None, lost: tuple[Lost, ...], nothing: str) -> Finding:
    reason = nothing if value is None else ""
    return Finding(requirement=need, value=value, passed=need.holds(value), reason=reason, lost=lost)


def _lost(row: ProbeScore, proposed: Collection[tuple[str, str]]) -> Lost:
    return Lost(
        edit=row.edit,
        role=row.role,
        kind=row.kind,
        prompt=row.prompt,
        answers=row.answers,
        before=row.said_before,
        after=row.said_after,
        proposed=(row.edit, row.prompt) in proposed,
    )
