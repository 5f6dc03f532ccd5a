"""The proven optimum of a search problem, by mixed-integer programs: what a search is measured against."""

from dataclasses import dataclass

from microtune.modules.search.integer_program import Genome, best_genome
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
