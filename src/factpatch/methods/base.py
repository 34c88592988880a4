"""What a method is: a frozen `Config`, frozen `Traits`, and `fit(lm, edits) -> Patch`.

A method evaluates nothing, saves nothing, prints nothing and leaves the model as it found it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, ValidationError

from factpatch.edits import KINDS, Edit, EditKind, first_problem
from factpatch.errors import BadConfig, CannotEdit, did_you_mean
from factpatch.lm import LM, BaseLM
from factpatch.methods import located
from factpatch.methods.needs import Needs, usual_needs
from factpatch.patches import Patch, Provenance
from factpatch.progress import Progress, silent

__all__ = ["Config", "Layers", "Method", "Preset", "Traits", "in_own_order", "told"]


def _split(value: Any) -> Any:
    """Several values as a command line writes them, such as `4,5,6`."""
    return value.strip("[]() ").split(",") if isinstance(value, str) else value


def _ordered(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(layers)))


Layers = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_split), Field(min_length=1), AfterValidator(_ordered)]
"""Numbers of blocks, each once, from the lowest up."""


class Config(BaseModel):
    """Settings that every method has. A method's own stand in a subclass right above it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chat: bool = Field(default=False, description="put each prompt into the model's chat template before editing")
    seed: int = Field(default=0, description="decides everything that is drawn at random")


@dataclass(frozen=True, slots=True)
class Traits:
    """What a method is, so that nobody has to ask for it by name.

    family         methods that share an idea
    phase          of the survey's taxonomy: recognition, association or mastery
    paper          where it was published
    kinds          the kinds of edit it can make
    needs_subject  it must know which part of the prompt the fact is about
    joint          a batch of edits is made at once; otherwise one after the other, each on what the last one left
    patch          the kind of patch it makes
    prepares       what it computes once for each model, in words; empty for nothing
    needs          what a model must have, in words
    effort         of one edit, in passes of the model there and back, roughly, with a share of what is prepared once; only
                   to try cheap methods before dear ones
    """

    family: str
    phase: Literal["recognition", "association", "mastery"]
    paper: str
    patch: type[Patch]
    kinds: frozenset[EditKind] = frozenset(KINDS)
    needs_subject: bool = False
    joint: bool = False
    prepares: str = ""
    needs: str = ""
    effort: int = 100


@dataclass(frozen=True, slots=True)
class Preset:
    """Defaults that change for models of one shape.

    shape   number of blocks and hidden size, such as (32, 4096)
    values  the settings that differ from `Config`'s defaults
    source  where they come from: a paper, or the results of ours that measured them
    """

    shape: tuple[int, int]
    values: Mapping[str, Any]
    source: str


C = TypeVar("C", bound=Config)


