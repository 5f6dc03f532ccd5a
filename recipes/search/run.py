"""A whole search in its folder: schemes evolved by table or by accuracy, the finalists, and what is left behind."""

import logging
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from microtune.modules.atomic_files import write_json
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.integer_program import Genome
from microtune.modules.search.random_search import random_search
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.finalists import rank_correlation, train_finalists
from microtune.recipes.search.front import microcontrollers_served, write_front
from microtune.recipes.search.genetic_algorithm import evolve, make_toolbox, rules_of_thumb
from microtune.recipes.search.options import GRADIENT, Effort, TrialSettings
from microtune.recipes.search.provenance import provenance_of
from microtune.recipes.search.report import SearchLog, draw_search, updated_layers
from microtune.recipes.search.rungs import Rungs, best_first, fitness_of, pairs_of_rungs
from microtune.recipes.search.table_search import Search
from microtune.recipes.search.trial_search import TrialSearch
from microtune.recipes.search.workers import Workers
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.run_folder import open_run_folder, refuse_another_run, write_config

log = logging.getLogger(__name__)

RECIPE = "evolve_update_scheme"  # whose command makes the same scheme


def begin_search(out_dir: Path | None, arguments: dict[str, Any], resume: bool) -> Path:
    """Opens the run's folder, with the arguments in it; refuses to go on with a run of other ones."""
    out_dir = open_run_folder(out_dir, RECIPE, resume)
    if resume:
        refuse_another_run(out_dir, arguments, None)
    else:
        write_config(out_dir, arguments)
    return out_dir


def run_search(
    search: Search,
    effort: Effort,
    rungs: Rungs,
    settings: TrialSettings,
    budget: Budget,
    workers: Workers,
    arguments: dict[str, Any],
    logger: LoggerName,
    out_dir: Path,
    started: float,
) -> dict[str, Any]:
    """Searches, or goes on after the last finished generation, and leaves the scheme in the folder.

    By a gradient alone nothing is searched for: its best scheme is computed.

    Args:
        search: What is solved.
        effort: How schemes are judged.
        rungs: For how long, and how long all of it may take.
        settings: Of the trials, as long as the last rung.
        budget: What a scheme may take.
        workers: Where schemes are trained.
        arguments: Of ``evolve_update_scheme.py`` for this search, which the scheme's provenance has.
        logger: wandb, csv or none.
        out_dir: Folder of the search, from ``begin_search``.
        started: When the work began, by ``time.monotonic``.

    Returns:
        What ``report.json`` says.

    Raises:
        UserError: The table is not what the search was begun with, or nothing came of it.
    """
    is_gradient = arguments["contributions"] == GRADIENT
    table_file = Path(arguments["contributions"])
    if is_gradient:
        table_file = keep_table(search.table, out_dir / "contributions.csv")
    of_arguments = {name: arguments[name] for name in ("level", "channel_multiple")}
    search = replace(search, facts=search.facts | {"fitness": effort.fitness, **of_arguments, **budget.facts})
    made_by = partial(provenance_of, RECIPE, arguments, table_file, budget)
    parts = search.table, search.optimum, search.problem
    search_log = SearchLog(logger, out_dir, arguments, *parts, rungs)
    if is_gradient and effort.fitness == "table":
        return finish_computed(search, made_by, search_log, started)
    settings = replace(settings, features_dir=settings.features_dir or str(out_dir / "features"))
    ranked, state = evolve_schemes(search, effort, rungs, settings, workers, table_file, made_by, search_log)
    best, of_finalists = best_of_finalists(search, effort, settings, workers, state, ranked)
    report = {**results_of(search, best, state, ranked, effort.seed), **of_finalists}
    if effort.fitness == "accuracy":
        report |= {
            "judged_by": effort.judged_by,
            "learning_rate": state.learning_rate,
            "steps_spent": (rungs.spent(state.fitness) + state.rate_steps) * effort.trial_seeds,
            "rank_correlation_of_rungs": correlations(state, rungs),
        }
    if effort.front:
        rows = write_front(search.problem, state, rungs, effort.judged_by, made_by, out_dir)
        served = microcontrollers_served(search.problem, rows, out_dir)
        report |= {"front": [asdict(row) for row in rows], "mcus": served}
    report["seconds"] = time.monotonic() - started
    finish_evolved(search, best, state, rungs, report, made_by, search_log)
    return report


def keep_table(table: ContributionTable, path: Path) -> Path:
    """Writes the table of a gradient into the run's folder, or refuses to go on with another than lies there."""
    with tempfile.TemporaryDirectory() as folder:
        table.save(Path(folder) / path.name)
        if path.exists() and path.read_bytes() != (Path(folder) / path.name).read_bytes():
            raise UserError(
                f"the gradient is not what it was when {path} was written: the data, the weights or the machine have "
                "changed: start the search anew without --resume"
            )
    table.save(path)
    return path


def correlations(state: SearchState, rungs: Rungs) -> list[dict[str, Any]]:
    """How well each rung ranks schemes as a longer one does: Spearman's correlation over those that were on both."""
    return [
        {"steps": lower, "longer_steps": upper, "schemes": len(short), "correlation": rank_correlation(short, long)}
        for lower, upper, short, long in pairs_of_rungs(state.fitness, rungs.steps)
    ]


