"""Scorecards side by side."""

from typing import Any

from factpatch.scoring import Scorecard


def rows(card: Scorecard) -> list[dict[str, Any]]:
    """The probe scores; what is a matter of float tolerance, such as a divergence, to four places."""
    return [
        row.model_dump() | {"measures": {name: round(value, 4) for name, value in row.measures.items()}}
        for row in card.scores
    ]
