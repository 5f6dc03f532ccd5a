"""What prunings by several criteria show: rank correlations, pictures, tables and a verdict by stated rules."""

import functools
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from microtune.recipes.studies.student_interval import CONFIDENCE, interval
from microtune.recipes.training.memory_figures import KIB
from microtune.recipes.training.pictures import drawn

UNPRUNED = "unpruned"
RESAMPLES = 2000  # of the bootstrap: the ends of its interval vary by about a hundredth
TARGETS = {"loss_increase": "loss increase", "accuracy_lost": "accuracy lost"}
KINDS = ("all", "expanded", "residual_stream")


@dataclass(frozen=True)
class PrunedRow:
    """One pruned network: a row of ``pruning.csv``.

    Args:
        criterion: By which units were removed, or unpruned.
        sparsity: Part of the multiply-accumulates that was to be removed.
        seed: Of the random order, and of the batches of the fine-tuning.
        fine_tuned: Whether it was.
        top1: On the test split.
        val_top1: On the validation split.
        multiply_accumulates: Of a forward pass.
        parameters: All of them.
        flash_bytes: Of the int8 network: weights 1 byte each, biases 4, the classifier among them.
        peak_bytes: SRAM of an int8 forward pass, at its peak.
        latency_ms: Of one sample on one core, in floating point; the median of many.
        latency_ratio: The same over that of the unpruned network, measured in turns with it.
        batch_latency_ratio: The same of 32 samples at once, where PyTorch's own work per layer weighs less.
    """

    criterion: str
    sparsity: float
    seed: int
    fine_tuned: bool
    top1: float
    val_top1: float
    multiply_accumulates: int
    parameters: int
    flash_bytes: int
    peak_bytes: int
    latency_ms: float
    latency_ratio: float
    batch_latency_ratio: float

    @property
    def key(self) -> tuple[str, float, int, bool]:
        """What is pruned and trained."""
        return self.criterion, self.sparsity, self.seed, self.fine_tuned


@dataclass(frozen=True)
class SingleUnit:
    """One unit that was removed alone: a row of ``single_units.csv``, with the scores of ``single_unit_type``.

    Args:
        group: Name of its group.
        kind: Of the group.
        channel: Its number.
        loss_increase: Of the mean loss on the validation split.
        accuracy_lost: Of the top-1 on it.
    """

    group: str
    kind: str
    channel: int
    loss_increase: float
    accuracy_lost: float


@functools.cache
def single_unit_type(*criteria: str) -> type[SingleUnit]:
    """``SingleUnit`` with one more field for each criterion: the unit's score by it."""
    return make_dataclass("SingleUnit", [(name, float) for name in criteria], bases=(SingleUnit,), frozen=True)


def correlations(units: Sequence[SingleUnit], criteria: Sequence[str]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of each criterion with each target, over all units and those of a kind.

    The intervals are of a bootstrap over units, with the same resamples for all criteria, so that the differences from
    the first criterion are paired.

    Args:
        units: Removed alone.
        criteria: The first is what the others are compared with.
    """
    entries = []
    for kind in KINDS:
        chosen = [unit for unit in units if kind in ("all", unit.kind)]
        if len(chosen) < 3:
            continue
        resamples = np.random.default_rng(0).integers(len(chosen), size=(RESAMPLES, len(chosen)))
        rows = np.concatenate([np.arange(len(chosen))[None], resamples])
        for target in TARGETS:
            truth = _ranks(np.array([getattr(unit, target) for unit in chosen])[rows])
            rhos = {
                name: _pearson(_ranks(np.array([getattr(unit, name) for unit in chosen])[rows]), truth)
                for name in criteria
            }
            for name in criteria:
                entry = {"kind": kind, "target": target, "criterion": name, "units": len(chosen)}
                entry |= {"rho": _number(rhos[name][0]), "interval": _percentiles(rhos[name][1:])}
                if name != criteria[0]:
                    difference = rhos[criteria[0]] - rhos[name]
                    entry["difference"] = _number(difference[0])
                    entry["difference_interval"] = _percentiles(difference[1:])
                entries.append(entry)
    return entries


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.stats import rankdata  # a second, which a command line need not wait for

    return rankdata(values, axis=1)


def _pearson(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The correlation of each row; not a number where all values of a row are equal."""
    left, right = (values - values.mean(axis=1, keepdims=True) for values in (left, right))
    with np.errstate(invalid="ignore"):
        return (left * right).sum(1) / np.sqrt((left**2).sum(1) * (right**2).sum(1))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float] | None:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    tail = 100 * (1 - CONFIDENCE) / 2
    return float(np.percentile(finite, tail)), float(np.percentile(finite, 100 - tail))


