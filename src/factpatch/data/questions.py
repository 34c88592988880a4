"""Questions that are to be answered as before: one's own, and a built-in few dozen with some neutral texts."""

from __future__ import annotations

import csv
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from factpatch.data.own import split_cell
from factpatch.edits import Probe, brief, first_problem
from factpatch.errors import BadFile, BadRecord
from factpatch.files import parse_json, read_whole

__all__ = ["guard_questions", "guard_texts", "read_questions"]

_FORMS = "one question a line (.txt), or records with prompt and, if they are known, answers (.jsonl, .json, .csv)"


def guard_questions() -> tuple[Probe, ...]:
    """General knowledge that no edit should touch; our own."""
    return tuple(Probe(**record) for record in _guard()["questions"])


def guard_texts() -> tuple[str, ...]:
    """Short texts about nothing in particular, to take the perplexity of; our own."""
    return tuple(_guard()["texts"])


def _guard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files("factpatch.data").joinpath("guard.json").read_text(encoding="utf-8"))
    return found


def read_questions(path: Path) -> tuple[Probe, ...]:
    """The questions of a file, each once. Raises BadFile, BadRecord."""
    try:
        text = read_whole(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file.\n  Expected {_FORMS}.") from None
    except (OSError, ValueError) as error:
        raise BadFile(f"{path}: cannot be read ({error}).\n  Expected {_FORMS}.") from None
    probes = [_probe(path, number, record) for number, record in enumerate(_records(path, text))]
    if not probes:
        raise BadFile(f"{path}: holds no question.\n  Expected {_FORMS}.")
    return tuple(dict.fromkeys(probes))


def _records(path: Path, text: str) -> list[object]:
    form = path.suffix.lower()
    try:
        if form == ".txt":
            return [{"prompt": line} for line in text.splitlines() if line.strip()]
        if form == ".csv":
            rows = csv.DictReader(io.StringIO(text))
            cells = [{key: value for key, value in row.items() if value} for row in rows]
            return [
                {key: split_cell(value) if key == "answers" else value for key, value in row.items()} for row in cells
            ]
        if form == ".jsonl":
            # Not splitlines(), which would also cut at the line separators that a JSON text may hold.
            return [parse_json(line) for line in text.split("\n") if line.strip()]
        if form == ".json":
            value = parse_json(text)
            return value if isinstance(value, list) else [value]
    except (ValueError, csv.Error) as error:
        what = "a table with commas" if form == ".csv" else "JSON"
        raise BadFile(f"{path}: expected {what} ({error}).\n  Expected {_FORMS}.") from None
    raise BadFile(f'{path}: of an unknown form "{form}".\n  Expected {_FORMS}.')


def _probe(path: Path, number: int, record: object) -> Probe:
    if not isinstance(record, dict):
        raise BadRecord(str(path), number, "record", f"expected an object with a prompt, found {brief(record)}")
    known = {key: record[key] for key in ("prompt", "answers") if key in record}
    try:
        return Probe(**known)
    except ValidationError as error:
        raise BadRecord(str(path), number, *first_problem(error)) from None
