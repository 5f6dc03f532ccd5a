"""Which search finds the better schemes? Evolution, random search and rules, at the same cost and trained alike.

    uv run recipes/studies/compare_searches.py --data_sets recipes/results/data_sets.json --only cifar10 --processes 2

Every search has the same number of optimizer steps, and as many seeds; what it returns is trained for longer, at the
learning rate that suits it, and judged on the test split: differences are paired over seeds. The budget ``published``
is what the paper's scheme takes on the data. The same command goes on where it was stopped, also with more seeds, arms
or data sets. A search of 10,000 steps takes five minutes on a core of an AMD EPYC for images of 96 px, a final training
of 540 fifteen seconds.
"""

import itertools
import json
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from microtune.modules.atomic_files import write_json
from microtune.modules.csv_rows import read_rows, write_rows
from microtune.modules.memory.microcontrollers import KIB
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.options import Effort, Level, TrialSettings
from microtune.recipes.search.plan import plan_search
from microtune.recipes.search.table_search import load_table, make_problem
from microtune.recipes.search.trials import described_by
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.paired_differences import compare_all, draw_comparisons, print_comparisons
from microtune.recipes.studies.result_rows import Result
from microtune.recipes.studies.scheme_search import SchemeSearch, search_once
from microtune.recipes.studies.seeded_trainings import Case, Training, train_all
from microtune.recipes.studies.study import facts_of, row_of
from microtune.recipes.studies.study_folder import opened_folder, watched
from microtune.recipes.studies.transfer_tasks import TransferTask, load_tasks
from microtune.recipes.studies.way_schemes import budget_by_name, extra_bytes
from microtune.recipes.studies.ways import Numbers, Way
from microtune.recipes.training.command_line import check_at_least_one, flat, listed, run_recipe
from microtune.recipes.training.networks import DescribedNetwork
from microtune.recipes.training.run_folder import new_folder

log = logging.getLogger(__name__)

PAPERS_SCHEME = Path(__file__).parents[1] / "schemes/mobilenet_v2-w0.35_lin2022_99kb.json"
PUBLISHED = "published"  # the arm, and the budget of what it takes
RATE_SEED, FINAL_SEED = 1000, 2000  # the first of each: others than those of the searches
FINAL_SEEDS_APART = 100  # of the final trainings of one scheme
COPIES = 4  # of the augmentation
# where a comparison goes on
MAY_CHANGE = {"out_dir", "processes", "data_sets", "only", "arms", "seeds", "budgets"}


@dataclass(frozen=True)
class Arm:
    """Where a scheme comes from: from a search, or from the paper or a measured table, which search for nothing.

    Args:
        effort: Of the search, but for its seed; None without.
        level: Of its updates.
    """

    effort: Effort | None
    level: Level = "sub_tensor"


def arms_of(rungs: str, total_steps: int) -> dict[str, Arm]:
    """All that is compared, the first being what the others are measured against.

    Args:
        rungs: Steps of the trials of the searches on several rungs; those on one have the last.
        total_steps: Of every search that trains schemes.
    """
    evolution = Effort("accuracy", judged_by="loss", rungs=rungs, total_steps=total_steps, finalists=0)
    at_random = replace(evolution, proposed_by="random")
    return {
        "evolution": Arm(evolution),
        "evolution_layers": Arm(evolution, "layer"),
        "random_halving": Arm(at_random),
        "random": Arm(replace(at_random, rungs=rungs.split(",")[-1])),
        "one_pass": Arm(Effort()),
        "one_pass_layers": Arm(Effort(), "layer"),
        "table_optimum": Arm(None),
        PUBLISHED: Arm(None),
    }


