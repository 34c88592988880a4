"""Files to read, made for one test."""

import json

import pytest


@pytest.fixture
def written(tmp_path):
    """Write a value as JSON, or a text as it is, under a name; gives the path."""

    def write(value, name="file.json"):
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8", newline="")
        return path

    return write
