from types import SimpleNamespace

import pytest

import factpatch.methods
from factpatch.testing import tiny_lm
from tests.workspace.planted import OSLO, ROME, Tell, make, take


@pytest.fixture(autouse=True)
def _tell(monkeypatch):
    """The method is known as one of another package."""
    own = factpatch.methods._foreign()
    point = SimpleNamespace(name="tell", load=lambda: Tell)
    monkeypatch.setattr(factpatch.methods, "_foreign", lambda: (*own, point))


@pytest.fixture(scope="session")
def lm():
    return tiny_lm()


@pytest.fixture
def space(tmp_path, lm):
    """An empty workspace."""
    return make(tmp_path / "w", lm)


@pytest.fixture
def two(space):
    """A workspace with two patches: entries 2 and 3."""
    take(space, ROME)
    take(space, OSLO)
    return space
