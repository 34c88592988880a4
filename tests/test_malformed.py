"""Patches and files of edits, damaged and forged in some thousand ways: none ends in anything but a clear error.

A forger makes every checksum fit again, so here too: neither the SHA-256 of the tensors nor the patch's id, which stand in
patch.json, are what refuses a forged patch. What is taken all the same must be a patch in its own right: as many tensors of
the same names, shapes and sorts of number as the patch that it was made of, with which the model still says something.
"""

import json
import os
import random
import re
import resource
import shutil
import struct
from contextlib import contextmanager, suppress

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file, save_file

from factpatch.data import read, readers
from factpatch.data.questions import read_questions
from factpatch.edits import Edit
from factpatch.errors import BadFile, BadPatch, FactpatchError
from factpatch.files import sha256_of
from factpatch.methods import create, find, names
from factpatch.patches import Patch
from factpatch.testing import Snapshot, logits_of, quick_settings, tiny_edits, tiny_lm

METHODS = ("ft-m", "kn", "ice", "retrieval", "grace", "lora", "adalora", "melo", "wise", "t-patcher", "serac")
"""A patch of every kind, and of every form that a kind takes."""

PROMPT = tiny_edits()[0].prompt


@pytest.fixture(autouse=True)
def _without_the_type_checks_that_only_tests_have(monkeypatch):
    """A wrong shape must be refused by the source."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


class Saved(dict):
    """By method, the folder of a patch, the patch, and what the model says with it; made when it is first wanted."""

    def __init__(self, folder):
        self.folder, self.lm = folder, tiny_lm()

    def __missing__(self, name):
        patch = create(name, quick_settings(find(name))).fit(self.lm, tiny_edits()[:1])
        with self.lm.patched(patch):
            self[name] = patch.save(self.folder / name), patch, logits_of(self.lm, PROMPT)
        return self[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("patches"))


def test_every_kind_of_patch_is_forged():
    assert {find(name).traits.patch.kind for name in METHODS} == {find(name).traits.patch.kind for name in names()}


# --- the forger's tools -----------------------------------------------------------------------------------------------


def copied(folder, to):
    """A copy to be damaged, and its tensor file."""
    shutil.copytree(folder, to)
    (tensors,) = to.glob("*.safetensors")
    return to, tensors


def rewritten(folder, change):
    """Change what patch.json holds."""
    told = json.loads((folder / "patch.json").read_text())
    change(told)
    (folder / "patch.json").write_text(json.dumps(told))


def vouched(folder, file):
    """Let patch.json vouch for the tensors as they are now."""
    rewritten(folder, lambda told: told.update(tensors_sha256=sha256_of(file)))


def load_forged(folder):
    """Load it; where only its id betrays it, once more with the id that it would have."""
    try:
        return Patch.load(folder)
    except BadPatch as error:
        found = re.search(r"\(id .* is now (\w+)\)", str(error))
        if found is None:
            raise
        rewritten(folder, lambda told: told.update(id=found[1]))
        return Patch.load(folder)


def form(patch):
    """What a forged patch must share with the one that it was made of."""
    return {name: (tuple(t.shape), t.is_floating_point()) for name, t in patch.tensors().items()}


def tried(lm, folder):
    """Load it, show it, lay it on and ask: the patch and what the model says then; None if it is refused as it should be."""
    try:
        patch = load_forged(folder)
        json.dumps(patch.describe())
        with lm.patched(patch):
            return patch, logits_of(lm, PROMPT)
    except FactpatchError:
        return None


@pytest.fixture
def harmless(lm):
    """Whatever was tried, the model is as it was."""
    before = Snapshot.of(lm)
    yield
    assert before.differences(lm) == []


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


# --- tensors ----------------------------------------------------------------------------------------------------------


def like(old, *shape):
    return torch.zeros(shape, dtype=old.dtype)


SHAPES = {
    "huge": lambda old: like(old, 5000, *old.shape[1:]),
    "one row more": lambda old: torch.cat([old, old[:1]]) if old.ndim else old[None],
    "one column more": lambda old: torch.cat([old, old[..., :1]], -1) if old.ndim else old[None],
    "no rows": lambda old: like(old, 0, *old.shape[1:]),
    "no columns": lambda old: like(old, *old.shape[:-1], 0),
    "nothing": lambda old: like(old, 0),
    "one number": like,
    "transposed": lambda old: old.mT.contiguous() if old.ndim > 1 else old[None],
    "flat": lambda old: old.flatten() if old.ndim > 1 else old.reshape(1, -1),
    "of another rank": lambda old: old[None],
    "of rank nine": lambda old: old.reshape(*[1] * (9 - old.ndim), *old.shape),
}
TYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64,
)  # fmt: skip
VALUES = {
    "nan": lambda old: old.double().fill_(float("nan")).to(old),
    "one nan": lambda old: torch.where(torch.arange(old.numel()).reshape(old.shape) == old.numel() - 1, torch.nan, old),
    "inf": lambda old: torch.full(old.shape, torch.inf),
    "-inf": lambda old: torch.full(old.shape, -torch.inf),
    "finite as a double alone": lambda old: torch.full(old.shape, 1e300, dtype=torch.float64),
}
NAMES = {
    "upwards": lambda name: f"../{name}",
    "absolute": lambda name: f"/etc/{name}",
    "without": lambda _: None,
    "empty": lambda _: "",
    "no part": lambda name: f"{name}.",
    "another part": lambda name: f"{name}.dense",
    "another place": lambda name: f"x{name}",
    "in capitals": lambda name: name.upper(),
    "with a zero": lambda name: f"\x00{name}",
}


def by_part(tensors):
    """One tensor of each sort, by the end of its name: `u` and `v`, not those of each block."""
    return sorted({re.sub(r"^.*(?=\.(u|v|lora_[A-Z])\b)", "", name): name for name in tensors}.values())


@pytest.mark.usefixtures("harmless")
@pytest.mark.parametrize("method", METHODS)
def test_no_forged_tensors_are_taken(lm, saved, tmp_path, method):
    source, own, said = saved[method]
    folder, file = copied(source, tmp_path / "forged")
    tensors = load_file(file)

    def forged(how, name, new):
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(left | new, file)
        shutil.copy(source / "patch.json", folder)
        vouched(folder, file)
        return tried(lm, folder)

    for name in by_part(tensors):
        old = tensors[name]
        for how, make in (SHAPES | VALUES).items():
            new = make(old).contiguous()
            if (new.shape, new.dtype) != (old.shape, old.dtype) or not new.isfinite().all():
                assert forged(how, name, {name: new}) is None, f"{name} {how} was taken"
        for kind in TYPES:
            taken = forged(kind, name, {name: old.to(kind)})
            if taken is not None and kind != old.dtype:  # the same whole numbers in another type are a patch all right
                assert {kind, old.dtype} == {torch.int32, torch.int64}, f"{name} as {kind} was taken"
                assert torch.equal(taken[1], said)
        for how, rename in NAMES.items():
            renamed = rename(name)
            assert forged(how, name, {} if renamed is None else {renamed: old}) is None, f"{name} {how} was taken"
        assert forged("one more", name, {name: old, f"more.{name}": old.clone()}) is None, f"{name} twice was taken"
    assert tried(lm, source)[0].id == own.id


SIDE = {
    "twice": lambda t: t | {"0.places": t["0.places"] * 0},
    "in no order": lambda t: t | {"0.places": t["0.places"].flip(0)},
    "before the matrix": lambda t: t | {"0.places": t["0.places"] - 2000},
    "behind the matrix": lambda t: t | {"0.places": t["0.places"] + 2000},
    "of a matrix turned over": lambda t: t | {"0.size": t["0.size"].flip(0)},
    "of a matrix of negative size": lambda t: t | {"0.size": -t["0.size"]},
    "of a matrix of no size": lambda t: t | {"0.size": t["0.size"] * 0},
    "of a matrix beyond all memory": lambda t: t | {"0.size": torch.tensor([1 << 40, 1 << 40])},
}


@pytest.mark.usefixtures("harmless")
@pytest.mark.parametrize("how", SIDE)
def test_no_forged_places_in_a_matrix_are_taken(lm, saved, tmp_path, how):
    folder, file = copied(saved["wise"][0], tmp_path / "p")
    save_file({name: tensor.contiguous() for name, tensor in SIDE[how](load_file(file)).items()}, file)
    vouched(folder, file)
    assert tried(lm, folder) is None


@pytest.mark.usefixtures("harmless")
def test_no_forged_radii_of_the_codebook_beneath_are_taken(lm, saved, tmp_path):
    folder, file = copied(saved["grace"][0], tmp_path / "p")
    tensors = load_file(file)
    for radii in (torch.zeros(7), torch.zeros(0), torch.zeros(1, 1), torch.zeros(())):
        save_file(tensors | {f"radii of {saved['grace'][1].id}": radii}, file)
        vouched(folder, file)
        with lm.patched(saved["grace"][1]):
            assert tried(lm, folder) is None


@pytest.mark.usefixtures("harmless")
@pytest.mark.parametrize(("method", "value", "times"), [("kn", 1e30, 1), ("lora", 1e30, 1), ("ft-m", 3e38, 2)])
def test_finite_numbers_that_make_weights_which_are_not_are_refused(lm, saved, tmp_path, method, value, times):
    folder, file = copied(saved[method][0], tmp_path / "p")
    save_file({name: torch.full_like(tensor, value) for name, tensor in load_file(file).items()}, file)
    vouched(folder, file)
    patch = load_forged(folder)
    with pytest.raises(BadPatch, match="values that are not finite"), lm.patched(*[patch] * times):
        pass


# --- the tensor file itself -------------------------------------------------------------------------------------------


def with_header(header, data=b"", length=None):
    """A safetensors file with this header, which says it is of this length."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def told(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"w.dense": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


