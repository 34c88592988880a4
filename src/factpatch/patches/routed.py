"""`RoutedPatch`: a scope classifier in front of a second model that answers with the edit before its eyes (SERAC)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from factpatch.lm import LM, BaseLM
from factpatch.lm.batches import Pass, by_rows, current_pass
from factpatch.lm.hooks import replacing_output
from factpatch.lm.model import raw_bytes
from factpatch.patches.base import Provenance
from factpatch.patches.context import Context, ContextPatch
from factpatch.patches.delta import LowRank, joinable, moved, tensors_of
from factpatch.patches.parts import damaged, linear_map
from factpatch.words import counted

__all__ = ["RoutedPatch", "Scope"]


@dataclass(frozen=True, eq=False)
class Scope:
    """Whether a question is in the scope of an edit, from the sentence vectors of both.

    A hidden layer reads the product and the distance of the two vectors, component by component.
    """

    hidden: Float[Tensor, "units both"]
    hidden_bias: Float[Tensor, " units"]
    out: Float[Tensor, " units"]
    out_bias: Float[Tensor, ""]

    def logits(
        self, edits: Float[Tensor, "*batch width"], questions: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch"]:
        """The log-odds for each pair."""
        pair = torch.cat([edits * questions, (edits - questions).abs()], -1)
        return (pair @ self.hidden.T + self.hidden_bias).relu() @ self.out + self.out_bias


@dataclass(frozen=True, eq=False)
class RoutedPatch(ContextPatch):
    """Where a question is in an edit's scope, the second model is asked it, the edit before it; else the base model is.

    The second model is the base with an adapter, and the adapter acts in the rows that hold a note and in no others, so
    that the base model's answers stay what they are to the bit. Patches of one editor that lie on one model act as one.

    scope    tells what is in scope; `recall.threshold` is the least probability
    adapter  by module name: what is added to the module's map, as of `y = W x`
    """

    kind: ClassVar[str] = "routed"
    needs_weights: ClassVar[bool] = True
    scope: Scope = field(kw_only=True)
    adapter: Mapping[str, LowRank] = field(kw_only=True)

    def attach(self, lm: BaseLM) -> Callable[[], None]:
        """Add itself to the model's contexts, and hook onto the adapter's modules."""
        self.check_base(lm)
        assert isinstance(lm, LM), "it was made on one"
        modules = {
            name: linear_map(lm, name, "the adapter belongs to", reads=change.shape[1], writes=change.shape[0]).module
            for name, change in self.adapter.items()
        }
        router = _Router(self, lm)
        lm.contexts.append(router)
        with ExitStack() as stack:
            stack.callback(lm.contexts.remove, router)
            stack.callback(lm.model.register_forward_pre_hook(router.look, with_kwargs=True).remove)
            for name, change in self.adapter.items():
                stack.enter_context(replacing_output(modules[name], router.adding(moved(change, lm.device))))
            return stack.pop_all().close

    def similarity(self, asked: Float[Tensor, "prompts width"]) -> Float[Tensor, "prompts notes"]:
        """The probability that each prompt, of which the sentence vector is given, is in the scope of each note's edit."""
        if 2 * asked.shape[1] != self.scope.hidden.shape[1]:
            raise damaged(
                f"the classifier reads {self.scope.hidden.shape[1]} numbers of two texts; the encoder gives "
                f"{asked.shape[1]} of each."
            )
        shape = (len(asked), *self._topics.shape)
        return self.scope.logits(self._topics[None].expand(shape), asked[:, None].expand(shape)).sigmoid()

    def acts_with(self, other: ContextPatch) -> bool:
        """Whether the two act as one: those of one editor do, by the uppermost's least probability."""
        return isinstance(other, RoutedPatch) and (other.asking, other.editor) == (self.asking, self.editor)

    @cached_property
    def editor(self) -> str:
        """Tells whether two patches are of one editor: a hash of all that was trained."""
        digest = hashlib.sha256()
        for _, tensor in sorted(self.tensors().items()):
            digest.update(raw_bytes(tensor))
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """The classifier's, and the adapter's by module."""
        own = {f"{_SCOPE}{name}": getattr(self.scope, name) for name in Scope.__dataclass_fields__}
        return own | tensors_of(self.adapter)

    @classmethod
    def from_parts(cls, provenance: Provenance, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RoutedPatch:
        """From what `spec` and `tensors` gave."""
        read = ContextPatch.from_parts(provenance, spec, {})
        try:
            network = {name: tensors[f"{_SCOPE}{name}"] for name in Scope.__dataclass_fields__}
            names = {key.rpartition(".")[0] for key in tensors if not key.startswith(_SCOPE)}
            pairs = {name: (tensors[f"{name}.u"], tensors[f"{name}.v"]) for name in sorted(names)}
        except KeyError as error:
            raise damaged(f"patch.safetensors: {error} is missing.") from None
        shapes = [tuple(tensor.shape) for tensor in network.values()]
        units = shapes[0][:1]
        if (
            [len(shapes[0]), *shapes[1:]] != [2, units, units, ()]
            or not all(joinable(*pair) for pair in pairs.values())
            or read.recall is None
        ):
            raise damaged(
                "patch.safetensors: a classifier or an adapter whose matrices cannot be multiplied, or nothing to recall."
            )
        scope, adapter = Scope(**network), {name: LowRank(*pair) for name, pair in pairs.items()}
        return RoutedPatch(provenance, read.notes, read.asking, read.recall, scope=scope, adapter=adapter)

    def changes(self) -> list[dict[str, Any]]:
        """The prompt, and the adapter of the second model."""
        notes = {
            "part": "what is asked",
            "form": f"up to 1 of {counted(len(self.notes), 'note')} before it, where in scope",
        }
        form = f"where a note is: an adapter on {len(self.adapter)} modules"
        return [notes, {"part": "the second model", "form": form}] if self.adapter else [notes]


_SCOPE = "scope:"


class _Router(Context):
    """A patch on a model, that also sees which rows hold a note."""

    patch: RoutedPatch
    lm: LM

    def __init__(self, patch: RoutedPatch, lm: LM) -> None:
        super().__init__(patch, lm)
        self._alone: Bool[Tensor, " rows"] | None = None

    def look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the rows that hold a note, in the pass that reads the prompt."""
        now = current_pass()
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or (now is not None and now.ends is None) or not self.is_uppermost:
            return  # given as vectors, or writing on after a prompt that was read; or another looks for this one too
        mask = torch.ones_like(ids) if now is None else now.mask
        if now is not None and now.ends is not None:  # what follows the prompt is no note, also where it is read again
            mask = mask * (torch.arange(mask.shape[1], device=mask.device) <= now.ends[:, None])
        texts = [self.lm.tokens.decode(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
        notes = [note.text for context in self.together() for note in context.patch.notes]
        routed = torch.tensor([any(note in text for note in notes) for text in texts], device=ids.device)
        if now is None:
            self._alone = routed
        else:
            now.notes[self] = routed

    def adding(self, change: LowRank) -> Callable[[Tensor, Tensor], Tensor]:
        """What a module puts out, the adapter's part added in those rows."""

        def add(x: Tensor, out: Tensor) -> Tensor:
            now: Pass | None = current_pass()
            routed = self._alone if now is None else now.notes.get(self)
            if routed is None or not routed.any() or not self.is_uppermost:
                return out
            rows = by_rows(out)
            changed = change.added(by_rows(x)[routed], rows[routed])
            return rows.index_put((routed.nonzero()[:, 0],), changed).reshape(out.shape)

        return add
