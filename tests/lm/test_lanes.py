"""Stacks of patches side by side. That every kind of patch on every architecture may lie on a lane, the contract tests."""

from dataclasses import replace

import pytest
import torch

from factpatch.errors import WrongBase
from factpatch.lm import model
from factpatch.lm.predictions import predict
from factpatch.lm.writing import Sampler, generate
from factpatch.methods import create
from factpatch.patches.delta import Dense
from factpatch.scoring import Scorer
from factpatch.testing import Snapshot, quick_settings, tiny_edits, tiny_lm
from tests.cards import rows

METHODS = {
    "ft-m": {"layer": 1, "steps": 6},
    "grace": {"layer": 1, "steps": 30, "lr": 1.0},
    "melo": {"steps": 20},
    "lora": {"steps": 3},
}


def fitted(lm, name, edit):
    method = create(name)
    settings = {key: value for key, value in METHODS[name].items() if key in type(method).config_type.model_fields}
    return create(name, quick_settings(type(method)) | settings).fit(lm, [edit])


def stacks_of_two(lm, name):
    """One patch; two, the second made on the first; and the second alone."""
    first, second = tiny_edits()
    lower = fitted(lm, name, first)
    with lm.patched(lower):
        upper = fitted(lm, name, second)
    return [(lower,), (lower, upper), (fitted(lm, name, second),)]


def prompts(lm):
    return [lm.tokens.encode(edit.prompt).ids for edit in tiny_edits()]


@pytest.mark.parametrize("name", METHODS)
def test_a_lane_may_hold_several_patches(name):
    lm = tiny_lm()
    stacks, before = stacks_of_two(lm, name), Snapshot.of(lm)
    expected = []
    for stack in stacks:
        with lm.patched(*stack):
            expected += [one.logprobs for one in predict(lm, lm.encode(*asked()))]
    with lm.side_by_side(stacks):
        lanes = [lane for lane in range(3) for _ in tiny_edits()]
        found = [one.logprobs for one in predict(lm, lm.encode(*asked(3), lanes=lanes))]
    torch.testing.assert_close(*(torch.tensor(sum(rows, ())) for rows in (found, expected)), rtol=1e-4, atol=1e-4)
    assert len({round(row[0], 3) for row in expected[::2]}) > 1, "the stacks do differ"
    assert before.differences(lm) == []


def asked(times=1):
    return [edit.prompt for edit in tiny_edits()] * times, [edit.target for edit in tiny_edits()] * times


def test_lanes_lie_above_what_lies_on_the_model():
    lm = tiny_lm()
    (lower,), (_, upper), (other,) = stacks_of_two(lm, "ft-m")
    with lm.patched(lower, other):
        expected = generate(lm, prompts(lm), max_new=6)
    with lm.patched(lower):
        beneath = generate(lm, prompts(lm), max_new=6)
        with lm.side_by_side([(upper,), (other,)]):
            assert lm.patches == (lower,)
            assert generate(lm, prompts(lm), max_new=6, lanes=[1, 1]) == expected
            assert generate(lm, prompts(lm), max_new=6) == beneath
        assert lm.patches == (lower,)


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_end_leave_their_lane(name):
    lm = tiny_lm()
    stacks = stacks_of_two(lm, name)
    alone = []
    for stack in stacks:
        with lm.patched(*stack):
            alone += generate(lm, prompts(lm), max_new=9)

    def stop(written):
        return written == alone[0][:2] or written == alone[3][:5]

    ended = [next((row[:n] for n in range(1, 10) if stop(row[:n])), row) for row in alone]
    assert len({len(row) for row in ended}) > 1
    with lm.side_by_side(stacks):
        lanes = [0, 0, 1, 1, 2, 2]
        assert generate(lm, prompts(lm) * 3, max_new=9, stop=stop, lanes=lanes) == ended


def rows_of(lm, lanes=None):
    return torch.tensor(sum((one.logprobs for one in predict(lm, lm.encode(*asked(), lanes=lanes))), ()))


def test_patches_that_act_as_one_do_so_on_a_lane():
    lm, (first, _) = tiny_lm(), tiny_edits()
    one, other = (fitted(lm, "grace", edit) for edit in (first, first.model_copy(update={"target": "Chad"})))
    further = replace(other, keys=other.keys + other.radii.min() / other.keys.shape[1])  # in reach, and not the nearest
    with lm.patched(one):
        expected = rows_of(lm)
    with lm.patched(further):
        assert not torch.allclose(rows_of(lm), expected, atol=1e-3), "the upper one would answer, were it alone"
    with lm.patched(one, further):
        torch.testing.assert_close(rows_of(lm), expected, rtol=1e-4, atol=1e-4)
    with lm.side_by_side([(one, further)]):
        torch.testing.assert_close(rows_of(lm, [0, 0]), expected, rtol=1e-4, atol=1e-4)


