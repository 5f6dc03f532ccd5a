"""The proven optimum of a search problem, by mixed-integer programs: what a search is measured against."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from microtune.modules.scheme_search import Genome, SearchProblem
from microtune.modules.user_error import UserError

INFEASIBLE = 2  # of the states that milp returns
OBJECTIVE_SCALE = 1e4  # what all gains sum up to in the program: HiGHS stops within 1e-6 of the best
NO_GAIN = 1e-12  # what is below does not count
BOUND_TOLERANCE = 1e-8  # of the sum of gains: bounds are no more exact than what HiGHS stops within


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
    genome = best_genome(problem)
    return Optimum(genome, problem.score(genome))


def best_genome(problem: SearchProblem) -> Genome | None:
    """The genome of the optimum; None if no genome fits, which a problem in hand rules out."""
    best, best_score = None, -np.inf
    with _silent_standard_output():
        bounds = np.array([_highest_gain(problem, depth) for depth in range(len(problem.depths))])
        for depth in np.argsort(-bounds, kind="stable").tolist():
            if bounds[depth] <= best_score:
                break
            genome = _best_of_depth(problem, depth)
            if genome is not None and problem.score(genome) > best_score:
                best, best_score = genome, problem.score(genome)
    return best


def _highest_gain(problem: SearchProblem, depth: int) -> float:
    """No genome of this bias depth scores more: the optimum if parts of choices could be taken; -inf if none fits."""
    options = _usable_options(problem, depth)
    parts = _chosen(problem, depth, options, integral=False)
    if parts is None:
        return -np.inf
    gains = problem.gains[options]
    return float(problem.gains[depth] + parts @ gains + BOUND_TOLERANCE * np.abs(gains).sum())


def _best_of_depth(problem: SearchProblem, depth: int) -> Genome | None:
    """The best genome with this bias depth; None if none fits."""
    options = _usable_options(problem, depth)
    chosen = _chosen(problem, depth, options, integral=True)
    if chosen is None:
        return None
    genome = [depth] + [0] * len(problem.layers)
    for option in options[chosen > 0.5].tolist():
        part = int(problem.part_of[option])
        genome[part] = option - int(problem.first_option[part])
    if not problem.fits(tuple(genome)):
        raise RuntimeError(f"HiGHS returned {genome}, which is over the budget")
    return tuple(genome)


def _usable_options(problem: SearchProblem, depth: int) -> NDArray[np.int64]:
    """The updates that can be chosen at this bias depth."""
    is_update = np.arange(len(problem.part_of)) != problem.first_option[problem.part_of]
    usable = problem.is_within[depth] & is_update & (problem.part_of > 0)
    if problem.flash_limit_bytes is None:  # only the flash asks for updates that cost accuracy
        usable &= problem.gains > 0
    return np.flatnonzero(usable)


def _chosen(
    problem: SearchProblem, depth: int, options: NDArray[np.int64], integral: bool
) -> NDArray[np.float64] | None:
    """How much of each option has the highest sum of gains, at most one whole of each layer; None if nothing fits.

    Args:
        problem: What to solve.
        depth: The bias depth.
        options: Those to choose from.
        integral: Whether options are taken whole or not at all.
    """
    gains, layers = problem.gains[options], problem.part_of[options]
    bytes_added = problem.account.per_choice[depth][options - len(problem.depths)]
    left = problem.limits - problem.account.constant[depth]
    if not len(gains):
        return np.zeros(0) if (left >= 0).all() else None
    one_of_each = (layers == np.unique(layers)[:, None]).astype(float)
    # sums are whole numbers: half a byte more admits no other scheme, and keeps the solver's tolerance away
    rows = LinearConstraint(
        np.concatenate([bytes_added.T, one_of_each]),
        ub=np.concatenate([np.floor(left) + 0.5, np.ones(len(one_of_each))]),
    )
    scale = OBJECTIVE_SCALE / max(np.abs(gains).sum(), NO_GAIN)
    result = milp(
        -gains * scale,
        integrality=np.full(len(gains), int(integral)),
        bounds=Bounds(0, 1),
        constraints=rows,
        options={"mip_rel_gap": 0},
    )
    if result.status == INFEASIBLE:
        return None
    if not result.success:
        raise RuntimeError(f"HiGHS ended without the optimum: {result.message}")
    return result.x


@contextmanager
def _silent_standard_output() -> Iterator[None]:
    """HiGHS prints from C, past ``sys.stdout``: it would stand amid what a recipe prints for another program."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
