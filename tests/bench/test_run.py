"""Grids: what is on record stays, what is missing is made, whoever was killed in between."""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from factpatch.bench import Cell, Grid, MethodSpec, Mode, Outcome, Run, Store, Worker
from factpatch.bench.cluster import _Cluster
from factpatch.bench.outcome import ALONE, watching_memory
from factpatch.bench.run import Turn
from factpatch.data import write_jsonl
from factpatch.edits import Edit, Probe
from factpatch.errors import AnatomyError, BadConfig, BadFile, OutputError, UnknownMethod
from factpatch.files import contents_sha256, sha256_of
from factpatch.methods import create
from factpatch.report import result_rows, table_rows
from factpatch.scoring import Scorecard, Scorer
from factpatch.testing import Snapshot, tiny_edits, tiny_lm
from tests.cards import rows

QUICK = {"layer": 1, "steps": 4, "lr": 1e-2}
METHODS = [{"name": "ft-m", "settings": QUICK}, {"name": "grace", "settings": {"steps": 3}}, "ice"]
TIMES = {"fit_seconds", "score_seconds", "peak_memory_mb", "prepare_seconds"}
ABREAST = 5
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def few_abreast(monkeypatch):
    """So that there is more than one turn on few edits."""
    for module in ("run", "sequence", "singles"):
        monkeypatch.setattr(f"factpatch.bench.{module}.ABREAST", ABREAST)


def facts(n):
    names = ("Rome", "Oslo", "Lima", "Bern", "Kiev")
    return [
        Edit(
            id=f"fact-{i}",
            prompt=f"{names[i % 5]} {i} lies in",
            subject=names[i % 5],
            target=("Peru", "Chad")[i % 2],
            rephrases=(f"Find {names[i % 5]} {i} in",),
            locality={"N": (Probe(prompt=f"Ulm {i} lies in", answers=("Spain",)),)},
        )
        for i in range(n)
    ]


@pytest.fixture
def data(tmp_path):
    write_jsonl(facts(11), tmp_path / "facts.jsonl")
    return str(tmp_path / "facts.jsonl")


def grid_of(data, **more):
    return Grid.make({"methods": METHODS, "data": [data], "fluency": False, "at": [1, 3]} | more)


def run_of(grid, folder):
    return Run(grid, folder, Worker(grid, lm=tiny_lm()))


def test_a_file_is_given_once_with_a_range_of_its_own(data, tmp_path):
    grid = grid_of({"file": data, "start": 2, "limit": 3}, limit=9)
    (dataset,) = grid.read_data()
    assert [edit.id for edit in dataset.edits] == ["fact-2", "fact-3", "fact-4"]
    with pytest.raises(BadConfig, match="given twice"):
        Grid.make({"methods": METHODS, "data": [{"file": data, "limit": 2}, {"file": data, "start": 5}]}).read_data()


def done(grid, folder):
    """The whole grid, run without being disturbed."""
    run = run_of(grid, folder)
    run.go()
    assert run.failed == {}
    return table(folder)


def table(folder):
    """All numbers but what was measured by the clock; to six places."""
    with Store(folder, make=False) as store:
        return [plain({k: v for k, v in row.items() if k not in TIMES}) for row in table_rows(store)]


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def test_a_grid_gives_what_each_method_gives_by_hand(data, tmp_path):
    grid, lm = grid_of(data, limit=3), tiny_lm()
    before = Snapshot.of(lm)
    worker = Worker(grid, lm=lm)
    run = Run(grid, tmp_path / "run", worker)
    run.go()
    assert before.differences(lm) == []
    for number, cell in run.store.cells().items():
        spec = next(spec for spec in grid.methods if spec.name == cell.method)
        method = create(spec.name, spec.settings)
        by_hand = [Scorer(lm, fluency=False).score([edit], method.fit(lm, [edit])) for edit in facts(3)]
        assert rows(run.store.card(number, ALONE)) == rows(Scorecard.join(by_hand))
    assert [cell.method for cell in run.store.cells().values()] == ["ft-m", "grace", "ice"]


