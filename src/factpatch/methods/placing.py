"""Where a new edit goes in a codebook: the keys and the rules that GRACE (arXiv 2211.11031) and MELO (2312.11795) share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.anatomy import Projection
from factpatch.lm.batches import Batch
from factpatch.lm.run import input_of
from factpatch.methods.keys import context_prefixes
from factpatch.patches.codebook import GONE, UNMOVED, Codebook, nearest, radii

__all__ = ["Placement", "key_of", "placed", "spacing"]

SAME = 1e-4
"""Of the radius of a new entry: two keys that are no further apart than this are one."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What becomes of the uppermost codebook when a key comes in.

    how     an entry was widened to reach the key; or the key needs one of its own: with room, after a split, or in place
            of an entry with the very same key
    radius  of the new entry; None if it needs none
    radii   of the entries that the uppermost codebook has already
    moved   the radii that it moves in those beneath
    """

    how: Literal["added", "split", "widened", "replaced"]
    radius: float | None
    radii: Float[Tensor, " entries"]
    moved: Mapping[str, Tensor]


def placed(books: Sequence[Codebook], key: Float[Tensor, " in"], label: str, radius: float) -> Placement:
    """GRACE's algorithm 1, for the codebooks that lie on one module; the last of them changes.

    A key beyond reach of all others gets an entry of this radius. One near to an entry with another label splits the
    distance between the two. One near to an entry of its own label widens that entry. Where the two keys are the same, as
    when a prompt is edited again, nothing can be split: the new entry takes the place and the reach of the old one.
    """
    labels = [each for book in books for each in book.labels]
    book = books[-1]
    if not labels:
        return Placement("added", radius, book.radii, book.moved)
    found = nearest(key[None], books)
    at, distance = int(found.entry), float(found.distance)
    reach = float(radii(books)[at])
    if distance > radius + reach:
        return Placement("added", radius, book.radii, book.moved)
    if labels[at] == label:
        return Placement("widened", None, *_with_radius(books, at, max(reach, distance)))
    if distance < SAME * radius:
        return Placement("replaced", reach, *_with_radius(books, at, GONE))
    return Placement("split", distance / 2, *_with_radius(books, at, max(distance / 2 - 1e-5, 0.0)))


def _with_radius(books: Sequence[Codebook], at: int, radius: float) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The last book's radii and those it moves, the radius of entry `at`, counted through all books, set anew."""
    upper = books[-1]
    for each in books:
        if at < len(each.keys):
            break
        at -= len(each.keys)
    if each is upper:
        own = upper.radii.clone()
        own[at] = radius
        return own, upper.moved
    moved = upper.moved.get(each.id, torch.full_like(each.radii, UNMOVED)).clone()
    moved[at] = radius
    return upper.radii, {**upper.moved, each.id: moved}


def key_of(lm: LM, projection: Projection, edit: Edit, *, chat: bool) -> Float[Tensor, " in"]:
    """What the projection reads at the prompt's last token, in float32."""
    ids = lm.tokens.encode(edit.prompt, edit.target, chat=chat).prompt_ids
    return input_of(lm, projection.module, Batch.of([ids], lm.device))[0, -1].float()


def spacing(lm: LM, projection: Projection, seed: int) -> float:
    """The median distance between the keys of two short texts that the model writes."""

    def measure() -> float:
        texts = [lm.tokens.encode(prefix.rstrip()).ids for prefix in context_prefixes(lm, 20, seed)[1:]]
        keys = [input_of(lm, projection.module, Batch.of([ids], lm.device))[0, -1].float() for ids in texts]
        return float(torch.pdist(torch.stack(keys)).median())

    return lm.once(("spacing of keys", projection.parameter, seed), measure)
