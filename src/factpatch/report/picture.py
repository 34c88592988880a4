"""A picture on disk, with the numbers it was drawn from beside it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from factpatch.files import whole_file
from factpatch.report.plots import standalone

__all__ = ["save_picture", "save_table"]

Cell = str | int | float | bool | None


def save_picture(folder: Path, name: str, svg: str, rows: Sequence[Mapping[str, Cell]]) -> Path:
    """Write `<name>.svg` and `<name>.csv` into a folder that exists; the picture's path. Raises OutputError."""
    save_table(folder / f"{name}.csv", rows)
    path = folder / f"{name}.svg"
    with whole_file(path) as draft:
        draft.write_text(standalone(svg), encoding="utf-8")
    return path


def save_table(path: Path, rows: Iterable[Mapping[str, Cell]]) -> None:
    """Write rows as CSV, with a column for each key in the order in which they first appear; None is left empty."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
