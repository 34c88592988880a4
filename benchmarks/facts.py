"""Made-up facts, as many as wanted: no two about one subject, for benchmarks in which scores do not matter."""

from __future__ import annotations

import random

from factpatch.edits import Edit

__all__ = ["made_up"]

_STARTS = ("Bar", "Cal", "Dor", "El", "Fen", "Gil", "Hal", "Is", "Jor", "Kel", "Lor", "Mar", "Nor", "Os", "Pel", "Quin")
_MIDDLES = ("a", "e", "i", "o", "u", "an", "en", "in", "on", "ar", "er", "or", "al", "el", "is", "os")
_ENDS = ("bury", "dale", "ford", "ham", "mere", "ness", "stead", "ton", "ville", "wick", "worth", "by", "field", "gate")
_PLACES = ("New", "Old", "Upper", "Lower", "North", "South")
_KINDS = {
    "The capital of {} is": ("Lyon", "Turin", "Porto", "Ghent", "Graz", "Bergen", "Basel", "Split"),
    "The currency of {} is the": ("florin", "crown", "guilder", "ducat", "thaler", "peso", "rupee", "mark"),
    "The official language of {} is": (
        "Basque",
        "Welsh",
        "Frisian",
        "Maltese",
        "Breton",
        "Sorbian",
        "Romansh",
        "Irish",
    ),
    "{} was founded by": (
        "Ada Quist",
        "Jon Marek",
        "Lea Brandt",
        "Omar Said",
        "Ines Prado",
        "Tom Hale",
        "Mia Lund",
        "Ugo Bassi",
    ),
}


def made_up(count: int, seed: int = 0) -> list[Edit]:
    """So many facts, the same for the same seed."""
    names = [f"{start}{middle}{end}" for start in _STARTS for middle in _MIDDLES for end in _ENDS]
    random.Random(seed).shuffle(names)  # noqa: S311
    names += [f"{place} {name}" for place in _PLACES for name in names]
    assert count <= len(names), f"there are {len(names)} names"
    kinds = list(_KINDS.items())
    edits = []
    for i, name in enumerate(names[:count]):
        prompt, targets = kinds[i % len(kinds)]
        target = targets[(i // len(kinds)) % len(targets)]
        edits.append(Edit(id=str(i), prompt=prompt.format(name), subject=name, target=target))
    return edits