def curves(rows: Sequence[PrunedRow], criteria: Sequence[str]) -> list[dict[str, Any]]:
    """Of each criterion and sparsity the means over the seeds, and by how much the first criterion is better.

    The difference of fine-tuned networks is paired over the seeds, as is its interval; without fine-tuning only a
    random order has more than one network, and the difference is one of means.

    Args:
        rows: All that were measured.
        criteria: The first is what the others are compared with.
    """
    entries = []
    for fine_tuned in (False, True):
        for sparsity in sorted({row.sparsity for row in rows}):
            those = [row for row in rows if (row.fine_tuned, row.sparsity) == (fine_tuned, sparsity)]
            first = {row.seed: row.top1 for row in those if row.criterion == criteria[0]}
            for name in (UNPRUNED, *criteria):
                own = {row.seed: row for row in those if row.criterion == name}
                if own:
                    others = first if name != criteria[0] else {}
                    entries.append(_curve_entry(name, sparsity, fine_tuned, own, others))
    return entries


def _curve_entry(
    name: str, sparsity: float, fine_tuned: bool, own: Mapping[int, PrunedRow], first: Mapping[int, float]
) -> dict[str, Any]:
    top1 = {seed: row.top1 for seed, row in own.items()}
    entry: dict[str, Any] = {"criterion": name, "sparsity": sparsity, "fine_tuned": fine_tuned, "top1": top1}
    for column in ("top1", "val_top1", "multiply_accumulates", "parameters", "flash_bytes", "peak_bytes",
                   "latency_ms", "latency_ratio", "batch_latency_ratio"):  # fmt: skip
        entry[f"{column}_mean"] = statistics.mean(getattr(row, column) for row in own.values())
    entry["top1_std"] = statistics.stdev(top1.values()) if len(top1) > 1 else None
    if first:
        both = [seed for seed in first if seed in top1]
        differences = [first[seed] - top1[seed] for seed in both]
        entry["difference"] = statistics.mean(first.values()) - entry["top1_mean"]
        entry["interval"] = interval(differences) if fine_tuned else None
    return entry


def verdicts(report: dict[str, Any]) -> list[str]:
    """What the data say of the first criterion, in sentences.

    It describes what inference can do without if the interval of its correlation with the loss increase is above zero;
    it does so better or worse than another criterion if the interval of their difference does not hold zero.
    """
    sentences = []
    first = report["criteria"][0]
    for kind in KINDS:
        entries = {
            entry["criterion"]: entry
            for entry in report["correlations"]
            if (entry["kind"], entry["target"]) == (kind, "loss_increase")
        }
        if not entries or entries[first]["interval"] is None:
            continue
        low, high = entries[first]["interval"]
        does = "it describes" if low > 0 else "it describes the opposite of" if high < 0 else "it does not describe"
        ranked = "; ".join(_compared(entry, name) for name, entry in entries.items() if name != first)
        units = f"{entries[first]['units']} {'' if kind == 'all' else kind.replace('_', ' ') + ' '}units"
        sentences.append(
            f"{first} ranks the loss increase of removing single units with rho = {entries[first]['rho']:.2f} "
            f"({low:.2f} to {high:.2f}) over {units}: {does} what inference can do without ({ranked})"
        )
    for fine_tuned in (False, True):
        sentences += _verdict_of_prunings(report, first, fine_tuned)
    return sentences


