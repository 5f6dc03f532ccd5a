"""The surrogate learns what layers are worth together, and what it proposes is new, fits and differs enough."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from microtune.recipes.search.genetic_algorithm import Individual, make_toolbox, new_children
from microtune.recipes.search.surrogate import (
    LEAST_TRIALS,
    NEAR,
    Surrogate,
    offsets,
    propose_by_surrogate,
)


@pytest.fixture(scope="module")
def genomes(problem):
    random.seed(1)
    toolbox = make_toolbox(problem, 0.5)
    return [tuple(child) for child in new_children(toolbox, [], 150, set())]


def made_up(problem, genome):
    """What no sum of gains says: a best depth, and two layers that are worth little together."""
    depth, *options = genome
    parts = [option / max(1, len(ratios) - 1) for option, ratios in zip(options, problem.ratios, strict=True)]
    return -(((depth / len(problem.depths)) - 0.5) ** 2) + 0.1 * sum(parts) - 0.3 * parts[-1] * parts[-2]


def test_it_ranks_schemes_that_it_has_not_seen(problem, genomes):
    rng = np.random.default_rng(0)
    known = {genome: (made_up(problem, genome) + 0.01 * rng.normal(),) for genome in genomes[:100]}
    truth = [made_up(problem, genome) for genome in genomes[100:]]
    assert spearmanr(Surrogate(problem, known).fitness(genomes[100:]), truth).statistic > 0.8
    by_table = [problem.score(genome) for genome in genomes[100:]]
    assert spearmanr(by_table, truth).statistic < 0.6


def test_longer_trials_count_more_and_lost_ones_nothing(problem, genomes):
    """On the higher rung all are better by the same, and what was noise below is not."""
    rng = np.random.default_rng(0)
    known = {genome: (made_up(problem, genome) + 0.1 * rng.normal(),) for genome in genomes[:100]}
    longer = {
        genome: (value, made_up(problem, genome) + 5) if index % 3 == 0 else (value,)
        for index, (genome, (value,)) in enumerate(known.items())
    }
    truth = [made_up(problem, genome) for genome in genomes[100:]]
    short, both = (
        spearmanr(Surrogate(problem, one).fitness(genomes[100:]), truth).statistic for one in (known, longer)
    )
    assert both > short
    lost = known | {genomes[0]: (None,), genomes[1]: (known[genomes[1]][0], None)}
    without = {genome: values for genome, values in known.items() if genome != genomes[0]}
    assert Surrogate(problem, lost).fitness(genomes) == pytest.approx(Surrogate(problem, without).fitness(genomes))


def test_a_training_that_diverged_changes_little(problem, genomes):
    known = {genome: (made_up(problem, genome),) for genome in genomes[:100]}
    diverged = known | {genomes[5]: (-100.0,)}
    truth = [made_up(problem, genome) for genome in genomes[100:]]
    assert spearmanr(Surrogate(problem, diverged).fitness(genomes[100:]), truth).statistic > 0.8


def test_offsets_are_of_those_that_were_on_both():
    known = {(0,): (1.0, 3.0, 7.0), (1,): (2.0, 3.0), (2,): (9.0,), (3,): (1.0, None), (4,): ()}
    assert offsets(known).tolist() == [0, 1.5, 6]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 10))
def test_what_is_proposed_is_new_fits_and_differs_enough(problem, genomes, seed, count):
    random.seed(seed)
    toolbox = make_toolbox(problem, 0.5)
    known = {genome: (made_up(problem, genome),) for genome in genomes[:40]} | {genomes[40]: ()}
    parents = [Individual(genome, (0.0, known[genome][0])) for genome in genomes[:8]]
    state = random.getstate()
    proposed = [tuple(child) for child in propose_by_surrogate(toolbox, problem, parents, count, known)]
    assert len(proposed) == len(set(proposed)) <= count
    assert not known.keys() & set(proposed)
    assert all(problem.fits(genome) for genome in proposed)
    random.setstate(state)
    again = [tuple(child) for child in propose_by_surrogate(toolbox, problem, parents, count, known)]
    assert again == proposed
    at_random = 1  # which may be near another
    distances = [
        min(sum(abs(a - b) for a, b in zip(genome, other, strict=True)) for other in [*known, *proposed[:index]])
        for index, genome in enumerate(proposed)
    ]
    assert sum(distance <= NEAR for distance in distances) <= at_random


def test_it_proposes_better_ones_than_are_bred(problem, genomes):
    known = {genome: (made_up(problem, genome),) for genome in genomes[:100]}
    best = sorted(known, key=lambda genome: -known[genome][0])[:8]
    parents = [Individual(genome, (0.0, known[genome][0])) for genome in best]
    toolbox = make_toolbox(problem, 0.5)
    random.seed(0)
    proposed = propose_by_surrogate(toolbox, problem, parents, 40, known)
    bred = new_children(toolbox, parents, 40, known)
    means = [np.mean([made_up(problem, tuple(one)) for one in of]) for of in (proposed, bred)]
    assert means[0] > means[1]


@pytest.mark.parametrize("trials", [0, LEAST_TRIALS - 1])
def test_with_few_trials_it_proposes_what_is_bred(problem, genomes, trials):
    known = {genome: (made_up(problem, genome),) for genome in genomes[:trials]}
    parents = [Individual(genome, (0.0, values[0])) for genome, values in known.items()]
    known |= dict.fromkeys(genomes[50:90], (None,))  # lost, which says nothing
    toolbox, found = make_toolbox(problem), []
    for propose in (propose_by_surrogate, lambda toolbox, problem, *rest: new_children(toolbox, *rest)):
        random.seed(0)
        found.append(propose(toolbox, problem, parents, 6, known))
    assert found[0] == found[1]
