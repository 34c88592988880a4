"""What methods that learn, or show examples, learn from in the benchmarks: records that are never scored there."""

from __future__ import annotations

from collections.abc import Mapping

from factpatch.data import read
from factpatch.edits import Edit

__all__ = ["lessons_of"]


def lessons_of(data: Mapping[str, range]) -> list[Edit]:
    """The records of these numbers of each file, which goes as `NAME:PATH`; their ids say which file they are from."""
    return [
        edit.model_copy(update={"id": f"{spec.partition(':')[0]} {edit.id}"})
        for spec, taken in data.items()
        for edit in read(spec, start=taken.start, limit=len(taken)).edits
    ]
