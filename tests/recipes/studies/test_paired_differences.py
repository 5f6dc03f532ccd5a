"""What a study says at its end: differences are paired over seeds, and what is missing is left out."""

import statistics
from dataclasses import replace

import pytest
from PIL import Image

from microtune.recipes.studies import paired_differences
from microtune.recipes.studies.paired_differences import (
    compare,
    compare_all,
    draw_comparisons,
    print_report,
    title_of_comparison,
)
from microtune.recipes.studies.result_rows import Result

STUDENT_T_OF_2 = 12.7062  # of two seeds at 95 %, from a printed table


def row(way, seed, top1, extra=1024.0, numbers="fp32", budget="extra64", data="cifar10"):
    criterion = ("weight_norm", 0)
    return Result(
        data, numbers, way, budget, *criterion, seed, top1, top1 / 2, extra, 4 * extra, 3, 1, 9, 0.1, 5, 8, 0.0, 2.0
    )


ROWS = [row("evolved", 0, 0.5), row("evolved", 1, 0.7), row("biases", 0, 0.4, 2048.0), row("biases", 1, 0.4, 2048.0)]
WAYS = [("evolved", "fp32"), ("biases", "fp32"), ("lost", "fp32")]


def test_compare_takes_the_seeds_that_both_have():
    rows = [row("a", 0, 0.9), row("a", 1, 0.8), row("a", 2, 0.7)]
    rows += [row("b", 1, 0.5, 100.0), row("b", 2, 0.6, 300.0), row("b", 3, 0.0, 200.0)]
    first, second, third = compare(rows, [("a", "fp32"), ("b", "fp32"), ("c", "fp32")], "extra")
    assert first == {
        **{"way": "a", "numbers": "fp32", "top1": {0: 0.9, 1: 0.8, 2: 0.7}},
        **{"extra_memory_bytes_mean": 1024, "train_seconds_mean": 2.0},
        **{"top1_mean": pytest.approx(0.8), "top1_std": pytest.approx(0.1)},
        **{"val_top1_mean": pytest.approx(0.4), "val_top1_std": pytest.approx(0.05)},
    }
    assert second["difference"] == pytest.approx(statistics.mean([0.3, 0.1]))
    assert second["interval"] == pytest.approx((0.2 - STUDENT_T_OF_2 * 0.1, 0.2 + STUDENT_T_OF_2 * 0.1), rel=1e-4)
    assert second["extra_memory_bytes_mean"] == 200
    assert third == {"way": "c", "numbers": "fp32", "top1": {}}


def test_the_first_way_is_that_in_the_same_numbers_where_it_has_these():
    rows = [row("a", 0, 0.9), row("a", 0, 0.8, numbers="int8"), row("b", 0, 0.6), row("b", 0, 0.6, numbers="int8")]
    ways = [("a", "fp32"), ("a", "int8"), ("b", "fp32"), ("b", "int8")]
    differences = [entry.get("difference") for entry in compare(rows, ways, "peak")]
    assert differences == [None, None, pytest.approx(0.3), pytest.approx(0.2)]
    # else it is the first of all: int8 against floating point
    of_int8 = compare([rows[0], rows[3]], [("a", "fp32"), ("b", "int8")], "peak")
    assert of_int8[1]["difference"] == pytest.approx(0.3)


def test_every_data_set_and_budget_is_compared_with_what_has_no_budget():
    rows = [*ROWS, row("evolved", 0, 0.9, budget="stm32f746"), row("full", 0, 0.6, budget="none")]
    rows += [row("evolved", 0, 0.3, data="flowers17")]
    found = compare_all(rows, [*WAYS, ("full", "fp32")])
    assert [(one["data"], one["budget"], one["memory"]) for one in found] == [
        ("cifar10", "extra64", "extra"), ("cifar10", "stm32f746", "peak"), ("flowers17", "extra64", "extra"),
    ]  # fmt: skip
    assert [entry["top1"] for entry in found[1]["ways"]] == [{0: 0.9}, {}, {}, {0: 0.6}]
    assert found[0]["ways"][3]["difference"] == pytest.approx(0.5 - 0.6)
    # of trainings without any budget the peak is told
    alone = compare_all([row("full", 0, 0.6, budget="none")], [("full", "fp32")])
    assert [(one["budget"], one["memory"]) for one in alone] == [("none", "peak")]


def test_accuracy_without_validation():
    (entry,) = compare([replace(ROWS[0], val_top1=None)], WAYS[:1], "extra")
    assert "val_top1_mean" not in entry
    assert entry["top1_std"] is None


@pytest.mark.parametrize(
    ("budget", "title"),
    [
        ("none", "CIFAR-10"),
        ("extra64", "CIFAR-10 within 64 KiB of extra memory"),
        ("peak200", "CIFAR-10 within 200 KiB at the peak"),
        ("stm32f746", "CIFAR-10 within the memory of STM32F746"),
    ],
)
def test_titles(budget, title):
    assert title_of_comparison({"data": "cifar10", "budget": budget}) == title


# ---- what is shown


@pytest.fixture
def report():
    """Of two ways on two seeds, and of one that is missing."""
    return {"comparisons": compare_all(ROWS, WAYS), "missing": ["lost in fp32, seed 0: diverged"], "seconds": 61.4}


def test_picture_has_a_panel_for_each_comparison_and_leaves_out_what_is_missing(report, tmp_path):
    draw_comparisons(report["comparisons"], tmp_path / "one.png")
    draw_comparisons(report["comparisons"] * 2, tmp_path / "two.png")
    heights = []
    for name in ("one.png", "two.png"):
        with Image.open(tmp_path / name) as image:
            assert (image.format, min(image.size) > 300) == ("PNG", True)
            heights.append(image.size[1])
    assert heights[1] == 2 * heights[0]


def test_printed_report(report, tmp_path, capsys):
    print_report(report, tmp_path)
    printed = capsys.readouterr().out
    assert "Top-1 on the test split: CIFAR-10 within 64 KiB of extra memory" in printed
    assert "extra memory, KiB" in printed
    assert "evolved minus this, points" in printed
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line[:1] == "│"]
    half = STUDENT_T_OF_2 * 0.1 * 100
    assert lines == [
        ["evolved", "1.0", "60.00 ± 14.14", "", "", "2"],
        ["biases", "2.0", "40.00 ± 0.00", "+20.00", f"{20 - half:+.2f} to {20 + half:+.2f}", "2"],
        ["lost", "", "missing", "", "", "0"],
    ]
    assert printed.splitlines()[-2:] == [
        "missing: lost in fp32, seed 0: diverged",
        f"results: {tmp_path}/results.csv, report: {tmp_path}/report.json, 61 s",
    ]


def test_nothing_is_logged_but_with_wandb(report, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr("microtune.recipes.training.loggers.make_loggers", lambda *of: made.append(of) or [])
    for logger in ("none", "csv", "wandb"):
        paired_differences.log_to_wandb(logger, [], report, tmp_path, {})
    assert made == [("wandb", tmp_path, "compare_trainings")]
