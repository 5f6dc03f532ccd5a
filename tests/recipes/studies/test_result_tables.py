"""Tables of results: every cell by hand, and nothing depends on the order of the rows."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtune.recipes.studies.result_rows import (
    BUDGETS,
    CRITERIA,
    DATA,
    METHODS,
    NUMBERS,
    SEEDS,
    Result,
)
from microtune.recipes.studies.result_tables import (
    COLUMNS,
    accuracy_cell,
    accuracy_table,
    difference_cell,
    differences_table,
    full_update,
    how_to_read,
    markdown_table,
    missing_rows,
    missing_selection_rows,
    most_seeds,
    paired_differences,
    results_section,
    search_time_section,
    selection_section,
    selection_table,
    with_best_bold,
)

BASE = Result(
    "cifar10", "fp32", "biases", "extra64", "weight_norm", 0, 0, 0.8, None, 61440.0, 171930.0, 47, 0, 0, 0.05, 1830,
    32, 0.0, 71.5,
)  # fmt: skip
CHOSEN = replace(BASE, way="weight_norm", extra_memory_bytes=61747.0, steps=366, learning_rate=0.006)


def rows_of(top1, **values):
    """A row for each seed."""
    return [replace(BASE, seed=seed, top1=one, **values) for seed, one in enumerate(top1)]


def chosen(top1, **values):
    """A row for each seed."""
    way = f"{values.get('criterion', 'weight_norm')}_{values.get('rechoose_every', 0)}"
    return [replace(CHOSEN, way=way, seed=seed, top1=one, **values) for seed, one in enumerate(top1)]


def all_rows(data="cifar10", seed=0):
    """Every row that there should be, with accuracies at random."""
    top1 = random.Random(seed)
    return [
        replace(BASE, data=data, numbers=numbers, way=method, budget=budget, seed=seed, top1=top1.random())
        for numbers in NUMBERS
        for method in METHODS
        for budget in (("none",) if method == "full" else BUDGETS)
        for seed in SEEDS
    ]


# ---- cells


@pytest.mark.parametrize(
    ("top1", "usual", "cell"),
    [
        ([0.81, 0.82, 0.83], 3, "82.0 ± 1.0"),
        ([0.81, 0.83], 3, "82.0 ± 1.4 (2)"),
        ([0.8149], 3, "81.5 (1)"),
        ([0.8149], 1, "81.5"),
        ([1.0, 1.0, 1.0], 3, "100.0 ± 0.0"),
        ([], 3, "-"),
    ],
)
def test_accuracy_cell(top1, usual, cell):
    assert accuracy_cell(top1, usual) == cell


@pytest.mark.parametrize(
    ("differences", "usual", "cell"),
    [
        # Student's t of 2 degrees is 4.30265: 4.30265 * 1 / sqrt(3) = 2.484
        ([0.01, 0.02, 0.03], 3, "+2.0 [-0.5, 4.5]"),
        ([0.02, 0.03, 0.04], 3, "+3.0 [0.5, 5.5]*"),
        ([-0.02, -0.03, -0.04], 3, "-3.0 [-5.5, -0.5]*"),
        ([0.01, 0.01, 0.01], 3, "+1.0 [1.0, 1.0]*"),
        ([0.0, 0.0, 0.0], 3, "+0.0 [0.0, 0.0]"),
        ([-0.0001, -0.0001, -0.0001], 3, "+0.0 [0.0, 0.0]*"),
        ([0.01, 0.02], 3, "+1.5 [-4.9, 7.9] (2)"),
        ([0.012], 3, "+1.2 (1)"),
        ([0.012, 0.012], 0, "+1.2 [1.2, 1.2]* (2)"),
        ([], 3, "-"),
    ],
)
def test_difference_cell(differences, usual, cell):
    assert difference_cell(differences, usual) == cell


def test_markdown_table():
    assert markdown_table(["method", "top-1"], [["biases", "79.8"]]) == (
        "| method | top-1 |\n| --- | ---: |\n| biases | 79.8 |\n"
    )


def test_best_of_each_column_is_bold_as_it_is_shown():
    lines = [["81.0 ± 0.2", "-", "9.9 (1)"], ["81.0 ± 0.3", "-", "10.0 ± 0.1"], ["80.9 ± 0.1", "-", "-"]]
    assert with_best_bold(lines) == [
        ["**81.0 ± 0.2**", "-", "9.9 (1)"],
        ["**81.0 ± 0.3**", "-", "**10.0 ± 0.1**"],
        ["80.9 ± 0.1", "-", "-"],
    ]


def test_pairs_are_what_both_have():
    some, other = rows_of([0.9, 0.8, 0.7]), rows_of([0.5, 0.6, 0.4])[1:]
    assert paired_differences(reversed(some), other, lambda row: (row.seed,)) == [0.8 - 0.6, 0.7 - 0.4]


# ---- tables


def test_accuracy_table_by_hand():
    rows = rows_of([0.78, 0.79, 0.8]) + rows_of([0.82, 0.82, 0.82], way="sub_tensor")
    rows += rows_of([0.83], way="dynamic", budget="stm32f746")
    assert accuracy_table(rows, 3).splitlines() == [
        "| fp32, top-1 in % | 64 KiB | 100 KiB | 256 KiB | STM32F746 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| last layers | - | - | - | - |",
        "| biases only | 79.0 ± 1.0 | - | - | - |",
        "| evolved, whole layers | - | - | - | - |",
        "| evolved, sub-tensors | **82.0 ± 0.0** | - | - | - |",
        "| from one backward pass | - | - | - | - |",
        "| dynamic channels | - | - | - | **83.0 (1)** |",
    ]


def test_what_is_measured_aside_is_shown_where_it_is():
    rows = rows_of([0.8, 0.8], way="one_pass") + rows_of([0.79, 0.79], way="one_pass_4")
    assert "| the same, multiples of 4 channels | 79.0 ± 0.0 | - | - | - |" in accuracy_table(rows, 2)
    assert "| multiples of 4 minus one pass | -1.0 [-1.0, -1.0]* | - | - | - |" in differences_table(rows, 2)
    assert not any("one_pass_4" in line for line in missing_rows(rows))


def test_full_update_stands_apart_and_is_never_the_best():
    full = rows_of(
        [0.98, 0.99, 1.0], way="full", budget="none", extra_memory_bytes=867021.0, peak_memory_bytes=1040486.0
    )
    rows = rows_of([0.78, 0.79, 0.8]) + full
    assert "99.0" not in accuracy_table(rows, 3)
    assert "**79.0 ± 1.0**" in accuracy_table(rows, 3)
    assert full_update(rows, 3) == (
        "Full update in fp32: 99.0 ± 1.0 %, with 846.7 KiB of extra memory and 1,016.1 KiB at its peak.\n"
    )
    assert full_update(rows_of([0.78]), 3) == ""


def test_differences_table_by_hand():
    rows = rows_of([0.8, 0.8, 0.8]) + rows_of([0.82, 0.83, 0.84], way="sub_tensor")
    rows += rows_of([0.83, 0.82, 0.84], way="layers") + rows_of([0.85], way="one_pass")
    rows += rows_of([0.9, 0.9, 0.9], way="dynamic", budget="extra100")
    assert differences_table(rows, 3).splitlines() == [
        "| fp32, points | 64 KiB | 100 KiB | 256 KiB | STM32F746 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| sub-tensors minus layers | +0.0 [-2.5, 2.5] | - | - | - |",
        "| sub-tensors minus biases | +3.0 [0.5, 5.5]* | - | - | - |",
        "| sub-tensors minus last layers | - | - | - | - |",
        "| one pass minus sub-tensors | +3.0 (1) | - | - | - |",
        "| dynamic minus sub-tensors | - | - | - | - |",
    ]
    assert differences_table(rows_of([0.8, 0.8, 0.8]), 3) == ""


def test_section_says_the_steps_and_keeps_fp32_and_int8_apart():
    rows = rows_of([0.8, 0.8, 0.8]) + rows_of([0.7, 0.7, 0.7], numbers="int8")
    section = results_section(rows)
    assert section.startswith("### CIFAR-10\n\nEvery method was trained for 1,830 steps of batch size 32.\n\n| fp32,")
    fp32, int8 = section.split("| int8, top-1 in % |")
    assert "**80.0 ± 0.0**" in fp32
    assert "**70.0 ± 0.0**" in int8
    assert "int8" not in results_section(rows_of([0.8]))


@pytest.mark.parametrize(
    ("top1", "text"),
    [([0.8], "Top-1 on the test split in %, of one seed;"), ([0.8, 0.7], "mean ± standard deviation of 2 seeds (")],
)
def test_how_to_read_says_how_many_seeds(top1, text):
    assert text in how_to_read(rows_of(top1))


def test_search_time_by_hand():
    one_pass = rows_of([0.8, 0.8], way="one_pass", search_seconds=1.0)
    one_pass += rows_of([0.8, 0.8], way="one_pass", budget="extra100", search_seconds=2.0)
    layers = rows_of([0.79], way="layers", search_seconds=100.0)
    evolved = rows_of([0.81, 0.81], way="sub_tensor", search_seconds=5000.0)
    evolved += rows_of([0.83, 0.83], way="sub_tensor", budget="extra256", search_seconds=6000.0)
    assert search_time_section(one_pass + layers + evolved).splitlines()[-5:] == [
        "| scheme | fp32, seconds | one pass minus this |",
        "| --- | ---: | ---: |",
        "| from one backward pass | 1.5 |  |",
        "| evolved, whole layers | 100 | +1.0 (1) |",
        "| evolved, sub-tensors | 5,500 | -1.0 [-1.0, -1.0]* (2) |",
    ]
    assert search_time_section(rows_of([0.8])) == ""


def test_search_time_of_int8_stands_beside():
    rows = rows_of([0.8], way="one_pass", search_seconds=1.0)
    rows += rows_of([0.7], way="sub_tensor", numbers="int8", search_seconds=9.96)
    assert search_time_section(rows).splitlines()[-5:] == [
        "| scheme | fp32, seconds | one pass minus this | int8, seconds | one pass minus this |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| from one backward pass | 1.0 |  | - |  |",
        "| evolved, whole layers | - | - | - | - |",
        "| evolved, sub-tensors | - | - | 10.0 | - |",
    ]


@pytest.mark.parametrize("seed", range(3))
def test_lines_are_at_most_120_wide(seed):
    texts = [how_to_read(all_rows()), search_time_section(all_rows(seed=seed))]
    top1 = random.Random(seed)
    for data in DATA:
        rows = [replace(row, top1=0.6 + top1.random() / 40) for row in all_rows(data)]
        texts.append(results_section(rows))
    some = [
        row
        for criterion in CRITERIA
        for every in (0, 100)
        for budget in BUDGETS
        for row in chosen([0.8 + top1.random() / 40] * 3, criterion=criterion, rechoose_every=every, budget=budget)
    ]
    texts.append(selection_section(some + [replace(row, data="flowers17") for row in some]))
    assert max(len(line) for text in texts for line in text.splitlines()) <= COLUMNS == 120


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False), st.integers(1, 45))
def test_order_of_rows_does_not_matter(order, count):
    rows = all_rows()[: 2 * count]
    some = [
        row
        for data in ("cifar10", "mswc_arabic")
        for criterion in CRITERIA[:3]
        for row in chosen([0.1 * order.random(), 0.3, 0.7], data=data, criterion=criterion)
    ]
    makers = (results_section, search_time_section, missing_rows, how_to_read)
    expected = [maker(rows) for maker in makers] + [selection_section(some), missing_selection_rows(some)]
    order.shuffle(rows)
    order.shuffle(some)
    found = [maker(rows) for maker in makers] + [selection_section(some), missing_selection_rows(some)]
    assert found == expected


# ---- what is missing


def without(rows, **values):
    return [row for row in rows if any(getattr(row, name) != value for name, value in values.items())]


def of_three():
    """All rows of the data sets beside CIFAR-10 that are missed."""
    return [row for data in ("flowers17", "speech_commands", "mswc_arabic") for row in all_rows(data)]


def test_nothing_is_missing():
    assert missing_rows(all_rows() + of_three()) == []


@pytest.mark.parametrize(
    ("lost", "line"),
    [
        ({"seed": 2, "way": "full", "numbers": "fp32"}, "fp32 full on cifar10, seed 2"),
        ({"way": "full", "numbers": "fp32"}, "fp32 full on cifar10, seeds 0, 1, 2"),
        (
            {"seed": 1, "way": "dynamic", "numbers": "int8", "budget": "stm32f746"},
            "int8 dynamic at stm32f746 on cifar10, seed 1",
        ),
        (
            {"way": "dynamic", "numbers": "int8", "budget": "stm32f746"},
            "int8 dynamic at stm32f746 on cifar10, seeds 0, 1, 2",
        ),
        ({"way": "layers", "numbers": "fp32"}, "fp32 layers on cifar10, all budgets and seeds"),
        ({"numbers": "int8"}, "int8 on cifar10, all rows"),
        ({"data": "cifar10"}, "cifar10, all rows"),
    ],
)
def test_missing_in_words(lost, line):
    assert missing_rows(without(all_rows(), **lost) + of_three()) == [line]


def test_several_are_missing():
    rows = without(without(all_rows(), seed=1, way="biases", budget="extra64"), seed=2, way="biases")
    assert missing_rows(rows)[:4] == [
        "fp32 biases at extra64 on cifar10, seeds 1, 2",
        "fp32 biases at extra100 on cifar10, seed 2",
        "fp32 biases at extra256 on cifar10, seed 2",
        "fp32 biases at stm32f746 on cifar10, seed 2",
    ]
    assert missing_rows(rows)[-3:] == ["flowers17, all rows", "speech_commands, all rows", "mswc_arabic, all rows"]


def test_cifar100_is_missed_only_by_those_who_have_it():
    rows = all_rows() + of_three()
    assert missing_rows([*rows, *without(all_rows("cifar100"), numbers="fp32")]) == ["fp32 on cifar100, all rows"]


def test_missing_in_a_selection():
    rows = chosen([0.8, 0.8, 0.8]) + chosen([0.8, 0.8, 0.8], budget="extra100")
    rows += chosen([0.8], criterion="fisher", rechoose_every=50) + chosen([0.8], data="flowers17")
    assert missing_selection_rows(rows) == [
        "fisher, every 50 steps at extra64 on cifar10, seeds 1, 2",
        "fisher, every 50 steps at extra100 on cifar10, seeds 0, 1, 2",
    ]
    assert missing_selection_rows(chosen([0.8, 0.8])) == missing_selection_rows([]) == []


# ---- choosing channels


def test_selection_table_by_hand():
    rows = chosen([0.8, 0.81, 0.82]) + chosen([0.7, 0.7, 0.7], budget="rp2040")
    rows += chosen([0.83, 0.84, 0.85], criterion="fisher") + chosen([0.7], criterion="random", budget="rp2040")
    rows += chosen([0.81], criterion="loss_decrease", rechoose_every=50)
    rows += chosen([0.6], criterion="weight_norm", rechoose_every=200)
    assert selection_table(rows).splitlines() == [
        "| channels by | 64 KiB | RP2040 | minus weight norm |",
        "| --- | ---: | ---: | ---: |",
        "| weight norm, static | 81.0 ± 1.0 | **70.0 ± 0.0** |  |",
        "| fisher, static | **84.0 ± 1.0** | - | +3.0 [3.0, 3.0]* (3) |",
        "| random, static | - | **70.0 (1)** | +0.0 (1) |",
        "| loss decrease, every 50 steps | 81.0 (1) | - | +1.0 (1) |",
        "| weight norm, every 200 steps | 60.0 (1) | - | -20.0 (1) |",
    ]


def test_selection_without_the_reference_has_no_differences():
    assert selection_table(chosen([0.8], criterion="fisher")).splitlines()[-1] == "| fisher, static | **80.0** | - |"


def test_selection_section_pools_over_data_sets():
    rows = chosen([0.8, 0.8]) + chosen([0.7, 0.7], data="flowers17", steps=10)
    rows += chosen([0.81, 0.81], criterion="taylor") + chosen([0.74, 0.74], data="flowers17", criterion="taylor")
    rows = [replace(row, steps=10) if row.data == "flowers17" else row for row in rows]
    section = selection_section(rows, {"cifar10": "picture.png"})
    first, second, over_all = section.split("minus weight norm |\n")[1:]
    assert "CIFAR-10, 366 steps of batch size 32 for every row:\n" in section
    assert "Flowers-17, 10 steps of batch size 32 for every row:\n" in section
    assert (
        "| taylor, static | **81.0 ± 0.0** | +1.0 [1.0, 1.0]* (2) |\n\n![channel selection: CIFAR-10](picture.png)\n"
        in first
    )
    assert "| taylor, static | **74.0 ± 0.0** | +4.0 [4.0, 4.0]* (2) |" in second
    # four differences of 1, 1, 4 and 4 points: deviation sqrt(3), and Student's t of 3 degrees is 3.18245
    assert "| taylor, static | +2.5 [-0.3, 5.3] (4) |" in over_all
    assert "over all data sets" not in selection_section(chosen([0.8]))
    assert selection_section([]) == ""


def test_most_seeds():
    assert most_seeds(rows_of([0.8, 0.8]) + rows_of([0.8], way="layers")) == 2
