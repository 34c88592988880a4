"""A workspace: patches that passed the gate, in a ledger that is only added to, and taken back at any time."""

from factpatch.workspace.conflicts import Conflict, Standing, conflicts
from factpatch.workspace.difference import Difference
from factpatch.workspace.entry import Entry, Place, Regression, replay
from factpatch.workspace.ledger import Damage, Ledger
from factpatch.workspace.store import Pending, Settings
from factpatch.workspace.verify import ModelCheck, Report
from factpatch.workspace.workspace import Outcome, Workspace

__all__ = [
    "Conflict",
    "Damage",
    "Difference",
    "Entry",
    "Ledger",
    "ModelCheck",
    "Outcome",
    "Pending",
    "Place",
    "Regression",
    "Report",
    "Settings",
    "Standing",
    "Workspace",
    "conflicts",
    "replay",
]
