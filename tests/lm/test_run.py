"""Batched reading and writing give what one-by-one gives, and what transformers itself gives."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factpatch.lm.hooks import reading, replacing_input, replacing_output, until
from factpatch.lm.run import Batch, Places, Sampler, UpperRun, evaluating, generate, length_batches, logits_at, predict
from factpatch.testing import ARCHITECTURES, Snapshot, tiny_lm

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
    counts = Counter(sampler(logits, [(0,)]).item() for _ in range(4000))
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


def test_until_stops_there_and_replacements_replace():
    lm = tiny_lm()
    ids = torch.tensor([lm.tokens.encode("Rome").ids])
    blocks, seen = lm.anatomy.blocks, []
    with reading(blocks[0], lambda *_: seen.append(0)), reading(blocks[1], lambda *_: seen.append(1)), until(blocks[0]):
        lm.model(ids)
    assert seen == [0]
    with torch.no_grad():
        with replacing_output(blocks[2], lambda _, out: out * 0):
            assert lm.model(ids).logits.std(dim=1).max() == 0
        with replacing_input(lm.anatomy.head, lambda hidden: hidden * 0):
            assert lm.model(ids).logits.abs().max() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    assert math.isfinite(lm.model(ids).logits.sum().item())
