"""Weight change: how much of a model a patch changes, where, at what rank, and how far two patches lie over each other.

What is low-rank is never multiplied out for its spectrum: QR of both factors, then the SVD of the small product. What is
written out goes through the Gram matrix of its shorter side, in float64 and a piece at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from factpatch.errors import AnatomyError
from factpatch.lm import LM
from factpatch.lm.anatomy import Anatomy, Projection
from factpatch.patches import Dense, LowRank, Patch, WeightPatch
from factpatch.patches.delta import Delta
from factpatch.progress import Progress, silent

__all__ = [
    "ENERGY",
    "THRESHOLDS",
    "BlockTotal",
    "Change",
    "MatrixChange",
    "MatrixOverlap",
    "Overlap",
    "PatchChange",
    "Pieces",
    "Spectrum",
    "WeightReport",
    "as_matrix",
    "block_totals",
    "eps_of",
    "gram_values",
    "in_words",
    "matrix_change",
    "mean_squared_cosine",
    "rounding_noise",
    "spectrum",
    "weight_changes",
]

THRESHOLDS: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-12, 3))
"""Of the sparsity curve, in units of the RMS of the matrix's own entries: a millionth to ten, two to a decade."""
ENERGY = 0.9
"""The spaces of a change are those of the leading singular vectors that hold this share of its squared norm."""

Index = tuple[slice, slice]
_PIECE = 1 << 22
_SPARSE = 0.05


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MatrixChange(_Value):
    """What became of one parameter: `D = W' - W`.

    block            None outside the blocks
    shape            as it is stored; one of more than two dimensions counts as a matrix with the last one's columns
    form             how the change is held: "rank 1", "dense", "24 entries"
    norm             Frobenius norm `||D||`
    relative         `||D|| / ||W||`; None where W is zero
    largest          the greatest absolute value of an entry of D
    rank             how many singular values exceed `tolerance`
    tolerance        what rounding of the entries could make of a singular value; see `rounding_noise`
    stable_rank      `||D||_F² / ||D||_2²`; 0 where D is zero
    touched          entries of D that are not zero
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


class BlockTotal(_Value):
    """All changes in one block, or outside the blocks where `block` is None.

    relative  the norm of all changes over the norm of all matrices there, changed or not; None where that is zero
    """

    block: int | None
    norm: float
    relative: float | None
    touched: int


class Change(_Value):
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


class MatrixOverlap(_Value):
    """Two changes of one matrix `W` of `y = W x`.

    outputs    mean squared cosine of the principal angles between the spaces the two write into, 0 to 1
    inputs     the same between the spaces they read from
    dims       of the spaces; see ENERGY
    by_chance  what random spaces of these dimensions have: outputs, inputs
    cosine     of the two changes as vectors, -1 to 1
    jaccard    entries that both touch over entries that either touches
    """

    parameter: str
    outputs: float
    inputs: float
    dims: tuple[int, int]
    by_chance: tuple[float, float]
    cosine: float
    jaccard: float


class Overlap(_Value):
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


class WeightReport(_Value):
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


@dataclass(frozen=True, eq=False, slots=True)
class Pieces:
    """A matrix that is read a piece at a time, so that a large one is never held in float64 as a whole."""

    rows: int
    cols: int
    read: Callable[[Index], Tensor]

    @classmethod
    def of(cls, delta: Delta) -> Pieces:
        """The entries of a change of a parameter."""
        if isinstance(delta, LowRank):
            u, v = delta.u.detach().cpu().float(), delta.v.detach().cpu().float()
            return cls(u.shape[0], v.shape[1], lambda at: u[at[0]] @ v[:, at[1]])
        return cls.held(delta.full())

    @classmethod
    def held(cls, tensor: Tensor) -> Pieces:
        """The entries of a tensor in hand."""
        matrix = as_matrix(tensor.detach())
        return cls(matrix.shape[0], matrix.shape[1], lambda at: matrix[at].cpu())

    @property
    def tall(self) -> bool:
        """Whether it is cut along its rows, not its columns: along the longer side."""
        return self.rows >= self.cols

    @property
    def squares(self) -> float:
        """The sum of squares of the entries that are finite."""
        read = (self.read(at).double().nan_to_num(0, 0, 0) for at in self)
        return sum(float(piece.square().sum()) for piece in read)

    def __iter__(self) -> Iterator[Index]:
        """Where the pieces lie; the same for all matrices of one shape."""
        long, short = max(self.rows, self.cols), max(1, min(self.rows, self.cols))
        step = max(1, _PIECE // short)
        for start in range(0, long, step):
            own, whole = slice(start, min(long, start + step)), slice(0, min(self.rows, self.cols))
            yield (own, whole) if self.tall else (whole, own)


def as_matrix(tensor: Tensor) -> Tensor:
    """A vector as one row; of more than two dimensions all but the last are rows, as in stacks of experts."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(0, -2)


