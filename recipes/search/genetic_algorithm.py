"""The genetic algorithm in DEAP that evolves update schemes: what an individual is, how it varies and what survives."""

import logging
import random
from collections.abc import Callable, Container, Sequence

import numpy as np
from deap import base, tools

from microtune.modules.search.integer_program import Genome
from microtune.modules.search.scheme_optimum import Optimum, best_at_depths
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.user_error import UserError
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.rungs import Rungs, best_first, fitness_of

log = logging.getLogger(__name__)


class FitnessMax(base.Fitness):
    """The rung that was reached, and how good the genome was there: compared in this order, the higher the better."""

    weights = (1.0, 1.0)


class Individual(list):
    """A genome as DEAP's operators change it, with its fitness."""

    def __init__(self, genome: Sequence[int], fitness: tuple[float, float] | None = None):
        super().__init__(genome)
        self.fitness = FitnessMax()
        if fitness is not None:
            self.fitness.values = fitness


# What is evolved, and why so. (mu + lambda): the best found is never lost, and a solution that took seconds of training
# stays. Scores of different bias depths lie close together while the best ratios differ from depth to depth, so at most
# SURVIVORS_PER_DEPTH of a depth survive, and a tenth of the children are immigrants: both keep depths in play. Under a
# budget a single change of a ratio seldom helps, so half of the mutations move memory from one layer to another. Every
# child is repaired and filled with gains that are a little off, else all fillings would be the greedy one.
SURVIVORS_PER_DEPTH = 3
POPULATION = {"table": 40, "accuracy": 8}  # by how fitness is told
GUESSED_DEPTHS = 10
POWERS = (1.0, 0.7, 1.5)  # of the gains of good guesses
IMMIGRANTS = 0.1
CROSSOVER = 0.6
FILLING_NOISE = 0.5
MOST_TRIES = 10  # per child, to make one that was not seen before
LEAST_NEW = 0.1  # part of a generation; with fewer the search has seen what it can reach


def make_toolbox(problem: SearchProblem, left_out: float = 0.0, levels: Sequence[SearchProblem] = ()) -> base.Toolbox:
    """The operators, which draw from Python's global random numbers as DEAP's own do; fitness is by the table.

    Args:
        problem: What to solve.
        left_out: Part of what could be filled that is not, where filling makes the same of all: for fitness that is not
            the table's, by which what leaves memory unused is never the best.
        levels: The problem within other budgets, of which each genome is repaired for one; by default for its own.
    """

    def repair(genome: Sequence[int], left_out: float) -> Individual:
        within = random.choice(levels) if levels else problem
        return Individual(within.repair(tuple(genome), random, FILLING_NOISE, left_out))

    toolbox = base.Toolbox()
    toolbox.register("repair", repair, left_out=0.0)
    toolbox.register("repair_loosely", repair, left_out=left_out)
    toolbox.register("immigrant", lambda: toolbox.repair(problem.random_genome(random)))
    toolbox.register("mate", tools.cxUniform, indpb=0.5)
    toolbox.register("mutate", mutate, problem=problem)
    toolbox.register("select_parents", tools.selTournament, k=2, tournsize=3)
    toolbox.register("select", survivors, per_depth=SURVIVORS_PER_DEPTH)
    toolbox.register("propose", new_children, toolbox)
    toolbox.register("rising", Rungs.rising)
    toolbox.register("evaluate", lambda genomes, rung: list(map(problem.score, genomes)))
    return toolbox


def good_guesses(
    problem: SearchProblem, optimum: Optimum, depths: int = GUESSED_DEPTHS, powers: Sequence[float] = POWERS
) -> list[Genome]:
    """What a search by accuracy begins with: the table's optimum, the last layers, and the best of other bias depths.

    Of which depth the best scheme is, and over how many layers its memory is spread, gains do not say: so there is one
    for each of some depths and powers of the gains.

    Args:
        problem: What to solve.
        optimum: Of it.
        depths: How many bias depths, from the deepest on.
        powers: Of the gains, those that matter most first.
    """
    deepest = len(problem.depths) - 1
    indexes = dict.fromkeys(round(deepest * (1 - part / depths)) for part in range(depths))
    by_depth = [genome for power in powers for genome in best_at_depths(problem, indexes, power)]
    return list(dict.fromkeys([optimum.genome, *rules_of_thumb(problem)[:1], *by_depth]))


