"""Two runs side by side, for a researcher who changed one thing."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from factpatch.bench.outcome import Moment
from factpatch.bench.store import Cell, Store
from factpatch.report.rows import SCORES
from factpatch.report.stats import difference
from factpatch.scoring import ProtocolName

__all__ = ["ComparedRow", "compare_stores"]


class ComparedRow(BaseModel):
    """One score of one method on one data set in both runs, over the edits that have it in both.

    a, b       the means
    mean       of b - a over edits
    low, high  its interval at 95 %, by paired bootstrap; None for a single edit
    """

    model_config = ConfigDict(frozen=True)

    method: str
    dataset: str
    moment: Moment
    protocol: ProtocolName
    score: str
    edits: int
    a: float
    b: float
    mean: float
    low: float | None
    high: float | None
    is_clear: bool


def compare_stores(a: Store, b: Store) -> list[ComparedRow]:
    """Of every pair of cells that share method, data, where they start in it, and mode: all scores, paired by edit.

    Where one run has several cells of a method, each is compared with the other run's cell of the same settings, if it has
    one, else with its only one. Scores of different versions of a protocol are not compared.
    """
    return [row for one, other in _pairs(a.cells(), b.cells()) for row in _compared(a, one, b, other)]


def _pairs(a: dict[int, Cell], b: dict[int, Cell]) -> Iterator[tuple[int, int]]:
    for number, cell in a.items():
        alike = [n for n, other in b.items() if _what(other) == _what(cell)]
        same = [n for n in alike if b[n].settings == cell.settings and b[n].fingerprint == cell.fingerprint]
        same.sort(key=lambda n: b[n].contents != cell.contents)
        if same or len(alike) == 1:
            yield number, (same or alike)[0]


def _what(cell: Cell) -> tuple[object, ...]:
    return cell.method, cell.dataset, cell.data_sha256, cell.start, cell.mode


def _compared(a: Store, one: int, b: Store, other: int) -> Iterator[ComparedRow]:
    cell, versions = a.cells()[one], b.cells()[other].protocols
    moments = dict.fromkeys(outcome.moment for outcome in a.outcomes(one))
    for moment in moments:
        cards = a.card(one, moment), b.card(other, moment)
        if cards[0] is None or cards[1] is None:
            continue
        for protocol in (name for name, version in cell.protocols.items() if versions.get(name) == version):
            for score, role in SCORES.items():
                found = difference(*(card.per_edit(protocol, role) for card in cards if card is not None))
                if found is not None:
                    low, high = found.interval or (None, None)
                    yield ComparedRow(
                        method=cell.method,
                        dataset=cell.dataset,
                        moment=moment,
                        protocol=protocol,
                        score=score,
                        edits=found.edits,
                        a=found.a,
                        b=found.b,
                        mean=found.mean,
                        low=low,
                        high=high,
                        is_clear=found.is_clear,
                    )
