"""What the unedited model did with each question, kept on disk: it is asked once, whatever processes score its patches.

Kept in `<cache>/baselines.sqlite`, for every model in hand:

answers        of each probe what `Seen` holds, and the sampled texts that fluency is measured on: a few hundred bytes each
distributions  what is predicted right after a locality prompt, in float32, because the divergence from it is to be the
               same to the bit: 4 bytes for each token of the vocabulary, 200 KB of the default model's. To compute one
               again takes a pass through the model, some hundred times longer than to read it. Where there is no room for
               more within `ROOM`, the oldest go

Each is kept under everything it depends on; see `Baseline`. Nothing is kept of a model behind an endpoint: its weights
cannot be seen, and another model may answer there tomorrow. Nor of a model with hooks or contexts that are no patch's: what
these do is told by nothing that could stand in a key.

Many processes may use the file at once, each in short transactions; what a killed one was writing is rolled back by the
next. It is not in SQLite's WAL mode, which is unsafe on the network disks that nodes of a cluster share, cannot be read
where the cache is read-only, and would write the distributions twice. The file is a cache: whatever is wrong with it or its
disk is said once in a warning, and the model is asked. It may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from factpatch.errors import OutputError
from factpatch.files import cache_root, make_folder
from factpatch.lm import LM, BaseLM
from factpatch.lm.model import checksum
from factpatch.lm.run import can_resume
from factpatch.scoring.protocols import Ask, Protocol, Seen, Way

__all__ = ["ROOM", "VERSION", "Baseline", "Store", "can_keep"]

VERSION = 1
"""To be raised when a model is asked in another way than before, and no protocol's version or anything else in the key says so.

That is: how texts become tokens and tokens text, where an answer ends, how a text is sampled, what `Seen` holds.
"""

ROOM = 2**30
"""Bytes the file takes at most, but for answers, which always stay; some five thousand distributions of the default model."""

Table = Literal["answers", "distributions"]
Bytes = bytes | memoryview

_log = logging.getLogger("factpatch")

_UNSHOWN: Collection[Way] = ("freely", "briefly")
"""Ways of asking in which the model does not see the right answers, so that what it says does not depend on them."""
_BUSY_SECONDS = 30.0
_MOST_KEYS = 500
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_TABLE = "CREATE TABLE IF NOT EXISTS {} (key BLOB PRIMARY KEY, sum INTEGER NOT NULL, value BLOB NOT NULL)"


def can_keep(lm: BaseLM) -> bool:
    """Whether all that this model's answers depend on is known, as it is now; without patches to be asked."""
    return isinstance(lm, LM) and not lm.patches and not lm.contexts and can_resume(lm)


