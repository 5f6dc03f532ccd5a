"""Trains under schemes by every method, on every data set, at every budget: what the README's results are made from.

    uv run recipes/studies/measure_results.py --data_sets recipes/results/data_sets.json --out_dir runs/results \\
        --processes 2
    uv run recipes/studies/make_results.py --results runs/results/results.csv --out_dir runs/results

Methods: full update, as many of the last layers or of the biases as fit, schemes that a genetic algorithm evolved by
trained accuracy (of whole layers, or of channels), the scheme of one backward pass, and the evolved one with channels
chosen anew while it trains. All get the same steps, and the test split is used once, after training. The learning rate
of each method on each data set is the best of a few by validation accuracy, within 100 KiB and with a seed that is not
reported; where a training at another budget diverges with it, that budget gets half of it. The same command goes on
where it was stopped. Four data sets take about two hours on two cores of an AMD EPYC.
"""

import functools
import itertools
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import wandb

from microtune.modules.csv_rows import write_rows
from microtune.modules.memory.microcontrollers import microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes
from microtune.modules.search.short_training import Choice
from microtune.modules.sparse_update.simple_schemes import full_update
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes import evolve_update_scheme
from microtune.recipes.search.budget import Budget, budget_of
from microtune.recipes.search.trials import described_by
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.compare_schemes import Judge, ruled
from microtune.recipes.studies.data_set_list import DataSet, Numbers, keep_sources, load_data_sets
from microtune.recipes.studies.paired_trainings import MAY_CHANGE, opened_folder, quiet
from microtune.recipes.studies.result_rows import BUDGETS, METHODS, NUMBERS, Result, load_rows
from microtune.recipes.studies.trial_grid import NOT_IN_KEY, Cell, best_rates, result, train_until_none_diverges
from microtune.recipes.studies.watched_files import watched
from microtune.recipes.training.command_line import called_with, check_at_least_one, flat, listed, run_recipe
from microtune.recipes.training.loggers import make_loggers, wandb_run
from microtune.recipes.training.memory_figures import fit_of, scheme_fits
from microtune.recipes.training.networks import DescribedNetwork
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.run_folder import new_folder, read_config

log = logging.getLogger(__name__)

SEARCHED = ("layers", "sub_tensor")  # by trained accuracy, in floating point; int8 takes the same schemes
ONE_PASS = {"one_pass": 1, "one_pass_4": 4}  # and what numbers of channels are multiples of
RECHOSEN_BY = "loss_decrease"  # the dynamic choice
SEED = 1000  # of the trainings that choose schemes and learning rates: not among those that are reported
EXTRA = "extra"
# the results may grow: every training is known by what it does
MAY_GROW = MAY_CHANGE | {"only", "numbers", "methods", "budgets", "seeds"}


@dataclass(frozen=True)
class Plan:
    """What is compared, from the command line.

    Args:
        data_sets: By name.
        numbers: fp32, int8 or both.
        methods, budgets: As in ``result_rows``.
        steps, batch_size: Of every training.
        seeds: How many trainings.
        evaluations: Of every search by accuracy.
        base_depth: How deep searches look, and behind which layer features are kept.
        rechoose_every, choice_samples: Of the dynamic choice.
        out_dir: Folder of everything.
    """

    data_sets: dict[str, DataSet]
    numbers: Sequence[Numbers]
    methods: Sequence[str]
    budgets: Sequence[str]
    steps: int
    batch_size: int
    seeds: int
    evaluations: int
    base_depth: int
    rechoose_every: int
    choice_samples: int
    out_dir: Path

    def settings(self, data: str, numbers: Numbers, depth: int | None = None):
        """Settings of trials; of schemes deeper than the base depth with the whole network in training."""
        base_depth = max(self.base_depth, depth or 0)
        folder = self.out_dir / "features" / f"{data}-{numbers}-{base_depth}"
        return self.data_sets[data].trial_settings(
            numbers, base_depth, self.steps, self.batch_size, features="disk", features_dir=str(folder)
        )

    @functools.cache  # noqa: B019, there is one plan
    def described(self, data: str, numbers: Numbers) -> DescribedNetwork:
        """The network that meets the data."""
        return described_by(self.settings(data, numbers))

    def __hash__(self):
        return id(self)


