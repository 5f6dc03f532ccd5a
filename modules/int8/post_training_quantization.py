"""Post-training quantization: a trained, folded MobileNetV2 becomes an int8 network, by what it holds on samples.

Per-channel symmetric weights, per-tensor affine activations (Nagel et al. 2021, "A White Paper on Neural Network
Quantization", sections 2 and 3).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from microtune.modules.int8.activation_ranges import (
    BINS,
    Histogram,
    RangeEstimator,
    estimated_quantization,
    quantization_of_range,
)
from microtune.modules.int8.graph import (
    INT8_MAX,
    InvertedResidual,
    Quantization,
    QuantizedClassifier,
    QuantizedConvolution,
    QuantizedGraph,
)
from microtune.modules.int8.layers import BIAS_LIMIT, NEAR_ZERO
from microtune.modules.networks.batch_norm_folding import find_batch_norm
from microtune.modules.networks.mobilenet_v2 import KerasPadding, MobileNetV2
from microtune.modules.networks.operations import evaluation_mode
from microtune.modules.user_error import UserError

Normalization = tuple[tuple[float, ...], tuple[float, ...]]

# pixels less 128 are a device's integers; with a mean of 0.5 every integer would lie halfway between two
PIXELS = Quantization(scale=1 / 127.5, zero_point=0)
PIXELS_NORMALIZATION = (128 / 255, 127.5 / 255)


@dataclass(frozen=True)
class Calibration:
    """What the tensors of a network held, over all samples.

    Args:
        histograms: By the layer of the int8 network that writes them; ``"input"`` is the samples' own, and
            ``"blocks.3.addition"`` that of a sum.
        means: Of every channel of the same tensors.
        sizes: Height and width of what each convolution reads, before its padding.
        input_shape: Channels, height and width of a sample.
        samples: How many there were.
    """

    histograms: dict[str, Histogram]
    means: dict[str, Tensor]
    sizes: dict[str, tuple[int, int]]
    input_shape: tuple[int, int, int]
    samples: int


def calibrate(network: nn.Module, samples: Iterable[Tensor]) -> Calibration:
    """Runs samples through a network, twice: for the range of every tensor, and for its histogram.

    Args:
        network: A folded ``mobilenet_v2``.
        samples: Batches of shape (N, channels, height, width); they are gone through twice, and must be the same.

    Raises:
        UserError: The network is another, or has batch norm; there are no samples; a tensor is not finite.

    Example::

        calibration = calibrate(network, [images[:32], images[32:64]])
        calibration.histograms["blocks.3.pointwise1"].high
    """
    _check_network(network)
    observed = _Observed()
    hooks = [module.register_forward_hook(partial(observed.note, name)) for name, module in _written(network)]
    try:
        with evaluation_mode(network), torch.inference_mode():
            for observed.ranges_are_known in (False, True):
                for batch in samples:
                    observed.see("input", batch)
                    network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not observed.samples:
        raise UserError("there are no samples to calibrate on: give a few hundred")
    histograms = {name: Histogram(*limits, observed.counts[name].numpy()) for name, limits in observed.ranges.items()}
    means = {name: total / observed.samples for name, total in observed.sums_of_means.items()}
    return Calibration(histograms, means, observed.sizes, observed.input_shape, observed.samples)


def _check_network(network: nn.Module) -> None:
    if not isinstance(network, MobileNetV2):
        raise UserError(f"the network is a {type(network).__name__}: only a MobileNetV2 can be quantized")
    norm = find_batch_norm(network)
    if norm is not None:
        raise UserError(f"batch norm {norm} is not folded: fold it first, with fold_batch_norm")


class _Observed:
    """Ranges and histograms of tensors, as a network computes them."""

    def __init__(self) -> None:
        self.ranges_are_known = False
        self.ranges: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        self.counts: dict[str, Tensor] = defaultdict(lambda: torch.zeros(BINS, dtype=torch.float64))
        self.sums_of_means: dict[str, Tensor] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.input_shape: tuple[int, int, int] = (0, 0, 0)
        self.samples = 0

    def note(self, name: str, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.sizes[name] = tuple(inputs[0].shape[2:])
        self.see(name, output)

    def see(self, name: str, values: Tensor) -> None:
        if self.ranges_are_known:
            self._count(name, values)
            return
        if name == "input":
            self.input_shape = tuple(values.shape[1:])
            self.samples += len(values)
        low, high = (value.item() for value in values.aminmax())
        if not math.isfinite(high - low):
            raise UserError(f"{name} is not finite on the samples: give a network that was trained, and its data")
        self.ranges[name] = (min(low, self.ranges[name][0]), max(high, self.ranges[name][1]))

    def _count(self, name: str, values: Tensor) -> None:
        means = values.flatten(2).mean(2) if values.dim() == 4 else values
        self.sums_of_means[name] = self.sums_of_means.get(name, 0) + means.double().sum(0).cpu()
        low, high = self.ranges[name]
        if low == high:
            return
        self.counts[name] += torch.histc(values, BINS, low, high).cpu()
        if low == 0:  # behind a ReLU half of the values are 0, which has no error in any range
            self.counts[name][0] -= (values == 0).sum().cpu()


class _Part(NamedTuple):
    """A convolution or the classifier of a folded MobileNetV2.

    Args:
        name: Of the layer in the int8 network.
        reads: Name of the tensor that it reads, as ``Calibration`` has it.
        module: What writes the layer's output, its activation included.
        layer: In the module, or the module itself.
    """

    name: str
    reads: str
    module: nn.Module
    layer: nn.Conv2d | nn.Linear


def _parts(network: MobileNetV2) -> Iterator[_Part]:
    """The convolutions in forward order, and the classifier."""
    reads = "first_conv"
    yield _part(reads, "input", network.features[0])
    for index, block in enumerate(_blocks(network)):
        modules = [module for module in block.conv if isinstance(module, nn.Sequential | nn.Conv2d)]
        for kind, module in zip(("pointwise1", "depthwise", "pointwise2")[-len(modules) :], modules, strict=True):
            name = f"blocks.{index}.{kind}"
            yield _part(name, reads, module)
            reads = name
        if block.adds_input:
            reads = f"blocks.{index}.addition"
    if isinstance(network.features[-1], nn.Sequential):
        yield _part("feature_mix", reads, network.features[-1])
        reads = "feature_mix"
    yield _part("classifier", reads, network.classifier)


def _part(name: str, reads: str, module: nn.Module) -> _Part:
    children = [module] if isinstance(module, nn.Conv2d) else module
    return _Part(name, reads, module, next(child for child in children if isinstance(child, nn.Conv2d | nn.Linear)))


def _blocks(network: MobileNetV2) -> list[nn.Module]:
    return [module for module in network.features if hasattr(module, "adds_input")]


def _written(network: MobileNetV2) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of everything whose output becomes int8."""
    for part in _parts(network):
        yield part.name, part.module
    for index, block in enumerate(_blocks(network)):
        if block.adds_input:
            yield f"blocks.{index}.addition", block


