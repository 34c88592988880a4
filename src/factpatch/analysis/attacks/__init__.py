"""Attacks on what a model should no longer say; see `factpatch.analysis.audit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from factpatch.analysis.attacks.asking import FewShot, Greedy, Languages, Paraphrases, Samples
from factpatch.analysis.attacks.base import Attack, Candidate, Question, Setting
from factpatch.analysis.attacks.lens import HeadProjection, ProbabilityDelta, UpdateProjection
from factpatch.analysis.attacks.relearning import Relearning
from factpatch.errors import BadConfig, did_you_mean

__all__ = ["ATTACKS", "Attack", "Candidate", "Question", "Setting", "find_attacks"]

ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        attack.name: attack
        for attack in (
            Greedy(),
            Paraphrases(),
            Samples(),
            FewShot(),
            Languages(),
            HeadProjection(),
            UpdateProjection(),
            ProbabilityDelta(),
            Relearning(),
        )
    }
)
"""All that are built in, by name."""


def find_attacks(names: Sequence[str] | None) -> list[Attack]:
    """The attacks of these names, each once, in the order of the table; all of them for None. Raises BadConfig."""
    for name in names or ():
        if name not in ATTACKS:
            raise BadConfig(f'no attack "{name}".{did_you_mean(name, ATTACKS)}\n  All attacks: {", ".join(ATTACKS)}')
    if names is not None and not names:
        raise BadConfig(f"no attack was named.\n  All attacks: {', '.join(ATTACKS)}")
    return [attack for name, attack in ATTACKS.items() if names is None or name in names]
