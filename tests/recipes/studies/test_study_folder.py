"""The folder of a study: one study, of one process, whose definitions stay; a bar over files that others make."""

import logging
import time

import pytest

from microtune.modules.user_error import UserError
from microtune.recipes.studies.study_folder import hashes_of, keep_definitions, opened_folder, watched


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("nothing happened within five seconds")


def test_it_says_how_far_the_work_is(tmp_path, caplog):
    """In the log, where there is no terminal; what was there before is counted, but not timed."""
    caplog.set_level(logging.INFO)
    files = [tmp_path / f"{number}.json" for number in range(4)]
    files[0].touch()
    calls = []
    with watched(files, "searches", lambda: calls.append(sum(file.exists() for file in files)), every_seconds=0.01):
        files[1].touch()
        wait_for(lambda: calls)
        files[2].touch()
        files[3].touch()
        wait_for(lambda: calls[-1] == 4)
    assert caplog.messages[0].startswith("2 of 4 searches, ")
    assert caplog.messages[-1].startswith("4 of 4 searches, 0 s left")
    files[0].unlink()
    time.sleep(0.05)
    assert calls[-1] == 4  # nobody watches any more


def test_it_ends_with_the_block_whatever_happens(tmp_path):
    with pytest.raises(ValueError, match="inside"), watched([tmp_path / "never"], "trainings", every_seconds=60):
        raise ValueError("inside")


def test_folder_is_one_study_of_one_process(tmp_path):
    out_dir, begun = tmp_path / "out", {"seeds": 3, "processes": 1}
    busy = pytest.raises(UserError, match=f"another process is at the study in {out_dir}: wait for it")
    with opened_folder(out_dir, begun), busy, opened_folder(out_dir, begun):
        pass
    with opened_folder(out_dir, begun | {"processes": 2}):
        pass
    other = pytest.raises(UserError, match="was begun with seeds 3, not 4: go on with --config")
    with other, opened_folder(out_dir, begun | {"seeds": 4}):
        pass


def test_definitions_may_be_more_but_not_others(tmp_path):
    keep_definitions(tmp_path, "ways", {"a": {"ratios": (0.5, 1)}})
    keep_definitions(tmp_path, "ways", {"b": {}})
    keep_definitions(tmp_path, "ways", {"a": {"ratios": (0.5, 1)}, "c": 3})
    kept = (tmp_path / "ways.json").read_bytes()
    with pytest.raises(UserError) as refused:
        keep_definitions(tmp_path, "ways", {"d": 1, "b": {"ratio": 1}})
    assert str(refused.value) == (
        f"b is not what it was when the study in {tmp_path} began ({tmp_path}/ways.json), and what was measured with "
        "either does not compare: give another name or --out_dir"
    )
    assert (tmp_path / "ways.json").read_bytes() == kept


def test_hashes_are_of_what_files_hold(tmp_path):
    (tmp_path / "empty").touch()
    found = hashes_of([str(tmp_path / "empty")])
    assert found == {str(tmp_path / "empty"): "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    with pytest.raises(UserError, match=r"nowhere\.npz: cannot read the network: No such file or directory"):
        hashes_of(["nowhere.npz"])
