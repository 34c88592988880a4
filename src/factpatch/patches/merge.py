"""A model with its patches, as a plain checkpoint that needs no factpatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from factpatch.errors import PatchError
from factpatch.files import whole_folder
from factpatch.lm import LM, Attachable
from factpatch.lm.fetch import without_bars
from factpatch.patches.base import Patch

__all__ = ["check_mergeable", "merge"]


def check_mergeable(patches: Sequence[Attachable]) -> None:
    """Raise PatchError for a patch that is more than a change of weights."""
    for patch in patches:
        if not getattr(patch, "mergeable", False):
            name = (
                f"{patch.id} ({patch.kind}, by {patch.provenance.method})"
                if isinstance(patch, Patch)
                else getattr(patch, "id", patch)
            )
            raise PatchError(
                f"patch {name} is not a change of weights and cannot be merged into them.\n"
                "  Leave it out, and lay it on the merged model where that runs; or make the edit anew as a change of weights: "
                "factpatch edit --require mergeable"
            )


def merge(
    lm: LM,
    patches: Sequence[Patch],
    folder: str | Path,
    more: Mapping[str, str] | None = None,
    *,
    shard_size: str = "50GB",
) -> Path:
    """Write `lm`, what lies on it included, with `patches` laid on in order, as a Hugging Face checkpoint with tokenizer.

    more        further text files for the folder, by name
    shard_size  most bytes of one file of weights, as transformers reads it, such as `2GB`

    Raises PatchError for a patch that is more than a change of weights, WrongBase, and OutputError; then nothing is
    written. The model in hand is left as it was.
    """
    check_mergeable([*lm.patches, *patches])
    folder = Path(folder)
    with whole_folder(folder) as draft, lm.patched(*patches), without_bars():
        lm.model.save_pretrained(draft, max_shard_size=shard_size)
        lm.tokenizer.save_pretrained(draft)
        for name, text in (more or {}).items():
            (draft / name).write_text(text, encoding="utf-8")
    return folder
