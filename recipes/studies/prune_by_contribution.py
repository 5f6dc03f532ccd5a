"""Removes the channels that contribute least, for real, and asks whether contribution says what inference can spare.

    uv run recipes/studies/prune_by_contribution.py --data cifar10 --data_dir data --weights runs/cifar/last.ckpt \\
        --learning_rate 0.003 --out_dir runs/pruning

The network must know the data's classes. What goes is a channel with all that depends on it (see
``structured_pruning``), in the order of its contribution, magnitude and others, until a part of the
multiply-accumulates is gone; each network is tested as it is, and after a short fine-tuning of all weights. Beside that
some units are removed alone, to see which score ranks the loss that this costs. The same command goes on where it was
stopped.

A pruned network goes on in a program of one's own, which has folded network and input shape from the same weights:
``remove_units(network, input_shape, json.loads(path.read_text()))`` with a file of ``removed/`` makes it again, exactly
as it was before fine-tuning. It needs the package torch-pruning: ``uv sync --extra prune``.
"""

import copy
import logging
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microtune.datamodules.contract import Split
from microtune.datamodules.data_sets import DataName
from microtune.datamodules.kept_features import TrunkFeatures
from microtune.datamodules.progress import progress_bar
from microtune.modules.atomic_files import write_json
from microtune.modules.csv_rows import read_rows, write_rows
from microtune.modules.int8.files import is_quantized_file
from microtune.modules.learning_rate import learning_rate_factor
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import flash_bytes, multiply_accumulates
from microtune.modules.networks.operations import find_operations
from microtune.modules.search.frozen_trunk import cut_network, features_of
from microtune.modules.sparse_update.channel_importance import ChannelImportance
from microtune.modules.sparse_update.simple_schemes import classifier_only
from microtune.modules.user_error import UserError
from microtune.recipes.studies.pruning_report import (
    UNPRUNED,
    PrunedRow,
    SingleUnit,
    correlations,
    curves,
    draw_prunings,
    draw_single_units,
    print_report,
    single_unit_type,
    verdicts,
)
from microtune.recipes.studies.structured_pruning import (
    ChannelGroup,
    PruningCriterion,
    check_criterion,
    find_groups,
    measure_units,
    remove_units,
    unit_scores,
    units_to_remove,
    without_unit,
)
from microtune.recipes.studies.study_folder import opened_folder
from microtune.recipes.training.command_line import check_at_least_one, flat, listed, numbers, run_recipe
from microtune.recipes.training.data_module import data_module
from microtune.recipes.training.networks import DescribedNetwork, describe_network
from microtune.recipes.training.options import LoggerName
from microtune.recipes.training.plan import check_ranges, source_of_weights
from microtune.recipes.training.run_folder import new_folder

log = logging.getLogger(__name__)

CRITERIA = "contribution,magnitude,taylor,fisher,activation_norm,random"
WARMUP_FRACTION = 0.1  # of the fine-tuning, as in the training recipes
OR_ANEW = ", or remove the file to measure anew"
LATENCY_PASSES, WARM_UP_PASSES = 100, 3  # the first are slower
BATCH, BATCH_PASSES = 32, 10  # to see what is left of the gain where PyTorch's own work per layer weighs less


@dataclass(frozen=True)
class Pruning:
    """What all prunings begin with.

    Args:
        network: Folded, trained.
        described: The same network without weights, and its operations.
        groups: Of its channels.
        importance: Of its input channels.
        samples: Of the data set.
    """

    network: nn.Module
    described: DescribedNetwork
    groups: list[ChannelGroup]
    importance: ChannelImportance
    samples: TrunkFeatures

    def scores(self, criterion: PruningCriterion, seed: int) -> dict[str, Tensor]:
        """Of every unit."""
        return unit_scores(self.network, self.described.input_shape, criterion, self.importance, seed)


@dataclass(frozen=True)
class FineTuning:
    """A short training of a pruned network, the same for all.

    Args:
        steps: Of SGD on all weights; 0 for none.
        batch_size: Samples of a step.
        learning_rate: At its highest.
    """

    steps: int
    batch_size: int
    learning_rate: float


