"""What an int8 network is made of, as plain data: shapes, scales and zero points. Its weights are tensors beside it."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ConfigDict, TypeAdapter, ValidationError

from microtune.modules.user_error import UserError

INT8_MIN, INT8_MAX = -128, 127
INT8_SUFFIX = "-int8"  # of the name of an int8 network: what comes before is that of the network that it was
# of pydantic, which reads these classes from JSON
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Quantization:
    """How integers stand for real numbers: ``real = scale * (integer - zero_point)``.

    Args:
        scale: Positive.
        zero_point: The integer that stands for 0, from -128 to 127.

    Example::

        Quantization(scale=6 / 255, zero_point=-128)  # of what ReLU6 gives: 0 to 6
    """

    __pydantic_config__ = STRICT
    scale: float
    zero_point: int

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise UserError(f"a scale is {self.scale}: it must be positive and finite")
        if not INT8_MIN <= self.zero_point <= INT8_MAX:
            raise UserError(f"a zero point is {self.zero_point}: it must be from {INT8_MIN} to {INT8_MAX}")


@dataclass(frozen=True)
class QuantizedConvolution:
    """A convolution of int8 by int8 to int8, with a bias of 32 bits; its activation is where its output saturates.

    Args:
        in_channels, out_channels, groups: As in ``nn.Conv2d``.
        kernel_size, stride: Height and width.
        padding: Zeros before and behind, in the order of ``torch.nn.functional.pad``: left, right, top, bottom.
        input: Of what it reads.
        output: Of what it writes.
    """

    __pydantic_config__ = STRICT
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    groups: int
    input: Quantization
    output: Quantization

    def __post_init__(self):
        sizes = (self.in_channels, self.out_channels, *self.kernel_size, *self.stride, self.groups)
        if min(sizes) < 1 or min(self.padding) < 0:
            raise UserError(
                "channels, kernel, stride and groups of a convolution must be positive, its padding 0 or more"
            )
        if self.in_channels % self.groups or self.out_channels % self.groups:
            channels = f"{self.in_channels} and {self.out_channels} channels"
            raise UserError(f"{self.groups} groups of a convolution do not divide its {channels}")

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Of the weight: out, in / groups, kernel height and width."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def keeps_size(self) -> bool:
        """Whether the output is as high and wide as the input."""
        left, right, top, bottom = self.padding
        height, width = self.kernel_size
        return self.stride == (1, 1) and (top + bottom, left + right) == (height - 1, width - 1)


@dataclass(frozen=True)
class InvertedResidual:
    """A block of MobileNetV2 (Sandler et al. 2018, section 3.3): expand, filter depthwise, project, perhaps add.

    Args:
        pointwise1: Expands; none where the expansion is 1.
        depthwise: Filters.
        pointwise2: Projects.
        addition: Of the sum of the block's input and what ``pointwise2`` gives; none where nothing is added.

    Raises:
        UserError: What would be added is of another shape than the block's input.
    """

    __pydantic_config__ = STRICT
    pointwise1: QuantizedConvolution | None
    depthwise: QuantizedConvolution
    pointwise2: QuantizedConvolution
    addition: Quantization | None

    def __post_init__(self):
        parts = [part for part in (self.pointwise1, self.depthwise, self.pointwise2) if part is not None]
        if self.addition is None:
            return
        if parts[0].in_channels != parts[-1].out_channels or not all(part.keeps_size for part in parts):
            channels = f"{parts[-1].out_channels} channels of {parts[0].in_channels}"
            raise UserError(f"a block makes {channels}, or another height and width: its input cannot be added")


@dataclass(frozen=True)
class QuantizedClassifier:
    """The last, linear layer; it reads the rounded mean of the last feature map.

    Args:
        features: Inputs.
        classes: Outputs.
        input: Of what it reads.
        output: Of the int8 logits; none of a classifier in floating point, which is what a device trains.
    """

    __pydantic_config__ = STRICT
    features: int
    classes: int
    input: Quantization
    output: Quantization | None

    def __post_init__(self):
        if min(self.features, self.classes) < 1:
            raise UserError(
                f"a classifier has {self.features} features and {self.classes} classes: it needs some of both"
            )


@dataclass(frozen=True)
class QuantizedGraph:
    """An int8 network: its layers in forward order and what its input means.

    Args:
        name: As update schemes name it, such as ``"mobilenet_v2-w0.35-int8"``.
        input_shape: Channels, height and width that it was trained or calibrated on; it runs on others too.
        input: Of a sample. A device hands these integers in, the simulation makes them of real numbers.
        normalization: Mean and standard deviation, one each per channel, which make the real numbers of pixels from
            0 to 1; none of spectrograms.
        first_conv: The first convolution.
        blocks: Inverted residuals.
        feature_mix: The last convolution, before the mean; none where the last block is followed by the mean.
        classifier: The last layer.
        class_names: What the outputs mean; none if that is not known.

    Raises:
        UserError: What one layer writes is not what the next one reads, or the normalization or the class names are of
            another number than channels or classes.

    Example::

        graph, tensors = read_quantized_network("network.safetensors")
        [name for name, _ in graph.convolutions()]  # ["first_conv", "blocks.0.depthwise", ...]
    """

    __pydantic_config__ = STRICT
    name: str
    input_shape: tuple[int, int, int]
    input: Quantization
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None
    first_conv: QuantizedConvolution
    blocks: tuple[InvertedResidual, ...]
    feature_mix: QuantizedConvolution | None
    classifier: QuantizedClassifier
    class_names: tuple[str, ...] | None = None

    def __post_init__(self):
        self._check_input_and_classes()
        written, channels = self.input, self.input_shape[0]
        for name, layer in self.convolutions():
            if (layer.input, layer.in_channels) != (written, channels):
                raise UserError(
                    f"{name} reads {layer.in_channels} channels of {layer.input}, but gets {channels} of {written}"
                )
            written, channels = layer.output, layer.out_channels
            if name.endswith(".pointwise2"):
                written = self.blocks[int(name.split(".")[1])].addition or written
        if (self.classifier.input, self.classifier.features) != (written, channels):
            raise UserError(
                f"the classifier reads {self.classifier.features} features of {self.classifier.input}, but gets "
                f"{channels} of {written}"
            )

    def _check_input_and_classes(self) -> None:
        if min(self.input_shape) < 1:
            raise UserError(f"input_shape is {self.input_shape}: channels, height and width must be positive")
        if self.normalization is not None:
            mean, deviation = self.normalization
            is_whole = len(mean) == len(deviation) == self.input_shape[0]
            if not is_whole or min(deviation) <= 0 or not all(map(math.isfinite, (*mean, *deviation))):
                raise UserError(
                    f"normalization is {self.normalization}: it must have a mean and a positive standard deviation for "
                    f"each of {self.input_shape[0]} channels"
                )
        if self.class_names is not None and len(self.class_names) != self.classifier.classes:
            raise UserError(f"there are {len(self.class_names)} class names for {self.classifier.classes} classes")

    def convolutions(self) -> Iterator[tuple[str, QuantizedConvolution]]:
        """Name and description of every convolution, in forward order."""
        yield "first_conv", self.first_conv
        for index, block in enumerate(self.blocks):
            for part in ("pointwise1", "depthwise", "pointwise2"):
                if getattr(block, part) is not None:
                    yield f"blocks.{index}.{part}", getattr(block, part)
        if self.feature_mix is not None:
            yield "feature_mix", self.feature_mix

    def to_json(self) -> str:
        """The graph as JSON; a scale is written so that it is read as the same number."""
        return _adapter().dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "QuantizedGraph":
        """The graph that ``to_json`` wrote.

        Raises:
            UserError: A key is missing or unknown, or a value is of the wrong type or out of its range.
        """
        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise UserError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error


def float_names(graph: QuantizedGraph) -> dict[str, str]:
    """The layer of an int8 MobileNetV2 by the name that it has in torchvision's, where schemes for both can be read.

    Example::

        float_names(graph)["features.4.conv.0.0"]  # "blocks.3.pointwise1"
    """
    names = {"features.0.0": "first_conv"}
    for index, block in enumerate(graph.blocks):
        parts = ("pointwise1", "depthwise", "pointwise2") if block.pointwise1 else ("depthwise", "pointwise2")
        for place, part in enumerate(parts):
            end = "" if part == "pointwise2" else ".0"
            names[f"features.{index + 1}.conv.{place}{end}"] = f"blocks.{index}.{part}"
    if graph.feature_mix is not None:
        names[f"features.{len(graph.blocks) + 1}.0"] = "feature_mix"
    return names


@functools.cache
def _adapter() -> TypeAdapter[QuantizedGraph]:
    return TypeAdapter(QuantizedGraph)
