"""A tiny model on disk, a file of edits, and the commands."""

import json

import pytest
from typer.testing import CliRunner

from factpatch.cli.app import app
from factpatch.errors import FactpatchError
from factpatch.testing import tiny_lm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm = tiny_lm()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def run(*args):
    """Exit code, stdout and the error message of one command, as `main` would report them."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if isinstance(result.exception, FactpatchError):
        return 2, result.stdout, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    records = [
        {
            "id": "a",
            "prompt": "Rome lies in",
            "subject": "Rome",
            "target": "Peru",
            "locality": {"N": [{"prompt": "Oslo is", "answers": ["a city"]}]},
        },
        {"id": "b", "prompt": "Ann is", "subject": "Ann", "target": "a pilot", "rephrases": ["Who is Ann?"]},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path
