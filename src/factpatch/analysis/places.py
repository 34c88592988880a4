"""Do locating methods find the fact? Places found for related facts compared with places found for unrelated ones.

Two ways of locating are compared: knowledge neurons (Dai et al. 2022, arXiv 2104.08696) and causal tracing (Meng et al.
2022, arXiv 2202.05262). The measure is the survey's (arXiv 2401.01286, section 5.2), which takes it from KLoB (Ju and
Zhang 2023, arXiv 2309.16535), relative similarity:

    RSim = max((Sim_cand - Sim_all) / (1 - Sim_all), 0)

`Sim_cand` is how alike the places of facts that belong together are, `Sim_all` how alike they are to all others. It is 1
if those that belong together are found in one place, and 0 if they are no more alike than any.

What belongs together, by level:

wording    one fact asked in other words; KLoB's consistency
chain      a fact and a question that goes through it, such as a city's country and the language of that country; KLoB's
           relevance
entity     facts of one entity with other relations; beside `chain`, the survey's case study in numbers
relation   facts of one relation about other entities, with other answers
answer     facts of other relations about other entities with the same answer; a control, for a method may find what is
           said rather than why

What is compared of each fact, by measure:

neurons       the set of neurons with more than `threshold` of the greatest attribution: shared ones over all (Jaccard)
attributions  the attributions of all neurons: cosine
layers        the `top` layers with the greatest effect at the subject's last token: the share in common, as in the survey
maps          the effects by role of token and layer: cosine

Facts of one relation are mostly asked in the same words, so that level holds what the words alone bring about.

`Sim_all` is taken over pairs of facts that share neither entity, relation nor answer. In KLoB it is all other results of
the task, which are mostly such; in a table of entities by relations they would mostly not be. Both are means over the
groups of a level (facts, entities, relations, answers), each group's over its own pairs.

Whether an edit's target can be read off the changed weights is for `factpatch.analysis.changed_values` to tell.

What could not be verified. The survey's text was read in a transcription in which its formula is a picture; the formula is
as a summary of KLoB's paper gives it. KLoB's text was not at hand: whether it takes the quotient for each item, or of the
means as here, and its similarity of neurons, are choices made here. Which is KLoB's data for consistency and which for
relevance, the survey tells the other way round than KLoB's own examples, which are followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from factpatch.analysis.base import Result
from factpatch.analysis.changed_values import Unread, ValueReading, check_readable, read_values
from factpatch.analysis.places_alike import (
    LevelComparison,
    Measure,
    compare_levels,
    cosine,
    few,
    jaccard,
    overlap,
)
from factpatch.analysis.places_facts import Triple, Wording, counterfacts, known_triples, read_triples
from factpatch.analysis.tracing import ROLES, Part, average, encoded_fact, trace_all
from factpatch.errors import BadFile
from factpatch.lm import LM
from factpatch.methods import Method
from factpatch.methods.kn import attributions
from factpatch.progress import Progress, part, silent
from factpatch.words import counted

__all__ = ["PlacesReport", "compare_places", "read_triples"]


class PlacesReport(Result):
    """What was found of where facts are.

    asked        facts in the table
    facts        of these, those that the model knows and that were located
    wordings     of these facts, all that were located
    entities     of these facts, different ones
    part         what was restored in tracing
    steps        of the integral of attribution
    threshold    least attribution of a neuron, in shares of the greatest
    top          layers taken as found by tracing
    comparisons  for each measure, each level at which something could be compared
    values       for each method and edit, what the changed values say
    unread       edits that a method refused, or that changed nothing
    """

    model: str
    fingerprint: str
    asked: int
    facts: int
    wordings: int
    entities: int
    part: Part
    samples: int
    steps: int
    threshold: float
    top: int
    seed: int
    comparisons: tuple[LevelComparison, ...]
    values: tuple[ValueReading, ...] = ()
    unread: tuple[Unread, ...] = ()


def _comparable(located: Sequence[Wording]) -> bool:
    """Whether there are both related and unrelated ones among them."""
    return bool(compare_levels("maps", torch.zeros(len(located), len(located)), located))


def _attributed(lm: LM, located: Sequence[Wording], steps: int, progress: Progress) -> Float[Tensor, "results places"]:
    """Attributions of all neurons of all blocks, a row for each fact; on the CPU."""
    layers = range(lm.anatomy.n_layers)
    rows = []
    for i, one in enumerate(located):
        ids = encoded_fact(lm, one.fact).prompt_ids
        found = attributions(lm, layers, ids, one.token, steps, part(progress, i, len(located)))
        rows.append(found.flatten().cpu())
    return torch.stack(rows)


def _above(scores: Float[Tensor, "results places"], threshold: float) -> Bool[Tensor, "results places"]:
    """The neurons of each result above a share of its greatest attribution; of none above zero, the greatest."""
    most = scores.max(-1, keepdim=True).values
    return torch.where(most > 0, scores > threshold * most, scores == most)


def _highest(scores: Float[Tensor, "results layers"], top: int) -> Bool[Tensor, "results layers"]:
    """The layers of each result with the highest scores."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :top]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, value=True)


