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

Whether an edit's target can be read off the changed weights is the survey's section 5.1: the five columns of a changed
value matrix that change most are read through the output head, before and after, and Hit@10 and Hit@50 tell whether the
target is among the first 10 and 50 tokens.

What could not be verified. The survey's text was read in a transcription in which its formula is a picture; the formula is
as a summary of KLoB's paper gives it. KLoB's text was not at hand: whether it takes the quotient for each item, or of the
means as here, and its similarity of neurons, are choices made here. Which is KLoB's data for consistency and which for
relevance, the survey tells the other way round than KLoB's own examples, which are followed. Of section 5.1 it is not told
whether one column with the target is enough; here it is. The survey multiplies columns by the embedding as they are (after
Dar et al. 2022, arXiv 2209.02535); here they go through the final norm first, as what they are added to does.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from factpatch.analysis.facts import Fact, from_telling, known_facts
from factpatch.analysis.tracing import ROLES, Part, average, encoded_fact, trace_all
from factpatch.bench.singles import make
from factpatch.edits import Edit, Texts, first_problem
from factpatch.errors import AnatomyError, BadFile, BadRecord, CannotEdit
from factpatch.lm import LM
from factpatch.lm.batches import Batch, Places, by_rows
from factpatch.lm.hooks import reading
from factpatch.lm.predictions import predict
from factpatch.lm.run import logits_at
from factpatch.methods import Method
from factpatch.methods.kn import attributions
from factpatch.patches import Patch, WeightPatch
from factpatch.patches.delta import Delta
from factpatch.progress import Progress, part, silent
from factpatch.scoring.metrics import normalise

__all__ = [
    "LEVELS",
    "MEASURES",
    "Group",
    "Level",
    "LevelComparison",
    "Measure",
    "PlacesReport",
    "Triple",
    "Unread",
    "ValueReading",
    "Wording",
    "compare_levels",
    "compare_places",
    "cosine",
    "counterfacts",
    "jaccard",
    "known_triples",
    "overlap",
    "read_triples",
    "read_values",
    "relative_similarity",
]

