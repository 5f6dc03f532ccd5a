"""A bar over files that others make: it counts them, and calls whenever there are more."""

import logging
import time

import pytest

from microtune.recipes.studies.watched_files import watched


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
