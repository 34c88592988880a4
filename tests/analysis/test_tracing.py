"""Tracing: against one pass for each place and sample, on a model whose fact's place is known, and its own rules."""

import math
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from benchmarks import tracing as benchmark
from transformers import AutoConfig, AutoModelForCausalLM

from factpatch.analysis import facts, tracing
from factpatch.analysis.facts import Fact, first_telling, known_facts, says
from factpatch.analysis.tracing import (
    PARTS,
    ROLES,
    Trace,
    average,
    encoded_fact,
    subject_noise,
    suggested_layer,
    trace,
    trace_all,
    usual_window,
    window_at,
)
from factpatch.data import read
from factpatch.errors import AnatomyError, BadConfig, TokenizerError
from factpatch.lm import LM
from factpatch.lm.hooks import replacing_output
from factpatch.methods import create
from factpatch.patches import ContextPatch
from factpatch.testing import ARCHITECTURES, MIXTURES, Snapshot, tiny_edits, tiny_lm, tiny_tokenizer

FACT = Fact("In Rome now", "Rome", "it")


def assert_same(found, reference):
    clean, corrupted, restored = reference
    assert found.clean == pytest.approx(clean, rel=1e-4)
    assert found.corrupted == pytest.approx(corrupted, rel=1e-4)
    expected = torch.tensor(list(restored.values()))
    scale = float((expected - corrupted).abs().max())
    assert scale > 1e-3 * corrupted, "the test would see nothing"
    got = torch.stack([found.restored[place] for place in restored])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3 * scale)


def plain(lm, fact, part, window, samples=2, tokens=None):
    """At all places, or at those of some tokens."""
    places = None if tokens is None else [(token, layer) for token in tokens for layer in range(lm.anatomy.n_layers)]
    return benchmark.plain(lm, fact, part, window, samples=samples, noise=3.0, seed=0, places=places)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_every_place_is_as_with_a_pass_of_its_own(architecture):
    lm = tiny_lm(architecture)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 3:  # a mixture's experts, which would do next to nothing
                parameter.mul_(8)
    for part, window in (("state", 1), ("mlp", 2), ("attention", 1)):
        found = trace(lm, FACT, part=part, window=window, samples=2)
        assert_same(found, plain(lm, FACT, part, window, tokens=(2, 4, 7, 11)))


@pytest.mark.parametrize(("part", "window"), [("state", 2), ("state", 3), ("mlp", 1), ("mlp", 5), ("attention", 3)])
def test_windows_are_as_with_passes_of_their_own(part, window):
    lm = tiny_lm("gpt2")
    assert_same(trace(lm, FACT, part=part, window=window, samples=2), plain(lm, FACT, part, window, tokens=(4, 6, 8)))


@pytest.mark.parametrize(("batch", "enough"), [(1, 1), (40, 30), (40, 4096), (4096, 1), (4096, 4096)])
def test_what_runs_together_does_not_matter(monkeypatch, batch, enough):
    lm = tiny_lm("gemma3_text")
    expected = plain(lm, FACT, "state", 1, samples=3, tokens=(5, 11))
    monkeypatch.setattr(tracing, "BATCH_TOKENS", batch)
    monkeypatch.setattr(tracing, "_ENOUGH_TOKENS", enough)
    rows = []
    run = tracing._Question.run
    monkeypatch.setattr(
        tracing._Question, "run", lambda self, n, **more: rows.append(n * len(self.ids)) or run(self, n, **more)
    )
    assert_same(trace(lm, FACT, samples=3), expected)
    assert max(rows) <= max(batch, len(encoded_fact(lm, FACT).prompt_ids))


def test_what_does_not_change_runs_once():
    lm = tiny_lm()
    tokens = []
    with replacing_output(lm.anatomy.blocks[0], lambda x, out: tokens.append(x.shape[0] * x.shape[1]) or out):
        trace(lm, FACT, samples=2)
    columns = len(encoded_fact(lm, FACT).prompt_ids)
    with_hook = [columns, 2 * columns]
    assert tokens == with_hook, "the clean and the corrupted run, and no more"


