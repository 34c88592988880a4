"""`Scorer`: asks a model all probes of all edits, before and after, and makes a `Scorecard`.

It is blind to how a patch was made. The unpatched model is asked each probe once, however many patches are scored, and
what it did is kept on disk (`factpatch.scoring.baseline`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from factpatch.edits import Edit, LabelledProbe, Probe
from factpatch.errors import BadConfig
from factpatch.lm import LM, Attachable, BaseLM
from factpatch.lm.writing import Sampler, generate
from factpatch.progress import Progress, silent
from factpatch.scoring.baseline import Baseline, Store, can_keep
from factpatch.scoring.judge import Judge
from factpatch.scoring.metrics import fluency
from factpatch.scoring.protocols import PROTOCOLS, Ask, Protocol, ProtocolName, Seen
from factpatch.scoring.retained import retained
from factpatch.scoring.scorecard import ProbeScore, Scorecard

__all__ = ["FLUENCY_TOKENS", "Scorer"]

FLUENCY_TOKENS = 100
_FLUENCY_TOP_K = 5

_Asked = dict[tuple[ProtocolName, Ask], Seen | None]
_Written = dict[str, str]


@dataclass(frozen=True, slots=True)
class _Questions:
    """What a model is asked under each protocol, the prompts it writes on from, and what will be compared."""

    asks: dict[ProtocolName, list[Ask]]
    prompts: list[str]
    compared: Collection[Ask]

    @property
    def are_none(self) -> bool:
        return not (any(self.asks.values()) or self.prompts)


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
    retain     questions to ask under every patch, whose free answers should stay as they are
    judge      a model that is asked what it thinks of each free answer
    keep       read from disk what the unpatched model did before, in other processes too, and keep there what is new; without,
               it is asked anew, as it must be where that is to be timed
    beneath    patches that count as part of the unpatched model, so that what they changed is not laid at a later one's door
    """

    def __init__(
        self,
        lm: BaseLM,
        *,
        protocols: Sequence[ProtocolName] | None = None,
        chat: bool = False,
        seed: int = 0,
        fluency: bool = True,
        retain: Sequence[Probe] = (),
        judge: Judge | None = None,
        keep: bool = True,
        beneath: Sequence[Attachable] = (),
    ) -> None:
        in_hand = isinstance(lm, LM)
        able = [name for name, protocol in PROTOCOLS.items() if in_hand or not protocol.needs_weights]
        wanted = able if protocols is None else list(protocols)
        if not wanted:
            raise ValueError("no protocol was given")
        if set(wanted) - set(able):
            raise BadConfig(f"{lm.name} can only be asked, so it can be scored under these alone: {', '.join(able)}.")
        if (retain or judge) and "open" not in wanted:
            raise BadConfig(
                "Questions to retain, and a judge, need free answers.\n  Score under the open protocol too."
            )
        self.lm, self.chat, self.seed, self.fluency = lm, chat, seed, fluency and in_hand
        self.retain, self.judge, self.beneath = tuple(retain), judge, tuple(beneath)
        self.protocols = [PROTOCOLS[name] for name in wanted]
        self._base = _Answers()
        self._store = Store() if keep else None

    def baseline(self, edits: Sequence[Edit], progress: Progress = silent) -> None:
        """Learn what the unpatched model does with these edits' probes, as far as it is not known yet: from disk, or by asking.

        Raises TokenizerError if a question cannot be put.
        """
        wanted = self._questions(edits)
        if self._unknown(wanted).are_none:
            return
        with self.lm.unpatched(), self.lm.patched(*self.beneath):
            kept = self._kept()
            if kept is not None:
                self._recall(kept, self._unknown(wanted))
            new = self._unknown(wanted)
            if new.are_none:
                return
            (found,) = self._ask([new], "Asking the unedited model", progress, kept=kept)
        self._base.asked |= found.asked
        self._base.written |= found.written

    def score(self, edits: Sequence[Edit], *patches: Attachable, progress: Progress = silent) -> Scorecard:
        """How the model does on these edits with `patches` laid on top of what lies on it already.

        "Before" is always the unpatched model, or that with `beneath`. Raises ValueError if two edits have one id.
        """
        if len({edit.id for edit in edits}) < len(edits):
            raise ValueError("two edits have the same id, so their scores could not be told apart")
        started = time.perf_counter()
        self.baseline(edits, progress)
        based = time.perf_counter()
        with self.lm.patched(*patches):
            (now,) = self._ask([self._questions(edits)], "Asking the edited model", progress)
        (card,) = self._judged([self._card(edits, now, time.perf_counter() - based, based - started)])
        return card

    def score_each(
        self,
        groups: Sequence[Sequence[Edit]],
        stacks: Sequence[Sequence[Attachable]],
        progress: Progress = silent,
    ) -> list[Scorecard]:
        """A scorecard for each group of edits under a stack of patches of its own: what `score` gives, in less time.

        The stacks lie side by side on lanes of the model, which holds a copy of each weight that any of them touches, as many
        as have room; on a model that can only be asked they take turns. The seconds of each card are its share of the whole, by
        its edits.
        """
        started = time.perf_counter()
        every = [edit for group in groups for edit in group]
        self.baseline(every, progress)
        if not every:
            return []
        if not isinstance(self.lm, LM):
            return [self.score(group, *stack) for group, stack in zip(groups, stacks, strict=True)]
        based = time.perf_counter()
        asked: list[_Answers] = []
        for some in self.lm.abreast(stacks):
            with self.lm.side_by_side([stacks[i] for i in some]):
                questions = [self._questions(groups[i]) for i in some]
                asked += self._ask(questions, "Asking edited models", progress, lanes=True)
        seconds, base_seconds = time.perf_counter() - based, based - started
        shares = [len(group) / len(every) for group in groups]
        return self._judged(
            [
                self._card(group, own, seconds * share, base_seconds * share)
                for group, own, share in zip(groups, asked, shares, strict=True)
            ]
        )

    def _questions(self, edits: Sequence[Edit]) -> _Questions:
        """All that is asked of a model for these edits, each thing once."""
        asks: dict[ProtocolName, list[Ask]] = {}
        compared: set[Ask] = set()
        for protocol in self.protocols:
            found = [(labelled.role, protocol.ask(edit, labelled)) for edit in edits for labelled in edit.probes()]
            asks[protocol.name] = list(dict.fromkeys(ask for _, ask in found))
            compared |= {ask for role, ask in found if role == "locality"}
        if self.retain:
            asks["open"] = list(dict.fromkeys([*asks["open"], *map(_retaining, self.retain)]))
        return _Questions(asks, list(dict.fromkeys(edit.prompt for edit in edits)) if self.fluency else [], compared)

    def _kept(self) -> Baseline | None:
        """What is on disk of this model, without patches; None if nothing is to be kept of it."""
        if self._store is None or not isinstance(self.lm, LM) or not can_keep(self.lm):
            return None
        sampling = {"seed": self.seed, "top_k": _FLUENCY_TOP_K, "longest": FLUENCY_TOKENS}
        return Baseline(self.lm, self._store, chat=self.chat, sampling=sampling)

    def _recall(self, kept: Baseline, new: _Questions) -> None:
        for protocol in self.protocols:
            seen = kept.answers(protocol, new.asks[protocol.name], new.compared)
            self._base.asked |= {(protocol.name, ask): one for ask, one in seen.items()}
        self._base.written |= kept.texts(new.prompts)

    def _unknown(self, wanted: _Questions) -> _Questions:
        """Those of them that are still to be answered by the unpatched model."""
        return _Questions(
            {name: [ask for ask in asks if not self._known(name, ask, wanted)] for name, asks in wanted.asks.items()},
            [prompt for prompt in wanted.prompts if prompt not in self._base.written],
            wanted.compared,
        )

    def _known(self, name: ProtocolName, ask: Ask, wanted: _Questions) -> bool:
        """Whether the unpatched model was asked this, and if it is compared, also for what else that takes."""
        if (name, ask) not in self._base.asked:
            return False
        seen = self._base.asked[name, ask]
        is_complete = ask.way != "freely" or ask not in wanted.compared or not isinstance(self.lm, LM)
        return is_complete or seen is None or seen.first is not None

    def _card(self, edits: Sequence[Edit], now: _Answers, seconds: float, baseline_seconds: float) -> Scorecard:
        asks = [_retaining(probe) for probe in self.retain]
        before, after = ([_text(one.asked["open", ask]) for ask in asks] for one in (self._base, now))
        return Scorecard(
            versions={protocol.name: protocol.version for protocol in self.protocols},
            chat=self.chat,
            scores=tuple(row for edit in edits for row in self._rows(edit, now)),
            retained=retained(self.retain, before, after, chat=self.chat, edits=[edit.id for edit in edits]),
            score_seconds=round(seconds, 3),
            baseline_seconds=round(baseline_seconds, 3),
        )

    def _judged(self, cards: Sequence[Scorecard]) -> list[Scorecard]:
        """With the judge's opinion as one more measure of each free answer that is scored, and whether it had none."""
        if self.judge is None:
            return list(cards)
        rows = [row for card in cards for row in card.scores if _is_judged(row)]
        verdicts = iter(self.judge.verdicts([(row.prompt, row.answers, row.said_after) for row in rows]))
        judged = []
        for card in cards:
            scores = []
            for row in card.scores:
                if not _is_judged(row):
                    scores.append(row)
                    continue
                verdict = next(verdicts)
                opinion = {} if verdict is None else {"judged": float(verdict)}
                measures = row.measures | opinion | {"unjudged": float(verdict is None)}
                scores.append(row.model_copy(update={"measures": measures}))
            judged.append(card.model_copy(update={"scores": tuple(scores)}))
        return judged

    def _ask(
        self,
        groups: Sequence[_Questions],
        doing: str,
        progress: Progress,
        *,
        lanes: bool = False,
        kept: Baseline | None = None,
    ) -> list[_Answers]:
        """What is done with each group of questions; the groups are lanes of the model, or else there is one.

        kept  where that is kept of one group, after each protocol, so that a process that is killed has not asked in vain
        """
        answers = [_Answers() for _ in groups]
        compared = frozenset().union(*(group.compared for group in groups))
        steps = len(self.protocols) + 1
        for step, protocol in enumerate(self.protocols):
            progress(doing, step, steps)
            asked = [(i, ask) for i, group in enumerate(groups) for ask in group.asks[protocol.name]]
            own = [i for i, _ in asked] if lanes else None
            seen = protocol.observe(
                self.lm,
                [ask for _, ask in asked],
                chat=self.chat,
                lanes=own,
                compared=compared,
                beneath=self.beneath,
            )
            for (i, ask), one in zip(asked, seen, strict=True):
                answers[i].asked[protocol.name, ask] = one
            if kept is not None:
                kept.keep_answers(protocol, {ask: one for (_, ask), one in zip(asked, seen, strict=True)})
        progress(doing, steps - 1, steps)
        if isinstance(self.lm, LM):
            begun = [(i, prompt) for i, group in enumerate(groups) for prompt in group.prompts]
            texts = self._write(self.lm, [prompt for _, prompt in begun], [i for i, _ in begun] if lanes else None)
            for (i, prompt), text in zip(begun, texts, strict=True):
                answers[i].written[prompt] = text
            if kept is not None:
                kept.keep_texts(answers[0].written)
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
                key = (protocol.name, protocol.ask(edit, labelled))
                rows.append(self._row(edit, labelled, protocol, self._base.asked[key], now.asked[key]))
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
        self, edit: Edit, labelled: LabelledProbe, protocol: Protocol, before: Seen | None, after: Seen | None
    ) -> ProbeScore:
        role, kind, probe = labelled
        row = ProbeScore(
            protocol=protocol.name,
            edit=edit.id,
            role=role,
            kind=kind,
            prompt=protocol.ask(edit, labelled).probe.prompt,
            answers=probe.answers,
        )
        if before is None or after is None:
            return row.model_copy(update={"unscored": "the data set gives no answer to compare with"})
        said: dict[str, Any] = {"said_before": before.text, "said_after": after.text}
        if role != "locality" and (reason := protocol.cannot_judge(edit, labelled)):
            return row.model_copy(update=said | {"unscored": reason})
        said["measures"] = protocol.measures(edit, labelled, before, after, chat=self.chat)
        if role == "locality":
            return row.model_copy(update=said | {"after": protocol.unchanged(before, after)})
        now = protocol.correct(edit, labelled, after, before, chat=self.chat)
        scores: dict[str, Any] = {
            "before": protocol.correct(edit, labelled, before, before, chat=self.chat),
            "after": now,
            "failure": protocol.failure(edit, labelled, before, after) if now < 1 else None,
        }
        return row.model_copy(update=said | scores)


def _is_judged(row: ProbeScore) -> bool:
    """Whether it is a free answer to compare with the right one; whether a secret was kept is not a matter of opinion."""
    is_answer = row.role in {"edit", "rephrase", "portability"} and not row.unscored and row.after is not None
    return row.protocol == "open" and is_answer and "secret_absent" not in row.measures


def _retaining(probe: Probe) -> Ask:
    return Ask("freely", probe)


def _text(seen: Seen | None) -> str:
    assert seen is not None  # free answers are always given
    return seen.text
