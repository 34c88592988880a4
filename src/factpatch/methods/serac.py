"""SERAC: edits are kept as text; a classifier tells which questions they are about, a second model answers those.

Mitchell et al., ICML 2022 (arXiv 2206.06520).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from factpatch.edits import Edit, Probe
from factpatch.lm import LM
from factpatch.lm.encoder import EncoderName, sentence_encoder
from factpatch.lm.hooks import replacing_output
from factpatch.methods.base import Layers, Traits, in_own_order
from factpatch.methods.facts import ASKING, fact_of, note_of
from factpatch.methods.learning import Course, Learned, LearnedConfig, Look
from factpatch.methods.targets import TargetBatch
from factpatch.patches import LowRank
from factpatch.patches.context import Note, Recall
from factpatch.patches.routed import RoutedPatch, Scope
from factpatch.progress import Progress

__all__ = ["Serac", "SeracConfig"]


class SeracConfig(LearnedConfig):
    """Settings of SERAC."""

    encoder: EncoderName = Field(
        default="minilm", description="what turns texts into vectors: minilm, or words (their pieces in common)"
    )
    threshold: float = Field(default=0.5, ge=0, le=1, description="least probability of being in scope")
    units: PositiveInt = Field(default=64, description="of the classifier's hidden layer")
    layers: Layers | None = Field(
        default=None, description="blocks the second model's adapter is on; default: upper half"
    )
    rank: PositiveInt = Field(default=8, description="of the adapter's maps")
    steps: PositiveInt = Field(default=150, description="training steps, at most")
    lr: PositiveFloat = Field(default=1e-2, description="learning rate of the classifier, in training")
    adapter_lr: PositiveFloat = Field(default=2e-3, description="learning rate of the adapter, in training")
    success: NonNegativeFloat = Field(default=0.1, description="weight of the second model's loss, in training")
    locality: NonNegativeFloat = Field(default=1.0, description="weight of the classifier's loss, in training")


class Serac(Learned[SeracConfig]):
    """SERAC: the classifier compares sentence vectors; the second model is the base with an adapter, reading the edit.

    Published SERAC takes another, smaller model for the second. Here it shares the base's weights: the adapter acts only
    where a question is in scope, so answers out of scope stay what they are.
    """

    name = "serac"
    config_type = SeracConfig
    in_use = frozenset({"threshold"})
    traits = Traits(
        family="learned editors",
        phase="recognition",
        paper="Mitchell et al. 2022, arXiv 2206.06520",
        patch=RoutedPatch,
        joint=True,
        prepares="a trained classifier and adapter, a sentence encoder",
        needs="attention projections; the extra retrieval",
        effort=3,
    )

    def make(self, lm: LM, edits: tuple[Edit, ...], config: SeracConfig, progress: Progress) -> RoutedPatch:
        """Write the edits down beside what was trained."""
        network, config, editor = self.trained(lm, config, progress)
        assert isinstance(network, _Network)
        network.cpu()  # as it would come from disk
        ordered = in_own_order(edits)
        notes = tuple(Note(text=note_of(edit), topic=fact_of(edit)) for edit in ordered)
        recall = Recall(encoder=config.encoder, threshold=config.threshold, most=1)
        settled = config.model_copy(update={"layers": _layers(lm, config)})
        provenance = self.provenance(lm, settled, edits, [{"editor": editor}])
        return RoutedPatch(provenance, notes, ASKING, recall, scope=network.scope(), adapter=network.adapter())

    def network(self, lm: LM, config: SeracConfig) -> _Network:
        """The classifier and the adapter, of which the second changes nothing at first."""
        return _Network(lm, config).to(lm.device)

    def course(self, lm: LM, edits: Sequence[Edit], config: SeracConfig, progress: Progress) -> Course:
        """Questions in and out of scope for the one, answers to those in scope for the other."""
        return _SeracCourse(self.network(lm, config), lm, edits, config, progress)


class _Network(nn.Module):
    """What SERAC trains."""

    def __init__(self, lm: LM, config: SeracConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        both = 2 * sentence_encoder(config.encoder).embed(["width"]).shape[1]
        self.hidden = nn.Parameter(torch.randn(config.units, both, generator=generator) / both**0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(config.units))
        self.out = nn.Parameter(torch.randn(config.units, generator=generator) / config.units**0.5)
        self.out_bias = nn.Parameter(torch.zeros(()))
        maps = [p for layer in _layers(lm, config) for p in lm.anatomy.queries_and_values(layer)]
        self.modules_changed = [p.parameter.removesuffix(".weight") for p in maps]
        shapes = [p.matrix.shape for p in maps]
        self.u = nn.ParameterList(torch.zeros(out, config.rank) for out, _ in shapes)
        self.v = nn.ParameterList(torch.randn(config.rank, w, generator=generator) / w**0.5 for _, w in shapes)

    def scope(self) -> Scope:
        """The classifier."""
        return Scope(self.hidden, self.hidden_bias, self.out, self.out_bias)

    def adapter(self) -> dict[str, LowRank]:
        """The adapter, by module."""
        return {name: LowRank(u, v) for name, u, v in zip(self.modules_changed, self.u, self.v, strict=True)}


class _SeracCourse(Course):
    """For each edit, questions in its scope, questions out of it, and what the second model is to say to the former."""

    def __init__(
        self, network: _Network, lm: LM, edits: Sequence[Edit], config: SeracConfig, progress: Progress
    ) -> None:
        self.network: _Network = network
        self.lm, self.edits, self.config = lm, edits, config
        self.within = [_within(edit) for edit in edits]
        self.beyond = [self._beyond(number) for number in range(len(edits))]
        texts = [fact_of(edit) for edit in edits]
        texts += [probe.prompt for group in (*self.within, *self.beyond) for probe in group]
        wanted = list(dict.fromkeys(texts))
        vectors = sentence_encoder(config.encoder, progress).embed(wanted).to(lm.device)
        self.vectors = dict(zip(wanted, vectors, strict=True))

    def parameters(self) -> list[dict[str, object]]:
        """The adapter has a learning rate of its own."""
        adapter = [*self.network.u, *self.network.v]
        classifier = [p for p in self.network.parameters() if not any(p is each for each in adapter)]
        return [{"params": classifier}, {"params": adapter, "lr": self.config.adapter_lr}]

    def study(self, chosen: Sequence[int]) -> Look:
        """Both at once; neither's loss touches the other."""
        with torch.enable_grad():
            loss, seen = self._losses(chosen)
            loss.backward(inputs=list(self.network.parameters()))  # type: ignore[no-untyped-call]
        return seen

    def look(self, chosen: Sequence[int]) -> Look:
        """The same without learning."""
        with torch.no_grad():
            return self._losses(chosen)[1]

    def _losses(self, chosen: Sequence[int]) -> tuple[Float[Tensor, ""], Look]:
        edits, questions, truth = [], [], []
        for number in chosen:
            for probes, inside in ((self.within[number], 1.0), (self.beyond[number], 0.0)):
                for probe in probes:
                    edits.append(self.vectors[fact_of(self.edits[number])])
                    questions.append(self.vectors[probe.prompt])
                    truth.append(inside)
        wanted = torch.tensor(truth, device=self.lm.device)
        logits = self.network.scope().logits(torch.stack(edits), torch.stack(questions))
        # As much weight to what is in scope as to what is not, however many there are of each.
        weights = torch.where(
            wanted > 0, 0.5 / wanted.mean().clamp(min=1e-6), 0.5 / (1 - wanted).mean().clamp(min=1e-6)
        )
        scope = nn.functional.binary_cross_entropy_with_logits(logits, wanted, weights)
        accuracy = ((logits > 0) == (wanted > 0)).float().mean()
        nll, success = self._second_model(chosen)
        loss = self.config.locality * scope + self.config.success * nll
        seen = {"loss": loss, "scope": scope, "accuracy": accuracy, "nll": nll, "success": success}
        return loss, {name: float(value.detach()) for name, value in seen.items()}

    def _second_model(self, chosen: Sequence[int]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss of the answers in scope with the edit in the prompt, and the share of them that are right."""
        texts = [
            self.lm.tokens.encode(
                probe.prompt, probe.answers[0], prefix=note_of(self.edits[number]) + ASKING, chat=self.config.chat
            )
            for number in chosen
            for probe in self.within[number]
        ]
        modules = dict(self.lm.model.named_modules())
        batch = TargetBatch(self.lm, texts, min(_layers(self.lm, self.config)))
        with ExitStack() as stack:
            for name, change in self.network.adapter().items():
                stack.enter_context(replacing_output(modules[name], change.added))
            losses, correct = batch.nll_and_correct()
        return losses.mean(), correct.float().mean()

    def _beyond(self, number: int) -> list[Probe]:
        """The edit's own locality probes, which tend to be about the same subject, and two other edits' prompts."""
        edit = self.edits[number]
        own = [probe for group in edit.locality.values() for probe in group[:1]]
        others = [self.edits[(number + step) % len(self.edits)] for step in (1, 2)]
        return own + [Probe(prompt=other.prompt) for other in others if other.prompt != edit.prompt]


def _within(edit: Edit) -> list[Probe]:
    """The prompt, a rephrase, and the first portability probe of each kind."""
    target = (edit.target,)
    wordings = [Probe(prompt=prompt, answers=target) for prompt in (edit.prompt, *edit.rephrases[:1])]
    return wordings + [group[0] for group in edit.portability.values() if group and group[0].answers]


def _layers(lm: LM, config: SeracConfig) -> tuple[int, ...]:
    return config.layers or tuple(range(lm.anatomy.n_layers // 2, lm.anatomy.n_layers))
