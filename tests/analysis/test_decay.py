"""Sequential decay: numbers by hand, ages, where a method breaks, interrupted runs, pictures."""

import csv
import io
import json
import logging
import math
from itertools import count

import pytest

from factpatch.analysis import decay as decay_module
from factpatch.analysis import health
from factpatch.analysis.decay import Decay, Look, Rule, breaks, kept_at, sequential_decay
from factpatch.analysis.health import Monitor, Vitals
from factpatch.bench import score_sequence, sequence
from factpatch.edits import Edit, Probe
from factpatch.errors import BadFile
from factpatch.methods import create
from factpatch.report.decay import decay_pictures, decay_rows
from factpatch.report.picture import save_picture
from factpatch.scoring import Retained, Scorer
from factpatch.testing import Snapshot, tiny_edits, tiny_lm
from tests.cards import rows

TEXTS = ("Rome was a town once.", "So it is said of it.")
SETTINGS = {"layer": 1, "steps": 15, "lr": 1e-2}


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def scorer(lm):
    return Scorer(lm, fluency=False)


@pytest.fixture(scope="module")
def monitor(lm):
    return Monitor(lm, texts=TEXTS, canaries=())


def five():
    return [
        *tiny_edits(),
        *(Edit(id=f"e{i}", prompt=f"Town {i} lies in", subject=f"Town {i}", target="Chad") for i in range(3)),
    ]


def of(lm, scorer, monitor, edits=None, method=None, at=(1, 3), folder=None):
    method = create("ft-m", SETTINGS) if method is None else method
    return sequential_decay(lm, method, five() if edits is None else edits, scorer, monitor, at, folder)


@pytest.fixture(scope="module")
def whole(lm, scorer, monitor):
    """A sequence made in one go and kept nowhere."""
    return of(lm, scorer, monitor)


def same(one, other):
    left = {"fit_seconds", "score_seconds"}
    return json.loads(one.model_dump_json(exclude=left)) == json.loads(other.model_dump_json(exclude=left))


def test_points_and_vitals_are_those_of_a_plain_loop(lm, scorer, monitor, whole):
    method, laid = create("ft-m", SETTINGS), []
    plain = score_sequence(lm, method, five(), scorer, (1, 3))
    assert [checkpoint.patches for checkpoint in whole.checkpoints] == [1, 3, 5]
    assert whole.protocols == ("open", "survey")
    for protocol in whole.protocols:
        each = plain.at_edit.per_edit(protocol, "edit")
        for point in whole.points(protocol):
            at_end = plain.at_end[point.patches].summary(protocol)
            ids = [edit.id for edit in five()[: point.patches]]
            assert point.edits == point.patches
            assert point.at_edit == pytest.approx(sum(each[i] for i in ids) / len(ids))
            assert point.at_end == pytest.approx(at_end.edit_success)
            for score in ("rephrase", "portability", "locality"):
                assert getattr(point, score) == pytest.approx(getattr(at_end, score))
            assert point.fluency is None
    for edit in five():
        with lm.patched(*laid):
            laid.append(method.fit(lm, [edit]))
        if len(laid) in {1, 3, 5}:
            with lm.patched(*laid):
                vitals = monitor.vitals()
            found = next(c.vitals for c in whole.checkpoints if c.patches == len(laid))
            assert found.perplexity == pytest.approx(vitals.perplexity, rel=1e-5)
            assert found.norm == pytest.approx(vitals.norm, rel=1e-5)
    assert whole.unedited.norm == 0
    assert whole.refused == {}


def test_the_model_is_as_it_was(lm, scorer, monitor):
    before = Snapshot.of(lm)
    of(lm, scorer, monitor, edits=five()[:2])
    assert before.differences(lm) == []


