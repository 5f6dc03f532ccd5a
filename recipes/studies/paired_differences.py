"""What a study says at its end: the accuracy of each way and paired differences, as report, table and picture."""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from microtune.modules.memory.microcontrollers import KIB
from microtune.recipes.studies.result_rows import Result, budget_name, memory_and_kib, title_of
from microtune.recipes.studies.student_interval import interval
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.pictures import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WayAndNumbers = tuple[str, str]


def compare_all(rows: Sequence[Result], ways: Sequence[WayAndNumbers]) -> list[dict[str, Any]]:
    """The comparisons of each data set at each budget, with the trainings that have none.

    Args:
        rows: All trainings that are done.
        ways: The ways and what they compute in, the first being what the others are measured against.
    """
    comparisons = []
    for data in dict.fromkeys(row.data for row in rows):
        of_data = [row for row in rows if row.data == data]
        budgets = list(dict.fromkeys(row.budget for row in of_data))
        for budget in [one for one in budgets if one != "none"] or budgets:
            of_budget = [row for row in of_data if row.budget in (budget, "none")]
            memory, _ = memory_and_kib(budget)
            compared = compare(of_budget, ways, memory)
            comparisons.append({"data": data, "budget": budget, "memory": memory, "ways": compared})
    return comparisons


def compare(rows: Sequence[Result], ways: Sequence[WayAndNumbers], memory: str) -> list[dict[str, Any]]:
    """Of each way its memory and accuracy, and by how much the first one is better, over the seeds that both have.

    Args:
        rows: Of one data set and budget.
        ways: As in ``compare_all``; the first way in the same numbers, where it has these, is measured against.
        memory: Which memory of a training step is told, extra or peak.
    """
    top1 = {way: {row.seed: row.top1 for row in rows if (row.way, row.numbers) == way} for way in ways}
    compared = []
    for way, numbers in ways:
        own = [row for row in rows if (row.way, row.numbers) == (way, numbers)]
        entry: dict[str, Any] = {"way": way, "numbers": numbers, "top1": top1[way, numbers]}
        for column in (f"{memory}_memory_bytes", "top1", "val_top1", "train_seconds"):
            values = [getattr(row, column) for row in own if getattr(row, column) is not None]
            if not values:
                continue
            entry[f"{column}_mean"] = statistics.mean(values)
            if column.endswith("top1"):
                entry[f"{column}_std"] = statistics.stdev(values) if len(values) > 1 else None
        first = (ways[0][0], numbers)
        first = first if first in top1 else ways[0]
        both = [seed for seed in top1[first] if seed in top1[way, numbers]]
        if (way, numbers) != first and both:
            differences = [top1[first][seed] - top1[way, numbers][seed] for seed in both]
            entry["difference"] = statistics.mean(differences)
            entry["interval"] = interval(differences)
        compared.append(entry)
    return compared


def title_of_comparison(comparison: dict[str, Any]) -> str:
    """A comparison in words.

    Example::

        title_of_comparison({"data": "cifar10", "budget": "extra64"})  # "CIFAR-10 within 64 KiB of extra memory"
    """
    data, budget = title_of(comparison["data"]), comparison["budget"]
    if budget == "none":
        return data
    is_device = not budget.startswith(("extra", "peak"))
    within = f"the memory of {budget_name(budget)}" if is_device else budget_name(budget)
    return f"{data} within {within}" + (" of extra memory" if budget.startswith("extra") else "")


def label_of(entry: dict[str, Any], entries: Sequence[dict[str, Any]]) -> str:
    """A way's name, with what it computes in where it computes in both."""
    both = sum(other["way"] == entry["way"] for other in entries) > 1
    return f"{entry['way']}, {entry['numbers']}" if both else entry["way"]


