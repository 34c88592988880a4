"""Where the parts of a decoder are: blocks, MLP output projections, attention, final norm, head.

They are found by shape and structure, not by name, so that a new architecture costs nothing; what is found for a
known architecture is checked against a short table. Nothing outside `lm/` ever writes a module path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from factpatch.errors import AnatomyError

__all__ = ["Anatomy", "Projection", "find_anatomy"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Module paths; those of a block's parts are relative to the block."""

    blocks: str
    attention: str
    attention_out: str
    mlp: str
    mlp_out: str | None
    final_norm: str


# The cross-check. A row is not needed for a model to work; it makes a wrong guess loud.
_KNOWN: dict[str, Layout] = {
    "bloom": Layout("transformer.h", "self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h", "transformer.ln_f"),
    "falcon": Layout("transformer.h", "self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h", "transformer.ln_f"),
    "gpt2": Layout("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neox": Layout(
        "gpt_neox.layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"
    ),
    "gptj": Layout("transformer.h", "attn", "attn.out_proj", "mlp", "mlp.fc_out", "transformer.ln_f"),
    "opt": Layout("model.decoder.layers", "self_attn", "self_attn.out_proj", "", "fc2", "model.decoder.final_layer_norm"),
} | dict.fromkeys(
    ["gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"],
    Layout("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj", "model.norm"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear map `y = W x (+ b)`, whichever way round its weight is stored.

    module     the live module
    parameter  the weight's name in the model
    transposed the weight is stored (in, out), as GPT-2's Conv1D does, not (out, in)
    """

    module: nn.Module
    parameter: str
    transposed: bool

    @property
    def matrix(self) -> Float[Tensor, "out in"]:
        """The weight as `W` of `y = W x`: a view, never a copy."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.T if self.transposed else weight

    def apply(self, matrix: Float[Tensor, "out in"], x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """`y = W x + b` with `matrix` in place of `W`."""
        bias = getattr(self.module, "bias", None)
        return nn.functional.linear(x, matrix, bias.to(x.dtype) if isinstance(bias, Tensor) else None)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one decoder. Layers are counted from 0."""

    model: nn.Module
    layout: Layout
    moe: bool

    @property
    def blocks(self) -> list[nn.Module]:
        """The stack of blocks, first to last."""
        return list(self.model.get_submodule(self.layout.blocks).children())

    @property
    def n_layers(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.head.weight.shape[1])

    @property
    def activation(self) -> nn.Module:
        """The MLP's activation function, as the model's config names it; BLOOM's is a GELU that its config leaves out."""
        names = ("hidden_act", "hidden_activation", "activation_function", "activation")
        config = self.model.config
        found = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), str)), "gelu")
        module: nn.Module = ACT2FN[found]
        return module

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        assert isinstance(embedding, nn.Module)
        return embedding

    @property
    def head(self) -> nn.Linear:
        """The projection from hidden states to logits."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        assert isinstance(head, nn.Linear)
        return head

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head."""
        return self.model.get_submodule(self.layout.final_norm)

    def block(self, layer: int) -> nn.Module:
        """Block `layer`. Raises AnatomyError if there is none."""
        if not 0 <= layer < self.n_layers:
            raise AnatomyError(
                f"there is no block {layer}: the model has {self.n_layers}, numbered 0 to {self.n_layers - 1}.\n"
                "  See its parts: factpatch models show MODEL"
            )
        return self.blocks[layer]

    def mlp_out(self, layer: int) -> Projection:
        """The MLP's output projection of block `layer`: hidden x inter.

        Raises AnatomyError for a mixture of experts, which has no single one.
        """
        block, path = self.block(layer), self.layout.mlp_out
        if path is None or (not _has(block, path) and _looks_like_experts(block)):
            raise AnatomyError(
                f"block {layer}: its MLP is a mixture of experts, without one output projection to edit.\n"
                "  Methods that change no MLP projection still work; see the column 'needs' of: factpatch methods"
            )
        return self._projection(layer, path)

    def mlp_in(self, layer: int) -> tuple[Projection, ...]:
        """The maps from the residual stream into the MLP of block `layer`: one, or a gate beside it.

        Raises AnatomyError for a mixture of experts.
        """
        out = self.mlp_out(layer)
        attention = f"{self.layout.attention}."
        found = [
            self._projection(layer, name)
            for name, width, _ in _linear_maps(self.block(layer))
            if width == self.hidden_size and not name.startswith(attention) and "expert" not in name
        ]
        return tuple(projection for projection in found if projection.module is not out.module)

    def queries_and_values(self, layer: int) -> tuple[Projection, ...]:
        """The attention's maps to queries and to values in block `layer`, or the one map to all three where they are fused."""
        attention = self.block(layer).get_submodule(self.layout.attention)
        paths = (
            f"{self.layout.attention}.{name}" for name, width, _ in _linear_maps(attention) if width == self.hidden_size
        )
        names = [path for path in paths if path != self.layout.attention_out]
        apart = [name for name in names if name.rpartition(".")[2][0] in "qv"]
        return tuple(self._projection(layer, name) for name in (apart if len(names) > 1 else names))

    def attention_out(self, layer: int) -> Projection:
        """The attention's output projection of block `layer`."""
        return self._projection(layer, self.layout.attention_out)

    def projections_out(self) -> Iterator[tuple[int, str, Projection]]:
        """Block, "attention" or "MLP", and its output projection, through all blocks; none for a mixture of experts."""
        for layer in range(self.n_layers):
            for what, find in (("attention", self.attention_out), ("MLP", self.mlp_out)):
                with suppress(AnatomyError):
                    yield layer, what, find(layer)

    def _projection(self, layer: int, path: str) -> Projection:
        block = self.block(layer)
        if not _has(block, path):
            raise AnatomyError(
                f"block {layer} ({type(block).__name__}) has no {path}, as the first blocks have.\n"
                "  Choose another layer; see the model's parts: factpatch models show MODEL"
            )
        module = block.get_submodule(path)
        return Projection(module, f"{self.layout.blocks}.{layer}.{path}.weight", isinstance(module, Conv1D))

    def describe(self) -> dict[str, Any]:
        """What was found, JSON-ready."""
        path = self.layout.mlp_out
        dense = next((i for i, block in enumerate(self.blocks) if path and _has(block, path)), None)
        return {
            "architecture": type(self.model).__name__,
            "layers": self.n_layers,
            "hidden_size": self.hidden_size,
            "inter_size": None if dense is None else int(self.mlp_out(dense).matrix.shape[1]),
            "vocabulary": int(self.head.weight.shape[0]),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tied_head": self.head.weight is self.embedding.weight,
            "mixture_of_experts": self.moe,
            **asdict(self.layout),
        }


