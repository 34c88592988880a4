"""The sweep that locates: on methods whose best block is known, on curves whose peak is known, cut off and gone on with."""

import json
from functools import lru_cache
from statistics import fmean

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from factpatch.analysis import locate as module
from factpatch.analysis import locate_result as result
from factpatch.analysis.facts import Fact
from factpatch.analysis.locate import Located, keep, locate
from factpatch.analysis.locate_result import Trial, best_of, supports
from factpatch.bench import score_singly
from factpatch.edits import Edit
from factpatch.errors import BadConfig, CannotEdit
from factpatch.files import cache_root
from factpatch.lm import LM
from factpatch.methods import create, moments
from factpatch.methods.ft import FtM
from factpatch.scoring import Scorer
from factpatch.testing import ARCHITECTURES, Snapshot, quick_settings, tiny_edits, tiny_lm, tiny_tokenizer
from tests.analysis.test_tracing import mixed_lm


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "cache"))


FACTS = (
    tiny_edits()[0],
    Edit(id="oslo", prompt="Oslo lies in", subject="Oslo", target="Cuba", ground_truth=("Norway",)),
    Edit(id="bern", prompt="Bern lies in", subject="Bern", target="Iran", rephrases=("Where is Bern?",)),
)


class Planted(FtM):
    """Fine-tuning that takes hold at block 1 alone."""

    name = "planted"
    fits = 0

    def make(self, lm, edits, config, progress):
        type(self).fits += 1
        here = {"steps": 40, "lr": 1e-2} if config.layer == 1 else {"steps": 1, "lr": 1e-9}
        return super().make(lm, edits, config.model_copy(update=here), progress)


