"""Makes the file of an int8 network: quantizes a trained one after training, or reads one that Lin et al. published.

    uv run recipes/quantize_network.py --source mbv2-w0.35.pkl --out network.safetensors
    uv run recipes/quantize_network.py --source runs/train_cifar/20261120-100000/last.ckpt --out network.safetensors \\
        --data cifar10 --data_dir data

Reading takes seconds, nearly all of them to import PyTorch, and quantizing a MobileNetV2 of width 0.35 at 96 px a
quarter of a minute on one core of an AMD EPYC. What got 83.8 % of 1,500 test images of CIFAR-10 gets 83.2 % in int8,
and torchvision's MobileNetV2 80.7 % of 1,000 of ImageNet, where it got 81.4 %.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from microtune.datamodules.contract import ClassificationData
from microtune.datamodules.data_sets import DATA_SETS, DataName, find_data_set
from microtune.datamodules.reproducible_order import seeded_torch
from microtune.modules.int8.activation_ranges import RangeEstimator
from microtune.modules.int8.files import is_quantized_file, write_quantized_network
from microtune.modules.int8.graph import INT8_SUFFIX, QuantizedGraph
from microtune.modules.int8.layers import NEAR_ZERO
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.int8.post_training_quantization import (
    calibrate,
    quantize_after_training,
    renormalized,
)
from microtune.modules.int8.published_networks import read_published_network
from microtune.modules.networks.pretrained_weights import KERAS_SUFFIXES
from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import check_at_least_one, run_recipe
from microtune.recipes.training.data_module import data_module
from microtune.recipes.training.memory_figures import KIB, size_of
from microtune.recipes.training.networks import describe_network, input_shape_of
from microtune.recipes.training.plan import check_ranges

PICKLE_SUFFIXES = (".pkl", ".pickle")
SUFFIXES = (".pth", ".pt", ".ckpt", *KERAS_SUFFIXES)
Int8 = tuple[QuantizedGraph, dict[str, Tensor]]


def main(
    source: str,
    out: Path,
    data: DataName | None = None,
    data_dir: Path | None = None,
    data_options: dict[str, Any] | None = None,
    resolution: int | None = None,
    width: float | None = None,
    head_convolution: bool = False,
    samples: int = 256,
    estimator: RangeEstimator = "mse",
    batch_size: int = 32,
    seed: int = 0,
    overwrite: bool = False,
) -> QuantizedGraph:
    """Makes the file of an int8 network: quantizes a trained one after training, or reads a published one.

    Args:
        source: The .pkl file of a published int8 network, or a network in floating point: torchvision, or a .pth,
            .ckpt, .h5 or .npz file.
        out: The .safetensors file.
        data: Name of the data set whose training split, not augmented unless data_options ask for it, is what ranges
            are taken from. What the source's classifier was trained on, or what is to be learnt; then the classifier
            stays in floating point.
        data_dir: Folder of the data set.
        data_options: Further arguments of the data module.
        resolution: Height and width of images, in pixels; by default what a checkpoint was trained on, else 96. Speech
            has the shape of its spectrograms.
        width: Multiplier of the network's channels; by default that of the source.
        head_convolution: Whether the network has its last 1x1 convolution.
        samples: Number of training samples that ranges are taken from.
        estimator: Way to estimate ranges: mse (which clips) or min_max. Both are measured, this one is written.
        batch_size: Number of samples that are computed at once.
        seed: Seed that chooses the samples, and the weights of a fresh classifier.
        overwrite: Whether to replace the file if it exists.
    """
    check_at_least_one(samples=samples, batch_size=batch_size, resolution=resolution)
    check_ranges({"seed": seed})
    check_out(out, overwrite)
    recipe = "train_*.py"
    if Path(source).suffix in PICKLE_SUFFIXES:
        if data is not None or data_dir is not None:
            raise UserError(f"{source} is an int8 network with ranges of its own: leave --data and --data_dir out")
        graph, tensors = read_published_network(source)
    else:
        check_source(source, data)
        if resolution is None:
            known = input_shape_of(source)
            resolution = 96 if known is None else known[1]
        data_set = find_data_set(data)
        recipe = data_set.recipe or recipe
        options = {**data_set.without_augmentation, **(data_options or {})}
        calibration_data = data_module(data, data_dir, source, resolution, batch_size, seed, options)
        trained = trained_network(source, calibration_data, width, head_convolution, seed)
        graph, tensors = quantized(trained, calibration_data, samples, estimator)
    write_quantized_network(out, graph, tensors)
    print(summary(graph, tensors, out))
    print(f"next: train it, or its classifier: recipes/{recipe} --network {out}")
    return graph


def check_out(out: Path, overwrite: bool) -> None:
    """Raises ``UserError`` if the file cannot or shall not be written: asked before long work begins."""
    if not is_quantized_file(out):
        raise UserError(f"out is {out}: give a name that ends in .safetensors")
    if out.is_dir():
        raise UserError(f"out is {out}, a folder: give the name of a file")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: give another --out, or --overwrite to replace it")


def check_source(source: str, data: str | None) -> None:
    """Raises ``UserError`` if the source is no trained network in floating point, or there is no data for it."""
    if is_quantized_file(source):
        raise UserError(f"{source} is an int8 network already: give one in floating point, or a published .pkl")
    if source == "none" or (source != "torchvision" and Path(source).suffix not in SUFFIXES):
        raise UserError(f"source is {source!r}: give torchvision, a {', '.join(SUFFIXES)} or a published .pkl file")
    if data is None:
        raise UserError(
            f"{source} is in floating point, and its ranges are taken from samples: give --data, one of "
            f"{', '.join(DATA_SETS)}, and --data_dir"
        )


@dataclass(frozen=True)
class TrainedNetwork:
    """A folded network in floating point, and what is known of it.

    Args:
        name: As update schemes name it.
        network: With its weights.
        knows_classes: Whether its classifier was trained for the classes of the data.
    """

    name: str
    network: nn.Module
    knows_classes: bool


def trained_network(
    source: str, data: ClassificationData, width: float | None, head_convolution: bool, seed: int
) -> TrainedNetwork:
    """Builds the network that fits the weights and loads them, its classifier too if it is for the data's classes."""
    # Lightning takes seconds to import, which a command line need not wait for
    from microtune.modules.classifier import Classifier
    from microtune.recipes.training.pretrained import load_pretrained

    described = describe_network(source, data.input_shape, data.num_classes, width, head_convolution)
    for whole in (True, False):
        with seeded_torch(seed, 0, 0):
            module = Classifier(described.arguments, class_names=data.class_names)
        try:
            load_pretrained(module, source, data.input_shape, whole)
            return TrainedNetwork(described.name, module.net, knows_classes=whole)
        except UserError:  # of another mistake than a classifier that does not fit, the second time too
            if not whole:
                raise
    raise AssertionError


