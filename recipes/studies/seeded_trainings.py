"""The trainings of a study: each done once, kept in a file of its own, at a learning rate that suits its way."""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from microtune.datamodules.contract import Split
from microtune.modules.atomic_files import write_json
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.trials import trials
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.study_folder import watched
from microtune.recipes.studies.ways import Numbers, Way

MOST_RATES = 8
MOST_HALVINGS = 4
# these decide no outcome
NOT_IN_KEY = {"data_dir", "features", "features_limit_mib", "features_dir"}


@dataclass(frozen=True)
class Case:
    """What is trained with every seed.

    Args:
        data, numbers, budget, way: As in rows of results.
    """

    data: str
    numbers: Numbers
    budget: str
    way: str

    def __str__(self) -> str:
        within = "" if self.budget == "none" else f" within {self.budget}"
        return f"{self.way} in {self.numbers}{within} on {self.data}"


@dataclass(frozen=True)
class Training:
    """One training; those that differ in their case alone are done once.

    Args:
        case: What it is called.
        way: How it is done.
        seed: Of the classifier and the order of the samples.
        settings: Of the trial.
        scheme: What is updated, as plain values.
        learning_rate: At its highest.
        is_rate_chosen: Whether that is chosen, and not given.
        warmup_fraction: Part of the steps in which it rises.
        as_recipe: Whether it is to be that of a training recipe: the seed is that of the augmentation too.
        splits: Where the accuracy is measured.
        facts: What a row of results says of the scheme.
    """

    case: Case
    way: Way
    seed: int
    settings: TrialSettings
    scheme: dict[str, Any]
    learning_rate: float
    is_rate_chosen: bool = False
    warmup_fraction: float = 0.1
    as_recipe: bool = False
    splits: tuple[Split, ...] = ("val", "test")
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe_seed(self) -> int | None:
        """As ``trials`` takes it."""
        return self.seed if self.as_recipe else None

    @property
    def key(self) -> str:
        """What is trained, as a short text."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in NOT_IN_KEY}
        scheme = {name: value for name, value in self.scheme.items() if name != "provenance"}
        trained = [
            settings, scheme, self.seed, self.recipe_seed, self.learning_rate, self.warmup_fraction,
            asdict(self.way.choice), asdict(self.way.int8_update), self.splits,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()[:20]

    def file(self, out_dir: Path) -> Path:
        """What it leaves behind when it is done."""
        return out_dir / "trainings" / f"{self.key}.json"

    def result(self, out_dir: Path) -> dict[str, Any] | None:
        """Accuracies and losses of the splits, the last loss in training and seconds, if it is done; else None.

        A loss that is no number is None.
        """
        path = self.file(out_dir)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def __str__(self) -> str:
        return f"{self.case}, seed {self.seed}"


def train_once(training: Training, path: str) -> None:
    """Trains, and writes what came out: what a worker is asked for."""
    # two busy jobs with two threads each slow one another several times (spinning OpenMP threads)
    torch.set_num_threads(1)
    started, settings = time.monotonic(), training.settings
    if training.as_recipe and settings.features_dir is not None:  # each seed augments in its own way
        settings = replace(settings, features_dir=f"{settings.features_dir}-seed{training.seed}")
    trial = trials(settings, training.recipe_seed)
    trained = trial.train(
        [UpdateScheme.from_dict(training.scheme)], training.seed, training.learning_rate,
        training.way.choice,
        training.way.int8_update, training.warmup_fraction,
    )  # fmt: skip
    splits = [split for split in training.splits if trial.features.samples[split]]
    evaluated = {split: trial.evaluate(trained, split)[0] for split in splits}
    found = {
        "training": str(training),
        "top1": {split: one.top1 for split, one in evaluated.items()},
        "cross_entropy": {split: _finite(one.cross_entropy) for split, one in evaluated.items()},
        "loss": _finite(trained[0].loss),
        "seconds": time.monotonic() - started,
    }
    write_json(path, found)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def train_all(
    trainings: Sequence[Training],
    workers: Workers,
    out_dir: Path,
    what: str,
    on_change: Callable[[], object] = lambda: None,
) -> None:
    """Does the trainings that are not done yet, those that share data one after another.

    Args:
        trainings: All, done or not.
        workers: Where they are done.
        out_dir: Folder of the study.
        what: They are, for the progress bar.
        on_change: Called whenever more of them are done.
    """
    of_key = {training.key: training for training in trainings}
    waiting = [training for training in of_key.values() if not training.file(out_dir).exists()]
    waiting.sort(key=lambda one: (json.dumps(asdict(one.settings), sort_keys=True), one.recipe_seed or 0))
    (out_dir / "trainings").mkdir(parents=True, exist_ok=True)
    with watched([training.file(out_dir) for training in of_key.values()], what, on_change):
        workers.map(train_once, waiting, [str(training.file(out_dir)) for training in waiting])


def best_rates(
    tried: dict[Case, Training], rates_of: dict[Case, Sequence[float]], seed: int, workers: Workers, out_dir: Path
) -> dict[Case, float]:
    """The learning rate with the best validation accuracy for each group of trainings.

    Where the best is the lowest or the highest, one more beyond it is tried, as far from it as the next one is, until
    the best has a worse one on either side; after ``MOST_RATES`` it is taken as it is.

    Args:
        tried: The training that stands for a group.
        rates_of: Rates that are tried first for it.
        seed: Of these trainings, another than those of the study.
        workers: Where they are done.
        out_dir: Folder of the study.

    Returns:
        The rate of each group; none of a group whose every training was lost.
    """
    rates_of = {group: sorted(rates_of[group]) for group in tried}
    chosen: dict[Case, float] = {}
    growing = set(tried)
    while growing:
        of_rate = {
            group: {rate: replace(one, seed=seed, learning_rate=rate, splits=("val",)) for rate in rates_of[group]}
            for group, one in tried.items()
        }
        train_all([one for of_group in of_rate.values() for one in of_group.values()], workers, out_dir, "rates")
        for group in list(growing):
            found = {rate: one.result(out_dir) for rate, one in of_rate[group].items()}
            known = {rate: one["top1"]["val"] for rate, one in found.items() if one is not None}
            if known:
                chosen[group] = max(known, key=lambda rate: (known[rate], -rate))
            beyond = _beyond(rates_of[group], chosen.get(group))
            if beyond is None or len(rates_of[group]) == MOST_RATES:
                growing.remove(group)
            else:
                rates_of[group] = sorted([*rates_of[group], beyond])
    return chosen


def _beyond(rates: Sequence[float], best: float | None) -> float | None:
    """The next learning rate beyond the best one, where that is the lowest or highest of several."""
    if len(rates) > 1 and best == rates[-1]:
        return best * rates[-1] / rates[-2]
    if len(rates) > 1 and best == rates[0]:
        return best * rates[0] / rates[1]
    return None


def train_until_none_diverges(
    trainings: Sequence[Training],
    workers: Workers,
    out_dir: Path,
    on_change: Callable[[Sequence[Training]], object] = lambda _: None,
) -> list[Training]:
    """Does the trainings; where one at a chosen rate diverged, those of its way and budget anew at half the rate.

    A rate that was chosen at one budget and by one seed may be too high for another. Diverged is what ends with less
    than half of the validation accuracy of the best on the same data with the same numbers; the test split decides
    nothing. A rate that was given stays.

    Args:
        trainings: With their learning rates.
        workers: Where they are done.
        out_dir: Folder of the study.
        on_change: Called with the trainings whenever more of them are done.

    Returns:
        The trainings with the rates that they have in the end, ``MOST_HALVINGS`` later at most.
    """
    trainings = list(trainings)
    for _ in range(MOST_HALVINGS):
        train_all(trainings, workers, out_dir, "trainings", functools.partial(on_change, trainings))
        diverged = _diverged(trainings, out_dir)
        if not diverged:
            return trainings
        trainings = [
            replace(one, learning_rate=one.learning_rate / 2) if one.case in diverged else one for one in trainings
        ]
    train_all(trainings, workers, out_dir, "trainings", functools.partial(on_change, trainings))
    return trainings


def _diverged(trainings: Iterable[Training], out_dir: Path) -> set[Case]:
    """The cases with chosen rates of which a training ended with less than half of the best accuracy."""
    done = [(one.case, one.result(out_dir)) for one in trainings if one.is_rate_chosen]
    known = [(case, found["top1"]["val"]) for case, found in done if found is not None]
    best: dict[tuple[str, str], float] = {}
    for case, top1 in known:
        best[case.data, case.numbers] = max(best.get((case.data, case.numbers), 0.0), top1)
    return {case for case, top1 in known if top1 < best[case.data, case.numbers] / 2}
