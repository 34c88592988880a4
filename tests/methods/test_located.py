"""The kept choice of a block: what `resolve` makes of it, and that nothing goes wrong for want of one."""

import json
import logging

import pytest

from factpatch.files import cache_root
from factpatch.lm import BaseLM
from factpatch.methods import Preset, create, find, names
from factpatch.methods.located import Choice, keep, kept, place_field, settings
from factpatch.methods.rome import Rome
from factpatch.testing import Snapshot, quick_settings, tiny_edits, tiny_lm


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "cache"))


def choice(*layers):
    return Choice(layers=layers, made={"by": "a test"})


class Tuned(Rome):
    """ROME with a preset for the tiny model's shape, which does not say which block."""

    name = "rome"
    presets = (Preset((3, 32), {"steps": 7}, "a test"),)


@pytest.mark.parametrize("method", names())
def test_every_method_resolves_with_and_without_a_choice(method):
    lm, kind = tiny_lm(), find(method)
    field = place_field(kind.config_type)
    usual = kind().resolve(lm)
    keep(lm, method, choice(1))
    expected = usual if field is None else usual.model_copy(update={field: (1,) if field == "layers" else 1})
    assert kind().resolve(lm) == expected
    assert kind().resolve(tiny_lm()) == expected, "another process sees it too"
    assert kind().resolve(tiny_lm(seed=1)) == usual, "it is of one model"


def test_a_choice_is_of_one_method():
    lm = tiny_lm()
    keep(lm, "rome", choice(2))
    assert create("rome").resolve(lm).layer == 2
    assert create("r-rome").resolve(lm).layer is None


def test_what_the_user_sets_goes_before_it_and_so_does_a_preset():
    lm = tiny_lm()
    keep(lm, "rome", choice(2))
    assert create("rome", layer=1).resolve(lm).layer == 1
    assert create("rome", steps=3).resolve(lm).layer == 2
    assert (Tuned().resolve(lm).layer, Tuned().resolve(lm).steps) == (None, 7)


def test_the_patch_is_made_there_and_tells_so():
    lm = tiny_lm()
    keep(lm, "rome", choice(2))
    before = Snapshot.of(lm)
    patch = create("rome", quick_settings(Rome)).fit(lm, tiny_edits()[:1])
    assert before.differences(lm) == []
    assert patch.provenance.config["layer"] == 2
    assert [change["part"] for change in patch.changes()] == [lm.anatomy.mlp_out(2).parameter]


def test_a_later_choice_replaces_an_earlier_one_and_leaves_others():
    lm = tiny_lm()
    assert create("rome").resolve(lm).layer is None
    keep(lm, "rome", choice(2))
    keep(lm, "memit", choice(0, 1))
    path = keep(lm, "rome", choice(1))
    for seen in (kept(lm), kept(tiny_lm())):
        assert {method: each.layers for method, each in seen.items()} == {"rome": (1,), "memit": (0, 1)}
    assert json.loads(path.read_text())["choices"]["rome"]["made"] == {"by": "a test"}


def test_the_disk_is_asked_once(monkeypatch):
    from factpatch.methods import located

    lm, asked = tiny_lm(), []
    keep(lm, "rome", choice(2))
    monkeypatch.setattr(located, "_read", lambda lm, path, read=located._read: asked.append(path) or read(lm, path))
    fresh = tiny_lm()
    create("rome", layer=1).resolve(fresh)
    assert asked == [], "the user has said it"
    for _ in range(3):
        for method in ("rome", "memit", "ft-m"):
            create(method).resolve(fresh)
    assert len(asked) == 1


def test_without_any_choice_not_even_the_fingerprint_is_taken():
    lm = tiny_lm()
    create("rome").resolve(lm)
    assert "fingerprint" not in vars(lm)


def test_patches_on_the_model_stay_on_and_do_not_count():
    lm = tiny_lm()
    keep(lm, "rome", choice(2))
    lm = tiny_lm()
    patch = create("ft-m", steps=2).fit(lm, tiny_edits())
    fresh = tiny_lm()
    with fresh.patched(patch):
        assert create("rome").resolve(fresh).layer == 2
        assert fresh.patches == (patch,)


def test_a_model_that_can_only_be_asked_has_none():
    class Far(BaseLM):
        fingerprint = "far"

        def answer(self, prompts, **how):
            return [""] * len(prompts)

        def describe(self):
            return {}

    assert settings(Far("far"), "rome", Rome.config_type, {}) == {}
    assert create("rome").resolve(Far("far")).layer is None


FILE = {"format": 1, "model": "m", "fingerprint": "f", "choices": {}}
DAMAGED = {
    "empty": "",
    "cut off": '{"format": 1, "choices": {"rome": ',
    "no JSON": "\x00\xff",
    "another format": json.dumps(FILE | {"format": 2}),
    "another model": json.dumps(FILE | {"choices": {"rome": {"layers": [1], "made": {}}}}),
    "not a block": json.dumps(FILE | {"choices": {"rome": {"layers": [-1], "made": {}}}}),
    "no blocks": json.dumps(FILE | {"choices": {"rome": {"layers": [], "made": {}}}}),
    "blocks that are not there": '{"format": 1, "model": "m", "fingerprint": "OWN", "choices": {"rome": {"layers": [3], "made": {}}}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_ignored_and_named(content, caplog):
    lm = tiny_lm()
    path = cache_root() / "located" / f"{lm.fingerprint}.json"
    path.parent.mkdir(parents=True)
    path.write_text(content.replace("OWN", lm.fingerprint))
    with caplog.at_level(logging.WARNING, "factpatch"):
        assert create("rome").resolve(lm).layer is None
        assert create("rome").resolve(lm).layer is None
    assert caplog.text.count(str(path)) == 1
    keep(lm, "rome", choice(1))
    assert create("rome").resolve(tiny_lm()).layer == 1


def test_a_folder_in_the_file_s_place_is_ignored_too():
    lm = tiny_lm()
    (cache_root() / "located" / f"{lm.fingerprint}.json").mkdir(parents=True)
    assert create("rome").resolve(lm).layer is None
