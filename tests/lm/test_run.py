"""Batched reading and writing give what one-by-one gives, and what transformers itself gives."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factpatch.errors import TokenizerError
from factpatch.lm import batches, writing
from factpatch.lm.batches import Batch, Places, current_pass, length_batches
from factpatch.lm.hooks import reading, replacing_input, replacing_output
from factpatch.lm.predictions import predict
from factpatch.lm.run import UpperRun, can_resume, evaluating, forward, input_of, logits_at
from factpatch.lm.writing import Sampler, generate
from factpatch.testing import ARCHITECTURES, Snapshot, logits_of, tiny_lm

PROMPTS = ["Rome lies in", "A", "Where, then, does Oslo lie? Far up in", "One more"]
TARGETS = ["Peru", "b", "Norway, they say", "time"]


def texts(lm):
    return [lm.tokens.encode(prompt, target) for prompt, target in zip(PROMPTS, TARGETS, strict=True)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predictions_in_a_batch_equal_one_by_one_and_plain_transformers(architecture):
    lm = tiny_lm(architecture)
    for text, batched in zip(texts(lm), predict(lm, texts(lm)), strict=True):
        (alone,) = predict(lm, [text])
        assert alone.best == batched.best
        assert alone.logprobs == pytest.approx(batched.logprobs, abs=1e-4)
        with torch.no_grad():
            plain = lm.model(torch.tensor([text.ids])).logits[0].float().log_softmax(-1)[text.target - 1 : -1]
        assert batched.best == tuple(plain.argmax(-1).tolist())
        expected = plain.gather(-1, torch.tensor(text.target_ids)[:, None])[:, 0].tolist()
        assert batched.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_writing_equals_transformers_own(architecture):
    lm = tiny_lm(architecture)
    prompts = [lm.tokens.encode(prompt).ids for prompt in PROMPTS]
    batched = generate(lm, prompts, max_new=8)
    for prompt, written in zip(prompts, batched, strict=True):
        assert generate(lm, [prompt], max_new=8) == [written]
        own = lm.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
        )
        assert own[0, len(prompt) :].tolist() == written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resuming_above_gives_the_whole_models_logits(architecture):
    lm = tiny_lm(architecture)
    before = Snapshot.of(lm)
    batch = Batch.of([text.ids for text in texts(lm)], lm.device)
    places = Places.of([range(len(text.ids)) for text in texts(lm)], lm.device)
    with torch.no_grad():
        expected = logits_at(lm, batch, places)
        for layer in range(4):
            upper = UpperRun(lm, batch, layer)
            for _ in range(2):
                torch.testing.assert_close(upper.logits_at(places), expected, rtol=1e-5, atol=1e-5)
    assert before.differences(lm) == []


@pytest.mark.parametrize("said", ["It is said", "It is " + "so often " * 9 + "said"], ids=["short", "beyond a window"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_columns_that_do_not_change_need_not_run_again(architecture, said):
    lm = tiny_lm(architecture)
    before = Snapshot.of(lm)
    shown = [
        lm.tokens.encode(*text) for text in (("Rome lies in", "Peru"), (f"{said} that Oslo is", "a b c"), ("Ann", "x"))
    ]
    column = [3, len(said) + 6, 1]  # from here on things change
    site = lm.anatomy.mlp_out(1).module
    change = torch.randn(lm.anatomy.hidden_size, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def run(layer, since):
        aligned = Batch.of_texts(shown, lm.device, align=column if since else None)
        shifts = [max(column) - c if since else 0 for c in column]
        upper = UpperRun(lm, aligned, layer, since=since)
        at = (torch.arange(3), torch.tensor([c + shift - since for c, shift in zip(column, shifts, strict=True)]))

        def add(_, out):
            grid = out.reshape(3, -1, out.shape[-1])
            return grid.index_put(at, change.expand(3, -1), accumulate=True).reshape(out.shape)

        places = Places.of(
            [[c + shift, len(t.ids) - 1 + shift] for c, shift, t in zip(column, shifts, shown, strict=True)], lm.device
        )
        with replacing_output(site, add):
            logits = [upper.logits_at(places) for _ in range(2)]
        assert torch.equal(*logits), "what is kept is not used up"
        (gradient,) = torch.autograd.grad(logits[1].logsumexp(-1).sum(), [change])
        return logits[1], gradient

    expected = run(0, 0)
    for layer in range(2):
        for found, plain in zip(run(layer, max(column)), expected, strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert before.differences(lm) == []


def test_a_model_with_hooks_is_not_run_in_parts():
    lm = tiny_lm()
    assert can_resume(lm)
    with reading(lm.anatomy.blocks[1], lambda *_: None):
        assert not can_resume(lm)
    with replacing_input(lm.anatomy.blocks[1], lambda x: x):
        assert not can_resume(lm)
    assert can_resume(lm)


def test_rows_leave_the_batch_without_changing_the_others():
    lm = tiny_lm()
    prompts = [lm.tokens.encode(prompt).ids for prompt in PROMPTS]
    full = generate(lm, prompts, max_new=10)
    limits = dict(zip(map(tuple, full), (2, 10, 5, 7), strict=True))

    def stop(written):
        return any(len(written) >= n and list(row[: len(written)]) == written for row, n in limits.items())

    assert [len(row) for row in generate(lm, prompts, max_new=10, stop=stop)] == [2, 10, 5, 7]
    assert all(
        short == row[: len(short)]
        for short, row in zip(generate(lm, prompts, max_new=10, stop=stop), full, strict=True)
    )


def test_an_end_token_is_not_written():
    lm = tiny_lm()
    prompt = lm.tokens.encode("Rome lies in").ids
    (full,) = generate(lm, [prompt], max_new=6)
    assert generate(lm, [prompt], max_new=6, end=frozenset({full[3]})) == [full[: full.index(full[3])]]


def test_sampling_is_seeded_by_each_text_alone_and_leaves_the_global_state():
    lm = tiny_lm()
    prompts = [lm.tokens.encode(prompt).ids for prompt in PROMPTS]
    before = Snapshot.of(lm)
    batched = generate(lm, prompts, max_new=12, choose=Sampler(seed=3, top_k=20))
    assert before.differences(lm) == []
    assert [generate(lm, [p], max_new=12, choose=Sampler(seed=3, top_k=20))[0] for p in prompts] == batched
    assert generate(lm, prompts[::-1], max_new=12, choose=Sampler(seed=3, top_k=20)) == batched[::-1]
    assert generate(lm, prompts, max_new=12, choose=Sampler(seed=4, top_k=20)) != batched


def test_samples_follow_the_distribution_of_the_top_k():
    logits = torch.tensor([[0.5, 0.3, 0.2, 1e-9]]).log()
    sampler = Sampler(seed=0, top_k=2)
    counts = Counter(sampler(logits, [(None, (0,))]).item() for _ in range(4000))
    assert set(counts) == {0, 1}
    assert counts[0] / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_batches_are_a_partition_within_the_budget(lengths, budget):
    batches = list(length_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)


def test_evaluating_puts_every_module_back_into_its_mode():
    lm = tiny_lm()
    lm.model.train()
    lm.anatomy.blocks[1].train(mode=False)
    modes = [module.training for module in lm.model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(lm.model):
        assert not any(module.training for module in lm.model.modules())
        _ = 1 / 0
    assert [module.training for module in lm.model.modules()] == modes


def test_rows_are_padded_on_the_side_asked_for():
    cpu = torch.device("cpu")
    right, left = Batch.of([[5, 6, 7], [8]], cpu), Batch.of([[5, 6, 7], [8]], cpu, left=True)
    assert right.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert right.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left.ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left.mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_places_are_rows_and_columns():
    places = Places.of([[1, 2], [], [0]], torch.device("cpu"))
    assert places.rows.tolist() == [0, 0, 2]
    assert places.cols.tolist() == [1, 2, 0]


@pytest.mark.parametrize("budget", [1, 30, 60, 10_000])
def test_order_and_batch_budget_do_not_matter(monkeypatch, budget):
    lm = tiny_lm("gpt2")
    prompts = [lm.tokens.encode(prompt).ids for prompt in PROMPTS]
    expected, written = predict(lm, texts(lm)), generate(lm, prompts, max_new=6)
    sampled = generate(lm, prompts, max_new=6, choose=Sampler(seed=1, top_k=9))
    monkeypatch.setattr(batches, "BATCH_TOKENS", budget)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        found = predict(lm, [texts(lm)[i] for i in order])
        for i, prediction in zip(order, found, strict=True):
            assert (prediction.target, prediction.best) == (expected[i].target, expected[i].best)
            assert prediction.logprobs == pytest.approx(expected[i].logprobs, abs=1e-4)
        chosen = [prompts[i] for i in order]
        assert generate(lm, chosen, max_new=6) == [written[i] for i in order]
        assert generate(lm, chosen, max_new=6, choose=Sampler(seed=1, top_k=9)) == [sampled[i] for i in order]


def test_the_budget_bounds_what_the_model_sees_at_once(monkeypatch):
    lm = tiny_lm()
    monkeypatch.setattr(batches, "BATCH_TOKENS", 40)
    sizes = []
    with reading(lm.anatomy.embedding, lambda ids, _: sizes.append(ids.numel())):
        predict(lm, texts(lm))
    assert len(sizes) > 1
    assert max(sizes[:-1]) <= 40
    assert sizes[-1] == max(len(text.ids) for text in texts(lm)) > 40, "a text too long for the budget runs alone"


def test_what_is_asked_twice_runs_once_and_each_gets_an_answer_of_its_own():
    lm = tiny_lm()
    prompt, rows = lm.tokens.encode("Rome lies in").ids, []
    with reading(lm.anatomy.embedding, lambda ids, _: rows.append(ids.shape[0])):
        one, other = generate(lm, [prompt, list(prompt)], max_new=3)
        first, second = predict(lm, [texts(lm)[0]] * 2)
    assert set(rows) == {1}
    assert one == other
    assert one is not other
    assert first == second


def test_nothing_asked_nothing_done():
    lm = tiny_lm()
    assert predict(lm, []) == []
    assert generate(lm, [], max_new=3) == []
    assert generate(lm, [lm.tokens.encode("Rome").ids], max_new=0) == [[]]
    (nothing,) = predict(lm, [lm.tokens.encode("Rome")])
    assert (nothing.target, nothing.best, nothing.logprobs) == ((), (), ())


def test_a_target_with_nothing_before_it_is_refused():
    with pytest.raises(TokenizerError, match='nothing stands before the target "Rome"'):
        tiny_lm(bos=False).tokens.encode("", "Rome")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_places_asked_for(architecture):
    lm = tiny_lm(architecture)
    batch = Batch.of([text.ids for text in texts(lm)], lm.device)
    places = Places.of([[3, 0], [1], [], [2, 2]], lm.device)
    with torch.no_grad():
        plain = lm.model(input_ids=batch.ids, attention_mask=batch.mask).logits.float()
        found = logits_at(lm, batch, places)
    torch.testing.assert_close(found, plain[[0, 0, 1, 3, 3], [3, 0, 1, 2, 2]], rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32


def test_logits_are_float32_whatever_the_model_is_and_keep_the_graph():
    lm = tiny_lm()
    lm.model.to(torch.bfloat16)
    batch, places = Batch.of([[256, 5, 6]], lm.device), Places.of([[2]], lm.device)
    logits = logits_at(lm, batch, places)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert lm.anatomy.mlp_out(0).module.weight.grad is not None


def test_what_a_module_reads_is_taken_without_running_on():
    lm = tiny_lm()
    batch, seen, after = Batch.of([text.ids for text in texts(lm)], lm.device), [], []
    projection = lm.anatomy.mlp_out(1).module
    with reading(lm.anatomy.blocks[1], lambda *_: after.append(1)):
        found = input_of(lm, projection, batch)
    assert after == []
    with torch.no_grad(), reading(projection, lambda x, _: seen.append(x)):
        lm.model(input_ids=batch.ids, attention_mask=batch.mask)
    assert torch.equal(found, seen[0])
    assert not found.requires_grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_leave_the_batch_without_changing_the_others_beyond_a_sliding_window(architecture):
    lm, source = tiny_lm(architecture), random.Random(0)
    prompts = [(256, *(source.randrange(256) for _ in range(n))) for n in (90, 3, 61, 70)]
    full = generate(lm, prompts, max_new=8)
    assert full == [generate(lm, [prompt], max_new=8)[0] for prompt in prompts]
    limits = {tuple(row): n for row, n in zip(full, (2, 8, 5, 3), strict=True)}

    def stop(written):
        return any(len(written) >= n and list(row[: len(written)]) == written for row, n in limits.items())

    for short, row in zip(generate(lm, prompts, max_new=8, stop=stop), full, strict=True):
        assert short == row[: len(short)]


def test_rows_that_have_ended_are_not_computed_on():
    lm = tiny_lm()
    prompts = [lm.tokens.encode(prompt).ids for prompt in PROMPTS]
    rows = []
    with reading(lm.anatomy.embedding, lambda ids, _: rows.append(ids.shape[0])):
        generate(lm, prompts, max_new=9, stop=lambda written: len(written) == 4)
    assert rows == [4, 4, 4, 4]
    longest = generate(lm, prompts, max_new=9)[2]
    rows.clear()
    with reading(lm.anatomy.embedding, lambda ids, _: rows.append(ids.shape[0])):
        generate(lm, prompts, max_new=9, stop=lambda written: written != longest[: len(written)])
    assert rows == [4] + [1] * 8


def test_an_end_token_at_once_gives_nothing_and_leaves_the_others():
    lm = tiny_lm()
    prompts = [lm.tokens.encode(prompt).ids for prompt in PROMPTS]
    full = generate(lm, prompts, max_new=5)
    end = full[0][0]
    cut = [row[: row.index(end)] if end in row else row for row in full]
    assert generate(lm, prompts, max_new=5, end=frozenset({end})) == cut
    assert cut[0] == []


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "falcon"])
def test_sampling_does_not_depend_on_its_batch(architecture):
    lm = tiny_lm(architecture)
    prompts = [lm.tokens.encode(prompt).ids for prompt in PROMPTS]
    batched = generate(lm, prompts, max_new=8, choose=Sampler(seed=5, top_k=30))
    assert [generate(lm, [p], max_new=8, choose=Sampler(seed=5, top_k=30))[0] for p in prompts] == batched


def test_two_prompts_of_one_length_draw_from_streams_of_their_own():
    logits = torch.zeros(2, 50)
    sampler = Sampler(seed=0, top_k=50)
    drawn = torch.stack([sampler(logits, [(None, (1,)), (None, (2,))]) for _ in range(20)])
    assert (drawn[:, 0] != drawn[:, 1]).sum() > 10


def test_a_stream_goes_on_from_token_to_token():
    sampler = Sampler(seed=0, top_k=50)
    drawn = [sampler(torch.zeros(1, 50), [(None, (1,))]).item() for _ in range(20)]
    assert len(set(drawn)) > 5


def test_samples_follow_the_distribution():
    share, draws = torch.tensor([0.5, 0.3, 0.15, 0.05]), 4000
    for seed in range(3):
        sampler = Sampler(seed, top_k=4)
        logits = (share.log() + 7).repeat(draws, 1)  # logits are log-probabilities up to a constant
        counts = sampler(logits, [(None, (i,)) for i in range(draws)]).bincount(minlength=4)
        chi_square = ((counts - draws * share) ** 2 / (draws * share)).sum().item()
        assert chi_square < 21.1, f"four outcomes exceed this once in ten thousand times; drew {counts.tolist()}"


def test_the_most_likely_token_alone_is_greedy():
    lm = tiny_lm()
    prompts = [lm.tokens.encode(prompt).ids for prompt in PROMPTS]
    assert generate(lm, prompts, max_new=5, choose=Sampler(seed=9, top_k=1)) == generate(lm, prompts, max_new=5)


def test_more_tokens_asked_for_than_there_are():
    assert Sampler(seed=0, top_k=99)(torch.tensor([[0.0, -1e9]]), [(None, (1,))]).tolist() == [0]


def test_batches_go_from_short_to_long_and_equal_lengths_keep_their_order():
    assert list(length_batches([3, 1, 3, 2], 6)) == [[1, 3], [0, 2]]
    assert list(length_batches([])) == []
    assert list(length_batches([9], 1)) == [[0]]


def test_reading_is_done_without_dropout():
    lm = tiny_lm("gpt2")
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in lm.model.modules())
    expected, prompt = logits_of(lm, "Rome"), lm.tokens.encode("Rome").ids
    written, predicted = generate(lm, [prompt], max_new=5), predict(lm, texts(lm))
    lm.model.train()
    assert torch.equal(logits_of(lm, "Rome"), expected)
    assert generate(lm, [prompt], max_new=5) == written
    assert predict(lm, texts(lm)) == predicted
    assert lm.model.training


def test_writing_stops_where_the_model_can_read_no_further():
    lm = tiny_lm("gpt2")
    prompt = lm.tokens.encode("x" * 250).ids
    assert len(generate(lm, [prompt], max_new=20)[0]) == 6  # 251 are read, the sixth new one is not


def test_rows_that_have_ended_stay_where_fewer_would_run_slower():
    lm = tiny_lm()
    prompts = [(5, 6, 7 + i) for i in range(20)]
    steps, sizes = dict.fromkeys(prompts, 0), []

    def choose(logits, rows):
        sizes.append(len(rows))
        tokens = []
        for _, prompt in rows:
            steps[prompt] += 1
            tokens.append(0 if steps[prompt] > prompt[-1] - 6 else 9)
        return torch.tensor(tokens)

    written = generate(lm, prompts, max_new=40, choose=choose, end=frozenset({0}))
    assert [len(ids) for ids in written] == list(range(1, 21)), "a row that has ended writes no more"
    assert sizes == [20, 20, 19, 18, 17] + [16] * 14 + [2, 1]


def ending(lm, prompts, seed=0, most=40):
    """What is written after each prompt alone, cut at lengths of all kinds, and a `stop` that cuts it there."""
    full = [generate(lm, [prompt], max_new=most)[0] for prompt in prompts]
    source = random.Random(seed)
    cut = {tuple(row[: source.choice([1, 2, 3, 5, 17, 33, most])]) for row in full}
    stop = lambda written: tuple(written) in cut  # noqa: E731
    return [next((row[:n] for n in range(1, most) if stop(row[:n])), row) for row in full], stop


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text", "bloom"])
def test_answers_that_outlast_their_batch_go_on_among_others(monkeypatch, architecture):
    lm, source = tiny_lm(architecture), random.Random(1)
    prompts = [(256, *(source.randrange(256) for _ in range(n))) for n in (3, 4, 5, 5, 6, 7, 7, 8) * 3]
    expected, stop = ending(lm, prompts)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 8 * 24)
    monkeypatch.setattr(writing, "_ENOUGH", 4)
    sizes = []
    with reading(lm.anatomy.head, lambda hidden, _: sizes.append(len(hidden))):
        assert generate(lm, prompts, max_new=40, stop=stop) == expected
    assert sizes[0] >= 7, "batches have room for a short answer alone"
    assert generate(lm, prompts[::-1], max_new=40, stop=stop) == expected[::-1]


def test_a_few_that_go_on_are_put_together_rather_than_run_to_their_ends():
    lm, source = tiny_lm(), random.Random(2)
    prompts = [(256, *(source.randrange(256) for _ in range(20))) for _ in range(300)]
    slow = {prompts[7], prompts[150], prompts[290]}
    count, batches = Counter(), []

    def choose(logits, rows):
        batches.append(len(rows))
        count.update(prompt for _, prompt in rows)
        return torch.tensor([9 if prompt in slow or count[prompt] < 2 else 0 for _, prompt in rows])

    written = generate(lm, prompts, max_new=60, choose=choose, end=frozenset({0}))
    assert Counter(map(len, written)) == {1: 297, 60: 3}
    first = [size for size in batches if size > 50]
    assert len(first) == 6, "three batches of about a hundred, two steps each"
    assert batches[len(first) :] == [3] * 58, "then the three that go on, together"


def test_near_the_end_of_what_can_be_read_other_texts_do_not_matter():
    lm = tiny_lm("gpt2")
    prompts = [lm.tokens.encode("x" * n).ids for n in (250, 240, 100, 3)]
    alone = [generate(lm, [prompt], max_new=20)[0] for prompt in prompts]
    assert [len(row) for row in alone] == [6, 16, 20, 20]
    assert generate(lm, prompts, max_new=20) == alone
    assert generate(lm, prompts, max_new=20, stop=lambda written: len(written) == 18) == [row[:18] for row in alone]


def test_what_is_noted_beneath_is_there_above():
    lm = tiny_lm()
    first, second = lm.anatomy.blocks[:2]
    texts_ = texts(lm)
    batch = Batch.of_texts(texts_, lm.device)
    at = Places.of([[text.target - 1] for text in texts_], lm.device)

    def note(x, out):
        current_pass().notes["sum"] = x.sum((1, 2))

    def use(x, out):
        return out * (1 + current_pass().notes["sum"][:, None, None].tanh())

    with reading(first, note), replacing_output(second, use):
        expected = logits_at(lm, batch, at)
        run = UpperRun(lm, batch, 1)
        for _ in range(2):
            torch.testing.assert_close(run.logits_at(at), expected)


def test_kinds_of_attention_are_switched_back_after_an_error():
    lm = tiny_lm()
    seen = []
    with (
        reading(lm.anatomy.block(0), lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()) or 1 / 0),
        pytest.raises(ZeroDivisionError),
    ):
        forward(lm, Batch.of([[1, 2]], lm.device))
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()
