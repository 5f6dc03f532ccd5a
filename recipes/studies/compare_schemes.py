"""Trains an evolved scheme and simple ones that fit the same budget: real training judges what a search found.

    uv run recipes/studies/compare_schemes.py --data cifar10 --data_dir data --weights KERAS_FILE.h5 \\
        --schemes evolved=scheme.json --memory extra --budget_kib 64 --out_dir runs/comparison

All train the whole network on equal terms: the same data, weights, epochs and learning rate, and with the same seeds,
so that differences are paired. The same command goes on where it was stopped. Two epochs on 5,850 images at 96 px take
half a minute on one core of an AMD EPYC.
"""

import logging
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microtune.datamodules.data_sets import DataName
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes, extra_memory_per_layer
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.search.genome_bytes import Memory
from microtune.modules.sparse_update.simple_schemes import (
    biases_that_fit,
    classifier_only,
    expanding_convolutions_that_fit,
    is_expanding,
    last_layers_that_fit,
)
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget, budget_of
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.search.table_search import load_table, make_problem
from microtune.recipes.search.trials import described_by
from microtune.recipes.studies.paired_trainings import (
    Training,
    draw_comparison,
    log_to_wandb,
    opened_folder,
    print_report,
    train_and_compare,
)
from microtune.recipes.training.command_line import check_at_least_one, flat, listed, run_recipe
from microtune.recipes.training.memory_figures import KIB, refuse_oversize, scheme_fits
from microtune.recipes.training.networks import DescribedNetwork
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.plan import check_ranges
from microtune.recipes.training.run_folder import new_folder

log = logging.getLogger(__name__)

RULES = ("last_layers", "biases", "expanding", "random")
RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of random schemes, where no table says which


@dataclass(frozen=True)
class Judge:
    """What schemes need of a budget.

    Args:
        described: The network.
        budget: What a scheme may take.
    """

    described: DescribedNetwork
    budget: Budget

    @property
    def peak_memory(self) -> PeakMemory:
        """Of the network."""
        return PeakMemory(self.described.operations)

    def memory_bytes(self, scheme: UpdateScheme) -> float:
        """What the scheme takes of the memory that the budget is of."""
        operations = self.described.operations
        if self.budget.memory == "extra":
            return extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme)
        return self.peak_memory.peak_bytes(scheme)

    def fits(self, scheme: UpdateScheme) -> bool:
        """Whether the scheme is within the budget, and its frozen weights within the flash of a microcontroller."""
        if self.budget.microcontroller is not None:
            return scheme_fits(self.peak_memory, scheme, self.budget.microcontroller)
        return self.memory_bytes(scheme) <= self.budget.size_bytes

    def refuse_oversize(self, name: str, scheme: UpdateScheme) -> None:
        """Raises ``UserError`` if the scheme does not fit: what it needs, what there is, and what costs most."""
        if self.fits(scheme):
            return
        remedy = "give another scheme or budget"
        if self.budget.microcontroller is not None:
            device, network = self.budget.microcontroller, self.described.network
            try:
                refuse_oversize(self.peak_memory, scheme, device, network, remedy)
            except UserError as error:
                raise UserError(f"scheme {name}: {error}") from error
        smallest = self.memory_bytes(classifier_only(self.described.name))
        layers = extra_memory_per_layer(self.described.operations.convolutions, scheme)
        layers = [layer for layer in sorted(layers, key=lambda layer: -layer.total_bytes)[:3] if layer.total_bytes]
        costly = ", ".join(f"{layer.name} ({layer.total_bytes / KIB:.1f} KiB)" for layer in layers)
        most = f"; most of the extra memory goes to {costly}" if costly else ""
        raise UserError(
            f"scheme {name} needs {self.memory_bytes(scheme) / KIB:.1f} KiB of {self.budget.memory} memory, but the "
            f"budget is {self.budget.size_bytes / KIB:.1f} KiB; the smallest scheme, the classifier only, needs "
            f"{smallest / KIB:.1f} KiB{most}: {remedy}"
        )


