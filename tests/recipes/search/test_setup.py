"""What a search is about: one budget, the data's network, good guesses, and a command that gives the scheme again."""

import hashlib
import random
import shlex

import pytest
import torch

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.user_error import UserError
from microtune.recipes.search.setup import (
    Budget,
    all_budgets,
    budget_of,
    good_guesses,
    measure_gradient,
    provenance_of,
    searched_network,
)
from microtune.recipes.search.trials import TrialSettings
from microtune.recipes.training.networks import describe_network

BUDGETS = {
    "extra": (("extra", 100.0, None, None, None, None), ("extra", 102400, None)),
    "peak in KiB": (("peak", 0.5, None, None, None, None), ("peak", 512, None)),
    "default": (("peak", None, None, None, None, None), ("peak", 288 * 1024, "stm32f746")),
    "by name": (("peak", None, "nrf52840", None, None, None), ("peak", 192 * 1024, "nrf52840")),
    "other reserve": (("peak", None, "stm32f746", None, None, 0), ("peak", 320 * 1024, "stm32f746")),
    "reserve of the default": (("peak", None, None, None, None, 1024), ("peak", 319 * 1024, "stm32f746")),
    "own": (("peak", None, None, 65536, None, None), ("peak", 32 * 1024, "custom")),
}


@pytest.mark.parametrize("kind", BUDGETS)
def test_budget(kind):
    arguments, (memory, size_bytes, name) = BUDGETS[kind]
    budget = budget_of(*arguments)
    assert (budget.memory, budget.size_bytes) == (memory, size_bytes)
    assert (budget.microcontroller and budget.microcontroller.name) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extra", None, None, None, None, None), "extra memory leaves out the forward pass"),
        (("extra", None, "stm32f746", None, None, None), "give --budget_kib, or --memory peak"),
        (("peak", 100.0, "stm32f746", None, None, None), "a microcontroller and budget_kib are two budgets"),
        (("extra", 100.0, None, None, None, 0), "a microcontroller and budget_kib are two budgets"),
        (("peak", None, "z80", None, None, None), "unknown microcontroller 'z80'"),
        *((("extra", value, None, None, None, None), f"budget_kib is {value}: give a positive number of kibibytes")
          for value in (0.0, -1.0, float("nan"), float("inf"))),
    ],
)  # fmt: skip
def test_no_budget(arguments, message):
    with pytest.raises(UserError, match=message):
        budget_of(*arguments)


def test_budget_in_words():
    assert str(Budget("peak", 288 * 1024, MICROCONTROLLERS["stm32f746"])) == "288.0 KiB of peak memory of stm32f746"
    assert str(Budget("extra", 1536)) == "1.5 KiB of extra memory"


def test_budgets_of_all_microcontrollers():
    budgets = all_budgets()
    assert {budget.microcontroller.name for budget in budgets} == set(MICROCONTROLLERS)
    assert all(budget.size_bytes == budget.microcontroller.budget_bytes for budget in budgets)
    assert [budget.size_bytes for budget in budgets] == sorted(budget.size_bytes for budget in budgets)


def test_network_is_that_of_the_data():
    settings = TrialSettings("digits", resolution=32)
    assert searched_network(settings, 96, None, 3, 5).input_shape == (1, 32, 32)


@pytest.mark.parametrize(("width_px", "shape"), [(None, (2, 48, 48)), (40, (2, 48, 40))])
def test_network_without_data(width_px, shape):
    described = searched_network(TrialSettings(width=0.5), 48, width_px, 2, 7)
    assert (described.name, described.input_shape) == ("mobilenet_v2-w0.5", shape)
    assert described.arguments["num_classes"] == 7


@pytest.fixture(scope="module")
def problem(small_table):
    described = describe_network("none", (3, 32, 32), 10)
    table = ContributionTable.load(small_table)
    return SearchProblem(described.name, PeakMemory(described.operations), table, 30 * 1024, "extra")


@pytest.mark.parametrize("population", [1, 2, 4, 16, 100])
def test_good_guesses(problem, population):
    """The optimum first, all of them distinct and within the budget, with room for what is random."""
    random.seed(0)
    optimum = proven_optimum(problem)
    guesses = good_guesses(problem, optimum, population)
    assert len(set(guesses)) == len(guesses) <= population * 3 / 4
    assert guesses[:1] == [optimum.genome][: len(guesses)]
    assert all(problem.fits(guess) for guess in guesses)
    if population == 100:
        assert len(set(guesses) & set(problem.neighbours(optimum.genome))) > 5


