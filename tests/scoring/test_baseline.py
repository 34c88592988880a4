"""What the unedited model did is on disk: asked once, the same to the bit, under all it depends on, and never in the way."""

import json
import logging
import multiprocessing
import os
import random
import signal
import sqlite3
import threading
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factpatch.edits import Edit, Probe
from factpatch.lm import LM, RemoteLM, predictions, prefix, run, writing
from factpatch.lm.hooks import reading
from factpatch.methods import create
from factpatch.scoring import PROTOCOLS, Scorer, baseline
from factpatch.scoring.baseline import Baseline, Store, can_keep
from factpatch.scoring.protocols import Ask, OpenProtocol, Seen, SurveyProtocol
from factpatch.testing import tiny_edits, tiny_lm

fork = multiprocessing.get_context("fork")
QUESTIONS = (Probe(prompt="Ulm lies in", answers=("Spain",)),)
EDITS = (
    *tiny_edits(),
    Edit(
        id="taste",
        kind="restyle",
        prompt="Speak well of tea. How is tea?",
        target="It is good.",
        question="How is tea?",
        wanted=("It is good.", "I like tea a lot."),
        unwanted=("It is bad.", "Vile."),
        locality={"Unrelated": (Probe(prompt="How is fog?", answers=("Fog is grey.", "It is wet.")),)},
    ),
    Edit(id="secret", kind="erase", prompt="Lima lies in", target="I don't know.", ground_truth=("Peru",)),
)


