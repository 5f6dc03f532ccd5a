"""The choice of updates with the highest sum of gains within the limits, by mixed-integer programs (HiGHS)."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Genome = tuple[int, ...]  # index of the bias depth, then of the ratio of each candidate layer; 0: not updated

INFEASIBLE = 2  # of the states that milp returns
OBJECTIVE_SCALE = 1e4  # what all gains sum up to in the program: HiGHS stops within 1e-6 of the best
NO_GAIN = 1e-12  # what is below does not count
BOUND_TOLERANCE = 1e-8  # of the sum of gains: bounds are no more exact than what HiGHS stops within


@dataclass(frozen=True)
class IntegerProgram:
    """At most one option of each layer, and one bias depth, of which the bytes add up.

    Args:
        gains: Of each option: first the depths, then the ratios of each layer, of shape (option,).
        part_of: Of each option, which part it is of: 0 the depth, then the layers.
        first_option: Of each part; of a layer that is the one that updates nothing.
        is_within: Whether each option lies within each depth, of shape (depth, option).
        limits: Bytes that there are at each moment, of shape (moment,).
        constant: Bytes at each depth without weights, of shape (depth, moment).
        per_choice: What each option of a layer adds, of shape (depth, option less the depths, moment).
        may_cost_accuracy: Whether options that lose accuracy can be needed, as where they free flash.
    """

    gains: NDArray[np.float64]
    part_of: NDArray[np.int64]
    first_option: NDArray[np.int64]
    is_within: NDArray[np.bool_]
    limits: NDArray[np.float64]
    constant: NDArray[np.float64]
    per_choice: NDArray[np.float64]
    may_cost_accuracy: bool = False

    @property
    def num_depths(self) -> int:
        """How many bias depths there are to choose from."""
        return len(self.constant)

    @property
    def num_layers(self) -> int:
        """How many layers there are to choose for."""
        return len(self.first_option) - 1

    def score(self, genome: Genome) -> float:
        """The sum of the gains of a genome whose layers all lie within its depth."""
        return float(sum(self.gains[self.first_option + np.array(genome)].tolist()))

    def fits(self, genome: Genome) -> bool:
        """Whether the genome is within the limits."""
        depth, *choices = (self.first_option + np.array(genome)).tolist()
        added = self.per_choice[depth, np.array(choices, dtype=np.int64) - self.num_depths].sum(axis=0)
        return bool((self.constant[depth] + added <= self.limits).all())


def best_genome(program: IntegerProgram) -> Genome | None:
    """The genome of the optimum; None if no genome fits, which a search problem in hand rules out."""
    best, best_score = None, -np.inf
    with _silent_standard_output():
        bounds = np.array([_highest_gain(program, depth) for depth in range(program.num_depths)])
        for depth in np.argsort(-bounds, kind="stable").tolist():
            if bounds[depth] <= best_score:
                break
            genome = _best_of_depth(program, depth)
            if genome is not None and program.score(genome) > best_score:
                best, best_score = genome, program.score(genome)
    return best


def best_at_depth(program: IntegerProgram, depth: int) -> Genome | None:
    """The genome with the highest sum of gains of those with this bias depth, by its index; None if none fits."""
    with _silent_standard_output():
        return _best_of_depth(program, depth)


def _highest_gain(program: IntegerProgram, depth: int) -> float:
    """No genome of this bias depth scores more: the optimum if parts of choices could be taken; -inf if none fits."""
    options = _usable_options(program, depth)
    parts = _chosen(program, depth, options, integral=False)
    if parts is None:
        return -np.inf
    gains = program.gains[options]
    return float(program.gains[depth] + parts @ gains + BOUND_TOLERANCE * np.abs(gains).sum())


def _best_of_depth(program: IntegerProgram, depth: int) -> Genome | None:
    """The best genome with this bias depth; None if none fits."""
    options = _usable_options(program, depth)
    chosen = _chosen(program, depth, options, integral=True)
    if chosen is None:
        return None
    genome = [depth] + [0] * program.num_layers
    for option in options[chosen > 0.5].tolist():
        part = int(program.part_of[option])
        genome[part] = option - int(program.first_option[part])
    if not program.fits(tuple(genome)):
        raise RuntimeError(f"HiGHS returned {genome}, which is over the budget")
    return tuple(genome)


def _usable_options(program: IntegerProgram, depth: int) -> NDArray[np.int64]:
    """The updates that can be chosen at this bias depth."""
    is_update = np.arange(len(program.part_of)) != program.first_option[program.part_of]
    usable = program.is_within[depth] & is_update & (program.part_of > 0)
    if not program.may_cost_accuracy:
        usable &= program.gains > 0
    return np.flatnonzero(usable)


def _chosen(
    program: IntegerProgram, depth: int, options: NDArray[np.int64], integral: bool
) -> NDArray[np.float64] | None:
    """How much of each option has the highest sum of gains, at most one whole of each layer; None if nothing fits.

    Args:
        program: What to solve.
        depth: The bias depth.
        options: Those to choose from.
        integral: Whether options are taken whole or not at all.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # a second, which a command line need not wait for

    gains, layers = program.gains[options], program.part_of[options]
    bytes_added = program.per_choice[depth][options - program.num_depths]
    left = program.limits - program.constant[depth]
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
