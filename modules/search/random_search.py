"""Random search for an update scheme: what any other search has to beat."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from microtune.modules.search.search_problem import Genome, SearchProblem
from microtune.modules.user_error import UserError


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        genome: The best.
        score: Its score.
        evaluations: How many scores were computed.
        best_scores: The best so far after each evaluation.
    """

    genome: Genome
    score: float
    evaluations: int
    best_scores: list[float]


def random_search(
    problem: SearchProblem,
    evaluations: int,
    seed: int,
    blind: bool = False,
    score: Callable[[Genome], float] | None = None,
    stop_at: float = math.inf,
) -> SearchResult:
    """Takes the best of random genomes, each repaired: what any other search has to beat.

    Args:
        problem: What to solve.
        evaluations: Genomes to score.
        seed: Of the draws.
        blind: Repair by throwing out at random and fill nothing.
        score: Instead of the problem's, such as the accuracy after a short training.
        stop_at: Stop at this score, where none can be higher.

    Raises:
        UserError: ``evaluations`` is not positive.

    Example::

        random_search(problem, evaluations=5000, seed=0).score / proven_optimum(problem).score
    """
    if evaluations < 1:
        raise UserError(f"evaluations is {evaluations}: give 1 or more")
    score = score or problem.score
    rng = random.Random(seed)
    best: tuple[float, Genome] | None = None
    best_scores = []
    for _ in range(evaluations):
        genome = problem.random_genome(rng)
        genome = problem.blind_repair(genome, rng) if blind else problem.repair(genome)
        found = score(genome)
        if best is None or found > best[0]:
            best = (found, genome)
        best_scores.append(best[0])
        if best[0] >= stop_at:
            break
    return SearchResult(best[1], best[0], len(best_scores), best_scores)
