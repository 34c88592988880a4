"""A PEFT adapter out of any change of linear maps: exact where the rank allows, cut to a rank with the error told.

Each matrix is adapted at the rank of its own change, with PEFT's scaling at 1, so that `W + B A` is the patched matrix.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from factpatch.errors import PatchError
from factpatch.export.card import card
from factpatch.export.stack import stack_of
from factpatch.export.using import hub_id
from factpatch.files import whole_folder
from factpatch.lm import LM
from factpatch.patches import LowRank, Patch
from factpatch.patches.weight import WeightPatch

__all__ = ["Shortened", "export_adapter", "to_adapter"]

_PREFIX = "base_model.model."
_CHECKPOINT = "  Export a checkpoint: factpatch export checkpoint"


@dataclass(frozen=True, slots=True)
class Shortened:
    """What became of one matrix's change.

    rank   of the change, and `kept` of it in the adapter
    error  of what was cut off, as a share of the change's Frobenius norm
    """

    parameter: str
    rank: int
    kept: int
    error: float


@dataclass(frozen=True, slots=True)
class _Factors:
    """`u v`, its rank, and what is lost."""

    u: Float[Tensor, "rows kept"]
    v: Float[Tensor, "kept cols"]
    told: Shortened


def to_adapter(
    lm: LM, patches: Sequence[Patch], rank: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[Shortened, ...]]:
    """PEFT's config and tensors for what lies on the model and these patches together change, and what was cut off.

    rank  most that one matrix may have; by default as many as its change has

    Raises PatchError for patches that are more than changes of weights, or change what PEFT's LoRA does not adapt, and
    WrongBase.
    """
    stack = stack_of(lm, patches)
    modules = dict(lm.model.named_modules())
    with lm.unpatched():
        changes = _changes(lm, stack)
    if not changes:
        raise PatchError("these patches change no weight, so there is nothing to adapt.\n  Leave them out.")
    turned = set()
    found: dict[str, _Factors] = {}
    for name, change in changes.items():
        module = modules.get(name.removesuffix(".weight"))
        if not name.endswith(".weight") or not isinstance(module, nn.Linear | Conv1D):
            raise PatchError(f"{name} is no linear map's matrix, and PEFT's LoRA adapts nothing else.\n{_CHECKPOINT}")
        turned.add(isinstance(module, Conv1D))
        found[name] = _factors(name, change, rank)
    if len(turned) > 1:
        raise PatchError(
            f"these patches change maps that are stored both ways round, which one adapter cannot.\n{_CHECKPOINT}"
        )
    is_turned = turned == {True}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, factors in found.items():
        module_name = name.removesuffix(".weight")
        # PEFT adds B A to the matrix as (out, in); one that is stored (in, out) is added the transpose.
        a, b = (factors.u.T, factors.v.T) if is_turned else (factors.v, factors.u)
        tensors[f"{_PREFIX}{module_name}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{module_name}.lora_B.weight"] = b.contiguous()
        ranks[module_name] = factors.told.kept
    most = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_id(lm) or lm.name,  # never a path, since this is shipped
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_turned,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: kept for name, kept in ranks.items() if kept != most},
        "alpha_pattern": {name: kept for name, kept in ranks.items() if kept != most},
    }
    return config, tensors, tuple(factors.told for factors in found.values())


def export_adapter(
    lm: LM, patches: Sequence[Patch], folder: str | Path, rank: int | None = None
) -> tuple[Path, tuple[Shortened, ...]]:
    """Write it as a folder that PEFT loads, with a card. Raises what `to_adapter` raises, and OutputError."""
    config, tensors, told = to_adapter(lm, patches, rank)
    folder = Path(folder)
    with whole_folder(folder) as draft:
        (draft / "adapter_config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        save_file(tensors, draft / "adapter_model.safetensors", metadata={"format": "pt"})
        (draft / "README.md").write_text(card(lm, stack_of(lm, patches), "adapter", told), encoding="utf-8")
    return folder, told


def _changes(lm: LM, patches: Sequence[Patch]) -> dict[str, LowRank | Tensor]:
    """By parameter, what all of them add to the unpatched model together; as factors where all that touch it are low-rank."""
    weights = [patch for patch in patches if isinstance(patch, WeightPatch)]
    if len(weights) == len(patches):
        deltas: dict[str, list[Any]] = {}
        for patch in weights:
            patch.check_base(lm)
            for name, delta in patch.deltas.items():
                deltas.setdefault(name, []).append(delta)
        return {name: _sum(own) for name, own in deltas.items()}
    # Adapters are merged by PEFT's own arithmetic; what they add is the difference.
    before = {name: parameter.data for name, parameter in lm.model.named_parameters()}
    with lm.patched(*patches):
        after = {name: p.data for name, p in lm.model.named_parameters() if p.data_ptr() != before[name].data_ptr()}
    return {name: after[name].double() - before[name].double() for name in after}


def _sum(deltas: Sequence[Any]) -> LowRank | Tensor:
    if all(isinstance(delta, LowRank) for delta in deltas):
        u = torch.cat([delta.u.detach().cpu().double() for delta in deltas], 1)
        v = torch.cat([delta.v.detach().cpu().double() for delta in deltas], 0)
        return LowRank(u, v)
    return torch.stack([delta.full().detach().cpu().double() for delta in deltas]).sum(0)


def _factors(name: str, change: LowRank | Tensor, most: int | None) -> _Factors:
    """The shortest factors of a change, in float32; in float64 until then."""
    if isinstance(change, LowRank):
        (q, r), (p, s) = torch.linalg.qr(change.u), torch.linalg.qr(change.v.T)
        left, values, right = torch.linalg.svd(r @ s.T, full_matrices=False)
        left, right = q @ left, right @ p.T
    else:
        left, values, right = torch.linalg.svd(change.cpu(), full_matrices=False)
    # What float32, in which patches and weights are kept, cannot tell from zero.
    longest = max(left.shape[0], right.shape[1])
    floor = float(values[0]) * longest * torch.finfo(torch.float32).eps if len(values) else 0.0
    rank = max(1, int((values > floor).sum()))
    kept = rank if most is None else min(rank, most)
    root = values[:kept].sqrt()
    size = float(values.norm())
    error = float(values[kept:].norm()) / size if kept < rank else 0.0
    told = Shortened(name, rank, kept, error)
    return _Factors((left[:, :kept] * root).float(), (root[:, None] * right[:kept]).float(), told)
