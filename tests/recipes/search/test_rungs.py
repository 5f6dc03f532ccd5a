"""Rungs of successive halving: the best third of all so far rise, and the budget of steps holds."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtune.modules.user_error import UserError
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.genetic_algorithm import evolve, make_toolbox
from microtune.recipes.search.rungs import Rungs, best_first, fitness_of, pairs_of_rungs

RUNGS = Rungs((60, 180, 540), total_steps=5000)
# by hand: seven on the first rung, of which two rise; the lost one counts as no result
KNOWN = {(0,): (0.5,), (1,): (0.9, 0.7), (2,): (0.6,), (3,): (0.8,), (4,): (None,), (5,): (0.1,), (6,): (0.2,)}
KNOWN |= {(7,): (0.7, None)}


def test_the_best_third_of_all_rises():
    assert RUNGS.rising(KNOWN, 1) == [(3,)]  # of seven the best two are (1,), which is there, and (3,)
    assert RUNGS.rising(KNOWN, 2) == []  # the only one with a result is a third of none
    more = KNOWN | {(8,): (0.95,), (9,): (0.94,)}
    assert RUNGS.rising(more, 1) == [(8,), (9,)]  # of nine three, the third being (1,)


def test_what_was_lost_on_a_rung_is_not_tried_again_and_stays_on_the_one_below():
    assert (7,) not in RUNGS.rising(KNOWN | {(7,): (0.99, None)}, 1)
    assert fitness_of((0.99, None)) == (0.0, 0.99)
    assert fitness_of((None,)) is None


def test_steps():
    assert RUNGS.spent(KNOWN) == 8 * 60 + 2 * 180
    assert RUNGS.affordable(KNOWN, 0) == (5000 - 840) // 60
    assert RUNGS.affordable(KNOWN, 2) == (5000 - 840) // 540
    assert Rungs((60,), 100).affordable(KNOWN, 0) == 0


def test_the_longest_training_says_most():
    assert best_first(KNOWN) == [(1,), (3,), (7,), (2,), (0,), (6,), (5,)]
    assert best_first({(0,): (0.5,), (1,): (0.5,)}) == [(1,), (0,)]


def test_pairs_of_rungs():
    known = {(0,): (0.1, 0.3, 0.5), (1,): (0.2, 0.2), (2,): (0.3, None), (3,): (0.4,)}
    assert pairs_of_rungs(known, (60, 180, 540)) == [
        (60, 180, [0.1, 0.2], [0.3, 0.2]),
        (60, 540, [0.1], [0.5]),
        (180, 540, [0.3], [0.5]),
    ]


@pytest.mark.parametrize("steps", [(), (0, 5), (60, 60), (180, 60), (-1,)])
def test_wrong_rungs(steps):
    with pytest.raises(UserError, match=r"rungs is .*: give numbers of steps, each more than the one before, such as"):
        Rungs(steps, 1000)


def test_too_small_a_budget():
    with pytest.raises(UserError, match="total_steps is 59: give at least one trial of 60 steps"):
        Rungs((60, 180), 59)


# ---- a search on them


@pytest.fixture(scope="module")
def course(problem):
    """Searches by a fitness that each rung knows better; every evaluation they asked for."""

    def search(seed, total_steps, population, steps=(60, 180, 540)):
        asked, rng = [], random.Random(seed)
        luck = {}

        def evaluate(genomes, rung):
            values = [problem.score(one) + luck.setdefault((one, rung), rng.gauss(0, 0.1 / 3**rung)) for one in genomes]
            asked.append((rung, dict(zip(genomes, values, strict=True))))
            return values

        toolbox, state = make_toolbox(problem), SearchState()
        toolbox.register("evaluate", evaluate)
        random.seed(seed)
        rungs = Rungs(steps, total_steps)
        ranked = evolve(problem, toolbox, rungs, population, [], state, lambda _: None)
        return ranked, state, rungs, asked

    return search


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), total_steps=st.integers(60, 20_000), population=st.integers(1, 30))
def test_a_search_keeps_to_its_budget_and_climbs_rung_by_rung(course, seed, total_steps, population):
    ranked, state, rungs, asked = course(seed, total_steps, population)
    trained = [(genome, rung) for rung, values in asked for genome in values]
    assert len(trained) == len(set(trained))  # nothing is trained twice
    assert sum(rungs.steps[rung] for _, rung in trained) == rungs.spent(state.fitness) <= total_steps
    so_far = [{}, {}, {}]
    for rung, values in asked:
        if rung:  # what rises is among the best third of all below at that time
            below = so_far[rung - 1]
            best = sorted(below.values(), reverse=True)[: len(below) // 3]
            assert all(below[genome] in best for genome in values)
        so_far[rung] |= values
    assert ranked == best_first(state.fitness)
    assert set(ranked) == set(state.fitness)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_a_stopped_search_goes_on_as_if_it_had_not_been(problem, stop_after, tmp_path):
    rungs, path = Rungs((60, 180, 540), 20_000), tmp_path / "search.json"
    toolbox = make_toolbox(problem)
    toolbox.register(
        "evaluate",
        lambda genomes, rung: [
            problem.score(one) + random.Random(f"{one} {rung}").gauss(0, 0.1 / 3**rung) for one in genomes
        ],
    )

    def search(after_generation):
        state = SearchState.load(path)
        random.seed(7)
        ranked = evolve(problem, toolbox, rungs, 12, [], state, after_generation)
        return ranked, state

    def stop(state):
        state.save(path)
        if state.generation == stop_after:
            raise Stopped

    expected, whole = search(lambda _: None)
    assert whole.generation > 4
    with pytest.raises(Stopped):
        search(stop)
    found, state = search(lambda _: None)
    assert found == expected
    assert list(state.fitness.items()) == list(whole.fitness.items())
    assert (state.population, state.history) == (whole.population, whole.history)


def test_rungs_find_better_than_short_trials_alone(course, problem):
    """At the same cost, in the mean of many searches, by the fitness without luck."""
    of_rungs, of_short = (
        sum(problem.score(course(seed, 6000, 27, steps)[0][0]) for seed in range(15))
        for steps in ((60, 180, 540), (60,))
    )
    assert of_rungs > of_short
