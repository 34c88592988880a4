"""The health monitor: what it measures, what it says, and where it stops a sequence."""

import logging
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from factpatch.analysis import health
from factpatch.analysis.health import Health, Monitor, Sign, Verdict, Vitals, check, edit_until_sick, judge
from factpatch.edits import Edit, Probe
from factpatch.errors import CannotEdit
from factpatch.lm.base import BaseLM
from factpatch.methods import Config, Method, Traits, create
from factpatch.patches import WeightPatch
from factpatch.scoring import Retained
from factpatch.scoring.guard import ANSWER_TOKENS, perplexity
from factpatch.scoring.protocols import says
from factpatch.testing import Snapshot, tiny_edits, tiny_lm

TEXTS = ("Rome was a town once.", "So it is said of it.")
PROMPTS = [
    f"{name} lies in" for name in ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Bonn", "Bern", "Riga", "Kyiv", "Baku")
]
QUICK = {"layer": 1, "steps": 8}


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def known(lm):
    """Questions that the tiny model happens to answer "rightly": with what it says."""
    said = lm.answer(PROMPTS, max_new=ANSWER_TOKENS)
    found = [Probe(prompt=p, answers=(a,)) for p, a in zip(PROMPTS, said, strict=True) if a.strip()]
    found = [
        probe
        for probe, a in zip(found, lm.answer([p.prompt for p in found], max_new=ANSWER_TOKENS), strict=True)
        if says(probe, a, chat=False)
    ]
    assert len(found) >= 3
    return tuple(found)


def some(n):
    return [
        Edit(id=f"e{i}", prompt=f"Town {i} lies in", subject=f"Town {i}", target=f"{chr(65 + i)}ria") for i in range(n)
    ]


def test_norm_is_that_of_the_summed_change_over_all_weights(lm):
    method = create("ft-m", QUICK | {"lr": 1e-2})
    monitor = Monitor(lm, texts=TEXTS, canaries=())
    before, all_before = Snapshot.of(lm), torch.cat([p.data.flatten().double() for p in lm.model.parameters()])
    one = method.fit(lm, tiny_edits()[:1])
    with lm.patched(one):
        two = create("ft-m", QUICK | {"lr": 1e-2, "layer": 2}).fit(lm, tiny_edits()[1:])
    with lm.patched(one, two):
        now = torch.cat([p.data.flatten().double() for p in lm.model.parameters()])
        vitals = monitor.vitals()
        assert vitals.norm == pytest.approx(float((now - all_before).norm() / all_before.norm()), rel=1e-5)
        assert vitals.perplexity == pytest.approx(perplexity(lm, TEXTS))
    assert vitals.perplexity_ratio == pytest.approx(vitals.perplexity / perplexity(lm, TEXTS))
    assert vitals.norm > 1e-4
    assert monitor.vitals().norm == 0
    assert monitor.vitals() == monitor.unedited()
    assert before.differences(lm) == []


class NoFloat64(TorchFunctionMode):
    """Stands for a device without float64, such as Apple's: only what was fetched from it may become that."""

    def __init__(self):
        super().__init__()
        self.fetched = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not isinstance(found, torch.Tensor):
            return found
        if func is torch.Tensor.cpu or any(one is other for one in args for other in self.fetched):
            self.fetched.append(found)
        else:
            assert found.dtype != torch.float64, func
        return found


def test_norms_are_taken_without_float64_on_the_device(lm):
    patch = create("ft-m", QUICK | {"lr": 1e-2}).fit(lm, tiny_edits()[:1])
    with NoFloat64() as mode:
        monitor = Monitor(lm, texts=TEXTS, canaries=())
        with lm.patched(patch):
            assert monitor.vitals().norm > 1e-4
    assert mode.fetched


def test_patches_that_change_no_weights_have_norm_0(lm):
    patch = create("grace", {"layer": 1, "steps": 5}).fit(lm, tiny_edits()[:1])
    with lm.patched(patch):
        assert Monitor(lm, texts=TEXTS, canaries=()).vitals().norm == 0


def test_what_lies_on_the_model_when_the_monitor_is_made_counts(lm):
    patch = create("ft-m", QUICK | {"lr": 1e-2}).fit(lm, tiny_edits()[:1])
    late = Monitor(lm, texts=TEXTS, canaries=())
    with lm.patched(patch):
        assert Monitor(lm, texts=TEXTS, canaries=()).vitals() == late.vitals()
        assert late.vitals().perplexity_ratio != 1


