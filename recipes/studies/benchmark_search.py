"""Judges the search by a contribution table: evolution against the proven optimum and random search; and its speed.

    uv run recipes/studies/benchmark_search.py --processes 2 --out_dir runs/by_table
    uv run recipes/studies/benchmark_search.py --level speed

Three contribution tables (the two of ``recipes/contributions`` and a made one in which budget and layers play
together), five budgets, ten seeds. A search that is finished is kept in the folder, so that the same command goes on
where it was stopped. By accuracy ``compare_searches.py`` judges.
"""

import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from microtune.datamodules.progress import progress_bar
from microtune.modules.atomic_files import write_json
from microtune.modules.memory.training_memory import extra_memory_bytes
from microtune.modules.networks.operations import NetworkOperations
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.search.genome_bytes import Memory
from microtune.modules.search.random_search import random_search
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.simple_schemes import is_expanding
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget, budget_of
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.genetic_algorithm import POPULATION, evolve, make_toolbox
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.rungs import Rungs
from microtune.recipes.search.shared_folder import open_shared_folder
from microtune.recipes.search.table_search import make_problem
from microtune.recipes.search.trials import described_by
from microtune.recipes.search.workers import Workers
from microtune.recipes.training.command_line import check_at_least_one, flat, listed, run_recipe
from microtune.recipes.training.memory_figures import KIB
from microtune.recipes.training.networks import DescribedNetwork
from microtune.recipes.training.pictures import drawn
from microtune.recipes.training.run_folder import new_folder, read_config

MEASUREMENTS = (
    "recipes/contributions/mobilenet_v2-w0.35_cifar10,recipes/contributions/mobilenet_v2-w0.35_speech_commands"
)
# within 16 KiB a dozen schemes are all there is, and every search finds the best
EXTRA_BUDGETS_KIB = (32, 48, 64, 100)
PEAK_BUDGET = "nrf52840"
MADE = "made"


@dataclass(frozen=True)
class Job:
    """All searches of a seed by one table at one budget; plain values, since it goes to another process."""

    measurement: str
    budget: str
    seed: int
    evaluations: int

    @property
    def file_name(self) -> str:
        """Where its result is kept."""
        return f"{Path(self.measurement).name}_{self.budget}_seed{self.seed}.json"


def main(
    level: Literal["table", "speed"] = "table",
    measurements: str = MEASUREMENTS,
    evaluations: int | None = None,
    seeds: int = 10,
    processes: int = 1,
    out_dir: Path | None = None,
) -> list[dict[str, Any]]:
    """Judges the search by a contribution table: evolution against the proven optimum and random search.

    Args:
        level: Subject: table (what is found by the contribution table) or speed (how long it takes to score and repair
            as many genomes as ``evaluations`` says, by default 100,000).
        measurements: Folders of measure_contributions.py, separated by commas.
        evaluations: Number of schemes that each search evaluates, by default 5,000; random search also gets four times
            as many.
        seeds: Repetitions.
        processes: Processes of this machine that search, one thread each.
        out_dir: Folder of the results; by default a new one below runs/.
    """
    arguments = flat(locals())
    torch.set_num_threads(1)
    check_at_least_one(evaluations=evaluations, seeds=seeds, processes=processes)
    folders = [Path(name) for name in listed(measurements)]
    refuse_wrong_folders(folders)
    if level == "speed":
        return [measure_speed(folders[0], memory, evaluations or 100_000) for memory in ("extra", "peak")]
    out_dir = out_dir or new_folder(Path("runs") / "benchmark_search")
    open_shared_folder(out_dir, arguments, {"out_dir", "processes"})
    names = [str(folder) for folder in folders] + [MADE]
    budgets = [*(f"extra{kib}" for kib in EXTRA_BUDGETS_KIB), PEAK_BUDGET]
    cells = itertools.product(names, budgets, range(seeds))
    jobs = [Job(name, budget, seed, evaluations or 5000) for name, budget, seed in cells]
    results = do_jobs(jobs, str(folders[0]), out_dir, processes)
    write_json(out_dir / "table_search.json", results)
    print_table_level(results)
    draw_table_level(results, out_dir / "table_search.png")
    print(f"results: {out_dir / 'table_search.json'} and .png")
    return results


