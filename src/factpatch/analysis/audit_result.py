"""What an audit found, and how much of that is chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from factpatch.analysis.attacks.base import Access, Candidate
from factpatch.analysis.audit_facts import Fact, LeftOut

__all__ = [
    "LEVEL",
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
"""Of audits in which all is chance, at most this share finds old answers that stand out, and as many a clear attack."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Trial(_Value):
    """One attack on one fact of one model.

    rank         the old answer's place among the candidates, from 1; None if it is not among them
    decoy_ranks  the same for each of the fact's decoys
    unscored     why it cannot be told whether the old answer is among them; empty if it can
    """

    attack: str
    state: State
    fact: str
    candidates: tuple[Candidate, ...]
    rank: int | None
    decoy_ranks: tuple[int | None, ...]
    unscored: str = ""

    def found(self, budget: int) -> bool:
        """Whether the old answer is among the first so many candidates."""
        return self.rank is not None and self.rank <= budget

    def decoys_found(self, budget: int) -> int:
        """How many decoys are."""
        return sum(rank is not None and rank <= budget for rank in self.decoy_ranks)


class Choice(_Value):
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


class Learnt(_Value):
    """How many steps of training on an answer it takes until it is given; None if it is not given after all of them."""

    state: State
    fact: str
    answer: str
    steps: int | None
    decoy: str | None
    decoy_steps: int | None


class Laid(_Value):
    """A patch that was audited.

    weights         how many parameters it changes; 0 if the weights stay as they are
    tells           ids of the edits whose old answers stand in plain words in its folder
    """

    id: str
    kind: str
    method: str
    weights: int
    tells: tuple[str, ...]


class AttackInfo(_Value):
    """An attack that was made."""

    name: str
    title: str
    access: Access
    about: str


class Recall(_Value):
    """How an attack, or all of them together, did on one model within a budget.

    facts   on how many it could be told whether the old answer was found
    found   on how many it was
    share   found by facts; None if there are none
    chance  share of decoys found; None if there are none
    p       how likely so many would be found if the old answers were found as decoys are; see `Audit.recall`
    """

    attack: str
    state: State
    budget: int
    facts: int
    found: int
    share: float | None
    chance: float | None
    p: float | None


class StandingOut(_Value):
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


class Audit(_Value):
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

    @property
    def states(self) -> tuple[State, ...]:
        """The models attacked."""
        return tuple(dict.fromkeys(trial.state for trial in self.trials))

    @property
    def budgets(self) -> tuple[int, ...]:
        """Those that recall is told for."""
        return tuple(sorted({b for b in (1, 2, 5, 10, 20, 50, 100) if b < self.budget} | {self.budget}))

    def of(self, state: State, attack: str | None = None, fact: str | None = None) -> list[Trial]:
        """Trials on one model that could be scored."""
        return [
            trial
            for trial in self.trials
            if trial.state == state
            and not trial.unscored
            and attack in {None, trial.attack}
            and fact in {None, trial.fact}
        ]

    def recall(self, state: State, attack: str | None = None, budget: int | None = None) -> Recall:
        """Of one attack; or of all together, each with the whole budget, a fact being found if any attack finds it.

        `p` is the probability of at least so many successes in as many draws, where the chance of each is the greater of two
        rates: that of the decoys, with one more taken to be found and one more tried, so that few decoys prove little; and
        that of the never-told control, if there is one.
        """
        budget = self.budget if budget is None else budget
        by_fact: dict[str, list[Trial]] = {}
        for trial in self.of(state, attack):
            by_fact.setdefault(trial.fact, []).append(trial)
        found = sum(any(trial.found(budget) for trial in own) for own in by_fact.values())
        tried = sum(len(own[0].decoy_ranks) for own in by_fact.values())
        hits = sum(_any_found(own, budget) for own in by_fact.values())
        n = len(by_fact)
        p = None
        if n:
            rate = (hits + 1) / (tried + 1)
            if state != "control" and "control" in self.states:
                rate = max(rate, self.recall("control", attack, budget).share or 0.0)
            p = tail(n, found, rate)
        return Recall(
            attack=attack or "all",
            state=state,
            budget=budget,
            facts=n,
            found=found,
            share=found / n if n else None,
            chance=hits / tried if tried else None,
            p=p,
        )

    @property
    def clear(self) -> tuple[str, ...]:
        """Attacks that by themselves found more than chance would, at `LEVEL` over all attacks (Bonferroni)."""
        bar = LEVEL / max(1, len(self.attacks))
        rows = [self.recall("after", info.name) for info in self.attacks]
        return tuple(row.attack for row in rows if row.found and row.p is not None and row.p <= bar)

    def standing_out(self, state: State) -> StandingOut:
        """For which facts the old answer was found, and more readily than every decoy.

        How readily: the sum over attacks of `1 / rank`, nothing where it was not found. An answer never told is as likely to
        lead as each of its decoys, one time in `decoys + 1`. `p` is the probability of at least so many in as many draws at
        the mean of these rates, or at that of the never-told control if it is greater.
        """
        by_fact: dict[str, list[Trial]] = {}
        for trial in self.of(state):
            by_fact.setdefault(trial.fact, []).append(trial)
        ahead, rates = [], []
        for fact, own in by_fact.items():
            secret, *decoys = map(_readiness, zip(*((trial.rank, *trial.decoy_ranks) for trial in own), strict=True))
            rates.append(1 / (len(decoys) + 1))
            if secret > max(decoys, default=math.inf):
                ahead.append(fact)
        n = len(by_fact)
        rate = fmean(rates) if rates else 1.0
        if state != "control" and "control" in self.states and n:
            rate = max(rate, len(self.standing_out("control").facts) / n)
        return StandingOut(facts=tuple(ahead), of=n, expected=rate * n, p=tail(n, len(ahead), rate) if n else None)

    @property
    def recovered(self) -> bool:
        """Whether more was found than chance would find: old answers that stand out, or one attack that is clear by itself."""
        found = self.standing_out("after")
        return bool(self.clear) or bool(found.facts and found.p is not None and found.p <= LEVEL)

    def finders(self, fact: str) -> list[Trial]:
        """The attacks that found this fact's old answer, the best placed first."""
        own = [trial for trial in self.of("after", fact=fact) if trial.rank is not None]
        return sorted(own, key=lambda trial: trial.rank or 0)

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


def _any_found(trials: list[Trial], budget: int) -> int:
    """How many decoys of one fact any of these attacks found."""
    ranks = zip(*(trial.decoy_ranks for trial in trials), strict=True)
    return sum(any(rank is not None and rank <= budget for rank in own) for own in ranks)


def _readiness(ranks: Sequence[int | None]) -> float:
    return math.fsum(1 / rank for rank in ranks if rank is not None)


def _steps(steps: int | None) -> float:
    return math.inf if steps is None else float(steps)


def tail(n: int, k: int, rate: float) -> float:
    """The probability of at least `k` successes in `n` independent draws, each at this rate."""
    rate = min(1.0, rate)
    terms: Iterable[float] = (math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(k, n + 1))
    return min(1.0, sum(terms))
