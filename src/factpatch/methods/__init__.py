"""Editing methods by name: our own, and those that other packages add by entry point.

A third party's package adds one without touching this repository:

    [project.entry-points."factpatch.methods"]
    my-method = "my_package.my_module:MyMethod"
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract
from pkgutil import iter_modules
from typing import Any

from factpatch.errors import BadConfig, UnknownMethod, did_you_mean
from factpatch.methods.base import Config, Method, Preset, Traits

__all__ = ["Config", "Method", "Preset", "Traits", "create", "find", "names"]


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted({*_own(), *(point.name for point in _foreign())})


def find(name: str) -> type[Method[Any]]:
    """The method of this name. Raises UnknownMethod with the nearest name and all names."""
    if name in _own():
        return _own()[name]
    for point in _foreign():
        if point.name == name:
            found: type[Method[Any]] = point.load()
            return found
    raise UnknownMethod(
        f'no method "{name}".{did_you_mean(name, names())}\n  All of them: {", ".join(names())}  (factpatch methods)'
    )


def create(name: str, settings: Mapping[str, Any] | None = None, **more: Any) -> Method[Any]:
    """A method with these settings, given as a mapping or by name; texts are read as the setting's type.

    Raises UnknownMethod, BadConfig.
    """
    return find(name)(**{**(settings or {}), **more})


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """`key=value` texts as a mapping. Raises BadConfig."""
    parsed: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise BadConfig(f'"{pair}": expected key=value, such as --set steps=10')
        parsed[key.strip().replace("-", "_")] = value.strip()
    return parsed


@cache
def _own() -> dict[str, type[Method[Any]]]:
    """Every class in this package's files that has a name and writes `make`."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {
        each.name: each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Method) and hasattr(each, "name") and not isabstract(each)
    }


def _foreign() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group="factpatch.methods"))