@dataclass(frozen=True)
class Comparison:
    """What is compared, from the command line.

    Args:
        tasks, arms: By name.
        budgets: As rows of results name them, or ``PUBLISHED``.
        numbers: What the networks compute in.
        seeds: Searches of each arm.
        final_steps, final_seeds: Of the trainings of what each of them returns.
        base_depth: Deepest bias depth.
        out_dir: Folder of everything.
    """

    tasks: dict[str, TransferTask]
    arms: dict[str, Arm]
    budgets: Sequence[str]
    numbers: Numbers
    seeds: int
    final_steps: int
    final_seeds: int
    base_depth: int
    out_dir: Path

    def settings(self, data: str, steps: int) -> TrialSettings:
        """The settings of trainings of so many steps, or of the trials of searches, of 0."""
        task = self.tasks[data]
        given = {"steps": steps} if steps else {"learning_rate": task.middle_rate}
        return task.trial_settings(
            self.numbers, base_depth=self.base_depth, copies=COPIES, features="disk",
            features_dir=str(self.out_dir / "features" / f"{data}-{self.numbers}-{steps or 'searches'}"), **given,
        )  # fmt: skip

    def described(self, data: str) -> DescribedNetwork:
        """The network that meets the data."""
        return described_by(self.settings(data, 0))

    def budget_on(self, data: str, budget: str) -> str:
        """The budget in KiB, also where it is what the paper's scheme takes."""
        if budget != PUBLISHED:
            return budget
        described = self.described(data)
        return f"extra{extra_bytes(described, described.load_scheme(PAPERS_SCHEME)) / KIB:.6f}"

    def cases(self, data: str) -> Iterator[Case]:
        """All that is compared on a data set; without what there is not, or what is over the budget."""
        for budget in self.budgets:
            within = self.budget_on(data, budget)
            for name in self.arms:
                if name == PUBLISHED and budget != PUBLISHED:
                    continue  # a scheme of one size
                if name == "table_optimum" and self.tasks[data].contributions is None:
                    continue
                yield Case(data, self.numbers, within, name)

    def search_of(self, case: Case, seed: int) -> SchemeSearch | None:
        """The search of a seed, where there is one."""
        arm = self.arms[case.way]
        if arm.effort is None:
            return None
        folder = self.out_dir / "searches" / f"{case.data}-{case.numbers}-{case.budget}-{case.way}-seed{seed}"
        settings, effort = self.settings(case.data, 0), replace(arm.effort, seed=seed)
        return SchemeSearch(settings, case.budget, folder, effort, arm.level)


def main(
    data_sets: Path,
    only: str | None = None,
    arms: str | None = None,
    budgets: str = "extra64",
    numbers: Numbers = "fp32",
    rungs: str = "60,180,540",
    total_steps: int = 10_000,
    seeds: int = 10,
    final_steps: int = 540,
    final_seeds: int = 3,
    base_depth: int = 36,
    processes: int = 1,
    out_dir: Path | None = None,
) -> dict[str, Any]:
    """Which search finds the better schemes, at the same cost and trained alike.

    Args:
        data_sets: List of data sets with their networks and learning rates, such as recipes/results/data_sets.json.
        only: Names of those that are wanted, separated by commas.
        arms: Names of what is compared, separated by commas, the others with the first: evolution, evolution_layers,
            random_halving, random (on the last rung alone), one_pass, one_pass_layers, table_optimum (of data sets
            that have a table) and published (the paper's scheme); by default all.
        budgets: KiB of extra memory (extra64) or of peak memory (peak200), microcontrollers, or published: what the
            paper's scheme takes on the data; separated by commas.
        numbers: Numbers that the networks compute in, in searches and after: fp32 or int8.
        rungs: Numbers of optimizer steps of trials.
        total_steps: Number of optimizer steps of each search that trains schemes.
        seeds: Number of searches of each kind.
        final_steps: Number of optimizer steps of a final training; a third of them at each learning rate come before.
        final_seeds: Number of final trainings of each scheme, whose mean counts.
        base_depth: Deepest bias depth of the schemes.
        processes: Number of searches or trainings that run at once, one thread each.
        out_dir: Folder of the comparison; by default a new one below runs/. Where the same was begun, it goes on.
    """
    started, arguments = time.monotonic(), flat(locals())
    torch.set_num_threads(1)
    check_at_least_one(total_steps=total_steps, seeds=seeds, final_seeds=final_seeds, base_depth=base_depth)
    check_at_least_one(processes=processes)
    if final_steps < 3:
        raise UserError(f"final_steps is {final_steps}: give 3 or more")
    of_names = arms_of(rungs, total_steps)
    wanted = {name: of_names[name] for name in names_among(listed(arms), of_names)}
    for budget in listed(budgets):
        if budget != PUBLISHED and budget_by_name(budget) is None:
            raise UserError("schemes are searched within a budget: give one with --budgets, such as extra64")
    tasks = load_tasks(data_sets, listed(only))
    out_dir = out_dir or new_folder(Path("runs") / "compare_searches")
    of_finals = final_steps, final_seeds
    comparison = Comparison(tasks, wanted, listed(budgets), numbers, seeds, *of_finals, base_depth, out_dir)
    check(comparison)
    with opened_folder(out_dir, arguments, MAY_CHANGE), Workers(processes) as workers:
        for data in tasks:
            searched = searched_on(comparison, data, workers)
            trained_on(comparison, data, searched, workers)
        report = {**report_of(comparison), "seconds": time.monotonic() - started}
        write_json(out_dir / "report.json", report)
        draw_comparisons(report["comparisons"], out_dir / "comparison.png")
    print_comparisons(report["comparisons"])
    print_costs(report["costs"])
    print(f"trainings: {out_dir / 'searches.csv'}, report: {out_dir / 'report.json'}")
    return report