class TrainingSamples:
    """The first samples of a data module's training split in its order, as batches; every pass gives the same.

    Args:
        data: Data module, set up.
        count: Number of samples.

    Example::

        calibrate(network, TrainingSamples(data, 256))
    """

    def __init__(self, data: ClassificationData, count: int):
        self.data = data
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        left = self.count
        for batch in self.data.train_dataloader():
            samples, _ = self.data.on_after_batch_transfer(batch, 0)
            yield samples[:left].contiguous(memory_format=torch.channels_last)
            left -= len(samples)
            if left <= 0:
                return


def quantized(trained: TrainedNetwork, data: ClassificationData, samples: int, estimator: RangeEstimator) -> Int8:
    """Quantizes by both estimators, says what each costs on the validation split, and returns what is asked for."""
    calibration = calibrate(trained.network, TrainingSamples(data, samples))
    print(f"{trained.name}: ranges of {calibration.samples:,} samples of the training split")
    made = {
        one: quantize_after_training(
            trained.network, calibration, trained.name + INT8_SUFFIX, one, data.normalization, data.class_names,
            trained.knows_classes,
        )
        for one in get_args(RangeEstimator)
    }  # fmt: skip
    if not trained.knows_classes:
        print(f"the classifier of {data.num_classes} classes is fresh and stays in floating point: train it")
    elif data.val_samples:
        Console(width=None if sys.stdout.isatty() else 140).print(accuracy_table(trained.network, made, data))
    return made[estimator]


def accuracy_table(network: nn.Module, made: Mapping[str, Int8], data: ClassificationData) -> Table:
    """Top-1 on the validation split: in floating point, and in int8 by each estimator."""
    networks = {"float": network}
    for name, (graph, tensors) in made.items():
        networks[f"int8, {name}"] = QuantizedNetwork(graph).to(memory_format=torch.channels_last)
        load_quantized_tensors(networks[f"int8, {name}"], tensors)
    right = correct_on_validation(networks, data)
    table = Table("network", title=f"Top-1 on the validation split of {data.val_samples:,} samples")
    for column in ("top-1", "change in points"):
        table.add_column(column, justify="right")
    for name, count in right.items():
        change = "" if name == "float" else f"{(count - right['float']) / data.val_samples * 100:+.2f}"
        table.add_row(name, f"{count / data.val_samples:.2%}", change)
    return table


@torch.inference_mode()
def correct_on_validation(networks: Mapping[str, nn.Module], data: ClassificationData) -> dict[str, int]:
    """How many samples of the validation split each network gets right."""
    right = dict.fromkeys(networks, 0)
    for batch in data.val_dataloader():
        given, labels = data.on_after_batch_transfer(batch, 0)
        for name, network in networks.items():
            samples = given
            if isinstance(network, QuantizedNetwork) and network.graph.normalization is not None:
                samples = renormalized(given, data.normalization, network.graph.normalization)
            logits = network.eval()(samples.contiguous(memory_format=torch.channels_last))
            right[name] += int((logits.argmax(1) == labels).sum())
    return right


def summary(graph: QuantizedGraph, tensors: Mapping[str, Tensor], out: Path) -> str:
    """What was written, and what of it may surprise."""
    layers = [name for name, _ in graph.convolutions()]
    classifier, output = graph.classifier, "in floating point" if graph.classifier.output is None else "int8"
    weights = sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == torch.int8)
    lines = [
        f"{graph.name}: {len(layers)} convolutions and a classifier of {classifier.classes} classes ({output}), "
        f"input of {graph.input_shape[0]} channels, {size_of(graph.input_shape)}",
        f"written: {out}, {out.stat().st_size / KIB:,.1f} KiB, of which {weights / KIB:,.1f} KiB are int8 weights",
    ]
    near_zero = {name: channels_near_zero(tensors[f"{name}.weight_scales"]) for name in layers}
    if any(near_zero.values()):
        found = ", ".join(f"{name} ({count})" for name, count in near_zero.items() if count)
        lines.append(
            f"{sum(near_zero.values())} output channels have a weight scale near zero, below {NEAR_ZERO:g} of their "
            f"layer's median, and quantization-aware scaling leaves their weights as they are: {found}"
        )
    return "\n".join(lines)


def channels_near_zero(scales: Tensor) -> int:
    """How many of a layer's weight scales quantization-aware scaling takes for zero."""
    return int((scales < NEAR_ZERO * scales.median()).sum())


if __name__ == "__main__":
    run_recipe(main)
