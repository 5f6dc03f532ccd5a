"""What short trainings say of long ones: test-retest and rank correlations, the spread of schemes, and what is gained.

Of one data set at one budget; the truth about a scheme is its mean test accuracy after the longest training, at the
learning rate that is best for it by validation accuracy.
"""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from microtune.recipes.search.finalists import rank_correlation
from microtune.recipes.studies.result_rows import Amount, AtLeastOne, Count, Fraction, Name
from microtune.recipes.studies.sampled_schemes import kind_of

DRAWS = 2000  # of candidates, of which one is chosen
CANDIDATES = 27  # that a search can afford to try


@dataclass(frozen=True)
class TrialRow:
    """One training of one scheme: a row of ``trials.csv``, whose columns are these, in this order.

    Args:
        data: Name of the data set.
        budget: As in ``Result``.
        scheme: Name of the scheme, which begins with its kind.
        steps: Number of optimizer steps of the training, whose schedule of learning rates ends with them.
        learning_rate: At its highest.
        seed: Of the classifier and the order of the samples.
        val_top1, test_top1: Accuracies, fractions.
        val_loss: Mean cross-entropy on the validation split, in nats; None where it is no number.
        extra_memory_bytes: Of a training step.
        bias_depth, updated_layers, updated_channels: As in ``Result``.

    Example::

        read_rows("recipes/results/trials.csv", TrialRow)[0].val_top1
    """

    data: Name
    budget: str
    scheme: Name
    steps: AtLeastOne
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    seed: Count
    val_top1: Fraction
    test_top1: Fraction
    val_loss: Amount | None
    extra_memory_bytes: Amount
    bias_depth: Count
    updated_layers: Count
    updated_channels: Count

    @property
    def key(self) -> tuple[Any, ...]:
        """What no other row has."""
        return self.data, self.budget, self.scheme, self.steps, self.learning_rate, self.seed


MEASURES: dict[str, Callable[[TrialRow], float]] = {
    "val_top1": lambda row: row.val_top1,
    # of a diverged training: as bad as can be
    "val_loss": lambda row: -np.inf if row.val_loss is None else -row.val_loss,
    "test_top1": lambda row: row.test_top1,
}


def figures_of(rows: Sequence[TrialRow]) -> dict[str, Any]:
    """All figures of one data set at one budget, as plain values.

    Args:
        rows: All trainings of the schemes; of a length at the same rates, or at one rate for each scheme, as of the
            longest.
    """
    lengths = sorted({row.steps for row in rows})
    truths = truth_of(rows, lengths[-1])
    found: dict[str, Any] = {"schemes": len(truths), "longest_steps": lengths[-1]}
    of_lengths = {steps: [row for row in rows if row.steps == steps] for steps in lengths}
    longest = of_lengths[lengths[-1]]
    at_all_rates = [steps for steps in lengths[:-1] if len(rates_of(of_lengths[steps])) == 1]
    found["retest"] = [
        {"steps": steps, "learning_rate": rate, **retest(of_rate)}
        for steps in at_all_rates
        for rate, of_rate in by_rate(of_lengths[steps])
    ]
    for steps in lengths:
        if steps not in at_all_rates:
            found["retest"].append({"steps": steps, "learning_rate": None, **retest(of_lengths[steps])})
    found["with_longest"] = [
        {"steps": steps, "learning_rate": rate, **with_truth(of_rate, truths)}
        for steps in at_all_rates
        for rate, of_rate in by_rate(of_lengths[steps])
    ]
    for steps in lengths[:-1]:
        best = at_best_rate([row for row in rows if row.steps == steps])
        found["with_longest"].append({"steps": steps, "learning_rate": None, **with_truth(best, truths)})
    found["spread"] = spread(longest)
    found["ceiling"] = ceiling(longest)
    found["chosen"] = [
        {"steps": one["steps"], "learning_rate": one["learning_rate"], **chosen_by(of, truths)}
        for one in found["with_longest"]
        for of in [rows_like(rows, one["steps"], one["learning_rate"])]
    ]
    return found