def refuse_wrong_folders(folders: Sequence[Path]) -> None:
    """Raises ``UserError`` unless there are measurements, each with its table, its arguments and a name of its own."""
    if not folders:
        raise UserError("there are no measurements: give folders of measure_contributions.py")
    names = [folder.name for folder in folders] + [MADE]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two measurements are named {doubled[0]}: rename the folder of one")
    for folder in folders:
        for name in ("contributions.csv", "config.yaml"):
            if not (folder / name).exists():
                raise UserError(f"{folder} is no folder of measure_contributions.py: it lacks {name}")
        settings_of_measurement(folder)


def measure_speed(folder: Path, memory: Memory, genomes: int) -> dict[str, Any]:
    """Processor seconds of repairing and scoring random genomes on one core."""
    described = described_by(settings_of_measurement(folder))
    table = ContributionTable.load(folder / "contributions.csv")
    budget = Budget("extra", 64 * KIB) if memory == "extra" else budget_of("peak", None, PEAK_BUDGET, None, None, None)
    problem = make_problem(described, table, budget)
    draws = random.Random(0)
    drawn = [problem.random_genome(draws) for _ in range(genomes)]
    started = time.process_time()
    for genome in track(drawn, f"{memory} memory", transient=True):
        problem.score(problem.repair(genome))
    seconds = time.process_time() - started
    print(f"{genomes:,} genomes repaired and scored within {budget}: {seconds:.1f} s on one core")
    return {"memory": memory, "genomes": genomes, "processor_seconds": seconds}


def do_jobs(jobs: Sequence[Job], first: str, out_dir: Path, processes: int) -> list[dict[str, Any]]:
    """The results of all jobs, those of finished ones from the folder."""
    with progress_bar() as progress, Workers(processes) as workers:
        task = progress.add_task("searches", total=len(jobs))
        for start in range(0, len(jobs), processes):
            chunk = [job for job in jobs[start : start + processes] if not (out_dir / job.file_name).exists()]
            workers.map(do_job, chunk, [first] * len(chunk), [out_dir] * len(chunk))
            progress.advance(task, processes)
    if lost := [job.file_name for job in jobs if not (out_dir / job.file_name).exists()]:
        raise UserError(f"{len(lost)} searches were lost with their workers, such as {lost[0]}: start it again")
    return [json.loads((out_dir / job.file_name).read_text(encoding="utf-8")) for job in jobs]


def do_job(job: Job, first: str, out_dir: Path) -> None:
    """Does one job and keeps its result."""
    torch.set_num_threads(1)
    random.seed(job.seed)
    measurement = Path(first if job.measurement == MADE else job.measurement)
    described = described_by(settings_of_measurement(measurement))
    table = (
        made_table(described) if job.measurement == MADE else ContributionTable.load(measurement / "contributions.csv")
    )
    is_extra = job.budget.startswith("extra")
    budget = (
        budget_of("extra", float(job.budget.removeprefix("extra")), None, None, None, None)
        if is_extra
        else budget_of("peak", None, job.budget, None, None, None)
    )
    problem = make_problem(described, table, budget)
    cell = {"measurement": Path(job.measurement).name, "budget": job.budget, "seed": job.seed}
    write_json(out_dir / job.file_name, cell | search_table(job, problem))


def settings_of_measurement(folder: Path) -> TrialSettings:
    """The settings of the trials that a folder of ``measure_contributions.py`` was made with."""
    arguments = read_config(folder / "config.yaml")
    known = TrialSettings.__dataclass_fields__
    return TrialSettings(**{name: value for name, value in arguments.items() if name in known})


