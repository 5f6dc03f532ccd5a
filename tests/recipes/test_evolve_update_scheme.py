"""The search for a scheme: within its budget, as good as the optimum, reproducible and resumed to the bit."""

import hashlib
import json
import math
import multiprocessing
import random
import re
import shlex
import shutil
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from PIL import Image
from scipy.stats import spearmanr
from torch import nn

from microtune.datamodules.digits import Digits
from microtune.modules.int8.files import write_quantized_network
from microtune.modules.memory.microcontrollers import MICROCONTROLLERS
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.gradient_contributions import gradient_table
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.channel_choice import highest_channels
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.evolve_update_scheme import main
from microtune.recipes.search.gradient_search import measure_gradient
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.trials import fitness as trained_fitness
from microtune.recipes.search.workers import Workers
from microtune.recipes.training.command_line import run_recipe
from microtune.recipes.training.memory_figures import scheme_fits
from microtune.recipes.training.networks import describe_network

RECIPE = "evolve_update_scheme"
MEASURED = Path(__file__).parents[2] / "recipes/contributions/mobilenet_v2-w0.35_cifar10/contributions.csv"
CONTRACT = (
    *("--network", "mobilenet_v2", "--width", 0.35, "--resolution", 128, "--contributions", MEASURED),
    *("--fitness", "table", "--seed", 0, "--evaluations", 400, "--finalists", 0, "--logger", "none"),
)
BUDGETS = {"extra": ("--memory", "extra", "--budget_kib", 100), "peak": ("--mcu", "stm32f746")}
BUDGET_BYTES = {"extra": 100 * 1024, "peak": 288 * 1024}
SMALL_BUDGET = 30 * 1024
GRADIENT_DEPTH = 12
WITH_GRADIENT = ("--contributions", "gradient", "--data", "digits")
IMPORTED_BY_NEED = ("microtune.recipes.training.pretrained", "microtune.datamodules.digits", "scipy.optimize")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def forking():
    """Processes that have imported everything: of those that are killed, and of workers. It takes long."""
    forkserver.set_forkserver_preload(["microtune.recipes.evolve_update_scheme", *IMPORTED_BY_NEED])
    forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def call(*words, with_picture=False):
    """Runs the recipe in this process, also for a fixture of the whole module; returns what is in its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{RECIPE}.py", *map(str, words)])
        if not with_picture:
            patch.setattr("microtune.recipes.search.run.draw_search", lambda *_: None)
        run_recipe(main)
    return found_in(words[words.index("--out_dir") + 1])


def found_in(out_dir):
    report = json.loads((out_dir / "report.json").read_text())
    searched = out_dir / "search.json"  # none where the scheme was computed
    state = json.loads(searched.read_text()) if searched.exists() else {"fitness": [], "history": []}
    return SimpleNamespace(
        folder=out_dir,
        report=report,
        without_seconds={name: value for name, value in report.items() if name != "seconds"},
        scheme=UpdateScheme.load(out_dir / "scheme.json"),
        fitness=[[*genome, known[-1]] for genome, known in state["fitness"]],
        history=state["history"],
    )


def chosen(scheme):
    return scheme.bias_depth, scheme.weights


def table_score(table, scheme):
    gains = [table.weight_gains[layer][ratio] for layer, ratio in scheme.weights.items()]
    return table.bias_gains[scheme.bias_depth] + sum(gains)


def memory_bytes(memory, described, scheme):
    operations = described.operations
    if memory == "extra":
        return extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme)
    return PeakMemory(operations).peak_bytes(scheme)


@pytest.fixture(scope="module")
def small(small_table):
    """The words of a search of half a second."""
    return (
        *("--network", "mobilenet_v2", "--width", 0.35, "--resolution", 32, "--contributions", small_table),
        *("--memory", "extra", "--budget_kib", SMALL_BUDGET // 1024, "--finalists", 0, "--logger", "none"),
    )


# ---- the contract


@pytest.fixture(scope="module", params=BUDGETS)
def contract(request, tmp_path_factory):
    """A finished search by the measured table, with its kind of memory."""
    out_dir = tmp_path_factory.mktemp("contract") / "out"
    found = call(*CONTRACT, *BUDGETS[request.param], "--out_dir", out_dir, with_picture=True)
    found.memory = request.param
    found.described = describe_network("none", (3, 128, 128), 10)
    return found


def test_report(contract):
    names = {"score", "optimum_score", "random_score", "evaluations", "memory_bytes", "budget_bytes", "seconds"}
    assert names <= set(contract.report)
    assert contract.report["budget_bytes"] == BUDGET_BYTES[contract.memory]
    assert 0 < contract.report["seconds"] < 120
    assert contract.report["memory"] == contract.memory
    assert contract.report["mcu"] == (None if contract.memory == "extra" else "stm32f746")


def test_scheme_is_for_the_network_and_within_the_budget(contract):
    scheme = contract.described.load_scheme(contract.folder / "scheme.json")
    assert scheme.weights
    needed = memory_bytes(contract.memory, contract.described, scheme)
    assert contract.report["memory_bytes"] == needed <= BUDGET_BYTES[contract.memory]
    if contract.memory == "peak":
        peak_memory = PeakMemory(contract.described.operations)
        assert scheme_fits(peak_memory, scheme, MICROCONTROLLERS["stm32f746"])


def test_scheme_is_as_good_as_the_optimum(contract):
    report = contract.report
    assert report["score"] == pytest.approx(table_score(ContributionTable.load(MEASURED), contract.scheme))
    assert 0.995 * report["optimum_score"] <= report["score"] <= report["optimum_score"] + 1e-12
    assert 0 < report["random_blind_score"] <= report["random_score"] <= report["optimum_score"] + 1e-12
    assert report["best_fitness"] == report["score"]


def test_optimum_is_a_scheme_too(contract):
    optimum = contract.described.load_scheme(contract.folder / "optimum.json")
    score = table_score(ContributionTable.load(MEASURED), optimum)
    assert contract.report["optimum_score"] == pytest.approx(score)
    assert memory_bytes(contract.memory, contract.described, optimum) <= BUDGET_BYTES[contract.memory]


def test_evaluations_are_no_more_than_asked_and_each_another(contract):
    genomes = [tuple(genome) for *genome, _ in contract.fitness]
    assert contract.report["evaluations"] == len(genomes) == len(set(genomes)) == 400
    assert contract.report["lost_evaluations"] == 0


def test_history_holds_every_generation(contract):
    history = contract.history
    assert [row["generation"] for row in history] == list(range(1, 11))  # of 40 each
    assert [row["evaluations"] for row in history] == list(range(40, 401, 40))
    best = [row["best"] for row in history]
    assert best == sorted(best)
    assert best[-1] == contract.report["score"]
    assert history[-1]["memory_bytes"] == contract.report["memory_bytes"]
    assert all(row["mean"] <= row["best"] and row["spread"] >= 0 for row in history)


def test_picture(contract):
    with Image.open(contract.folder / "search.png") as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)


def test_provenance_says_how_to_get_the_scheme_again(contract, tmp_path):
    provenance = contract.scheme.provenance
    assert provenance["contributions_sha256"] == hashlib.sha256(MEASURED.read_bytes()).hexdigest()
    assert provenance["budget_bytes"] == BUDGET_BYTES[contract.memory]
    assert (provenance["memory"], provenance["mcu"]) == (contract.memory, contract.report["mcu"])
    assert provenance["found"]["score"] == contract.report["score"]
    uv, verb, recipe, *words = shlex.split(provenance["command"])
    assert (uv, verb, recipe) == ("uv", "run", f"recipes/{RECIPE}.py")
    again = call(*words, "--logger", "none", "--out_dir", tmp_path / "again")
    assert chosen(again.scheme) == chosen(contract.scheme)
    assert again.without_seconds == contract.without_seconds
    assert again.fitness == contract.fitness


def test_output_tells_the_scheme_and_where_it_is(command, small, tmp_path):
    ended = command(RECIPE, *small, "--evaluations", 60, "--out_dir", tmp_path / "out")
    assert ended.status == 0, ended.errors
    found = found_in(tmp_path / "out")
    assert ended.output.startswith(f"biases of the last {found.scheme.bias_depth} convolutions; ")
    assert f"{found.report['memory_bytes'] / 1024:.1f} KiB of extra memory, within 30.0 KiB\n" in ended.output
    assert f"scheme: {tmp_path / 'out/scheme.json'}, report: {tmp_path / 'out/report.json'}, " in ended.output


def test_another_seed_is_another_search(small, tmp_path):
    first, second = (
        call(*small, "--evaluations", 40, "--seed", seed, "--out_dir", tmp_path / f"{seed}") for seed in (0, 1)
    )
    assert first.fitness != second.fitness


# ---- few schemes


def test_a_search_ends_where_nothing_new_comes_up(small, tmp_path):
    """So small a budget that there are no thousand schemes."""
    found = call(*small, "--budget_kib", 8, "--evaluations", 1000, "--out_dir", tmp_path / "out")
    assert found.report["evaluations"] == len(found.fitness) < 100
    assert found.report["score"] == pytest.approx(found.report["optimum_score"])


@pytest.mark.parametrize("population", [4, 40])
def test_a_table_of_biases_only(population, small, small_table, tmp_path):
    """As measure_contributions --layers "" writes it: a few schemes in all."""
    lines = small_table.read_text().splitlines(keepends=True)
    table = tmp_path / "biases.csv"
    table.write_text("".join(line for line in lines if not line.startswith("weight")))
    words = ("--contributions", table, "--allow_missing_layers", "true", "--population", population)
    found = call(*small, *words, "--out_dir", tmp_path / "out")
    assert found.scheme.weights == {}
    gain = ContributionTable.load(table).bias_gains[found.scheme.bias_depth]
    assert found.report["score"] == found.report["optimum_score"] == gain


# ---- by accuracy, here made up


def made_up_accuracy(scheme, steps):
    """No sum of gains, and another one after longer training."""
    return random.Random(f"{scheme['bias_depth']} {sorted(scheme['weights'].items())} {steps}").random()


def in_place_of_training(patch):
    """Replaces ``Workers.map``; holds its calls, and says which of their evaluations are to be lost with a worker."""
    trained = SimpleNamespace(calls=[], lost=lambda call, index: False)

    def map_in_place(workers, function, settings, schemes, seeds, steps, judged_by, rates):
        random.seed(0)
        taken = steps[0] or settings[0].steps
        trained.calls.append(
            SimpleNamespace(settings=settings[0], schemes=schemes, seeds=seeds[0], steps=taken, rate=rates[0])
        )
        number = len(trained.calls)
        return [
            None if trained.lost(number, index) else made_up_accuracy(scheme, taken) - (judged_by[0] == "loss")
            for index, scheme in enumerate(schemes)
        ]

    patch.setattr(Workers, "map", map_in_place)
    return trained


@pytest.fixture
def trained(monkeypatch):
    return in_place_of_training(monkeypatch)


@pytest.fixture(scope="module")
def by_accuracy(small):
    words = ("--fitness", "accuracy", "--data", "digits", "--evaluations", 40, "--population", 8)
    return (*small, *words, "--judged_by", "top1", "--learning_rate", 0.1)


@pytest.fixture(scope="module")
def judged(by_accuracy, tmp_path_factory):
    """A search by accuracy, with its finalists."""
    words = (*by_accuracy, "--finalists", 4, "--trial_seeds", 2, "--final_seeds", 3)
    with pytest.MonkeyPatch.context() as patch:
        trained = in_place_of_training(patch)
        found = call(*words, "--out_dir", tmp_path_factory.mktemp("judged") / "out")
    found.trials = [one for one in trained.calls if one.settings.steps == 100]
    found.finals = trained.calls[len(found.trials) :]
    return found


def test_search_by_accuracy_starts_with_the_optimum_of_the_table(judged, small_table):
    optimum, first = UpdateScheme.load(judged.folder / "optimum.json"), judged.trials[0].schemes
    assert (first[0]["bias_depth"], first[0]["weights"]) == chosen(optimum)
    table = ContributionTable.load(small_table)
    scores = [table_score(table, UpdateScheme.from_dict(scheme)) for scheme in first]
    assert max(scores) == scores[0] == pytest.approx(judged.report["optimum_score"])


def test_search_by_accuracy_goes_on_where_everything_fits(small_table, tmp_path, monkeypatch):
    """Filling then makes the same of all genomes, and only what is left unfilled differs."""
    in_place_of_training(monkeypatch)
    words = ("--contributions", small_table, "--memory", "extra", "--budget_kib", 10_000, "--fitness", "accuracy")
    words += ("--data", "digits", "--resolution", 32, "--evaluations", 60, "--population", 8, "--finalists", 0)
    words += ("--learning_rate", 0.1)
    assert call(*words, "--logger", "none", "--out_dir", tmp_path / "out").report["evaluations"] == 60


def test_search_by_accuracy_trains_every_scheme_once_within_the_budget(judged):
    schemes = [scheme for one in judged.trials for scheme in one.schemes]
    assert len(schemes) == judged.report["evaluations"] == 40
    assert len({(s["bias_depth"], tuple(sorted(s["weights"].items()))) for s in schemes}) == 40
    described = describe_network("none", (1, 32, 32), 10)
    assert all(memory_bytes("extra", described, UpdateScheme.from_dict(s)) <= SMALL_BUDGET for s in schemes)
    assert {one.seeds for one in judged.trials} == {(0, 1)}
    best = max(made_up_accuracy(scheme, 100) for scheme in schemes)
    assert judged.report["best_fitness"] == best
    assert [value for *_, value in judged.fitness] == [made_up_accuracy(scheme, 100) for scheme in schemes]


def test_finalists_are_the_best_schemes_and_good_guesses_trained_for_longer(judged):
    finalists = judged.report["finalists"]
    proxies = sorted((value for *_, value in judged.fitness), reverse=True)[:4]
    of_optimum, of_rule = judged.fitness[0][-1], judged.fitness[1][-1]  # what the search began with
    assert max(of_optimum, of_rule) < proxies[-1]  # they have their chance all the same
    assert sorted(one["proxy"] for one in finalists) == sorted([*proxies, of_optimum, of_rule])
    assert [len(one.schemes) for one in judged.finals] == [6, 6, 6]  # of three seeds
    assert {one.settings.steps for one in judged.finals} == {400}
    seeds = {seed for one in judged.finals for seed in one.seeds}
    assert len(seeds) == 3
    assert not seeds & {0, 1}  # those of the trials
    values = [one["val_top1_mean"] for one in finalists]
    assert values == sorted(values, reverse=True)
    winner = made_up_accuracy(judged.scheme.to_dict(), 400)
    assert winner == pytest.approx(values[0])
    assert judged.report["score"] == finalists[0]["table_score"]
    assert judged.report["memory_bytes"] == finalists[0]["memory_bytes"]


def test_rank_correlation_is_that_of_proxy_and_longer_training(judged):
    pairs = [(one["proxy"], one["val_top1_mean"]) for one in judged.report["finalists"]]
    assert judged.report["rank_correlation"] == pytest.approx(spearmanr(*zip(*pairs, strict=True)).statistic)


def test_finalists_of_a_search_by_the_table(trained, small, tmp_path):
    words = ("--data", "digits", "--evaluations", 60, "--finalists", 3, "--final_steps", 7)
    found = call(*small, *words, "--out_dir", tmp_path / "out")
    assert [(one.settings.steps, len(one.schemes)) for one in trained.calls] == [(7, 4)] * 3  # with the rule
    assert [one["proxy"] for one in found.report["finalists"]] == [
        pytest.approx(one["table_score"]) for one in found.report["finalists"]
    ]
    assert made_up_accuracy(found.scheme.to_dict(), 7) == max(
        made_up_accuracy(scheme, 7) for scheme in trained.calls[0].schemes
    )


def test_search_on_rungs(trained, small, caplog, tmp_path):
    """The best third of all schemes so far is trained for longer, within one budget of steps."""
    words = ("--fitness", "accuracy", "--data", "digits", "--rungs", "10,30,90", "--total_steps", 1000)
    words += ("--population", 9, "--judged_by", "top1", "--learning_rate", 0.1)
    with caplog.at_level("INFO"):
        found = call(*small, *words, "--out_dir", tmp_path / "out", with_picture=True)
    of_steps = {
        steps: [s for one in trained.calls if one.steps == steps for s in one.schemes] for steps in (10, 30, 90)
    }
    assert {one.settings.steps for one in trained.calls} == {90}  # whose augmented copies all rungs share
    counts = {steps: len({json.dumps(scheme) for scheme in schemes}) for steps, schemes in of_steps.items()}
    assert counts == {steps: len(schemes) for steps, schemes in of_steps.items()}  # nothing is trained twice
    assert counts[10] == found.report["evaluations"] >= 3 * counts[30] >= 9 * counts[90] > 0
    assert found.report["steps_spent"] == sum(steps * count for steps, count in counts.items()) <= 1000
    assert found.report["best_fitness"] == max(made_up_accuracy(scheme, 90) for scheme in of_steps[90])
    # without a terminal there is a line for each generation
    (last, *_) = [message for message in reversed(caplog.messages) if "optimizer steps, best" in message]
    assert last.startswith(f"{found.report['steps_spent']:,} of 1,000 optimizer steps, best ")
    first = found.report["rank_correlation_of_rungs"][0]
    pairs = [(made_up_accuracy(scheme, 10), made_up_accuracy(scheme, 30)) for scheme in of_steps[30]]
    assert (first["steps"], first["longer_steps"], first["schemes"]) == (10, 30, len(pairs))
    assert first["correlation"] == pytest.approx(spearmanr(*zip(*pairs, strict=True)).statistic)
    with Image.open(tmp_path / "out/search.png") as picture:
        assert picture.format == "PNG"


def test_search_by_the_loss(trained, by_accuracy, capsys, tmp_path):
    """Judged by it in the trials, and by accuracy among the finalists."""
    words = ("--judged_by", "loss", "--finalists", 2)
    found = call(*by_accuracy, *words, "--out_dir", tmp_path / "out", with_picture=True)
    schemes = [scheme for one in trained.calls if one.steps == 100 for scheme in one.schemes]
    assert found.report["best_fitness"] == max(made_up_accuracy(scheme, 100) for scheme in schemes) - 1 < 0
    assert found.report["judged_by"] == "loss"
    assert f"lowest validation loss of a trial: {-found.report['best_fitness']:.4f} nats" in capsys.readouterr().out
    assert found.report["finalists"][0]["val_top1_mean"] > 0
    assert found.report["finalists"][0]["proxy"] < 0
    assert (tmp_path / "out/search.png").exists()


def test_the_learning_rate_is_chosen(trained, small, monkeypatch, caplog, tmp_path):
    """At which a few schemes have the best mean; what that costs is of the budget, and a resumed search keeps it."""
    monkeypatch.setattr(
        sys.modules[__name__], "made_up_accuracy", lambda scheme, steps: -abs(math.log(trained.calls[-1].rate / 0.06))
    )
    words = ("--fitness", "accuracy", "--data", "digits", "--rungs", "10,30", "--total_steps", 1200, "--population", 30)
    with caplog.at_level("INFO"):
        found = call(*small, *words, "--out_dir", tmp_path / "out")
    rates = [one.rate for one in trained.calls]
    tried = [0.0125, 0.025, 0.05, 0.1]  # doubled until it gets worse
    assert rates[:4] == tried
    assert set(rates[4:]) == {0.05} == {found.report["learning_rate"]}
    assert [(len(one.schemes), one.steps) for one in trained.calls[:4]] == [(3, 30)] * 4
    assert "schemes are judged at learning rate 0.05" in caplog.messages
    spent = sum(len(one.schemes) * one.steps for one in trained.calls)
    assert found.report["steps_spent"] == spent <= 1200

    # killed after the choice
    state = json.loads((tmp_path / "out/search.json").read_text())
    begun = state | {"generation": 0, "population": [], "fitness": [], "history": []}
    trained.calls.clear()
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    (tmp_path / "again/search.json").write_text(json.dumps(begun))
    (tmp_path / "again/report.json").unlink()
    resumed = call(*small, *words, "--resume", "true", "--out_dir", tmp_path / "again")
    assert {one.rate for one in trained.calls} == {0.05}
    assert resumed.fitness == found.fitness


def test_too_few_steps_to_choose_a_learning_rate(trained, small, caplog, tmp_path):
    words = ("--fitness", "accuracy", "--data", "digits", "--rungs", "10,30", "--total_steps", 500, "--population", 9)
    found = call(*small, *words, "--out_dir", tmp_path / "out")
    assert {one.rate for one in trained.calls} == {found.report["learning_rate"]} == {0.0125}
    assert "500 steps are too few to choose a learning rate: schemes are judged at 0.0125; give --learning_rate" in (
        caplog.messages
    )


def test_search_at_random(trained, by_accuracy, tmp_path):
    """Every scheme is drawn anew, without the optimum: as many as of an evolution, and others for another seed."""
    words = (*by_accuracy, "--proposed_by", "random", "--finalists", 0)
    found = call(*words, "--out_dir", tmp_path / "out")
    schemes = [json.dumps(scheme) for one in trained.calls for scheme in one.schemes]
    assert len(schemes) == len(set(schemes)) == found.report["evaluations"] == 40
    optimum = UpdateScheme.load(tmp_path / "out/optimum.json")
    assert chosen(UpdateScheme.from_dict(json.loads(schemes[0]))) != chosen(optimum)
    trained.calls.clear()
    call(*words, "--seed", 1, "--out_dir", tmp_path / "other")
    assert schemes[0] != json.dumps(trained.calls[0].schemes[0])


@pytest.mark.parametrize("memory", ["extra", "peak"])
def test_search_of_the_front(memory, trained, small_table, monkeypatch, capsys, tmp_path):
    """Schemes of many sizes in one search, each the best of its size, with a table and a picture."""
    noise = made_up_accuracy

    def the_more_the_better(scheme, steps):
        return (scheme["bias_depth"] + 10 * sum(scheme["weights"].values()) + noise(scheme, steps)) / 100

    monkeypatch.setattr(sys.modules[__name__], "made_up_accuracy", the_more_the_better)
    within = ("--memory", "extra", "--budget_kib", 30) if memory == "extra" else ("--mcu", "stm32f746")
    words = ("--contributions", small_table, "--resolution", 32, "--fitness", "accuracy", "--data", "digits", *within)
    words += ("--front", "true", "--rungs", "10,30", "--total_steps", 1000, "--population", 20, "--logger", "none")
    words += ("--judged_by", "top1", "--learning_rate", 0.1)
    found = call(*words, "--out_dir", tmp_path / "out")
    rows = found.report["front"]
    assert len(rows) > 3
    assert found.report["steps_spent"] <= 1000
    sizes, fitness = [row["memory_bytes"] for row in rows], [row["fitness"] for row in rows]
    assert (sizes, fitness) == (sorted(sizes), sorted(fitness))
    assert sizes[-1] <= found.report["budget_bytes"]
    schemes = [UpdateScheme.load(tmp_path / "out" / row["scheme"]) for row in rows]
    assert fitness == [made_up_accuracy(scheme.to_dict(), 30) for scheme in schemes]
    assert chosen(found.scheme) == chosen(schemes[-1])  # the best of all within the whole budget
    with Image.open(tmp_path / "out/front.png") as picture:
        assert picture.format == "PNG"
    output = capsys.readouterr().out
    assert "The best schemes by size" in output
    assert str(rows[0]["scheme"]) in output
    served = found.report["mcus"]
    if memory == "extra":
        assert served == {}
        return
    peak_memory = PeakMemory(DIGITS.operations)
    for name, file in served.items():
        fitting = [
            row
            for row, scheme in zip(rows, schemes, strict=True)
            if scheme_fits(peak_memory, scheme, MICROCONTROLLERS[name])
        ]
        assert file == fitting[-1]["scheme"]
    assert "stm32f746" in served


def test_the_best_scheme_so_far_is_there_at_any_time(trained, by_accuracy, caplog, tmp_path):
    def lost(call, index):
        if call == stop_at:
            raise KeyboardInterrupt
        return False

    trained.lost = lost
    for stop_at in (1, 3):
        with pytest.raises(SystemExit) as ended, caplog.at_level("INFO"):
            call(*by_accuracy, "--out_dir", tmp_path / f"out{stop_at}")
        assert ended.value.code == 130
        assert re.search(r"4,000 optimizer steps: about \d+ min; the best scheme so far is in scheme.json", caplog.text)
        trained.calls.clear()
    guess, best = (UpdateScheme.load(tmp_path / f"out{stop_at}/scheme.json") for stop_at in (1, 3))
    assert guess.provenance["found"]["unfinished"] is best.provenance["found"]["unfinished"] is True
    known = json.loads((tmp_path / "out3/search.json").read_text())["fitness"]
    assert len(known) == best.provenance["found"]["evaluations"] == 16
    assert made_up_accuracy(best.to_dict(), 100) == max(values[-1] for _, values in known)
    assert not (tmp_path / "out3/report.json").exists()


def test_a_worker_that_dies_costs_its_evaluation(trained, by_accuracy, tmp_path):
    trained.lost = lambda call, index: (call, index) == (2, 3)
    found = call(*by_accuracy, "--out_dir", tmp_path / "out")
    assert (found.report["evaluations"], found.report["lost_evaluations"]) == (40, 1)
    assert [index for index, (*_, value) in enumerate(found.fitness) if value is None] == [8 + 3]
    assert sum(len(one.schemes) for one in trained.calls) == 40  # it is not tried again


def test_a_generation_that_is_lost_costs_its_evaluations(trained, by_accuracy, tmp_path):
    trained.lost = lambda call, index: call == 1
    found = call(*by_accuracy, "--out_dir", tmp_path / "out")
    assert (found.report["evaluations"], found.report["lost_evaluations"]) == (40, 8)


@pytest.mark.parametrize(
    ("finalists", "lost", "message"),
    [
        (0, lambda call, index: True, "every evaluation was lost with its worker: the warnings above say why"),
        (2, lambda call, index: call > 5, "every training of a finalist was lost with its worker: the warnings above"),
    ],
)
def test_all_lost(finalists, lost, message, trained, by_accuracy, command, tmp_path):
    trained.lost = lost
    ended = command(RECIPE, *by_accuracy, "--finalists", finalists, "--out_dir", tmp_path / "out")
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors.startswith(f"{RECIPE}.py: error: {message}")


# ---- by accuracy, really trained, and killed


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a folded network that knows the digits a little: from fresh weights no update gains anything."""
    data = Digits(resolution=32, augment=True)
    data.setup()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = mobilenet_v2(0.35, num_classes=10, in_channels=1)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.5
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for images, labels in [*data.train_dataloader()] * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network.train()(images), labels).backward()
        optimizer.step()
    folded = fold_batch_norm(network.eval(), data.input_shape)
    path = tmp_path_factory.mktemp("weights") / "digits.ckpt"
    described = {"width": 0.35, "num_classes": 10, "in_channels": 1, "folded": True, "padding": "symmetric"}
    torch.save(
        {
            "state_dict": {f"net.{name}": value for name, value in folded.state_dict().items()},
            "hyper_parameters": {"network": described, "class_names": data.class_names, "input_shape": [1, 32, 32]},
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def words_of(small, weights):
    """The words of a search by the table and of one by accuracy, each with some generations."""
    return {
        "table": (
            *("--width", 0.35, "--resolution", 32, "--contributions", MEASURED, "--memory", "extra"),
            *("--budget_kib", 60, "--evaluations", 400, "--finalists", 0, "--logger", "none"),
        ),
        "accuracy": (
            *(*small, "--data", "digits", "--weights", weights, "--fitness", "accuracy", "--steps", 10),
            *("--learning_rate", 1.0, "--judged_by", "top1", "--evaluations", 18, "--population", 6),
            *("--finalists", 2, "--final_steps", 10, "--final_seeds", 1),
        ),
    }


@pytest.fixture(scope="module")
def killed(forking, words_of, tmp_path_factory):
    """Folders of searches whose processes were killed in the middle."""
    folders = {}
    for fitness, words in words_of.items():
        folders[fitness] = tmp_path_factory.mktemp("killed") / fitness
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{RECIPE}.py", *map(str, words), "--out_dir", str(folders[fitness])])
            child = forking.Process(target=run_recipe, args=(main,))
            child.start()
        wait_until(child, lambda folder=folders[fitness]: generation_in(folder) >= 2)
        child.kill()
        child.join()
        assert not (folders[fitness] / "report.json").exists()
    return folders


def generation_in(folder):
    path = folder / "search.json"
    return json.loads(path.read_text())["generation"] if path.exists() else 0


def wait_until(child, holds, seconds=120):
    """Waits for what a process is to do, as long as it runs."""
    end = time.monotonic() + seconds
    while not holds():
        assert child.is_alive(), child.exitcode
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(words_of, tmp_path_factory):
    """Searches that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return {fitness: call(*words, "--out_dir", folder / fitness) for fitness, words in words_of.items()}


@pytest.mark.parametrize("fitness", ["table", "accuracy"])
def test_killed_and_resumed(fitness, killed, whole, words_of, tmp_path):
    shutil.copytree(killed[fitness], tmp_path / "out")
    known = json.loads((tmp_path / "out/search.json").read_text())["fitness"]
    assert 0 < len(known) < len(whole[fitness].fitness)
    resumed = call(*words_of[fitness], "--resume", "true", "--out_dir", tmp_path / "out")
    assert resumed.fitness == whole[fitness].fitness
    assert chosen(resumed.scheme) == chosen(whole[fitness].scheme)
    assert resumed.without_seconds == whole[fitness].without_seconds
    assert resumed.history == whole[fitness].history


def test_killed_before_the_first_generation(small, tmp_path):
    words = (*small, "--evaluations", 60)
    whole = call(*words, "--out_dir", tmp_path / "whole")
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "whole/config.yaml", tmp_path / "out")
    resumed = call(*words, "--resume", "true", "--out_dir", tmp_path / "out")
    assert resumed.fitness == whole.fitness


def test_killed_before_the_finalists(whole, words_of, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("config.yaml", "search.json"):
        shutil.copy(whole["accuracy"].folder / name, tmp_path / "out")
    resumed = call(*words_of["accuracy"], "--resume", "true", "--out_dir", tmp_path / "out")
    assert resumed.without_seconds == whole["accuracy"].without_seconds


def test_schemes_differ_in_accuracy(whole):
    """Else the searches by accuracy would be equal for the wrong reason."""
    assert len({value for *_, value in whole["accuracy"].fitness}) > 5
    assert whole["accuracy"].report["best_fitness"] > 0.3


def test_accuracy_is_that_of_the_trial(whole, words_of, small_table):
    found = whole["accuracy"]
    arguments = dict(zip(words_of["accuracy"][::2], words_of["accuracy"][1::2], strict=True))
    settings = TrialSettings(
        "digits", None, weights=str(arguments["--weights"]), width=0.35, resolution=32, base_depth=18, steps=10,
        learning_rate=1.0,
    )  # fmt: skip
    optimum = UpdateScheme.load(found.folder / "optimum.json")
    assert trained_fitness(settings, optimum.to_dict(), (0,)) == found.fitness[0][-1]


def test_several_processes_find_the_same(forking, whole, words_of, monkeypatch, tmp_path):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forking)  # which has imported everything
    found = call(*words_of["accuracy"], "--processes", 2, "--out_dir", tmp_path / "out")
    assert found.fitness == whole["accuracy"].fitness
    assert chosen(found.scheme) == chosen(whole["accuracy"].scheme)
    assert found.without_seconds == whole["accuracy"].without_seconds


# ---- by a gradient


@pytest.fixture(scope="module")
def by_gradient(weights):
    """The words of a scheme from one backward pass."""
    return (
        *("--contributions", "gradient", "--data", "digits", "--weights", weights, "--resolution", 32),
        *("--base_depth", GRADIENT_DEPTH, "--choice_samples", 70, "--memory", "extra"),
        *("--budget_kib", SMALL_BUDGET // 1024),
        *("--logger", "none"),
    )


@pytest.fixture(scope="module")
def measured(weights):
    """The gradient that ``by_gradient`` asks for, on the first 70 samples."""
    settings = TrialSettings("digits", weights=str(weights), resolution=32, base_depth=GRADIENT_DEPTH)
    return measure_gradient(settings, 70, seed=0)


@pytest.fixture(scope="module", autouse=True)
def measured_once():
    """The recipe's own gradients, each measured once for all tests, which are of what is made of it."""
    known = {}

    def measure_once(*arguments):
        key = repr(arguments)
        if key not in known:
            known[key] = measure_gradient(*arguments)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microtune.recipes.evolve_update_scheme.measure_gradient", measure_once)
        yield


@pytest.fixture
def measured_anew(monkeypatch):
    """As in another process."""
    monkeypatch.setattr("microtune.recipes.evolve_update_scheme.measure_gradient", measure_gradient)


@pytest.fixture(scope="module")
def computed(by_gradient, tmp_path_factory):
    """The scheme of all numbers of channels, of multiples of four, and of whole layers."""
    folder = tmp_path_factory.mktemp("computed")
    words = {"channels": (), "fours": ("--channel_multiple", 4), "layers": ("--level", "layer")}
    return {name: call(*by_gradient, *more, "--out_dir", folder / name) for name, more in words.items()}


DIGITS = describe_network("none", (1, 32, 32), 10)
IN_CHANNELS = {convolution.name: convolution.in_channels for convolution in DIGITS.operations.convolutions}


def test_computed_scheme_is_the_optimum_within_the_budget(computed, measured):
    found = computed["channels"]
    table = gradient_table(measured.importance, DIGITS.operations.convolutions, GRADIENT_DEPTH)
    problem = SearchProblem(DIGITS.name, PeakMemory(DIGITS.operations), table, SMALL_BUDGET, "extra")
    assert found.report["score"] == proven_optimum(problem).score > 0
    needed = memory_bytes("extra", DIGITS, found.scheme)
    assert SMALL_BUDGET * 0.99 < needed == found.report["memory_bytes"] <= SMALL_BUDGET == found.report["budget_bytes"]
    assert (found.report["choice_samples"], measured.samples) == (70, 70)
    assert found.report["gradient_samples"] == measured.importance.samples == 38  # the other 32 are the first batch
    assert found.report["classifier_top1"] == measured.classifier_top1 > 0.2  # chance is 0.1
    assert found.report["score_unit"] == "nats per unit of learning rate"
    table.save(found.folder / "again.csv")
    assert (found.folder / "again.csv").read_bytes() == (found.folder / "contributions.csv").read_bytes()
    assert not {"optimum.json", "search.json", "search.png"} & {path.name for path in found.folder.iterdir()}


def test_computed_scheme_has_the_channels_of_the_highest_gain(computed, measured):
    scheme, report = computed["channels"].scheme, computed["channels"].report
    assert DIGITS.load_scheme(computed["channels"].folder / "scheme.json").channels
    gains = []
    for layer, channels in scheme.channels.items():
        scores = measured.importance.layers[layer].loss_decrease
        assert channels == highest_channels(scores, len(channels))
        gains.append(scores[channels].sum().item())
    rows = {row["layer"]: row for row in report["layers"]}
    assert set(rows) == set(scheme.weights)
    assert [rows[layer]["updated_channels"] for layer in scheme.channels] == list(map(len, scheme.channels.values()))
    assert [rows[layer]["predicted_gain"] for layer in scheme.channels] == pytest.approx(gains)
    whole = set(scheme.weights) - set(scheme.channels)
    assert all(rows[layer]["updated_channels"] == IN_CHANNELS[layer] for layer in whole)
    total = report["bias_score"] + sum(row["predicted_gain"] for row in rows.values())
    assert report["score"] == pytest.approx(total)
    of_biases = UpdateScheme(DIGITS.name, scheme.bias_depth)
    extra = sum(row["extra_bytes"] for row in rows.values()) + memory_bytes("extra", DIGITS, of_biases)
    assert report["memory_bytes"] == extra


def test_multiples_of_channels_and_whole_layers(computed):
    fours, layers = computed["fours"], computed["layers"]
    counts = {layer: len(channels) for layer, channels in fours.scheme.channels.items()}
    assert counts
    assert all(count % 4 == 0 for count in counts.values())
    assert any(len(channels) % 4 for channels in computed["channels"].scheme.channels.values())
    assert layers.scheme.channels == {}
    assert set(layers.scheme.weights.values()) == {1.0}
    scores = [computed[name].report["score"] for name in ("layers", "fours", "channels")]
    assert scores == sorted(set(scores))
    assert (fours.report["channel_multiple"], layers.report["level"]) == (4, "layer")


def test_provenance_says_how_to_compute_the_scheme_again(computed, tmp_path):
    provenance = computed["fours"].scheme.provenance
    table = (computed["fours"].folder / "contributions.csv").read_bytes()
    assert provenance["contributions_sha256"] == hashlib.sha256(table).hexdigest()
    assert provenance["contributions_arguments"] is None
    assert provenance["found"]["choice_samples"] == 70
    words = shlex.split(provenance["command"])[3:]
    assert words[:2] == ["--contributions", "gradient"]
    assert not {"--steps", "--trial_seeds", "--final_seeds", "--finalists"} & set(words)
    again = call(*words, "--logger", "none", "--out_dir", tmp_path / "again")
    assert (chosen(again.scheme), again.scheme.channels) == (
        chosen(computed["fours"].scheme),
        computed["fours"].scheme.channels,
    )
    assert again.without_seconds == computed["fours"].without_seconds


def test_output_tells_what_is_updated_layer_by_layer(command, computed, by_gradient, tmp_path):
    ended = command(RECIPE, *by_gradient, "--finalists", 0, "--out_dir", tmp_path / "out")
    assert ended.status == 0, ended.errors
    report, lines = computed["channels"].report, ended.output.splitlines()
    assert re.split(" {2,}", lines[0]) == [
        *("layer", "channels updated", "extra memory, KiB", "gain, nats per unit of learning rate")
    ]
    for line, row in zip(lines[1:], report["layers"], strict=False):
        assert re.split(" {2,}", line) == [
            row["layer"], f"{row['updated_channels']} of {row['in_channels']}", f"{row['extra_bytes'] / 1024:.2f}",
            f"{row['predicted_gain']:.4g}",
        ]  # fmt: skip
    depth = computed["channels"].scheme.bias_depth
    assert lines[1 + len(report["layers"]) :] == [
        f"biases of the last {depth} convolutions: gain {report['bias_score']:.4g}",
        f"predicted decrease of the loss {report['score']:.4g} nats per unit of learning rate, the most within the "
        "budget",
        f"{report['memory_bytes'] / 1024:.1f} KiB of extra memory, within 30.0 KiB",
        "from one backward pass over 38 of 70 samples, with a classifier fitted to the others (top-1 in the pass "
        f"{report['classifier_top1']:.2%})",
        lines[-1],
    ]
    assert lines[-1].startswith(f"scheme: {tmp_path / 'out/scheme.json'}, report: ")


def test_computed_scheme_of_a_microcontroller(by_gradient, tmp_path):
    words = ("--memory", "peak", "--budget_kib", "null", "--sram_bytes", 80_000, "--reserve_bytes", 32_000)
    words += ("--flash_bytes", 10**6, "--channel_multiple", 4)
    found = call(*by_gradient, *words, "--out_dir", tmp_path / "out")
    peak_bytes = PeakMemory(DIGITS.operations).peak_bytes(found.scheme)
    assert 47_000 < peak_bytes == found.report["memory_bytes"] <= 48_000 == found.report["budget_bytes"]
    assert found.report["mcu"] == "custom"
    assert found.scheme.channels


def test_computed_scheme_of_an_int8_network(small_graph, small_tensors, tiny_cifar, tmp_path):
    write_quantized_network(tmp_path / "small.safetensors", small_graph, small_tensors)
    words = ("--contributions", "gradient", "--network", tmp_path / "small.safetensors", "--data", "cifar10")
    words += ("--data_dir", tiny_cifar, "--resolution", 32, "--base_depth", 6, "--memory", "extra", "--budget_kib", 9)
    found = call(*words, "--logger", "none", "--out_dir", tmp_path / "out")
    described = describe_network(str(tmp_path / "small.safetensors"), (3, 32, 32), 10)
    scheme = described.load_scheme(tmp_path / "out/scheme.json")
    assert scheme.channels
    assert memory_bytes("extra", described, scheme) == found.report["memory_bytes"] <= 9 * 1024
    assert found.report["choice_samples"] == 90  # as many as there are to train on
    assert found.report["score"] > 0


def test_computed_again_where_it_was_killed(computed, measured_anew, by_gradient, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("config.yaml", "contributions.csv"):
        shutil.copy(computed["channels"].folder / name, tmp_path / "out")
    resumed = call(*by_gradient, "--resume", "true", "--out_dir", tmp_path / "out")
    assert resumed.without_seconds == computed["channels"].without_seconds


def test_another_gradient_is_not_gone_on_with(computed, command, by_gradient, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(computed["channels"].folder / "config.yaml", tmp_path / "out")
    kept = tmp_path / "out/contributions.csv"
    kept.write_text((computed["channels"].folder / "contributions.csv").read_text().replace("bias,1,", "bias,1,1"))
    before = kept.read_bytes()
    error = resumed_with_error(command, by_gradient, tmp_path / "out")
    assert error == (
        f"the gradient is not what it was when {kept} was written: the data, the weights or the machine have changed: "
        "start the search anew without --resume\n"
    )
    assert kept.read_bytes() == before


def test_weights_that_have_learnt_nothing(by_gradient, trained, caplog, tmp_path):
    """Their gradient is no more than rounding, also where it only begins a search."""
    unlearnt = ("--weights", "none")
    by_accuracy = ("--fitness", "accuracy", "--evaluations", 4, "--population", 4, "--finalists", 0)
    by_accuracy += ("--learning_rate", 0.1)
    said = {}
    for name, words in {"computed": unlearnt, "searched": (*unlearnt, *by_accuracy), "learnt": ()}.items():
        caplog.clear()
        found = call(*by_gradient, *words, "--out_dir", tmp_path / name)
        said[name] = [message for message in caplog.messages if "learnt nothing" in message]
        assert (found.report["optimum_score" if name == "searched" else "score"] < 1e-9) == (name != "learnt")
    warning = "schemes update little of a network that has learnt nothing: give --weights"
    assert said == {"computed": [warning], "searched": [warning], "learnt": []}


@pytest.fixture(scope="module")
def by_gradient_and_accuracy(by_gradient):
    words = ("--fitness", "accuracy", "--evaluations", 40, "--population", 8, "--finalists", 2)
    return (*by_gradient, *words, "--judged_by", "top1", "--learning_rate", 0.1)


@pytest.fixture(scope="module")
def judged_by_gradient(by_gradient_and_accuracy, tmp_path_factory):
    """A search by accuracy that a gradient begins."""
    with pytest.MonkeyPatch.context() as patch:
        trained = in_place_of_training(patch)
        found = call(*by_gradient_and_accuracy, "--out_dir", tmp_path_factory.mktemp("by gradient") / "out")
    found.trials = [one for one in trained.calls if one.settings.steps == 100]
    found.finals = trained.calls[len(found.trials) :]
    return found


def updates(scheme):
    """What of a scheme as plain values is updated."""
    return {name: value for name, value in scheme.items() if name != "provenance"}


def test_search_by_accuracy_begins_with_the_computed_scheme(judged_by_gradient, computed):
    expected = updates(computed["channels"].scheme.to_dict())
    assert updates(judged_by_gradient.trials[0].schemes[0]) == expected
    assert updates(UpdateScheme.load(judged_by_gradient.folder / "optimum.json").to_dict()) == expected
    assert judged_by_gradient.report["optimum_score"] == computed["channels"].report["score"]
    assert expected in [updates(scheme) for scheme in judged_by_gradient.finals[0].schemes]


def test_every_scheme_is_trained_with_the_channels_of_the_highest_gain(judged_by_gradient, measured):
    schemes = [scheme for one in judged_by_gradient.trials for scheme in one.schemes]
    assert len(schemes) == 40
    for scheme in [*schemes, *judged_by_gradient.finals[0].schemes, judged_by_gradient.scheme.to_dict()]:
        assert memory_bytes("extra", DIGITS, UpdateScheme.from_dict(scheme)) <= SMALL_BUDGET
        for layer, ratio in scheme["weights"].items():
            count = math.floor(ratio * IN_CHANNELS[layer] + 1e-9)
            scores = measured.importance.layers[layer].loss_decrease
            fixed = scheme["channels"].get(layer, list(range(IN_CHANNELS[layer])))
            assert fixed == highest_channels(scores, count)
    assert len({layer for scheme in schemes for layer in scheme["channels"]}) > 5


def test_search_of_multiples_and_of_whole_layers(by_gradient_and_accuracy, trained, tmp_path):
    for name, words in {"fours": ("--channel_multiple", 4), "layers": ("--level", "layer")}.items():
        trained.calls.clear()
        call(*by_gradient_and_accuracy, *words, "--out_dir", tmp_path / name)
        schemes = [scheme for one in trained.calls for scheme in one.schemes]
        counts = {len(channels) % 4 for scheme in schemes for channels in scheme["channels"].values()}
        assert counts == ({0} if name == "fours" else set())
        assert any(scheme["weights"] for scheme in schemes)


def test_output_of_a_search_by_gradient_has_its_unit(by_gradient_and_accuracy, trained, command, tmp_path):
    ended = command(RECIPE, *by_gradient_and_accuracy, "--out_dir", tmp_path / "out")
    report = found_in(tmp_path / "out").report
    said = f"predicted decrease of the loss {report['score']:.4g} nats per unit of learning rate, proven optimum "
    assert said + f"{report['optimum_score']:.4g}, random search {report['random_score']:.4g}, " in ended.output
    assert "points" not in ended.output


def test_search_by_gradient_stopped_and_resumed(
    by_gradient_and_accuracy, judged_by_gradient, trained, command, tmp_path
):
    def stop(call, index):
        if call == 3:
            raise KeyboardInterrupt

    trained.lost = stop
    assert command(RECIPE, *by_gradient_and_accuracy, "--out_dir", tmp_path / "out").status == 130
    assert generation_in(tmp_path / "out") == 2
    trained.lost = lambda call, index: False
    resumed = call(*by_gradient_and_accuracy, "--resume", "true", "--out_dir", tmp_path / "out")
    assert resumed.fitness == judged_by_gradient.fitness
    assert updates(resumed.scheme.to_dict()) == updates(judged_by_gradient.scheme.to_dict())
    assert resumed.without_seconds == judged_by_gradient.without_seconds


def test_really_trained_by_gradient(by_gradient, weights, tmp_path):
    words = ("--fitness", "accuracy", "--evaluations", 4, "--population", 4, "--steps", 4, "--learning_rate", 1.0)
    words += ("--judged_by", "top1")
    found = call(*by_gradient, *words, "--finalists", 0, "--out_dir", tmp_path / "out")
    settings = TrialSettings(
        "digits", weights=str(weights), resolution=32, base_depth=GRADIENT_DEPTH, steps=4, learning_rate=1.0
    )
    optimum = UpdateScheme.load(tmp_path / "out/optimum.json")
    assert trained_fitness(settings, optimum.to_dict(), (0,)) == found.fitness[0][-1]


def test_whole_layers_and_multiples_of_a_measured_table(small, tmp_path):
    layers = call(*small, "--evaluations", 60, "--level", "layer", "--out_dir", tmp_path / "layers")
    assert set(layers.scheme.weights.values()) == {1.0}
    fours = call(*small, "--evaluations", 60, "--channel_multiple", 12, "--out_dir", tmp_path / "fours")
    counts = {layer: math.floor(ratio * IN_CHANNELS[layer]) for layer, ratio in fours.scheme.weights.items()}
    assert all(count % 12 == 0 or count == IN_CHANNELS[layer] for layer, count in counts.items())


def test_table_without_what_is_asked_for(refuse, small_table, tmp_path):
    lines = small_table.read_text().splitlines(keepends=True)
    (tmp_path / "halves.csv").write_text("".join(line for line in lines if ",1.0," not in line))
    expected = {
        ("--level", "layer"): "halves.csv: no weight row is of a whole layer: measure ratio 1 too, or search with "
        "--level sub_tensor\n",
        ("--channel_multiple", 100): "halves.csv: no weight row is of a whole layer or a multiple of 100 channels: "
        "measure ratio 1 too, or give a smaller --channel_multiple\n",
    }
    for words, message in expected.items():
        assert refuse("--contributions", "halves.csv", *words) == message


# ---- all microcontrollers


@pytest.fixture(scope="module")
def all_mcus(small, tmp_path_factory):
    """At a resolution that is too much for the smallest."""
    out_dir = tmp_path_factory.mktemp("all") / "out"
    words = dict(zip(small[::2], small[1::2], strict=True)) | {"--resolution": 96, "--evaluations": 40}
    del words["--memory"], words["--budget_kib"]
    words = [word for pair in words.items() for word in pair]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{RECIPE}.py", *map(str, words), "--all_mcus", "--out_dir", str(out_dir)])
        run_recipe(main)
    return out_dir


def rows_of(all_mcus):
    return {row["mcu"]: row for row in json.loads((all_mcus / "report.json").read_text())["mcus"]}


def test_all_mcus_have_a_scheme_within_their_budget(all_mcus):
    described = describe_network("none", (3, 96, 96), 10)
    peak_memory, rows = PeakMemory(described.operations), rows_of(all_mcus)
    assert set(rows) == set(MICROCONTROLLERS)
    fitting = {name for name in rows if peak_memory.floor_bytes <= MICROCONTROLLERS[name].budget_bytes}
    assert {path.name for path in all_mcus.glob("mobilenet*.json")} == {
        f"mobilenet_v2-w0.35_{name}.json" for name in fitting
    }
    for name in fitting:
        scheme = described.load_scheme(all_mcus / f"mobilenet_v2-w0.35_{name}.json")
        assert scheme_fits(peak_memory, scheme, MICROCONTROLLERS[name])
        assert rows[name]["memory_bytes"] == peak_memory.peak_bytes(scheme) <= rows[name]["budget_bytes"]
        assert rows[name]["budget_bytes"] == MICROCONTROLLERS[name].budget_bytes
        assert rows[name]["score"] <= rows[name]["optimum_score"] + 1e-12
    assert 0 < len(fitting) < len(rows)


def test_mcus_that_are_too_small_are_told_the_resolution_that_would_do(all_mcus):
    rows = [row for row in rows_of(all_mcus).values() if "too_small" in row]
    assert {row["mcu"] for row in rows} == {"stm32f411", "stm32f407"}
    for row in rows:
        (resolution,) = map(int, re.findall(r"--resolution (\d+)$", row["too_small"]))
        for pixels, fits in ((resolution, True), (resolution + 16, False)):
            operations = describe_network("none", (3, pixels, pixels), 10).operations
            assert (PeakMemory(operations).floor_bytes <= row["budget_bytes"]) == fits


def test_front_is_a_picture(all_mcus):
    with Image.open(all_mcus / "front.png") as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)


def test_scheme_of_one_of_all_mcus_says_how_to_get_it_again(all_mcus, tmp_path):
    scheme = UpdateScheme.load(all_mcus / "mobilenet_v2-w0.35_nrf52840.json")
    words = shlex.split(scheme.provenance["command"])[3:]
    assert (scheme.provenance["mcu"], words[words.index("--mcu") + 1]) == ("nrf52840", "nrf52840")
    again = call(*words, "--logger", "none", "--out_dir", tmp_path / "out")
    assert chosen(again.scheme) == chosen(scheme)


# ---- Weights & Biases


def test_offline_run_holds_course_table_and_scheme(command, offline_run, small, small_table, monkeypatch, tmp_path):
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    words = (*small, "--evaluations", 80, "--population", 20)
    ended = command(RECIPE, *words, "--logger", "wandb", "--out_dir", tmp_path / "out")
    wandb.teardown()
    assert ended.status == 0, ended.errors
    logged, found = offline_run(tmp_path / "out"), found_in(tmp_path / "out")

    rows = [row for row in logged.history if "search/best" in row]
    names = ("generation", "evaluations", "best", "mean", "spread", "memory_bytes")
    assert [{name: row[f"search/{name}"] for name in names} for row in rows] == found.history
    distances = [row["search/distance_to_optimum"] for row in rows]
    assert distances == pytest.approx([found.report["optimum_score"] - row["search/best"] for row in rows])
    assert rows[-1]["search/memory_bytes"] == found.report["memory_bytes"]

    (file,) = logged.files.glob("media/table/contributions*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["kind", "bias_depth", "layer", "ratio", "gain", "gain_std", "runs"]
    assert table["data"] == [list(vars(row).values())[:7] for row in ContributionTable.load(small_table).rows]

    (artifact,) = (artifact for artifact in logged.artifacts if artifact.type == "update-scheme")
    assert [entry.path for entry in artifact.manifest.contents] == ["scheme.json"]
    assert json.loads(artifact.metadata) == found.scheme.to_dict()
    assert json.loads(artifact.metadata)["provenance"]["command"].startswith(f"uv run recipes/{RECIPE}.py ")
    assert logged.summary["score"] == found.report["score"]
    assert logged.config["arguments"]["population"] == 20
    (picture,) = logged.files.glob("media/images/search*.png")
    assert picture.read_bytes() == (tmp_path / "out/search.png").read_bytes()

    unlogged = call(*words, "--out_dir", tmp_path / "unlogged")
    assert (unlogged.fitness, chosen(unlogged.scheme)) == (found.fitness, chosen(found.scheme))


def test_offline_run_of_a_computed_scheme(command, offline_run, by_gradient, monkeypatch, tmp_path):
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    ended = command(RECIPE, *by_gradient, "--level", "layer", "--logger", "wandb", "--out_dir", tmp_path / "out")
    wandb.teardown()
    assert ended.status == 0, ended.errors
    logged, found = offline_run(tmp_path / "out"), found_in(tmp_path / "out")
    (artifact,) = (artifact for artifact in logged.artifacts if artifact.type == "update-scheme")
    assert json.loads(artifact.metadata) == found.scheme.to_dict()
    assert logged.summary["score"] == found.report["score"]
    assert logged.summary["score_unit"] == "nats per unit of learning rate"


# ---- wrong input


# one of each kind; all that a plan refuses is in search/test_plan.py
MISTAKES = {
    "missing table": (("--contributions", "nowhere.csv"), r"nowhere\.csv: the file cannot be read: No such"),
    "a file of that name": (("--contributions", "./gradient"), "gradient: the file cannot be read: No such"),
    "options that contradict": (("--mcu", "stm32f746"), "a microcontroller and budget_kib are two budgets: give one"),
    "budget in words": (("--budget_kib", "much"), "budget_kib is much: give a number"),
    "unknown memory": (("--memory", "flash"), "memory is .*flash.*: give one of 'peak', 'extra'"),
    "unknown data": (("--data", "mnist"), "data is .*mnist.*: give one of .*digits"),
    "unknown data option": (("--data", "digits", "--data_options", '{"colour": 1}'), "digits has no option 'colour'"),
    "no steps": (("--steps", 0, "--fitness", "accuracy", "--data", "digits"), "steps is 0: give 1 or more"),
    "width 0": (("--width", 0), "width .*0"),
    "no classes": (("--num_classes", 0), "num_classes .*0"),
    "no channels": (("--in_channels", 0), "in_channels .*0"),
    "unknown option": (("--epochs", 3), "epochs"),
    "nothing to resume": (("--resume",), "there is no run in out: start it without --resume"),
    "a gradient of nothing": (("--contributions", "gradient"), "a gradient is that of training samples: say of what"),
    "a gradient too deep": ((*WITH_GRADIENT, "--base_depth", 52), "base_depth is 52: give no more than the 51 convol"),
    "a gradient too small": ((*WITH_GRADIENT, "--budget_kib", 0.01), "budget_bytes is 10 of extra memory, but the sm"),
}  # fmt: skip


@pytest.fixture
def refuse(command, small, monkeypatch, tmp_path):
    """One clear line and exit status 2, and nothing is written; returns the line."""
    monkeypatch.chdir(tmp_path)

    def call(*changes):
        before = sorted(tmp_path.rglob("*"))
        ended = command(RECIPE, *small, "--out_dir", "out", *changes)
        assert (ended.status, ended.output) == (2, ""), ended.errors
        assert ended.errors.startswith(f"{RECIPE}.py: error: ")
        assert ended.errors.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return ended.errors.removeprefix(f"{RECIPE}.py: error: ")

    return call


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_input(mistake, refuse):
    changes, message = MISTAKES[mistake]
    error = refuse(*changes)
    assert re.search(message, error), error


@pytest.fixture
def table_with_a_gap(small_table, tmp_path):
    """A table that lacks an expanding convolution."""
    lines = small_table.read_text().splitlines(keepends=True)
    (tmp_path / "gap.csv").write_text("".join(line for line in lines if "features.15" not in line))
    return tmp_path / "gap.csv"


def test_bad_table(refuse, table_with_a_gap):
    """What else may be wrong with a table is in tests/modules/search/test_contributions.py."""
    error = refuse("--contributions", "gap.csv")
    missing = "missing layers: the contribution table has no weight rows of features.15.conv.0.0: measure them, "
    assert error.startswith(f"gap.csv: {missing}")
    assert error.endswith("--allow_missing_layers\n")


def test_missing_layers_can_be_allowed(small, table_with_a_gap, tmp_path):
    words = (*small, "--contributions", table_with_a_gap, "--allow_missing_layers", "true", "--evaluations", 40)
    found = call(*words, "--out_dir", tmp_path / "out")
    assert found.scheme.weights
    assert "features.15.conv.0.0" not in found.scheme.weights


@pytest.mark.parametrize("memory", ["extra", "peak"])
def test_budget_that_no_scheme_can_meet(memory, refuse, small, tmp_path):
    """The error says the smallest that would do, and it does."""
    error = refuse("--memory", memory, "--budget_kib", 0.01)
    assert re.match(rf"budget_bytes is 10 of {memory} memory, but the smallest scheme, the classifier only, ", error)
    smallest = int(re.search(r"needs [\d.]+ KiB: give at least (\d+) bytes\n$", error)[1])
    described = describe_network("none", (3, 32, 32), 10)
    classifier_only = UpdateScheme(described.name, 0)
    assert smallest == math.ceil(memory_bytes(memory, described, classifier_only))
    found = call(*small, "--memory", memory, "--budget_kib", smallest / 1024, "--out_dir", tmp_path / "smallest")
    assert found.report["memory_bytes"] <= smallest == found.report["budget_bytes"]


def test_microcontroller_that_no_scheme_fits(refuse, small, tmp_path):
    """The error says the resolution that would do, and it does."""
    peak = ("--memory", "peak", "--budget_kib", "null", "--mcu", "stm32f411")
    error = refuse(*peak, "--resolution", 128)
    assert error.startswith("stm32f411 has 96.0 KiB for a training step, but even the classifier alone needs ")
    resolution = re.search(r" at 128 px; .*: give --resolution (\d+)\n$", error)[1]
    words = (*small, *peak, "--resolution", resolution, "--evaluations", 5)
    found = call(*words, "--out_dir", tmp_path / "smaller")
    assert found.report["memory_bytes"] <= found.report["budget_bytes"] == 96 * 1024


def test_folder_of_something_else(refuse, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    assert refuse().startswith("out is not empty: give another --out_dir, or --resume to go on with the run in it")


@pytest.fixture
def stopped(killed, monkeypatch, tmp_path):
    """A copy of a search that was killed, as the folder ``out``."""
    shutil.copytree(killed["table"], tmp_path / "out")
    return tmp_path / "out"


def resumed_with_error(command, words, out_dir, *changes):
    ended = command(RECIPE, *words, *changes, "--resume", "--out_dir", out_dir)
    assert (ended.status, ended.output) == (2, ""), ended.errors
    assert ended.errors.count("\n") == 1
    return ended.errors.removeprefix(f"{RECIPE}.py: error: ")


def test_another_search_in_the_folder(stopped, command, words_of):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    error = resumed_with_error(command, words_of["table"], stopped, "--budget_kib", 90)
    assert "was started with budget_kib 60.0, not 90.0: resume it with --config " in error
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_table_that_was_changed_meanwhile(stopped, command, words_of, tmp_path):
    """Scores by two tables do not compare."""
    table = tmp_path / "contributions.csv"
    shutil.copy(MEASURED, table)
    (stopped / "config.yaml").write_text((stopped / "config.yaml").read_text().replace(str(MEASURED), str(table)))
    table.write_text(table.read_text().replace("bias,36,,,0.01", "bias,36,,,0.09"))
    error = resumed_with_error(command, words_of["table"], stopped, "--contributions", table)
    assert str(table) in error


def test_damaged_state(stopped, command, words_of):
    (stopped / "search.json").write_bytes(b'{"generation": 3, "popu')
    error = resumed_with_error(command, words_of["table"], stopped)
    expected = f"{stopped / 'search.json'} cannot be read, it was damaged: remove it to begin the search again\n"
    assert error == expected


def test_finished_search_is_not_resumed(whole, command, words_of):
    folder = whole["table"].folder
    error = resumed_with_error(command, words_of["table"], folder)
    assert error == f"the run in {folder} is finished: its results are in {folder / 'report.json'}\n"
