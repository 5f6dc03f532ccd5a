"""Compares ways to train on equal terms, paired over seeds: update schemes, int8 training, choices of channels.

    uv run recipes/studies/compare_trainings.py --ways evolved=scheme.json,last_layers,biases,expanding,random \\
        --data cifar10 --data_dir data --weights KERAS_FILE.npz --budgets extra64 --epochs 2 --learning_rate 0.0125
    uv run recipes/studies/compare_trainings.py --ways_file recipes/studies/ways/methods.json \\
        --data_sets recipes/results/data_sets.json --budgets extra64,extra100,extra256,stm32f746 --rate_budget extra100

A way is where its update scheme comes from (a file, a rule that fills the budget, a search) and what differs in its
training; ``ways.py`` has all fields, ``ways/`` ready lists. All begin with the same weights, and with each seed from
the same classifier and the same batches, so that differences are paired. With ``--epochs`` a training is that of the
training recipes. The same command goes on where it was stopped, and may have more ways, budgets, data sets and seeds.
A training of 200 steps takes about five seconds on one core of an AMD EPYC.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from microtune.datamodules.data_sets import DataName
from microtune.datamodules.option_names import KeepName
from microtune.modules.atomic_files import write_json
from microtune.modules.int8.files import is_quantized_file
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.named_json import checked
from microtune.recipes.studies.paired_differences import compare_all, draw_comparisons, log_to_wandb, print_report
from microtune.recipes.studies.seeded_trainings import Case, train_until_none_diverges
from microtune.recipes.studies.study import Study, keep_results, missing_from, trainings_of, with_chosen_rates
from microtune.recipes.studies.study_folder import MAY_CHANGE, hashes_of, keep_definitions, opened_folder, watched
from microtune.recipes.studies.transfer_tasks import TransferTask, load_tasks
from microtune.recipes.studies.way_schemes import (
    budget_by_name,
    found_scheme,
    keep_scheme,
    schemes_without_search,
    search_once,
)
from microtune.recipes.studies.ways import SEARCHES, Numbers, load_ways
from microtune.recipes.training.command_line import check_at_least_one, flat, listed, run_recipe
from microtune.recipes.training.command_line import numbers as numbers_in
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.plan import check_ranges, source_of_weights
from microtune.recipes.training.run_folder import new_folder

log = logging.getLogger(__name__)

EPOCHS = 10
COPIES = 4  # of the augmentation, where steps are given
# a study may grow: what it has measured is known by what it does
MAY_GROW = MAY_CHANGE | {"ways", "ways_file", "only", "numbers", "budgets", "seeds"}


def main(
    ways: str | None = None,
    ways_file: Path | None = None,
    scheme: str | None = None,
    data: DataName | None = None,
    data_dir: Path | None = None,
    data_options: dict[str, Any] | None = None,
    weights: str = "none",
    network: str = "mobilenet_v2",
    resolution: int = 96,
    width: float | None = None,
    head_convolution: bool = False,
    data_sets: Path | None = None,
    only: str | None = None,
    numbers: str | None = None,
    budgets: str = "stm32f746",
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    learning_rate: float | None = None,
    learning_rates: str | None = None,
    rate_budget: str | None = None,
    warmup_fraction: float = 0.1,
    seeds: int = 3,
    base_depth: int = 36,
    contributions: Path | None = None,
    copies: int | None = None,
    features: KeepName = "disk",
    features_limit_mib: float = 4096,
    processes: int = 1,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
) -> dict[str, Any]:
    """Compares ways to train on equal terms, paired over seeds.

    Args:
        ways: Ways to train, the others compared with the first, such as
            evolved=scheme.json,biases,q=expanding:ratio=0.25; schemes are a JSON file, last_layers, biases, expanding,
            random, classifier, full, gradient or accuracy (searched for by it); names of ways in ways_file stand for
            these. By default all of ways_file.
        ways_file: List of ways in JSON, such as recipes/studies/ways/methods.json.
        scheme: Scheme of the ways that do not say theirs, such as those of recipes/studies/ways/int8.json.
        data: Name of the data set.
        data_dir: Folder of the data.
        data_options: Further arguments of the data module.
        weights: Network in floating point: none, torchvision, or a .pth, .ckpt, .h5 or .npz file.
        network: The .safetensors file of the same network in int8.
        resolution: Height and width of images, in pixels; speech has the shape of its spectrograms.
        width: Multiplier of the channels of the network in floating point; by default that of the weights.
        head_convolution: Whether the network in floating point has its last 1x1 convolution.
        data_sets: List of data sets with their networks, such as recipes/results/data_sets.json, in place of one.
        only: Names of those that are wanted, separated by commas.
        numbers: Numbers that ways compute in which do not say theirs: fp32, int8 or both; by default all there are
            networks for.
        budgets: KiB of extra memory (extra64) or of peak memory (peak200), microcontrollers, or none, which takes
            schemes as they are; separated by commas.
        epochs: Passes over the training split; 10 without steps.
        steps: Optimizer steps of batch_size samples, in place of epochs; augmentations then recur after 4 passes.
        batch_size: Samples per step.
        learning_rate: Learning rate at its highest; by default 0.1 / 256 x batch_size (Lin et al.), and of a list of
            data sets the best of those that it has, for each way.
        learning_rates: Rates to choose from for each way, by validation accuracy with a seed that is not reported.
        rate_budget: Budget that rates are chosen at, for all budgets; by default each has its own.
        warmup_fraction: Part of all steps in which the learning rate rises; then it falls to zero as a cosine.
        seeds: Trainings of each way.
        base_depth: Deepest bias depth of searches; features are kept behind it.
        contributions: Table whose layers, ratios and bias depths random schemes are drawn from; by default all
            expanding convolutions and all bias depths.
        copies: Augmentations of every training sample; by default one for each epoch, or 4 with steps.
        features: Place where the output of the frozen layers is kept: memory, disk or none.
        features_limit_mib: Largest size in MiB of what is kept, in each process.
        processes: Trainings that run at once, one thread each.
        logger: wandb (offline unless you are logged in), csv or none.
        out_dir: Folder of the study; by default a new one below runs/. Where the same was begun, it goes on.
    """
    started, arguments = time.monotonic(), flat(locals())
    torch.set_num_threads(1)
    refuse_contradictions(arguments)
    if epochs is None and steps is None:
        epochs = EPOCHS
    if data_sets is None:
        default_rate = 0.1 / 256 * batch_size if learning_rate is None else learning_rate
        tasks = one_task(
            data, weights, network, data_dir=None if data_dir is None else str(data_dir),
            data_options=data_options or {}, resolution=resolution, width=width, head_convolution=head_convolution,
            learning_rates=[default_rate] if learning_rates is None else numbers_in(learning_rates, float),
        )  # fmt: skip
        learning_rate = default_rate if learning_rates is None else None
    else:
        tasks = load_tasks(data_sets, listed(only))
    study = Study(
        tasks=tasks,
        ways=load_ways(ways, ways_file, scheme),
        numbers=numbers_asked_for(numbers, tasks),
        budgets=listed(budgets),
        seeds=seeds,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        rate_budget=rate_budget,
        warmup_fraction=warmup_fraction,
        base_depth=base_depth,
        contributions=contributions,
        copies=copies or epochs or COPIES,
        features=features,
        features_limit_mib=features_limit_mib,
        out_dir=out_dir or new_folder(Path("runs") / "compare_trainings"),
    )
    check(study)
    schemes = schemes_of(study)
    hashes = hashes_of({network.source for network in study.networks.values()} - {"none", "torchvision"})
    with opened_folder(study.out_dir, arguments, MAY_GROW), Workers(processes) as workers:
        keep_beginnings(study, hashes)
        searched, search_seconds = searched_schemes(study, workers)
        keep_schemes(study, schemes | searched)
        planned = trainings_of(study, schemes | searched, search_seconds)
        rated = with_chosen_rates(study, planned, workers)
        trainings = train_until_none_diverges(rated, workers, study.out_dir, partial(keep_results, study))
        rows, missing = keep_results(study, trainings), missing_from(study, trainings)
        if not rows:
            raise UserError(missing[0])
        report = {"comparisons": compare_all(rows, study.ways_and_numbers()), "missing": missing}
        report["seconds"] = time.monotonic() - started
        write_json(study.out_dir / "report.json", report)
        draw_comparisons(report["comparisons"], study.out_dir / "comparison.png")
        log_to_wandb(logger, rows, report, study.out_dir, arguments)
    print_report(report, study.out_dir)
    return report


def refuse_contradictions(arguments: dict[str, Any]) -> None:
    """Raises ``UserError`` where an argument is out of its range, or makes no sense beside another."""
    counts = ("batch_size", "seeds", "processes", "base_depth", "steps", "copies")
    check_at_least_one(**{name: arguments[name] for name in counts})
    check_ranges(arguments)
    if arguments["data"] is None and arguments["data_sets"] is None:
        raise UserError("there is no data: give --data, or a list of data sets with --data_sets")
    for name, other in (
        ("epochs", "steps"), ("learning_rate", "learning_rates"), ("data_sets", "data"), ("data", "only"),
        ("data_sets", "learning_rates"),
    ):  # fmt: skip
        if arguments[name] is not None and arguments[other] is not None:
            raise UserError(f"{name} is {arguments[name]} beside {other} {arguments[other]}: leave one of them out")


def one_task(data: DataName, weights: str, network: str, **further: Any) -> dict[str, TransferTask]:
    """The data set of the command line; the others are fields of ``TransferTask``."""
    int8_network = network if is_quantized_file(network) else None
    source_of_weights("mobilenet_v2" if int8_network else network, weights)
    return {
        data: checked(data, {"data": data, "weights": weights, "int8_network": int8_network} | further, TransferTask)
    }


def numbers_asked_for(text: str | None, tasks: dict[str, TransferTask]) -> list[Numbers]:
    """What the command line asks for; by default all that every data set has a network for."""
    known = get_args(Numbers)
    if text is None:
        return [one for one in known if all(one in task.numbers for task in tasks.values())]
    if unknown := [one for one in listed(text) if one not in known]:
        raise UserError(f"numbers has {unknown[0]!r}: give some of {', '.join(known)}")
    return listed(text)


def check(study: Study) -> None:
    """Raises ``UserError`` where something is missing or makes no sense; nothing is written."""
    for budget in study.budgets:
        budget_by_name(budget)
    if study.rate_budget is not None and study.rate_budget not in study.budgets:
        raise UserError(f"rate_budget is {study.rate_budget}: give one of --budgets, {', '.join(study.budgets)}")
    cases = list(study.cases())
    if not cases:
        raise UserError("there is nothing to compare: give --budgets and --numbers that some of the ways have")
    for case in cases:
        way, samples = study.ways[case.way], study.networks[case.data, case.numbers].val_samples
        study.tasks[case.data].trial_settings(way.search_numbers or case.numbers)
        if way.scheme in SEARCHES and case.budget == "none":
            raise UserError(f"way {case.way} searches within a budget: give one with --budgets, such as extra64")
        if not samples and (study.chooses_rate(way) or way.scheme in SEARCHES):
            raise UserError(
                f"{case.data} has no validation split, by which schemes and learning rates are chosen: leave "
                "validation_fraction 0 out, or give --learning_rate and no search"
            )
    if any(one.source == "none" for one in study.networks.values()):
        log.warning("schemes update little of a network that has learnt nothing: give --weights")


def schemes_of(study: Study) -> dict[Case, Sequence[UpdateScheme]]:
    """The scheme for each seed of the cases that need no search; raises ``UserError`` if one does not fit."""
    return {
        case: schemes
        for cases, ways in study.cases_of_one_scheme()
        if ways.source.scheme not in SEARCHES
        for schemes in [schemes_without_search(ways, study.contributions, study.seeds)]
        for case in cases
    }


def searched_schemes(study: Study, workers: Workers) -> tuple[dict[Case, Sequence[UpdateScheme]], dict[Case, float]]:
    """The schemes of the other cases, and the seconds to find them; without those whose search failed."""
    shared = [(cases, ways) for cases, ways in study.cases_of_one_scheme() if ways.source.scheme in SEARCHES]
    searches = {search.folder: search for search in (study.search_of(cases[0]) for cases, _ in shared)}
    waiting = [search for search in searches.values() if not search.report_file.exists()]
    with watched([search.report_file for search in searches.values()], "searches"):
        failures = workers.map(search_once, waiting)
    for failure in filter(None, failures):
        log.warning(failure)
    schemes, seconds = {}, {}
    for cases, ways in shared:
        search = study.search_of(cases[0])
        if search.report_file.exists():
            scheme = found_scheme(ways, search.folder / "scheme.json")
            taken = json.loads(search.report_file.read_text(encoding="utf-8"))["seconds"]
            schemes |= dict.fromkeys(cases, [scheme] * study.seeds)
            seconds |= dict.fromkeys(cases, taken)
    return schemes, seconds


def keep_beginnings(study: Study, hashes: dict[str, str]) -> None:
    """Writes what the study began with, or refuses to go on with something else under the same names."""
    keep_definitions(study.out_dir, "ways", {name: asdict(way) for name, way in study.ways.items()})
    tasks = {name: asdict(task) | {"data_dir": None} for name, task in study.tasks.items()}
    keep_definitions(study.out_dir, "data_sets", tasks)
    keep_definitions(study.out_dir, "networks", hashes)


def keep_schemes(study: Study, schemes: dict[Case, Sequence[UpdateScheme]]) -> None:
    """Writes the schemes into the folder of the study, or raises ``UserError`` where another lies there."""
    for case, of_seeds in schemes.items():
        # of int8 the name says so: those of floating point are drawn
        name = "-".join([case.data, case.budget, case.way, *(["int8"] if case.numbers == "int8" else [])])
        is_random = study.ways[case.way].scheme == "random"
        keep_scheme(study.out_dir / "schemes" / f"{name}.json", of_seeds, is_random)


if __name__ == "__main__":
    run_recipe(main)
