"""What is different between the model after one entry and after another: patches, edits, weights, answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict

from factpatch.lm import LM
from factpatch.workspace.conflicts import Standing

__all__ = ["Difference", "EditDifference", "ParameterDifference", "difference"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class EditDifference(_Value):
    """An edit that is made at one end and not at the other, or by another patch.

    number          of the entry that brought its patch in
    in_a, in_b      the patch that makes it there; None if none does
    said_a, said_b  the model's free answers to its prompt; None if it was not asked
    """

    number: int
    edit: str
    prompt: str
    target: str
    in_a: str | None
    in_b: str | None
    said_a: str | None = None
    said_b: str | None = None


class ParameterDifference(_Value):
    """A parameter whose values differ.

    entries   how many of its values
    norm      Frobenius norm of the difference
    relative  over the norm of the base model's own; None where that is zero
    """

    parameter: str
    shape: tuple[int, ...]
    entries: int
    norm: float
    relative: float | None


class Difference(_Value):
    """From after entry `a` to after entry `b`; `parameters` is None if weights were not compared."""

    a: int
    b: int
    edits: tuple[EditDifference, ...]
    parameters: tuple[ParameterDifference, ...] | None


End = tuple[int, Sequence[Standing]]
"""An entry's number, and the stack after it."""


def difference(a: End, b: End, lm: LM | None, *, chat: bool = False) -> Difference:
    """Compare two ends of a ledger; without a model, only which edits there are."""
    rows = _edits(a[1], b[1])
    if lm is None:
        return Difference(a=a[0], b=b[0], edits=tuple(rows), parameters=None)
    prompts = [row.prompt for row in rows]
    said = []
    for _, stack in (a, b):
        with lm.unpatched(), lm.patched(*(each.patch for each in stack)):
            said.append(lm.answer(prompts, chat=chat) if prompts else [])
    asked = [
        row.model_copy(update={"said_a": one, "said_b": other}) for row, one, other in zip(rows, *said, strict=True)
    ]
    return Difference(a=a[0], b=b[0], edits=tuple(asked), parameters=tuple(_parameters(lm, a[1], b[1])))


def _edits(a: Sequence[Standing], b: Sequence[Standing]) -> list[EditDifference]:
    found: dict[tuple[int, str], EditDifference] = {}
    for field, stack in (("in_a", a), ("in_b", b)):
        for standing in stack:
            number = standing.number or 0
            for edit in standing.patch.provenance.edits:
                row = found.get((number, edit.id)) or EditDifference(
                    number=number, edit=edit.id, prompt=edit.prompt, target=edit.target, in_a=None, in_b=None
                )
                found[number, edit.id] = row.model_copy(update={field: standing.patch.id})
    return [row for _, row in sorted(found.items()) if row.in_a != row.in_b]


@torch.no_grad()
def _parameters(lm: LM, a: Sequence[Standing], b: Sequence[Standing]) -> list[ParameterDifference]:
    found = []
    with lm.unpatched():
        base = {name: parameter.data for name, parameter in lm.model.named_parameters()}
        with lm.patched(*(each.patch for each in a)):
            # Only what patches touch are copies; the rest are the model's own tensors.
            at_a = {name: parameter.data for name, parameter in lm.model.named_parameters()}
        with lm.patched(*(each.patch for each in b)):
            for name, parameter in lm.model.named_parameters():
                if parameter.data_ptr() == at_a[name].data_ptr() or torch.equal(parameter, at_a[name]):
                    continue
                delta = parameter.float() - at_a[name].float()
                own = float(base[name].float().norm())
                found.append(
                    ParameterDifference(
                        parameter=name,
                        shape=tuple(parameter.shape),
                        entries=int((parameter != at_a[name]).sum()),
                        norm=float(delta.norm()),
                        relative=float(delta.norm()) / own if own else None,
                    )
                )
    return found
