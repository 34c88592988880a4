"""`Scorer`: asks a model all probes of all edits, before and after, and makes a `Scorecard`.

It is blind to how a patch was made. The unpatched model is asked each probe once, however many patches are scored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

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
        self._base_asked: _Asked = {}
        self._base_written: _Written = {}

    def baseline(self, edits: Sequence[Edit], progress: Progress = silent) -> None:
        """Ask the unpatched model whatever of these edits' probes it was not asked yet."""
        probes = list(dict.fromkeys(labelled.probe for edit in edits for labelled in edit.probes()))
        new_probes = [p for p in probes if (self.protocols[0].name, p) not in self._base_asked]
        new_prompts = [edit.prompt for edit in edits if self.fluency and edit.prompt not in self._base_written]
        if new_probes or new_prompts:
            with self.lm.unpatched():
                asked, written = self._ask(new_probes, new_prompts, "Asking the unedited model", progress)
            self._base_asked |= asked
            self._base_written |= written

    def score(self, edits: Sequence[Edit], *patches: Attachable, progress: Progress = silent) -> Scorecard:
        """How the model does on these edits with `patches` laid on top of what lies on it already.

        "Before" is always the unpatched model. Raises ValueError if two edits have one id.
        """
        if len({edit.id for edit in edits}) < len(edits):
            raise ValueError("two edits have the same id, so their scores could not be told apart")
        started = time.perf_counter()
        self.baseline(edits, progress)
        based = time.perf_counter()
        probes = list(dict.fromkeys(labelled.probe for edit in edits for labelled in edit.probes()))
        with self.lm.patched(*patches):
            asked, written = self._ask(probes, [edit.prompt for edit in edits], "Asking the edited model", progress)
        rows = [row for edit in edits for row in self._rows(edit, asked, written)]
        return Scorecard(
            versions={protocol.name: protocol.version for protocol in self.protocols},
            chat=self.chat,
            scores=tuple(rows),
            score_seconds=round(time.perf_counter() - based, 3),
            baseline_seconds=round(based - started, 3),
        )

    def _ask(
        self, probes: Sequence[Probe], prompts: Sequence[str], doing: str, progress: Progress
    ) -> tuple[_Asked, _Written]:
        asked: _Asked = {}
        steps = len(self.protocols) + 1
        for i, protocol in enumerate(self.protocols):
            progress(doing, i, steps)
            seen = protocol.observe(self.lm, probes, chat=self.chat)
            asked |= {(protocol.name, probe): one for probe, one in zip(probes, seen, strict=True)}
        progress(doing, steps - 1, steps)
        written = self._write(self.lm, prompts) if self.fluency and isinstance(self.lm, LM) else {}
        progress(doing, steps, steps)
        return asked, written

    def _write(self, lm: LM, prompts: Sequence[str]) -> _Written:
        """Sampled text after each prompt."""
        encoded = [text.ids for text in lm.encode(prompts, chat=self.chat)]
        sampler = Sampler(self.seed, _FLUENCY_TOP_K)
        written = generate(lm, encoded, max_new=FLUENCY_TOKENS, choose=sampler)
        return {prompt: lm.tokens.decode(ids) for prompt, ids in zip(prompts, written, strict=True)}

    def _rows(self, edit: Edit, asked: _Asked, written: _Written) -> list[ProbeScore]:
        rows = []
        for protocol in self.protocols:
            for labelled in edit.probes():
                key = (protocol.name, labelled.probe)
                rows.append(self._row(edit, labelled, protocol.name, self._base_asked[key], asked[key]))
            if not self.fluency:
                continue
            before, after = self._base_written[edit.prompt], written[edit.prompt]
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
        said = {"said_before": before.text, "said_after": after.text}
        if role == "locality":
            return row.model_copy(update=said | {"after": protocol.unchanged(before, after)})
        if reason := protocol.cannot_judge(edit, labelled):
            return row.model_copy(update=said | {"unscored": reason})
        scores = {
            "before": protocol.correct(edit, labelled, before, chat=self.chat),
            "after": protocol.correct(edit, labelled, after, chat=self.chat),
        }
        return row.model_copy(update=said | scores)
