"""The whole story in minutes, on data that needs no download: which updates fit a microcontroller, and what they buy.

    uv run recipes/quickstart.py

A small MobileNetV2 is trained on the digits 0 to 4. Short trainings on 5 to 9, which it has never seen, measure what
updates gain on the validation split, and from these contributions a genetic algorithm evolves an update scheme for the
microcontroller. Then the network is adapted to 5 to 9 as a device would be: by updating the classifier only, the biases
only, the last layers that fit, the same part of as many layers as fit (sub_tensor), everything, and what the evolved
scheme says. Needs no network, no account and no GPU; 161 seconds on two cores of an AMD EPYC, 310 on busy ones.

For an RP2040 (232 KiB) the evolved scheme gives 95 % within 139 KiB, sub_tensor 89 %, the last layers that fit 45 %,
and full update, which does not fit, 95 %. For an STM32F411 (96 KiB) the evolved one gives 94 %, sub_tensor 65 %.
"""

import functools
import logging
import math
import os
import random
import shlex
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from microtune.datamodules.kept_features import TrunkFeatures
from microtune.datamodules.progress import progress_bar
from microtune.modules.atomic_files import write_json
from microtune.modules.memory.microcontrollers import Microcontroller, microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.saved_for_backward import measure_saved_bytes
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import build_network
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.frozen_trunk import cut_network
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.search.short_training import TrialTraining
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget
from microtune.recipes.search.checkpoint import SearchState
from microtune.recipes.search.contribution_trials import (
    Trial,
    Update,
    contributions_of,
    draw_contributions,
    updates_to_measure,
)
from microtune.recipes.search.genetic_algorithm import evolve, make_toolbox
from microtune.recipes.search.rungs import Rungs
from microtune.recipes.search.table_search import make_problem
from microtune.recipes.search.workers import Workers
from microtune.recipes.training.command_line import check_at_least_one, flat, run_recipe
from microtune.recipes.training.memory_figures import KIB, memory_figures
from microtune.recipes.training.networks import DescribedNetwork, describe_network
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.pictures import drawn
from microtune.recipes.training.plan import NAMED_SCHEMES
from microtune.recipes.training.run_folder import open_run_folder, write_config
from microtune.recipes.training.schemes import scheme_by_name_or_file
from microtune.recipes.training.step_time import interleaved_seconds, prepared, training_step

if TYPE_CHECKING:  # Lightning takes seconds to import: by need, in the functions that train
    from lightning.pytorch import Callback, Trainer

KNOWN_DIGITS, NEW_DIGITS = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
WIDTH, RESOLUTION = 0.35, 32
PRETRAINING_EPOCHS = 20
ADAPTATION_EPOCHS = 10
BATCH_SIZE = 16
# of 0.0125, 0.025, 0.05 and 0.1 the best on average over the methods, on the validation split
LEARNING_RATE = 0.05
# of the trials that measure contributions. All blocks but the first can be updated: the early ones have few channels,
# so that their weights cost little. In trials of 40 or 60 steps, even two of them, most gains drown in the noise, and
# half the learning rate thirds them.
BASE_DEPTH, BIAS_DEPTHS, RATIOS = 48, (12, 24, 36), (0.5, 1.0)
TRIAL_STEPS, TRIAL_SEEDS, TRIAL_LEARNING_RATE = 120, 1, 0.1
EVALUATIONS, POPULATION = 1000, 40
MOST_PROCESSES = 8  # by default: each takes seconds to start, for fewer than 60 trainings in all