def compare_places(
    lm: LM,
    triples: Sequence[Triple],
    *,
    methods: Sequence[Method[Any]] = (),
    edits: int = 10,
    limit: int | None = None,
    wordings: int | None = None,
    traced: Part = "mlp",
    steps: int = 20,
    threshold: float = 0.2,
    top: int = 5,
    samples: int = 10,
    seed: int = 0,
    progress: Progress = silent,
) -> PlacesReport:
    """Locate facts by attribution and by tracing, and compare the places found; see the module for the measures.

    methods    whose changed values are read, on so many `edits` that give a fact another fact's answer
    limit      of the facts that the model knows, only so many: the first, and some to compare them with; see `few`
    wordings   of each of these, only the first so many that the model knows
    traced     what is restored in tracing: one `state`, or the outputs of several blocks' `mlp` or `attention`
    steps      of the integral of attribution
    threshold  a neuron counts above this share of the greatest attribution
    top        so many layers count as found by tracing
    samples    of noise in tracing

    Values are read first, since that may fail. Raises BadFile if the model knows too little of the facts for any comparison;
    AnatomyError; CannotEdit for a method that changes no MLP output projection; what tracing and the methods raise.
    """
    for method in methods:
        check_readable(method)
    known = known_triples(lm, triples, wordings)
    located = few(known, limit)
    if not _comparable(located):
        knows = sum(one.first for one in known)
        enough = (n for n in range(limit or knows, knows + 1) if _comparable(few(known, n)))
        cut = limit is not None and limit < knows
        raise BadFile(
            f"{lm.name} knows {knows} of these {counted(len(triples), 'fact')}"
            + (f", of which the limit leaves {limit}" if cut else "")
            + "; there are not both related and unrelated ones among them, so nothing can be compared.\n  "
            + (f"Raise --limit to {least} or more; or give" if (least := next(enough, None)) else "Give")
            + " facts that it knows, about several entities: --facts FILE"
        )
    changed = counterfacts(located)[:edits]
    read = [read_values(lm, method, changed, progress) for method in methods]
    found = _attributed(lm, located, steps, progress)
    traces = trace_all(
        lm, [one.fact for one in located], part=traced, samples=samples, seed=seed, progress=progress
    )  # fmt: skip
    # A role that no token has counts as without effect. Before the subject nothing is disturbed, hence nothing restored.
    maps = torch.stack([average([trace]).effects.nan_to_num() for trace in traces])
    alike: dict[Measure, Tensor] = {
        "neurons": jaccard(_above(found, threshold)),
        "attributions": cosine(found),
        "layers": overlap(_highest(maps[:, ROLES.index("last subject token")], top)),
        "maps": cosine(maps.flatten(1)),
    }
    return PlacesReport(
        model=lm.name,
        fingerprint=lm.fingerprint,
        asked=len(triples),
        facts=sum(one.first for one in located),
        wordings=len(located),
        entities=len({one.entity for one in located}),
        part=traced,
        samples=samples,
        steps=steps,
        threshold=threshold,
        top=top,
        seed=seed,
        comparisons=tuple(one for measure, table in alike.items() for one in compare_levels(measure, table, located)),
        values=tuple(value for values, _ in read for value in values),
        unread=tuple(edit for _, edits_left in read for edit in edits_left),
    )
