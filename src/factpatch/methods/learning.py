"""Learned editors: trained once for a model on some edits, then used to make others.

A training may be killed at any moment. Started again in the same folder it goes on from its last look at the held-out
edits, and ends with the editor that it would have ended with.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from factpatch.data import read
from factpatch.edits import Edit
from factpatch.errors import BadConfig, CannotEdit
from factpatch.files import cache_root
from factpatch.lm import LM
from factpatch.lm.cache import cached_tensors
from factpatch.methods.base import Config, Method
from factpatch.methods.editors import Editor, Training, is_editor
from factpatch.progress import Progress, silent

__all__ = ["Course", "Learned", "LearnedConfig", "Look"]

Look = Mapping[str, float]
"""What one look at some edits showed, by name: `loss`, which training lowers, and what it is made of."""


class LearnedConfig(Config):
    """Settings of methods that are trained. Those of the training are written into the editor and come from there."""

    editor: str | None = Field(
        default=None, description="folder that factpatch train has written; default: an editor trained on `data`"
    )
    data: str = Field(default="sample", description="edits to train on where no editor is given, as NAME:PATH")
    steps: PositiveInt = Field(default=400, description="training steps, at most")
    batch_size: PositiveInt = Field(default=8, description="edits in one training step")
    lr: PositiveFloat = Field(default=1e-3, description="learning rate of Adam, in training")
    check_every: PositiveInt = Field(default=25, description="training steps between two looks at held-out edits")
    patience: PositiveInt = Field(default=6, description="looks in a row without a lower loss, after which it stops")
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share of the edits to look at instead of learn from")


L = TypeVar("L", bound=LearnedConfig)


class Course(ABC):
    """One method's training on some edits: the network, and how it learns from them."""

    network: nn.Module

    @abstractmethod
    def study(self, chosen: Sequence[int]) -> Look:
        """Add the loss's gradient on the edits of these numbers to the network's, and tell the loss."""

    @abstractmethod
    def look(self, chosen: Sequence[int]) -> Look:
        """How the network does on the edits of these numbers; nothing is learned."""

    def parameters(self) -> list[dict[str, Any]]:
        """What is trained, in the groups that `torch.optim.Adam` takes."""
        return [{"params": list(self.network.parameters())}]


class Learned(Method[L], ABC, Generic[L]):
    """Base of methods whose editor is trained. A subclass writes `course` and `network` beside `make`.

    in_use  settings that do not touch the training; whoever uses an editor may choose them, and its seed and chat template
    """

    in_use: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def network(self, lm: LM, config: L) -> nn.Module:
        """A new network of the shape this model and these settings ask for."""

    @abstractmethod
    def course(self, lm: LM, edits: Sequence[Edit], config: L, progress: Progress) -> Course:
        """A training on these edits."""

    def prepare(self, lm: LM, progress: Progress = silent) -> None:
        """Read the editor, or train one on `data` and keep it in the cache."""
        self.trained(lm, self.resolve(lm), progress)

    def trained(self, lm: LM, config: L, progress: Progress = silent) -> tuple[nn.Module, L, str]:
        """The trained network, the settings to use it with, and the editor's id.

        Raises BadEditor, WrongBase if the editor given is not for this method or model; BadFile, OutputError.
        """
        if config.editor is None:
            network = self.network(lm, config)
            network.load_state_dict(self._cached(lm, config, progress))
            return network.requires_grad_(requires_grad=False), config, f"trained on {config.data}"
        editor = Editor.load(config.editor)
        editor.check(self.name, lm)
        own = {name: getattr(config, name) for name in ("editor", "chat", "seed", *self.in_use)}
        settled = self.config_type(**{**editor.about.config, **own})
        for name in sorted(self.config.model_fields_set - {"data"}):
            # None stands for a default that hangs on the model, which a patch's provenance writes out.
            if getattr(settled, name) not in {None, getattr(self.config, name)}:
                raise BadConfig(
                    f"{self.name}: {name} was settled when the editor in {config.editor} was trained, "
                    f"as {getattr(settled, name)}.\n  Leave it out, or train another: factpatch train {self.name} --set {name}=…"
                )
        network = self.network(lm, settled)
        network.load_state_dict(editor.tensors)
        return network.requires_grad_(requires_grad=False), settled, editor.id

    def train(
        self,
        lm: LM,
        edits: Sequence[Edit],
        *,
        folder: Path | None = None,
        source: str = "",
        progress: Progress = silent,
        watch: Callable[[Look], None] = lambda _: None,
    ) -> Editor:
        """An editor for the base model of `lm`, trained on these edits; `lm` itself stays as it is.

        folder  where the training is kept, and gone on with if it is there already
        source  where the edits come from, for people
        watch   is given each look at the held-out edits

        Raises CannotEdit if there are fewer than two edits, BadEditor if `folder` holds another training, OutputError.
        """
        self.check(edits)
        config = self.resolve(lm)
        if config.editor is not None:
            raise BadConfig(f"{self.name}: a new editor is trained without another.\n  Leave editor out.")
        if len(edits) < 2:
            raise CannotEdit(f"{self.name}: one edit was given; an editor learns from some and is checked on others.")
        about = {
            "method": self.name,
            "config": config.model_dump(mode="json", exclude=set(self.in_use)),
            "source": source,
            "edits": len(edits),
            "edits_sha256": _hash_of(edits),
        }
        with lm.unpatched():
            training = Training.of(lm, about)
            return _run(self.course(lm, edits, config, progress), training, config, len(edits), folder, progress, watch)

    def _cached(self, lm: LM, config: L, progress: Progress) -> dict[str, Tensor]:
        edits = read(config.data).edits
        settings = config.model_dump(mode="json", exclude={"data", "editor", *self.in_use})
        key = {
            "method": self.name,
            "fingerprint": lm.fingerprint,
            "surroundings": lm.surroundings,
            "dtype": str(lm.dtype),
            "config": settings,
            "edits": _hash_of(edits),
        }
        usable = [edit for edit in edits if edit.kind in self.traits.kinds]
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        folder = cache_root() / "training" / name

        def compute() -> dict[str, Tensor]:
            # In a folder, so that a training that is killed is gone on with.
            finished = is_editor(folder)
            editor = Editor.load(folder) if finished else self.train(lm, usable, folder=folder, progress=progress)
            return dict(editor.tensors)

        tensors = cached_tensors("editors", key, compute)
        shutil.rmtree(folder, ignore_errors=True)
        return tensors


