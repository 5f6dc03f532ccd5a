"""Peak memory: the highest number of MCU bytes alive at any moment of one training step.

The step is walked operation by operation, forward and back; a convolution and its activation are one operation. What
is alive when depends on the bias depth alone. Within one bias depth the bytes of every moment are linear in how many
channels each layer updates and keeps, so the peaks of many schemes are one matrix product and a maximum.
"""

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from microtune.modules.memory.microcontrollers import Fit, Microcontroller
from microtune.modules.memory.training_memory import flash_bytes, is_classifier, needs_gradient, not_in_the_account
from microtune.modules.networks.operations import NetworkOperations, Operation, find_operations
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

OptimizerState = Literal["none", "momentum", "adam"]
STATE_BYTES: dict[str, int] = {"none": 0, "momentum": 4, "adam": 8}  # per trained parameter
INT8_BYTES, LATENT_BYTES = 1, 4  # of an updated weight, and of its float copy
CATEGORIES = ("weights", "optimizer state", "activations", "kept inputs", "masks", "gradients", "weight gradients")
# one bit per element is all that the backward of these needs; None: the int8 output saturates
ONE_BIT_ACTIVATIONS = {None, "relu", "hardtanh", "leaky_relu", "hardsigmoid"}
SCHEMES_AT_ONCE = 4096  # keeps the matrix product in a few megabytes


@dataclass(frozen=True)
class MomentRows:
    """Bytes at every moment of a training step with one bias depth, as a linear function; one row per moment.

    With n channels of a layer updated, the layer counts n *updated* channels, and either n *kept* channels (a copy)
    or, if n is all of them, a *whole* kept input (the activation itself). Only layers that read the same activation
    keep their union instead, counted at the first of them that keeps any: see ``PeakMemory.kept_inputs``.

    Args:
        moments: Name of the operation and direction of each moment.
        constant: Bytes whatever the scheme updates, of shape (category, moment).
        per_updated_channel: Bytes per updated channel, of shape (category, moment, layer).
        per_kept_channel: Bytes per channel of the copy, of the same shape.
        kept_whole: Bytes if the input is kept whole, of the same shape.

    Example::

        rows = PeakMemory(operations).rows(bias_depth=12)
        rows.constant.sum(0).max()  # bytes, in the highest moment, of updating twelve biases and no weight
    """

    moments: tuple[str, ...]
    constant: NDArray[np.int64]
    per_updated_channel: NDArray[np.int64]
    per_kept_channel: NDArray[np.int64]
    kept_whole: NDArray[np.int64]