def main(
    data: DataName,
    weights: str,
    data_dir: Path | None = None,
    data_options: dict[str, Any] | None = None,
    network: str = "mobilenet_v2",
    resolution: int = 96,
    width: float | None = None,
    head_convolution: bool = False,
    criteria: str = CRITERIA,
    sparsities: str = "0.1,0.2,0.3,0.5",
    channel_multiple: int = 1,
    choice_samples: int = 256,
    fine_tuning_steps: int = 100,
    batch_size: int = 32,
    learning_rate: float | None = None,
    seeds: int = 3,
    single_units: int = 200,
    single_unit_samples: int | None = None,
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
) -> dict[str, Any]:
    """Removes the channels that contribute least, for real, and asks whether that is what inference can spare.

    Args:
        data: Name of the data set.
        weights: Weights of a network that knows the data's classes: the .ckpt of a training recipe, or torchvision for
            ImageNet.
        data_dir: Folder of the data.
        data_options: Further arguments of the data module.
        network: Network: mobilenet_v2; an int8 network cannot be pruned.
        resolution: Height and width of images, in pixels; speech has the shape of its spectrograms.
        width: Multiplier of the network's channels; by default that of the weights.
        head_convolution: Whether the network has its last 1x1 convolution.
        criteria: Criteria that units are ranked by, separated by commas; the others are compared with the first.
        sparsities: Parts of the multiply-accumulates to remove, separated by commas.
        channel_multiple: Number of which each layer's remaining channels are a multiple; kernels of some
            microcontrollers want 4.
        choice_samples: Training samples that the scores are measured on.
        fine_tuning_steps: Steps of SGD on all weights of a pruned network; 0 for none.
        batch_size: Samples per step.
        learning_rate: Learning rate of the fine-tuning at its highest; by default 0.1 / 256 x batch_size (Lin et al.).
        seeds: Random orders, and fine-tunings of each network, with other orders of the samples.
        single_units: Number of units that are removed alone, shared out evenly among the groups; 0 for none.
        single_unit_samples: Validation samples that this is measured on; by default all.
        logger: Logger of the summary: wandb (offline unless you are logged in), csv or none.
        out_dir: Folder of the results; by default a new one below runs/. Where the same pruning was begun, it goes on.
    """
    started, arguments = time.monotonic(), flat(locals())
    torch.set_num_threads(1)
    check_at_least_one(
        resolution=resolution, channel_multiple=channel_multiple, choice_samples=choice_samples,
        batch_size=batch_size, seeds=seeds, single_unit_samples=single_unit_samples,
    )  # fmt: skip
    check_ranges(arguments)
    for name in ("fine_tuning_steps", "single_units"):
        if arguments[name] < 0:
            raise UserError(f"{name} is {arguments[name]}: give 0 or more")
    names, parts = criteria_of(criteria), sparsities_of(sparsities)
    source = floating_point_source(network, weights)

    of_data = data_module(data, data_dir, source, resolution, batch_size, 0, data_options)
    if not of_data.val_samples:
        raise UserError("single units are judged on the validation split: leave validation_fraction 0 out")
    described = describe_network(source, of_data.input_shape, of_data.num_classes, width, head_convolution)
    rate = 0.1 / 256 * batch_size if learning_rate is None else learning_rate
    fine_tuning = FineTuning(fine_tuning_steps, batch_size, rate)
    prepared = prepare(source, described, of_data, fine_tuning, choice_samples)
    # what can be reached does not depend on the order: refused before minutes of work
    units_to_remove(described.operations, prepared.groups, prepared.scores("random", 0), parts[-1], channel_multiple)
    out_dir = out_dir or new_folder(Path("runs") / "prune_by_contribution")
    with opened_folder(out_dir, arguments):
        units = removed_alone(prepared, names, single_units, single_unit_samples, out_dir)
        rows = prune_all(prepared, names, parts, channel_multiple, seeds, fine_tuning, out_dir)
        report = {
            "criteria": names,
            "fine_tuning_steps": fine_tuning_steps,
            "correlations": correlations(units, names),
            "prunings": curves(rows, names),
        }
        report |= {"verdict": verdicts(report), "seconds": time.monotonic() - started}
        write_json(out_dir / "report.json", report)
        draw_prunings(report, f"{described.name} on {data}, pruned", out_dir / "pruning.png")
        if report["correlations"]:
            draw_single_units(units, report, out_dir / "single_units.png")
        log_to_wandb(logger, rows, report, out_dir, arguments)
    print_report(report, out_dir)
    return report


