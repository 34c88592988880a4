"""Shared fixtures: a cache of its own, quiet threads, and the default model."""

import importlib
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: two workers on two cores must not spin against each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# beartype, which checks shapes in tests, draws from Python's global random state to pick the list items it looks at;
# methods are tested not to touch that state, so beartype is imported with a random source of its own.
_global, random.getrandbits = random.getrandbits, random.Random(0).getrandbits
importlib.import_module("beartype._check.code.codemain")
importlib.import_module("beartype.door")
random.getrandbits = _global

# A busy machine is slow, not wrong.
settings.register_profile("factpatch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("factpatch")

SHARED = Path(__file__).parents[1].parent / "shared" / "knowedit"


@pytest.fixture(scope="session", autouse=True)
def _threads():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _cache(tmp_path_factory):
    return tmp_path_factory.mktemp("factpatch-cache")


@pytest.fixture(autouse=True)
def _own_cache(request, monkeypatch, _cache):
    """Tests keep their statistics apart from the user's, but for those that use the real model."""
    if "real" not in request.keywords:
        monkeypatch.setenv("FACTPATCH_CACHE", str(_cache))


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch):
    """Each scorer asks the unedited model itself, so that no answer is compared with itself, read back from disk."""
    from factpatch.scoring import Scorer

    monkeypatch.setattr(Scorer.__init__, "__kwdefaults__", Scorer.__init__.__kwdefaults__ | {"keep": False})


@pytest.fixture(scope="session")
def smollm():
    """The default model."""
    import factpatch

    return factpatch.load()


@pytest.fixture
def knowedit():
    """The folder of real KnowEdit files; skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("the real KnowEdit files are not beside this checkout (../shared/knowedit)")
    return SHARED
