"""Learned editors of gradients: MEND and MALMEN.

MEND    Mitchell et al., ICLR 2022 (arXiv 2110.11309)
MALMEN  Tan et al., ICLR 2024 (arXiv 2311.04661)

A small network is trained to turn an edit's gradient into a change of the weights that carries to other wordings and
leaves unrelated answers alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from factpatch.edits import Edit, Probe
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.hooks import replacing_output
from factpatch.methods.base import Layers, Preset, Traits, in_own_order
from factpatch.methods.gradients import Gradients, gradients
from factpatch.methods.hypernetwork import HyperNetwork
from factpatch.methods.insertion import insert
from factpatch.methods.learning import Course, Learned, LearnedConfig, Look
from factpatch.methods.targets import TargetBatch
from factpatch.patches import Dense, LowRank, WeightPatch
from factpatch.progress import Progress

__all__ = ["HyperConfig", "Malmen", "MalmenConfig", "Mend"]


class HyperConfig(LearnedConfig):
    """Settings of MEND."""

    layers: Layers | None = Field(default=None, description="blocks to edit; default: the last three")
    rank: PositiveInt = Field(default=128, description="of the network's maps")
    step: PositiveFloat = Field(default=1e-4, description="size of the weights' step before training")
    success: NonNegativeFloat = Field(default=0.1, description="weight of the target's loss, in training")
    locality: NonNegativeFloat = Field(default=1.0, description="weight of the change elsewhere, in training")
    together: PositiveInt = Field(default=1, description="edits merged into one change, in training")


class MalmenConfig(HyperConfig):
    """Settings of MALMEN."""

    together: PositiveInt = Field(default=8, description="edits merged into one change, in training")


class _Hyper(Learned[HyperConfig]):
    config_type = HyperConfig
    presets = (Preset((30, 576), {"success": 1.0}, "SmolLM2-135M, measured with MEND: docs/results/tuning/mend.md"),)

    def make(self, lm: LM, edits: tuple[Edit, ...], config: HyperConfig, progress: Progress) -> WeightPatch:
        """One backward pass, and the network's answer to it."""
        network, config, editor = self.trained(lm, config, progress)
        assert isinstance(network, HyperNetwork)
        layers = _layers(lm, config)
        matrices = _matrices(lm, layers)
        ordered = in_own_order(edits)
        found = gradients(lm, matrices, layers[0], ordered, chat=config.chat, everywhere=True, progress=progress)
        with torch.no_grad():
            changes = {m: self.shift(network.to(lm.device), m, found[m]) for m in matrices}
        settled = config.model_copy(update={"layers": layers})
        return WeightPatch.of(self.provenance(lm, settled, edits, [{"editor": editor}]), changes)

    @abstractmethod
    def shift(self, network: HyperNetwork, matrix: Projection, found: Gradients) -> LowRank | Dense:
        """The change of one matrix that these gradients call for; differentiable in the network."""

    def network(self, lm: LM, config: HyperConfig) -> HyperNetwork:
        """For the projections into and out of the MLPs of the blocks to edit."""
        matrices = _matrices(lm, _layers(lm, config))
        return HyperNetwork(matrices, config.rank, config.step, config.seed).to(lm.device)

    def course(self, lm: LM, edits: Sequence[Edit], config: HyperConfig, progress: Progress) -> Course:
        """Gradients of the targets in; out, the targets' loss in every wording and the change of unrelated answers."""
        return _HyperCourse(self, lm, edits, config, progress)


class Mend(_Hyper):
    """MEND: `ΔW = -α Σ_i δ̃_i ũ_iᵀ` over the edits' tokens, `[ũ, δ̃]` the network's answer to `[u, δ]`.

    Edits made at once are summed, which weakens them as they become many.
    """

    name = "mend"
    traits = Traits(
        family="learned editors",
        phase="mastery",
        paper="Mitchell et al. 2022, arXiv 2110.11309",
        patch=WeightPatch,
        joint=True,
        prepares="a trained editor",
        needs="MLP projections",
        effort=2,
    )

    def shift(self, network: HyperNetwork, matrix: Projection, found: Gradients) -> LowRank:
        """Equation 3."""
        u, delta, _ = network(matrix, found)
        return LowRank(-network.step(matrix) * delta.T, u)


