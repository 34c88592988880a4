"""Pictures of sequential decay: several methods in one, each with its numbers; see `factpatch.analysis.decay`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from factpatch.analysis.decay import Break, Decay, Look, Rule, breaks
from factpatch.report.picture import Cell
from factpatch.report.plots import INK, colour, counted, figure, legend_above, marked, scaled
from factpatch.scoring import ProtocolName

__all__ = ["Picture", "decay_pictures", "decay_rows"]

WIDTH, HEIGHT = 7.2, 4.6
"""Of a picture, in inches: nine methods with two lines each need more room than the plots of a report."""

Row = dict[str, Cell]


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot, what to call its file, and the numbers it was drawn from."""

    name: str
    svg: str
    rows: Sequence[Mapping[str, Cell]]


def decay_pictures(decays: Mapping[str, Decay], rule: Rule | None = None) -> list[Picture]:
    """All pictures of some sequences, by label: success, age, locality and the like, perplexity, weights, guard.

    Of scores there is one for each protocol. What has no number anywhere gets no picture; a sequence of which nothing was
    made is left out.
    """
    rule = rule or Rule()
    decays = {label: decay for label, decay in decays.items() if decay.checkpoints}
    if not decays:
        return []
    first_break = {label: next(iter(breaks(decay, rule, _headline(decay))), None) for label, decay in decays.items()}
    pictures: list[Picture | None] = []
    protocols = list(dict.fromkeys(protocol for decay in decays.values() for protocol in decay.protocols))
    for protocol in protocols:
        pictures.append(_success(decays, protocol, first_break))
        pictures.append(_ages(decays, protocol))
        for score, label in _SCORES.items():
            pictures.append(_score(decays, protocol, score, label))
    ratio = "perplexity, times the unedited"
    title = "Perplexity on neutral texts in sequence"
    pictures.append(_vital(decays, "perplexity", "perplexity_ratio", ratio, title, rule.max_perplexity, log=True))
    title = "Growth of the weights' change in sequence"
    pictures.append(_vital(decays, "norm", "norm", "‖change‖ / ‖weights‖ (Frobenius)", title, log=True))
    kept = "share of known answers kept"
    title = "Guard questions in sequence"
    pictures.append(_vital(decays, "guard", "canaries_kept", kept, title, rule.min_canaries, log=False))
    return [picture for picture in pictures if picture is not None]


_SCORES = {
    "rephrase": "rephrase success",
    "portability": "portability",
    "locality": "locality",
    "fluency": "fluency (bits)",
}


def decay_rows(decays: Mapping[str, Decay]) -> list[Row]:
    """One row for each sequence, protocol and checkpoint, with all that was measured there."""
    return [
        {"method": label, "protocol": protocol, **point.model_dump(), **_vitals(checkpoint)}
        for label, decay in decays.items()
        for protocol in decay.protocols
        for checkpoint, point in zip(decay.checkpoints, decay.points(protocol), strict=True)
    ]


def _vitals(look: Look) -> Row:
    vitals = look.vitals
    return {
        "perplexity": vitals.perplexity,
        "perplexity_ratio": vitals.perplexity_ratio,
        "norm": vitals.norm,
        "guard_right": vitals.right,
        "guard_asked": len(vitals.questions),
        "canaries": len(vitals.canaries),
        "canaries_kept": vitals.canaries_kept,
    }


def _headline(decay: Decay) -> ProtocolName:
    return "open" if "open" in decay.protocols else decay.protocols[0]


def _success(decays: Mapping[str, Decay], protocol: ProtocolName, first: Mapping[str, Break | None]) -> Picture:
    """At end against the number of patches, at edit dashed, with a ring where each method broke."""
    rows: list[Row] = []
    title = f"Success in sequence, {protocol} protocol"
    with figure(HEIGHT, title, WIDTH) as (axes, drawn):
        for i, (label, decay) in enumerate(decays.items()):
            points, broken = decay.points(protocol), first[label]
            _line(axes, i, label, [(point.patches, point.at_end) for point in points])
            _dashed(axes, i, [(point.patches, point.at_edit) for point in points])
            rings = [
                (p.patches, p.at_end) for p in points if broken and p.patches == broken.at and p.at_end is not None
            ]
            for across, up in rings:
                axes.scatter(across, up, s=150, facecolors="none", edgecolors=colour(i), linewidths=1.6, zorder=4)
            rows += [
                {
                    "method": label,
                    "patches": point.patches,
                    "at_end": point.at_end,
                    "at_edit": point.at_edit,
                    "broken": broken is not None and point.patches >= broken.at,
                    "why": broken.says if broken and point.patches == broken.at else "",
                }
                for point in points
            ]
        _counts(axes, decays)
        axes.set(ylabel="edit success (0 to 1)", ylim=(-0.04, 1.05))
        more = [_key(axes, "right after each edit", "--")]
        if any(first.values()):
            ring = axes.scatter([], [], s=110, facecolors="none", edgecolors=INK, linewidths=1.3, label="broken")
            more.append(ring)
        legend_above(axes, 4, more)
    return Picture(f"success-{protocol}", drawn[0], rows)


