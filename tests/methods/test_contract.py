"""Every registered method, on every tiny architecture, keeps every promise of `factpatch.testing`."""

import pytest

from factpatch.methods import find, names
from factpatch.testing import MIXTURES, contract, mixtures_are_refused_or_edited

CHECKS = [check for name in names() for check in contract(find(name))]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_contract(check):
    check()


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("name", names())
def test_mixture_of_experts(name, architecture):
    mixtures_are_refused_or_edited(find(name), architecture)
