"""An int8 network of inverted residuals, in simulation: MobileNetV2 and its kin as a microcontroller trains them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from microtune.modules.int8.graph import INT8_MAX, INT8_MIN, InvertedResidual, QuantizedGraph
from microtune.modules.int8.layers import (
    BIAS_LIMIT,
    QuantizedAddition,
    QuantizedConv2d,
    QuantizedInput,
    QuantizedLinear,
    QuantizedMean,
)
from microtune.modules.user_error import UserError


class QuantizedBlock(nn.Module):
    """An int8 inverted residual.

    Args:
        description: Shapes, scales and zero points.

    Example::

        QuantizedBlock(graph.blocks[3])
    """

    def __init__(self, description: InvertedResidual):
        super().__init__()
        first = description.pointwise1 or description.depthwise
        self.pointwise1 = QuantizedConv2d(description.pointwise1) if description.pointwise1 else nn.Identity()
        self.depthwise = QuantizedConv2d(description.depthwise)
        self.pointwise2 = QuantizedConv2d(description.pointwise2)
        self.addition: QuantizedAddition | None = None
        if description.addition is not None:
            self.addition = QuantizedAddition(first.input, description.pointwise2.output, description.addition)

    def forward(self, x: Tensor) -> Tensor:
        """Integers less their zero point, of shape (N, in, H, W), to (N, out, H', W')."""
        projected = self.pointwise2(self.depthwise(self.pointwise1(x)))
        return projected if self.addition is None else self.addition(x, projected)


class QuantizedNetwork(nn.Module):
    """An int8 network, with a classifier in floating point where it is trained.

    Its integers are those of a device. Weights and biases are parameters in float32; ``read_quantized_network`` gives
    them, ``load_quantized_tensors`` puts them in.

    Args:
        graph: Its layers.
        num_classes: Outputs of a fresh classifier in floating point; by default the classifier is the graph's own.

    Raises:
        UserError: It is run under autocast or in another precision than float32.

    Example::

        graph, tensors = read_quantized_network("network.safetensors")
        network = QuantizedNetwork(graph, num_classes=10)
        load_quantized_tensors(network, tensors)
        network(torch.zeros(1, *graph.input_shape)).shape  # (1, 10)
    """

    def __init__(self, graph: QuantizedGraph, num_classes: int | None = None):
        super().__init__()
        self.graph = graph
        self.input = QuantizedInput(graph.input)
        self.first_conv = QuantizedConv2d(graph.first_conv)
        self.blocks = nn.Sequential(*(QuantizedBlock(block) for block in graph.blocks))
        self.feature_mix = nn.Identity() if graph.feature_mix is None else QuantizedConv2d(graph.feature_mix)
        self.mean = QuantizedMean(graph.classifier.input)
        self.classifier: nn.Linear | QuantizedLinear
        if num_classes is None and graph.classifier.output is not None:
            self.classifier = QuantizedLinear(graph.classifier)
        else:
            self.classifier = nn.Linear(graph.classifier.features, num_classes or graph.classifier.classes)
            nn.init.normal_(self.classifier.weight, 0, 0.01)  # as torchvision's MobileNetV2 begins
            nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of samples in real numbers (N, channels, height, width)."""
        if x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
            raise UserError("an int8 network is simulated in float32, whose whole numbers are exact: precision 32-true")
        x = self.blocks(self.first_conv(self.input(x)))
        return self.classifier(self.mean(self.feature_mix(x)))


def build_quantized_network(*, graph: str, num_classes: int, int8_classifier: bool = False) -> QuantizedNetwork:
    """An int8 network without its integers, as the hyperparameters of a checkpoint describe it.

    Args:
        graph: Of the network, as JSON.
        num_classes: Outputs of its classifier.
        int8_classifier: Whether that is the graph's own, for inference.

    Example::

        build_quantized_network(graph=graph.to_json(), num_classes=10)
    """
    return QuantizedNetwork(QuantizedGraph.from_json(graph), None if int8_classifier else num_classes)


def is_quantized(network: nn.Module) -> bool:
    """Whether a network has int8 layers."""
    return any(isinstance(module, QuantizedConv2d) for module in network.modules())


def load_quantized_tensors(network: QuantizedNetwork, tensors: Mapping[str, Tensor]) -> None:
    """Puts the integers and scales of an int8 network's file into a network.

    A classifier in floating point of as many classes takes the real values of an int8 one; of another number it stays
    fresh. A bias of more than 24 bits is rounded to 24, which float32 and a device's conversion to it have.

    Args:
        network: Changed in place.
        tensors: As ``read_quantized_network`` gives them.

    Example::

        load_quantized_tensors(network, tensors)
    """
    state = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    for name in [name for name in state if name.endswith(".bias") and not name.startswith("classifier.")]:
        state[name].clamp_(-BIAS_LIMIT, BIAS_LIMIT)
    own = network.graph.classifier
    if isinstance(network.classifier, nn.Linear):
        scales = state.pop("classifier.weight_scales", None)
        if network.classifier.out_features != own.classes:
            state |= {f"classifier.{name}": value for name, value in network.classifier.state_dict().items()}
        elif scales is not None:
            state["classifier.weight"] *= scales[:, None]
            state["classifier.bias"] *= scales * own.input.scale
    network.load_state_dict(state)


def quantized_tensors(
    network: QuantizedNetwork,
    class_names: Sequence[str] | None = None,
    input_shape: tuple[int, int, int] | None = None,
) -> tuple[QuantizedGraph, dict[str, Tensor]]:
    """The graph and the integers of a network, as ``write_quantized_network`` takes them.

    Args:
        network: Without a scheme applied. What is no integer is rounded, what is out of range is limited.
        class_names: What its outputs mean, if that is known.
        input_shape: Channels, height and width that it was trained on, if they are others than the graph's.

    Returns:
        The graph, with a classifier in floating point if the network has one, and the tensors.
    """
    graph, classifier = network.graph, network.graph.classifier
    if isinstance(network.classifier, nn.Linear):
        classifier = replace(classifier, classes=network.classifier.out_features, output=None)
    graph = replace(
        graph,
        classifier=classifier,
        class_names=None if class_names is None else tuple(class_names),
        input_shape=input_shape or graph.input_shape,
    )
    tensors = {}
    for name, value in network.state_dict().items():
        layer, _, kind = name.rpartition(".")
        value = value.detach().cpu()
        if isinstance(network.get_submodule(layer), QuantizedConv2d | QuantizedLinear):
            if kind == "weight":
                value = value.round().clamp(INT8_MIN, INT8_MAX).to(torch.int8)
            elif kind == "bias":
                value = value.double().round().clamp(-BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)
        tensors[name] = value.contiguous()
    return graph, tensors
