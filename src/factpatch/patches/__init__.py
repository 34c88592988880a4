"""Patches as values: kinds, folder format, merging."""

from factpatch.patches.base import Patch, Provenance
from factpatch.patches.context import ContextPatch, Note, Recall
from factpatch.patches.delta import Dense, LowRank, Sparse
from factpatch.patches.merge import check_mergeable, merge
from factpatch.patches.weight import WeightPatch

__all__ = [
    "ContextPatch",
    "Dense",
    "LowRank",
    "Note",
    "Patch",
    "Provenance",
    "Recall",
    "Sparse",
    "WeightPatch",
    "check_mergeable",
    "merge",
]
