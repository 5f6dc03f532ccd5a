"""The range that int8 is to span of an activation, from a histogram of what it held on samples.

PyTorch's own observers are not used: ``torch.ao.quantization`` is deprecated and is to be removed (pytorch/ao issue
2259), and its ``HistogramObserver`` does not know that 0 must be an integer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from microtune.modules.int8.graph import INT8_MAX, INT8_MIN, Quantization
from microtune.modules.user_error import UserError

RangeEstimator = Literal["min_max", "mse"]

BINS = 2048
STEPS = INT8_MAX - INT8_MIN
# of the whole range, what its ends are tried at, widest first
PARTS = tuple(percent / 100 for percent in range(100, 0, -1))


@dataclass(frozen=True)
class Histogram:
    """What one tensor of a network held, over all samples.

    Args:
        low: The smallest value, or 0 if that is smaller.
        high: The largest value, or 0 if that is larger.
        counts: Of the values but 0, in bins of equal width from ``low`` to ``high``.

    Example::

        Histogram(low=-1.0, high=3.0, counts=np.ones(2048))
    """

    low: float
    high: float
    counts: NDArray[np.float64]


def quantization_of_range(low: float, high: float) -> Quantization:
    """Scale and zero point by which int8 spans a range, which is widened to hold 0.

    0 is an integer (Nagel et al. 2021, section 2.1), so that the range moves by up to half a step.

    Args:
        low: What -128 is to stand for.
        high: What 127 is to stand for.

    Example::

        quantization_of_range(0, 6)  # Quantization(scale=6 / 255, zero_point=-128)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    # a tensor of nothing but zeros has any scale; one below float32's numbers would be 0 there
    scale = (high - low) / STEPS if high - low > STEPS * torch.finfo(torch.float32).tiny else 1 / STEPS
    return Quantization(scale, min(INT8_MAX, max(INT8_MIN, round(INT8_MIN - low / scale))))


def estimated_quantization(histogram: Histogram, estimator: RangeEstimator) -> Quantization:
    """Scale and zero point for values of this histogram.

    ``"min_max"`` spans all of them. ``"mse"`` clips some: it looks for the range whose quantized values have the least
    mean squared error (Nagel et al. 2021, section 3.1, equation 24 and table 2), moving one end and then the other, in
    hundredths of the whole range, until neither move helps. 0 stays inside.

    Args:
        histogram: Of the values.
        estimator: ``"min_max"`` or ``"mse"``.

    Raises:
        UserError: The estimator is unknown.

    Example::

        estimated_quantization(calibration.histograms["first_conv"], "mse")
    """
    if estimator not in get_args(RangeEstimator):
        raise UserError(f"estimator is {estimator!r}: give one of {', '.join(get_args(RangeEstimator))}")
    low, high = histogram.low, histogram.high
    if estimator == "min_max" or not histogram.counts.any():
        return quantization_of_range(low, high)

    before = None
    while before != (low, high):
        before = (low, high)
        low, high = _best(histogram, [before, *((low, histogram.high * part) for part in PARTS)])
        low, high = _best(histogram, [(low, high), *((histogram.low * part, high) for part in PARTS)])
    return quantization_of_range(low, high)


def _best(histogram: Histogram, ranges: list[tuple[float, float]]) -> tuple[float, float]:
    errors = mean_squared_errors(histogram, [quantization_of_range(*limits) for limits in ranges])
    return ranges[int(errors.argmin())]  # the first of the best


def mean_squared_errors(histogram: Histogram, quantizations: Sequence[Quantization]) -> NDArray[np.float64]:
    """What each of several quantizations costs on average of the values but 0, taken to lie in the middle of their bin.

    Example::

        mean_squared_errors(histogram, [Quantization(0.02, -128), Quantization(0.03, -128)])  # shape (2,)
    """
    edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    scales = np.array([[one.scale] for one in quantizations])
    zero_points = np.array([[one.zero_point] for one in quantizations])
    integers = np.rint(middles / scales).clip(INT8_MIN - zero_points, INT8_MAX - zero_points)
    # summed row by row: in a product of matrices the last digits depend on the place, and the search might not end
    return ((integers * scales - middles) ** 2 * histogram.counts).sum(1) / histogram.counts.sum()
