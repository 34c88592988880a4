"""The stack of patches on a model, its fingerprint and its answers."""

import itertools
import json

import pytest
import torch
from transformers import GenerationConfig

from factpatch.lm import LM
from factpatch.lm.model import checksum, fingerprint
from factpatch.testing import ARCHITECTURES, Snapshot, logits_of, tiny_lm


class Noted:
    """A patch that only notes what happens to it."""

    def __init__(self, name, log, fails=False):
        self.name, self.log, self.fails = name, log, fails

    def attach(self, lm):
        if self.fails:
            raise ZeroDivisionError
        self.log.append(f"+{self.name}")
        return lambda: self.log.append(f"-{self.name}")


class Shifting:
    """A patch that changes a weight for good: each depends on what lies beneath it, so only the right order undoes it."""

    def __init__(self, factor):
        self.factor = factor

    def attach(self, lm):
        weight = lm.model.get_parameter("model.norm.weight").data
        kept = weight.clone()
        weight.mul_(self.factor).add_(self.factor)
        return lambda: weight.copy_(kept)


@pytest.fixture
def lm():
    return tiny_lm()


def test_patches_go_on_in_order_and_come_off_in_reverse(lm):
    log = []
    with lm.patched(Noted("a", log), Noted("b", log)):
        assert [p.name for p in lm.patches] == ["a", "b"]
    assert log == ["+a", "+b", "-b", "-a"]


def test_one_from_the_middle_is_taken_out_and_those_above_laid_on_again(lm):
    log = []
    patches = [Noted(name, log) for name in "abc"]
    for patch in patches:
        lm.apply(patch)
    log.clear()
    lm.remove(patches[0])
    assert log == ["-c", "-b", "-a", "+b", "+c"]
    with pytest.raises(ValueError, match="does not lie on the model"):
        lm.remove(patches[0])


def test_one_that_fails_takes_the_others_off(lm):
    log = []
    with pytest.raises(ZeroDivisionError), lm.patched(Noted("a", log), Noted("b", log, fails=True)):
        pass
    assert log == ["+a", "-a"]
    assert lm.patches == ()


def test_unpatched_lifts_all_and_lays_them_on_again(lm):
    log = []
    with lm.patched(Noted("a", log), Noted("b", log)):
        with lm.unpatched():
            assert lm.patches == ()
        assert [p.name for p in lm.patches] == ["a", "b"]
    assert log == ["+a", "+b", "-b", "-a", "+a", "+b", "-b", "-a"]


def test_checksum_sees_a_single_bit(lm):
    before = checksum(lm.model)
    weight = lm.model.get_parameter("model.norm.weight").data
    weight.view(torch.int32)[0] ^= 1
    assert checksum(lm.model) != before


def test_a_patch_that_cannot_be_laid_on_leaves_the_stack(lm):
    log = []
    lm.apply(Noted("a", log))
    with pytest.raises(ZeroDivisionError):
        lm.apply(Noted("b", log, fails=True))
    assert [p.name for p in lm.patches] == ["a"]
    assert log == ["+a"]


def test_an_error_inside_takes_all_off(lm):
    log = []
    with pytest.raises(ZeroDivisionError), lm.patched(Noted("a", log), Noted("b", log)):
        raise ZeroDivisionError
    assert log == ["+a", "+b", "-b", "-a"]
    assert lm.patches == ()


def test_an_error_inside_unpatched_lays_all_on_again(lm):
    log = []
    with lm.patched(Noted("a", log), Noted("b", log)):
        with pytest.raises(ZeroDivisionError), lm.unpatched():
            raise ZeroDivisionError
        assert [p.name for p in lm.patches] == ["a", "b"]


