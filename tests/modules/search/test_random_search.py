"""Random search keeps the best of what fits, and its repair beats throwing out at random."""

import random
from functools import cache

import pytest

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.search.random_search import random_search
from microtune.modules.search.search_problem import Memory, SearchProblem
from microtune.modules.user_error import UserError
from microtune.recipes.training.networks import describe_network


@cache
def some_problem(memory: Memory) -> SearchProblem:
    """Random gains of every fourth of the last thirty layers, and room for two fifths of their updates."""
    rng = random.Random(0)
    operations = describe_network("none", (3, 32, 32), 10).operations
    depths, ratios = (2, 5, 12, 20, 21, 30), (0.125, 0.25, 0.5, 1.0)
    rows = [Contribution("bias", depth, "", 0.0, rng.gauss(0.01, 0.01), 0.0, 1) for depth in depths]
    rows += [
        Contribution("weight", 30, layer.name, ratio, rng.gauss(0.01, 0.01), 0.0, 1)
        for layer in operations.convolutions[-30::4]
        for ratio in ratios
    ]
    account, table = PeakMemory(operations), ContributionTable(tuple(rows))
    free = SearchProblem("x", account, table, 1e9, memory)
    nothing, everything = ((0,) * (1 + len(free.layers)), (len(depths),) + (4,) * len(free.layers))
    least, most = free.memory_bytes(nothing), free.memory_bytes(everything)
    return SearchProblem("x", account, table, least + 0.4 * (most - least), memory)


@pytest.mark.parametrize("memory", ["peak", "extra"])
@pytest.mark.parametrize("blind", [False, True])
def test_random_search_keeps_the_best(memory, blind):
    problem = some_problem(memory)
    result = random_search(problem, 40, seed=3, blind=blind)
    assert result.evaluations == len(result.best_scores) == 40
    assert result.best_scores == sorted(result.best_scores)
    assert result.score == result.best_scores[-1] == problem.score(result.genome)
    assert problem.fits(result.genome)
    assert result == random_search(problem, 40, seed=3, blind=blind)
    assert result.best_scores[:10] == random_search(problem, 10, seed=3, blind=blind).best_scores


def test_filling_beats_throwing_out():
    problem = some_problem("peak")
    assert random_search(problem, 40, seed=0).score > random_search(problem, 40, seed=0, blind=True).score


def test_random_search_takes_another_score():
    problem = some_problem("peak")
    seen = []

    def fewest_updates(genome):
        seen.append(genome)
        return -sum(genome)

    result = random_search(problem, 30, seed=0, score=fewest_updates)
    assert result.score == max(-sum(genome) for genome in seen)
    assert len(seen) == 30
    assert all(problem.fits(genome) for genome in seen)


def test_no_evaluations_are_refused():
    with pytest.raises(UserError, match="evaluations is 0: give 1 or more"):
        random_search(some_problem("peak"), 0, seed=0)
