"""How well do short trainings rank update schemes? What a search by accuracy can tell apart, and what it could gain.

    uv run recipes/studies/benchmark_trials.py --data_sets recipes/results/data_sets.json --only cifar10 \\
        --budget extra64 --processes 2 --out_dir runs/trials

Trains schemes of many kinds within a budget (from one backward pass, by rules, at random) for two numbers of steps at
each learning rate, and for longer at the rate that was then best for each scheme. Of all this it tells the rank
correlations between seeds and between lengths, how far schemes lie apart beside what the seed does, and what a search
gains that chooses by so short a training. The same command goes on where it was stopped. 40 schemes of one data set
take some 300,000 steps: two core hours on an AMD EPYC for images of 96 px.
"""

import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from microtune.modules.atomic_files import write_json
from microtune.modules.csv_rows import read_rows, write_rows
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.gradient_search import measure_gradient
from microtune.recipes.search.plan import CHOICE_SAMPLES
from microtune.recipes.search.trials import described_by
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.sampled_schemes import kind_of, sampled_schemes
from microtune.recipes.studies.seeded_trainings import Case, Training, train_all
from microtune.recipes.studies.study_folder import opened_folder
from microtune.recipes.studies.transfer_tasks import TransferTask, load_tasks
from microtune.recipes.studies.trial_figures import (
    MEASURES,
    TrialRow,
    best_rates,
    by_scheme,
    figures_of,
    mean,
    rows_like,
    truth_of,
)
from microtune.recipes.studies.way_schemes import SEARCH_SEED, budget_by_name, extra_bytes
from microtune.recipes.studies.ways import Way
from microtune.recipes.training.command_line import check_at_least_one, flat, listed, numbers, run_recipe
from microtune.recipes.training.networks import DescribedNetwork
from microtune.recipes.training.pictures import drawn
from microtune.recipes.training.run_folder import new_folder

log = logging.getLogger(__name__)

LONG_SEED = 100  # the first of the longest trainings: others than those of the short ones
COPIES = 4  # of the augmentation
AT_ALL_RATES = 2  # lengths, the shortest
SHOWN = {"val_top1": "top-1", "val_loss": "loss", "test_top1": "test"}  # measures, in a table
MAY_CHANGE = {"out_dir", "only", "processes", "data_sets"}  # where a study goes on


@dataclass(frozen=True)
class Terms:
    """How the schemes of one data set are trained.

    Args:
        name: Name of the data set in the list.
        task: The data set.
        budget: As rows of results name it.
        lengths: Numbers of steps, ascending.
        trial_seeds: Number of trainings of each scheme, length and rate, but of the longest.
        seeds: Number of the longest ones.
        base_depth: Deepest bias depth.
        out_dir: Folder of the study.
    """

    name: str
    task: TransferTask
    budget: str
    lengths: Sequence[int]
    trial_seeds: int
    seeds: int
    base_depth: int
    out_dir: Path

    def training(self, scheme: str, update: UpdateScheme, steps: int, rate: float, seed: int) -> Training:
        """One training."""
        settings = self.task.trial_settings(
            "fp32", base_depth=self.base_depth, steps=steps, copies=COPIES, features="disk",
            features_dir=str(self.out_dir / "features" / f"{self.name}-{steps}"),
        )  # fmt: skip
        case = Case(self.name, "fp32", self.budget, scheme)
        return Training(case, Way(), seed, settings, update.to_dict(), rate)


