"""Each attack against constructions in which what it must find is known."""

from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factpatch.analysis.attacks import ATTACKS, find_attacks, lens, relearning
from factpatch.analysis.attacks.asking import FewShot, Greedy, Paraphrases, Samples, in_other_words
from factpatch.analysis.attacks.base import Candidate, Question, Setting, best, token_key
from factpatch.analysis.attacks.lens import (
    HeadProjection,
    ProbabilityDelta,
    UpdateProjection,
    read_through_head,
    states,
)
from factpatch.analysis.attacks.relearning import Relearning, Study, steps_to_learn
from factpatch.analysis.audit_facts import prepare
from factpatch.edits import Probe
from factpatch.errors import BadConfig
from factpatch.lm.batches import Batch, Places
from factpatch.lm.hooks import replacing_output
from factpatch.lm.run import logits_at
from factpatch.methods.targets import TargetBatch
from factpatch.progress import silent
from factpatch.scoring.metrics import normalise
from factpatch.testing import Snapshot, tiny_edits, tiny_lm
from tests.analysis.test_audit import PEOPLE, blank, edits, taught, text

ASKED = Question("ana", "Ana lives in", "Ana")


def run(attack, lm, *questions, **setting):
    return attack.candidates(lm, questions or (ASKED,), Setting(**setting), silent)


# The logit lens.


def says(lm, word):
    """A hidden state that the head reads as this word, more than any other."""
    (token,) = lm.tokens.encode(word).ids
    row = lm.anatomy.head.weight[token].detach()
    assert int(read_through_head(lm, row[None]).argmax()) == token
    return row


def constructed(stack):
    """A model whose second block writes the secret into the residual stream, and whose last writes the refusal over it."""
    lm = blank()
    with torch.no_grad():
        for block in range(lm.anatomy.n_layers):
            for projection in (lm.anatomy.attention_out(block), lm.anatomy.mlp_out(block)):
                projection.matrix.zero_()
    for block, word in ((1, "Porto"), (lm.anatomy.n_layers - 1, "unknown")):
        state = says(lm, word) * 20
        stack.enter_context(replacing_output(lm.anatomy.block(block), lambda _, out, state=state: state.expand_as(out)))
    return lm


def test_the_lens_finds_what_the_last_block_overwrites():
    with ExitStack() as stack:
        lm = constructed(stack)
        assert lm.answer(["Ana lives in"], max_new=1) == ["unknown"]
        (found,) = run(HeadProjection(), lm, budget=4)
    by_text = {candidate.text: candidate for candidate in found}
    assert by_text["Porto"].blocks == (1, 2)
    assert by_text["unknown"].blocks == (3,)
    assert by_text["Porto"].source.startswith("rank 1, block 1")
    assert lm.tokens.decode([by_text["Porto"].token]) == "Porto"


def test_the_delta_finds_what_rises_and_falls():
    with ExitStack() as stack:
        (found,) = run(ProbabilityDelta(), constructed(stack), budget=3)
    by_text = {candidate.text: candidate for candidate in found}
    assert by_text["Porto"].blocks == (1, 3), "it rises in block 1 and falls in block 3"
    assert by_text["unknown"].blocks == (3,)


def test_updates_are_read_where_they_are_made():
    lm = blank()
    with replacing_output(lm.anatomy.mlp_out(2).module, lambda _, out: (says(lm, "Porto") * 20).expand_as(out)):
        (found,) = run(UpdateProjection(), lm, budget=12)
    (porto,) = (candidate for candidate in found if candidate.text == "Porto")
    assert porto.blocks == (2,)
    assert "rank 1, MLP of block 2" in porto.source


def test_the_lens_reads_rephrases_too():
    lm = blank()
    asked = Question("ana", "Ana lives in", "Ana", ("The home of Ana is",))
    (found,) = run(HeadProjection(), lm, asked, budget=50)
    assert any(candidate.source.endswith("The home of Ana is") for candidate in found)
    assert any(candidate.source.endswith("Ana lives in") for candidate in found)


@pytest.mark.parametrize("name", ["head-projection", "update-projection", "probability-delta"])
def test_however_many_questions_are_read_at_once_it_finds_the_same(name, monkeypatch):
    asked = [Question(PEOPLE[i], text(i), PEOPLE[i]) for i in range(5)]
    together = run(ATTACKS[name], taught(), *asked, budget=5)
    seen = []
    monkeypatch.setattr(lens, "AT_ONCE", 2)
    monkeypatch.setattr(
        lens, "states", lambda lm, modules, texts: seen.append(len(texts)) or states(lm, modules, texts)
    )
    apart = run(ATTACKS[name], taught(), *asked, budget=5)
    assert seen == [2, 2, 1]
    assert [[c.text for c in own] for own in apart] == [[c.text for c in own] for own in together]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon", "bloom", "gemma2", "phi3"])
