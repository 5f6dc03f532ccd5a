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

from microtune.modules.atomic_files import write_json
from microtune.modules.int8.files import is_quantized_file
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.named_json import checked
from microtune.recipes.studies.options import TaskOptions, TermOptions, WayOptions, refuse_contradictions
from microtune.recipes.studies.paired_differences import compare_all, draw_comparisons, log_to_wandb, print_report
from microtune.recipes.studies.scheme_search import search_once
from microtune.recipes.studies.seeded_trainings import Case, train_until_none_diverges
from microtune.recipes.studies.study import Study, keep_results, missing_from, trainings_of, with_chosen_rates
from microtune.recipes.studies.study_folder import MAY_CHANGE, hashes_of, keep_definitions, opened_folder, watched
from microtune.recipes.studies.transfer_tasks import TransferTask, load_tasks
from microtune.recipes.studies.way_schemes import found_scheme, keep_scheme, schemes_without_search
from microtune.recipes.studies.ways import RULES, SEARCHES, WHOLE, Numbers, Way, load_ways
from microtune.recipes.training.command_line import flat, listed, run_recipe
from microtune.recipes.training.command_line import numbers as numbers_in
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.plan import source_of_weights
from microtune.recipes.training.run_folder import new_folder

log = logging.getLogger(__name__)

# a study may grow: what it has measured is known by what it does
MAY_GROW = MAY_CHANGE | {"ways", "ways_file", "only", "numbers", "budgets", "seeds"}


def main(
    tried: WayOptions = WayOptions(),
    task: TaskOptions = TaskOptions(),
    terms: TermOptions = TermOptions(),
    processes: int = 1,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
) -> dict[str, Any]:
    """Compares ways to train on equal terms, paired over seeds.

    Args:
        processes: Number of trainings that run at once, one thread each.
        logger: Logger: wandb (offline unless you are logged in), csv or none.
        out_dir: Folder of the study; by default a new one below runs/. Where the same was begun, it goes on.
    """
    started, arguments = time.monotonic(), flat(locals())
    torch.set_num_threads(1)
    refuse_contradictions(tried, task, terms, processes)
    terms = terms.filled_in(has_task_rates=task.data_sets is not None)
    ways = load_ways(tried.ways, tried.ways_file, tried.scheme)
    check_files(ways, tried.contributions)
    tasks = one_task(task, terms) if task.data_sets is None else load_tasks(task.data_sets, listed(task.only))
    study = Study(
        tasks, ways, numbers_asked_for(task.numbers, tasks), listed(tried.budgets), tried.base_depth,
        tried.contributions, terms, out_dir or new_folder(Path("runs") / "compare_trainings"),
    )  # fmt: skip
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


def check_files(ways: dict[str, Way], contributions: Path | None) -> None:
    """Raises ``UserError`` where a file that was named cannot be read, before the data is."""
    for way in ways.values():
        if way.scheme not in (*RULES, *WHOLE, *SEARCHES):
            UpdateScheme.load(way.scheme)
    if contributions is not None:
        ContributionTable.load(contributions)


def one_task(task: TaskOptions, terms: TermOptions) -> dict[str, TransferTask]:
    """The data set of the command line."""
    int8_network = task.network if is_quantized_file(task.network) else None
    source_of_weights("mobilenet_v2" if int8_network else task.network, task.weights)
    given = {name: getattr(task, name) for name in ("data", "data_dir", "weights", "resolution", "width")}
    given |= {"data_options": task.data_options or {}, "head_convolution": task.head_convolution}
    rates = [terms.learning_rate] if terms.learning_rates is None else numbers_in(terms.learning_rates, float)
    return {
        task.data: checked(task.data, given | {"int8_network": int8_network, "learning_rates": rates}, TransferTask)
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
        for schemes in [schemes_without_search(ways, study.contributions, study.terms.seeds)]
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
            schemes |= dict.fromkeys(cases, [scheme] * study.terms.seeds)
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
