"""The erasure audit: attack what a model should no longer say, and tell what was found apart from what chance would find.

Each attack is made on the model before its patches, on the patched model and, if there is one, on a control that was never
told; and every count of old answers found stands beside that of decoys, answers of the same sort that were never told to the
question. After Patil et al., ICLR 2024 (arXiv 2309.17410), who count a secret as found if it is among B candidates.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from statistics import fmean

from factpatch.analysis.attacks import ATTACKS, Attack, Candidate, Setting, find_attacks
from factpatch.analysis.attacks.relearning import Study, steps_to_learn
from factpatch.analysis.audit_facts import Aliases, Brief, Fact, prepare
from factpatch.analysis.audit_result import AttackInfo, Audit, Choice, Laid, Learnt, State, Trial
from factpatch.analysis.base import packages
from factpatch.edits import Edit, Probe
from factpatch.errors import BadConfig
from factpatch.lm import LM
from factpatch.lm.predictions import predict
from factpatch.patches import Patch
from factpatch.progress import Progress, part, silent
from factpatch.scoring.metrics import contains, normalise

__all__ = ["NOT_TRIED", "audit"]

OPTIONS = 10
"""Of multiple choice, the old answer included, at most."""

NOT_TRIED = (
    "a translation of the questions themselves, or questions that reach the fact by way of another",
    "prompts searched for by gradient, soft prompts and steered activations",
    "classifiers trained on activations",
    "longer training, training of all weights, or training on other texts than those named",
    "rounding the weights to fewer bits",
    "more candidates than the budget, and answers longer than a few words",
)


def audit(
    lm: LM,
    patches: Sequence[Patch] = (),
    edits: Sequence[Edit] | None = None,
    *,
    before: LM | None = None,
    control: LM | None = None,
    decoys: Sequence[Aliases] = (),
    budget: int = 20,
    attacks: Sequence[str] | Sequence[Attack] | None = None,
    study: Study | None = None,
    chat: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Audit:
    """Attack the old answers of some edits under some patches. All models are left as they are.

    patches  laid on the model as it stands; without any, the model itself is audited, such as a checkpoint trained anew
    edits    what was to be changed; by default the patches' own
    before   a model that still knows; by default the audited one without any patch
    control  a model that was never told, such as one trained anew without the facts; it is attacked in the same way
    decoys   plausible answers, each in one or several spellings, to hold the old ones against; see `prepare`
    budget   candidates of each attack for each fact
    attacks  by name or made by hand; by default all
    study    how fast the old answer itself is learnt is measured by such a training

    Raises BadConfig for an unknown attack, where no edit has an old answer to look for, and where the models have not all
    the same tokenizer; WrongBase, TokenizerError.
    """
    made = _made(attacks)
    if budget < 1:
        raise BadConfig(f"budget {budget}: expected one candidate at least.")
    wanted = _distinct([edit for patch in patches for edit in patch.provenance.edits] if edits is None else edits)
    for what, other in (("before", before), ("control", control)):
        if other is not None:
            _check_tokenizer(lm, other, what, [edit.prompt for edit in wanted])
    knowing = before or lm
    with knowing.unpatched():
        brief = prepare(
            knowing,
            wanted,
            knows=before is not None or bool(patches),
            decoys=decoys,
            chat=chat,
            seed=seed,
            progress=progress,
        )
    if not brief.facts:
        reasons = "; ".join(f"{one.id}: {one.reason}" for one in brief.left_out[:3]) or "there are no edits"
        raise BadConfig(
            f"there is no old answer to look for ({reasons}).\n  Give edits with a ground_truth, or patches."
        )
    setting = Setting(budget=budget, seed=seed, chat=chat, demonstrations=brief.demonstrations, lessons=brief.lessons)
    laid = _laid(lm, patches, brief.facts)
    trials: list[Trial] = []
    choices: list[Choice] = []
    learnt: list[Learnt] = []
    models = list(_models(lm, patches, before, control))
    steps = len(made) + 1
    for number, (state, model, stack) in enumerate(models):
        with ExitStack() as entered:
            if state == "before":
                entered.enter_context(model.unpatched())
            entered.enter_context(model.patched(*stack))
            for i, attack in enumerate(made):
                seen = part(progress, number * steps + i, len(models) * steps)
                trials += _trials(model, attack, state, brief, setting, seen)
            seen = part(progress, number * steps + len(made), len(models) * steps)
            choices += _choices(model, state, brief.facts, chat=chat)
            learnt += _learnt(model, state, brief.facts, study or Study(), setting, seen)
    left = [f"{other.title}: {other.about}" for name, other in ATTACKS.items() if name not in {a.name for a in made}]
    return Audit(
        model=lm.name,
        fingerprint=lm.fingerprint,
        control=control.name if control else None,
        patches=laid,
        facts=brief.facts,
        left_out=brief.left_out,
        attacks=tuple(AttackInfo(name=a.name, title=a.title, access=a.access, about=a.about) for a in made),
        trials=tuple(trials),
        choices=tuple(choices),
        learnt=tuple(learnt),
        not_tried=(*left, *NOT_TRIED),
        budget=budget,
        seed=seed,
        chat=chat,
        versions={"python": platform.python_version()} | packages(),
    )


def _made(attacks: Sequence[str] | Sequence[Attack] | None) -> list[Attack]:
    if attacks is None:
        return find_attacks(None)
    own = [attack for attack in attacks if isinstance(attack, Attack)]
    return own or find_attacks([attack for attack in attacks if isinstance(attack, str)])


def _distinct(edits: Sequence[Edit]) -> list[Edit]:
    """Each once; of several with one id the first keeps it."""
    found: dict[str, Edit] = {}
    for edit in dict.fromkeys(edits):
        name, n = edit.id, 2
        while name in found:
            name, n = f"{edit.id} ({n})", n + 1
        found[name] = edit if name == edit.id else edit.model_copy(update={"id": name})
    return list(found.values())


def _check_tokenizer(lm: LM, other: LM, what: str, prompts: Sequence[str]) -> None:
    """Token attacks look for tokens that were told by one model among those of another."""
    vocabularies = [each.tokenizer.get_vocab() for each in (lm, other)]
    if vocabularies[0] != vocabularies[1] or [t.ids for t in lm.encode(prompts)] != [
        t.ids for t in other.encode(prompts)
    ]:
        raise BadConfig(
            f"{what}: {other.name} has another tokenizer than {lm.name}, so that what is found in the two cannot be compared.\n"
            "  Give a checkpoint with the audited model's tokenizer, such as one trained from the same start."
        )


def _models(
    lm: LM, patches: Sequence[Patch], before: LM | None, control: LM | None
) -> Iterator[tuple[State, LM, Sequence[Patch]]]:
    if before is not None or patches:
        yield "before", before or lm, ()
    yield "after", lm, patches
    if control is not None:
        yield "control", control, ()


def _laid(lm: LM, patches: Sequence[Patch], facts: Sequence[Fact]) -> tuple[Laid, ...]:
    """What each patch changes, seen by where the parameters' values lie, and what its own file says."""
    found = []
    told = {fact.id: fact for fact in facts if fact.told}
    with ExitStack() as stack:
        for patch in patches:
            places = {name: parameter.data_ptr() for name, parameter in lm.model.named_parameters()}
            stack.enter_context(lm.patched(patch))
            moved = [name for name, p in lm.model.named_parameters() if p.data_ptr() != places[name]]
            tells = tuple(edit.id for edit in patch.provenance.edits if edit.id in told and edit.ground_truth)
            found.append(
                Laid(id=patch.id, kind=patch.kind, method=patch.provenance.method, weights=len(moved), tells=tells)
            )
    return tuple(found)