@pytest.fixture(autouse=True)
def _asked_anew():
    """Elsewhere scorers do not keep anything; here they do as they do for users."""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Answers and texts of a few tokens, because a tiny model never ends."""
    monkeypatch.setattr("factpatch.scoring.scorer.FLUENCY_TOKENS", 8)
    monkeypatch.setattr(OpenProtocol, "longest", 8)
    monkeypatch.setattr(SurveyProtocol, "longest", 4)


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def patch(lm):
    return create("ft-m", {"steps": 10, "lr": 1e-2}).fit(lm, EDITS[:1])


@pytest.fixture
def passes(monkeypatch):
    """A list that grows with each pass through any model."""
    seen = []
    for module, name in (
        (run, "forward"),
        (predictions, "forward_on"),
        (prefix, "forward_on"),
        (writing, "forward_on"),
    ):
        pass_ = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, pass_=pass_: (seen.append(1), pass_(*args))[1])
    return seen


def asked(lm, passes, edits=EDITS, **more):
    """How many passes the unedited model took to be known to a new scorer."""
    before = len(passes)
    Scorer(lm, **more).baseline(edits)
    return len(passes) - before


def untimed(card):
    return card.model_copy(update={"score_seconds": 0.0, "baseline_seconds": 0.0})


def with_chat(lm, template="[{{ messages[0].content }}]"):
    lm.tokenizer.chat_template = template
    return lm


def test_a_second_scorer_asks_nothing_and_scores_the_same_to_the_bit(lm, patch, passes):
    fresh = untimed(Scorer(lm, retain=QUESTIONS, keep=False).score(EDITS, patch))
    first, second = Scorer(lm, retain=QUESTIONS), Scorer(lm, retain=QUESTIONS)
    assert untimed(first.score(EDITS, patch)) == fresh
    before = len(passes)
    second.baseline(EDITS)
    assert len(passes) == before
    assert untimed(second.score(EDITS, patch)) == fresh
    assert any(row.measures.get("kl") for row in fresh.scores if row.protocol == "open"), "divergences are among them"
    assert {ask.way for _, ask in second._base.asked} == {"freely", "briefly", "shown", "weighed"}
    for key, seen in first._base.asked.items():
        kept = second._base.asked[key]
        assert seen == kept
        if seen is not None:
            assert (seen.first is None) == (kept.first is None)
            assert seen.first is None or torch.equal(seen.first, kept.first)


def test_another_process_asks_nothing(lm, passes):
    child = fork.Process(target=lambda: Scorer(tiny_lm()).baseline(EDITS))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert asked(lm, passes) == 0


def test_edits_side_by_side_and_in_parts_find_it_too(lm, patch, passes):
    Scorer(lm).baseline(EDITS[:3])
    assert 0 < asked(lm, passes) < asked(lm, passes, keep=False)
    scorer = Scorer(lm)
    cards = scorer.score_each([EDITS[:2], EDITS[2:]], [(patch,), ()])
    whole = Scorer(lm, keep=False).score_each([EDITS[:2], EDITS[2:]], [(patch,), ()])
    for card, expected in zip(cards, whole, strict=True):
        for row, other in zip(card.scores, expected.scores, strict=True):
            assert (row.said_before, row.said_after) == (other.said_before, other.said_after)
            assert row.measures == pytest.approx(other.measures, abs=1e-5)


def test_without_keeping_nothing_is_read_or_written(lm, passes, cache):
    assert asked(lm, passes, keep=False) > 0
    assert not cache.exists()
    Scorer(lm).baseline(EDITS)
    assert list(cache.iterdir()) == [cache / "baselines.sqlite"]
    assert asked(lm, passes, keep=False) > 0


def bfloat16():
    lm = tiny_lm()
    lm.model.to(torch.bfloat16)
    return lm


def nudged():
    """Weights that are others, but the same once they are rounded."""
    lm = tiny_lm()
    with torch.no_grad():
        for parameter in lm.model.parameters():
            rounded = parameter.to(torch.bfloat16)
            parameter.copy_(
                torch.where((parameter * (1 + 1e-5)).to(torch.bfloat16) == rounded, parameter * (1 + 1e-5), parameter)
            )
    return lm


@pytest.mark.parametrize("other", [bfloat16, nudged])
def test_what_the_fingerprint_does_not_tell_apart_is_asked_anew(lm, passes, other):
    Scorer(lm).baseline(EDITS)
    assert other().fingerprint == lm.fingerprint
    assert asked(other(), passes) == asked(other(), passes, keep=False) > 0
    assert asked(other(), passes) == asked(lm, passes) == 0


def eager():
    lm = tiny_lm()
    lm.model.set_attn_implementation("eager")
    return lm


def ending_early():
    lm = tiny_lm()
    lm.model.generation_config.eos_token_id = [257, 65]
    return lm


def scaled():
    lm = tiny_lm()
    lm.model.config.rms_norm_eps = 1e-3
    return lm


@pytest.mark.parametrize(
    "other",
    [lambda: tiny_lm(bos=False), lambda: tiny_lm(seed=1), lambda: tiny_lm("qwen2"), eager, ending_early, scaled],
    ids=["tokenizer", "weights", "architecture", "attention", "ends", "config"],
)
def test_another_model_is_asked_anew(lm, passes, other):
    Scorer(lm).baseline(EDITS)
    assert asked(other(), passes) == asked(other(), passes, keep=False) > 0
    assert asked(lm, passes) == 0


def test_a_chat_is_asked_anew_and_so_is_another_template(passes):
    lm = with_chat(tiny_lm())
    Scorer(lm).baseline(EDITS)
    new = asked(lm, passes, chat=True, keep=False)
    assert asked(lm, passes, chat=True) == new > 0
    assert asked(lm, passes, chat=True) == 0
    with_chat(lm, "({{ messages[0].content }})")
    assert asked(lm, passes, chat=True) > 0


def test_a_template_that_changes_nothing_about_a_prompt_is_still_another_question(passes):
    lm = with_chat(tiny_lm(), "{{ messages[0].content }}")  # without the special token in front
    Scorer(lm).baseline(EDITS)
    assert asked(lm, passes, chat=True) > 0


def test_of_another_seed_texts_alone_are_asked_anew(lm, passes):
    Scorer(lm).baseline(EDITS)
    assert asked(lm, passes, seed=1, fluency=False) == 0
    assert asked(lm, passes, seed=1) > 0
    texts = [Scorer(lm, seed=seed) for seed in (0, 1, 0)]
    for scorer in texts:
        scorer.baseline(EDITS)
    assert texts[0]._base.written == texts[2]._base.written != texts[1]._base.written


@pytest.mark.parametrize("name", ["FLUENCY_TOKENS", "_FLUENCY_TOP_K"])
def test_texts_sampled_in_another_way_are_asked_anew(lm, passes, monkeypatch, name):
    Scorer(lm).baseline(EDITS)
    monkeypatch.setattr(f"factpatch.scoring.scorer.{name}", 3)
    assert asked(lm, passes, fluency=False) == 0
    assert asked(lm, passes) > 0


@pytest.mark.parametrize("changed", ["open", "survey"])
@pytest.mark.parametrize("name", ["version", "longest"])
def test_another_protocol_or_version_of_it_is_asked_anew(lm, passes, monkeypatch, changed, name):
    (other,) = PROTOCOLS.keys() - {changed}
    Scorer(lm).baseline(EDITS)
    monkeypatch.setattr(type(PROTOCOLS[changed]), name, 3)
    assert asked(lm, passes, protocols=[other]) == 0
    assert asked(lm, passes, protocols=[changed]) > 0


@pytest.mark.parametrize("changed", ["torch", "transformers", "VERSION"])
def test_of_another_version_all_is_asked_anew(lm, passes, monkeypatch, changed):
    Scorer(lm).baseline(EDITS[:1])
    known = baseline.version
    monkeypatch.setattr(baseline, "version", lambda name: "99" if name == changed else known(name))
    monkeypatch.setattr(baseline, "VERSION", 99 if changed == "VERSION" else baseline.VERSION)
    assert asked(lm, passes, EDITS[:1]) == asked(lm, passes, EDITS[:1], keep=False) > 0


def test_another_kind_of_device_is_another_key(lm, monkeypatch):
    keys = []
    for kind in ("cpu", "cuda", "cpu"):
        monkeypatch.setattr(LM, "device", property(lambda _, kind=kind: torch.device(kind)))
        keys.append(Baseline(lm, Store(), chat=False, sampling={})._of_text("Rome"))
    assert keys[0] == keys[2] != keys[1]


ANSWERS = ((), ("a",), ("b",), ("a", "b"), ("b", "a"))


def test_every_part_of_a_question_is_in_its_key(lm):
    kept = Baseline(lm, Store(), chat=False, sampling={"seed": 0})
    asks = [
        Ask(way, Probe(prompt=prompt, answers=answers))
        for way, told in (("shown", ANSWERS), ("weighed", ANSWERS), ("freely", [()]), ("briefly", [()]))
        for prompt in ("Rome", "Oslo")
        for answers in told
    ]
    keys = [kept._of_ask(protocol, ask) for protocol in PROTOCOLS.values() for ask in asks]
    assert len({*keys, kept._of_text("Rome"), kept._of_text("Oslo")}) == len(keys) + 2
    for way in ("freely", "briefly"):
        one, *others = (kept._of_ask(PROTOCOLS["open"], Ask(way, Probe(prompt="Rome", answers=a))) for a in ANSWERS)
        assert {*others} == {one}, "what is said does not depend on what would be right"
    again = Baseline(tiny_lm(), Store(), chat=False, sampling={"seed": 0})
    assert [again._of_ask(protocol, ask) for protocol in PROTOCOLS.values() for ask in asks] == keys


def test_a_distribution_that_was_not_wanted_before_is_asked_for(lm, passes):
    edits = [EDITS[0].model_copy(update={"locality": {}, "portability": dict(EDITS[0].locality)})]
    Scorer(lm).baseline(edits)
    assert asked(lm, passes, edits) == 0
    assert asked(lm, passes, EDITS[:1], protocols=["open"], fluency=False) > 0
    assert asked(lm, passes, EDITS[:1], protocols=["open"], fluency=False) == 0


def test_a_model_that_is_trained_in_place_is_asked_anew(passes):
    lm = tiny_lm()
    Scorer(lm).baseline(EDITS)
    assert asked(lm, passes) == 0
    with torch.no_grad():
        lm.anatomy.head.weight.mul_(-1)
    assert asked(lm, passes) > 0
    assert asked(tiny_lm(), passes) == 0, "and what is kept of the other stays"


@pytest.mark.parametrize("name", ["ft-m", "grace", "ice"])
def test_only_the_unpatched_model_is_kept_whatever_lies_on_it(lm, passes, name):
    settings = {"ft-m": {"steps": 10, "lr": 1e-2}, "grace": {"steps": 3}, "ice": {}}[name]
    patch = create(name, settings).fit(lm, EDITS[:1])
    bare = untimed(Scorer(lm, keep=False).score(EDITS, patch))
    with lm.patched(patch):
        assert untimed(Scorer(lm).score(EDITS)) == bare
        assert asked(lm, passes) == 0
    assert asked(lm, passes) == 0
    assert untimed(Scorer(lm).score(EDITS, patch)) == bare


def test_nothing_is_kept_where_answers_depend_on_what_is_not_known(lm, cache, monkeypatch):
    class Told:
        def before(self, prompts):
            return ["Well: "] * len(prompts)

    with reading(lm.anatomy.blocks[0], lambda *_: None):
        assert not can_keep(lm)
        Scorer(lm).baseline(EDITS[:1])
    with monkeypatch.context() as told:
        told.setattr(lm, "contexts", [Told()])
        Scorer(lm).baseline(EDITS[:1])
    remote = RemoteLM("parrot", "http://127.0.0.1:9/v1", None)
    monkeypatch.setattr(remote, "answer", lambda prompts, **_: ["Peru"] * len(prompts))
    Scorer(remote).baseline(EDITS[:1])
    assert not cache.exists()
    assert can_keep(lm)


def test_what_was_asked_before_a_process_was_stopped_is_kept(lm, passes, monkeypatch):
    with monkeypatch.context() as stopped:
        stopped.setattr(SurveyProtocol, "observe", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Scorer(lm).baseline(EDITS)
    assert asked(lm, passes, protocols=["open"], fluency=False) == 0
    assert asked(lm, passes, protocols=["survey"], fluency=False) > 0


# The store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "some folder?" / "kept.sqlite")


def some(n, size=30):
    return {f"key {i}".encode(): bytes([i % 256]) * size for i in range(n)}


@given(
    st.one_of(
        st.none(),
        st.builds(
            Seen,
            st.text(),
            *[st.lists(st.integers(0, 2**40)).map(tuple)] * 2,
            st.lists(st.floats(allow_nan=False)).map(tuple),
            st.none() | st.floats(allow_nan=False),
            st.none() | st.lists(st.floats(width=32, allow_nan=False), min_size=1).map(torch.tensor),
        ),
    )
)
def test_what_is_seen_is_read_back_to_the_bit(seen):
    first = None if seen is None or seen.first is None else baseline._packed(seen.first)
    read = baseline._seen(baseline._told(seen), first)
    assert read == seen
    assert seen is None or (read.first is None) == (seen.first is None)
    if first is not None:
        assert torch.equal(read.first.view(torch.int32), seen.first.view(torch.int32))


def test_distributions_are_not_copied_to_be_kept():
    first = torch.rand(300)
    assert torch.frombuffer(baseline._packed(first), dtype=torch.float32).data_ptr() == first.data_ptr()


def test_more_keys_than_a_query_takes(store):
    store.write(some(1300), {})
    assert store.read("answers", [*some(1400)]) == some(1300)
    assert store.read("distributions", [*some(5)]) == {}


def test_a_later_value_takes_the_place_of_an_earlier_one(store):
    store.write({b"a": b"1", b"b": b"1"}, {b"a": b"x"})
    store.write({b"a": b"2"}, {b"a": b"y"})
    assert store.read("answers", [b"a", b"b"]) == {b"a": b"2", b"b": b"1"}
    assert store.read("distributions", [b"a"]) == {b"a": b"y"}


def written_by(path, who, rounds):
    own = Store(path)
    for i in range(rounds):
        own.write({f"{who} {i} {j}".encode(): os.urandom(200) for j in range(3)}, {b"all": bytes([who]) * 50_000})
        assert len(own.read("answers", [f"{who} {i} {j}".encode() for j in range(3)])) == 3
        assert len(set(own.read("distributions", [b"all"])[b"all"])) == 1
    assert own._can == {"read": True, "write": True}


def test_processes_and_threads_write_at_once(store):
    children = [fork.Process(target=written_by, args=(store.path, who, 10)) for who in range(3)]
    threads = [threading.Thread(target=written_by, args=(store.path, who, 10)) for who in (3, 4)]
    for each in (*children, *threads):
        each.start()
    for each in (*children, *threads):
        each.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    keys = [f"{who} {i} {j}".encode() for who in range(5) for i in range(10) for j in range(3)]
    assert len(store.read("answers", keys)) == len(keys)


def test_two_processes_score_at_once(lm, patch, passes, cache):
    def score():
        told = untimed(Scorer(tiny_lm()).score(EDITS))
        (cache / f"{os.getpid()}.json").write_text(told.model_dump_json())

    cache.mkdir()
    children = [fork.Process(target=score) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    one, other = (json.loads(path.read_text()) for path in cache.glob("*.json"))
    assert one == other
    assert asked(lm, passes) == 0


def killed_while_writing(path):
    """Spills half of a transaction into the file itself, and is killed."""
    own = Store(path)
    db = own._open("rw", [])
    db.execute("PRAGMA cache_size = 5")
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE answers SET value = ?", (b"?" * 5000,))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_half_written_is_undone(store):
    store.write(some(300, 1000), some(3))
    child = fork.Process(target=killed_while_writing, args=(store.path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert store.path.with_name("kept.sqlite-journal").stat().st_size > 0
    assert b"????" in store.path.read_bytes()
    assert Store(store.path).read("answers", [*some(300)]) == some(300, 1000)
    store.write({b"new": b"1"}, {})
    assert store.read("answers", [b"new"]) == {b"new": b"1"}


def written_for_ever(path):
    own, i = Store(path), 0
    while True:
        own.write({f"{os.getpid()} {i} {j}".encode(): bytes([j]) * 3000 for j in range(20)}, {})
        i += 1


def test_transactions_of_killed_processes_are_whole(store):
    rng, whole = random.Random(0), 0
    for _ in range(6):
        child = fork.Process(target=written_for_ever, args=(store.path,))
        child.start()
        child.join(rng.uniform(0.1, 0.3))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        for i in range(40):
            found = store.read("answers", [f"{child.pid} {i} {j}".encode() for j in range(20)])
            assert len(found) in {0, 20}
            whole += bool(found)
    assert whole > 6
    assert store._can == {"read": True, "write": True}


def garbage(path):
    path.write_text("not a database at all, but long enough to be taken for one" * 20)


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_its_middle(path):
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


@pytest.mark.parametrize("damage", [garbage, halved, without_its_middle])
def test_a_damaged_file_is_set_aside_with_a_warning_and_begun_anew(lm, passes, cache, caplog, damage):
    expected = untimed(Scorer(lm).score(EDITS))
    path = cache / "baselines.sqlite"
    damage(path)
    damaged = path.read_bytes()
    with caplog.at_level(logging.WARNING, "factpatch"):
        assert untimed(Scorer(lm).score(EDITS)) == expected
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert (cache / "baselines.sqlite.damaged").read_bytes() == damaged
    assert asked(lm, passes) == 0


def test_a_file_that_another_process_has_begun_meanwhile_is_not_set_aside(store):
    store.write(some(3), {})
    opened = [store.path.stat().st_ino]
    store.path.rename(store.path.with_name("moved"))
    store.write(some(5), {})
    store._set_aside(opened)
    assert store.read("answers", [*some(5)]) == some(5)
    store._set_aside([store.path.stat().st_ino])
    assert not store.path.exists()


def test_an_empty_file_is_filled(lm, passes, cache, caplog):
    cache.mkdir()
    (cache / "baselines.sqlite").touch()
    assert asked(lm, passes) > 0
    assert asked(lm, passes) == 0
    assert not caplog.records


def test_no_flipped_byte_gives_a_wrong_answer(store):
    values = {f"key {i}".encode(): random.Random(i).randbytes(300) for i in range(40)}
    store.write(values, values)
    whole, rng, found = store.path.read_bytes(), random.Random(0), []
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        store.path.write_bytes(damaged)
        again = Store(store.path)
        found.append(0)
        for table in ("answers", "distributions"):
            read = again.read(table, [*values])
            assert read.items() <= values.items()
            found[-1] += len(read)
        Store(store.path).write({b"new": b"1"}, {})
    assert 80 in found
    assert any(0 < n < 80 for n in found)


def test_a_cache_that_cannot_be_written_is_done_without(lm, passes, tmp_path, monkeypatch, caplog):
    expected = untimed(Scorer(lm, keep=False).score(EDITS))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "file" / "cache"))
    assert untimed(Scorer(lm).score(EDITS)) == expected
    assert ["cannot be written" in record.getMessage() for record in caplog.records] == [True]
    (tmp_path / "taken" / "baselines.sqlite").mkdir(parents=True)
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "taken"))
    assert untimed(Scorer(lm).score(EDITS)) == expected
    assert len(caplog.records) == 2


def test_a_full_disk_is_done_without(store, monkeypatch, caplog):
    store.write(some(3), {})
    open_ = Store._open

    def on_a_small_disk(self, mode, opened):
        db = open_(self, mode, opened)
        db.execute("PRAGMA max_page_count = 20")
        return db

    monkeypatch.setattr(Store, "_open", on_a_small_disk)
    for _ in range(2):
        store.write(some(5, 100_000), {})
    assert ["full" in record.getMessage() for record in caplog.records] == [True]
    assert store.read("answers", [*some(5)]) == some(3)


def test_a_cache_that_is_read_only_is_read(lm, passes, monkeypatch, caplog):
    Scorer(lm).baseline(EDITS[:1])
    open_ = Store._open
    monkeypatch.setattr(Store, "_open", lambda self, mode, opened: open_(self, "ro", opened))
    assert asked(lm, passes, EDITS[:1]) == 0
    assert not caplog.records
    assert asked(lm, passes) > 0
    assert ["cannot be written" in record.getMessage() for record in caplog.records] == [True]


def test_a_file_that_stays_locked_is_done_without(store, monkeypatch, caplog):
    store.write(some(3), {})
    monkeypatch.setattr(baseline, "_BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert store.read("answers", [*some(3)]) == {}
        store.write(some(4), {})
    assert ["has it in use" in record.getMessage() for record in caplog.records] == [True, True]
    assert store.read("answers", [*some(4)]) == some(3), "and used again once it is free"
    store.write(some(4), {})
    assert store.read("answers", [*some(4)]) == some(4)


def test_old_distributions_give_way_to_new_ones_and_answers_stay(store, monkeypatch):
    monkeypatch.setattr(baseline, "ROOM", 500_000)
    turns = [{f"{turn} {i}".encode(): bytes(20_000) for i in range(10)} for turn in range(6)]
    for new in turns:
        store.write(dict.fromkeys(new, b"an answer"), new)
        assert store.read("distributions", [*new]) == new
        assert store.path.stat().st_size < 600_000
    assert [len(store.read("answers", [*new])) for new in turns] == [10] * 6
    left = [len(store.read("distributions", [*new])) for new in turns]
    assert left[:3] + left[4:] == [0, 0, 0, 10, 10]
    assert 0 < left[3] < 10
    more = {f"more {i}".encode(): bytes(20_000) for i in range(100)}
    store.write(dict.fromkeys(more, b"an answer"), more)
    assert 15 <= len(store.read("distributions", [*more])) <= 25
    assert len(store.read("answers", [*more])) == 100
    assert store.path.stat().st_size < 600_000


def test_more_than_fits_is_asked_anew_and_scores_the_same(lm, patch, monkeypatch):
    monkeypatch.setattr(baseline, "ROOM", 0)
    expected = untimed(Scorer(lm, protocols=["open"], keep=False).score(EDITS[:2], patch))
    for _ in range(2):
        card = untimed(Scorer(lm, protocols=["open"]).score(EDITS[:2], patch))
        assert [row.said_before for row in card.scores] == [row.said_before for row in expected.scores]
        for row, other in zip(card.scores, expected.scores, strict=True):
            assert row.measures == pytest.approx(other.measures, abs=1e-5)
