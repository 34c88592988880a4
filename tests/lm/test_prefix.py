"""What many texts begin with runs once, and nobody can tell from the results."""

import functools
import random
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factpatch.lm import batches, prefix, writing
from factpatch.lm.hooks import reading
from factpatch.lm.predictions import predict, target_logprobs
from factpatch.lm.prefix import Shared, shared_prefixes
from factpatch.lm.tokens import Encoded
from factpatch.lm.writing import Noting, Sampler, generate
from factpatch.methods import create
from factpatch.testing import ARCHITECTURES, Snapshot, quick_settings, tiny_edits, tiny_lm


def tokens(n, seed):
    source = random.Random(seed)
    return tuple(source.randrange(256) for _ in range(n))


LONG, SHORT = tokens(90, 0), tokens(40, 1)  # one is beyond the sliding windows, the other within
TEXTS = [
    *(Encoded(LONG + tokens(n, n), 90 + n - 2) for n in (3, 30, 8, 12)),
    Encoded(LONG + tokens(12, 12) + tokens(5, 5), 104),  # another one and more
    Encoded(LONG + tokens(8, 8), 93),  # the same as another, with more of it predicted
    Encoded(LONG, 87),  # nothing beyond the prefix
    *(Encoded(SHORT + tokens(n, n), 40 + n - 1) for n in (7, 60, 2, 4)),
    Encoded(tokens(9, 20), 6),
    Encoded(tokens(50, 21), 49),
]
PROMPTS = [text.prompt_ids for text in TEXTS]


@pytest.fixture
def unshared(monkeypatch):
    """What is done without sharing."""

    def plain(do):
        with monkeypatch.context() as patch:
            patch.setattr(prefix, "can_share", lambda _: False)
            return do()

    return plain


