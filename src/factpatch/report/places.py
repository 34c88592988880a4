"""What comparing located places found: rows with intervals, sentences and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from factpatch.analysis.changed_values import ValueReading
from factpatch.analysis.places import PlacesReport
from factpatch.analysis.places_alike import LEVELS, MEASURES, Level, LevelComparison, Measure
from factpatch.report.picture import Cell, save_picture
from factpatch.report.plots import Bar, grouped_bars
from factpatch.report.stats import Interval, bootstrap

__all__ = ["hit_rows", "place_rows", "save_places", "sentences"]

HITS = (10, 50)

_ENOUGH = 6
"""Groups, or edits, for an interval: of two values a bootstrap gives these values, and hardly more of a few."""

_WHOSE: dict[Level, str] = {
    "wording": "Wordings of one fact",
    "chain": "A fact and a question through it",
    "entity": "Facts of one entity",
    "relation": "Facts of one relation",
    "answer": "Facts with one answer",
}
_WHAT: dict[Measure, str] = {
    "neurons": "share of knowledge neurons",
    "attributions": "likeness of attributions",
    "layers": "share of traced layers",
    "maps": "likeness of traced maps",
}
_FOUND_BY: tuple[tuple[str, Measure], ...] = (("knowledge neurons", "neurons"), ("causal tracing", "layers"))


def place_rows(places: PlacesReport) -> list[dict[str, Cell]]:
    """A row for each measure and level; intervals are of means over groups, at 95 %, and None with too few groups.

    inside, outside  how alike the places of facts that belong together are, and those of unrelated facts
    times            the first over the second
    rsim             relative similarity; its interval is cut off at 0 as it is itself
    told_apart       whether the interval, before that, lies above 0; None with too few groups to tell
    """
    return [_row(one) for one in places.comparisons]


def _row(one: LevelComparison) -> dict[str, Cell]:
    inside = _interval([group.inside for group in one.groups])
    relative = _interval(one.relative)
    return {
        "measure": one.measure,
        "level": one.level,
        "groups": len(one.groups),
        "pairs": sum(group.pairs for group in one.groups),
        "inside": one.inside,
        "inside_low": inside and inside[0],
        "inside_high": inside and inside[1],
        "outside": one.outside,
        "times": one.inside / one.outside if one.outside > 0 else None,
        "rsim": one.rsim,
        "rsim_low": None if relative is None else max(relative[0], 0.0),
        "rsim_high": None if relative is None else min(max(relative[1], 0.0), 1.0),
        "told_apart": None if relative is None else relative[0] > 0,
    }


def _interval(values: Sequence[float]) -> Interval | None:
    return bootstrap(values) if len(values) >= _ENOUGH else None


def hit_rows(places: PlacesReport) -> list[dict[str, Cell]]:
    """Hit@10 and Hit@50 before and after, for each method and what was read; over all edits that it did not refuse, and over
    those that all methods made, as the survey has it.
    """
    methods = list(dict.fromkeys(value.method for value in places.values))
    made = [{value.edit for value in places.values if value.method == name and value.made} for name in methods]
    common = set.intersection(*made) if made else set()
    rows: list[dict[str, Cell]] = []
    for name in methods:
        own = [value for value in places.values if value.method == name]
        for over, chosen in (("all", own), ("made by all", [value for value in own if value.edit in common])):
            for what, ranks in _READ.items():
                if chosen:
                    rows.append(_hits(name, what, over, chosen, ranks))
    return rows


_READ: dict[str, Callable[[ValueReading], tuple[int, int]]] = {
    "columns": lambda value: (value.columns_before, value.columns_after),
    "output": lambda value: (value.output_before, value.output_after),
}


def _hits(
    name: str,
    what: str,
    over: str,
    values: Sequence[ValueReading],
    ranks: Callable[[ValueReading], tuple[int, int]],
) -> dict[str, Cell]:
    row: dict[str, Cell] = {
        "method": name,
        "read": what,
        "over": over,
        "edits": len(values),
        "made": sum(value.made for value in values),
    }
    for most in HITS:
        for when, moment in enumerate(("before", "after")):
            hits = [float(ranks(value)[when] <= most) for value in values]
            interval = _interval(hits)
            row |= {
                f"hit{most}_{moment}": fmean(hits),
                f"hit{most}_{moment}_low": interval and interval[0],
                f"hit{most}_{moment}_high": interval and interval[1],
            }
    return row


def sentences(places: PlacesReport) -> list[str]:
    """What was found at each level, and then of each way of locating, in words that follow from the numbers."""
    by = {(one.measure, one.level): one for one in places.comparisons}
    told: list[str] = []
    for level in LEVELS:
        parts = [_part(by[measure, level], noun) for measure, noun in _SHARED.items() if (measure, level) in by]
        if parts:
            told.append(f"{_WHOSE[level]}: {'; '.join(parts)}.")
    for name, measure in _FOUND_BY:
        ranked = sorted((by[measure, level] for level in LEVELS if (measure, level) in by), key=lambda one: -one.rsim)
        apart = [one for one in ranked if _row(one)["told_apart"]]
        few = [one.level for one in ranked if len(one.groups) < _ENOUGH]
        rest = f" Too few groups to tell: {', '.join(few)}." if few else ""
        if apart:
            order = ", ".join(f"{one.level} {one.rsim:.2f}" for one in apart)
            told.append(
                f"By {name}, these are told apart from unrelated facts (RSim, the greatest first): {order}.{rest}"
            )
        elif len(few) < len(ranked):
            told.append(f"By {name}, what belongs together is at no level told apart from unrelated facts.{rest}")
        elif ranked:
            told.append(f"By {name}, there are too few groups at every level to tell facts apart from unrelated ones.")
    return told


_SHARED: dict[Measure, str] = {"neurons": "neurons", "layers": "traced layers"}


def _part(one: LevelComparison, noun: str) -> str:
    row = _row(one)
    if one.outside > 0:
        than = f"overlap {one.inside / one.outside:.1f} times as much as those of unrelated facts"
    elif one.inside > 0:
        than = "overlap, while those of unrelated facts do not"
    else:
        than = "do not overlap, and nor do those of unrelated facts"
    several = "1 group is" if len(one.groups) == 1 else f"{len(one.groups)} groups are"
    clear = {True: "", False: ", which may be chance", None: f"; {several} too few to tell"}[_apart(row)]
    return f"their {noun} {than} ({one.inside:.2g} against {one.outside:.2g}; RSim {one.rsim:.2f}{clear})"


def _apart(row: Mapping[str, Cell]) -> bool | None:
    told = row["told_apart"]
    assert told is None or isinstance(told, bool)
    return told


def save_places(folder: Path, places: PlacesReport) -> list[Path]:
    """Pictures with their numbers beside them: `places`, `places-alike` and, where edits were made, `places-hits`."""
    rows = place_rows(places)
    relative = _bars(_by_level(rows, "rsim"), "relative similarity (RSim)", "Places told apart")
    alike = _by_level(rows, "inside") | {"unrelated": _unrelated(rows)}
    drawn = _bars(alike, "similarity of places", "How alike places are")
    saved = [save_picture(folder, "places", relative, rows), save_picture(folder, "places-alike", drawn, rows)]
    if hits := hit_rows(places):
        moments = [(most, moment) for most in HITS for moment in ("before", "after")]
        bars = {
            f"{row['method']}, {row['read']}": {f"Hit@{most} {m}": _bar(row, f"hit{most}_{m}") for most, m in moments}
            for row in hits
            if row["over"] == "all"
        }
        drawn = _bars(bars, "share of edits with the target among the first 10 or 50", "Targets in the changed values")
        saved.append(save_picture(folder, "places-hits", drawn, hits))
    return saved


def _bars(values: Mapping[str, Mapping[str, Bar]], x: str, title: str) -> str:
    return grouped_bars(values, x, title, columns=2)


def _by_level(rows: Sequence[Mapping[str, Cell]], what: str) -> dict[str, dict[str, Bar]]:
    found: dict[str, dict[str, Bar]] = {}
    for level in LEVELS:
        own = {
            _WHAT[m]: _bar(row, what) for m in MEASURES for row in rows if (row["measure"], row["level"]) == (m, level)
        }
        if own:
            found[level] = own
    return found


def _unrelated(rows: Sequence[Mapping[str, Cell]]) -> dict[str, Bar]:
    """How alike unrelated facts are by each measure, mean over levels."""
    own = {m: [_number(row["outside"]) for row in rows if row["measure"] == m] for m in MEASURES}
    return {_WHAT[m]: (fmean(values), None) for m, values in own.items() if values}


def _bar(row: Mapping[str, Cell], what: str) -> Bar:
    low, high = row[f"{what}_low"], row[f"{what}_high"]
    return _number(row[what]), None if low is None or high is None else (_number(low), _number(high))


def _number(cell: Cell) -> float:
    assert isinstance(cell, float)
    return cell
