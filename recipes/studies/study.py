"""What a study compares: every way on every data set at every budget, as trainings and as rows of results."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from microtune.datamodules.option_names import KeepName
from microtune.datamodules.reproducible_order import data_loader
from microtune.modules.csv_rows import read_rows, write_rows
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.search.options import Effort, TrialSettings
from microtune.recipes.search.trials import network_and_data
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.options import TermOptions
from microtune.recipes.studies.result_rows import Result
from microtune.recipes.studies.scheme_search import SchemeSearch
from microtune.recipes.studies.seeded_trainings import Case, Training, best_rates
from microtune.recipes.studies.transfer_tasks import TransferTask
from microtune.recipes.studies.way_schemes import (
    SEARCH_SEED,
    WaysOfOneScheme,
    budget_by_name,
    extra_bytes,
    search_name,
    step_fit,
)
from microtune.recipes.studies.ways import Numbers, Way, numbers_of
from microtune.recipes.training.networks import DescribedNetwork


@dataclass(frozen=True)
class NetworkOnData:
    """A network that meets data.

    Args:
        described: The network.
        source: Where its weights are.
        train_samples, val_samples: How many the data has.
    """

    described: DescribedNetwork
    source: str
    train_samples: int
    val_samples: int


@dataclass(frozen=True)
class Study:
    """What is compared, from the command line.

    Args:
        tasks, ways: By name.
        numbers, budgets: Those that are asked for.
        base_depth: How deep searches look, and behind which layer features are kept.
        contributions: Table that random schemes are drawn from.
        terms: Of the trainings, with their defaults filled in; a learning rate of None is chosen from the task's.
        out_dir: Folder of everything.
    """

    tasks: dict[str, TransferTask]
    ways: dict[str, Way]
    numbers: Sequence[Numbers]
    budgets: Sequence[str]
    base_depth: int
    contributions: Path | None
    terms: TermOptions
    out_dir: Path

    def settings(self, data: str, numbers: Numbers, way: Way = Way(), bias_depth: int = 0) -> TrialSettings:  # noqa: B008
        """The settings of trainings; of schemes deeper than the base depth with the whole network in training."""
        task = self.tasks[data]
        network = self.networks[data, numbers]
        depth = len(network.described.operations.convolutions)
        is_whole = bias_depth > self.base_depth
        base_depth = depth if is_whole else min(self.base_depth, depth)
        batch_size = way.batch_size or self.terms.batch_size
        steps_per_epoch = len(data_loader(range(network.train_samples), batch_size, shuffle_seed=0))
        if self.terms.epochs is not None:
            steps = self.terms.epochs * steps_per_epoch
        else:  # as many samples, whatever the batch size
            steps = max(1, round(self.terms.steps * self.terms.batch_size / batch_size))
        copies = min(self.terms.copies, math.ceil(steps / steps_per_epoch))
        return task.trial_settings(
            numbers, base_depth=base_depth, steps=steps, batch_size=batch_size, copies=copies,
            # there is nothing to keep where nothing is frozen
            features="none" if is_whole else self.terms.features, features_limit_mib=self.terms.features_limit_mib,
            features_dir=str(self.out_dir / "features" / f"{data}-{numbers}-{base_depth}-{copies}"),
        )  # fmt: skip

    @functools.cached_property
    def networks(self) -> dict[tuple[str, Numbers], NetworkOnData]:
        """All that are trained or searched on, by data set and numbers."""
        wanted = [
            (case.data, numbers)
            for case in self.cases()
            for numbers in (case.numbers, self.ways[case.way].search_numbers)
            if numbers is not None
        ]
        found = {}
        for data, numbers in dict.fromkeys(wanted):
            settings = self.tasks[data].trial_settings(numbers, batch_size=self.terms.batch_size)
            described, module = network_and_data(settings)
            found[data, numbers] = NetworkOnData(described, settings.source, module.train_samples, module.val_samples)
        return found

    def described(self, data: str, numbers: Numbers) -> DescribedNetwork:
        """The network that meets the data."""
        return self.networks[data, numbers].described

    def ways_and_numbers(self) -> list[tuple[str, Numbers]]:
        """What is compared on each data set at each budget, in the order in which it was given."""
        return [(name, numbers) for name, way in self.ways.items() for numbers in numbers_of(way, self.numbers)]

    def cases(self) -> Iterator[Case]:
        """All that is compared; a way that no budget concerns stands there once."""
        for data in self.tasks:
            for numbers in ("fp32", "int8"):
                for budget in dict.fromkeys(["none", *self.budgets]):
                    for name, way in self.ways.items():
                        wanted = self.budgets if way.has_budget else ["none"]
                        if numbers in numbers_of(way, self.numbers) and budget in wanted:
                            yield Case(data, numbers, budget, name)

    def cases_of_one_scheme(self) -> list[tuple[list[Case], WaysOfOneScheme]]:
        """The cases that share a scheme, with their ways."""
        groups: dict[tuple[str, Numbers, str, Way], list[Case]] = {}
        for case in self.cases():
            groups.setdefault((case.data, case.numbers, case.budget, self.ways[case.way].source), []).append(case)
        return [
            (
                cases,
                WaysOfOneScheme(
                    self.described(data, numbers), budget_by_name(budget), {c.way: self.ways[c.way] for c in cases}
                ),
            )
            for (data, numbers, budget, _), cases in groups.items()
        ]

    def search_of(self, case: Case) -> SchemeSearch:
        """The search for the scheme of a case."""
        source, task = self.ways[case.way].source, self.tasks[case.data]
        numbers = source.search_numbers or case.numbers
        depth = len(self.described(case.data, numbers).operations.convolutions)
        features: KeepName = "none"  # a gradient looks at some hundred samples
        effort = Effort(seed=SEARCH_SEED)
        if source.scheme == "accuracy":
            features = self.terms.features
            effort = replace(effort, fitness="accuracy", evaluations=source.evaluations, finalists=0)
        settings = task.trial_settings(
            numbers, base_depth=min(self.base_depth, depth), batch_size=self.terms.batch_size,
            learning_rate=task.middle_rate, features=features, features_limit_mib=self.terms.features_limit_mib,
            # other steps see other augmented copies: not the folder of the trainings
            features_dir=str(self.out_dir / "features" / f"{case.data}-{numbers}-searches"),
        )  # fmt: skip
        folder = self.out_dir / "searches" / f"{case.data}-{numbers}-{case.budget}-{search_name(source)}"
        return SchemeSearch(settings, case.budget, folder, effort, source.level, source.channel_multiple)

    def rate_of(self, data: str, way: Way) -> float:
        """The learning rate of a way where none is chosen for it, in proportion to its batch size."""
        base = self.tasks[data].middle_rate if self.terms.learning_rate is None else self.terms.learning_rate
        return way.learning_rate or base * self.share_of_batch(way)

    def chooses_rate(self, way: Way) -> bool:
        """Whether the learning rate of a way is chosen, and not given."""
        return self.terms.learning_rate is None and way.learning_rate is None

    def share_of_batch(self, way: Way) -> float:
        """The batch size of a way as a part of the study's."""
        return (way.batch_size or self.terms.batch_size) / self.terms.batch_size


