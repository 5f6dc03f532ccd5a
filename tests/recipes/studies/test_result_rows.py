"""Rows of results are read as they were written, and a value that cannot be is refused with its line."""

import csv
from dataclasses import replace
from typing import get_args

import pytest

from microtune.modules.csv_rows import read_rows, write_rows
from microtune.modules.memory.microcontrollers import KIB, MICROCONTROLLERS
from microtune.modules.sparse_update.channel_importance import Criterion
from microtune.modules.user_error import UserError
from microtune.recipes.studies.result_rows import (
    BUDGETS,
    CRITERIA,
    Result,
    budget_name,
    memory_and_kib,
    sorted_budgets,
)

RESULT = Result(
    "cifar10", "fp32", "biases", "extra64", "weight_norm", 0, 0, 0.798, None, 61747.5, 171930.0, 47, 0, 0, 0.05, 1830,
    32, 0.0, 71.5,
)  # fmt: skip
HEADER = (
    "data,numbers,way,budget,criterion,rechoose_every,seed,top1,val_top1,extra_memory_bytes,peak_memory_bytes,"
    "bias_depth,updated_layers,updated_channels,learning_rate,steps,batch_size,search_seconds,train_seconds"
)
LINE = "cifar10,fp32,biases,extra64,weight_norm,0,0,0.798,,61747.5,171930,47,0,0,0.05,1830,32,0,71.5"


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


def test_line_is_read(file):
    assert read_rows(file(HEADER, LINE), Result) == [RESULT]


def test_rows_are_read_as_they_were_saved(tmp_path):
    rows = [RESULT, replace(RESULT, seed=1, top1=1 / 3, val_top1=0.1 + 0.2), replace(RESULT, numbers="int8")]
    write_rows(tmp_path / "rows.csv", rows, Result)
    assert read_rows(tmp_path / "rows.csv", Result) == rows
    with (tmp_path / "rows.csv").open() as opened:
        assert next(csv.reader(opened)) == HEADER.split(",")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"data": "a b"}, "data is 'a b'"),
        ({"numbers": "fp16"}, "numbers is 'fp16': give fp32 or int8"),
        ({"way": "my-way"}, "way is 'my-way'"),
        ({"budget": "best"}, "budget is 'best': give KiB of extra memory such as extra64 or of peak memory such as"),
        ({"criterion": "magnitude"}, "criterion is 'magnitude': give weight_norm, gradient_norm, fisher"),
        ({"rechoose_every": "-1"}, "rechoose_every is '-1': give 0 or more"),
        ({"seed": "0.5"}, "seed is '0.5': give a whole number"),
        ({"seed": "-1"}, "seed is '-1': give 0 or more"),
        ({"top1": ""}, "top1 is '': give a number"),
        ({"top1": "79.8"}, "top1 is '79.8': give 1 or less"),
        ({"top1": "nan"}, "top1 is 'nan'"),
        ({"val_top1": "-0.1"}, "val_top1 is '-0.1': give 0 or more"),
        ({"peak_memory_bytes": "inf"}, "peak_memory_bytes is 'inf': give a finite number"),
        ({"extra_memory_bytes": "-1"}, "extra_memory_bytes is '-1': give 0 or more"),
        ({"bias_depth": "-1"}, "bias_depth is '-1': give 0 or more"),
        ({"updated_layers": "-1"}, "updated_layers is '-1': give 0 or more"),
        ({"updated_channels": "-1"}, "updated_channels is '-1': give 0 or more"),
        ({"learning_rate": "0"}, "learning_rate is '0': give a number above 0"),
        ({"steps": "0"}, "steps is '0': give 1 or more"),
        ({"batch_size": "0"}, "batch_size is '0': give 1 or more"),
        ({"search_seconds": "-1"}, "search_seconds is '-1': give 0 or more"),
        ({"train_seconds": "nan"}, "train_seconds is 'nan'"),
        (
            {"extra_memory_bytes": "65537"},
            "extra_memory_bytes is 65537, but the budget extra64 is 65536: give a row that is within it",
        ),
        (
            {"budget": "stm32f746", "peak_memory_bytes": "294913"},
            "peak_memory_bytes is 294913, but the budget stm32f746 is 294912: give a row that is within it",
        ),
        (
            {"budget": "peak1"},
            "peak_memory_bytes is 171930, but the budget peak1 is 1024: give a row that is within it",
        ),
    ],
)
def test_mistakes(values, error, file):
    path = file(HEADER, LINE.replace("cifar10", "other"), changed(**values))
    with pytest.raises(UserError) as caught:
        read_rows(path, Result)
    assert str(caught.value).startswith(f"{path}: line 3: {error}")


def test_a_row_stands_there_once(file):
    with pytest.raises(UserError, match="lines 2 and 4 are both cifar10, fp32, biases, extra64, 0: keep one"):
        read_rows(file(HEADER, LINE, changed(seed="1"), changed(top1="0.9", criterion="taylor")), Result)


def test_memory_may_be_all_of_a_budget():
    assert replace(RESULT, extra_memory_bytes=64 * KIB).extra_memory_bytes == 65536
    # the budget of extra memory says nothing of the peak, and the other way round
    assert replace(RESULT, peak_memory_bytes=1e9).peak_memory_bytes == 1e9
    assert replace(RESULT, budget="stm32f746", extra_memory_bytes=1e9, peak_memory_bytes=288 * KIB)
    assert replace(RESULT, budget="peak168", extra_memory_bytes=1e9)
    assert replace(RESULT, budget="none", extra_memory_bytes=1e9, peak_memory_bytes=1e9)


def test_budgets_are_known():
    assert [memory_and_kib(one) for one in ("extra64", "peak2.5", "none", "stm32f746")] == [
        ("extra", 64), ("peak", 2.5), ("peak", None), ("peak", 288),
    ]  # fmt: skip
    assert all(budget.startswith("extra") or budget in MICROCONTROLLERS for budget in BUDGETS)
    for wrong in ("extra", "extra0", "-1", "peak1e3", "z80", ""):
        with pytest.raises(UserError, match=f"budget is '{wrong}': give KiB of extra memory such as extra64"):
            memory_and_kib(wrong)


def test_budgets_in_words_and_in_order():
    assert [budget_name(budget) for budget in BUDGETS] == ["64 KiB", "100 KiB", "256 KiB", "STM32F746"]
    assert budget_name("peak200") == "200 KiB at the peak"
    assert sorted_budgets(["rp2040", "extra100", "stm32f746", "extra64", "extra100", "nrf52840"]) == [
        "extra64", "extra100", "nrf52840", "rp2040", "stm32f746",
    ]  # fmt: skip
