"""Locating compared: the measures by hand, levels where the answer is known, and a small world that a tiny model knows."""

import json
import re
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from factpatch.analysis import places_alike
from factpatch.analysis.changed_values import _most_changed, read_values
from factpatch.analysis.facts import Fact, from_telling
from factpatch.analysis.places import compare_places
from factpatch.analysis.places_alike import (
    LEVELS,
    MEASURES,
    Group,
    LevelComparison,
    compare_levels,
    cosine,
    jaccard,
    overlap,
    relative_similarity,
)
from factpatch.analysis.places_facts import Triple, Wording, counterfacts, known_triples, read_triples
from factpatch.analysis.tracing import ROLES, average, trace
from factpatch.edits import Edit
from factpatch.errors import BadFile, BadRecord, CannotEdit
from factpatch.lm import LM
from factpatch.lm.batches import Batch
from factpatch.lm.run import input_of
from factpatch.methods import create
from factpatch.methods.base import Config, Method, Traits
from factpatch.methods.kn import attributions
from factpatch.methods.targets import TargetBatch
from factpatch.patches import LowRank, WeightPatch
from factpatch.report.places import hit_rows, place_rows, save_places, sentences
from factpatch.testing import Snapshot, tiny_lm
from tests.analysis.test_tracing import mixed_lm

TOWNS = {
    "Arles": "France",
    "Basel": "Swiss",
    "Cadiz": "Spain",
    "Derby": "England",
    "Essen": "Germany",
    "Nice": "France",
}
TONGUE = {"France": "French", "Swiss": "German", "Spain": "Spanish", "England": "English", "Germany": "German"}
RIVER = {"Arles": "Rhone", "Basel": "Rhine", "Cadiz": "none", "Derby": "Derwent", "Essen": "Ruhr", "Nice": "Var"}
WORLD = {
    "relations": {
        "country": ["{} lies in", "the country of {} is"],
        "river": ["{} stands on the river", "the river of {} is"],
        "tongue": ["in the country of {} people speak"],
    },
    "chains": {"tongue": "country"},
    "facts": {town: {"country": c, "river": RIVER[town], "tongue": TONGUE[c]} for town, c in TOWNS.items()},
}
QUICK = {"steps": 3, "samples": 2, "top": 1}
SUBJECT = ROLES.index("last subject token")


@pytest.fixture
def world(tmp_path):
    path = tmp_path / "world.json"
    path.write_text(json.dumps(WORLD))
    return path


@pytest.fixture
def triples(world):
    return read_triples(world)


@lru_cache
def taught():
    """A tiny model with a token for each word, trained until it knows the world."""
    told = [
        (wording.replace("{}", town), answer)
        for town, own in WORLD["facts"].items()
        for relation, answer in own.items()
        for wording in WORLD["relations"][relation]
    ]
    words = dict.fromkeys(word for prompt, answer in told for word in f"{prompt} {answer}".split())
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    config = AutoConfig.for_model(
        "llama", vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=48, max_position_embeddings=64,
        eos_token_id=1, pad_token_id=1, bos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.train(mode=False)
    lm = LM(model, fast, name="small-world")
    batch = TargetBatch(lm, lm.encode([prompt for prompt, _ in told], [answer for _, answer in told]))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = batch.nll().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.zero_grad()
    return lm


# Measures


def test_measures_by_hand():
    sets = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert jaccard(sets).tolist()[0] == pytest.approx([1, 1 / 3, 2 / 3, 0])
    assert overlap(sets).tolist()[0][:3] == [1, 0.5, 1]
    assert jaccard(sets)[3, 3] == overlap(sets)[3, 3] == 1
    found = cosine(torch.tensor([[3.0, 4.0], [4.0, 3.0], [-3.0, -4.0], [0.0, 0.0]]))
    assert found[0].tolist() == pytest.approx([1, 0.96, -1, 0])


SETS = arrays.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 8)))


@given(SETS)
def test_similarities_of_sets_are_symmetric_and_1_for_equal_sets(found):
    sets = torch.from_numpy(found)
    for alike in (jaccard(sets), overlap(sets)):
        assert torch.equal(alike, alike.T)
        assert ((alike >= 0) & (alike <= 1)).all()
        same = (sets[:, None] == sets).all(-1)
        assert (alike[same] == 1).all()
    assert torch.equal(jaccard(sets) == 1, same)


