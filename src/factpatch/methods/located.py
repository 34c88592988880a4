"""Which block to edit in a model that nobody has tuned: what a sweep chose, kept in the cache for `Method.resolve`.

One plain JSON file for each model, `<cache>/located/<fingerprint>.json`, holds a choice for each method. It is read once
while the model is in hand. What cannot be read is ignored with a warning that names the file: a choice only replaces a
default, and no edit should fail for want of one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from factpatch.files import cache_root, locked, make_folder, whole_file
from factpatch.lm import LM, BaseLM

__all__ = ["Choice", "PlaceField", "keep", "kept", "place_field", "settings"]

_log = logging.getLogger("factpatch")

PlaceField = Literal["layer", "layers"]
_FIELDS: tuple[PlaceField, ...] = ("layer", "layers")


class Choice(BaseModel):
    """The block or blocks that one method should edit in one model.

    layers  numbers of blocks, lowest first
    made    what made it, as the sweep tells it: method and settings, facts, seed, versions, every score
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[NonNegativeInt, ...] = Field(min_length=1)
    made: dict[str, Any]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str
    fingerprint: str
    choices: dict[str, Choice]


def place_field(config_type: type[BaseModel]) -> PlaceField | None:
    """The setting that says where a method edits: `layer` of one block, `layers` of several, None of neither.

    Where a method has both, the others hang on the one.
    """
    return next((name for name in _FIELDS if name in config_type.model_fields), None)


def settings(lm: BaseLM, method: str, config_type: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """The setting that was chosen for this method and model, to stand in for a default; empty where there is none.

    given  what the user set, which is not looked for
    """
    field = place_field(config_type)
    if field is None or field in given or not isinstance(lm, LM):
        return {}
    choice = kept(lm).get(method)
    if choice is None:
        return {}
    return {field: choice.layers if field == "layers" else choice.layers[0]}


def kept(lm: LM) -> Mapping[str, Choice]:
    """The choices for this model, by method; the disk is asked once while the model is in hand."""
    return _at_hand(lm)


def keep(lm: LM, method: str, choice: Choice, *, replace: bool = True) -> Path | None:
    """Keep a choice for this method; where it is kept, or None if it is not.

    replace  whether it takes the place of an earlier one; otherwise it is kept only if there is none

    Raises OutputError.
    """
    path = _path(lm)
    with locked(make_folder(path.parent) / f"{path.stem}.lock"):
        there = _read(lm, path)
        if method in there and not replace:
            return None
        choices = {**there, method: choice}
        with whole_file(path) as draft:
            content = _File(model=lm.name, fingerprint=lm.fingerprint, choices=choices)
            draft.write_text(content.model_dump_json(indent=2) + "\n", encoding="utf-8")
    _at_hand(lm)[method] = choice
    return path


def _at_hand(lm: LM) -> dict[str, Choice]:
    # Most users never keep a choice: the fingerprint, which reads all weights, is not asked for in vain.
    return lm.once("located", lambda: _read(lm, _path(lm)) if _folder().is_dir() else {})


def _folder() -> Path:
    return cache_root() / "located"


def _path(lm: LM) -> Path:
    return _folder() / f"{lm.fingerprint}.json"


def _read(lm: LM, path: Path) -> dict[str, Choice]:
    """What the file holds for this model; nothing if it is missing, damaged or about another one."""
    try:
        content = _File.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        _log.warning("%s: ignored, because it cannot be read (%s). Make it anew: factpatch locate", path, _first(error))
        return {}
    if content.fingerprint != lm.fingerprint:
        _log.warning("%s: ignored, because it is about another model. Make it anew: factpatch locate", path)
        return {}
    outside = [name for name, each in content.choices.items() if max(each.layers) >= lm.anatomy.n_layers]
    if outside:
        _log.warning("%s: ignored for %s, which would edit blocks that are not there", path, ", ".join(outside))
    return {name: choice for name, choice in content.choices.items() if name not in outside}


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