def made_table(described: DescribedNetwork, base_depth: int = 36) -> ContributionTable:
    """A table in which greed goes wrong: gains in proportion to bytes, and the best layers only at costly depths.

    They are a fixed part and one in proportion to bytes, with some noise (a strongly correlated knapsack, Pisinger
    2005, "Where are the hard knapsack problems?"), so that how updates add up to the budget counts. The deepest layers
    gain most, but to reach them the masks and biases of all others must be paid for.
    """
    draws, operations = random.Random(0), described.operations
    convolutions = operations.convolutions
    names = [layer.name for layer in convolutions[len(convolutions) - base_depth :] if is_expanding(layer)]
    rows = [
        Contribution("bias", depth, "", 0.0, 0.01 * (depth / base_depth) ** 3, 0.0, 1)
        for depth in range(1, base_depth + 1)
    ]
    reference = _extra_bytes(operations, UpdateScheme("", base_depth))
    for index, name in enumerate(names):
        for ratio in (0.125, 0.25, 0.5, 1.0):
            added = _extra_bytes(operations, UpdateScheme("", base_depth, {name: ratio})) - reference
            depth_factor = 1.3 - 0.6 * index / len(names)
            gain = depth_factor * (0.001 + added / (100 * KIB) * draws.uniform(0.09, 0.11))
            rows.append(Contribution("weight", base_depth, name, ratio, gain, 0.0, 1))
    return ContributionTable(tuple(rows))


def _extra_bytes(operations: NetworkOperations, scheme: UpdateScheme) -> float:
    return extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme)


def search_table(job: Job, problem: SearchProblem) -> dict[str, Any]:
    """The scores of evolution and of both random searches, as parts of the optimum's."""
    optimum = proven_optimum(problem)
    state, started = SearchState(), time.process_time()
    rungs = Rungs((1,), job.evaluations)
    best, *_ = evolve(problem, make_toolbox(problem), rungs, POPULATION["table"], [], state, lambda state: None)
    seconds = time.process_time() - started
    found = {"evolution": problem.score(best)}
    schemes = [best]
    for name, blind in (("random", False), ("blind", True)):
        drawn = random_search(problem, 4 * job.evaluations, job.seed, blind, stop_at=optimum.score)
        schemes.append(drawn.genome)
        found |= {name: drawn.best_scores[: job.evaluations][-1], f"{name}_x4": drawn.score}
    return {
        "optimum_score": optimum.score,
        # of a table in which nothing that fits gains anything, all have the optimum
        "of_optimum": {name: score / optimum.score if optimum.score else 1.0 for name, score in found.items()},
        "evaluations": len(state.fitness),
        "processor_seconds": seconds,
        "within_budget": all(problem.fits(genome) for genome in schemes),
    }


def print_table_level(results: Sequence[dict[str, Any]]) -> None:
    """Prints per table the parts of the optimum that each search reached: median and worst of budgets and seeds."""
    table = Table("table", "search", "evaluations", "median, %", "worst, %", title="Parts of the proven optimum")
    for name in dict.fromkeys(result["measurement"] for result in results):
        of_table = [result["of_optimum"] for result in results if result["measurement"] == name]
        for search in of_table[0]:
            parts = [part[search] * 100 for part in of_table]
            count = "x 4" if search.endswith("_x4") else "x 1"
            table.add_row(
                name, search.removesuffix("_x4"), count, f"{statistics.median(parts):.2f}", f"{min(parts):.2f}"
            )
    console = Console(width=110)
    console.print(table)
    seconds = statistics.median(result["processor_seconds"] for result in results)
    over = sum(not result["within_budget"] for result in results)
    print(f"an evolution takes {seconds:.1f} s of processor time in the median; {over} schemes were over their budget")


def draw_table_level(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the parts of the optimum of every search, table by table, as a PNG."""
    names = list(dict.fromkeys(result["measurement"] for result in results))
    with drawn(path, 1, len(names), figsize=(4.5 * len(names), 4.5), sharey=True) as panels:
        for axes, name in zip([panels] if len(names) == 1 else panels, names, strict=True):
            of_table = [result["of_optimum"] for result in results if result["measurement"] == name]
            searches = list(of_table[0])
            axes.boxplot([[part[search] * 100 for part in of_table] for search in searches], whis=(0, 100))
            labels = [search.replace("_x4", "\n4 x") for search in searches]
            axes.set_xticks(range(1, len(searches) + 1), labels, fontsize=8)
            axes.set_title(name, fontsize=9)
        axes.figure.supylabel("part of the proven optimum, % (whiskers: worst and best)", fontsize=9)


if __name__ == "__main__":
    run_recipe(main)