def main(
    data_sets: Path,
    only: str | None = None,
    numbers: str = ",".join(NUMBERS),
    methods: str = ",".join(METHODS),
    budgets: str = ",".join(BUDGETS),
    steps: int = 200,
    batch_size: int = 32,
    seeds: int = 3,
    evaluations: int = 32,
    base_depth: int = 36,
    rechoose_every: int = 50,
    choice_samples: int = 256,
    processes: int = 1,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
) -> list[Result]:
    """Trains under schemes by every method, on every data set, at every budget.

    Args:
        data_sets: List of data sets, such as recipes/results/data_sets.json.
        only: Which of them, separated by commas.
        numbers: What the network computes in: fp32, int8.
        methods: full, last_layers, biases, layers, sub_tensor, one_pass, one_pass_4, dynamic.
        budgets: extra64, extra100, extra256 (KiB of extra memory), stm32f746 (its peak).
        steps: Optimizer steps of every training.
        batch_size: Samples of a step.
        seeds: Trainings of each.
        evaluations: Schemes that each search by accuracy trains, 100 steps each.
        base_depth: How deep schemes are searched.
        rechoose_every: Steps after which the dynamic choice moves.
        choice_samples: Training samples that it is made by.
        processes: Trainings that run at once, one thread each.
        logger: wandb (offline unless you are logged in), csv or none.
        out_dir: Folder of the results; by default a new one below runs/. Where the same were begun, it goes on.
    """
    arguments = flat(locals())
    torch.set_num_threads(1)
    check_at_least_one(
        steps=steps, batch_size=batch_size, seeds=seeds, evaluations=evaluations, base_depth=base_depth,
        rechoose_every=rechoose_every, choice_samples=choice_samples, processes=processes,
    )  # fmt: skip
    chosen = load_data_sets(data_sets, listed(only))
    out_dir = out_dir or new_folder(Path("runs") / "measure_results")
    plan = Plan(
        chosen, some_of(numbers, NUMBERS, "numbers"), some_of(methods, METHODS, "methods"),
        some_of(budgets, BUDGETS, "budgets"), steps, batch_size, seeds, evaluations, base_depth, rechoose_every,
        choice_samples, out_dir,
    )  # fmt: skip
    for data, number in itertools.product(plan.data_sets, plan.numbers):
        plan.settings(data, number)  # says what is missing before anything is written
    with opened_folder(out_dir, arguments, MAY_GROW), Workers(processes) as workers:
        keep_sources(chosen, out_dir)
        search_schemes(plan, workers)
        planned = [
            trained
            for data, number in itertools.product(plan.data_sets, plan.numbers)
            for trained in schemes_of(plan, data, number)
        ]
        cells = [cell for trained in planned for cell in cells_of(plan, trained)]
        # the rates are chosen where budgets are neither tight nor loose
        first = sorted(cells, key=lambda cell: cell.labels["budget"] != "extra100")
        group = ("data", "numbers", "method")
        rates: dict[tuple[Any, ...], float] = {}
        for data, data_set in plan.data_sets.items():
            of_data = [cell for cell in first if cell.labels["data"] == data]
            rates |= best_rates(of_data, data_set.learning_rates, SEED, group, workers, out_dir)
        cells = [
            replace(cell, learning_rate=rates[tuple(cell.labels[name] for name in group)])
            for cell in cells
            if tuple(cell.labels[name] for name in group) in rates
        ]
        cells = train_until_none_diverges(cells, (*group, "budget"), group[:2], workers, out_dir)
        rows = [row for cell in cells if (row := row_of(plan, cell)) is not None]
        kept = load_rows(out_dir / "results.csv", Result) if (out_dir / "results.csv").exists() else []
        of_key = {row.key: row for row in [*kept, *rows]}  # also those of other methods, measured before
        write_rows(out_dir / "results.csv", of_key.values(), Result)
        log_to_wandb(logger, out_dir, arguments)
    print(f"{len(rows)} of {len(cells)} trainings: {out_dir / 'results.csv'}; make_results.py makes tables of them")
    return rows


def some_of(text: str, known: Sequence[str], what: str) -> list[str]:
    """The parts of a list that commas separate, in the order in which they are known."""
    given = listed(text)
    if unknown := [one for one in given if one not in known]:
        raise UserError(f"{what} has {unknown[0]!r}: give some of {', '.join(known)}")
    if not given:
        raise UserError(f"{what} is empty: give some of {', '.join(known)}")
    return [one for one in known if one in given]


def budget_arguments(name: str) -> dict[str, Any]:
    """A budget of ``result_rows`` as the command line has it.

    Example::

        budget_arguments("extra64")  # {"memory": "extra", "budget_kib": 64.0}
    """
    if name.startswith(EXTRA):
        return {"memory": EXTRA, "budget_kib": float(name.removeprefix(EXTRA))}
    return {"memory": "peak", "mcu": name}


def budget_by_name(name: str) -> Budget:
    """A budget of ``result_rows``."""
    given = {"budget_kib": None, "mcu": None, **budget_arguments(name)}
    return budget_of(**given, sram_bytes=None, flash_bytes=None, reserve_bytes=None)


