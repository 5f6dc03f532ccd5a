"""Lines of CSV know their numbers."""

import pytest

from microtune.modules.numbered_lines import numbered_lines
from microtune.modules.user_error import UserError


def test_blank_lines_count_but_are_left_out():
    assert list(numbered_lines('a,b\n\n1,"2,3"\r\n')) == [(1, ["a", "b"]), (3, ["1", "2,3"])]
    assert list(numbered_lines("")) == []


def test_what_is_cut_off_is_said_with_its_line():
    lines = numbered_lines('a,b\n1,"2')
    assert next(lines) == (1, ["a", "b"])
    with pytest.raises(UserError, match=r"^line 2: not valid CSV, perhaps cut off: unexpected end of data$"):
        next(lines)
