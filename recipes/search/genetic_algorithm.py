"""The genetic algorithm in DEAP that evolves update schemes: what an individual is, how it varies and what survives."""

import logging
import random
from collections.abc import Callable, Sequence

import numpy as np
from deap import base, tools

from microtune.modules.search.integer_program import Genome
from microtune.modules.search.scheme_optimum import Optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.user_error import UserError
from microtune.recipes.search.checkpoint import SearchState

log = logging.getLogger(__name__)


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
POPULATION = {"table": 40, "accuracy": 16}  # by how fitness is told
IMMIGRANTS = 0.1
CROSSOVER = 0.6
FILLING_NOISE = 0.5
MOST_TRIES = 10  # per child, to make one that was not seen before
HALL_OF_FAME = 100  # places, of which the first are the finalists
LEAST_NEW = 0.1  # part of a generation; with fewer the search has seen what it can reach


def make_toolbox(problem: SearchProblem, left_out: float = 0.0) -> base.Toolbox:
    """The operators, which draw from Python's global random numbers as DEAP's own do; fitness is by the table.

    Args:
        problem: What to solve.
        left_out: Part of what could be filled that is not, where filling makes the same of all: for fitness that is not
            the table's, by which what leaves memory unused is never the best.
    """
    toolbox = base.Toolbox()
    toolbox.register("repair", lambda genome: Individual(problem.repair(tuple(genome), random, FILLING_NOISE)))
    toolbox.register(
        "repair_loosely",
        lambda genome: Individual(problem.repair(tuple(genome), random, FILLING_NOISE, left_out)),
    )
    toolbox.register("immigrant", lambda: toolbox.repair(problem.random_genome(random)))
    toolbox.register("mate", tools.cxUniform, indpb=0.5)
    toolbox.register("mutate", mutate, problem=problem)
    toolbox.register("select_parents", tools.selTournament, k=2, tournsize=3)
    toolbox.register("select", survivors, per_depth=SURVIVORS_PER_DEPTH)
    toolbox.register("evaluate", problem.score)
    toolbox.register("map", map)
    return toolbox


def good_guesses(problem: SearchProblem, optimum: Optimum, population: int) -> list[Genome]:
    """What a search by accuracy begins with: the table's optimum, rules of thumb, and neighbours of the optimum.

    They are three quarters of a population at most: the rest is random, so that the table does not decide everything.
    """
    neighbours = problem.neighbours(optimum.genome)
    random.shuffle(neighbours)
    guesses = [optimum.genome, *rules_of_thumb(problem), *neighbours]
    return list(dict.fromkeys(guesses))[: population * 3 // 4]


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
