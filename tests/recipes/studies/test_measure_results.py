"""Results and the comparison of criteria: every row is a training within its budget, each done once, and never lost."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from microtune.modules.search.short_training import Choice
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies import measure_results, trial_grid
from microtune.recipes.studies.compare_schemes import Judge
from microtune.recipes.studies.measure_results import budget_by_name, with_room_for_scores
from microtune.recipes.studies.result_rows import METHODS, Result, SelectionResult, load_rows
from microtune.recipes.studies.trial_grid import Cell, best_rates, result, train_cells, train_until_none_diverges
from microtune.recipes.training.memory_figures import scheme_fits
from microtune.recipes.training.networks import describe_network

TINY = {"--steps": 3, "--batch_size": 16, "--seeds": 1, "--base_depth": 8, "--choice_samples": 16, "--logger": "none"}
RESULTS = TINY | {"--numbers": "fp32", "--evaluations": 3, "--rechoose_every": 2, "--budgets": "extra64"}
SELECTION = TINY | {"--rechoose_every": 1, "--budgets": "extra16", "--criteria": "weight_norm,taylor,random"}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def words(options):
    return [word for pair in options.items() for word in pair]


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    """The digits under the name of a data set that tables know."""
    path = tmp_path_factory.mktemp("list") / "data_sets.json"
    digits = {"data": "digits", "weights": "none", "resolution": 32, "learning_rates": [0.05, 0.1]}
    path.write_text(json.dumps({"cifar10": digits}))
    return path


@pytest.fixture(scope="module")
def measured(data_sets, tmp_path_factory):
    """The folder of results by every method."""
    out_dir = tmp_path_factory.mktemp("results") / "run"
    options = {name.removeprefix("--"): value for name, value in RESULTS.items()}
    measure_results.main(data_sets, **options, out_dir=out_dir)
    return out_dir


def test_every_method_has_its_row_within_the_budget(measured):
    rows = load_rows(measured / "results.csv", Result)
    assert [row.method for row in rows] == list(METHODS)
    assert {(row.numbers, row.seed, row.steps, row.batch_size) for row in rows} == {("fp32", 0, 3, 16)}
    assert all(row.extra_memory_bytes <= 64 * 1024 for row in rows if row.method != "full")
    by_method = {row.method: row for row in rows}
    assert by_method["full"].bias_depth == by_method["full"].updated_layers == 51
    assert by_method["biases"].updated_layers == 0 < by_method["biases"].bias_depth
    assert by_method["dynamic"].extra_memory_bytes == by_method["sub_tensor"].extra_memory_bytes
    assert by_method["dynamic"].peak_memory_bytes > by_method["sub_tensor"].peak_memory_bytes  # the scores
    assert by_method["one_pass"].search_seconds > 0 == by_method["last_layers"].search_seconds


def test_evolved_layers_are_whole_and_channels_are_fixed(measured):
    schemes = {
        method: UpdateScheme.load(measured / "schemes" / f"cifar10-extra64-{method}.json")
        for method in ("layers", "sub_tensor", "one_pass", "dynamic")
    }
    assert set(schemes["layers"].weights.values()) <= {1.0}
    for method in ("sub_tensor", "one_pass"):
        scheme = schemes[method]
        assert set(scheme.channels) == {layer for layer, ratio in scheme.weights.items() if ratio < 1}
    assert schemes["dynamic"].weights == schemes["sub_tensor"].weights
    assert not schemes["dynamic"].channels


def test_rates_are_chosen_without_the_test_split(measured):
    """By cells of another seed, which know the validation split alone."""
    cells = [json.loads(path.read_text()) for path in (measured / "cells").iterdir()]
    assert {tuple(cell["top1"]) for cell in cells} == {("val",), ("val", "test")}
    # a sweep of two rates or more for each method, and a training of each
    assert sum("test" not in cell["top1"] for cell in cells) >= 2 * (len(METHODS) - 1)
    # (one fewer where one pass has no other best scheme in multiples of 4)
    assert sum("test" in cell["top1"] for cell in cells) in (len(METHODS) - 1, len(METHODS))


def test_results_go_on_where_they_were_stopped(measured, data_sets, command, tmp_path, monkeypatch):
    """A cell that is lost is trained once more, alone, and comes out the same."""
    folder = tmp_path / "again"
    shutil.copytree(measured, folder)
    rows = load_rows(folder / "results.csv", Result)
    lost = next(path for path in sorted((folder / "cells").iterdir()) if "test" in path.read_text())
    lost.unlink()
    trained, original = [], trial_grid.train_cell
    monkeypatch.setattr(trial_grid, "train_cell", lambda *of: (trained.append(of[1]), original(*of)))
    ended = command("measure_results", "--data_sets", data_sets, *words(RESULTS), "--out_dir", folder)
    assert ended.status == 0
    assert trained == [str(lost)]
    again = load_rows(folder / "results.csv", Result)
    assert [replace(row, train_seconds=0.0) for row in again] == [replace(row, train_seconds=0.0) for row in rows]
    assert f"8 of 8 trainings: {folder / 'results.csv'}" in ended.output


def test_a_search_of_something_else_is_refused(measured, data_sets, command, tmp_path):
    """The list of data sets may have changed since: then its schemes are not those of the results."""
    changed = tmp_path / "data_sets.json"
    changed.write_text(data_sets.read_text().replace('"resolution": 32', '"resolution": 48'))
    folder = tmp_path / "again"
    shutil.copytree(measured, folder)
    config = (folder / "config.yaml").read_text().replace(str(data_sets), str(changed))
    (folder / "config.yaml").write_text(config)
    ended = command("measure_results", "--data_sets", changed, *words(RESULTS), "--out_dir", folder)
    assert ended.status == 2
    assert "has resolution 32, and the list of data sets now says 48: remove that folder" in ended.errors


def test_a_search_that_had_not_begun_begins(tmp_path, monkeypatch):
    """A folder that was made, and nothing in it that says of what: a kill at the wrong moment."""
    (tmp_path / "search" / "metrics").mkdir(parents=True)
    begun = []
    monkeypatch.setattr(measure_results.evolve_update_scheme, "main", lambda **of: begun.append(of))
    assert measure_results.search({}, str(tmp_path / "search")) is None
    assert not (tmp_path / "search").exists()
    assert begun == [{"logger": "none", "out_dir": tmp_path / "search", "resume": False}]


def test_another_comparison_in_the_folder_is_refused(measured, data_sets, command):
    ended = command(
        "measure_results", "--data_sets", data_sets, *words(RESULTS | {"--steps": 4}), "--out_dir", measured
    )
    assert ended.status == 2
    assert f"the work in {measured} was begun with steps 3, not 4" in ended.errors


def test_make_results_renders_what_was_measured(measured, command, tmp_path):
    ended = command(
        "make_results", "--results", measured / "results.csv", "--out_dir", tmp_path / "rendered",
    )  # fmt: skip
    assert ended.status == 0, ended.errors
    assert "evolved, sub-tensors" in (tmp_path / "rendered" / "results.md").read_text()
    assert (tmp_path / "rendered" / "accuracy_over_memory_cifar10.png").exists()


def test_dynamic_schemes_shrink_until_their_scores_fit():
    """A microcontroller's peak has room for the step, the scores and the sums; extra memory leaves these out."""
    described = describe_network("none", (3, 96, 96), 10)
    names = [layer.name for layer in described.operations.convolutions if layer.out_channels > layer.in_channels]
    scheme = UpdateScheme(described.name, 40, dict.fromkeys(names[-9:], 0.9))
    judge = Judge(described, budget_by_name("stm32f746"))
    assert not scheme_fits(judge.peak_memory, scheme, judge.budget.microcontroller, "loss_decrease")
    smaller = with_room_for_scores(scheme, judge)
    assert scheme_fits(judge.peak_memory, smaller, judge.budget.microcontroller, "loss_decrease")
    assert smaller.weights
    assert with_room_for_scores(scheme, Judge(described, budget_by_name("extra64"))) == scheme


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--methods", "full,best", "methods has 'best': give some of full, last_layers, biases"),
        ("--budgets", "extra32", "budgets has 'extra32': give some of extra64, extra100, extra256, stm32f746"),
        ("--numbers", ",", "numbers is empty: give some of fp32, int8"),
        ("--numbers", "int8", "there is no int8_network in the list of data sets: add it, or leave int8 out"),
        ("--seeds", 0, "seeds is 0: give 1 or more"),
        ("--only", "flowers17", "has no data set 'flowers17': it has cifar10"),
    ],
)
def test_wrong_words_for_results(option, value, message, data_sets, refused):
    refused(message, "measure_results", "--data_sets", data_sets, *words(RESULTS | {option: value}))


