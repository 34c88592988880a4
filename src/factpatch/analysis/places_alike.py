"""How alike the places of facts are: measures of likeness, and what is compared with what, level by level.

What both are taken from stands in `factpatch.analysis.places`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from factpatch.analysis.base import Result
from factpatch.analysis.places_facts import Wording
from factpatch.scoring.metrics import normalise

__all__ = [
    "LEVELS",
    "MEASURES",
    "Group",
    "Level",
    "LevelComparison",
    "Measure",
    "compare_levels",
    "cosine",
    "few",
    "jaccard",
    "overlap",
    "relative_similarity",
]

Measure = Literal["neurons", "attributions", "layers", "maps"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Level = Literal["wording", "chain", "entity", "relation", "answer"]
LEVELS: tuple[Level, ...] = get_args(Level)


class Group(Result):
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


class LevelComparison(Result):
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


def jaccard(sets: Bool[Tensor, "results places"]) -> Float[Tensor, "results results"]:
    """Places that two results share, over all that either has; 1 for two results without any."""
    shared, sizes = _shared(sets)
    return _share(shared, sizes[:, None] + sizes - shared)


def overlap(sets: Bool[Tensor, "results places"]) -> Float[Tensor, "results results"]:
    """Places that two results share, over those of the smaller; 1 if it has none."""
    shared, sizes = _shared(sets)
    return _share(shared, torch.minimum(sizes[:, None], sizes))


def _shared(sets: Bool[Tensor, "results places"]) -> tuple[Float[Tensor, "results results"], Float[Tensor, " results"]]:
    """How many places two results share, and how many each has."""
    member = sets.float()
    return member @ member.T, member.sum(-1)


def _share(
    some: Float[Tensor, "results results"], of: Float[Tensor, "results results"]
) -> Float[Tensor, "results results"]:
    return torch.where(of > 0, some / of.clamp(min=1), torch.ones_like(some))


def cosine(scores: Float[Tensor, "results places"]) -> Float[Tensor, "results results"]:
    """Cosine of the scores of two results, from -1 to 1; 0 with one that is all zero."""
    unit = torch.nn.functional.normalize(scores.double(), dim=-1)
    return (unit @ unit.T).clamp(-1, 1).float()


def relative_similarity(inside: float, outside: float) -> float:
    """`RSim = max((Sim_cand - Sim_all) / (1 - Sim_all), 0)`; 0 where `Sim_all` is 1, since none stands out."""
    return max((inside - outside) / (1 - outside), 0.0) if outside < 1 else 0.0


def few(located: Sequence[Wording], limit: int | None) -> list[Wording]:
    """So many of the facts, in their order: the first ones, but with two that are unrelated and one related to either.

    The facts of an entity stand together, so that the first few alone may hold none that are unrelated.
    """
    firsts = [i for i, one in enumerate(located) if one.first]
    if limit is None or len(firsts) <= limit:
        return list(located)
    pairs = (
        (i, j) for at, j in enumerate(firsts) for i in firsts[:at] if _unrelated(located[i], located[j])
    )  # fmt: skip
    # Of two facts alone, the wordings of one are all that can belong together.
    several = {i for i in firsts if i + 1 < len(located) and not located[i + 1].first} if limit == 2 else set(firsts)
    kept = list(next((pair for pair in pairs if several & {*pair}), ()))[:limit]
    related = (k for k in firsts if k not in kept and any(_related(located[k], located[i]) for i in kept))
    kept += [k for k in (next(related, None),) if k is not None and len(kept) < limit]
    kept += [k for k in firsts if k not in kept][: limit - len(kept)]
    found, taken = [], False
    for i, one in enumerate(located):
        taken = i in kept if one.first else taken
        found += [one] if taken else []
    return found


def _related(one: Wording, other: Wording) -> bool:
    """Whether some level compares two facts as ones that belong together."""
    return any(rule.name(one) == rule.name(other) and rule.match(one, other) for rule in _RULES.values())


def _unrelated(one: Wording, other: Wording) -> bool:
    """Whether two facts share neither entity, relation nor answer."""
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
    outside = [[table[i][j] for j in firsts if _unrelated(one, located[j])] for i, one in enumerate(located)]
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