@given(arrays.arrays("float32", (4, 5), elements=st.floats(-10, 10, width=32)))
def test_cosines_are_symmetric_and_1_for_equal_scores(found):
    scores = torch.from_numpy(found)
    alike = cosine(scores)
    torch.testing.assert_close(alike, alike.T)
    some = scores.norm(dim=-1) > 1e-3
    torch.testing.assert_close(alike.diagonal()[some], torch.ones(int(some.sum())))
    assert alike.abs().max() <= 1
    torch.testing.assert_close(cosine(3 * scores)[some][:, some], alike[some][:, some])


def test_relative_similarity_by_hand():
    assert relative_similarity(0.6, 0.2) == pytest.approx(0.5)
    assert relative_similarity(0.1, 0.2) == 0
    assert relative_similarity(1.0, 0.3) == 1
    assert relative_similarity(1.0, 1.0) == 0, "where all are alike none is told apart"


@given(st.floats(0, 1), st.floats(0, 1))
def test_relative_similarity_is_a_share(inside, outside):
    found = relative_similarity(inside, outside)
    assert 0 <= found <= 1
    assert (found == 0) if inside <= outside else (found <= inside)


def test_the_mean_is_cut_off_and_not_each_group():
    one = comparison("neurons", "entity", (0.75, 0.25), 0.5)
    assert one.relative == (0.5, -0.5)
    assert one.rsim == 0
    assert comparison("neurons", "entity", (1.0, 1.0), 1.0).relative == (0.0, 0.0)


# Levels


def world_of(*rows):
    """Wording facts of (entity, relation, answer token, first wording?, via)."""
    return [
        Wording(Fact(f"{entity} {relation} {i}", entity, f"<{token}>"), relation, token, first, via)
        for i, (entity, relation, token, first, via) in enumerate(rows)
    ]


TABLE = world_of(
    ("Ada", "home", 1, True, None),
    ("Ada", "home", 1, False, None),
    ("Ada", "trade", 11, True, None),
    ("Ada", "tongue", 12, True, "home"),
    ("Bob", "home", 2, True, None),
    ("Bob", "trade", 1, True, None),
    ("Cyd", "home", 1, True, None),
    ("Cyd", "trade", 13, True, None),
    ("Dee", "home", 2, True, None),
)  # fmt: skip


def test_pairs_of_each_level():
    """One pair after the other is made the only one that is alike; the level then holds it or not."""
    expected = {
        "wording": {(0, 1)},
        "chain": {(0, 3)},
        "entity": {(0, 2), (4, 5), (6, 7)},
        "relation": {(0, 4), (0, 8), (4, 6), (6, 8), (2, 5), (2, 7), (5, 7)},
        "answer": {(0, 5), (5, 6)},
    }
    seen = {level: set() for level in LEVELS}
    for i in range(len(TABLE)):
        for j in range(i + 1, len(TABLE)):
            alike = torch.zeros(len(TABLE), len(TABLE))
            alike[i, j] = alike[j, i] = 1
            for one in compare_levels("neurons", alike, TABLE):
                assert one.level == "wording" or (TABLE[i].first and TABLE[j].first) or one.inside == 0
                if one.inside > 0:
                    seen[one.level].add((i, j))
                    assert one.outside == 0, "a pair that belongs together counts among the unrelated"
    assert seen == expected


def test_groups_and_means_by_hand():
    alike = torch.zeros(len(TABLE), len(TABLE))
    for i, j, value in ((0, 2, 0.5), (4, 5, 0.9), (0, 7, 0.3), (2, 6, 0.6)):
        alike[i, j] = alike[j, i] = value
    by = {one.level: one for one in compare_levels("layers", alike, TABLE)}
    entity = {group.name: group for group in by["entity"].groups}
    assert {name: group.pairs for name, group in entity.items()} == {"Ada": 1, "Bob": 1, "Cyd": 1}
    # Unrelated to Ada's home are Cyd's trade alone; to her trade the homes of Bob, Cyd and Dee.
    assert entity["Ada"].inside == pytest.approx(0.5)
    assert entity["Ada"].outside == pytest.approx((0.3 + 0.6 + 0 + 0) / 4)
    assert by["entity"].inside == pytest.approx((0.5 + 0.9 + 0) / 3)
    outside = sum(group.outside for group in entity.values()) / 3
    assert by["entity"].rsim == pytest.approx((1.4 / 3 - outside) / (1 - outside))
    assert sum(by["entity"].relative) / 3 == pytest.approx(by["entity"].rsim)
    assert [group.name for group in by["answer"].groups] == ["<1>"]


