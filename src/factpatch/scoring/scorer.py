"""`Scorer`: asks a model all probes of all edits, before and after, and makes a `Scorecard`.

It is blind to how a patch was made. The unpatched model is asked each probe once, however many patches are scored.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from factpatch.edits import Edit, LabelledProbe, Probe
from factpatch.errors import BadConfig
from factpatch.lm import LM, Attachable, BaseLM
from factpatch.lm.run import Sampler, generate
from factpatch.progress import Progress, silent
from factpatch.scoring.metrics import fluency
from factpatch.scoring.protocols import PROTOCOLS, ProtocolName, Seen
from factpatch.scoring.scorecard import ProbeScore, Scorecard

__all__ = ["FLUENCY_TOKENS", "Scorer"]

FLUENCY_TOKENS = 100
_FLUENCY_TOP_K = 5

_Asked = dict[tuple[ProtocolName, Probe], Seen | None]
_Written = dict[str, str]


@dataclass(slots=True)
class _Answers:
    """What one model, patched or not, did with each probe under each protocol, and wrote after each prompt."""

    asked: _Asked = field(default_factory=dict)
    written: _Written = field(default_factory=dict)


class Scorer:
    """Scores patches on one model.

    protocols  which ones; `open` is the headline. By default both, or of a model that can only be asked, `open`
    chat       put prompts into the chat template
    seed       of the sampled text that fluency is measured on
    fluency    whether to measure it; it takes as long as all the rest, and the model must be in hand for it
    """

    def __init__(
        self,
        lm: BaseLM,
        *,
        protocols: Sequence[ProtocolName] | None = None,
        chat: bool = False,
        seed: int = 0,
        fluency: bool = True,
    ) -> None:
        in_hand = isinstance(lm, LM)
        able = [name for name, protocol in PROTOCOLS.items() if in_hand or not protocol.needs_weights]
        wanted = able if protocols is None else list(protocols)
        if not wanted:
            raise ValueError("no protocol was given")
        if set(wanted) - set(able):
            raise BadConfig(f"{lm.name} can only be asked, so it can be scored under these alone: {', '.join(able)}.")
        self.lm, self.chat, self.seed, self.fluency = lm, chat, seed, fluency and in_hand
        self.protocols = [PROTOCOLS[name] for name in wanted]
        self._base = _Answers()

    def baseline(self, edits: Sequence[Edit], progress: Progress = silent) -> None:
        """Ask the unpatched model whatever of these edits' probes it was not asked yet."""
        compared = _compared(edits)
        probes = [probe for probe in _probes(edits) if not self._known(probe, in_full=probe in compared)]
        prompts = [edit.prompt for edit in edits if self.fluency and edit.prompt not in self._base.written]
        if probes or prompts:
            with self.lm.unpatched():
                (new,) = self._ask([probes], [prompts], compared, "Asking the unedited model", progress)
            self._base.asked |= new.asked
            self._base.written |= new.written

    def score(self, edits: Sequence[Edit], *patches: Attachable, progress: Progress = silent) -> Scorecard:
        """How the model does on these edits with `patches` laid on top of what lies on it already.

        "Before" is always the unpatched model. Raises ValueError if two edits have one id.
        """
        if len({edit.id for edit in edits}) < len(edits):
            raise ValueError("two edits have the same id, so their scores could not be told apart")
        started = time.perf_counter()
        self.baseline(edits, progress)
        based = time.perf_counter()
        with self.lm.patched(*patches):
            prompts = [edit.prompt for edit in edits]
            (now,) = self._ask([_probes(edits)], [prompts], _compared(edits), "Asking the edited model", progress)
        return self._card(edits, now, time.perf_counter() - based, based - started)

    def score_each(
        self, edits: Sequence[Edit], stacks: Sequence[Sequence[Attachable]], progress: Progress = silent
    ) -> list[Scorecard]:
        """A scorecard for each edit under a stack of patches of its own: what `score` gives one by one, in less time.

        The stacks lie side by side on lanes of the model, which holds a copy of each weight that any of them touches; on a
        model that can only be asked they take turns. The seconds of each card are its share of the whole.
        """
        started = time.perf_counter()
        self.baseline(edits, progress)
        if not edits:
            return []
        if not isinstance(self.lm, LM):
            return [self.score([edit], *stack) for edit, stack in zip(edits, stacks, strict=True)]
        based = time.perf_counter()
        with self.lm.side_by_side(stacks):
            asked = self._ask(
                [_probes([edit]) for edit in edits],
                [[edit.prompt] for edit in edits],
                _compared(edits),
                "Asking edited models",
                progress,
                lanes=True,
            )
        share, base_share = (time.perf_counter() - based) / len(edits), (based - started) / len(edits)
        return [self._card([edit], own, share, base_share) for edit, own in zip(edits, asked, strict=True)]

    def _known(self, probe: Probe, *, in_full: bool) -> bool:
        """Whether the unpatched model was asked this probe, and if it is compared, also for what else that takes."""
        first = self.protocols[0].name
        if (first, probe) not in self._base.asked:
            return False
        seen = self._base.asked.get(("open", probe))
        return not in_full or seen is None or seen.first is not None or not isinstance(self.lm, LM)

    def _card(self, edits: Sequence[Edit], now: _Answers, seconds: float, baseline_seconds: float) -> Scorecard:
        return Scorecard(
            versions={protocol.name: protocol.version for protocol in self.protocols},
            chat=self.chat,
            scores=tuple(row for edit in edits for row in self._rows(edit, now)),
            score_seconds=round(seconds, 3),
            baseline_seconds=round(baseline_seconds, 3),
        )

    def _ask(
        self,
        probes: Sequence[Sequence[Probe]],
        prompts: Sequence[Sequence[str]],
        compared: Collection[Probe],
        doing: str,
        progress: Progress,
        *,
        lanes: bool = False,
    ) -> list[_Answers]:
        """What is done with each group of probes and prompts; the groups are lanes of the model, or else there is one."""
        answers = [_Answers() for _ in probes]
        asked = [(i, probe) for i, group in enumerate(probes) for probe in group]
        own = [i for i, _ in asked] if lanes else None
        steps = len(self.protocols) + 1
        for step, protocol in enumerate(self.protocols):
            progress(doing, step, steps)
            group = [probe for _, probe in asked]
            seen = protocol.observe(self.lm, group, chat=self.chat, lanes=own, compared=compared)
            for (i, probe), one in zip(asked, seen, strict=True):
                answers[i].asked[protocol.name, probe] = one
        progress(doing, steps - 1, steps)
        if self.fluency and isinstance(self.lm, LM):
            begun = [(i, prompt) for i, group in enumerate(prompts) for prompt in group]
            texts = self._write(self.lm, [prompt for _, prompt in begun], [i for i, _ in begun] if lanes else None)
            for (i, prompt), text in zip(begun, texts, strict=True):
                answers[i].written[prompt] = text
        progress(doing, steps, steps)
        return answers

    def _write(self, lm: LM, prompts: Sequence[str], lanes: Sequence[int] | None) -> list[str]:
        """Sampled text after each prompt."""
        encoded = [text.ids for text in lm.encode(prompts, chat=self.chat, lanes=lanes)]
        sampler = Sampler(self.seed, _FLUENCY_TOP_K)
        return [
            lm.tokens.decode(ids) for ids in generate(lm, encoded, max_new=FLUENCY_TOKENS, choose=sampler, lanes=lanes)
        ]

    def _rows(self, edit: Edit, now: _Answers) -> list[ProbeScore]:
        rows = []
        for protocol in self.protocols:
            for labelled in edit.probes():
                key = (protocol.name, labelled.probe)
                rows.append(self._row(edit, labelled, protocol.name, self._base.asked[key], now.asked[key]))
            if not self.fluency:
                continue
            before, after = self._base.written[edit.prompt], now.written[edit.prompt]
            rows.append(
                ProbeScore(
                    protocol=protocol.name,
                    edit=edit.id,
                    role="fluency",
                    prompt=edit.prompt,
                    before=fluency(before),
                    after=fluency(after),
                    said_before=before,
                    said_after=after,
                )
            )
        return rows

    def _row(
        self, edit: Edit, labelled: LabelledProbe, name: ProtocolName, before: Seen | None, after: Seen | None
    ) -> ProbeScore:
        protocol, (role, kind, probe) = PROTOCOLS[name], labelled
        row = ProbeScore(protocol=name, edit=edit.id, role=role, kind=kind, prompt=probe.prompt, answers=probe.answers)
        if before is None or after is None:
            return row.model_copy(update={"unscored": "the data set gives no answer to compare with"})
        said: dict[str, Any] = {"said_before": before.text, "said_after": after.text}
        if role != "locality" and (reason := protocol.cannot_judge(edit, labelled)):
            return row.model_copy(update=said | {"unscored": reason})
        said["measures"] = protocol.measures(labelled, before, after, chat=self.chat)
        if role == "locality":
            return row.model_copy(update=said | {"after": protocol.unchanged(before, after)})
        scores = {
            "before": protocol.correct(edit, labelled, before, chat=self.chat),
            "after": protocol.correct(edit, labelled, after, chat=self.chat),
        }
        return row.model_copy(update=said | scores)


def _compared(edits: Sequence[Edit]) -> frozenset[Probe]:
    """The probes that are compared with what the unpatched model did."""
    return frozenset(labelled.probe for edit in edits for labelled in edit.probes() if labelled.role == "locality")


def _probes(edits: Sequence[Edit]) -> list[Probe]:
    """All probes of these edits, each once."""
    return list(dict.fromkeys(labelled.probe for edit in edits for labelled in edit.probes()))
