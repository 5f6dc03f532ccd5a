"""The study of short trainings: every training once, its rows, its figures, and clear errors."""

import json
import re

import pytest
from PIL import Image

from microtune.modules.csv_rows import read_rows
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.studies import seeded_trainings
from microtune.recipes.studies.sampled_schemes import kind_of
from microtune.recipes.studies.trial_figures import TrialRow, best_rates

RECIPE = "benchmark_trials"
TASK = {"data": "digits", "weights": "none", "data_options": {"classes": [0, 1]}, "resolution": 32}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Of a study of some seconds."""
    path = tmp_path_factory.mktemp("tasks") / "data_sets.json"
    path.write_text(
        json.dumps({"ones": TASK | {"learning_rates": [0.1, 0.4]}, "twos": TASK | {"learning_rates": [0.1]}})
    )
    return ("--data_sets", path, "--only", "ones", "--budget", "extra10", "--base_depth", 12, "--steps", "1,3,2",
            "--schemes", 7, "--trial_seeds", 1, "--seeds", 2)  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """The trainings that are really done."""
    done, original = [], seeded_trainings.train_once
    monkeypatch.setattr(seeded_trainings, "train_once", lambda *of: (original(*of), done.append(of[0])))
    return done


def test_study(words, command, trained, tmp_path):
    ended = command(RECIPE, *words, "--out_dir", tmp_path / "out")
    assert ended.status == 0, ended.errors
    rows = read_rows(tmp_path / "out/trials.csv", TrialRow)
    assert len(rows) == len(trained) == 7 * (2 * 2 * 1 + 2)
    assert {(row.steps, row.seed) for row in rows} == {(1, 0), (2, 0), (3, 100), (3, 101)}
    best = best_rates([row for row in rows if row.steps == 2])
    assert {row.scheme: row.learning_rate for row in rows if row.steps == 3} == best
    for name in best:
        (path,) = (tmp_path / "out/schemes").glob(f"*/{name}.json")
        scheme = UpdateScheme.load(path)
        assert scheme.provenance["kind"] == kind_of(name)
        assert {row.bias_depth for row in rows if row.scheme == name} == {scheme.bias_depth}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["ones"]["schemes"], report["ones"]["longest_steps"]) == (7, 3)
    assert "ones: 7 schemes, rank correlation with 3 steps" in ended.output
    assert re.search(r"after 3 steps schemes differ by \d+\.\d\d points", ended.output)

    with Image.open(tmp_path / "out/ones.png") as picture:
        assert (picture.format, min(picture.size) > 300) == ("PNG", True)

    # given again it does nothing anew; it may take up another data set, and keeps the first
    trained.clear()
    assert command(RECIPE, *words, "--out_dir", tmp_path / "out").output == ended.output
    assert trained == []
    assert command(RECIPE, *words, "--only", "twos", "--out_dir", tmp_path / "out").status == 0
    assert read_rows(tmp_path / "out/trials.csv", TrialRow)[: len(rows)] == rows


MISTAKES = {
    "steps": (("--steps", "60"), "steps is 60: give two numbers or more of 1 and up, such as 60,540"),
    "steps 0": (("--steps", "0,60"), "steps is 0,60: give two numbers or more"),
    "no budget": (("--budget", "none"), "schemes are sampled within a budget: give one with --budget, such as extra64"),
    "unknown budget": (("--budget", "z80"), "budget is 'z80': give KiB of extra memory such as extra64"),
    "schemes": (("--schemes", 0), "schemes is 0: give 1 or more"),
    "unknown data set": (("--only", "tens"), "has no data set 'tens': it has ones, twos"),
    "missing list": (("--data_sets", "nowhere.json"), "nowhere.json: cannot read the list of data sets"),
    "too many schemes": (("--schemes", 5000, "--budget", "extra1"), "there are only .* give fewer --schemes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_input(mistake, words, refused):
    changes, message = MISTAKES[mistake]
    refused(message, RECIPE, *words, *changes, "--out_dir", "out")
