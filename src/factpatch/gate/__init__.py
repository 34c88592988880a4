"""The gate before a patch: what it must show, on which probes, and which method shows it first."""

from factpatch.gate.auto import AutoChoice, choose
from factpatch.gate.gate import Gate, Judgement
from factpatch.gate.propose import Proposal, propose
from factpatch.gate.require import Finding, Requirement, Verdict, check

__all__ = [
    "AutoChoice",
    "Finding",
    "Gate",
    "Judgement",
    "Proposal",
    "Requirement",
    "Verdict",
    "check",
    "choose",
    "propose",
]