@pytest.fixture
def passed(monkeypatch):
    """How many tokens, padding included, have passed through a model's first block while something was done."""

    def count(lm, do):
        seen, block = [], lm.anatomy.blocks[0]
        forward = block.forward

        def counting(*args, **kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.append(hidden.shape[:2].numel())
            return forward(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(block, "forward", counting)
            do()
        return sum(seen)

    return count


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prefixes_change_no_prediction(architecture, unshared, passed):
    lm = tiny_lm(architecture)
    before = Snapshot.of(lm)
    expected = unshared(lambda: predict(lm, TEXTS))
    for found, plain in zip(predict(lm, TEXTS), expected, strict=True):
        assert (found.target, found.best) == (plain.target, plain.best)
        assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert passed(lm, lambda: predict(lm, TEXTS)) < unshared(lambda: passed(lm, lambda: predict(lm, TEXTS)))
    assert before.differences(lm) == []


@pytest.mark.parametrize("budget", [4096, 500, 1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prefixes_change_nothing_that_is_written(architecture, budget, unshared, monkeypatch):
    lm = tiny_lm(architecture)
    monkeypatch.setattr(prefix, "ONE_PASS", 0)
    before = Snapshot.of(lm)

    def written(choose):
        return generate(lm, PROMPTS, max_new=6, choose=choose)

    expected = unshared(lambda: (written(writing.greedy), written(Sampler(seed=2, top_k=20))))
    monkeypatch.setattr(batches, "BATCH_TOKENS", budget)
    assert (written(writing.greedy), written(Sampler(seed=2, top_k=20))) == expected
    assert before.differences(lm) == []


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom"])
def test_rows_that_end_leave_those_with_a_shared_prefix_as_they_are(architecture, unshared):
    lm = tiny_lm(architecture)
    full = unshared(lambda: generate(lm, PROMPTS[:6], max_new=9))
    limits = dict(zip(map(tuple, full), (2, 9, 5, 1, 7, 3), strict=True))

    def stop(written):
        return any(len(written) >= n and list(row[: len(written)]) == written for row, n in limits.items())

    cut = [next((row[:n] for n in range(1, 10) if stop(row[:n])), row) for row in full]
    assert len({len(row) for row in cut}) > 2
    assert generate(lm, PROMPTS[:6], max_new=9, stop=stop) == cut


def test_what_is_predicted_first_is_noted_as_without_sharing(unshared):
    lm = tiny_lm()

    def first():
        rows = [(None, prompt) for prompt in PROMPTS]
        noting = Noting(rows)
        generate(lm, PROMPTS, max_new=2, choose=noting)
        return torch.stack([noting.first[row] for row in rows])

    torch.testing.assert_close(first(), unshared(first), rtol=1e-4, atol=1e-4)


def test_the_prefix_runs_once(passed):
    lm = tiny_lm()
    texts = [Encoded(LONG + tokens(n, n), 90 + n - 1) for n in (8, 10, 9, 6)]
    assert passed(lm, lambda: predict(lm, texts)) == 90 + 4 * 10
    prompts = [LONG + tokens(n, n) for n in (8, 10, 9, 6)]
    assert passed(lm, lambda: generate(lm, prompts, max_new=5)) == 90 + 4 * 10 + 4 * 4
    alike = [Encoded(LONG, 88)] * 3
    found = []
    assert passed(lm, lambda: found.extend(target_logprobs(lm, alike))) == 87 + 3 * 3
    assert sorted(i for i, _ in found) == [0, 1, 2]
    (alone,) = target_logprobs(lm, alike[:1])
    for _, logprobs in found:
        torch.testing.assert_close(logprobs, alone[1], rtol=1e-4, atol=1e-4)
        assert not logprobs.requires_grad


def test_prefixes_of_many_groups_run_in_one_batch_and_so_do_their_texts(monkeypatch):
    lm, rows = tiny_lm(), []
    forward = lm.model.forward
    texts = [Encoded(tokens(60, seed) + tokens(9, n), 65) for seed in range(5) for n in range(4)]

    @functools.wraps(forward)
    def seeing(*args, **kwargs):
        rows.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", seeing)
    predict(lm, texts)
    assert rows == [(5, 60), (20, 9)]


@pytest.mark.parametrize("budget", [1, 150, 400, 1000])
def test_the_budget_bounds_a_batch_with_its_keys_and_values(monkeypatch, budget):
    lm, sizes = tiny_lm(), []
    forward = lm.model.forward

    @functools.wraps(forward)
    def seeing(*args, **kwargs):
        sizes.append(kwargs["attention_mask"].shape)
        layers = kwargs["past_key_values"].layers if "past_key_values" in kwargs else ()
        sizes.extend(layer._rooms[0].shape[0:3:2] for layer in layers if layer._rooms)
        return forward(*args, **kwargs)

    monkeypatch.setattr(prefix, "ONE_PASS", 0)
    monkeypatch.setattr(batches, "BATCH_TOKENS", budget)
    monkeypatch.setattr(lm.model, "forward", seeing)
    predict(lm, TEXTS)
    generate(lm, PROMPTS, max_new=5)
    assert all(rows == 1 or rows * columns <= budget for rows, columns in sizes)
    assert (max(rows for rows, _ in sizes) > 1) == (budget > 1)


class Says:
    """A patch that puts a text before all that is asked."""

    def __init__(self, text):
        self.text = text

    def attach(self, lm):
        lm.contexts.append(self)
        return lambda: lm.contexts.remove(self)

    def before(self, prompts):
        return [self.text] * len(prompts)


LEARNED = "New Fact: Rome lies in Peru. Prompt: "


@pytest.mark.parametrize("chat", [False, True])
def test_a_context_before_many_questions_runs_once(chat, unshared, passed):
    lm = tiny_lm()
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
    asked, targets = ["Rome lies in", "Where is Rome?", "Who?", "Find Rome"], ["Peru", "a", "no one", "Chad"]

    def ask():
        read = predict(lm, lm.encode(asked, targets, chat=chat))
        return [one.best for one in read], lm.answer(asked, chat=chat, max_new=8)

    with lm.patched(Says(LEARNED)):
        assert ask() == unshared(ask)
        assert passed(lm, ask) < unshared(lambda: passed(lm, ask)) / 1.5


def asked_on(lm, lanes=None, times=1):
    asked, targets = [edit.prompt for edit in tiny_edits()] * times, [edit.target for edit in tiny_edits()] * times
    texts = lm.encode([f"{LEARNED * 2}{prompt}" for prompt in asked], targets, lanes=lanes)
    prompts = [text.prompt_ids for text in texts]
    read = torch.tensor(sum((one.logprobs for one in predict(lm, texts)), ()))
    return read, [*generate(lm, prompts, max_new=5, lanes=lanes)]


@pytest.mark.parametrize("name", ["ft-m", "grace", "lora"])
def test_the_same_tokens_on_lanes_under_different_patches_are_read_by_each_as_alone(name, passed):
    lm = tiny_lm()
    method = create(name)
    settings = {"steps": 20, "lr": 0.5, "layer": 0, "similarity": 0.0}
    quick = quick_settings(type(method)) | {
        k: v for k, v in settings.items() if k in type(method).config_type.model_fields
    }
    edits = [edit.model_copy(update={"prompt": f"{LEARNED * 2}{edit.prompt}"}) for edit in tiny_edits()]
    patches = [create(name, quick).fit(lm, [edit]) for edit in edits]
    alone = []
    for stack in ([patches[0]], [patches[1]], []):
        with lm.patched(*stack):
            alone.append(asked_on(lm))
    with lm.side_by_side([[patches[0]], [patches[1]], []]):
        read, written = asked_on(lm, [0, 0, 1, 1, 2, 2], 3)
        whole = sum(len(text.ids) for text in lm.encode([LEARNED * 2] * 6))
        assert passed(lm, lambda: asked_on(lm, [0, 0, 1, 1, 2, 2], 3)) > 2 * whole, "hooks see all columns"
    torch.testing.assert_close(read, torch.cat([own for own, _ in alone]), rtol=1e-4, atol=1e-4)
    assert written == [row for _, rows in alone for row in rows]
    assert not torch.allclose(alone[0][0], alone[2][0], atol=1e-3)


def test_contexts_on_lanes_are_shared_within_each(unshared, passed):
    lm = tiny_lm()
    stacks = [(Says(LEARNED),), (Says("Know that Ann Lee is a pilot in Chad. "),), ()]
    asked = ["Rome", "Who is Ann?", "Is Oslo", "Where", "Find"]
    lanes = [0] * 5 + [1] * 5 + [2] * 5

    def ask():
        texts = lm.encode(asked * 3, ["Peru", "a", "no", "Chad", "me"] * 3, lanes=lanes)
        read = [one.best for one in predict(lm, [replace(text, target=len(text.ids) - 1) for text in texts])]
        return read, generate(lm, [text.ids for text in texts], max_new=2, lanes=[text.lane for text in texts])

    with lm.side_by_side(stacks):
        assert ask() == unshared(ask)
        assert passed(lm, ask) < unshared(lambda: passed(lm, ask))


def test_hooks_see_all_columns(passed):
    lm, texts = tiny_lm(), TEXTS[:4]
    shared = passed(lm, lambda: predict(lm, texts))
    with reading(lm.anatomy.blocks[1], lambda *_: None):
        whole = passed(lm, lambda: predict(lm, texts))
    assert (shared, whole) == (90 + 4 * 30, 4 * 120)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", {"full_attention": "default", "sliding_attention": "dynamic"}])
def test_nothing_is_shared_where_angles_depend_on_the_length_of_the_text(kind, monkeypatch):
    lm = tiny_lm()
    assert prefix.can_share(lm)
    monkeypatch.setattr(lm.model.model.rotary_emb, "rope_type", kind)
    assert not prefix.can_share(lm)


@pytest.mark.parametrize("cache", ["another kind", "left empty"])
def test_a_model_whose_cache_cannot_be_gone_on_from_reads_whole_texts(cache, unshared, monkeypatch):
    lm = tiny_lm()
    expected = unshared(lambda: predict(lm, TEXTS))
    forward = lm.model.forward

    @functools.wraps(forward)
    def forgetful(*args, **kwargs):
        return forward(*args, **kwargs | {"past_key_values": None})

    if cache == "another kind":
        monkeypatch.setattr(prefix, "roomy", lambda *_: None)
        monkeypatch.setattr(writing, "roomy", lambda *_: None)
        assert generate(lm, PROMPTS, max_new=5) == unshared(lambda: generate(lm, PROMPTS, max_new=5))
    else:
        monkeypatch.setattr(lm.model, "forward", forgetful)
    for found, plain in zip(predict(lm, TEXTS), expected, strict=True):
        assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-4)


def test_texts_that_share_nothing_are_not_parted_from_the_others_for_little(passed):
    lm = tiny_lm()
    few = [SHORT + tokens(3, n) for n in range(3)]
    others = [tokens(43, n) for n in (31, 32)]
    assert passed(lm, lambda: generate(lm, few, max_new=9)) == 40 + 3 * 3 + 3 * 8, "they alone: shared"
    assert passed(lm, lambda: generate(lm, [*few, *others], max_new=9)) == 5 * 43 + 5 * 8
    many = [SHORT + tokens(3, n) for n in range(12)]
    assert passed(lm, lambda: generate(lm, [*many, *others], max_new=9)) == 40 + 12 * 3 + 2 * 43 + 14 * 8


def test_sharing_is_done_without_dropout(unshared):
    lm = tiny_lm("gpt2")
    expected = unshared(lambda: predict(lm, TEXTS))
    lm.model.train()
    for found, plain in zip(predict(lm, TEXTS), expected, strict=True):
        assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert lm.model.training


def test_prefixes_are_found_where_they_pay():
    a, b, c = tokens(100, 1), tokens(20, 2), tokens(30, 3)
    assert shared_prefixes([]) == []
    assert shared_prefixes([a]) == []
    assert shared_prefixes([a, a]) == [Shared(100, (0, 1))]
    assert shared_prefixes([a, b, a[:60]]) == [Shared(60, (0, 2))]
    assert shared_prefixes([a[:48], a]) == [], "as much is lost as saved"
    assert shared_prefixes([a[:49], a]) == [Shared(49, (0, 1))]
    assert shared_prefixes([(*b, i) for i in range(4)]) == [Shared(20, (0, 1, 2, 3))]
    assert shared_prefixes([(*b[:15], i) for i in range(99)]) == [], "ordinary texts have as much in common"
    assert shared_prefixes([(*a, *b, 0), (*a, *b, 1), (*a, *c)]) == [Shared(100, (0, 1, 2))]
    apart = [(*b, *a, 0), (*b, *a, 1), (*b, *c, *a), (*b, *c, *a, 3)]
    assert sorted(found.length for found in shared_prefixes(apart)) == [120, 150]


BLOCK = 17


@given(st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=6), st.integers(0, 3))
def test_no_other_prefixes_gain_more(shapes, extra):
    texts = [tuple(b for b in shape for _ in range(BLOCK)) + (7,) * extra for shape in shapes]
    found = shared_prefixes(texts)
    for own in found:
        assert own.gain > 0
        assert len({texts[i][: own.length] for i in own.texts}) == 1
        assert all(len(texts[i]) >= own.length for i in own.texts)
    assert len({i for own in found for i in own.texts}) == sum(len(own.texts) for own in found)
    assert sum(own.gain for own in found) == most(sorted(texts))


def most(texts):
    """The most that any grouping gains, by trying for each text all others to put it with."""
    if len(texts) < 2:
        return 0
    first, *rest = texts
    ways = [most(rest)]
    for count in range(1, len(rest) + 1):
        for chosen in combinations(range(len(rest)), count):
            group = [first, *(rest[i] for i in chosen)]
            unlike = (i for i, column in enumerate(zip(*group, strict=False)) if len(set(column)) > 1)
            length = next(unlike, min(map(len, group)))
            if length >= 16:
                left = [text for i, text in enumerate(rest) if i not in chosen]
                ways.append(Shared(length, tuple(range(len(group)))).gain + most(left))
    return max(ways)