def test_canaries_are_what_the_unedited_model_knows(lm, known):
    wrong = Probe(prompt="Who is it?", answers=("nobody at all",))
    unknown = Probe(prompt=known[0].prompt + " ")
    monitor = Monitor(lm, texts=TEXTS, canaries=(*known, wrong, unknown))
    vitals = monitor.vitals()
    assert [q.prompt for q in vitals.canaries] == [*(p.prompt for p in known), unknown.prompt]
    assert (vitals.canaries_kept, vitals.canaries_lost, vitals.right) == (1, 0, len(known))
    patch = create("ft-m", {"layer": 1, "steps": 40, "lr": 3e-2}).fit(lm, tiny_edits()[:1])
    with lm.patched(patch):
        now = monitor.vitals()
        said = lm.answer([p.prompt for p in known], max_new=ANSWER_TOKENS)
    right = sum(says(probe, one, chat=False) for probe, one in zip(known, said, strict=True))
    assert now.right == right < len(known)
    assert now.canaries_lost == len(known) - right + now.questions[-1].changed
    assert now.canaries_kept == (len(known) + 1 - now.canaries_lost) / (len(known) + 1)


def asked(kept, lost=0, wrong=0):
    common = {"prompt": "q", "answers": ("x",), "before": "x", "after": "x"}
    return tuple(
        [Retained(**common, changed=False, was_right=True, is_right=True)] * kept
        + [Retained(**common, changed=True, was_right=True, is_right=False)] * lost
        + [Retained(**common, changed=True, was_right=False, is_right=False)] * wrong
    )


@pytest.mark.parametrize(
    ("norm", "ratio", "questions", "sick"),
    [
        (0.0, 1.0, asked(10), set()),
        (0.1, 2.0, asked(9, 1), set()),  # on the limit
        (0.1001, 2.0, asked(9, 1), {"norm"}),
        (0.0, 2.01, asked(9, 1), {"perplexity"}),
        (0.0, 0.5, asked(8, 1), {"canaries"}),
        (0.0, 1.0, asked(9, 1, wrong=50), set()),  # what was wrong before is no canary
        (1.0, math.inf, asked(0, 1), {"norm", "perplexity", "canaries"}),
        (math.nan, math.nan, asked(1), {"norm", "perplexity"}),
        (None, None, (), set()),
    ],
)
def test_the_verdict_by_hand(norm, ratio, questions, sick):
    vitals = Vitals(norm=norm, perplexity=ratio and ratio * 4, perplexity_before=ratio and 4.0, questions=questions)
    verdict = judge(vitals, Health(max_norm=0.1, max_perplexity=2.0, min_canaries=0.9))
    assert verdict.healthy is (not sick)
    assert {sign.name for sign in verdict.signs if not sign.healthy} == sick
    assert [sign.limit for sign in verdict.signs] == [0.1, 2.0, 0.9]
    words = {"norm": "weights have moved", "perplexity": "Perplexity", "canaries": "canary facts are lost"}
    assert {name for name, word in words.items() if word.lower() in verdict.reason.lower()} == sick
    assert verdict.unmeasured == (() if norm is not None else ("norm", "perplexity", "canaries"))
    assert Verdict.model_validate_json(verdict.model_dump_json()).reason == verdict.reason


def test_what_is_not_watched_has_no_sign():
    vitals = Vitals(norm=9.0, perplexity=9.0, perplexity_before=1.0, questions=asked(0, 9))
    assert judge(vitals, Health(max_norm=None, max_perplexity=None, min_canaries=None)).signs == ()
    (sign,) = judge(vitals, Health(max_norm=None, min_canaries=None)).signs
    assert sign == Sign(name="perplexity", value=9.0, limit=2.0, healthy=False)


def test_check_in_one_go(lm):
    before = Snapshot.of(lm)
    assert check(lm, texts=TEXTS, canaries=()).healthy
    patch = create("ft-m", QUICK | {"lr": 1.0}).fit(lm, tiny_edits()[:1])
    with lm.patched(patch):
        verdict = check(lm, Health(max_norm=0.01), texts=TEXTS, canaries=())
        assert lm.patches == (patch,)
    assert not verdict.healthy
    assert "weights have moved" in verdict.reason
    assert before.differences(lm) == []


class _Asked(BaseLM):
    fingerprint = "f"

    def answer(self, prompts, *, chat=False, max_new=64):
        return ["Peru"] * len(prompts)

    def describe(self):
        return {}


def test_a_model_that_can_only_be_asked_has_canaries_alone():
    verdict = check(_Asked("far"), canaries=[Probe(prompt="Rome lies in", answers=("Peru",))])
    assert verdict.healthy
    assert verdict.unmeasured == ("norm", "perplexity")


# Sequences


