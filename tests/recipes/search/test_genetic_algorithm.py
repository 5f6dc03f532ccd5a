"""The genetic algorithm: every genome once and within the budget, the best kept, and nothing but its seed decides."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.user_error import UserError
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.genetic_algorithm import (
    GUESSED_DEPTHS,
    Individual,
    evolve,
    good_guesses,
    make_toolbox,
    mutate,
    new_children,
    survivors,
)
from microtune.recipes.search.rungs import Rungs
from microtune.recipes.training.networks import describe_network


def course_of(problem, evaluate, evaluations=80, **changes):
    """The state at the end of a search on one rung."""
    arguments = {"population": 8, "guesses": [], "after_generation": lambda _: None} | changes
    arguments.setdefault("rungs", Rungs((1,), evaluations))
    toolbox, state = make_toolbox(problem), SearchState()
    toolbox.register("evaluate", lambda genomes, rung: list(map(evaluate, genomes)))
    random.seed(0)
    evolve(problem, toolbox, state=state, **arguments)
    return state


def test_evaluations_do_not_disturb_the_search(problem):
    """A training seeds the random numbers that DEAP draws from."""

    def evaluate(genome):
        random.seed(0)
        return problem.score(genome)

    expected = course_of(problem, problem.score)
    state = course_of(problem, evaluate)
    assert list(state.fitness.items()) == list(expected.fitness.items())
    assert (state.population, state.history) == (expected.population, expected.history)


def test_every_genome_is_evaluated_once_and_within_the_budget(problem):
    evaluated = []
    state = course_of(problem, lambda genome: evaluated.append(genome) or problem.score(genome))
    assert len(evaluated) == len(set(evaluated)) == 80
    assert list(state.fitness) == evaluated
    assert all(problem.fits(genome) and problem.canonical(genome) == genome for genome in evaluated)


def test_guesses_are_evaluated_first(problem):
    rng = random.Random(1)
    guesses = list({problem.repair(problem.random_genome(rng), rng, 0.5) for _ in range(9)})
    state = course_of(problem, problem.score, guesses=guesses[:5])
    assert list(state.fitness)[:5] == guesses[:5]


@st.composite
def genomes(draw, of):
    options = [len(of.depths), *(len(ratios) for ratios in of.ratios)]
    return of.canonical(tuple(draw(st.integers(0, count - 1)) for count in options))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_mutations_stay_within_the_options(problem, data, seed):
    genome = data.draw(genomes(problem))
    random.seed(seed)
    for _ in range(5):
        (individual,) = mutate(Individual(genome), problem)
        assert len(individual) == len(genome)
        assert 0 <= individual[0] < len(problem.depths)
        for option, ratios in zip(individual[1:], problem.ratios, strict=True):
            assert 0 <= option < len(ratios)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), k=st.integers(1, 20))
def test_survivors_are_the_best_of_several_depths(problem, data, k):
    drawn = data.draw(st.lists(genomes(problem), max_size=30))
    individuals = [Individual(genome, (0.0, problem.score(genome))) for genome in drawn]
    kept = survivors(individuals, k, per_depth=3)
    values = [one.fitness.values[1] for one in kept]
    assert values == sorted(values, reverse=True)
    assert len({tuple(one) for one in kept}) == len(kept) <= k
    of_depth = {}
    for genome in sorted(set(drawn), key=problem.score, reverse=True):
        of_depth.setdefault(genome[0], []).append(problem.score(genome))
    expected = sorted((score for scores in of_depth.values() for score in scores[:3]), reverse=True)
    assert values == expected[:k]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 12), with_parents=st.booleans())
def test_children_are_new_and_fit(problem, seed, count, with_parents):
    random.seed(seed)
    toolbox = make_toolbox(problem)
    known = {tuple(toolbox.immigrant()) for _ in range(20)}
    parents = [Individual(genome, (0.0, problem.score(genome))) for genome in known] if with_parents else []
    children = [tuple(child) for child in new_children(toolbox, parents, count, known)]
    assert len(children) == len(set(children)) <= count
    assert not known & set(children)
    assert all(problem.fits(child) for child in children)


def test_children_leave_their_parents_as_they_are(problem):
    random.seed(0)
    toolbox = make_toolbox(problem)
    before = {tuple(toolbox.immigrant()) for _ in range(10)}
    parents = [Individual(genome, (0.0, problem.score(genome))) for genome in before]
    new_children(toolbox, parents, 20, set(before))
    assert {tuple(parent) for parent in parents} == before


def test_loosely_repaired_is_as_repaired_where_nothing_is_left_out(problem):
    """To the last random number, so that a search by the table is the same with either."""
    toolbox, genome = make_toolbox(problem), problem.random_genome(random.Random(0))
    found = []
    for repair in (toolbox.repair, toolbox.repair_loosely):
        random.seed(0)
        found.append((repair(genome), random.getstate()))
    assert found[0] == found[1]


def test_loosely_repaired_leaves_memory_unused(small_table):
    """Where everything fits, filling makes the same of all."""
    described = describe_network("none", (3, 32, 32), 10)
    table = ContributionTable.load(small_table)
    problem = SearchProblem(described.name, PeakMemory(described.operations), table, 10**7, "extra")
    toolbox, drawn = make_toolbox(problem, left_out=0.5), random.Random(0)
    random.seed(0)
    genomes = [problem.random_genome(drawn) for _ in range(20)]
    tight, loose = (
        {tuple(repair(genome)) for genome in genomes} for repair in (toolbox.repair, toolbox.repair_loosely)
    )
    assert len(tight) < len(loose)
    most = max(map(problem.memory_bytes, tight))
    assert min(map(problem.memory_bytes, loose)) < most


def test_every_lost_evaluation_is_an_error_of_the_search(problem):
    with pytest.raises(UserError, match="every evaluation was lost with its worker"):
        course_of(problem, lambda genome: None, evaluations=10)


# ---- what it begins with


def test_good_guesses(problem):
    """The optimum first, all of them distinct, within the budget, and of many depths."""
    optimum = proven_optimum(problem)
    guesses = good_guesses(problem, optimum)
    assert guesses[0] == optimum.genome
    assert len(set(guesses)) == len(guesses) > GUESSED_DEPTHS
    assert all(problem.fits(guess) and problem.canonical(guess) == guess for guess in guesses)
    assert len({guess[0] for guess in guesses}) >= min(GUESSED_DEPTHS, len(problem.depths))
    assert good_guesses(problem, optimum) == guesses  # of no random numbers


@pytest.mark.parametrize("evaluations", [4, 9, 30])
def test_guesses_come_first_and_leave_room_for_others(problem, evaluations):
    guesses = good_guesses(problem, proven_optimum(problem))
    state = course_of(problem, problem.score, evaluations, guesses=guesses)
    count = min(len(guesses), evaluations * 3 // 4)
    # what is bred meanwhile may be a guess that is not reached
    assert list(state.fitness)[:count] == guesses[:count]
    assert len(state.fitness) == evaluations
