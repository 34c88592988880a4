"""One language model in hand: loading, anatomy, hooks, tokens, batched reading and writing, fingerprint, cache."""

from factpatch.lm.anatomy import Anatomy, Projection
from factpatch.lm.load import load
from factpatch.lm.model import LM, Attachable

__all__ = ["LM", "Anatomy", "Attachable", "Projection", "load"]
