"""Trainings of several things on the same seeds, side by side, and the paired differences of their accuracies."""

import contextlib
import csv
import functools
import io
import json
import logging
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Container, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
import wandb
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from microtune.modules.atomic_files import whole_file, write_json
from microtune.modules.search.genome_bytes import Memory
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.shared_folder import CLAIMS, open_shared_folder
from microtune.recipes.search.workers import Workers
from microtune.recipes.studies.student_interval import interval
from microtune.recipes.studies.watched_files import watched
from microtune.recipes.training.data_module import data_module
from microtune.recipes.training.loggers import make_loggers, wandb_run
from microtune.recipes.training.memory_figures import KIB
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.training import train

log = logging.getLogger(__name__)

# they would say for every training what they have said, or what the summary says
QUIET = (
    "lightning.pytorch",
    "lightning.fabric",
    "microtune.datamodules",
    "microtune.modules",
    "microtune.recipes.training.training",
    "microtune.recipes.training.int8_training",
)
# what may differ after a stop
MAY_CHANGE = {"out_dir", "logger", "processes", "data_dir"}


@dataclass(frozen=True)
class Training:
    """One training: a row of the results, once it is done.

    Args:
        scheme: Name of what is compared; what it stands for may be another for each seed.
        seed: Of the fresh classifier, the order of the samples and their augmentation.
        batch_size: Samples per step.
        learning_rate: At its highest.
        folder: Of the run; the training is done when its report is there.
        data_arguments: Further ones of ``data_module``.
        train_arguments: Further ones of ``train``.
    """

    scheme: str
    seed: int
    batch_size: int
    learning_rate: float
    folder: str
    data_arguments: dict[str, Any]
    train_arguments: dict[str, Any]

    @property
    def report_file(self) -> Path:
        """What the run leaves behind when it is done."""
        return Path(self.folder) / "report.json"


@dataclass(frozen=True)
class Row:
    """What came out of a training: a row of ``results.csv``; the seconds are those since its last start."""

    scheme: str
    seed: int
    top1: float
    val_top1: float | None
    memory_bytes: float
    bias_depth: int
    updated_layers: int
    seconds: float


@contextlib.contextmanager
def opened_folder(out_dir: Path, arguments: dict[str, Any], may_change: Container[str] = MAY_CHANGE) -> Iterator[None]:
    """Makes the folder, or checks that the comparison in it is this one; it is this process's in the block."""
    open_shared_folder(out_dir, arguments, may_change)
    try:
        held = FileLock(out_dir / CLAIMS / "comparison.lock", timeout=0).acquire()
    except Timeout as error:
        raise UserError(f"another process is at the comparison in {out_dir}: wait for it") from error
    with held:
        yield


