"""What a search was asked for, and every refusal that needs neither the data nor the disk."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget, budget_of
from microtune.recipes.search.genetic_algorithm import POPULATION
from microtune.recipes.search.options import (
    GRADIENT,
    Effort,
    SearchBudgetOptions,
    TrialSettings,
    check_data_is_named,
)
from microtune.recipes.search.rungs import Rungs
from microtune.recipes.search.workers import check_workers
from microtune.recipes.training.command_line import check_at_least_one, listed, numbers

EVALUATIONS = 5000  # by a table
RUNGS = "60,180,540"
RUNGS_OF_A_FRONT = "60,180"  # which needs many schemes on the last
FINALISTS = 4
CHOICE_SAMPLES = 512  # of a gradient
TOTAL_STEPS = 20_000  # of a search on rungs


@dataclass(frozen=True)
class SearchPlan:
    """What is to be searched for, with every default filled in that no file decides.

    Args:
        is_gradient: Whether the search goes by a gradient, in place of a measured table.
        budget: What a scheme may take; None for the budgets of all known microcontrollers.
        effort: How schemes are judged, and for how long.
        rungs: What the evaluations cost, and may cost.
        settings: Settings of the trials, as long as the last rung; a measured table brings another base depth.
        choice_samples: Number of samples of the gradient.
    """

    is_gradient: bool
    budget: Budget | None
    effort: Effort
    rungs: Rungs
    settings: TrialSettings
    choice_samples: int

    @property
    def is_computed(self) -> bool:
        """Whether the best scheme is computed, and not searched for."""
        return self.is_gradient and self.effort.fitness == "table"


def plan_search(
    contributions: str,
    budget: SearchBudgetOptions,
    effort: Effort,
    trials: TrialSettings,
    *,
    base_depth: int | None = None,
    choice_samples: int | None = None,
    channel_multiple: int = 1,
    allow_missing_layers: bool = False,
    processes: int = 1,
    cluster: str | None = None,
    resume: bool = False,
) -> SearchPlan:
    """Fills in the defaults, and refuses what cannot be; reads no file and no data, and writes nothing.

    Args:
        contributions: File of a measured table, or ``GRADIENT``.
        budget, effort, trials: Options of the recipe.
        base_depth, choice_samples, channel_multiple, allow_missing_layers: As in the recipe.
        processes, cluster, resume: As in the recipe.

    Raises:
        UserError: A number is out of its range, or options contradict one another.

    Example::

        plan = plan_search("contributions.csv", SearchBudgetOptions(), Effort(finalists=0), TrialSettings())
        str(plan.budget), plan.effort.evaluations  # ("288.0 KiB of peak memory of stm32f746", 5000)
    """
    check_at_least_one(
        evaluations=effort.evaluations, population=effort.population, trial_seeds=effort.trial_seeds,
        final_steps=effort.final_steps, final_seeds=effort.final_seeds, channel_multiple=channel_multiple,
        base_depth=base_depth, choice_samples=choice_samples,
    )  # fmt: skip
    check_workers(processes, cluster)
    is_gradient = contributions == GRADIENT
    if is_gradient:
        refuse_beside_gradient(effort, budget.all_mcus, allow_missing_layers)
    else:
        if not Path(contributions).suffix and len(Path(contributions).parts) == 1 and os.sep not in contributions:
            raise UserError(
                f"contributions is {contributions!r}: give the file of a table, such as measure_contributions.py "
                f"writes, or {GRADIENT}"
            )
        refuse_beside_table(base_depth=base_depth, choice_samples=choice_samples)
    refuse_beside_rungs(effort)
    refuse_beside_front(effort)
    if effort.fitness == "table" and effort.evaluations is None:
        effort = replace(effort, evaluations=EVALUATIONS)
    rungs = rungs_of(effort, trials)
    if effort.finalists is None:
        # the last of several rungs is a longer training
        is_done = (is_gradient and effort.fitness == "table") or len(rungs.steps) > 1 or effort.front
        effort = replace(effort, finalists=0 if is_done else FINALISTS)
    effort = replace(effort, population=effort.population or POPULATION[effort.fitness])
    refuse_without_data(trials, effort, budget.all_mcus, is_gradient)
    if effort.fitness == "accuracy":
        trials = replace(trials, steps=rungs.steps[-1])
    if budget.all_mcus:
        refuse_beside_all_mcus(budget, resume)
    return SearchPlan(
        is_gradient,
        None if budget.all_mcus else budget_of(
            budget.memory, budget.budget_kib, budget.mcu, budget.sram_bytes, budget.flash_bytes, budget.reserve_bytes
        ),
        effort,
        rungs,
        replace(trials, base_depth=base_depth or TrialSettings.base_depth),
        choice_samples or CHOICE_SAMPLES,
    )  # fmt: skip


def refuse_beside_rungs(effort: Effort) -> None:
    """Raises ``UserError`` where options make no sense beside rungs or a budget of steps, or beside a table."""
    if effort.judged_by != Effort.judged_by and effort.fitness == "table":
        raise UserError(f"judged_by is {effort.judged_by}, but a table has scores alone: give --fitness accuracy")
    if effort.proposed_by != "evolution" and effort.fitness == "table":
        raise UserError(
            f"proposed_by is {effort.proposed_by}, but by a table random search stands beside the evolution in any "
            "case: leave it out, or give --fitness accuracy"
        )
    for name in ("rungs", "total_steps"):
        value = getattr(effort, name)
        if value is not None and effort.fitness == "table":
            raise UserError(f"{name} is {value}, but a table's score takes no steps: give --fitness accuracy")
        if value is not None and effort.evaluations is not None:
            raise UserError(f"evaluations is {effort.evaluations} beside {name} {value}: leave one of them out")


def refuse_beside_front(effort: Effort) -> None:
    """Raises ``UserError`` where options make no sense beside a search of the front."""
    if effort.front and effort.fitness == "table":
        raise UserError("front is of schemes that are trained: give --fitness accuracy, or --all_mcus by a table")
    if effort.front and effort.finalists:
        raise UserError(f"finalists is {effort.finalists}, but a front has no single best: leave --finalists out")
    if effort.front and effort.proposed_by != "evolution":
        raise UserError(f"proposed_by is {effort.proposed_by}, but a front is evolved: leave one of them out")


def rungs_of(effort: Effort, trials: TrialSettings) -> Rungs:
    """What the evaluations of a search cost, and may cost; of the effort with its defaults."""
    if effort.fitness == "table":
        return Rungs((1,), effort.evaluations)
    rungs = effort.rungs
    if rungs is None and effort.evaluations is None and trials.steps == TrialSettings.steps:
        rungs = RUNGS_OF_A_FRONT if effort.front else RUNGS
    steps = (trials.steps,) if rungs is None else tuple(numbers(rungs, int))
    if effort.evaluations is not None:
        return Rungs(steps, effort.evaluations * trials.steps)
    total_steps = TOTAL_STEPS if effort.total_steps is None else effort.total_steps
    return Rungs(steps, total_steps // effort.trial_seeds)


def refuse_beside_gradient(effort: Effort, all_mcus: bool, allow_missing_layers: bool) -> None:
    """Raises ``UserError`` where options make no sense beside contributions from a gradient."""
    if all_mcus:
        raise UserError("all_mcus searches by a measured table: give its file as --contributions, or one --mcu")
    if allow_missing_layers:
        raise UserError("allow_missing_layers is of a measured table, and a gradient misses none: leave it out")
    for name in ("evaluations", "population", "finalists"):
        value = getattr(effort, name)
        if value and effort.fitness == "table":
            raise UserError(
                f"{name} is {value}, but by the gradient alone the best scheme is computed, not searched for: leave "
                f"--{name} out, or train schemes with --fitness accuracy"
            )


def refuse_beside_table(**of_a_gradient: int | None) -> None:
    """Raises ``UserError`` where options are given that only contributions from a gradient have."""
    for name, value in of_a_gradient.items():
        if value is not None:
            raise UserError(
                f"{name} is {value}, but a table brings its own: leave it out, or --contributions {GRADIENT}"
            )


def refuse_beside_all_mcus(budget: SearchBudgetOptions, resume: bool) -> None:
    """Raises ``UserError`` where options make no sense beside the budgets of all microcontrollers."""
    if resume:
        raise UserError("all_mcus takes less than a minute or two and is not resumed: leave --resume out")
    if budget != SearchBudgetOptions(all_mcus=True):
        raise UserError("all_mcus takes the budget of each known microcontroller: leave out every other budget")


def refuse_without_data(settings: TrialSettings, effort: Effort, all_mcus: bool, is_gradient: bool) -> None:
    """Raises ``UserError`` where schemes are to be trained, but there is nothing to train on."""
    if effort.finalists < 0:
        raise UserError(f"finalists is {effort.finalists}: give 0 or more")
    if all_mcus and effort.fitness == "accuracy":
        raise UserError("all_mcus searches by the table: give --fitness table, or one --mcu at a time")
    if settings.data is None and is_gradient:
        raise UserError("a gradient is that of training samples: say of what with --data")
    if settings.data is None and effort.fitness == "accuracy":
        raise UserError("fitness accuracy trains every scheme: say on what with --data, or give --fitness table")
    if settings.data is None and effort.finalists and not all_mcus:
        raise UserError("the finalists are trained: say on what with --data, or give --finalists 0")


@dataclass(frozen=True)
class MeasurementPlan:
    """Which contributions are to be measured.

    Args:
        layers: Layers whose weights are updated: ``"expanding"``, ``"all"``, or their names.
        ratios: Update ratios of the weights.
        bias_depths: Bias depths; None for all down to the base depth.
    """

    layers: str | list[str]
    ratios: list[float]
    bias_depths: list[int] | None


def plan_measurement(
    layers: str, ratios: str, bias_depths: str | None, seeds: int, side_by_side: int, trials: TrialSettings
) -> MeasurementPlan:
    """Understands lists, and refuses what cannot be; reads no file and no data, and writes nothing.

    Args:
        layers, ratios, bias_depths, seeds, side_by_side, trials: As in the recipe.

    Raises:
        UserError: A list is none, or a number is out of its range, or there is no data.

    Example::

        plan_measurement("all", "0.5,1", "2,4", 3, 4, TrialSettings("digits")).ratios  # [0.5, 1.0]
    """
    check_at_least_one(seeds=seeds, side_by_side=side_by_side)
    check_data_is_named(trials)
    depths = None if bias_depths is None else numbers(bias_depths, int)
    for depth in depths or ():
        if not 0 <= depth <= trials.base_depth:
            raise UserError(f"bias depth {depth} is out of its range: give 1 to the base depth, {trials.base_depth}")
    return MeasurementPlan(layers if layers in ("expanding", "all") else listed(layers), numbers(ratios, float), depths)