GRID = world_of(
    *[(f"e{e}", f"r{r}", 10 * r + e, first, None) for e in range(4) for r in range(3) for first in (True, False)]
)


@pytest.mark.parametrize(
    ("place", "level"),
    [
        (lambda one: one.entity, "entity"),
        (lambda one: one.relation, "relation"),
        (lambda one: one.entity + one.relation, "wording"),
    ],
    ids=["entity", "relation", "wording"],
)
def test_places_that_hang_on_one_thing_are_told_apart_by_it_alone(place, level):
    names = sorted({place(one) for one in GRID})
    sets = torch.tensor([[place(one) == name for name in names] for one in GRID])
    found = {one.level: one.rsim for one in compare_levels("neurons", jaccard(sets), GRID)}
    assert found.keys() == {"wording", "entity", "relation"}
    expected = {"wording": 1.0, "entity": 0.0, "relation": 0.0} | {level: 1.0}
    assert found == pytest.approx(expected)


def test_the_same_place_everywhere_tells_nothing_apart():
    found = compare_levels("layers", torch.ones(len(GRID), len(GRID)), GRID)
    assert [one.rsim for one in found] == [0.0, 0.0, 0.0]


# Files


def test_built_in_facts_are_whole():
    triples = read_triples()
    assert len(triples) > 100
    assert all(each.entity in prompt for each in triples for prompt in each.prompts)
    relations = {(each.entity, each.relation) for each in triples}
    chains = [each for each in triples if each.via]
    assert chains
    assert all((each.entity, each.via) in relations for each in chains)


def test_own_file(triples):
    assert Triple("Arles", "country", ("Arles lies in", "the country of Arles is"), ("France",)) in triples
    tongue = next(each for each in triples if each.relation == "tongue")
    assert tongue.via == "country"


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, BadFile, "no such file"),
        ("{", BadFile, "expected JSON"),
        ("[]", BadRecord, "world.json"),
        ('{"relations": {}, "facts": {"Arles": {"country": "France"}}}', BadRecord, '"country" needs wordings'),
        ('{"relations": {"r": "no place"}, "facts": {"Arles": {"r": "x"}}}', BadRecord, "where the entity goes"),
        ('{"relations": {}, "facts": {}, "more": 1}', BadRecord, "more"),
        ('{"relations": {"r": "{} is"}, "facts": {"Arles": {"r": []}}}', BadRecord, r"Arles\.r"),
    ],
)
def test_bad_files_are_named(tmp_path, content, error, said):
    path = tmp_path / "world.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=said):
        read_triples(path)


# A model that knows its small world


def test_known_wordings_only(triples):
    lm = taught()
    wrong = Triple("Arles", "sea", ("Arles lies in",), ("Spain",))
    known = known_triples(lm, [wrong, *triples])
    assert all(one.relation != "sea" for one in known)
    assert sum(one.first for one in known) == 18
    assert len(known) == 6 * 5
    assert {lm.tokens.decode([one.token]) for one in known if one.entity == "Derby"} == {
        "England",
        "Derwent",
        "English",
    }
    assert [one.via for one in known if one.entity == "Derby"] == [None, None, None, None, "country"]
    few = known_triples(lm, triples, wordings=1)
    assert [one.fact.prompt for one in few] == [triple.prompts[0] for triple in triples]


@pytest.mark.parametrize("limit", range(2, 19))
def test_however_few_facts_hold_related_and_unrelated_ones(triples, limit):
    known = known_triples(taught(), triples)
    own = places_alike.few(known, limit)
    assert sum(one.first for one in own) == limit
    assert own == [one for one in known if one in own], "in their order, with all their wordings"
    compared = places_alike.compare_levels("maps", torch.zeros(len(own), len(own)), own)
    assert compared
    firsts = [one for one in known if one.first]
    if any(places_alike._unrelated(a, b) for a in firsts[:limit] for b in firsts[:limit]) and limit > 3:
        assert [one for one in own if one.first] == firsts[:limit], "no others than the first where these will do"


def test_the_third_fact_is_related_to_one_of_the_first_two():
    def known(entity, relation, token):
        return Wording(Fact(f"{relation} of {entity}", entity, str(token)), relation, token, first=True)

    located = [known("a", "r", 1), known("b", "s", 2), known("c", "t", 3), known("a", "u", 4)]
    assert places_alike.few(located, 2) == located[:2]
    assert places_alike.few(located, 3) == [*located[:2], located[3]]


