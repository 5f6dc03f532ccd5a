"""Evolves an update scheme that fits a microcontroller: a genetic algorithm in DEAP over bias depth and update ratios.

    uv run recipes/evolve_update_scheme.py --contributions CONTRIBUTIONS.csv --mcu stm32f746 --finalists 0
    uv run recipes/evolve_update_scheme.py --contributions gradient --data cifar10 --data_dir DIR --weights torchvision

Needs the table that ``measure_contributions.py`` writes. By that table (``--fitness table``) the search takes seconds,
and a solver's proven optimum stands beside what it finds; with ``--fitness accuracy`` every scheme is trained for some
steps, since gains do not add up: two seconds a trial on a core of an AMD EPYC, where the table's search takes six in
all.

With ``--contributions gradient`` nothing is measured by training: one backward pass over some training samples says
how much the loss of each channel's update falls to first order, and what fits with the highest sum is computed, down to
the single channel. With ``--fitness accuracy`` that is where the search begins, and every scheme has the channels of
the highest gain.
"""

import logging
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from microtune.datamodules.progress import progress_bar
from microtune.modules.atomic_files import write_json
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import all_budgets
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.genetic_algorithm import evolve, make_toolbox
from microtune.recipes.search.gradient_search import gradient_search, measure_gradient
from microtune.recipes.search.options import Effort, Level, SearchBudgetOptions, TrialSettings
from microtune.recipes.search.plan import plan_search
from microtune.recipes.search.provenance import provenance_of
from microtune.recipes.search.report import draw_front, print_computed, print_front, print_report
from microtune.recipes.search.run import RECIPE, begin_search, run_search
from microtune.recipes.search.rungs import Rungs
from microtune.recipes.search.table_search import make_problem, searched_network, searched_table, table_search
from microtune.recipes.search.workers import Workers
from microtune.recipes.training.command_line import flat, run_recipe
from microtune.recipes.training.networks import DescribedNetwork
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.run_folder import check_run_folder

log = logging.getLogger(__name__)


def main(
    contributions: str,
    level: Level = "sub_tensor",
    channel_multiple: int = 1,
    base_depth: int | None = None,
    choice_samples: int | None = None,
    allow_missing_layers: bool = False,
    input_width: int | None = None,
    in_channels: int = 3,
    num_classes: int = 10,
    processes: int = 1,
    cluster: str | None = None,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
    resume: bool = False,
    budget: SearchBudgetOptions = SearchBudgetOptions(),
    effort: Effort = Effort(),
    trials: TrialSettings = TrialSettings(),
) -> dict[str, Any]:
    """Evolves an update scheme that fits a microcontroller: a genetic algorithm in DEAP.

    Args:
        contributions: Table that measure_contributions.py wrote, or gradient: one backward pass in its place.
        level: Level of the updates: sub_tensor (some channels of a layer) or layer (whole layers only).
        channel_multiple: Number of which the updated channels of a layer are a multiple, or the whole layer; device
            kernels like 4.
        base_depth: Deepest bias depth of contributions by gradient, by default 36; a table brings its own.
        choice_samples: Number of training samples of the backward pass, by default 512: to half of them the classifier
            is fitted, the other half are for the pass.
        allow_missing_layers: Whether to search although the table lacks expanding convolutions within its base depth.
        input_width: Width of the input without data, where it is another than its height: of a spectrogram, its bands.
        in_channels: Number of channels of the input without data.
        num_classes: Number of outputs of the classifier without data.
        processes: Number of processes of this machine that train, one thread each.
        cluster: Address of a Dask scheduler whose workers train instead, such as tcp://10.0.0.5:8786.
        logger: Logger: wandb (offline unless you are logged in), or csv or none to do without.
        out_dir: Folder of the scheme; by default a new one below runs/.
        resume: Whether to go on with the search in out_dir after its last finished generation.
    """
    started, arguments = time.monotonic(), flat(locals())
    torch.set_num_threads(1)  # two busy jobs with two threads each slow one another several times
    plan = plan_search(
        contributions, budget, effort, trials, base_depth=base_depth, choice_samples=choice_samples,
        channel_multiple=channel_multiple, allow_missing_layers=allow_missing_layers, processes=processes,
        cluster=cluster, resume=resume,
    )  # fmt: skip
    check_run_folder(out_dir, resume)
    settings, table = plan.settings, None
    if not plan.is_gradient:  # read before the data, which may take long
        settings = replace(settings, base_depth=max(1, *ContributionTable.load(contributions).bias_gains))

    described = searched_network(settings, input_width, in_channels, num_classes)
    if not plan.is_gradient:
        table = searched_table(contributions, described, allow_missing_layers, level, channel_multiple)
    if plan.budget is None:
        return search_all_mcus(described, table, plan.effort, out_dir, arguments)
    if plan.is_gradient:
        measured = measure_gradient(settings, plan.choice_samples, plan.effort.seed)
        search = gradient_search(
            described, measured, plan.budget, settings.base_depth, level, channel_multiple,
            is_coarse=not plan.is_computed,
        )  # fmt: skip
    else:
        search = table_search(described, table, plan.budget)

    with Workers(processes, cluster) as workers:
        out_dir = begin_search(out_dir, arguments, resume)
        if plan.is_gradient and settings.source == "none":
            log.warning("schemes update little of a network that has learnt nothing: give --weights")
        report = run_search(
            search, plan.effort, plan.rungs, settings, plan.budget, workers, arguments, logger, out_dir, started
        )
    tell = print_computed if plan.is_computed else print_report
    tell(report, UpdateScheme.load(out_dir / "scheme.json"), out_dir)
    return report


def search_all_mcus(
    described: DescribedNetwork,
    table: ContributionTable,
    effort: Effort,
    out_dir: Path | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """A scheme for every microcontroller that the network fits, and for the others the resolution that would do."""
    started = time.monotonic()
    out_dir = begin_search(out_dir, arguments, resume=False)
    rows: list[dict[str, Any]] = []
    with progress_bar() as progress:
        for budget in progress.track(all_budgets(), description="microcontrollers"):
            name = budget.microcontroller.name
            rows.append({"mcu": name, "budget_bytes": budget.size_bytes})
            try:
                problem = make_problem(described, table, budget)
            except UserError as error:
                rows[-1]["too_small"] = str(error)
                continue
            random.seed(effort.seed)
            rungs = Rungs((1,), effort.evaluations)
            best, *_ = evolve(
                problem, make_toolbox(problem), rungs, effort.population, [], SearchState(), lambda _: None
            )
            found = {"score": problem.score(best), "optimum_score": proven_optimum(problem).score}
            rows[-1] |= {**found, "memory_bytes": problem.memory_bytes(best)}
            of_one = {**arguments, "all_mcus": None, "mcu": name, "finalists": 0}
            made_by = provenance_of(RECIPE, of_one, Path(arguments["contributions"]), budget, found)
            problem.scheme(best, made_by).save(out_dir / f"{described.name}_{name}.json")
    report = {"mcus": rows, "seconds": time.monotonic() - started}
    write_json(out_dir / "report.json", report)
    draw_front(rows, described.name, out_dir / "front.png")
    print_front(rows, out_dir)
    return report


if __name__ == "__main__":
    run_recipe(main)
