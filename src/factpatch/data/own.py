"""One's own edits: JSON lines, a JSON list or a CSV table; and JSON lines out again.

JSON holds edits as `Edit.to_json` writes them. A CSV table has a header and the columns of an edit that are plain
texts; several texts in one cell are separated by `|`. An edit without an id gets the file's stem and its number.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

from factpatch.data.records import Record, Source
from factpatch.edits import Edit
from factpatch.errors import BadFile, did_you_mean
from factpatch.files import parse_json, whole_file

__all__ = ["SUFFIXES", "own", "write_jsonl"]

_COLUMNS = ("id", "kind", "prompt", "target", "subject", "ground_truth", "rephrases")
_SEVERAL = {"ground_truth", "rephrases"}


def own(source: Source) -> Iterator[Record]:
    """One's own edits; the ending of the file's name tells the form."""
    form = _FORMS.get(source.path.suffix.lower())
    if form is None:
        raise BadFile(f"{source.path}: expected a name ending in {', '.join(SUFFIXES)}.\n  Rename or convert it.")
    return form(source)


def write_jsonl(edits: Iterable[Edit], path: str | Path) -> None:
    """Write edits, one JSON object a line; the file is there whole or not at all. `read(path)` gives them back.

    Raises OutputError if the place cannot be written.
    """
    with whole_file(Path(path)) as draft, draft.open("w", encoding="utf-8", newline="\n") as file:
        for edit in edits:
            file.write(json.dumps(edit.to_json(), ensure_ascii=False) + "\n")


def _json(source: Source) -> Iterator[Record]:
    for number, raw in enumerate(source.raws()):
        yield _record(source, number, raw)


def _jsonl(source: Source) -> Iterator[Record]:
    # Not splitlines(), which would also cut at the line separators that a JSON text may hold.
    lines = [(place, line) for place, line in enumerate(source.text.split("\n"), 1) if line.strip()]
    for number, (place, line) in enumerate(lines):
        yield _line(source, number, place, line)


def _line(source: Source, number: int, place: int, line: str) -> Record:
    try:
        return _record(source, number, parse_json(line))
    except json.JSONDecodeError as error:
        problem = f"line {place}, column {error.colno}: expected one JSON object ({error.msg})"
    except ValueError as error:
        problem = f"line {place}: expected one JSON object ({error})"
    return Record(number, line, partial(_refuse, source, number, problem))


def _csv(source: Source) -> Iterator[Record]:
    rows = csv.reader(io.StringIO(source.text, newline=""), strict=True)
    try:
        header = _header(source, next(rows, []))
        for number, row in enumerate(row for row in rows if row):
            yield _row(source, number, header, row)
    except csv.Error as error:
        raise BadFile(
            f"{source.path}, line {rows.line_num}: expected a table with commas ({error}).\n"
            '  Put a text with commas or line ends in "double quotes", and double the quotes inside it.'
        ) from None


def _header(source: Source, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    known = f"  Columns separated by commas; prompt and target must be there: {', '.join(_COLUMNS)}"
    for name in header:
        if name not in _COLUMNS:
            raise BadFile(
                f'{source.path}: no field of an edit for column "{name}".{did_you_mean(name, _COLUMNS)}\n{known}'
            )
        if header.count(name) > 1:
            raise BadFile(f'{source.path}: column "{name}" is there twice.\n{known}')
    for name in ("prompt", "target"):
        if name not in header:
            raise BadFile(f'{source.path}: no column "{name}" in the first line.\n{known}')
    return header


def _row(source: Source, number: int, header: list[str], row: list[str]) -> Record:
    if len(row) != len(header):
        problem = f"expected {len(header)} cells, as in the first line, found {len(row)}"
        return Record(number, row, partial(_refuse, source, number, problem))
    cells = {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}
    return _record(source, number, cells | {name: split_cell(cells[name]) for name in _SEVERAL & cells.keys()})


def split_cell(cell: str) -> list[str]:
    """The texts of one cell."""
    return [text for text in cell.split("|") if text.strip()]


def _record(source: Source, number: int, raw: object) -> Record:
    named = {"id": f"{source.path.stem}-{number}", **raw} if isinstance(raw, dict) else raw
    return Record(number, raw, partial(Edit.model_validate, named))


def _refuse(source: Source, number: int, problem: str) -> NoReturn:
    raise source.bad_record(number, "record", problem)


_FORMS: dict[str, Callable[[Source], Iterator[Record]]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
SUFFIXES = tuple(_FORMS)