def find_anatomy(model: nn.Module, named: Mapping[str, str] | None = None) -> Anatomy:
    """Find the parts of a decoder by looking at its modules.

    `named` gives the path of a part the search cannot find or finds wrongly: any field of `Layout`.
    Raises AnatomyError naming the module it stumbled on and what was seen there.
    """
    named = dict(named or {})
    unknown = set(named) - set(Layout.__dataclass_fields__)
    if unknown:
        raise AnatomyError(f"no part is called {sorted(unknown)}; parts are {sorted(Layout.__dataclass_fields__)}.")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        raise AnatomyError(
            f"{type(model).__name__} has no output head, so it is no language model that writes text.\n"
            "  Load a causal language model, such as those of transformers' AutoModelForCausalLM."
        )
    hidden = int(head.weight.shape[1])
    for part, path in named.items():
        _check_named(model, part, path, named)
    blocks = named.get("blocks") or _find_blocks(model)
    stack = list(model.get_submodule(blocks).children())
    where = f"block 0 ({type(stack[0]).__name__})"
    attention = named.get("attention") or _find_attention(stack[0], where)
    attention_out = named.get("attention_out") or _last_onto(stack[0].get_submodule(attention), attention, hidden)
    if attention_out is None:
        raise _no_projection(where, attention, hidden, stack[0].get_submodule(attention), "attention_out")
    # Some mixtures of experts have dense blocks among them, first or elsewhere.
    found = (_last_onto(block, "", hidden, but=attention) for block in stack)
    mlp_out = named.get("mlp_out") or next((path for path in found if path), None)
    moe = any(_looks_like_experts(block) for block in stack if mlp_out is None or not _has(block, mlp_out))
    if mlp_out is None and not moe:
        raise _no_projection(where, "the block outside its attention", hidden, stack[0], "mlp_out")
    mlp = named.get("mlp", mlp_out.rpartition(".")[0] if mlp_out else "mlp")
    layout = Layout(
        blocks, attention, attention_out, mlp, mlp_out, named.get("final_norm") or _find_norm(model, blocks)
    )
    known = _KNOWN.get(str(getattr(getattr(model, "config", None), "model_type", "")))
    if known is not None and not named and layout != known:
        raise AnatomyError(
            f"{type(model).__name__}: found {layout}, but this architecture is known to have {known}.\n"
            "  The library that defines it may have changed; name the parts yourself: load(..., anatomy={...})"
        )
    return Anatomy(model, layout, moe)