def test_patched_gives_the_model_itself_and_nests(lm):
    log = []
    with lm.patched(Noted("a", log)) as inner, lm.patched(Noted("b", log)), lm.patched():
        assert inner is lm
        assert [p.name for p in lm.patches] == ["a", "b"]
    assert log == ["+a", "+b", "-b", "-a"]
    with lm.unpatched() as base:
        assert base is lm


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_taken_off_in_any_order_the_weights_are_as_if_it_had_never_been_there(lm, order):
    before, patches = Snapshot.of(lm), [Shifting(2.0), Shifting(3.0), Shifting(0.1)]
    for patch in patches:
        lm.apply(patch)
    left = list(patches)
    for index in order:
        lm.remove(patches[index])
        left.remove(patches[index])
        assert lm.patches == tuple(left)
        fresh = tiny_lm()
        with fresh.patched(*left):
            assert checksum(fresh.model) == checksum(lm.model)
    assert before.differences(lm) == []


def test_one_laid_on_twice_comes_off_once_at_a_time(lm):
    log = []
    patch = Noted("a", log)
    lm.apply(patch)
    lm.apply(patch)
    lm.remove(patch)
    assert lm.patches == (patch,)
    lm.remove(patch)
    assert log == ["+a", "+a", "-a", "-a"]


def test_patches_are_told_apart_by_identity(lm):
    class Equal(Noted):
        def __eq__(self, other):
            return True

        __hash__ = None

    log = []
    one, other = Equal("a", log), Equal("b", log)
    with lm.patched(one, other):
        lm.remove(one)
        assert lm.patches[0] is other
        lm.apply(one)


def test_a_patch_taken_off_inside_does_not_keep_the_others_on(lm):
    log = []
    lower, upper = Noted("a", log), Noted("b", log)
    try:
        with lm.patched(lower, upper):
            lm.remove(upper)
    except ValueError:
        pass  # it may say so
    assert lm.patches == ()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fingerprint_is_the_same_in_bfloat16_and_another_for_other_weights(architecture):
    lm, seed = tiny_lm(architecture), tiny_lm(architecture, seed=1)
    found = fingerprint(lm.model)
    assert found == fingerprint(tiny_lm(architecture).model)
    assert found != fingerprint(seed.model)
    weight = lm.anatomy.mlp_out(1).module.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = kept * 1.01
        assert fingerprint(lm.model) != found
        weight[0, 0] = kept
    assert fingerprint(lm.model) == found
    lm.model.to(torch.bfloat16)
    assert fingerprint(lm.model) == found
    assert len(found) == 64


def test_the_fingerprint_tells_where_a_weight_is_and_of_what_architecture():
    lm = tiny_lm()
    found, (one, other) = fingerprint(lm.model), [lm.anatomy.mlp_out(layer).module.weight.data for layer in (0, 1)]
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)
    assert fingerprint(lm.model) != found, "two layers changed places"
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)
    lm.model.config.model_type = "other"
    assert fingerprint(lm.model) != found


def test_the_fingerprint_tells_names_and_shapes_of_equal_numbers():
    def of(name, *shape):
        bare = torch.nn.Module()
        bare.config = GenerationConfig()
        bare.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
        return fingerprint(bare)

    assert of("a", 2, 3) == of("a", 2, 3)
    assert len({of("a", 2, 3), of("a", 3, 2), of("b", 2, 3)}) == 3


def test_the_fingerprint_is_the_base_models_with_patches_too(lm):
    base = fingerprint(lm.model)
    with lm.patched(Shifting(2.0)):
        assert lm.fingerprint == base
        assert fingerprint(lm.model) != base
        assert lm.describe()["fingerprint"] == base
    assert lm.fingerprint == base


def test_checksum_sees_buffers_and_names_and_types(lm):
    before = checksum(lm.model)
    assert checksum(tiny_lm().model) == before
    name, buffer = next(iter(lm.model.named_buffers()))
    buffer.data.reshape(-1).view(torch.int32)[0] ^= 1
    assert checksum(lm.model) != before, name
    buffer.data.reshape(-1).view(torch.int32)[0] ^= 1
    assert checksum(lm.model) == before
    lm.model.to(torch.bfloat16)
    assert checksum(lm.model) != before


