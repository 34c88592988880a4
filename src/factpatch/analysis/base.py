"""What results of analyses have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["Result", "digest", "mean_over", "packages"]


class Result(BaseModel):
    """A value that may be written as JSON, which knows no infinite numbers: these become strings there."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


def mean_over(values: Mapping[str, float], ids: Iterable[str]) -> float | None:
    """The mean of the values of these ids, which may repeat; those without one are left out, and of none it is None."""
    found = [values[one] for one in ids if one in values]
    return fmean(found) if found else None


def digest(value: Any) -> str:
    """SHA-256 of what JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def packages() -> dict[str, str]:
    """The versions of those that decide numbers, by name."""
    return {name: version(name) for name in ("factpatch", "torch", "transformers")}
