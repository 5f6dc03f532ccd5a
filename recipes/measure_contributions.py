"""Measures how much accuracy each bias depth and each layer's update buys: the table that a search goes by.

    uv run recipes/measure_contributions.py --data cifar10 --data_dir data --weights KERAS_FILE.h5 \\
        --out_dir runs/contributions

Every row is a few short fine-tunings (Lin et al. 2022, section 2.2). What lies before the base depth is frozen in all
of them, so its output is computed once and kept. The same command goes on where it was stopped, and started twice with
the same --out_dir, two processes share the work. On two cores of an AMD EPYC, 255 trials of 120 steps on CIFAR-10
took six minutes.
"""

import logging
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from microtune.datamodules.progress import progress_bar
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.recipes.search.contribution_trials import (
    draw_contributions,
    measure,
    read_trials,
    updates_to_measure,
    write_trials,
)
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.plan import plan_measurement
from microtune.recipes.search.shared_folder import check_shared_folder, open_shared_folder
from microtune.recipes.search.trials import described_by, trials
from microtune.recipes.training.command_line import flat, run_recipe
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.run_folder import new_folder

log = logging.getLogger(__name__)

# what may differ between processes that share the work, or after a stop
MAY_CHANGE = {"out_dir", "logger", "side_by_side", "features", "features_limit_mib", "features_dir", "data_dir"}


def main(
    layers: str = "expanding",
    ratios: str = "0.125,0.25,0.5,1",
    bias_depths: str | None = None,
    seeds: int = 3,
    side_by_side: int = 4,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
    settings: TrialSettings = TrialSettings(),
) -> ContributionTable:
    """Measures how much accuracy each bias depth and each layer's update buys: the table that a search goes by.

    Args:
        layers: Layers whose weights are updated: expanding (1x1 convolutions with more outputs than inputs), all, or
            names separated by commas; of those within the base depth.
        ratios: Update ratios of the weights, separated by commas.
        bias_depths: Bias depths, separated by commas; by default all down to the base depth.
        seeds: Number of trials of each update, with other classifiers and orders of samples.
        side_by_side: Number of updates that train in one pass over the data; it pays where features are not kept.
        logger: Logger: wandb (offline unless you are logged in), or csv or none to do without.
        out_dir: Folder of the table; by default a new one below runs/. Where the same measurement was begun, it goes
            on, or helps the process that is at it.
    """
    started, arguments = time.monotonic(), flat(locals())
    torch.set_num_threads(1)
    plan = plan_measurement(layers, ratios, bias_depths, seeds, side_by_side, settings)
    out_dir = out_dir or new_folder(Path("runs") / "measure_contributions")
    check_shared_folder(out_dir, arguments, MAY_CHANGE)
    described = described_by(settings)
    updates = updates_to_measure(described, settings.base_depth, plan.layers, plan.ratios, plan.bias_depths)
    training = trials(replace(settings, features_dir=settings.features_dir or str(out_dir / "features")))
    open_shared_folder(out_dir, arguments, MAY_CHANGE)
    trained = 0
    total = len(updates) * seeds
    with progress_bar() as progress:
        bar = progress.add_task("trials", total=total)
        for _ in measure(updates, training, described.name, seeds, side_by_side, out_dir):
            trained, known = trained + 1, len(read_trials(out_dir))
            progress.update(bar, completed=known)
            if progress.disable and trained % (5 * side_by_side) == 0:
                left = (time.monotonic() - started) / trained * (total - known)
                log.info("%d of %d trials, %.0f s left at this pace", known, total, left)
    write_trials(out_dir, [], updates, seeds)  # a process may have been stopped between the two files
    table = ContributionTable.load(out_dir / "contributions.csv")
    draw_contributions(table, described.operations.convolutions, out_dir / "contributions.png")
    log_to_wandb(logger, table, out_dir, arguments)
    seconds = time.monotonic() - started
    print(f"{len(table.rows)} contributions from {total} trials, {trained} of them made here, in {seconds:.0f} s")
    print(f"table: {out_dir / 'contributions.csv'}, picture: {out_dir / 'contributions.png'}")
    print("next: recipes/evolve_update_scheme.py --contributions with that table")
    return table


def log_to_wandb(logger: LoggerName, table: ContributionTable, out_dir: Path, arguments: dict[str, Any]) -> None:
    """Logs the table and the picture as one run."""
    if logger != "wandb":
        return
    # two seconds and more, which a command line need not wait for
    import wandb

    from microtune.recipes.training.loggers import make_loggers, wandb_run

    experiment = wandb_run(make_loggers(logger, out_dir, "measure_contributions"))
    if experiment is not None:
        experiment.config.update({"arguments": arguments}, allow_val_change=True)
        columns = list(Contribution.__dataclass_fields__)
        rows = [list(astuple(row)) for row in table.rows]
        picture = wandb.Image(str(out_dir / "contributions.png"))
        experiment.log({"contributions": wandb.Table(columns, rows), "gains": picture})
        wandb.finish()


if __name__ == "__main__":
    run_recipe(main)
