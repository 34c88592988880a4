"""The curve of `factpatch locate`: how well edits do by block, beside what causal tracing finds there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from factpatch.analysis.locate import Located, Measures, Place
from factpatch.report.picture import Cell
from factpatch.report.plots import INK, colour, figure, legend_above
from factpatch.scoring.protocols import ProtocolName

__all__ = ["layer_rows", "layers_picture"]

_MEASURES = ("edit_success", "rephrase", "portability", "locality")
_MARKS = "sD^v"


def layers_picture(found: Located) -> str:
    """A panel for each protocol with its measures by block, and one for tracing; both choices are marked in all of them.

    A window of blocks stands at its middle one.
    """
    heights = [2.3, 1.9, *([1.5] if found.traced else [])]
    with figure(sum(heights) + 0.9, f"Where {found.method} edits {found.model} best", 6.4) as (axes, drawn):
        panels = _stacked(axes, heights)
        _draw_measures(panels[0], found, "open")
        _draw_measures(panels[1], found, "survey")
        if found.traced:
            _draw_tracing(panels[2], found.traced.effects)
        for panel in panels:
            _mark(panel, found)
        legend_above(panels[0])
        wide = len(found.places[0].layers) if found.places else 1
        panels[-1].set(xlabel="block" if wide == 1 else f"middle of {wide} blocks edited together; of tracing, block")
    return drawn[0]


def layer_rows(found: Located) -> list[dict[str, Cell]]:
    """A row for each block of the model that was tried or traced: what is drawn there, and what the choice rests on."""
    places = {place.block: place for place in found.places}
    effects = dict(enumerate(found.traced.effects)) if found.traced else {}
    rows = []
    for block in sorted({*places, *effects}):
        place = places.get(block)
        row: dict[str, Cell] = {
            "block": block,
            "layers": " ".join(map(str, place.layers)) if place else None,
            "score": place.score if place else None,
            "survey_score": place.survey_score if place else None,
            "support": place.support if place else None,
        }
        for protocol in ("open", "survey"):
            measures = _of(place, protocol).model_dump() if place else dict.fromkeys(_MEASURES)
            row |= {f"{protocol}_{name}": value for name, value in measures.items()}
        row |= {
            "refused": len(place.refused) if place else None,
            "chosen": place is not None and place.layers == found.chosen,
            "tracing_effect": effects.get(block),
            "tracing_suggests": found.traced is not None and found.traced.suggested == block,
        }
        rows.append(row)
    return rows


def _stacked(axes: Any, heights: Sequence[float]) -> list[Any]:
    """The axes and further ones beneath them, of these heights, over one horizontal axis."""
    grid = axes.figure.add_gridspec(len(heights), 1, height_ratios=heights)
    axes.set_subplotspec(grid[0])
    panels = [axes, *(axes.figure.add_subplot(grid[i], sharex=axes) for i in range(1, len(heights)))]
    for panel in panels[1:]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(visible=True, alpha=0.18, color=INK, linewidth=0.6)
        panel.set_axisbelow(True)
    for panel in panels[:-1]:
        panel.tick_params(labelbottom=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return panels


def _draw_measures(panel: Any, found: Located, protocol: ProtocolName) -> None:
    for i, name in enumerate(_MEASURES):  # the first are the largest, so that what lies upon them hides none
        points = _points(found.places, lambda place, name=name: getattr(_of(place, protocol), name))  # type: ignore[misc]
        label = name.replace("_", " ")
        panel.plot(
            *points, color=colour(i), marker=_MARKS[i], markersize=6.5 - 1.4 * i, linewidth=1, alpha=0.85, label=label
        )
    points = _points(found.places, lambda place: place.score if protocol == "open" else place.survey_score)
    panel.plot(*points, color=INK, marker="o", markersize=3, linewidth=2.2, label="score; the open one decides")
    panel.set(ylabel=f"{protocol} protocol", ylim=(-0.04, 1.06))


def _draw_tracing(panel: Any, effects: Sequence[float]) -> None:
    panel.bar(range(len(effects)), effects, color=colour(4), alpha=0.6, width=0.72)
    panel.axhline(0, color=INK, linewidth=0.6)
    panel.set(ylabel="indirect effect\n(probability)")


def _mark(panel: Any, found: Located) -> None:
    """Lines at what the sweep chose and what tracing suggests."""
    if found.best:
        panel.axvline(found.best.block, color=INK, linewidth=1.4, alpha=0.55, label="chosen by editing")
    if found.traced:
        panel.axvline(
            found.traced.suggested, color=colour(4), linewidth=1.6, linestyle=(0, (4, 2)), label="suggested by tracing"
        )


def _of(place: Place, protocol: str) -> Measures:
    return place.survey if protocol == "survey" else place.open


def _points(places: Sequence[Place], value: Callable[[Place], float | None]) -> tuple[list[int], list[float]]:
    """Blocks and numbers, where there are any."""
    found = [(place.block, number) for place in places if (number := value(place)) is not None]
    return [block for block, _ in found], [number for _, number in found]
