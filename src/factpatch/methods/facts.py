"""How an edit is written down for a model to read: ICE, IKE, retrieval and SERAC put it before what is asked."""

from __future__ import annotations

from factpatch.edits import Edit

__all__ = ["ASKING", "fact_of", "note_of"]

ASKING = "Prompt: "
"""Before the question itself."""


def fact_of(edit: Edit) -> str:
    """The prompt and its new answer."""
    return f"{edit.prompt} {edit.target}"


def note_of(edit: Edit) -> str:
    """The line that tells the model of an edit."""
    return f"New Fact: {fact_of(edit)}\n"