@pytest.fixture(scope="module")
def broken(lm, known):
    """A method with far too great a learning rate: its edits, and by the plainest loop there is its patches and the vitals
    after each of them."""
    method, edits = create("ft-m", QUICK | {"lr": 1e-2}), some(9)
    # What the model likes to say: perplexity on that grows as it is ruined.
    texts = [f"{probe.prompt} {probe.answers[0]}" for probe in known]
    monitor = Monitor(lm, texts=texts, canaries=())
    vitals, patches = [monitor.vitals()], []
    for edit in edits:
        with lm.patched(*patches):
            patches.append(method.fit(lm, [edit]))
        with lm.patched(*patches):
            vitals.append(monitor.vitals())
    return method, edits, texts, vitals, patches


@pytest.mark.parametrize("measure", ["norm", "perplexity"])
def test_a_method_that_breaks_is_stopped_exactly_where_brute_force_says(lm, broken, measure):
    method, edits, texts, vitals, patches = broken
    if measure == "norm":
        first = 6
        assert all(one.norm < other.norm for one, other in pairwise(vitals)), "it only grows"
        limits = Health(max_norm=(vitals[5].norm + vitals[6].norm) / 2, max_perplexity=None)
    else:
        ratios = [one.perplexity_ratio for one in vitals]
        first = ratios.index(max(ratios))
        assert first >= 4, ratios
        limits = Health(max_norm=None, max_perplexity=(max(ratios[:first]) + ratios[first]) / 2)
        edits = edits[:first]  # beyond, it may be well again
    verdicts = [judge(one, limits) for one in vitals]
    assert [one.healthy for one in verdicts[: len(edits) + 1]] == [True] * first + [False] * (len(edits) + 1 - first)
    before = Snapshot.of(lm)
    for every in (1, 4, 20):
        found = edit_until_sick(lm, method, edits, every=every, monitor=Monitor(lm, limits, texts=texts, canaries=()))
        assert before.differences(lm) == []
        assert [patch.id for patch in found.patches] == [patch.id for patch in patches[: first - 1]]
        assert found.edits == tuple((edit.id,) for edit in edits[: first - 1])
        assert found.culprit == (edits[first - 1].id,)
        assert found.stopped_early
        assert found.verdict.signs[0].value == pytest.approx(verdicts[first].signs[0].value)
        assert [c.verdict.healthy for c in found.checks] == [verdicts[c.patches].healthy for c in found.checks]


def test_a_healthy_sequence_goes_to_its_end(lm):
    monitor = Monitor(lm, Health(max_perplexity=None), texts=TEXTS, canaries=())
    found = edit_until_sick(lm, create("ft-m", QUICK | {"lr": 1e-5}), some(5), every=2, monitor=monitor)
    assert not found.stopped_early
    assert len(found.patches) == 5
    assert found.culprit == ()
    assert [c.patches for c in found.checks] == [0, 2, 4, 5]


class Nothing(Method[Config]):
    """Makes patches that change nothing, and refuses some edits."""

    name = "nothing"
    config_type = Config
    traits = Traits(family="test", phase="mastery", paper="none", patch=WeightPatch)

    def make(self, lm, edits, config, progress):
        if edits[0].target == "no":
            raise CannotEdit("it will not")
        return WeightPatch(self.provenance(lm, config, edits), {})


class Script:
    """Says how the model is by how many patches lie on it."""

    def __init__(self, lm, healthy):
        self.lm, self.healthy, self.asked = lm, healthy, []

    def check(self):
        self.asked.append(len(self.lm.patches))
        return Verdict(healthy=self.healthy[len(self.lm.patches)], signs=(), reason=str(len(self.lm.patches)))


def scripted(lm, healthy, every, monkeypatch, refused=()):
    script = Script(lm, healthy)
    monkeypatch.setattr(Monitor, "check", lambda self: script.check())
    edits = [
        Edit(id=f"e{i}", prompt="p", target="no" if i in refused else "t")
        for i in range(len(healthy) - 1 + len(refused))
    ]
    return edit_until_sick(lm, Nothing(), edits, every=every, monitor=Monitor(lm, texts=TEXTS, canaries=())), script


