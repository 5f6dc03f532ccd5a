"""The int8 networks that Lin et al. (2022) published, read from their pickles."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from microtune.modules.int8.graph import (
    INT8_MAX,
    INT8_MIN,
    INT8_SUFFIX,
    InvertedResidual,
    Quantization,
    QuantizedClassifier,
    QuantizedConvolution,
    QuantizedGraph,
)
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2, network_name
from microtune.modules.restricted_pickle import read_plain_pickle
from microtune.modules.user_error import UserError

REMEDY = "give a pickle of an int8 network as Lin et al. published them, such as mbv2-w0.35.pkl"
NETWORK_KEYS = ("first_conv", "blocks", "feature_mix", "classifier")
BLOCK_KEYS = ("pointwise1", "depthwise", "pointwise2", "residual", "se")
CLASSIFIER_KEYS = ("in_channel", "out_channel", "kernel_size", "stride", "groups", "params")
CONVOLUTION_KEYS = (*CLASSIFIER_KEYS, "in_shape", "out_shape", "depthwise", "act")
RESIDUAL_KEYS = ("in_channel", "in_shape", "params")
PARAMS_KEYS = ("x_scale", "x_zero", "y_scale", "y_zero", "weight", "bias", "w_scales")
FLOAT32 = np.finfo(np.float32)
WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.3, 1.4)  # those with public weights


def read_published_network(path: str | Path, name: str | None = None) -> tuple[QuantizedGraph, dict[str, Tensor]]:
    """Reads an int8 network of inverted residuals from a pickle of Lin et al. (2022), and runs nothing that it names.

    Args:
        path: A pickle, or the zip file that ``torch.save`` makes of one.
        name: Of the graph; by default ``architecture_of`` it, or else the file's name, with ``-int8`` behind.

    Returns:
        The graph, whose classifier is int8 too, and its tensors: ``"<layer>.weight"`` in int8, ``"<layer>.bias"`` in
        int32 and ``"<layer>.weight_scales"`` in float32, of every convolution and of ``"classifier"``.

    Raises:
        UserError: The file is missing, is no such pickle, contradicts itself, or has what is not supported: squeeze and
            excitation, convolutions beside a block, activations that are not where an int8 output saturates.

    Example::

        graph, tensors = read_published_network("mbv2-w0.35.pkl")
        graph.name  # "mobilenet_v2-w0.35-int8"
        tensors["blocks.3.pointwise1.weight"].shape  # (96, 16, 1, 1)
    """
    path = Path(path)
    network = _Entry(path, "", read_plain_pickle(path, "a published int8 network", REMEDY))
    network.check_keys(NETWORK_KEYS)
    first_conv, features = _convolution(network["first_conv"], None)
    blocks = []
    for entry in network["blocks"].items():
        block, features = _block(entry, features)
        blocks.append(block)
    feature_mix = network.optional("feature_mix")
    if feature_mix is not None:
        feature_mix, features = _convolution(feature_mix, features)
    size = network["first_conv"]["in_shape"].size()
    graph = QuantizedGraph(
        name=name or path.stem + INT8_SUFFIX,
        input_shape=(first_conv.in_channels, size, size),
        input=first_conv.input,
        normalization=_normalization(first_conv),
        first_conv=first_conv,
        blocks=tuple(blocks),
        feature_mix=feature_mix,
        classifier=_classifier(network["classifier"], features),
    )
    architecture = architecture_of(convolution for _, convolution in graph.convolutions())
    if name is None and architecture is not None:
        graph = dataclasses.replace(graph, name=architecture + INT8_SUFFIX)
    return graph, _tensors(network, graph)


def architecture_of(convolutions: Iterable[QuantizedConvolution]) -> str | None:
    """Names the MobileNetV2 that has these convolutions, or returns None if no usual width has.

    Channels, kernels, strides and groups count; padding does not, as schemes carry over from one to another.

    Args:
        convolutions: Of the whole network, in forward order.

    Example::

        architecture_of(convolution for _, convolution in graph.convolutions())  # "mobilenet_v2-w0.35"
    """
    found = [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.groups) for c in convolutions]
    for width in WIDTHS:
        whole = _convolutions_of(width)
        whole = [(found[0][0], *whole[0][1:]), *whole[1:]] if found else whole  # it may read grey images
        for head_convolution, expected in ((True, whole), (False, whole[:-1])):
            if found == expected:
                return network_name(width, head_convolution)
    return None


@functools.cache
def _convolutions_of(width: float) -> list[tuple]:
    with torch.device("meta"):  # shapes only
        network = mobilenet_v2(width, head_convolution=True)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    return [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.groups) for c in convolutions]


def _normalization(first_conv: QuantizedConvolution) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What makes of a pixel p, from 0 to 255, the real number for which the integer p - 128 stands.

    The networks were trained with mean and deviation 127.5 / 255, of which the real numbers are half an integer off:
    rounded to even, every second value would be lost.
    """
    scale, zero_point = first_conv.input.scale, first_conv.input.zero_point
    mean, deviation = (zero_point - INT8_MIN) / 255, 1 / (255 * scale)
    return (mean,) * first_conv.in_channels, (deviation,) * first_conv.in_channels