def main(
    mcu: str = "rp2040",
    head_convolution: bool = False,
    seeds: int = 3,
    processes: int | None = None,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
) -> dict[str, Any]:
    """The whole story in minutes, on data that needs no download: which updates fit an MCU, and what they buy.

    Args:
        mcu: Microcontroller that the updates shall fit.
        head_convolution: Whether the network has its last 1x1 convolution.
        seeds: Number of adaptations by each method, with other fresh classifiers and orders of samples.
        processes: Number of processes that train, one thread each; by default one for each core, at most 8. The results
            do not depend on it.
        logger: Logger: wandb (offline unless you are logged in), or csv or none to do without.
        out_dir: Folder of the report; by default a new one below runs/.
    """
    started, arguments = time.monotonic(), flat(locals())
    # images of 32 px are too small to share among cores: two threads gain nothing, and stall on a busy machine
    torch.set_num_threads(1)
    check_at_least_one(seeds=seeds, processes=processes)
    device = microcontroller(mcu)
    out_dir = open_run_folder(out_dir, "quickstart", resume=False)
    write_config(out_dir, arguments)
    described = describe(head_convolution)
    peak_memory = PeakMemory(described.operations)
    schemes = {name: scheme_by_name_or_file(name, described, peak_memory, device) for name in NAMED_SCHEMES}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder, Workers(processes or min(cores, MOST_PROCESSES)) as workers:
        pretrained = Pretrained(str(Path(folder) / "pretrained.pth"), head_convolution)
        torch.save(pretrain(described), pretrained.weights)
        table = measure_contributions(pretrained, workers)
        table.save(out_dir / "contributions.csv")
        draw_contributions(table, described.operations.convolutions, out_dir / "contributions.png")
        schemes["evolved"] = evolve_scheme(described, table, device)
        top1 = adapt_under_all(pretrained, schemes, seeds, workers)
    measured = measure_steps(described, schemes)

    report = {"mcu": mcu, "budget_bytes": device.budget_bytes, "seeds": seeds, "methods": {}}
    for name, scheme in schemes.items():
        figures = memory_figures(peak_memory, scheme, device)
        report["methods"][name] = {
            "top1_mean": statistics.mean(top1[name]),
            "top1_std": statistics.stdev(top1[name]) if seeds > 1 else 0.0,
            **{key: figures[key] for key in ("extra_memory_bytes", "peak_memory_bytes", "fits")},
            **measured[name],
        }
        scheme.save(out_dir / f"scheme_{name}.json")
    write_json(out_dir / "report.json", report)
    draw_accuracy_over_memory(report, out_dir / "report.png")
    log_to_wandb(logger, report, out_dir)
    console = Console()
    console.print(table_of(report))
    console.print(
        f"{mcu} has {device.budget_bytes / KIB:.0f} KiB for a training step; peak and extra memory are MCU bytes "
        f"(int8, batch 1), 'saved' is what PyTorch kept (fp32)"
    )
    console.print(f"done in {time.monotonic() - started:.0f} s; table, picture and schemes: {out_dir}", soft_wrap=True)
    return report


@dataclass(frozen=True)
class Pretrained:
    """The network that knows the digits 0 to 4, as other processes find it.

    Args:
        weights: File of its state, with batch norm folded.
        head_convolution: Whether it has its last 1x1 convolution.
    """

    weights: str
    head_convolution: bool

    def state(self) -> dict[str, Tensor]:
        """Its weights."""
        return torch.load(self.weights, weights_only=True)


@functools.cache
def describe(head_convolution: bool) -> DescribedNetwork:
    """The network that learns the new digits."""
    return describe_network("none", (1, RESOLUTION, RESOLUTION), len(NEW_DIGITS), WIDTH, head_convolution)


