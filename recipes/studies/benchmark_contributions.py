"""Measures what makes the contribution analysis fast: kept features, and candidates that train side by side.

    uv run recipes/studies/benchmark_contributions.py --data cifar10 --data_dir data --weights KERAS_FILE.h5 \\
        --base_depth 12

The same few trials in four ways, which take turns: with the trunk's output kept or computed in every pass, one by one
or side by side. All give the same accuracies. Processor time, since that is what the analysis costs on any number of
cores.
"""

import json as json_format
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from microtune.modules.sparse_update.simple_schemes import is_expanding
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.options import TrialSettings, check_data_is_named
from microtune.recipes.search.trials import described_by, trials
from microtune.recipes.training.command_line import check_at_least_one, run_recipe

WAYS = {
    "kept, one by one": ("memory", False),
    "kept, side by side": ("memory", True),
    "not kept, one by one": ("none", False),
    "not kept, side by side": ("none", True),
}


def main(rounds: int = 3, json: bool = False, settings: TrialSettings = TrialSettings()) -> dict[str, Any]:
    """Measures what makes the contribution analysis fast: kept features, and candidates that train side by side.

    Args:
        rounds: Number of measurements of each way.
        json: Whether to print one JSON object and nothing else.
    """
    torch.set_num_threads(1)
    check_at_least_one(rounds=rounds)
    check_data_is_named(settings)
    described = described_by(settings)
    convolutions = described.operations.convolutions
    within = [layer for layer in convolutions[len(convolutions) - settings.base_depth :] if is_expanding(layer)]
    if not within:
        raise UserError(f"there is no expanding convolution within base depth {settings.base_depth}: give 3 or more")
    schemes = [
        UpdateScheme(described.name, settings.base_depth, {within[0].name: ratio}) for ratio in (0.125, 0.25, 0.5, 1.0)
    ]
    started = time.process_time()
    trials(replace(settings, features="memory"))
    keeping_seconds = time.process_time() - started
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    accuracies = {}
    for seed in track(range(rounds), "measuring", disable=json, transient=True):
        for way, (features, side_by_side) in WAYS.items():
            training = trials(replace(settings, features=features))
            started = time.process_time()
            groups = [schemes] if side_by_side else [[scheme] for scheme in schemes]
            top1 = [value for group in groups for value in training.accuracies(group, seed)]
            seconds[way].append((time.process_time() - started) / len(schemes))
            accuracies[seed, way] = top1
    same = all(accuracies[seed, way] == accuracies[seed, next(iter(WAYS))] for seed, way in accuracies)
    slowest = seconds["not kept, one by one"]
    report = {
        "base_depth": settings.base_depth,
        "keeping_seconds": keeping_seconds,
        "features_mib": trials(replace(settings, features="memory")).features.size_bytes / 2**20,
        "same_accuracies": same,
        "ways": {
            way: {
                "processor_seconds_per_trial": median(values),
                "speedup": median(whole / own for whole, own in zip(slowest, values, strict=True)),
            }
            for way, values in seconds.items()
        },
    }
    print(json_format.dumps(report, indent=2)) if json else print_table(report)
    return report


def print_table(report: dict[str, Any]) -> None:
    """Prints one row per way."""
    table = Table("trunk's features and candidates", "processor seconds per trial", "speed-up")
    for way, row in report["ways"].items():
        table.add_row(way, f"{row['processor_seconds_per_trial']:.2f}", f"{row['speedup']:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"keeping {report['features_mib']:.0f} MiB of features takes {report['keeping_seconds']:.1f} s once (with the "
        f"data and the network); accuracies are the same: {'yes' if report['same_accuracies'] else 'NO'}"
    )


if __name__ == "__main__":
    run_recipe(main)