def test_without_a_limit_all_are_compared(triples):
    known = known_triples(taught(), triples)
    assert places_alike.few(known, None) == places_alike.few(known, 18) == known


def test_where_the_limit_leaves_too_little_it_is_named(triples):
    with pytest.raises(BadFile, match="knows 18 of these 18 facts, of which the limit leaves 1; ") as told:
        compare_places(taught(), triples, limit=1)
    least = int(re.search(r"Raise --limit to (\d+) or more", str(told.value))[1])
    assert least > 1
    quick = {"steps": 1, "samples": 1}
    with pytest.raises(BadFile, match=f"Raise --limit to {least} or more"):
        compare_places(taught(), triples, limit=least - 1, **quick)
    assert compare_places(taught(), triples, limit=least, **quick).comparisons


def test_counterfacts_take_another_answer_of_the_relation(triples):
    edits = counterfacts(known_triples(taught(), triples))
    assert len(edits) == 12, "chains are not edited"
    assert edits[0] == Edit(
        id="Arles, country", prompt="Arles lies in", subject="Arles", target="Swiss", ground_truth=("France",)
    )
    assert {edit.id: edit.target for edit in edits}["Nice, country"] == "Swiss"
    assert all(edit.target != edit.ground_truth[0] for edit in edits)


def test_comparisons_are_of_attributions_and_traces(triples):
    lm = taught()
    before = Snapshot.of(lm)
    found = compare_places(lm, triples[:9], **QUICK)
    assert before.differences(lm) == []
    assert (found.asked, found.facts, found.wordings, found.entities) == (9, 9, 15, 3)
    by = {(one.measure, one.level): {group.name: group for group in one.groups} for one in found.comparisons}
    assert {measure for measure, _ in by} == set(MEASURES)
    prompts = ["Arles lies in", "the country of Arles is"]
    ids = [lm.tokens.encode(prompt).ids for prompt in prompts]
    token = lm.tokens.encode(prompts[0], "France").target_ids[0]
    one, other = (attributions(lm, range(3), each, token, 3).flatten() for each in ids)
    expected = torch.nn.functional.cosine_similarity(one, other, dim=0).item()
    assert by["attributions", "wording"]["Arles, country"].inside == pytest.approx(expected, abs=1e-5)
    sets = [set((each > 0.2 * each.max()).nonzero()[:, 0].tolist()) for each in (one, other)]
    share = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert by["neurons", "wording"]["Arles, country"].inside == pytest.approx(share)
    at_subject, at_last = [], []
    for name, group in by["layers", "wording"].items():
        town, relation = name.split(", ")
        asked = [wording.replace("{}", town) for wording in WORLD["relations"][relation]]
        facts = [Fact(prompt, town, WORLD["facts"][town][relation]) for prompt in asked]
        maps = [average([trace(lm, fact, part="mlp", samples=2)]).effects.nan_to_num() for fact in facts]
        best = [each.argmax(-1).tolist() for each in maps]
        at_subject.append(float(best[0][SUBJECT] == best[1][SUBJECT]))
        at_last.append(float(best[0][-1] == best[1][-1]))
        assert group.inside == at_subject[-1]
        expected = torch.nn.functional.cosine_similarity(maps[0].flatten(), maps[1].flatten(), dim=0).item()
        assert by["maps", "wording"][name].inside == pytest.approx(expected, abs=1e-5)
    assert at_subject != at_last, "the last token would do as well, so that nothing is shown"


def test_a_model_that_knows_nothing_is_refused(triples):
    with pytest.raises(BadFile, match="knows 0 of these 18 facts"):
        compare_places(tiny_lm(), triples)


# What the changed values say


