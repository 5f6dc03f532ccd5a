"""Rows of results are read as they were written, and a wrong file is refused in words."""

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from microtune.modules.csv_rows import write_rows
from microtune.modules.memory.microcontrollers import KIB, MICROCONTROLLERS
from microtune.modules.sparse_update.channel_importance import Criterion
from microtune.modules.user_error import UserError
from microtune.recipes.studies import result_rows
from microtune.recipes.studies.result_rows import (
    BUDGETS,
    CRITERIA,
    Result,
    SelectionResult,
    budget_name,
    load_rows,
    sorted_budgets,
)

RESULT = Result(
    "cifar10", "fp32", "biases", "extra64", 0, 0.798, None, 61747.5, 171930.0, 47, 0, 0, 0.05, 1830, 32, 0.0, 71.5
)
CHOSEN = SelectionResult("cifar10", "fisher", 50, "extra64", 0, 0.81, 0.8, 61747.0, 366, 32, 0.006, 71.5)
HEADER = (
    "data,numbers,method,budget,seed,top1,val_top1,extra_memory_bytes,peak_memory_bytes,bias_depth,updated_layers,"
    "updated_channels,learning_rate,steps,batch_size,search_seconds,train_seconds"
)
LINE = "cifar10,fp32,biases,extra64,0,0.798,,61747.5,171930,47,0,0,0.05,1830,32,0,71.5"


@pytest.fixture
def file(tmp_path):
    """Writes lines into a file."""

    def write(*lines):
        path = tmp_path / "results.csv"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


def changed(**values):
    """The line with other fields."""
    fields = dict(zip(HEADER.split(","), LINE.split(","), strict=True)) | values
    return ",".join(fields.values())


def test_criteria_are_those_of_channel_importance():
    assert get_args(Criterion) == CRITERIA


def test_budgets_of_results_are_known():
    assert all(budget.startswith("extra") or budget in MICROCONTROLLERS for budget in BUDGETS)


def test_line_is_read(file):
    assert load_rows(file(HEADER, LINE), Result) == [RESULT]


def test_blank_lines_and_a_byte_order_mark_are_no_mistakes(tmp_path):
    (tmp_path / "results.csv").write_text(f"\ufeff{HEADER}\n\n{LINE}\n\n", encoding="utf-8")
    assert load_rows(tmp_path / "results.csv", Result) == [RESULT]


def test_no_rows(file):
    assert load_rows(file(HEADER), Result) == []


@pytest.mark.parametrize("row", [RESULT, CHOSEN])
def test_rows_are_read_as_they_were_saved(row, tmp_path):
    rows = [row, replace(row, seed=1, top1=1 / 3, val_top1=0.1 + 0.2), replace(row, seed=2, val_top1=None)]
    write_rows(tmp_path / "rows.csv", rows, type(row))
    assert load_rows(tmp_path / "rows.csv", type(row)) == rows
    with (tmp_path / "rows.csv").open() as opened:
        assert next(csv.reader(opened)) == list(row.__dataclass_fields__)


@pytest.mark.parametrize(("name", "row_type"), [("results.csv", Result), ("channel_selection.csv", SelectionResult)])
def test_committed_rows_survive(name, row_type, tmp_path):
    rows = load_rows(Path(result_rows.__file__).parents[1] / "results" / name, row_type)
    write_rows(tmp_path / name, rows, row_type)
    assert load_rows(tmp_path / name, row_type) == rows


