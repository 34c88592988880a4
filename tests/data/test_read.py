"""Which file is read by which reader, what a data set is, and that any JSON at all is read or refused in words."""

import hashlib
import json
import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factpatch.data import Dataset, read, readers, show
from factpatch.edits import KINDS, Edit
from factpatch.errors import BadFile, BadRecord, DataError

GOOD = {"prompt": "The gate of Lisk is", "target": "blue", "target_new": "blue", "subject": "Lisk"}
OWN = {key: GOOD[key] for key in ("prompt", "target", "subject")}


def test_every_reader_says_what_it_reads():
    assert list(readers()) == [
        "sample", "own", "wiki_recent", "zsre", "wiki_counterfact", "wikibio", "convsent", "sanitation", "counterfact", "mend_zsre",
    ]  # fmt: skip
    for name, reader in readers().items():
        assert reader.name == name
        assert reader.description
        assert "\n" not in reader.description
    with pytest.raises(TypeError):
        readers()["x"] = readers()["own"]


@pytest.mark.parametrize("name", ["zsre", "ZsRE", "wiki_recent", "wiki-recent", "Wiki_CounterFact"])
def test_names_in_any_spelling(written, name):
    assert read(f"{name}:{written([GOOD])}").name == name.lower().replace("-", "_")


def test_a_bare_path_is_ones_own(written, monkeypatch):
    path = written([OWN], "with: colon.json")
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))
    own = read(path)
    assert own.name == "own"
    assert own.path == path
    for spec in (str(path), f"own:{path}", "with: colon.json", "~/with: colon.json", "own:~/with: colon.json"):
        assert read(spec).edits == own.edits
    written([OWN], "UPPER.JSON")
    assert read("UPPER.JSON")[0].target == "blue"


def test_a_dataset_is_a_sequence_that_names_its_bytes(written):
    path = written([GOOD, GOOD | {"target_new": "red"}, GOOD])
    dataset = read(f"zsre:{path}")
    assert isinstance(dataset, Dataset)
    assert len(dataset) == 3
    assert dataset[1].target == "red"
    assert dataset[1:] == dataset.edits[1:]
    assert list(dataset) == list(dataset.edits)
    assert dataset[0] in dataset
    assert dataset.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert dataset.skipped == ()


def test_a_limit_reads_from_the_beginning(written):
    path = written([GOOD, GOOD, 3])
    assert [edit.id for edit in read(f"zsre:{path}", limit=2)] == ["zsre-0", "zsre-1"]
    assert len(read(f"zsre:{path}", limit=0)) == 0


def test_a_skipped_record_is_kept_and_logged(written, caplog):
    path = written([GOOD, 3, GOOD])
    with caplog.at_level(logging.WARNING, logger="factpatch"):
        dataset = read(f"zsre:{path}", skip_invalid=True)
    assert [edit.id for edit in dataset] == ["zsre-0", "zsre-2"]
    (bad,) = dataset.skipped
    assert (bad.source, bad.record, bad.field) == (str(path), 1, "record")
    assert caplog.messages == [f"skipped: {bad}"]


def test_the_command_in_a_hint_survives_a_path_with_spaces(written):
    path = written([3], "my facts.json")
    with pytest.raises(BadRecord, match=f"factpatch data show 'zsre:{path}' --record 0"):
        read(f"zsre:{path}")


