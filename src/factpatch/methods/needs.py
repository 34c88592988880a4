"""What making edits takes, as a method tells it beforehand: `Method.needs`, and the pieces it is put together from.

All are estimates, in bytes. They are reckoned from shapes alone, so the model may be without its weights. What a method
keeps is told in stages; memory that one stage has let go of does not count in the next. The weights themselves come on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.batches import length_batches
from factpatch.methods.targets import tokens_at_once, with_targets

__all__ = [
    "Change",
    "Held",
    "Needs",
    "Preparation",
    "Stage",
    "kept_keys",
    "kept_tokens",
    "laid_on",
    "low_rank",
    "most",
    "predictions",
    "usual_needs",
    "widest_pass",
]


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Held(_Told):
    """Something held in memory.

    host  in main memory even where the model lies on a GPU
    """

    what: str
    bytes: int
    host: bool = False


class Stage(_Told):
    """A part of the work, and what is held at its height beside the weights."""

    doing: str
    held: tuple[Held, ...]


class Change(_Told):
    """A matrix that will be changed, and in what form the patch will keep the change."""

    part: str
    shape: tuple[int, int]
    form: str


class Preparation(_Told):
    """What depends on the model alone and is made once, then kept on disk.

    blocks   it is made for
    missing  those of them for which it is not there yet; None where that is not known
    tokens   the model must write or read if anything is missing
    bytes    on disk, of all blocks
    """

    what: str
    blocks: tuple[int, ...] = ()
    missing: tuple[int, ...] | None = None
    tokens: int = 0
    bytes: int = 0


class Needs(_Told):
    """What a method needs for some edits on one model.

    patch_bytes  of the patch's tensors on disk; None where that is not known
    unknown      what this leaves out, a sentence each
    """

    stages: tuple[Stage, ...]
    changes: tuple[Change, ...] = ()
    preparations: tuple[Preparation, ...] = ()
    patch_bytes: int | None = None
    unknown: tuple[str, ...] = ()


def kept_tokens(lm: LM, first: int, tokens: int) -> Held:
    """What so many tokens leave in the blocks above the input of block `first`, for gradients with the weights constant.

    Twice as many numbers as a block has weights for each entry of the hidden state. Counted on fifteen architectures it is
    0.9 to 2 times (Llama's 1.2; in bfloat16, whose norms run in float32, 1.4), for Gemma 2 three times.
    """
    weights = sum(p.numel() for block in lm.anatomy.blocks[first:] for p in block.parameters())
    kept = tokens * 2 * weights // lm.anatomy.hidden_size * lm.dtype.itemsize
    return Held(what=f"activations of {tokens} tokens, for gradients from block {first} on", bytes=kept)


def kept_keys(lm: LM, tokens: int, blocks: int | None = None) -> Held:
    """Keys and values of so many tokens in all blocks, or in some."""
    n = lm.anatomy.n_layers if blocks is None else blocks
    kept = 2 * n * tokens * _key_width(lm) * lm.dtype.itemsize
    return Held(what=f"keys and values of {tokens} tokens", bytes=kept)


def predictions(lm: LM, reads: int, held: int = 0) -> Held:
    """Logits at so many places, with their gradient; `held` distributions are kept to compare with.

    Logits are taken in float32, and stand beside those of the model's own type where that is shorter.
    """
    vocabulary, size = len(lm.anatomy.head.weight), lm.dtype.itemsize
    each = 8 if size == 4 else 8 + 2 * size
    kept = vocabulary * (each * reads + 16 * held)
    return Held(what=f"logits at {reads} places, {vocabulary} each, and their gradient", bytes=kept)


def widest_pass(lm: LM, tokens: int) -> Held:
    """What a pass without gradients holds at once: as many numbers as a block has weights for each entry of the hidden state."""
    weights = max(sum(p.numel() for p in block.parameters()) for block in lm.anatomy.blocks)
    return Held(
        what=f"one block's activations of {tokens} tokens",
        bytes=tokens * weights // lm.anatomy.hidden_size * lm.dtype.itemsize,
    )


def laid_on(lm: LM, matrices: Sequence[Projection]) -> Held:
    """Changed copies of these weights, and the last one's change in float32."""
    sizes = [matrix.matrix.numel() for matrix in matrices]
    kept = sum(sizes) * lm.dtype.itemsize + 4 * max(sizes, default=0)
    return Held(what=f"changed copies of {len(sizes)} matri{'x' if len(sizes) == 1 else 'ces'}", bytes=kept)


def low_rank(projection: Projection, rank: int) -> tuple[Change, int]:
    """A change of this rank at most, as a `WeightPatch` keeps it, and the bytes of its tensors."""
    out, width = (int(n) for n in projection.matrix.shape)
    factors = rank * (out + width)
    form = f"rank {rank}" if factors <= out * width else "dense"
    return Change(part=projection.parameter, shape=(out, width), form=form), 4 * min(factors, out * width)


def most(stages: Iterable[Stage]) -> Stage:
    """The one that holds the most."""
    return max(stages, key=lambda stage: sum(held.bytes for held in stage.held))


def usual_needs(lm: LM, edits: Sequence[Edit], config: BaseModel, *, joint: bool, inside: bool, prepares: str) -> Needs:
    """What a method that tells nothing of its own is taken to need: activations for gradients of its edits' texts.

    They reach down to its setting `layer`, or the lowest of `layers`; to the first block where it has neither. As many texts
    run at once as its setting `batch_size` says; without one all that `joint` edits have, within `tokens_at_once`, or one.

    inside  it needs the weights; one that works through the prompt alone keeps nothing
    """
    preparations = (Preparation(what=prepares),) if prepares else ()
    if not inside:
        return Needs(stages=(), preparations=preparations, unknown=("the size of the patch: it holds texts.",))
    place = getattr(config, "layer", None)
    layers = [place] if isinstance(place, int) else [i for i in getattr(config, "layers", None) or () if i >= 0]
    first = min(layers, default=0)
    texts = with_targets(lm, edits, chat=bool(getattr(config, "chat", False)))
    lengths = [len(text.ids) for text in texts]
    size = getattr(config, "batch_size", None)
    if isinstance(size, int) and joint:
        groups = [list(range(i, min(i + size, len(texts)))) for i in range(0, len(texts), size)]
    elif joint:
        groups = list(length_batches(lengths, tokens_at_once(lm, first)))
    else:
        groups = [[i] for i in range(len(texts))]
    # A context is about as long as a prompt.
    contexts = 1 + (getattr(config, "contexts", None) or 0)
    at_once = [contexts * len(group) * max(lengths[i] for i in group) for group in groups]
    reads = [contexts * sum(len(texts[i].target_ids) for i in group) for group in groups]
    held = (kept_tokens(lm, first, max(at_once)), predictions(lm, max(reads)))
    return Needs(
        stages=(Stage(doing="Learning", held=held),),
        preparations=preparations,
        unknown=(
            "which matrices will change, the size of the patch, and what the method trains: it does not tell beforehand.",
        ),
    )


def _key_width(lm: LM) -> int:
    """Numbers in one token's key, of all heads of a block; the hidden size where the config does not tell."""
    config = lm.model.config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return lm.anatomy.hidden_size
    shared = getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or lm.anatomy.hidden_size // heads
    return int(width) * (shared if isinstance(shared, int) else heads)
