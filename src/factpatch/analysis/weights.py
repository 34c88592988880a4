"""Weight change: how much of a model a patch changes, where, at what rank, and how far two patches lie over each other.

The arithmetic is in `factpatch.analysis.spectra`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from factpatch.analysis.base import Result
from factpatch.analysis.spectra import ENERGY, Pieces, eps_of, mean_squared_cosine, rounding_noise, spectrum
from factpatch.errors import AnatomyError
from factpatch.lm import LM
from factpatch.lm.anatomy import Anatomy, Projection
from factpatch.patches import Dense, LowRank, Patch, WeightPatch
from factpatch.patches.delta import Delta
from factpatch.progress import Progress, silent

__all__ = [
    "THRESHOLDS",
    "BlockTotal",
    "Change",
    "MatrixChange",
    "MatrixOverlap",
    "Overlap",
    "PatchChange",
    "WeightReport",
    "block_totals",
    "in_words",
    "matrix_change",
    "weight_changes",
]

THRESHOLDS: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-12, 3))
"""Of the sparsity curve, in units of the RMS of the matrix's own entries: a millionth to ten, two to a decade."""
_SPARSE = 0.05


class MatrixChange(Result):
    """What became of one parameter: `D = W' - W`.

    The D of a weight patch is what the patch says, before the sum is rounded to the weights' type; `touched` is counted
    after it, so that in a coarse type it may be far less than the entries of D that are not zero.

    block            None outside the blocks
    shape            as it is stored; one of more than two dimensions counts as a matrix with the last one's columns
    form             how the change is held: "rank 1", "dense", "24 entries"
    norm             Frobenius norm `||D||`
    relative         `||D|| / ||W||`; None where W is zero
    largest          the greatest absolute value of an entry of D
    rank             how many singular values exceed `tolerance`
    tolerance        what rounding of the entries could make of a singular value; see `rounding_noise`
    stable_rank      `||D||_F² / ||D||_2²`; 0 where D is zero
    touched          entries in which W' and W differ
    beyond           the share of entries with `|D_ij|` greater than each of THRESHOLDS times the RMS of W's entries
    singular_values  those that count, falling
    """

    parameter: str
    block: int | None
    shape: tuple[int, ...]
    form: str
    norm: float
    relative: float | None
    largest: float
    rank: int
    tolerance: float
    stable_rank: float
    touched: int
    beyond: tuple[float, ...]
    singular_values: tuple[float, ...]

    @property
    def entries(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


class BlockTotal(Result):
    """All changes in one block, or outside the blocks where `block` is None.

    relative  the norm of all changes over the norm of all matrices there, changed or not; None where that is zero
    """

    block: int | None
    norm: float
    relative: float | None
    touched: int


class Change(Result):
    """All that differs between two sets of weights.

    layers   how many blocks there are
    touched  entries that differ
    share    of all parameters
    words    the whole in a few words, by rule; see `in_words`
    """

    matrices: tuple[MatrixChange, ...]
    blocks: tuple[BlockTotal, ...]
    layers: int
    norm: float
    touched: int
    share: float
    words: str


class PatchChange(Change):
    """What one patch changes.

    adds     what it is made of instead, where it changes no weights
    numbers  how many numbers it holds
    """

    name: str
    id: str
    kind: str
    method: str
    adds: tuple[str, ...]
    numbers: int


class MatrixOverlap(Result):
    """Two changes of one matrix `W` of `y = W x`.

    outputs    mean squared cosine of the principal angles between the spaces the two write into, 0 to 1
    inputs     the same between the spaces they read from
    dims       of the spaces; see ENERGY
    by_chance  what random spaces of these dimensions have: outputs, inputs
    cosine     of the two changes as vectors, -1 to 1
    jaccard    entries that both touch over entries that either touches

    An adapter's change is compared without what rounding put into it, as far as its rank goes: its cosine is 0 where all of
    it may be rounding.
    """

    parameter: str
    outputs: float
    inputs: float
    dims: tuple[int, int]
    by_chance: tuple[float, float]
    cosine: float
    jaccard: float


class Overlap(Result):
    """Two patches. `outputs` and `inputs` are means over the matrices that both change, None where there are none.

    cosine, jaccard  over all weights; a matrix that only one of them changes counts as untouched by the other
    """

    one: str
    other: str
    outputs: float | None
    inputs: float | None
    cosine: float
    jaccard: float
    matrices: tuple[MatrixOverlap, ...]


class WeightReport(Result):
    """Patches side by side.

    parameters  of the model, tied ones once
    """

    model: str
    parameters: int
    layers: int
    thresholds: tuple[float, ...] = THRESHOLDS
    energy: float
    patches: tuple[PatchChange, ...]
    overlaps: tuple[Overlap, ...]


def matrix_change(
    parameter: str,
    block: int | None,
    shape: Sequence[int],
    weight: Pieces,
    change: Pieces,
    form: str,
    values: Float[Tensor, " values"],
    tolerance: float,
    touched: int | None = None,
) -> MatrixChange:
    """All that is told of one change.

    weight   what was changed
    values   the change's singular values
    touched  entries that differ, if these are others than the change's that are not zero
    """
    own, entries = math.sqrt(weight.squares), math.prod(shape)
    rms = own / math.sqrt(entries)
    bounds = torch.tensor(THRESHOLDS, dtype=torch.float64) * rms
    counts = torch.zeros(len(THRESHOLDS) + 1, dtype=torch.long)
    squares, largest, found = 0.0, 0.0, 0
    for at in change:
        sizes = change.read(at).double().abs().flatten()
        counts += torch.bucketize(sizes, bounds).bincount(minlength=len(counts))
        squares += float(sizes.square().sum())
        largest = max(largest, float(sizes.max()))
        found += int(sizes.count_nonzero())
    # Entries in bucket i lie above the bounds before i.
    above = counts.flip(0).cumsum(0).flip(0)[1:]
    norm = math.sqrt(squares)
    kept = values[values > tolerance]
    return MatrixChange(
        parameter=parameter,
        block=block,
        shape=tuple(shape),
        form=form,
        norm=norm,
        relative=norm / own if own else None,
        largest=largest,
        rank=len(kept),
        tolerance=tolerance,
        stable_rank=squares / float(values[0]) ** 2 if len(values) and values[0] > 0 else 0.0,
        touched=found if touched is None else touched,
        beyond=tuple((above.double() / entries).tolist()),
        singular_values=tuple(kept.tolist()),
    )


def block_totals(matrices: Sequence[MatrixChange], squares: Mapping[int | None, float]) -> tuple[BlockTotal, ...]:
    """The changes of each block that has some, first to last, and those outside the blocks at the end.

    squares  for each block the squared norm of all its matrices
    """
    found = []
    for block in sorted({m.block for m in matrices}, key=lambda b: math.inf if b is None else b):
        own = [m for m in matrices if m.block == block]
        norm, whole = math.hypot(*(m.norm for m in own)), math.sqrt(squares.get(block, 0.0))
        found.append(
            BlockTotal(
                block=block,
                norm=norm,
                relative=norm / whole if whole else None,
                touched=sum(m.touched for m in own),
            )
        )
    return tuple(found)


def in_words(matrices: Sequence[MatrixChange], layers: int) -> str:
    """What a change is: of which rank or how dense, in how many matrices of how many blocks.

    A matrix of which at most a twentieth of the entries are touched counts as sparse; one whose factors would take less room
    than itself, as of its rank; any other as dense.
    """
    changed = [m for m in matrices if m.touched]
    if not changed:
        return "changes no weights"
    kinds: dict[str, list[MatrixChange]] = {}
    for m in changed:
        kinds.setdefault(_kind(m), []).append(m)
    if len(kinds) == 1:
        kind = next(iter(kinds))
        found = f"{_what(kind, changed)} in {_where(changed, layers)}"
    else:
        counted = "; ".join(f"{_what(kind, own)} in {_number(own)}" for kind, own in kinds.items())
        found = f"{_where(changed, layers)}: {counted}"
    blocks: dict[int | None, float] = {}
    for m in changed:
        blocks[m.block] = blocks.get(m.block, 0.0) + m.norm**2
    most = max(blocks, key=lambda block: blocks[block])
    if len(blocks) > 2 and blocks[most] > sum(blocks.values()) / 2:
        found += f", most of it {'outside the blocks' if most is None else f'in block {most}'}"
    return found


def _kind(m: MatrixChange) -> str:
    if len(m.shape) < 2:
        return "vector"
    if m.rank == 0:
        return "noise"
    if m.touched <= _SPARSE * m.entries:
        return "sparse"
    return "low" if m.rank * (math.prod(m.shape[:-1]) + m.shape[-1]) < m.entries else "dense"


def _what(kind: str, matrices: Sequence[MatrixChange]) -> str:
    each = " each" if len(matrices) > 1 else ""
    least, most = min(m.rank for m in matrices), max(m.rank for m in matrices)
    ranks = f"rank {least}" if least == most else f"rank {least} to {most}"
    if kind == "sparse":
        share = sum(m.touched for m in matrices) / sum(m.entries for m in matrices)
        return f"{100 * share:.2g} % of the entries, {ranks}{each},"
    words = {"low": f"{ranks}{each}", "vector": "entries", "noise": "no more than rounding", "dense": "dense"}
    return words[kind]


def _number(matrices: Sequence[MatrixChange]) -> str:
    noun, several = ("vector", "vectors") if all(len(m.shape) < 2 for m in matrices) else ("matrix", "matrices")
    return f"one {noun}" if len(matrices) == 1 else f"{len(matrices)} {several}"


def _where(matrices: Sequence[MatrixChange], layers: int) -> str:
    blocks = {m.block for m in matrices}
    number = _number(matrices)
    if len(blocks) > 1:
        inside = len(blocks - {None})
        return f"{number} spread over {inside} of {layers} blocks" + (" and outside them" if None in blocks else "")
    (block,) = blocks
    place = "outside the blocks" if block is None else f"block {block}"
    return f"{number} ({place})" if len(matrices) == 1 or block is None else f"{number} of {place}"


@dataclass(frozen=True, eq=False, slots=True)
class _Held:
    """One change, kept for comparing it with others: in stored orientation, but for its spaces.

    delta    as the patch holds it; of an adapter, itself without what is noise
    norm     of `delta`
    touched  a bit for each entry, eight to a byte
    """

    delta: Delta
    norm: float
    told: MatrixChange
    touched: UInt8[np.ndarray, " bytes"]
    outputs: Float[Tensor, "out leading"]
    inputs: Float[Tensor, "in leading"]


def weight_changes(
    lm: LM, patches: Mapping[str, Patch], *, energy: float = ENERGY, progress: Progress = silent
) -> WeightReport:
    """What each patch changes in the weights of the base model, side by side, and how far they overlap.

    patches  by the names they are shown under
    energy   see ENERGY

    A patch that changes no weights has a row that says what it adds instead. Patches that lie on `lm` do not count.
    Raises WrongBase for a patch of another model that needs weights, MissingExtra for an adapter without PEFT.

    Beside the model and what the patches hold, it takes a copy of the weights that one patch touches, one change in float64,
    and of each change of each patch a bit for each entry and the leading singular vectors. Of an adapter's changes the
    factors are kept, at the rank that was found; only one that has no low rank is kept whole.
    """
    with torch.no_grad(), lm.unpatched():
        anatomy, parameters = lm.anatomy, dict(lm.model.named_parameters())
        total = sum(p.numel() for p in parameters.values())
        squares: dict[int | None, float] = {}
        # What the anatomy does not know is taken as stored (out, in), as nn.Linear does.
        transposed = {projection.parameter for projection in _projections(anatomy) if projection.transposed}
        rows, held = [], {}
        for name, patch in patches.items():
            own = {h.told.parameter: h for h in _measured(lm, patch, transposed, energy, f"Measuring {name}", progress)}
            held[name] = own
            for block in {h.told.block for h in own.values()} - squares.keys():
                there = (p for n, p in parameters.items() if p.ndim > 1 and _block(anatomy, n) == block)
                squares[block] = sum(Pieces.held(p).squares for p in there)
            rows.append(_patch_row(name, patch, [h.told for h in own.values()], squares, anatomy.n_layers, total))
        pairs = list(combinations(patches, 2))
        overlaps = []
        for i, (one, other) in enumerate(pairs):
            progress("Comparing patches", i, len(pairs))
            if held[one] and held[other]:
                overlaps.append(_overlap(one, held[one], other, held[other]))
        progress("Comparing patches", max(1, len(pairs)), max(1, len(pairs)))
    return WeightReport(
        model=lm.name,
        parameters=total,
        layers=anatomy.n_layers,
        energy=energy,
        patches=tuple(rows),
        overlaps=tuple(overlaps),
    )


def _measured(
    lm: LM, patch: Patch, transposed: Collection[str], energy: float, doing: str, progress: Progress
) -> list[_Held]:
    """A patch's changes, gone through one at a time while it lies on the model; none of one that changes no weights.

    A weight patch says what it changes. Of any other that consists of weights (adapters) the weights it makes are compared
    with those it found, so that the rule for each kind of adapter is PEFT's own.
    """
    if not patch.mergeable:
        if patch.needs_weights:
            patch.check_base(lm)
        return []
    before, found = {name: p.data for name, p in lm.model.named_parameters()}, []
    with lm.patched(patch):
        after = {name: p.data for name, p in lm.model.named_parameters()}
        told = patch.deltas if isinstance(patch, WeightPatch) else {}
        names = list(told) or [name for name, old in before.items() if after[name].data_ptr() != old.data_ptr()]
        for i, name in enumerate(names):
            progress(doing, i, len(names))
            old, new = before[name], after[name]
            if name in told or not torch.equal(old, new):
                found.append(
                    _change(name, _block(lm.anatomy, name), old, new, told.get(name), energy, turn=name in transposed)
                )
    progress(doing, max(1, len(names)), max(1, len(names)))
    return found


def _change(
    parameter: str, block: int | None, old: Tensor, new: Tensor, said: Delta | None, energy: float, *, turn: bool
) -> _Held:
    """What became of one parameter; `said` is the change as the patch has it, None if it is to be reckoned."""
    delta = Dense(new.float() - old.float()) if said is None else said
    eps = eps_of(old.dtype if said is None else torch.float32)
    pieces, weight = Pieces.of(delta), Pieces.held(old)
    noise = 0.0
    if not isinstance(delta, LowRank):
        # The change was reckoned from rounded weights, or has been rounded itself.
        noise = rounding_noise(pieces, [(weight, eps), (pieces, eps)])
    found = spectrum(delta, energy, noise)
    touched = np.packbits((new != old).cpu().numpy())
    told = matrix_change(
        parameter, block, old.shape, weight, pieces, delta.form, found.values, max(found.floor, noise), _ones(touched)
    )
    outputs, inputs = (found.right, found.left) if turn else (found.left, found.right)
    if said is not None or found.factors is None:
        return _Held(delta, told.norm, told, touched, outputs, inputs)
    return _Held(found.factors, found.factors.norm(), told, touched, outputs, inputs)


def _ones(bits: UInt8[np.ndarray, " bytes"]) -> int:
    return int(np.unpackbits(bits).sum())


def _patch_row(
    name: str,
    patch: Patch,
    matrices: Sequence[MatrixChange],
    squares: Mapping[int | None, float],
    layers: int,
    total: int,
) -> PatchChange:
    touched = sum(m.touched for m in matrices)
    adds = () if patch.mergeable else tuple(f"{row['part']}: {row['form']}" for row in patch.changes())
    return PatchChange(
        matrices=tuple(matrices),
        blocks=block_totals(matrices, squares),
        layers=layers,
        norm=math.hypot(*(m.norm for m in matrices)),
        touched=touched,
        share=touched / total,
        words=in_words(matrices, layers),
        name=name,
        id=patch.id,
        kind=patch.kind,
        method=patch.provenance.method,
        adds=adds,
        numbers=sum(t.numel() for t in patch.tensors().values()) if patch.needs_weights else 0,
    )


def _overlap(one: str, its: Mapping[str, _Held], other: str, others: Mapping[str, _Held]) -> Overlap:
    shared, dots, both = [], 0.0, 0
    for parameter in (name for name in its if name in others):
        a, b = its[parameter], others[parameter]
        x, y = Pieces.of(a.delta), Pieces.of(b.delta)
        dot = sum(float((x.read(at).double() * y.read(at).double()).sum()) for at in x)
        common = _ones(a.touched & b.touched)
        dots, both, each = dots + dot, both + common, a.told.touched + b.told.touched - common
        k, least = (a.outputs.shape[1], b.outputs.shape[1]), min(a.outputs.shape[1], b.outputs.shape[1])
        if least == 0:
            continue  # a change that is zero spans no space
        shared.append(
            MatrixOverlap(
                parameter=parameter,
                outputs=mean_squared_cosine(a.outputs, b.outputs),
                inputs=mean_squared_cosine(a.inputs, b.inputs),
                dims=k,
                by_chance=(max(k) / len(a.outputs), max(k) / len(a.inputs)),
                cosine=_cosine(dot, a.norm, b.norm),
                jaccard=common / each if each else 0.0,
            )
        )
    norms = [math.hypot(*(h.norm for h in held.values())) for held in (its, others)]
    either = sum(h.told.touched for held in (its, others) for h in held.values()) - both
    return Overlap(
        one=one,
        other=other,
        outputs=sum(m.outputs for m in shared) / len(shared) if shared else None,
        inputs=sum(m.inputs for m in shared) / len(shared) if shared else None,
        cosine=_cosine(dots, *norms),
        jaccard=both / either if either else 0.0,
        matrices=tuple(shared),
    )


def _cosine(dot: float, one: float, other: float) -> float:
    return max(-1.0, min(1.0, dot / (one * other))) if one and other else 0.0


def _block(anatomy: Anatomy, parameter: str) -> int | None:
    """The block a parameter lies in."""
    stack = f"{anatomy.layout.blocks}."
    return int(parameter.removeprefix(stack).partition(".")[0]) if parameter.startswith(stack) else None


def _projections(anatomy: Anatomy) -> Iterator[Projection]:
    """All that the anatomy knows the orientation of; of a mixture of experts, those of the attention."""
    for layer in range(anatomy.n_layers):
        with suppress(AnatomyError):
            yield from (anatomy.mlp_out(layer), *anatomy.mlp_in(layer))
        with suppress(AnatomyError):
            yield from (anatomy.attention_out(layer), *anatomy.queries_and_values(layer))
