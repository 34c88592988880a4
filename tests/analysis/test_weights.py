"""Weight change: spectra against dense arithmetic, spaces against closed forms, and checkpoints against what was done to them."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from factpatch.analysis import spectra, weights
from factpatch.analysis.checkpoints import compare, inspect, open_checkpoint
from factpatch.analysis.spectra import Pieces, gram_values, mean_squared_cosine, spectrum
from factpatch.analysis.weights import THRESHOLDS, MatrixChange, in_words, weight_changes
from factpatch.errors import BadFile, UnknownModel, WrongBase
from factpatch.methods import create
from factpatch.patches import ContextPatch, Dense, LowRank, Note, Provenance, Sparse, WeightPatch, merge
from factpatch.patches.codebook import CodebookPatch
from factpatch.report import plots
from factpatch.report import weights as pictures
from factpatch.report.weights import save_weight_pictures
from factpatch.testing import Snapshot, tiny_edits, tiny_lm

DOWN = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(spectra, "_PIECE", 40)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patch_of(lm, deltas):
    return WeightPatch(Provenance.of(lm, "made", {}, tiny_edits()), deltas)


def low_rank(shape, rank=1, seed=0, scale=1.0):
    return LowRank(normal(shape[0], rank, seed=seed) * scale, normal(rank, shape[1], seed=seed + 50))


# Spectra


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 14), st.integers(1, 5), st.integers(0, 3), st.integers(0, 99))
def test_the_spectrum_from_factors_is_that_of_the_product(rows, cols, rank, repeated, seed):
    u, v = normal(rows, rank, seed=seed), normal(rank, cols, seed=seed + 1)
    # Columns that repeat others add no rank.
    u = torch.cat([u, u[:, :1].repeat(1, repeated)], 1)
    v = torch.cat([v, normal(repeated, cols, seed=seed + 2)], 0)
    found = spectrum(LowRank(u, v))
    dense = torch.linalg.svd(u.double() @ v.double(), full_matrices=False)
    count = min(len(found.values), len(dense.S))
    torch.testing.assert_close(found.values[:count], dense.S[:count], rtol=1e-9, atol=1e-9 * float(dense.S[0]))
    assert found.values[count:].sum() < 1e-9
    assert int((found.values > found.floor).sum()) == min(rows, cols, rank)
    k = found.left.shape[1]
    assert dense.S[:k].square().sum() >= 0.9 * dense.S.square().sum() * (1 - 1e-9)
    assert k == 1 or dense.S[: k - 1].square().sum() < 0.9 * dense.S.square().sum()
    # The same directions, whatever their signs: k of them carry all that k can.
    carried = found.left.T @ (u.double() @ v.double()) @ found.right
    torch.testing.assert_close(carried.diagonal().abs(), dense.S[:k], rtol=1e-8, atol=1e-8)


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 99))
def test_the_spectrum_of_a_dense_change_is_its_svds(rows, cols, seed):
    matrix = normal(rows, cols, seed=seed)
    expected = torch.linalg.svd(matrix.double(), full_matrices=False)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(spectra, "_PIECE", 3 * min(rows, cols))
        found = spectrum(Dense(matrix))
        alone, _ = gram_values(Pieces.held(matrix))
    torch.testing.assert_close(found.values, expected.S, rtol=1e-6, atol=1e-6 * float(expected.S[0]))
    torch.testing.assert_close(alone, expected.S, rtol=1e-6, atol=1e-6 * float(expected.S[0]))
    k = found.left.shape[1]
    for vectors in (found.left, found.right):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        (found.left.T @ matrix.double() @ found.right).diagonal(), expected.S[:k], rtol=1e-6, atol=1e-6
    )


@settings(max_examples=40)
@given(st.integers(6, 12), st.integers(6, 14), st.integers(0, 2), st.integers(0, 99))
def test_a_change_that_is_written_out_is_kept_as_its_factors_without_the_noise(rows, cols, rank, seed):
    u, v = (torch.linalg.qr(normal(n, rank, seed=seed + n))[0] for n in (rows, cols))
    made = 5 * u @ v.T
    found = spectrum(Dense(made + 1e-3 * normal(rows, cols, seed=seed)), noise=0.1)
    assert found.factors.u.shape == (rows, rank)
    torch.testing.assert_close(found.factors.full(), made, rtol=0, atol=0.02)
    # Factors would take more room: without noise there is the full rank.
    assert spectrum(Dense(made + 1e-3 * normal(rows, cols, seed=seed))).factors is None


def test_a_change_that_is_zero_has_no_rank_and_no_space():
    for delta in (Dense(torch.zeros(4, 6)), LowRank(torch.zeros(4, 2), torch.zeros(2, 6))):
        found = spectrum(delta)
        assert not (found.values > found.floor).any()
        assert found.left.shape == (4, 0)
        assert found.right.shape == (6, 0)


@given(st.integers(2, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_overlap_of_spaces_is_the_mean_squared_cosine_of_the_principal_angles(n, k, m, seed):
    linalg = pytest.importorskip("scipy.linalg")
    k, m = min(k, n), min(m, n)
    one, other = (torch.linalg.qr(normal(n, d, seed=seed + d).double())[0] for d in (k, m))
    expected = float((torch.tensor(linalg.subspace_angles(one.numpy(), other.numpy())).cos() ** 2).mean())
    assert mean_squared_cosine(one, other) == pytest.approx(expected, abs=1e-8)


def test_overlap_of_spaces_in_closed_form():
    eye, angle = torch.eye(4, dtype=torch.float64), 0.7
    turned = math.cos(angle) * eye[:, :1] + math.sin(angle) * eye[:, 1:2]
    assert mean_squared_cosine(eye[:, :1], turned) == pytest.approx(math.cos(angle) ** 2)
    assert mean_squared_cosine(eye[:, :1], eye[:, :2]) == 1
    assert mean_squared_cosine(eye[:, :2], eye[:, 1:3]) == pytest.approx(0.5)
    assert mean_squared_cosine(eye[:, :2], eye[:, 2:]) == 0


# Patches


def test_every_number_of_a_patch_against_plain_arithmetic(lm, small_pieces):
    shape = tuple(lm.model.get_parameter(DOWN[0]).shape)
    entries = torch.zeros(shape)
    entries[3, 5], entries[7, 1] = 2.0, -0.5
    deltas = {DOWN[0]: low_rank(shape, 2, scale=0.01), DOWN[1]: Sparse.of(entries), DOWN[2]: Dense(normal(*shape))}
    report = weight_changes(lm, {"made": patch_of(lm, deltas)})
    (row,) = report.patches
    total = sum(p.numel() for p in lm.model.parameters())
    assert report.parameters == total
    assert [m.rank for m in row.matrices] == [2, 2, 32]
    assert [m.block for m in row.matrices] == [0, 1, 2]
    assert [m.touched for m in row.matrices] == [shape[0] * shape[1], 2, shape[0] * shape[1]]
    assert row.share == pytest.approx((2 * shape[0] * shape[1] + 2) / total)
    for m, (name, delta) in zip(row.matrices, deltas.items(), strict=True):
        D, W = delta.full().double(), lm.model.get_parameter(name).detach().double()
        S = torch.linalg.svdvals(D)
        assert m.norm == pytest.approx(float(D.norm()), rel=1e-6)
        assert m.relative == pytest.approx(float(D.norm() / W.norm()), rel=1e-6)
        assert m.largest == pytest.approx(float(D.abs().max()), rel=1e-6)
        assert m.stable_rank == pytest.approx(float(D.square().sum() / S[0] ** 2), rel=1e-5)
        assert m.singular_values == pytest.approx(S[: m.rank].tolist(), rel=1e-4)
        rms = float(W.square().mean().sqrt())
        assert m.beyond == pytest.approx([float((D.abs() > x * rms).double().mean()) for x in THRESHOLDS], abs=1e-9)
        (block,) = [b for b in row.blocks if b.block == m.block]
        whole = [p.detach().double() for n, p in lm.model.named_parameters() if f".{m.block}." in n and p.ndim > 1]
        assert block.relative == pytest.approx(float(D.norm() / torch.cat([p.flatten() for p in whole]).norm()))
    assert row.norm == pytest.approx(math.sqrt(sum(m.norm**2 for m in row.matrices)))
    assert row.matrices[0].form == "rank 2"
    assert row.matrices[1].form == "2 entries"


def test_the_model_and_what_lies_on_it_are_left_alone(lm):
    shape = lm.model.get_parameter(DOWN[0]).shape
    patch = patch_of(lm, {DOWN[0]: low_rank(shape)})
    with lm.patched(patch_of(lm, {DOWN[0]: Dense(normal(*shape) * 9)})):
        before = Snapshot.of(lm)
        covered = weight_changes(lm, {"a": patch})
        assert before.differences(lm) == []
    assert covered == weight_changes(lm, {"a": patch})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["low-rank", "dense"])
def test_what_a_change_reads_and_writes_is_told_apart_however_the_weight_is_stored(architecture, form):
    lm = tiny_lm(architecture)
    for projection in (lm.anatomy.mlp_out(1), lm.anatomy.mlp_in(1)[0], lm.anatomy.queries_and_values(1)[0]):
        out, width = projection.matrix.shape
        key, values = normal(1, width), torch.linalg.qr(normal(out, 2, seed=1))[0]
        changes = [LowRank(values[:, [i]], key) for i in (0, 1)]
        made = {
            str(i): WeightPatch.of(
                Provenance.of(lm, "made", {}, tiny_edits()),
                {projection: change if form == "low-rank" else Dense(change.full())},
            )
            for i, change in enumerate(changes)
        }
        (overlap,) = weight_changes(lm, made).overlaps
        assert overlap.inputs == pytest.approx(1)
        assert overlap.outputs == pytest.approx(0, abs=1e-6)
        assert overlap.cosine == pytest.approx(0, abs=1e-6)
        assert overlap.matrices[0].by_chance == (1 / out, 1 / width)


def test_overlap_of_patches(lm, small_pieces):
    shape = lm.model.get_parameter(DOWN[0]).shape
    one, same = low_rank(shape, 2), low_rank(shape, 2)
    dense = Dense(normal(*shape, seed=5))
    first, second = torch.zeros(shape), torch.zeros(shape)
    first[0, :4], second[0, 2:6] = 1.0, 3.0
    made = {
        "one": patch_of(lm, {DOWN[0]: one}),
        "twice": patch_of(lm, {DOWN[0]: LowRank(same.u * -2, same.v)}),
        "dense": patch_of(lm, {DOWN[0]: dense, DOWN[1]: Dense(normal(*shape, seed=6))}),
        "elsewhere": patch_of(lm, {DOWN[2]: one}),
        "first": patch_of(lm, {DOWN[2]: Sparse.of(first)}),
        "second": patch_of(lm, {DOWN[2]: Sparse.of(second)}),
    }
    found = {(o.one, o.other): o for o in weight_changes(lm, made).overlaps}
    assert len(found) == 15
    twice = found["one", "twice"]
    assert (twice.outputs, twice.inputs, twice.jaccard) == (pytest.approx(1), pytest.approx(1), 1)
    assert twice.cosine == pytest.approx(-1, abs=1e-6)
    apart = found["one", "elsewhere"]
    assert (apart.outputs, apart.inputs, apart.cosine, apart.jaccard, apart.matrices) == (None, None, 0, 0, ())
    mixed, D = found["one", "dense"], one.full().double()
    whole = torch.cat([made["dense"].deltas[name].full().flatten() for name in DOWN[:2]]).double()
    expected = float((D.flatten() @ whole[: D.numel()]) / (D.norm() * whole.norm()))
    assert mixed.cosine == pytest.approx(expected, abs=1e-6)
    assert mixed.matrices[0].cosine == pytest.approx(
        float(torch.cosine_similarity(D.flatten(), whole[: D.numel()], dim=0)), abs=1e-6
    )
    assert mixed.jaccard == 0.5
    assert found["first", "second"].jaccard == pytest.approx(2 / 6)
    assert found["first", "second"].cosine == pytest.approx(0.5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_counts_as_what_it_makes_of_the_weights(architecture):
    lm = tiny_lm(architecture)
    patch = create("lora", {"steps": 4, "rank": 4, "layers": (1,)}).fit(lm, tiny_edits())
    (row,) = weight_changes(lm, {"lora": patch}).patches
    merged = patch.merged(lm.model)
    assert {m.parameter for m in row.matrices} == set(merged)
    for m in row.matrices:
        D = merged[m.parameter] - lm.model.get_parameter(m.parameter).detach()
        assert m.norm == pytest.approx(float(D.double().norm()), rel=1e-6)
        assert m.rank == 4
    assert row.adds == ()


def test_adapters_are_compared_as_what_they_make_and_kept_as_factors(lm, monkeypatch):
    made = {
        str(i): create("lora", {"steps": 4, "rank": 2, "layers": (1, 2), "seed": i}).fit(lm, tiny_edits())
        for i in (0, 1)
    }
    before, kept, own = Snapshot.of(lm), [], weights._overlap

    def looked(one, its, other, others):
        kept.extend(held.delta for held in [*its.values(), *others.values()])
        return own(one, its, other, others)

    monkeypatch.setattr(weights, "_overlap", looked)
    (overlap,) = weight_changes(lm, made).overlaps
    assert before.differences(lm) == []
    assert kept
    assert all(isinstance(delta, LowRank) and delta.u.shape[1] <= 2 for delta in kept)
    one, other = (
        {name: (w - lm.model.get_parameter(name).detach()).double() for name, w in patch.merged(lm.model).items()}
        for patch in made.values()
    )
    whole = [torch.cat([change[name].flatten() for name in one]) for change in (one, other)]
    assert overlap.cosine == pytest.approx(float(torch.cosine_similarity(*whole, dim=0)), abs=1e-4)
    assert {m.parameter for m in overlap.matrices} == {name for name in one if one[name].any() and other[name].any()}
    for m in overlap.matrices:
        changes = [change[m.parameter] for change in (one, other)]
        assert m.cosine == pytest.approx(float(torch.cosine_similarity(*map(torch.flatten, changes), dim=0)), abs=1e-4)
        a, b = (change != 0 for change in changes)
        assert m.jaccard == pytest.approx(float((a & b).sum() / (a | b).sum()))


def test_in_a_coarse_type_touched_is_what_rounding_left_and_what_inspect_finds(tmp_path):
    lm = tiny_lm()
    lm.model.bfloat16()
    shape = lm.model.get_parameter(DOWN[0]).shape
    made = {
        "small": patch_of(lm, {DOWN[0]: low_rank(shape, scale=2e-4)}),
        "large": patch_of(lm, {DOWN[0]: low_rank(shape, scale=0.1, seed=3), DOWN[1]: low_rank(shape, scale=1e-12)}),
    }
    lm.model.save_pretrained(tmp_path / "base")
    report = weight_changes(lm, made)
    moved = {}
    for row, (name, patch) in zip(report.patches, made.items(), strict=True):
        merge(lm, [patch], tmp_path / name)
        found = inspect(tmp_path / "base", tmp_path / name)
        assert {m.parameter: m.touched for m in row.matrices if m.touched} == {
            m.parameter: m.touched for m in found.matrices
        }
        assert row.touched == found.touched
        weight = lm.model.get_parameter(DOWN[0]).data
        with lm.patched(patch):
            moved[name] = lm.model.get_parameter(DOWN[0]).data != weight
    small, large = report.patches
    assert 0 < small.touched < small.matrices[0].entries / 2
    assert large.touched > small.touched
    assert [m.touched for m in large.matrices][1] == 0, "and its norm is that of what the patch says"
    assert large.matrices[1].norm > 0
    expected = float((moved["small"] & moved["large"]).sum() / (moved["small"] | moved["large"]).sum())
    assert report.overlaps[0].jaccard == pytest.approx(expected)


def test_a_patch_that_changes_no_weights_says_what_it_adds(lm):
    other = tiny_lm(seed=3)
    provenance = Provenance.of(lm, "made", {}, tiny_edits())
    book = CodebookPatch(
        provenance, DOWN[1].removesuffix(".weight"), normal(2, 48), torch.ones(2), ("a", "b"), values=normal(2, 32)
    )
    noted = ContextPatch(Provenance.of(other, "ice", {}, tiny_edits()), (Note(text="x\n", topic="x"),), "")
    rows = weight_changes(lm, {"book": book, "notes": noted}).patches
    assert [row.words for row in rows] == ["changes no weights"] * 2
    assert rows[0].adds == ("model.layers.1.mlp.down_proj: a codebook of 2 entries",)
    assert rows[0].numbers == 2 * 48 + 2 + 2 * 32
    assert (rows[1].numbers, rows[1].touched, rows[1].matrices) == (0, 0, ())
    assert "1 note before it" in rows[1].adds[0]
    with pytest.raises(WrongBase, match="was made for"):
        weight_changes(other, {"book": book})
    with pytest.raises(WrongBase, match="was made for"):
        weight_changes(other, {"w": patch_of(lm, {DOWN[0]: low_rank((32, 48))})})


def told(block=0, rank=1, touched=100, shape=(10, 10), norm=1.0):
    return MatrixChange(
        parameter="w", block=block, shape=shape, form="", norm=norm, relative=None, largest=1, rank=rank, tolerance=0,
        stable_rank=1, touched=touched, beyond=(), singular_values=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("matrices", "words"),
    [
        ([], "changes no weights"),
        ([told(touched=0)], "changes no weights"),
        ([told(4)], "rank 1 in one matrix (block 4)"),
        ([told(i) for i in range(7)], "rank 1 each in 7 matrices spread over 7 of 30 blocks"),
        ([told(0), told(0, rank=3)], "rank 1 to 3 each in 2 matrices of block 0"),
        ([told(rank=10)], "dense in one matrix (block 0)"),
        ([told(None, rank=10)], "dense in one matrix (outside the blocks)"),
        ([told(touched=2, rank=2)], "2 % of the entries, rank 2, in one matrix (block 0)"),
        (
            [told(0), told(1, rank=9), told(None)],
            "3 matrices spread over 2 of 30 blocks and outside them: rank 1 each in 2 matrices; dense in one matrix",
        ),
        (
            [told(0), told(1), told(2, norm=2)],
            "rank 1 each in 3 matrices spread over 3 of 30 blocks, most of it in block 2",
        ),
        ([told(shape=(100,))], "entries in one vector (block 0)"),
        ([told(rank=0)], "no more than rounding in one matrix (block 0)"),
    ],
)
def test_in_words(matrices, words):
    assert in_words(matrices, 30) == words


def test_pictures_have_their_numbers_beside_them(lm, tmp_path):
    pytest.importorskip("matplotlib")
    shape = lm.model.get_parameter(DOWN[0]).shape
    embedding = "model.embed_tokens.weight"
    made = {
        "rank <1>": patch_of(lm, {DOWN[0]: low_rank(shape)}),
        "more": patch_of(
            lm, {DOWN[0]: low_rank(shape, 3, seed=4), embedding: low_rank(lm.model.get_parameter(embedding).shape)}
        ),
    }
    report = weight_changes(lm, made)
    drawn = save_weight_pictures(tmp_path, {p.name: p for p in report.patches}, report.overlaps)
    assert {path.name for path in drawn} == {
        "by-block.svg", "sparsity.svg", "spectra.svg", "overlap-outputs.svg", "overlap-inputs.svg",
        "overlap-cosine.svg", "overlap-jaccard.svg",
    }  # fmt: skip
    for path in drawn:
        assert path.read_text().startswith("<svg")
        assert len(path.with_suffix(".csv").read_text().splitlines()) > 1
    assert "other" in (tmp_path / "by-block.svg").read_text()
    lines = (tmp_path / "spectra.csv").read_text().splitlines()
    assert len(lines) == 1 + 1 + 3 + 1
    assert (tmp_path / "matrices.csv").read_text().splitlines()[1].startswith(f"rank <1>,{DOWN[0]},0,32 × 48,rank 1,")
    assert save_weight_pictures(tmp_path / "none", {}) == []


# Checkpoints


@pytest.fixture(scope="module")
def base(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "base"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_merged_patch_is_found_at_its_matrix_and_rank(architecture, tmp_path):
    lm = tiny_lm(architecture)
    lm.model.save_pretrained(tmp_path / "base")
    projection = lm.anatomy.mlp_out(1)
    patch = WeightPatch.of(
        Provenance.of(lm, "made", {}, tiny_edits()), {projection: low_rank(projection.matrix.shape, scale=0.05)}
    )
    merge(lm, [patch], tmp_path / "merged")
    found = inspect(tmp_path / "base", tmp_path / "merged")
    assert [m.parameter for m in found.matrices] == [projection.parameter]
    (m,) = found.matrices
    assert (m.rank, m.block) == (1, 1)
    assert m.norm == pytest.approx(patch.deltas[projection.parameter].norm(), rel=1e-4)
    assert found.equal == found.compared - 1
    assert [found.only_a, found.only_b, found.shapes, found.dtypes, found.rounded] == [()] * 5
    assert found.tied == {}
    assert found.words == "rank 1 in one matrix (block 1)"
    assert not found.alike
    (row,) = weight_changes(lm, {"p": patch}).patches
    assert found.blocks[0].relative == pytest.approx(row.blocks[0].relative, rel=1e-4)
    again = inspect(tmp_path / "merged", tmp_path / "merged")
    assert again.alike
    assert again.words == "changes no weights"


@settings(max_examples=40)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(8, 40),
    st.integers(8, 40),
    st.integers(0, 3),
    st.floats(0, 2),
    st.integers(0, 99),
)
def test_rounding_is_not_counted_as_rank(dtype, rows, cols, rank, uneven, seed):
    # Rows and columns of very different size, as in real models.
    scales = (uneven * normal(rows, 1, seed=seed + 3)).exp() * (uneven * normal(1, cols, seed=seed + 4)).exp()
    W = (normal(rows, cols, seed=seed) * scales * 0.1).to(dtype)
    strength = 30 * torch.finfo(dtype).eps * float(W.float().norm())
    u, v = (torch.linalg.qr(normal(n, 3, seed=seed + n))[0][:, :rank] for n in (rows, cols))
    changed = (W.float() + strength * u @ v.T).to(dtype)
    found = compare({"w": W}, {"w": changed})
    assert [m.rank for m in found.matrices] == ([rank] if rank else [])
    # A checkpoint and its rounding: all that differs is noise.
    exact = normal(rows, cols, seed=seed) * scales
    if dtype != torch.float32:
        assert compare({"w": exact}, {"w": exact.to(dtype)}).rounded == ("w",)
        (noise,) = compare({"w": exact}, {"w": exact.to(dtype)}, exact=True).matrices
        assert noise.rank == 0


def test_the_rank_tolerance_can_be_given():
    a = torch.zeros(4, 4)
    b = torch.diag(torch.tensor([1.0, 0.1, 0.001, 0.0]))
    assert compare({"w": a}, {"w": b}).matrices[0].rank == 3
    found = compare({"w": a}, {"w": b}, rank_tol=0.01).matrices[0]
    assert (found.rank, found.tolerance) == (2, pytest.approx(0.01))
    assert found.singular_values == pytest.approx((1.0, 0.1))
    assert found.relative is None


def test_types_are_compared_after_rounding_to_the_coarser_unless_asked_otherwise():
    a = {"layers.0.w": normal(6, 8), "layers.1.w": normal(6, 8, seed=1), "layers.1.half": torch.ones(3, 3)}
    b = {name: t.to(torch.bfloat16) for name, t in a.items()}
    b["layers.1.w"][2, 3] += 1
    found = compare(a, b)
    assert found.rounded == ("layers.0.w",)
    assert {m.name for m in found.dtypes} == set(a)
    (m,) = found.matrices
    assert (m.touched, m.rank, m.dtypes) == (1, 1, ("float32", "bfloat16"))
    assert m.largest == pytest.approx(1, rel=0.02)
    assert found.equal == 1
    assert {m.parameter for m in compare(a, b, exact=True).matrices} == {"layers.0.w", "layers.1.w"}
    assert compare(b, a).matrices[0].touched == 1


def test_everything_else_that_may_differ_is_told():
    head = normal(5, 4)
    a = {"embed": head, "mask": torch.ones(2, 2, dtype=torch.int64), "gone": torch.ones(2), "w": torch.ones(2, 3)}
    b = {"embed": head, "head": head.clone(), "mask": torch.tensor([[1, 2], [1, 1]]), "w": torch.ones(3, 2)}
    a["flat"] = b["flat"] = b["new"] = torch.ones(5, 4)  # equal, but no more than any two tensors of ones
    found = compare(a, b)
    assert found.tied == {"head": "embed"}
    assert (found.only_a, found.only_b) == (("gone",), ("new",))
    assert [(m.name, m.a, m.b) for m in found.shapes] == [("w", "2 × 3", "3 × 2")]
    (m,) = found.matrices
    assert (m.parameter, m.touched, m.rank, m.largest) == ("mask", 1, 1, 1)
    assert (found.compared, found.equal, found.parameters) == (3, 2, 44)
    # A head that is no copy is news.
    assert compare(a, b | {"head": head + 1}).only_b == ("head", "new")


def test_values_that_are_not_finite_are_counted_and_left_out():
    a, b = torch.ones(3, 3), torch.ones(3, 3)
    a[0, 0] = b[0, 0] = float("nan")
    a[1, 1] = b[1, 1] = float("inf")
    assert compare({"w": a}, {"w": b}).alike
    b[2, 2], b[2, 1], b[1, 2] = float("nan"), float("-inf"), 3.0
    (m,) = compare({"w": a}, {"w": b}).matrices
    assert (m.not_finite, m.touched, m.norm, m.rank) == (2, 1, 2.0, 1)
    json.dumps(m.model_dump(mode="json"), allow_nan=False)


def test_a_stack_of_experts_counts_as_one_matrix_with_their_rows():
    a = normal(3, 4, 5)
    b = a.clone()
    b[1] += low_rank((4, 5)).full()
    (m,) = compare({"blocks.2.experts": a}, {"blocks.2.experts": b}).matrices
    assert (m.rank, m.block, m.shape) == (1, 2, (3, 4, 5))


def test_names_are_matched_where_one_side_was_saved_without_its_wrapper():
    a = {"h.0.w": normal(3, 3), "wte": normal(4, 3)}
    b = {"transformer.h.0.w": normal(3, 3) + 1, "transformer.wte": a["wte"], "head": normal(2, 3)}
    found = compare(a, b)
    assert found.prefix == "transformer."
    assert [m.parameter for m in found.matrices] == ["transformer.h.0.w"]
    assert (found.only_a, found.only_b) == ((), ("head",))
    back = compare(b, a)
    assert (back.prefix, back.only_a, back.equal) == ("transformer.", ("head",), 1)
    assert compare({"x": a["wte"]}, {"y": a["wte"]}).compared == 0


def test_checkpoints_of_every_form(base, lm, tmp_path):
    whole = load_file(base / "model.safetensors")
    lm.model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    apart = tmp_path / "apart"
    apart.mkdir()
    for i, (name, tensor) in enumerate(whole.items()):
        save_file({name: tensor}, apart / f"{i}.safetensors")
    pickled = tmp_path / "pickled"
    lm.tokenizer.save_pretrained(pickled)
    lm.model.config.save_pretrained(pickled)
    torch.save(whole, pickled / "pytorch_model.bin")
    for other in (base / "model.safetensors", tmp_path / "sharded", apart, pickled, str(base)):
        found = inspect(base, other)
        assert found.alike, other
        assert found.compared == len(whole)


def test_what_is_no_checkpoint_is_refused(base, lm, tmp_path):
    patch_of(lm, {DOWN[0]: low_rank((32, 48))}).save(tmp_path / "patch")
    with pytest.raises(BadFile, match="a patch, not a checkpoint"):
        open_checkpoint(tmp_path / "patch")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((base / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(BadFile, match="not a whole safetensors file"):
        open_checkpoint(broken)
    folder = tmp_path / "index"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "missing.safetensors"}}')
    with pytest.raises(BadFile, match="missing.safetensors"):
        open_checkpoint(folder)
    index.write_text("[]")
    with pytest.raises(BadFile, match="not an index"):
        open_checkpoint(folder)
    with pytest.raises(UnknownModel, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_an_empty_tensor_is_no_copy_of_another():
    one = {"weight": torch.eye(2), "empty": torch.zeros(0, 2)}
    found = compare(one, one | {"more": torch.zeros(0, 2)})
    assert (found.only_b, found.tied, found.equal) == (("more",), {}, 2)


def test_patches_of_one_block_stand_side_by_side_and_ticks_are_plain_numbers(lm):
    name = next(n for n, p in lm.model.named_parameters() if n.endswith("mlp.down_proj.weight"))
    shape = tuple(dict(lm.model.named_parameters())[name].shape)
    report = weight_changes(lm, {str(i): patch_of(lm, {name: low_rank(shape, 3, seed=i)}) for i in range(3)})
    changes = {patch.name: patch for patch in report.patches}
    with pytest.MonkeyPatch.context() as patcher:
        seen = []
        figure = plots.figure

        @contextmanager
        def keeping(*args):
            with figure(*args) as (axes, drawn):
                seen.append(axes)
                yield axes, drawn

        patcher.setattr(pictures, "figure", keeping)
        svgs = [pictures.by_block(changes), pictures.spectra(changes)]
    blocks, values = seen
    across = [[x for x, y in zip(*line.get_data(), strict=True) if y == y] for line in blocks.get_lines()]  # noqa: PLR0124
    assert len({x for own in across for x in own}) == 3
    assert all(abs(x - round(x)) < 0.5 for own in across for x in own)
    assert [label.get_text() for label in values.get_xticklabels()] == ["1", "2"]
    assert not any("mathdefault" in svg or "× 10" in svg for svg in svgs)
