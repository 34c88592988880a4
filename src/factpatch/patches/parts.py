"""What a patch read from a folder is checked against: the form of its spec, and the places in the model that it names."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from factpatch.edits import first_problem
from factpatch.errors import AnatomyError, BadPatch, WrongBase
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection

__all__ = ["Spec", "block_of", "is_beside", "linear_map"]


class Spec(BaseModel):
    """Base of the forms of `spec` in patch.json: no fields but those that are named, no numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(cls, spec: Any) -> Self:
        """The spec in this form. Raises BadPatch naming the field."""
        try:
            return cls.model_validate(spec)
        except ValidationError as error:
            field, problem = first_problem(error)
            raise BadPatch(f'patch.json, "spec.{field}": {problem}\n  Make the patch again: factpatch edit') from None


def damaged(what: str) -> BadPatch:
    """The error of a patch that contradicts itself."""
    return BadPatch(f"{what}\n  The file is damaged; make the patch again with: factpatch edit")


def misfit(what: str) -> WrongBase:
    """The error of a patch that asks for what the model, which has the right fingerprint, does not have."""
    return WrongBase(f"{what}\n  The patch's folder may be damaged; make it again with: factpatch edit")


def linear_map(
    lm: LM, name: str, belongs: str, *, reads: int | None = None, writes: int | None = None, kind: str = "module"
) -> Projection:
    """The linear map of this name in a model.

    belongs  the beginning of the sentence that says what is not to be found
    reads    the width it must read, if that is known; `writes` the width it must put out

    Raises WrongBase.
    """
    try:
        module = lm.model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | Conv1D):
        raise misfit(f"{belongs} {name}; {lm.name} has no such {kind}.")
    found = Projection(module, f"{name}.weight", isinstance(module, Conv1D))
    out, into = found.matrix.shape
    if (reads is not None and reads != into) or (writes is not None and writes != out):
        wanted = " to ".join("any" if width is None else str(width) for width in (reads, writes))
        raise misfit(f"{belongs} {name}, as a map of {wanted}; that of {lm.name} is of {into} to {out}.")
    return found


def block_of(lm: LM, name: str) -> int:
    """The number of the block that a module is in. Raises WrongBase if it is in none."""
    blocks = f"{lm.anatomy.layout.blocks}."
    number = name.removeprefix(blocks).partition(".")[0]
    if not name.startswith(blocks) or not number.isdecimal():
        raise misfit(f"{name} is in no block of {lm.name}.")
    return int(number)


def is_beside(lm: LM, reads: str, writes: str) -> bool:
    """Whether two modules are a way into one block's MLP and the way out of it."""
    layer = block_of(lm, writes)
    try:
        ways_in = [projection.parameter for projection in lm.anatomy.mlp_in(layer)]
        return f"{writes}.weight" == lm.anatomy.mlp_out(layer).parameter and f"{reads}.weight" in ways_in
    except AnatomyError:
        return False
