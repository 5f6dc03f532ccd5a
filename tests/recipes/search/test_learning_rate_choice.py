"""The rate with the highest fitness between two worse ones is found, whichever side it lies on."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microtune.recipes.search.learning_rate_choice import FACTOR, PILOTS, best_rate, pilots_among


@given(best=st.integers(-6, 6), first=st.floats(1e-4, 1))
def test_the_best_of_all_multiples(best, first):
    tried = best_rate(lambda rate: -abs(math.log2(rate / first) - best), first, most=20)
    rates = list(tried)
    assert rates[0] == pytest.approx(first * FACTOR**best)
    assert {rates[0] * FACTOR, rates[0] / FACTOR} <= set(tried)
    assert len(tried) <= abs(best) + 3
    assert list(tried.values()) == sorted(tried.values(), reverse=True)


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_no_more_than_may_be_tried(most):
    calls = []
    best_rate(lambda rate: calls.append(rate) or rate, 0.1, most)
    assert len(calls) == len(set(calls)) == most


@pytest.mark.parametrize("count", range(1, 12))
def test_pilots_differ(count):
    guesses = [(number,) for number in range(count)]
    pilots = pilots_among(guesses)
    assert pilots[0] == guesses[0]
    assert len(set(pilots)) == len(pilots) == min(PILOTS, count)
