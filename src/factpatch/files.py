"""Files that are either whole or absent: what is written appears under its name only when it is complete."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from factpatch.errors import OutputError

__all__ = [
    "cache_root",
    "check_output",
    "contents_sha256",
    "json_ready",
    "locked",
    "parse_json",
    "read_whole",
    "remove_drafts",
    "sha256_of",
    "whole_file",
    "whole_folder",
]

MOST = 1 << 30
"""Bytes of one file that are read into memory at once, at most."""


def cache_root() -> Path:
    """Where fetched models and costly statistics are kept: `$FACTPATCH_CACHE`, or the user's cache folder."""
    named = os.environ.get("FACTPATCH_CACHE")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("factpatch")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents_sha256(place: Path) -> str:
    """The SHA-256 of a file's bytes, or of the names and bytes of all files right in a folder, in hex."""
    if not place.is_dir():
        return sha256_of(place)
    files = sorted(path for path in place.iterdir() if path.is_file())
    return hashlib.sha256("".join(f"{path.name}\n{sha256_of(path)}\n" for path in files).encode()).hexdigest()


def read_whole(path: Path, most: int = MOST) -> bytes:
    """The bytes of a file. Raises OSError, also for what is no plain file, which may never end, or has more than `most`."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # of a folder the system tells by itself
        raise OSError(0, "it is neither a file nor a folder, but a pipe or a device")
    if found.st_size > most:
        raise OSError(0, f"it has {found.st_size} bytes, more than the {most} that are read")
    return path.read_bytes()


def parse_json(text: str) -> Any:
    """The value that a JSON text stands for. Raises ValueError, also where an object has a key twice or nesting never ends."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'"{next(key for key in keys if keys.count(key) > 1)}" is there twice in one object')
    return found


def json_ready(value: Any) -> Any:
    """The same with numbers that JSON does not have, such as a perplexity without bound, as texts."""
    if isinstance(value, Mapping):
        return {key: json_ready(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def make_folder(path: Path) -> Path:
    """The folder, made if need be. Raises OutputError where that is not allowed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


@contextmanager
def locked(path: Path, *, wait: float | None = None) -> Iterator[None]:
    """Hold a lock that one process at a time can have.

    wait  for so many seconds; by default for as long as it takes

    Raises OutputError where the lock's file cannot be made, or others hold it for longer.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait is None else wait)
    except Timeout:
        raise OutputError(
            f"{path}: another process holds it, and still did after {wait:g} seconds.\n"
            "  Wait until that has ended, then try again; the lock of a process that was killed is free."
        ) from None
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it takes the name `path`, on any error nothing is left.

    Raises OutputError if the place cannot be written.
    """
    make_folder(path.parent)
    with _scratch(path) as folder:
        draft = folder / path.name
        yield draft
        _flush(draft)
        draft.replace(path)
        _flush_names(path.parent)


@contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the name `path`, on any error nothing is left.

    Raises OutputError if the place cannot be written, or is taken and `replace` is false.
    """
    make_folder(path.parent)
    if not replace:
        refuse_taken(path)
    with _scratch(path) as folder:
        draft = folder / "draft"
        draft.mkdir()
        yield draft
        for file in list(draft.rglob("*")):
            if file.is_file():
                _flush(file)
        for below in [draft, *draft.rglob("*")]:
            if below.is_dir():
                _flush_names(below)
        old = folder / "old"
        if path.exists():
            path.replace(old)
        try:
            draft.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
        _flush_names(path.parent)


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes have left half written in a folder. Only where nobody is writing now."""
    for left in folder.glob(".*-????????"):
        shutil.rmtree(left, ignore_errors=True)


def check_output(path: Path) -> None:
    """Raise OutputError if a new folder cannot take this name: asked before long work, not only after it."""
    refuse_taken(path)
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise _unwritable(path, NotADirectoryError(0, f"{above} is not a folder"))
    with _scratch(above / path.name):  # tried, because permissions do not tell all
        pass


def refuse_taken(path: Path) -> None:
    """Raise OutputError if something other than an empty folder has this name."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(
            f"{path}: already there, and it is not overwritten.\n  Name another folder, or remove this one."
        )


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, so that the final rename stays on one disk; removed whatever happens."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield folder
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    """Bring a finished file to the disk, readable by whom new files are readable: some libraries write for the owner alone."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    usual = path.with_name(f".{path.name}.mode")
    usual.touch()
    path.chmod(usual.stat().st_mode)
    usual.unlink()


def _flush_names(folder: Path) -> None:
    """Bring a folder's list of names to the disk, so that a rename is there before whatever is written next."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a system that cannot open folders keeps such order by itself, or not at all
        return
    try:
        os.fsync(handle)
    except OSError:  # a network disk may not know how
        pass
    finally:
        os.close(handle)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error}).\n"
        "  Name a folder you may write to with space left; caches move with the variable FACTPATCH_CACHE."
    )