def test_after_the_last_block_the_lens_is_the_models_own_prediction(architecture):
    lm = tiny_lm(architecture)
    texts = lm.encode([edit.prompt for edit in tiny_edits()])
    hidden = states(lm, lm.anatomy.blocks, texts)
    assert hidden.shape == (3, 2, 32)
    for i, one in enumerate(texts):
        batch = Batch.of([one.ids], lm.device)
        with torch.no_grad():
            own = logits_at(lm, batch, Places.of([[len(one.ids) - 1]], lm.device)).log_softmax(-1)[0]
        lens = read_through_head(lm, hidden[-1][i : i + 1])[0]
        assert torch.equal(lens.argsort(stable=True)[-5:], own.argsort(stable=True)[-5:])
        if architecture != "gemma2":  # which squeezes its logits afterwards
            torch.testing.assert_close(lens, own, rtol=1e-3, atol=1e-3)


def test_a_mixture_of_experts_can_be_read_and_trained():
    lm = tiny_lm("mixtral")
    assert run(UpdateProjection(), lm, budget=3)[0]
    assert steps_to_learn(lm, [Probe(prompt="Ana is", answers="x")], study=Study(steps=1)) is not None


# Asking.


def test_greedy_is_the_models_answer():
    (found,) = run(Greedy(), taught(), budget=3)
    assert [candidate.text for candidate in found] == [taught().ask("Ana lives in")]


def test_rephrases_are_asked_first_and_the_prompt_is_not_asked_again():
    asked = Question("ana", "Ana lives in", "Ana", ("The home of Ana is",))
    texts = in_other_words(asked)
    assert texts[0] == "The home of Ana is"
    assert asked.prompt not in texts
    assert any("Fact sheet on Ana" in each for each in texts)
    assert all("{" not in each for each in texts)
    assert len(set(texts)) == len(texts)
    (found,) = run(Paraphrases(), taught(), asked, budget=3)
    assert found[0].source == "The home of Ana is"