def _hash_of(edits: Sequence[Edit]) -> str:
    return hashlib.sha256(json.dumps([edit.to_json() for edit in edits], sort_keys=True).encode()).hexdigest()


@dataclass
class _State:
    """All that a training is at one moment; what is not here follows from its settings and its step."""

    optimiser: torch.optim.Adam
    network: nn.Module
    best: dict[str, Tensor]
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def stale(self) -> int:
        """How many looks ago the loss was at its lowest."""
        losses = [look["loss"] for look in self.curve]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def tensors(self) -> dict[str, Tensor]:
        """To be kept."""
        adam = {
            f"adam.{number}.{name}": torch.as_tensor(value)
            for number, each in self.optimiser.state_dict()["state"].items()
            for name, value in each.items()
        }
        network = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        return adam | network | {f"best.{name}": value for name, value in self.best.items()}

    def restore(self, tensors: Mapping[str, Tensor], step: int, curve: list[dict[str, float]]) -> None:
        """From what `tensors` gave."""
        grouped: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            grouped.setdefault(part, {})[name] = value
        self.network.load_state_dict(grouped["network"])
        self.best = grouped["best"]
        adam: dict[int, dict[str, Tensor]] = {}
        for key, value in grouped.get("adam", {}).items():
            number, _, name = key.partition(".")
            adam.setdefault(int(number), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": adam})
        self.step, self.curve = step, curve


def _run(
    course: Course,
    training: Training,
    config: LearnedConfig,
    count: int,
    folder: Path | None,
    progress: Progress,
    watch: Callable[[Look], None],
) -> Editor:
    n_held = min(count - 1, max(1, round(count * config.held_out)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
    held, learned = sorted(order[:n_held]), sorted(order[n_held:])
    optimiser = torch.optim.Adam(course.parameters(), lr=config.lr)
    state = _State(optimiser, course.network, _copy(course.network))
    kept = training.resume(folder)
    if kept is not None:
        state.restore(*kept)
        for look in state.curve:
            watch(look)
    doing = f"Training {training.about['method']}"
    while True:
        if state.step % config.check_every == 0 or state.step == config.steps:
            if not state.curve or state.curve[-1]["step"] < state.step:
                look = {"step": float(state.step), **course.look(held)}
                if not isfinite(look["loss"]):
                    raise CannotEdit(
                        f"{training.about['method']}: the loss is not finite after {state.step} steps of training.\n"
                        "  Choose a smaller learning rate: --set lr=…"
                    )
                state.curve.append(look)
                if state.stale == 0:
                    state.best = _copy(course.network)
                watch(look)
                training.keep(folder, state.tensors(), state.step, state.curve)
            if state.stale >= config.patience or state.step == config.steps:
                break
        progress(doing, state.step, config.steps)
        optimiser.zero_grad()
        course.study(_chosen(learned, state.step, config))
        # Far above what is usual; it only keeps one wild edit from undoing all that was learned.
        nn.utils.clip_grad_norm_(course.network.parameters(), 100.0)
        optimiser.step()
        state.step += 1
    progress(doing, config.steps, config.steps)
    return training.finish(folder, state.best, state.step, state.curve)


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _chosen(learned: Sequence[int], step: NonNegativeInt, config: LearnedConfig) -> list[int]:
    """The edits of one step: the next so many of an endless row of shuffled rounds through all of them."""
    chosen = []
    for at in range(step * config.batch_size, (step + 1) * config.batch_size):
        lap, place = divmod(at, len(learned))
        order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(config.seed + 1 + lap))
        chosen.append(learned[int(order[place])])
    return chosen