def test_columns_before_a_place_are_not_run_again(monkeypatch):
    lm, seen = tiny_lm(), []
    run = tracing._Question.run
    monkeypatch.setattr(
        tracing._Question,
        "run",
        lambda self, n, **more: seen.append((n, more.get("since", 0))) or run(self, n, **more),
    )
    monkeypatch.setattr(tracing, "_ENOUGH_TOKENS", 1)
    found = trace(lm, FACT, samples=2)
    columns = range(found.subject[0], len(found.tokens))
    assert seen == [(1, 0), (2, 0), *((2, column) for column in columns for _ in range(3))]


def test_keys_and_values_of_one_batch_of_columns_are_held_at_a_time(monkeypatch):
    held, most = WeakSet(), []
    begin = tracing._Restored.__init__

    def counted(self, *args):
        begin(self, *args)
        held.add(self)
        most.append(len(held))

    monkeypatch.setattr(tracing._Restored, "__init__", counted)
    monkeypatch.setattr(tracing._Restored, "__hash__", object.__hash__)
    monkeypatch.setattr(tracing, "_ENOUGH_TOKENS", 1)
    found = trace(tiny_lm(), FACT, samples=2)
    assert most == [1] * (len(found.tokens) - found.subject[0])


def mixed_lm():
    """A mixture of experts in blocks 0 and 2, with a plain MLP in block 1."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    experts = {"intermediate_size": 48, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    config = AutoConfig.for_model("qwen3_moe", vocab_size=258, mlp_only_layers=[1], **sizes, **experts, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return LM(model.eval(), tiny_tokenizer(), name="mixed")


def test_a_mixture_with_a_dense_block_is_traced():
    lm = mixed_lm()
    mlps = [tracing._site(lm, "mlp", layer) for layer in range(3)]
    assert mlps[1] is lm.anatomy.mlp_out(1).module, "its output projection"
    assert mlps[::2] == [lm.anatomy.block(layer).mlp for layer in (0, 2)], "the sum of the experts"
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(8)  # so that they do something
    assert_same(trace(lm, FACT, part="mlp", window=2, samples=2), plain(lm, FACT, "mlp", 2, tokens=(4, 7, 11)))


def known_place():
    """A GPT-2 in which the MLP of block 1 knows the letter x, and block 2's attention tells the last token; nothing else acts.

    A large constant in what positions add makes norms all but linear. Entry 1 is what the MLP writes where it reads the
    letter; entry 2 is what attention makes of that, and what the head reads.
    """
    lm = tiny_lm("gpt2")
    gpt, bulk = lm.model.transformer, 200.0
    scale = bulk * math.sqrt(2 / 32)
    letter = lm.tokens.encode("x").ids[-1]
    with torch.no_grad():
        for block in gpt.h:
            for weight in (*block.attn.parameters(), *block.mlp.parameters()):
                weight.zero_()
        gpt.wte.weight[:, [1, 2, 30, 31]] = 0
        gpt.wpe.weight.zero_()
        gpt.wpe.weight[:, 30], gpt.wpe.weight[:, 31] = bulk, -bulk
        # A bump of three neurons, narrow so that noise hardly ever hits it, around what the letter gives along itself.
        key = gpt.wte.weight[letter] - gpt.wte.weight[letter].mean()
        height, mlp = float(key @ gpt.wte.weight[letter]), gpt.h[1].mlp
        slope = 20 / height
        for neuron, (shift, weight) in enumerate([(1, 1.0), (0, -2.0), (-1, 1.0)]):
            mlp.c_fc.weight[:, neuron] = 20 * slope * scale * key
            mlp.c_fc.bias[neuron] = 20 * (shift - slope * height)
            mlp.c_proj.weight[neuron, 1] = weight * 50 / 20
        attention = gpt.h[2].attn
        attention.c_attn.weight[1, 64] = 1.0
        attention.c_proj.weight[0, 2] = 1500.0
        head = torch.zeros_like(lm.model.lm_head.weight)
        head[lm.tokens.encode("Qy").ids[-1], 2] = 6.0
    lm.model.lm_head.weight = torch.nn.Parameter(head)
    return lm


def test_all_places_at_once():
    lm = tiny_lm()
    assert_same(trace(lm, FACT, samples=2), plain(lm, FACT, "state", 1))


@pytest.fixture(scope="module")
def found():
    lm = known_place()
    fact = Fact("In Bax now", "Bax", "yes")
    return {part: trace(lm, fact, part=part, window=1, samples=10, noise=12.0) for part in PARTS}


def test_the_known_model_says_its_fact_and_forgets_it_under_noise(found):
    assert found["state"].clean > 0.95
    assert found["state"].corrupted < 0.25


@pytest.mark.parametrize(
    ("part", "places"),
    [
        # The letter's state carries the fact until attention has read it, then the last token's does.
        ("state", [("x", 0), ("x", 1), ("last", 2)]),
        ("mlp", [("x", 1)]),
        ("attention", [("last", 2)]),
    ],
)
def test_tracing_finds_the_fact_where_it_was_put_and_nowhere_else(found, part, places):
    own = found[part]
    where = {"x": own.subject[1] - 1, "last": len(own.tokens) - 1}
    assert own.tokens[where["x"]] == "x"
    effects = own.effects.clone()
    for name, layer in places:
        assert effects[where[name], layer] > 0.7
        effects[where[name], layer] = 0
    assert effects.abs().max() < 0.05


def test_the_known_block_is_suggested(found):
    assert suggested_layer(average([found["mlp"]])) == 1


def test_the_last_state_of_the_last_token_is_the_clean_run():
    own = trace(tiny_lm(), FACT, samples=2)
    assert float(own.restored[-1, -1]) == pytest.approx(own.clean, rel=1e-4)
    assert own.effects[: own.subject[0]].abs().max() < 1e-9
    assert own.tokens == ("<s>", *FACT.prompt, " "), "the space before the answer tells nothing"
    assert own.asked == "i"
    assert own.subject == (4, 8)


@pytest.mark.parametrize("part", PARTS)
def test_the_model_is_left_as_it_was(part):
    lm = tiny_lm("opt")
    lm.model.train()
    before = Snapshot.of(lm)
    trace(lm, FACT, part=part, window=2, samples=2)
    assert before.differences(lm) == []


def test_dropout_is_off():
    lm = tiny_lm("gpt2")
    expected = trace(lm, FACT, samples=2).restored
    lm.model.train()
    assert torch.equal(trace(lm, FACT, samples=2).restored, expected)


def test_the_seed_fixes_the_result_and_the_first_draws_stay():
    lm = tiny_lm()
    one = trace(lm, FACT, samples=2, seed=5)
    torch.manual_seed(1)
    assert torch.equal(one.restored, trace(lm, FACT, samples=2, seed=5).restored)
    assert not torch.allclose(one.restored, trace(lm, FACT, samples=2, seed=6).restored, rtol=1e-3)
    text = encoded_fact(lm, FACT)
    few, many = (subject_noise(lm, text, samples=n, noise=3.0, seed=5) for n in (2, 7))
    assert torch.equal(few, many[:2])
    assert few.shape == (2, 4, 32)


def test_noise_is_three_deviations_of_subjects_embeddings():
    lm = tiny_lm()
    subjects = {edit.subject for edit in read("sample").edits if edit.subject}
    letters = [token for subject in subjects for token in lm.tokens.encode(subject).ids[1:]]
    deviation = lm.anatomy.embedding.weight[letters].std().item()
    drawn = subject_noise(lm, encoded_fact(lm, FACT), samples=400, noise=3.0, seed=0)
    assert drawn.std().item() == pytest.approx(3 * deviation, rel=0.01)
    assert abs(drawn.mean().item()) < 0.02 * deviation * 3


def test_the_noise_of_a_scaled_embedding_is_scaled():
    lm = tiny_lm("gemma3_text")
    drawn = subject_noise(lm, encoded_fact(lm, FACT), samples=50, noise=1.0, seed=0)
    assert drawn.std().item() == pytest.approx(0.15 * math.sqrt(32), rel=0.1)


def test_facts_are_traced_as_alone():
    lm = tiny_lm()
    facts = [FACT, Fact("Who is Ann Lee?", "Ann Lee", "a pilot")]
    told = []
    together = trace_all(lm, facts, part="mlp", samples=2, progress=lambda *args: told.append(args))
    assert [own.fact for own in together] == facts
    for own in together:
        assert torch.equal(own.restored, trace(lm, own.fact, part="mlp", samples=2).restored)
    assert told[-1][1] == told[-1][2]


def test_a_patched_model_is_traced_as_it_is():
    lm = tiny_lm()
    base = trace(lm, FACT, samples=2)
    rome = tiny_edits()[0]
    for name in ("ft-m", "grace"):  # other weights, and a hook on a module
        method = create(name, {"steps": "3", "layer": "1"})
        patch = method.fit(lm, [rome.model_copy(update={"prompt": FACT.prompt, "target": "in Ur"})])
        with lm.patched(patch):
            before = Snapshot.of(lm)
            found = trace(lm, FACT, samples=2)
            assert before.differences(lm) == []
            assert found.clean != base.clean
            assert float(found.restored[-1, -1]) == pytest.approx(found.clean, rel=1e-3)
            if name == "ft-m":
                assert_same(found, plain(lm, FACT, "state", 1, tokens=(7, 11)))
    assert torch.equal(trace(lm, FACT, samples=2).restored, base.restored)


def test_what_cannot_be_traced_is_refused_in_words():
    lm = tiny_lm()
    with pytest.raises(TokenizerError, match='the subject "Oslo" is not in the prompt'):
        trace(lm, Fact("Rome is", "Oslo", "it"))
    for wrong in ({"samples": 0}, {"window": 0}, {"noise": 0.0}, {"noise": math.nan}):
        with pytest.raises(BadConfig, match=rf"cannot trace with {next(iter(wrong))}"):
            trace(lm, FACT, **wrong)


def test_a_mixture_without_a_module_of_experts_is_refused():
    lm = tiny_lm("mixtral")
    object.__setattr__(lm.anatomy.layout, "mlp", "elsewhere")
    with pytest.raises(AnatomyError, match="mixture of experts"):
        trace(lm, FACT, part="mlp")
    trace(lm, FACT, part="attention", samples=1)


def test_windows():
    assert [usual_window("state", 48), usual_window("mlp", 48), usual_window("attention", 30)] == [1, 10, 10]
    assert [usual_window("mlp", layers) for layers in (1, 3, 12, 29)] == [1, 1, 4, 9]
    assert [list(window_at(layer, 1, 3)) for layer in range(3)] == [[0], [1], [2]]
    assert list(window_at(10, 10, 48)) == list(range(5, 15))
    assert list(window_at(1, 3, 4)) == [0, 1, 2]
    assert list(window_at(0, 10, 48)) == list(range(5))
    assert list(window_at(47, 10, 48)) == list(range(42, 48))


def made(effects, subject, part="mlp", corrupted=0.25):
    table = torch.tensor(effects)
    tokens = tuple("abcdefgh"[: len(table)])
    return Trace(FACT, part, 3, tokens, subject, 0.5, corrupted, table + corrupted)


def test_the_average_is_over_facts_by_role():
    #                before first        middle      middle      last        after       further     last
    one = made([[9.0], [0.125], [0.25], [0.5], [0.375], [0.5], [0.625], [0.75]], (1, 5))
    two = made([[0.5], [0.25], [1.0]], (0, 1))  # no first, no middle, nothing further
    mean = average([one, two])
    assert (mean.facts, mean.window, mean.part, mean.clean, mean.corrupted) == (2, 3, "mlp", 0.5, 0.25)
    assert mean.counts == (1, 1, 2, 2, 1, 2)
    expected = [0.125, 0.375, (0.375 + 0.5) / 2, (0.5 + 0.25) / 2, 0.625, (0.75 + 1.0) / 2]
    torch.testing.assert_close(mean.effects[:, 0], torch.tensor(expected))
    assert mean.errors[:, 0].isnan().tolist() == [True, True, False, False, True, False]
    # The standard error of two values is half of how far they are apart.
    torch.testing.assert_close(mean.errors[[2, 3, 5], 0], torch.tensor([0.0625, 0.125, 0.125]))


@pytest.mark.parametrize(
    ("subject", "tokens", "counts"),
    [
        ((0, 1), 1, (0, 0, 1, 0, 0, 0)),  # the subject is the prompt
        ((0, 2), 2, (1, 0, 1, 0, 0, 0)),
        ((1, 4), 4, (1, 1, 1, 0, 0, 0)),  # it ends the prompt
        ((0, 1), 2, (0, 0, 1, 0, 0, 1)),  # one token after it, which is the last
        ((0, 1), 3, (0, 0, 1, 1, 0, 1)),
        ((0, 1), 4, (0, 0, 1, 1, 1, 1)),
    ],
)
def test_each_token_has_one_role(subject, tokens, counts):
    mean = average([made([[1.0 + i] for i in range(tokens)], subject)])
    assert mean.counts == counts
    assert mean.effects[:, 0].isnan().tolist() == [not count for count in counts]
    assert len(ROLES) == len(counts)


def test_what_does_not_go_together_is_not_averaged():
    one = made([[1.0], [2.0]], (0, 1))
    for wrong in ([], [one, made([[1.0], [2.0]], (0, 1), part="state")], [one, made([[1.0, 0.0]] * 2, (0, 1))]):
        with pytest.raises(ValueError, match="one part, one window and one model"):
            average(wrong)


def test_the_layer_suggested_is_the_greatest_at_the_subjects_last_token():
    assert suggested_layer(average([made([[0.1, 0.7, 0.9], [0.2, 0.6, 0.1], [5.0, 0.0, 0.0]], (0, 2))])) == 1


def test_a_context_is_put_before_and_not_harmed():
    lm = tiny_lm()
    (edit, _) = tiny_edits()
    patch = create("ice").fit(lm, [edit])
    assert isinstance(patch, ContextPatch)
    with lm.patched(patch):
        before = lm.before([edit.prompt])[edit.prompt]
        found = trace(lm, Fact(edit.prompt, "Rome", "Peru"), samples=1)
    assert "".join(found.tokens).startswith(f"<s>{before}")
    assert "".join(found.tokens[slice(*found.subject)]) == "Rome"
    assert found.subject[0] >= len(before)


@pytest.mark.parametrize(
    ("answer", "at"),
    [("Italy", 1), ("1945", 1), ("a pilot", 3), ("Ahmed", 1), ('"Rome"', 2), ("a", None), ("...", None)],
)
def test_spaces_marks_and_articles_tell_nothing(answer, at):
    lm = tiny_lm()  # with a token for each letter
    assert first_telling(lm, lm.encode(["It is"], [answer])[0].target_ids) == at


@pytest.mark.parametrize(
    ("said", "answer", "known"),
    [
        ("Italy", "Italy", True),
        ("Iraq", "Italy", True),  # as far as the first letter that tells something
        ("Oslo", "Italy", False),  # with the same space before it
        ("1945", "1945", True),
        ("1946", "1945", False),
        ("19 men", "1945", False),
        ("a poet", "a pilot", True),
        ("a man", "a pilot", False),
        ("...", "...", False),
    ],
)
def test_a_fact_is_known_by_what_tells_something_and_a_number_by_all_its_digits(monkeypatch, said, answer, known):
    def predict(lm, texts):
        (best,) = lm.encode(["It is"], [said])
        return [SimpleNamespace(best=best.target_ids[: len(text.target_ids)], target=text.target_ids) for text in texts]

    monkeypatch.setattr(facts, "predict", predict)
    lm = tiny_lm()
    assert says(lm, [Fact("It is", "It", answer)]) == [known]
    edit = tiny_edits()[0].model_copy(update={"prompt": "It is", "subject": "It", "ground_truth": (answer,)})
    assert [fact.answer for fact in known_facts(lm, [edit])] == [answer] * known


def test_a_chat_is_traced_in_its_template():
    lm = tiny_lm()
    lm.tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>"
    found = trace(lm, FACT, samples=1, chat=True)
    assert "".join(found.tokens).startswith("[user]In Rome now>")
    assert "".join(found.tokens[slice(*found.subject)]) == "Rome"


def test_progress_over_several_facts_is_one():
    facts = [Fact("Rome lies in", "Rome", "Italy"), Fact("It is said of Oslo that it lies far in", "Oslo", "Norway")]
    told = []
    trace_all(tiny_lm(), facts, samples=2, progress=lambda doing, done, total: told.append((doing, done, total)))
    assert len({(doing, total) for doing, _, total in told}) == 1
    done = [done for _, done, _ in told]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == told[-1][2]
    ends = [len(prompt) - prompt.index(subject) for prompt, subject in ((fact.prompt, fact.subject) for fact in facts)]
    middle = told[-1][2] * ends[0] / sum(ends)
    assert any(abs(each - middle) <= 0.1 * told[-1][2] for each in done), "the longer prompt counts for more"