@pytest.mark.parametrize(("name", "settings"), [("ft-m", SETTINGS), ("grace", {"layer": 1, "steps": 20, "lr": 1.0})])
def test_at_edit_is_what_each_edit_gives_on_those_beneath_it(lm, scorer, monkeypatch, name, settings):
    """Patches of weights are scored as the weights they left, others laid on anew; some were scored before others are made."""
    monkeypatch.setattr(sequence, "ABREAST", 2)
    given, own = [], scorer.score_each
    monkeypatch.setattr(
        scorer, "score_each", lambda groups, stacks: given.extend(map(len, stacks)) or own(groups, stacks)
    )
    method, laid, by_hand = create(name, settings), [], []
    done = score_sequence(lm, method, five()[:3], scorer)
    for edit in five()[:3]:
        with lm.patched(*laid):
            laid.append(method.fit(lm, [edit]))
        by_hand += rows(scorer.score([edit], *laid))
    assert rows(done.at_edit) == by_hand
    assert given == ([1] * 3 if name == "ft-m" else [1, 2, 3]), "how many patches each lane was given"


# By hand.


def vitals(ratio=1.0, kept=(10, 10), norm=0.01):
    had = {"prompt": "q", "answers": ("x",), "before": "x", "after": "y", "was_right": True}
    asked = tuple(Retained(**had, changed=i >= kept[0], is_right=i < kept[0]) for i in range(kept[1]))
    return Vitals(norm=norm, perplexity=ratio * 8, perplexity_before=8.0, questions=asked)


def made(at_edit, ends, vital=None, refused=()):
    """A sequence by its success: at edit by edit, and after so many patches a list of those of the edits made by then."""
    ids = [f"e{i}" for i in range(len(at_edit) + len(refused)) if i not in refused]
    checkpoints = []
    for patches, values in ends.items():
        now = dict(zip(ids, values, strict=False))
        checkpoints.append(
            Look(
                patches=patches,
                made=tuple((i,) for i in now),
                scores={"open": {"edit": now}},
                vitals=(vital or {}).get(patches, vitals()),
            )
        )
    return Decay(
        method="by hand",
        config={},
        model="m",
        fingerprint="f",
        units=max(ends, default=0),
        at_edit={"open": {"edit": dict(zip(ids, at_edit, strict=True))}},
        checkpoints=tuple(checkpoints),
        unedited=vitals(norm=0.0),
        refused={f"e{i}": "no" for i in refused},
        fit_seconds=0,
        score_seconds=0,
        packages={},
    )


def test_bins_of_ages_by_hand():
    # Thirteen edits: the last has age 0, the first age 12.
    now = [1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 1]
    decay = made([1] * 12 + [0], {13: now})
    found = [(b.youngest, b.oldest, b.edits, b.at_edit, b.now) for b in decay.ages("open")]
    assert found == [
        (0, 0, 1, 0, 1),  # the last
        (1, 2, 2, 1, 1 / 2),  # 1, 0
        (3, 9, 7, 1, 3 / 7),  # 0, 0, 0, 1, 1, 0, 1
        (10, 29, 3, 1, 2 / 3),  # 1, 0, 1
    ]
    assert [(b.youngest, b.oldest, b.edits) for b in decay.ages("open", bounds=(0, 5))] == [(0, 4, 5), (5, 12, 8)]
    assert decay.ages("survey") == ()


def test_an_age_is_counted_in_patches_that_were_made():
    decay = made([1, 1, 1], {5: [0, 1, 1]}, refused=(1, 4))  # e0, e2, e3
    assert [(b.youngest, b.oldest, b.edits, b.now) for b in decay.ages("open")] == [(0, 0, 1, 1), (1, 2, 2, 1 / 2)]


def test_ages_at_an_earlier_checkpoint():
    decay = made([1, 1, 1, 1], {1: [0], 4: [1, 1, 1, 0]})
    assert [(b.youngest, b.now) for b in decay.ages("open", 0)] == [(0, 0)]
    assert [(b.youngest, b.now) for b in decay.ages("open")] == [(0, 0), (1, 1), (3, 1)]


