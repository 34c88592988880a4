"""Markdown tables, and pages from the templates beside this file, which load nothing from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from factpatch.errors import MissingExtra

__all__ = ["markdown_table", "number", "rendered"]


def number(value: float | None, digits: int = 3) -> str:
    """A dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """Its lines; columns of numbers, which are all but the first, stand on the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(heads) - 1)]
    cells = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *cells)]


def rendered(template: str, **values: Any) -> str:
    """The page that this template makes of the values. Raises MissingExtra without Jinja."""
    try:
        jinja: Any = import_module("jinja2")
    except ImportError:
        raise MissingExtra(
            "A page needs Jinja, which is not installed.\n  Install it: pip install 'factpatch[report]'"
        ) from None
    environment = jinja.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja.StrictUndefined
    )
    environment.filters |= {"number": number, "title": lambda name: name.replace("_", " ")}
    texts = {
        name: files("factpatch.report").joinpath(name).read_text(encoding="utf-8")
        for name in (template, "page.css", "page.js")
    }
    made = f"factpatch {version('factpatch')}, {date.today()}"
    page: str = environment.from_string(texts[template]).render(
        style=texts["page.css"], script=texts["page.js"], made=made, **values
    )
    return page