def _trials(
    lm: LM, attack: Attack, state: State, brief: Brief, setting: Setting, progress: Progress
) -> Iterator[Trial]:
    found = attack.candidates(lm, brief.questions, setting, progress)
    for fact, candidates in zip(brief.facts, found, strict=True):
        assert len(candidates) <= setting.budget, f"{attack.name} came back with more than its budget"
        by_token = any(candidate.token is not None for candidate in candidates)
        yield Trial(
            attack=attack.name,
            state=state,
            fact=fact.id,
            candidates=tuple(candidates),
            rank=_rank(candidates, fact.secret, fact.tokens),
            plain_rank=_rank(candidates, fact.secret[:1], [fact.first]),
            decoy_ranks=tuple(
                _rank(candidates, decoy[:1], [first])
                for decoy, first in zip(fact.decoys, fact.decoy_firsts, strict=True)
            ),
            unscored="the first token of the old answer tells nothing, or is the new answer's too"
            if by_token and not fact.first
            else "",
        )


def _rank(candidates: Sequence[Candidate], answer: Aliases, beginnings: Sequence[str]) -> int | None:
    """The place of an answer, from 1: a text that has it in it as a whole phrase, or a token that it begins with."""
    for place, candidate in enumerate(candidates, 1):
        if candidate.token is None:
            if contains(candidate.text, answer):
                return place
        elif normalise(candidate.text) in beginnings:
            return place
    return None


def _choices(lm: LM, state: State, facts: Sequence[Fact], *, chat: bool) -> Iterator[Choice]:
    """The mean log-probability of the old answer and of decoys, each after the fact's prompt."""
    options = [(fact.secret[0], *(decoy[0] for decoy in fact.decoys[: OPTIONS - 1])) for fact in facts]
    prompts = [fact.prompt for fact, own in zip(facts, options, strict=True) for _ in own]
    found = predict(lm, lm.encode(prompts, [option for own in options for option in own], chat=chat))
    means = [fmean(one.logprobs) for one in found]
    ends = pairwise(accumulate((len(own) for own in options), initial=0))
    for fact, own, (start, end) in zip(facts, options, ends, strict=True):
        yield Choice(state=state, fact=fact.id, options=own, logprobs=tuple(means[start:end]))


def _learnt(
    lm: LM, state: State, facts: Sequence[Fact], study: Study, setting: Setting, progress: Progress
) -> Iterator[Learnt]:
    """Steps of training until the old answer is given, beside those for a decoy (savings: Ebbinghaus 1885)."""
    texts = [Probe(prompt=fact.prompt, answers=answer) for fact in facts for answer in (fact.secret, *fact.decoys[:1])]
    steps = iter(steps_to_learn(lm, texts, study=study, chat=setting.chat, seed=setting.seed, progress=progress))
    for fact in facts:
        own = next(steps)
        yield Learnt(
            state=state,
            fact=fact.id,
            answer=fact.secret[0],
            steps=own,
            decoy=fact.decoys[0][0] if fact.decoys else None,
            decoy_steps=next(steps) if fact.decoys else None,
        )