def search_schemes(plan: Plan, workers: Workers) -> None:
    """Runs the searches that are not done yet, each in a folder of its own."""
    tasks: list[tuple[dict[str, Any], str]] = []
    for data in plan.data_sets:
        for numbers, method in searches(plan):
            for budget in plan.budgets:
                folder = search_folder(plan, data, numbers, budget, method)
                tasks.append((search_arguments(plan, data, numbers, budget, method), str(folder)))
    waiting = [task for task in tasks if not (Path(task[1]) / "report.json").exists()]
    for arguments, folder in tasks:
        refuse_another_search(arguments, Path(folder))
    with watched([Path(folder) / "report.json" for _, folder in tasks], "searches"):
        failures = workers.map(search, *zip(*waiting, strict=True)) if waiting else []
    for failure in filter(None, failures):
        log.warning(failure)


def searches(plan: Plan) -> list[tuple[Numbers, str]]:
    """What is searched on each data set at each budget."""
    evolved = [method for method in SEARCHED if method in plan.methods]
    if "dynamic" in plan.methods and "sub_tensor" not in evolved:
        evolved.append("sub_tensor")
    return [("fp32", method) for method in evolved] + [
        (numbers, method) for numbers in plan.numbers for method in ONE_PASS if method in plan.methods
    ]


def search_folder(plan: Plan, data: str, numbers: Numbers, budget: str, method: str) -> Path:
    """Where a search is, or was, at work."""
    return plan.out_dir / "searches" / f"{data}-{numbers}-{budget}-{method}"


def search_arguments(plan: Plan, data: str, numbers: Numbers, budget: str, method: str) -> dict[str, Any]:
    """The arguments of ``evolve_update_scheme.py``."""
    data_set, settings = plan.data_sets[data], plan.settings(data, numbers)
    arguments: dict[str, Any] = {
        "contributions": "gradient", "base_depth": plan.base_depth, "network": settings.network, "data": data_set.data,
        "data_dir": data_set.data_dir, "data_options": data_set.data_options, "weights": settings.weights,
        "resolution": data_set.resolution, "batch_size": plan.batch_size, "learning_rate": data_set.middle_rate,
        "seed": SEED, **budget_arguments(budget),
    }  # fmt: skip
    if method in ONE_PASS:
        multiple = {"channel_multiple": ONE_PASS[method]} if ONE_PASS[method] > 1 else {}
        return arguments | multiple | {"features": "none"}  # it looks at some hundred samples
    level = "layer" if method == "layers" else "sub_tensor"
    # other steps see other augmented copies: not the folder of the trainings
    kept = {"features": "disk", "features_dir": f"{settings.features_dir}-searches"}
    return arguments | kept | {"fitness": "accuracy", "level": level, "evaluations": plan.evaluations, "finalists": 0}


