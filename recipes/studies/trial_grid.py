"""Many short trainings of a comparison: each done once, kept in a file of its own."""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microtune.datamodules.contract import Split
from microtune.modules.atomic_files import write_json
from microtune.modules.search.short_training import Choice
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.trials import trials
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.watched_files import watched

VALIDATED: tuple[Split, ...] = ("val",)
TESTED: tuple[Split, ...] = ("val", "test")
MOST_RATES = 8
MOST_HALVINGS = 4
# where the features lie decides no outcome
NOT_IN_KEY = {"features", "features_limit_mib", "features_dir"}


@dataclass(frozen=True)
class Cell:
    """One training of a grid.

    Args:
        labels: The columns that name it in the CSV; cells that differ in nothing else are trained once.
        settings: Of the trial.
        scheme: What is updated, as plain values.
        seed: Of the fresh classifier and the order of the samples.
        learning_rate: At its highest.
        choice: Of the channels that the scheme does not fix.
        splits: Where the accuracy is measured.
    """

    labels: dict[str, Any]
    settings: TrialSettings
    scheme: dict[str, Any]
    seed: int
    learning_rate: float
    choice: Choice = Choice()  # noqa: RUF009, it is frozen
    splits: tuple[Split, ...] = TESTED

    @property
    def key(self) -> str:
        """What is trained, as a short text."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in NOT_IN_KEY}
        scheme = {name: value for name, value in self.scheme.items() if name != "provenance"}
        trained = [settings, scheme, self.seed, self.learning_rate, asdict(self.choice), self.splits]
        return hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()[:20]

    def file(self, out_dir: Path) -> Path:
        """What it leaves behind when it is done."""
        return out_dir / "cells" / f"{self.key}.json"


def train_cell(cell: Cell, path: str) -> None:
    """Trains, and writes the accuracies: what a worker is asked for."""
    # two busy jobs with two threads each slow one another several times (spinning OpenMP threads)
    torch.set_num_threads(1)
    started = time.monotonic()
    found = trials(cell.settings).accuracies_on(
        cell.splits, [UpdateScheme.from_dict(cell.scheme)], cell.seed, cell.learning_rate, cell.choice
    )
    accuracies = {split: values[0] for split, values in found.items()}
    write_json(path, {"labels": cell.labels, "top1": accuracies, "seconds": time.monotonic() - started})


def train_cells(cells: Sequence[Cell], workers: Workers, out_dir: Path, what: str) -> None:
    """Trains the cells that are not done yet, those that share data one after another.

    Args:
        cells: All, done or not.
        workers: Where they are trained.
        out_dir: Of the comparison.
        what: They are, for the progress bar.
    """
    of_key = {cell.key: cell for cell in cells}
    waiting = [cell for cell in of_key.values() if not cell.file(out_dir).exists()]
    waiting.sort(key=lambda cell: json.dumps(asdict(cell.settings), sort_keys=True))
    (out_dir / "cells").mkdir(parents=True, exist_ok=True)
    with watched([cell.file(out_dir) for cell in of_key.values()], what):
        workers.map(train_cell, waiting, [str(cell.file(out_dir)) for cell in waiting])


def result(cell: Cell, out_dir: Path) -> dict[str, Any] | None:
    """Accuracies and seconds of a cell that is done; None of another."""
    path = cell.file(out_dir)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def best_rates(
    cells: Iterable[Cell], rates: Sequence[float], seed: int, group: Sequence[str], workers: Workers, out_dir: Path
) -> dict[tuple[Any, ...], float]:
    """The learning rate with the best validation accuracy for each group of cells, by one cell of each.

    Where the best is the lowest or the highest, one more beyond it is tried, as far from it as the next one is, until
    the best has a worse one on either side; after ``MOST_RATES`` it is taken as it is.

    Args:
        cells: The first of a group stands for it.
        rates: What is tried first.
        seed: Of these trainings, another than those of the cells.
        group: Labels of which cells of one group have the same.
        workers: Where they are trained.
        out_dir: Of the comparison.

    Returns:
        The rate for each group's values of these labels; none of a group whose every training was lost.
    """
    first: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        first.setdefault(_values(cell, group), cell)
    tried = {values: sorted(rates) for values in first}
    chosen: dict[tuple[Any, ...], float] = {}
    growing = set(first)
    while growing:
        of_rate = {
            values: {rate: replace(first[values], seed=seed, learning_rate=rate, splits=VALIDATED) for rate in of_group}
            for values, of_group in tried.items()
        }
        train_cells([cell for group in of_rate.values() for cell in group.values()], workers, out_dir, "learning rates")
        for values in list(growing):
            found = {rate: result(cell, out_dir) for rate, cell in of_rate[values].items()}
            known = {rate: one["top1"]["val"] for rate, one in found.items() if one is not None}
            if known:
                chosen[values] = max(known, key=lambda rate: (known[rate], -rate))
            beyond = _beyond(tried[values], chosen.get(values))
            if beyond is None or len(tried[values]) == MOST_RATES:
                growing.remove(values)
            else:
                tried[values] = sorted([*tried[values], beyond])
    return chosen


def train_until_none_diverges(
    cells: Sequence[Cell], group: Sequence[str], like: Sequence[str], workers: Workers, out_dir: Path
) -> list[Cell]:
    """Trains the cells, and those of a group anew at half the learning rate where one of them diverged.

    A rate that was chosen at one budget and by one seed may be too high for another. Diverged is what ends with less
    than half of the validation accuracy of the best cell that it is like; the test split decides nothing.

    Args:
        cells: With their learning rates.
        group: Labels of which cells of one group have the same, and so the same rate.
        like: Labels of which cells that are alike have the same.
        workers: Where they are trained.
        out_dir: Of the comparison.

    Returns:
        The cells with the rates that they were trained with in the end, ``MOST_HALVINGS`` later at most.
    """
    cells = list(cells)
    for _ in range(MOST_HALVINGS):
        train_cells(cells, workers, out_dir, "trainings")
        diverged = _diverged(cells, group, like, out_dir)
        if not diverged:
            return cells
        cells = [
            replace(cell, learning_rate=cell.learning_rate / 2) if _values(cell, group) in diverged else cell
            for cell in cells
        ]
    train_cells(cells, workers, out_dir, "trainings")
    return cells


def _diverged(cells: Sequence[Cell], group: Sequence[str], like: Sequence[str], out_dir: Path) -> set[tuple[Any, ...]]:
    """The groups of which a cell ended with less than half of the accuracy of the best that it is like."""
    top1 = {cell.key: found["top1"]["val"] for cell in cells if (found := result(cell, out_dir)) is not None}
    best: dict[tuple[Any, ...], float] = {}
    for cell in cells:
        best[_values(cell, like)] = max(best.get(_values(cell, like), 0.0), top1.get(cell.key, 0.0))
    return {
        _values(cell, group) for cell in cells if cell.key in top1 and top1[cell.key] < best[_values(cell, like)] / 2
    }


def _values(cell: Cell, group: Sequence[str]) -> tuple[Any, ...]:
    return tuple(cell.labels[name] for name in group)


def _beyond(rates: Sequence[float], best: float | None) -> float | None:
    """The next learning rate beyond the best one, where that is the lowest or highest of several."""
    if len(rates) > 1 and best == rates[-1]:
        return best * rates[-1] / rates[-2]
    if len(rates) > 1 and best == rates[0]:
        return best * rates[0] / rates[1]
    return None
