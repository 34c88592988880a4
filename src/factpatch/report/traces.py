"""Causal traces as heat maps, and the rows of numbers beside them."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from factpatch.analysis.tracing import ROLES, AverageTrace, Part, Trace
from factpatch.report.picture import Cell
from factpatch.report.plots import COLOURS, WIDTH, figure
from factpatch.words import counted

__all__ = ["average_map", "average_rows", "part_name", "shown_token", "trace_map", "trace_rows"]

_NAMES: dict[Part, str] = {"state": "block output", "mlp": "MLP output", "attention": "attention output"}
_COLOURS: dict[Part, str] = {"state": COLOURS[4], "mlp": COLOURS[2], "attention": COLOURS[7]}
_HARM = COLOURS[5]
"""Where restoring makes the answer less likely."""

_TITLE = 60
"""Characters in a line of the title."""
_LONGEST = 24
"""Of a token's text, in characters."""


def part_name(part: Part, window: int) -> str:
    """What is restored, in words."""
    return _NAMES[part] if window == 1 else f"{window} {_NAMES[part]}s"


def shown_token(text: str) -> str:
    """A token as one short line: white space that is all of it, and breaks, are made visible."""
    told = text.replace("\n", "⏎").replace("\t", "⇥")
    told = told.strip(" ") or "␣" * len(told)
    return told if len(told) <= _LONGEST else told[: _LONGEST - 1] + "…"


def trace_map(trace: Trace) -> str:
    """One fact: tokens down, those that are harmed starred; blocks across."""
    first, end = trace.subject
    names = [
        shown_token(text) + (" *" if first <= i < end else "  ") for i, text in enumerate(trace.tokens)
    ]  # the blanks keep the texts in line
    p = f'p("{shown_token(trace.asked)}")' if trace.asked else "p"
    asked = textwrap.fill(f'"{" ".join(trace.fact.prompt.split())}" → {shown_token(trace.fact.answer)}', _TITLE)
    title = f"{asked}\n{p} {trace.clean:.2g} clean, {trace.corrupted:.2g} corrupted"
    return _map(trace.effects.tolist(), names, trace.part, trace.window, title, "token")


def average_map(average: AverageTrace) -> str:
    """The mean over facts: roles of tokens down, blocks across; roles that no fact has are left out."""
    shown = [i for i, count in enumerate(average.counts) if count]
    counts = ["" if count == average.facts else f"\n{counted(count, 'fact')}" for count in average.counts]
    names = [ROLES[i] + (" *" if i < 3 else "  ") + counts[i] for i in shown]
    title = f"{counted(average.facts, 'fact')}; p(answer) {average.clean:.2g} clean, {average.corrupted:.2g} corrupted"
    return _map([average.effects[i].tolist() for i in shown], names, average.part, average.window, title, "role")


def _map(cells: Sequence[Sequence[float]], names: Sequence[str], part: Part, window: int, title: str, down: str) -> str:
    layers = len(cells[0])
    values = [value for row in cells for value in row]
    low, high = min(0.0, *values), max(0.0, *values)
    most = max(-low, high) or 1.0
    height = 1.3 + 0.2 * (title.count("\n") + sum(1 + name.count("\n") for name in names))
    with warnings.catch_warnings():
        # The picture keeps texts as texts, and the reader's own fonts show them.
        warnings.filterwarnings("ignore", "Glyph")
        with figure(max(2.4, height), f"Causal trace, {part}", max(WIDTH, 1.9 + 0.13 * layers)) as (axes, drawn):
            colours: Any = import_module("matplotlib.colors")
            shades = colours.LinearSegmentedColormap.from_list("effects", [_HARM, "#ffffff", _COLOURS[part]])
            mesh = axes.pcolormesh(cells, cmap=shades, vmin=-most, vmax=most, edgecolors="face", linewidth=0.3)
            axes.invert_yaxis()
            axes.grid(visible=False)
            axes.tick_params(length=0)
            axes.set_yticks([i + 0.5 for i in range(len(names))], [name.replace("$", r"\$") for name in names])
            ticks = range(0, layers, max(1, math.ceil(layers / 12)))
            axes.set_xticks([i + 0.5 for i in ticks], [str(i) for i in ticks])
            axes.set_xlabel(_across(part, window))
            axes.set_ylabel(f"{down} (* with noise)")
            axes.set_title(title.replace("$", r"\$"), fontsize=10)
            bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.06)
            bar.set_label("p(answer) restored - corrupted", fontsize=9)
            bar.ax.set_ylim(low, high or most)
            bar.outline.set_visible(False)
    return drawn[0]


def _across(part: Part, window: int) -> str:
    name = _NAMES[part].removeprefix("block ")
    if window == 1:
        return f"block whose {name} is restored"
    return f"centre of {window} blocks whose {name}s are restored"


def trace_rows(trace: Trace) -> list[dict[str, Cell]]:
    """A row for each token and block."""
    first, end = trace.subject
    return [
        {
            "token": i,
            "text": text,
            "corrupted": first <= i < end,
            "block": layer,
            "window": trace.window,
            "p_clean": trace.clean,
            "p_corrupted": trace.corrupted,
            "p_restored": p,
            "effect": effect,
        }
        for i, text in enumerate(trace.tokens)
        for layer, (p, effect) in enumerate(zip(trace.restored[i].tolist(), trace.effects[i].tolist(), strict=True))
    ]


def average_rows(average: AverageTrace) -> list[dict[str, Cell]]:
    """A row for each role that some fact has, and each block; no error where fewer than two facts have it."""
    return [
        {
            "role": role,
            "facts": count,
            "block": layer,
            "window": average.window,
            "effect": effect,
            "standard_error": None if math.isnan(error) else error,
        }
        for role, count, effects, errors in zip(
            ROLES, average.counts, average.effects.tolist(), average.errors.tolist(), strict=True
        )
        if count
        for layer, (effect, error) in enumerate(zip(effects, errors, strict=True))
    ]
