"""`AdapterPatch`: a PEFT adapter (LoRA, AdaLoRA, DoRA), kept in a folder that every tool which reads PEFT can read.

On a model it lies merged into the weights, by PEFT's own arithmetic on copies of the modules it touches; so the model's
modules stay in place, and other patches find them.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from factpatch.errors import BadPatch, MissingExtra, WrongBase
from factpatch.lm import LM
from factpatch.patches.base import Patch, Provenance
from factpatch.patches.weight import point

__all__ = ["AdapterPatch", "adapt", "peft_library"]

_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class AdapterPatch(Patch):
    """An adapter: PEFT's config as JSON, and its tensors by PEFT's names. Raises MissingExtra where PEFT is needed."""

    kind: ClassVar[str] = "adapter"
    mergeable: ClassVar[bool] = True
    tensor_file: ClassVar[str] = "adapter_model.safetensors"
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, provenance: Provenance, trained: Any) -> AdapterPatch:
        """The adapter of a trained `PeftModel`."""
        own = trained.peft_config["default"]
        if own.peft_type.value == "ADALORA":
            own.rank_pattern = None  # masked values are kept as zeros; PEFT cannot read a module cut down to rank 0
        config = own.to_dict()
        config |= {"inference_mode": True, "base_model_name_or_path": provenance.base_name}
        config = json.loads(json.dumps(config, default=sorted))
        # By their whole names: PEFT shortens a long list to the endings that its modules share.
        config["target_modules"] = sorted(trained.base_model.targeted_module_names)
        weights = peft_library().get_peft_model_state_dict(trained)
        return cls(provenance, config, {name: t.detach().cpu().clone() for name, t in weights.items()})

    def attach(self, lm: LM) -> Callable[[], None]:
        """Point each touched weight at the merged one; undoing points it back at the very tensor it had."""
        self.check_base(lm)
        parameters = dict(lm.model.named_parameters())
        for name in self.config["target_modules"]:
            if f"{name}.weight" not in parameters:
                raise WrongBase(
                    f"the adapter changes {name}; {lm.name} has no such module.\n"
                    "  The patch's folder may be damaged; make it again with: factpatch edit"
                )
        try:
            changed = self.merged(lm.model)
        except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
            told = str(error).strip().partition("\n")[0]
            raise BadPatch(
                f"PEFT cannot lay this adapter on {lm.name} ({told}).\n"
                "  The patch's folder may be damaged; make it again with: factpatch edit"
            ) from error
        kept = {name: parameters[name].data for name in changed}
        point(parameters, changed)
        return partial(point, parameters, kept)

    def merged(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights this adapter makes of a model's, by name; the model is not touched."""
        peft = peft_library()
        names = list(self.config["target_modules"])
        aliases = {name: f"m{i}" for i, name in enumerate(names)}  # module names in a dict may hold no dots
        copies = nn.ModuleDict({aliases[name]: _copied(model.get_submodule(name)) for name in names})
        local = {"target_modules": list(aliases.values()), "base_model_name_or_path": None}
        config = peft.PeftConfig.from_peft_type(**{**self.config, **local})
        renamed = {}
        for key, tensor in self.weights.items():
            name = max((n for n in names if key.startswith(f"{_PREFIX}{n}.")), key=len)
            renamed[f"{_PREFIX}{aliases[name]}{key.removeprefix(_PREFIX + name)}"] = tensor
        adapted = adapt(copies, config, seed=0)
        with torch.no_grad():
            peft.set_peft_model_state_dict(adapted, renamed)
            merged = adapted.merge_and_unload()
        return {f"{name}.weight": merged[aliases[name]].weight.detach() for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """By PEFT's names."""
        return dict(self.weights)

    def spec(self) -> dict[str, Any]:
        """PEFT's config."""
        return dict(self.config)

    def files(self) -> dict[str, str]:
        """What PEFT looks for beside the tensors."""
        return {"adapter_config.json": json.dumps(dict(self.config), indent=2, sort_keys=True) + "\n"}

    @classmethod
    def from_parts(cls, provenance: Provenance, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterPatch:
        """From PEFT's config and tensors."""
        names = spec.get("target_modules") or []
        strays = [key for key in tensors if not any(key.startswith(f"{_PREFIX}{name}.") for name in names)]
        if not names or strays:
            raise BadPatch(
                f"{cls.tensor_file}: holds tensors of no module that the config names ({strays[:1]}).\n"
                "  The file is damaged; make the patch again with: factpatch edit"
            )
        return AdapterPatch(provenance, dict(spec), tensors)

    def changes(self) -> list[dict[str, Any]]:
        """One row for each module."""
        kind, rank = self.config["peft_type"], self.config.get("init_r") or self.config["r"]
        form = f"{'DORA' if self.config.get('use_dora') else kind} of rank {rank}"
        return [{"part": f"{name}.weight", "form": form} for name in self.config["target_modules"]]


def adapt(model: nn.Module, config: Any, seed: int) -> Any:
    """PEFT's `PeftModel` with a fresh adapter. The global random state is left alone."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going out of use
        torch.manual_seed(seed)
        return peft_library().get_peft_model(model, config)


def peft_library() -> Any:
    """The module. Raises MissingExtra if it is not installed."""
    try:
        return import_module("peft")
    except ImportError:
        raise MissingExtra(
            'adapters need an extra that is not installed.\n  Install it: pip install "factpatch[adapters]"'
        ) from None


def _copied(module: nn.Module) -> nn.Module:
    """A module of its own with a copy of the weight, and no hooks."""
    twin = copy.copy(module)
    # Parameters of its own throughout: PEFT freezes whatever it is given.
    twin._parameters = {
        name: nn.Parameter(p.detach().clone() if name == "weight" else p.detach(), requires_grad=False)
        for name, p in module._parameters.items()
        if p is not None
    } | {name: None for name, p in module._parameters.items() if p is None}
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin
