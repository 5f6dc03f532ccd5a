"""Promises of files: they are written whole or not at all."""

import json
import math

import pytest

from microtune.modules.whole_files import whole_file, write_json


def test_the_file_is_put_in_place_at_the_end(tmp_path):
    path = tmp_path / "folder" / "report.png"
    with whole_file(path) as partial:
        assert partial.suffix == ".png"
        assert partial.parent == path.parent
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [True, False])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, exception, written):
    path = tmp_path / "report.txt"
    path.write_text("old")
    with pytest.raises(exception), whole_file(path) as partial:  # noqa: PT012
        if written:
            partial.write_text("half of the n")
        raise exception
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_written_and_read_back(tmp_path):
    value = {"name": "größer", "values": [1, 2.5, None, True], "nested": {"a": []}}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "größer" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_without_numbers_that_it_does_not_have(tmp_path, value):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_json(path, {"a": [value]})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