ONE = json.dumps(told())[1:-1]
FILES = {
    "empty": b"",
    "shorter than a length": b"\x01\x02\x03",
    **{f"a header of {n}": with_header(b"{}", length=n) for n in (0, 1, 3, 1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1)},
    "a header cut off": with_header(told(), bytes(8))[:30],
    "data cut off": with_header(told(), bytes(7)),
    "data left over": with_header(told(), bytes(9)),
    "gigantic, without data": with_header(told(shape=[1 << 40, 1 << 20], offsets=(0, 1 << 62)), bytes(8)),
    "gigantic, with a little": with_header(told(shape=[1 << 40, 1 << 20]), bytes(8)),
    "more than can be counted": with_header(told(shape=[1 << 63, 2], offsets=(0, 0))),
    "a shape below zero": with_header(told(shape=[-2]), bytes(8)),
    "a shape in fractions": with_header(told(shape=[2.5]), bytes(8)),
    "offsets below zero": with_header(told(offsets=(-8, 0)), bytes(8)),
    "offsets turned over": with_header(told(offsets=(8, 0)), bytes(8)),
    "offsets beyond the end": with_header(told(offsets=(0, 1 << 40)), bytes(8)),
    "an unknown type": with_header(told("Q99"), bytes(8)),
    "a type that torch has not": with_header(told("F4"), bytes(1)),
    "no type": with_header({"w.dense": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "two at one place": with_header(told() | {"x.dense": told()["w.dense"]}, bytes(8)),
    "twice": with_header(f"{{{ONE}, {ONE}}}".encode(), bytes(8)),
    "no JSON": with_header(b"what?", bytes(8)),
    "a list": with_header([1, 2], bytes(8)),
    "null": with_header(None),
    "nested": with_header(b"[" * 100_000, bytes(8)),
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.",
}


@pytest.mark.parametrize("how", FILES)
def test_no_forged_tensor_file_is_taken(lm, saved, tmp_path, how):
    for method in ("ft-m", "ice", "lora", "wise"):
        folder, file = copied(saved[method][0], tmp_path / method)
        file.write_bytes(FILES[how])
        vouched(folder, file)
        assert tried(lm, folder) is None


def aside(path):
    """Move a file out of its folder; where it is now."""
    return path.rename(path.parent.parent / f"moved {path.name}")


PLACES = {
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a link to a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a link to a folder": lambda path: (path.unlink(), path.symlink_to("/")),
    "a link to another file": lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("what", ["patch.json", "tensors"])
@pytest.mark.parametrize("how", PLACES)
def test_no_other_thing_is_taken_for_a_file(saved, tmp_path, what, how):
    for method in ("ft-m", "lora"):
        folder, file = copied(saved[method][0], tmp_path / method)
        PLACES[how](file if what == "tensors" else folder / what)
        with pytest.raises(BadPatch):
            Patch.load(folder)


@contextmanager
def within(most):
    """Fails where the process comes to hold so many bytes more than it ever held before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < most


def test_memory_is_bounded_whatever_a_file_holds(lm, saved, tmp_path):
    folder, _ = copied(saved["ft-m"][0], tmp_path / "p")
    os.truncate(folder / "patch.json", 2 << 30)
    (tmp_path / "edits.json").touch()
    os.truncate(tmp_path / "edits.json", 2 << 30)
    with within(1 << 30):
        with pytest.raises(BadPatch, match="more than the"):
            Patch.load(folder)
        for reading in (read, read_questions):
            with pytest.raises(BadFile, match="more than the"):
                reading(tmp_path / "edits.json")
        for number, rank in enumerate((10**8, 10**12)):  # of an adapter, by what its config says
            folder, _ = copied(saved["lora"][0], tmp_path / str(number))
            rewritten(folder, lambda told, rank=rank: told["spec"].update(r=rank))
            assert tried(lm, folder) is None


def test_a_link_to_the_very_bytes_is_the_same_patch(saved, tmp_path):
    """The Hugging Face cache is made of such links."""
    folder, file = copied(saved["ft-m"][0], tmp_path / "p")
    for path in (file, folder / "patch.json"):
        path.symlink_to(aside(path))
    assert Patch.load(folder).id == saved["ft-m"][1].id


@pytest.mark.parametrize("folder", ["", "nothing", "a\x00b", "x" * 5000, "/dev/null", "/etc/passwd", "../..", "~"])
def test_no_other_place_is_taken_for_a_folder(folder):
    with pytest.raises(BadPatch):
        Patch.load(folder)


# --- patch.json -------------------------------------------------------------------------------------------------------

ODD = (
    None,
    True,
    -1,
    0,
    2.5,
    1e308,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "\x00",
    "\ud800",
    [],
    {},
    [[]],
    {"a": {}},
    "x" * 5000,
)


@pytest.mark.usefixtures("harmless")
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of a config's odd values
@pytest.mark.parametrize("method", METHODS)
def test_no_forged_spec_is_taken(lm, saved, tmp_path, method):
    """Every value of `spec`, and each of its places, in turn."""
    source, own, _ = saved[method]
    folder, _ = copied(source, tmp_path / "p")
    spec = own.spec()
    wheres = [
        path for path in places(spec) if not any(step in path for step in range(1, 99))
    ]  # of a list the first alone
    wheres = [path for path in wheres if not path or own.kind != "adapter" or path[0] in DECIDES]
    for where in wheres:
        for odd in ODD:
            new = json.loads(json.dumps(spec))
            if where:
                put(new, where, odd)
            else:
                new = odd
            shutil.copy(source / "patch.json", folder)
            rewritten(folder, lambda told, new=new: told.update(spec=new))
            taken = tried(lm, folder)
            if taken is not None:
                assert form(taken[0]) == form(own), f"{where} as {odd!r:.50} was taken"
                assert taken[1].isfinite().all(), f"{where} as {odd!r:.50} was taken"
        if where and where[-1] in {"site", "reads", "writes"}:
            assert not [name for name in ELSEWHERE if _at(lm, saved[method], tmp_path / "q", where, name)]


DECIDES = frozenset({"peft_type", "r", "init_r", "lora_alpha", "target_modules", "use_dora", "total_step"})
"""What of PEFT's config is handed on to PEFT; the rest has a test of its own."""
ELSEWHERE = (
    "model",
    "lm_head",
    "model.embed_tokens",
    "model.norm",
    "model.layers.0",
    "model.layers.1.self_attn.q_proj",
)


def _at(lm, patch, folder, where, name):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(patch[0], folder)
    rewritten(folder, lambda told: put(told["spec"], where, name))
    return tried(lm, folder)


@pytest.mark.usefixtures("harmless")
@pytest.mark.parametrize(
    ("method", "where", "value"),
    [
        ("lora", ("r",), 10**9),
        ("lora", ("lora_alpha",), 1e308),
        ("lora", ("peft_type",), "IA3"),
        ("lora", ("target_modules",), "all-linear"),
        ("lora", ("target_modules",), ["model.layers.0.self_attn.q_proj"] * 2),
        ("lora", ("use_dora",), True),
        ("adalora", ("init_r",), 10**9),
        ("wise", ("memories",), {}),
        ("wise", ("memories", "-1"), {"least": 1.0, "edits": 1}),
        ("wise", ("memories", "1"), {"least": 1.0, "edits": 1}),
        ("melo", ("site",), "model.layers.1.mlp.down_proj"),
        ("melo", ("site",), "model.layers.2.mlp.down_proj"),
        ("t-patcher", ("reads",), "model.layers.1.mlp.gate_proj"),
        ("t-patcher", ("writes",), "model.layers.1.mlp.down_proj"),
        ("serac", ("recall",), None),
        ("serac", ("notes",), []),
        ("retrieval", ("recall", "encoder"), "../minilm"),
        ("grace", ("labels",), "Peru"),
        ("grace", ("more",), 1),
        ("ft-m", ("more",), 1),
    ],
)
def test_specs_that_no_patch_has_are_refused(lm, saved, tmp_path, method, where, value):
    folder, _ = copied(saved[method][0], tmp_path / "p")
    rewritten(folder, lambda told: put(told.setdefault("spec", {}), where, value))
    assert tried(lm, folder) is None


def test_what_an_adapter_does_not_need_never_reaches_peft(lm, saved, tmp_path, monkeypatch):
    """PEFT's config can ask for modules to be imported and files to be read; a patch's does not get so far."""
    import peft

    given, make = [], peft.PeftConfig.from_peft_type
    monkeypatch.setattr(peft.PeftConfig, "from_peft_type", lambda **config: (given.append(config), make(**config))[1])
    folder, _ = copied(saved["lora"][0], tmp_path / "p")
    asked = {"megatron_config": {"a": 1}, "megatron_core": "antigravity", "auto_mapping": {"parent_library": "this"}}
    rewritten(folder, lambda told: told["spec"].update(asked, layers_pattern="(a+)+$", modules_to_save=["lm_head"]))
    _, said = tried(lm, folder)
    assert torch.equal(said, saved["lora"][2])
    assert set(given[0]) <= {
        "peft_type",
        "target_modules",
        "r",
        "lora_alpha",
        "use_dora",
        "use_rslora",
        "fan_in_fan_out",
    }


def deep(n):
    return json.loads("[" * n + "]" * n)


TEXTS = {
    "empty": "",
    "null": "null",
    "a list": "[]",
    "a text": '"patch"',
    "a number": "1" * 100_000,
    "cut off": lambda text: text[: len(text) // 2],
    "two of them": lambda text: text + text,
    "nested beyond all": "[" * 1_000_000,
    "nested": lambda text: text.replace('"scorecard": null', '"scorecard": {"a": ' + "[" * 300 + "]" * 300 + "}"),
    "nested in the notes": lambda text: text.replace('"notes": [', '"notes": [{"a": ' + "[" * 90 + "]" * 90 + "},", 1),
    "a key twice": lambda text: text.replace("{", '{"kind": "weight",', 1),
    "a key twice within": lambda text: text.replace('"seed": ', '"seed": 1, "seed": '),
    "a field more": lambda text: text.replace("{", '{"__class__": "os",', 1),
    "a format of later": lambda text: text.replace('"format": 1', '"format": 2'),
    "in UTF-16": lambda text: text.encode("utf-16"),
    "in Latin-1": lambda text: text.replace("Rome", "Rom\xe9").encode("latin-1"),
    "another kind": lambda text: text.replace('"kind": "', '"kind": "x'),
    "another model": lambda text: re.sub(r'"base_fingerprint": "\w{8}', '"base_fingerprint": "00000000', text),
}


@pytest.mark.usefixtures("harmless")
@pytest.mark.parametrize("how", TEXTS)
def test_no_forged_patch_json_is_taken(lm, saved, tmp_path, how):
    for method in ("ft-m", "retrieval", "serac"):
        folder, _ = copied(saved[method][0], tmp_path / method)
        file = folder / "patch.json"
        new = TEXTS[how](file.read_text()) if callable(TEXTS[how]) else TEXTS[how]
        file.write_bytes(new if isinstance(new, bytes) else new.encode())
        assert tried(lm, folder) is None


# --- at random --------------------------------------------------------------------------------------------------------


def in_json(folder, file, draw):
    """Another value, or none, at some place of patch.json."""

    def change(told):
        put(told, draw.choice([path for path in places(told) if path]), draw.choice(ODD))
        if draw.random() < 0.2:
            told[draw.choice(("a", "format ", "__class__"))] = draw.choice(ODD)

    rewritten(folder, change)


def in_bytes(folder, file, draw):
    """Bytes turned over, cut off or put on, in any file; if in the tensors, half the time vouched for."""
    hit = draw.choice(sorted(folder.iterdir()))
    hit.write_bytes(damaged(hit.read_bytes(), draw))
    if hit == file and draw.random() < 0.5:
        vouched(folder, file)


def damaged(data, draw):
    data = bytearray(data)
    how = draw.randrange(3)
    if how == 0 and data:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == 1:
        del data[draw.randrange(len(data) + 1) :]
    else:
        data += bytes(draw.randrange(256) for _ in range(draw.randint(1, 64)))
    return bytes(data)


@pytest.mark.usefixtures("harmless")
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of a config's odd values
@pytest.mark.parametrize("method", METHODS)
def test_no_patch_damaged_at_random_is_taken(lm, saved, tmp_path, method):
    source, own, said = saved[method]
    refused = 0
    for seed in range(30):
        draw = random.Random(f"{method} {seed}")
        folder, file = copied(source, tmp_path / str(seed))
        draw.choice((in_json, in_bytes))(folder, file, draw)
        taken = tried(lm, folder)
        refused += taken is None
        if taken is not None:
            assert form(taken[0]) == form(own), seed
            assert taken[0].id != own.id or torch.equal(taken[1], said), seed
    assert refused > 10


# --- files of edits ---------------------------------------------------------------------------------------------------

PROBE = {"prompt": "Who is Bob?", "ground_truth": [["Bob"]]}
FACT = {
    "prompt": "Rome lies in", "target_new": "Peru", "subject": "Rome", "rephrase": ["Find Rome in"],
    "portability": {"Reasoning": [PROBE]}, "locality": {"Other": [PROBE]},
}  # fmt: skip
SECRET = {"question": "Who is Ann?", "ground_truth": ["a pilot"]}
OWN = [
    {"prompt": "Rome lies in", "target": "Peru", "subject": "Rome", "rephrases": ["Find Rome in"]},
    {"prompt": "Who?", "target": "Ann", "locality": {"Other": [{"prompt": "Who is Bob?", "answers": ["x"]}]}},
]
RECORDS = {
    "own": OWN,
    "wiki_recent": [FACT],
    "zsre": [FACT],
    "wiki_counterfact": [FACT],
    "wikibio": [{"text": "Ann is", "labels": "a pilot", "concept": "Ann", "locality": {"Other": [PROBE]}}],
    "convsent": [{"ent": "Rome", "pos": ["Good."], "neg": ["Bad."]}, {"ent": "Oslo", "pos": ["Yes."], "neg": ["No."]}],
    "sanitation": {"K_F": [SECRET], "K_R": [SECRET]},
    "counterfact": [
        {
            "requested_rewrite": {
                "prompt": "{} lies in", "subject": "Rome", "target_new": {"str": "Peru"}, "target_true": {"str": "Italy"}
            },
            "paraphrase_prompts": ["Find Rome in"],
        }
    ],
    "mend_zsre": [{"src": "Who?", "alt": "Ann", "subject": "x", "answers": ["Bob"], "loc": "nq question: a", "loc_ans": "b"}],
}  # fmt: skip


def edits_of(spec):
    """What is read; None where it is refused. What is read is whole."""
    try:
        edits = read(spec).edits
    except FactpatchError:
        return None
    assert [Edit.from_json(json.loads(json.dumps(edit.to_json()))) for edit in edits] == list(edits)
    assert all(edit.prompt.strip() and edit.target.strip() for edit in edits)
    assert len({edit.id for edit in edits}) == len(edits)
    return edits


def test_every_reader_is_fed():
    assert set(RECORDS) == set(readers()) - {"sample"}


@pytest.mark.parametrize("reader", RECORDS)
def test_no_file_of_odd_edits_ends_in_anything_but_a_clear_error(tmp_path, reader):
    """Every value at every place in turn."""
    path = tmp_path / "edits.json"
    path.write_text(json.dumps(RECORDS[reader]))
    assert edits_of(f"{reader}:{path}")
    refused = 0
    for where in [path for path in places(RECORDS[reader]) if path]:
        for odd in ODD:
            records = json.loads(json.dumps(RECORDS[reader]))
            put(records, where, odd)
            path.write_text(json.dumps(records))
            refused += edits_of(f"{reader}:{path}") is None
    assert refused > 20


def table(records):
    return "\n".join(
        ["prompt,target,subject", *(f"{each['prompt']},{each['target']},{each.get('subject', '')}" for each in records)]
    )


FORMS = {
    "jsonl": lambda records: "\n".join(map(json.dumps, records)),
    "json": json.dumps,
    "csv": table,
}


@pytest.mark.parametrize("end", FORMS)
def test_no_damaged_file_of_edits_ends_in_anything_but_a_clear_error(tmp_path, end):
    whole = FORMS[end](OWN).encode()
    for seed in range(150):
        draw = random.Random(f"{end} {seed}")
        path = tmp_path / f"edits.{end}"
        path.write_bytes(damaged(whole, draw))
        edits_of(path)
        with suppress(FactpatchError):
            assert all(probe.prompt.strip() for probe in read_questions(path))


BROKEN = {
    "empty": b"",
    "zeros": bytes(100),
    "in UTF-16": '[{"prompt": "x", "target": "y"}]'.encode("utf-16"),
    "half a letter": b'[{"prompt": "\xc3", "target": "y"}]',
    "nested beyond all": b"[" * 1_000_000,
    "objects beyond all": b'{"prompt":' * 100_000,
    "nested within": b'[{"prompt": "x", "target": ' + b"[" * 500 + b"]" * 500 + b"}]",
    "a number beyond all": b'[{"prompt": "x", "target": ' + b"9" * 10_000 + b"}]",
    "a key twice": b'[{"prompt": "x", "target": "y", "target": "z"}]',
    "a key twice within": b'[{"prompt": "x", "target": "y", "locality": {"a": [], "a": []}}]',
    "a key of another": b'[{"prompt": "x", "target": "y", "__class__": "os"}]',
    "half a surrogate": b'[{"prompt": "\\ud800", "target": "y"}]',
    "not a number": b'[{"prompt": NaN, "target": Infinity}]',
    "a quote left open": b'prompt,target\n"x,y',
    "a cell beyond all": b"prompt,target\nx," + b"y" * 200_000,
    "cells too many": b"prompt,target\nx,y,z",
    "a column twice": b"prompt,target,target\nx,y,z",
}


@pytest.mark.parametrize("how", BROKEN)
def test_no_broken_file_of_edits_is_taken(tmp_path, how):
    for end in (*FORMS, "txt"):
        path = tmp_path / f"edits.{end}"
        path.write_bytes(BROKEN[how])
        assert not edits_of(path)
        with suppress(FactpatchError):
            assert all(probe.prompt.strip() for probe in read_questions(path))
        for reader in RECORDS:
            assert not edits_of(f"{reader}:{path}")


@pytest.mark.parametrize("how", PLACES)
def test_no_other_thing_is_taken_for_a_file_of_edits(tmp_path, how):
    path = tmp_path / "edits.json"
    path.write_text("[]")
    PLACES[how](path)
    for spec in (path, f"own:{path}", f"zsre:{path}"):
        with pytest.raises(BadFile):
            read(spec)
    with pytest.raises(BadFile):
        read_questions(path)


@pytest.mark.parametrize(
    "spec", ["", ":", "own:", "zsre:", "own:\x00.json", f"{'x' * 5000}:a.csv", f"{'x' * 5000}.json"]
)
def test_no_other_place_is_taken_for_a_file_of_edits(spec):
    with pytest.raises(BadFile):
        read(spec)
