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
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from factpatch.errors import MissingExtra
from factpatch.lm import LM
from factpatch.patches.base import Patch, Provenance
from factpatch.patches.parts import Spec, damaged, linear_map, misfit
from factpatch.patches.weight import check_finite, point

__all__ = ["AdapterPatch", "adapt", "peft_library"]

_PREFIX = "base_model.model."
_PEFT_RAISES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("expected each module once, found one twice")
    return names


class _Config(Spec):
    """What of PEFT's config decides what an adapter does to the weights. Nothing else of it is handed on to PEFT.

    PEFT's config can ask for much more, such as modules to import or files to read, and a patch must not.
    """

    model_config = ConfigDict(extra="ignore")

    peft_type: Literal["LORA", "ADALORA"]
    target_modules: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_once)]
    r: PositiveInt
    lora_alpha: PositiveFloat
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_r: PositiveInt | None = None
    target_r: PositiveInt | None = None
    total_step: PositiveInt | None = None
    tinit: NonNegativeInt = 0
    tfinal: NonNegativeInt = 0

    @property
    def rank(self) -> int:
        """Of its matrices."""
        return self.r if self.init_r is None else self.init_r

    def acting(self) -> dict[str, Any]:
        """What PEFT is given; the modules are the caller's."""
        ours = {"r"} if self.peft_type == "ADALORA" else {"init_r", "target_r", "total_step", "tinit", "tfinal"}
        return self.model_dump(exclude={"target_modules", *ours}, exclude_none=True)


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
        for name in _Config.read(self.config).target_modules:
            linear_map(lm, name, "the adapter changes")
            if f"{name}.weight" not in parameters:  # it goes by another name, that of what it is tied to
                raise misfit(f"the adapter changes {name}, whose weight in {lm.name} is another module's too.")
        try:
            changed = self.merged(lm.model)
        except _PEFT_RAISES as error:
            told = str(error).strip().partition("\n")[0]
            raise damaged(f"PEFT cannot lay this adapter on {lm.name} ({told}).") from error
        check_finite(changed, lm)
        kept = {name: parameters[name].data for name in changed}
        point(parameters, changed)
        return partial(point, parameters, kept)

    def merged(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights this adapter makes of a model's, by name; the model is not touched.

        Raises BadPatch if its tensors are not those that its config asks for.
        """
        peft = peft_library()
        read = _Config.read(self.config)
        names = list(read.target_modules)
        aliases = {name: f"m{i}" for i, name in enumerate(names)}  # module names in a dict may hold no dots
        copies = nn.ModuleDict({aliases[name]: _copied(model.get_submodule(name)) for name in names})
        config = peft.PeftConfig.from_peft_type(**read.acting(), target_modules=list(aliases.values()))
        renamed = {}
        for key, tensor in self.weights.items():
            name = max((n for n in names if key.startswith(f"{_PREFIX}{n}.")), key=len)
            renamed[f"{_PREFIX}{aliases[name]}{key.removeprefix(_PREFIX + name)}"] = tensor
        adapted = adapt(copies, config, seed=0)
        wanted = {key: tensor.shape for key, tensor in peft.get_peft_model_state_dict(adapted).items()}
        # PEFT passes over what it does not know, and leaves what it does not find at its random start.
        if wanted != {key: tensor.shape for key, tensor in renamed.items()}:
            raise damaged(f"{self.tensor_file}: its tensors are not those that adapter_config.json asks for.")
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
        read = _Config.read(spec)
        names = read.target_modules
        strays = [key for key in tensors if not any(key.startswith(f"{_PREFIX}{name}.") for name in names)]
        if strays:
            raise damaged(f"{cls.tensor_file}: holds tensors of no module that the config names ({strays[:1]}).")
        # Before PEFT makes room for it: a rank may be written down that no memory holds.
        if any(tensor.shape[:1] != (read.rank,) for key, tensor in tensors.items() if ".lora_A" in key):
            raise damaged(f"{cls.tensor_file}: its matrices are not of rank {read.rank}, which the config tells of.")
        return AdapterPatch(provenance, dict(spec), tensors)

    def changes(self) -> list[dict[str, Any]]:
        """One row for each module."""
        read = _Config.read(self.config)
        form = f"{'DORA' if read.use_dora else read.peft_type} of rank {read.rank}"
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