def criteria_of(text: str) -> list[str]:
    """The criteria that commas separate; raises ``UserError`` if one is unknown, or there is none."""
    names = list(dict.fromkeys(listed(text)))
    for name in names:
        check_criterion(name)
    if not names:
        raise UserError(f"criteria names none: give some of {CRITERIA}")
    return names


def sparsities_of(text: str) -> list[float]:
    """The sparsities that commas separate, in ascending order; raises ``UserError`` unless all are between 0 and 1."""
    parts = sorted(set(numbers(text, float)))
    if not parts or not all(0 < part < 1 for part in parts):
        raise UserError(f"sparsities is {text!r}: give parts above 0 and below 1, as in 0.1,0.3")
    return parts


def floating_point_source(network: str, weights: str) -> str:
    """Where the weights are; raises ``UserError`` if there are none, or if they are of an int8 network."""
    for given in (network, weights):
        if is_quantized_file(given):
            raise UserError(f"{given} is an int8 network: prune its .ckpt in floating point first, and quantize after")
    if weights == "none":
        raise UserError("weights is none, and pruning needs a network that knows the data: give a .ckpt")
    return source_of_weights(network, weights)


def prepare(
    source: str, described: DescribedNetwork, data: Any, fine_tuning: FineTuning, choice_samples: int
) -> Pruning:
    """Loads the network, finds its groups and measures its channels on training samples."""
    # Lightning takes seconds to import, which a command line need not wait for
    from microtune.modules.classifier import Classifier
    from microtune.recipes.training.pretrained import load_pretrained

    module = Classifier(described.arguments, class_names=data.class_names, input_shape=list(described.input_shape))
    load_pretrained(module, source, described.input_shape, whole=True)
    network = module.net.eval()
    groups = find_groups(network, described.input_shape)
    batches_of_choice = math.ceil(choice_samples / fine_tuning.batch_size)
    batches = max(fine_tuning.steps, batches_of_choice)
    copies = math.ceil(batches * fine_tuning.batch_size / data.train_samples)
    samples = TrunkFeatures(nn.Identity(), data, copies, keep="none")
    choice = samples.training_batches(fine_tuning.batch_size, 0, batches_of_choice)
    importance = measure_units(network, described.operations, _first_samples(choice, choice_samples))
    return Pruning(network, described, groups, importance, samples)


def _first_samples(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for samples, labels in batches:
        if count > 0:
            yield samples[:count], labels[:count]
        count -= len(labels)


def prune_all(
    prepared: Pruning,
    criteria: Sequence[str],
    sparsities: Sequence[float],
    channel_multiple: int,
    seeds: int,
    fine_tuning: FineTuning,
    out_dir: Path,
) -> list[PrunedRow]:
    """Prunes, fine-tunes and tests what ``pruning.csv`` does not have yet; returns all its rows."""
    keys = keys_of(criteria, sparsities, seeds, fine_tuning.steps > 0)
    path = out_dir / "pruning.csv"
    rows = {row.key: row for row in read_rows(path, PrunedRow, remedy=OR_ANEW)} if path.exists() else {}
    missing = [key for key in keys if key not in rows]
    shape = prepared.described.input_shape
    with progress_bar() as progress:
        bar = progress.add_task("pruned networks", total=len(keys), completed=len(keys) - len(missing))
        for number, key in enumerate(missing, 1):
            criterion, sparsity, seed, fine_tuned = key
            network = copy.deepcopy(prepared.network)
            if criterion != UNPRUNED:
                seed_of_order = seed if criterion == "random" else 0
                scores = prepared.scores(criterion, seed_of_order)
                removed = units_to_remove(
                    prepared.described.operations, prepared.groups, scores, sparsity, channel_multiple
                )
                write_json(out_dir / "removed" / f"{criterion}-{sparsity:g}-seed{seed_of_order}.json", removed)
                network = remove_units(prepared.network, shape, removed)
            network = network.to(memory_format=torch.channels_last)
            if fine_tuned:
                fine_tune(network, prepared.samples, fine_tuning, seed)
            rows[key] = measured(network, prepared, key)
            write_rows(path, [rows[one] for one in keys if one in rows], PrunedRow)
            progress.update(bar, advance=1)
            if progress.disable and number % 10 == 0:
                log.info("%d of %d pruned networks", len(keys) - len(missing) + number, len(keys))
    return [rows[key] for key in keys]


def keys_of(
    criteria: Sequence[str], sparsities: Sequence[float], seeds: int, with_fine_tuning: bool
) -> list[tuple[str, float, int, bool]]:
    """Criterion, sparsity, seed and whether fine-tuned of every row; without chance, one seed is enough."""
    networks = [(UNPRUNED, 0.0)] + [(criterion, sparsity) for criterion in criteria for sparsity in sparsities]
    keys = [(*one, seed, False) for one in networks for seed in range(seeds if one[0] == "random" else 1)]
    # those of one seed after another, so that what is known early can be compared
    return keys + [(*one, seed, True) for seed in range(seeds) for one in networks if with_fine_tuning]


def fine_tune(network: nn.Module, samples: TrunkFeatures, fine_tuning: FineTuning, seed: int) -> None:
    """Trains all weights with SGD for some steps, with warm-up and a cosine to zero.

    Args:
        network: Changed in place.
        samples: Of the data set.
        fine_tuning: How.
        seed: Of the order of the samples.
    """
    network.train().requires_grad_(True)
    optimizer = torch.optim.SGD(network.parameters(), lr=math.nan)
    warmup_steps = round(WARMUP_FRACTION * fine_tuning.steps)
    batches = samples.training_batches(fine_tuning.batch_size, seed, fine_tuning.steps)
    for step, (inputs, labels) in enumerate(batches):
        factor = learning_rate_factor(step, warmup_steps, fine_tuning.steps)
        optimizer.param_groups[0]["lr"] = fine_tuning.learning_rate * factor
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(inputs), labels)
        loss.backward()
        optimizer.step()
    if not loss.isfinite():
        log.warning(
            "a fine-tuning diverged at learning rate %g, and its accuracy means little: give a smaller --learning_rate",
            fine_tuning.learning_rate,
        )
    network.eval()


