"""One's own files: there and back again, tables, and everything a file can have wrong with it."""

import csv
import io
import json
import string
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factpatch.data import read, show, write_jsonl
from factpatch.edits import KINDS, Edit
from factpatch.errors import BadFile, BadRecord, OutputError

texts = st.text(min_size=1, max_size=20).map(str.strip).filter(bool)
cells = texts.map(lambda text: text.replace("|", "/"))
probes = st.fixed_dictionaries({"prompt": texts}, optional={"answers": st.lists(texts, max_size=2)})
groups = st.dictionaries(texts, st.lists(probes, max_size=2), max_size=2)


@st.composite
def records(draw, *, table=False):
    """Edits as JSON; of a table, only what a table can hold."""
    plain = cells if table else texts
    record = draw(
        st.fixed_dictionaries(
            {"id": plain, "kind": st.sampled_from(KINDS), "prompt": plain, "target": plain},
            optional={"ground_truth": st.lists(plain, max_size=2), "rephrases": st.lists(plain, max_size=2)}
            | ({} if table else {"portability": groups, "locality": groups, "wanted": st.lists(texts, max_size=1)}),
        )
    )
    subject = draw(st.sampled_from([None, record["prompt"], record["prompt"][0]]))
    return record | ({"subject": subject} if subject else {})


def many(one):
    return st.lists(one, max_size=4, unique_by=lambda record: record["id"])


@given(many(records()))
def test_what_is_written_is_read_again(some):
    edits = tuple(Edit(**record) for record in some)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.jsonl"
        write_jsonl(edits, path)
        assert read(path).edits == edits
        path.with_suffix(".json").write_text(json.dumps(some))
        assert read(path.with_suffix(".json")).edits == edits


@given(many(records(table=True)))
def test_a_table_gives_the_edits_it_was_made_of(some):
    columns = ["target", "id", "kind", "prompt", "subject", "ground_truth", "rephrases"]
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns)
    for record in some:
        row = [record.get(name, "") for name in columns]
        writer.writerow(["|".join(cell) if isinstance(cell, list) else cell for cell in row])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.csv"
        path.write_bytes(table.getvalue().encode())
        assert read(path).edits == tuple(Edit(**record) for record in some)


def test_blank_lines_are_passed_over_and_ids_made(written):
    line = json.dumps({"prompt": "The gate of Lisk is", "target": "blue"})
    path = written(f"\ufeff{line}\r\n\n   \n{line}\n", "gates.jsonl")
    assert [edit.id for edit in read(path)] == ["gates-0", "gates-1"]
    assert {edit.target for edit in read(path)} == {"blue"}


def test_a_line_may_hold_line_separators(written):
    path = written('{"prompt": "one\u2028two\x85three is", "target": "x"}\n', "a.jsonl")
    assert read(path)[0].prompt == "one\u2028two\x85three is"


def test_what_is_written_can_be_read_by_people(tmp_path):
    write_jsonl([Edit(id="1", prompt="The gate of Škofja is", target="grün")], tmp_path / "new" / "f.jsonl")
    text = (tmp_path / "new" / "f.jsonl").read_text(encoding="utf-8")
    assert text == '{"id": "1", "prompt": "The gate of Škofja is", "target": "grün", "kind": "modify"}\n'


def test_a_table_with_gaps(written):
    path = written(
        'prompt, target,subject ,ground_truth,rephrases,id\r\n\r\n"Lisk, in short, is",a town,Lisk,a village | a hamlet|,,\r\nBrel is,a river,,,"Brel?|The ""Brel""?",b\r\n',
        "t.csv",
    )
    assert read(path).edits == (
        Edit(
            id="t-0",
            prompt="Lisk, in short, is",
            target="a town",
            subject="Lisk",
            ground_truth=("a village", "a hamlet"),
        ),
        Edit(id="b", prompt="Brel is", target="a river", rephrases=("Brel?", 'The "Brel"?')),
    )


