"""A search for the best schemes of every size at once: accuracy against bytes, by NSGA-II.

After Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II": what no other beats in both
objectives goes before what some do, and of equals what lies where the front is sparse.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from deap import base, tools
from deap.tools import emo
from pydantic import Field
from rich.console import Console
from rich.table import Table

from microtune.modules.csv_rows import write_rows
from microtune.modules.memory.microcontrollers import MICROCONTROLLERS
from microtune.modules.search.integer_program import Genome
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.genetic_algorithm import Individual, good_guesses, make_toolbox
from microtune.recipes.search.rungs import Known, Rungs, offsets
from microtune.recipes.search.surrogate import propose_by_surrogate
from microtune.recipes.training.memory_figures import KIB, scheme_fits
from microtune.recipes.training.pictures import drawn

LEVELS = 6  # budgets that schemes are filled to, each halfway from the one above to the least that a scheme takes
GUESSED_DEPTHS = 4  # of each level


class FrontFitness(base.Fitness):
    """How good a genome is, and its bytes: the more of the one and the less of the other the better."""

    weights = (1.0, -1.0)


class FrontPoint(tuple):
    """A genome with both objectives, as DEAP's operators take it."""

    def __new__(cls, genome: Genome, objectives: tuple[float, float]):
        point = super().__new__(cls, genome)
        point.fitness = FrontFitness(objectives)
        return point


def best_of_front(problem: SearchProblem, fitness: Mapping[Genome, float], count: int) -> list[Genome]:
    """The best by NSGA-II.

    Args:
        problem: That tells the bytes of genomes.
        fitness: Of each genome, on one scale.
        count: How many.
    """
    points = [FrontPoint(genome, (value, problem.memory_bytes(genome))) for genome, value in fitness.items()]
    ranked: list[Genome] = []
    for front in tools.sortNondominated(points, count) if points else []:
        emo.assignCrowdingDist(front)
        ranked += sorted(front, key=lambda point: point.fitness.crowding_dist, reverse=True)
    return [tuple(point) for point in ranked[:count]]


def levels_of(problem: SearchProblem) -> list[SearchProblem]:
    """The problem within its own and ever smaller budgets; of peak memory also those of known microcontrollers."""
    least, most = problem.memory_bytes((0,) * (1 + len(problem.layers))), problem.budget_bytes
    budgets = {least + (most - least) / 2**level for level in range(1, LEVELS)}
    if problem.memory == "peak":
        budgets |= {device.budget_bytes for device in MICROCONTROLLERS.values() if least < device.budget_bytes < most}
    levels = [problem]
    for budget_bytes in sorted(budgets, reverse=True):
        try:
            levels.append(problem.within(budget_bytes))
        except UserError:  # the flash asks for more updates than fit
            break
    return levels


def make_front_toolbox(
    problem: SearchProblem, left_out: float, state: SearchState
) -> tuple[base.Toolbox, list[Genome]]:
    """The operators, with which ``evolve`` searches the front, and good guesses of all sizes.

    Args:
        problem: With the largest budget.
        left_out: As in ``make_toolbox``.
        state: Of the search.
    """
    levels = levels_of(problem)
    toolbox = make_toolbox(problem, left_out, levels)

    def best(fitness: Mapping[Genome, float], count: int) -> list[Genome]:
        return best_of_front(problem, fitness, count)

    def select(individuals: Sequence[Individual], count: int) -> list[Individual]:
        fitness = on_one_scale(state.fitness)
        by_genome = {tuple(one): one for one in individuals}
        return [by_genome[genome] for genome in best({one: fitness[one] for one in by_genome}, count)]

    toolbox.register("select_parents", lambda parents: random.choices(parents, k=2))
    toolbox.register("select", select)
    toolbox.register("rising", lambda rungs, known, rung: rungs.rising(known, rung, best))
    toolbox.register("propose", propose_by_surrogate, toolbox, problem, best=best)
    of_levels = [good_guesses(level, proven_optimum(level), GUESSED_DEPTHS, powers=(1.0,)) for level in levels]
    # the first of every level come before the second of any
    ordered = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*of_levels)))
    return toolbox, list(dict.fromkeys(ordered))


def on_one_scale(known: Mapping[Genome, Known]) -> dict[Genome, float]:
    """The fitness of each genome on the last rung that it was on, as if that were the first; without lost ones."""
    offset = offsets(known)
    last = {genome: [pair for pair in enumerate(values) if pair[1] is not None] for genome, values in known.items()}
    return {genome: pairs[-1][1] - offset[pairs[-1][0]] for genome, pairs in last.items() if pairs}


@dataclass(frozen=True)
class FrontRow:
    """A scheme of the front: a row of ``front.csv``.

    Args:
        memory_bytes: What it takes, of the memory that has the budget.
        fitness: Of its longest trial: accuracy, or the loss, negative.
        steps: Of that trial.
        bias_depth, updated_layers: Of the scheme.
        scheme: Its file, in the folder of the search.
    """

    memory_bytes: Annotated[float, Field(ge=0)]
    fitness: float
    steps: Annotated[int, Field(ge=1)]
    bias_depth: Annotated[int, Field(ge=0)]
    updated_layers: Annotated[int, Field(ge=0)]
    scheme: str


