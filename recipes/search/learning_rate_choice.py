"""The learning rate that schemes are judged at, where none is given: at which a few different ones learn best."""

from collections.abc import Callable, Sequence

from microtune.modules.search.integer_program import Genome

PILOTS = 3  # schemes that are trained at every rate
FACTOR = 2.0  # between neighbouring rates


def pilots_among(guesses: Sequence[Genome]) -> list[Genome]:
    """A few genomes that differ: the first, and others at equal distances.

    Example::

        pilots_among([(0,), (1,), (2,), (3,), (4,), (5,)])  # [(0,), (2,), (4,)]
    """
    distance = max(1, len(guesses) // PILOTS)
    return list(guesses[::distance][:PILOTS])


def best_rate(fitness_at: Callable[[float], float], first: float, most: int) -> dict[float, float]:
    """Mean fitness at each rate that was tried, the best rate first: doubled as long as it rises, or else halved.

    A rate that suits schemes on average ranks them; one that is best for the best few may let others diverge, which
    tells nothing of them (``recipes/studies/benchmark_trials.py``).

    Args:
        fitness_at: The mean fitness of the pilots at a rate.
        first: The rate to begin with.
        most: Number of rates that are tried, at most.

    Example::

        next(iter(best_rate(lambda rate: -abs(rate - 0.1), first=0.0125, most=9)))  # 0.1
    """
    found = {first: fitness_at(first)}
    for factor in (FACTOR, 1 / FACTOR):
        rate = first
        while len(found) < most:
            beyond = rate * factor
            found[beyond] = fitness_at(beyond)
            if found[beyond] <= found[rate]:
                break
            rate = beyond
        if rate != first:
            break
    return dict(sorted(found.items(), key=lambda pair: pair[1], reverse=True))