@dataclass(frozen=True)
class _Entry:
    """A value of the pickle and where it stands, so that what is wrong is told with its place."""

    path: Path
    key: str
    value: Any

    def __getitem__(self, key: str) -> "_Entry":
        if type(self.value) is list:
            return _Entry(self.path, f"{self.key}.{key}", self.value[int(key)])
        if type(self.value) is not dict:
            raise self.error(f"is {_described(self.value)}, not a dict")
        place = f"{self.key}.{key}" if self.key else key
        if key not in self.value:
            raise UserError(f"{self.path}: {place} is missing: {REMEDY}")
        return _Entry(self.path, place, self.value[key])

    def optional(self, key: str) -> "_Entry | None":
        return None if self.value.get(key) is None else self[key]

    def items(self) -> Iterator["_Entry"]:
        if type(self.value) is not list:
            raise self.error(f"is {_described(self.value)}, not a list")
        for index in range(len(self.value)):
            yield self[str(index)]

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}: {self.key or 'the whole'} {what}: {REMEDY}")

    def check_keys(self, known: tuple[str, ...]) -> None:
        if type(self.value) is not dict:
            raise self.error(f"is {_described(self.value)}, not a dict")
        for key, value in self.value.items():
            if key not in known and value is not None:
                raise self.error(f"has {_described(key)}, which is not supported")

    def integer(self, low: int, high: int) -> int:
        is_integer = isinstance(self.value, int | np.integer) and not isinstance(self.value, bool)
        if not is_integer or not low <= self.value <= high:
            raise self.error(f"is {_described(self.value)}, not an integer from {low} to {high}")
        return int(self.value)

    def size(self) -> int:
        return self.integer(1, 2**20)

    def scale(self) -> float:
        if not isinstance(self.value, float | np.floating) or not FLOAT32.tiny <= self.value <= FLOAT32.max:
            raise self.error(f"is {_described(self.value)}, not a positive number of 32 bits")
        return float(self.value)

    def quantization(self, which: str) -> Quantization:
        """Of what is read (``"x"``) or written (``"y"``)."""
        return Quantization(self[f"{which}_scale"].scale(), self[f"{which}_zero"].integer(INT8_MIN, INT8_MAX))

    def tensor(self, dtype: str, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
        """Of the first of the shapes, whichever the array has."""
        array = self.value
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape not in shapes:
            raise self.error(f"is {_described(array)}, not an array of {dtype} and shape {shapes[0]}")
        return torch.tensor(array.reshape(shapes[0]))  # a copy: a pickle can have one array twice


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    # what containers hold may be endless
    return f"{value!r:.60}" if isinstance(value, str | int | float | np.generic) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class _Features:
    """Channels, height and width of what a layer reads, and how its integers stand for real numbers."""

    channels: int
    size: int
    quantization: Quantization

    def check(self, entry: _Entry) -> None:
        """Refuses a layer that reads anything else."""
        for key, expected in (("in_channel", self.channels), ("in_shape", self.size)):
            if key in entry.value and entry[key].size() != expected:
                raise entry[key].error(f"is {entry[key].value}, but the layer before gives {expected}")
        read = entry["params"].quantization("x")
        for key, value, expected in (
            ("x_scale", read.scale, self.quantization.scale),
            ("x_zero", read.zero_point, self.quantization.zero_point),
        ):
            if value != expected:
                raise entry["params"][key].error(f"is {value}, but the layer before gives {expected}")


def _convolution(entry: _Entry, given: _Features | None) -> tuple[QuantizedConvolution, _Features]:
    """A convolution and what it writes; ``given`` is what it reads, if a layer is before it."""
    entry.check_keys(CONVOLUTION_KEYS)
    if given is not None:
        given.check(entry)
    height, width = kernel_size = _kernel_size(entry["kernel_size"])
    stride = entry["stride"].size()
    _check_groups(entry)
    convolution = QuantizedConvolution(
        in_channels=entry["in_channel"].size(),
        out_channels=entry["out_channel"].size(),
        kernel_size=kernel_size,
        stride=(stride, stride),
        padding=(width // 2, width // 2, height // 2, height // 2),
        groups=entry["groups"].size(),
        input=entry["params"].quantization("x"),
        output=entry["params"].quantization("y"),
    )
    _check_activation(entry, convolution.output)
    # an odd kernel, padded with half its size
    size = (entry["in_shape"].size() - 1) // stride + 1
    if entry["out_shape"].size() != size:
        raise entry["out_shape"].error(f"is {entry['out_shape'].value}, but the convolution gives {size}")
    return convolution, _Features(convolution.out_channels, size, convolution.output)


def _check_groups(entry: _Entry) -> None:
    channels, groups = (entry["in_channel"].size(), entry["out_channel"].size()), entry["groups"].size()
    if channels[0] % groups or channels[1] % groups:
        raise entry["groups"].error(f"is {groups}, which does not divide {channels[0]} and {channels[1]} channels")
    if type(entry["depthwise"].value) is not bool:
        raise entry["depthwise"].error(f"is {_described(entry['depthwise'].value)}, not True or False")
    if entry["depthwise"].value and channels != (groups, groups):
        raise entry["depthwise"].error(f"is True, but {channels[0]} to {channels[1]} channels are in {groups} groups")


def _kernel_size(entry: _Entry) -> tuple[int, int]:
    sizes = entry.value if type(entry.value) is tuple and len(entry.value) == 2 else (entry.value, entry.value)
    height, width = (_Entry(entry.path, entry.key, size).integer(1, 31) for size in sizes)
    if height % 2 == 0 or width % 2 == 0:
        raise entry.error(f"is {height} x {width}, and even kernels, which pad one side more, are not supported")
    return height, width


def _check_activation(entry: _Entry, output: Quantization) -> None:
    """Refuses an activation that is more than where the output saturates, which alone is simulated."""
    activation = entry.value.get("act")
    low, high = ((integer - output.zero_point) * output.scale for integer in (INT8_MIN, INT8_MAX))
    highest = {"relu": math.inf, "relu6": 6.00001} if low == 0 else {}  # 6 may have been rounded
    if activation is not None and (type(activation) is not str or high > highest.get(activation, -math.inf)):
        raise entry["act"].error(f"is {_described(activation)}, which is not supported for outputs {low:g} to {high:g}")


def _block(entry: _Entry, given: _Features) -> tuple[InvertedResidual, _Features]:
    entry.check_keys(BLOCK_KEYS)
    squeeze, residual = entry.optional("se"), entry.optional("residual")
    if squeeze is not None:
        raise squeeze.error("is squeeze and excitation, which is not supported")
    parts, features = {"pointwise1": None}, given
    for part in ("pointwise1", "depthwise", "pointwise2"):
        if part != "pointwise1" or entry.optional(part) is not None:
            parts[part], features = _convolution(entry[part], features)
    for part in ("pointwise1", "pointwise2"):
        if parts[part] is not None and parts[part].kernel_size != (1, 1):
            raise entry[part]["kernel_size"].error("is not 1, which is not supported")
    if not entry["depthwise"]["depthwise"].value:
        raise entry["depthwise"]["depthwise"].error("is False, which is not supported")
    if residual is None:
        return InvertedResidual(**parts, addition=None), features
    addition = _addition(residual, given, features)
    return InvertedResidual(**parts, addition=addition), dataclasses.replace(features, quantization=addition)


def _addition(entry: _Entry, block_input: _Features, projected: _Features) -> Quantization:
    if type(entry.value) is dict and "kernel_size" in entry.value:
        raise entry.error("is a convolution, which is not supported")
    entry.check_keys(RESIDUAL_KEYS)
    block_input.check(entry)
    shapes = [f"{features.channels} x {features.size} x {features.size}" for features in (block_input, projected)]
    if shapes[0] != shapes[1]:
        raise entry.error(f"adds {shapes[0]} to {shapes[1]}, which is not possible")
    return entry["params"].quantization("y")


def _classifier(entry: _Entry, given: _Features) -> QuantizedClassifier:
    entry.check_keys(CLASSIFIER_KEYS)
    given.check(entry)
    if _kernel_size(entry["kernel_size"]) != (1, 1):
        raise entry["kernel_size"].error("is not 1, and a classifier reads the mean of the last features")
    for key in ("stride", "groups"):
        entry[key].integer(1, 1)
    return QuantizedClassifier(
        features=entry["in_channel"].size(),
        classes=entry["out_channel"].size(),
        input=entry["params"].quantization("x"),
        output=entry["params"].quantization("y"),
    )


def _tensors(network: _Entry, graph: QuantizedGraph) -> dict[str, Tensor]:
    linear = (graph.classifier.classes, graph.classifier.features)
    shapes = {layer: (convolution.weight_shape,) for layer, convolution in graph.convolutions()}
    shapes["classifier"] = (linear, (*linear, 1, 1))  # the published ones write it as a convolution
    tensors = {}
    for layer, weight_shapes in shapes.items():
        params = functools.reduce(_Entry.__getitem__, layer.split("."), network)["params"]
        params.check_keys(PARAMS_KEYS)
        channels = ((weight_shapes[0][0],),)
        tensors[f"{layer}.weight"] = params["weight"].tensor("int8", weight_shapes)
        tensors[f"{layer}.bias"] = params["bias"].tensor("int32", channels)
        scales = tensors[f"{layer}.weight_scales"] = params["w_scales"].tensor("float32", channels)
        if not ((scales > 0) & (scales < math.inf)).all():
            raise params["w_scales"].error("has a scale that is not a positive number")
    return tensors