def test_what_is_on_record_is_not_made_again(data, tmp_path, monkeypatch):
    first = done(grid_of(data, limit=3), tmp_path / "run")

    def never(*_, **__):
        raise AssertionError("made again")

    with monkeypatch.context() as patched:
        patched.setattr("factpatch.bench.singles.make", never)
        assert done(grid_of(data, limit=3), tmp_path / "run") == first
    assert done(grid_of(data), tmp_path / "run") == done(grid_of(data), tmp_path / "at once")


@pytest.mark.parametrize("named", ["own:{}", "{}"])
def test_a_setting_that_names_a_file_stands_for_what_the_file_holds(data, tmp_path, named):
    corpus = tmp_path / "corpus.jsonl"
    grid = grid_of(
        data,
        methods=[
            {"name": "ike", "settings": {"corpus": named.format(corpus), "encoder": "words", "demonstrations": 1}}
        ],
        limit=1,
    )
    write_jsonl(facts(6)[1:], corpus)
    first = done(grid, tmp_path / "run")
    assert done(grid, tmp_path / "run") == first
    write_jsonl(facts(9)[1:], corpus)
    both = [row["label"] for row in done(grid, tmp_path / "run") if row["method"] == "ike"]
    assert len(set(both)) == 2
    assert all(label.startswith("ike (corpus as of ") for label in both)


