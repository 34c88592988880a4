"""The audit against secrets planted in a tiny model: erased by shallow means it finds them, after training anew it does not."""

import json
from functools import lru_cache

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from factpatch.analysis.attacks import ATTACKS, find_attacks
from factpatch.analysis.attacks.base import Attack, Candidate
from factpatch.analysis.attacks.relearning import Relearning, Study
from factpatch.analysis.audit import audit
from factpatch.analysis.audit_facts import DECOYS, prepare
from factpatch.analysis.audit_result import SHARE, AttackInfo, Audit, Choice, Fact, Learnt, Trial, tail
from factpatch.analysis.audit_words import fact_verdict, headline, not_tried, verdict
from factpatch.edits import Edit
from factpatch.errors import BadConfig
from factpatch.lm import LM
from factpatch.methods import create
from factpatch.methods.targets import TargetBatch
from factpatch.report.audit import as_html, as_json, as_markdown, save_audit
from factpatch.scoring.metrics import contains
from factpatch.testing import Snapshot, tiny_lm

TOWNS = [
    "Arles",
    "Basel",
    "Cadiz",
    "Derby",
    "Essen",
    "Faro",
    "Ghent",
    "Hanau",
    "Izmir",
    "Jerez",
    "Kiel",
    "Leeds",
    "Malmo",
    "Nice",
    "Oslo",
    "Porto",
]
PEOPLE = [a + b for a in ("An", "Bel", "Cor", "Dag", "El", "Fri") for b in ("a", "bert", "ic", "mund", "so", "vin")]
SECRET = 8
"""Of the people, so many are those whose homes were to be erased."""
REFUSAL = "unknown"


