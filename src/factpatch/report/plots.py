"""Plots as SVG texts that take the colour of the page they stand in; numbers in, a picture out."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from factpatch.errors import MissingExtra

__all__ = ["bars", "check_drawable", "colour", "curves", "figure", "grouped_bars", "scatter", "standalone"]

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
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
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
            axes.scatter(across, up, color=colour(i), marker=MARKS[(i // 10 + i) % len(MARKS)], s=46, zorder=3)
        # A mark takes room too, but for the one that is being named.
        marks = {place: _Box(place[0] - 0.015, place[1] - 0.02, 0.03, 0.04) for place in points.values()}
        taken: list[_Box] = []
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
                key=lambda box: sum(map(box.meets, others)),  # of equals the first, which is the nearest
                default=_Box(across + side * 0.022 - (width if side < 0 else 0), up - height / 2, width, height),
            )
            taken.append(box)
            edge, middle = box.left + (width if side < 0 else 0), box.bottom + height / 2
            is_far = math.hypot(edge - across, middle - up) > 0.06
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


def grouped_bars(values: Mapping[str, Mapping[str, float]], x: str, title: str) -> str:
    """For each name, a bar for each kind; kinds are told apart by colour."""
    kinds = list(dict.fromkeys(kind for own in values.values() for kind in own))
    thick = 0.8 / max(1, len(kinds))
    with figure(1.2 + 0.17 * len(values) * (len(kinds) + 1), title) as (axes, drawn):
        for k, kind in enumerate(kinds):
            places = [i + (k - (len(kinds) - 1) / 2) * thick for i in range(len(values))]
            widths = [own.get(kind, 0.0) for own in values.values()]
            axes.barh(places, widths, height=thick * 0.92, color=colour(k), label=kind.replace("_", " "))
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=x, xlim=(0, 1))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8.5)
    return drawn[0]


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, title: str) -> str:
    """A line for each name, over a logarithmic axis from its first point to its last."""
    with figure(3.6, title) as (axes, drawn):
        for i, (name, points) in enumerate(lines.items()):
            mark = MARKS[(i // 10 + i) % len(MARKS)]
            axes.plot(*zip(*points, strict=True), color=colour(i), marker=mark, markersize=5, linewidth=1.6, label=name)
        counts = sorted({across for points in lines.values() for across, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:g}" for count in counts], minor=False)
        axes.set_xticks([], minor=True)
        axes.set(xlabel=x, ylabel=y, ylim=(-0.03, 1.05))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8.5)
    return drawn[0]