def _compared(entry: dict[str, Any], name: str) -> str:
    """How another criterion does, and how the first one is beside it."""
    if entry["rho"] is None or entry["difference_interval"] is None:
        return f"{name} has no ranks"
    low, high = entry["difference_interval"]
    how = "better than" if low > 0 else "worse than" if high < 0 else "not to be told from"
    return f"{how} {name} with {entry['rho']:.2f}"


def _verdict_of_prunings(report: dict[str, Any], first: str, fine_tuned: bool) -> list[str]:
    sentences = []
    for name in report["criteria"][1:]:
        entries = [
            entry
            for entry in report["prunings"]
            if (entry["criterion"], entry["fine_tuned"]) == (name, fine_tuned) and "difference" in entry
        ]
        if not entries:
            continue
        points = ", ".join(_points(entry) for entry in entries)
        when = "after fine-tuning" if fine_tuned else "without fine-tuning"
        sentences.append(f"pruned by {first}, the top-1 {when} differs from {name}'s by {points} points")
    return sentences


def _points(entry: dict[str, Any]) -> str:
    low_and_high = entry["interval"]
    text = f"{entry['difference'] * 100:+.1f}"
    if low_and_high is not None:
        text += f" ({low_and_high[0] * 100:+.1f} to {low_and_high[1] * 100:+.1f})"
    return f"{text} at {entry['sparsity']:g}"


def draw_prunings(report: dict[str, Any], title: str, path: Path) -> None:
    """Draws accuracy over multiply-accumulates, without and with fine-tuning: means, and ranges over seeds."""
    tuned = [flag for flag in (False, True) if any(entry["fine_tuned"] == flag for entry in report["prunings"])]
    with drawn(path, 1, len(tuned), figsize=(6 * len(tuned), 4.5), sharey=True, squeeze=False) as panels:
        for axes, fine_tuned in zip(panels[0], tuned, strict=True):
            entries = [entry for entry in report["prunings"] if entry["fine_tuned"] == fine_tuned]
            unpruned = [entry for entry in entries if entry["criterion"] == UNPRUNED]
            for index, name in enumerate(report["criteria"]):
                own = unpruned + [entry for entry in entries if entry["criterion"] == name]
                own.sort(key=lambda entry: entry["multiply_accumulates_mean"])
                x = [entry["multiply_accumulates_mean"] / 1e6 for entry in own]
                color = "grey" if name == "random" else f"C{index}"
                axes.plot(x, [entry["top1_mean"] * 100 for entry in own], "o-", color=color, label=name, markersize=4)
                low, high = ([limit(entry["top1"].values()) * 100 for entry in own] for limit in (min, max))
                axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            when = f"after {report['fine_tuning_steps']} steps of fine-tuning" if fine_tuned else "without fine-tuning"
            axes.set(xlabel="multiply-accumulates, millions", title=when)
            axes.grid(linewidth=0.4)
        panels[0][0].set_ylabel("top-1 on the test split, %")
        panels[0][-1].legend(fontsize=8, loc="lower right")
        panels[0][0].figure.suptitle(title)


