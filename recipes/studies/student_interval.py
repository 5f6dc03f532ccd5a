"""Student's confidence interval of a mean of few values, such as differences paired over seeds."""

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


def interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's confidence interval of the mean; None of fewer than two values.

    Example::

        interval([0.01, 0.02, 0.03])  # (-0.0048..., 0.0448...)
    """
    count = len(differences)
    if count < 2:
        return None
    # by need, as it takes half a second; scipy.stats, which calls it, takes more
    from scipy.special import stdtrit

    half = stdtrit(count - 1, (1 + confidence) / 2) * statistics.stdev(differences) / math.sqrt(count)
    mean = statistics.mean(differences)
    return float(mean - half), float(mean + half)
