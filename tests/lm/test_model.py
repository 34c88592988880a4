"""The stack of patches on a model, its fingerprint, its answers, and the cache beside it."""

import pytest
import torch

from factpatch.errors import OutputError
from factpatch.files import whole_file, whole_folder
from factpatch.lm.cache import cached_tensors
from factpatch.lm.model import checksum
from factpatch.lm.sentences import first_sentence, has_ended
from factpatch.testing import tiny_lm


class Noted:
    """A patch that only notes what happens to it."""

    def __init__(self, name, log, fails=False):
        self.name, self.log, self.fails = name, log, fails

    def attach(self, lm):
        if self.fails:
            raise ZeroDivisionError
        self.log.append(f"+{self.name}")
        return lambda: self.log.append(f"-{self.name}")


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


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (" Paris. It is", "Paris."),
        ("\n\nParis\nand more", "Paris"),
        ("St. Louis, in the U.S. state of Missouri. Next", "St. Louis, in the U.S. state of Missouri."),
        ("J. R. R. Tolkien! Yes", "J. R. R. Tolkien!"),
        ("about 3.5 metres", "about 3.5 metres"),
        ("in 1912. Then", "in 1912."),
        ('he said "yes." Then', 'he said "yes."'),
        ("1. Paris is big. Yes", "1. Paris is big."),
        ("", ""),
        ("Paris.", "Paris."),
    ],
)
def test_first_sentence(text, first):
    assert first_sentence(text) == first


def test_an_answer_has_ended_only_when_something_follows():
    assert not has_ended("Paris.")
    assert has_ended("Paris. ")
    assert not has_ended("\n\n")
    assert has_ended("\nParis\n")


def test_statistics_are_computed_once_for_each_key_and_again_if_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path))
    calls = []

    def compute():
        calls.append(1)
        return {"x": torch.arange(3.0)}

    for key, count in (({"a": 1}, 1), ({"a": 1}, 1), ({"a": 2}, 2)):
        assert torch.equal(cached_tensors("test", key, compute)["x"], torch.arange(3.0))
        assert len(calls) == count
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(cached_tensors("test", {"a": 1}, compute)["x"], torch.arange(3.0))
    assert len(calls) == 3


def test_files_and_folders_are_whole_or_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "f") as draft:
        draft.write_text("half")
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "d") as draft:
        (draft / "f").write_text("half")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("old")
    with pytest.raises(OutputError, match="already there"), whole_folder(tmp_path / "d"):
        pass
    with whole_folder(tmp_path / "d", replace=True) as draft:
        (draft / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "new"]
