"""Benchmarks: loops over edits, methods and models."""

from factpatch.bench.singles import Failure, Singles, score_singly

__all__ = ["Failure", "Singles", "score_singly"]
