"""`Scorecard`: what came of an edit, probe by probe, before and after, and the numbers made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from factpatch.edits import Role
from factpatch.scoring.failures import FailureMode
from factpatch.scoring.protocols import ProtocolName
from factpatch.scoring.retained import Retained

__all__ = ["ProbeScore", "ScoreRole", "Scorecard", "Summary"]

ScoreRole = Role | Literal["fluency"]
Value = Callable[["ProbeScore"], float | None]
"""A number of one probe."""


class ProbeScore(BaseModel):
    """One probe under one protocol.

    before, after  from 0 to 1, or bits of fluency; None if it could not be scored, and `unscored` says why. Locality is
                   itself a comparison of the two moments, so it has no `before`
    measures       what else the protocol says of the answer after the edit, by name
    said_before, said_after  what the model gave
    failure        of a wrong free answer: what kind it is
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: ProtocolName
    edit: str
    role: ScoreRole
    kind: str = ""
    prompt: str
    answers: tuple[str, ...] = ()
    before: float | None = None
    after: float | None = None
    measures: dict[str, float] = {}
    said_before: str = ""
    said_after: str = ""
    unscored: str = ""
    failure: FailureMode | None = None


class Summary(BaseModel):
    """The numbers of one protocol. None where nothing could be scored.

    edit_success, rephrase  of each edit the mean over its probes; of these the mean over edits
    portability, locality   of each edit the mean over its probes of a kind, then over kinds; of these the mean over edits
    fluency                 bits, mean over edits; the survey prints it times 100
    *_before                the same for the unedited model
    by_kind                 `portability/<kind>` and `locality/<kind>`, mean over edits that have the kind
    measures                `<role>/<name>`: the protocol's other measures, averaged as the scores are
    failures                by kind of failure, how many edits failed that way at their own prompt
    scored, unscored        probes that count, and probes that do not
    """

    model_config = ConfigDict(frozen=True)

    protocol: ProtocolName
    protocol_version: int
    edits: int
    edit_success: float | None
    rephrase: float | None
    portability: float | None
    locality: float | None
    fluency: float | None
    edit_success_before: float | None
    rephrase_before: float | None
    portability_before: float | None
    fluency_before: float | None
    by_kind: dict[str, float]
    measures: dict[str, float]
    failures: dict[FailureMode, int]
    scored: int
    unscored: int


