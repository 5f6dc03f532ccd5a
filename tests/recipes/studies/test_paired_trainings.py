"""Trainings side by side: each is done once, goes on where it was stopped, and is kept; differences are paired."""

import csv
import dataclasses
import json
import logging
import statistics
import time

import pytest
from PIL import Image

from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.studies import paired_trainings
from microtune.recipes.studies.paired_trainings import (
    Row,
    Training,
    compare,
    draw_comparison,
    keep_results,
    opened_folder,
    print_report,
    train_once,
)
from microtune.recipes.studies.watched_files import watched

SCHEME = UpdateScheme("mobilenet_v2-w0.35", 12, {"features.16.conv.0.0": 0.5, "features.14.conv.0.0": 1.0})
STUDENT_T_OF_2 = 12.7062  # of two seeds at 95 %, from a printed table

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def trainings(tmp_path):
    """Two seeds of one scheme."""
    SCHEME.save(tmp_path / "scheme.json")
    of_data = {"name": "digits", "data_dir": None, "weights": "none", "resolution": 32}
    of_train = {"scheme": str(tmp_path / "scheme.json"), "epochs": 1}
    return [
        Training("evolved", seed, 16, 0.1, str(tmp_path / f"runs/evolved-seed{seed}"), of_data, of_train)
        for seed in (0, 1)
    ]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def row(scheme, seed, top1, memory=1024):
    return Row(scheme, seed, top1, top1 / 2, memory, 3, 1, 2.0)


# ---- one training


def test_training_has_its_own_arguments(trainings, pretended, tmp_path):
    training = dataclasses.replace(trainings[1], train_arguments=trainings[1].train_arguments | {"mcu": "rp2040"})
    assert train_once(training) is None
    (call,) = pretended.all
    data = call.pop("data")
    assert (data.seed, data.batch_size, data.input_shape) == (1, 16, (1, 32, 32))
    assert call == {
        "weights": "none", "epochs": 1, "batch_size": 16, "seed": 1, "learning_rate": 0.1, "mcu": "rp2040",
        "scheme": str(tmp_path / "scheme.json"), "allow_oversize": True, "logger": "none", "resume": False,
        "out_dir": tmp_path / "runs/evolved-seed1",
    }  # fmt: skip


def test_training_may_start_from_weights_or_an_int8_network(trainings, pretended):
    for arguments in ({"weights": "bright.ckpt"}, {"network": "bright.safetensors"}):
        train_once(dataclasses.replace(trainings[0], train_arguments=trainings[0].train_arguments | arguments))
    assert [(call["weights"], call.get("network")) for call in pretended.all] == [
        ("bright.ckpt", None), ("none", "bright.safetensors"),
    ]  # fmt: skip


