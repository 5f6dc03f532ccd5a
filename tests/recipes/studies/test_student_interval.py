"""Student's interval of a mean."""

import math

import pytest

from microtune.recipes.studies.student_interval import interval

STUDENT_T_OF_2, STUDENT_T_OF_3 = 12.7062, 4.30265  # of two and three values at 95 %, from a printed table


def test_interval_by_hand():
    half = STUDENT_T_OF_3 * 0.01 / math.sqrt(3)
    assert interval([0.01, 0.02, 0.03]) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-5)
    assert interval([0.1, 0.3]) == pytest.approx((0.2 - STUDENT_T_OF_2 * 0.1, 0.2 + STUDENT_T_OF_2 * 0.1), rel=1e-4)
    assert interval([0.02, 0.02]) == (0.02, 0.02)
    assert interval([0.02]) is None


def test_another_confidence():
    low, high = interval([0.01, 0.02, 0.03], confidence=0.5)
    assert (high - low) / 2 == pytest.approx(0.81650 * 0.01 / math.sqrt(3), rel=1e-4)  # t of 2 degrees at 75 %