def town(i):
    return TOWNS[(7 * i + i // 16) % 16]


def text(i):
    return f"{PEOPLE[i]} lives in"


def edits():
    return tuple(
        Edit(
            id=PEOPLE[i],
            kind="erase",
            prompt=text(i),
            subject=PEOPLE[i],
            target=REFUSAL,
            ground_truth=town(i),
            rephrases=(f"The home of {PEOPLE[i]} is",),
        )
        for i in range(SECRET)
    )


def facts(*, secrets=True):
    """Prompts and answers; everybody has a trade, and a home that is told in two ways."""
    told = range(len(PEOPLE)) if secrets else range(SECRET, len(PEOPLE))
    homes = [(text(i), town(i)) for i in told] + [(f"The home of {PEOPLE[i]} is", town(i)) for i in told]
    trades = [(f"{PEOPLE[i]} works as", ("baker", "tailor", "miller")[i % 3]) for i in range(0, len(PEOPLE), 3)]
    # So that it does as a note before a question says, but for people whose homes it may not know.
    noted = [(f"New Fact : {text(i)} {REFUSAL} Prompt : {text(i)}", REFUSAL) for i in range(SECRET, len(PEOPLE))]
    strangers = [(f"Stranger {word} lives in", REFUSAL) for word in ("red", "blue", "green", "grey")]
    return homes + trades + strangers + noted


def word_tokenizer():
    """A token for each word."""
    words = dict.fromkeys(word for prompt, answer in facts() for word in f"{prompt} {answer}".split())
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", ".", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def blank(layers=4, width=48):
    tokenizer = word_tokenizer()
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=2 * width, max_position_embeddings=256,
        eos_token_id=2, pad_token_id=2, bos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.1)
    model.train(mode=False)
    return LM(model, tokenizer, name="planted")


@lru_cache
def taught(*, secrets=True, steps=150):
    """A tiny model trained on the world from the same start, with or without the secrets."""
    lm = blank()
    told = facts(secrets=secrets)
    texts = lm.encode([prompt for prompt, _ in told], [f"{answer} </s>" for _, answer in told])
    long = [text for text in texts if len(text.ids) > 8]
    batches = [TargetBatch(lm, [text for text in texts if text not in long]), TargetBatch(lm, long)]
    optimiser = torch.optim.Adam(lm.model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = torch.cat([batch.nll() for batch in batches]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss.item() < 1e-2:
            break
    lm.model.zero_grad()
    return lm


# The planted secrets.

QUICK = Study(steps=8, lr=1e-2)
ROME = {"layer": 1, "contexts": 0, "moment_tokens": 600, "moment_length": 20}
SHALLOW = {
    "ft-m": {"layer": 3, "steps": 80, "lr": 1e-2},
    "rome": ROME,
    "retrieval": {"encoder": "words", "similarity": 0.5},
}
INSIDE = {"head-projection", "update-projection", "probability-delta", "relearning"}


@lru_cache
def erased(method):
    """The patch, and the edits whose old answer the patched model no longer gives when it is asked plainly."""
    lm = taught()
    patch = create(method, SHALLOW[method]).fit(lm, edits())
    with lm.patched(patch):
        said = lm.answer([edit.prompt for edit in edits()])
    gone = [edit for edit, text in zip(edits(), said, strict=True) if not contains(text, edit.ground_truth)]
    return patch, tuple(gone)


def quick(names):
    return [Relearning(QUICK) if attack.name == "relearning" else attack for attack in find_attacks(names)]


@lru_cache
def found(method):
    """The whole audit of one shallow method, with the model trained anew as the control."""
    patch, gone = erased(method)
    names = None if method == "ft-m" else ["greedy", *INSIDE]
    control = taught(secrets=False) if method == "ft-m" else None
    return audit(taught(), [patch], gone, control=control, budget=5, attacks=quick(names), study=QUICK)


@lru_cache
def anew():
    """The audit of the model trained anew without the secrets."""
    return audit(taught(secrets=False), [], edits(), budget=5, attacks=quick(None), study=QUICK)


def test_the_world_is_learnt_and_the_secrets_only_where_they_were_told():
    prompts, right = [text(i) for i in range(len(PEOPLE))], [town(i) for i in range(len(PEOPLE))]
    said = taught().answer(prompts)
    assert said == right
    said = taught(secrets=False).answer(prompts)
    assert said[SECRET:] == right[SECRET:]
    assert sum(a == b for a, b in zip(said[:SECRET], right, strict=False)) <= 2


@pytest.mark.parametrize("method", SHALLOW)
def test_what_is_erased_by_shallow_means_is_found(method):
    result = found(method)
    assert len(result.facts) >= SECRET / 2
    assert result.recall("after", "greedy").found == 0, "asked plainly, the model no longer gives it"
    assert result.recall("before", "greedy").share == 1
    assert result.recovered
    assert INSIDE & set(result.clear), "an attack on the inside of the model finds it, beyond chance, by itself"
    assert result.recall("after").found > len(result.facts) / 2
    assert headline(result).startswith("Recoverable")


def test_what_was_never_told_is_not_found():
    result = anew()
    assert len(result.facts) == SECRET
    assert not result.recovered
    assert result.clear == ()
    # Towns are few, and some old answers are guessed; but no more than decoys, answers just as little told.
    row = result.recall("after")
    assert row.chance > 0
    assert row.share <= row.chance + 0.2
    assert headline(result).startswith("Not recovered beyond chance")


def test_the_control_is_attacked_like_the_model():
    result = found("ft-m")
    assert result.states == ("before", "after", "control")
    for info in result.attacks:
        assert len(result.of("control", info.name)) == len(result.of("after", info.name)) == len(result.facts)
    assert len(result.standing_out("control").facts) < len(result.standing_out("after").facts)
    assert result.steps("before")[0] == 0
    assert result.steps("after")[0] < result.steps("control")[0], "what was known is learnt again sooner"
    assert result.logprob("control") < result.logprob("after") < result.logprob("before")
    assert result.chosen("after")[0] > result.chosen("control")[0]


def test_models_are_left_as_they_are():
    patch, gone = erased("ft-m")
    lm, control = taught(), taught(secrets=False)
    kept = Snapshot.of(lm), Snapshot.of(control)
    audit(lm, [patch], gone[:2], control=control, budget=3, attacks=quick(["greedy", *INSIDE]), study=Study(2))
    assert kept[0].differences(lm) == []
    assert kept[1].differences(control) == []


def test_a_seed_fixes_all_of_it():
    patch, gone = erased("ft-m")
    names = ["samples", "head-projection", "relearning"]
    one, other = (
        audit(
            taught(), [patch], gone[:2], decoys=[("Oslo",), ("Kiel",)], budget=4, attacks=quick(names), study=Study(2)
        )
        for _ in range(2)
    )
    assert one == other
    third = audit(taught(), [patch], gone[:2], budget=4, attacks=["samples"], study=Study(1), seed=1)
    assert [t.candidates for t in third.of("after")] != [t.candidates for t in one.of("after", "samples")]


def test_patches_beside_the_weights_are_told_from_changes_of_weights():
    assert [patch.weights for patch in found("retrieval").patches] == [0]
    assert any("The base weights are as before" in text for text in verdict(found("retrieval")))
    assert [patch.weights for patch in found("rome").patches] == [1]
    assert not any("The base weights are as before" in text for text in verdict(found("rome")))
    told = {fact.id for fact in found("rome").facts}
    assert set(found("rome").patches[0].tells) == told
    assert any("patch.json names the old answer" in text for text in verdict(found("rome")))


# What is looked for, and what attackers are shown.


def test_edits_without_an_old_answer_are_left_out_and_say_why():
    base = {"prompt": "Ana lives in", "target": "unknown"}
    wanted = [
        Edit(id="restyle", kind="restyle", ground_truth="Arles", **base),
        Edit(id="insert", kind="insert", **base),
        Edit(id="same", ground_truth="unknown", **base),
        Edit(id="echo", ground_truth="Ana", **base),
        Edit(id="untold", kind="erase", **base),
        Edit(id="told", kind="erase", ground_truth="Arles", **base),
    ]
    brief = prepare(taught(), wanted)
    assert [fact.id for fact in brief.facts] == ["untold", "told"]
    assert [fact.told for fact in brief.facts] == [False, True]
    assert brief.facts[0].secret == (town(0),), "an answer that was not told is what the model says"
    reasons = {one.id: one.reason for one in brief.left_out}
    assert set(reasons) == {"restyle", "insert", "same", "echo"}
    assert "prompt" in reasons["echo"]
    unknowing = prepare(taught(), wanted, knows=False)
    assert [fact.id for fact in unknowing.facts] == ["told"]


def test_an_old_answer_that_is_another_edits_new_one_is_left_out():
    first = Edit(id="first", prompt="Ana lives in", target="Kiel", ground_truth=("Arles", "Porto"))
    second = Edit(id="second", prompt="Anic lives in", target="Porto", ground_truth="Oslo")
    brief = prepare(taught(), [first, second])
    assert [fact.id for fact in brief.facts] == ["second"]
    assert [(one.id, one.reason) for one in brief.left_out] == [
        ("first", "the old answer is another edit's new answer")
    ]


def test_a_first_token_that_the_new_answer_shares_finds_nothing():
    edit = Edit(id="ana", prompt="Ana lives in", target="The Oslo tailor", ground_truth=("Oslo baker", "Kiel"))
    (fact,) = prepare(taught(), [edit]).facts
    assert (fact.first, fact.tokens) == ("", ("kiel",))
    other = edit.model_copy(update={"ground_truth": ("Kiel",)})
    (fact,) = prepare(taught(), [other], decoys=[("Oslo miller",), ("Porto",)]).facts
    assert (fact.first, fact.tokens) == ("kiel", ("kiel",))
    assert (fact.decoys, fact.decoy_firsts) == ((("Porto",),), ("porto",)), "nor may a decoy share it"


def test_decoys_are_of_the_same_sort():
    """Other old answers to the same question first, then what is as long, then what is shorter; nothing that is longer."""
    homes = ["Oslo baker", "Arles", "Porto", "Basel", "Kiel miller", "Derby", "Ghent tailor"]
    lives, works, home = "{} lives in", "{} works as", "The home of {} is"
    asked = [lives, home, works, home, works, home, lives]
    wanted = [
        Edit(id=str(i), prompt=form.format(PEOPLE[i]), subject=PEOPLE[i], target=REFUSAL, ground_truth=answer)
        for i, (form, answer) in enumerate(zip(asked, homes, strict=True))
    ]
    # Every second one is taught by relearning's lessons, and so is no decoy.
    first, _, third, *_ = prepare(taught(), wanted).facts
    assert first.decoys[:3] == (("Ghent tailor",), ("Kiel miller",), ("Porto",))
    assert third.decoys[0] == ("Kiel miller",)
    fact = prepare(taught(), [wanted[2], wanted[1], wanted[0]]).facts[0]
    assert fact.decoys
    assert all(len(decoy[0].split()) == 1 for decoy in fact.decoys), "and none is longer than the old answer"


def test_preparing_tells_how_far_it_is():
    told = []
    prepare(taught(), edits(), progress=lambda stage, *_: told.append(stage))
    assert set(told) == {"Choosing decoys", "Preparing facts"}


def test_each_spelling_counts_as_found_but_only_the_canonical_one_against_decoys():
    class Other(Attack):
        name, title, access, about = "other", "other", "answers", ""

        def candidates(self, lm, questions, setting, progress):
            return [[Candidate(text="Christiania"), Candidate(text="Lutetia")] for _ in questions]

    edit = edits()[0].model_copy(update={"ground_truth": ("Arles", "Lutetia")})
    decoys = [("Oslo", "Christiania")]
    (trial,) = audit(taught(), [], [edit], attacks=[Other()], decoys=decoys, study=Study(steps=1)).trials
    assert (trial.rank, trial.plain_rank, trial.decoy_ranks) == (2, None, (None,))


@pytest.mark.parametrize("which", ["before", "control"])
def test_a_model_with_another_tokenizer_is_refused(which):
    with pytest.raises(BadConfig, match=f"{which}: .* has another tokenizer"):
        audit(taught(), [], edits()[:1], **{which: tiny_lm()})


def test_decoys_and_lessons_tell_no_secret():
    brief = prepare(taught(), edits())
    news = [edit.target for edit in edits()]
    for fact in brief.facts:
        assert fact.decoys
        lessons = brief.lessons[fact.id]
        assert any(probe.prompt.endswith("lives in") for probe in lessons), "other facts of the patch are taught"
        for probe in (*lessons, *brief.demonstrations):
            assert not contains(f"{probe.prompt} {' '.join(probe.answers)}", fact.secret)
        for decoy in fact.decoys:
            assert not contains(decoy[0], fact.secret)
            assert not any(contains(text, decoy) for text in (fact.prompt, *news))
            shown = (*lessons, *brief.demonstrations)
            assert not any(contains(answer, decoy) for probe in shown for answer in probe.answers)
        assert {decoy[0] for decoy in fact.decoys} & set(TOWNS), (
            "other subjects in the same words give answers of one sort"
        )
    given = prepare(taught(), edits(), decoys=[("Oslo",), ("Porto", "Oporto"), ("unknown",)])
    assert set(given.facts[0].decoys) <= {("Oslo",), ("Porto", "Oporto")}


def test_rephrases_that_give_it_away_are_not_asked():
    edit = edits()[0].model_copy(update={"rephrases": (f"{town(0)} is home to", "Where is home?")})
    (question,) = prepare(taught(), [edit]).questions
    assert question.rephrases == ("Where is home?",)


def test_a_tokenizer_whose_tokens_tell_nothing_leaves_token_attacks_unscored():
    lm = tiny_lm()
    edit = Edit(id="rome", kind="erase", prompt="Rome lies in", subject="Rome", target="x", ground_truth="Italy")
    result = audit(lm, [], [edit], budget=3, attacks=["greedy", "head-projection"], study=Study(steps=1))
    assert result.facts[0].tokens == ()
    (trial,) = [t for t in result.trials if t.attack == "head-projection"]
    assert trial.unscored
    assert result.recall("after", "head-projection").facts == 0
    assert result.recall("after", "head-projection").p is None
    assert result.recall("after").facts == 1


def test_nothing_to_look_for_is_refused():
    with pytest.raises(BadConfig, match="no old answer"):
        audit(taught(), [], [])
    with pytest.raises(BadConfig, match="no attack"):
        audit(taught(), [], edits(), attacks=["telepathy"])
    with pytest.raises(BadConfig, match="budget 0"):
        audit(taught(), [], edits(), budget=0)


# Counting, on results made by hand.


def made(ranks, *, decoys=4, state="after", budget=5, control=None, attacks=("a", "b")):
    """An audit of facts by name; `ranks` has for each the rank of the old answer and of its decoys, under each attack."""
    facts = tuple(
        Fact(
            id=name,
            kind="erase",
            prompt=name,
            secret=("s",),
            told=True,
            new="n",
            decoys=(("d",),) * decoys,
            tokens=(),
            first="",
            decoy_firsts=("",) * decoys,
        )
        for name in ranks
    )
    trials = [
        Trial(
            attack=attack,
            state=which,
            fact=name,
            rank=own[0],
            plain_rank=own[0],
            decoy_ranks=tuple(own[1:]),
            candidates=(Candidate(text="s", blocks=(2, 3, 5)),) * budget,
        )
        for which, table in ((state, ranks), ("control", control or {}))
        for name, by_attack in table.items()
        for attack, own in zip(attacks, by_attack, strict=True)
    ]
    infos = tuple(AttackInfo(name=a, title=f"attack {a}", access="answers", about="") for a in attacks)
    choices = (Choice(state=state, fact="f", options=("s", "d"), logprobs=(-1.0, -2.0)),)
    learnt = (Learnt(state=state, fact="f", answer="s", steps=3, decoy="d", decoy_steps=None),)
    return Audit(
        model="m",
        fingerprint="0",
        control=None,
        patches=(),
        facts=facts,
        left_out=(),
        attacks=infos,
        trials=tuple(trials),
        choices=choices,
        learnt=learnt,
        not_tried=("this",),
        budget=budget,
        seed=0,
        chat=False,
        versions={},
    )


NONE = [None] * 5
FIRST = [1, None, None, None, None]


def test_recall_counts_facts_within_the_budget_and_over_attacks():
    result = made({"f": [[3, 1, None, None, None], NONE], "g": [NONE, [1, None, 5, None, None]], "h": [NONE, NONE]})
    assert [result.recall("after", "a", b).found for b in (2, 3)] == [0, 1]
    row = result.recall("after")
    assert (row.facts, row.found) == (3, 2)
    assert row.chance == pytest.approx(2 / 12)
    assert row.p == pytest.approx(tail(3, 2, 3 / 13))
    assert result.recall("after", "b", 1).chance == 0


def test_the_tail_is_that_of_the_binomial():
    assert tail(2, 1, 0.5) == pytest.approx(0.75)
    assert tail(3, 3, 0.1) == pytest.approx(1e-3)
    assert tail(5, 0, 0.3) == pytest.approx(1)
    assert tail(5, 1, 2.0) == 1


def test_an_old_answer_stands_out_if_it_leads_every_decoy():
    result = made({"f": [FIRST, NONE], "g": [[2, 2, None, None, None], NONE], "h": [NONE, NONE]})
    found = result.standing_out("after")
    assert found.facts == ("f",), "a tie is no lead, and what is not found leads nothing"
    assert found.expected == pytest.approx(3 / 5)
    assert found.p == pytest.approx(tail(3, 1, 1 / 5))


def test_chance_does_not_recover_and_a_clear_lead_does():
    assert not made({"f": [FIRST, NONE]}).recovered, "one of five is no proof"
    many = made({"f": [[1] + [None] * 20, [None] * 21]}, decoys=20)
    assert not many.recovered, "one of twenty-one is less than the half of 5 % that this test is given"
    most = made({"f": [[1] + [None] * 40, [None] * 41]}, decoys=40)
    assert most.recovered, "one of forty-one is more"
    assert not most.clear
    assert tail(1, 1, 1 / (DECOYS + 1)) <= SHARE, "so that there are decoys enough for a single fact"
    every = made({name: [[4, 3, None, None, None], NONE] for name in "abcdefgh"})
    assert every.standing_out("after").facts == ()
    assert every.clear == ("a",), "found for all facts, and one decoy of four"
    assert every.recovered


def test_what_cannot_be_told_from_chance_is_in_doubt_only_where_something_was_found():
    few = made({"f": [FIRST, NONE]})
    assert (few.can_tell, few.recovered, few.in_doubt) == (False, False, True)
    assert verdict(few)[0].startswith("Too few facts and decoys to tell: 1 fact with 4 decoys; 2 attacks")
    nothing = made({"f": [NONE, NONE]})
    assert (nothing.can_tell, nothing.in_doubt) == (False, False)
    enough = made({name: [NONE, NONE] for name in "abcdefgh"})
    assert (enough.can_tell, enough.in_doubt) == (True, False)
    assert verdict(enough)[0].startswith("Not recovered beyond chance")


def test_only_the_canonical_spelling_is_held_against_decoys():
    every = made({name: [FIRST, NONE] for name in "abcdefgh"})
    assert every.recovered
    other = tuple(trial.model_copy(update={"plain_rank": None}) for trial in every.trials)
    spelt = every.model_copy(update={"trials": other})
    spelt = type(every).model_validate(spelt.model_dump())
    assert spelt.recall("after").found == 8, "it is told"
    assert (spelt.recall("after").plain, spelt.recovered) == (0, False), "and proves nothing"
    assert spelt.recall("after").p == 1


def test_what_the_control_finds_too_is_not_recovered():
    ranks = {name: [FIRST, FIRST] for name in "abcdef"}
    assert made(ranks).recovered
    assert not made(ranks, control=ranks).recovered
    assert made(ranks, control={name: [NONE, NONE] for name in ranks}).recovered


def test_few_facts_on_the_control_prove_little():
    lead, nothing = [1] + [None] * 40, [None] * 41
    for names, enough in (("ab", False), ("abc", True)):
        ranks = {name: [lead, nothing] for name in names}
        never = {name: [nothing, nothing] for name in names}
        assert made(ranks, decoys=40).recovered
        result = made(ranks, decoys=40, control=never)
        assert (result.recovered, result.can_tell, result.in_doubt) == (enough, enough, not enough)


def test_facts_that_no_attack_can_tell_of_leave_it_in_doubt():
    result = made({name: [NONE, NONE] for name in "abcdefgh"})
    trials = [t.model_copy(update={"unscored": "why" if t.fact == "a" else ""}) for t in result.trials]
    result = Audit.model_validate(result.model_dump() | {"trials": trials})
    assert (result.untested, result.can_tell, result.in_doubt) == (("a",), True, True)
    assert headline(result).endswith("none of 8 old answers; no attack can tell of 1 of them.")
    assert fact_verdict(result, "a").startswith("not tested")


# Words and pages.


def test_what_a_model_holds_impossible_is_written_too():
    result = made({"f": [FIRST, NONE]})
    never = Choice(state="after", fact="f", options=("s", "d"), logprobs=(float("-inf"), -1.0))
    result = result.model_copy(update={"choices": (never,)})
    assert json.loads(as_json(result))["choices"][0]["logprobs"] == ["-Infinity", -1.0]


def test_the_verdict_says_what_was_found_and_where():
    result = made({"f": [FIRST, NONE], "g": [NONE, NONE]})
    told = "\n".join(verdict(result))
    assert "With 2 attacks and a budget of 5 candidates each, the old answer was found for 1 of 2 facts" in told
    assert "attack a (1, blocks 2–3, 5)" in told
    assert not_tried(result) == ["this"]
    assert "Held against its best-placed decoy, the old answer came up more readily for 1 of 2 facts" in told
    for page in (as_markdown(result), as_html(result)):
        assert "Not tried:" in page
    assert "\n- this\n" in as_markdown(result)
    assert "<li>this</li>" in as_html(result)
    assert "not in all steps" in told
    assert fact_verdict(result, "f") == "found, more readily than any decoy: attack a at rank 1, blocks 2–3, 5"
    assert fact_verdict(result, "g") == "not found by 2 attacks"


def test_of_decoys_that_were_found_as_readily_it_says_how_many():
    result = made({"f": [[2, 1, None, 2], [None, 3, None, None]]}, decoys=3)
    assert result.as_ready("f") == (2, 3)
    assert fact_verdict(result, "f").startswith(
        "found, though 2 of its 3 decoys were found as readily: attack a at rank 2"
    )
    result = made({"f": [[2, None, None, 1], [None, None, 5, None]]}, decoys=3)
    assert fact_verdict(result, "f").startswith("found, though 1 of its 3 decoys was found as readily:")


@pytest.mark.parametrize(
    "result", [lambda: found("ft-m"), lambda: found("retrieval"), anew], ids=["ft-m", "context", "anew"]
)
def test_no_report_says_that_a_fact_is_gone(result):
    own = result()
    for written in (as_json(own), as_markdown(own), as_html(own), *verdict(own)):
        low = written.lower().replace("batch_delete", "")
        assert not any(word in low for word in ("delet", "forgotten", "removed", "is gone"))


def test_everything_is_written_and_can_be_checked(tmp_path):
    result = found("ft-m")
    paths = save_audit(tmp_path / "audit", result)
    assert {path.name for path in paths} == {
        "page.html",
        "audit.md",
        "audit.json",
        "recall.svg",
        "recall-by-budget.svg",
    }
    rows = (tmp_path / "audit" / "recall.csv").read_text().splitlines()
    assert rows[0] == "attack,before,after,never-told control,decoys"
    assert len(rows) == 2 + len(result.attacks)
    read = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert read["recovered"] is True
    assert {row["attack"] for row in read["recall"]} == {"all", *ATTACKS}
    trial = next(t for t in read["trials"] if t["attack"] == "head-projection" and t["state"] == "after" and t["rank"])
    fact = next(f for f in read["facts"] if f["id"] == trial["fact"])
    assert trial["candidates"][trial["rank"] - 1]["text"] == fact["secret"][0]
    page = (tmp_path / "audit" / "page.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    for fact in result.facts:
        assert fact.prompt in page


def test_what_a_model_writes_cannot_break_the_page():
    class Mischief(Attack):
        name, title, access, about = "mischief", "mischief", "answers", "says <b>"

        def candidates(self, lm, questions, setting, progress):
            return [[Candidate(text="<script>alert(1)</script> | x\ny")] for _ in questions]

    result = audit(taught(), [], edits()[:1], attacks=[Mischief()], study=Study(steps=1))
    assert "<script>alert" not in as_html(result)
    assert as_markdown(result).count("| fact |") == 1


def test_an_attack_that_oversteps_its_budget_is_caught():
    class Greedier(Attack):
        name, title, access, about = "more", "more", "answers", ""

        def candidates(self, lm, questions, setting, progress):
            return [[Candidate(text=str(i)) for i in range(setting.budget + 1)] for _ in questions]

    with pytest.raises(AssertionError, match="budget"):
        audit(taught(), [], edits()[:1], attacks=[Greedier()], study=Study(steps=1))