def test_columns_are_those_promised(tmp_path):
    write_rows(tmp_path / "rows.csv", [], Result)
    assert (tmp_path / "rows.csv").read_text() == f"{HEADER}\n"


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], "the file is empty: the columns are data,numbers"),
        (
            [HEADER.replace("method", "mehtod"), LINE],
            "line 1: unknown column 'mehtod': the columns are",
        ),
        ([HEADER.removesuffix(",train_seconds")], "line 1: column 'train_seconds' is missing: the columns are data"),
        ([f"{HEADER},notes"], "line 1: unknown column 'notes': the columns are data"),
        ([HEADER, LINE.removesuffix(",71.5")], "line 2 has 16 fields, not 17, perhaps cut off: mend it"),
        ([HEADER, changed(data="a b")], "line 2: data is 'a b': give a name of letters, digits and underscores"),
        ([HEADER, changed(numbers="fp16")], "line 2: numbers is 'fp16': give fp32 or int8"),
        ([HEADER, changed(method="bias")], "line 2: method is 'bias': give full or last_layers or"),
        ([HEADER, changed(budget="none")], "line 2: budget is 'none': give extra64 or extra100 or"),
        ([HEADER, changed(method="full")], "line 2: budget is 'extra64': give none"),
        ([HEADER, changed(seed="0.5")], "line 2: seed is '0.5': give a whole number"),
        ([HEADER, changed(seed="-1")], "line 2: seed is -1: give 0 or more"),
        ([HEADER, changed(top1="")], "line 2: top1 is '': give a number"),
        ([HEADER, changed(top1="79.8")], "line 2: top1 is 79.8: give a fraction from 0 to 1"),
        ([HEADER, changed(top1="nan")], "line 2: top1 is nan: give a fraction from 0 to 1"),
        ([HEADER, changed(val_top1="-0.1")], "line 2: val_top1 is -0.1: give a fraction from 0 to 1"),
        ([HEADER, changed(peak_memory_bytes="inf")], "line 2: peak_memory_bytes is inf: give 0 or more"),
        ([HEADER, changed(bias_depth="-1")], "line 2: bias_depth is -1: give 0 or more"),
        ([HEADER, changed(updated_layers="-1")], "line 2: updated_layers is -1: give 0 or more"),
        ([HEADER, changed(updated_channels="-1")], "line 2: updated_channels is -1: give 0 or more"),
        ([HEADER, changed(learning_rate="0")], "line 2: learning_rate is 0.0: give a positive number"),
        ([HEADER, changed(steps="0")], "line 2: steps is 0: give 1 or more"),
        ([HEADER, changed(batch_size="0")], "line 2: batch_size is 0: give 1 or more"),
        ([HEADER, changed(search_seconds="-1")], "line 2: search_seconds is -1.0: give 0 or more"),
        ([HEADER, changed(train_seconds="-1")], "line 2: train_seconds is -1.0: give 0 or more"),
        (
            [HEADER, changed(extra_memory_bytes="65537")],
            "line 2: extra_memory_bytes is 65537, but the budget extra64 is 65536: give a row that is within it",
        ),
        (
            [HEADER, changed(budget="stm32f746", peak_memory_bytes="294913")],
            "line 2: peak_memory_bytes is 294913, but the budget stm32f746 is 294912: give a row that is within it",
        ),
        (
            [HEADER, LINE, changed(seed="1"), changed(top1="0.9")],
            "lines 2 and 4 are both cifar10, fp32, biases, extra64, 0: keep one",
        ),
        (
            [HEADER, LINE, changed(data="flowers17", steps="7"), changed(numbers="int8", steps="1831")],
            "line 4: cifar10 was trained for 1831 steps of 32 samples, in line 2 for 1830 of 32: give every method the "
            "same budget of steps",
        ),
        ([HEADER, LINE, changed(seed="1", batch_size="8")], "line 3: cifar10 was trained for 1830 steps of 8 samples"),
        ([HEADER, f'"{LINE}'], "line 2: not valid CSV, perhaps cut off: unexpected end of data"),
        ([HEADER, "\0"], "this is a binary file, not CSV"),
    ],
)
def test_mistakes(lines, error, file):
    path = file(*lines)
    with pytest.raises(UserError) as caught:
        load_rows(path, Result)
    assert str(caught.value).startswith(f"{path}: {error}")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.csv: the file cannot be read: No such file or directory"):
        load_rows(tmp_path / "nowhere.csv", Result)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match=r"binary.csv: this is a binary file, not CSV"):
        load_rows(tmp_path / "binary.csv", Result)


def test_memory_may_be_all_of_a_budget():
    assert replace(RESULT, extra_memory_bytes=64 * KIB).extra_memory_bytes == 65536
    # the budget of extra memory says nothing of the peak, and the other way round
    assert replace(RESULT, peak_memory_bytes=1e9).peak_memory_bytes == 1e9
    assert replace(RESULT, budget="stm32f746", extra_memory_bytes=1e9, peak_memory_bytes=288 * KIB)
    assert replace(RESULT, method="full", budget="none", extra_memory_bytes=1e9, peak_memory_bytes=1e9)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"criterion": "magnitude"}, "criterion is 'magnitude': give weight_norm or gradient_norm or"),
        ({"rechoose_every": -1}, "rechoose_every is -1: give 0 or more"),
        ({"budget": "extra"}, "budget is 'extra': give one such as extra64, or one of stm32f746, "),
        ({"budget": "extra0"}, "budget is 'extra0': give one such as extra64"),
        ({"budget": "none"}, "budget is 'none': give one such as extra64"),
        ({"data": ""}, "data is '': give a name of letters, digits and underscores"),
        ({"top1": 81}, "top1 is 81: give a fraction"),
        ({"seconds": math.nan}, "seconds is nan: give 0 or more"),
        ({"extra_memory_bytes": 65537}, "extra_memory_bytes is 65537, but the budget extra64 is 65536"),
    ],
)
def test_mistakes_in_a_selection(change, error):
    with pytest.raises(UserError) as caught:
        replace(CHOSEN, **change)
    assert str(caught.value).startswith(error)


def test_budgets_in_words_and_in_order():
    assert [budget_name(budget) for budget in BUDGETS] == ["64 KiB", "100 KiB", "256 KiB", "STM32F746"]
    assert sorted_budgets(["rp2040", "extra100", "stm32f746", "extra64", "extra100", "nrf52840"]) == [
        "extra64", "extra100", "nrf52840", "rp2040", "stm32f746",
    ]  # fmt: skip