def names_among(names: Sequence[str] | None, known: dict[str, Arm]) -> Sequence[str]:
    """The names, or all that are known; raises ``UserError`` where one is not."""
    for name in names or ():
        if name not in known:
            raise UserError(f"arms has {name!r}: give some of {', '.join(known)}")
    return names or list(known)


def check(comparison: Comparison) -> None:
    """Raises ``UserError`` where a search makes no sense; nothing is written."""
    for data in comparison.tasks:
        for case in comparison.cases(data):
            search = comparison.search_of(case, 0)
            if search is not None:
                plan_search("gradient", search.budget_options, search.effort, search.settings)
            elif case.way == PUBLISHED:
                scheme = comparison.described(data).load_scheme(PAPERS_SCHEME)
                if scheme.bias_depth > comparison.base_depth:
                    raise UserError(
                        f"base_depth is {comparison.base_depth}, but the published scheme reaches "
                        f"{scheme.bias_depth}: give as much"
                    )


def searched_on(comparison: Comparison, data: str, workers: Workers) -> dict[tuple[Case, int], UpdateScheme]:
    """The scheme of each case and seed on a data set; without those whose search failed."""
    of_seeds = itertools.product(range(comparison.seeds), comparison.cases(data))
    searches = {(case, seed): comparison.search_of(case, seed) for seed, case in of_seeds}
    wanted = [search for search in searches.values() if search is not None]
    waiting = [search for search in wanted if not search.report_file.exists()]
    with watched([search.report_file for search in wanted], f"{data}, searches"):
        failures = workers.map(search_once, waiting)
    for failure in filter(None, failures):
        log.warning(failure)
    described, found = comparison.described(data), {}
    fixed = {
        case: scheme_without_search(comparison, case, described)
        for case in comparison.cases(data)
        if comparison.arms[case.way].effort is None
    }
    for (case, seed), search in searches.items():
        if search is None:
            found[case, seed] = fixed[case]
        elif search.report_file.exists():
            found[case, seed] = described.load_scheme(search.folder / "scheme.json")
    return found


def scheme_without_search(comparison: Comparison, case: Case, described: DescribedNetwork) -> UpdateScheme:
    """The paper's, or the best by the measured table."""
    if case.way == PUBLISHED:
        return described.load_scheme(PAPERS_SCHEME)
    table = load_table(Path(comparison.tasks[case.data].contributions), described)
    problem = make_problem(described, table, budget_by_name(case.budget))
    return problem.scheme(proven_optimum(problem).genome)