class Plant(Method[Config]):
    """Writes the head's row of the target into the value of the neuron that fires most at the last token."""

    name = "plant"
    config_type = Config
    traits = Traits(family="test", phase="mastery", paper="none", patch=WeightPatch)
    layer = 1

    def make(self, lm, edits, config, progress):
        projection = lm.anatomy.mlp_out(self.layer)
        text = from_telling(lm, lm.tokens.encode(edits[0].prompt, edits[0].target))
        key = input_of(lm, projection.module, Batch.of([text.prompt_ids], lm.device))[0, -1]
        at = int(key.abs().argmax())
        column = torch.zeros(1, len(key))
        column[0, at] = 1.0
        row = lm.anatomy.head.weight[text.target_ids[0]].detach().float()
        return WeightPatch.of(
            self.provenance(lm, config, edits), {projection: LowRank(1000 * row[:, None] * key[at].sign(), column)}
        )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_planted_target_is_read(architecture):
    lm = tiny_lm(architecture)
    edit = Edit(id="e", prompt="Rome lies in", target="Peru")
    before = Snapshot.of(lm)
    (found,), unread = read_values(lm, Plant(), [edit])
    assert before.differences(lm) == []
    assert unread == ()
    ids = from_telling(lm, lm.tokens.encode(edit.prompt, edit.target))
    projection = lm.anatomy.mlp_out(1)
    (delta,) = Plant().fit(lm, [edit]).deltas.values()
    full = delta.full().T if projection.transposed else delta.full()
    at = int(full.norm(dim=0).argmax())
    with torch.no_grad():
        column = projection.matrix[:, at]
        logits = lm.anatomy.head(lm.anatomy.final_norm(column[None, None]))[0, 0]
    assert found.columns_before == 1 + int((logits > logits[ids.target_ids[0]]).sum())
    fired = input_of(lm, projection.module, Batch.of([ids.prompt_ids], lm.device))[0, :, at]
    assert (found.layer, found.token) == (1, int(fired.abs().argmax()))
    fires = full[:, at] @ lm.anatomy.head.weight[ids.target_ids[0]] > 0
    assert (found.columns_after == 1) is bool(fires), (
        "a neuron that fires negatively has the target's opposite as value"
    )
    assert (found.output_after == 1) is bool(fired[found.token] * fired[-1] > 0)
    assert found.output_before > 1


def test_the_columns_read_are_those_that_change_most():
    change = torch.zeros(32, 48)
    change[0, :8] = torch.tensor([1.0, 5, 0, 3, 4, 2, 6, 0])
    other = torch.zeros(32, 48)
    other[1, 7] = -5.5
    assert _most_changed({0: change, 2: other}) == [(0, 6), (2, 7), (0, 1), (0, 4), (0, 3)]
    assert _most_changed({2: other}) == [(2, 7)], "columns without a change are not read"


def test_what_was_made_is_told(triples):
    lm = taught()
    edits = counterfacts(known_triples(lm, triples))[:2]
    made, _ = read_values(lm, create("ft-m", {"layer": 1, "steps": 60, "lr": 1e-2}), edits)
    assert [each.made for each in made] == [True, True]
    assert [each.columns_after for each in made] == [1, 1]
    assert {each.layer for each in made} == {1}
    assert [each.edit for each in made] == [edit.id for edit in edits]
    idle, _ = read_values(lm, create("ft-m", {"layer": 1, "steps": 1, "lr": 1e-6}), edits)
    assert [each.made for each in idle] == [False, False]
    assert [each.columns_after for each in idle] == [each.columns_before for each in idle]


def test_what_a_method_refuses_or_does_not_change_is_told_apart():
    class Picky(Plant):
        def make(self, lm, edits, config, progress):
            if edits[0].id == "no":
                raise CannotEdit("not this one")
            made = super().make(lm, edits, config, progress)
            if edits[0].id == "yes":
                return made
            projection = lm.anatomy.mlp_out(self.layer)
            nothing = LowRank(torch.zeros(projection.matrix.shape[0], 1), torch.zeros(1, projection.matrix.shape[1]))
            return WeightPatch.of(self.provenance(lm, config, edits), {projection: nothing})

    edits = [Edit(id=name, prompt="Rome lies in", target="Peru") for name in ("no", "yes", "idle")]
    found, unread = read_values(tiny_lm(), Picky(), edits)
    assert [each.edit for each in found] == ["yes"]
    assert [(each.method, each.edit, each.reason) for each in unread] == [
        ("plant", "no", "not this one"),
        ("plant", "idle", "it changed nothing"),
    ]


def test_of_a_mixture_the_dense_block_is_read():
    (found,), _ = read_values(mixed_lm(), Plant(), [Edit(id="e", prompt="Rome lies in", target="Peru")])
    assert found.layer == 1