class Store:
    """Bytes by key in one SQLite file.

    Nothing that is wrong with it is raised. A damaged file is set aside, and one that cannot be read, or written, is not any
    more; of both a warning tells, once. What was changed behind SQLite's back is taken as missing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_root() / "baselines.sqlite"
        self._can = {"read": True, "write": True}

    def read(self, table: Table, keys: Collection[bytes]) -> dict[bytes, bytes]:
        """What is kept under these keys."""
        found: dict[bytes, bytes] = {}
        wanted = list(dict.fromkeys(keys))
        if not wanted or not self._can["read"]:
            return found
        with self._trying_to("read") as opened:
            if not self.path.is_file():
                return found
            with closing(self._open("rw", opened)) as db:
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
                    return found
                for start in range(0, len(wanted), _MOST_KEYS):
                    some = wanted[start : start + _MOST_KEYS]
                    marks = ", ".join("?" * len(some))
                    rows = db.execute(f"SELECT key, sum, value FROM {table} WHERE key IN ({marks})", some)  # noqa: S608
                    found |= {key: value for key, kept, value in rows if kept == _sum(key, value)}
        return found

    def write(self, answers: Mapping[bytes, Bytes], distributions: Mapping[bytes, Bytes]) -> None:
        """Keep all of it or nothing, in place of what was kept under the same keys; of distributions as many as may be."""
        if not answers or not all(self._can.values()):
            return
        with self._trying_to("write") as opened:
            make_folder(self.path.parent)
            with closing(self._open("rwc", opened)) as db:  # closing it before the end undoes what was begun
                db.execute("BEGIN IMMEDIATE")
                for table in ("answers", "distributions"):
                    db.execute(_TABLE.format(table))
                new: dict[Table, Mapping[bytes, Bytes]] = {"answers": answers}
                new["distributions"] = _fitting(db, distributions, _size(answers))
                for table, values in new.items():
                    rows = [(key, _sum(key, value), value) for key, value in values.items()]
                    db.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", rows)  # noqa: S608
                db.execute("COMMIT")

    def _open(self, mode: str, opened: list[int]) -> sqlite3.Connection:
        where = f"file:{quote(str(self.path.absolute()))}?mode={mode}"
        db = sqlite3.connect(where, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
        opened.append(self.path.stat().st_ino)
        return db

    @contextmanager
    def _trying_to(self, do: Literal["read", "write"]) -> Iterator[list[int]]:
        """Do without, if this does not work. Yields a list for the number, in its folder, of the file that is opened."""
        opened: list[int] = []
        try:
            yield opened
        except (sqlite3.Error, OSError, OutputError) as error:
            code = getattr(error, "sqlite_errorcode", None)
            told = str(error).splitlines()[0]
            if code is not None and code & 0xFF in _DAMAGED:
                self._set_aside(opened)
                _log.warning("%s: damaged (%s), and set aside. What it held is asked anew.", self.path, told)
                return
            if code is not None and code & 0xFF == sqlite3.SQLITE_BUSY:
                _log.warning("%s: another process has it in use (%s). Done without for now.", self.path, told)
                return
            self._can[do] = False
            doing = {"read": "read, so the unedited model is asked anew", "write": "written, so nothing is kept"}[do]
            _log.warning("%s: cannot be %s (%s)", self.path, doing, told)

    def _set_aside(self, opened: Sequence[int]) -> None:
        """Rename the file, unless another process has done so and begun a new one. SQLite must not find its journal again."""
        with suppress(OSError):
            if self.path.stat().st_ino in opened:
                for name in ("-journal", ""):
                    with suppress(FileNotFoundError):
                        Path(f"{self.path}{name}").replace(f"{self.path}.damaged{name}")


def _fitting(db: sqlite3.Connection, new: Mapping[bytes, Bytes], beside: int) -> dict[bytes, Bytes]:
    """Those of the new distributions that fit into `ROOM`, once the oldest have given way to them.

    beside  bytes that will be written beside them
    """
    pages, unused, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    room, wanted = ROOM - (pages - unused) * size - beside, _size(new)
    if room < wanted:
        kept = db.execute("SELECT rowid, LENGTH(value) FROM distributions ORDER BY rowid").fetchall()
        for row, length in kept:
            if room >= wanted:
                break
            db.execute("DELETE FROM distributions WHERE rowid = ?", (row,))
            room += length
    fitting = {}
    for key, value in new.items():
        room -= len(value)
        if room < 0:
            break
        fitting[key] = value
    return fitting


def _size(values: Mapping[bytes, Bytes]) -> int:
    return sum(map(len, values.values()))


def _sum(key: bytes, value: Bytes) -> int:
    """A checksum, since SQLite has none."""
    return zlib.crc32(value, zlib.crc32(key))


class Baseline:
    """What one model did without patches, as far as it is in the store; `can_keep` must hold for it.

    A question's key is made of the model (its fingerprint, which rounds, and a checksum, which does not; config, tokenizer,
    type of weights, device, precision of products, kind of attention, tokens that end a text), the versions of torch and
    transformers, `chat`, and what is asked: the protocol with its version, the way, the answers if the model is shown them,
    how long its own may be, and the prompt as it is given, in which a chat template may have put today's date. For texts it
    is the prompt and `sampling`.

    sampling  all that a sampled text depends on, by name
    """

    def __init__(self, lm: LM, store: Store, *, chat: bool, sampling: Mapping[str, int]) -> None:
        self._lm, self._store, self._chat, self._sampling = lm, store, chat, dict(sampling)
        # A model may be trained in place; what is filed under its weights must not be under those it had before.
        changes = [parameter._version for parameter in lm.model.parameters()]
        about = {
            "version": VERSION,
            "fingerprint": lm.fingerprint,
            "weights": lm.once(("checksum", *changes), lambda: checksum(lm.model)),
            "surroundings": lm.surroundings,
            "dtype": str(lm.dtype),
            "device": _device(lm),
            "precision": [torch.get_float32_matmul_precision(), torch.is_autocast_enabled(lm.device.type)],
            "attention": getattr(lm.model.config, "_attn_implementation", None),
            "ends": sorted(lm.end_tokens),
            "chat": chat,
            "packages": [version(name) for name in ("torch", "transformers")],
        }
        self._about = hashlib.sha256(json.dumps(about, sort_keys=True).encode())

    def answers(self, protocol: Protocol, asks: Sequence[Ask], compared: Collection[Ask]) -> dict[Ask, Seen | None]:
        """What is kept of these, with the distributions after those that are compared, where they are kept too."""
        keys = {ask: self._of_ask(protocol, ask) for ask in asks}
        told = self._store.read("answers", keys.values())
        firsts = self._store.read("distributions", [keys[ask] for ask in asks if ask in compared])
        return {ask: _seen(told[key], firsts.get(key)) for ask, key in keys.items() if key in told}

    def texts(self, prompts: Sequence[str]) -> dict[str, str]:
        """The sampled texts that are kept, by the prompts they go on from."""
        keys = {prompt: self._of_text(prompt) for prompt in prompts}
        told = self._store.read("answers", keys.values())
        return {prompt: json.loads(told[key]) for prompt, key in keys.items() if key in told}

    def keep_answers(self, protocol: Protocol, seen: Mapping[Ask, Seen | None]) -> None:
        """Keep what the model did with these."""
        keys = {ask: self._of_ask(protocol, ask) for ask in seen}
        firsts = {keys[ask]: one.first for ask, one in seen.items() if one is not None and one.first is not None}
        self._store.write(
            {keys[ask]: _told(one) for ask, one in seen.items()}, {key: _packed(first) for key, first in firsts.items()}
        )

    def keep_texts(self, texts: Mapping[str, str]) -> None:
        """Keep these sampled texts, by their prompts."""
        self._store.write({self._of_text(prompt): json.dumps(text).encode() for prompt, text in texts.items()}, {})

    def _of_ask(self, protocol: Protocol, ask: Ask) -> bytes:
        return self._key(
            {
                "protocol": protocol.name,
                "version": protocol.version,
                "longest": protocol.longest,
                "way": ask.way,
                "prompt": self._given(ask.probe.prompt),
                "answers": () if ask.way in _UNSHOWN else ask.probe.answers,
            }
        )

    def _of_text(self, prompt: str) -> bytes:
        return self._key({"sampling": self._sampling, "prompt": self._given(prompt)})

    def _given(self, prompt: str) -> str:
        return self._lm.tokens.render(prompt, chat=self._chat)

    def _key(self, question: Mapping[str, Any]) -> bytes:
        digest = self._about.copy()
        digest.update(json.dumps(question, sort_keys=True).encode())
        return digest.digest()


def _device(lm: LM) -> str:
    """Cards of two makes differ in their last bits, which in half precision can decide a word."""
    is_card = lm.device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(lm.device) if is_card else lm.device.type


def _told(seen: Seen | None) -> bytes:
    """As JSON, without the distribution; Python writes floats so that they are read back to the bit."""
    kept = None if seen is None else {each.name: getattr(seen, each.name) for each in fields(Seen)[:-1]}
    return json.dumps(kept).encode()


def _seen(told: bytes, first: bytes | None) -> Seen | None:
    kept = json.loads(told)
    if kept is None:
        return None
    values: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in kept.items()}
    return Seen(**values, first=None if first is None else _unpacked(first))


def _packed(first: Float[Tensor, " vocab"]) -> memoryview:
    """Its bytes where they lie, as there are many such and they are held already."""
    assert first.dtype == torch.float32
    return first.cpu().numpy().astype("<f4", copy=False).view(np.uint8).data


def _unpacked(first: bytes) -> Float[Tensor, " vocab"]:
    # Copied, because bytes cannot be written to.
    return torch.from_numpy(np.frombuffer(first, "<f4").astype(np.float32))
