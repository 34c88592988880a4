"""Second moments of many blocks in one pass that can be killed, and what is kept of them while the model is in hand."""

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from factpatch.errors import AnatomyError, OutputError
from factpatch.lm.cache import Unfinished
from factpatch.lm.writing import generate
from factpatch.methods import create, moments
from factpatch.methods.moments import (
    MomentConfig,
    directions,
    factorised,
    least_used,
    metric_factor,
    packed,
    second_moment,
    second_moments,
    unpacked,
)
from factpatch.progress import silent
from factpatch.testing import tiny_edits, tiny_lm
from tests.reference import plain

BATCHES = 8
QUICK = {"contexts": 2, "steps": 3, "moment_length": 30}


class Killed(BaseException):
    """As good as SIGKILL: nobody catches it."""


class Clock:
    """Stands in for the clock and for progress: each report is `step` seconds after the one before."""

    def __init__(self, step=0.0, *, die_after=None):
        self.now, self.step, self.die_after, self.seen = 0.0, step, die_after, []

    def __call__(self):
        return self.now

    def report(self, doing, done, total):
        self.seen.append((doing, done, total))
        self.now += self.step
        # A batch that has been kept is one whose report came back, so the next report dies.
        if self.die_after is not None and len(self.seen) > self.die_after:
            raise Killed


@pytest.fixture
def config(monkeypatch, tmp_path):
    """A corpus of texts of many lengths, in eight batches."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"Text {n} is {'rather ' * (n % 5)}short." for n in range(20)), encoding="utf-8")
    monkeypatch.setattr("factpatch.lm.batches.BATCH_TOKENS", 90)
    return MomentConfig(corpus=str(corpus), moment_tokens=600, moment_length=30)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Start with an empty cache of this name."""

    def use(name):
        monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / name))
        return tmp_path / name / "statistics" / "second-moment"

    use("cache")
    return use


def stop(monkeypatch, lm, config, layers, *, after):
    """Gather until so many batches are done and kept, then die."""
    clock = Clock(step=20.0, die_after=after)
    with monkeypatch.context() as patch:
        patch.setattr(moments, "monotonic", clock)
        with pytest.raises(Killed):
            second_moments(lm, layers, config, clock.report)