def test_no_age_is_lost():
    for n in range(1, 40):
        decay = made([1] * n, {n: [1] * n})
        bins = decay.ages("open", bounds=(0, 1, 3, 10, 30))
        assert sum(b.edits for b in bins) == n
        assert [b.oldest + 1 for b in bins[:-1]] == [b.youngest for b in bins[1:]]
        assert bins[-1].edits <= bins[-1].oldest - bins[-1].youngest + 1


ENDS = {1: [1], 2: [1, 1], 4: [1, 1, 0, 0], 8: [1, 0, 0, 0, 0, 0, 0, 0]}


@pytest.mark.parametrize(
    ("at_edit", "vital", "rule", "expected"),
    [
        ([1] * 8, {}, Rule(), [("success", 8, 4)]),  # 0.5 at 4 is not under a half
        ([1] * 8, {}, Rule(min_success=0.51), [("success", 4, 2)]),
        ([1] * 8, {}, Rule(min_success=0), []),
        ([1, 1, 0, 0, 0, 0, 0, 0], {}, Rule(), []),  # 1/8 of 2/8 is half
        ([0] * 8, {}, Rule(), []),  # nothing was ever there to be lost
        ([1] * 8, {2: vitals(2.0), 4: vitals(2.1)}, Rule(), [("perplexity", 4, 2), ("success", 8, 4)]),
        ([1] * 8, {1: vitals(2.1), 2: vitals(0.5)}, Rule(), [("perplexity", 1, 0), ("success", 8, 4)]),
        ([1] * 8, {4: vitals(kept=(4, 10)), 8: vitals(kept=(0, 10))}, Rule(), [("canaries", 4, 2), ("success", 8, 4)]),
        ([1] * 8, {4: vitals(kept=(5, 10))}, Rule(), [("success", 8, 4)]),
        ([1] * 8, {4: vitals(kept=(0, 0))}, Rule(min_success=0), []),  # there was no canary
        ([1] * 8, {4: vitals(math.nan)}, Rule(min_success=0), [("perplexity", 4, 2)]),
        ([1] * 8, {8: vitals(math.inf, (0, 1))}, Rule(), [("success", 8, 4), ("perplexity", 8, 4), ("canaries", 8, 4)]),
    ],
)
def test_where_it_breaks_by_hand(at_edit, vital, rule, expected):
    found = breaks(made(at_edit, ENDS, vital), rule)
    assert [(one.kind, one.at, one.after) for one in found] == expected
    for one in found:
        assert f"{one.value:.3g}" in one.says


def test_the_rule_says_its_numbers():
    said = Rule(min_success=0.4, max_perplexity=3, min_canaries=0.7).says()
    assert all(text in said for text in ("0.4 times", "3 times", "0.7 of the canary"))


# Interrupted runs.


class Interrupted(Exception):
    """Stands for a kill."""


def counting(method, stop_at=None):
    """The method, raising at a fit of this number, and the list of its fits."""
    fits, own = [], type(method).fit

    def fit(lm, edits, progress=None):
        if len(fits) + 1 == stop_at:
            raise Interrupted
        fits.append(edits[0].id)
        return own(method, lm, edits)

    method.fit = fit
    return method, fits


