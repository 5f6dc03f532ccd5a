"""The trials that a contribution table is made of: which there are, who makes them, and what gains they say."""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import Field

from microtune.modules.csv_rows import read_rows, write_rows
from microtune.modules.networks.operations import Convolution
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.search.short_training import TrialTraining
from microtune.modules.sparse_update.simple_schemes import is_expanding
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.shared_folder import CLAIMS
from microtune.recipes.training.networks import DescribedNetwork
from microtune.recipes.training.pictures import drawn


@dataclass(frozen=True)
class Update:
    """What one row of the table measures: a bias depth, or a layer's weight at a ratio over the base depth."""

    kind: str
    bias_depth: int
    layer: str = ""
    ratio: float = 0.0

    def scheme(self, network: str) -> UpdateScheme:
        """The update as a scheme."""
        return UpdateScheme(network, self.bias_depth, {self.layer: self.ratio} if self.layer else {})

    def __str__(self) -> str:
        return f"{self.ratio:g} of {self.layer}" if self.layer else f"biases of the last {self.bias_depth}"


@dataclass(frozen=True)
class Trial:
    """One short fine-tuning: a row of ``trials.csv``."""

    kind: Literal["bias", "weight"]
    bias_depth: int
    layer: str
    ratio: float
    seed: int
    val_top1: Annotated[float, Field(ge=0, le=1)]

    @property
    def update(self) -> Update:
        """What was trained."""
        return Update(self.kind, self.bias_depth, self.layer, self.ratio)


def updates_to_measure(
    described: DescribedNetwork,
    base_depth: int,
    layers: str | Sequence[str],
    ratios: Iterable[float],
    bias_depths: Iterable[int] | None,
) -> list[Update]:
    """What to measure, the references of all gains first: the classifier alone, and the biases of the base depth.

    Args:
        described: The network.
        base_depth: Deepest bias depth.
        layers: Layers whose weights are updated: ``"expanding"``, ``"all"``, or their names.
        ratios: Update ratios of the weights.
        bias_depths: Bias depths; None for all down to the base depth.

    Raises:
        UserError: The network has no such layers, or a ratio is none of theirs.
    """
    convolutions = described.operations.convolutions
    if not 1 <= base_depth <= len(convolutions):
        raise UserError(f"base_depth is {base_depth}: give 1 to {len(convolutions)}, the network's convolutions")
    depths = range(1, base_depth) if bias_depths is None else bias_depths
    updates = [Update("bias", depth) for depth in dict.fromkeys((0, base_depth, *depths))]
    for layer in chosen_layers(convolutions, base_depth, layers):
        for ratio in sorted(set(ratios)):
            updates.append(Update("weight", base_depth, layer.name, ratio))
            updates[-1].scheme(described.name).check(convolutions)
    return updates


def chosen_layers(
    convolutions: Sequence[Convolution], base_depth: int, layers: str | Sequence[str]
) -> list[Convolution]:
    """The layers within the base depth that ``layers`` means, in forward order."""
    within = convolutions[len(convolutions) - base_depth :]
    if layers in ("expanding", "all"):
        return [layer for layer in within if layers == "all" or is_expanding(layer)]
    for name in layers:
        if name not in [layer.name for layer in within]:
            raise UserError(f"{name} is no convolution within base depth {base_depth}: the first is {within[0].name}")
    return [layer for layer in within if layer.name in layers]


def measure(
    updates: Sequence[Update],
    training: TrialTraining,
    network: str,
    seeds: int,
    side_by_side: int,
    out_dir: Path,
) -> Iterator[Trial]:
    """Trains what no other process has trained or is training; yields every trial once it is written."""
    starts = range(2, len(updates), side_by_side)
    groups = [tuple(updates[:2]), *(tuple(updates[start : start + side_by_side]) for start in starts)]
    while missing := [group for group in groups if missing_seeds(group, read_trials(out_dir), seeds)]:
        claimed = False
        for group in missing:
            # the references are in every gain: wait for whoever is at them
            with claim(out_dir, group[0], wait=group is groups[0]) as is_mine:
                for seed in missing_seeds(group, read_trials(out_dir), seeds) if is_mine else ():
                    claimed = True
                    top1 = training.accuracies([update.scheme(network) for update in group], seed)
                    made = [Trial(*astuple(update), seed, value) for update, value in zip(group, top1, strict=True)]
                    write_trials(out_dir, made, updates, seeds)
                    yield from made
        if not claimed:
            time.sleep(1)  # others are at all that is left


