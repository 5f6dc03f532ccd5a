"""Promises of CSV rows: they survive writing and reading, and what is wrong is named with its line."""

import subprocess
import sys
from dataclasses import astuple, dataclass, make_dataclass
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from microtune.modules.csv_rows import read_rows, write_rows
from microtune.modules.user_error import UserError


@dataclass(frozen=True)
class Measurement:
    """A row of every kind of value."""

    name: str
    method: Literal["one", "other"]
    seed: int
    top1: Annotated[float, Field(ge=0, le=1)]
    loss: float | None
    steps: int | None
    trained: bool

    def __post_init__(self):
        if self.name == "nobody":
            raise UserError("name is nobody: give somebody")

    @property
    def key(self):
        return self.name, self.seed


HEADER = "name,method,seed,top1,loss,steps,trained"
LINE = "a,one,0,0.5,,,True"
ROW = Measurement("a", "one", 0, 0.5, None, None, True)

names = st.text(st.characters(exclude_categories=("Cc", "Cs"))).filter(lambda name: name != "nobody")
rows = st.builds(
    Measurement,
    names,
    st.sampled_from(["one", "other"]),
    st.integers(),
    st.floats(0, 1),
    st.none() | st.floats(allow_nan=False),
    st.none() | st.integers(),
    st.booleans(),
)


@given(st.lists(rows, max_size=5, unique_by=lambda row: row.key))
def test_rows_survive_writing_and_reading(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "rows.csv", rows, Measurement)
    assert read_rows(str(folder / "rows.csv"), Measurement) == rows
    write_rows(folder / "again.csv", read_rows(folder / "rows.csv", Measurement), Measurement)
    assert (folder / "again.csv").read_bytes() == (folder / "rows.csv").read_bytes()


def test_written_text(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, [ROW, Measurement('"ä", b', "other", 12, 0.1 + 0.2, 1e-07, 3, False)], Measurement)
    expected = f'{HEADER}\n{LINE}\n"""ä"", b",other,12,0.30000000000000004,1e-07,3,False\n'
    assert path.read_bytes() == expected.encode()
    write_rows(path, [], Measurement)
    assert path.read_bytes() == f"{HEADER}\n".encode()


def test_rows_that_cannot_be_written_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, [ROW], Measurement)
    with pytest.raises(UnicodeEncodeError):
        write_rows(path, [Measurement("\ud800", *astuple(ROW)[1:])], Measurement)
    assert read_rows(path, Measurement) == [ROW]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]


def test_columns_may_be_in_any_order_and_lines_may_be_a_spreadsheets(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbftrained,name,seed,steps,loss,method,top1\r\n\r\nTrue,a,0,,,one,0.5\r\n\r\n")
    assert read_rows(path, Measurement) == [ROW]


def test_columns_that_are_known_only_when_they_are_read(tmp_path):
    scored = make_dataclass(
        "Scored", [(name, float) for name in ("taylor", "fisher")], bases=(Measurement,), frozen=True
    )
    (tmp_path / "rows.csv").write_text(f"{HEADER},taylor,fisher\n{LINE},1.5,-2\n")
    assert read_rows(tmp_path / "rows.csv", scored) == [scored(*astuple(ROW), 1.5, -2.0)]


ARE = f"the columns are {HEADER}"
MISTAKES = {
    "name is nobody": (LINE.replace("a,", "nobody,"), "line 3: name is nobody: give somebody"),
    "method": (LINE.replace("one", "neither"), "line 3: method is 'neither': give one or other"),
    "empty number": (LINE.replace("0.5", ""), "line 3: top1 is '': give a number"),
    "no number": (LINE.replace("0.5", "much"), "line 3: top1 is 'much': give a number"),
    "too low": (LINE.replace("0.5", "-0.5"), "line 3: top1 is '-0.5': give 0 or more"),
    "too high": (LINE.replace("0.5", "79.8"), "line 3: top1 is '79.8': give 1 or less"),
    "nan": (LINE.replace("0.5", "nan"), "line 3: top1 is 'nan': give 1 or less"),
    "empty whole number": (LINE.replace("0,0", ",0"), "line 3: seed is '': give a whole number"),
    "point": (LINE.replace("0,0", "2.0,0"), "line 3: seed is '2.0': give a whole number"),
    "optional number": (LINE.replace(",,,", ",little,,"), "line 3: loss is 'little': give a number"),
    "optional point": (LINE.replace(",,T", ",2.0,T"), "line 3: steps is '2.0': give a whole number"),
    "truth": (LINE.replace("True", "perhaps"), "line 3: trained is 'perhaps': give True or False"),
    "long value": (LINE.replace("0.5", "x" * 999), f"line 3: top1 is '{'x' * 79}: give a number"),
    "cut off": ("a,one,0", "line 3 has 3 fields, not 7, perhaps cut off: mend it"),
    "one more": (f"{LINE},5", "line 3 has 8 fields, not 7, perhaps cut off: mend it"),
    "open quote": ('"a,one', "line 3: not valid CSV, perhaps cut off: unexpected end of data"),
    "doubled": (f"{LINE}\n\n{LINE}", "lines 3 and 5 are both a, 0: keep one"),
    "zeros": ("\0\0", "this is a binary file, not CSV"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_with_their_line(tmp_path, mistake):
    line, message = MISTAKES[mistake]
    path = tmp_path / "rows.csv"
    path.write_text(f"{HEADER}\n\n{line}")
    with pytest.raises(UserError) as error:
        read_rows(path, Measurement, remedy=", or remove the file")
    assert str(error.value) == f"{path}: {message}, or remove the file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"the file is empty: {ARE}"),
        (b"\n\n", f"the file is empty: {ARE}"),
        (b"\xff\xfe\x80", "this is a binary file, not CSV"),
        (HEADER.replace("seed", "sede").encode(), f"line 1: unknown column 'sede': {ARE}"),
        (HEADER.removesuffix(",trained").encode(), f"line 1: column 'trained' is missing: {ARE}"),
        (f"{HEADER},notes".encode(), f"line 1: unknown column 'notes': {ARE}"),
        (f"{HEADER},seed".encode(), f"line 1: column 'seed' stands there twice: {ARE}"),
    ],
)
def test_files_that_are_no_such_rows(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_rows(path, Measurement)
    assert str(error.value) == f"{path}: {message}"


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError) as error:
        read_rows(tmp_path / "nowhere.csv", Measurement)
    assert str(error.value) == f"{tmp_path / 'nowhere.csv'}: the file cannot be read: No such file or directory"
    with pytest.raises(UserError, match=r"the file cannot be read: Is a directory$"):
        read_rows(tmp_path, Measurement)


def test_a_row_is_checked_beside_those_before_it(tmp_path):
    def same_method(row, others):
        for line, other in others.items():
            if other.method != row.method:
                raise UserError(f"method is {row.method}, in line {line} it is {other.method}: give one")

    path = tmp_path / "rows.csv"
    path.write_text(f"{HEADER}\n{LINE}\n{LINE.replace('a,', 'b,')}\n{LINE.replace('a,one', 'c,other')}\n")
    assert len(read_rows(path, Measurement)) == 3
    with pytest.raises(UserError) as error:
        read_rows(path, Measurement, same_method)
    assert str(error.value) == f"{path}: line 4: method is other, in line 2 it is one: give one"


def test_import_is_light():
    code = "import sys, microtune.modules.csv_rows; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
