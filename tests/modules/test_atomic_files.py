"""Promises of files and folders: they are written whole or not at all."""

import json
import math
import os
import stat
from contextlib import nullcontext

import pytest

from microtune.modules.atomic_files import whole_file, whole_folder, write_json
from microtune.modules.user_error import UserError


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


def test_a_file_where_there_can_be_none_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a\.json cannot be written \(.*\): give another folder"):
        write_json(tmp_path / "file/a.json", {})


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


def test_the_folder_is_put_in_place_at_the_end(tmp_path):
    path = tmp_path / "data" / "train"
    with whole_folder(str(path)) as partial:
        assert partial.parent == path.parent
        assert list(partial.iterdir()) == []
        (partial / "word").mkdir()
        (partial / "word" / "clip.txt").write_text("new")
        assert not path.exists()
    assert (path / "word" / "clip.txt").read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_the_folder_has_the_permissions_of_any_other(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "folder") as partial:
            assert stat.S_IMODE(partial.stat().st_mode) == 0o700
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("written", [True, False])
def test_an_exception_leaves_no_folder(tmp_path, exception, written):
    with pytest.raises(exception), whole_folder(tmp_path / "folder") as partial:  # noqa: PT012
        if written:
            (partial / "word").mkdir()
            (partial / "word" / "clip.txt").write_text("half of the n")
        raise exception
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exception", [None, ValueError])
def test_a_folder_that_is_there_is_left_as_it_is(tmp_path, exception):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(exception) if exception else nullcontext(), whole_folder(path) as partial:
        (partial / "new.txt").write_text("new")
        if exception:
            raise exception
    assert list(path.iterdir()) == [path / "old.txt"]
    assert (path / "old.txt").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_under_the_folders_name_is_left_as_it_is(tmp_path):
    (tmp_path / "name").write_text("old")
    with pytest.raises(OSError, match="name"), whole_folder(tmp_path / "name") as partial:
        (partial / "new.txt").write_text("new")
    assert (tmp_path / "name").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "name"]


def test_of_two_at_once_the_first_to_end_stays(tmp_path):
    path = tmp_path / "folder"
    with whole_folder(path) as late:
        (late / "late.txt").write_text("late")
        with whole_folder(path) as early:
            assert early != late
            (early / "early.txt").write_text("early")
    assert list(path.iterdir()) == [path / "early.txt"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = r"file cannot be written to \(File exists\): give another folder"
    with pytest.raises(UserError, match=message), whole_folder(tmp_path / "file" / "folder"):
        pass
    with pytest.raises(UserError, match="cannot be written to"), whole_folder("/proc/here/folder"):
        pass