@contextmanager
def counting(lm):
    """How often each block runs."""
    calls = [0] * lm.anatomy.n_layers

    def count(index):
        def see(*_):
            calls[index] += 1

        return see

    handles = [block.register_forward_pre_hook(count(i)) for i, block in enumerate(lm.anatomy.blocks)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# One pass.


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon", "bloom"])
def test_one_pass_equals_block_by_block_to_the_bit_and_a_plain_sum(architecture, config, cache):
    lm = tiny_lm(architecture)
    together = second_moments(lm, [2, 0, 1], config, silent)
    cache("apart")
    assert same(together, {layer: second_moment(lm, layer, config, silent) for layer in range(3)})
    rows = moments._texts(lm, config, silent)
    assert len({len(row) for row in rows}) > 3, "texts of one length need no mask"
    for layer, found in together.items():
        assert found.dtype == torch.float32
        expected = plain.second_moment(lm, lm.anatomy.mlp_out(layer).module, rows)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_model_runs_once_and_no_further_than_the_highest_block_that_is_missing(config, cache):
    lm = tiny_lm()
    with counting(lm) as calls:
        first = second_moments(lm, [0, 1], config, silent)
        assert calls == [BATCHES, BATCHES, 0]
        assert same(second_moments(lm, [0, 1], config, silent), first)
        assert calls == [BATCHES, BATCHES, 0], "nothing was missing"
    cache("other")
    second_moment(lm, 1, config, silent)
    with counting(lm) as calls:
        assert same(second_moments(lm, [0, 1], config, silent), first)
        assert calls == [BATCHES, 0, 0], "block 1 was there"
        second_moments(lm, [0, 1, 2], config, silent)
        assert calls == [2 * BATCHES, BATCHES, BATCHES]


def test_progress_tells_the_blocks_and_the_tokens(config, cache):
    clock = Clock()
    second_moments(tiny_lm(), [2, 0], config, clock.report)
    assert {doing for doing, _, _ in clock.seen} == {"Measuring keys at blocks 0, 2 (once)"}
    done = [tokens for _, tokens, _ in clock.seen]
    assert len(done) == BATCHES
    assert done == sorted(set(done))
    assert clock.seen[-1][1] == clock.seen[-1][2]


@pytest.mark.parametrize(
    ("name", "settings", "layers"),
    [
        ("memit", {"layers": (0, 1, 2)}, "0, 1, 2"),
        ("memit", {"layers": (0, 1, 2), "ends_only": True}, "0, 2"),
        ("alphaedit", {"layers": (0, 1, 2)}, "0, 1, 2"),
        ("pmet", {"layers": (0, 2)}, "0, 2"),
    ],
)
@pytest.mark.parametrize(
    "ask", [lambda method, lm, see: method.prepare(lm, see), lambda *a: a[0].fit(a[1], tiny_edits(), a[2])]
)
def test_methods_measure_all_their_blocks_in_one_pass(name, settings, layers, ask, config, cache):
    clock = Clock()
    method = create(name, QUICK | settings | {"corpus": config.corpus})
    ask(method, tiny_lm(), clock.report)
    assert {doing for doing, *_ in clock.seen if "Measuring" in doing} == {f"Measuring keys at blocks {layers} (once)"}


def test_a_block_that_is_not_there_is_told_before_the_model_writes(cache, monkeypatch):
    monkeypatch.setattr(moments, "generate", lambda *_, **__: pytest.fail("long work was done first"))
    with pytest.raises(AnatomyError):
        second_moments(tiny_lm(), [0, 7], MomentConfig(moment_tokens=300), silent)


# Killed and gone on with.


@pytest.mark.parametrize("after", [1, 5, BATCHES - 1])
def test_a_pass_that_was_killed_goes_on_and_ends_with_the_same_bits(after, config, cache, monkeypatch):
    lm = tiny_lm()
    whole = second_moments(lm, [0, 1], config, silent)
    folder = cache("killed")
    stop(monkeypatch, lm, config, [0, 1], after=after)
    kept = [load_file(path) for path in folder.glob("*.unfinished")]
    assert [(sums["total"].dtype, int(sums["done"])) for sums in kept] == 2 * [(torch.float64, after)]
    with counting(lm) as calls:
        assert same(second_moments(lm, [0, 1], config, silent), whole)
    assert calls == [BATCHES - after, BATCHES - after, 0]
    assert {path.suffix for path in folder.iterdir()} <= {".lock", ".safetensors"}, "something was left behind"


def test_blocks_that_came_to_different_batches_meet(config, cache, monkeypatch):
    lm = tiny_lm()
    whole = second_moments(lm, [0, 1, 2], config, silent)
    cache("killed")
    stop(monkeypatch, lm, config, [2], after=5)
    stop(monkeypatch, lm, config, [0], after=2)
    with counting(lm) as calls:
        assert same(second_moments(lm, [0, 1, 2], config, silent), whole)
    assert calls == [BATCHES, BATCHES, BATCHES - 5]


def test_a_process_that_is_killed_for_real_leaves_what_the_next_goes_on_with(config, cache):
    lm = tiny_lm()
    whole = second_moments(lm, [0, 1], config, silent)
    folder = cache("killed")
    script = f"""
        import os, signal, torch
        from factpatch.lm import batches
        from factpatch.methods import moments
        from factpatch.progress import silent
        from factpatch.testing import tiny_lm
        torch.set_num_threads(1)
        batches.BATCH_TOKENS, moments._KEEP_EVERY = 90, 0.0
        moments.monotonic = lambda: 0.0
        def die(doing, done, total):
            if done > total / 2:
                os.kill(os.getpid(), signal.SIGKILL)
        config = moments.MomentConfig(corpus={config.corpus!r}, moment_tokens=600, moment_length=30)
        moments.second_moments(tiny_lm(), [0, 1], config, die)
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=dict(os.environ), check=False)
    assert child.returncode == -signal.SIGKILL
    assert len(list(folder.glob("*.unfinished"))) == 2
    with counting(lm) as calls:
        assert same(second_moments(lm, [0, 1], config, silent), whole)
    assert 0 < calls[0] < BATCHES


def test_sums_are_kept_now_and_then_and_seldom_if_that_is_slow(config, cache, monkeypatch):
    lm, kept = tiny_lm(), []
    keep = Unfinished.keep

    def gather(step, slow):
        clock = Clock(step)

        def keeping(self, tensors):
            kept.append(int(tensors["done"]))
            clock.now += slow
            keep(self, tensors)

        kept.clear()
        cache(f"{step} {slow}")
        monkeypatch.setattr(moments, "monotonic", clock)
        monkeypatch.setattr(Unfinished, "keep", keeping)
        second_moment(lm, 0, config, clock.report)
        return list(kept)

    assert gather(1.0, 0.0) == []
    assert gather(7.0, 0.0) == [3, 6]
    assert gather(20.0, 0.0) == list(range(1, BATCHES)), "not after the last: the result itself is stored then"
    assert gather(20.0, 5.0) == [1, 4, 7], "45 seconds of work to 5 of writing"


@pytest.mark.parametrize("keep", [0, 7, 100, -1], ids=["nothing", "half a header", "a header", "all but a byte"])
def test_damaged_sums_are_ignored(keep, config, cache, monkeypatch):
    lm = tiny_lm()
    whole = second_moments(lm, [0, 1], config, silent)
    folder = cache("killed")
    stop(monkeypatch, lm, config, [0, 1], after=4)
    for path in folder.glob("*.unfinished"):
        path.write_bytes(path.read_bytes()[:keep])
    with counting(lm) as calls:
        assert same(second_moments(lm, [0, 1], config, silent), whole)
    assert calls == [BATCHES, BATCHES, 0]


def test_sums_over_other_batches_are_ignored(config, cache, monkeypatch):
    lm = tiny_lm()
    stop(monkeypatch, lm, config, [0], after=4)
    monkeypatch.setattr("factpatch.lm.batches.BATCH_TOKENS", 200)
    found = second_moment(lm, 0, config, silent)
    cache("other")
    assert torch.equal(second_moment(lm, 0, config, silent), found)


def test_sums_of_another_block_or_model_are_ignored(config, cache, monkeypatch):
    lm = tiny_lm()
    whole = second_moment(lm, 1, config, silent)
    folder = cache("killed")
    stop(monkeypatch, lm, config, [1], after=2)
    (own,) = folder.glob("*.unfinished")
    for other, layer in ((lm, 0), (tiny_lm(seed=5), 1)):
        stop(monkeypatch, other, config, [layer], after=4)
        (strange,) = set(folder.glob("*.unfinished")) - {own}
        strange.replace(own)
    assert torch.equal(second_moment(lm, 1, config, silent), whole)


def test_where_sums_cannot_be_kept_the_work_goes_on_without(config, cache, monkeypatch):
    lm, clock, tries = tiny_lm(), Clock(step=20.0), []
    whole = second_moment(lm, 0, config, silent)
    cache("full")

    def full(*_):
        tries.append(1)
        raise OutputError("No space left on device")

    monkeypatch.setattr(moments, "monotonic", clock)
    monkeypatch.setattr(Unfinished, "keep", full)
    assert torch.equal(second_moment(lm, 0, config, clock.report), whole)
    assert tries


def test_text_that_the_model_was_writing_when_it_was_killed_is_gone_on_with(cache, monkeypatch):
    lm, rounds = tiny_lm(), []
    config = MomentConfig(moment_tokens=600, moment_length=40)
    monkeypatch.setattr(moments, "_OPENINGS", moments._OPENINGS[:4])

    def writing(*args, **kwargs):
        rounds.append(kwargs["choose"].seed)
        if len(rounds) == die_at:
            raise Killed
        return generate(*args, **kwargs)

    die_at = None
    monkeypatch.setattr(moments, "generate", writing)
    whole = moments._texts(lm, config, silent)
    in_all = list(rounds)
    assert len(in_all) > 3
    cache("killed")
    rounds.clear()
    die_at = 3
    with pytest.raises(Killed):
        moments._texts(lm, config, silent)
    die_at = None
    assert moments._texts(lm, config, silent) == whole
    assert rounds == [*in_all[:3], *in_all[2:]]


# At hand.


@pytest.fixture
def factorisations(monkeypatch):
    """The dampings that moments were factorised with."""
    seen = []

    def counted(moment, damping):
        seen.append(damping)
        return factorised(moment, damping)

    monkeypatch.setattr(moments, "factorised", counted)
    return seen


def test_the_factor_is_computed_once_for_each_damping_corpus_and_model(config, factorisations):
    lm = tiny_lm()
    first = metric_factor(lm, 1, config, silent)
    assert torch.equal(first, factorised(second_moment(lm, 1, config, silent), 1e-3))
    assert torch.equal(metric_factor(lm, 1, config, silent), first)
    for other in ({"damping": 0.1}, {"moment_tokens": 300}, {"moment_length": 7}, {"seed": 1, "corpus": None}):
        changed = config.model_copy(update=other)
        expected = factorised(second_moment(lm, 1, changed, silent), changed.damping)
        assert not torch.equal(expected, first)
        assert torch.equal(metric_factor(lm, 1, changed, silent), expected)
    assert not torch.equal(metric_factor(lm, 0, config, silent), first)
    assert not torch.equal(metric_factor(tiny_lm(seed=5), 1, config, silent), first)
    assert torch.equal(metric_factor(lm, 1, config, silent), first)
    assert factorisations == [1e-3, 0.1, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]


@pytest.mark.parametrize(
    ("name", "blocks"), [("rome", {"layer": 1}), ("emmet", {"layer": 1}), ("memit", {"layers": (0, 2)})]
)
def test_two_fits_share_their_factors(name, blocks, config, cache, factorisations):
    lm, (first, second) = tiny_lm(), tiny_edits()
    settings = QUICK | blocks | {"corpus": config.corpus}
    method = create(name, settings)
    count = len(blocks.get("layers", [1]))
    lower = method.fit(lm, [first])
    with lm.patched(lower):
        upper = method.fit(lm, [second])
    assert factorisations == [1e-3] * count
    create(name, settings | {"damping": 0.1}).fit(lm, [second])
    assert factorisations == [1e-3] * count + [0.1] * count
    fresh = tiny_lm()
    with fresh.patched(create(name, settings).fit(fresh, [first])):
        assert create(name, settings).fit(fresh, [second]).id == upper.id


def test_what_is_at_hand_is_the_base_models_whatever_patches_lie_on_it(config, cache):
    lm = tiny_lm()
    patch = create("ft-m", {"layer": 0, "steps": 20, "lr": 1e-2}).fit(lm, tiny_edits())
    with lm.patched(patch):
        factor, basis = metric_factor(lm, 1, config, silent), least_used(lm, 1, 0.5, config, silent)
    cache("other")
    assert torch.equal(factor, factorised(second_moment(lm, 1, config, silent), 1e-3))
    assert torch.equal(basis, directions(lm, [1], config, silent)[1][:, :24].double())


def test_the_free_directions_are_made_once_for_each_share(config, monkeypatch):
    lm = tiny_lm()
    basis = least_used(lm, 1, 0.5, config, silent)
    assert basis.dtype == torch.float64
    assert least_used(lm, 1, 0.25, config, silent).shape == (48, 12)
    monkeypatch.setattr(moments, "directions", lambda *_: pytest.fail("read again"))
    assert torch.equal(least_used(lm, 1, 0.5, config, silent), basis)


def test_directions_that_were_sorted_before_a_kill_stay(config, cache, monkeypatch):
    lm = tiny_lm()
    clock = Clock()

    def die(doing, done, total):
        if doing == "Sorting the directions of block 2 (once)":
            raise Killed

    with pytest.raises(Killed):
        directions(lm, [0, 1, 2], config, die)
    directions(lm, [0, 1, 2], config, clock.report)
    assert [doing for doing, *_ in clock.seen] == ["Sorting the directions of block 2 (once)"]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 48])
def test_a_triangle_is_packed_into_half_the_room_and_comes_back_to_the_bit(n):
    factor = torch.randn(n, n, generator=torch.Generator().manual_seed(n)).double().tril()
    folded = packed(factor)
    assert folded.numel() <= (n + 1) ** 2 / 2
    assert torch.equal(unpacked(folded), factor)


def test_what_is_kept_at_hand_is_bounded(config, monkeypatch, factorisations):
    lm = tiny_lm()
    factors = [metric_factor(lm, layer, config, silent) for layer in range(3)]
    monkeypatch.setattr(moments, "_MOST_AT_HAND", 2 * packed(factors[0]).nbytes)
    metric_factor(lm, 0, config, silent)  # the others have not been asked for longer
    kept = lm.once("matrices at hand", lambda: pytest.fail("not kept"))._kept
    assert [
        torch.equal(unpacked(value), factors[layer]) for value, layer in zip(kept.values(), (2, 0), strict=True)
    ] == [
        True,
        True,
    ]
    factorisations.clear()
    again = [metric_factor(lm, layer, config, silent) for layer in (2, 0, 1)]
    assert len(factorisations) == 1, "only block 1's had been dropped"
    assert all(torch.equal(found, factors[layer]) for found, layer in zip(again, (2, 0, 1), strict=True))
    assert sum(value.nbytes for value in kept.values()) <= moments._MOST_AT_HAND


def test_factorising_leaves_the_moment_alone():
    moment = torch.eye(4, dtype=torch.double)
    factor = factorised(moment, 0.5)
    assert torch.equal(moment, torch.eye(4, dtype=torch.double))
    torch.testing.assert_close(factor @ factor.T, 1.5 * torch.eye(4, dtype=torch.double))


def test_a_document_longer_than_the_model_reads_is_cut(tmp_path):
    lm = tiny_lm()
    assert lm.tokens.limit is not None
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("rather long " * lm.tokens.limit, encoding="utf-8")
    config = MomentConfig(corpus=str(corpus), moment_tokens=2 * lm.tokens.limit, moment_length=2 * lm.tokens.limit)
    rows = moments._texts(lm, config, silent)
    assert [len(row) for row in rows] == [lm.tokens.limit] * 2
    assert tuple(token for row in rows for token in row) == lm.tokens.ids(corpus.read_text())[: 2 * lm.tokens.limit]
