"""Bytes and multiply-accumulates of a training step under an update scheme, in closed form from shapes.

MCU bytes (int8 network, batch 1) and autograd bytes (what PyTorch keeps) are two accounts and never mixed.
"""

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from microtune.modules.networks.operations import Convolution, NetworkOperations, Operation
from microtune.modules.sparse_update.channel_choice import to_be_chosen
from microtune.modules.sparse_update.channel_importance import WITHOUT_DATA, Criterion
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

OF_THE_MEAN_GRADIENT = ("gradient_norm", "loss_decrease")  # a norm of a sum over samples, which has to be summed first
KEEP_OUTPUT = {"sigmoid", "tanh", "relu"}  # PyTorch's derivatives.yaml; every other activation keeps its input


@dataclass(frozen=True)
class LayerExtraMemory:
    """Extra memory of one convolution, in MCU bytes.

    Args:
        name: Module path of the convolution.
        bias_bytes: Its bias, 4 bytes each.
        mask_bytes: 1 bit per output element: whether the int8 output saturated.
        input_bytes: The input channels kept for the weight gradient, 1 byte per element.
        weight_bytes: The updated weights, 1 byte each.
    """

    name: str
    bias_bytes: float
    mask_bytes: float
    input_bytes: float
    weight_bytes: float

    @property
    def total_bytes(self) -> float:
        """The sum of the four."""
        return self.bias_bytes + self.mask_bytes + self.input_bytes + self.weight_bytes


def extra_memory_per_layer(convolutions: Sequence[Convolution], scheme: UpdateScheme) -> list[LayerExtraMemory]:
    """Extra memory of every convolution, in forward order; zeros outside the bias depth.

    Args:
        convolutions: The network's, in forward order.
        scheme: What is updated.

    Raises:
        UserError: The scheme does not fit these convolutions.

    Example::

        for layer in extra_memory_per_layer(operations.convolutions, scheme):
            print(layer.name, layer.total_bytes)
    """
    scheme.check(convolutions)
    return [
        _layer_extra_memory(convolution, scheme.updated_channels(convolution), depth <= scheme.bias_depth)
        for depth, convolution in zip(range(len(convolutions), 0, -1), convolutions, strict=True)
    ]


def _layer_extra_memory(convolution: Convolution, updated_channels: int, updates_bias: bool) -> LayerExtraMemory:
    return LayerExtraMemory(
        name=convolution.name,
        bias_bytes=4 * convolution.bias_elements * updates_bias,
        mask_bytes=convolution.out_elements / 8 * updates_bias,
        input_bytes=updated_channels * math.prod(convolution.in_size),
        weight_bytes=updated_channels * convolution.weight_elements_per_channel,
    )


def extra_memory_bytes(convolutions: Sequence[Convolution], classifier_features: int, scheme: UpdateScheme) -> float:
    """The paper's extra memory (Lin et al. 2022, section 2.2, as its code computes it), in MCU bytes.

    It leaves out the forward pass and the gradients: never compare it with a microcontroller's whole SRAM, but see
    ``PeakMemory``. A fraction of a byte comes of masks whose elements are no multiple of 8.

    Args:
        convolutions: The network's, in forward order.
        classifier_features: Inputs of the classifier, whose update keeps them, 1 byte each.
        scheme: What is updated.

    Raises:
        UserError: The scheme does not fit these convolutions.

    Example::

        extra_memory_bytes(operations.convolutions, operations.classifier_features, scheme) / 1024  # KiB
    """
    layers = extra_memory_per_layer(convolutions, scheme)
    return sum(layer.total_bytes for layer in layers) + classifier_features


def needs_gradient(
    operations: NetworkOperations, bias_depth: int, weights: Container[str] | None = None
) -> tuple[bool, ...]:
    """Of every activation, whether the backward pass computes its gradient.

    It does for the output of a convolution within the bias depth and for all that is computed from it.

    Args:
        operations: The network's.
        bias_depth: The biases of the last ``bias_depth`` convolutions are updated.
        weights: Names of the layers whose weights are updated; without it, a convolution within the bias depth counts
            as updated even if it has no bias.

    Example::

        needs_gradient(operations, bias_depth=0)  # all False: the classifier alone needs none
    """
    needed = [False] * len(operations.tensors)
    first_updated = len(operations.convolutions) - bias_depth
    for operation in operations.operations:
        updated = operation.layer is not None and operation.layer >= first_updated
        if updated and weights is not None:
            updated = operations.convolutions[operation.layer].has_bias or operation.name in weights
        needed[operation.output] = updated or any(needed[index] for index in operation.inputs)
    return tuple(needed)