def test_a_folder_holds_its_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "one").write_text("1")
    before = contents_sha256(tmp_path)
    assert before != contents_sha256(tmp_path / "one") == sha256_of(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert contents_sha256(tmp_path) != before


def test_records_from_another_number_on_are_results_of_their_own(data, tmp_path):
    first = done(grid_of(data, methods=["ice"], limit=2), tmp_path / "run")
    both = done(grid_of(data, methods=["ice"], start=2, limit=2), tmp_path / "run")
    assert {row["label"] for row in both} == {
        "unedited (start=0)",
        "unedited (start=2)",
        "ice (start=0)",
        "ice (start=2)",
    }
    with Store(tmp_path / "run", make=False) as store:
        edits = [[edit for outcome in store.outcomes(number) for edit in outcome.edits] for number in store.cells()]
    assert edits == [["fact-0", "fact-1"], ["fact-2", "fact-3"]]
    assert len(both) == 2 * len(first)


def test_all_methods_get_their_turn_on_the_first_edits(data, tmp_path):
    run = run_of(grid_of(data), tmp_path / "run")
    turns = [(turn.spec.name, list(turn.units)) for turn in run.turns()]
    parts = [list(range(start, min(start + ABREAST, 11))) for start in range(0, 11, ABREAST)]
    assert turns == [(name, part) for part in parts for name in ("ft-m", "grace", "ice")]


def test_batches_are_one_patch_of_several_edits(data, tmp_path):
    lm, grid = tiny_lm(), grid_of(data, mode="batch:4", methods=METHODS[:1])
    run = Run(grid, tmp_path / "run", Worker(grid, lm=lm))
    run.go()
    outcomes = run.store.outcomes(1)
    assert [len(outcome.edits) for outcome in outcomes] == [4, 4, 3]
    patch = create("ft-m", QUICK).fit(lm, facts(4))
    assert rows(run.store.card(1, ALONE, 0)) == rows(Scorer(lm, fluency=False).score(facts(4), patch))


def test_edits_of_a_group_are_made_together():
    edits = [edit.model_copy(update={"group": group}) for edit, group in zip(facts(6), "aabbb ", strict=True)]
    edits[5] = edits[5].model_copy(update={"group": None})
    assert [len(unit) for unit in Mode("single").units(edits)] == [2, 3, 1]
    assert [len(unit) for unit in Mode("batch", 2).units(edits)] == [5, 1]
    assert Mode("single").units([]) == []


def go_on(grid, folder):
    run = run_of(grid, folder)
    run.go()
    os._exit(len(run.failed))


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_a_run_killed_at_random_moments_ends_with_the_same_table(data, tmp_path, mode):
    grid = grid_of(data, mode=mode, methods=METHODS[:2])
    begun = time.monotonic()
    whole = done(grid, tmp_path / "whole")
    took = time.monotonic() - begun
    rng, seen, folder = random.Random(0), [], tmp_path / "killed"
    # How long the whole takes says little of the next on a busy machine: the times of the kills spread wide.
    for _ in range(10):
        child = fork.Process(target=go_on, args=(grid, folder))
        child.start()
        child.join(rng.uniform(0.05, 0.6) * took)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        seen.append(on_record(folder))
    assert len({n for n in seen if n}) > 1, "some kills came on the way"
    assert done(grid, folder) == whole
    assert not list((folder / "patches").glob("*/*")), "patches of a sequence that is done are removed"


def on_record(folder):
    """How many outcomes there are."""
    if not (folder / "results.sqlite").exists():
        return 0
    with Store(folder) as store:
        return sum(len(store.outcomes(cell)) for cell in store.cells())


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_two_processes_share_a_run(data, tmp_path, mode):
    grid = grid_of(data, mode=mode, methods=METHODS[:2])
    both = [fork.Process(target=go_on, args=(grid, tmp_path / "shared")) for _ in range(2)]
    for child in both:
        child.start()
    for child in both:
        child.join()
    assert [child.exitcode for child in both] == [0, 0]
    assert table(tmp_path / "shared") == done(grid, tmp_path / "alone")


def test_a_sequence_is_scored_at_edit_and_as_it_grows(data, tmp_path):
    grid = grid_of(data, mode="sequential", methods=METHODS[:1], limit=5)
    lm, laid, at_edit = tiny_lm(), [], []
    run = Run(grid, tmp_path / "run", Worker(grid, lm=lm))
    run.go()
    method = create("ft-m", QUICK)
    for edit in facts(5):
        with lm.patched(*laid):
            laid.append(method.fit(lm, [edit]))
        at_edit += rows(Scorer(lm, fluency=False).score([edit], *laid))
        if len(laid) in {1, 3, 5}:
            expected = rows(Scorer(lm, fluency=False).score(facts(len(laid)), *laid))
            assert rows(run.store.card(1, f"after {len(laid)}")) == expected
    assert rows(run.store.card(1, "at edit")) == at_edit
    moments = [row.moment for row in result_rows(run.store) if row.protocol == "open"]
    assert moments == ["at edit", "at edit", "after 1", "after 3", "at end"], "the first is the unedited model's"


def test_a_longer_sequence_goes_on_from_a_shorter_one(data, tmp_path):
    short, long = (grid_of(data, mode="sequential", methods=METHODS[:2], limit=n) for n in (4, 7))
    done(short, tmp_path / "run")
    grown = done(long, tmp_path / "run")
    whole = done(long, tmp_path / "whole")
    ends = ("at edit", "after 1", "after 3", "at end")
    assert [row for row in grown if row["moment"] in ends] == [row for row in whole if row["moment"] in ends]


def test_a_cell_that_fails_is_told_and_the_rest_goes_on(data, tmp_path):
    methods = ["ice", {"name": "rome", "settings": {"layer": 99}}, "retrieval"]
    run = run_of(grid_of(data, limit=2, methods=methods), tmp_path / "run")
    run.go()
    ((cell, reason),) = run.failed.items()
    assert run.store.cells()[cell].method == "rome"
    assert "99" in reason
    found = {row.method: row for row in result_rows(run.store) if row.protocol == "open"}
    assert found["rome"].reason == reason
    assert (found["rome"].edits, found["rome"].edit_success) == (0, None)
    assert found["ice"].edits == found["retrieval"].edits == 2


def test_a_reason_is_forgotten_once_the_cell_works(data, tmp_path, monkeypatch):
    grid = grid_of(data, limit=2, methods=["ice"])
    with monkeypatch.context() as broken:
        broken.setattr("factpatch.methods.context.Ice.make", lambda *_: (_ for _ in ()).throw(AnatomyError("no MLP")))
        run = run_of(grid, tmp_path / "run")
        run.go()
        assert run.failed == {1: "no MLP"}
    assert {row["reason"] for row in done(grid, tmp_path / "run")} == {""}


def test_refused_edits_are_counted_with_their_reason(tmp_path):
    write_jsonl([*tiny_edits(), Edit(id="none", prompt="Oslo lies in", target="Chad")], tmp_path / "e.jsonl")
    settings = {"layer": 1, "steps": 2, "contexts": 1, "moment_tokens": 300, "moment_length": 30}
    for mode in ("single", "sequential"):
        grid = grid_of(str(tmp_path / "e.jsonl"), mode=mode, methods=[{"name": "rome", "settings": settings}])
        run = run_of(grid, tmp_path / mode)
        run.go()
        (row,) = (
            r
            for r in result_rows(run.store)
            if r.method == "rome" and r.moment in {"alone", "at edit"} and r.protocol == "open"
        )
        assert (row.edits, row.not_made) == (2, 1)
        assert next(o.reason for o in run.store.outcomes(1) if o.reason).startswith('edit "none": rome needs to know')
        assert list(run.turns()) == [], "it is not tried again"


def test_the_plan_tells_what_is_left_and_what_it_takes(data, tmp_path, monkeypatch):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "cache"))
    run = run_of(grid_of(data, limit=9), tmp_path / "run")
    plan = run.plan()
    assert (plan.left, plan.seconds_left, plan.memory_mb) == (27, None, None)
    run_of(grid_of(data, limit=3), tmp_path / "run").go()
    plan = run.plan()
    assert plan.left == 18
    assert [(cell.done, len(cell.units)) for cell in plan.cells] == [(3, 9)] * 3
    assert plan.seconds_left == pytest.approx(sum(6 * cell.cost.seconds for cell in plan.cells))
    assert plan.memory_mb > 50
    # Another folder knows it from the cache; what is not known is taken to cost what the others do.
    other = run_of(grid_of(data, limit=3, methods=[*METHODS, "retrieval"]), tmp_path / "other").plan()
    known = [cell.cost.seconds for cell in other.cells[:3]]
    assert other.cells[3].cost is None
    assert other.seconds_left == pytest.approx(3 * sum(known) + 3 * sum(known) / 3)


