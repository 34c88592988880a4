"""Plots as SVG texts that take the colour of the page they stand in; numbers in, a picture out."""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from factpatch.errors import MissingExtra

__all__ = [
    "Bar",
    "bars",
    "check_drawable",
    "colour",
    "counted",
    "curves",
    "figure",
    "grouped_bars",
    "legend_above",
    "marked",
    "round_counts",
    "scaled",
    "scatter",
    "standalone",
]

Bar = tuple[float, tuple[float, float] | None]
"""A value and its interval."""

INK = "#123456"
"""Stands for the colour of the page's text, which is not known here."""
COLOURS = ("#3b7dd8", "#d9822b", "#2e9e6b", "#c2417c", "#8a63d2", "#a08a2c", "#1f9aa8", "#c8503c", "#6b8e23", "#7a7f87")
MARKS = "osD^vPX<>*"
WIDTH = 5.4
MOST_NAMES = 12
"""At one mark."""


def colour(index: int) -> str:
    """One of ten, over and over."""
    return COLOURS[index % len(COLOURS)]


def _mark(index: int) -> str:
    """With its colour told from ninety-nine others."""
    return MARKS[(index // 10 + index) % len(MARKS)]


def marked(index: int, linewidth: float = 1.4) -> dict[str, Any]:
    """How one of many lines is told from the others: a colour and a mark, of which the pair comes again after a hundred."""
    return {"color": colour(index), "marker": _mark(index), "markersize": 5, "linewidth": linewidth}


def legend_above(axes: Any, columns: int = 3, more: Sequence[Any] = ()) -> None:
    """Above the plot: what is drawn, then `more`, handles of what else there is to know."""
    handles = [handle for handle in axes.get_legend_handles_labels()[0] if not any(handle is other for other in more)]
    axes.legend(
        handles=[*handles, *more],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
    )


def counted(axes: Any, counts: Sequence[float]) -> None:
    """A logarithmic axis across, with ticks at these numbers alone."""
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,g}" for count in counts], minor=False)
    axes.set_xticks([], minor=True)


def round_counts(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 and so on, up to a number."""
    return [
        count for power in range(len(str(most))) for count in (10**power, 2 * 10**power, 5 * 10**power) if count <= most
    ]


def scaled(axes: Any) -> None:
    """A logarithmic axis upwards, with some ticks, all named by plain numbers of one size, however short it is.

    Called when everything is drawn. Where all lies at one height, the axis goes from half of that to twice as much.
    """
    axes.set_yscale("log")
    bottom, top = axes.dataLim.intervaly
    bottom = min(axes.dataLim.minposy, top)
    if not 0 < bottom <= top < math.inf:
        return
    bottom, top = (bottom / 2, top * 2) if top / bottom < 1.05 else axes.get_ylim()
    axes.set_ylim(bottom, top)
    ticks = next((found for fine in _MANTISSAS if len(found := _log_ticks(bottom, top, fine)) >= 3), None)
    if ticks is None:
        ticks = [tick for tick in _rounded(bottom, top) if bottom <= tick <= top]
    every = math.ceil(len(ticks) / 8)
    axes.set_yticks(ticks[::every], [_plain(tick) for tick in ticks[::every]])
    axes.set_yticks([], minor=True)


_MANTISSAS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))
"""Of the ticks of a logarithmic axis, the coarser first."""


def _log_ticks(bottom: float, top: float, mantissas: Sequence[float]) -> list[float]:
    """Those that lie on the axis; rounded, so that 0.3 is that."""
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    ticks = (float(f"{mantissa}e{power}") for power in powers for mantissa in mantissas)
    return [tick for tick in ticks if bottom <= tick <= top]


def _rounded(bottom: float, top: float) -> list[float]:
    """Round numbers at equal distances, of which some three or four lie on an axis."""
    coarse = 10.0 ** math.floor(math.log10(top - bottom))
    step = next(coarse * part for part in (1, 0.5, 0.25, 0.2, 0.1) if (top - bottom) / (coarse * part) >= 3)
    return [float(f"{i * step:.12g}") for i in range(math.floor(bottom / step), math.ceil(top / step) + 1)]


def _plain(value: float) -> str:
    """0.06 or 300; what is very small or great as a power of ten."""
    if 1e-4 <= value < 1e6:
        return f"{value:,g}" if value < 1e4 else f"{value:,.0f}"
    mantissa, power = f"{value:e}".split("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = f"{float(mantissa):g}"
    return f"10{raised}" if factor == "1" else f"{factor} × 10{raised}"


def check_drawable() -> None:
    """Raise MissingExtra if nothing can be drawn: asked before long work, not only after it."""
    _matplotlib()


def _matplotlib() -> tuple[Any, Any]:
    """Matplotlib and its figures. Raises MissingExtra."""
    try:
        return import_module("matplotlib"), import_module("matplotlib.figure")
    except ImportError:
        raise MissingExtra(
            "A page with plots needs Matplotlib, which is not installed.\n  Install it: pip install 'factpatch[report]'"
        ) from None


@contextmanager
def figure(height: float, title: str, width: float = WIDTH) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on, of so many inches; the list holds the SVG text afterwards. Raises MissingExtra."""
    matplotlib, figures = _matplotlib()
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "factpatch",
        "font.family": "sans-serif",
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    drawn: list[str] = []
    with matplotlib.rc_context(style):
        canvas = figures.Figure(figsize=(width, height), layout="constrained")
        axes = canvas.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, alpha=0.18, color=INK, linewidth=0.6)
        axes.set_axisbelow(True)
        yield axes, drawn
        text = io.StringIO()
        canvas.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    drawn.append(_bare(text.getvalue(), title))


def _bare(svg: str, title: str) -> str:
    """Only the picture, as wide as it may be, in the colour of the text around it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = f' role="img" aria-label="{html.escape(title)}"'
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', lambda found: found[1] + label, svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor")


def standalone(svg: str) -> str:
    """A picture as a file of its own, which has no page to take its colour from: dark on light, or light on dark."""
    style = "<style>svg{color:#24292f}@media (prefers-color-scheme:dark){svg{color:#d0d7de}}</style>"
    at = svg.index(">", svg.index("<svg")) + 1
    return svg[:at] + style + svg[at:]


def scatter(points: Mapping[str, tuple[float, float]], x: str, y: str, title: str) -> str:
    """A mark for each point, with the names of all that lie in one place; both axes go from 0 to 1."""
    with figure(4.0, title) as (axes, drawn):
        for i, (across, up) in enumerate(points.values()):
            axes.scatter(across, up, color=colour(i), marker=_mark(i), s=46, zorder=3)
        # A mark takes room too, but for the one that is being named.
        marks = {place: _Box(place[0] - 0.015, place[1] - 0.02, 0.03, 0.04) for place in points.values()}
        taken: list[_Box] = []
        leaders: list[_Leader] = []
        for (across, up), names in _by_place(points).items():
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            text = textwrap.fill(", ".join(names[:MOST_NAMES]) + more, 30)
            side = -1 if across > 0.55 else 1
            width, height = 0.0155 * max(map(len, text.splitlines())), 0.042 * (text.count("\n") + 1)
            others = [*taken, *(box for place, box in marks.items() if not _near(place, (across, up)))]

            box = min(
                (
                    _Box(
                        across + side * (0.022 + out) - (width if side < 0 else 0), up + off - height / 2, width, height
                    )
                    for out, off in _TRIES
                    if up + off - height / 2 >= -0.13 and up + off + height / 2 <= 1.04
                ),
                key=partial(_hidden, at=(across, up), side=side, others=others, leaders=leaders),
                default=_Box(across + side * 0.022 - (width if side < 0 else 0), up - height / 2, width, height),
            )
            taken.append(box)
            leader = box.leader((across, up), side)
            leaders += [leader] if leader else []
            edge, middle = box.left + (width if side < 0 else 0), box.bottom + height / 2
            is_far = leader is not None
            axes.annotate(
                text, (across, up), (edge, middle), fontsize=8.5, va="center", ha="right" if side < 0 else "left",
                arrowprops={"arrowstyle": "-", "color": INK, "alpha": 0.4, "lw": 0.6} if is_far else None,
            )  # fmt: skip
        axes.set(xlim=(-0.03, 1.05), ylim=(-0.14, 1.05), xlabel=x, ylabel=y)
    return drawn[0]


_TRIES = sorted(
    ((0.04 * n, 0.01 * m) for n in range(13) for m in range(-40, 41)),
    key=lambda shift: math.hypot(shift[0], 4 * shift[1]),
)
"""How far a name may be moved away from its mark and up. Sideways first: higher or lower it would stand at another mark."""


@dataclass(frozen=True, slots=True)
class _Box:
    """Where something stands, in units of the axes."""

    left: float
    bottom: float
    width: float
    height: float

    def meets(self, other: _Box) -> bool:
        """Whether two of them lie over each other."""
        across = self.left < other.left + other.width and other.left < self.left + self.width
        return across and self.bottom < other.bottom + other.height and other.bottom < self.bottom + self.height

    def leader(self, mark: tuple[float, float], side: int) -> _Leader | None:
        """The line from a mark to the name that stands here, on this side of it; none where they are near."""
        edge, middle = self.left + (self.width if side < 0 else 0), self.bottom + self.height / 2
        return _Leader(mark, (edge, middle)) if math.hypot(edge - mark[0], middle - mark[1]) > 0.06 else None


def _hidden(
    box: _Box, *, at: tuple[float, float], side: int, others: Sequence[_Box], leaders: Sequence[_Leader]
) -> int:
    """How much would lie over others if a name stood here; of equals the first is taken, which is the nearest."""
    own = box.leader(at, side)
    struck = sum(map(own.meets, others)) if own else 0
    return sum(map(box.meets, others)) + struck + sum(leader.meets(box) for leader in leaders)


@dataclass(frozen=True, slots=True)
class _Leader:
    """A line from a mark to its name."""

    start: tuple[float, float]
    end: tuple[float, float]

    def meets(self, box: _Box) -> bool:
        """Whether it goes through what stands there; looked at in fifty places."""
        (x, y), (to_x, to_y) = self.start, self.end
        return any(
            box.left < x + (to_x - x) * part < box.left + box.width
            and box.bottom < y + (to_y - y) * part < box.bottom + box.height
            for part in (i / 50 for i in range(51))
        )


def _near(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return abs(one[0] - other[0]) < 0.02 and abs(one[1] - other[1]) < 0.03


def _by_place(points: Mapping[str, tuple[float, float]]) -> dict[tuple[float, float], list[str]]:
    """The names of points that cannot be told apart by eye, by the place of the first; from the top down."""
    found: dict[tuple[float, float], list[str]] = {}
    for name, place in sorted(points.items(), key=lambda item: (-item[1][1], item[0])):
        at = next((known for known in found if _near(known, place)), place)
        found.setdefault(at, []).append(name)
    return found


def bars(values: Mapping[str, float], x: str, title: str, *, log: bool = False) -> str:
    """A bar with its number for each name, the first on top."""
    with figure(0.8 + 0.27 * len(values), title) as (axes, drawn):
        names, widths = list(values), list(values.values())
        axes.barh(names, widths, color=colour(0), height=0.66)
        for i, width in enumerate(widths):
            axes.annotate(f" {width:.3g}", (width, i), va="center", fontsize=8.5)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=x)
        axes.margins(x=0.12)
        if log:
            axes.set_xscale("log")
    return drawn[0]


def grouped_bars(
    values: Mapping[str, Mapping[str, Bar]], x: str, title: str, *, width: float = WIDTH, columns: int = 3
) -> str:
    """For each name a bar for each kind it has, with its interval if that is known; kinds are told apart by colour."""
    kinds = list(dict.fromkeys(kind for own in values.values() for kind in own))
    thick = 0.8 / max(1, len(kinds))
    with figure(1.3 + 0.16 * len(values) * (len(kinds) + 1), title, width) as (axes, drawn):
        for k, kind in enumerate(kinds):
            own = {
                i + (k - (len(kinds) - 1) / 2) * thick: of[kind] for i, of in enumerate(values.values()) if kind in of
            }
            lengths = [length for length, _ in own.values()]
            axes.barh(list(own), lengths, height=thick * 0.9, color=colour(k), label=kind)
            for place, (_, interval) in own.items():
                if interval is not None:
                    axes.plot(interval, (place, place), color=INK, linewidth=1.1, alpha=0.75, solid_capstyle="butt")
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=x, xlim=(0, 1.02))
        legend_above(axes, columns)
    return drawn[0]


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, title: str) -> str:
    """A line for each name, over a logarithmic axis from its first point to its last."""
    with figure(3.6, title) as (axes, drawn):
        for i, (name, points) in enumerate(lines.items()):
            axes.plot(*zip(*points, strict=True), **marked(i, 1.6), label=name)
        counted(axes, sorted({across for points in lines.values() for across, _ in points}))
        axes.set(xlabel=x, ylabel=y, ylim=(-0.03, 1.05))
        legend_above(axes)
    return drawn[0]
