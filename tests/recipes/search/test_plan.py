"""What a search is asked for: the defaults that it fills in, and all that it refuses before anything is read."""

import re

import pytest

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget
from microtune.recipes.search.options import Effort, SearchBudgetOptions, TrialSettings
from microtune.recipes.search.plan import plan_measurement, plan_search
from microtune.recipes.search.rungs import Rungs

STM32F746 = Budget("peak", 288 * 1024, MICROCONTROLLERS["stm32f746"])
OF_BUDGET, OF_EFFORT = SearchBudgetOptions.__dataclass_fields__, Effort.__dataclass_fields__
OF_TRIALS = TrialSettings.__dataclass_fields__.keys() - {"base_depth"}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """A folder with nothing in it: a plan reads nothing, and leaves nothing."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


def planned(contributions="nowhere.csv", **options):
    """The plan by flat options, as the command line has them."""
    groups = [
        kind(**{name: value for name, value in options.items() if name in names})
        for kind, names in ((SearchBudgetOptions, OF_BUDGET), (Effort, OF_EFFORT), (TrialSettings, OF_TRIALS))
    ]
    others = {name: value for name, value in options.items() if name not in {*OF_BUDGET, *OF_EFFORT, *OF_TRIALS}}
    return plan_search(contributions, *groups, **others)


def test_defaults_by_the_table():
    plan = planned(data="digits")
    assert (plan.is_gradient, plan.is_computed) == (False, False)
    assert plan.budget == STM32F746
    assert (plan.effort.evaluations, plan.effort.population, plan.effort.finalists) == (5000, 40, 4)


def test_defaults_by_accuracy():
    plan = planned(data="digits", fitness="accuracy")
    assert (plan.effort.evaluations, plan.effort.population, plan.effort.finalists) == (None, 8, 0)
    assert plan.effort.judged_by == "loss"
    assert planned(data="digits", fitness="accuracy", evaluations=9).effort.finalists == 4
    assert planned(data="digits", fitness="accuracy", front=True, rungs="60").effort.finalists == 0


def test_defaults_by_a_gradient():
    plan = planned("gradient", data="digits")
    assert (plan.is_gradient, plan.is_computed, plan.effort.finalists) == (True, True, 0)
    assert (plan.settings.base_depth, plan.choice_samples) == (36, 512)
    plan = planned("gradient", data="digits", fitness="accuracy")
    assert (plan.is_computed, plan.effort.finalists, plan.effort.evaluations) == (False, 0, None)


@pytest.mark.parametrize(
    ("given", "rungs", "longest"),
    [
        ({}, Rungs((60, 180, 540), 20_000), 540),
        ({"evaluations": 200}, Rungs((100,), 200 * 100), 100),
        ({"front": True}, Rungs((60, 180), 20_000), 180),
        ({"steps": 30}, Rungs((30,), 20_000), 30),
        ({"evaluations": 7, "steps": 30}, Rungs((30,), 7 * 30), 30),
        ({"rungs": "60, 180"}, Rungs((60, 180), 20_000), 180),
        ({"rungs": "60,180,540", "total_steps": 9000}, Rungs((60, 180, 540), 9000), 540),
        ({"total_steps": 9000, "steps": 30}, Rungs((30,), 9000), 30),
    ],
)
def test_trials_are_as_long_as_the_rungs(given, rungs, longest):
    plan = planned(data="digits", fitness="accuracy", **given)
    assert (plan.rungs, plan.settings.steps) == (rungs, longest)


def test_what_is_given_stays():
    given = {"evaluations": 7, "population": 3, "finalists": 0, "trial_seeds": 2, "final_steps": 5, "final_seeds": 4}
    plan = planned("gradient", data="digits", fitness="accuracy", seed=9, base_depth=12, choice_samples=70, **given)
    assert plan.effort == Effort("accuracy", **given, seed=9)
    assert (plan.settings, plan.choice_samples) == (TrialSettings("digits", base_depth=12), 70)


def test_all_microcontrollers_have_a_budget_each():
    assert planned(all_mcus=True).budget is None


EXTRA = {"memory": "extra", "budget_kib": 30.0}
BY_GRADIENT = {"contributions": "gradient", "data": "digits"}
ALL_MCUS = {"all_mcus": True, "finalists": 0}
MISTAKES = {
    "no extra memory without budget": ({"memory": "extra"}, "give --budget_kib, or --memory peak"),
    "two budgets": (EXTRA | {"mcu": "stm32f746"}, "a microcontroller and budget_kib are two budgets: give one of"),
    "misspelt": ({"contributions": "gradeint"}, "contributions is 'gradeint': give the file of a table, such as meas"),
    "rungs by table": ({"rungs": "60,180", "data": "digits"}, "rungs is 60,180, but a table's score takes no steps"),
    "top-1 by table": ({"judged_by": "top1", "data": "digits"}, "judged_by is top1, but a table has scores alone"),
    "front by table": ({"front": True, "data": "digits"}, "front is of schemes that are trained: give --fitness accu"),
    "front with finalists": (
        {"front": True, "data": "digits", "fitness": "accuracy", "finalists": 2},
        "finalists is 2, but a front has no single best: leave --finalists out",
    ),
    "front at random": (
        {"front": True, "data": "digits", "fitness": "accuracy", "proposed_by": "random"},
        "proposed_by is random, but a front is evolved: leave one of them out",
    ),
    "at random by table": (
        {"proposed_by": "random", "data": "digits"},
        "proposed_by is random, but by a table random search stands beside the evolution in any case",
    ),
    "steps by table": ({"total_steps": 9, "data": "digits"}, "total_steps is 9, but a table's score takes no steps"),
    "two efforts": (
        {"total_steps": 900, "evaluations": 9, "data": "digits", "fitness": "accuracy"},
        "evaluations is 9 beside total_steps 900: leave one of them out",
    ),
    "rungs that fall": (
        {"rungs": "180,60", "data": "digits", "fitness": "accuracy"},
        "rungs is 180,60: give numbers of steps, each more than the one before, such as 60,180,540",
    ),
    "no rungs": ({"rungs": "a", "data": "digits", "fitness": "accuracy"}, "'a' is no list of numbers"),
    "too few steps": (
        {"rungs": "60", "total_steps": 59, "data": "digits", "fitness": "accuracy"},
        "total_steps is 59: give at least one trial of 60 steps",
    ),
    "unknown microcontroller": ({"mcu": "stm32h74"}, r"unknown microcontroller 'stm32h74' \(did you mean stm32h743"),
    **{
        f"budget {value}": ({"budget_kib": value}, f"budget_kib is {value}: give a positive number of kibibytes")
        for value in (0.0, -1.0, float("nan"), float("inf"))
    },
    **{
        f"no {name}": ({name: 0}, f"{name} is 0: give 1 or more")
        for name in ("evaluations", "population", "trial_seeds", "final_steps", "final_seeds", "processes",
                     "channel_multiple", "base_depth", "choice_samples", "steps", "batch_size", "copies", "resolution")
    },
    **{
        f"{name} {value}": ({name: value}, f"{name} is {value}: give a positive number")
        for name in ("width", "learning_rate", "features_limit_mib") for value in (0.0, float("nan"))
    },
    "a cluster beside processes": ({"processes": 2, "cluster": "tcp://there:1"}, "processes is 2 beside cluster tcp://"),
    "accuracy of what": ({"fitness": "accuracy"}, "fitness accuracy trains every scheme: say on what with --data"),
    "finalists of what": ({"finalists": 4}, "the finalists are trained: say on what with --data, or give --finalis"),
    "finalists by default": ({"finalists": None}, "the finalists are trained: say on what with --data"),
    "finalists negative": ({"finalists": -1}, "finalists is -1: give 0 or more"),
    "all by accuracy": ({"all_mcus": True, "fitness": "accuracy", "data": "digits"}, "give --fitness table"),
    "all resumed": (ALL_MCUS | {"resume": True}, "all_mcus takes less than .* is not resumed: leave --resume out"),
    **{
        f"all with {name}": (ALL_MCUS | {name: value}, "all_mcus takes the budget of each known microcontroller: leave")
        for name, value in {"memory": "extra", "budget_kib": 9.0, "mcu": "rp2040", "reserve_bytes": 0}.items()
    },
    "depth of a table": ({"base_depth": 9}, "base_depth is 9, but a table brings its own: leave it out, or --contrib"),
    "samples of a table": ({"choice_samples": 9}, "choice_samples is 9, but a table brings its own: leave it out"),
    "a gradient of what": ({"contributions": "gradient"}, "a gradient is that of training samples: say of what with"),
    "a gradient, all": (BY_GRADIENT | {"all_mcus": True}, "all_mcus searches by a measured table: give its file"),
    "a gradient, missing": (BY_GRADIENT | {"allow_missing_layers": True}, "a gradient misses none: leave it out"),
    **{
        f"a gradient, {name}": (BY_GRADIENT | {name: 3}, f"{name} is 3, but by the gradient alone the best scheme is "
                                f"computed, not searched for: leave --{name} out, or train schemes with --fitness acc")
        for name in ("evaluations", "population", "finalists")
    },
    "two weights": ({"network": "small.safetensors", "weights": "torchvision"}, "is an int8 network, which has its"),
    "another network": ({"network": "resnet18"}, "network is 'resnet18': give mobilenet_v2, or the .safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refused(mistake):
    """Although neither the table nor the data is there."""
    options, message = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        planned(**{"finalists": 0} | options)
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value)


def test_int8_network_is_its_own_weights():
    assert TrialSettings("digits", network="small.safetensors").source == "small.safetensors"


# ---- a measurement


def measured(layers="expanding", ratios="0.5,1", bias_depths=None, seeds=1, side_by_side=1, data="digits"):
    settings = TrialSettings(data, base_depth=6)
    return plan_measurement(layers, ratios, bias_depths, seeds, side_by_side, settings)


def test_lists_of_a_measurement():
    plan = measured("a.0, b.1", "1,0.25", "0,6")
    assert (plan.layers, plan.ratios, plan.bias_depths) == (["a.0", "b.1"], [1.0, 0.25], [0, 6])
    assert (measured("all").layers, measured("").layers, measured().bias_depths) == ("all", [], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "a b"}, "'a b' has blanks in it: separate by commas"),
        ({"ratios": "half"}, "'half' is no list of numbers: separate them by commas, as in 0.25,0.5"),
        ({"ratios": "0.5;1"}, "'0.5;1' is no list of numbers: separate them by commas"),
        ({"bias_depths": "deep"}, "'deep' is no list of numbers: separate them by commas"),
        ({"bias_depths": "1.5"}, r"'1\.5' is no list of numbers: separate them by commas"),
        ({"bias_depths": "3,7"}, "bias depth 7 is out of its range: give 1 to the base depth, 6"),
        ({"bias_depths": "-1"}, "bias depth -1 is out of its range: give 1 to the base depth, 6"),
        ({"seeds": 0}, "seeds is 0: give 1 or more"),
        ({"side_by_side": 0}, "side_by_side is 0: give 1 or more"),
        ({"data": None}, "trials need data: give --data"),
    ],
)
def test_refused_measurement(options, message):
    with pytest.raises(UserError, match=message):
        measured(**options)
