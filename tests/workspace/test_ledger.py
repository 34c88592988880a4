"""Entries, their chain and what becomes of damaged files; without a model."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from factpatch.errors import PatchError
from factpatch.workspace.entry import Entry, Place, replay
from factpatch.workspace.ledger import append, read_ledger
from tests.workspace.planted import edit_file


def patch_id(number):
    return f"{number:016x}"


def chained(*steps):
    """Entries of init and these steps: ("accept", id) or ("revert", number, replaced)."""
    entries = [Entry(number=1, action="init", author="Ann", time="t", previous="").sealed()]
    for number, step in enumerate(steps, 2):
        more = {"patch": patch_id(step[1])} if step[0] == "accept" else {"reverts": step[1], "replaced": step[2]}
        entries.append(
            Entry(number=number, action=step[0], author="Ann", time="t", previous=entries[-1].hash, **more).sealed()
        )
    return entries


@st.composite
def steps(draw):
    """Steps that can follow one another, and the stack after them."""
    done, stack, new = [], [], 100
    for number in range(2, 2 + draw(st.integers(0, 12))):
        if stack and draw(st.booleans()):
            gone = draw(st.sampled_from(stack))
            stack.remove(gone)
            replaced = {}
            for i, (place, old) in enumerate(stack):
                if draw(st.booleans()):
                    new += 1
                    replaced[patch_id(old)] = patch_id(new)
                    stack[i] = (place, new)
            done.append(("revert", gone[0], replaced))
        else:
            new += 1
            stack.append((number, new))
            done.append(("accept", new))
    return done, tuple(Place(number, patch_id(patch)) for number, patch in stack)


@given(steps())
def test_the_stack_is_what_the_steps_leave(made):
    done, stack = made
    assert replay(chained(*done)) == stack


@pytest.mark.parametrize(
    "wrong",
    [
        [("revert", 2, {})],
        [("accept", 5), ("revert", 3, {})],
        [("accept", 5), ("revert", 2, {}), ("revert", 2, {})],
        [("accept", 5), ("accept", 6), ("revert", 2, {patch_id(5): patch_id(7)})],
    ],
)
def test_steps_that_cannot_follow_are_refused(wrong):
    with pytest.raises(PatchError, match="not in the stack"):
        replay(chained(*wrong))


def test_a_second_beginning_is_refused():
    first, *_ = chained()
    with pytest.raises(PatchError, match="begins the ledger again"):
        replay([first, Entry(number=2, action="init", author="a", time="t", previous=first.hash).sealed()])


def test_the_hash_covers_every_field():
    entry = chained(("accept", 5))[1]
    for name, value in {
        "number": 3, "action": "revert", "author": "Bob", "time": "u", "message": "m", "patch": patch_id(6), "reverts": 1,
        "proposal": 4, "replaced": {patch_id(1): patch_id(2)}, "files": {f"patches/{patch_id(5)}/patch.json": "0" * 64},
        "scores": {"locality": 1.0}, "previous": "x",
    }.items():  # fmt: skip
        assert entry.model_copy(update={name: value}).digest != entry.hash, name
    assert set(Entry.model_fields) - {"hash", "regressions"} == {
        "number", "action", "author", "time", "message", "patch", "reverts", "proposal", "replaced", "files", "scores", "previous"
    }  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "/etc/passwd",
        "patches/../../x",
        f"patches/{patch_id(1)}/../x",
        f"patches/{patch_id(1)}/.hidden",
        "ledger/000001.json",
    ],
)
def test_a_path_cannot_lead_out_of_the_workspace(path):
    with pytest.raises(ValidationError):
        Entry(number=2, action="accept", author="a", time="t", previous="", files={path: "0" * 64})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ledger").mkdir()
    for entry in chained(("accept", 5), ("accept", 6), ("revert", 2, {}), ("accept", 7)):
        append(tmp_path, entry)
    return tmp_path


def test_entries_are_read_as_they_were_written(folder):
    ledger = read_ledger(folder)
    assert list(ledger.entries) == chained(("accept", 5), ("accept", 6), ("revert", 2, {}), ("accept", 7))
    assert (ledger.last, ledger.good, ledger.damage) == (5, 5, ())
    assert ledger.stack() == (Place(3, patch_id(6)), Place(5, patch_id(7)))
    assert ledger.stack(3) == (Place(2, patch_id(5)), Place(3, patch_id(6)))


@pytest.mark.parametrize("at", [0, -1, 6])
def test_an_entry_that_is_not_there_is_named(folder, at):
    with pytest.raises(PatchError, match=f"entry {at}: there is none; the ledger has 1 to 5"):
        read_ledger(folder).up_to(at)


def seal_again(path):
    """Change an entry and give it the hash it then must have."""
    record = json.loads(path.read_text()) | {"author": "Eve"}
    path.write_text(json.dumps(Entry.model_validate(record).sealed().to_json()))


DAMAGE = {
    "removed": (lambda path: path.unlink(), 3, "missing"),
    "emptied": (lambda path: path.write_text(""), 3, "not JSON"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:50]), 3, "not JSON"),
    "binary": (lambda path: path.write_bytes(b"\xff\x00\xfe"), 3, "not JSON"),
    "deep": (lambda path: path.write_text("[" * 100_000), 3, "cannot be read|not JSON"),
    "another kind": (lambda path: path.write_text("[1]"), 3, "expected"),
    "a field more": (lambda path: edit_file(path, '"author"', '"x": 1, "author"'), 3, "not a field"),
    "not a number": (lambda path: edit_file(path, '"number": 3', '"number": NaN'), 3, "expected"),
    "changed": (lambda path: edit_file(path, "Ann", "Eve"), 3, "was changed after it was written"),
    "another's": (lambda path: path.write_bytes(path.with_name("000002.json").read_bytes()), 3, "holds entry 2"),
    "sealed again": (seal_again, 4, "does not follow entry 3"),
}


@pytest.mark.parametrize(("damage", "at", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_named_and_the_rest_is_usable(folder, damage, at, words):
    damage(folder / "ledger" / "000003.json")
    ledger = read_ledger(folder)
    assert ledger.damage[0].path == f"ledger/{at:06d}.json"
    assert __import__("re").search(words, ledger.damage[0].problem), ledger.damage[0].problem
    assert ledger.good == at - 1
    assert 5 in {entry.number for entry in ledger.entries}, "what is sound is still read"
    assert ledger.stack(2) == (Place(2, patch_id(5)),)
    for wanted in (at, 5, None):
        with pytest.raises(PatchError, match=f"ledger/{at:06d}.json: .*\n.*up to entry {at - 1} is sound"):
            ledger.stack(wanted)


def test_a_gap_is_told_once(folder):
    (folder / "ledger" / "000005.json").rename(folder / "ledger" / "999999.json")
    found = read_ledger(folder).damage
    assert [str(each) for each in found] == [
        "ledger/000005.json: missing, as are all up to entry 999998",
        "ledger/999999.json: holds entry 5",
    ]


def test_files_of_other_names_are_no_entries(folder):
    for name in ("6.json", "0006.json", "٠٠٠٠٠٦.json", "x.json", "000006.txt"):
        (folder / "ledger" / name).write_text("{}")
    assert read_ledger(folder).last == 5
    assert read_ledger(folder).damage == ()


def test_an_empty_ledger_says_so(tmp_path):
    with pytest.raises(PatchError, match="broken off"):
        read_ledger(tmp_path).up_to(None)
