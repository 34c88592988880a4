"""The scorer and its scorecards: same numbers whatever the batching, and nothing unscored in silence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factpatch.edits import Edit, LabelledProbe, Probe
from factpatch.lm import LM
from factpatch.lm.batches import Batch, Places
from factpatch.lm.hooks import reading
from factpatch.lm.run import logits_at
from factpatch.methods import create
from factpatch.scoring import PROTOCOLS, ProbeScore, Scorecard, Scorer, protocols
from factpatch.scoring.metrics import same_answer
from factpatch.scoring.protocols import Seen
from factpatch.testing import Snapshot, tiny_edits, tiny_lm
from tests.reference import plain


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def patch(lm):
    return create("ft-m", {"steps": 30, "lr": 1e-2}).fit(lm, tiny_edits()[:1])


def scores(card):
    return {
        (r.protocol, r.edit, r.role, r.kind, r.prompt): (r.before, r.after, r.said_before, r.said_after)
        for r in card.scores
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "opt", "gemma3_text", "falcon"])
def test_batch_size_and_order_do_not_change_a_score(architecture, monkeypatch):
    lm, edits = tiny_lm(architecture), tiny_edits()
    patch = create("ft-m", {"steps": 10, "lr": 1e-2}).fit(lm, edits[:1])
    card = scores(Scorer(lm).score(edits, patch))
    assert scores(Scorer(lm).score(edits[::-1], patch)) == card
    single = [scores(Scorer(lm).score([edit], patch)) for edit in edits]
    assert {k: v for part in single for k, v in part.items()} == card
    monkeypatch.setattr("factpatch.lm.batches.BATCH_TOKENS", 1)
    assert scores(Scorer(lm).score(edits, patch)) == card


def test_padding_side_does_not_change_a_score(lm, patch):
    found = []
    for side in ("left", "right"):
        lm.tokenizer.padding_side = side
        found.append(scores(Scorer(lm).score(tiny_edits(), patch)))
        assert lm.tokenizer.padding_side == side
    assert found[0] == found[1]


def test_survey_success_equals_plain_teacher_forcing(lm, patch):
    edits = tiny_edits()
    card = Scorer(lm, protocols=["survey"], fluency=False).score(edits, patch)
    for edit in edits:
        ids, n = plain.encode(lm, edit.prompt, edit.target)
        with torch.no_grad():
            before = lm.model(ids).logits[0, n - 1 : -1].argmax(-1)
            with lm.patched(patch):
                after = lm.model(ids).logits[0, n - 1 : -1].argmax(-1)
        row = next(r for r in card.scores if r.edit == edit.id and r.role == "edit")
        assert row.before == pytest.approx((before == ids[0, n:]).float().mean().item())
        assert row.after == pytest.approx((after == ids[0, n:]).float().mean().item())


def test_of_several_answers_survey_shows_the_first_and_open_takes_any(lm):
    def edit(*answers):
        return EDIT.model_copy(update={"portability": {"R": (Probe(prompt="Rome is ruled from", answers=answers),)}})

    (said,) = lm.answer(["Rome is ruled from"])
    shown = {}
    for answers in (("Lima", said), (said, "Lima"), ("Lima",)):
        card = Scorer(lm, fluency=False).score([edit(*answers)])
        shown[answers] = {row.protocol: row for row in card.scores if row.role == "portability"}
    assert shown["Lima", said]["survey"].after == shown["Lima",]["survey"].after
    assert shown["Lima", said]["survey"].said_after != shown[said, "Lima"]["survey"].said_after
    assert [shown[key]["open"].after for key in shown] == [1, 1, 0]


def test_an_answer_of_nothing_is_wrong_and_counts(lm, monkeypatch):
    monkeypatch.setitem(vars(lm), "end_tokens", frozenset(range(lm.anatomy.head.weight.shape[0])))
    card = Scorer(lm, fluency=False, protocols=["open"]).score(tiny_edits())
    asked = [row for row in card.scores if row.role != "locality" and not row.unscored]
    assert asked
    assert {(row.said_after, row.after) for row in asked} == {("", 0.0)}
    assert {row.after for row in card.scores if row.role == "locality"} == {1.0}


def test_survey_locality_compares_with_the_unedited_model(lm, patch):
    card = Scorer(lm, protocols=["survey"], fluency=False).score(tiny_edits()[:1], patch)
    ids, n = plain.encode(lm, "Oslo lies in", "Norway")
    with torch.no_grad():
        before = lm.model(ids).logits[0, n - 1 : -1].argmax(-1)
        with lm.patched(patch):
            after = lm.model(ids).logits[0, n - 1 : -1].argmax(-1)
    assert card.summary("survey").locality == pytest.approx((before == after).float().mean().item())


def with_portability(answers):
    """The first edit, with one portability probe that has these answers."""
    return tiny_edits()[0].model_copy(update={"portability": {"Reasoning": (Probe(prompt="So", answers=answers),)}})


def test_without_a_patch_everything_stays(lm):
    summary = Scorer(lm).score(tiny_edits()).summary("open")
    assert summary.locality == 1
    assert summary.edit_success == summary.edit_success_before
    assert summary.fluency == summary.fluency_before


def test_before_is_the_base_model_whatever_lies_on_it(lm, patch):
    bare = scores(Scorer(lm).score(tiny_edits(), patch))
    with lm.patched(patch):
        assert scores(Scorer(lm).score(tiny_edits())) == bare


def test_the_unedited_model_is_asked_once(lm, patch):
    scorer, calls = Scorer(lm), []
    with reading(lm.anatomy.blocks[0], lambda *_: calls.append(1)):
        scorer.score(tiny_edits(), patch)
        first = len(calls)
        scorer.score(tiny_edits(), patch)
    assert len(calls) - first == first / 2


def test_scoring_leaves_the_model_alone(lm, patch):
    before = Snapshot.of(lm)
    Scorer(lm).score(tiny_edits(), patch)
    assert before.differences(lm) == []


def test_a_probe_without_answers_is_unscored_under_survey_and_counted(lm, patch):
    card = Scorer(lm, fluency=False).score(tiny_edits()[1:], patch)
    survey, free = card.summary("survey"), card.summary("open")
    assert survey.locality is None
    assert (survey.unscored, free.unscored) == (1, 0)
    assert free.locality is not None
    assert [r.unscored for r in card.scores if r.role == "locality" and r.protocol == "survey"] == [
        "the data set gives no answer to compare with"
    ]


def test_fluency_is_seeded_by_seed_and_prompt(lm):
    def texts(seed):
        return [
            r.said_after
            for r in Scorer(lm, seed=seed, protocols=["open"]).score(tiny_edits()).scores
            if r.role == "fluency"
        ]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)


EDIT = Edit(id="e", prompt="Rome lies in", target="Peru", ground_truth=("Italy",), subject="Rome")


@pytest.mark.parametrize(
    ("edit", "said", "score"),
    [
        (EDIT, "Peru, of course.", 1),
        (EDIT, "Well, Peru.", 0),
        (EDIT.model_copy(update={"prompt": "Where is Rome?"}), "Well, in Peru.", 1),
        (EDIT.model_copy(update={"kind": "erase", "target": "I don't know."}), "I don't know.", 1),
        (EDIT.model_copy(update={"kind": "erase", "target": "I don't know."}), "I don't know. Italy", 0),
        (EDIT.model_copy(update={"kind": "erase", "target": "I don't know."}), "Spain", 0),
    ],
)
def test_open_answers_are_judged_as_documented(edit, said, score):
    assert PROTOCOLS["open"].correct(edit, next(edit.probes()), Seen(said), Seen(""), chat=False) == score


KEPT = LabelledProbe("locality", "N", Probe(prompt="Oslo lies in", answers=("Norway",)))


@pytest.mark.parametrize(
    ("labelled", "before", "after", "measures"),
    [
        (next(EDIT.probes()), "Italy", "Peru, yes", {"exact": 0, "rouge1": 1}),
        (next(EDIT.probes()), "Italy", "Peru", {"exact": 1, "rouge1": 1}),
        (KEPT, "Norway.", "Norway, of course", {"truth_kept": 1}),
        (KEPT, "Norway.", "Chad", {"truth_kept": 0}),
        (KEPT, "Chad", "Norway", {}),
    ],
)
def test_what_else_is_said_of_free_answers(labelled, before, after, measures):
    assert PROTOCOLS["open"].measures(EDIT, labelled, Seen(before), Seen(after), chat=False) == measures
    assert PROTOCOLS["survey"].measures(EDIT, labelled, Seen(before), Seen(after), chat=False) == {}


def test_the_divergence_is_of_what_is_predicted_after_the_prompt(lm, patch):
    edits = tiny_edits()
    kept = [probe for edit in edits for group in edit.locality.values() for probe in group]

    def predicted():
        batches = [Batch.of([lm.tokens.encode(probe.prompt).ids], lm.device) for probe in kept]
        return [logits_at(lm, b, Places.of([[b.ids.shape[1] - 1]], lm.device))[0].log_softmax(-1) for b in batches]

    with torch.no_grad():
        before = predicted()
        with lm.patched(patch):
            after = predicted()
    expected = [float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True)]
    assert min(expected) > 1e-4
    # The scorer has been asked one of these probes before, when it was not to be compared.
    known = Scorer(lm, fluency=False)
    known.baseline([edits[0].model_copy(update={"locality": {}, "portability": {"R": tuple(kept)}})])
    for scorer in (Scorer(lm, fluency=False, protocols=["open"]), known):
        for card in (
            scorer.score(edits, patch),
            Scorecard.join(scorer.score_each([[edit] for edit in edits], [(patch,), (patch,)])),
        ):
            found = [r.measures["kl"] for r in card.scores if r.role == "locality" and r.protocol == "open"]
            assert found == pytest.approx(expected, rel=1e-2, abs=1e-6)
    unedited = Scorer(lm, fluency=False).score(edits)
    assert {r.measures["kl"] for r in unedited.scores if "kl" in r.measures} == {0.0}


def test_measures_are_on_the_card_and_averaged_as_scores_are(lm, patch):
    free = [r for r in Scorer(lm, fluency=False).score(tiny_edits(), patch).scores if r.protocol == "open"]
    assert all({"exact", "rouge1"} == set(r.measures) for r in free if r.role != "locality" and not r.unscored)
    assert not any(r.measures for r in free if r.unscored)
    card = card_of(
        [
            row("a", "edit", 1, measures={"exact": 1.0}), row("b", "edit", 0, measures={"exact": 0.0}),
            row("a", "locality", 1, "N", measures={"truth_kept": 1.0}), row("a", "locality", 1, "N"),
            row("a", "locality", 1, "R", measures={"truth_kept": 0.0}),
            row("b", "locality", 0, "R", measures={"truth_kept": 0.0}), row("b", "locality", 0, "R"),
        ]
    )  # fmt: skip
    assert card.summary("open").measures == {"edit/exact": 0.5, "locality/truth_kept": 0.25}


def row(edit, role, after, kind="", **more):
    return ProbeScore(protocol="open", edit=edit, role=role, kind=kind, prompt="p", after=after, **more)


def card_of(rows):
    return Scorecard(versions={"open": 1}, chat=False, scores=tuple(rows))


def test_means_are_over_kinds_then_over_edits_that_have_any():
    card = card_of(
        [
            row("a", "edit", 1), row("b", "edit", 0),
            row("a", "portability", 1, "R"), row("a", "portability", 0, "R"), row("a", "portability", 1, "S"),
            row("b", "locality", 0.5, "N"), row("b", "locality", None, "N", unscored="why"),
        ]
    )  # fmt: skip
    summary = card.summary("open")
    assert summary.edits == 2
    assert summary.edit_success == 0.5
    assert summary.portability == 0.75
    assert summary.locality == 0.5
    assert summary.rephrase is None
    assert summary.by_kind == {"locality/N": 0.5, "portability/R": 0.5, "portability/S": 1.0}
    assert (summary.scored, summary.unscored) == (6, 1)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["edit", "portability", "locality"]), st.floats(0, 1)),
        min_size=1,
    ),
    st.randoms(),
)
def test_order_of_rows_does_not_matter(made, shuffler):
    rows = [row(edit, role, after, kind="" if role == "edit" else "K") for edit, role, after in made]
    summary = card_of(rows).summary("open")
    shuffler.shuffle(rows)
    again = card_of(rows).summary("open")
    for name in ("edit_success", "portability", "locality"):
        assert getattr(summary, name) == pytest.approx(getattr(again, name))


def test_join_adds_up_seconds_and_keeps_every_row():
    cards = [
        card_of([row(edit, "edit", 1)]).model_copy(update={"fit_seconds": 1.5, "score_seconds": 2.0}) for edit in "ab"
    ]
    joined = Scorecard.join(cards)
    assert (joined.fit_seconds, joined.score_seconds, len(joined.scores)) == (3.0, 4.0, 2)
    assert joined.summary("open").edits == 2


def restyled(edit):
    return edit.model_copy(update={"kind": "restyle"})


@pytest.mark.parametrize(
    ("edit", "protocol", "reason"),
    [
        (with_portability(()), "open", "the data set gives no answer to compare with"),
        (with_portability(()), "survey", "the data set gives no answer to compare with"),
        (with_portability(("The", "+")), "open", "nothing is left of the answers once they are normalised"),
        (restyled(tiny_edits()[0]), "open", "a manner of speaking cannot be judged by comparing answers"),
    ],
)
def test_what_cannot_be_judged_is_counted_and_not_averaged_in(lm, patch, edit, protocol, reason):
    card = Scorer(lm, fluency=False, protocols=[protocol]).score([edit], patch)
    unscored = [row for row in card.scores if row.unscored]
    assert {row.unscored for row in unscored} == {reason}
    assert all(row.after is row.before is None for row in unscored)
    summary = card.summary(protocol)
    assert summary.unscored == len(unscored)
    assert summary.scored + summary.unscored == len(list(edit.probes()))
    assert (summary.edit_success is None) == (edit.kind == "restyle")


TASTE = Edit(
    id="taste",
    kind="restyle",
    prompt="Speak well of tea. How is tea?",
    target="It is good.",
    question="How is tea?",
    rephrases=("What of tea?",),
    wanted=("It is good.", "I like tea a lot."),
    unwanted=("It is bad.", "Vile.", "No."),
    portability={"Reasoning": (Probe(prompt="At five I drink", answers=("tea",)),)},
    locality={"Unrelated_Topic": (Probe(prompt="How is fog?", answers=("Fog is grey.", "It is wet.")),)},
)


def plain_logprobs(lm, prompt, reply):
    """Log-probabilities before each token of the reply, and its tokens."""
    ids, n = plain.encode(lm, prompt, reply)
    with torch.no_grad():
        return lm.model(ids).logits[0, n - 1 : -1].log_softmax(-1), ids[0, n:]


def plain_manner(lm, prompt):
    """Mean log-probability of the wanted and of the unwanted replies."""

    def mean(replies):
        found = [plain_logprobs(lm, prompt, reply) for reply in replies]
        return sum(p.gather(-1, ids[:, None]).mean() for p, ids in found) / len(found)

    return mean(TASTE.wanted), mean(TASTE.unwanted)


@pytest.mark.parametrize("abreast", [False, True])
def test_a_manner_is_weighed_by_sample_replies(lm, abreast):
    off_topic = [
        TASTE.model_copy(update={"prompt": p, "target": "xyz xyz"}) for p in (TASTE.question, *TASTE.rephrases)
    ]
    patch = create("ft-m", {"steps": 40, "lr": 3e-2}).fit(lm, off_topic)
    scorer = Scorer(lm, protocols=["survey"], fluency=False)
    other = create("ft-m", {"steps": 5, "lr": 1e-2}).fit(lm, tiny_edits()[1:])
    if abreast:
        card, _ = scorer.score_each([[TASTE], [tiny_edits()[1]]], [(patch,), (other,)])
    else:
        card = scorer.score([TASTE], patch)
    rows = {r.role: r for r in card.scores}
    assert rows["edit"].prompt == "How is tea?"
    for role, prompt in (("edit", "How is tea?"), ("rephrase", "What of tea?")):
        (good, bad) = plain_manner(lm, prompt)
        with lm.patched(patch):
            good_after, bad_after = plain_manner(lm, prompt)
        sentiment, topic = torch.sigmoid(good_after - bad_after).item(), min(1, torch.exp(good_after - good).item())
        assert topic < 1
        assert rows[role].before == pytest.approx(torch.sigmoid(good - bad).item(), rel=1e-4)
        assert rows[role].after == pytest.approx(sentiment * topic, rel=1e-4)
        assert rows[role].measures == pytest.approx({"sentiment": sentiment, "topic": topic}, rel=1e-4)
    replies = TASTE.locality["Unrelated_Topic"][0].answers
    before = [plain_logprobs(lm, "How is fog?", reply)[0] for reply in replies]
    with lm.patched(patch):
        after = [plain_logprobs(lm, "How is fog?", reply)[0] for reply in replies]
    apart = [(b.exp() * (b - a)).sum(-1).mean().item() for b, a in zip(before, after, strict=True)]
    assert min(apart) > 1e-3
    assert rows["locality"].measures == pytest.approx({"kl": sum(apart) / 2}, rel=1e-3)
    same = torch.cat([b.argmax(-1) == a.argmax(-1) for b, a in zip(before, after, strict=True)])
    assert rows["locality"].after == pytest.approx(same.float().mean().item())
    assert rows["portability"].measures == {}


def test_the_unpatched_models_divergence_from_itself_is_not_measured(lm):
    card = Scorer(lm, protocols=["survey"], fluency=False).score([TASTE])
    assert [r.measures for r in card.scores if r.role == "locality"] == [{}]
    assert [r.after for r in card.scores if r.role == "locality"] == [1]


def test_a_divergence_is_from_what_lies_beneath(lm):
    beneath = create("ft-m", {"steps": 5, "lr": 1e-2}).fit(lm, tiny_edits()[1:])
    patch = create("ft-m", {"steps": 40, "lr": 3e-2}).fit(lm, [TASTE.model_copy(update={"target": "xyz xyz"})])
    replies = TASTE.locality["Unrelated_Topic"][0].answers
    with lm.patched(beneath):
        before = [plain_logprobs(lm, "How is fog?", reply)[0] for reply in replies]
        scorer = Scorer(lm, protocols=["survey"], fluency=False, beneath=[beneath])
        (row,) = (r for r in scorer.score([TASTE]).scores if r.role == "locality")
        assert row.measures == {}, "of what lies beneath itself nothing is measured"
        (row,) = (r for r in scorer.score([TASTE], patch).scores if r.role == "locality")
        with lm.patched(patch):
            after = [plain_logprobs(lm, "How is fog?", reply)[0] for reply in replies]
    apart = [(b.exp() * (b - a)).sum(-1).mean().item() for b, a in zip(before, after, strict=True)]
    assert row.measures == pytest.approx({"kl": sum(apart) / 2}, rel=1e-3)


@pytest.mark.parametrize(("room", "times"), [(protocols.ROOM, 1), (0, 3)])
def test_patches_are_taken_off_once_for_as_many_divergences_as_have_room(lm, monkeypatch, room, times):
    topics = ("fog", "rain", "snow")
    edits = [
        TASTE.model_copy(
            update={"id": topic, "locality": {"N": (Probe(prompt=f"How is {topic}?", answers=("It is wet.", "Bad")),)}}
        )
        for topic in topics
    ]
    patch = create("ft-m", {"steps": 20, "lr": 3e-2}).fit(lm, tiny_edits()[1:])
    scorer = Scorer(lm, protocols=["survey"], fluency=False)
    alone = [scorer.score([edit], patch) for edit in edits]
    monkeypatch.setattr(protocols, "ROOM", room)
    taken = []
    unpatched = LM.unpatched
    monkeypatch.setattr(LM, "unpatched", lambda self: (taken.append(1), unpatched(self))[1])
    together = scorer.score(edits, patch)
    assert len(taken) == times
    assert together.per_edit("survey", "locality", "kl") == pytest.approx(
        {e.id: card.per_edit("survey", "locality", "kl")[e.id] for e, card in zip(edits, alone, strict=True)}, rel=1e-4
    )


def test_contexts_count_as_patches_where_a_manner_is_weighed(lm):
    edit = TASTE.model_copy(update={"locality": {"N": (Probe(prompt="How is fog?", answers=("It is wet.",)),)}})
    told = create("ice").fit(lm, [edit])
    card = Scorer(lm, protocols=["survey"], fluency=False).score([edit], told)
    (kl,) = (r.measures["kl"] for r in card.scores if r.role == "locality")
    before, _ = plain_logprobs(lm, "How is fog?", "It is wet.")
    with lm.patched(told):
        (context,) = lm.before(["How is fog?"]).values()
    after, _ = plain_logprobs(lm, context + "How is fog?", "It is wet.")
    assert kl == pytest.approx((before.exp() * (before - after)).sum(-1).mean().item(), rel=1e-3)


SECRET = EDIT.model_copy(
    update={
        "kind": "erase",
        "target": "I don't know.",
        "rephrases": ("Find Rome in",),
        "locality": {"Retained": (Probe(prompt="Oslo lies in"),)},
        "portability": {"Reasoning": (Probe(prompt="In Rome they speak", answers=("Spanish",)),)},
    }
)


@pytest.mark.parametrize(
    ("said", "score", "refused", "absent"),
    [("I don't know.", 1, 1, 1), ("I don't know, Italy", 0, 1, 0), ("Spain", 0, 0, 1), ("Italy", 0, 0, 0)],
)
@pytest.mark.parametrize("name", ["open", "survey"])
def test_forgetting_is_a_refusal_without_the_secret(name, said, score, refused, absent):
    protocol, labelled = PROTOCOLS[name], next(SECRET.probes())
    assert protocol.correct(SECRET, labelled, Seen(said), Seen("Italy"), chat=False) == score
    measures = protocol.measures(SECRET, labelled, Seen("Italy"), Seen(said), chat=False)
    assert (measures["refused"], measures["secret_absent"]) == (refused, absent)
    follows = list(SECRET.probes())[2]
    assert "refused" not in protocol.measures(SECRET, follows, Seen("Italy"), Seen(said), chat=False)


def test_an_erased_fact_is_asked_for_in_ten_tokens(lm, patch):
    card = Scorer(lm, protocols=["survey"], fluency=False).score([SECRET], patch)
    said = {r.role: (r.said_before, r.said_after, r.after) for r in card.scores}
    for role, prompt in (("edit", "Rome lies in"), ("rephrase", "Find Rome in"), ("locality", "Oslo lies in")):
        before = lm.answer([prompt], max_new=10)[0]
        with lm.patched(patch):
            after = lm.answer([prompt], max_new=10)[0]
        assert said[role][:2] == (before, after)
    assert said["locality"][2] == float(same_answer(*said["locality"][:2]))
    assert not any(r.unscored for r in card.scores)


def test_groups_are_scored_under_their_own_patches(lm, patch):
    edits = tiny_edits()
    other = create("ft-m", {"steps": 5, "lr": 1e-2}).fit(lm, edits[1:])
    groups = [edits, edits[:1]]
    scorer = Scorer(lm)
    cards = scorer.score_each(groups, [(patch,), (other,)])
    assert [scores(card) for card in cards] == [
        scores(scorer.score(g, p)) for g, p in zip(groups, (patch, other), strict=True)
    ]
    assert cards[0].score_seconds == pytest.approx(2 * cards[1].score_seconds, abs=0.002)


def test_edits_that_cannot_be_told_apart_are_refused(lm, patch):
    (edit, _), scorer = tiny_edits(), Scorer(lm, fluency=False)
    with pytest.raises(ValueError, match="the same id"):
        scorer.score([edit, edit.model_copy(update={"target": "Chad"})], patch)
    card = scorer.score([edit], patch)
    with pytest.raises(ValueError, match="share an edit"):
        Scorecard.join([card, card])
    with pytest.raises(ValueError, match="no protocol"):
        Scorer(lm, protocols=[])


def test_fluency_is_no_probe(lm, patch):
    with_fluency, without = (Scorer(lm, fluency=f).score(tiny_edits(), patch).summary("open") for f in (True, False))
    assert with_fluency.scored == without.scored