def main(
    data_sets: Path,
    only: str | None = None,
    budget: str = "extra64",
    steps: str = "60,180,540,1620",
    schemes: int = 40,
    trial_seeds: int = 2,
    seeds: int = 3,
    base_depth: int = 36,
    processes: int = 1,
    out_dir: Path | None = None,
) -> dict[str, Any]:
    """How well short trainings rank update schemes.

    Args:
        data_sets: List of data sets with their networks and learning rates, such as recipes/results/data_sets.json.
        only: Names of those that are wanted, separated by commas.
        budget: KiB of extra memory (extra64) or of peak memory (peak200), or a microcontroller.
        steps: Numbers of optimizer steps of 32 samples, separated by commas: the longest is the truth, and the shortest
            two are trained at every learning rate.
        schemes: Number of schemes.
        trial_seeds: Number of trainings of each scheme, length and learning rate, but of the longest.
        seeds: Number of the longest trainings of each scheme.
        base_depth: Deepest bias depth of the schemes.
        processes: Number of trainings that run at once, one thread each.
        out_dir: Folder of the study; by default a new one below runs/. Where the same was begun, it goes on.
    """
    started, arguments = time.monotonic(), flat(locals())
    torch.set_num_threads(1)
    check_at_least_one(schemes=schemes, trial_seeds=trial_seeds, seeds=seeds, base_depth=base_depth)
    check_at_least_one(processes=processes)
    lengths = sorted(set(numbers(steps, int)))
    if len(lengths) < 2 or lengths[0] < 1:
        raise UserError(f"steps is {steps}: give two numbers or more of 1 and up, such as 60,540")
    if budget_by_name(budget) is None:
        raise UserError("schemes are sampled within a budget: give one with --budget, such as extra64")
    tasks = load_tasks(data_sets, listed(only))
    out_dir = out_dir or new_folder(Path("runs") / "benchmark_trials")
    report: dict[str, Any] = {"budget": budget}
    studied = [
        sampled(Terms(name, task, budget, lengths, trial_seeds, seeds, base_depth, out_dir), schemes)
        for name, task in tasks.items()
    ]
    with opened_folder(out_dir, arguments, MAY_CHANGE), Workers(processes) as workers:
        for of_data in studied:
            name, rows = of_data.terms.name, trained_rows(of_data, workers)
            report[name] = figures_of(rows)
            print_figures(name, report[name])
            draw_ranks(name, rows, out_dir / f"{name}.png")
            write_json(out_dir / "report.json", report | {"seconds": time.monotonic() - started})
    print(f"trainings: {out_dir / 'trials.csv'}, report: {out_dir / 'report.json'}, a picture of each data set beside")
    return report


@dataclass(frozen=True)
class Sample:
    """The schemes of one data set, and how they are trained."""

    terms: Terms
    described: DescribedNetwork
    schemes: dict[str, UpdateScheme]


def sampled(terms: Terms, count: int) -> Sample:
    """Samples the schemes, from one backward pass; raises ``UserError`` where there are not so many."""
    settings = terms.task.trial_settings("fp32", base_depth=terms.base_depth)
    described, measured = described_by(settings), measure_gradient(settings, CHOICE_SAMPLES, SEARCH_SEED)
    budget = budget_by_name(terms.budget)
    return Sample(terms, described, sampled_schemes(described, measured, budget, terms.base_depth, count, SEARCH_SEED))


def trained_rows(sample: Sample, workers: Workers) -> list[TrialRow]:
    """Does all trainings of a data set, the short ones first, and keeps their rows as they come."""
    terms, schemes = sample.terms, sample.schemes
    for name, scheme in schemes.items():
        scheme.save(terms.out_dir / "schemes" / f"{terms.name}-{terms.budget}" / f"{name}.json")
    *short, longest = terms.lengths
    done: list[Training] = []

    def train(steps: int, trainings: Iterable[Training]) -> None:
        done.extend(trainings)
        train_all(done, workers, terms.out_dir, f"{terms.name}, {steps} steps", partial(keep, sample, done))

    for steps in short[:AT_ALL_RATES]:
        of_rates = itertools.product(range(terms.trial_seeds), schemes.items(), sorted(terms.task.learning_rates))
        train(steps, (terms.training(name, scheme, steps, rate, seed) for seed, (name, scheme), rate in of_rates))
    best = best_rates([row for row in rows_of(sample, done) if row.steps == short[:AT_ALL_RATES][-1]])
    longer = [(steps, range(terms.trial_seeds)) for steps in short[AT_ALL_RATES:]]
    for steps, seeds in [*longer, (longest, range(LONG_SEED, LONG_SEED + terms.seeds))]:
        of_seeds = itertools.product(seeds, schemes.items())
        train(steps, (terms.training(name, scheme, steps, best[name], seed) for seed, (name, scheme) in of_seeds))
    return keep(sample, done)