# ---- the criteria


def test_selection_of_channels(data_sets, command, tmp_path):
    out_dir = tmp_path / "selection"
    options = ["--data_sets", data_sets, *words(SELECTION), "--dynamic", "loss_decrease", "--out_dir", out_dir]
    ended = command("compare_channel_selection", *options)
    assert ended.status == 0, ended.errors
    rows = load_rows(out_dir / "channel_selection.csv", SelectionResult)
    found = [(row.criterion, row.rechoose_every) for row in rows]
    assert found == [("weight_norm", 0), ("taylor", 0), ("random", 0), ("loss_decrease", 1)]
    assert len({row.learning_rate for row in rows}) == len({row.extra_memory_bytes for row in rows}) == 1
    assert (out_dir / "channel_selection_cifar10.png").exists()
    assert f"4 of 4 trainings: {out_dir / 'channel_selection.csv'}" in ended.output
    files = {path: path.stat().st_mtime_ns for path in (out_dir / "cells").iterdir()}
    # one more criterion is one more training
    more = [*options[: options.index("--criteria") + 1], "weight_norm,taylor,random,fisher"]
    more += options[options.index("--criteria") + 2 :]
    assert command("compare_channel_selection", *more).status == 0
    assert len(load_rows(out_dir / "channel_selection.csv", SelectionResult)) == 5
    now = {path: path.stat().st_mtime_ns for path in (out_dir / "cells").iterdir()}
    assert len(now.items() - files.items()) == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--ratio", 1.0, "ratio is 1.0: give more than 0 and less than 1, or there is nothing to choose"),
        ("--criteria", "best", "criteria has 'best': give some of weight_norm, gradient_norm, fisher"),
        ("--dynamic", "best", "dynamic has 'best'"),
        ("--budgets", "extra0.1", "of the channels of the last expanding convolution is more than 0.1 KiB of extra"),
        ("--budgets", "z80", "z80"),
    ],
)
def test_wrong_words_for_the_selection(option, value, message, data_sets, command, here):
    ended = command("compare_channel_selection", "--data_sets", data_sets, *words(SELECTION | {option: value}))
    assert ended.status == 2
    assert message in ended.errors
    assert ended.errors.count("\n") == 1


