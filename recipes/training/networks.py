"""The network of a recipe and its operations, from what the command line says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from microtune.datamodules.contract import Normalization
from microtune.modules.int8.files import is_quantized_file, read_quantized_network
from microtune.modules.int8.graph import INT8_SUFFIX, float_names
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.networks.mobilenet_v2 import build_network, network_name
from microtune.modules.networks.operations import NetworkOperations, find_operations
from microtune.modules.networks.pretrained_weights import (
    NORMALIZATION,
    class_names_of_weights,
    input_shape_of_weights,
    padding_of_weights,
    weights_are_folded,
    width_of_weights,
)
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import check_at_least_one

WIDTH = 0.35  # of a network that no weights describe


@dataclass(frozen=True)
class DescribedNetwork:
    """A folded network without trained weights, or an int8 network with its own, to reckon with and to measure.

    Args:
        name: As update schemes name it.
        arguments: Of ``Classifier``'s network.
        network: The network.
        operations: What it does with one sample.
        input_shape: Channels, height and width of a sample.
    """

    name: str
    arguments: dict[str, Any]
    network: nn.Module
    operations: NetworkOperations
    input_shape: tuple[int, int, int]

    @property
    def is_quantized(self) -> bool:
        """Whether it is an int8 network."""
        return isinstance(self.network, QuantizedNetwork)

    def to_train(self, has_scheme: bool) -> dict[str, Any]:
        """Arguments of ``Classifier``'s network that is trained: folded under a scheme, else with batch norm."""
        return self.arguments if self.is_quantized else self.arguments | {"folded": has_scheme}

    def to_evaluate(self, source: str) -> dict[str, Any]:
        """Arguments of ``Classifier``'s network that is only tested: as its weights are, with their own classifier.

        Args:
            source: From ``source_of_weights``.
        """
        if self.is_quantized:
            has_int8_classifier = self.network.graph.classifier.output is not None
            return self.arguments | {"int8_classifier": has_int8_classifier}
        return self.arguments | {"folded": weights_are_folded(source)}

    def load_scheme(self, path: Path | str) -> UpdateScheme:
        """Reads a scheme and checks that it is for this network, or for the one that this int8 network was."""
        scheme = UpdateScheme.load(path)
        if self.is_quantized and f"{scheme.network}{INT8_SUFFIX}" == self.name:
            scheme = scheme.renamed(self.name, float_names(self.network.graph))
        try:
            scheme.check(self.operations.convolutions, self.name)
        except ValueError as error:
            raise type(error)(f"{path}: {error}") from error
        return scheme


def normalization_of(source: str) -> Normalization:
    """Mean and standard deviation of images as the weights expect them.

    Args:
        source: From ``source_of_weights``.

    Raises:
        UserError: It is an int8 network that was made for spectrograms.
    """
    if not is_quantized_file(source):
        return NORMALIZATION[padding_of_weights(source)]
    graph, _ = read_quantized_network(source)
    if graph.normalization is None:
        raise UserError(f"{source} was made for inputs of shape {graph.input_shape}, not for images: give another")
    return graph.normalization


def class_names_of(source: str) -> list[str] | None:
    """What the outputs of the weights mean, where that is known."""
    if is_quantized_file(source):
        names = read_quantized_network(source)[0].class_names
        return None if names is None else list(names)
    return class_names_of_weights(source)


def input_shape_of(source: str) -> tuple[int, ...] | None:
    """Channels, height and width that weights were trained on, where that is known."""
    return (
        read_quantized_network(source)[0].input_shape if is_quantized_file(source) else input_shape_of_weights(source)
    )


def describe_network(
    source: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    width: float | None = None,
    head_convolution: bool = False,
) -> DescribedNetwork:
    """Builds the network that fits weights, folded or int8, and runs it once.

    Args:
        source: From ``source_of_weights``; ``"none"`` for a network that is only reckoned with.
        input_shape: Channels, height and width of a sample.
        num_classes: Outputs of its fresh classifier.
        width: Multiplier of its channels; by default that of the weights, else 0.35. An int8 network has its own.
        head_convolution: Whether it has its last 1x1 convolution; an int8 network says so itself.

    Raises:
        UserError: An argument is out of its range.
    """
    check_at_least_one(resolution=min(input_shape[1:]))
    if is_quantized_file(source):
        return describe_quantized_network(source, input_shape, num_classes)
    if width is None:
        width = width_of_weights(source) or WIDTH
    arguments = {
        "width": width,
        "num_classes": num_classes,
        "in_channels": input_shape[0],
        "head_convolution": head_convolution,
        "padding": padding_of_weights(source),
        "folded": True,
    }
    network = build_network(**arguments)
    operations = find_operations(network, input_shape)
    return DescribedNetwork(network_name(width, head_convolution), arguments, network, operations, input_shape)


def describe_quantized_network(path: str, input_shape: tuple[int, int, int], num_classes: int) -> DescribedNetwork:
    """Reads an int8 network and runs it once, with a classifier in floating point, as it is trained.

    Args:
        path: Its file.
        input_shape: Channels, height and width of a sample.
        num_classes: Outputs of its classifier; a fresh one, if they are not as many as in the file.

    Raises:
        UserError: The file is no int8 network, or has other input channels.
    """
    graph, tensors = read_quantized_network(path)
    if graph.input_shape[0] != input_shape[0]:
        raise UserError(
            f"{path} takes {graph.input_shape[0]} channels, and the data has {input_shape[0]}: give another"
        )
    arguments = {"graph": graph.to_json(), "num_classes": num_classes}
    network = QuantizedNetwork(graph, num_classes)
    load_quantized_tensors(network, tensors)
    operations = find_operations(network, input_shape)
    return DescribedNetwork(graph.name, arguments, network, operations, input_shape)
