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
from pathlib import Path
from typing import Any

import torch

from microtune.datamodules.progress import progress_bar
from microtune.modules.atomic_files import write_json
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.genome_bytes import Memory
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.evolution import CHOICE_SAMPLES, RECIPE, Effort, FitnessName, begin_search, run_search
from microtune.recipes.search.genetic_algorithm import POPULATION, evolve, make_toolbox
from microtune.recipes.search.report import draw_front, print_computed, print_front, print_report
from microtune.recipes.search.setup import (
    GRADIENT,
    Level,
    all_budgets,
    budget_of,
    gradient_search,
    make_problem,
    measure_gradient,
    provenance_of,
    refuse_beside_all_mcus,
    refuse_beside_gradient,
    refuse_beside_table,
    refuse_without_data,
    searched_network,
    searched_table,
    table_search,
)
from microtune.recipes.search.trials import TrialSettings
from microtune.recipes.search.workers import Workers
from microtune.recipes.training.command_line import check_at_least_one, flat, run_recipe
from microtune.recipes.training.networks import DescribedNetwork
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.run_folder import check_run_folder

log = logging.getLogger(__name__)

EVALUATIONS = {"table": 5000, "accuracy": 200}
FINALISTS = 4
BASE_DEPTH = 36  # of a gradient


def main(
    contributions: str,
    network: str = "mobilenet_v2",
    mcu: str | None = None,
    memory: Memory = "peak",
    budget_kib: float | None = None,
    sram_bytes: int | None = None,
    flash_bytes: int | None = None,
    reserve_bytes: int | None = None,
    all_mcus: bool = False,
    level: Level = "sub_tensor",
    channel_multiple: int = 1,
    base_depth: int | None = None,
    choice_samples: int | None = None,
    fitness: FitnessName = "table",
    evaluations: int | None = None,
    population: int | None = None,
    trial_seeds: int = 1,
    finalists: int | None = None,
    final_steps: int | None = None,
    final_seeds: int = 3,
    processes: int = 1,
    cluster: str | None = None,
    allow_missing_layers: bool = False,
    resolution: int = 96,
    input_width: int | None = None,
    in_channels: int = 3,
    num_classes: int = 10,
    seed: int = 0,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
    resume: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Evolves an update scheme that fits a microcontroller: a genetic algorithm in DEAP.

    Args:
        contributions: Table that measure_contributions.py wrote, or gradient: one backward pass in its place.
        network: mobilenet_v2, or the .safetensors file of an int8 network.
        mcu: Microcontroller that a training step must fit; by default stm32f746, unless another budget is given.
        memory: What the budget is of: peak of a training step, or extra (the paper's figure).
        budget_kib: Budget in KiB, in place of a microcontroller.
        sram_bytes: SRAM that one buffer can use; describes another microcontroller, or replaces the named one's.
        flash_bytes: Flash, likewise.
        reserve_bytes: SRAM that is not for training, likewise.
        all_mcus: A scheme for every known microcontroller, by the table.
        level: sub_tensor (some channels of a layer) or layer (whole layers only).
        channel_multiple: Numbers of updated channels are multiples of it, or the whole layer; device kernels like 4.
        base_depth: Deepest bias depth, of contributions by gradient; by default 36.
        choice_samples: Training samples of the backward pass, likewise; by default 512: to
            half of them the classifier is fitted, the other half are for the pass.
        fitness: table (sum of contributions, seconds) or accuracy (of a short training of each scheme).
        evaluations: Schemes to evaluate; by default 5,000 by the table, 200 by accuracy.
        population: Survivors of a generation; by default 40, or 16 by accuracy.
        trial_seeds: Trainings of each scheme, where fitness is accuracy.
        finalists: Best schemes to train for longer, beside the table's optimum and as many of the last layers as fit;
            the validation split chooses. By default 4; 0 for none, without data, and by the gradient alone.
        final_steps: Optimizer steps of these; by default four times those of a trial.
        final_seeds: Trainings of each of these.
        processes: Processes of this machine that train, one thread each.
        cluster: Address of a Dask scheduler whose workers train instead, such as tcp://10.0.0.5:8786.
        allow_missing_layers: Search although the table lacks expanding convolutions within its base depth.
        resolution: Height and width of the input in pixels; of a spectrogram, its frames. Data bring their own.
        input_width: Width of the input where it is another: of a spectrogram, its bands.
        in_channels: Channels of the input.
        num_classes: Outputs of the classifier.
        seed: Of the search.
        logger: wandb (offline unless you are logged in), csv or none.
        out_dir: Folder of the scheme; by default a new one below runs/.
        resume: Go on with the search in out_dir after its last finished generation.
    """
    started, arguments = (
        time.monotonic(),
        flat({**{name: value for name, value in locals().items() if name != "options"}, **options}),
    )
    torch.set_num_threads(1)
    check_at_least_one(
        evaluations=evaluations, population=population, trial_seeds=trial_seeds, final_steps=final_steps,
        final_seeds=final_seeds, channel_multiple=channel_multiple, base_depth=base_depth,
        choice_samples=choice_samples,
    )  # fmt: skip
    is_gradient = contributions == GRADIENT
    is_computed = is_gradient and fitness == "table"
    if is_gradient:
        searched = {"evaluations": evaluations, "population": population, "finalists": finalists}
        refuse_beside_gradient(fitness, all_mcus, allow_missing_layers, **searched)
        base_depth = base_depth or BASE_DEPTH
    else:
        refuse_beside_table(base_depth=base_depth, choice_samples=choice_samples)
        base_depth = max(1, *ContributionTable.load(contributions).bias_gains)
    finalists = (0 if is_computed else FINALISTS) if finalists is None else finalists
    settings = TrialSettings(network=network, resolution=resolution, base_depth=base_depth, **options)
    refuse_without_data(settings, fitness, finalists, all_mcus, is_gradient)
    if all_mcus:
        refuse_beside_all_mcus(resume, memory, mcu, budget_kib, sram_bytes, flash_bytes, reserve_bytes)

    described = searched_network(settings, resolution, input_width, in_channels, num_classes)
    table = None
    if not is_gradient:
        table = searched_table(contributions, described, allow_missing_layers, level, channel_multiple)
    check_run_folder(out_dir, resume)
    evaluations, population = evaluations or EVALUATIONS[fitness], population or POPULATION[fitness]
    effort = Effort(fitness, evaluations, population, trial_seeds, finalists, final_steps, final_seeds, seed)
    if all_mcus:
        return search_all_mcus(described, table, effort, out_dir, arguments)

    budget = budget_of(memory, budget_kib, mcu, sram_bytes, flash_bytes, reserve_bytes)
    if is_gradient:
        measured = measure_gradient(settings, choice_samples or CHOICE_SAMPLES, seed)
        search = gradient_search(described, measured, budget, base_depth, level, channel_multiple, not is_computed)
    else:
        search = table_search(described, table, budget)
    with Workers(processes, cluster) as workers:
        out_dir = begin_search(out_dir, arguments, resume)
        if is_gradient and settings.source == "none":
            log.warning("schemes update little of a network that has learnt nothing: give --weights")
        report = run_search(search, effort, settings, budget, workers, arguments, logger, out_dir, started)
    tell = print_computed if is_computed else print_report
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
            hall = evolve(
                problem, make_toolbox(problem), effort.evaluations, effort.population, [], SearchState(), lambda _: None
            )
            best = tuple(hall[0])
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