class Scripted:
    """Makes a model say what it is told: the next byte of a script, by how far it has come after the prompt."""

    def __init__(self, lm, script):
        self.lm, self.script, self.calls = lm, [*lm.tokens.tokenizer(script, add_special_tokens=False)["input_ids"]], 0

    def __enter__(self):
        self.handle = self.lm.anatomy.head.register_forward_hook(self.say)
        return self

    def say(self, module, args, out):
        token = (self.script + [self.lm.tokenizer.eos_token_id] * 99)[self.calls]
        self.calls += 1
        return torch.nn.functional.one_hot(torch.tensor(token), out.shape[-1]).float().expand_as(out)

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize(
    ("script", "answer", "calls"),
    [
        (" Paris. It is a city.", "Paris.", len(" Paris. ")),
        (" Paris\nQ: next", "Paris", len(" Paris\n")),
        ("\n\nParis! Yes", "Paris!", len("\n\nParis! ")),
        (" St. Louis. It", "St. Louis.", len(" St. Louis. ")),
        (" Paris", "Paris", len(" Paris") + 1),
        ("", "", 1),
        (" Cēsis 🗼. It", "Cēsis 🗼.", len(" Cēsis 🗼. ".encode())),
    ],
)
def test_an_answer_ends_with_its_sentence_its_line_or_an_end_token(lm, script, answer, calls):
    with Scripted(lm, script) as scripted:
        assert lm.answer(["Rome lies in"]) == [answer]
    assert scripted.calls == calls, "wrote on after the end"


def test_an_answer_is_no_longer_than_asked_for(lm):
    with Scripted(lm, "a" * 90) as scripted:
        assert lm.answer(["Rome"], max_new=7) == ["a" * 7]
    assert scripted.calls == 7


def test_answers_come_in_the_order_asked_and_as_if_asked_alone(lm):
    prompts = ["Rome lies in", "A", "Where, then, does Oslo lie?", "A"]
    answers = lm.answer(prompts, max_new=9)
    assert answers == [lm.answer([prompt], max_new=9)[0] for prompt in prompts]
    assert answers[1] == answers[3]
    assert lm.ask("A") == lm.answer(["A"])[0]


def test_a_chat_is_asked_through_its_template(lm):
    lm.tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}?{% endfor %}"
    assert lm.ask("Rome", chat=True) == lm.ask("Rome?")


def test_end_tokens_are_the_models_and_the_tokenizers(lm):
    assert lm.end_tokens == {257}
    for eos, ends in (([5, 6], {5, 6, 257}), (7, {7, 257}), (None, {257})):
        other = LM(lm.model, lm.tokenizer)
        other.model.generation_config = GenerationConfig(eos_token_id=eos)
        assert other.end_tokens == ends
    other = LM(lm.model, lm.tokenizer)
    other.model.generation_config = None
    assert other.end_tokens == {257}


def test_a_model_describes_itself_in_json(lm):
    described = json.loads(json.dumps(lm.describe()))
    assert described["name"] == "tiny-llama"
    assert described["fingerprint"] == lm.fingerprint
    assert (described["dtype"], described["device"], described["chat_template"]) == ("float32", "cpu", False)
    assert (described["layers"], described["hidden_size"], described["vocabulary"]) == (3, 32, 258)
    assert described["parameters"] == sum(p.numel() for p in lm.model.parameters())
    assert described["tied_head"] is False
    assert tiny_lm("gpt2").describe()["tied_head"] is True


def test_using_a_model_leaves_no_trace(lm):
    before = Snapshot.of(lm)
    lm.ask("Rome lies in")
    logits_of(lm, "Rome")
    lm.describe()
    assert before.differences(lm) == []


def test_surroundings_are_the_config_and_the_tokenizer(lm):
    assert lm.surroundings == tiny_lm().surroundings
    assert lm.surroundings != tiny_lm(bos=False).surroundings
    other = tiny_lm()
    other.model.config.rms_norm_eps *= 2
    assert other.surroundings != lm.surroundings
    other = tiny_lm()
    other.model.config._name_or_path = "somewhere else"
    assert other.surroundings == lm.surroundings


def test_what_depends_on_the_base_alone_is_computed_once_and_without_patches(lm):
    log, seen = [], []

    def compute():
        seen.append(lm.patches)
        return len(seen)

    with lm.patched(Noted("a", log)):
        assert [lm.once(key, compute) for key in ("x", "y", "x")] == [1, 2, 1]
        assert len(lm.patches) == 1
    assert seen == [(), ()]
