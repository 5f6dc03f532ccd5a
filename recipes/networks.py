"""The network of a recipe, its operations and its scheme, from what the command line says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from microtune.modules.microcontrollers import Microcontroller
from microtune.modules.mobilenet_v2 import build_network, network_name
from microtune.modules.operations import NetworkOperations, find_operations
from microtune.modules.peak_memory import PeakMemory
from microtune.modules.simple_schemes import (
    biases_that_fit,
    classifier_only,
    expanding_convolutions_that_fit,
    full_update,
    last_layers_that_fit,
)
from microtune.modules.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.command_line import check_at_least_one
from microtune.recipes.memory_figures import scheme_fits

NetworkName = Literal["mobilenet_v2"]
NAMED_SCHEMES = ("classifier", "biases", "last_layers", "sub_tensor", "full")
FILLING_SCHEMES = ("biases", "last_layers", "sub_tensor")  # as much as fits a microcontroller


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
    width: float,
    input_shape: tuple[int, int, int],
    num_classes: int,
    head_convolution: bool,
    padding: str = "symmetric",
) -> DescribedNetwork:
    """Builds a folded MobileNetV2 and runs it once on ``input_shape``: channels, height and width."""
    in_channels, height, width_px = input_shape
    check_at_least_one(resolution=min(height, width_px))
    arguments = {
        "width": width,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "head_convolution": head_convolution,
        "padding": padding,
        "folded": True,
    }
    network = build_network(**arguments)
    operations = find_operations(network, input_shape)
    return DescribedNetwork(network_name(width, head_convolution), arguments, network, operations, input_shape)


def scheme_by_name_or_file(
    scheme: str, described: DescribedNetwork, peak_memory: PeakMemory, microcontroller: Microcontroller
) -> UpdateScheme:
    """The update scheme that the command line asks for.

    Args:
        scheme: A JSON file, or one of ``NAMED_SCHEMES``; ``biases``, ``last_layers`` and ``sub_tensor`` take as many
            layers as fit the microcontroller.
        described: The network.
        peak_memory: Of the network, with the options of the training.
        microcontroller: The device.

    Raises:
        UserError: The file is no scheme for this network, or nothing fits.
    """
    name, operations = described.name, described.operations
    rules = {
        "biases": biases_that_fit,
        "last_layers": last_layers_that_fit,
        "sub_tensor": expanding_convolutions_that_fit,
    }
    if scheme == "classifier":
        return classifier_only(name)
    if scheme == "full":
        return full_update(name, operations)
    if scheme in rules:
        found = rules[scheme](name, operations, lambda one: scheme_fits(peak_memory, one, microcontroller))
        # nothing fits: the smallest scheme says so where it is checked
        return found or classifier_only(name)
    if not Path(scheme).suffix and not Path(scheme).exists():
        raise UserError(f"unknown scheme {scheme!r}: give a JSON file or one of {', '.join(NAMED_SCHEMES)}")
    return described.load_scheme(scheme)
