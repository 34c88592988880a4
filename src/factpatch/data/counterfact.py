"""CounterFact and zsRE in the forms in which their first users released them.

CounterFact: Meng et al. 2022, arXiv 2202.05262. zsRE for editing: Mitchell et al. 2022, arXiv 2110.11309. Both files
are at https://rome.baulab.info/data/dsets/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from factpatch.data.records import Form, OneOrMany, Record, Source, only_within
from factpatch.edits import Edit, Probe, Text

__all__ = ["counterfact", "mend_zsre"]


def counterfact(source: Source) -> Iterator[Record]:
    """Made-up facts about known subjects.

    Two kinds of locality: neighbourhood prompts are about other subjects of which the old fact is true, attribute
    prompts about other subjects of which the new one is. Both must stay so.
    """
    return source.each(_counterfact)


def mend_zsre(source: Source) -> Iterator[Record]:
    """Questions with another answer each, one rephrase and one unrelated question."""
    return source.each(_mend_zsre)


def _with_gap(prompt: str) -> str:
    if "{}" not in prompt:
        raise ValueError(f'expected a text with {{}} where the subject goes, found "{prompt}"')
    return prompt


class _Object(Form):
    text: Text = Field(alias="str")


class _Rewrite(Form):
    prompt: Annotated[Text, AfterValidator(_with_gap)]
    subject: Text
    target_new: _Object
    target_true: _Object


class _CounterFact(Form):
    requested_rewrite: _Rewrite
    paraphrase_prompts: OneOrMany = ()
    neighborhood_prompts: OneOrMany = ()
    attribute_prompts: OneOrMany = ()


def _counterfact(raw: object, edit_id: str) -> Edit:
    record = _CounterFact.model_validate(raw)
    rewrite = record.requested_rewrite
    new, true = rewrite.target_new.text, rewrite.target_true.text
    locality = {
        "Neighborhood": tuple(Probe(prompt=prompt, answers=(true,)) for prompt in record.neighborhood_prompts),
        "Attribute": tuple(Probe(prompt=prompt, answers=(new,)) for prompt in record.attribute_prompts),
    }
    return Edit(
        id=edit_id,
        prompt=rewrite.prompt.replace("{}", rewrite.subject),
        target=new,
        subject=rewrite.subject,
        ground_truth=(true,),
        rephrases=record.paraphrase_prompts,
        locality={kind: probes for kind, probes in locality.items() if probes},
    )


class _MendZsre(Form):
    src: Text
    alt: Text
    subject: str
    answers: OneOrMany
    rephrase: OneOrMany = ()
    loc: Text
    loc_ans: OneOrMany


def _mend_zsre(raw: object, edit_id: str) -> Edit:
    record = _MendZsre.model_validate(raw)
    unrelated = Probe(prompt=record.loc.removeprefix("nq question: "), answers=record.loc_ans)
    return Edit(
        id=edit_id,
        prompt=record.src,
        target=record.alt,
        subject=only_within(record.src, record.subject),
        ground_truth=record.answers,
        rephrases=record.rephrase,
        locality={"Unrelated": (unrelated,)},
    )
