"""Benchmarks: loops over edits, methods and models."""

from factpatch.bench.sequence import Sequential, score_sequence
from factpatch.bench.singles import Failure, Singles, score_singly

__all__ = ["Failure", "Sequential", "Singles", "score_sequence", "score_singly"]
