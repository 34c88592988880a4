"""What an edit wrote into the weights, read through the output head: is its target there?

The survey's section 5.1 (arXiv 2401.01286): the five columns of a changed value matrix that change most are read, before and
after, and Hit@10 and Hit@50 tell whether the target is among the first 10 and 50 tokens. It is not told there whether one
column with the target is enough; here it is. The survey multiplies columns by the embedding as they are (after Dar et al.
2022, arXiv 2209.02535); here they go through the final norm first, as what they are added to does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from factpatch.analysis.base import Result
from factpatch.analysis.facts import from_telling
from factpatch.bench.singles import make
from factpatch.edits import Edit
from factpatch.errors import AnatomyError, CannotEdit
from factpatch.lm import LM
from factpatch.lm.batches import Batch, Places, by_rows
from factpatch.lm.hooks import reading
from factpatch.lm.predictions import predict
from factpatch.lm.run import logits_at
from factpatch.methods import Method
from factpatch.patches import Patch, WeightPatch
from factpatch.patches.delta import Delta
from factpatch.progress import Progress, silent

__all__ = ["COLUMNS", "Unread", "ValueReading", "check_readable", "read_values"]

COLUMNS = 5
"""How many columns of the changed value matrices are read, as in the survey."""


class ValueReading(Result):
    """At which rank an edit's target stands when what the edit changed is read through the final norm and the head.

    made            whether the model now gives the target, token by token
    layer, token    where the MLP's output changed most: block, and index in the prompt
    columns_before  the best rank, from 1, of the target's first token over the columns that change most, before
    columns_after   the same, after
    output_before   its rank in the MLP's output at that place, before
    output_after    the same, after
    """

    method: str
    edit: str
    target: str
    made: bool
    layer: int
    token: int
    columns_before: int
    columns_after: int
    output_before: int
    output_after: int


class Unread(Result):
    """An edit whose changed values could not be read, and why."""

    method: str
    edit: str
    reason: str


@torch.no_grad()
def read_values(
    lm: LM, method: Method[Any], edits: Sequence[Edit], progress: Progress = silent
) -> tuple[tuple[ValueReading, ...], tuple[Unread, ...]]:
    """Make each edit alone, and read through the final norm and the head what it changed in the MLPs' output projections.

    Two things are read, each before and after: the five columns of these matrices that change most (greatest norm of the
    change, over all blocks), and what the MLP puts out where this changes most while the prompt is read. The columns are
    read as if their neurons fired positively, which need not be so; the output tells what comes of them. What the method
    refuses is told apart. Raises CannotEdit if it changes no such matrix by its nature, and what else `fit` raises.
    """
    check_readable(method)
    found: list[ValueReading] = []
    unread: list[Unread] = []
    for i, edit in enumerate(edits):
        progress(f"Editing with {method.name}", i, len(edits))
        with torch.enable_grad():
            patch, outcome = make(lm, method, [edit])
        if patch is None:
            unread.append(Unread(method=method.name, edit=edit.id, reason=outcome.reason))
            continue
        deltas = _changes(lm, patch, method.name)
        places, layers = _most_changed(deltas), list(deltas)
        if not places:
            unread.append(Unread(method=method.name, edit=edit.id, reason="it changed nothing"))
            continue
        text = from_telling(lm, lm.encode([edit.prompt], [edit.target])[0])
        before, outputs = _values(lm, places), _outputs(lm, layers, text.prompt_ids)
        with lm.patched(patch):
            after, changed = _values(lm, places), _outputs(lm, layers, text.prompt_ids)
            made = predict(lm, lm.encode([edit.prompt], [edit.target]))[0]
        moved = (changed - outputs).norm(dim=-1)
        row, token = divmod(int(moved.argmax()), moved.shape[1])
        ranks = [
            int(_ranks(lm, vectors, text.target_ids[0]).min())
            for vectors in (before, after, outputs[row, token][None], changed[row, token][None])
        ]
        found.append(
            ValueReading(
                method=method.name,
                edit=edit.id,
                target=edit.target,
                made=made.best == made.target,
                layer=layers[row],
                token=token,
                columns_before=ranks[0],
                columns_after=ranks[1],
                output_before=ranks[2],
                output_after=ranks[3],
            )
        )
    progress(f"Editing with {method.name}", len(edits), len(edits))
    return tuple(found), tuple(unread)


def check_readable(method: Method[Any]) -> None:
    """Raise CannotEdit if the method changes no weights, and so no values."""
    if method.traits.patch is not WeightPatch:
        raise _no_values(method.name)


def _no_values(name: str) -> CannotEdit:
    return CannotEdit(
        f"{name} changes no MLP output projection, so there are no value vectors to read.\n"
        "  Choose a method that does; see the column 'needs' of: factpatch methods"
    )


def _changes(lm: LM, patch: Patch, name: str) -> dict[int, Float[Tensor, "hidden inter"]]:
    """By block, the changes of MLP output projections. Raises CannotEdit if there are none."""
    deltas: Mapping[str, Delta] = patch.deltas if isinstance(patch, WeightPatch) else {}
    found: dict[int, Tensor] = {}
    for layer in range(lm.anatomy.n_layers) if deltas else ():
        try:
            projection = lm.anatomy.mlp_out(layer)
        except AnatomyError:  # a mixture of experts, among blocks that are none
            continue
        if (delta := deltas.get(projection.parameter)) is not None:
            full = delta.full().float().cpu()
            found[layer] = full.T if projection.transposed else full
    if not found:
        raise _no_values(name)
    return found


def _most_changed(deltas: Mapping[int, Tensor]) -> list[tuple[int, int]]:
    """Block and index of the columns that change most, the most changed first; never one that does not change."""
    norms = {
        (layer, i): norm
        for layer, delta in deltas.items()
        for i, norm in enumerate(delta.norm(dim=0).tolist())
        if norm > 0
    }  # fmt: skip
    return sorted(norms, key=lambda place: (-norms[place], place))[:COLUMNS]


def _values(lm: LM, places: Sequence[tuple[int, int]]) -> Float[Tensor, "columns hidden"]:
    return torch.stack([lm.anatomy.mlp_out(layer).matrix[:, i].detach().clone() for layer, i in places])


def _outputs(lm: LM, layers: Sequence[int], ids: Sequence[int]) -> Float[Tensor, "layers seq hidden"]:
    """What the MLPs of these blocks put out at each token."""
    seen: dict[int, Tensor] = {}

    def see(layer: int) -> Callable[[Tensor, Tensor], None]:
        return lambda _, out: seen.update({layer: by_rows(out)[0].clone()})

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(reading(lm.anatomy.mlp_out(layer).module, see(layer)))
        logits_at(lm, Batch.of([ids], lm.device), Places.of([[len(ids) - 1]], lm.device))
    return torch.stack([seen[layer] for layer in layers])


def _ranks(lm: LM, vectors: Float[Tensor, "vectors hidden"], token: int) -> Int[Tensor, " vectors"]:
    """At which rank, from 1, a token stands when each vector is read as if it were the last hidden state."""
    logits: Tensor = lm.anatomy.head(lm.anatomy.final_norm(vectors[None]))[0].float()
    return (logits > logits[:, token, None]).sum(-1) + 1