def rules_of_thumb(problem: SearchProblem) -> list[Genome]:
    """As many of the last layers as fit at each option, the highest first; the paper's own schemes are much like it.

    Of a measured table an option is the same ratio in every layer. Of a gradient it is another fraction in each, since
    layers have other numbers of channels to choose from.
    """
    highest = max((len(ratios) for ratios in problem.ratios), default=1) - 1
    return [problem.from_the_back(option) for option in range(highest, 0, -1)]


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


def new_children(
    toolbox: base.Toolbox, parents: Sequence[Individual], count: int, known: Container[Genome]
) -> list[Individual]:
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
    rungs: Rungs,
    population: int,
    guesses: Sequence[Genome],
    state: SearchState,
    after_generation: Callable[[SearchState], None],
) -> list[Genome]:
    """The search, generation by generation, until its budget is spent or no new genomes come up.

    In each generation new genomes are evaluated on the first rung, and the best of all so far rise.

    Args:
        problem: What to solve.
        toolbox: From ``make_toolbox``; its ``evaluate(genomes, rung)`` gives the fitness of each, or None where the
            evaluation was lost, and its ``propose(parents, count, known)`` new children.
        rungs: What evaluations cost, and may cost.
        population: Number of survivors, and of children, of a generation.
        guesses: Genomes to begin with, generation by generation, three quarters of all evaluations at most.
        state: What to begin from; brought up to date before ``after_generation`` is called.
        after_generation: Keeps the state.

    Returns:
        All genomes, the best first.

    Raises:
        UserError: Every evaluation was lost.
    """
    if state.random_state is not None:
        random.setstate(state.random_state)
    statistics = tools.Statistics(lambda one: one.fitness.values[1])
    for name, function in (("best", np.max), ("mean", np.mean), ("spread", np.std)):
        statistics.register(name, function)
    logbook = tools.Logbook()
    parents = [Individual(genome, fitness_of(state.fitness[genome])) for genome in state.population]
    # they are not all there is, so that the table does not decide everything
    guesses = guesses[: max(1, rungs.affordable({}, 0) * 3 // 4)]
    while affordable := rungs.affordable(state.fitness, 0):
        count = min(population, affordable)
        children = [Individual(genome) for genome in guesses if genome not in state.fitness][:count]
        known = state.fitness | {tuple(child): () for child in children}
        children += toolbox.propose(parents, count - len(children), known)
        if not children or (parents and len(children) < LEAST_NEW * count):
            log.info("no new schemes come up after %d evaluations", len(state.fitness))
            break
        candidates = [tuple(one) for one in (*parents, *children)]
        evaluate(toolbox, state, [tuple(child) for child in children], 0)
        for rung in range(1, len(rungs.steps)):
            risen = toolbox.rising(rungs, state.fitness, rung)[: rungs.affordable(state.fitness, rung)]
            evaluate(toolbox, state, risen, rung)
            candidates += risen
        evaluated = {genome: fitness_of(state.fitness[genome]) for genome in candidates}
        individuals = [Individual(genome, fitness) for genome, fitness in evaluated.items() if fitness is not None]
        parents = toolbox.select(individuals, population)
        state.population = [tuple(parent) for parent in parents]
        state.generation += 1
        if parents:
            highest = max(one.fitness.values[0] for one in parents)
            longest = [one for one in parents if one.fitness.values[0] == highest]
            found = {name: float(value) for name, value in statistics.compile(longest).items()}
            memory_bytes = problem.memory_bytes(best_first(state.fitness)[0])
            evaluations = len(state.fitness)
            logbook.record(generation=state.generation, evaluations=evaluations, memory_bytes=memory_bytes, **found)
            state.history.append(dict(logbook[-1]))
        after_generation(state)
    best = best_first(state.fitness)
    if not best:
        raise UserError("every evaluation was lost with its worker: the warnings above say why")
    return best


def evaluate(toolbox: base.Toolbox, state: SearchState, genomes: Sequence[Genome], rung: int) -> None:
    """Evaluates genomes on a rung, and adds to the state what comes out; leaves the random numbers as they are."""
    drawn = random.getstate()
    values = toolbox.evaluate(genomes, rung) if genomes else []
    random.setstate(drawn)
    for genome, value in zip(genomes, values, strict=True):
        state.fitness[genome] = (*state.fitness.get(genome, ()), value)