def measured(network: nn.Module, prepared: Pruning, key: tuple[str, float, int, bool]) -> PrunedRow:
    """What the network can do, and what it takes."""
    operations = find_operations(network, prepared.described.input_shape)
    scheme = classifier_only(prepared.described.name)
    classifier = operations.classifier_classes * (operations.classifier_features + 4)
    shape, unpruned = prepared.described.input_shape, prepared.network
    latency_ms, ratio = latency(network, unpruned, shape, 1, LATENCY_PASSES)
    _, top1 = loss_and_top1(network, prepared.samples.evaluation_batches("test"))
    _, val_top1 = loss_and_top1(network, prepared.samples.evaluation_batches("val"))
    return PrunedRow(
        *key,
        top1=top1,
        val_top1=val_top1,
        multiply_accumulates=multiply_accumulates(operations, scheme).forward,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        flash_bytes=flash_bytes(operations, scheme) + classifier,
        peak_bytes=PeakMemory(operations).inference_peak_bytes,
        latency_ms=latency_ms,
        latency_ratio=ratio,
        batch_latency_ratio=latency(network, unpruned, shape, BATCH, BATCH_PASSES)[1],
    )


@torch.inference_mode()
def loss_and_top1(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean cross entropy and top-1 over batches of samples and labels."""
    loss, correct, count = 0.0, 0, 0
    for samples, labels in batches:
        logits = network(samples)
        loss += float(nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return loss / count, correct / count


@torch.inference_mode()
def latency(
    network: nn.Module, other: nn.Module, input_shape: tuple[int, int, int], samples: int, passes: int
) -> tuple[float, float]:
    """Median milliseconds of a forward pass on one core, and the ratio to another network's, measured in turns.

    Counted is the processor's time for it, so that other work on the machine matters little, and it is counted in
    turns, since what is left of that slows both alike.

    Args:
        network: Whose time is told.
        other: What it is compared with.
        input_shape: Channels, height and width of a sample.
        samples: Of one pass.
        passes: How many of each network are counted.
    """
    inputs = torch.zeros(samples, *input_shape).contiguous(memory_format=torch.channels_last)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(-WARM_UP_PASSES, passes):
        for of_one, one in zip(seconds, (network, other), strict=True):
            began = time.thread_time()
            one(inputs)
            if number >= 0:
                of_one.append(time.thread_time() - began)
    own, others = (statistics.median(times) for times in seconds)
    return own * 1000, own / others


def removed_alone(
    prepared: Pruning, criteria: Sequence[str], count: int, samples: int | None, out_dir: Path
) -> list[SingleUnit]:
    """The units of ``single_units.csv``, which are measured unless it is there.

    Args:
        prepared: The network and its scores.
        criteria: Whose scores are kept beside what is measured.
        count: How many units.
        samples: How many of the validation split; None for all.
        out_dir: Folder of the results.
    """
    path, unit_type = out_dir / "single_units.csv", single_unit_type(*criteria)
    if count == 0:
        return []
    if not path.exists():
        scores = {criterion: prepared.scores(criterion, 0) for criterion in criteria}
        units = measure_alone(prepared, chosen_units(prepared.groups, count, 0), samples, scores)
        write_rows(path, units, unit_type)
    return read_rows(path, unit_type, remedy=OR_ANEW)


def chosen_units(groups: Sequence[ChannelGroup], count: int, seed: int) -> list[tuple[ChannelGroup, int]]:
    """Units drawn at random, as many of each group as of the others while it has any; all, if there are fewer.

    Args:
        groups: The network's.
        count: How many.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(group.channels, generator=generator).tolist() for group in groups]
    places = torch.randperm(len(groups), generator=generator).tolist()
    drawn = [(turn, place) for turn in range(max(map(len, orders))) for place in places if turn < len(orders[place])]
    return [(groups[place], orders[place][turn]) for turn, place in drawn[:count]]


