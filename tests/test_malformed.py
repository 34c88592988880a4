"""Patches and files of edits damaged in hundreds of ways: all are refused with a clear error, none ends in anything else."""

import json
import random
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from factpatch.data import read
from factpatch.errors import BadPatch, FactpatchError
from factpatch.files import sha256_of
from factpatch.methods import create, find
from factpatch.patches import Patch
from factpatch.testing import Snapshot, logits_of, quick_settings, tiny_edits, tiny_lm

METHODS = ("ft-m", "ice", "grace", "lora", "kn", "melo", "wise", "t-patcher")
ODD = (
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "..",
    "../../etc/passwd",
    "\x00",
    "\ud800",
    [],
    {},
    [[]],
    {"a": {}},
    "x" * 5000,
)


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    settings = {"ft-m": {"steps": 2, "layer": 1}, "grace": {"steps": 2}, "lora": {"steps": 2, "layers": (1,)}}
    settings |= {name: quick_settings(find(name)) for name in METHODS if name not in settings}
    for name in METHODS:
        create(name, settings.get(name)).fit(lm, tiny_edits()[:1]).save(folder / name)
    return folder


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, own in inside:
        yield from places(own, (*path, key))


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def in_json(folder, draw):
    """Another value, or none, at some place of patch.json."""
    file = folder / "patch.json"
    told = json.loads(file.read_text())
    where = draw.choice([path for path in places(told) if path])
    put(told, where, draw.choice(ODD))
    if draw.random() < 0.2:
        told[draw.choice(("a", "format ", "__class__"))] = draw.choice(ODD)
    file.write_text(json.dumps(told))


def in_bytes(folder, draw):
    """Bytes turned over, cut off or put on, in any file."""
    file = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    data = bytearray(file.read_bytes())
    how = draw.randrange(3)
    if how == 0 and data:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == 1:
        del data[draw.randrange(len(data) + 1) :]
    else:
        data += bytes(draw.randrange(256) for _ in range(draw.randint(1, 64)))
    file.write_bytes(bytes(data))


def in_tensors(folder, draw):
    """Other numbers, shapes, types or names, with the SHA-256 in patch.json made to fit, as one who means harm would."""
    file = next((path for path in sorted(folder.glob("*.safetensors"))), None)
    if file is None:
        return in_json(folder, draw)
    how = draw.randrange(7)
    tensors = load_file(file)
    if how == 0:  # a header that promises far more than there is
        header = json.dumps({"w.dense": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 8]}}).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    elif how == 1:
        file.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    elif not tensors:
        return in_bytes(folder, draw)
    else:
        name = draw.choice(sorted(tensors))
        old = tensors[name]
        new = {
            2: lambda: old.float() * float("nan"),
            3: lambda: old.to(torch.int64),
            4: lambda: torch.zeros(3, 1, 2),
            5: lambda: old.float().flatten(),
        }
        if how in new:
            tensors[name] = new[how]().contiguous()
        else:
            tensors["../" + name] = tensors.pop(name)
        save_file(tensors, file)
    described = folder / "patch.json"
    told = json.loads(described.read_text())
    for path in places(told):
        if path and "sha256" in str(path[-1]):
            put(told, path, sha256_of(file))
    described.write_text(json.dumps(told))
    return None


def load_forged(folder):
    """Load it; where only its id betrays it, once more with the id that it would have."""
    try:
        return Patch.load(folder), False
    except BadPatch as error:
        found = re.search(r"is now (\w+)", str(error))
        if found is None:
            raise
        file = folder / "patch.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"id": found[1]}))
        return Patch.load(folder), True


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of a config's odd values
@pytest.mark.parametrize("method", METHODS)
def test_no_malformed_patch_is_taken_or_ends_in_anything_but_a_clear_error(lm, saved, tmp_path, method):
    before, plain = Snapshot.of(lm), logits_of(lm, "Rome lies in")
    own = Patch.load(saved / method)
    refused = 0
    for seed in range(50):
        draw = random.Random(f"{method} {seed}")
        folder = tmp_path / str(seed)
        shutil.copytree(saved / method, folder)
        original = {path.name: path.read_bytes() for path in folder.iterdir()}
        draw.choice((in_json, in_bytes, in_tensors))(folder, draw)
        if {path.name: path.read_bytes() for path in folder.iterdir()} == original:
            continue
        try:
            patch, is_forged = load_forged(folder)
            with lm.patched(patch):
                found = logits_of(lm, "Rome lies in")
        except FactpatchError as error:
            told = str(error)
        else:
            told = ""
            # What decides how a patch acts is what its id is made of.
            assert is_forged or patch.id == own.id, f"seed {seed}: a changed patch was taken"
            assert bool(torch.isfinite(found).all()), seed
        refused += bool(told.strip())
        assert before.differences(lm) == [], seed
        assert torch.equal(logits_of(lm, "Rome lies in"), plain)
        shutil.rmtree(folder)
    assert refused > 25


RECORDS = (
    {"prompt": "Rome lies in", "target": "Peru", "subject": "Rome", "rephrases": ["Find Rome in"]},
    {
        "prompt": "Who is Ann?",
        "target": "a pilot",
        "locality": {"Other": [{"prompt": "Who is Bob?", "answers": ["x"]}]},
    },
)


@pytest.mark.parametrize("end", ["jsonl", "json", "csv"])
def test_no_malformed_file_of_edits_ends_in_anything_but_a_clear_error(tmp_path, end):
    for seed in range(100):
        draw = random.Random(f"{end} {seed}")
        records = json.loads(json.dumps(RECORDS))
        for _ in range(draw.randint(1, 3)):
            where = [path for path in places(records) if path]
            put(records, draw.choice(where), draw.choice(ODD))
        if end == "csv":
            rows = [
                ",".join(map(str, record.values())) if isinstance(record, dict) else str(record) for record in records
            ]
            text = "\n".join(["prompt,target,subject", *rows])
        else:
            text = json.dumps(records) if end == "json" else "\n".join(map(json.dumps, records))
        data = bytearray(text.encode("utf-8", "surrogatepass"))
        if draw.random() < 0.5 and data:
            for _ in range(draw.randint(1, 5)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        path = tmp_path / f"{seed}.{end}"
        path.write_bytes(bytes(data))
        try:
            edits = read(str(path)).edits
        except FactpatchError:
            continue
        assert all(edit.prompt.strip() and edit.target.strip() for edit in edits)