def main(
    data: DataName,
    schemes: str = "",
    rules: str = ",".join(RULES),
    data_dir: Path | None = None,
    data_options: dict[str, Any] | None = None,
    weights: str = "none",
    network: str = "mobilenet_v2",
    resolution: int = 96,
    width: float | None = None,
    head_convolution: bool = False,
    memory: Memory = "peak",
    budget_kib: float | None = None,
    mcu: str | None = None,
    sram_bytes: int | None = None,
    flash_bytes: int | None = None,
    reserve_bytes: int | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float | None = None,
    learning_rates: str | None = None,
    seeds: int = 3,
    batch_1: bool = False,
    contributions: Path | None = None,
    processes: int = 1,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
) -> dict[str, Any]:
    """Trains an evolved scheme and simple ones that fit the same budget: real training judges what a search found.

    Args:
        schemes: What is compared, such as evolved=scheme.json,optimum=optimum.json; the others are measured against
            the first.
        data: Name of the data set.
        rules: Simple schemes that fill the budget, separated by commas: last_layers (weights and biases), biases,
            expanding (all channels of the last expanding convolutions) and random (another for each seed).
        data_dir: Folder of the data.
        data_options: Further arguments of the data module.
        weights: To start from: none, torchvision, or a .pth, .ckpt, .h5 or .npz file.
        network: mobilenet_v2, or the .safetensors file of an int8 network, which has its own weights.
        resolution: Height and width of images, in pixels; speech has the shape of its spectrograms.
        width: Multiplier of the network's channels; by default that of the weights, and 0.35 without.
        head_convolution: Whether the network has its last 1x1 convolution.
        memory: What the budget is of: peak of a training step, or extra (the paper's figure).
        budget_kib: Budget in KiB, in place of a microcontroller.
        mcu: Microcontroller that a training step must fit; by default stm32f746, unless another budget is given.
        sram_bytes: SRAM that one buffer can use; describes another microcontroller, or replaces the named one's.
        flash_bytes: Flash, likewise.
        reserve_bytes: SRAM that is not for training, likewise.
        epochs: Passes over the training split.
        batch_size: Samples per step.
        learning_rate: At its highest; by default 0.1 / 256 x batch_size (Lin et al.).
        learning_rates: Other ones for some of the schemes, which rarely all learn best at the same, such as
            biases=0.05,last_layers=0.025.
        seeds: Trainings of each scheme.
        batch_1: Train the first scheme also with batch size 1, as a microcontroller does, and the learning rate
            divided by batch_size.
        contributions: Table whose layers, ratios and bias depths random schemes are drawn from; by default all
            expanding convolutions and all bias depths.
        processes: Trainings that run at once, one thread each.
        logger: Of the summary: wandb (offline unless you are logged in), csv or none.
        out_dir: Folder of the comparison; by default a new one below runs/. Where the same comparison was begun, it
            goes on.
    """
    arguments = flat(locals())
    torch.set_num_threads(1)
    check_at_least_one(batch_size=batch_size, seeds=seeds, processes=processes)
    check_ranges(arguments)
    if batch_1 and batch_size == 1:
        raise UserError("batch_size is 1 already: leave --batch_1 out")
    files, rule_names = named_files(schemes), known_rules(rules)
    refuse_duplicates([*files, *rule_names])
    if not files and not rule_names:
        raise UserError("there is nothing to compare: give --schemes evolved=scheme.json, or --rules")
    budget = budget_of(memory, budget_kib, mcu, sram_bytes, flash_bytes, reserve_bytes)
    settings = TrialSettings(
        data, None if data_dir is None else str(data_dir), data_options or {}, weights, width, head_convolution,
        resolution, network=network,
    )  # fmt: skip
    data_arguments = {
        "name": data, "data_dir": settings.data_dir, "weights": settings.source, "resolution": resolution,
        "options": settings.data_options,
    }  # fmt: skip
    described = described_by(settings)
    judge = Judge(described, budget)
    base_rate = 0.1 / 256 * batch_size if learning_rate is None else learning_rate
    rates = dict.fromkeys([*files, *rule_names], base_rate) | own_rates(learning_rates, [*files, *rule_names])
    compared = schemes_to_compare(files, rule_names, judge, contributions, seeds)
    out_dir = out_dir or new_folder(Path("runs") / "compare_schemes")
    train_arguments = {
        "weights": weights, "network": network, "epochs": epochs, "width": width,
        "head_convolution": head_convolution, "mcu": mcu, "sram_bytes": sram_bytes, "flash_bytes": flash_bytes,
        "reserve_bytes": reserve_bytes,
    }  # fmt: skip
    with opened_folder(out_dir, arguments):
        scheme_files = keep_schemes(compared, out_dir)
        trainings = trainings_of(scheme_files, batch_size, rates, batch_1, out_dir, data_arguments, train_arguments)
        if settings.source == "none":
            log.warning("schemes update little of a network that has learnt nothing: give --weights")
        budget_figures = {
            "budget_bytes": budget.size_bytes,
            "mcu": budget.microcontroller and budget.microcontroller.name,
        }
        rows, report = train_and_compare(trainings, memory, processes, out_dir, budget_figures)
        draw_comparison(report, f"{described.name} on {data}, within {budget}", out_dir / "comparison.png")
        log_to_wandb(logger, "compare_schemes", rows, report, out_dir, arguments)
    print_report(report, out_dir)
    return report


