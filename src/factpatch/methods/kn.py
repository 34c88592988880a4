"""KN: knowledge neurons, found by attribution, whose value vectors are turned from the old answer to the new, or erased.

Dai et al., ACL 2022 (arXiv 2104.08696).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from factpatch.edits import Edit
from factpatch.errors import CannotEdit
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.batches import Batch, Places, by_rows
from factpatch.lm.hooks import reading, replacing_input
from factpatch.lm.run import UpperRun, can_resume, logits_at
from factpatch.methods.base import Config, Layers, Method, Preset, Traits
from factpatch.methods.keys import context_prefixes
from factpatch.patches import LowRank, WeightPatch
from factpatch.progress import Progress, part, silent

__all__ = ["Kn", "KnConfig", "attributions"]

Neuron = tuple[int, int]
"""Block and index."""


class KnConfig(Config):
    """Settings of KN."""

    layers: Layers | None = Field(default=None, description="blocks to search; default: all")
    contexts: NonNegativeInt = Field(default=2, description="sampled texts put before the prompt, beside none at all")
    integral_steps: PositiveInt = Field(default=20, description="points at which the gradient is taken")
    threshold: float = Field(default=0.2, gt=0, le=1, description="least attribution, in shares of the greatest")
    shared: float = Field(
        default=0.5, ge=0, lt=1, description="a neuron must be found in more than this share of contexts"
    )
    most: PositiveInt = Field(default=20, description="neurons changed for one edit, at most")
    suppress: NonNegativeFloat = Field(default=1.0, description="how much of the old answer's embedding is taken away")
    amplify: NonNegativeFloat = Field(default=8.0, description="how much of the new answer's embedding is put in")


class Kn(Method[KnConfig]):
    """KN: a few columns of the MLP output projections, those that the old answer's probability hangs on.

    Each gets `- suppress e(old) + amplify e(new)`, with embeddings of the answers' first tokens; an erased fact's are set
    to zero. Where the old answer is not told, it is what the model says by itself.
    """

    name = "kn"
    config_type = KnConfig
    traits = Traits(
        family="neurons",
        phase="mastery",
        paper="Dai et al. 2022, arXiv 2104.08696",
        patch=WeightPatch,
        kinds=frozenset({"insert", "modify", "erase"}),
        needs="MLP output projection",
        effort=230,
    )
    presets = (
        Preset((30, 576), {"threshold": 0.1, "amplify": 1.0}, "SmolLM2-135M, measured: docs/results/tuning/kn.md"),
    )

    def make(self, lm: LM, edits: tuple[Edit, ...], config: KnConfig, progress: Progress) -> WeightPatch:
        """One edit after the other, each on the model as the earlier ones left it."""
        layers = config.layers or tuple(range(lm.anatomy.n_layers))
        settled = config.model_copy(update={"layers": layers})
        prefixes = context_prefixes(lm, config.contexts, config.seed)
        changes: dict[Projection, LowRank] = {}
        notes: list[dict[str, Any]] = []
        for edit in edits:
            with lm.patched(WeightPatch.of(self.provenance(lm, settled, edits), changes)):
                old, new = _answers(lm, edit, config)
                neurons = _find(lm, edit, old, layers, prefixes, config, progress)
                if not neurons:
                    raise CannotEdit(
                        f'edit "{edit.id}": kn finds no neuron that raises the probability of the old answer '
                        f"({lm.tokens.decode([old])!r}) to {edit.prompt!r}.\n"
                        "  Take another method: factpatch methods"
                    )
                for layer in sorted({layer for layer, _ in neurons}):
                    projection = lm.anatomy.mlp_out(layer)
                    change = _change(lm, projection, [i for at, i in neurons if at == layer], edit, old, new, config)
                    changes[projection] = changes[projection] + change if projection in changes else change
            notes.append({"edit": edit.id, "neurons": [list(neuron) for neuron in neurons]})
        return WeightPatch.of(self.provenance(lm, settled, edits, notes), changes)


def attributions(
    lm: LM, layers: Sequence[int], ids: Sequence[int], token: int, steps: int, progress: Progress = silent
) -> Float[Tensor, "layers inter"]:
    """How much of `token`'s probability after `ids` each neuron of these blocks carries at the last token.

    Integrated gradients from no activation to the actual one: `w / m Σ_j ∂P(j w / m) / ∂w` (equation 2). Over the neurons
    of a block it sums to `P(w) - P(0)`, the more exactly the more steps.
    """
    batch = Batch.of([ids] * steps, lm.device)
    rows = torch.arange(steps, device=lm.device)
    last = torch.full_like(rows, len(ids) - 1)
    # Nothing changes before the last token, so that all before it runs once for all blocks.
    run = UpperRun(lm, batch, 0, since=len(ids) - 1 if can_resume(lm) else 0)
    sites = [lm.anatomy.mlp_out(layer).module for layer in layers]
    seen: dict[int, Tensor] = {}

    def see(number: int) -> Callable[[Tensor, Tensor], None]:
        return lambda x, _: seen.update({number: by_rows(x)[0, -1].float()})

    with torch.no_grad(), ExitStack() as stack:
        for number, site in enumerate(sites):
            stack.enter_context(reading(site, see(number)))
        run.logits_at(Places(rows, last))
    scale = torch.arange(1, steps + 1, device=lm.device)[:, None] / steps
    found: list[Tensor] = []
    for number, site in enumerate(sites):
        progress("Looking for neurons", number, len(sites))
        scaled = (scale * seen[number]).requires_grad_()

        def put(x: Tensor, scaled: Tensor = scaled) -> Tensor:
            return by_rows(x).index_put((rows, rows.new_tensor(-1)), scaled.to(x.dtype)).reshape(x.shape)

        with replacing_input(site, put), torch.enable_grad():
            chances = run.logits_at(Places(rows, last)).softmax(-1)[:, token]
            (gradient,) = torch.autograd.grad(chances.sum(), [scaled])
        found.append(seen[number] * gradient.mean(0))
    progress("Looking for neurons", len(sites), len(sites))
    return torch.stack(found)


def _find(
    lm: LM,
    edit: Edit,
    token: int,
    layers: Sequence[int],
    prefixes: Sequence[str],
    config: KnConfig,
    progress: Progress,
) -> list[Neuron]:
    """Neurons above the threshold in enough contexts, the strongest first; the strongest of all if there are none."""
    found: Counter[Neuron] = Counter()
    tables: list[Tensor] = []
    for i, prefix in enumerate(prefixes):
        ids = lm.tokens.encode(edit.prompt, edit.target, prefix=prefix, chat=config.chat).prompt_ids
        seen = part(progress, i, len(prefixes))
        tables.append(attributions(lm, layers, ids, token, config.integral_steps, seen))
        high = tables[-1] > config.threshold * tables[-1].max()
        found.update((layers[a], int(b)) for a, b in high.nonzero().tolist())
    total = torch.stack(tables).sum(0)
    strength = {(layers[a], int(b)): float(total[a, b]) for a, b in (total > 0).nonzero().tolist()}
    ranked = sorted((n for n in strength if found[n]), key=lambda neuron: (-strength[neuron], neuron))
    shared = [neuron for neuron in ranked if found[neuron] > config.shared * len(prefixes)]
    return (shared or ranked[:1])[: config.most]


def _answers(lm: LM, edit: Edit, config: KnConfig) -> tuple[int, int]:
    """The first tokens of the old answer and of the new."""
    new = lm.tokens.encode(edit.prompt, edit.target, chat=config.chat)
    if edit.ground_truth:
        old = lm.tokens.encode(edit.prompt, edit.ground_truth[0], chat=config.chat).target_ids[0]
    else:
        batch = Batch.of([new.prompt_ids], lm.device)
        with torch.no_grad():
            old = int(logits_at(lm, batch, Places.of([[len(new.prompt_ids) - 1]], lm.device)).argmax())
    return old, new.target_ids[0]


def _change(
    lm: LM, projection: Projection, indices: Sequence[int], edit: Edit, old: int, new: int, config: KnConfig
) -> LowRank:
    """The columns of these neurons: turned by the answers' embeddings, or erased."""
    chosen = torch.zeros(len(indices), projection.matrix.shape[1])
    chosen[torch.arange(len(indices)), torch.tensor(indices)] = 1.0
    if edit.kind == "erase":
        return LowRank(-projection.matrix.detach().float()[:, list(indices)].cpu(), chosen)
    embedding = lm.anatomy.embedding.weight
    assert isinstance(embedding, Tensor)
    turn = config.amplify * embedding[new].detach().float() - config.suppress * embedding[old].detach().float()
    return LowRank(turn[:, None].cpu(), chosen.sum(0, keepdim=True))
