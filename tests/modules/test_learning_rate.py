"""The schedule of the learning rate: it rises linearly, then falls to zero."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microtune.modules.learning_rate import learning_rate_factor


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(1, 2000))
def test_factor_is_within_bounds(step, warmup_steps, total_steps):
    assert 0 <= learning_rate_factor(step, warmup_steps, total_steps) <= 1


@given(st.data(), st.integers(2, 1000))
def test_factor_rises_linearly_then_falls(data, total_steps):
    warmup_steps = data.draw(st.integers(0, total_steps - 1))
    factors = [learning_rate_factor(step, warmup_steps, total_steps) for step in range(total_steps + 1)]
    assert factors[:warmup_steps] == pytest.approx([(step + 1) / warmup_steps for step in range(warmup_steps)])
    falling = factors[warmup_steps:]
    assert falling[0] == 1
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(0, abs=1e-12)


@given(st.integers(1, 1000))
def test_factor_is_half_in_the_middle_of_the_cosine(half):
    assert learning_rate_factor(10 + half, 10, 10 + 2 * half) == pytest.approx(0.5)


def test_factor_stays_zero_after_the_end():
    assert learning_rate_factor(150, 10, 100) == pytest.approx(0, abs=1e-12)


def test_no_step_is_wasted_at_rate_zero():
    assert learning_rate_factor(0, 10, 100) == 0.1
    assert learning_rate_factor(0, 0, 100) == 1