def is_classifier(operations: NetworkOperations, operation: Operation) -> bool:
    """Whether this operation is the classifier, the last linear layer."""
    return operation.kind == "linear" and operation.name == operations.classifier_name


def not_in_the_account(operation: Operation, what: str) -> UserError:
    """The error for an operation of which it is not known what its backward keeps."""
    return UserError(
        f"{what} {operation.name} needs a gradient under this scheme and is not in the account of memory: "
        "give a bias depth that begins behind it, or replace it in the network"
    )


def autograd_bytes_per_sample(operations: NetworkOperations, scheme: UpdateScheme, bytes_per_element: int = 4) -> int:
    """What PyTorch keeps for the backward of ``network(x)``, in autograd bytes per sample, without the loss.

    Holds for a network of the project's sub-tensor layers, in eager mode; unique storages, parameters not counted.

    Args:
        operations: The network's.
        scheme: What is updated.
        bytes_per_element: Of the floats that the network computes in.

    Raises:
        UserError: The scheme does not fit the network, or an operation that needs a gradient is of unknown kind.

    Example::

        autograd_bytes_per_sample(operations, scheme) * batch_size
    """
    scheme.check(operations.convolutions)
    needed = needs_gradient(operations, scheme.bias_depth, scheme.weights)
    storages: dict[object, int] = {}
    for operation in operations.operations:
        if needed[operation.output] or is_classifier(operations, operation):
            storages.update(_kept_storages(operations, operation, scheme, bytes_per_element))
    return sum(storages.values())


def _kept_storages(
    operations: NetworkOperations, operation: Operation, scheme: UpdateScheme, bytes_per_element: int
) -> Iterator[tuple[object, int]]:
    """Identity and bytes of each storage that one operation keeps; an activation's identity is its index."""
    read, written = operation.inputs[0], operation.output
    read_bytes = math.prod(operations.tensors[read]) * bytes_per_element
    out_elements = math.prod(operations.tensors[written])
    if operation.activation_is_module or operation.is_quantized:
        yield ("mask", operation.name), out_elements
    elif operation.activation in KEEP_OUTPUT:
        yield written, out_elements * bytes_per_element
    elif operation.activation is not None:
        yield ("before the activation", operation.name), out_elements * bytes_per_element

    if operation.kind == "convolution":
        convolution = operations.convolutions[operation.layer]
        channels = scheme.updated_channels(convolution)
        channel_bytes = math.prod(convolution.padded_size) * bytes_per_element
        if operation.is_quantized and channels:
            yield ("channels", operation.name), channels * math.prod(convolution.in_size)
        elif channels == convolution.in_channels and convolution.padded_size == convolution.in_size:
            yield read, read_bytes
        elif channels:
            yield ("channels", operation.name), channels * channel_bytes
    elif operation.kind == "max_pool":
        yield read, read_bytes
        yield ("indices", operation.name), out_elements * 8  # int64
    elif is_classifier(operations, operation):
        yield read, read_bytes
    elif operation.kind == "other":
        raise not_in_the_account(operation, "operation")


@dataclass(frozen=True)
class MultiplyAccumulates:
    """Multiply-accumulates of one training step for one sample.

    Args:
        forward: Of the forward pass.
        backward: Of the gradients with respect to activations and to updated weights.
    """

    forward: int
    backward: int


def multiply_accumulates(operations: NetworkOperations, scheme: UpdateScheme) -> MultiplyAccumulates:
    """Counts the multiply-accumulates of convolutions and linear layers in one step for one sample.

    A gradient with respect to a layer's input costs as much as its forward, one with respect to its weight the
    updated fraction of that. Biases, additions and pooling are not counted.

    Args:
        operations: The network's.
        scheme: What is updated.

    Raises:
        UserError: The scheme does not fit the network.

    Example::

        count = multiply_accumulates(operations, scheme)
        count.backward / count.forward
    """
    scheme.check(operations.convolutions)
    needed = needs_gradient(operations, scheme.bias_depth, scheme.weights)
    forward = backward = 0
    for operation in operations.operations:
        per_channel, in_channels, updated_channels = _layer_work(operations, operation, scheme)
        forward += per_channel * in_channels
        backward += per_channel * (in_channels * needed[operation.inputs[0]] + updated_channels)
    return MultiplyAccumulates(forward, backward)