# ---- the grid


@pytest.fixture
def cell():
    settings = TrialSettings("digits", base_depth=3, steps=2, batch_size=16, resolution=32, features="none")
    scheme = UpdateScheme("mobilenet_v2-w0.35", 1, provenance={"rule": "the last bias"})
    return Cell({"method": "biases"}, settings, scheme.to_dict(), 0, 0.1)


def test_a_cell_is_known_by_what_it_trains(cell):
    """Not by what it is called, how its scheme came about, or where its features lie."""
    same = [
        replace(cell, labels={"method": "layers"}),
        replace(cell, scheme=cell.scheme | {"provenance": {}}),
        replace(cell, settings=replace(cell.settings, features="memory", features_limit_mib=1.0)),
    ]
    others = [
        replace(cell, seed=1),
        replace(cell, learning_rate=0.2),
        replace(cell, choice=Choice("taylor")),
        replace(cell, choice=Choice(rechoose_every=5)),
        replace(cell, splits=("val",)),
        replace(cell, scheme=cell.scheme | {"bias_depth": 2}),
        replace(cell, settings=replace(cell.settings, steps=3)),
    ]
    assert {one.key for one in same} == {cell.key}
    assert len({one.key for one in [cell, *others]}) == 1 + len(others)


def test_equal_cells_are_trained_once(cell, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(trial_grid, "train_cell", lambda cell, path: (trained.append(path), Path(path).touch()))
    cells = [cell, replace(cell, labels={"method": "last_layers"}), replace(cell, seed=1)]
    with Workers(1) as workers:
        train_cells(cells, workers, tmp_path, "trainings")
        train_cells(cells, workers, tmp_path, "trainings")
    assert trained == [str(cells[0].file(tmp_path)), str(cells[2].file(tmp_path))]


def test_the_best_rate_of_a_group_is_that_of_its_first_cell(cell, tmp_path, monkeypatch):
    """By validation accuracy; of equally good ones the smallest; a group whose every cell is lost has none."""
    accuracies = {("biases", 0.1): 0.5, ("biases", 0.2): 0.7, ("biases", 0.4): 0.7, ("layers", 0.1): 0.9}

    def train(cell, path):
        assert (cell.seed, cell.splits) == (7, ("val",))
        found = accuracies.get((cell.labels["method"], cell.learning_rate))
        if found is not None:
            Path(path).write_text(json.dumps({"labels": cell.labels, "top1": {"val": found}, "seconds": 1}))

    monkeypatch.setattr(trial_grid, "train_cell", train)
    layers = replace(cell, labels={"method": "layers"}, scheme=cell.scheme | {"bias_depth": 2})
    lost = replace(cell, labels={"method": "full"}, scheme=cell.scheme | {"bias_depth": 3})
    with Workers(1) as workers:
        rates = best_rates([cell, layers, lost], [0.4, 0.1, 0.2], 7, ["method"], workers, tmp_path)
    assert rates == {("biases",): 0.2, ("layers",): 0.1}
    assert result(cell, tmp_path) is None


@pytest.mark.parametrize(("best", "tried"), [(0.05, [0.025, 0.05, 0.1, 0.2]), (0.4, [0.1, 0.2, 0.4, 0.8])])
def test_rates_are_tried_until_the_best_has_a_worse_one_on_either_side(best, tried, cell, tmp_path, monkeypatch):
    def train(cell, path):
        top1 = 1 - abs(math.log(cell.learning_rate / best)) / 10
        Path(path).write_text(json.dumps({"labels": {}, "top1": {"val": top1}, "seconds": 1}))

    monkeypatch.setattr(trial_grid, "train_cell", train)
    with Workers(1) as workers:
        assert best_rates([cell], [0.1, 0.2], 7, ["method"], workers, tmp_path) == {("biases",): pytest.approx(best)}
    assert len(list((tmp_path / "cells").iterdir())) == len(tried)


def test_what_diverges_is_trained_anew_at_half_the_rate(cell, tmp_path, monkeypatch):
    """All seeds of that budget, and nothing else; by validation accuracy, and not without end."""
    at_budget = {
        budget: [
            replace(
                cell, labels={"method": "layers", "budget": budget}, scheme=cell.scheme | {"bias_depth": depth}, seed=s
            )
            for s in (0, 1)
        ]
        for depth, budget in enumerate(("tight", "loose", "hopeless"), 1)
    }

    def train(cell, path):
        # one seed of the loose budget bears no more than a quarter of the rate, the other all of it
        limits = {"tight": 1.0, "loose": 0.025 if cell.seed else 1.0, "hopeless": 0.0}
        top1 = 0.8 if cell.learning_rate <= limits[cell.labels["budget"]] else 0.1
        Path(path).write_text(json.dumps({"labels": {}, "top1": {"val": top1, "test": 1 - top1}, "seconds": 1}))

    monkeypatch.setattr(trial_grid, "train_cell", train)
    cells = [one for of_budget in at_budget.values() for one in of_budget]
    with Workers(1) as workers:
        trained = train_until_none_diverges(cells, ("method", "budget"), ("method",), workers, tmp_path)
    rates = [cell.learning_rate for cell in trained]
    hopeless = 0.1 / 2**trial_grid.MOST_HALVINGS
    assert rates == pytest.approx([0.1, 0.1, 0.025, 0.025, hopeless, hopeless])
    assert all(result(one, tmp_path) is not None for one in trained)


def test_rates_that_only_ever_rise_end_somewhere(cell, tmp_path, monkeypatch):
    def train(cell, path):
        top1 = 1 - 1 / (1 + cell.learning_rate)
        Path(path).write_text(json.dumps({"labels": {}, "top1": {"val": top1}, "seconds": 1}))

    monkeypatch.setattr(trial_grid, "train_cell", train)
    with Workers(1) as workers:
        rates = best_rates([cell], [0.1, 0.2], 7, ["method"], workers, tmp_path)
    assert rates == {("biases",): pytest.approx(0.1 * 2 ** (trial_grid.MOST_RATES - 1))}