def pretrain(described: DescribedNetwork) -> dict[str, Tensor]:
    """Trains a network with batch norm on the known digits; returns its state with batch norm folded."""
    from lightning.pytorch import seed_everything
    from lightning.pytorch.callbacks import LambdaCallback

    from microtune.datamodules.digits import Digits
    from microtune.modules.classifier import Classifier

    started = time.monotonic()
    seed_everything(0, verbose=False)
    network = {**described.arguments, "num_classes": len(KNOWN_DIGITS), "folded": False}
    module = Classifier(network, learning_rate=3e-3, optimizer="adamw", weight_decay=0.01)
    data = Digits(KNOWN_DIGITS, RESOLUTION, batch_size=32, augment=True)
    with progress_bar() as progress:
        task = progress.add_task("training on the digits 0 to 4", total=PRETRAINING_EPOCHS)
        advance = LambdaCallback(on_train_epoch_end=lambda *_: progress.advance(task))
        quiet_trainer(PRETRAINING_EPOCHS, advance).fit(module, data)
    print(f"trained on the digits 0 to 4 in {time.monotonic() - started:.0f} s")
    return fold_batch_norm(module.net, described.input_shape).state_dict()


def evaluated(workers: Workers, description: str, function: Callable[..., float], *arguments: Sequence) -> list[float]:
    """``map`` by the workers, with a bar that moves whenever each of them has had one call."""
    calls, results = list(zip(*arguments, strict=True)), []
    with progress_bar() as progress:
        task = progress.add_task(description, total=len(calls))
        for start in range(0, len(calls), workers.processes):
            some = calls[start : start + workers.processes]
            results += workers.map(function, *zip(*some, strict=True))
            progress.advance(task, len(some))
    if None in results:
        raise UserError("a training was lost with its process, as the warning above says: give --processes 1")
    return results


def measure_contributions(pretrained: Pretrained, workers: Workers) -> ContributionTable:
    """Trains for some steps under one update after the other; their gains on the validation split are the table."""
    started = time.monotonic()
    updates = updates_to_measure(describe(pretrained.head_convolution), BASE_DEPTH, "expanding", RATIOS, BIAS_DEPTHS)
    pairs = [(update, seed) for seed in range(TRIAL_SEEDS) for update in updates]
    top1 = evaluated(
        workers, "measuring contributions", trial_top1, [pretrained] * len(pairs), *zip(*pairs, strict=True)
    )
    made = [Trial(*astuple(update), seed, value) for (update, seed), value in zip(pairs, top1, strict=True)]
    table = ContributionTable(tuple(contributions_of(made, updates, TRIAL_SEEDS)))
    best = max((row for row in table.rows if row.layer), key=lambda row: row.gain)
    seconds = time.monotonic() - started
    print(
        f"measured the gains of {len(table.rows)} updates by {len(made)} trainings of {TRIAL_STEPS} steps "
        f"in {seconds:.0f} s"
    )
    print(f"most gains the weight of {best.layer}: {best.gain * 100:.1f} points")
    return table


def trial_top1(pretrained: Pretrained, update: Update, seed: int) -> float:
    """Trains for some steps under one update; returns the accuracy on the validation split."""
    scheme = update.scheme(describe(pretrained.head_convolution).name)
    return trials_from(pretrained).accuracies([scheme], seed)[0]


@functools.lru_cache(maxsize=1)  # a process computes the trunk's features once
def trials_from(pretrained: Pretrained) -> TrialTraining:
    """Short trainings on the new digits from the pretrained network, none of which sees a test image."""
    from lightning.pytorch import seed_everything

    from microtune.datamodules.digits import Digits

    described = describe(pretrained.head_convolution)
    # 72 validation images would be too few to tell updates apart: here half of the training images validate
    data = Digits(NEW_DIGITS, RESOLUTION, BATCH_SIZE, augment=True, validation_fraction=0.5)
    data.setup()
    network = build_network(**described.arguments)
    network.load_state_dict(pretrained.state())
    trunk, rest = cut_network(network, described.operations, BASE_DEPTH)
    steps_per_epoch = math.ceil(data.train_samples / BATCH_SIZE)
    features = TrunkFeatures(trunk, data, copies=math.ceil(TRIAL_STEPS / steps_per_epoch))

    def fresh_classifier(seed: int) -> dict[str, Tensor]:
        seed_everything(seed, verbose=False)
        return build_network(**described.arguments).classifier.state_dict()

    return TrialTraining(rest, features, fresh_classifier, TRIAL_STEPS, BATCH_SIZE, TRIAL_LEARNING_RATE)