@given(st.lists(st.booleans(), min_size=1, max_size=14), st.integers(1, 6))
@settings(max_examples=40)
def test_with_the_patches_returned_it_was_healthy_and_with_one_more_it_was_not(healthy, every):
    lm = tiny_lm_once()
    with pytest.MonkeyPatch.context() as patch:
        found, script = scripted(lm, healthy, every, patch)
    n, good = len(healthy) - 1, len(found.patches)
    assert found.units == n
    looked = [0, *range(every, n + 1, every), *([n] if n % every else [])]
    expected = next((count for count in looked if not healthy[count]), None)
    assert found.stopped_early is (expected is not None)
    assert lm.patches == ()
    if expected is None:
        assert good == n
    elif expected:
        assert healthy[good]
        assert not healthy[good + 1]
        assert good < expected <= good + every
        assert found.culprit == (f"e{good}",)
        assert found.verdict.reason == str(good + 1)
        assert len(script.asked) <= looked.index(expected) + 1 + math.ceil(math.log2(every or 1)) + 1
    else:
        assert (good, found.culprit) == (0, ())


_TINY = []


def tiny_lm_once():
    if not _TINY:
        _TINY.append(tiny_lm())
    return _TINY[0]


def test_refused_edits_do_not_count_and_are_told(lm, monkeypatch):
    found, script = scripted(lm, [True] * 4 + [False] * 2, 2, monkeypatch, refused=(1, 6))
    assert [ids for (ids,) in found.edits] == ["e0", "e2", "e3"]
    assert found.culprit == ("e4",)
    assert [failure.edit for failure in found.failures] == ["e1"]
    assert found.failures[0].reason == "it will not"
    assert script.asked == [0, 2, 4, 3]


def test_the_last_patches_are_looked_at_also_when_the_last_edit_is_refused(lm, monkeypatch):
    found, script = scripted(lm, [True, True, True, False], 2, monkeypatch, refused=(3,))
    assert script.asked == [0, 2, 3]
    assert found.culprit == ("e2",)


def test_a_model_that_is_sick_already_gets_no_edit(lm, monkeypatch):
    monkeypatch.setattr(Nothing, "make", lambda *_: pytest.fail("it was edited"))
    found, _ = scripted(lm, [False, False], 1, monkeypatch)
    assert (found.patches, found.culprit, found.stopped_early) == ((), (), True)


def test_what_makes_no_sense_is_refused(lm):
    monitor = Monitor(lm, texts=TEXTS, canaries=())
    with pytest.raises(ValueError, match="every"):
        edit_until_sick(lm, Nothing(), some(1), every=0)
    with pytest.raises(ValueError, match="monitor"):
        edit_until_sick(lm, Nothing(), some(1), Health(), monitor=monitor)


def test_an_error_leaves_nothing_on_the_model(lm, monkeypatch):
    before = Snapshot.of(lm)
    calls = []

    def failing(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Verdict(healthy=True, signs=(), reason="")

    monkeypatch.setattr(Monitor, "check", failing)
    with pytest.raises(KeyboardInterrupt):
        edit_until_sick(lm, create("ft-m", QUICK), some(4), every=1, monitor=Monitor(lm, texts=TEXTS, canaries=()))
    assert before.differences(lm) == []


@pytest.mark.parametrize(("method", "settings"), [("ft-m", QUICK), ("rome", {"layer": 1, "steps": 2, "contexts": 0})])
@pytest.mark.parametrize("room", ["enough", "a byte less", "none"])
def test_that_copies_will_have_no_room_is_said_once_after_the_first_patch(
    lm, monkeypatch, caplog, method, settings, room
):
    small = {"moment_tokens": 300, "moment_length": 30} if method == "rome" else {}
    weight = lm.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    # A dense change lies beside the copy that it made; factors are two vectors.
    each = weight.nbytes + (weight.nbytes if method == "ft-m" else 4 * sum(weight.shape))
    free = {"enough": 3 * each, "a byte less": 3 * each - 1, "none": 0}[room]
    monkeypatch.setattr(health, "_free", lambda _: free)
    monitor = Monitor(lm, Health(max_norm=None, max_perplexity=None), texts=TEXTS, canaries=())
    with caplog.at_level(logging.WARNING, logger="factpatch"):
        found = edit_until_sick(lm, create(method, settings | small), some(4), monitor=monitor)
    assert len(found.patches) == 4, "it goes on all the same"
    told = [record.message for record in caplog.records if "keeps" in record.message]
    assert len(told) == (0 if room == "enough" else 1)
    assert all(one.startswith(f"{method}: each patch keeps") and "Make fewer edits" in one for one in told)


def test_patches_that_copy_no_weights_need_no_room(lm, monkeypatch, caplog):
    monkeypatch.setattr(health, "_free", lambda _: 0)
    monitor = Monitor(lm, Health(max_perplexity=None), texts=TEXTS, canaries=())
    edit_until_sick(lm, create("grace", {"layer": 1, "steps": 2}), some(3), monitor=monitor)
    assert not [record for record in caplog.records if "keeps" in record.message]
