"""The front of a search: what no other scheme beats in accuracy and bytes, found as single searches would find it."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtune.modules.csv_rows import read_rows
from microtune.modules.memory.microcontrollers import MICROCONTROLLERS
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.front import (
    LEVELS,
    FrontRow,
    best_of_front,
    front_of,
    levels_of,
    make_front_toolbox,
    on_one_scale,
    write_front,
)
from microtune.recipes.search.genetic_algorithm import evolve
from microtune.recipes.search.rungs import Rungs
from microtune.recipes.training.networks import describe_network


@pytest.fixture(scope="module")
def genomes(problem):
    rng = random.Random(0)
    levels = levels_of(problem)
    drawn = (rng.choice(levels).repair(problem.random_genome(rng), rng, 0.5) for _ in range(200))
    return list(dict.fromkeys(drawn))


def beats(problem, fitness, one, other):
    """In both, or in one where the other is the same."""
    pairs = [(-problem.memory_bytes(genome), fitness[genome]) for genome in (one, other)]
    return pairs[0] != pairs[1] and all(a >= b for a, b in zip(*pairs, strict=True))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 25), count=st.integers(0, 20))
def test_none_that_is_left_out_beats_one_that_is_chosen(problem, genomes, seed, size, count):
    rng = random.Random(seed)
    fitness = {genome: rng.random() for genome in rng.sample(genomes, size)}
    chosen = best_of_front(problem, fitness, count)
    assert len(chosen) == len(set(chosen)) == min(size, count)
    left = fitness.keys() - set(chosen)
    assert not any(beats(problem, fitness, one, other) for one in left for other in chosen)


def test_where_few_are_chosen_the_ends_of_the_front_are(problem, genomes):
    """Where the front is sparse, and not all of one size."""
    fitness = {genome: problem.memory_bytes(genome) for genome in genomes}  # none beats another
    sizes = sorted(fitness.values())
    chosen = [fitness[genome] for genome in best_of_front(problem, fitness, 5)]
    assert {min(chosen), max(chosen)} == {sizes[0], sizes[-1]}


def test_levels(problem):
    levels = levels_of(problem)
    assert len(levels) == LEVELS
    assert levels[0] is problem
    least = problem.memory_bytes((0,) * (1 + len(problem.layers)))
    for above, below in itertools.pairwise(levels):
        assert below.budget_bytes - least == pytest.approx((above.budget_bytes - least) / 2)
        genome = below.repair(problem.random_genome(random.Random(0)))
        assert below.fits(genome)
        assert problem.memory_bytes(genome) == below.memory_bytes(genome) <= below.budget_bytes
        assert problem.scheme(genome) == below.scheme(genome)


def test_levels_of_peak_memory_are_also_those_of_microcontrollers(small_table):
    described = describe_network("none", (3, 32, 32), 10)
    table = ContributionTable.load(small_table)
    largest = MICROCONTROLLERS["stm32f746"].budget_bytes
    problem = SearchProblem(described.name, PeakMemory(described.operations), table, largest)
    budgets = [level.budget_bytes for level in levels_of(problem)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == largest
    least = problem.memory_bytes((0,) * (1 + len(problem.layers)))
    wanted = {device.budget_bytes for device in MICROCONTROLLERS.values() if least < device.budget_bytes <= largest}
    assert wanted < set(budgets)
    assert MICROCONTROLLERS["nrf52840"].budget_bytes in wanted


def test_on_one_scale():
    known = {(0,): (0.5, 0.8), (1,): (0.7, 1.0), (2,): (0.6,), (3,): (0.9, None), (4,): (None,)}
    found = on_one_scale(known)
    assert {genome: pytest.approx(value) for genome, value in found.items()} == {
        (0,): 0.5, (1,): 0.7, (2,): 0.6, (3,): 0.9,
    }  # fmt: skip


def test_front_is_of_the_longest_trials_and_rises(problem, genomes):
    rng = random.Random(1)
    known = {
        genome: (rng.random(), *([rng.random()] if index % 3 == 0 else [])) for index, genome in enumerate(genomes)
    }
    known[genomes[0]] = (0.5, None)
    front = front_of(problem, known)
    long = {genome: values[1] for genome, values in known.items() if len(values) == 2 and values[1] is not None}
    assert set(front) == {
        one for one in long if not any(beats(problem, long, other, one) for other in long.keys() - {one})
    }
    sizes = [problem.memory_bytes(genome) for genome in front]
    assert sizes == sorted(sizes)
    assert [long[genome] for genome in front] == sorted(long[genome] for genome in front)


def test_search_finds_schemes_of_every_size(problem, tmp_path):
    """As good at each level as the best of what was drawn at random within it, and all on rungs of one budget."""
    random.seed(0)
    state, rungs = SearchState(), Rungs((1, 3), 200)
    toolbox, guesses = make_front_toolbox(problem, 0.5, state)
    assert len({genome[0] for genome in guesses}) > 3
    toolbox.register("evaluate", lambda genomes, rung: [problem.score(genome) + rung for genome in genomes])
    evolve(problem, toolbox, rungs, 16, guesses, state, lambda _: None)
    assert rungs.spent(state.fitness) <= 200
    rows = write_front(problem, state, rungs, "top1", lambda found: found, tmp_path)
    assert rows == read_rows(tmp_path / "front.csv", FrontRow)
    assert (tmp_path / "front.png").stat().st_size > 5000
    for row in rows:
        scheme = UpdateScheme.load(tmp_path / row.scheme)
        assert (scheme.bias_depth, len(scheme.weights)) == (row.bias_depth, row.updated_layers)
        assert scheme.provenance["fitness"] == row.fitness
        assert row.steps == 3
    rng = random.Random(3)
    for level in levels_of(problem)[:4]:
        drawn = max(problem.score(level.repair(problem.random_genome(rng), rng, 0.5)) for _ in range(60))
        within = [row.fitness - 1 for row in rows if row.memory_bytes <= level.budget_bytes]
        assert max(within) > 0.95 * drawn
