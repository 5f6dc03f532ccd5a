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
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from deap import base, tools

from microtune.datamodules.progress import progress_bar
from microtune.modules.contributions import ContributionTable
from microtune.modules.scheme_optimum import Optimum, proven_optimum
from microtune.modules.scheme_search import Genome, Memory, SearchProblem, random_search
from microtune.modules.user_error import UserError
from microtune.modules.whole_files import write_json
from microtune.recipes.command_line import check_at_least_one, flat, run
from microtune.recipes.finalists import train_finalists
from microtune.recipes.networks import DescribedNetwork
from microtune.recipes.run_folder import (
    LoggerName,
    check_run_folder,
    open_run_folder,
    plain,
    refuse_another_run,
    write_config,
)
from microtune.recipes.search_report import (
    SearchLog,
    draw_front,
    draw_search,
    print_computed,
    print_front,
    print_report,
    updated_layers,
)
from microtune.recipes.search_setup import (
    GRADIENT,
    Level,
    all_budgets,
    budget_of,
    check_table,
    good_guesses,
    gradient_problem,
    load_table,
    make_problem,
    measure_gradient,
    provenance_of,
    refuse_beside_gradient,
    refuse_beside_table,
    refuse_without_data,
    rules_of_thumb,
    searched_network,
    searched_rows,
)
from microtune.recipes.search_state import SearchState
from microtune.recipes.trial_setup import TrialSettings, accuracies
from microtune.recipes.workers import Workers

log = logging.getLogger(__name__)

FitnessName = Literal["table", "accuracy"]
POPULATION = {"table": 40, "accuracy": 16}
EVALUATIONS = {"table": 5000, "accuracy": 200}
FINALISTS = 4
BASE_DEPTH = 36  # of a gradient
CHOICE_SAMPLES = 512


class FitnessMax(base.Fitness):
    """One number, the higher the better."""

    weights = (1.0,)


class Individual(list):
    """A genome as DEAP's operators change it, with its fitness."""

    def __init__(self, genome: Sequence[int], fitness: float | None = None):
        super().__init__(genome)
        self.fitness = FitnessMax()
        if fitness is not None:
            self.fitness.values = (fitness,)


# What is evolved, and why so. (mu + lambda): the best found is never lost, and a solution that took seconds of training
# stays. Scores of different bias depths lie close together while the best ratios differ from depth to depth, so at most
# SURVIVORS_PER_DEPTH of a depth survive, and a tenth of the children are immigrants: both keep depths in play. Under a
# budget a single change of a ratio seldom helps, so half of the mutations move memory from one layer to another. Every
# child is repaired and filled with gains that are a little off, else all fillings would be the greedy one.
SURVIVORS_PER_DEPTH = 3
IMMIGRANTS = 0.1
CROSSOVER = 0.6
FILLING_NOISE = 0.5
MOST_TRIES = 10  # per child, to make one that was not seen before
HALL_OF_FAME = 100  # places, of which the first are the finalists
LEFT_OUT = 0.5  # of what could be filled, where filling makes the same of all and schemes are trained
LEAST_NEW = 0.1  # part of a generation; with fewer the search has seen what it can reach


def make_toolbox(problem: SearchProblem) -> base.Toolbox:
    """The operators, which draw from Python's global random numbers as DEAP's own do; fitness is by the table."""
    toolbox = base.Toolbox()
    toolbox.register("repair", lambda genome: Individual(problem.repair(tuple(genome), random, FILLING_NOISE)))
    toolbox.register("repair_loosely", toolbox.repair)
    toolbox.register("immigrant", lambda: toolbox.repair(problem.random_genome(random)))
    toolbox.register("mate", tools.cxUniform, indpb=0.5)
    toolbox.register("mutate", mutate, problem=problem)
    toolbox.register("select_parents", tools.selTournament, k=2, tournsize=3)
    toolbox.register("select", survivors, per_depth=SURVIVORS_PER_DEPTH)
    toolbox.register("evaluate", problem.score)
    toolbox.register("map", map)
    return toolbox


def mutate(individual: Individual, problem: SearchProblem) -> tuple[Individual]:
    """Moves memory from one layer to another, draws a ratio anew, or goes some bias depths deeper or less deep."""
    layers = range(1, len(individual))
    kind = random.random() if layers else 1.0
    if kind < 0.5:
        lowered = random.choice([layer for layer in layers if individual[layer]] or [0])
        raised = random.choice(layers)
        individual[lowered] = random.randrange(individual[lowered] or 1)
        individual[raised] = random.randrange(individual[raised], len(problem.ratios[raised - 1]))
    elif kind < 0.75:
        layer = random.choice(layers)
        individual[layer] = random.randrange(len(problem.ratios[layer - 1]))
    else:
        depth = individual[0] + random.choice((-3, -2, -1, 1, 2, 3))
        individual[0] = min(max(depth, 0), len(problem.depths) - 1)
    return (individual,)


