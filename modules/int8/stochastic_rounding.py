"""Stochastic rounding with random integers that a C program can repeat, bit for bit."""

import torch
from torch import Tensor

INCREMENT = (
    0x9E3779B9  # 2^32 divided by the golden ratio: Steele et al. 2014, "Fast splittable pseudorandom number generators"
)
WORD = 0xFFFFFFFF


class IntegerGenerator:
    """Random integers of 32 bits: a counter and a mixing of its bits, which need four bytes of state.

    In C::

        uint32_t next(uint32_t *state) {
            uint32_t z = (*state += 0x9E3779B9u);
            z ^= z >> 16;  z *= 0x21F0AAADu;
            z ^= z >> 15;  z *= 0x735A2D97u;
            return z ^ (z >> 15);
        }

    The constants are those of C. Wellons' hash-prospector with the least bias for this form. The period is 2^32.

    Args:
        state: Of the counter, any integer; the seed.

    Example::

        IntegerGenerator(0).integers(3)  # tensor([...]), int64 from 0 to 2^32 - 1
    """

    def __init__(self, state: int = 0):
        self.state = state & WORD

    def integers(self, count: int) -> Tensor:
        """The next ``count`` integers, int64 of shape (count,)."""
        z = (self.state + INCREMENT * torch.arange(1, count + 1)) & WORD
        self.state = (self.state + INCREMENT * count) & WORD
        # a product of two words wraps around 2^64, which leaves its lower half right
        z = ((z ^ (z >> 16)) * 0x21F0AAAD) & WORD
        z = ((z ^ (z >> 15)) * 0x735A2D97) & WORD
        return z ^ (z >> 15)


def round_stochastically(x: Tensor, generator: IntegerGenerator) -> Tensor:
    """Rounds up with a probability of the fractional part, else down: the mean is the number itself.

    In C, for every element in the order of its indexes::

        floorf(x) + ((next(&state) >> 8) < (x - floorf(x)) * 0x1p24f)

    Args:
        x: float32 of any shape.
        generator: Draws one integer per element, also for whole numbers, which it leaves as they are.

    Example::

        round_stochastically(torch.full((8,), 0.5), IntegerGenerator(0))  # zeros and ones
    """
    low = x.floor()
    threshold = (generator.integers(x.numel()) >> 8).to(x.device, torch.float32).view(x.shape)
    return low + (threshold < (x - low) * 2**24)