class Scorecard(BaseModel):
    """All probe scores of some edits, and how long it took.

    versions          of the protocols
    chat              whether prompts were put into the chat template
    scores            a row for each probe under each protocol
    retained          what came of the questions that were to be answered as before, if any were asked
    fit_seconds       wall time of making the patches; None if they were made elsewhere
    score_seconds     wall time of asking the patched model
    baseline_seconds  wall time of asking the unpatched model whatever was not known of it yet
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: dict[ProtocolName, int]
    chat: bool
    scores: tuple[ProbeScore, ...]
    retained: tuple[Retained, ...] = ()
    fit_seconds: float | None = None
    score_seconds: float = 0.0
    baseline_seconds: float = 0.0

    def summary(self, protocol: ProtocolName) -> Summary:
        """The numbers of one protocol."""
        rows = [row for row in self.scores if row.protocol == protocol]
        roles: dict[str, ScoreRole] = {
            "edit_success": "edit",
            "rephrase": "rephrase",
            "portability": "portability",
            "fluency": "fluency",
        }
        after = {name: _overall(rows, role, _after) for name, role in roles.items()}
        before = {f"{name}_before": _overall(rows, role, _before) for name, role in roles.items()}
        unscored = sum(bool(row.unscored) for row in rows)
        return Summary(
            protocol=protocol,
            protocol_version=self.versions[protocol],
            edits=len({row.edit for row in rows}),
            locality=_overall(rows, "locality", _after),
            by_kind=_by_kind(rows),
            measures=_measures(rows),
            failures=dict(Counter(row.failure for row in rows if row.role == "edit" and row.failure).most_common()),
            scored=sum(row.role != "fluency" for row in rows) - unscored,
            unscored=unscored,
            **after,
            **before,
        )

    def per_edit(self, protocol: ProtocolName, role: ScoreRole, measure: str | None = None) -> dict[str, float]:
        """By edit, what the summary's number is the mean of; edits for which nothing could be scored are left out.

        measure  one of the protocol's other measures, by name
        """
        rows = (row for row in self.scores if row.protocol == protocol and row.role == role)
        return _per_edit(rows, _after if measure is None else lambda row: row.measures.get(measure))

    def summaries(self) -> list[Summary]:
        """One for each protocol, `open` first."""
        return [self.summary(protocol) for protocol in self.versions]

    def to_json(self) -> dict[str, Any]:
        """Summaries and all probe scores."""
        return {
            "chat": self.chat,
            "fit_seconds": self.fit_seconds,
            "score_seconds": self.score_seconds,
            "baseline_seconds": self.baseline_seconds,
            "summaries": [summary.model_dump(mode="json") for summary in self.summaries()],
            "retained": [question.model_dump(mode="json") for question in self.retained],
            "scores": [row.model_dump(mode="json", exclude_defaults=True) for row in self.scores],
        }

    @classmethod
    def join(cls, cards: Sequence[Self]) -> Self:
        """One card of several. Seconds add up. Raises ValueError if they share an edit, or differ in protocol or chat."""
        first = cards[0]
        ids = [edit for card in cards for edit in {row.edit for row in card.scores}]
        if len(set(ids)) < len(ids) or any(
            (card.versions, card.chat) != (first.versions, first.chat) for card in cards
        ):
            raise ValueError("these scorecards share an edit, or differ in their protocols")
        fits = [card.fit_seconds for card in cards if card.fit_seconds is not None]
        return first.model_copy(
            update={
                "scores": tuple(row for card in cards for row in card.scores),
                "retained": tuple(question for card in cards for question in card.retained),
                "fit_seconds": sum(fits) if fits else None,
                "score_seconds": sum(card.score_seconds for card in cards),
                "baseline_seconds": sum(card.baseline_seconds for card in cards),
            }
        )


def _grouped(rows: Iterable[ProbeScore], key: Callable[[ProbeScore], str]) -> dict[str, list[ProbeScore]]:
    groups: dict[str, list[ProbeScore]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _after(row: ProbeScore) -> float | None:
    return row.after


def _before(row: ProbeScore) -> float | None:
    return row.before


def _mean(rows: Iterable[ProbeScore], value: Value) -> float | None:
    values = [found for row in rows if (found := value(row)) is not None]
    return fmean(values) if values else None


def _per_edit(rows: Iterable[ProbeScore], value: Value) -> dict[str, float]:
    """By edit, the mean over the probes of a kind, then over the kinds; edits without any are left out."""
    found = {}
    for edit, of_edit in _grouped(rows, lambda row: row.edit).items():
        kinds = _grouped(of_edit, lambda row: row.kind).values()
        means = [mean for group in kinds if (mean := _mean(group, value)) is not None]
        if means:
            found[edit] = fmean(means)
    return found


def _overall(rows: Iterable[ProbeScore], role: str, value: Value) -> float | None:
    """Mean over the edits that have any."""
    means = _per_edit((row for row in rows if row.role == role), value)
    return fmean(means.values()) if means else None


def _by_kind(rows: Iterable[ProbeScore]) -> dict[str, float]:
    kinds = _grouped((row for row in rows if row.kind), lambda row: f"{row.role}/{row.kind}")
    means = {name: _overall(group, group[0].role, _after) for name, group in sorted(kinds.items())}
    return {name: mean for name, mean in means.items() if mean is not None}


def _measures(rows: Iterable[ProbeScore]) -> dict[str, float]:
    rows = list(rows)
    names = sorted({(row.role, name) for row in rows for name in row.measures})
    means = {
        f"{role}/{name}": _overall(rows, role, lambda row, name=name: row.measures.get(name))  # type: ignore[misc]
        for role, name in names
    }
    return {name: mean for name, mean in means.items() if mean is not None}