def trainings_of(
    study: Study, schemes: dict[Case, Sequence[UpdateScheme]], search_seconds: dict[Case, float]
) -> list[Training]:
    """A training of each case for each seed.

    Args:
        study: What is compared.
        schemes: Of the cases, one for each seed; a case whose search failed has none.
        search_seconds: Which it took to find them, where that is not 0.
    """
    trainings = []
    for case in study.cases():
        way, described = study.ways[case.way], study.described(case.data, case.numbers)
        for seed, scheme in enumerate(schemes.get(case, ())):
            facts = facts_of(described, scheme, way) | {"search_seconds": search_seconds.get(case, 0.0)}
            settings = study.settings(case.data, case.numbers, way, scheme.bias_depth)
            of_way = study.rate_of(case.data, way), study.chooses_rate(way), study.terms.warmup_fraction
            as_recipe = study.terms.epochs is not None
            trainings.append(Training(case, way, seed, settings, scheme.to_dict(), *of_way, as_recipe, facts=facts))
    return trainings


def facts_of(described: DescribedNetwork, scheme: UpdateScheme, way: Way) -> dict[str, Any]:
    """What a row of results says of a scheme."""
    return {
        "extra_memory_bytes": extra_bytes(described, scheme),
        "peak_memory_bytes": float(step_fit(described, scheme, way).peak_bytes),
        "bias_depth": scheme.bias_depth,
        "updated_layers": len(scheme.weights),
        "updated_channels": sum(scheme.updated_channels(one) for one in described.operations.convolutions),
    }