class Malmen(_Hyper):
    """MALMEN: the shifts that the network wants at each token, merged by least squares instead of summed.

    `S = D Uᵀ (U Uᵀ + λ I)⁻¹` with `D_i = -η (u_i · ũ_i) δ̃_i`; η and λ are learned for each matrix.
    """

    name = "malmen"
    config_type = MalmenConfig
    traits = replace(Mend.traits, paper="Tan et al. 2024, arXiv 2311.04661")

    def shift(self, network: HyperNetwork, matrix: Projection, found: Gradients) -> LowRank | Dense:
        """Equations 3 and 4."""
        pseudo, delta, keys = network(matrix, found)
        wanted = -network.step(matrix) * (keys * pseudo).sum(1, keepdim=True) * delta
        return insert(wanted.T, keys.T, ridge=network.ridge(matrix))


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What an edit gives to learn from.

    found   its gradient's factors in the base model
    wanted  its target after each wording of its prompt
    kept    answers to other questions; None if there are none
    """

    found: Mapping[Projection, Gradients]
    wanted: TargetBatch
    kept: TargetBatch | None


_LESSONS = 512
"""How many lessons are kept in memory; each holds some hundred rows of activations."""


class _HyperCourse(Course):
    def __init__(self, method: _Hyper, lm: LM, edits: Sequence[Edit], config: HyperConfig, progress: Progress) -> None:
        self.method, self.lm, self.edits, self.config = method, lm, edits, config
        self.layers = _layers(lm, config)
        self.matrices = _matrices(lm, self.layers)
        self.network: HyperNetwork = method.network(lm, config)
        self.lessons: dict[int, _Lesson] = {}
        some = list(edits[: 8 * config.batch_size])
        self.network.normalise_by(
            gradients(lm, self.matrices, self.layers[0], some, chat=config.chat, everywhere=True, progress=progress)
        )

    def study(self, chosen: Sequence[int]) -> Look:
        """In groups that are merged into one change each; the graph of one group is held at a time."""
        return self._go_through(chosen, learn=True)

    def look(self, chosen: Sequence[int]) -> Look:
        """The same without learning."""
        return self._go_through(chosen, learn=False)

    def _go_through(self, chosen: Sequence[int], *, learn: bool) -> Look:
        together = min(self.config.together, len(chosen))
        groups = [chosen[i : i + together] for i in range(0, len(chosen), together)]
        total = torch.zeros(3)
        for group in groups:
            lessons = [self._lesson(i) for i in group]
            with torch.set_grad_enabled(learn):
                changes = {m: self.method.shift(self.network, m, _joined(lessons, m)) for m in self.matrices}
            # In two stages: the loss's gradient with respect to the change, then that of the change in the network.
            factors = [factor for change in changes.values() for factor in change.parts().values()]
            leaves = [factor.detach().requires_grad_(learn) for factor in factors]
            given = iter(leaves)
            changed = {m: type(change)(*(next(given) for _ in change.parts())) for m, change in changes.items()}
            for lesson in lessons:
                total += self._loss(lesson, changed, len(chosen), leaves if learn else None)
            if learn:
                torch.autograd.backward(factors, [leaf.grad for leaf in leaves])
        nll, moved, right = (total / len(chosen)).tolist()
        loss = self.config.success * nll + self.config.locality * moved
        return {"loss": loss, "nll": nll, "divergence": moved, "success": right}

    def _loss(
        self,
        lesson: _Lesson,
        changed: Mapping[Projection, LowRank | Dense],
        count: int,
        leaves: Sequence[Tensor] | None,
    ) -> Float[Tensor, " 3"]:
        """The target's loss, the divergence elsewhere, and whether the target was right; gradients go to `leaves`."""
        with torch.no_grad():
            before = None if lesson.kept is None else lesson.kept.logprobs()
        with torch.set_grad_enabled(leaves is not None), _shifted(changed):
            losses, correct = lesson.wanted.nll_and_correct()
            nll = losses.mean()
            moved = torch.zeros_like(nll)
            if lesson.kept is not None and before is not None:
                after = lesson.kept.logprobs()
                moved = (before.exp() * (before - after)).sum(-1).mean()
            if leaves is not None:
                loss = (self.config.success * nll + self.config.locality * moved) / count
                loss.backward(inputs=list(leaves))  # type: ignore[no-untyped-call]
        return torch.stack([nll.detach(), moved.detach(), correct.float().mean()]).cpu()

    def _lesson(self, number: int) -> _Lesson:
        if number not in self.lessons:
            if len(self.lessons) >= _LESSONS:
                del self.lessons[next(iter(self.lessons))]
            self.lessons[number] = self._new_lesson(number)
        return self.lessons[number]

    def _new_lesson(self, number: int) -> _Lesson:
        edit, other = self.edits[number], self.edits[(number + 1) % len(self.edits)]
        first, chat = self.layers[0], self.config.chat
        asked = [self.lm.tokens.encode(p, edit.target, chat=chat) for p in (edit.prompt, *edit.rephrases)]
        unrelated = [p for group in edit.locality.values() for p in group[:1] if p.answers]
        unrelated.append(Probe(prompt=other.prompt, answers=other.ground_truth or (other.target,)))
        kept = [self.lm.tokens.encode(p.prompt, p.answers[0], chat=chat) for p in unrelated if p.prompt != edit.prompt]
        return _Lesson(
            gradients(self.lm, self.matrices, first, [edit], chat=chat, everywhere=True),
            TargetBatch(self.lm, asked, first),
            TargetBatch(self.lm, kept, first) if kept else None,
        )


@contextmanager
def _shifted(changes: Mapping[Projection, LowRank | Dense]) -> Iterator[None]:
    """The model with these changes for the length of a `with`, beside its weights and differentiable."""
    with ExitStack() as stack:
        for matrix, change in changes.items():
            stack.enter_context(replacing_output(matrix.module, change.added))
        yield


def _joined(lessons: Sequence[_Lesson], matrix: Projection) -> Gradients:
    found = [lesson.found[matrix] for lesson in lessons]
    return Gradients(torch.cat([g.inputs for g in found]), torch.cat([g.outputs for g in found]))


def _layers(lm: LM, config: HyperConfig) -> tuple[int, ...]:
    n = lm.anatomy.n_layers
    return tuple(sorted(config.layers)) if config.layers else tuple(range(max(0, n - 3), n))


def _matrices(lm: LM, layers: Sequence[int]) -> list[Projection]:
    return [p for layer in layers for p in (*lm.anatomy.mlp_in(layer), lm.anatomy.mlp_out(layer))]