def draw_comparisons(comparisons: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the accuracy of every training, and the mean of each way, as a PNG: a panel for each comparison."""
    most = max(len(comparison["ways"]) for comparison in comparisons)
    size = (max(6, 1.5 * most), 4.5 * len(comparisons))
    with drawn(path, len(comparisons), 1, figsize=size, squeeze=False) as panels:
        for axes, comparison in zip(panels[:, 0], comparisons, strict=True):
            _draw_comparison(axes, comparison)


def _draw_comparison(axes: "Axes", comparison: dict[str, Any]) -> None:
    trained = [entry for entry in comparison["ways"] if entry["top1"]]
    ticks = []
    for place, entry in enumerate(trained):
        values = [value * 100 for value in entry["top1"].values()]
        axes.plot([place] * len(values), values, ".", color="tab:blue", alpha=0.6, label="" if place else "a seed")
        mean = [entry["top1_mean"] * 100]
        axes.plot([place], mean, "_", color="black", markersize=22, label="" if place else "mean")
        kib = entry[f"{comparison['memory']}_memory_bytes_mean"] / KIB
        ticks.append("\n".join([*label_of(entry, comparison["ways"]).split(", "), f"{kib:.1f} KiB"]))
    axes.set_xticks(range(len(trained)), ticks, fontsize=8)
    axes.margins(x=0.1, y=0.1)
    axes.set(ylabel="top-1 on the test split, %", title=title_of_comparison(comparison))
    axes.grid(axis="y", linewidth=0.4)
    axes.legend(fontsize=8)


def print_comparisons(comparisons: Sequence[dict[str, Any]]) -> None:
    """Prints a table for each comparison."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for comparison in comparisons:
        console.print(_table(comparison))


def print_report(report: dict[str, Any], out_dir: Path) -> None:
    """Prints a table for each comparison, what is missing, and where the results lie."""
    print_comparisons(report["comparisons"])
    for line in report["missing"]:
        print(f"missing: {line}")
    print(f"results: {out_dir / 'results.csv'}, report: {out_dir / 'report.json'}, {report['seconds']:.0f} s")


def _table(comparison: dict[str, Any]) -> Table:
    memory, entries = comparison["memory"], comparison["ways"]
    table = Table("", title=f"Top-1 on the test split: {title_of_comparison(comparison)}")
    columns = (f"{memory} memory, KiB", "top-1, %", f"{entries[0]['way']} minus this, points", "95 % interval", "seeds")
    for column in columns:
        table.add_column(column, justify="right")
    for entry in entries:
        if not entry["top1"]:
            table.add_row(label_of(entry, entries), "", "missing", "", "", "0")
            continue
        std, low_and_high = entry["top1_std"], entry.get("interval")
        spread = "" if std is None else f" ± {std * 100:.2f}"
        table.add_row(
            label_of(entry, entries),
            f"{entry[f'{memory}_memory_bytes_mean'] / KIB:.1f}",
            f"{entry['top1_mean'] * 100:.2f}{spread}",
            f"{entry['difference'] * 100:+.2f}" if "difference" in entry else "",
            " to ".join(f"{value * 100:+.2f}" for value in low_and_high) if low_and_high else "",
            str(len(entry["top1"])),
        )
    return table


def log_to_wandb(
    logger: LoggerName, rows: Sequence[Result], report: dict[str, Any], out_dir: Path, arguments: dict[str, Any]
) -> None:
    """Logs the results, the comparisons and the picture as one run."""
    if logger != "wandb":
        return
    import wandb  # with Lightning's loggers it takes seconds, which a command line need not wait for

    from microtune.recipes.training.loggers import make_loggers, wandb_run

    experiment = wandb_run(make_loggers(logger, out_dir, "compare_trainings"))
    if experiment is None:
        return
    experiment.config.update({"arguments": arguments}, allow_val_change=True)
    table = wandb.Table(list(Result.__dataclass_fields__), [list(asdict(row).values()) for row in rows])
    experiment.log({"results": table, "comparison": wandb.Image(str(out_dir / "comparison.png"))})
    means = {
        f"top1/{comparison['data']}/{comparison['budget']}/{label_of(entry, comparison['ways'])}": entry["top1_mean"]
        for comparison in report["comparisons"]
        for entry in comparison["ways"]
        if entry["top1"]
    }
    experiment.summary.update(means)
    artifact = wandb.Artifact(f"results-{experiment.id}", type="results")
    artifact.add_file(str(out_dir / "results.csv"), policy="immutable", skip_cache=True)
    experiment.log_artifact(artifact)
    wandb.finish()