def own_rates(learning_rates: str | None, names: Sequence[str]) -> dict[str, float]:
    """The learning rates of ``name=rate`` pairs that commas separate.

    Example::

        own_rates("biases=0.05", ["evolved", "biases"])  # {"biases": 0.05}
    """
    rates = {}
    for pair in listed(learning_rates) or []:
        name, _, text = pair.partition("=")
        if name not in names:
            raise UserError(f"learning_rates names {name!r}, which is not compared: give one of {', '.join(names)}")
        try:
            rates[name] = float(text)
        except ValueError:
            rates[name] = math.nan
        if not 0 < rates[name] < math.inf:
            raise UserError(f"learning_rates has {pair!r}: give name=rate with a positive number, as in {name}=0.05")
    return rates


def named_files(schemes: str) -> dict[str, str]:
    """The files of ``name=file`` pairs that commas separate.

    Example::

        named_files("evolved=scheme.json,optimum=optimum.json")
        # {"evolved": "scheme.json", "optimum": "optimum.json"}
    """
    pairs = [pair.strip().partition("=") for pair in schemes.split(",") if pair.strip()]
    for name, _, path in pairs:
        if not re.fullmatch(r"[\w.+-]+", name) or not path:
            raise UserError(f"{''.join((name, _, path))!r} is no name=file pair: give such as evolved=scheme.json")
    refuse_duplicates([name for name, _, _ in pairs])
    return {name: path for name, _, path in pairs}


def known_rules(rules: str) -> list[str]:
    """The names of rules that commas separate."""
    names = listed(rules)
    for name in names:
        if name not in RULES:
            raise UserError(f"rule {name!r} is unknown: give some of {', '.join(RULES)}")
    return names


def refuse_duplicates(names: Sequence[str]) -> None:
    """Raises ``UserError`` if a name stands there twice."""
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two schemes have the name {doubled[0]}: give each its own")


def schemes_to_compare(
    files: dict[str, str], rules: Sequence[str], judge: Judge, contributions: Path | None, seeds: int
) -> dict[str, list[UpdateScheme]]:
    """The scheme for each seed of everything that is compared; raises ``UserError`` if one does not fit."""
    compared = {name: [judge.described.load_scheme(path)] * seeds for name, path in files.items()}
    for rule in rules:
        is_random = rule == "random"
        compared[rule] = random_schemes(judge, contributions, seeds) if is_random else [ruled(rule, judge)] * seeds
    for name, (scheme, *_) in compared.items():
        judge.refuse_oversize(name, scheme)
    return compared


