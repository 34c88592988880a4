"""The gate: a patch is scored on its edits' probes, and let through or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from factpatch.edits import Edit, Probe
from factpatch.errors import BadConfig
from factpatch.gate.propose import Proposal, propose
from factpatch.gate.require import Requirement, Verdict, check
from factpatch.lm import BaseLM
from factpatch.patches import Patch
from factpatch.progress import Progress, silent
from factpatch.scoring import PROTOCOLS, Scorecard, Scorer

__all__ = ["Gate", "Judgement"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of a patch at the gate.

    proposal   the edits as they were probed
    scorecard  how they did
    verdict    whether that is enough
    """

    proposal: Proposal
    scorecard: Scorecard
    verdict: Verdict

    @property
    def passed(self) -> bool:
        """Whether the patch is let through."""
        return self.verdict.passed

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: the verdict, the probes that nobody wrote, and the scorecard."""
        return self._gate() | {"scorecard": self.scorecard.to_json()}

    def record(self) -> dict[str, Any]:
        """What a patch keeps of it (`Patch.with_scorecard`): the scorecard, with the verdict under `gate`."""
        return self.scorecard.to_json() | {"gate": self._gate()}

    def _gate(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "findings": [finding.model_dump(mode="json") | {"says": finding.says} for finding in self.verdict.findings],
            "proposed": [{"edit": edit, "prompt": prompt} for edit, prompt in sorted(self.proposal.added)],
        }


@dataclass(frozen=True, slots=True)
class Gate:
    """Requirements, and how a patch is asked whether it meets them.

    proposes  whether edits without rephrases or locality get probes that are made up for them
    retain    questions that must be answered as before
    chat      put prompts into the chat template
    full      score under both protocols and measure fluency, whether required or not; without, only what is required
    """

    requirements: tuple[Requirement, ...]
    proposes: bool = True
    retain: tuple[Probe, ...] = ()
    chat: bool = False
    full: bool = False

    @classmethod
    def of(cls, *requirements: str, retain: Sequence[Probe] = (), **more: bool) -> Gate:
        """From texts such as `edit_success>=1`. Raises BadConfig."""
        needs = tuple(Requirement.parse(text) for text in requirements)
        if any(need.measure == "retained" for need in needs) and not retain:
            raise BadConfig("retained: there are no questions to retain.\n  Give some: --retain FILE.")
        return cls(needs, retain=tuple(retain), **more)

    def proposal(self, lm: BaseLM, edits: Sequence[Edit], progress: Progress = silent) -> Proposal:
        """The edits as they will be probed."""
        return propose(lm, edits, progress) if self.proposes else Proposal(tuple(edits), frozenset())

    def scorer(self, lm: BaseLM) -> Scorer:
        """One for this gate. What lies on the model counts as its own: only what a patch adds is held against it."""
        wanted = {"open", *(need.protocol for need in self.requirements)}
        fluency = self.full or any(need.measure.startswith("fluency") for need in self.requirements)
        return Scorer(
            lm,
            protocols=None if self.full else [name for name in PROTOCOLS if name in wanted],
            chat=self.chat,
            fluency=fluency,
            retain=self.retain,
            beneath=lm.patches,
        )

    def judge(
        self,
        lm: BaseLM,
        edits: Sequence[Edit],
        patch: Patch,
        progress: Progress = silent,
        *,
        proposal: Proposal | None = None,
        scorer: Scorer | None = None,
    ) -> Judgement:
        """Score a patch on top of what lies on the model, and hold it against the requirements.

        proposal, scorer  those of an earlier patch for the same edits, so that what does not depend on it is asked once

        Raises BadConfig for a requirement that cannot be scored on this model, TokenizerError.
        """
        asked = proposal or self.proposal(lm, edits, progress)
        card = (scorer or self.scorer(lm)).score(asked.edits, patch, progress=progress)
        return Judgement(asked, card, check(card, patch, self.requirements, asked.added))