def quantize_after_training(
    network: nn.Module,
    calibration: Calibration,
    name: str,
    estimator: RangeEstimator = "mse",
    normalization: Normalization | None = None,
    class_names: Sequence[str] | None = None,
    classifier_is_trained: bool = True,
) -> tuple[QuantizedGraph, dict[str, Tensor]]:
    """Makes a trained network an int8 one.

    Pixels with a mean and a standard deviation of 0.5, as Keras' weights want them, get a mean of 128 / 255 in the
    graph, so that a device's pixel less 128 is the integer; the first bias makes up for the difference. Other pixels
    span what black and white are, and samples without normalization the range that is estimated. The logits span all
    that they were, since it is the largest that decides.

    Args:
        network: A folded ``mobilenet_v2``.
        calibration: Of this network.
        name: Of the int8 network, as schemes name it.
        estimator: Of the activations' ranges.
        normalization: Mean and standard deviation of pixels from 0 to 1, one each or one per channel; none of
            spectrograms.
        class_names: What the outputs mean.
        classifier_is_trained: Whether it is of worth; a fresh one stays in floating point.

    Returns:
        The graph and the tensors, as ``write_quantized_network`` takes them.

    Raises:
        UserError: The network is another, or has batch norm; the estimator is unknown.

    Example::

        calibration = calibrate(network, batches)
        graph, tensors = quantize_after_training(network, calibration, "mobilenet_v2-w0.35-int8")
        write_quantized_network("network.safetensors", graph, tensors)
    """
    _check_network(network)
    written = {layer: estimated_quantization(one, estimator) for layer, one in calibration.histograms.items()}
    written["classifier"] = estimated_quantization(calibration.histograms["classifier"], "min_max")
    written["input"], normalization, shift = _input_of_pixels(written["input"], normalization, calibration)
    graph = replace(
        _graph(network, calibration, written, classifier_is_trained),
        name=name,
        normalization=normalization,
        class_names=None if class_names is None else tuple(class_names),
    )
    *convolutions, classifier = _parts(network)
    tensors: dict[str, Tensor] = {}
    for part in (*convolutions, classifier) if classifier_is_trained else convolutions:
        offset = shift if part.reads == "input" else 0.0
        tensors |= _integers(part, written[part.reads], calibration.means[part.reads], offset)
    if not classifier_is_trained:
        fresh = classifier.layer.named_parameters()
        tensors |= {f"classifier.{one}": values.detach().cpu().clone() for one, values in fresh}
    return graph, tensors