def measure_alone(
    prepared: Pruning,
    chosen: Sequence[tuple[ChannelGroup, int]],
    samples: int | None,
    scores: dict[str, dict[str, Tensor]],
) -> list[SingleUnit]:
    """What removing each unit alone costs; what lies before the layers that read it is computed once for all."""
    operations, unit_type = prepared.described.operations, single_unit_type(*scores)
    places = {convolution.name: place for place, convolution in enumerate(operations.convolutions)}
    depths = {
        group.name: len(places) - min(places.get(layer, len(places)) for layer in group.readers)
        for group in prepared.groups
    }
    measured_units = []
    with progress_bar() as progress:
        bar = progress.add_task("units removed alone", total=len(chosen))
        for depth in sorted({depths[group.name] for group, _ in chosen}, reverse=True):
            trunk, rest = cut_network(prepared.network, operations, depth)
            batches = validation_features(prepared.samples, trunk, samples)
            loss_before, top1_before = loss_and_top1(rest, batches)
            for group, channel in chosen:
                if depths[group.name] != depth:
                    continue
                with without_unit(rest, group, channel):
                    loss, top1 = loss_and_top1(rest, batches)
                of_unit = {name: float(of_groups[group.name][channel]) for name, of_groups in scores.items()}
                measured_units.append(
                    unit_type(group.name, group.kind, channel, loss - loss_before, top1_before - top1, **of_unit)
                )
                progress.update(bar, advance=1)
    return measured_units


def validation_features(
    samples: TrunkFeatures, trunk: nn.Module, count: int | None, split: Split = "val"
) -> list[tuple[Tensor, Tensor]]:
    """What the trunk makes of validation samples, of all or of some evenly spread."""
    total = samples.samples[split]
    wanted = set(torch.linspace(0, total - 1, min(count or total, total)).round().long().tolist())
    batches, first = [], 0
    for inputs, labels in samples.evaluation_batches(split):
        chosen = [index for index in range(len(labels)) if first + index in wanted]
        first += len(labels)
        if chosen:
            batches.append((features_of(trunk, inputs[chosen]), labels[chosen]))
    return batches


def log_to_wandb(
    logger: LoggerName, rows: Sequence[PrunedRow], report: dict[str, Any], out_dir: Path, arguments: dict[str, Any]
) -> None:
    """Logs the results and the pictures as one run."""
    if logger != "wandb":
        return
    import wandb

    from microtune.recipes.training.loggers import make_loggers, wandb_run

    experiment = wandb_run(make_loggers(logger, out_dir, "prune_by_contribution"))
    if experiment is not None:
        experiment.config.update({"arguments": arguments}, allow_val_change=True)
        table = wandb.Table(list(PrunedRow.__dataclass_fields__), [list(astuple(row)) for row in rows])
        pictures = [path for path in (out_dir / "pruning.png", out_dir / "single_units.png") if path.exists()]
        experiment.log({"prunings": table} | {path.stem: wandb.Image(str(path)) for path in pictures})
        experiment.summary.update({"verdict": report["verdict"]})
        wandb.finish()


if __name__ == "__main__":
    run_recipe(main)