@dataclass(frozen=True)
class Timeline:
    """Bytes alive at every moment of one training step.

    Args:
        moments: Name of the operation and direction of each moment.
        bytes_of_category: Bytes per moment of each of ``CATEGORIES``.

    Example::

        timeline = PeakMemory(operations).timeline(scheme)
        plt.stackplot(range(len(timeline.moments)), timeline.bytes_of_category.values())
    """

    moments: tuple[str, ...]
    bytes_of_category: dict[str, NDArray[np.int64]]

    @property
    def total_bytes(self) -> NDArray[np.int64]:
        """The sum of all categories at every moment."""
        return sum(self.bytes_of_category.values())


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory of one training step of a network, batch 1, in MCU bytes.

    Args:
        operations: The network's.
        optimizer_state: What the optimizer holds in SRAM per trained parameter: nothing, 4 or 8 bytes.
        reordering: Apply a gradient as soon as it exists (Lin et al. 2022, section 2.3); else all wait for the end.
        gradient_accumulation: Carry the gradients of the trained parameters from step to step.
        depthwise_in_place: Let a depthwise convolution write over its input (MCUNet, Lin et al. 2020, section 3.2).
        gradient_bytes: Per element of a gradient of activations or weights; the published kernels take floats.
        latent_weights: Hold a float beside every updated int8 weight, as the code of Lin et al. 2022 trains. Biases
            have none: what is an int32 in inference is then a float, of the same size.

    Raises:
        UserError: The optimizer's state is unknown, or ``gradient_bytes`` is not positive.

    Example::

        operations = find_operations(network, (3, 128, 128))
        PeakMemory(operations).peak_bytes(scheme) <= microcontroller("stm32f746").budget_bytes
    """

    operations: NetworkOperations
    _: KW_ONLY
    optimizer_state: OptimizerState = "none"
    reordering: bool = True
    gradient_accumulation: bool = False
    depthwise_in_place: bool = True
    gradient_bytes: int = 4
    latent_weights: bool = False
    _totals: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self):
        if self.optimizer_state not in get_args(OptimizerState):
            known = ", ".join(get_args(OptimizerState))
            raise UserError(f"optimizer_state is {self.optimizer_state!r}: give one of {known}")
        if self.gradient_bytes <= 0:
            raise UserError(f"gradient_bytes is {self.gradient_bytes}: give the bytes per element, such as 4 or 1")

    @property
    def floor_bytes(self) -> int:
        """The peak where the classifier alone is updated: no scheme needs less."""
        return self.peak_bytes(UpdateScheme("", bias_depth=0))

    @property
    def inference_peak_bytes(self) -> int:
        """The peak of a forward pass alone, whose weights stay in flash; logits count 4 bytes each, as in training."""
        return int(self.rows(bias_depth=0).constant[CATEGORIES.index("activations")].max())

    def peak_bytes(self, scheme: UpdateScheme) -> int:
        """The peak under one scheme.

        Raises:
            UserError: The scheme does not fit the network, or an operation that needs a gradient is of unknown kind.
        """
        return int(self.timeline(scheme).total_bytes.max())

    def timeline(self, scheme: UpdateScheme) -> Timeline:
        """Bytes of every moment and category under one scheme; raises as ``peak_bytes`` does."""
        scheme.check(self.operations.convolutions)
        updated = np.array([[scheme.updated_channels(c) for c in self.operations.convolutions]], dtype=np.int64)
        kept, whole = self.kept_inputs(updated, scheme)
        rows = self.rows(scheme.bias_depth)
        in_bytes = rows.constant + rows.per_updated_channel @ updated[0]
        in_bytes += rows.per_kept_channel @ kept[0] + rows.kept_whole @ whole[0]
        return Timeline(rows.moments, dict(zip(CATEGORIES, in_bytes, strict=True)))

    def peaks_bytes(self, bias_depths: NDArray[np.integer], updated_channels: NDArray[np.integer]) -> NDArray[np.int64]:
        """The peaks of many schemes, which fix no channels; 100,000 of MobileNetV2 take seconds.

        Args:
            bias_depths: Of shape (scheme,).
            updated_channels: Input channels updated of each layer's weight, of shape (scheme, layer).

        Raises:
            UserError: A depth or a number of channels is out of range, or a weight outside the bias depth is updated.
        """
        bias_depths, updated_channels = np.asarray(bias_depths), np.asarray(updated_channels)
        self._check(bias_depths, updated_channels)
        peaks = np.empty(len(bias_depths), dtype=np.int64)
        for depth in np.unique(bias_depths).tolist():
            indexes = np.flatnonzero(bias_depths == depth)
            constant, per_variable = self._linear(depth)
            for start in range(0, len(indexes), SCHEMES_AT_ONCE):
                batch = indexes[start : start + SCHEMES_AT_ONCE]
                updated = updated_channels[batch]
                variables = np.concatenate([updated, *self.kept_inputs(updated)], axis=1)
                # integers below 2**53 are exact in float64, and only floats have a fast matrix product
                peaks[batch] = (variables.astype(np.float64) @ per_variable + constant).max(axis=1)
        return peaks

    def kept_inputs(
        self, updated_channels: NDArray[np.integer], scheme: UpdateScheme | None = None
    ) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
        """How many channels of its input each layer keeps as a copy, and whether it keeps the whole of it.

        Of layers that read the same activation, the first that keeps any keeps the union for all: its size is known
        where the scheme fixes their channels, otherwise the sum bounds it.

        Args:
            updated_channels: Of shape (scheme, layer).
            scheme: Of a single row, for the channels that it fixes.
        """
        whole = updated_channels == self._in_channels
        kept = np.where(whole, 0, updated_channels)
        for layers in self._layers_with_shared_input:
            channels = updated_channels[:, layers]
            keeps = channels > 0
            first = keeps & (keeps.cumsum(axis=1) == 1)
            any_whole = whole[:, layers].any(axis=1, keepdims=True)
            union = np.minimum(channels.sum(axis=1, keepdims=True), self._in_channels[layers[0]])
            names = [self.operations.convolutions[layer].name for layer in np.array(layers)[keeps[0]]] if scheme else []
            if names and all(name in scheme.channels for name in names):
                union[0] = len({channel for name in names for channel in scheme.channels[name]})
            kept[:, layers] = first * union * ~any_whole
            whole[:, layers] = first & any_whole
        return kept, whole

    def rows(self, bias_depth: int) -> MomentRows:
        """The linear function behind the peaks of one bias depth, as a mixed-integer program takes it.

        Raises:
            UserError: An operation that needs a gradient is of unknown kind.
        """
        return _Builder(self, bias_depth).rows()

    def _linear(self, bias_depth: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The sum over categories: a constant per moment, and bytes of shape (variable, moment)."""
        if bias_depth not in self._totals:
            rows = self.rows(bias_depth)
            per_variable = np.concatenate([rows.per_updated_channel, rows.per_kept_channel, rows.kept_whole], axis=2)
            self._totals[bias_depth] = (rows.constant.sum(0).astype(float), per_variable.sum(0).T.astype(float))
        return self._totals[bias_depth]

    @cached_property
    def _in_channels(self) -> NDArray[np.int64]:
        return np.array([c.in_channels for c in self.operations.convolutions], dtype=np.int64)

    @cached_property
    def _layers_with_shared_input(self) -> list[list[int]]:
        readers: dict[int, list[int]] = {}
        for operation in self.operations.operations:
            if operation.layer is not None:
                readers.setdefault(operation.inputs[0], []).append(operation.layer)
        return [layers for layers in readers.values() if len(layers) > 1]

    def _check(self, bias_depths: NDArray[np.integer], updated_channels: NDArray[np.integer]) -> None:
        layers = len(self.operations.convolutions)
        if updated_channels.shape != (*bias_depths.shape, layers):
            raise UserError(
                f"bias_depths and updated_channels are of shapes {bias_depths.shape} and {updated_channels.shape}: "
                f"give (schemes,) and (schemes, {layers})"
            )
        if ((bias_depths < 0) | (bias_depths > layers)).any():
            raise UserError(f"a bias depth is out of its range: give 0 to {layers}")
        outside = np.arange(layers) < layers - bias_depths[:, None]
        wrong = (updated_channels < 0) | (updated_channels > np.where(outside, 0, self._in_channels))
        if wrong.any():
            scheme, layer = np.argwhere(wrong)[0]
            raise UserError(
                f"{updated_channels[scheme, layer]} channels of {self.operations.convolutions[layer].name} are updated "
                f"with bias depth {bias_depths[scheme]}: give 0 to {self._in_channels[layer]}, 0 outside the bias depth"
            )