def test_a_changed_weight_acts_before_what_replaces_the_modules_output():
    lm, (first, _) = tiny_lm(), tiny_edits()
    book, weight = fitted(lm, "grace", first), fitted(lm, "ft-m", first)
    assert [book.site] == [name.removesuffix(".weight") for name in weight.deltas]
    with lm.patched(book, weight):
        expected = rows_of(lm)
    with lm.patched(book), lm.side_by_side([(weight,)]):
        torch.testing.assert_close(rows_of(lm, [0, 0]), expected, rtol=1e-4, atol=1e-4)


def test_one_prompt_on_two_lanes_is_sampled_as_alone():
    lm = tiny_lm()
    stacks = stacks_of_two(lm, "ft-m")[:2]
    alone = []
    for stack in stacks:
        with lm.patched(*stack):
            alone += generate(lm, prompts(lm)[:1], max_new=12, choose=Sampler(seed=3, top_k=20))
    with lm.side_by_side(stacks):
        found = generate(lm, prompts(lm)[:1] * 2, max_new=12, choose=Sampler(seed=3, top_k=20), lanes=[0, 1])
    assert found == alone


def test_an_error_inside_takes_the_lanes_off():
    lm = tiny_lm()
    stacks, before = stacks_of_two(lm, "grace"), Snapshot.of(lm)
    with pytest.raises(ZeroDivisionError), lm.side_by_side(stacks):
        _ = 1 / 0
    assert before.differences(lm) == []


class Unfit:
    def attach(self, lm):
        raise WrongBase("made for another model")


def test_a_patch_that_cannot_be_laid_on_takes_the_others_off():
    lm = tiny_lm()
    patch, before = fitted(lm, "ft-m", tiny_edits()[0]), Snapshot.of(lm)
    with pytest.raises(WrongBase), lm.side_by_side([(patch,), (Unfit(),)]):
        pass
    assert before.differences(lm) == []


class ChangesWhatIsRead:
    def attach(self, lm):
        return lm.anatomy.blocks[0].register_forward_pre_hook(lambda _, args: args).remove


def test_changing_what_a_module_reads_is_refused():
    lm = tiny_lm()
    before = Snapshot.of(lm)
    with pytest.raises(TypeError, match="not what it reads"), lm.side_by_side([(ChangesWhatIsRead(),)]):
        generate(lm, prompts(lm), max_new=1, lanes=[0, 0])
    assert before.differences(lm) == []


@pytest.mark.parametrize("chat", [False, True])
def test_each_edit_scored_on_its_lane_has_the_card_it_has_alone(chat):
    lm, edits = tiny_lm(), tiny_edits()
    if chat:
        lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    patches = [fitted(lm, "ft-m", edit) for edit in edits]
    alone = [Scorer(lm, chat=chat).score([edit], patch) for edit, patch in zip(edits, patches, strict=True)]
    together = Scorer(lm, chat=chat).score_each([[edit] for edit in edits], [(patch,) for patch in patches])
    for own, card in zip(together, alone, strict=True):
        assert own.chat == card.chat == chat
        assert rows(own) == rows(card)
        assert own.score_seconds > 0
    assert Scorer(lm).score_each([], []) == []


def test_as_many_lie_side_by_side_as_have_room(monkeypatch):
    lm = tiny_lm()
    stacks, before = [*stacks_of_two(lm, "ft-m"), (fitted(lm, "grace", tiny_edits()[0]),), ()], Snapshot.of(lm)
    size = lm.anatomy.mlp_out(1).matrix.nbytes
    assert [*lm.abreast(stacks)] == [range(5)], "a small model has room for all"
    monkeypatch.setattr(model, "ROOM_FOR_LANES", 0)
    half = sum(parameter.nbytes for parameter in lm.model.parameters()) // 2
    every = [stacks[0]] * (half // size + 2)
    assert [*lm.abreast(every)] == [range(half // size), range(half // size, len(every))]
    everywhere = fitted_everywhere(lm)
    assert [*lm.abreast([everywhere, *stacks, everywhere])] == [range(1), range(1, 6), range(6, 7)]
    assert [*lm.abreast([])] == []
    assert before.differences(lm) == []


def fitted_everywhere(lm):
    """A patch that changes more than half of the model."""
    (patch,) = stacks_of_two(lm, "ft-m")[0]
    deltas = {name: Dense(torch.full_like(p, 1e-3)) for name, p in lm.model.named_parameters()}
    return (replace(patch, deltas=deltas),)


def test_scores_do_not_depend_on_how_many_lie_side_by_side(monkeypatch):
    lm = tiny_lm()
    stacks, groups = stacks_of_two(lm, "ft-m"), [[edit] for edit in (*tiny_edits(), tiny_edits()[1])]
    together = Scorer(lm).score_each(groups, stacks)
    monkeypatch.setattr(lm, "abreast", lambda stacks: (range(i, i + 1) for i in range(len(stacks))))
    assert [rows(card) for card in Scorer(lm).score_each(groups, stacks)] == [rows(card) for card in together]
