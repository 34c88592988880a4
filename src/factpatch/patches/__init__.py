"""Patches as values: kinds, folder format, merging."""

from factpatch.patches.base import Patch, Provenance
from factpatch.patches.context import ContextPatch, Note, Recall
from factpatch.patches.merge import merge
from factpatch.patches.weight import Dense, LowRank, WeightPatch

__all__ = ["ContextPatch", "Dense", "LowRank", "Note", "Patch", "Provenance", "Recall", "WeightPatch", "merge"]