def test_training_goes_on_where_it_had_begun_and_else_begins_anew(trainings, pretended, tmp_path):
    for name in ("evolved-seed0", "evolved-seed1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "left").touch()
    (tmp_path / "runs/evolved-seed1/config.yaml").touch()
    assert [train_once(training) for training in trainings] == [None, None]
    assert [call["resume"] for call in pretended.all] == [False, True]
    assert not (tmp_path / "runs/evolved-seed0/left").exists()
    assert (tmp_path / "runs/evolved-seed1/left").exists()


def test_training_that_diverges_says_which_it_is(trainings, pretended):
    def diverges(folder):
        raise UserError("training diverged: start anew")

    pretended.of = diverges
    assert train_once(trainings[1]) == "evolved, seed 1: training diverged: start anew"
    assert not trainings[1].report_file.exists()


def test_other_errors_are_raised(trainings, pretended):
    """They are no user's mistake: a worker shows them whole."""

    def fails(folder):
        raise RuntimeError("a bug")

    pretended.of = fails
    with pytest.raises(RuntimeError, match="a bug"):
        train_once(trainings[0])


def test_trainings_are_quiet(trainings, pretended, capsys, caplog):
    """And the log is as it was afterwards, whatever happened."""
    log = logging.getLogger("microtune.recipes.training.training")
    log.setLevel(logging.INFO)

    def fails(folder):
        print("top-1 on the test split: 50 %")
        log.warning("a scheme updates little")
        log.error("what is wrong is said")
        raise RuntimeError("a bug")

    pretended.of = fails
    with pytest.raises(RuntimeError, match="a bug"):
        train_once(trainings[0])
    log.info("heard again")
    assert capsys.readouterr().out == ""
    assert caplog.messages == ["what is wrong is said", "heard again"]


# ---- what is kept


def test_results_are_written_as_soon_as_they_are_known(trainings, pretended, tmp_path):
    """By the watcher, while others train."""
    files = [training.report_file for training in trainings]
    with watched(files, "trainings", lambda: keep_results(trainings, "extra", tmp_path), every_seconds=0.01):
        train_once(trainings[0])
        for _ in range(200):
            if (tmp_path / "results.csv").exists():
                break
            time.sleep(0.02)
        assert [(row["scheme"], row["seed"], row["top1"]) for row in read(tmp_path / "results.csv")] == [
            ("evolved", "0", "0.5")
        ]


@pytest.mark.parametrize(("memory", "kept"), [("extra", 12 * 1024), ("peak", 12 * 4096)])
def test_row_of_a_training(memory, kept, trainings, pretended, tmp_path):
    """What its report and its scheme say; a training that is not done has none."""
    train_once(trainings[1])
    assert keep_results(trainings, memory, tmp_path) == [Row("evolved", 1, 0.5, 0.25, kept, 12, 2, 1.0)]
    (row,) = read(tmp_path / "results.csv")
    assert row == {
        "scheme": "evolved", "seed": "1", "top1": "0.5", "val_top1": "0.25", "memory_bytes": str(kept),
        "bias_depth": "12", "updated_layers": "2", "seconds": "1.0",
    }  # fmt: skip


def test_row_without_validation(trainings, pretended, tmp_path):
    """Of data without a validation split."""
    train_once(trainings[0])
    report = json.loads(trainings[0].report_file.read_text())
    del report["val_top1"]
    trainings[0].report_file.write_text(json.dumps(report))
    rows = keep_results(trainings, "extra", tmp_path)
    assert rows[0].val_top1 is None
    assert read(tmp_path / "results.csv")[0]["val_top1"] == ""
    (entry,) = compare(rows, ["evolved"])
    assert entry.keys() == {"scheme", "top1", "top1_mean", "top1_std", "memory_bytes_mean", "seconds_mean"}


# ---- the folder


def test_folder_is_one_comparison_of_one_process(tmp_path):
    out_dir, begun = tmp_path / "out", {"seeds": 3, "processes": 1}
    busy = pytest.raises(UserError, match=f"another process is at the comparison in {out_dir}: wait for it")
    with opened_folder(out_dir, begun), busy, opened_folder(out_dir, begun):
        pass
    with opened_folder(out_dir, begun | {"processes": 2}):
        pass
    other = pytest.raises(UserError, match="was begun with seeds 3, not 4: go on with --config")
    with other, opened_folder(out_dir, begun | {"seeds": 4}):
        pass


# ---- statistics


def test_compare_takes_the_seeds_that_both_have():
    rows = [row("a", 0, 0.9), row("a", 1, 0.8), row("a", 2, 0.7)]
    rows += [row("b", 1, 0.5, 100), row("b", 2, 0.6, 300), row("b", 3, 0.0, 200)]
    first, second, third = compare(rows, ["a", "b", "c"])
    assert first == {
        **{"scheme": "a", "top1": {0: 0.9, 1: 0.8, 2: 0.7}, "memory_bytes_mean": 1024, "seconds_mean": 2.0},
        **{"top1_mean": pytest.approx(0.8), "top1_std": pytest.approx(0.1)},
        **{"val_top1_mean": pytest.approx(0.4), "val_top1_std": pytest.approx(0.05)},
    }
    assert second["difference"] == pytest.approx(statistics.mean([0.3, 0.1]))
    assert second["interval"] == pytest.approx((0.2 - STUDENT_T_OF_2 * 0.1, 0.2 + STUDENT_T_OF_2 * 0.1), rel=1e-4)
    assert second["memory_bytes_mean"] == 200
    assert third == {"scheme": "c", "top1": {}}


# ---- what is shown


@pytest.fixture
def report():
    """Of two schemes on two seeds, and of one that is missing."""
    rows = [row("evolved", 0, 0.5), row("evolved", 1, 0.7), row("biases", 0, 0.4, 2048), row("biases", 1, 0.4, 2048)]
    names = ["evolved", "biases", "lost"]
    return {"memory": "peak", "schemes": compare(rows, names), "missing": ["lost, seed 0"], "seconds": 61.4}


def test_picture_leaves_out_what_is_missing(report, tmp_path):
    draw_comparison(report, "digits", tmp_path / "comparison.png")
    with Image.open(tmp_path / "comparison.png") as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)


def test_printed_report(report, tmp_path, capsys):
    print_report(report, tmp_path)
    printed = capsys.readouterr().out
    assert "peak memory, KiB" in printed
    assert "evolved minus this, points" in printed
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line[:1] == "│"]
    half = STUDENT_T_OF_2 * 0.1 * 100
    assert lines == [
        ["evolved", "1.0", "60.00 ± 14.14", "", "", "2"],
        ["biases", "2.0", "40.00 ± 0.00", "+20.00", f"{20 - half:+.2f} to {20 + half:+.2f}", "2"],
        ["lost", "", "missing", "", "", "0"],
    ]
    assert printed.splitlines()[-2:] == [
        "missing: lost, seed 0; the same command tries again",
        f"results: {tmp_path}/results.csv, report: {tmp_path}/report.json, 61 s",
    ]


def test_recipe_is_named_in_weights_and_biases(report, monkeypatch, tmp_path):
    """Nothing is logged but with wandb."""
    made = []
    monkeypatch.setattr(paired_trainings, "make_loggers", lambda *of: made.append(of) or [])
    for logger in ("none", "csv", "wandb"):
        paired_trainings.log_to_wandb(logger, "compare_int8", [], report, tmp_path, {})
    assert made == [("wandb", tmp_path, "compare_int8")]