def evolve_scheme(described: DescribedNetwork, table: ContributionTable, device: Microcontroller) -> UpdateScheme:
    """The scheme with the highest sum of gains that the genetic algorithm finds within the microcontroller's budget."""
    problem = make_problem(described, table, Budget("peak", device.budget_bytes, device))
    random.seed(0)
    rungs = Rungs((1,), EVALUATIONS)
    best, *_ = evolve(problem, make_toolbox(problem), rungs, POPULATION, [], SearchState(), lambda _: None)
    optimum = proven_optimum(problem)
    score = problem.score(best)
    words = ["recipes/quickstart.py", "--mcu", device.name]
    if described.arguments["head_convolution"]:
        words += ["--head_convolution", "true"]
    provenance = {"command": "uv run " + shlex.join(words), "mcu": device.name, "budget_bytes": device.budget_bytes}
    scheme = problem.scheme(best, {**provenance, "score": score, "optimum_score": optimum.score})
    print(
        f"evolved for {device.name}: the last {scheme.bias_depth} biases, weights of {len(scheme.weights)} layers, "
        f"{problem.memory_bytes(best) / KIB:.0f} of {device.budget_bytes / KIB:.0f} KiB"
    )
    print(f"its gains sum up to {score * 100:.1f} points, those of the proven optimum to {optimum.score * 100:.1f}")
    return scheme


def adapt_under_all(
    pretrained: Pretrained, schemes: dict[str, UpdateScheme], seeds: int, workers: Workers
) -> dict[str, list[float]]:
    """The test accuracy of every seed after adapting with each of the methods."""
    # one method after the other: those that train at the same time take as long
    pairs = [(None if name == "full" else scheme, seed) for name, scheme in schemes.items() for seed in range(seeds)]
    top1 = evaluated(
        workers, "adapting to the digits 5 to 9", adapt, [pretrained] * len(pairs), *zip(*pairs, strict=True)
    )
    return {name: top1[index * seeds : (index + 1) * seeds] for index, name in enumerate(schemes)}


def adapt(pretrained: Pretrained, scheme: UpdateScheme | None, seed: int) -> float:
    """Trains on the new digits from the pretrained network; returns the accuracy on their test images.

    Args:
        pretrained: The network.
        scheme: What is updated; everything without one.
        seed: Seed of the fresh classifier and the order of the samples.
    """
    from lightning.pytorch import seed_everything

    from microtune.callbacks.sparse_update import SparseUpdate
    from microtune.datamodules.digits import Digits
    from microtune.modules.classifier import Classifier

    described = describe(pretrained.head_convolution)
    seed_everything(seed, verbose=False)
    module = Classifier(described.arguments, learning_rate=LEARNING_RATE)
    fresh = {name: value for name, value in module.net.state_dict().items() if name.startswith("classifier")}
    module.net.load_state_dict(pretrained.state() | fresh)
    data = Digits(NEW_DIGITS, RESOLUTION, BATCH_SIZE, seed, augment=True)
    callbacks = [] if scheme is None else [SparseUpdate(scheme, input_shape=described.input_shape)]
    trainer = quiet_trainer(ADAPTATION_EPOCHS, *callbacks)
    trainer.fit(module, data)
    return trainer.test(module, data, verbose=False)[0]["test/top1"]


