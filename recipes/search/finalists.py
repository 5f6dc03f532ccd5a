"""The last step of a search: the best few schemes trained for longer, and whether the proxy had ranked them rightly."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from microtune.modules.search.integer_program import Genome
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.user_error import UserError
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.trials import fitnesses
from microtune.recipes.search.workers import Workers


def train_finalists(
    problem: SearchProblem,
    proxies: dict[Genome, float],
    settings: TrialSettings,
    steps: int,
    seeds: int,
    workers: Workers,
) -> tuple[Genome, dict[str, Any]]:
    """Trains schemes for longer, with seeds that the search has not used, and picks the best by validation accuracy.

    Args:
        problem: Of the search.
        proxies: The finalists, with the fitness that made them such.
        settings: Of the search's trials.
        steps: Optimizer steps of these.
        seeds: How often each is trained.
        workers: Where they are trained.

    Returns:
        The winner, and for the report the finalists, the best first, with the rank correlation of proxy and truth.

    Raises:
        UserError: Every training was lost with its worker.
    """
    # other steps see other augmented copies: not the folder that the search's trials share
    longer = replace(settings, steps=steps, features_dir=settings.features_dir and f"{settings.features_dir}-finalists")
    by_seed = [fitnesses(workers, longer, problem, (1000 + seed,), list(proxies)) for seed in range(seeds)]
    finalists = []
    for genome, *trained in zip(proxies, *by_seed, strict=True):
        known = [value for value in trained if value is not None]
        if known:
            finalists.append(
                {
                    "genome": list(genome),
                    "proxy": proxies[genome],
                    "table_score": problem.score(genome),
                    "memory_bytes": problem.memory_bytes(genome),
                    "val_top1_mean": statistics.mean(known),
                    "val_top1_std": statistics.stdev(known) if len(known) > 1 else 0.0,
                }
            )
    if not finalists:
        raise UserError("every training of a finalist was lost with its worker: the warnings above say why")
    finalists.sort(key=lambda finalist: -finalist["val_top1_mean"])
    truths = [finalist["val_top1_mean"] for finalist in finalists]
    ranks = rank_correlation([finalist["proxy"] for finalist in finalists], truths)
    return tuple(finalists[0]["genome"]), {"finalists": finalists, "rank_correlation": ranks}


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None of fewer than three pairs, or where one side is all the same.

    Example::

        rank_correlation([1, 2, 3], [10, 20, 25])  # 1.0
    """
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    from scipy.stats import spearmanr  # a second, which a command line need not wait for

    value = float(spearmanr(first, second).statistic)
    return value if math.isfinite(value) else None