def train_once(training: Training) -> str | None:
    """Trains, or goes on after the last finished epoch of a training that was stopped: what a worker is asked for.

    Args:
        training: What is trained.

    Returns:
        What went wrong with this training, such as a loss that is no number; else None, and the report is written.
    """
    # two busy jobs with two threads each slow one another several times (spinning OpenMP threads)
    torch.set_num_threads(1)
    folder = Path(training.folder)
    resume = (folder / "config.yaml").exists()
    if folder.exists() and not resume:
        shutil.rmtree(folder)  # it had not begun
    of_training = {"batch_size": training.batch_size, "seed": training.seed, "learning_rate": training.learning_rate}
    try:
        with quiet():
            data = data_module(**training.data_arguments, batch_size=training.batch_size, seed=training.seed)
            arguments = {"weights": "none"} | training.train_arguments | of_training
            # the scheme itself is compared when a training goes on, not where its file lies: the folder may have moved
            kept = {name: value for name, value in arguments.items() if name != "scheme"}
            train(
                data, "paired_trainings", kept, allow_oversize=True, logger="none", out_dir=folder, resume=resume,
                **arguments,
            )  # fmt: skip
    except UserError as error:
        return f"{training.scheme}, seed {training.seed}: {error}"
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what a training prints, its progress bars and Lightning's remarks."""
    loggers = [logging.getLogger(name) for name in QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def keep_results(trainings: Sequence[Training], memory: Memory, out_dir: Path) -> list[Row]:
    """The rows of all trainings that are done, which ``results.csv`` has then too."""
    rows = []
    for training in trainings:
        if training.report_file.exists():
            report = json.loads(training.report_file.read_text(encoding="utf-8"))
            scheme = UpdateScheme.load(Path(training.folder) / "scheme.json")
            rows.append(
                Row(
                    training.scheme,
                    training.seed,
                    report["top1"],
                    report.get("val_top1"),
                    report[f"{memory}_memory_bytes"],
                    scheme.bias_depth,
                    len(scheme.weights),
                    round(report["seconds"], 1),
                )
            )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    writer.writerows(astuple(row) for row in rows)
    with whole_file(out_dir / "results.csv") as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")
    return rows


def train_and_compare(
    trainings: Sequence[Training],
    memory: Memory,
    processes: int,
    out_dir: Path,
    further: dict[str, Any] | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """Does the trainings that are not done yet; returns all that are, and what ``report.json`` says of them.

    Args:
        trainings: All, done or not; the others are compared with what the first one trains.
        memory: Which memory of a training step is told.
        processes: Trainings that run at once, one thread each.
        out_dir: Of the comparison, opened.
        further: For the report.

    Raises:
        UserError: Nothing was trained.
    """
    started = time.monotonic()
    files = [training.report_file for training in trainings]
    keep = functools.partial(keep_results, trainings, memory, out_dir)
    with watched(files, "trainings", keep), Workers(processes) as workers:
        failures = workers.map(train_once, [training for training in trainings if not training.report_file.exists()])
    rows = keep_results(trainings, memory, out_dir)
    failures = [failure for failure in failures if failure]
    if not rows:
        raise UserError(failures[-1] if failures else "every training was lost with its worker: see above")
    for failure in failures:
        log.warning(failure)
    report = {
        "memory": memory,
        **(further or {}),
        "schemes": compare(rows, list(dict.fromkeys(training.scheme for training in trainings))),
        "missing": [f"{one.scheme}, seed {one.seed}" for one in trainings if not one.report_file.exists()],
        "seconds": time.monotonic() - started,
    }
    write_json(out_dir / "report.json", report)
    return rows, report


def compare(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each scheme its memory and accuracy, and by how much the first one is better, over the seeds that both have.

    Args:
        rows: All trainings that are done.
        names: The schemes, the first being what the others are compared with.
    """
    top1 = {name: {row.seed: row.top1 for row in rows if row.scheme == name} for name in names}
    compared = []
    for name in names:
        own = [row for row in rows if row.scheme == name]
        entry: dict[str, Any] = {"scheme": name, "top1": top1[name]}
        if own:
            for column in ("memory_bytes", "top1", "val_top1", "seconds"):
                values = [getattr(row, column) for row in own if getattr(row, column) is not None]
                if not values:
                    continue
                entry[f"{column}_mean"] = statistics.mean(values)
                if column.endswith("top1"):
                    entry[f"{column}_std"] = statistics.stdev(values) if len(values) > 1 else None
        both = [seed for seed in top1[names[0]] if seed in top1[name]]
        if name != names[0] and both:
            differences = [top1[names[0]][seed] - top1[name][seed] for seed in both]
            entry["difference"] = statistics.mean(differences)
            entry["interval"] = interval(differences)
        compared.append(entry)
    return compared


def draw_comparison(report: dict[str, Any], title: str, path: Path) -> None:
    """Draws the accuracy of every training, and the mean of each scheme, as a PNG."""
    matplotlib.use("Agg")
    trained = [entry for entry in report["schemes"] if entry["top1"]]
    figure, axes = plt.subplots(figsize=(max(6, 1.5 * len(trained)), 4.5), layout="constrained")
    for place, entry in enumerate(trained):
        values = [value * 100 for value in entry["top1"].values()]
        axes.plot([place] * len(values), values, ".", color="tab:blue", alpha=0.6, label="" if place else "a seed")
        mean = [entry["top1_mean"] * 100]
        axes.plot([place], mean, "_", color="black", markersize=22, label="" if place else "mean")
    ticks = ["\n".join([*one["scheme"].split(", "), f"{one['memory_bytes_mean'] / KIB:.1f} KiB"]) for one in trained]
    axes.set_xticks(range(len(trained)), ticks, fontsize=8)
    axes.margins(x=0.1, y=0.1)
    axes.set(ylabel="top-1 on the test split, %", title=title)
    axes.grid(axis="y", linewidth=0.4)
    axes.legend(fontsize=8)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)


def log_to_wandb(
    logger: LoggerName,
    recipe: str,
    rows: Sequence[Row],
    report: dict[str, Any],
    out_dir: Path,
    arguments: dict[str, Any],
) -> None:
    """Logs the results, the comparison and the picture as one run."""
    if logger != "wandb":
        return
    experiment = wandb_run(make_loggers(logger, out_dir, recipe))
    if experiment is not None:
        experiment.config.update({"arguments": arguments}, allow_val_change=True)
        table = wandb.Table(list(Row.__dataclass_fields__), [list(astuple(row)) for row in rows])
        experiment.log({"results": table, "comparison": wandb.Image(str(out_dir / "comparison.png"))})
        experiment.summary.update(
            {f"top1/{one['scheme']}": one["top1_mean"] for one in report["schemes"] if one["top1"]}
        )
        wandb.finish()


def print_report(report: dict[str, Any], out_dir: Path) -> None:
    """Prints a row per scheme, what is missing, and where the results lie."""
    first = report["schemes"][0]["scheme"]
    table = Table("", title="Top-1 on the test split")
    columns = (f"{report['memory']} memory, KiB", "top-1, %", f"{first} minus this, points", "95 % interval", "seeds")
    for column in columns:
        table.add_column(column, justify="right")
    for entry in report["schemes"]:
        if not entry["top1"]:
            table.add_row(entry["scheme"], "", "missing", "", "", "0")
            continue
        std = entry["top1_std"]
        spread = "" if std is None else f" ± {std * 100:.2f}"
        low_and_high = entry.get("interval")
        table.add_row(
            entry["scheme"],
            f"{entry['memory_bytes_mean'] / KIB:.1f}",
            f"{entry['top1_mean'] * 100:.2f}{spread}",
            f"{entry['difference'] * 100:+.2f}" if "difference" in entry else "",
            " to ".join(f"{value * 100:+.2f}" for value in low_and_high) if low_and_high else "",
            str(len(entry["top1"])),
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for name in report["missing"]:
        print(f"missing: {name}; the same command tries again")
    print(f"results: {out_dir / 'results.csv'}, report: {out_dir / 'report.json'}, {report['seconds']:.0f} s")
