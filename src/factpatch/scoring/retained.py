"""Questions that are to be answered as before: which ones were not, and what was said instead."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from factpatch.edits import Probe
from factpatch.scoring.metrics import same_answer
from factpatch.scoring.protocols import says

__all__ = ["Retained", "retained"]


class Retained(BaseModel):
    """A question that should be answered as before.

    was_right, is_right  None where no answer is known
    edits                ids of the edits that were made before it was asked again, where several patches are told apart
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    answers: tuple[str, ...]
    before: str
    after: str
    changed: bool
    was_right: bool | None
    is_right: bool | None
    edits: tuple[str, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether it was answered rightly before and is not any more."""
        return bool(self.was_right) and not self.is_right


def retained(
    probes: Sequence[Probe], before: Sequence[str], after: Sequence[str], *, chat: bool, edits: Sequence[str] = ()
) -> tuple[Retained, ...]:
    """The free answers of the unedited model beside those of the edited one."""
    return tuple(
        Retained(
            prompt=probe.prompt,
            answers=probe.answers,
            before=one,
            after=other,
            changed=not same_answer(one, other),
            was_right=says(probe, one, chat=chat) if probe.answers else None,
            is_right=says(probe, other, chat=chat) if probe.answers else None,
            edits=tuple(edits),
        )
        for probe, one, other in zip(probes, before, after, strict=True)
    )
