"""Files are whole or absent, and what is there already is not lost."""

import hashlib
from pathlib import Path

import pytest

from factpatch.errors import OutputError
from factpatch.files import cache_root, check_output, make_folder, refuse_taken, sha256_of, whole_file, whole_folder


def everything(folder):
    """All below a folder, hidden or not, with what the files say."""
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def full_disk(monkeypatch, tmp_path):
    """The last step fails, once: what has been written cannot take its name."""
    real, refused = Path.replace, []

    def replace(self, target):
        if Path(target).parent == tmp_path and not refused:
            refused.append(self)
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "down" / "f.txt"
    with whole_file(path) as draft:
        draft.write_text("all")
        assert not path.exists()
        assert draft.name == path.name, "some writers look at the name's ending"
    assert everything(tmp_path) == {"deep": None, "deep/down": None, "deep/down/f.txt": "all"}


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with whole_file(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert everything(tmp_path) == {"f": "new"}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_no_file_and_no_draft(tmp_path, error):
    with pytest.raises(error), whole_file(tmp_path / "f") as draft:
        draft.write_text("half")
        raise error
    assert everything(tmp_path) == {}


def test_an_error_leaves_the_old_file(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "f") as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert everything(tmp_path) == {"f": "old"}


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with whole_folder(tmp_path / "d") as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "f").write_text("all")
        assert not (tmp_path / "d").exists()
    assert everything(tmp_path) == {"d": None, "d/sub": None, "d/sub/f": "all"}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_no_folder_and_no_draft(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "d") as draft:
        (draft / "f").write_text("half")
        raise error
    assert everything(tmp_path) == {}


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "d").mkdir()
    with whole_folder(tmp_path / "d") as draft:
        (draft / "f").write_text("all")
    assert everything(tmp_path) == {"d": None, "d/f": "all"}


def test_replacing_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("old")
    with whole_folder(tmp_path / "d", replace=True) as draft:
        (draft / "new").write_text("new")
        assert (tmp_path / "d" / "old").read_text() == "old"
    assert everything(tmp_path) == {"d": None, "d/new": "new"}


def test_an_error_while_replacing_leaves_the_old_folder(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "d", replace=True) as draft:
        (draft / "new").write_text("half")
        raise ZeroDivisionError
    assert everything(tmp_path) == {"d": None, "d/old": "old"}


def test_an_error_at_the_very_last_step_leaves_the_old_folder(tmp_path, full_disk):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("old")
    with pytest.raises(OutputError, match="No space left"), whole_folder(tmp_path / "d", replace=True) as draft:
        (draft / "new").write_text("new")
    assert everything(tmp_path) == {"d": None, "d/old": "old"}


def test_an_error_at_the_very_last_step_leaves_the_old_file(tmp_path, full_disk):
    (tmp_path / "f").write_text("old")
    with pytest.raises(OutputError, match="No space left"), whole_file(tmp_path / "f") as draft:
        draft.write_text("new")
    assert everything(tmp_path) == {"f": "old"}


def test_what_is_taken_is_not_overwritten(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = everything(tmp_path)
    for path in (tmp_path / "d", tmp_path / "file"):
        for refuse in (refuse_taken, check_output, lambda path: whole_folder(path).__enter__()):
            with pytest.raises(OutputError) as caught:
                refuse(path)
            assert str(caught.value) == (
                f"{path}: already there, and it is not overwritten.\n  Name another folder, or remove this one."
            )
    assert everything(tmp_path) == before


def test_what_is_free_is_not_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "empty", tmp_path / "new", tmp_path / "not" / "yet", Path("relative"), Path("a/b")):
        refuse_taken(path)
        check_output(path)
    assert everything(tmp_path) == {"empty": None}


@pytest.mark.parametrize("write", [whole_file, whole_folder, lambda path: make_folder(path.parent)])
def test_a_place_below_a_file_is_refused(tmp_path, write):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written") as caught:
        write(tmp_path / "file" / "new").__enter__()
    assert "Name a folder you may write to" in str(caught.value)
    assert "FACTPATCH_CACHE" in str(caught.value)
    assert everything(tmp_path) == {"file": "mine"}


def test_a_place_below_a_file_is_refused_before_long_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file is not a folder") as caught:
        check_output(tmp_path / "file" / "new" / "patch")
    assert str(caught.value).startswith(str(tmp_path / "file" / "new" / "patch"))


def test_a_place_without_permission_is_refused_before_long_work(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")  # a superuser may write anywhere

    monkeypatch.setattr("factpatch.files.tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError, match="cannot be written .Permission denied.") as caught:
        check_output(tmp_path / "new")
    assert str(tmp_path) in str(caught.value)


def test_a_folder_where_a_file_should_be_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(OutputError, match="d: cannot be written"), whole_file(tmp_path / "d") as draft:
        draft.write_text("new")
    assert everything(tmp_path) == {"d": None}


def test_sha256(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(data)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_the_cache_is_where_the_variable_says(monkeypatch):
    monkeypatch.setenv("FACTPATCH_CACHE", "~/elsewhere")
    assert cache_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("FACTPATCH_CACHE")
    assert cache_root().name == "factpatch"


def test_what_is_written_may_be_read_by_whom_new_files_may(tmp_path):
    (tmp_path / "usual").touch()
    with whole_file(tmp_path / "file") as draft:
        draft.touch(mode=0o600)
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "inside").touch(mode=0o600)
    modes = {(tmp_path / name).stat().st_mode for name in ("usual", "file", "folder/inside")}
    assert len(modes) == 1
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["inside"]


def test_asking_whether_a_place_can_be_written_leaves_nothing(tmp_path):
    check_output(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