def ruled(rule: str, judge: Judge) -> UpdateScheme:
    """The largest scheme by a rule that fits; the classifier only, where none does."""
    rules: dict[str, Callable[..., UpdateScheme | None]] = {
        "last_layers": last_layers_that_fit,
        "biases": biases_that_fit,
        "expanding": lambda *of: expanding_convolutions_that_fit(*of, ratios=(1.0,)),
    }
    described = judge.described
    return rules[rule](described.name, described.operations, judge.fits) or classifier_only(described.name)


def random_schemes(judge: Judge, contributions: Path | None, seeds: int) -> list[UpdateScheme]:
    """A scheme for each seed, drawn at random, of which updates are thrown out at random until it fits."""
    described = judge.described
    table = table_without_gains(described) if contributions is None else load_table(contributions, described)
    problem = make_problem(described, table, judge.budget)
    found = []
    for seed in range(seeds):
        rng = random.Random(seed)
        genome = problem.blind_repair(problem.random_genome(rng), rng)
        found.append(problem.scheme(genome, {"rule": "random scheme that fits", "seed": seed}))
    return found


def table_without_gains(described: DescribedNetwork) -> ContributionTable:
    """All bias depths, and all expanding convolutions at some ratios: what there is to draw from."""
    convolutions = described.operations.convolutions
    deepest, nothing = len(convolutions), {"gain": 0.0, "gain_std": 0.0, "runs": 1}
    rows = [Contribution("bias", depth, "", 0.0, **nothing) for depth in range(1, deepest + 1)]
    for layer in filter(is_expanding, convolutions):
        ratios = [ratio for ratio in RATIOS if ratio * layer.in_channels >= 1]
        rows += [Contribution("weight", deepest, layer.name, ratio, **nothing) for ratio in ratios]
    return ContributionTable(tuple(rows))


def keep_schemes(compared: dict[str, Sequence[UpdateScheme]], out_dir: Path) -> dict[str, list[Path]]:
    """Writes the schemes, or checks that those of an earlier start are the same; returns the file for each seed."""
    files: dict[str, list[Path]] = {}
    for name, of_seeds in compared.items():
        differ = name == "random"
        names = [f"{name}-seed{seed}.json" if differ else f"{name}.json" for seed in range(len(of_seeds))]
        files[name] = [out_dir / "schemes" / file for file in names]
        for path, scheme in dict(zip(files[name], of_seeds, strict=True)).items():
            if not path.exists():
                scheme.save(path)
            elif UpdateScheme.load(path).to_dict() != scheme.to_dict():
                raise UserError(
                    f"the comparison in {out_dir} was begun with another scheme {name}, {path}: give that one, or "
                    "another --out_dir"
                )
    return files


def trainings_of(
    files: dict[str, list[Path]], batch_size: int, rates: dict[str, float], batch_1: bool, out_dir: Path,
    data_arguments: dict[str, Any], train_arguments: dict[str, Any],
) -> list[Training]:  # fmt: skip
    """All trainings, those of one seed after another, so that what is known early can be compared."""
    trainings = []
    first = next(iter(files))
    for seed in range(len(files[first])):
        for name, of_seeds in files.items():
            arguments = {**train_arguments, "scheme": str(of_seeds[seed])}
            folder = out_dir / "runs" / f"{name}-seed{seed}"
            trainings.append(Training(name, seed, batch_size, rates[name], str(folder), data_arguments, arguments))
            if batch_1 and name == first:
                folder = out_dir / "runs" / f"{name},batch1-seed{seed}"  # no scheme's name has a comma
                rate = rates[name] / batch_size
                alone = Training(f"{name}, batch 1", seed, 1, rate, str(folder), data_arguments, arguments)
                trainings.append(alone)
    return trainings


if __name__ == "__main__":
    run_recipe(main)
