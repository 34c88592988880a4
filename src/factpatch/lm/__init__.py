"""One language model in hand: loading, anatomy, hooks, tokens, batched reading and writing, fingerprint, cache."""

from factpatch.lm.anatomy import Anatomy, Projection
from factpatch.lm.base import Attachable, BaseLM
from factpatch.lm.load import load, load_or_connect
from factpatch.lm.model import LM
from factpatch.lm.remote import RemoteLM, connect

__all__ = ["LM", "Anatomy", "Attachable", "BaseLM", "Projection", "RemoteLM", "connect", "load", "load_or_connect"]