def survivors(individuals: Sequence[Individual], k: int, per_depth: int) -> list[Individual]:
    """The k best distinct individuals, of one bias depth no more than ``per_depth``."""
    of_depth: dict[int, int] = {}
    distinct = {tuple(one): one for one in individuals}
    chosen = []
    for one in sorted(distinct.values(), key=lambda one: one.fitness.values, reverse=True):
        of_depth[one[0]] = of_depth.get(one[0], 0) + 1
        if of_depth[one[0]] <= per_depth:
            chosen.append(one)
    return chosen[:k]


def new_children(toolbox: base.Toolbox, parents: Sequence[Individual], count: int, known: set) -> list[Individual]:
    """Children that were not evaluated before; fewer than ``count`` where the search has seen all it can reach."""
    children: dict[Genome, Individual] = {}
    tries = MOST_TRIES * max(count, 20)  # also for the few that are left at the end
    for attempt in range(tries):
        if len(children) == count:
            break
        # where the budget is loose, filling makes the same of all
        repair = toolbox.repair if attempt < tries / 2 else toolbox.repair_loosely
        if not parents or random.random() < IMMIGRANTS:
            child = toolbox.immigrant()
        else:
            child, other = map(toolbox.clone, toolbox.select_parents(parents))
            if random.random() < CROSSOVER:
                toolbox.mate(child, other)
            child = repair(toolbox.mutate(child)[0])
        if tuple(child) not in known:
            children.setdefault(tuple(child), child)
    return list(children.values())


