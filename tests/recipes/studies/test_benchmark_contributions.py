"""The comparison of ways to analyse contributions: the same accuracies in all, and clear about wrong input."""

import json

import pytest

RECIPE = "benchmark_contributions"
SHORT = ("--data", "digits", "--resolution", 32, "--steps", 3, "--rounds", 1)
WAYS = ["kept, one by one", "kept, side by side", "not kept, one by one", "not kept, side by side"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_json_is_all_that_is_printed(command):
    ended = command(RECIPE, *SHORT, "--base_depth", 6, "--json")
    assert ended.status == 0, ended.errors
    report = json.loads(ended.output)
    assert set(report) == {"base_depth", "keeping_seconds", "features_mib", "same_accuracies", "ways"}
    assert report["base_depth"] == 6
    assert report["same_accuracies"] is True
    assert report["features_mib"] > 0
    assert report["keeping_seconds"] > 0
    assert list(report["ways"]) == WAYS
    assert report["ways"]["not kept, one by one"]["speedup"] == 1
    slowest = report["ways"]["not kept, one by one"]["processor_seconds_per_trial"]
    for row in report["ways"].values():  # of one round, a ratio of the two times
        assert row["speedup"] == pytest.approx(slowest / row["processor_seconds_per_trial"])


def test_table(command):
    """Three is the smallest depth that the error for smaller ones advises."""
    ended = command(RECIPE, *SHORT, "--base_depth", 3)
    assert ended.status == 0, ended.errors
    rows = [[cell.strip() for cell in line.split("│")] for line in ended.output.splitlines() if "│" in line]
    assert [row[1] for row in rows] == WAYS
    assert rows[2][3] == "1.00"
    assert "accuracies are the same: yes" in " ".join(ended.output.split())


def test_ways_that_differ_are_told(command, monkeypatch):
    """A way whose last accuracy is another."""

    def accuracies(training, schemes, seed, split="val"):
        return [float(training.features.keep == "none" and len(schemes) > 1)] * len(schemes)

    monkeypatch.setattr("microtune.modules.search.short_training.TrialTraining.accuracies", accuracies)
    ended = command(RECIPE, *SHORT, "--base_depth", 6)
    assert ended.status == 0, ended.errors
    assert "accuracies are the same: NO" in " ".join(ended.output.split())


MISTAKES = {
    "no expanding layer": (
        ("--base_depth", 1),
        "there is no expanding convolution within base depth 1: give 3 or more",
    ),
    "one layer short": (("--base_depth", 2), "there is no expanding convolution within base depth 2: give 3 or more"),
    "no rounds": (("--rounds", 0), "rounds is 0: give 1 or more"),
    "base depth 0": (("--base_depth", 0), "base_depth is 0: give 1 or more"),
    "base depth beyond": (("--base_depth", 99), "depth 99 "),
    "unknown data": (("--data", "mnist"), "data is "),
    "unknown option": (("--epochs", 3), "epochs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_input(mistake, command):
    changes, message = MISTAKES[mistake]
    ended = command(RECIPE, *SHORT, *changes)
    assert (ended.status, ended.output) == (2, ""), ended.errors
    assert ended.errors.startswith(f"{RECIPE}.py: error: ")
    assert ended.errors.count("\n") == 1
    assert message in ended.errors


def test_without_data(command):
    ended = command(RECIPE, "--rounds", 1)
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors == f"{RECIPE}.py: error: trials need data: give --data\n"
