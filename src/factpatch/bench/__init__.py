"""Benchmarks: loops over edits, methods and models."""

from factpatch.bench.grid import Grid, MethodSpec
from factpatch.bench.outcome import Mode, Outcome
from factpatch.bench.run import Plan, Run
from factpatch.bench.sequence import Sequential, score_sequence
from factpatch.bench.singles import Failure, Singles, score_singly
from factpatch.bench.store import Cell, Store
from factpatch.bench.work import Worker

__all__ = [
    "Cell",
    "Failure",
    "Grid",
    "MethodSpec",
    "Mode",
    "Outcome",
    "Plan",
    "Run",
    "Sequential",
    "Singles",
    "Store",
    "Worker",
    "score_sequence",
    "score_singly",
]
