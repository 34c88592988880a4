"""Scoring: the measures, the two protocols, the scorer and its scorecards."""

from factpatch.scoring.guard import GuardReport, run_guard
from factpatch.scoring.judge import Judge
from factpatch.scoring.protocols import PROTOCOLS, ProtocolName
from factpatch.scoring.retained import Retained
from factpatch.scoring.scorecard import ProbeScore, Scorecard, ScoreRole, Summary
from factpatch.scoring.scorer import Scorer

__all__ = [
    "PROTOCOLS",
    "GuardReport",
    "Judge",
    "ProbeScore",
    "ProtocolName",
    "Retained",
    "ScoreRole",
    "Scorecard",
    "Scorer",
    "Summary",
    "run_guard",
]
