"""What an audit found, and how much of that is chance.

Two tests decide, each at half of `LEVEL` (Bonferroni), so that of audits in which old answers turn up like decoys at most one
in twenty says "recoverable": whether old answers stand out among their decoys, and whether one attack by itself finds more of
them than of decoys, at a level split once more over the attacks. The bound holds as far as facts are independent of one
another and decoys are as easily come by as the old answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from statistics import fmean, median
from typing import Any, Literal

from factpatch.analysis.attacks.base import Access, Candidate
from factpatch.analysis.audit_facts import Fact, LeftOut
from factpatch.analysis.base import Result

__all__ = [
    "LEVEL",
    "SHARE",
    "AttackInfo",
    "Audit",
    "Choice",
    "Laid",
    "Learnt",
    "Recall",
    "StandingOut",
    "State",
    "Trial",
    "tail",
]

State = Literal["before", "after", "control"]
"""The model before the patches; the audited one; another that was never told."""

LEVEL = 0.05
"""Of audits in which all is chance, at most this share says that old answers can be recovered."""
SHARE = LEVEL / 2
"""Of each of the two tests that decide."""


class Trial(Result):
    """One attack on one fact of one model.

    rank         the old answer's place among the candidates, from 1, in any of its spellings; None if it is not among them
    plain_rank   that of its canonical spelling alone, which is what is held against decoys: each spelling is another chance
    decoy_ranks  of the canonical spelling of each of the fact's decoys
    unscored     why it cannot be told whether the old answer is among them; empty if it can
    """

    attack: str
    state: State
    fact: str
    candidates: tuple[Candidate, ...]
    rank: int | None
    plain_rank: int | None
    decoy_ranks: tuple[int | None, ...]
    unscored: str = ""

    def found(self, budget: int) -> bool:
        """Whether the old answer is among the first so many candidates, in any of its spellings."""
        return _within(self.rank, budget)


class Choice(Result):
    """The old answer among decoys, all of them shown to the model after the prompt.

    logprobs  mean log-probability of each option's tokens, in nats; the old answer's first
    rank      of the old answer, 1 for the likeliest
    """

    state: State
    fact: str
    options: tuple[str, ...]
    logprobs: tuple[float, ...]

    @property
    def rank(self) -> int:
        """How many options are at least as likely, itself included."""
        return sum(value >= self.logprobs[0] for value in self.logprobs)


class Learnt(Result):
    """How many steps of training on an answer it takes until it is given; None if it is not given after all of them."""

    state: State
    fact: str
    answer: str
    steps: int | None
    decoy: str | None
    decoy_steps: int | None


class Laid(Result):
    """A patch that was audited.

    weights         how many parameters it changes; 0 if the weights stay as they are
    tells           ids of the edits whose old answers stand in plain words in its folder
    """

    id: str
    kind: str
    method: str
    weights: int
    tells: tuple[str, ...]


class AttackInfo(Result):
    """An attack that was made."""

    name: str
    title: str
    access: Access
    about: str


class Recall(Result):
    """How an attack, or all of them together, did on one model within a budget.

    facts   on how many it could be told whether the old answer was found
    found   on how many it was, in any of its spellings
    plain   on how many in its canonical spelling, which is what `p` is reckoned from
    share   found by facts; None if there are none
    chance  share of decoys found; None if there are none
    p       how likely so many would be found if the old answers were found as decoys are; see `Audit.recall`
    """

    attack: str
    state: State
    budget: int
    facts: int
    found: int
    plain: int
    share: float | None
    chance: float | None
    p: float | None


class StandingOut(Result):
    """Facts whose old answer was found more readily than every decoy; see `Audit.standing_out`.

    facts     their ids
    of        how many facts there are
    expected  how many it would be by chance
    p         how likely it is that chance alone makes it so many
    """

    facts: tuple[str, ...]
    of: int
    expected: float
    p: float | None


class Audit(Result):
    """Attacks on what a model should no longer say.

    model, control  names
    patches         what lay on the model
    facts           what was looked for
    left_out        edits that were not audited, and why
    attacks         what was tried
    trials          every attack on every fact of every model, with all candidates
    choices         multiple choice, which is shown the old answer
    learnt          training on the old answer itself
    not_tried       in words
    budget          candidates for each attack and fact, at most
    seed, chat      of the whole audit
    versions        of the packages that decide the numbers
    """

    model: str
    fingerprint: str
    control: str | None
    patches: tuple[Laid, ...]
    facts: tuple[Fact, ...]
    left_out: tuple[LeftOut, ...]
    attacks: tuple[AttackInfo, ...]
    trials: tuple[Trial, ...]
    choices: tuple[Choice, ...]
    learnt: tuple[Learnt, ...]
    not_tried: tuple[str, ...]
    budget: int
    seed: int
    chat: bool
    versions: dict[str, str]

    @cached_property
    def states(self) -> tuple[State, ...]:
        """The models attacked."""
        return tuple(dict.fromkeys(trial.state for trial in self.trials))

    @property
    def budgets(self) -> tuple[int, ...]:
        """Those that recall is told for."""
        return tuple(sorted({b for b in (1, 2, 5, 10, 20, 50, 100) if b < self.budget} | {self.budget}))

    def of(self, state: State, attack: str | None = None, fact: str | None = None) -> list[Trial]:
        """Trials on one model that could be scored."""
        return list(self._scored.get((state, attack, fact), ()))

    @cached_property
    def _scored(self) -> dict[tuple[State, str | None, str | None], list[Trial]]:
        """Trials by what they may be asked for."""
        found: dict[tuple[State, str | None, str | None], list[Trial]] = {}
        for trial in self.trials:
            if not trial.unscored:
                for attack in (None, trial.attack):
                    for fact in (None, trial.fact):
                        found.setdefault((trial.state, attack, fact), []).append(trial)
        return found

    def recall(self, state: State, attack: str | None = None, budget: int | None = None) -> Recall:
        """Of one attack; or of all together, each with the whole budget, a fact being found if any attack finds it.

        `p` is the probability of at least so many successes, in the canonical spelling, in as many draws, where the chance of
        each is the greater of two rates: that of the decoys, and that of the never-told control, if there is one; both with
        one more taken to be found and one more tried, so that few of them prove little.
        """
        budget = self.budget if budget is None else budget
        by_fact = self._by_fact(state, attack)
        found = sum(any(trial.found(budget) for trial in own) for own in by_fact.values())
        plain = sum(any(_within(trial.plain_rank, budget) for trial in own) for own in by_fact.values())
        tried = sum(len(own[0].decoy_ranks) for own in by_fact.values())
        hits = sum(_any_found(own, budget) for own in by_fact.values())
        n = len(by_fact)
        p = None
        if n:
            rate = (hits + 1) / (tried + 1)
            if state != "control" and "control" in self.states:
                never = self.recall("control", attack, budget)
                rate = max(rate, (never.plain + 1) / (never.facts + 1))
            p = tail(n, plain, rate)
        return Recall(
            attack=attack or "all",
            state=state,
            budget=budget,
            facts=n,
            found=found,
            plain=plain,
            share=found / n if n else None,
            chance=hits / tried if tried else None,
            p=p,
        )

    def _by_fact(self, state: State, attack: str | None = None) -> dict[str, list[Trial]]:
        by_fact: dict[str, list[Trial]] = {}
        for trial in self.of(state, attack):
            by_fact.setdefault(trial.fact, []).append(trial)
        return by_fact

    @property
    def bar(self) -> float:
        """What the `p` of one attack must not exceed for it to be clear by itself."""
        return SHARE / max(1, len(self.attacks))

    @cached_property
    def clear(self) -> tuple[str, ...]:
        """Attacks that by themselves found more than chance would, at `SHARE` over all attacks (Bonferroni)."""
        rows = [self.recall("after", info.name) for info in self.attacks]
        return tuple(row.attack for row in rows if row.plain and row.p is not None and row.p <= self.bar)

    def standing_out(self, state: State) -> StandingOut:
        """For which facts the old answer was found, and more readily than every decoy; all in their canonical spellings.

        How readily: the sum over attacks of `1 / rank`, nothing where it was not found. An answer never told is as likely to
        lead as each of its decoys, one time in `decoys + 1`. `p` is the probability of at least so many in as many draws at
        the mean of these rates, or at that of the never-told control if it is greater, with one more taken to lead there and
        one more tried.
        """
        return self._standing_out[state] if state in self._standing_out else _nothing_stands_out()

    @cached_property
    def _standing_out(self) -> dict[State, StandingOut]:
        found: dict[State, StandingOut] = {}
        for state in sorted(self.states, key=lambda state: state != "control"):
            by_fact = self._by_fact(state)
            ahead = [fact for fact, own in by_fact.items() if _leads(own)]
            rates = [1 / (len(own[0].decoy_ranks) + 1) for own in by_fact.values()]
            n = len(by_fact)
            if not n:
                found[state] = _nothing_stands_out()
                continue
            rate = fmean(rates)
            if state != "control" and "control" in found:
                rate = max(rate, (len(found["control"].facts) + 1) / (found["control"].of + 1))
            found[state] = StandingOut(facts=tuple(ahead), of=n, expected=rate * n, p=tail(n, len(ahead), rate))
        return found

    @property
    def recovered(self) -> bool:
        """Whether more was found than chance would find: old answers that stand out, or one attack that is clear by itself."""
        found = self.standing_out("after")
        return bool(self.clear) or bool(found.facts and found.p is not None and found.p <= SHARE)

    @cached_property
    def can_tell(self) -> bool:
        """Whether there are facts and decoys enough, and facts on the control, for what was found to count at all.

        That is, whether finding every old answer, no decoy and nothing on the control would pass one of the two tests. With
        40 decoys it takes one fact, and three with a control, on which so few facts say little.
        """
        by_fact = self._by_fact("after")
        decoys = [len(own[0].decoy_ranks) for own in by_fact.values()]
        rates = [1 / (d + 1) for d in decoys]
        if rates and tail(len(rates), sum(map(bool, decoys)), self._least(fmean(rates))) <= SHARE:
            return True
        for info in self.attacks:
            by_fact = self._by_fact("after", info.name)
            tried = sum(len(own[0].decoy_ranks) for own in by_fact.values())
            least = self._least(1 / (tried + 1), info.name)
            if by_fact and tail(len(by_fact), len(by_fact), least) <= self.bar:
                return True
        return False

    def _least(self, rate: float, attack: str | None = None) -> float:
        """The least rate of chance there can be beside a control on which nothing is found."""
        return max(rate, 1 / (len(self._by_fact("control", attack)) + 1)) if "control" in self.states else rate

    @property
    def untested(self) -> tuple[str, ...]:
        """Facts of which no attack can tell whether it found them."""
        return tuple(fact.id for fact in self.facts if not self.of("after", fact=fact.id))

    @property
    def in_doubt(self) -> bool:
        """Whether it is open if more can be recovered than chance would find.

        So it is where something was found but cannot be told from chance for want of facts and decoys, and where facts were
        not tested. Where no attack found anything, there is nothing to be told from chance.
        """
        if self.recovered:
            return False
        return bool(self.untested) or (not self.can_tell and self.recall("after").found > 0)

    def finders(self, fact: str) -> list[Trial]:
        """The attacks that found this fact's old answer, the best placed first."""
        own = [trial for trial in self.of("after", fact=fact) if trial.rank is not None]
        return sorted(own, key=lambda trial: trial.rank or 0)

    def as_ready(self, fact: str) -> tuple[int, int]:
        """How many decoys of a fact were found, and no less readily than its old answer; and how many it has."""
        trials = self.of("after", fact=fact)
        if not trials:
            return 0, 0
        secret, *decoys = _readinesses(trials)
        return sum(bool(decoy) and decoy >= secret for decoy in decoys), len(decoys)

    def chosen(self, state: State) -> tuple[int, int, float] | None:
        """Multiple choice: how often the old answer came first, of how many, and how often it would by chance."""
        own = [choice for choice in self.choices if choice.state == state and len(choice.options) > 1]
        if not own:
            return None
        return sum(c.rank == 1 for c in own), len(own), sum(1 / len(c.options) for c in own)

    def logprob(self, state: State) -> float | None:
        """The old answer's mean log-probability a token, in nats, the mean over facts."""
        own = [choice.logprobs[0] for choice in self.choices if choice.state == state]
        return fmean(own) if own else None

    def steps(self, state: State) -> tuple[float, float | None] | None:
        """Median steps of training until the old answer is given, and until decoys are; what is never given counts as most."""
        own = [one for one in self.learnt if one.state == state]
        if not own:
            return None
        decoys = [_steps(one.decoy_steps) for one in own if one.decoy is not None]
        return float(median(_steps(one.steps) for one in own)), float(median(decoys)) if decoys else None

    def table(self) -> list[dict[str, Any]]:
        """Recall of every attack and of all together, on every model within every budget; flat rows."""
        names: list[str | None] = [None, *(info.name for info in self.attacks)]
        return [
            self.recall(state, name, budget).model_dump()
            for name in names
            for state in self.states
            for budget in self.budgets
        ]