class Method(ABC, Generic[C]):
    """Base of all editing methods.

    A subclass names itself, its `Config` type and its `Traits`, and writes `make`. Register it in
    `factpatch.methods`, or from another package by the entry point group `factpatch.methods`.
    """

    name: ClassVar[str]
    traits: ClassVar[Traits]
    presets: ClassVar[tuple[Preset, ...]] = ()
    config_type: type[C]

    def __init__(self, config: C | None = None, **settings: Any) -> None:
        """Give a whole config, or single settings by name. Raises BadConfig."""
        if config is not None and (settings or type(config) is not self.config_type):
            raise BadConfig(f"{self.name} takes a {self.config_type.__name__}, or single settings by name; not both.")
        self.config = config if config is not None else self._configure(settings)

    @classmethod
    def _configure(cls, settings: Mapping[str, Any]) -> C:
        config_type: type[C] = cls.config_type
        unknown = [key for key in settings if key not in config_type.model_fields]
        if unknown:
            raise BadConfig(
                f'{cls.name} has no setting "{unknown[0]}".{did_you_mean(unknown[0], config_type.model_fields)}\n'
                f"  Its settings: {', '.join(config_type.model_fields)}"
            )
        try:
            return config_type(**settings)
        except ValidationError as error:
            name, problem = first_problem(error)
            about = config_type.model_fields[name.partition(".")[0]].description if name else ""
            raise BadConfig(f'{cls.name}, setting "{name}" ({about}): {problem}') from None

    def resolve(self, lm: BaseLM) -> C:
        """The settings for this model: those the user gave, then a preset's for its shape, then the defaults.

        For a shape without a preset, the block that `factpatch locate` chose for this very model replaces the default. A
        model that has one is edited in the same place whatever the cache holds.
        """
        given = {key: getattr(self.config, key) for key in self.config.model_fields_set}
        preset = next((p.values for p in self.presets if p.shape == lm.shape), None)
        if preset is None:
            preset = located.settings(lm, self.name, self.config_type, given)
        return self.config_type(**{**preset, **given})

    def check(self, edits: Sequence[Edit]) -> None:
        """Raise CannotEdit, naming the edit, if one is of a kind this method cannot make."""
        if not edits:
            raise CannotEdit(f"{self.name}: no edits were given.\n  Give at least one.")
        for edit in edits:
            if edit.kind not in self.traits.kinds:
                raise CannotEdit(
                    f'edit "{edit.id}": {self.name} cannot {edit.kind}; it can {", ".join(sorted(self.traits.kinds))}.\n'
                    "  Choose another method: factpatch methods"
                )
            if self.traits.needs_subject and edit.subject is None:
                raise CannotEdit(
                    f'edit "{edit.id}": {self.name} needs to know the subject, a part of the prompt "{edit.prompt}".\n'
                    "  Give one (--subject), or choose a method that needs none: factpatch methods"
                )

    def prepare(self, lm: Any, progress: Progress = silent) -> None:
        """Compute and cache what is costly and depends on the model alone; `fit` does so too when it must."""

    def needs(self, lm: LM, edits: Sequence[Edit], config: C) -> Needs:
        """What making these edits is expected to take, settings being settled; `lm` may be without its weights.

        A method that knows more than `usual_needs` writes its own.
        """
        traits = self.traits
        return usual_needs(
            lm, edits, config, joint=traits.joint, inside=traits.patch.needs_weights, prepares=traits.prepares
        )

    def check_model(self, lm: BaseLM) -> None:
        """Raise CannotEdit if the model's weights are not in hand and the method needs them."""
        if self.traits.patch.needs_weights and not isinstance(lm, LM):
            from factpatch.methods import find, names  # noqa: PLC0415 - they import this file

            able = [name for name in names() if not find(name).traits.patch.needs_weights]
            raise CannotEdit(
                f"{self.name} changes what is inside a model; {lm.name} can only be asked.\n"
                f"  Choose a method that works through the prompt: {', '.join(able)}"
            )

    def fit(self, lm: BaseLM, edits: Sequence[Edit], progress: Progress = silent) -> Patch:
        """A patch that makes these edits on `lm` as it stands, patches included; `lm` itself stays as it is.

        Raises CannotEdit, BadConfig, AnatomyError, TokenizerError, SingularMoment, OutputError (the cache).
        """
        self.check(edits)
        self.check_model(lm)
        _ = lm.fingerprint  # taken now: while some methods work, the model has parts of theirs
        patch = self.make(lm, tuple(edits), self.resolve(lm), progress)
        if not all(bool(tensor.isfinite().all()) for tensor in patch.tensors().values()):
            names = ", ".join(edit.id for edit in edits[:3])
            raise CannotEdit(
                f"edit {names}: what {self.name} made of it is not finite.\n"
                "  Try a smaller learning rate, another layer, or fewer edits at once."
            )
        return patch

    @abstractmethod
    def make(self, lm: Any, edits: tuple[Edit, ...], config: C, progress: Progress) -> Patch:
        """The work of `fit`, on checked edits and with settled settings."""

    def provenance(
        self, lm: BaseLM, config: C, edits: tuple[Edit, ...], notes: Sequence[Mapping[str, Any]] = ()
    ) -> Provenance:
        """What to write into the patch about its making."""
        return Provenance.of(lm, self.name, config.model_dump(mode="json"), edits, tuple(dict(note) for note in notes))


def in_own_order(edits: Iterable[Edit]) -> list[Edit]:
    """Edits sorted by what they say, for methods with which the order in which they are given must not count."""
    return sorted(edits, key=lambda edit: (edit.prompt, edit.target))


def told(losses: Sequence[float]) -> dict[str, Any]:
    """How a search for a smaller loss went, for a patch's notes; JSON-ready."""
    if not losses:
        return {"steps": 0}
    return {"steps": len(losses), "first_loss": round(losses[0], 6), "last_loss": round(losses[-1], 6)}
