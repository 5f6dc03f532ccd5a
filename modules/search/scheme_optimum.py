"""The proven optimum of a search problem, by mixed-integer programs: what a search is measured against."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from microtune.modules.search.integer_program import Genome, best_at_depth, best_genome
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.user_error import UserError


@dataclass(frozen=True)
class Optimum:
    """The best genome there is.

    Args:
        genome: One with the highest score; several may have it.
        score: Its score.
    """

    genome: Genome
    score: float


def proven_optimum(problem: SearchProblem) -> Optimum:
    """The highest score within the budget, with a proof: by HiGHS, one program per bias depth.

    At one depth the bytes of every moment are linear in the choices, at most one ratio per layer: with extra memory a
    multiple-choice knapsack, with peak memory one such row per moment. A depth is skipped if it could not beat the best
    so far even with parts of choices (the linear relaxation).

    Args:
        problem: What to solve.

    Raises:
        UserError: Two candidate layers read the same activation: their bytes do not add up under peak memory.

    Example::

        problem.scheme(proven_optimum(problem).genome).save("optimum.json")
    """
    if not problem.account.is_linear:
        convolutions = problem.peak_memory.operations.convolutions
        names = " and ".join(convolutions[layer].name for layer in problem.account.shared_inputs[0])
        raise UserError(
            f"{names} read the same activation, so their peak memory does not add up and no optimum is proven: "
            "leave all but one of them out of the contribution table, or take memory='extra'"
        )
    genome = best_genome(problem.integer_program())
    return Optimum(genome, problem.score(genome))


def best_at_depths(problem: SearchProblem, depths: Iterable[int], power: float = 1.0) -> list[Genome]:
    """The best genome at each of some bias depths, by gains to a power; without depths at which nothing fits.

    Gains of single updates do not say what several are worth together, nor how the memory is best shared between biases
    and weights: a power below one spreads memory over more layers, one above concentrates it on few.

    Args:
        problem: What to solve; the bytes of its layers add up.
        depths: Indexes into ``problem.depths``.
        power: Of the absolute value of each gain; its sign stays.

    Example::

        best_at_depths(problem, range(len(problem.depths)), power=0.7)
    """
    program = problem.integer_program()
    program = replace(program, gains=np.sign(program.gains) * np.abs(program.gains) ** power)
    found = (best_at_depth(program, depth) for depth in depths)
    return [genome for genome in found if genome is not None]