def trained_on(
    comparison: Comparison, data: str, schemes: dict[tuple[Case, int], UpdateScheme], workers: Workers
) -> None:
    """Trains each scheme at the learning rates of the data set, then for longer at the best, and keeps the rows."""
    task, out_dir, steps = comparison.tasks[data], comparison.out_dir, comparison.final_steps
    of_rates: dict[tuple[Case, int], list[Training]] = {}
    described = comparison.described(data)
    for (case, seed), scheme in schemes.items():
        settings = comparison.settings(data, steps // 3)
        facts = facts_of(described, scheme, Way()) | {"search_seconds": search_facts(comparison, case, seed)["seconds"]}
        training = Training(
            case, Way(), RATE_SEED + seed, settings, scheme.to_dict(), 0.0, splits=("val",), facts=facts
        )
        of_rates[case, seed] = [replace(training, learning_rate=rate) for rate in task.learning_rates]
    train_all([one for of_one in of_rates.values() for one in of_one], workers, out_dir, f"{data}, learning rates")
    finals: dict[tuple[Case, int], list[Training]] = {}
    for (case, seed), of_one in of_rates.items():
        best = lowest_loss(of_one, out_dir)
        if best is not None:
            final = replace(best, settings=comparison.settings(data, steps), splits=("val", "test"))
            first = FINAL_SEED + seed
            seeds = range(first, first + comparison.final_seeds * FINAL_SEEDS_APART, FINAL_SEEDS_APART)
            finals[case, seed] = [replace(final, seed=one) for one in seeds]
    keep = partial(keep_rows, comparison, finals)
    train_all([one for of_one in finals.values() for one in of_one], workers, out_dir, f"{data}, final trainings", keep)
    keep()


def lowest_loss(trainings: Sequence[Training], out_dir: Path) -> Training | None:
    """The training that ended with the lowest loss on the validation split; None if all diverged or were lost."""
    losses = {}
    for index, training in enumerate(trainings):
        found = training.result(out_dir)
        if found is not None and found["cross_entropy"]["val"] is not None:
            losses[index] = found["cross_entropy"]["val"]
    return trainings[min(losses, key=lambda index: losses[index])] if losses else None


def keep_rows(comparison: Comparison, finals: dict[tuple[Case, int], list[Training]]) -> None:
    """Writes a row of each scheme whose final trainings are done, beside those of other data sets, arms and budgets."""
    path, rows = comparison.out_dir / "searches.csv", []
    for (_, seed), of_scheme in finals.items():
        done = [row for training in of_scheme if (row := row_of(training, comparison.out_dir)) is not None]
        if len(done) == len(of_scheme):
            means = {name: statistics.fmean(getattr(row, name) for row in done) for name in ("top1", "val_top1")}
            rows.append(replace(done[0], seed=seed, **means))
    ours = {row.key for row in rows}
    kept = read_rows(path, Result) if path.exists() else []
    write_rows(path, [*(row for row in kept if row.key not in ours), *rows], Result)


def search_facts(comparison: Comparison, case: Case, seed: int) -> dict[str, Any]:
    """What the report of a search says; of what is not searched for that it took no time."""
    search = comparison.search_of(case, seed)
    if search is None:
        return {"seconds": 0.0}
    return json.loads(search.report_file.read_text(encoding="utf-8"))


def report_of(comparison: Comparison) -> dict[str, Any]:
    """Accuracies and paired differences of each data set and budget, and what the searches cost."""
    wanted = {case for data in comparison.tasks for case in comparison.cases(data)}
    rows = [
        row
        for row in read_rows(comparison.out_dir / "searches.csv", Result)
        if Case(row.data, row.numbers, row.budget, row.way) in wanted and row.seed < comparison.seeds
    ]
    comparisons = compare_all(rows, [(name, comparison.numbers) for name in comparison.arms])
    for one in comparisons:  # not every arm is there at every budget
        one["ways"] = [
            entry
            for entry in one["ways"]
            if Case(one["data"], comparison.numbers, one["budget"], entry["way"]) in wanted
        ]
    costs = []
    for data in comparison.tasks:
        for case in comparison.cases(data):
            if comparison.arms[case.way].effort is None:
                continue
            facts = [
                search_facts(comparison, case, seed)
                for seed in range(comparison.seeds)
                if comparison.search_of(case, seed).report_file.exists()
            ]
            costs.append({"data": data, "budget": case.budget, "arm": case.way} | mean_costs(facts))
    return {"comparisons": comparisons, "costs": costs}


def mean_costs(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds: seconds, optimizer steps, and the rank correlations of the rungs."""
    found: dict[str, Any] = {"searches": len(facts)}
    if facts:
        found["seconds"] = statistics.fmean(one["seconds"] for one in facts)
        found["steps"] = statistics.fmean(one.get("steps_spent", 0) for one in facts)
    correlations: dict[str, list[float]] = {}
    for one in facts:
        for pair in one.get("rank_correlation_of_rungs", ()):
            if pair["correlation"] is not None:
                correlations.setdefault(f"{pair['steps']}-{pair['longer_steps']}", []).append(pair["correlation"])
    found["rank_correlation_of_rungs"] = {pair: statistics.fmean(values) for pair, values in correlations.items()}
    return found


def print_costs(costs: Sequence[dict[str, Any]]) -> None:
    """Prints what the searches took."""
    table = Table("data", "budget", "arm", title="What a search takes, means over seeds")
    for column in ("searches", "steps", "core seconds", "rank correlation of rungs"):
        table.add_column(column, justify="right")
    for one in costs:
        if one["searches"]:
            pairs = ", ".join(f"{pair} {value:.2f}" for pair, value in one["rank_correlation_of_rungs"].items())
            numbers = str(one["searches"]), f"{one['steps']:,.0f}", f"{one['seconds']:.0f}"
            table.add_row(one["data"], one["budget"], one["arm"], *numbers, pairs)
    Console(width=140).print(table)


if __name__ == "__main__":
    run_recipe(main)