def quiet_trainer(epochs: int, *callbacks: "Callback") -> "Trainer":
    """A Trainer on the CPU that prints and writes nothing."""
    from lightning.pytorch import Trainer

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def measure_steps(described: DescribedNetwork, schemes: dict[str, UpdateScheme]) -> dict[str, dict[str, float]]:
    """What PyTorch saves for backward per sample, and the median time of a step, of every method."""
    samples = torch.randn(BATCH_SIZE, *described.input_shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(len(NEW_DIGITS), (BATCH_SIZE,))
    plain = described.network.to(memory_format=torch.channels_last)
    saved, steps = {}, {}
    for name, scheme in schemes.items():
        method = "full" if name == "full" else "sub_tensor"
        ready = prepared(plain, scheme, described.operations, method)
        saved[name] = measure_saved_bytes(ready.network, samples) / BATCH_SIZE
        steps[name] = training_step(ready, samples, labels)
    seconds = interleaved_seconds(steps, rounds=20, show_progress=False)
    return {
        name: {"autograd_bytes_per_sample": saved[name], "step_seconds": statistics.median(seconds[name])}
        for name in schemes
    }


def table_of(report: dict[str, Any]) -> Table:
    """One row per method."""
    table = Table(title=f"Adapting to new digits, {report['seeds']} seeds")
    table.add_column("updated", no_wrap=True)
    for name in ("top-1, %", "extra,\nKiB", "peak,\nKiB", "fits", "saved,\nKiB", "step,\nms"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in report["methods"].items():
        table.add_row(
            name,
            f"{row['top1_mean'] * 100:.1f} ± {row['top1_std'] * 100:.1f}",
            f"{row['extra_memory_bytes'] / KIB:.1f}",
            f"{row['peak_memory_bytes'] / KIB:.1f}",
            "yes" if row["fits"] else "no",
            f"{row['autograd_bytes_per_sample'] / KIB:.1f}",
            f"{row['step_seconds'] * 1e3:.1f}",
        )
    return table


def draw_accuracy_over_memory(report: dict[str, Any], path: Path) -> None:
    """Draws top-1 over peak memory, with the microcontroller's budget as a line, as a PNG."""
    with drawn(path, figsize=(7, 4.5)) as axes:
        for name, row in report["methods"].items():
            x, y = row["peak_memory_bytes"] / KIB, row["top1_mean"] * 100
            axes.errorbar(x, y, yerr=row["top1_std"] * 100, fmt="o" if row["fits"] else "x", capsize=3)
            is_left = x > 0.7 * report["budget_bytes"] / KIB
            place = {"xytext": (-6 if is_left else 6, -12), "ha": "right" if is_left else "left"}
            axes.annotate(name, (x, y), textcoords="offset points", fontsize=9, **place)
        budget_kib = report["budget_bytes"] / KIB
        axes.axvline(budget_kib, color="black", linestyle="--")
        axes.text(
            budget_kib, 0.98, f" budget of {report['mcu']}", transform=axes.get_xaxis_transform(), va="top", fontsize=8
        )
        axes.margins(y=0.15)
        axes.set(xlabel="peak memory of one training step, KiB", ylabel="top-1 on new digits, %")
        axes.set_xlim(
            0, 1.15 * max(budget_kib, *(row["peak_memory_bytes"] / KIB for row in report["methods"].values()))
        )
        seeds = f"{report['seeds']} seed{'s' if report['seeds'] > 1 else ''}"
        axes.set_title(f"Adapting to new digits, mean and deviation of {seeds}")


def log_to_wandb(logger: LoggerName, report: dict[str, Any], out_dir: Path) -> None:
    """Logs the table and the picture as one run."""
    if logger != "wandb":
        return
    import wandb

    from microtune.recipes.training.loggers import make_loggers, wandb_run

    experiment = wandb_run(make_loggers(logger, out_dir, "quickstart"))
    if experiment is None:
        return
    columns = ["method", *next(iter(report["methods"].values()))]
    rows = [[name, *row.values()] for name, row in report["methods"].items()]
    pictures = {name: wandb.Image(str(out_dir / f"{name}.png")) for name in ("report", "contributions")}
    experiment.config.update({key: value for key, value in report.items() if key != "methods"})
    experiment.log({"methods": wandb.Table(columns, rows), **pictures})
    wandb.finish()


if __name__ == "__main__":
    run_recipe(main)