def evolve(
    problem: SearchProblem,
    toolbox: base.Toolbox,
    evaluations: int,
    population: int,
    guesses: Sequence[Genome],
    state: SearchState,
    after_generation: Callable[[SearchState], None],
) -> tools.HallOfFame:
    """The search, generation by generation, until ``evaluations`` genomes are evaluated or no new ones come up.

    Args:
        problem: What to solve.
        toolbox: From ``make_toolbox``; its ``map`` may give None for an evaluation that was lost.
        evaluations: Genomes to evaluate, each once.
        population: Survivors, and children, of a generation.
        guesses: Genomes to begin with; the rest of the first generation is random.
        state: What to begin from; brought up to date before ``after_generation`` is called.
        after_generation: Keeps the state.

    Returns:
        The best individuals, distinct.
    """
    if state.random_state is not None:
        random.setstate(state.random_state)
    hall = tools.HallOfFame(max(population, HALL_OF_FAME))
    hall.update([Individual(genome, value) for genome, value in state.fitness.items() if value is not None])
    statistics = tools.Statistics(lambda one: one.fitness.values[0])
    for name, function in (("best", np.max), ("mean", np.mean), ("spread", np.std)):
        statistics.register(name, function)
    logbook = tools.Logbook()
    parents = [Individual(genome, state.fitness[genome]) for genome in state.population]
    while len(state.fitness) < evaluations:
        count = min(population, evaluations - len(state.fitness))
        children = [Individual(genome) for genome in guesses[:count]] if not state.fitness else []
        known = state.fitness.keys() | {tuple(child) for child in children}
        children += new_children(toolbox, parents, count - len(children), known)
        if not children or (parents and len(children) < LEAST_NEW * count):
            log.info("no new schemes come up after %d of %d evaluations", len(state.fitness), evaluations)
            break
        drawn = random.getstate()  # whatever an evaluation draws
        values = list(toolbox.map(toolbox.evaluate, [tuple(child) for child in children]))
        random.setstate(drawn)
        state.fitness |= zip(map(tuple, children), values, strict=True)
        pairs = zip(children, values, strict=True)
        children = [Individual(child, value) for child, value in pairs if value is not None]
        hall.update(children)
        parents = toolbox.select(parents + children, population)
        state.population = [tuple(parent) for parent in parents]
        state.generation += 1
        if parents:
            found = {name: float(value) for name, value in statistics.compile(parents).items()}
            memory_bytes = problem.memory_bytes(tuple(hall[0]))
            evaluated = len(state.fitness)
            logbook.record(generation=state.generation, evaluations=evaluated, memory_bytes=memory_bytes, **found)
            state.history.append(dict(logbook[-1]))
        after_generation(state)
    if not hall:
        raise UserError("every evaluation was lost with its worker: the warnings above say why")
    return hall


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
    started, arguments = time.monotonic(), plain(flat(locals()))
    torch.set_num_threads(1)
    check_at_least_one(
        evaluations=evaluations, population=population, trial_seeds=trial_seeds, final_steps=final_steps,
        final_seeds=final_seeds, channel_multiple=channel_multiple, base_depth=base_depth,
        choice_samples=choice_samples,
    )  # fmt: skip
    is_gradient = contributions == GRADIENT
    if is_gradient:
        searched = {"evaluations": evaluations, "population": population, "finalists": finalists}
        refuse_beside_gradient(fitness, all_mcus, allow_missing_layers, **searched)
        base_depth = base_depth or BASE_DEPTH
    else:
        refuse_beside_table(base_depth=base_depth, choice_samples=choice_samples)
        base_depth = max(1, *ContributionTable.load(contributions).bias_gains)
    is_computed = is_gradient and fitness == "table"
    finalists = (0 if is_computed else FINALISTS) if finalists is None else finalists
    settings = TrialSettings(network=network, resolution=resolution, base_depth=base_depth, **options)
    refuse_without_data(settings, fitness, finalists, all_mcus, is_gradient)
    if all_mcus and resume:
        raise UserError("all_mcus takes less than a minute or two and is not resumed: leave --resume out")
    if all_mcus and (mcu, budget_kib, sram_bytes, flash_bytes, reserve_bytes, memory) != (None,) * 5 + ("peak",):
        raise UserError("all_mcus takes the budget of each known microcontroller: leave out every other budget")
    described = searched_network(settings, resolution, input_width, in_channels, num_classes)
    if not is_gradient:
        table = load_table(contributions, described)
        check_table(contributions, table, described, allow_missing_layers)
        table = searched_rows(contributions, table, described.operations.convolutions, level, channel_multiple)
    evaluations, population = evaluations or EVALUATIONS[fitness], population or POPULATION[fitness]
    check_run_folder(out_dir, resume)
    if all_mcus:
        return search_all_mcus(described, table, evaluations, population, seed, out_dir, arguments)

    budget = budget_of(memory, budget_kib, mcu, sram_bytes, flash_bytes, reserve_bytes)
    facts = {"score_unit": "accuracy"}
    if is_gradient:
        measured = measure_gradient(settings, choice_samples or CHOICE_SAMPLES, seed)
        facts = measured.facts
        problem, table, optimum = gradient_problem(
            described, measured, budget, base_depth, level, channel_multiple, is_coarse=not is_computed
        )
    else:
        problem = make_problem(described, table, budget)
        optimum = proven_optimum(problem)
    facts |= {
        "fitness": fitness, "level": level, "channel_multiple": channel_multiple, "memory": budget.memory,
        "budget_bytes": budget.size_bytes, "mcu": budget.microcontroller and budget.microcontroller.name,
    }  # fmt: skip
    with Workers(processes, cluster) as workers:
        out_dir = open_run_folder(out_dir, "evolve_update_scheme", resume)
        settings = replace(settings, features_dir=settings.features_dir or str(out_dir / "features"))
        if resume:
            refuse_another_run(out_dir, arguments, None)
        else:
            write_config(out_dir, arguments)
        if is_gradient:
            contributions = keep_table(table, out_dir / "contributions.csv")
        made_by = partial(provenance_of, "evolve_update_scheme", arguments, Path(contributions), budget)
        search_log = SearchLog(logger, out_dir, arguments, table, optimum, problem, evaluations)
        if is_computed:
            return finish_computed(problem, optimum, facts, made_by, search_log, started)
        state = SearchState.load(out_dir / "search.json")
        state.refuse_another_table(Path(contributions))
        random.seed(seed)
        toolbox, guesses = make_toolbox(problem), []
        if fitness == "accuracy":
            guesses = good_guesses(problem, optimum, population)
            seeds = tuple(range(seed * trial_seeds, (seed + 1) * trial_seeds))
            toolbox.register("map", lambda _, genomes: accuracies(workers, settings, problem, seeds, genomes))
            toolbox.register(
                "repair_loosely",
                lambda genome: Individual(problem.repair(tuple(genome), random, FILLING_NOISE, LEFT_OUT)),
            )

        def after_generation(state: SearchState) -> None:
            state.save(out_dir / "search.json")
            search_log.generation(state)

        with search_log:
            hall = evolve(problem, toolbox, evaluations, population, guesses, state, after_generation)
        best, of_finalists = tuple(hall[0]), {}
        if finalists:
            proxies = {tuple(one): one.fitness.values[0] for one in hall[:finalists]}
            # tables and short trials mislead at times: these have their chance in any case
            for genome in (optimum.genome, *rules_of_thumb(problem)[:1]):
                known = problem.score(genome) if fitness == "table" else state.fitness.get(genome)
                if known is not None:
                    proxies.setdefault(genome, known)
            steps = final_steps or 4 * settings.steps
            best, of_finalists = train_finalists(problem, proxies, settings, steps, final_seeds, workers)

    report = {
        "score": problem.score(best),
        "optimum_score": optimum.score,
        "random_score": random_search(problem, len(state.fitness), seed).score,
        "random_blind_score": random_search(problem, len(state.fitness), seed, blind=True).score,
        "best_fitness": hall[0].fitness.values[0],
        "evaluations": len(state.fitness),
        "lost_evaluations": sum(value is None for value in state.fitness.values()),
        "memory_bytes": problem.memory_bytes(best),
        **facts,
        **of_finalists,
        "seconds": time.monotonic() - started,
    }
    problem.scheme(best, made_by(report)).save(out_dir / "scheme.json")
    rule = {"rule": "proven optimum by the contribution table", "score": optimum.score}
    problem.scheme(optimum.genome, made_by(rule)).save(out_dir / "optimum.json")
    write_json(out_dir / "report.json", report)
    draw_search(state, problem, optimum, fitness, out_dir / "search.png")
    search_log.finish(report)
    print_report(report, problem.scheme(best), out_dir)
    return report