def rates_of(rows: Iterable[TrialRow]) -> set[frozenset[float]]:
    """The sets of learning rates that schemes were trained at: one, where all were at the same."""
    return {frozenset(row.learning_rate for row in of_scheme) for of_scheme in by_scheme(rows).values()}


def by_rate(rows: Iterable[TrialRow]) -> list[tuple[float, list[TrialRow]]]:
    """The rows at each learning rate."""
    ordered = sorted(rows, key=lambda row: row.learning_rate)
    return [(rate, list(group)) for rate, group in itertools.groupby(ordered, key=lambda row: row.learning_rate)]


def at_best_rate(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Of each scheme the rows at the rate with its best mean validation accuracy, the lowest of equals."""
    best = best_rates(rows)
    return [row for row in rows if row.learning_rate == best[row.scheme]]


def best_rates(rows: Sequence[TrialRow]) -> dict[str, float]:
    """The learning rate of each scheme with its best mean validation accuracy, the lowest of equals."""
    return {
        scheme: max(by_rate(of_scheme), key=lambda pair: mean(row.val_top1 for row in pair[1]))[0]
        for scheme, of_scheme in by_scheme(rows).items()
    }


def rows_like(rows: Sequence[TrialRow], steps: int, rate: float | None) -> list[TrialRow]:
    """The rows of a length at a rate; None for each scheme's best."""
    of_length = [row for row in rows if row.steps == steps]
    return at_best_rate(of_length) if rate is None else [row for row in of_length if row.learning_rate == rate]


def by_scheme(rows: Iterable[TrialRow]) -> dict[str, list[TrialRow]]:
    """The rows of each scheme."""
    found: dict[str, list[TrialRow]] = {}
    for row in rows:
        found.setdefault(row.scheme, []).append(row)
    return found


def truth_of(rows: Sequence[TrialRow], longest: int) -> dict[str, float]:
    """Mean test accuracy of each scheme after the longest training."""
    of_schemes = by_scheme(row for row in rows if row.steps == longest)
    return {scheme: mean(row.test_top1 for row in of_scheme) for scheme, of_scheme in of_schemes.items()}


def retest(rows: Sequence[TrialRow]) -> dict[str, float | None]:
    """Rank correlation between the same schemes with one seed and with another, the mean over pairs of seeds."""
    return {name: _retest(rows, measure) for name, measure in MEASURES.items()}


def _retest(rows: Sequence[TrialRow], measure: Callable[[TrialRow], float]) -> float | None:
    of_seed: dict[int, dict[str, float]] = {}
    for row in rows:
        of_seed.setdefault(row.seed, {})[row.scheme] = measure(row)
    found = []
    for one, other in itertools.combinations(of_seed.values(), 2):
        both = sorted(one.keys() & other.keys())
        found.append(rank_correlation([one[name] for name in both], [other[name] for name in both]))
    return mean_of_known(found)


def with_truth(rows: Sequence[TrialRow], truths: dict[str, float]) -> dict[str, Any]:
    """Rank correlation of short trainings with the truth: of one seed (the mean over seeds), and of all together.

    Also of one seed among the better half of the schemes alone: bad ones are easily told.
    """
    found: dict[str, Any] = {}
    seeds = sorted({row.seed for row in rows})
    median = statistics.median(truths.values())
    better = {scheme: truth for scheme, truth in truths.items() if truth >= median}
    for name, measure in MEASURES.items():
        of_seeds = [[row for row in rows if row.seed == seed] for seed in seeds]
        found[name] = {
            "one_seed": mean_of_known(_with_truth(of_seed, measure, truths) for of_seed in of_seeds),
            "one_seed_better_half": mean_of_known(_with_truth(of_seed, measure, better) for of_seed in of_seeds),
            f"{len(seeds)}_seeds": _with_truth(rows, measure, truths),
        }
    return found


def _with_truth(
    rows: Sequence[TrialRow], measure: Callable[[TrialRow], float], truths: dict[str, float]
) -> float | None:
    of_schemes = {name: mean(map(measure, of)) for name, of in by_scheme(rows).items() if name in truths}
    return rank_correlation(list(of_schemes.values()), [truths[name] for name in of_schemes])


def spread(rows: Sequence[TrialRow]) -> dict[str, Any]:
    """How far schemes lie apart after the longest training, beside what two seeds differ by, in fractions.

    The standard deviation between schemes is that of their true accuracies: what the seeds leave in the means is taken
    off (one-way analysis of variance, random effects).
    """
    of_schemes = by_scheme(rows)
    accuracies = [[row.test_top1 for row in of_scheme] for of_scheme in of_schemes.values()]
    seeds = min(map(len, accuracies))
    within = mean(statistics.variance(values) for values in accuracies) if seeds > 1 else 0.0
    means = [mean(values) for values in accuracies]
    between = max(0.0, (statistics.variance(means) if len(means) > 1 else 0.0) - within / seeds)
    kinds: dict[str, list[float]] = {}
    for name, value in zip(of_schemes, means, strict=True):
        kinds.setdefault(kind_of(name), []).append(value)
    return {
        "between_schemes": between**0.5,
        "between_seeds": within**0.5,
        "kinds": {
            kind: {"schemes": len(values), "mean": mean(values), "best": max(values), "worst": min(values)}
            for kind, values in kinds.items()
        },
    }


def chosen_by(rows: Sequence[TrialRow], truths: dict[str, float]) -> dict[str, Any]:
    """What choosing the best of some random schemes by a short training of one seed gains over taking any of them.

    Of ``CANDIDATES`` of the schemes that are drawn at random, or half of them, over many draws: the mean truth of what
    each measure chooses less the mean truth of all.
    """
    of_seed = {(row.scheme, row.seed): row for row in rows if kind_of(row.scheme).startswith("random")}
    seeds = sorted({seed for _, seed in of_seed})
    complete = [name for name in truths if seeds and all((name, seed) in of_seed for seed in seeds)]
    if len(complete) < 2:
        return {}
    truth = np.array([truths[name] for name in complete])
    found: dict[str, Any] = {"candidates": candidates_of(len(complete))}
    for name, measure in MEASURES.items():
        values = [np.array([measure(of_seed[scheme, seed]) for scheme in complete]) for seed in seeds]
        found[name] = mean(gain(of_one, truth) for of_one in values)
    return found


def ceiling(rows: Sequence[TrialRow]) -> float | None:
    """What choosing by the test accuracy of the longest trainings themselves gains, in fractions; None of one seed.

    The best of measured means has luck in it: so it is chosen by all seeds but one, and the gain is that of the other.

    Args:
        rows: Of the longest training.
    """
    of_schemes = [of for name, of in by_scheme(rows).items() if kind_of(name).startswith("random")]
    seeds = min((len(of_scheme) for of_scheme in of_schemes), default=0)
    if len(of_schemes) < 2 or seeds < 2:
        return None
    test = np.array([[row.test_top1 for row in of_scheme[:seeds]] for of_scheme in of_schemes])
    return mean(gain(np.delete(test, seed, axis=1).mean(1), test[:, seed]) for seed in range(seeds))


def gain(values: np.ndarray, truth: np.ndarray) -> float:
    """The mean truth of the scheme of the highest value among some that are drawn, less the mean truth of all."""
    rng, count = np.random.default_rng(0), candidates_of(len(values))
    draws = np.array([rng.choice(len(values), count, replace=False) for _ in range(DRAWS)])
    return float(truth[draws[np.arange(DRAWS), values[draws].argmax(1)]].mean() - truth.mean())


def candidates_of(schemes: int) -> int:
    """How many of so many schemes are drawn to choose from."""
    return min(CANDIDATES, max(2, schemes // 2))


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None of none."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def mean(values: Iterable[float]) -> float:
    """The mean, as a plain number."""
    return float(statistics.fmean(values))