Measure = Literal["neurons", "attributions", "layers", "maps"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Level = Literal["wording", "chain", "entity", "relation", "answer"]
LEVELS: tuple[Level, ...] = get_args(Level)

COLUMNS = 5
"""How many columns of the changed value matrices are read, as in the survey."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Triple:
    """An entity, a relation and an answer, with ways to ask for it.

    prompts  the same question in several wordings, each with the entity in it
    answers  any of these is right
    via      of a question that goes through another fact of the entity: the relation of that fact
    """

    entity: str
    relation: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    via: str | None = None


@dataclass(frozen=True, slots=True)
class Wording:
    """A wording of a fact that the model knows.

    token  the first of its answer that tells something
    first  whether it is the first wording of the fact that the model knows; levels other than `wording` compare these
    """

    fact: Fact
    relation: str
    token: int
    first: bool
    via: str | None = None

    @property
    def entity(self) -> str:
        """What the fact is about."""
        return self.fact.subject


class Group(_Value):
    """Facts that belong together.

    name     what they have in common
    pairs    how many pairs of them were compared
    inside   how alike their places are, mean over these pairs
    outside  how alike their places are to those of unrelated facts, mean over such pairs
    """

    name: str
    pairs: int
    inside: float
    outside: float


class LevelComparison(_Value):
    """How alike the places of facts that belong together are, by one measure, at one level.

    groups  at least one
    """

    measure: Measure
    level: Level
    groups: tuple[Group, ...] = Field(min_length=1)

    @property
    def inside(self) -> float:
        """`Sim_cand`, mean over groups."""
        return fmean(group.inside for group in self.groups)

    @property
    def outside(self) -> float:
        """`Sim_all`, mean over groups."""
        return fmean(group.outside for group in self.groups)

    @property
    def rsim(self) -> float:
        """Relative similarity of these two means."""
        return relative_similarity(self.inside, self.outside)

    @property
    def relative(self) -> tuple[float, ...]:
        """By group, `(inside - outside) / (1 - Sim_all)`; their mean is RSim where that is above 0."""
        room = 1 - self.outside
        return tuple((group.inside - group.outside) / room if room > 0 else 0.0 for group in self.groups)


class ValueReading(_Value):
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


class Unread(_Value):
    """An edit whose changed values could not be read, and why."""

    method: str
    edit: str
    reason: str


class PlacesReport(_Value):
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


# What is read ----------------------------------------------------------------------------------------------------------


class _Table(_Value):
    """A file of facts: wordings by relation with {} for the entity, the answers by entity, and which relations chain."""

    relations: dict[str, Texts]
    facts: dict[str, dict[str, Annotated[Texts, Field(min_length=1)]]]
    chains: dict[str, str] = Field(default_factory=dict)


def read_triples(path: Path | None = None) -> list[Triple]:
    """Facts from a JSON file; the built-in ones about countries and cities, which are ours, if none is given.

    The file has `relations` (name to wordings, with {} for the entity), `facts` (entity to relation to answers) and, if
    wanted, `chains` (relation to the relation of the same entity it goes through). Raises BadFile, BadRecord.
    """
    source = "places.json" if path is None else str(path)
    try:
        at = files("factpatch.data").joinpath("places.json") if path is None else path
        table = _Table.model_validate(json.loads(at.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BadFile(f"{source}: no such file.\n  Give a JSON file with relations and facts.") from None
    except ValidationError as error:
        raise BadRecord(source, None, *first_problem(error)) from None
    except (OSError, ValueError) as error:
        raise BadFile(f"{source}: expected JSON with relations and facts ({error}).") from None
    for entity, own in table.facts.items():
        for relation in own:
            wordings = table.relations.get(relation, ())
            if not wordings or any("{}" not in wording for wording in wordings):
                problem = f'"{relation}" needs wordings in "relations", each with {{}} where the entity goes'
                raise BadRecord(source, None, f"facts.{entity}", problem)
    return [
        Triple(
            entity,
            relation,
            tuple(wording.replace("{}", entity) for wording in table.relations[relation]),
            answers,
            table.chains.get(relation),
        )
        for entity, own in table.facts.items()
        for relation, answers in own.items()
    ]


def known_triples(
    lm: LM, triples: Sequence[Triple], limit: int | None = None, wordings: int | None = None
) -> list[Wording]:
    """The wordings at which the model gives the answer (see `says`): the first so many of the first so many facts."""
    asked = [
        Edit(id=prompt, prompt=prompt, subject=each.entity, target=each.answers[0], ground_truth=each.answers)
        for each in triples
        for prompt in each.prompts
    ]
    known = {(fact.prompt, fact.subject): fact for fact in known_facts(lm, asked)}
    found: list[Wording] = []
    facts = 0
    for each in triples:
        said = [known[prompt, each.entity] for prompt in each.prompts if (prompt, each.entity) in known]
        own = [fact for fact in said if fact.answer in each.answers][:wordings]
        if not own or (limit is not None and facts >= limit):
            continue
        facts += 1
        found += [
            Wording(fact, each.relation, encoded_fact(lm, fact).target_ids[0], i == 0, each.via)
            for i, fact in enumerate(own)
        ]
    return found


# Measures --------------------------------------------------------------------------------------------------------------


def jaccard(sets: Bool[Tensor, "results places"]) -> Float[Tensor, "results results"]:
    """Places that two results share, over all that either has; 1 for two results without any."""
    member = sets.float()
    shared, sizes = member @ member.T, member.sum(-1)
    either = sizes[:, None] + sizes - shared
    return torch.where(either > 0, shared / either.clamp(min=1), torch.ones_like(shared))


def overlap(sets: Bool[Tensor, "results places"]) -> Float[Tensor, "results results"]:
    """Places that two results share, over those of the smaller; 1 if it has none."""
    member = sets.float()
    shared, sizes = member @ member.T, member.sum(-1)
    smaller = torch.minimum(sizes[:, None], sizes)
    return torch.where(smaller > 0, shared / smaller.clamp(min=1), torch.ones_like(shared))


def cosine(scores: Float[Tensor, "results places"]) -> Float[Tensor, "results results"]:
    """Cosine of the scores of two results, from -1 to 1; 0 with one that is all zero."""
    unit = torch.nn.functional.normalize(scores.double(), dim=-1)
    return (unit @ unit.T).clamp(-1, 1).float()


def relative_similarity(inside: float, outside: float) -> float:
    """`RSim = max((Sim_cand - Sim_all) / (1 - Sim_all), 0)`; 0 where `Sim_all` is 1, since none stands out."""
    return max((inside - outside) / (1 - outside), 0.0) if outside < 1 else 0.0


def _unrelated(one: Wording, other: Wording) -> bool:
    return one.entity != other.entity and one.relation != other.relation and one.token != other.token


def _chained(one: Wording, other: Wording) -> bool:
    return one.via == other.relation or other.via == one.relation


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a level compares: results with the same name, in pairs that match."""

    name: Callable[[Wording], str]
    match: Callable[[Wording, Wording], bool]
    wordings: bool = False


_RULES: dict[Level, _Rule] = {
    "wording": _Rule(lambda x: f"{x.entity}, {x.relation}", lambda _, __: True, wordings=True),
    "chain": _Rule(lambda x: x.entity, _chained),
    "entity": _Rule(
        lambda x: x.entity, lambda x, y: x.relation != y.relation and x.via is None and y.via is None
    ),
    "relation": _Rule(lambda x: x.relation, lambda x, y: x.entity != y.entity and x.token != y.token),
    # The token alone will not do: many numbers begin with one digit.
    "answer": _Rule(
        lambda x: f"{x.token} {normalise(x.fact.answer)}", lambda x, y: x.entity != y.entity and x.relation != y.relation
    ),
}  # fmt: skip


def compare_levels(
    measure: Measure, alike: Float[Tensor, "results results"], located: Sequence[Wording]
) -> tuple[LevelComparison, ...]:
    """Sort how alike results are by level; a level, or a group, without pairs of either kind is left out."""
    table = alike.tolist()
    firsts = [i for i, one in enumerate(located) if one.first]
    outside = {
        i: [table[i][j] for j in firsts if _unrelated(one, located[j])] for i, one in enumerate(located)
    }  # fmt: skip
    found: list[LevelComparison] = []
    for level, rule in _RULES.items():
        members: defaultdict[str, list[int]] = defaultdict(list)
        for i, one in enumerate(located):
            if one.first or rule.wordings:
                members[rule.name(one)].append(i)
        groups = []
        for name, own in members.items():
            pairs = [(i, j) for i, j in combinations(own, 2) if rule.match(located[i], located[j])]
            among = [value for i in sorted({i for pair in pairs for i in pair}) for value in outside[i]]
            if pairs and among:
                inside = fmean(table[i][j] for i, j in pairs)
                shown = located[own[0]].fact.answer if level == "answer" else name
                groups.append(Group(name=shown, pairs=len(pairs), inside=inside, outside=fmean(among)))
        if groups:
            found.append(LevelComparison(measure=measure, level=level, groups=tuple(groups)))
    return tuple(found)


# Locating --------------------------------------------------------------------------------------------------------------


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
    limit      of the facts that the model knows, only the first so many
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
        _check_readable(method)
    located = known_triples(lm, triples, limit, wordings)
    if not any(_unrelated(one, other) for one, other in combinations(located, 2)):
        raise BadFile(
            f"{lm.name} knows {sum(one.first for one in located)} of these {len(triples)} facts, no two of which are "
            "unrelated, so nothing can be compared.\n  Give facts that it knows, about several entities: --facts FILE"
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


# What the changed values say -------------------------------------------------------------------------------------------


def counterfacts(located: Sequence[Wording]) -> list[Edit]:
    """For each fact, chains apart, an edit that gives it the answer of the next fact of its relation with another one."""
    firsts = [one for one in located if one.first and one.via is None]
    found: list[Edit] = []
    for i, one in enumerate(firsts):
        others = (x for x in firsts[i + 1 :] + firsts[:i] if x.relation == one.relation and x.token != one.token)
        if (other := next(others, None)) is not None:
            found.append(
                Edit(
                    id=f"{one.entity}, {one.relation}",
                    prompt=one.fact.prompt,
                    subject=one.entity,
                    target=other.fact.answer,
                    ground_truth=(one.fact.answer,),
                )
            )
    return found


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
    _check_readable(method)
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


def _check_readable(method: Method[Any]) -> None:
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
