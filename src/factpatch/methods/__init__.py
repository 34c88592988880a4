"""Editing methods by name: our own, and those that other packages add by entry point.

A third party's package adds one without touching this repository:

    [project.entry-points."factpatch.methods"]
    my-method = "my_package.my_module:MyMethod"
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from factpatch.errors import BadConfig, UnknownMethod, did_you_mean
from factpatch.methods.base import Config, Method, Preset, Traits

__all__ = ["Config", "Method", "Preset", "Traits", "create", "find", "names"]

_OWN = {
    "ft-l": "factpatch.methods.ft:FtL",
    "ft-m": "factpatch.methods.ft:FtM",
    "r-rome": "factpatch.methods.rome:RRome",
    "rome": "factpatch.methods.rome:Rome",
}


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted({*_OWN, *(point.name for point in _foreign())})


def find(name: str) -> type[Method[Any]]:
    """The method of this name. Raises UnknownMethod with the nearest name and all names."""
    where = _OWN.get(name) or next((point.value for point in _foreign() if point.name == name), None)
    if where is None:
        raise UnknownMethod(
            f'no method "{name}".{did_you_mean(name, names())}\n  All of them: {", ".join(names())}  (factpatch methods)'
        )
    module, _, attribute = where.partition(":")
    found: type[Method[Any]] = getattr(import_module(module), attribute)
    return found


def create(name: str, settings: Mapping[str, Any] | None = None) -> Method[Any]:
    """A method with these settings; texts are read as the setting's type, as from a command line.

    Raises UnknownMethod, BadConfig.
    """
    return find(name)(**dict(settings or {}))


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """`key=value` texts as a mapping. Raises BadConfig."""
    parsed: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise BadConfig(f'"{pair}": expected key=value, such as --set steps=10')
        parsed[key.strip().replace("-", "_")] = value.strip()
    return parsed


def _foreign() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group="factpatch.methods"))
