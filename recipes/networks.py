"""The network of a recipe, its operations and its scheme, from what the command line says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from microtune.modules.classifier import build_network
from microtune.modules.mobilenet_v2 import network_name
from microtune.modules.operations import NetworkOperations, find_operations
from microtune.modules.update_scheme import UpdateScheme

NetworkName = Literal["mobilenet_v2"]


@dataclass(frozen=True)
class DescribedNetwork:
    """A folded network without trained weights, to reckon with and to measure.

    Args:
        name: As update schemes name it.
        arguments: Of ``build_network``.
        network: The network.
        operations: What it does with one sample.
        input_shape: Channels, height and width of a sample.
    """

    name: str
    arguments: dict[str, Any]
    network: nn.Module
    operations: NetworkOperations
    input_shape: tuple[int, int, int]

    def load_scheme(self, path: Path | str) -> UpdateScheme:
        """Reads a scheme and checks that it is for this network."""
        scheme = UpdateScheme.load(path)
        try:
            scheme.check(self.operations.convolutions, self.name)
        except ValueError as error:
            raise type(error)(f"{path}: {error}") from error
        return scheme


def describe_network(
    width: float, resolution: int, num_classes: int, in_channels: int, head_convolution: bool, padding: str = "symmetric"
) -> DescribedNetwork:
    """Builds a folded MobileNetV2 and runs it once on ``in_channels`` x ``resolution`` x ``resolution``."""
    arguments = {
        "width": width,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "head_convolution": head_convolution,
        "padding": padding,
        "folded": True,
    }
    network = build_network(**arguments)
    input_shape = (in_channels, resolution, resolution)
    operations = find_operations(network, input_shape)
    return DescribedNetwork(network_name(width, head_convolution), arguments, network, operations, input_shape)