def rows_of(sample: Sample, trainings: Iterable[Training]) -> list[TrialRow]:
    """The rows of the trainings that are done."""
    terms, rows = sample.terms, []
    for training in trainings:
        found = training.result(terms.out_dir)
        if found is None:
            continue
        scheme = UpdateScheme.from_dict(training.scheme)
        channels = sum(scheme.updated_channels(one) for one in sample.described.operations.convolutions)
        row = TrialRow(
            terms.name, terms.budget, training.case.way, training.settings.steps, training.learning_rate,
            training.seed, found["top1"]["val"], found["top1"]["test"], found["cross_entropy"]["val"],
            extra_bytes(sample.described, scheme), scheme.bias_depth, len(scheme.weights), channels,
        )  # fmt: skip
        rows.append(row)
    return rows


def keep(sample: Sample, trainings: Iterable[Training]) -> list[TrialRow]:
    """Writes the rows into ``trials.csv``, beside those of other data sets; returns them."""
    path = sample.terms.out_dir / "trials.csv"
    others = [row for row in read_rows(path, TrialRow) if row.data != sample.terms.name] if path.exists() else []
    rows = rows_of(sample, trainings)
    write_rows(path, [*others, *rows], TrialRow)
    return rows


def print_figures(data: str, figures: dict[str, Any]) -> None:
    """Prints a table for people.

    Its columns are rank correlations of each measure: between seeds, with the longest training, and with that among the
    better half of the schemes; and what choosing by it gains over a random scheme, in points.
    """
    table = Table(title=f"{data}: {figures['schemes']} schemes, rank correlation with {figures['longest_steps']} steps")
    columns = (
        "steps",
        "rate",
        *(f"{SHOWN[measure]}: {what}" for measure in MEASURES for what in ("seeds", "long", "half", "gain")),
    )
    for column in columns:
        table.add_column(column, justify="right")
    of_retest = {(one["steps"], one["learning_rate"]): one for one in figures["retest"]}
    for one, chosen in zip(figures["with_longest"], figures["chosen"], strict=True):
        own = of_retest.get((one["steps"], one["learning_rate"]), {})
        rate = "best" if one["learning_rate"] is None else f"{one['learning_rate']:g}"
        cells = [str(one["steps"]), rate]
        for measure in MEASURES:
            cells += [shown(own.get(measure)), shown(one[measure]["one_seed"])]
            cells += [shown(one[measure]["one_seed_better_half"]), shown(chosen.get(measure), 100)]
        table.add_row(*cells)
    Console(width=160).print(table)
    spread = figures["spread"]
    print(
        f"after {figures['longest_steps']} steps schemes differ by {spread['between_schemes'] * 100:.2f} points "
        f"(standard deviation), seeds by {spread['between_seeds'] * 100:.2f}; choosing among random ones by such "
        f"trainings gains {shown(figures['ceiling'], 100)} points"
    )
    for kind, of_kind in spread["kinds"].items():
        print(
            f"  {kind} ({of_kind['schemes']}): mean {of_kind['mean'] * 100:.1f} %, "
            f"{of_kind['worst'] * 100:.1f} to {of_kind['best'] * 100:.1f}"
        )


def draw_ranks(data: str, rows: Sequence[TrialRow], path: Path) -> None:
    """Draws the validation accuracy after each short training over the test accuracy after the longest, as a PNG."""
    *short, longest = sorted({row.steps for row in rows})
    truths = truth_of(rows, longest)
    with drawn(path, 1, len(short), figsize=(4 * len(short) + 1.5, 4), squeeze=False) as panels:
        for axes, steps in zip(panels[0], short, strict=True):
            of_schemes = by_scheme(rows_like(rows, steps, None))
            for kind in dict.fromkeys(map(kind_of, of_schemes)):
                names = [name for name in of_schemes if kind_of(name) == kind]
                accuracies = [mean(row.val_top1 for row in of_schemes[name]) * 100 for name in names]
                axes.plot(accuracies, [truths[name] * 100 for name in names], ".", markersize=9, label=kind)
            axes.set(xlabel=f"validation, {steps} steps, %")
        panels[0][0].set_ylabel(f"test, {longest} steps, %")
        panels[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
        panels[0][0].figure.suptitle(f"{data}: schemes at each one's best learning rate, means over seeds", fontsize=10)


def shown(value: float | None, factor: float = 1) -> str:
    """A figure of the table; a dash where there is none."""
    return "-" if value is None else f"{value * factor:.2f}"


if __name__ == "__main__":
    run_recipe(main)
