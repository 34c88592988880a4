"""Facts to locate: entities, relations and answers, asked in several wordings, as far as a model knows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from factpatch.analysis.base import Result
from factpatch.analysis.facts import Fact, known_facts
from factpatch.analysis.tracing import encoded_fact
from factpatch.edits import Edit, Texts, first_problem
from factpatch.errors import BadFile, BadRecord
from factpatch.lm import LM

__all__ = ["Triple", "Wording", "counterfacts", "known_triples", "read_triples"]


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


class _Table(Result):
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


def known_triples(lm: LM, triples: Sequence[Triple], wordings: int | None = None) -> list[Wording]:
    """The wordings at which the model gives the answer (see `says`); of each fact the first so many."""
    asked = [
        Edit(id=prompt, prompt=prompt, subject=each.entity, target=each.answers[0], ground_truth=each.answers)
        for each in triples
        for prompt in each.prompts
    ]
    known = {(fact.prompt, fact.subject): fact for fact in known_facts(lm, asked)}
    found: list[Wording] = []
    for each in triples:
        said = [known[prompt, each.entity] for prompt in each.prompts if (prompt, each.entity) in known]
        own = [fact for fact in said if fact.answer in each.answers][:wordings]
        found += [
            Wording(fact, each.relation, encoded_fact(lm, fact).target_ids[0], i == 0, each.via)
            for i, fact in enumerate(own)
        ]
    return found


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