def eps_of(dtype: torch.dtype) -> float:
    """The spacing of numbers of a type just above 1; 0 for whole numbers, which are exact."""
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def rounding_noise(change: Pieces, rounded: Sequence[tuple[Pieces, float]]) -> float:
    """About the greatest singular value that rounding alone would put into a change: what lies below is not counted as rank.

    Rounding moves an entry `w` by up to `eps |w| / 2`, with a variance of at most `(eps w)² / 12`, and entries independently.
    The norm of such a matrix is near the root of the greatest row sum of variances plus that of the greatest column sum, with
    a term for a single large entry (Bandeira and van Handel 2016, arXiv 1408.6185, theorem 3.1). Rows and columns in which
    nothing differs do not count. A change that is itself smaller than the rounding is noise to this rule, which is right, but
    one of about its size has entries cut off and may seem of higher rank than it was made with.

    rounded  the matrices whose entries were rounded, and the eps of the type each was rounded to
    """
    rows = torch.zeros(change.rows, dtype=torch.bool)
    cols = torch.zeros(change.cols, dtype=torch.bool)
    for at in change:
        differs = change.read(at) != 0
        rows[at[0]] |= differs.any(1)
        cols[at[1]] |= differs.any(0)
    by_row, by_col = torch.zeros(change.rows, dtype=torch.float64), torch.zeros(change.cols, dtype=torch.float64)
    most = 0.0
    for at in change:
        variance = sum((weight.read(at).double() * eps) ** 2 / 12 for weight, eps in rounded)
        assert isinstance(variance, Tensor)
        variance = variance.nan_to_num(0, 0, 0) * rows[at[0]][:, None] * cols[at[1]]
        by_row[at[0]] += variance.sum(1)
        by_col[at[1]] += variance.sum(0)
        most = max(most, float(variance.max()))
    spread = 2 * math.sqrt(most * math.log(change.rows + change.cols))
    return float(by_row.max().sqrt() + by_col.max().sqrt()) + spread


@dataclass(frozen=True, eq=False, slots=True)
class Spectrum:
    """Singular values of a change, falling, and its leading singular vectors as columns.

    floor  below it a value is not to be told from zero in the arithmetic used
    left   of the rows as stored
    right  of the columns
    """

    values: Float[Tensor, " values"]
    floor: float
    left: Float[Tensor, "rows leading"]
    right: Float[Tensor, "cols leading"]


def spectrum(delta: Delta, energy: float = ENERGY) -> Spectrum:
    """Of any change, in float64; of a low-rank one exactly, from its factors.

    energy  the share of the squared norm that the leading vectors hold
    """
    if isinstance(delta, LowRank):
        u, v = delta.u.detach().cpu().double(), delta.v.detach().cpu().double()
        (q, r), (p, s) = torch.linalg.qr(u), torch.linalg.qr(v.T)
        a, values, b = torch.linalg.svd(r @ s.T, full_matrices=False)
        k = _leading(values, energy)
        # As far as the factors' own rounding, each entry by half its spacing, can move a singular value.
        floor = eps_of(delta.u.dtype) * float(u.norm() * v.norm())
        return Spectrum(values, floor, q @ a[:, :k], p @ b[:k].T)
    pieces = Pieces.of(delta)
    squares, vectors = torch.linalg.eigh(_gram(pieces))
    values = squares.flip(0).clamp(min=0).sqrt()
    k = _leading(values, energy)
    near = vectors.flip(1)[:, :k]
    read = (pieces.read(at).double() for at in pieces)
    far = torch.cat([(piece if pieces.tall else piece.T) @ near for piece in read]) / values[:k]
    return Spectrum(values, _gram_floor(values), *((far, near) if pieces.tall else (near, far)))


def gram_values(pieces: Pieces) -> tuple[Float[Tensor, " values"], float]:
    """The singular values of a matrix, falling, and below what they are not to be told from zero."""
    values = torch.linalg.eigvalsh(_gram(pieces)).flip(0).clamp(min=0).sqrt()
    return values, _gram_floor(values)


def _gram(pieces: Pieces) -> Float[Tensor, "short short"]:
    short = min(pieces.rows, pieces.cols)
    gram = torch.zeros(short, short, dtype=torch.float64)
    for at in pieces:
        piece = pieces.read(at).double()
        gram += piece.T @ piece if pieces.tall else piece @ piece.T
    return gram


def _gram_floor(values: Float[Tensor, " values"]) -> float:
    """A Gram matrix holds squares: what is below the root of float64's eps, times the greatest, is lost in it."""
    return float(values[0]) * math.sqrt(len(values) * torch.finfo(torch.float64).eps)


def _leading(values: Float[Tensor, " values"], energy: float) -> int:
    """How many of the greatest values hold `energy` of the sum of squares; none of a change that is zero."""
    held = values.square().cumsum(0)
    if not len(values) or held[-1] == 0:
        return 0
    return min(len(values), int((held < energy * held[-1] * (1 - 1e-12)).sum()) + 1)