@pytest.mark.parametrize("stop_at", [2, 5])
def test_killed_and_gone_on_with_gives_the_same(lm, scorer, monitor, whole, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(sequence, "ABREAST", 2)
    before = Snapshot.of(lm)
    method, first = counting(create("ft-m", SETTINGS), stop_at)
    with pytest.raises(Interrupted):
        of(lm, scorer, monitor, method=method, folder=tmp_path)
    assert before.differences(lm) == []
    (unfinished,) = tmp_path.glob("*.unfinished")
    with (unfinished / "outcomes.jsonl").open("a") as file:
        file.write('{"moment": "at edit", "number": 0, "edi')  # cut off in the middle of a line
    method, second = counting(create("ft-m", SETTINGS))
    found = of(lm, scorer, monitor, method=method, folder=tmp_path)
    assert same(found, whole)
    kept = (stop_at - 1) // 2 * 2  # those that were scored, two at a time
    assert first == [edit.id for edit in five()[: stop_at - 1]]
    assert second == [edit.id for edit in five()[kept:]]
    assert before.differences(lm) == []
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".json"


def test_killed_while_a_checkpoint_is_measured(lm, scorer, whole, tmp_path, monkeypatch):
    monitor, calls, own = Monitor(lm, texts=TEXTS, canaries=()), count(1), Monitor.vitals

    def measured(self):
        if next(calls) == 2:
            raise Interrupted
        return own(self)

    monkeypatch.setattr(Monitor, "vitals", measured)
    before = Snapshot.of(lm)
    with pytest.raises(Interrupted):
        of(lm, scorer, monitor, folder=tmp_path)
    assert before.differences(lm) == []
    assert same(of(lm, scorer, monitor, folder=tmp_path), whole)


def test_what_is_done_is_not_made_again_and_what_decides_it_is_all_in_the_key(
    lm, scorer, monitor, tmp_path, monkeypatch
):
    def again(**other):
        method, _ = counting(create("ft-m", SETTINGS | other.pop("settings", {})), stop_at=1)
        given = {"scorer": scorer, "monitor": monitor, "edits": five()[3:], "at": (1, 3)} | other
        return of(lm, method=method, folder=tmp_path, **given)

    first = of(lm, scorer, monitor, edits=five()[3:], folder=tmp_path)
    assert again() == first
    assert again(at=(1, 2, 1000)) == first, "the same checkpoints"
    for other in (
        {"settings": {"steps": 2}},
        {"settings": {"seed": 1}},
        {"edits": five()[2:4]},
        {"at": (2,)},
        {"scorer": Scorer(lm, fluency=False, protocols=["survey"])},
        {"scorer": Scorer(lm, fluency=False, seed=1)},
        {"monitor": Monitor(lm, texts=TEXTS[:1], canaries=())},
        {"monitor": Monitor(lm, texts=TEXTS, canaries=[Probe(prompt="Who?")])},
    ):
        with pytest.raises(Interrupted):
            again(**other)
    (path,) = tmp_path.glob("*.json")
    assert path == kept_at(lm, create("ft-m", SETTINGS), five()[3:], scorer, monitor, (1, 3), tmp_path)
    own = decay_module.version
    monkeypatch.setattr(decay_module, "version", lambda name: "0.0" if name == "factpatch" else own(name))
    with pytest.raises(Interrupted):
        again()


def test_a_result_kept_before_the_version_was_in_the_key_is_read(lm, scorer, monitor, tmp_path):
    first = of(lm, scorer, monitor, edits=five()[:1], folder=tmp_path)
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    # The fields as they were first written: results of long measurements are read by them.
    assert set(kept) == {
        *("key", "method", "config", "model", "fingerprint", "units", "at_edit", "checkpoints", "unedited", "refused"),
        *("fit_seconds", "score_seconds", "packages"),
    }
    assert set(kept["checkpoints"][0]) == {"patches", "made", "scores", "vitals"}
    assert set(kept["unedited"]) == {"norm", "perplexity", "perplexity_before", "questions"}
    del kept["key"]["factpatch"]
    path.write_text(json.dumps(kept))
    assert of(lm, scorer, monitor, edits=five()[:1], folder=tmp_path) == first


def test_that_copies_will_have_no_room_is_said(lm, scorer, monitor, monkeypatch, caplog):
    monkeypatch.setattr(health, "_free", lambda _: 0)
    with caplog.at_level(logging.WARNING, logger="factpatch"):
        of(lm, scorer, monitor)
    assert len([record for record in caplog.records if "ft-m: each patch keeps" in record.message]) == 1


def test_a_damaged_result_is_named(lm, scorer, monitor, tmp_path):
    of(lm, scorer, monitor, edits=five()[:1], folder=tmp_path)
    (path,) = tmp_path.iterdir()
    for text in ("{", "{}", '{"key": {}}', "[]"):
        path.write_text(text)
        with pytest.raises(BadFile, match=r"damaged(.|\n)*Remove it"):
            of(lm, scorer, monitor, edits=five()[:1], folder=tmp_path)


def test_refused_edits_are_told_and_the_rest_goes_on(lm, scorer, monitor, tmp_path):
    edits = [five()[0], Edit(id="none", prompt="Oslo lies in", target="Chad"), five()[1]]
    method = create("rome", {"layer": 1, "steps": 2, "contexts": 1, "moment_tokens": 300, "moment_length": 30})
    found = of(lm, scorer, monitor, edits=edits, method=method, at=(1, 2), folder=tmp_path)
    assert list(found.refused) == ["none"]
    assert "needs to know the subject" in found.refused["none"]
    assert [(p.patches, p.edits) for p in found.points("open")] == [(1, 1), (2, 1), (3, 2)]
    none = of(lm, scorer, monitor, edits=edits[1:2], method=method)
    assert (none.checkpoints, none.points("open"), none.ages("open"), breaks(none)) == ((), (), (), ())


# Pictures.


def test_methods_that_leave_the_weights_have_no_picture_of_their_growth():
    still = {"retrieval": made([1] * 8, ENDS, {n: vitals(1.0, norm=0.0) for n in ENDS})}
    assert {picture.name for picture in decay_pictures(still)} == {"success-open", "age-open", "perplexity", "guard"}


def test_every_picture_has_its_numbers(tmp_path):
    decays = {
        f"method {i}": made(
            [1] * 8, ENDS, {n: vitals(3.0 if i and n == 8 else 1.0, norm=0.1 * abs(i - 2)) for n in ENDS}
        )
        for i in range(9)
    } | {"nothing": made([], {})}
    pictures = {picture.name: picture for picture in decay_pictures(decays)}
    assert set(pictures) == {"success-open", "age-open", "perplexity", "norm", "guard"}
    success = pictures["success-open"]
    assert {row["method"] for row in success.rows} == {f"method {i}" for i in range(9)}
    assert [
        (r["patches"], r["at_end"], r["at_edit"], r["broken"]) for r in success.rows if r["method"] == "method 3"
    ] == [
        (1, 1, 1, False),
        (2, 1, 1, False),
        (4, 0.5, 1, False),
        (8, 0.125, 1, True),
    ]
    assert success.rows[3]["why"] == "success at end is 0.125 times that at edit"
    assert all(f"method {i}" in success.svg for i in range(9))
    for name in ("success-open", "perplexity", "norm", "guard"):
        assert "patches asked for, all that were made kept" in pictures[name].svg
        assert "edits" not in pictures[name].rows[0]
    assert "method 2 (none)" in pictures["norm"].svg
    assert [(r["youngest"], r["oldest"], r["edits"], r["now"]) for r in pictures["age-open"].rows[:4]] == [
        (0, 0, 1, 0),
        (1, 2, 2, 0),
        (3, 9, 5, 0.2),
        (0, 0, 1, 0),
    ]
    for picture in pictures.values():
        save_picture(tmp_path, picture.name, picture.svg, picture.rows)
    told = list(csv.DictReader(io.StringIO((tmp_path / "perplexity.csv").read_text())))
    assert told[-1]["perplexity_ratio"] == "3.0"
    assert len(told) == 9 * 4
    assert len(decay_rows(decays)) == 9 * 4


def test_nothing_made_gives_no_picture():
    assert decay_pictures({"nothing": made([], {})}) == []


def test_values_that_are_not_finite_are_written_and_not_drawn(tmp_path):
    decay = made([1] * 8, ENDS, {8: vitals(math.inf), 4: vitals(math.nan)})
    (picture,) = (one for one in decay_pictures({"a": decay}) if one.name == "perplexity")
    assert [row["perplexity_ratio"] for row in picture.rows][-1] == math.inf
    assert math.isinf(Decay.model_validate_json(decay.model_dump_json()).checkpoints[-1].vitals.perplexity)
