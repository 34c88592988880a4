"""Patches as values: kinds, folder format, merging."""

from factpatch.patches.base import Patch, Provenance
from factpatch.patches.merge import merge
from factpatch.patches.weight import Dense, LowRank, WeightPatch

__all__ = ["Dense", "LowRank", "Patch", "Provenance", "WeightPatch", "merge"]