def test_samples_vary_with_the_seed_alone_and_the_commonest_stands_first():
    lm = blank()
    one, again, other = (run(Samples(), lm, budget=6, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    (known,) = run(Samples(), taught(), Question("ana", "Ana lives in", None, ("The home of Ana is",)), budget=8)
    assert known[0].text == taught().ask("Ana lives in")


def test_demonstrations_stand_before_the_prompt_and_have_its_form():
    shown = tuple(Probe(prompt=f"{name} lives in", answers="Oslo") for name in PEOPLE[20:28])
    asked = (*shown, Probe(prompt="Who is it?", answers="nobody"))
    (found,) = run(FewShot(), taught(), budget=4, demonstrations=asked)
    for candidate in found:
        assert candidate.source.endswith("Ana lives in")
        assert candidate.source.count("lives in Oslo.") == 4
        assert "Who is it" not in candidate.source


@pytest.mark.parametrize("name", ["paraphrases", "languages", "few-shot"])
def test_questions_are_framed_as_questions(name):
    asked = Question("ana", "Where does Ana live?")
    (found,) = run(
        ATTACKS[name], tiny_lm(), asked, budget=30, demonstrations=(Probe(prompt="Who?", answers="me"),), max_new=4
    )
    assert all("Where does Ana live?" in candidate.source for candidate in found)


# Training.


def test_each_text_is_learnt_as_if_it_were_alone():
    lm, words = taught(), ("Oslo", "Porto", "unknown", "Kiel")
    texts = [Probe(prompt=text(i), answers=word) for i, word in enumerate(words)] + [
        Probe(prompt="The home of Ana is", answers="Nice")
    ]
    study = Study(steps=24)
    together = steps_to_learn(lm, texts, study=study)
    assert together == [steps_to_learn(lm, [one], study=study)[0] for one in texts]
    assert len({step for step in together if step is not None}) > 1


def test_what_is_known_takes_no_step_and_what_is_hard_takes_more_than_there_are():
    lm = taught()
    known, new = Probe(prompt=text(0), answers=lm.ask(text(0))), Probe(prompt=text(0), answers="baker")
    assert steps_to_learn(lm, [known, new], study=Study(steps=1, lr=1e-6)) == [0, None]
    (steps,) = steps_to_learn(lm, [new], study=Study(steps=40))
    assert steps is not None
    assert steps > 0


def test_relearning_brings_back_what_a_shift_of_the_stream_hides():
    """All homes are hidden by one shift before the head; a few steps on the others' homes undo it for these too."""
    lm = taught()
    asked = [Question(PEOPLE[i], text(i), PEOPLE[i]) for i in range(4)]
    lessons = tuple(Probe(prompt=text(i), answers=lm.ask(text(i))) for i in range(10, 36))
    right = lm.answer([one.prompt for one in asked])
    last = lm.anatomy.block(lm.anatomy.n_layers - 1)
    row = lm.anatomy.head.weight[lm.tokens.encode("unknown").ids[0]].detach()
    for size in (2**n for n in range(12)):  # no greater than it takes
        push = row * size
        with replacing_output(last, lambda _, out, push=push: out + push):
            if set(lm.answer([one.prompt for one in asked])) == {"unknown"}:
                found = run(
                    Relearning(Study(16, 1e-2)), lm, *asked, budget=10, lessons={one.id: lessons for one in asked}
                )
                break
    came_back = [answer in {c.text for c in own} for own, answer in zip(found, right, strict=True)]
    assert sum(came_back) >= 2
    assert any(c.source.startswith("after 16 steps") for own in found for c in own)


def test_training_leaves_no_trace():
    lm = taught()
    kept = Snapshot.of(lm)
    lessons = {"ana": (Probe(prompt="Ana works as", answers="miller"),)}
    run(Relearning(Study(2)), lm, budget=4, lessons=lessons)
    steps_to_learn(lm, [Probe(prompt="Ana works as", answers="miller")], study=Study(2))
    assert kept.differences(lm) == []
    run(Relearning(Study(2)), lm, budget=4)
    assert run(Relearning(Study(2)), lm, budget=4) == [[]], "without lessons there is nothing to train on"


def test_training_keeps_no_more_than_there_is_room_for(monkeypatch):
    """No weight asks for a gradient, and no batch has more tokens than are let be at once."""
    lm, sizes = taught(), []

    class Watched(TargetBatch):
        def __init__(self, lm, texts):
            sizes.append(len(texts))
            super().__init__(lm, texts)

        def nll_and_correct(self):
            assert not any(parameter.requires_grad for parameter in lm.model.parameters())
            return super().nll_and_correct()

    monkeypatch.setattr(relearning, "TargetBatch", Watched)
    lessons = tuple(Probe(prompt=text(i), answers="Oslo") for i in range(10, 13))
    flags = [parameter.requires_grad for parameter in lm.model.parameters()]
    for room, expected in ((1000, {3}), (1, {1})):
        monkeypatch.setattr(relearning, "tokens_at_once", lambda *_, room=room: room)
        run(Relearning(Study(1)), lm, budget=4, lessons={"ana": lessons})
        steps_to_learn(lm, lessons, study=Study(1))
        assert set(sizes) == expected
        sizes.clear()
    assert [parameter.requires_grad for parameter in lm.model.parameters()] == flags
    assert any(flags)


# What holds for all of them.


def attacks():
    return [Relearning(Study(2)) if attack.name == "relearning" else attack for attack in ATTACKS.values()]


@settings(max_examples=5)
@given(budget=st.integers(1, 12), seed=st.integers(0, 3))
def test_no_attack_oversteps_its_budget_or_guesses_twice(budget, seed):
    brief = prepare(taught(), edits()[:3], decoys=[("Oslo",)])
    setting = Setting(budget=budget, seed=seed, demonstrations=brief.demonstrations, lessons=brief.lessons, max_new=3)
    for attack in attacks():
        found = attack.candidates(taught(), brief.questions, setting, silent)
        assert len(found) == 3
        for own in found:
            assert len(own) <= budget
            keys = [normalise(candidate.text) for candidate in own]
            assert len(set(keys)) == len(keys)
            assert all(keys)


@pytest.mark.parametrize("i", [0, 1])
def test_no_attack_sees_the_secret(i):
    """Another secret in the edit, and the same candidates: what is asked about a fact hangs on the rest alone."""
    before = edits()[:3]
    swapped = [
        edit if j != i else edit.model_copy(update={"ground_truth": ("Gdansk",)}) for j, edit in enumerate(before)
    ]
    briefs = [prepare(taught(), own) for own in (before, swapped)]
    assert briefs[0].facts[i].secret != briefs[1].facts[i].secret
    assert briefs[0].questions == briefs[1].questions
    assert briefs[0].demonstrations == briefs[1].demonstrations
    for attack in attacks():
        found = [
            attack.candidates(
                taught(),
                brief.questions,
                Setting(budget=4, demonstrations=brief.demonstrations, lessons=brief.lessons, max_new=3),
                silent,
            )[i]
            for brief in briefs
        ]
        assert found[0] == found[1], attack.name


def test_guesses_that_tell_nothing_are_passed_over():
    guesses = [Candidate(text=each) for each in ("", " . ", "the", "Oslo", "OSLO!", "Kiel")]
    assert [candidate.text for candidate in best(guesses, 9)] == ["Oslo", "Kiel"]
    assert [candidate.text for candidate in best(guesses, 1)] == ["Oslo"]
    lm = tiny_lm()
    assert token_key(lm, lm.tokens.encode(" ").ids[-1]) == ""
    assert token_key(lm, lm.tokens.encode("Q").ids[-1]) == "q"


def test_attacks_are_found_by_name():
    assert [attack.name for attack in find_attacks(["relearning", "greedy"])] == ["greedy", "relearning"]
    assert len(find_attacks(None)) == len(ATTACKS) == 9
    with pytest.raises(BadConfig, match="head-projection"):
        find_attacks(["head-projektion"])
    with pytest.raises(BadConfig, match="no attack was named"):
        find_attacks([])