def _layer_work(operations: NetworkOperations, operation: Operation, scheme: UpdateScheme) -> tuple[int, int, int]:
    """Multiply-accumulates per input channel of a layer's weight, its input channels and the updated ones."""
    if operation.kind == "convolution":
        convolution = operations.convolutions[operation.layer]
        per_channel = convolution.weight_elements_per_channel * math.prod(convolution.out_size)
        return per_channel, convolution.in_channels, scheme.updated_channels(convolution)
    if operation.kind == "linear":
        features = math.prod(operations.tensors[operation.inputs[0]])
        updated_features = features if is_classifier(operations, operation) else 0
        return math.prod(operations.tensors[operation.output]), features, updated_features
    return 0, 0, 0


def flash_bytes(operations: NetworkOperations, scheme: UpdateScheme) -> int:
    """What stays in flash, in MCU bytes: frozen int8 weights, 1 byte each, and frozen biases, 4 bytes each.

    The scales of the output channels, 4 bytes each if they are floats, and the program are not counted.

    Args:
        operations: The network's.
        scheme: What is updated, and so lies in SRAM.

    Raises:
        UserError: The scheme does not fit the network.

    Example::

        Fit(microcontroller("stm32f746"), PeakMemory(operations).peak_bytes(scheme), flash_bytes(operations, scheme))
    """
    convolutions = operations.convolutions
    scheme.check(convolutions)
    weights = sum((c.in_channels - scheme.updated_channels(c)) * c.weight_elements_per_channel for c in convolutions)
    biases = sum(c.bias_elements for c in convolutions[: len(convolutions) - scheme.bias_depth])
    for operation in operations.operations:
        if operation.kind == "linear" and not is_classifier(operations, operation):
            outputs = math.prod(operations.tensors[operation.output])
            weights += math.prod(operations.tensors[operation.inputs[0]]) * outputs
            biases += outputs
    return weights + 4 * biases


@dataclass(frozen=True)
class DynamicChoice:
    """What it takes to choose channels anew on the device, beside the training steps in between.

    Args:
        score_bytes: The scores in SRAM, 4 bytes per input channel of every layer that chooses; none of a random order.
        sums_gradients: Whether the gradients of a slice are summed over the samples before they are scored, as in
            gradient accumulation.
        flash_bytes: What stays in flash: the frozen weights and biases, and a place for every weight that may leave a
            slice.
        moved_bytes_at_most: Weights that one choice can write to flash, 1 byte each: of each layer as many channels as
            it updates, or all others if these are fewer. Whole blocks that flash erases at once are not counted.
        scoring_passes: Passes through the network per sample: forward and back, one slice of each layer at a time,
            until all channels of all layers have had their turn; one forward of the activation norm; none without data.
    """

    score_bytes: int
    sums_gradients: bool
    flash_bytes: int
    moved_bytes_at_most: int
    scoring_passes: int


def dynamic_choice(
    operations: NetworkOperations, scheme: UpdateScheme, choice: Criterion = "weight_norm"
) -> DynamicChoice:
    """What it takes to choose channels anew on the device, in MCU bytes, in closed form.

    A pass that scores keeps as many channels of each layer as the scheme updates, and so no more than a training step;
    scores and, of the mean gradient's, sums over the samples are all that come on top.

    Args:
        operations: The network's.
        scheme: How many channels of which layers.
        choice: By which score.

    Raises:
        UserError: The scheme does not fit the network.

    Example::

        choice = dynamic_choice(operations, scheme, "taylor")
        PeakMemory(operations).peak_bytes(scheme) + choice.score_bytes
    """
    frozen_bytes = flash_bytes(operations, scheme)
    layers = [(c, scheme.updated_channels(c)) for c in to_be_chosen(scheme, operations.convolutions)]
    passes = max((math.ceil(c.in_channels / updated) for c, updated in layers), default=0)
    return DynamicChoice(
        score_bytes=0 if choice == "random" else 4 * sum(c.in_channels for c, _ in layers),
        sums_gradients=bool(layers) and choice in OF_THE_MEAN_GRADIENT,
        flash_bytes=frozen_bytes + sum(updated * c.weight_elements_per_channel for c, updated in layers),
        moved_bytes_at_most=sum(
            min(updated, c.in_channels - updated) * c.weight_elements_per_channel for c, updated in layers
        ),
        scoring_passes=0 if choice in WITHOUT_DATA else min(passes, 1) if choice == "activation_norm" else passes,
    )