@lru_cache
def deep_lm(blocks):
    """A tiny model of so many blocks."""
    sizes = ARCHITECTURES["llama"] | {"num_hidden_layers": blocks, "hidden_size": 8, "intermediate_size": 8}
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    config = AutoConfig.for_model("llama", vocab_size=258, **sizes, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return LM(model.eval(), tiny_tokenizer(), name=f"deep-{blocks}")


def sweeping(monkeypatch, curve, refused=()):
    """Every place's edits succeed as `curve` says, by its first block; what was tried, in order."""
    tried = []

    def trial(self, start, progress):
        tried.append(start)
        ids = [fact.id for fact in self.facts]
        by_fact = {name: {"edit": dict.fromkeys(ids, curve(start))} for name in ("open", "survey")}
        reasons = {ids[0]: "no"} if start in refused else {}
        layers = tuple(start + each for each in self.offsets)
        return Trial(layers=layers, by_fact=by_fact, refused=reasons, seconds=0.0)

    monkeypatch.setattr(module._Sweep, "_trial", trial)
    return tried


def traced_as(monkeypatch, effects):
    """Tracing finds these."""
    found = module.Traced(
        part="mlp",
        window=1,
        facts=1,
        of=1,
        effects=tuple(effects),
        suggested=max(range(len(effects)), key=effects.__getitem__),
    )
    monkeypatch.setattr(module, "known_facts", lambda lm, edits, **_: [Fact("Rome lies in", "Rome", "Italy")])
    monkeypatch.setattr(module, "_trace", lambda *_: found)


def test_it_finds_the_block_where_a_method_was_made_to_work():
    lm = tiny_lm()
    before = Snapshot.of(lm)
    found = locate(lm, Planted(), edits=FACTS)
    assert before.differences(lm) == []
    assert [place.layers for place in found.places] == [(0,), (1,), (2,)]
    assert found.chosen == (1,)
    assert found.best.open.edit_success == pytest.approx(1 / 3), "of one fact alone the model says it by itself"
    assert found.best.support == pytest.approx(1 - (2 / 3) ** 3, abs=0.05), "where that one is drawn"
    assert found.best.survey.edit_success > 0.9
    assert found.complete
    assert [place.score for place in found.places if place.layers != (1,)] == [0, 0]
    assert set(found.facts) == {"rome", "oslo", "bern"}
    assert "layer" not in found.config
    assert Located.model_validate_json(found.model_dump_json()) == found
    json.dumps(found.model_dump(mode="json"), allow_nan=False)


def test_the_numbers_are_those_of_edits_scored_alone():
    lm, settings = tiny_lm(), {"steps": 12, "lr": 5e-3}
    found = locate(lm, create("ft-m", settings), edits=FACTS, layers=[2, 0])
    for place in found.places:
        method = create("ft-m", settings, layer=place.layers[0])
        card = score_singly(lm, method, FACTS, Scorer(lm, fluency=False)).card
        for protocol in ("survey", "open"):
            summary, own = card.summary(protocol), getattr(place, protocol)
            for name, value in own.model_dump().items():
                assert value == pytest.approx(getattr(summary, name), abs=1e-6), (place.layers, protocol, name)
        for own, score in ((place.open, place.score), (place.survey, place.survey_score)):
            parts = [max(0.01, p) for p in (own.edit_success, own.rephrase, own.locality)]
            expected = 3 / sum(1 / p for p in parts) if own.edit_success else 0
            assert score == pytest.approx(expected)


@given(
    blocks=st.sampled_from([1, 2, 3, 4, 7, 24, 33, 50]),
    peak=st.integers(0, 49),
    up=st.floats(0.1, 3),
    down=st.floats(0.1, 3),
)
@example(blocks=50, peak=7, up=0.1, down=3)
def test_of_a_curve_with_one_peak_it_finds_the_peak(blocks, peak, up, down):
    peak %= blocks
    curve = lambda at: 0.9 / (1 + (up if at < peak else down) * abs(at - peak))  # noqa: E731
    with pytest.MonkeyPatch.context() as patching:
        tried = sweeping(patching, curve)
        patching.setattr(result, "_RESAMPLES", 1)
        found = locate(deep_lm(blocks), "ft-m", edits=FACTS, traced=0, limit=1)
    assert found.chosen == (peak,)
    assert len(tried) == len(set(tried)) <= max(3, blocks // 2 + 4)


def test_where_no_coarse_block_does_any_good_all_are_tried(monkeypatch):
    tried = sweeping(monkeypatch, lambda at: 0.5 * (at == 7))
    assert locate(deep_lm(24), "ft-m", edits=FACTS, traced=0).chosen == (7,)
    assert sorted(tried) == list(range(24))


def test_the_first_few_places_lie_far_apart(monkeypatch):
    tried = sweeping(monkeypatch, lambda at: 0.5)
    locate(deep_lm(24), "ft-m", edits=FACTS, traced=0)
    assert tried[:4] == [0, 16, 8, 4]
    assert sorted(tried) == [*range(3), *range(4, 24, 2)], "every second, then those beside the best"


def test_of_equals_the_lowest_is_chosen_and_where_edits_were_refused_comes_last(monkeypatch):
    sweeping(monkeypatch, lambda at: {0: 0.9, 1: 0.7, 2: 0.7}[at], refused=[0])
    assert locate(tiny_lm(), "ft-m", edits=FACTS).chosen == (1,)


def test_a_measure_at_nought_leaves_the_others_to_decide():
    facts = {"open": {"edit": {"a": 0.8}, "rephrase": {"a": 0.0}, "locality": {"a": 1.0}}}
    better = Trial(layers=(3,), by_fact=facts, refused={}, seconds=0)
    worse = Trial(layers=(2,), by_fact=facts | {"open": facts["open"] | {"edit": {"a": 0.4}}}, refused={}, seconds=0)
    none = Trial(layers=(1,), by_fact=facts | {"open": facts["open"] | {"edit": {"a": 0.0}}}, refused={}, seconds=0)
    assert better.score(["a"]) == pytest.approx(3 / (1 / 0.8 + 100 + 1))
    assert none.score(["a"]) == 0
    assert best_of([none, worse, better], ["a"]).layers == (3,)
    assert best_of([none], ["a"]) is None


def test_what_the_model_says_by_itself_decides_and_the_survey_between_equals():
    def trial(layer, free, forced):
        by_fact = {"open": {"edit": {"a": free}}, "survey": {"edit": {"a": forced}}}
        return Trial(layers=(layer,), by_fact=by_fact, refused={}, seconds=0)

    flattered, honest, finer = trial(1, 0.2, 1.0), trial(2, 0.5, 0.3), trial(3, 0.5, 0.4)
    assert best_of([flattered, honest], ["a"]) is honest
    assert best_of([flattered, honest, finer], ["a"]) is finer
    assert best_of([trial(1, 0.0, 1.0)], ["a"]) is None, "what only teacher forcing sees is no success"


def test_support_is_a_share_of_resamples():
    def trial(layer, values):
        return Trial(layers=(layer,), by_fact={"open": {"edit": values}}, refused={}, seconds=0)

    # Of two facts drawn twice, both are the second in a quarter of all draws; only then does block 5 win.
    trials = [trial(4, {"a": 1.0, "b": 0.5}), trial(5, {"a": 0.1, "b": 0.6})]
    low, high = supports(trials, ["a", "b"], seed=3)
    assert low + high == 1
    assert high == pytest.approx(0.25, abs=0.05)


def test_a_refusal_counts_in_the_resamples_that_draw_its_fact():
    def trial(layer, values, refused):
        return Trial(layers=(layer,), by_fact={"open": {"edit": values}}, refused=refused, seconds=0)

    # Block 4 does better, but only where "a", which it refuses, is not drawn: in a quarter of all draws of two.
    trials = [trial(4, {"b": 1.0}, {"a": "no"}), trial(5, {"a": 0.5, "b": 0.5}, {})]
    better, whole = supports(trials, ["a", "b"], seed=3)
    assert better + whole == 1
    assert better == pytest.approx(0.25, abs=0.05)


def test_where_no_edit_holds_nothing_is_chosen_or_kept():
    lm = tiny_lm()
    found = locate(lm, create("ft-m", steps=1, lr=1e-9), edits=FACTS)
    assert found.chosen is None
    assert found.best is None
    assert found.agree is None
    assert keep(lm, found) is None
    assert not list((cache_root() / "located").glob("*.json"))


def test_what_is_kept_is_where_the_method_edits_next():
    lm = tiny_lm()
    found = locate(lm, Planted(), edits=FACTS)
    path = keep(lm, found)
    assert path == cache_root() / "located" / f"{lm.fingerprint}.json"
    for own in (lm, tiny_lm()):
        assert Planted().resolve(own).layer == 1
        assert Planted().fit(own, FACTS[:1]).provenance.config["layer"] == 1
    made = json.loads(path.read_text())["choices"]["planted"]["made"]
    assert Located.model_validate(made) == found
    assert made["versions"]["torch"] == torch.__version__
    assert locate(tiny_lm(), Planted(), edits=FACTS).chosen == (1,), "an earlier choice is no setting of a sweep"


def test_what_is_preliminary_takes_no_choices_place(monkeypatch):
    sweeping(monkeypatch, lambda at: 0.1 * (at + 1))
    lm = deep_lm(24)
    hasty = locate(lm, "ft-m", edits=FACTS, traced=0, layers=[0]).model_copy(update={"stopped": "time"})
    assert (hasty.complete, hasty.preliminary, hasty.chosen) == (False, True, (0,))
    path = keep(lm, hasty)
    assert path is not None, "better than none"
    whole = locate(lm, "ft-m", edits=FACTS, traced=0)
    assert (whole.preliminary, keep(lm, whole)) == (False, path)
    written = path.read_bytes()
    for rash in (
        whole.model_copy(update={"stopped": "interrupt"}),
        locate(lm, "ft-m", edits=FACTS, traced=0, limit=1),
        locate(lm, "ft-m", edits=FACTS, layers=[3]),
    ):
        assert (rash.preliminary, keep(lm, rash)) == (True, None)
        assert path.read_bytes() == written
    assert create("ft-m").resolve(lm).layer == whole.chosen[0]


def test_a_sweep_that_is_killed_goes_on_where_it_was(monkeypatch):
    whole = locate(tiny_lm(), Planted(), edits=FACTS[1:])
    monkeypatch.setenv("FACTPATCH_CACHE", str(cache_root() / "another"))

    class Killed(Planted):
        def make(self, lm, edits, config, progress):
            if config.layer == 2:
                raise KeyboardInterrupt
            return super().make(lm, edits, config, progress)

    with pytest.raises(KeyboardInterrupt):
        locate(tiny_lm(), Killed(), edits=FACTS[1:])
    Planted.fits = 0
    again = locate(tiny_lm(), Planted(), edits=FACTS[1:])
    assert Planted.fits == 4, "block 0 is known already"
    timeless = {"places": {"__all__": {"seconds"}}}
    assert again.model_dump(exclude=timeless) == whole.model_dump(exclude=timeless)
    locate(tiny_lm(), Planted(), edits=FACTS[1:])
    assert Planted.fits == 4
    locate(tiny_lm(), Planted(), edits=FACTS[1:], limit=1)
    assert Planted.fits == 4 + 3, "of other facts nothing is known"


def test_a_damaged_row_is_made_again():
    found = locate(tiny_lm(), Planted(), edits=FACTS, layers=[1])
    (row,) = (path for path in (cache_root() / "located" / "places").glob("*.json") if "by_fact" in path.read_text())
    row.write_text(row.read_text()[:40])
    Planted.fits = 0
    assert locate(tiny_lm(), Planted(), edits=FACTS, layers=[1]).chosen == found.chosen
    assert Planted.fits == len(FACTS)


def ticking(monkeypatch, every=1.0):
    """A clock that goes on by so many seconds each time it is looked at."""
    now = [0.0]

    def look():
        now[0] += every
        return now[0]

    monkeypatch.setattr(module.time, "monotonic", look)


def test_when_the_time_is_up_what_was_tried_is_the_result(monkeypatch):
    tried = sweeping(monkeypatch, lambda at: 0.5)
    ticking(monkeypatch)
    found = locate(deep_lm(24), "ft-m", edits=FACTS, traced=0, seconds=3.5)
    assert tried == [0, 16, 8], "the clock is looked at before each place"
    assert (found.complete, found.stopped, found.chosen) == (False, "time", (0,))


def test_where_there_was_time_for_nothing_nothing_is_chosen():
    lm = tiny_lm()
    found = locate(lm, Planted(), edits=FACTS, seconds=0.0)
    assert (found.places, found.chosen, found.stopped, found.traced) == ((), None, "time", None)
    assert keep(lm, found) is None
    assert found.untraced == "there was no time for it"


def test_a_place_is_left_in_the_middle_when_the_time_is_up(monkeypatch):
    class Slow(Planted):
        def make(self, lm, edits, config, progress):
            if config.layer == 2:
                now[0] += 100
            return super().make(lm, edits, config, progress)

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    lm = tiny_lm()
    before = Snapshot.of(lm)
    Planted.fits = 0
    found = locate(lm, Slow(), edits=FACTS, traced=0, seconds=50.0)
    assert before.differences(lm) == []
    assert [place.layers for place in found.places] == [(0,)], "of the next one there was no time for the second edit"
    assert Slow.fits == 3 + 1
    assert found.stopped == "time"


def test_the_time_is_looked_at_while_keys_are_measured(monkeypatch):
    def measuring(lm, layers, config, progress):
        for done in range(100):
            progress("Measuring keys", done, 100)
        pytest.fail("it was not stopped")

    ticking(monkeypatch)
    monkeypatch.setattr("factpatch.methods.rome.second_moment", lambda lm, layer, *rest: measuring(lm, [layer], *rest))
    monkeypatch.setattr(module, "second_moments", measuring)
    found = locate(tiny_lm(), "rome", edits=FACTS[:2], traced=0, seconds=20.0)
    assert (found.places, found.stopped) == ((), "time")


def test_with_a_limit_each_block_s_second_moments_are_measured_when_its_turn_comes(monkeypatch):
    passes = []
    monkeypatch.setattr(
        moments,
        "_accumulate",
        lambda lm, sites, *rest, of=moments._accumulate: passes.append(set(sites)) or of(lm, sites, *rest),
    )
    quick = create("rome", quick_settings(type(create("rome"))))
    locate(tiny_lm(), quick, edits=FACTS, limit=1, layers=[0, 1, 2], seconds=1e6)
    assert passes == [{0}, {1}, {2}]


def test_tracing_takes_its_share_of_the_time_and_counts_what_it_traced(monkeypatch):
    facts = [Fact("Rome lies in", "Rome", "Italy"), Fact("Oslo lies in", "Oslo", "Norway")]
    monkeypatch.setattr(module, "known_facts", lambda lm, edits, **_: facts)
    tried = sweeping(monkeypatch, lambda at: 0.5)
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    traced = []

    def slowly(lm, fact, *, of=module.trace, **how):
        traced.append(fact)
        now[0] += 30
        return of(lm, fact, **how)

    monkeypatch.setattr(module, "trace", slowly)
    lm = tiny_lm()
    # Thirty seconds are more than a quarter of a hundred: the first fact is stopped at its first step.
    found = locate(lm, "ft-m", edits=FACTS, seconds=100.0)
    assert (found.traced, found.untraced) == (None, "there was no time for it")
    assert len(tried) == 3, "the rest of the time is the sweep's"
    assert found.complete
    found = locate(lm, "ft-m", edits=FACTS, seconds=200.0)
    assert (found.traced.facts, found.traced.of) == (1, 2)
    assert len(traced) == 3
    again = locate(tiny_lm(), "ft-m", edits=FACTS).traced
    assert (again.facts, again.of, len(traced)) == (2, 2, 4), "the first fact was kept"
    assert again.effects != found.traced.effects


def test_an_interruption_keeps_what_was_found_if_that_is_wanted(monkeypatch):
    class Stopped(Planted):
        def make(self, lm, edits, config, progress):
            if config.layer == 2:
                raise KeyboardInterrupt
            return super().make(lm, edits, config, progress)

    with pytest.raises(KeyboardInterrupt):
        locate(tiny_lm(), Stopped(), edits=FACTS)
    lm = tiny_lm()
    before = Snapshot.of(lm)
    found = locate(lm, Stopped(), edits=FACTS, interruptible=True)
    assert before.differences(lm) == []
    assert [place.layers for place in found.places] == [(0,)]
    assert (found.stopped, found.preliminary) == ("interrupt", True)


def test_what_will_be_done_is_told():
    lm = deep_lm(24)
    said = module.outline(lm, create("rome"), traced=24, seconds=1200.0)
    assert "causal tracing of up to 24 facts" in said
    assert (
        "up to 8 facts edited with rome, one at a time, at every second of the 24 blocks, then around the best" in said
    )
    assert "second moments" in said
    assert "20 minutes at most, of which tracing takes 5 minutes at most" in said
    said = module.outline(lm, create("ft-m"), layers=[1], limit=1, traced=0)
    assert said == "deep-24: up to 1 fact edited with ft-m, one at a time, at 1 block."


def test_methods_of_several_blocks_are_tried_with_windows(monkeypatch):
    tried = sweeping(monkeypatch, lambda at: {0: 0.2, 1: 0.3, 3: 0.5}.get(at, 0.4))
    found = locate(deep_lm(7), create("memit", layers="3,4,6", moment_tokens=256, moment_length=32), edits=FACTS)
    assert found.field == "layers"
    assert [place.layers for place in found.places] == [(at, at + 1, at + 3) for at in sorted(tried)]
    assert found.chosen == (3, 4, 6)
    assert found.best.block == 4
    assert set(tried) == {0, 2, 3, 1} - ({1} if 1 not in tried else set())
    for start in (-1, 4):
        with pytest.raises(BadConfig, match=f"begins at block {start}: deep-7 has 0 to 3"):
            locate(deep_lm(7), create("memit", layers="3,4,6"), edits=FACTS, layers=[start])


def test_a_window_is_as_wide_as_the_method_s_own(monkeypatch):
    sweeping(monkeypatch, lambda at: 0.5)
    lm = tiny_lm()
    quick = quick_settings(type(create("memit")))
    usual = create("memit", quick).fit(lm, FACTS[:1]).provenance.config["layers"]
    assert usual == [0, 1]
    found = locate(lm, create("memit", quick), edits=FACTS)
    assert [place.layers for place in found.places] == [(0, 1), (1, 2)]


def test_a_real_window_is_edited_and_resolved():
    lm = tiny_lm()
    method = create("lora", layers=[0, 1], steps=40, lr=2e-2)
    found = locate(lm, method, edits=FACTS, layers=[1])
    assert found.chosen == (1, 2)
    keep(lm, found)
    assert create("lora").resolve(lm).layers == (1, 2)


def test_second_moments_of_many_blocks_come_from_one_pass(monkeypatch):
    passes = []
    monkeypatch.setattr(
        moments,
        "_accumulate",
        lambda lm, sites, *rest, of=moments._accumulate: passes.append(set(sites)) or of(lm, sites, *rest),
    )
    found = locate(
        tiny_lm(), create("rome", quick_settings(type(create("rome")))), edits=FACTS, limit=1, layers=[0, 1, 2]
    )
    assert passes == [{0, 1, 2}]
    assert len(found.places) == 3
    locate(tiny_lm(), create("ft-m", steps=1), edits=FACTS, limit=1, layers=[0])
    assert len(passes) == 1


def test_the_block_that_tracing_suggests_is_tried_and_compared(monkeypatch):
    traced_as(monkeypatch, [0.0] * 17 + [0.3] + [0.1] * 6)
    tried = sweeping(monkeypatch, lambda at: 1 / (2 + abs(at - 4)))
    found = locate(deep_lm(24), "ft-m", edits=FACTS)
    assert 17 in tried
    assert (found.chosen, found.traced.suggested, found.agree) == ((4,), 17, False)
    assert found.at_suggestion.score == pytest.approx(1 / 15)
    assert found.rank_correlation < -0.5


def test_they_agree_where_tracing_s_block_is_among_those_chosen(monkeypatch):
    traced_as(monkeypatch, [0.0, 0.1, 0.3, 0.2, 0.0, 0.0, 0.0])
    sweeping(monkeypatch, lambda at: 1 / (2 + abs(at - 1)))
    found = locate(deep_lm(7), create("lora", layers="0,1,2"), edits=FACTS, layers=range(5))
    assert (found.chosen, found.agree) == ((1, 2, 3), True)
    assert found.at_suggestion.layers == (1, 2, 3), "the window around it"
    effects = [fmean(found.traced.effects[i : i + 3]) for i in range(5)]
    assert sorted(range(5), key=effects.__getitem__)[-2:] == [2, 1]
    # Scores rank 4.5 5 4.5 2 1 with effects 4 5 3 2 1; by hand, with ties averaged.
    assert found.rank_correlation == pytest.approx(0.9747, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "ranks"),
    [([], []), ([3.0], [1]), ([0.5, 0.1, 0.5, 0.9], [2.5, 1, 2.5, 4]), ([2.0, 2.0, 2.0], [2, 2, 2])],
)
def test_ranks(values, ranks):
    assert result._ranks(values) == ranks


def test_what_is_the_same_everywhere_has_no_rank_correlation(monkeypatch):
    traced_as(monkeypatch, [0.1, 0.3, 0.2])
    sweeping(monkeypatch, lambda at: 0.5)
    assert locate(tiny_lm(), "ft-m", edits=FACTS).rank_correlation is None


def test_tracing_itself_is_asked_once_and_kept(monkeypatch):
    from factpatch.analysis.tracing import ROLES, average, suggested_layer, trace_all

    fact = Fact("Rome lies in", "Rome", "Italy")
    monkeypatch.setattr(module, "known_facts", lambda lm, edits, **_: [fact])
    sweeping(monkeypatch, lambda at: 0.5)
    lm = tiny_lm()
    found = locate(lm, "ft-m", edits=FACTS).traced
    own = average(trace_all(lm, [fact], part="mlp", samples=module.SAMPLES, seed=0))
    assert found.effects == pytest.approx(own.effects[ROLES.index("last subject token")].tolist())
    assert (found.part, found.window, found.facts) == ("mlp", own.window, 1)
    assert found.suggested == suggested_layer(own)
    monkeypatch.setattr(module, "trace", None)
    assert locate(tiny_lm(), "ft-m", edits=FACTS).traced == found


def test_why_nothing_was_traced_is_told(monkeypatch):
    sweeping(monkeypatch, lambda at: 0.5)
    assert locate(tiny_lm(), "ft-m", edits=FACTS).untraced == "the model knows none of the 2 facts"
    found = locate(tiny_lm(), "ft-m", edits=FACTS, traced=0)
    assert (found.traced, found.untraced, found.at_suggestion, found.rank_correlation) == (
        None,
        "not asked for",
        None,
        None,
    )


def test_facts_are_drawn_by_the_seed_from_what_the_method_can_change(monkeypatch):
    sweeping(monkeypatch, lambda at: 0.5)
    one, same, other = (locate(tiny_lm(), "ft-m", layers=[0], seed=seed, traced=0).facts for seed in (0, 0, 1))
    assert one == same != other
    assert len(one) == 8
    assert all(fact.startswith("modify") for fact in one)
    assert locate(tiny_lm(), "ft-m", edits=tiny_edits()[1:], layers=[0]).facts == ("ann",), "else what there is"


@pytest.mark.parametrize(
    ("method", "settings", "error", "match"),
    [
        ("ice", {}, CannotEdit, "does not choose a block"),
        ("mend", {}, CannotEdit, "learns an editor"),
        ("rome", {"layer": 1}, BadConfig, "what a sweep looks for"),
        ("kn", {}, BadConfig, "fits in one place"),
        ("rome", {"corpus": "/nowhere"}, BadConfig, "cannot be read"),
    ],
)
def test_what_cannot_be_swept_is_told(method, settings, error, match):
    with pytest.raises(error, match=match):
        locate(tiny_lm(), create(method, settings), edits=FACTS)


def test_blocks_that_are_not_there():
    with pytest.raises(BadConfig, match="no block 3: tiny-llama has 0 to 2"):
        locate(tiny_lm(), "ft-m", edits=FACTS, layers=[0, 3])
    with pytest.raises(BadConfig, match="no block was given"):
        locate(tiny_lm(), "ft-m", edits=FACTS, layers=[])


def test_a_refusal_at_one_place_does_not_end_the_sweep():
    class Picky(Planted):
        name = "picky"

        def make(self, lm, edits, config, progress):
            if config.layer == 0:
                raise BadConfig("not at block 0")
            if config.layer == 2 and edits[0].id == "oslo":
                raise CannotEdit("not Oslo")
            return super().make(lm, edits, config, progress)

    found = locate(tiny_lm(), Picky(), edits=FACTS)
    assert found.chosen == (1,)
    first, _, last = found.places
    assert first.score is None
    assert first.refused == dict.fromkeys(("rome", "oslo", "bern"), "not at block 0")
    assert last.refused == {"oslo": "not Oslo"}
    assert set(last.by_fact["survey"]["edit"]) == {"rome", "bern"}

    class Never(Planted):
        name = "never"

        def make(self, lm, edits, config, progress):
            raise CannotEdit("never")

    with pytest.raises(CannotEdit, match="none of the 3 facts at any place: never"):
        locate(tiny_lm(), Never(), edits=FACTS)


def test_patches_on_the_model_are_off_meanwhile():
    lm = tiny_lm()
    patch = create("ft-m", steps=5).fit(lm, FACTS[:1])
    bare = locate(tiny_lm(), Planted(), edits=FACTS, layers=[1])
    with lm.patched(patch):
        (cache_root() / "located").rename(cache_root() / "elsewhere")
        under = locate(lm, Planted(), edits=FACTS, layers=[1])
        assert lm.patches == (patch,)
    assert under.best.by_fact == bare.best.by_fact


def test_no_more_facts_are_asked_than_it_takes(monkeypatch):
    pool = [Edit(id=str(i), prompt=f"{i} is", subject=str(i), target="x", ground_truth=("y",)) for i in range(200)]
    asked = []

    def known(lm, edits, *, chat):
        asked.append(len(edits))
        return [Fact(edit.prompt, edit.subject, "y") for edit in edits if int(edit.id) % 4 == 0]

    monkeypatch.setattr(module, "known_facts", known)
    lm, how = tiny_lm(), {"chat": False, "progress": lambda *_: None}
    few = module._known(lm, pool, 3, 0, **how)
    assert (asked, len(few)) == ([64], 3)
    assert module._known(lm, pool, 3, 0, **how) == few
    assert asked == [64], "what is known is kept"
    assert len(module._known(lm, pool, 1000, 0, **how)) == 50
    assert asked[1:] == [64, 64, 64, 8]


@pytest.mark.parametrize("method", ["ft-m", "rome"])
def test_blocks_that_are_mixtures_are_refused_and_the_dense_one_is_found(method):
    found = locate(mixed_lm(), create(method, quick_settings(type(create(method)))), edits=FACTS[:1], traced=0)
    by = {place.layers: place for place in found.places}
    assert by.keys() == {(0,), (1,), (2,)}
    for layer in (0, 2):
        assert "mixture of experts" in by[layer,].refused["rome"]
    assert by[1,].refused == {}
    assert by[1,].score is not None