def mean_squared_cosine(one: Float[Tensor, "n k"], other: Float[Tensor, "n l"]) -> float:
    """Of the principal angles between two spaces, given by orthonormal columns: `||AᵀB||² / min(k, l)`, 0 to 1.

    The subspace similarity of Hu et al. 2022 (arXiv 2106.09685), section 7.2. Random spaces have max(k, l) / n.
    """
    least = min(one.shape[1], other.shape[1])
    return min(1.0, float((one.T @ other).square().sum()) / least) if least else 0.0


def matrix_change(
    parameter: str,
    block: int | None,
    shape: Sequence[int],
    weight: Pieces,
    change: Pieces,
    form: str,
    values: Float[Tensor, " values"],
    tolerance: float,
) -> MatrixChange:
    """All that is told of one change, `weight` being what was changed and `values` the change's singular values."""
    own, entries = math.sqrt(weight.squares), math.prod(shape)
    rms = own / math.sqrt(entries)
    bounds = torch.tensor(THRESHOLDS, dtype=torch.float64) * rms
    counts = torch.zeros(len(THRESHOLDS) + 1, dtype=torch.long)
    squares, largest, touched = 0.0, 0.0, 0
    for at in change:
        sizes = change.read(at).double().abs().flatten()
        counts += torch.bucketize(sizes, bounds).bincount(minlength=len(counts))
        squares += float(sizes.square().sum())
        largest = max(largest, float(sizes.max()))
        touched += int(sizes.count_nonzero())
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
        touched=touched,
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
    """One change, kept for comparing it with others: in stored orientation, but for its spaces."""

    pieces: Pieces
    told: MatrixChange
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
    """
    with torch.no_grad(), lm.unpatched():
        anatomy, parameters = lm.anatomy, dict(lm.model.named_parameters())
        total = sum(p.numel() for p in parameters.values())
        squares: dict[int | None, float] = {}
        # What the anatomy does not know is taken as stored (out, in), as nn.Linear does.
        transposed = {projection.parameter for projection in _projections(anatomy) if projection.transposed}
        rows, held = [], {}
        for name, patch in patches.items():
            own: dict[str, _Held] = {}
            changes = _changes(lm, patch)
            for i, (parameter, (delta, eps)) in enumerate(changes.items()):
                progress(f"Measuring {name}", i, len(changes))
                weight = parameters[parameter]
                own[parameter] = _measured(
                    parameter, _block(anatomy, parameter), weight, delta, eps, energy, turn=parameter in transposed
                )
            progress(f"Measuring {name}", max(1, len(changes)), max(1, len(changes)))
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


def _changes(lm: LM, patch: Patch) -> dict[str, tuple[Delta, float]]:
    """By parameter: the change, and the eps its entries were rounded with; nothing of a patch that changes no weights.

    A weight patch says what it changes. Of any other that consists of weights (adapters) the weights it makes are compared
    with those it found, so that the rule for each kind of adapter is PEFT's own.
    """
    if not patch.mergeable:
        if patch.needs_weights:
            patch.check_base(lm)
        return {}
    before = {name: p.data for name, p in lm.model.named_parameters()}
    with lm.patched(patch):
        after = {name: p.data for name, p in lm.model.named_parameters()}
    if isinstance(patch, WeightPatch):
        single = torch.finfo(torch.float32).eps
        return {name: (delta, single) for name, delta in patch.deltas.items()}
    found: dict[str, tuple[Delta, float]] = {}
    for name, old in before.items():
        if after[name] is not old and not torch.equal(after[name], old):
            found[name] = (Dense(after[name].float() - old.float()), eps_of(old.dtype))
    return found


def _measured(
    parameter: str, block: int | None, weight: Tensor, delta: Delta, eps: float, energy: float, *, turn: bool
) -> _Held:
    pieces, found = Pieces.of(delta), spectrum(delta, energy)
    tolerance = found.floor
    if not isinstance(delta, LowRank):
        # The change was reckoned from rounded weights, or has been rounded itself.
        tolerance = max(tolerance, rounding_noise(pieces, [(Pieces.held(weight), eps), (pieces, eps)]))
    told = matrix_change(
        parameter, block, weight.shape, Pieces.held(weight), pieces, delta.form, found.values, tolerance
    )
    outputs, inputs = (found.right, found.left) if turn else (found.left, found.right)
    return _Held(pieces, told, outputs, inputs)


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
        dot, common = 0.0, 0
        for at in a.pieces:
            x, y = a.pieces.read(at).double(), b.pieces.read(at).double()
            dot += float((x * y).sum())
            common += int(((x != 0) & (y != 0)).sum())
        dots, both = dots + dot, both + common
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
                cosine=_cosine(dot, a.told.norm, b.told.norm),
                jaccard=common / (a.told.touched + b.told.touched - common),
            )
        )
    norms = [math.hypot(*(h.told.norm for h in held.values())) for held in (its, others)]
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