def _input_of_pixels(
    estimated: Quantization, normalization: Normalization | None, calibration: Calibration
) -> tuple[Quantization, Normalization | None, float]:
    """Quantization and normalization of the input, and what the network's own input is larger by."""
    if normalization is None:
        return estimated, None, 0.0
    channels = calibration.input_shape[0]
    means, stds = (tuple(values) * (channels if len(values) == 1 else 1) for values in normalization)
    if set(means) == set(stds) == {0.5}:
        mean, std = PIXELS_NORMALIZATION
        return PIXELS, ((mean,) * channels, (std,) * channels), (mean - 0.5) / std
    black = min(-mean / std for mean, std in zip(means, stds, strict=True))
    white = max((1 - mean) / std for mean, std in zip(means, stds, strict=True))
    return quantization_of_range(black, white), (means, stds), 0.0


def renormalized(samples: Tensor, given: Normalization, wanted: Normalization) -> Tensor:
    """Samples of one normalization as another has them.

    Args:
        samples: Of shape (N, channels, height, width).
        given: Mean and standard deviation of pixels from 0 to 1, one each or one per channel.
        wanted: Likewise.

    Example::

        renormalized(images, ((0.5,), (0.5,)), graph.normalization)
    """
    means, stds = (torch.tensor(values, device=samples.device).view(1, -1, 1, 1) for values in given)
    wanted_means, wanted_stds = (torch.tensor(values, device=samples.device).view(1, -1, 1, 1) for values in wanted)
    return samples * (stds / wanted_stds) + (means - wanted_means) / wanted_stds