def missing_seeds(group: Iterable[Update], known: Sequence[Trial], seeds: int) -> list[int]:
    """The seeds with which some update of the group was not yet trained."""
    done = {(trial.update, trial.seed) for trial in known}
    return [seed for seed in range(seeds) if any((update, seed) not in done for update in group)]


@contextmanager
def claim(out_dir: Path, first: Update, wait: bool) -> Iterator[bool]:
    """Whether this process may train the group that begins so; the system lets go of the claim if the process dies."""
    lock = FileLock(out_dir / CLAIMS / f"{first.bias_depth}-{first.layer}-{first.ratio:g}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def read_trials(out_dir: Path) -> list[Trial]:
    """The trials made so far, by all processes."""
    path = out_dir / "trials.csv"
    return read_rows(path, Trial, remedy=", or remove the file to measure anew") if path.exists() else []


def write_trials(out_dir: Path, made: Sequence[Trial], updates: Sequence[Update], seeds: int) -> None:
    """Adds trials to ``trials.csv``, and writes the rows of ``contributions.csv`` that are complete by now."""
    with FileLock(out_dir / CLAIMS / "trials.lock"):
        known = list(dict.fromkeys([*read_trials(out_dir), *made]))
        write_rows(out_dir / "trials.csv", known, Trial)
        rows = contributions_of(known, updates, seeds)
        if rows:
            ContributionTable(tuple(rows)).save(out_dir / "contributions.csv")


def contributions_of(known: Sequence[Trial], updates: Sequence[Update], seeds: int) -> list[Contribution]:
    """The gains of all updates that were trained with every seed; the references of a seed are trained first."""
    top1 = {(trial.update, trial.seed): trial.val_top1 for trial in known}
    classifier, base = updates[:2]
    rows = []
    for update in updates[1:]:
        reference = base if update.layer else classifier
        pairs = [(top1.get((update, seed)), top1.get((reference, seed))) for seed in range(seeds)]
        if any(value is None for pair in pairs for value in pair):
            continue
        gains = [value - before for value, before in pairs]
        std = statistics.stdev(gains) if seeds > 1 else 0.0
        rows.append(Contribution(*astuple(update), gain=statistics.mean(gains), gain_std=std, runs=seeds))
    return rows


def draw_contributions(table: ContributionTable, convolutions: Sequence[Convolution], path: Path) -> None:
    """Draws the gains over bias depth, and per layer and ratio, with their standard errors, as a PNG."""
    from matplotlib import colormaps  # imported by need, as all of matplotlib

    with drawn(path, 1, 2, figsize=(13, 4.5), gridspec_kw={"width_ratios": [1, 1.6]}) as (left, right):
        bias = sorted((row for row in table.rows if row.kind == "bias"), key=lambda row: row.bias_depth)
        left.errorbar(
            [row.bias_depth for row in bias], [row.gain * 100 for row in bias],
            [row.standard_error * 100 for row in bias], fmt="o-", markersize=3, linewidth=1, capsize=2,
        )  # fmt: skip
        left.set(xlabel="bias depth", ylabel="gain over the classifier only, points", title="biases of the last layers")
        weights = [row for row in table.rows if row.kind == "weight"]
        names = [layer.name for layer in convolutions if layer.name in {row.layer for row in weights}]
        ratios = sorted({row.ratio for row in weights})
        for index, ratio in enumerate(ratios):
            rows = [row for row in weights if row.ratio == ratio]
            places = [names.index(row.layer) + (index - (len(ratios) - 1) / 2) * 0.8 / len(ratios) for row in rows]
            color = colormaps["viridis"](0.9 - 0.8 * index / max(1, len(ratios) - 1))
            right.bar(
                places, [row.gain * 100 for row in rows], 0.8 / len(ratios), color=color, label=f"{ratio:g}",
                yerr=[row.standard_error * 100 for row in rows], error_kw={"linewidth": 0.7},
            )  # fmt: skip
        right.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        right.set(ylabel=f"gain over the last {table.base_depth} biases, points", title="weights, by update ratio")
        if weights:
            right.legend(title="ratio", fontsize=8)
        for axes in (left, right):
            axes.axhline(0, color="black", linewidth=0.6)
