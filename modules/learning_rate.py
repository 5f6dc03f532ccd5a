"""The learning rate over a training: warm-up, then a cosine."""

import math


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine to zero: the factor of the learning rate in optimizer step ``step``.

    Example::

        learning_rate_factor(0, warmup_steps=0, total_steps=100)  # 1.0
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
