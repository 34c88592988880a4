"""What should change, and how one would notice: `Edit` and `Probe`.

Both are frozen, validated values that know nothing of models or files. JSON goes in through `Edit.from_json`, which
names the field at fault, and out through `Edit.to_json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    model_validator,
)

from factpatch.errors import BadRecord, did_you_mean

__all__ = ["KINDS", "Edit", "EditKind", "LabelledProbe", "Probe", "Role"]

EditKind = Literal["insert", "modify", "erase", "restyle"]
KINDS: tuple[EditKind, ...] = get_args(EditKind)

Role = Literal["edit", "rephrase", "portability", "locality"]
"""What a probe asks: the edit itself, a paraphrase of it, something that follows from it, something that must stay."""

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


def _texts(value: Any) -> Any:
    """One text stands for a list of one."""
    return (value,) if isinstance(value, str) else value


def _without_repeats(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


Texts = Annotated[tuple[Text, ...], BeforeValidator(_texts), AfterValidator(_without_repeats)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Probe(_Value):
    """One question to the model, and the answers that count.

    Any one of `answers` counts; the first is the canonical one, which the survey protocol scores. A probe without
    answers can still be asked (did the answer change?); a score that needs the truth leaves it out as unscored.
    """

    prompt: Text
    answers: Texts = ()


Probes = Annotated[
    Mapping[Text, tuple[Probe, ...]],
    AfterValidator(lambda probes: MappingProxyType(dict(probes))),
    PlainSerializer(lambda probes: {kind: [p.model_dump() for p in group] for kind, group in probes.items()}),
]
"""Probes by kind, read-only."""


def _no_probes() -> Mapping[str, tuple[Probe, ...]]:
    return MappingProxyType({})


class LabelledProbe(NamedTuple):
    """A probe and the part it plays; `kind` is empty for the edit itself and its rephrases."""

    role: Role
    kind: str
    probe: Probe


class Edit(_Value):
    """One thing the model should say differently, with the probes that tell whether it does.

    id           unique within its data set
    kind         insert a new fact, modify a known one, erase one, restyle an opinion
    prompt       a completion prompt ("The capital of France is") or a question; without the answer
    target       what the model should say after it; of an erased fact, the refusal
    subject      the part of the prompt that the fact is about; methods that locate a fact need it
    ground_truth what was true before, any of these; of an erased fact, the secret
    rephrases    other wordings of the prompt, with the same target
    portability  by kind of reasoning: questions whose answers follow from the edit
    locality     by kind: questions whose answers must not change
    question     of a restyle: what the replies below are given to, without a word on the manner; by default the prompt
    wanted       of a restyle: sample replies in the wanted manner
    unwanted     of a restyle: sample replies in the other manner
    group        what the edit is a part of; edits of one group, such as all questions about a secret, are made together
    """

    id: Text
    kind: EditKind = "modify"
    prompt: Text
    target: Text
    subject: Text | None = None
    ground_truth: Texts = ()
    rephrases: Texts = ()
    portability: Probes = Field(default_factory=_no_probes)
    locality: Probes = Field(default_factory=_no_probes)
    question: Text | None = None
    wanted: Texts = ()
    unwanted: Texts = ()
    group: Text | None = None

    @model_validator(mode="after")
    def _subject_in_prompt(self) -> Self:
        if self.subject is not None and self.subject not in self.prompt:
            raise ValueError(
                f'subject: expected a part of the prompt, found "{self.subject}", which the prompt '
                f'"{self.prompt}" does not contain letter for letter'
            )
        return self

    @classmethod
    def from_json(cls, record: object, *, source: str = "edit", number: int | None = None) -> Self:
        """Validate one decoded JSON value.

        Raises BadRecord naming `source`, `number`, the field and what was expected.
        """
        if not isinstance(record, dict):
            raise BadRecord(source, number, "record", f"expected an object with fields, found {brief(record)}")
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            field, problem = first_problem(error, of_edit=True)
            raise BadRecord(source, number, field, problem) from None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object that `from_json` reads back; fields at their defaults are left out."""
        return self.model_dump(mode="json", exclude_defaults=True) | {"kind": self.kind}

    def probes(self) -> Iterator[LabelledProbe]:
        """Every probe of this edit, the edit's own prompt first."""
        yield LabelledProbe("edit", "", Probe(prompt=self.prompt, answers=(self.target,)))
        for rephrase in self.rephrases:
            yield LabelledProbe("rephrase", "", Probe(prompt=rephrase, answers=(self.target,)))
        yield from _labelled("portability", self.portability)
        yield from _labelled("locality", self.locality)

    # A read-only mapping can be neither copied nor pickled; a frozen value need not be copied and pickles as its JSON.
    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self).model_validate, (self.to_json(),))

    def __hash__(self) -> int:
        return hash((self.id, self.prompt, self.target))


def _labelled(role: Role, groups: Mapping[str, Iterable[Probe]]) -> Iterator[LabelledProbe]:
    for kind, group in groups.items():
        for probe in group:
            yield LabelledProbe(role, kind, probe)


def first_problem(error: ValidationError, *, of_edit: bool = False) -> tuple[str, str]:
    """The field and a sentence for the first thing pydantic objects to.

    of_edit  whether it was to be an edit, whose nearest field is told where one is not known
    """
    # What is not known is said first: a misspelt field is missing under its right name too.
    first = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        own_field, _, rest = message.partition(": ")
        return (field or own_field), (rest if not field and rest else message)
    if first["type"] == "missing":
        return field, "expected a value, found nothing"
    if first["type"] == "extra_forbidden":
        kind = Probe if "." in field else Edit
        near = did_you_mean(field.rpartition(".")[2], kind.model_fields) if of_edit else ""
        return field or '""', "is not a field that is known here" + (f".{near}" if near else "")
    if first["type"] == "model_type":
        return field or "record", f"expected an object with fields, found {brief(first['input'])}"
    if first["type"] == "string_too_short":
        return field, "expected some text, found none"
    expected = first["msg"].removeprefix("Input should be ")
    expected = {"a valid dictionary": "an object", "a valid string": "a text", "a valid tuple": "a list"}.get(
        expected, expected
    )
    return field, f"expected {expected}, found {brief(first['input'])}"


def brief(value: object) -> str:
    """A value as an error message shows it: its kind and its beginning."""
    names = {str: "the text", dict: "an object", list: "a list", type(None): "null", bool: "", int: "the number"}
    name = names.get(type(value), type(value).__name__)
    if isinstance(value, dict | list | None):
        return f"{name} of {len(value)}" if value else ("null" if value is None else f"{name}, empty")
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    return f"{name} {shown if len(shown) <= 60 else shown[:57] + '…' + shown[-1]}".strip()