def _check_named(model: nn.Module, part: str, path: str, named: Mapping[str, str]) -> None:
    """Raise AnatomyError if a part the user named is nowhere: below the model, or below any block."""
    if part in ("blocks", "final_norm"):
        below, roots = type(model).__name__, [model]
    else:
        blocks = named.get("blocks") or _find_blocks(model)
        below, roots = f"any of {blocks}", list(model.get_submodule(blocks).children())
    if not any(_has(root, path) for root in roots) or (
        part == "blocks" and not any(model.get_submodule(path).children())
    ):
        raise AnatomyError(
            f'there is no "{path}" in {below}, which was named as its {part}.\n'
            "  Give the path that named_modules() lists; parts of a block are named below the block."
        )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _find_blocks(model: nn.Module) -> str:
    """The longest list of modules of one class."""
    lists: list[tuple[int, str]] = [
        (len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(item) for item in module}) == 1
    ]
    if not lists:
        raise AnatomyError(
            f"{type(model).__name__}: found no stack of equal blocks (a ModuleList of one class).\n"
            '  Name it yourself: load(..., anatomy={"blocks": "path.to.blocks"})'
        )
    longest = max(length for length, _ in lists)
    return next(name for length, name in lists if length == longest)


def _find_attention(block: nn.Module, where: str) -> str:
    for name, child in block.named_children():
        if "attention" in type(child).__name__.lower():
            return name
    kinds = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
    raise AnatomyError(
        f'{where}: no attention among its parts: {kinds}.\n  Name it yourself: load(..., anatomy={{"attention": "<name>"}})'
    )


def _find_norm(model: nn.Module, blocks: str) -> str:
    """The norm beside the stack of blocks, not inside it."""
    parent = blocks.rpartition(".")[0]
    norms = [
        name
        for name, child in model.get_submodule(parent).named_children()
        if "norm" in type(child).__name__.lower() and "embedding" not in name
    ]
    if not norms:
        raise AnatomyError(
            f"{parent or type(model).__name__}: no final norm beside the blocks.\n"
            '  Name it yourself: load(..., anatomy={"final_norm": "path.to.norm"})'
        )
    return f"{parent}.{norms[-1]}".lstrip(".")


def _linear_maps(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Path, input and output width of every linear map below a module."""
    for name, child in module.named_modules():
        if isinstance(child, Conv1D):
            yield name, int(child.weight.shape[0]), int(child.weight.shape[1])
        elif isinstance(child, nn.Linear):
            yield name, child.in_features, child.out_features


def _last_onto(module: nn.Module, prefix: str, hidden: int, but: str = "") -> str | None:
    """The last linear map whose output is the residual stream, leaving out those below `but` and inside experts."""
    found = None
    for name, _, out in _linear_maps(module):
        path = f"{prefix}.{name}".strip(".")
        if out == hidden and not (but and path.startswith(f"{but}.")) and "expert" not in path:
            found = path
    return found


def _looks_like_experts(block: nn.Module) -> bool:
    return any("expert" in name.lower() for name, _ in block.named_modules())


def _no_projection(where: str, under: str, hidden: int, module: nn.Module, part: str) -> AnatomyError:
    seen = ", ".join(f"{name or 'itself'} {a}->{b}" for name, a, b in _linear_maps(module)) or "no linear maps"
    return AnatomyError(
        f"{where}: no projection back to hidden size {hidden} under {under}; saw {seen}.\n"
        f'  Name it yourself: load(..., anatomy={{"{part}": "<path below the block>"}})'
    )