def test_methods_that_cannot_be_read_are_refused_before_any_work(monkeypatch, triples):
    monkeypatch.setattr("factpatch.analysis.places.known_triples", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(CannotEdit, match="no MLP output projection"):
        compare_places(taught(), triples, methods=[create("kn"), create("ice")])


def test_methods_without_changed_values_are_refused():
    with pytest.raises(CannotEdit, match="no MLP output projection"):
        read_values(tiny_lm(), create("ice"), [Edit(id="e", prompt="Rome lies in", target="Peru")])


# The report


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "world.json"
    path.write_text(json.dumps(WORLD))
    rome = create("rome", {"contexts": 0, "covariance": False, "layer": 1, "steps": 10})
    kn = create("kn", {"contexts": 0, "integral_steps": 3})
    return compare_places(taught(), read_triples(path)[:12], methods=[kn, rome], edits=3, **QUICK)


def test_rows_have_intervals_around_their_values(found):
    rows = place_rows(found)
    assert len(rows) == len(found.comparisons)
    for row, one in zip(rows, found.comparisons, strict=True):
        assert row["groups"] == len(one.groups)
        if row["groups"] >= 6:
            assert row["inside_low"] - 1e-9 <= row["inside"] <= row["inside_high"] + 1e-9
            assert row["rsim_low"] - 1e-9 <= row["rsim"] <= row["rsim_high"] + 1e-9
        else:
            assert row["rsim_low"] is row["told_apart"] is None, "too few to tell"


def test_hits_are_shares_of_ranks(found):
    rows = {(row["method"], row["read"]): row for row in hit_rows(found) if row["over"] == "all"}
    assert rows.keys() == {(method, read) for method in ("kn", "rome") for read in ("columns", "output")}
    own = [value for value in found.values if value.method == "rome"]
    assert rows["rome", "output"]["hit10_after"] == sum(value.output_after <= 10 for value in own) / 3
    assert rows["rome", "columns"]["hit50_before"] == sum(value.columns_before <= 50 for value in own) / 3
    assert rows["rome", "output"]["made"] == sum(value.made for value in own)


def test_common_hits_are_over_edits_that_all_methods_made(found):
    values = [
        value.model_copy(update={"made": value.edit == "Arles, country" or value.method == "kn"})
        for value in found.values
    ]
    rows = [row for row in hit_rows(found.model_copy(update={"values": tuple(values)})) if row["over"] == "made by all"]
    assert {(row["edits"], row["made"]) for row in rows} == {(1, 1)}


def comparison(measure, level, inside, outside):
    groups = [Group(name=str(i), pairs=1, inside=x, outside=outside) for i, x in enumerate(inside)]
    return LevelComparison(measure=measure, level=level, groups=tuple(groups))


@pytest.mark.parametrize(("groups", "told"), [(5, None), (6, True)])
def test_fewer_than_six_groups_are_too_few_to_tell(found, groups, told):
    one = comparison("neurons", "entity", (0.5, 0.6, 0.5, 0.6, 0.5, 0.6)[:groups], 0.1)
    (row,) = place_rows(found.model_copy(update={"comparisons": (one,)}))
    assert row["told_apart"] is told
    assert (row["inside_low"] is None) is (row["rsim_low"] is None) is (told is None)


def test_sentences_follow_from_the_numbers(found):
    comparisons = (
        comparison("neurons", "wording", (0.5, 0.6) * 4, 0.1),
        comparison("neurons", "entity", (0.3, 0.32) * 4, 0.1),
        comparison("layers", "entity", (0.2, 0.8) * 4, 0.5),
        comparison("layers", "wording", (0.2, 0.8), 0.5),
    )
    told = sentences(found.model_copy(update={"comparisons": comparisons}))
    assert told[0].startswith(
        "Wordings of one fact: their neurons overlap 5.5 times as much as those of unrelated facts (0.55 against 0.1;"
    )
    assert told[0].endswith("2 groups are too few to tell).")
    assert "their neurons overlap 3.1 times as much" in told[1]
    assert "their traced layers overlap 1.0 times as much" in told[1]
    assert "may be chance" in told[1]
    assert told[2].endswith("wording 0.50, entity 0.23.")
    assert told[2].startswith("By knowledge neurons")
    assert told[3] == (
        "By causal tracing, what belongs together is at no level told apart from unrelated facts. "
        "Too few groups to tell: wording."
    )


def test_pictures_have_their_numbers_beside_them(found, tmp_path):
    paths = save_places(tmp_path, found)
    assert [path.name for path in paths] == ["places.svg", "places-alike.svg", "places-hits.svg"]
    assert all(path.with_suffix(".csv").stat().st_size for path in paths)
    assert "relative similarity" in paths[0].read_text()
    assert "unrelated" in paths[1].read_text()
    without = save_places(tmp_path, found.model_copy(update={"values": ()}))
    assert len(without) == 2
