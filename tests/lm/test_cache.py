"""Statistics are computed once for each key, whatever has become of the file since."""

import json
import threading
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open

from factpatch.errors import OutputError
from factpatch.lm.cache import Unfinished, cached_each, cached_tensors


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
    def denied(*_, **__):
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


# Several at once.


class Each:
    """Computes each of several, and notes which it was asked for."""

    def __init__(self, *, fail_at=None):
        self.asked, self.fail_at = [], fail_at

    def __call__(self, names):
        self.asked.append(list(names))
        for name in names:
            if name == self.fail_at:
                raise ZeroDivisionError
            yield {"x": torch.full((2,), float(name))}


def keys(*names):
    return {name: {"number": name} for name in names}


def test_what_is_missing_is_computed_together_under_the_keys_it_has_alone(cache):
    compute = Each()
    cached_tensors("test", {"number": 2}, lambda: {"x": torch.full((2,), 2.0)})
    for _ in range(2):
        found = cached_each("test", keys(3, 2, 1), compute)
        assert list(found) == [3, 2, 1]
        assert all(torch.equal(found[name]["x"], torch.full((2,), float(name))) for name in found)
    assert compute.asked == [[3, 1]]
    assert torch.equal(cached_tensors("test", {"number": 3}, Counting())["x"], torch.full((2,), 3.0))
    assert cached_each("test", {}, compute) == {}


def test_each_is_stored_as_it_comes(cache):
    with pytest.raises(ZeroDivisionError):
        cached_each("test", keys(1, 2, 3), Each(fail_at=3))
    compute = Each()
    cached_each("test", keys(1, 2, 3), compute)
    assert compute.asked == [[3]]


def test_those_who_ask_for_some_of_the_same_wait_for_one_another_and_never_for_ever(cache):
    asked, names = [], list(range(6))

    def slowly(wanted):
        asked.extend(wanted)
        time.sleep(0.05)
        yield from Each()(wanted)

    orders = [names, names[::-1], names[3:], names[:3][::-1]]
    threads = [threading.Thread(target=cached_each, args=("test", keys(*o), slowly), daemon=True) for o in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    assert sorted(asked) == names


# Unfinished work.


def test_unfinished_work_is_kept_until_the_result_is_stored(cache):
    def half():
        unfinished = Unfinished("test", {"a": 1}, "work")
        assert unfinished.read() is None
        unfinished.keep({"x": torch.arange(2.0)})
        unfinished.keep({"x": torch.arange(3.0)})
        return {"x": torch.ones(1) / (1 // 0)}

    def rest():
        (kept,) = Unfinished("test", {"a": 1}, "work").read().values()
        kept += 1  # in memory of its own: what was kept stays
        assert torch.equal(Unfinished("test", {"a": 1}, "work").read()["x"], torch.arange(3.0))
        assert Unfinished("test", {"a": 1}, "other work").read() is None
        assert Unfinished("test", {"a": 2}, "work").read() is None
        return {"x": kept}

    with pytest.raises(ZeroDivisionError):
        cached_tensors("test", {"a": 1}, half)
    assert stored(cache) == [], "taken for a result"
    assert torch.equal(cached_tensors("test", {"a": 1}, rest)["x"], torch.arange(3.0) + 1)
    assert Unfinished("test", {"a": 1}, "work").read() is None
    assert {path.suffix for path in (cache / "statistics" / "test").iterdir()} <= {".safetensors", ".lock"}


@pytest.mark.parametrize("keep", [0, 7, 20, -1], ids=["nothing", "half a header", "a header", "all but a byte"])
def test_damaged_unfinished_work_is_none(cache, keep):
    unfinished = Unfinished("test", {})
    unfinished.keep({"x": torch.arange(3.0)})
    (path,) = cache.rglob("*.unfinished")
    path.write_bytes(path.read_bytes()[:keep])
    assert unfinished.read() is None


def test_what_a_killed_process_had_half_written_is_removed(cache):
    compute = Counting()
    cached_tensors("test", {"a": 1}, compute)
    (path,) = stored(cache)
    path.unlink()
    drafts = [path.with_name(f".{path.stem}{suffix}-x1y2") for suffix in (".safetensors", ".unfinished")]
    strange = path.with_name(".another.safetensors-x1y2")  # somebody may be writing it
    for draft in [*drafts, strange]:
        draft.mkdir()
        (draft / "draft").write_text("half")
    cached_tensors("test", {"a": 1}, compute)
    assert not any(draft.exists() for draft in drafts)
    assert strange.exists()
