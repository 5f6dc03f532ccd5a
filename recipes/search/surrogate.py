"""A surrogate of trials: ridge regression with pairwise terms over all that were trained; it proposes new schemes."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from deap import base
from numpy.typing import NDArray

from microtune.modules.search.integer_program import Genome
from microtune.modules.search.search_problem import SearchProblem
from microtune.recipes.search.genetic_algorithm import IMMIGRANTS, Individual, new_children
from microtune.recipes.search.rungs import Best, Known, highest, offsets

LEAST_TRIALS = 16  # with fewer there is nothing to learn from
WORST_PERCENT = 5  # what is worse counts as this: how far a training diverged says nothing
PENALTIES = tuple(10.0**exponent for exponent in range(-1, 5))  # of which leave-one-out chooses
POOL = 20  # children for each that is trained
NEAR = 1  # steps of options in all, by which genomes differ that no trial tells apart


class Surrogate:
    """What a trial would say of a scheme, learnt from those that were done.

    Its terms are the bias depth and the part of each layer that is updated, and the products of every two of them. A
    scheme counts once for each rung that it was on, the higher twice as much as the one below.

    Args:
        problem: Whose genomes are trained.
        known: Their fitness on each rung; None where a trial was lost.

    Example::

        Surrogate(problem, state.fitness).fitness(genomes).argmax()
    """

    def __init__(self, problem: SearchProblem, known: Mapping[Genome, Known]):
        from sklearn.linear_model import RidgeCV  # seconds, which a command line need not wait for
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import PolynomialFeatures, StandardScaler

        self.problem = problem
        trials = [
            (genome, rung, value)
            for genome, values in known.items()
            for rung, value in enumerate(values)
            if value is not None
        ]
        rungs = np.array([rung for _, rung, _ in trials])
        fitness = np.array([value for *_, value in trials]) - offsets(known)[rungs]
        fitness = np.maximum(fitness, np.percentile(fitness, WORST_PERCENT))
        self.model = make_pipeline(
            StandardScaler(), PolynomialFeatures(2, include_bias=False), StandardScaler(), RidgeCV(PENALTIES)
        )
        self.model.fit(self._terms([genome for genome, *_ in trials]), fitness, ridgecv__sample_weight=2.0**rungs)

    def fitness(self, genomes: Sequence[Genome]) -> NDArray[np.float64]:
        """What a trial on the first rung would say of each genome, of shape (genome,)."""
        return self.model.predict(self._terms(genomes))

    def _terms(self, genomes: Sequence[Genome]) -> NDArray[np.float64]:
        ratios = self.problem.ratios
        rows = [
            [genome[0] / len(self.problem.depths), *(of[option] for of, option in zip(ratios, genome[1:], strict=True))]
            for genome in map(self.problem.canonical, genomes)
        ]
        return np.array(rows, dtype=np.float64)


def propose_by_surrogate(
    toolbox: base.Toolbox,
    problem: SearchProblem,
    parents: Sequence[Individual],
    count: int,
    known: Mapping[Genome, Known],
    best: Best = highest,
) -> list[Individual]:
    """New children as ``new_children`` makes them, of many more those that the surrogate thinks best of.

    None differs from another, or from what was trained, by so little that no trial tells them apart; some are random in
    any case.

    Args:
        toolbox: From ``make_toolbox``.
        problem: Whose genomes they are.
        parents: Of the children.
        count: How many are wanted; there may be fewer.
        known: As in ``Surrogate``; of what is about to be trained without fitness.
        best: The best few of genomes with the fitness that the surrogate tells.
    """
    trained = {genome: values for genome, values in known.items() if any(value is not None for value in values)}
    if not parents or len(trained) < LEAST_TRIALS:
        return new_children(toolbox, parents, count, known)
    at_random = new_children(toolbox, [], math.ceil(IMMIGRANTS * count), known)
    children = [tuple(child) for child in new_children(toolbox, parents, POOL * count, known)]
    fitness = Surrogate(problem, trained).fitness(children).tolist() if children else []
    chosen, seen = [], np.array([*known, *map(tuple, at_random)])
    for child in best(dict(zip(children, fitness, strict=True)), len(children)):
        if len(chosen) + len(at_random) == count:
            break
        if np.abs(seen - np.array(child)).sum(axis=1).min() > NEAR:
            chosen.append(Individual(child))
            seen = np.vstack([seen, child])
    return [*chosen, *at_random]
