"""Keys and values written in place are those that transformers keeps, and what is kept is not changed by adding to it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, StaticCache

from factpatch.lm.batches import Batch, Places
from factpatch.lm.kv import Roomy, adding_to, begun, roomy
from factpatch.lm.run import UpperRun
from factpatch.testing import ARCHITECTURES, tiny_lm


def some(rows, columns, *, seed=0, widths=(4, 6)):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, columns, width, generator=source) for width in widths]


def test_columns_are_written_behind_those_there_are_and_rows_may_leave():
    own, plain = Roomy(9), DynamicLayer()
    assert own.get_seq_length() == 0
    for step, columns in enumerate((4, 1, 2)):
        new = some(5, columns, seed=step)
        for found, expected in zip(own.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert own.get_mask_sizes(1) == plain.get_mask_sizes(1)
    for kept in (torch.tensor([0, 2, 3]), torch.tensor([1])):
        own.batch_select_indices(kept)
        plain.batch_select_indices(kept)
        new = some(len(kept), 1, seed=9)
        for found, expected in zip(own.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
    with pytest.raises(AssertionError):
        own.update(*some(1, 1))


def test_nothing_is_copied_while_columns_are_added():
    layer = Roomy(5)
    places = {tensor.data_ptr() for _ in range(5) for tensor in layer.update(*some(3, 1))}
    assert len(places) == 2, "one for the keys, one for the values"


def test_a_batch_begins_with_prefixes_that_end_where_it_goes_on():
    known = roomy(tiny_lm().model, 5)
    for i in range(3):
        known.update(*some(2, 5, seed=i, widths=(8, 8)), i)
    starts, since = [(1, 0), (0, 2), (1, 4), (0, 6)], 4
    cache = begun(known, starts, since, 7)
    assert cache.get_seq_length() == since
    assert known.get_seq_length() == 5
    new = some(4, 3, seed=7, widths=(8, 8))
    for i, layer in enumerate(known.layers):
        found = cache.update(*new, i)
        for got, kept, added in zip(found, (layer.keys, layer.values), new, strict=True):
            for row, (whose, start) in enumerate(starts):
                assert torch.equal(got[row, :, start:since], kept[whose, :, : max(0, since - start)])
                assert torch.equal(got[row, :, : min(start, since)], torch.zeros(2, min(start, since), 8))
                assert torch.equal(got[row, :, since:], added[row])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_is_of_the_models_own_kind_with_a_layer_for_each_block(architecture):
    lm = tiny_lm(architecture)
    cache = roomy(lm.model, 8)
    own = lm.model(input_ids=torch.tensor([[1, 2]]), use_cache=True).past_key_values
    assert type(cache) is type(own)
    assert len(cache.layers) == len(own.layers) == lm.anatomy.n_layers


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "intermediate_size": 16}),
        ("lfm2", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                  "intermediate_size": 16, "layer_types": ["conv", "full_attention"]}),
    ],
)  # fmt: skip
def test_a_model_that_keeps_other_things_makes_its_cache_itself(kind, sizes):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=32, **sizes))
    assert roomy(model, 8) is None


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_adding_leaves_what_is_kept_as_it_is_and_copies_nothing_of_it(architecture):
    lm = tiny_lm(architecture)
    ids = torch.arange(70).expand(2, -1)  # beyond the window, where there is one
    with torch.no_grad():
        past = lm.model(input_ids=ids, use_cache=True).past_key_values
        kept = [(layer.keys, layer.values, layer.keys.clone(), layer.values.clone()) for layer in past.layers]
        length = past.get_seq_length()
        for _ in range(2):
            own = adding_to(past)
            assert type(own) is DynamicCache
            assert all(a.keys is b.keys and a.values is b.values for a, b in zip(own.layers, past.layers, strict=True))
            lm.model(input_ids=ids[:, :3], past_key_values=own, use_cache=True)
            assert own.get_seq_length() == length + 3
    assert past.get_seq_length() == length
    for layer, (keys, values, as_keys, as_values) in zip(past.layers, kept, strict=True):
        assert layer.keys is keys
        assert layer.values is values
        assert torch.equal(keys, as_keys)
        assert torch.equal(values, as_values)


@pytest.mark.parametrize(
    "made", [lambda lm: StaticCache(config=lm.model.config, max_cache_len=9), lambda lm: roomy(lm.model, 9)]
)
def test_what_is_written_in_place_is_copied_before_it_is_added_to(made):
    lm = tiny_lm()
    past = made(lm)
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=past, use_cache=True)
        kept = [layer.keys.clone() for layer in past.layers]
        lm.model(input_ids=torch.tensor([[4, 5]]), past_key_values=adding_to(past), use_cache=True)
    assert int(past.get_seq_length()) == 3
    assert all(torch.equal(layer.keys, own) for layer, own in zip(past.layers, kept, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_run_from_a_column_on_does_not_change_what_it_goes_on_from(architecture):
    lm = tiny_lm(architecture)
    rows = [list(range(70)), list(range(100, 170))]
    upper = UpperRun(lm, Batch.of(rows, lm.device), 1, since=66)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in upper._past.layers]
    places = Places.of([[66, 69], [68]], lm.device)
    with torch.no_grad():
        first, second = upper.logits_at(places), upper.logits_at(places)
    assert torch.equal(first, second)
    for layer, (keys, values) in zip(upper._past.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