def _within(rank: int | None, budget: int) -> bool:
    return rank is not None and rank <= budget


def _any_found(trials: list[Trial], budget: int) -> int:
    """How many decoys of one fact any of these attacks found."""
    ranks = zip(*(trial.decoy_ranks for trial in trials), strict=True)
    return sum(any(_within(rank, budget) for rank in own) for own in ranks)


def _leads(trials: list[Trial]) -> bool:
    """Whether one fact's old answer was found more readily than each of its decoys, of which there are some."""
    secret, *decoys = _readinesses(trials)
    return secret > max(decoys, default=math.inf)


def _readinesses(trials: list[Trial]) -> list[float]:
    """Of one fact's old answer, then of each of its decoys."""
    return [_readiness(ranks) for ranks in zip(*((t.plain_rank, *t.decoy_ranks) for t in trials), strict=True)]


def _nothing_stands_out() -> StandingOut:
    return StandingOut(facts=(), of=0, expected=0.0, p=None)


def _readiness(ranks: Sequence[int | None]) -> float:
    return math.fsum(1 / rank for rank in ranks if rank is not None)


def _steps(steps: int | None) -> float:
    return math.inf if steps is None else float(steps)


def tail(n: int, k: int, rate: float) -> float:
    """The probability of at least `k` successes in `n` independent draws, each at this rate."""
    rate = min(1.0, rate)
    terms: Iterable[float] = (math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(k, n + 1))
    return min(1.0, sum(terms))
