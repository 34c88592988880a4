"""The network that turns a gradient's two factors into better ones: what MEND and MALMEN train.

Mitchell et al., ICLR 2022 (arXiv 2110.11309), section 3 and the release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from factpatch.lm.anatomy import Projection
from factpatch.methods.gradients import Gradients, Moments

__all__ = ["HyperNetwork"]


class _Residual(nn.Module):
    """`x + act(s ⊙ (U V x + b) + t)`, with a scale s and a shift t for each matrix (FiLM); the identity at first."""

    def __init__(self, width: int, rank: int, matrices: int, generator: torch.Generator, *, rectified: bool) -> None:
        super().__init__()
        self.rectified = rectified
        self.inner = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.outer = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(matrices, width))
        self.shift = nn.Parameter(torch.zeros(matrices, width))

    def forward(self, x: Float[Tensor, "rows width"], which: int) -> Float[Tensor, "rows width"]:
        """For matrix number `which` of those that share this layer."""
        change = self.scale[which] * (x @ self.inner.T @ self.outer.T + self.bias) + self.shift[which]
        return x + (change.relu() if self.rectified else change)


class _PairNetwork(nn.Module):
    """For all matrices of one shape: `[u, δ]`, normalised elementwise, through two residual layers."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, rank: int, matrices: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.hidden = _Residual(width, rank, matrices, generator, rectified=True)
        self.last = _Residual(width, rank, matrices, generator, rectified=False)

    def forward(self, rows: Float[Tensor, "rows width"], which: int) -> Float[Tensor, "rows width"]:
        """Both factors, joined."""
        normal = (rows - self.mean) / (self.deviation + 1e-7)
        hidden: Tensor = self.hidden(normal, which)
        out: Tensor = self.last(hidden, which)
        return out


class HyperNetwork(nn.Module):
    """A pair network for each shape of matrix, and numbers learned for each matrix.

    log_step   the logarithm of its step's size
    log_ridge  the logarithm of λ where shifts are merged by least squares
    """

    def __init__(self, matrices: Sequence[Projection], rank: int, step: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self._places: dict[str, tuple[str, int, int]] = {}
        sharing: dict[tuple[int, ...], list[Projection]] = {}
        for matrix in matrices:
            sharing.setdefault(tuple(matrix.matrix.shape), []).append(matrix)
        self.pairs = nn.ModuleDict()
        for shape, group in sharing.items():
            name = "x".join(map(str, shape))
            self.pairs[name] = _PairNetwork(sum(shape), min(rank, sum(shape)), len(group), generator)
            for number, matrix in enumerate(group):
                self._places[matrix.parameter] = (name, number, len(self._places))
        self.log_step = nn.Parameter(torch.full((len(matrices),), step).log())
        self.log_ridge = nn.Parameter(torch.zeros(len(matrices)))

    def normalise_by(self, seen: Mapping[Projection, Gradients]) -> None:
        """Take mean and deviation of each shape's rows from these gradients, once, before training begins."""
        for name, network in self.pairs.items():
            assert isinstance(network, _PairNetwork)
            rows = [_informative(g).joined for p, g in seen.items() if self._places[p.parameter][0] == name]
            moments = Moments.of(torch.cat(rows))
            network.mean.copy_(moments.mean)
            network.deviation.copy_((moments.spread / (moments.count - 1).clamp(min=1)).sqrt())

    def forward(
        self, matrix: Projection, gradients: Gradients
    ) -> tuple[Float[Tensor, "rows in"], Float[Tensor, "rows out"], Float[Tensor, "rows in"]]:
        """`ũ` and `δ̃` for each row that has a gradient, and the row's `u` as it was."""
        name, number, _ = self._places[matrix.parameter]
        rows = _informative(gradients)
        device = self.log_step.device
        out = self.pairs[name](rows.joined.to(device), number)
        width = rows.inputs.shape[1]
        return out[:, :width], out[:, width:], rows.inputs.to(device, torch.float32)

    def step(self, matrix: Projection) -> Float[Tensor, ""]:
        """The size of this matrix's step."""
        return self.log_step[self._places[matrix.parameter][2]].exp()

    def ridge(self, matrix: Projection) -> Float[Tensor, ""]:
        """This matrix's λ."""
        return self.log_ridge[self._places[matrix.parameter][2]].exp()


def _informative(gradients: Gradients) -> Gradients:
    """Without the rows whose gradient is zero, which say nothing."""
    kept = gradients.outputs.abs().amax(1) > 0
    return Gradients(gradients.inputs[kept], gradients.outputs[kept])
