"""The benchmark of the search: never above the optimum, never over the budget, and no work done twice."""

import json
import random
import re
import shutil
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.simple_schemes import is_expanding
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.studies import benchmark_search
from microtune.recipes.studies.benchmark_search import made_table
from microtune.recipes.training.command_line import run_recipe
from microtune.recipes.training.networks import describe_network

RECIPE = "benchmark_search"
ALL_BUDGETS_KIB = benchmark_search.EXTRA_BUDGETS_KIB
BUDGETS = ["extra16", "extra64", "nrf52840"]  # two of extra memory are enough
SEARCHES = ["evolution", "random", "random_x4", "blind", "blind_x4"]
TABLE = ("--level", "table", "--seeds", 2, "--evaluations", 100)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def fewer_budgets():
    """Proving an optimum takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_search, "EXTRA_BUDGETS_KIB", (16, 64))
        yield


@pytest.fixture(scope="module")
def described():
    """The network of the measurement."""
    return describe_network("none", (1, 32, 32), 10)


@pytest.fixture(scope="module")
def measurement(described, tmp_path_factory):
    """A folder as ``measure_contributions.py`` writes it, of random gains on digits."""
    draws = random.Random(0)
    rows = [Contribution("bias", depth, "", 0.0, draws.uniform(0, 0.02), 0.0, 1) for depth in (3, 6, 9)]
    rows += [
        Contribution("weight", 9, layer.name, ratio, draws.uniform(0, 0.02), 0.0, 1)
        for layer in described.operations.convolutions[-9:]
        if is_expanding(layer)
        for ratio in (0.25, 1.0)
    ]
    folder = tmp_path_factory.mktemp("measured") / "digits"
    folder.mkdir()
    ContributionTable(tuple(rows)).save(folder / "contributions.csv")
    arguments = {"data": "digits", "resolution": 32, "base_depth": 9, "steps": 5, "seeds": 1, "layers": "expanding"}
    (folder / "config.yaml").write_text(yaml.safe_dump(arguments))
    return folder


def call(*words):
    """Runs the recipe in this process, also for a fixture of the whole module; returns what is in its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{RECIPE}.py", *map(str, words)])
        results = run_recipe(benchmark_search.main)
    return SimpleNamespace(folder=words[words.index("--out_dir") + 1], results=results, words=words)


@pytest.fixture
def jobs_done(monkeypatch):
    """The file names of the jobs that are done from now on."""
    done = []

    def do_job(job, *arguments):
        done.append(job.file_name)
        original(job, *arguments)

    original = benchmark_search.do_job
    monkeypatch.setattr(benchmark_search, "do_job", do_job)
    return done


