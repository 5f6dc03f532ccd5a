"""The search by accuracy: who proposes schemes, by which trials they are judged, and at which learning rate."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean

from deap import base

from microtune.modules.search.integer_program import Genome
from microtune.modules.user_error import UserError
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.front import make_front_toolbox
from microtune.recipes.search.genetic_algorithm import good_guesses, make_toolbox
from microtune.recipes.search.learning_rate_choice import PILOTS, best_rate, pilots_among
from microtune.recipes.search.options import Effort, TrialSettings
from microtune.recipes.search.rungs import Rungs
from microtune.recipes.search.surrogate import propose_by_surrogate
from microtune.recipes.search.table_search import Search
from microtune.recipes.search.trials import fitnesses, trials
from microtune.recipes.search.workers import Workers

log = logging.getLogger(__name__)

LEFT_OUT = 0.5  # of what could be filled, where filling makes the same of all and schemes are trained
RATES_SHARE = 3  # a part of the steps that the choice of the learning rate may take
LEAST_RATES = 3


@dataclass(frozen=True)
class TrialSearch:
    """What a search by accuracy needs beside the genetic algorithm.

    Args:
        search: What is solved.
        effort: How schemes are judged.
        rungs: For how long, and how long all of it may take.
        settings: Of the trials, as long as the last rung.
        workers: Where schemes are trained.
    """

    search: Search
    effort: Effort
    rungs: Rungs
    settings: TrialSettings
    workers: Workers

    @functools.cached_property
    def guesses(self) -> list[Genome]:
        """What a search of one budget begins with, and the schemes by which the learning rate is chosen; seconds."""
        return good_guesses(self.search.problem, self.search.optimum)

    def operators(self, state: SearchState) -> tuple[base.Toolbox, list[Genome]]:
        """The operators of the genetic algorithm, and the genomes to begin with."""
        problem, guesses = self.search.problem, []
        if self.effort.front:
            toolbox, guesses = make_front_toolbox(problem, LEFT_OUT, state)
        elif self.effort.proposed_by == "random":
            toolbox = make_toolbox(problem, LEFT_OUT)
            toolbox.register("select", lambda individuals, k: [])  # without parents all are drawn
        else:
            toolbox, guesses = make_toolbox(problem, LEFT_OUT), self.guesses
            toolbox.register("propose", propose_by_surrogate, toolbox, problem)
        toolbox.register(
            "evaluate", lambda genomes, rung: self.trained(genomes, self.rungs.steps[rung], state.learning_rate)
        )
        return toolbox, guesses

    def trained(self, genomes: list[Genome], steps: int, rate: float | None) -> list[float | None]:
        """The fitness of each genome after so many steps; None where a worker was lost."""
        count, seed = self.effort.trial_seeds, self.effort.seed
        seeds = tuple(range(seed * count, (seed + 1) * count))
        return fitnesses(
            self.workers, self.settings, self.search.problem, seeds, genomes, steps, self.effort.judged_by, rate
        )

    def choose_rate(self, state: SearchState, keep: Callable[[], None]) -> None:
        """Sets the learning rate of the state, and what it took to choose one where none is given."""
        if self.settings.learning_rate is not None:
            state.learning_rate = self.settings.learning_rate
        if state.learning_rate is not None:
            return
        steps = self.rungs.steps[min(1, len(self.rungs.steps) - 1)]  # the shortest learn fastest at rates too high
        most = self.rungs.total_steps // RATES_SHARE // (PILOTS * steps)
        if most < LEAST_RATES:
            state.learning_rate = self.settings.rate
            log.warning(
                "%d steps are too few to choose a learning rate: schemes are judged at %g; give --learning_rate",
                self.rungs.total_steps, state.learning_rate,
            )  # fmt: skip
            return
        pilots = pilots_among(self.guesses)

        def fitness_at(rate: float) -> float:
            known = [value for value in self.trained(pilots, steps, rate) if value is not None]
            if not known:
                raise UserError("every evaluation was lost with its worker: the warnings above say why")
            log.info("learning rate %g: fitness %.4f in the mean of %d schemes", rate, fmean(known), len(known))
            return fmean(known)

        tried = best_rate(fitness_at, self.settings.rate, most)
        state.learning_rate = next(iter(tried))
        state.rate_steps = len(tried) * len(pilots) * steps
        log.info("schemes are judged at learning rate %g", state.learning_rate)
        keep()

    def left(self, state: SearchState) -> Rungs:
        """The rungs with what the choice of the learning rate has left of the steps."""
        return replace(self.rungs, total_steps=self.rungs.total_steps - state.rate_steps)

    def tell_expected_time(self, state: SearchState) -> None:
        """Says how long what is left will take, by a step of the table's optimum on this machine."""
        scheme = self.search.problem.scheme(self.search.optimum.genome)
        # the settings of ``measure_gradient``, whose network is still there
        one_step = trials(replace(self.settings, features="none", features_dir=None, steps=1)).step_seconds(scheme)
        steps = (self.left(state).total_steps - self.rungs.spent(state.fitness)) * self.effort.trial_seeds
        minutes = one_step * steps / self.workers.processes / 60
        shared = " of one worker" if self.workers.cluster else ""
        log.info(
            "%s optimizer steps: about %.0f min%s; the best scheme so far is in scheme.json at any time",
            f"{steps:,}", max(1, minutes), shared,
        )  # fmt: skip