def draw_single_units(units: Sequence[SingleUnit], report: dict[str, Any], path: Path) -> None:
    """Draws the loss increase of every unit over its score by each criterion, with Spearman's rho."""
    criteria = report["criteria"]
    columns = min(3, len(criteria))
    lines = -(-len(criteria) // columns)
    with drawn(path, lines, columns, figsize=(4.3 * columns, 3.6 * lines), sharey=True, squeeze=False) as panels:
        # linear around zero, where half of the units are, and logarithmic beyond
        around_zero = max(float(np.median([abs(unit.loss_increase) for unit in units])), 1e-9)
        for axes, name in zip(panels.flat, criteria, strict=False):
            # dead units, whose scores are next to nothing, are drawn at the left edge
            least = float(np.percentile([getattr(unit, name) for unit in units], 3)) / 3
            for kind, color, marker in (("expanded", "tab:blue", "."), ("residual_stream", "tab:red", "x")):
                own = [unit for unit in units if unit.kind == kind]
                x, y = [max(getattr(unit, name), least) for unit in own], [unit.loss_increase for unit in own]
                axes.scatter(x, y, s=18, color=color, marker=marker, linewidths=0.8, label=kind.replace("_", " "))
            if name != "random":
                axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=around_zero)
            axes.axhline(0, color="black", linewidth=0.6)
            entry = next(
                one
                for one in report["correlations"]
                if (one["criterion"], one["target"], one["kind"]) == (name, "loss_increase", "all")
            )
            rho = "no rank correlation" if entry["rho"] is None else f"rho = {entry['rho']:.2f}"
            axes.set(xlabel=f"{name} of the unit", title=rho)
            axes.grid(linewidth=0.3)
        for axes in panels.flat[len(criteria) :]:
            axes.set_visible(False)
        for line in panels:
            line[0].set_ylabel("loss increase without the unit")
        panels[0][0].legend(fontsize=8)


def print_report(report: dict[str, Any], out_dir: Path) -> None:
    """Prints the tables, the verdict, and where the results lie."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    if report["correlations"]:
        console.print(_correlation_table(report))
    console.print(_pruning_table(report))
    for sentence in report["verdict"]:
        print(f"- {sentence}")
    print(f"results: {out_dir / 'pruning.csv'}, report: {out_dir / 'report.json'}, {report['seconds']:.0f} s")


def _correlation_table(report: dict[str, Any]) -> Table:
    table = Table("criterion", title="Spearman's rank correlation with removing a single unit (95 % interval)")
    columns = [(target, kind) for target in TARGETS for kind in KINDS]
    for target, kind in columns:
        table.add_column(f"{TARGETS[target]}, {kind.replace('_', ' ')}", justify="right")
    found = {(entry["criterion"], entry["target"], entry["kind"]): entry for entry in report["correlations"]}
    for name in report["criteria"]:
        table.add_row(name, *(_rho(found.get((name, *column))) for column in columns))
    return table


def _rho(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["rho"] is None:
        return ""
    return f"{entry['rho']:+.2f} ({entry['interval'][0]:+.2f} to {entry['interval'][1]:+.2f})"


def _pruning_table(report: dict[str, Any]) -> Table:
    table = Table("criterion", title="Pruned networks: means over the seeds; top-1 on the test split")
    for column in ("sparsity", "top-1, %", "fine-tuned, %", "MACs, M", "parameters, k", "flash, KiB", "peak, KiB",
                   "latency ratio", "of a batch"):  # fmt: skip
        table.add_column(column, justify="right")
    tuned = {(one["criterion"], one["sparsity"]): one for one in report["prunings"] if one["fine_tuned"]}
    for entry in (entry for entry in report["prunings"] if not entry["fine_tuned"]):
        after = tuned.get((entry["criterion"], entry["sparsity"]))
        table.add_row(
            entry["criterion"],
            f"{entry['sparsity']:g}",
            _top1(entry),
            "" if after is None else _top1(after),
            f"{entry['multiply_accumulates_mean'] / 1e6:.2f}",
            f"{entry['parameters_mean'] / 1e3:.1f}",
            f"{entry['flash_bytes_mean'] / KIB:.1f}",
            f"{entry['peak_bytes_mean'] / KIB:.1f}",
            f"{entry['latency_ratio_mean']:.2f}",
            f"{entry['batch_latency_ratio_mean']:.2f}",
        )
    return table


def _top1(entry: dict[str, Any]) -> str:
    spread = "" if entry["top1_std"] is None else f" ± {entry['top1_std'] * 100:.1f}"
    return f"{entry['top1_mean'] * 100:.1f}{spread}"