def _graph(
    network: MobileNetV2, calibration: Calibration, written: dict[str, Quantization], classifier_is_trained: bool
) -> QuantizedGraph:
    *convolutions, classifier = _parts(network)
    layers = {
        part.name: _description(part, calibration.sizes[part.name], written[part.reads], written[part.name])
        for part in convolutions
    }
    return QuantizedGraph(
        name="",
        input_shape=calibration.input_shape,
        input=written["input"],
        normalization=None,
        first_conv=layers["first_conv"],
        blocks=tuple(
            InvertedResidual(
                pointwise1=layers.get(f"blocks.{index}.pointwise1"),
                depthwise=layers[f"blocks.{index}.depthwise"],
                pointwise2=layers[f"blocks.{index}.pointwise2"],
                addition=written.get(f"blocks.{index}.addition"),
            )
            for index in range(len(_blocks(network)))
        ),
        feature_mix=layers.get("feature_mix"),
        classifier=QuantizedClassifier(
            features=classifier.layer.in_features,
            classes=classifier.layer.out_features,
            input=written[classifier.reads],
            output=written["classifier"] if classifier_is_trained else None,
        ),
    )


def _description(part: _Part, size: tuple[int, int], read: Quantization, written: Quantization) -> QuantizedConvolution:
    convolution, (height, width) = part.layer, size
    is_padded_as_keras = isinstance(part.module, nn.Sequential) and isinstance(part.module[0], KerasPadding)
    vertical, horizontal = convolution.padding
    return QuantizedConvolution(
        in_channels=convolution.in_channels,
        out_channels=convolution.out_channels,
        kernel_size=convolution.kernel_size,
        stride=convolution.stride,
        padding=(width % 2, 1, height % 2, 1) if is_padded_as_keras else (horizontal, horizontal, vertical, vertical),
        groups=convolution.groups,
        input=read,
        output=written,
    )


def _integers(part: _Part, read: Quantization, means: Tensor, offset: float) -> dict[str, Tensor]:
    """The int8 weight, its scales and the 32-bit bias of a layer.

    Rounding the weight moves the mean of an output by the weight's error times the mean of the input, which the bias
    takes back (bias correction, Nagel et al. 2019, "Data-Free Quantization", section 4.2; the means are measured).

    Args:
        part: The layer.
        read: Of what it reads.
        means: Of the channels that it reads.
        offset: What these are larger by than what the int8 layer reads.
    """
    # contiguous, whatever the network's memory format: so they are written to a file
    weight, bias = (values.detach().double().cpu().contiguous() for values in (part.layer.weight, part.layer.bias))
    scales = weight_scales(weight)
    of_weight = scales.double().view(-1, *[1] * (weight.dim() - 1))
    integers = (weight / of_weight).round()
    bias = bias + _mean_sums(weight, means) - _mean_sums(integers * of_weight, means - offset)
    bias_integers = (bias / (scales.double() * read.scale)).round().clamp(-BIAS_LIMIT, BIAS_LIMIT)
    return {
        f"{part.name}.weight": integers.to(torch.int8),
        f"{part.name}.bias": bias_integers.to(torch.int32),
        f"{part.name}.weight_scales": scales,
    }


def _mean_sums(weight: Tensor, means: Tensor) -> Tensor:
    """The mean of every output without its bias, of shape (out,), where nothing is padded."""
    of_channels = weight.flatten(2).sum(2) if weight.dim() == 4 else weight
    groups = len(means) // of_channels.shape[1]
    return (of_channels.unflatten(0, (groups, -1)) @ means.view(groups, -1, 1)).flatten()


def weight_scales(weight: Tensor) -> Tensor:
    """The scale of every output channel, float32 of shape (out,): its largest weight becomes 127 or -127.

    A channel whose scale would be near zero, as batch norm leaves those that it has switched off, gets the median of
    the others: it loses no more by rounding than they do, its bias stays within 32 bits, and it can be trained.

    Args:
        weight: Of shape (out, ...).

    Example::

        weight_scales(torch.tensor([[0.5, -1.27], [0.254, 0.0]]))  # tensor([0.0100, 0.0020])
    """
    scales = (weight.double().flatten(1).abs().amax(1) / INT8_MAX).float()
    used = scales[scales > 0]
    median = used.median() if len(used) else torch.tensor(1.0)
    return torch.where(scales < NEAR_ZERO * median, median, scales)