def with_chosen_rates(study: Study, trainings: Sequence[Training], workers: Workers) -> list[Training]:
    """The trainings at the learning rates that are chosen for their ways; without those that no rate was found for."""

    def group(case: Case, way: str) -> Case:
        has_budget = study.terms.rate_budget is None and study.ways[way].has_budget
        return replace(case, way=way, budget=case.budget if has_budget else "any")

    tried: dict[Case, Training] = {}
    for training in sorted(trainings, key=lambda one: one.case.budget != study.terms.rate_budget):
        if training.is_rate_chosen and training.way.rate_of is None:
            tried.setdefault(group(training.case, training.case.way), training)
    rates_of = {
        key: [rate * study.share_of_batch(one.way) for rate in study.tasks[key.data].learning_rates]
        for key, one in tried.items()
    }
    rates = best_rates(tried, rates_of, SEARCH_SEED, workers, study.out_dir)
    rated = []
    for training in trainings:
        other = training.way.rate_of or training.case.way
        if not training.is_rate_chosen:
            rated.append(training)
        elif (rate := rates.get(group(training.case, other))) is not None:
            share = study.share_of_batch(training.way) / study.share_of_batch(study.ways[other])
            rated.append(replace(training, learning_rate=rate * share))
    return rated


def row_of(training: Training, out_dir: Path) -> Result | None:
    """What came out of a training, if it is done and did not diverge."""
    found = training.result(out_dir)
    if found is None or found["loss"] is None:
        return None
    return Result(
        **asdict(training.case),
        criterion=training.way.criterion,
        rechoose_every=training.way.rechoose_every,
        seed=training.seed,
        top1=found["top1"]["test"],
        val_top1=found["top1"].get("val"),
        learning_rate=training.learning_rate,
        steps=training.settings.steps,
        batch_size=training.settings.batch_size,
        train_seconds=round(found["seconds"], 1),
        **training.facts,
    )


def keep_results(study: Study, trainings: Sequence[Training]) -> list[Result]:
    """The rows of all trainings that are done; ``results.csv`` has them, beside those of ways that it had before."""
    path = study.out_dir / "results.csv"
    rows = [row for training in trainings if (row := row_of(training, study.out_dir)) is not None]
    ours = {
        (case.data, case.numbers, case.way, case.budget, seed)
        for case in study.cases()
        for seed in range(study.terms.seeds)
    }
    kept = read_rows(path, Result) if path.exists() else []
    write_rows(path, [*(row for row in kept if row.key not in ours), *rows], Result)
    return rows


def missing_from(study: Study, trainings: Sequence[Training]) -> list[str]:
    """What is not there of what was asked for, in words, with the reason."""
    lines, planned = [], {(one.case, one.seed): one for one in trainings}
    for case, seed in itertools.product(study.cases(), range(study.terms.seeds)):
        training = planned.get((case, seed))
        found = None if training is None else training.result(study.out_dir)
        if training is None:
            lines.append(f"{case}, seed {seed}: no scheme or learning rate was found for it")
        elif found is None:
            lines.append(f"{training}: lost with its worker; the same command tries again")
        elif found["loss"] is None:
            lines.append(f"{training}: diverged at learning rate {training.learning_rate:g}: give it a smaller one")
    return lines