def search(arguments: dict[str, Any], folder: str) -> str | None:
    """Searches, or goes on with a search that was stopped: what a worker is asked for; says what went wrong."""
    torch.set_num_threads(1)
    if not (Path(folder) / "config.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)  # it had not begun
    try:
        with quiet():
            of_run = {"logger": "none", "out_dir": Path(folder), "resume": (Path(folder) / "config.yaml").exists()}
            called_with(evolve_update_scheme.main, arguments | of_run)
    except UserError as error:
        return f"{Path(folder).name}: {error}"
    return None


def refuse_another_search(arguments: dict[str, Any], folder: Path) -> None:
    """Raises ``UserError`` if the search in the folder is, or was, of something else."""
    config = folder / "config.yaml"
    begun = read_config(config) if config.exists() else {}
    for name, value in flat(arguments).items():
        if name not in NOT_IN_KEY and name in begun and begun[name] != value:
            raise UserError(
                f"the search in {folder} has {name} {begun[name]}, and the list of data sets now says {value}: remove "
                "that folder, or give another --out_dir"
            )


@dataclass(frozen=True)
class Trained:
    """What is trained by one method at one budget.

    Args:
        data, numbers, method, budget: As in ``result_rows``.
        scheme: What is updated.
        choice: Of the channels that it does not fix.
        search_seconds: It took to find the scheme.
    """

    data: str
    numbers: Numbers
    method: str
    budget: str
    scheme: UpdateScheme
    choice: Choice = Choice()  # noqa: RUF009, it is frozen
    search_seconds: float = 0.0


def schemes_of(plan: Plan, data: str, numbers: Numbers) -> list[Trained]:
    """What every method updates at every budget; a search that failed is left out."""
    described = plan.described(data, numbers)
    found = []
    if "full" in plan.methods:
        found.append(Trained(data, numbers, "full", "none", full_update(described.name, described.operations)))
    for budget in plan.budgets:
        judge = Judge(described, budget_by_name(budget))
        for method in ("last_layers", "biases"):
            if method in plan.methods:
                found.append(Trained(data, numbers, method, budget, ruled(method, judge)))
        for method in (*SEARCHED, *ONE_PASS, "dynamic"):
            if method in plan.methods:
                found += searched_scheme(plan, judge, data, numbers, budget, method)
    return found


def searched_scheme(plan: Plan, judge: Judge, data: str, numbers: Numbers, budget: str, method: str) -> list[Trained]:
    """The scheme of a search that is done, as a list of one; kept where ``make_results.py`` finds it."""
    source = "sub_tensor" if method == "dynamic" else method
    folder = search_folder(plan, data, numbers if method in ONE_PASS else "fp32", budget, source)
    if not (folder / "report.json").exists():
        return []
    scheme = judge.described.load_scheme(folder / "scheme.json")
    choice = Choice()
    if method == "dynamic":
        scheme = with_room_for_scores(replace(scheme, channels={}), judge)
        choice = Choice(RECHOSEN_BY, plan.rechoose_every, plan.choice_samples)
    judge.refuse_oversize(method, scheme)
    if numbers == "fp32":  # int8 has the same, or one that looks much alike
        scheme.save(plan.out_dir / "schemes" / f"{data}-{budget}-{method}.json")
    return [
        Trained(
            data, numbers, method, budget, scheme, choice, json.loads((folder / "report.json").read_text())["seconds"]
        )
    ]


def with_room_for_scores(scheme: UpdateScheme, judge: Judge) -> UpdateScheme:
    """The scheme, if need be with fewer channels, so that the scores of a dynamic choice fit a microcontroller too."""
    if judge.budget.microcontroller is None:  # extra memory leaves such things out
        return scheme
    convolutions = {convolution.name: convolution for convolution in judge.described.operations.convolutions}
    while scheme.weights and not scheme_fits(judge.peak_memory, scheme, judge.budget.microcontroller, RECHOSEN_BY):
        # a tenth of the layer that has the most channels in training
        updated = {name: scheme.updated_channels(convolutions[name]) for name in scheme.weights}
        largest = max(updated, key=lambda name: updated[name])
        count = updated[largest] * 9 // 10
        weights = {name: ratio for name, ratio in scheme.weights.items() if name != largest}
        if count:
            weights[largest] = count / convolutions[largest].in_channels
        scheme = replace(scheme, weights=weights)
    return scheme


def cells_of(plan: Plan, trained: Trained) -> list[Cell]:
    """A training for each seed; its learning rate is chosen later."""
    labels = {
        "data": trained.data, "numbers": trained.numbers, "method": trained.method, "budget": trained.budget,
        "search_seconds": trained.search_seconds,
    }  # fmt: skip
    settings = plan.settings(trained.data, trained.numbers, trained.scheme.bias_depth)
    rate = plan.data_sets[trained.data].middle_rate
    return [
        Cell(labels | {"seed": seed}, settings, trained.scheme.to_dict(), seed, rate, trained.choice)
        for seed in range(plan.seeds)
    ]


def row_of(plan: Plan, cell: Cell) -> Result | None:
    """What came out of a training that is done."""
    found = result(cell, plan.out_dir)
    if found is None:
        return None
    operations = plan.described(cell.labels["data"], cell.labels["numbers"]).operations
    scheme = UpdateScheme.from_dict(cell.scheme)
    rechosen_by = cell.choice.criterion if cell.choice.rechoose_every else None
    fit = fit_of(PeakMemory(operations), scheme, microcontroller("stm32f746"), rechosen_by)
    return Result(
        **cell.labels,
        top1=found["top1"]["test"],
        val_top1=found["top1"]["val"],
        extra_memory_bytes=extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme),
        peak_memory_bytes=fit.peak_bytes,
        bias_depth=scheme.bias_depth,
        updated_layers=len(scheme.weights),
        updated_channels=sum(scheme.updated_channels(convolution) for convolution in operations.convolutions),
        learning_rate=cell.learning_rate,
        steps=plan.steps,
        batch_size=plan.batch_size,
        train_seconds=round(found["seconds"], 1),
    )


def log_to_wandb(logger: LoggerName, out_dir: Path, arguments: dict[str, Any]) -> None:
    """Logs the CSV as an artifact of one run."""
    if logger != "wandb":
        return
    experiment = wandb_run(make_loggers(logger, out_dir, "measure_results"))
    if experiment is not None:
        experiment.config.update({"arguments": arguments}, allow_val_change=True)
        artifact = wandb.Artifact(f"results-{experiment.id}", type="results")
        artifact.add_file(str(out_dir / "results.csv"), policy="immutable", skip_cache=True)
        experiment.log_artifact(artifact)
        wandb.finish()


if __name__ == "__main__":
    run_recipe(main)