def keep_table(table: ContributionTable, path: Path) -> Path:
    """Writes the table of a gradient into the run's folder, or refuses to go on with another than lies there."""
    with tempfile.TemporaryDirectory() as folder:
        table.save(Path(folder) / path.name)
        if path.exists() and path.read_bytes() != (Path(folder) / path.name).read_bytes():
            raise UserError(
                f"the gradient is not what it was when {path} was written: the data, the weights or the machine have "
                "changed: start the search anew without --resume"
            )
    table.save(path)
    return path


def finish_computed(
    problem: SearchProblem,
    optimum: Optimum,
    facts: dict[str, Any],
    made_by: Callable[[dict[str, Any]], dict[str, Any]],
    search_log: SearchLog,
    started: float,
) -> dict[str, Any]:
    """Writes and prints the scheme that the gradient says is best: no search follows."""
    out_dir = search_log.out_dir
    found = {
        "score": optimum.score,
        "bias_score": problem.gains_of(optimum.genome)[0],
        "memory_bytes": problem.memory_bytes(optimum.genome),
        **facts,
        "seconds": time.monotonic() - started,
    }
    scheme = problem.scheme(optimum.genome, made_by(found))
    scheme.save(out_dir / "scheme.json")
    report = {**found, "layers": updated_layers(problem, optimum.genome)}
    write_json(out_dir / "report.json", report)
    search_log.finish(report)
    print_computed(report, scheme, out_dir)
    return report


def search_all_mcus(
    described: DescribedNetwork, table: ContributionTable, evaluations: int, population: int, seed: int,
    out_dir: Path | None, arguments: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """A scheme for every microcontroller that the network fits, and for the others the resolution that would do."""
    started = time.monotonic()
    out_dir = open_run_folder(out_dir, "evolve_update_scheme", resume=False)
    write_config(out_dir, arguments)
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
            random.seed(seed)
            hall = evolve(problem, make_toolbox(problem), evaluations, population, [], SearchState(), lambda _: None)
            best = tuple(hall[0])
            found = {"score": problem.score(best), "optimum_score": proven_optimum(problem).score}
            rows[-1] |= {**found, "memory_bytes": problem.memory_bytes(best)}
            of_one = {**arguments, "all_mcus": None, "mcu": name, "finalists": 0}
            made_by = provenance_of("evolve_update_scheme", of_one, Path(arguments["contributions"]), budget, found)
            problem.scheme(best, made_by).save(out_dir / f"{described.name}_{name}.json")
    report = {"mcus": rows, "seconds": time.monotonic() - started}
    write_json(out_dir / "report.json", report)
    draw_front(rows, described.name, out_dir / "front.png")
    print_front(rows, out_dir)
    return report


if __name__ == "__main__":
    run(main)