@dataclass
class _GradientBuffer:
    """A gradient in memory; after an addition several activations wait for their producers to read it."""

    first_moment: int
    size_bytes: int
    waiting: set[int]


class _Builder:
    """Writes down what is alive from which moment to which, for one bias depth."""

    def __init__(self, options: PeakMemory, bias_depth: int):
        self.options = options
        self.network = network = options.operations
        self.first_updated = len(network.convolutions) - bias_depth
        self.needed = needs_gradient(network, bias_depth)
        forward = list(enumerate(network.operations))
        backward = [
            (position, operation)
            for position, operation in reversed(forward)
            if self.needed[operation.output] or is_classifier(network, operation)
        ]
        self.backward_moment = {position: len(forward) + index for index, (position, _) in enumerate(backward)}
        self.classifier = next(p for p, operation in reversed(forward) if is_classifier(network, operation))
        self.moments = tuple(f"{operation.name} forward" for _, operation in forward)
        self.moments += tuple(f"{operation.name} backward" for _, operation in backward)
        self.written = {0: 0} | {operation.output: position for position, operation in forward}
        self.last_read = self.written | {index: p for p, operation in forward for index in operation.inputs}
        shape = (len(CATEGORIES), len(self.moments))
        layers = len(network.convolutions)
        self.constant = np.zeros(shape, dtype=np.int64)
        self.per_updated_channel = np.zeros((*shape, layers), dtype=np.int64)
        self.per_kept_channel = np.zeros((*shape, layers), dtype=np.int64)
        self.kept_whole = np.zeros((*shape, layers), dtype=np.int64)

    def rows(self) -> MomentRows:
        self._add_resident()
        self._add_activations()
        self._add_gradients()
        for position, operation in enumerate(self.network.operations):
            if self.needed[operation.output]:
                self._add_masks(position, operation)
            if operation.layer is not None and operation.layer >= self.first_updated:
                self._add_kept_input(position, operation)
                self._add_weight_gradients(position, operation.layer)
        return MomentRows(self.moments, self.constant, self.per_updated_channel, self.per_kept_channel, self.kept_whole)

    def _add(self, category: str, first: int, last: int, size_bytes: int) -> None:
        self.constant[CATEGORIES.index(category), first : last + 1] += size_bytes

    def _elements(self, tensor: int) -> int:
        return math.prod(self.network.tensors[tensor])

    def _is_logits(self, tensor: int) -> bool:
        return tensor == self.network.operations[self.classifier].output

    def _activation_bytes(self, tensor: int) -> int:
        return self._elements(tensor) * (4 if self._is_logits(tensor) else 1)

    def _gradient_bytes(self, tensor: int) -> int:
        return self._elements(tensor) * (4 if self._is_logits(tensor) else self.options.gradient_bytes)

    @property
    def _classifier_parameters(self) -> int:
        return (self.network.classifier_features + 1) * self.network.classifier_classes

    def _add_resident(self) -> None:
        state_bytes = STATE_BYTES[self.options.optimizer_state]
        weight_bytes = INT8_BYTES + (LATENT_BYTES if self.options.latent_weights else 0)
        weights, state = CATEGORIES.index("weights"), CATEGORIES.index("optimizer state")
        updated = list(enumerate(self.network.convolutions))[self.first_updated :]
        trained = sum(convolution.bias_elements for _, convolution in updated) + self._classifier_parameters
        self.constant[weights] += 4 * trained
        self.constant[state] += state_bytes * trained
        for layer, convolution in updated:
            self.per_updated_channel[weights, :, layer] += weight_bytes * convolution.weight_elements_per_channel
            self.per_updated_channel[state, :, layer] += state_bytes * convolution.weight_elements_per_channel

    def _add_activations(self) -> None:
        for tensor, written in self.written.items():
            self._add("activations", written, self.last_read[tensor], self._activation_bytes(tensor))
        kept = self.network.operations[self.classifier].inputs[0]
        last = self.backward_moment[self.classifier]
        self._add("kept inputs", self.last_read[kept] + 1, last, self._activation_bytes(kept))
        for position, operation in enumerate(self.network.operations):
            if self._writes_over_input(position, operation):
                self._add("activations", position, position, -self._saved_forward(operation))

    def _writes_over_input(self, position: int, operation: Operation) -> bool:
        """Whether a convolution runs in place, unless a layer keeps its input whole."""
        return (
            self._is_in_place_kind(operation)
            and self.last_read[operation.inputs[0]] == position
            and operation.inputs[0] != self.network.operations[self.classifier].inputs[0]
        )

    def _is_in_place_kind(self, operation: Operation) -> bool:
        if operation.layer is None or not self.options.depthwise_in_place:
            return False
        convolution = self.network.convolutions[operation.layer]
        return convolution.is_depthwise and convolution.in_channels == convolution.out_channels

    def _saved_forward(self, operation: Operation) -> int:
        """What running in place saves: the smaller plane set, less a buffer of one output channel."""
        out_plane = math.prod(self.network.convolutions[operation.layer].out_size)
        return min(self._elements(operation.inputs[0]), self._elements(operation.output)) - out_plane

    def _add_kept_input(self, position: int, operation: Operation) -> None:
        tensor, layer, last = operation.inputs[0], operation.layer, self.backward_moment[position]
        category = CATEGORIES.index("kept inputs")
        plane = math.prod(self.network.convolutions[layer].in_size)
        self.per_kept_channel[category, position : last + 1, layer] += plane
        alive_anyway = self.last_read[tensor]
        if tensor == self.network.operations[self.classifier].inputs[0]:
            alive_anyway = self.backward_moment[self.classifier]
        self.kept_whole[category, alive_anyway + 1 : last + 1, layer] += self._activation_bytes(tensor)
        reader = self.last_read[tensor]
        if self._writes_over_input(reader, self.network.operations[reader]):
            saved = self._saved_forward(self.network.operations[reader])
            self.kept_whole[CATEGORIES.index("activations"), reader, layer] += saved

    def _add_masks(self, position: int, operation: Operation) -> None:
        if operation.kind == "other":
            raise not_in_the_account(operation, "operation")
        if operation.activation not in ONE_BIT_ACTIVATIONS:
            raise not_in_the_account(operation, f"the {operation.activation} of")
        elements = self._elements(operation.output)
        if operation.kind in ("convolution", "addition") or (
            operation.kind == "linear" and not is_classifier(self.network, operation)
        ):
            self._add("masks", position, self.backward_moment[position], -(-elements // 8))
        elif operation.kind == "max_pool":
            self._add("masks", position, self.backward_moment[position], elements)  # which position won

    def _add_weight_gradients(self, position: int, layer: int) -> None:
        convolution = self.network.convolutions[layer]
        category, alive = CATEGORIES.index("weight gradients"), self._alive_weight_gradient(position)
        self.constant[category, alive] += 4 * convolution.bias_elements
        channel_bytes = convolution.weight_elements_per_channel * self.options.gradient_bytes
        self.per_updated_channel[category, alive, layer] += channel_bytes

    def _alive_weight_gradient(self, position: int) -> slice:
        if self.options.gradient_accumulation:
            return slice(None)
        moment = self.backward_moment[position]
        return slice(moment, moment + 1 if self.options.reordering else None)

    def _add_gradients(self) -> None:
        alive = self._alive_weight_gradient(self.classifier)
        self.constant[CATEGORIES.index("weight gradients"), alive] += 4 * self._classifier_parameters
        buffers: dict[int, _GradientBuffer] = {}
        for position, moment in self.backward_moment.items():
            operation = self.network.operations[position]
            for buffer in self._walk_back(operation, moment, buffers):
                self._add("gradients", buffer.first_moment, moment, buffer.size_bytes)

    def _walk_back(
        self, operation: Operation, moment: int, buffers: dict[int, _GradientBuffer]
    ) -> Iterator[_GradientBuffer]:
        """Moves the gradients on through one operation and yields the buffers that end at this moment."""

        def new_buffer(tensor: int) -> _GradientBuffer:
            return _GradientBuffer(moment, self._gradient_bytes(tensor), {tensor})

        output = buffers.setdefault(operation.output, new_buffer(operation.output))
        tensors = [tensor for tensor in dict.fromkeys(operation.inputs) if self.needed[tensor]]
        if self._is_in_place_kind(operation) and tensors and tensors[0] not in buffers and len(output.waiting) == 1:
            yield _GradientBuffer(moment, -self._saved_backward(operation), set())
        for tensor in tensors:
            if tensor not in buffers and operation.kind == "addition":
                output.waiting.add(tensor)
                buffers[tensor] = output
            elif tensor not in buffers:
                buffers[tensor] = new_buffer(tensor)
            elif len(buffers[tensor].waiting) > 1:  # others have yet to read it as it is: accumulate in a copy
                buffers[tensor].waiting.remove(tensor)
                buffers[tensor] = new_buffer(tensor)
        output.waiting.remove(operation.output)
        if not output.waiting:
            yield output

    def _saved_backward(self, operation: Operation) -> int:
        """What running in place saves: the smaller gradient, less a buffer of one channel of the larger plane."""
        convolution = self.network.convolutions[operation.layer]
        larger_plane = max(math.prod(convolution.in_size), math.prod(convolution.out_size))
        smaller = min(self._elements(operation.inputs[0]), self._elements(operation.output))
        return self.options.gradient_bytes * (smaller - larger_plane)


def largest_resolution_that_fits(
    network: nn.Module, peak_memory: PeakMemory, microcontroller: Microcontroller, below: int, step: int = 16
) -> int | None:
    """The largest square input at which at least the classifier's update fits; None if no resolution helps.

    The frozen weights need the same flash at every resolution, so None also where they exceed it.

    Args:
        network: Any that ``find_operations`` takes.
        peak_memory: Of this network at any resolution, with the options of the training.
        microcontroller: The device.
        below: The resolution that did not fit; only smaller ones are tried.
        step: The resolution is a multiple of it.

    Example::

        peak_memory = PeakMemory(find_operations(network, (3, 128, 128)))
        largest_resolution_that_fits(network, peak_memory, microcontroller("stm32f411"), below=128)
    """
    scheme = UpdateScheme("", bias_depth=0)
    in_channels = peak_memory.operations.tensors[0][0]
    for resolution in range((below - 1) // step * step, 0, -step):
        try:
            operations = find_operations(network, (in_channels, resolution, resolution))
        except UserError:  # too small for its pooling, or a classifier behind a flattened feature map
            continue
        peak_bytes = replace(peak_memory, operations=operations).peak_bytes(scheme)
        if Fit(microcontroller, peak_bytes, flash_bytes(operations, scheme)).fits:
            return resolution
    return None
