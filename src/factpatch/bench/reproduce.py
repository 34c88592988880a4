"""Recipes: the rows of published tables, each with all it takes to run it again and the values to expect.

Each is a YAML file beside this one: the fields of a `Grid`, and `expected`. `{knowedit}` stands for the folder of KnowEdit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from factpatch.bench.grid import Grid
from factpatch.errors import BadConfig

__all__ = ["Recipe", "grids_of", "recipes", "recipes_named"]

_KNOWEDIT = "{knowedit}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One method on one data set.

    expected  by score, what was published: percentages, fluency in hundredths of a bit, `kl` in nats
    """

    name: str
    fields: Mapping[str, Any]
    expected: Mapping[str, float]

    @property
    def model(self) -> str:
        """That the values were published for."""
        return str(self.fields["model"])

    @property
    def method(self) -> str:
        """By name."""
        return str(self.fields["methods"][0]["name"])

    @property
    def dataset(self) -> str:
        """By name."""
        return str(self.fields["data"][0].partition(":")[0])

    def is_for(self, model: str) -> bool:
        """Whether its settings are meant for this model: by name, wherever a copy of it lies."""
        return Path(model).name == Path(self.model).name

    def grid(self, knowedit: Path, **changed: Any) -> Grid:
        """The grid to run, with KnowEdit in this folder.

        changed  fields to put in place of the recipe's. For another model the method's settings are that model's own, but for
                 where its editor learns.
        """
        values = {**self.fields, **changed}
        if not self.is_for(values["model"]):
            values["methods"] = [_without_settings(spec) for spec in self.fields["methods"]]
        return Grid.make(_filled(values, str(knowedit)), f"recipe {self.name}")


def _without_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """But for where its editor learns."""
    return {
        "name": spec["name"],
        "settings": {k: v for k, v in spec.get("settings", {}).items() if _KNOWEDIT in str(v)},
    }


def grids_of(chosen: Sequence[Recipe], knowedit: Path, **changed: Any) -> list[tuple[Grid, list[Recipe]]]:
    """As few grids as there can be, so that the unedited model is asked once about each data set; and whose they are.

    The methods of a grid come in the order of its recipes. For `changed` see `Recipe.grid`.
    """
    found: dict[str, tuple[Grid, list[Recipe]]] = {}
    for recipe in chosen:
        grid = recipe.grid(knowedit, **changed)
        common = grid.model_dump_json(exclude={"methods"})
        if common in found:
            known, own = found[common]
            found[common] = known.model_copy(update={"methods": known.methods + grid.methods}), [*own, recipe]
        else:
            found[common] = grid, [recipe]
    return list(found.values())


def _filled(value: Any, knowedit: str) -> Any:
    if isinstance(value, str):
        return value.replace(_KNOWEDIT, knowedit)
    if isinstance(value, Mapping):
        return {key: _filled(item, knowedit) for key, item in value.items()}
    return [_filled(item, knowedit) for item in value] if isinstance(value, list) else value


@cache
def recipes() -> Mapping[str, Recipe]:
    """All of them by name, such as `zsre-rome`."""
    found = {}
    for file in sorted(files("factpatch.bench").joinpath("recipes").iterdir(), key=lambda file: file.name):
        name = file.name.removesuffix(".yaml")
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
        found[name] = Recipe(name, fields, fields.pop("expected"))
    return found


def recipes_named(patterns: list[str]) -> list[Recipe]:
    """Those whose name begins or ends with one of these; all if there are none. Raises BadConfig for one that names nothing."""
    every = recipes()
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in every):
            raise BadConfig(f'--recipe "{pattern}": no such recipe.\n  See them all: factpatch reproduce --list')
    return [recipe for name, recipe in every.items() if not patterns or any(_fits(name, p) for p in patterns)]


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}-") or name.endswith(f"-{pattern}")
