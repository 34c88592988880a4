"""Statistics are computed once for each key, whatever has become of the file since."""

import json
import threading
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open

from factpatch.errors import OutputError
from factpatch.lm.cache import cached_tensors


class Counting:
    """A computation that counts how often it is asked."""

    def __init__(self, value=1.0):
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return {"x": torch.arange(3.0) * self.value}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored(cache):
    return sorted(cache.rglob("*.safetensors"))


def test_computed_once_then_read(cache):
    compute = Counting()
    for _ in range(3):
        assert torch.equal(cached_tensors("test", {"a": 1}, compute)["x"], torch.arange(3.0))
    assert compute.calls == 1
    # What is read is the file, not something remembered.
    assert torch.equal(cached_tensors("test", {"a": 1}, Counting(2.0))["x"], torch.arange(3.0))


def test_another_key_or_kind_is_another_file(cache):
    compute = Counting()
    for kind, key in (("test", {"a": 1}), ("test", {"a": 2}), ("test", {"b": 1}), ("other", {"a": 1})):
        cached_tensors(kind, key, compute)
    assert compute.calls == len(stored(cache)) == 4
    assert {path.parent.name for path in stored(cache)} == {"test", "other"}


def test_the_order_of_a_key_does_not_matter_and_the_key_is_stored(cache):
    compute = Counting()
    cached_tensors("test", {"a": 1, "b": [2, "c"]}, compute)
    cached_tensors("test", {"b": [2, "c"], "a": 1}, compute)
    assert compute.calls == 1
    (path,) = stored(cache)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["key"]) == {"a": 1, "b": [2, "c"]}


@pytest.mark.parametrize("keep", [0, 7, 20, -1], ids=["nothing", "half a header", "a header", "all but a byte"])
def test_a_damaged_file_is_computed_again(cache, keep):
    compute = Counting()
    cached_tensors("test", {}, compute)
    (path,) = stored(cache)
    path.write_bytes(path.read_bytes()[:keep])
    for _ in range(2):
        assert torch.equal(cached_tensors("test", {}, compute)["x"], torch.arange(3.0))
    assert compute.calls == 2


def test_a_computation_that_fails_leaves_nothing_and_is_tried_again(cache):
    with pytest.raises(ZeroDivisionError):
        cached_tensors("test", {}, lambda: {"x": torch.ones(1) / (1 // 0)})
    assert stored(cache) == []
    compute = Counting()
    cached_tensors("test", {}, compute)
    assert compute.calls == 1


def test_values_and_types_come_back_to_the_bit(cache):
    tensors = {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "double": torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        "half": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.bfloat16),
        "whole": torch.tensor(7),
    }
    cached_tensors("test", {}, lambda: tensors)
    read = cached_tensors("test", {}, Counting())
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert read["half"][1].signbit()


def test_several_at_once_compute_once(cache):
    compute = Counting()

    def slowly():
        time.sleep(0.05)
        return compute()

    threads = [threading.Thread(target=cached_tensors, args=("test", {}, slowly)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compute.calls == 1


def test_a_place_that_cannot_be_written_is_refused(cache):
    cache.write_text("a file where a folder should be")
    compute = Counting()
    with pytest.raises(OutputError, match="cannot be written") as caught:
        cached_tensors("test", {}, compute)
    assert str(cache / "statistics" / "test") in str(caught.value)
    assert "caches move with the variable FACTPATCH_CACHE" in str(caught.value)
    assert compute.calls == 0, "long work was done before the place was looked at"


def test_what_shares_memory_is_stored_and_what_is_given_is_what_is_read():
    both = torch.arange(6.0, requires_grad=True)

    def compute():
        return {"whole": both, "half": both[:3], "turned": both.reshape(2, 3).T}

    first, second = (cached_tensors("test", {"a": 1}, compute) for _ in range(2))
    for name, tensor in compute().items():
        assert torch.equal(first[name], tensor)
        assert torch.equal(second[name], tensor)
        assert not first[name].requires_grad


def test_what_is_stored_is_read_where_nothing_can_be_written(cache, monkeypatch):
    cached_tensors("test", {"a": 1}, Counting())
    monkeypatch.setattr("factpatch.files.FileLock.acquire", lambda *_: pytest.fail("locked"))
    assert torch.equal(cached_tensors("test", {"a": 1}, Counting(2.0))["x"], torch.arange(3.0))


def test_a_lock_that_cannot_be_made_is_refused_in_words(monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("factpatch.files.FileLock.acquire", denied)
    with pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)"):
        cached_tensors("test", {"a": 1}, Counting())


def test_a_full_disk_is_told_in_words(monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("factpatch.lm.cache.save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        cached_tensors("test", {"a": 1}, Counting())