def longest_trials(known: Mapping[Genome, Known]) -> dict[Genome, float]:
    """The fitness of the genomes with the longest trials."""
    finished = {genome: values for genome, values in known.items() if values and values[-1] is not None}
    longest = max(map(len, finished.values()))
    return {genome: values[-1] for genome, values in finished.items() if len(values) == longest}


def front_of(problem: SearchProblem, known: Mapping[Genome, Known]) -> list[Genome]:
    """The genomes with the longest trials of which no other is as good and smaller, the smallest first."""
    values = longest_trials(known)
    front: list[Genome] = []
    for genome in sorted(values, key=lambda one: (problem.memory_bytes(one), -values[one])):
        if not front or values[genome] > values[front[-1]]:
            front.append(genome)
    return front


def write_front(
    problem: SearchProblem,
    state: SearchState,
    rungs: Rungs,
    judged_by: str,
    made_by: Callable[[dict[str, Any]], dict[str, Any]],
    out_dir: Path,
) -> list[FrontRow]:
    """Writes the schemes of the front, ``front.csv`` and ``front.png``; returns the rows, the smallest first."""
    rows = []
    for number, genome in enumerate(front_of(problem, state.fitness), 1):
        values, memory_bytes = state.fitness[genome], problem.memory_bytes(genome)
        found = {"fitness": values[-1], "judged_by": judged_by, "steps": rungs.steps[len(values) - 1]}
        scheme = problem.scheme(genome, made_by(found | {"memory_bytes": memory_bytes}))
        file = Path("front") / f"{number:02d}_{memory_bytes / KIB:.1f}_KiB.json"
        scheme.save(out_dir / file)
        of_scheme = scheme.bias_depth, len(scheme.weights), file.as_posix()
        rows.append(FrontRow(memory_bytes, values[-1], found["steps"], *of_scheme))
    write_rows(out_dir / "front.csv", rows, FrontRow)
    draw_front_of_search(rows, problem, state, judged_by, out_dir / "front.png")
    return rows


def microcontrollers_served(problem: SearchProblem, rows: Sequence[FrontRow], out_dir: Path) -> dict[str, str]:
    """The file of the best scheme of the front for each microcontroller that one fits; of peak memory alone."""
    if problem.memory != "peak":
        return {}
    served = {}
    for row in rows:  # the smallest, and least good, first
        scheme = UpdateScheme.load(out_dir / row.scheme)
        of_row = [name for name, device in MICROCONTROLLERS.items() if scheme_fits(problem.peak_memory, scheme, device)]
        served |= dict.fromkeys(of_row, row.scheme)
    return served


def draw_front_of_search(
    rows: Sequence[FrontRow], problem: SearchProblem, state: SearchState, judged_by: str, path: Path
) -> None:
    """Draws the fitness of all schemes with the longest trials over their memory, and the front, as a PNG."""
    scale = -1 if judged_by == "loss" else 100  # points
    trained = longest_trials(state.fitness)
    points = [(problem.memory_bytes(genome) / KIB, value * scale) for genome, value in trained.items()]
    with drawn(path, figsize=(8, 4.5)) as axes:
        axes.plot(*zip(*points, strict=True), ".", color="tab:grey", label="schemes")
        front = [(row.memory_bytes / KIB, row.fitness * scale) for row in rows]
        axes.step(*zip(*front, strict=True), "o-", where="post", color="tab:red", markersize=4, label="front")
        if problem.memory == "peak":
            together: dict[int, list[str]] = {}
            for name, device in MICROCONTROLLERS.items():
                if rows[0].memory_bytes <= device.budget_bytes <= problem.budget_bytes:
                    together.setdefault(device.budget_bytes, []).append(name)
            for budget_bytes, names in together.items():
                axes.axvline(budget_bytes / KIB, color="black", linewidth=0.5, linestyle=":")
                axes.text(budget_bytes / KIB, axes.get_ylim()[0], f" {', '.join(names)}", rotation=90, fontsize=7)
        measure = "loss on the validation split, nats" if judged_by == "loss" else "top-1 on the validation split, %"
        axes.set(xlabel=f"{problem.memory} memory, KiB", ylabel=f"{measure}, after {rows[0].steps} steps")
        axes.set_title(f"The best schemes of {problem.network} by size")
        axes.legend(fontsize=8)


def print_schemes_of_front(report: dict[str, Any], out_dir: Path) -> None:
    """Prints a line for each scheme, and which microcontrollers it is the best for.

    Args:
        report: Of the search, with its front.
        out_dir: Of the search.
    """
    rows, served = [FrontRow(**row) for row in report["front"]], report["mcus"]
    is_loss = report["judged_by"] == "loss"
    table = Table(title=f"The best schemes by size, after {rows[0].steps} steps")
    measure = "validation loss, nats" if is_loss else "validation top-1, %"
    for column in (f"{report['memory']} memory, KiB", measure, "bias depth", "layers"):
        table.add_column(column, justify="right")
    table.add_column("scheme")
    if served:
        table.add_column("the best for")
    for row in rows:
        value = f"{-row.fitness:.4f}" if is_loss else f"{row.fitness * 100:.2f}"
        numbers = f"{row.memory_bytes / KIB:.1f}", value, row.bias_depth, row.updated_layers
        devices = ", ".join(name for name, file in served.items() if file == row.scheme)
        table.add_row(*map(str, numbers), row.scheme, *([devices] if served else []))
    Console(width=140).print(table)
    print(f"schemes, front.csv and front.png: {out_dir}")