def test_the_peak_of_memory_is_seen():
    device = torch.device("cpu")
    with watching_memory(device) as memory:
        held = bytearray(300_000_000)
        time.sleep(0.05)
        del held
    with watching_memory(device) as after:
        pass
    assert memory.peak_mb - memory.start / 1e6 > 250
    assert after.peak_mb < memory.peak_mb - 200


CELL = Cell(
    model="m", fingerprint="f", dtype="float32", method="ice", settings={}, dataset="d", data_file="d.jsonl",
    data_sha256="s", mode="single", seed=0, chat=False, fluency=False, protocols={"open": 2},
)  # fmt: skip


def test_a_store_keeps_what_came_first_unless_it_was_of_other_edits(tmp_path):
    with Store(tmp_path) as store:
        number = store.add_cell(CELL)
        assert store.add_cell(CELL) == number
        first, again = (Outcome(0, ALONE, ("a",), None, reason=reason) for reason in ("one", "two"))
        assert store.add(number, first)
        assert not store.add(number, again)
        assert [o.reason for o in store.outcomes(number)] == ["one"]
        assert store.add(number, Outcome(0, ALONE, ("a", "b"), None, reason="three"))
        assert [o.reason for o in store.outcomes(number)] == ["three"]
    with Store(tmp_path, make=False) as store:
        assert store.cells() == {number: CELL}
        assert store.outcomes(number)[0].packages["factpatch"]