def kept(folder):
    """What the jobs left."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*_seed*.json")}


def without_seconds(results):
    return [{name: value for name, value in row.items() if name != "processor_seconds"} for row in results]


# ---- by table


@pytest.fixture(scope="module")
def by_table(measurement, tmp_path_factory):
    """A finished benchmark; not to be changed."""
    return call(*TABLE, "--measurements", measurement, "--out_dir", tmp_path_factory.mktemp("table") / "out")


def test_table_results(by_table):
    cells = [(row["measurement"], row["budget"], row["seed"]) for row in by_table.results]
    assert cells == [(name, budget, seed) for name in ("digits", "made") for budget in BUDGETS for seed in (0, 1)]
    assert json.loads((by_table.folder / "table_search.json").read_text()) == by_table.results
    assert len(kept(by_table.folder)) == len(cells)


def test_nothing_beats_the_optimum_or_its_budget(by_table):
    for row in by_table.results:
        assert sorted(row["of_optimum"]) == sorted(SEARCHES)
        assert all(0 < part <= 1 + 1e-9 for part in row["of_optimum"].values())
        assert row["within_budget"] is True
        assert row["optimum_score"] > 0
        assert 0 < row["evaluations"] <= 100
        assert row["processor_seconds"] > 0


def test_more_trials_are_never_worse(by_table):
    for row in by_table.results:
        parts = row["of_optimum"]
        assert parts["random_x4"] >= parts["random"]
        assert parts["blind_x4"] >= parts["blind"]


def test_optimum_is_of_table_and_budget(by_table):
    """Seeds share it, and more memory never makes it worse."""
    for name in ("digits", "made"):
        rows = [row for row in by_table.results if row["measurement"] == name]
        of_budget = {budget: {row["optimum_score"] for row in rows if row["budget"] == budget} for budget in BUDGETS}
        assert all(len(scores) == 1 for scores in of_budget.values())
        scores = [of_budget[budget].pop() for budget in BUDGETS[:2]]
        assert scores == sorted(scores)


def test_seeds_are_others(by_table):
    pairs = list(zip(by_table.results[::2], by_table.results[1::2], strict=True))
    assert any(first["of_optimum"] != second["of_optimum"] for first, second in pairs)


def test_table_pictures_are_png(by_table):
    assert Image.open(by_table.folder / "table_search.png").format == "PNG"


def test_same_command_does_no_work_again(by_table, command, jobs_done):
    before = kept(by_table.folder)
    ended = command(RECIPE, *by_table.words, "--processes", 2)
    assert ended.status == 0, ended.errors
    assert jobs_done == []
    assert kept(by_table.folder) == before
    assert f"results: {by_table.folder / 'table_search.json'} and .png\n" in ended.output
    assert "0 schemes were over their budget" in ended.output


def test_printed_table(by_table, command):
    """Medians and worst of all budgets and seeds, as in the results."""
    ended = command(RECIPE, *by_table.words)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ended.output.splitlines() if "│" in line]
    assert len(rows) == 2 * len(SEARCHES)
    for name, search, count, median, worst in rows:
        key = search + ("_x4" if count == "x 4" else "")
        parts = [row["of_optimum"][key] * 100 for row in by_table.results if row["measurement"] == name]
        assert (median, worst) == (f"{statistics.median(parts):.2f}", f"{min(parts):.2f}")


def test_stopped_benchmark_goes_on(by_table, jobs_done, tmp_path):
    """Only what is missing is done, and it comes out as before."""
    shutil.copytree(by_table.folder, tmp_path / "out")
    missing = ["digits_extra64_seed1.json", "made_extra16_seed0.json"]
    for name in (*missing, "table_search.json", "table_search.png"):
        (tmp_path / "out" / name).unlink()
    resumed = call(*by_table.words[:-1], tmp_path / "out")
    assert jobs_done == missing
    assert without_seconds(resumed.results) == without_seconds(by_table.results)
    assert without_seconds(json.loads((tmp_path / "out/table_search.json").read_text())) == without_seconds(
        by_table.results
    )
    assert Image.open(tmp_path / "out/table_search.png").format == "PNG"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--seeds", 3), "seeds 2, not 3"),
        (("--evaluations", 50), "evaluations 100, not 50"),
    ],
)
def test_other_arguments_are_refused(changes, message, by_table, command, jobs_done):
    before = {path: path.read_bytes() for path in by_table.folder.rglob("*") if path.is_file()}
    ended = command(RECIPE, *by_table.words, *changes)
    config = by_table.folder / "config.yaml"
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors == (
        f"{RECIPE}.py: error: the work in {by_table.folder} was begun with {message}: go on with --config {config} "
        f"--out_dir {by_table.folder}, or give another --out_dir\n"
    )
    assert jobs_done == []
    assert {path: path.read_bytes() for path in by_table.folder.rglob("*") if path.is_file()} == before


def test_a_table_that_gains_nothing(measurement, monkeypatch, tmp_path):
    """The optimum is the classifier alone, of score 0: no part of it can be had."""
    table = ContributionTable.load(measurement / "contributions.csv")
    nothing = tuple(Contribution(**{**vars(row), "gain": -0.01}) for row in table.rows)
    folder = tmp_path / "measured"
    shutil.copytree(measurement, folder)
    ContributionTable(nothing).save(folder / "contributions.csv")
    monkeypatch.setattr(benchmark_search, "EXTRA_BUDGETS_KIB", (16,))
    words = ("--level", "table", "--seeds", 1, "--evaluations", 10, "--measurements", folder)
    found = call(*words, "--out_dir", tmp_path / "out")
    assert all(part <= 1 + 1e-9 for row in found.results for part in row["of_optimum"].values())


# ---- the made table


@pytest.fixture(scope="module")
def photographs():
    """The network of the CIFAR-10 measurement."""
    return describe_network("none", (3, 96, 96), 10)


def test_made_table_is_of_its_network(photographs):
    table = made_table(photographs)
    convolutions = photographs.operations.convolutions
    expanding = [layer.name for layer in convolutions[-36:] if is_expanding(layer)]
    table.check(convolutions, expanding)
    assert table.base_depth == 36
    assert list(table.weight_gains) == expanding
    assert all(tuple(gains) == (0.125, 0.25, 0.5, 1.0) for gains in table.weight_gains.values())
    assert sorted(table.bias_gains) == list(range(37))
    assert made_table(photographs) == table  # the same every time


def test_made_table_is_strongly_correlated(photographs):
    """Bytes and gains go together, so that what is better per byte does not tell much."""
    operations, table = photographs.operations, made_table(photographs)

    def size_bytes(weights):
        scheme = UpdateScheme("", 36, weights)
        return extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme)

    pairs = [
        (size_bytes({layer: ratio}) - size_bytes({}), gain)
        for layer, gains in table.weight_gains.items()
        for ratio, gain in gains.items()
    ]
    assert np.corrcoef(*zip(*pairs, strict=True))[0, 1] > 0.9


def test_greed_goes_wrong_on_the_made_table(photographs):
    table, peak_memory = made_table(photographs), PeakMemory(photographs.operations)
    worst = 1.0
    for kib in ALL_BUDGETS_KIB:
        problem = SearchProblem(photographs.name, peak_memory, table, kib * 1024, "extra")
        greedy = problem.repair((0,) * (1 + len(problem.layers)))
        part = problem.score(greedy) / proven_optimum(problem).score
        assert part <= 1 + 1e-9
        worst = min(worst, part)
        if worst < 0.999:  # one is enough
            break
    assert worst < 0.999


# ---- speed


def test_speed_prints(command, measurement, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ended = command(RECIPE, "--level", "speed", "--evaluations", 50, "--measurements", measurement)
    assert ended.status == 0, ended.errors
    extra, peak = [line for line in ended.output.splitlines() if line.strip()]
    pattern = r"50 genomes repaired and scored within {} KiB of {}: \d+\.\d s on one core"
    assert re.fullmatch(pattern.format(r"64\.0", "extra memory"), extra)
    assert re.fullmatch(pattern.format(r"192\.0", "peak memory of nrf52840"), peak)
    assert list(tmp_path.iterdir()) == []


# ---- two measurements


def test_measurements_of_the_same_name(command, measurement, tmp_path):
    """Results of one must not pass for those of the other."""
    other = tmp_path / measurement.name
    shutil.copytree(measurement, other)
    ended = command(RECIPE, "--measurements", f"{measurement},{other}", "--out_dir", tmp_path / "out")
    assert ended.status == 2
    assert f"two measurements are named {measurement.name}: rename the folder of one" in ended.errors
    assert not (tmp_path / "out").exists()


# ---- wrong input


MISTAKES = {
    "no evaluations": (("--evaluations", 0), "evaluations is 0: give 1 or more"),
    "no seeds": (("--seeds", 0), "seeds is 0: give 1 or more"),
    "no processes": (("--processes", 0), "processes is 0: give 1 or more"),
    "unknown level": (("--level", "luck"), "level is luck: give one of 'table', 'speed'"),
    "evaluations in words": (("--evaluations", "many"), "evaluations is many: give a whole number"),
    "no measurement": (("--measurements", "nowhere"), "nowhere is no folder of measure_contributions.py: it lacks "
                       "contributions.csv"),
    "one of two": (("--measurements", "half,nowhere"), "half is no folder of measure_contributions.py"),
    "no measurement, speed": (("--level", "speed", "--measurements", "half"), "half is no folder of measure_contrib"),
    "none at all": (("--measurements", ","), "measurements"),
    "none at all, speed": (("--level", "speed", "--measurements", ","), "measurements"),
    "damaged configuration": (("--measurements", "damaged"), "damaged"),
    "damaged configuration, speed": (("--level", "speed", "--measurements", "damaged"), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_input(mistake, command, measurement, monkeypatch, tmp_path):
    """One clear line and exit status 2, and nothing is written."""
    changes, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    for name in ("half", "damaged"):
        (tmp_path / name).mkdir()
        shutil.copy(measurement / "contributions.csv", tmp_path / name)
    (tmp_path / "damaged/config.yaml").write_text("")
    ended = command(RECIPE, "--measurements", measurement, *changes, "--out_dir", "out")
    assert (ended.status, ended.output) == (2, ""), ended.errors
    assert ended.errors.startswith(f"{RECIPE}.py: error: ")
    assert ended.errors.count("\n") == 1
    assert message in ended.errors, ended.errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "half"]


def test_a_folder_of_something_else_is_refused(command, measurement, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    ended = command(RECIPE, "--measurements", measurement, "--out_dir", tmp_path)
    assert ended.status == 2
    assert ended.errors == (
        f"{RECIPE}.py: error: {tmp_path} holds thesis.txt, but no config.yaml of this recipe: give another --out_dir\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
