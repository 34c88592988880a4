"""Every registered method, on every tiny architecture, keeps every promise of `factpatch.testing`."""

import pytest
import torch

from factpatch.methods import find, names
from factpatch.testing import MIXTURES, _agree, contract, mixtures_are_refused_or_edited

CHECKS = [check for name in names() for check in contract(find(name))]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_contract(check):
    check()


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("name", names())
def test_mixture_of_experts(name, architecture):
    mixtures_are_refused_or_edited(find(name), architecture)


@pytest.mark.parametrize("effect", [1e-3, 1.0])
def test_what_a_patch_of_little_effect_does_must_agree_all_the_same(effect):
    without = torch.zeros(3)
    _agree(without + effect + min(2e-3, 0.05 * effect), without + effect, without)
    with pytest.raises(AssertionError):
        _agree(without + 1.5 * effect, without + effect, without)
    with pytest.raises(AssertionError):
        _agree(torch.ones(4) + 1e-3, torch.ones(4), without)