def test_an_outcome_is_written_whole_or_not_at_all(tmp_path):
    lm, (edit, _) = tiny_lm(), tiny_edits()
    card = Scorer(lm, fluency=False).score([edit])
    bad = card.model_copy(update={"scores": (*card.scores, card.scores[0].model_copy(update={"prompt": None}))})
    with Store(tmp_path) as store:
        number = store.add_cell(CELL)
        with pytest.raises(Exception, match="NOT NULL"):
            store.add(number, Outcome(0, ALONE, ("rome",), bad))
        assert store.outcomes(number) == []
        assert store.card(number, ALONE) is None
        assert store.add(number, Outcome(0, ALONE, ("rome",), card))
        assert store.card(number, ALONE).scores == card.scores


def test_folders_that_hold_something_else(tmp_path):
    with pytest.raises(BadFile, match="holds no results"):
        Store(tmp_path, make=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "results.sqlite").write_text("not a database at all, but long enough to be taken for one" * 20)
    with pytest.raises(OutputError, match="cannot be used"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("values", "error", "problem"),
    [
        ({"methods": ["ice"]}, BadConfig, "data: expected a value"),
        ({"methods": [], "data": ["sample"]}, BadConfig, "methods"),
        ({"methods": ["icee"], "data": ["sample"]}, UnknownMethod, 'Did you mean "ice"'),
        ({"methods": [{"name": "ice", "settings": {"x": 1}}], "data": ["sample"]}, BadConfig, 'no setting "x"'),
        ({"methods": ["ice"], "data": ["sample"], "mode": "batch:0"}, BadConfig, "batch:K"),
        ({"methods": ["ice"], "data": ["sample"], "limt": 3}, BadConfig, "limt"),
        (["ice"], BadConfig, "expected fields"),
    ],
)
def test_a_grid_says_what_is_wrong_with_it(values, error, problem):
    with pytest.raises(error, match=problem):
        Grid.make(values)


def test_a_grid_can_be_a_file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("methods: [ice, {name: rome, settings: {layer: 3}}]\ndata: [sample]\nlimit: 4\n")
    grid = Grid.read(path)
    assert [(m.name, m.settings) for m in grid.methods] == [("ice", {}), ("rome", {"layer": 3})]
    assert (grid.limit, grid.mode) == (4, "single")
    for text, problem in (("{", "YAML"), ("- ice", "expected fields")):
        path.write_text(text)
        with pytest.raises((BadFile, BadConfig), match=problem):
            Grid.read(path)
    with pytest.raises(BadFile, match="no such file"):
        Grid.read(tmp_path / "none.yaml")


def test_a_cluster_gives_nobody_what_another_still_prepares():
    cluster = _Cluster(SimpleNamespace(cluster_resources=lambda: {"CPU": 2}), None, 2)
    slow, quick = MethodSpec(name="mend"), MethodSpec(name="ice")
    first, second, other = (Turn(i, spec, "d", {}) for i, spec in enumerate((slow, slow, quick)))
    cluster.busy = {"job": (None, first)}
    waiting = deque([second, other])
    assert [cluster._next(waiting), cluster._next(waiting)] == [other, second], "the one that waits comes last"
    cluster.prepared = [slow]
    assert cluster._next(deque([second, other])) is second


def test_a_worker_that_died_is_given_nothing_more():
    class Died(Exception):
        pass

    class Refused(Exception):
        cause = None

    def get(job):
        raise Died(job)

    errors = SimpleNamespace(RayError=Died, RayTaskError=Refused)
    failed = []
    run = SimpleNamespace(fail=lambda turn, error: failed.append(turn))
    cluster = _Cluster(SimpleNamespace(cluster_resources=lambda: {"CPU": 2}, get=get, exceptions=errors), run, 2)
    turn = Turn(0, MethodSpec(name="ice"), "d", {})
    assert [cluster._take("job", turn) for _ in range(3)] == [(False, False), (False, False), (True, False)]
    assert failed == [turn]