GOOD = {"id": "g", "prompt": "The gate of Lisk is", "target": "blue"}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("text", "name", "record", "field", "problem"),
    [
        (lines(GOOD, GOOD), "f.jsonl", 1, "id", '"g" is the id of an earlier record; ids must differ'),
        (
            lines(GOOD) + "\n" + lines(GOOD)[:20],
            "f.jsonl",
            1,
            "record",
            "line 3, column 21: expected one JSON object (Expecting",
        ),
        (
            lines(GOOD) + "[" * 100_000,
            "f.jsonl",
            1,
            "record",
            "line 2: expected one JSON object (maximum recursion depth exceeded",
        ),
        (lines(GOOD | {"subject": "Oskova"}), "f.jsonl", 0, "subject", 'expected a part of the prompt, found "Oskova"'),
        (
            lines(GOOD | {"tarket": "x"}),
            "f.jsonl",
            0,
            "tarket",
            'is not a field that is known here. Did you mean "target"?',
        ),
        (
            lines(GOOD | {"locality": {"x": [{"promt": "a"}]}}),
            "f.jsonl",
            0,
            "locality.x.0.promt",
            'is not a field that is known here. Did you mean "prompt"?',
        ),
        (
            lines(GOOD | {"kind": "replace"}),
            "f.jsonl",
            0,
            "kind",
            "expected 'insert', 'modify', 'erase' or 'restyle', found the text \"replace\"",
        ),
        (lines(3), "f.jsonl", 0, "record", "expected an object with fields, found the number 3"),
        (json.dumps([GOOD, {"prompt": "x"}]), "f.json", 1, "target", "expected a value, found nothing"),
        (
            "prompt,target\nLisk is,a town\nBrel is\n",
            "f.csv",
            1,
            "record",
            "expected 2 cells, as in the first line, found 1",
        ),
        ("prompt,target\nLisk is,a town\nBrel is,\n", "f.csv", 1, "target", "expected a value, found nothing"),
    ],
)
def test_a_bad_record_is_refused_in_words_or_skipped(written, text, name, record, field, problem):
    path = written(text, name)
    with pytest.raises(BadRecord) as caught:
        read(path)
    assert (caught.value.source, caught.value.record, caught.value.field) == (str(path), record, field)
    assert caught.value.problem.startswith(problem)
    assert str(caught.value).endswith(f"\n  See how a record is read: factpatch data show own:{path} --record {record}")
    dataset = read(path, skip_invalid=True)
    assert [bad.problem for bad in dataset.skipped] == [caught.value.problem]
    assert len(dataset) == record
    assert field == "id" or show(path, record).problem.problem == caught.value.problem


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (
            "prompt,targt\n",
            "f.csv",
            'f.csv: no field of an edit for column "targt". Did you mean "target"?\n  Columns separated by commas; prompt and target must be there: id, kind, ',
        ),
        ("prompt,prompt,target\n", "f.csv", 'f.csv: column "prompt" is there twice.\n  Columns'),
        ("prompt,id\n", "f.csv", 'f.csv: no column "target" in the first line.\n  Columns'),
        ("", "f.csv", 'f.csv: no column "prompt" in the first line.\n  Columns'),
        (
            'prompt,target\nLisk is,"a to',
            "f.csv",
            'f.csv, line 2: expected a table with commas (unexpected end of data).\n  Put a text with commas or line ends in "double quotes"',
        ),
        (
            '[{"prompt": "x",\n "tar',
            "f.json",
            "f.json, line 2, column 2: expected JSON (Unterminated string starting at).\n  Is it all there? Fetch it again, or mend it at that place.",
        ),
        ("9" * 5000, "f.json", "f.json: expected JSON (Exceeds the limit"),
        ("[" * 100_000, "f.json", "f.json: expected JSON (maximum recursion depth"),
        (
            '{"prompt": "x"}',
            "f.json",
            "f.json: expected a list of records, found an object of 1.\n  It was read as own.",
        ),
    ],
)
def test_a_broken_file_is_refused_in_words(written, text, name, words):
    with pytest.raises(BadFile) as caught:
        read(written(text, name), skip_invalid=True)
    assert words in str(caught.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("prompt,target\nLisk is,sch\u00f6n\n".encode("latin-1"))
    with pytest.raises(BadFile, match=r"latin.csv, line 2: not UTF-8 text\.\n  Save it as UTF-8"):
        read(path)


def test_a_file_cut_anywhere_is_read_or_refused(tmp_path):
    path = tmp_path / "f.jsonl"
    whole = lines(GOOD | {"target": "bl\u00fcte"}, GOOD | {"id": "h"}).encode()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        dataset = read(path, skip_invalid=True)
        assert len(dataset) + len(dataset.skipped) == len(whole[:end].splitlines())


def test_a_place_that_cannot_be_written_is_refused_and_nothing_left(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match=r"taken: cannot be written .*\n  Name a folder you may write to"):
        write_jsonl([Edit(**GOOD)], tmp_path / "taken")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_jsonl([Edit(**GOOD)], tmp_path / "file" / "f.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken"}


def test_writing_that_fails_midway_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.jsonl"
    write_jsonl([Edit(**GOOD)], path)

    def failing():
        yield Edit(**(GOOD | {"id": "other"}))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(failing(), path)
    assert [edit.id for edit in read(path)] == ["g"]
    assert list(tmp_path.iterdir()) == [path]


@settings(max_examples=200)
@given(st.text(string.printable, max_size=60), st.sampled_from(["jsonl", "json", "csv"]))
def test_any_text_is_read_or_refused(text, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"f.{suffix}"
        path.write_bytes(text.encode())
        with suppress(BadFile, BadRecord):
            read(path)