def _ages(decays: Mapping[str, Decay], protocol: ProtocolName) -> Picture | None:
    """After the last patch, by how many were made since; the same edits right after each was made, dashed."""
    found = {label: decay.ages(protocol) for label, decay in decays.items()}
    bins = sorted({(one.youngest, one.oldest) for own in found.values() for one in own})
    # The last bin ends with the longest sequence; of shorter ones it is the same bin.
    names = {youngest: _span(youngest, max(end for start, end in bins if start == youngest)) for youngest, _ in bins}
    places = {youngest: place for place, youngest in enumerate(sorted(names))}
    rows: list[Row] = [
        {
            "method": label,
            "youngest": one.youngest,
            "oldest": one.oldest,
            "edits": one.edits,
            "now": one.now,
            "at_edit": one.at_edit,
        }
        for label, own in found.items()
        for one in own
    ]
    if len(places) < 2:
        return None
    with figure(HEIGHT, f"Success by age, {protocol} protocol", WIDTH) as (axes, drawn):
        for i, (label, own) in enumerate(found.items()):
            _line(axes, i, label, [(places[one.youngest], one.now) for one in own])
            _dashed(axes, i, [(places[one.youngest], one.at_edit) for one in own])
        axes.set_xticks(list(places.values()), [names[youngest] for youngest in places])
        axes.set(xlabel="patches made since", ylabel="success after the last patch (0 to 1)", ylim=(-0.04, 1.05))
        legend_above(axes, 4, [_key(axes, "right after each edit", "--")])
    return Picture(f"age-{protocol}", drawn[0], rows)


def _span(youngest: int, oldest: int) -> str:
    return f"{youngest}" if youngest >= oldest else f"{youngest}–{oldest}"


def _score(decays: Mapping[str, Decay], protocol: ProtocolName, score: str, label: str) -> Picture | None:
    lines = {
        method: [(float(point.patches), getattr(point, score)) for point in decay.points(protocol)]
        for method, decay in decays.items()
    }
    if all(value is None for line in lines.values() for _, value in line):
        return None
    rows = [{"method": m, "patches": int(at), score: value} for m, line in lines.items() for at, value in line]
    with figure(HEIGHT, f"{label.capitalize()} in sequence, {protocol} protocol", WIDTH) as (axes, drawn):
        for i, (method, line) in enumerate(lines.items()):
            _line(axes, i, method, line)
        _counts(axes, decays)
        axes.set(ylabel=label)
        if score == "fluency":
            most = max(value for line in lines.values() for _, value in _known(line))
            axes.set_ylim(0, 1.08 * most or 1)
        else:
            axes.set(ylabel=f"{label} (0 to 1)", ylim=(-0.04, 1.05))
        legend_above(axes, 4)
    return Picture(f"{score}-{protocol}", drawn[0], rows)


def _vital(
    decays: Mapping[str, Decay],
    name: str,
    column: str,
    label: str,
    title: str,
    limit: float | None = None,
    *,
    log: bool,
) -> Picture | None:
    """One measure of the model against the number of patches; on a logarithmic axis, what is zero or infinite has no mark."""
    measured = {m: [(point.patches, _vitals(point)) for point in decay.checkpoints] for m, decay in decays.items()}
    rows: list[Row] = [{"method": m, "patches": at, **found} for m, own in measured.items() for at, found in own]
    lines: dict[str, list[tuple[int, Any]]] = {
        m: [(at, found[column]) for at, found in own] for m, own in measured.items()
    }
    values = [value for line in lines.values() for _, value in line if value is not None]
    # An axis on which nothing can be shown, such as the weights' change of methods that leave them, is no picture.
    if not any(not log or (value > 0 and math.isfinite(value)) for value in values):
        return None
    with figure(HEIGHT, title, WIDTH) as (axes, drawn):
        for i, (method, line) in enumerate(lines.items()):
            nowhere = log and not any(value and math.isfinite(value) for _, value in line)
            shown = f"{method} (none)" if nowhere and not any(value for _, value in line) else method
            _line(axes, i, shown, [(at, value if value or not log else None) for at, value in line])
        _counts(axes, decays)
        axes.set(ylabel=label)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(-0.04, 1.05)
        more = []
        if limit is not None:
            axes.axhline(limit, color=INK, linestyle=":", linewidth=1.2, alpha=0.8)
            more.append(_key(axes, f"limit {limit:g}", ":"))
        if log:
            scaled(axes)
        legend_above(axes, 4, more)
    return Picture(name, drawn[0], rows)


def _line(axes: Any, index: int, label: str, points: Sequence[tuple[float, float | None]]) -> None:
    known = _known(points)
    axes.plot(
        [at for at, _ in known],
        [value for _, value in known],
        **marked(index, linewidth=1.7),
        label=label,
        zorder=3,
    )


def _dashed(axes: Any, index: int, points: Sequence[tuple[float, float | None]]) -> None:
    known = _known(points)
    style = {"color": colour(index), "linestyle": (0, (4, 3)), "linewidth": 1.1, "alpha": 0.75, "zorder": 2}
    axes.plot([at for at, _ in known], [value for _, value in known], **style)


def _known(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    return [(at, value) for at, value in points if value is not None and math.isfinite(value)]


def _counts(axes: Any, decays: Mapping[str, Decay]) -> None:
    """A logarithmic axis with a tick at each checkpoint that has room for its number."""
    counts = sorted({checkpoint.patches for decay in decays.values() for checkpoint in decay.checkpoints})
    ticks: list[int] = []
    for count in reversed(counts):  # the last one is always named
        if not ticks or math.log(ticks[-1] / count) > 0.04 * math.log(max(2, counts[-1] / counts[0])):
            ticks.append(count)
    counted(axes, ticks)
    axes.set(xlabel="patches asked for, all that were made kept")


def _key(axes: Any, label: str, style: str) -> Any:
    """An entry of the legend for what is not a method."""
    (line,) = axes.plot([], [], color=INK, linestyle=style, linewidth=1.2, label=label)
    return line