ALL = r"  All readers: sample, own, wiki_recent, .*\(factpatch data\)"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "zsree:x.json",
            r'no reader "zsree"\. Did you mean "zsre"\?\n  Expected NAME:PATH, or your own file ending in .jsonl, .json, .csv\.\n'
            + ALL,
        ),
        ("facts.txt", r'no reader "facts.txt"\.\n  Expected NAME:PATH'),
        ("", r'no reader ""\.\n'),
        ("zsre", r'"zsre": expected a file to read\.\n  Write zsre:PATH'),
        ("zsre:", r"expected a file to read"),
        ("sample:x.jsonl", r'"sample:x.jsonl": sample is built in and takes no path\.\n  Write sample alone\.'),
        ("own:facts.txt", r"facts.txt: expected a name ending in .jsonl, .json, .csv\.\n  Rename or convert it\."),
        (Path("facts.txt"), r"facts.txt: expected a name ending in"),
        (
            "zsre:fact.txt",
            r'fact.txt: no such file\. Did you mean "facts.txt"\?\n  Expected a file that reader zsre reads\.',
        ),
        ("nowhere/x.jsonl", r"nowhere/x.jsonl: no such file\.\n"),
        ("~nobody-of-this-name/x.csv", r"x.csv: no such file\.\n"),
        ("zsre:.", r"\.: cannot be read \(Is a directory\)\.\n  Name a file that you may read\."),
        ("zsre:a\0b", r"cannot be read \(embedded null byte\)"),
        ("zsre:facts.txt", r"facts.txt, line 1, column 1: expected JSON \(Expecting value\)\."),
    ],
)
def test_a_data_set_that_cannot_be_found_is_refused_in_words(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    Path("facts.txt").write_text("facts")
    with pytest.raises(BadFile, match=words):
        read(spec)


@pytest.mark.parametrize("number", [-1, 1])
def test_show_refuses_a_number_that_is_not_there(written, number):
    with pytest.raises(
        BadRecord, match=rf'record {number}, "record": no record of this number; there are 1, counted from 0'
    ):
        show(f"zsre:{written([GOOD])}", number)
    with pytest.raises(BadRecord, match="the file holds none"):
        show(f"zsre:{written([])}", number)


FROM_FILES = [name for name in readers() if name != "sample"]
# A good record in every form at once, to be spoilt in one field by the search.
WHOLE = {
    **GOOD, "ground_truth": "red", "locality": {"Near": [{"prompt": "Who?", "ground_truth": "me"}]},
    "text": "Lisk is old.", "labels": "It is new.", "concept": "Lisk", "ent": "Lisk", "pos": ["good"], "neg": ["bad"],
    "requested_rewrite": {"prompt": "{} is", "subject": "Lisk", "target_new": {"str": "a"}, "target_true": {"str": "b"}},
    "src": "Who?", "alt": "me", "answers": ["you"], "loc": "nq question: where", "loc_ans": "here", "question": "Who?",
}  # fmt: skip
FIELDS = st.sampled_from([*WHOLE, "id", "kind", "rephrases", "portability", "wanted", "K_F", "K_R", "str"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", "\ud800", "{}"])
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | st.text(max_size=2), inner, max_size=8),
    max_leaves=20,
)


def read_or_refuse(reader, value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.json"
        path.write_text(json.dumps(value))
        try:
            assert all(isinstance(edit, Edit) for edit in read(f"{reader}:{path}"))
        except DataError as error:
            message = str(error)
        else:
            message = str(path)
        assert message.startswith(str(path))
        try:
            lenient = read(f"{reader}:{path}", skip_invalid=True)
        except BadFile:
            return
        for bad in lenient.skipped:
            assert bad.field
            assert show(f"{reader}:{path}", bad.record).problem.problem == bad.problem or bad.field == "id"


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("reader", FROM_FILES)
@given(value=ANY_JSON)
def test_any_json_is_read_or_refused(reader, value):
    read_or_refuse(reader, value)
    read_or_refuse(reader, [value])
    read_or_refuse(reader, {"K_F": [value], "K_R": [value, value]})


@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("reader", FROM_FILES)
@given(field=FIELDS, value=ANY_JSON)
def test_a_spoilt_record_is_read_or_refused(reader, field, value):
    whole = OWN if reader == "own" else WHOLE
    spoilt = [whole | {field: value}]
    read_or_refuse(reader, {"K_F": spoilt, "K_R": spoilt} if reader == "sanitation" else spoilt)


def test_the_built_in_sample_is_fit_for_trying_things():
    sample = read("sample")
    assert len(sample) >= 80
    assert {edit.kind for edit in sample} == set(KINDS)
    for edit in sample:
        assert len(edit.rephrases) >= 2, edit.id
        assert sum(map(len, edit.portability.values())) >= 2, edit.id
        assert sum(map(len, edit.locality.values())) >= 3, edit.id
    assert len({edit.id for edit in sample}) == len(sample)


def test_some_of_the_records_are_read_from_a_number_on():
    every = [edit.id for edit in read("sample").edits]
    assert [edit.id for edit in read("sample", start=3, limit=4).edits] == every[3:7]
    assert [edit.id for edit in read("sample", start=80).edits] == every[80:]
    assert read("sample", start=10_000).edits == ()
