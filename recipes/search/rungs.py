"""Rungs of successive halving: who is trained for how long, within one budget of optimizer steps.

After Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization", and Li et
al. 2020, "A system for massively parallel hyperparameter tuning", algorithm 2: what is among the best of all that were
ever on its rung rises to the next, whenever that was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from microtune.modules.search.integer_program import Genome
from microtune.modules.user_error import UserError

PROMOTED = 3  # the best of so many rise; the rungs are as far apart

# what is known of a genome: its fitness on each rung it has been on; None where the evaluation was lost
Known = tuple[float | None, ...]
Best = Callable[[Mapping[Genome, float], int], list[Genome]]


@dataclass(frozen=True)
class Rungs:
    """What an evaluation on each rung costs, and what all of them may cost.

    Args:
        steps: Optimizer steps of an evaluation on each rung, ascending; of a table's score 1.
        total_steps: The budget of the search.

    Raises:
        UserError: The steps are not positive and ascending, or the budget is less than one evaluation.

    Example::

        Rungs((60, 180, 540), total_steps=20_000)
    """

    steps: tuple[int, ...]
    total_steps: int

    def __post_init__(self):
        if not self.steps or self.steps[0] < 1 or list(self.steps) != sorted(set(self.steps)):
            raise UserError(
                f"rungs is {','.join(map(str, self.steps))}: give numbers of steps, each more than the one before, "
                "such as 60,180,540"
            )
        if self.total_steps < self.steps[0]:
            raise UserError(f"total_steps is {self.total_steps}: give at least one trial of {self.steps[0]} steps")

    def spent(self, known: Mapping[Genome, Known]) -> int:
        """What all evaluations have cost; lost ones too."""
        return sum(sum(self.steps[: len(values)]) for values in known.values())

    def affordable(self, known: Mapping[Genome, Known], rung: int) -> int:
        """How many evaluations on a rung the rest of the budget pays for."""
        return max(0, self.total_steps - self.spent(known)) // self.steps[rung]

    def rising(self, known: Mapping[Genome, Known], rung: int, best: Best | None = None) -> list[Genome]:
        """The genomes that rise to a rung: those of the best third of the rung below that are not there yet.

        Args:
            known: The fitness of all genomes.
            rung: To which.
            best: The best few of genomes with their fitness; by default those with the highest.
        """
        below = {genome: values[rung - 1] for genome, values in known.items() if len(values) >= rung}
        finished = {genome: value for genome, value in below.items() if value is not None}
        chosen = (best or highest)(finished, len(finished) // PROMOTED)
        return [genome for genome in chosen if len(known[genome]) == rung]


def highest(fitness: Mapping[Genome, float], count: int) -> list[Genome]:
    """The genomes with the highest fitness."""
    return sorted(fitness, key=lambda genome: fitness[genome], reverse=True)[:count]


def fitness_of(values: Known) -> tuple[float, float] | None:
    """The rung that a genome has reached and its fitness there, to be compared in this order; None if it was lost.

    What has risen was better than what has not, and the longest training says most.

    Example::

        fitness_of((0.71, 0.78))  # (1.0, 0.78)
    """
    known = [(float(rung), value) for rung, value in enumerate(values) if value is not None]
    return known[-1] if known else None


def best_first(known: Mapping[Genome, Known]) -> list[Genome]:
    """The genomes that were not lost, the best first; of equals the one that came last."""
    fitness = {genome: fitness_of(values) for genome, values in reversed(list(known.items()))}
    return sorted((one for one in fitness if fitness[one] is not None), key=lambda one: fitness[one], reverse=True)


def pairs_of_rungs(known: Mapping[Genome, Known], rungs: Sequence[int]) -> list[tuple[int, int, list, list]]:
    """For each two rungs their steps, and the fitness on either of the genomes that were on both."""
    found = []
    for lower in range(len(rungs)):
        for upper in range(lower + 1, len(rungs)):
            both = [one for one in known.values() if len(one) > upper and None not in (one[lower], one[upper])]
            found.append((rungs[lower], rungs[upper], [one[lower] for one in both], [one[upper] for one in both]))
    return found


def offsets(known: Mapping[Genome, Known]) -> NDArray[np.float64]:
    """By how much fitness on each rung lies above that on the first, by the genomes that were on both."""
    highest = max(map(len, known.values()))
    found = np.zeros(highest)
    for rung in range(1, highest):
        differences = [
            values[rung] - values[0]
            for values in known.values()
            if len(values) > rung and None not in (values[0], values[rung])
        ]
        if differences:
            found[rung] = np.mean(differences)
    return found
