"""Scoring: the measures, the two protocols, the scorer and its scorecards."""

from factpatch.scoring.protocols import PROTOCOLS, ProtocolName
from factpatch.scoring.scorecard import ProbeScore, Scorecard, ScoreRole, Summary
from factpatch.scoring.scorer import Scorer

__all__ = ["PROTOCOLS", "ProbeScore", "ProtocolName", "ScoreRole", "Scorecard", "Scorer", "Summary"]
