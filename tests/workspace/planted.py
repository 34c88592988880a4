"""Patches of which one knows what they do, a method that makes them, and workspaces over a tiny model.

A `Told` patch changes a weight as any other, and also makes the model give known answers, which a random model cannot be
brought to do for one fact without losing another. It may lean on what lies beneath it, as real edits do.
"""

import json
import random
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch

from factpatch.edits import Edit
from factpatch.methods import Method, Traits
from factpatch.methods.base import Config
from factpatch.patches import LowRank, Patch, WeightPatch
from factpatch.patches.delta import deltas_of
from factpatch.workspace import Workspace

PARAMETER = "model.layers.1.mlp.down_proj.weight"


@dataclass(frozen=True, eq=False)
class Told(WeightPatch):
    """`says` by prompt, unless the model beneath does not give the answers it `leans` on, by prompt."""

    kind: ClassVar[str] = "told"
    says: dict[str, str] = field(default_factory=dict)
    leans: dict[str, str] = field(default_factory=dict)

    def attach(self, lm):
        undo, beneath = super().attach(lm), lm.answer

        def answer(prompts, **more):
            held = not self.leans or beneath(list(self.leans)) == list(self.leans.values())
            said = self.says if held else {}
            others = [prompt for prompt in prompts if prompt not in said]
            told = said | (dict(zip(others, beneath(others, **more), strict=True)) if others else {})
            return [told[prompt] for prompt in prompts]

        lm.answer = answer

        def off():
            lm.answer = beneath
            undo()

        return off

    def spec(self) -> dict[str, Any]:
        return {"says": self.says, "leans": self.leans}

    @classmethod
    def from_parts(cls, provenance, spec, tensors):
        return cls(provenance, deltas_of(tensors), says=spec["says"], leans=spec["leans"])


class TellConfig(Config):
    """also: further answers as JSON; leans: on the answers to all edits beneath."""

    also: str = "{}"
    leans: bool = False


class Tell(Method[TellConfig]):
    name = "tell"
    config_type = TellConfig
    traits = Traits(family="tests", phase="mastery", paper="none", patch=Told, effort=0)

    def make(self, lm, edits, config, progress):
        source = torch.Generator().manual_seed(random.Random(edits[0].prompt + edits[0].target).getrandbits(32))
        shape = dict(lm.model.named_parameters())[PARAMETER].shape
        u, v = (0.01 * torch.randn(n, generator=source) for n in shape)
        says = {edit.prompt: edit.target for edit in edits} | json.loads(config.also)
        prompts = [e.prompt for p in lm.patches for e in p.provenance.edits] if config.leans else []
        leans = dict(zip(prompts, lm.answer(prompts), strict=True)) if prompts else {}
        deltas = {PARAMETER: LowRank(u[:, None], v[None])}
        return Told(self.provenance(lm, config, edits), deltas, says=says, leans=leans)


def fact(subject, target, **more):
    return Edit(id="edit", prompt=f"{subject} lies in", subject=subject, target=target, **more)


ROME, OSLO, BONN = fact("Rome", "Peru"), fact("Oslo", "Chad"), fact("Bonn", "Mali")


def make(folder, lm, *requirements, method="tell", **more):
    needs = requirements or ("edit_success>=1",)
    return Workspace.init(folder, lm, needs, proposes=False, method=method, author="Ann", **more)


def take(workspace, what, config=None, **more):
    """Propose and accept."""
    given = {} if config is None else {"config": config}
    propose = workspace.propose_patch if isinstance(what, Patch) else partial(workspace.propose, **given)
    proposed = propose(what if isinstance(what, Patch) else [what], **more)
    assert proposed.done, proposed.refused
    accepted = workspace.accept(proposed.proposal.number, **more)
    assert accepted.done, accepted.refused
    return accepted


def said(workspace, *edits, at=None):
    """What the model answers after an entry."""
    lm = workspace.model()
    with lm.patched(*workspace.stack(at)):
        return lm.answer([edit.prompt for edit in edits])


def edit_file(path, old, new):
    """Change a text file in place."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def tree(folder):
    """Every file and folder below, but for the lock, with its bytes."""
    found = (p for p in sorted(folder.rglob("*")) if p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}
