"""A merged Hugging Face checkpoint: sharded, with tokenizer, generation config and model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from factpatch.export.card import card
from factpatch.export.stack import stack_of
from factpatch.lm import LM
from factpatch.patches import Patch, merge

__all__ = ["export_checkpoint"]


def export_checkpoint(lm: LM, patches: Sequence[Patch], folder: str | Path, *, shard_size: str = "5GB") -> Path:
    """Write the model, with what lies on it and these patches, as a folder that transformers loads.

    shard_size  most bytes of one file, as transformers reads it, such as `2GB`

    Raises PatchError for a patch that is more than a change of weights, WrongBase, OutputError.
    """
    return merge(
        lm, patches, folder, {"README.md": card(lm, stack_of(lm, patches), "checkpoint")}, shard_size=shard_size
    )