def test_guesses_depend_on_the_seed_only(problem):
    optimum = proven_optimum(problem)
    found = []
    for _ in range(2):
        random.seed(3)
        found.append(good_guesses(problem, optimum, 16))
    assert found[0] == found[1]


def test_provenance(tmp_path):
    table = tmp_path / "a table.csv"
    table.write_bytes(b"kind\n")
    arguments = {
        "contributions": str(table), "data": "digits", "mcu": "stm32f746", "budget_kib": None, "all_mcus": False,
        "seed": 3, "learning_rate": 0.1, "data_options": {"task": "words10"}, "out_dir": "there", "resume": True,
        "logger": "none",
    }  # fmt: skip
    budget = Budget("peak", 288 * 1024, MICROCONTROLLERS["stm32f746"])
    provenance = provenance_of("evolve_update_scheme", arguments, table, budget, {"score": 0.5})
    command = provenance.pop("command")
    assert shlex.split(command) == [
        *("uv", "run", "recipes/evolve_update_scheme.py", "--contributions", str(table), "--data", "digits"),
        *("--mcu", "stm32f746"),
        *("--all_mcus", "false", "--seed", "3", "--learning_rate", "0.1", "--data_options", '{"task": "words10"}'),
    ]
    assert provenance == {
        "contributions_sha256": hashlib.sha256(b"kind\n").hexdigest(),
        "contributions_arguments": None,
        "memory": "peak",
        "mcu": "stm32f746",
        "budget_bytes": 288 * 1024,
        "found": {"score": 0.5},
    }


def test_provenance_of_what_trains_nothing(tmp_path):
    """Settings of trials decide nothing then, but how the table was measured does."""
    table = tmp_path / "contributions.csv"
    table.write_bytes(b"kind\n")
    (tmp_path / "config.yaml").write_text("data: digits\nsteps: 20\n")
    arguments = {"contributions": str(table), "steps": 100, "weights": "none", "resolution": 32, "final_seeds": 3}
    provenance = provenance_of("evolve_update_scheme", arguments, table, Budget("extra", 1024), {})
    assert shlex.split(provenance["command"])[3:] == ["--contributions", str(table), "--resolution", "32"]
    assert provenance["contributions_arguments"] == {"data": "digits", "steps": 20}


@pytest.mark.parametrize(("asked", "taken", "measured"), [(70, 70, 38), (10**6, 90, 58), (20, 20, 20)])
def test_gradient_is_of_as_many_samples_as_asked_for_or_there_are(asked, taken, measured, tiny_cifar):
    """The first of the training's order: the same ones every time, and nothing else is drawn.

    The classifier has the first half of the batches of 32, and the gradient the others; of a single one both.
    """
    settings = TrialSettings("cifar10", str(tiny_cifar), width=0.35, resolution=32, base_depth=3)
    state = torch.get_rng_state()
    found = [measure_gradient(settings, asked, seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert [(one.samples, one.importance.samples) for one in found] == [(taken, measured)] * 3
    assert len(found[0].importance.layers) == 3
    of_samples = [[layer.activation for layer in one.importance.layers.values()] for one in found]
    first, again, other = map(torch.cat, of_samples)
    assert torch.equal(first, again)
    largest = first.max()
    assert not torch.allclose(first / largest, other / largest, rtol=1e-4, atol=0)


def test_trials_need_a_validation_split(tiny_cifar):
    """Data can do without one, trials cannot."""
    settings = TrialSettings("cifar10", str(tiny_cifar), {"validation_fraction": 0}, resolution=32)
    with pytest.raises(UserError, match="trials are judged on the validation split: leave validation_fraction 0 out"):
        searched_network(settings, 32, None, 3, 10)


def test_int8_network_is_its_own_weights():
    settings = TrialSettings("digits", network="small.safetensors")
    assert settings.source == "small.safetensors"
    with pytest.raises(UserError, match=r"small\.safetensors is an int8 network, which has its own weights"):
        TrialSettings("digits", weights="torchvision", network="small.safetensors")
    with pytest.raises(UserError, match="network is 'resnet18': give mobilenet_v2, or the"):
        TrialSettings("digits", network="resnet18")