def evolve_schemes(
    search: Search,
    effort: Effort,
    rungs: Rungs,
    settings: TrialSettings,
    workers: Workers,
    table_file: Path,
    made_by: Callable[[dict[str, Any]], dict[str, Any]],
    search_log: SearchLog,
) -> tuple[list[Genome], SearchState]:
    """Evolves schemes, from the state in the run's folder on, where there is one, and keeps it after every generation.

    Where schemes are trained, which takes long, the best so far is kept too, from the start on.

    Returns:
        The schemes, the best first, and the state at the end.
    """
    problem, state_file = search.problem, search_log.out_dir / "search.json"
    state = SearchState.load(state_file)
    state.refuse_another_table(table_file)

    def keep_best(genome: Genome) -> None:
        found = {"unfinished": True, "evaluations": len(state.fitness)}
        problem.scheme(genome, made_by(found)).save(search_log.out_dir / "scheme.json")

    def after_generation(state: SearchState) -> None:
        state.save(state_file)
        ranked = best_first(state.fitness)
        if ranked and effort.fitness == "accuracy":
            keep_best(ranked[0])
        search_log.generation(state)

    toolbox, guesses = make_toolbox(problem), []
    if effort.fitness == "accuracy":
        by_trials = TrialSearch(search, effort, rungs, settings, workers)
        if not state.fitness:
            keep_best(search.optimum.genome)
        by_trials.tell_expected_time(state)
        by_trials.choose_rate(state, lambda: state.save(state_file))
        toolbox, guesses = by_trials.operators(state)
        rungs = by_trials.left(state)
    if not state.generation:  # what else has drawn has no part in the search
        random.seed(effort.seed)
        state.random_state = None
    with search_log:
        ranked = evolve(problem, toolbox, rungs, effort.population, guesses, state, after_generation)
    return ranked, state


def best_of_finalists(
    search: Search,
    effort: Effort,
    settings: TrialSettings,
    workers: Workers,
    state: SearchState,
    ranked: list[Genome],
) -> tuple[Genome, dict[str, Any]]:
    """The best of the finalists after longer training, with what the report says of them; without any, of the search.

    Beside the best of the search these are the table's optimum, and as many of the last layers as fit.
    """
    if not effort.finalists:
        return ranked[0], {}
    problem, settings = search.problem, replace(settings, learning_rate=state.learning_rate or settings.learning_rate)
    fitness = {genome: known[1] for genome, values in state.fitness.items() if (known := fitness_of(values))}
    proxies = {genome: fitness[genome] for genome in ranked[: effort.finalists]}
    # tables and short trials mislead at times: these have their chance in any case
    for genome in (search.optimum.genome, *rules_of_thumb(problem)[:1]):
        known = problem.score(genome) if effort.fitness == "table" else fitness.get(genome)
        if known is not None:
            proxies.setdefault(genome, known)
    steps = effort.final_steps or 4 * settings.steps
    return train_finalists(problem, proxies, settings, steps, effort.final_seeds, workers)


def results_of(search: Search, best: Genome, state: SearchState, ranked: list[Genome], seed: int) -> dict[str, Any]:
    """What was found, and for comparison the optimum and as many random schemes, by the table."""
    problem, evaluations = search.problem, len(state.fitness)
    return {
        "score": problem.score(best),
        "optimum_score": search.optimum.score,
        "random_score": random_search(problem, evaluations, seed).score,
        "random_blind_score": random_search(problem, evaluations, seed, blind=True).score,
        "best_fitness": fitness_of(state.fitness[ranked[0]])[1],
        "evaluations": evaluations,
        "lost_evaluations": sum(None in values for values in state.fitness.values()),
        "memory_bytes": problem.memory_bytes(best),
        **search.facts,
    }


def finish_evolved(
    search: Search,
    best: Genome,
    state: SearchState,
    rungs: Rungs,
    report: dict[str, Any],
    made_by: Callable[[dict[str, Any]], dict[str, Any]],
    search_log: SearchLog,
) -> None:
    """Writes and draws the best scheme, and the table's optimum beside it."""
    problem, optimum, out_dir = search.problem, search.optimum, search_log.out_dir
    problem.scheme(best, made_by(report)).save(out_dir / "scheme.json")
    rule = {"rule": "proven optimum by the contribution table", "score": optimum.score}
    problem.scheme(optimum.genome, made_by(rule)).save(out_dir / "optimum.json")
    write_json(out_dir / "report.json", report)
    judged_by = "table" if report["fitness"] == "table" else report["judged_by"]
    draw_search(state, problem, optimum, rungs, judged_by, out_dir / "search.png")
    search_log.finish(report)


def finish_computed(
    search: Search,
    made_by: Callable[[dict[str, Any]], dict[str, Any]],
    search_log: SearchLog,
    started: float,
) -> dict[str, Any]:
    """Writes the scheme that the gradient says is best: no search follows."""
    problem, optimum, out_dir = search.problem, search.optimum, search_log.out_dir
    found = {
        "score": optimum.score,
        "bias_score": problem.gains_of(optimum.genome)[0],
        "memory_bytes": problem.memory_bytes(optimum.genome),
        **search.facts,
        "seconds": time.monotonic() - started,
    }
    scheme = problem.scheme(optimum.genome, made_by(found))
    scheme.save(out_dir / "scheme.json")
    report = {**found, "layers": updated_layers(problem, optimum.genome)}
    write_json(out_dir / "report.json", report)
    search_log.finish(report)
    return report
