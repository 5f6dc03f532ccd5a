"""Peak memory equals what a plain simulation of one training step allocates, moment by moment."""

from dataclasses import dataclass, field
from math import ceil, prod

import numpy as np
import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import max_pool2d, relu, relu6

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.networks.operations import Convolution, NetworkOperations, Operation, find_operations
from microtune.modules.sparse_update.update_scheme import UpdateScheme


class Arena:
    """Named allocations in one memory, and the most that was ever allocated at once."""

    def __init__(self):
        self.allocations: dict[str, int] = {}
        self.high_water_mark = 0

    def allocate(self, name: str, size: int) -> None:
        assert name not in self.allocations, f"{name} is allocated twice"
        self.allocations[name] = size
        self.high_water_mark = max(self.high_water_mark, sum(self.allocations.values()))

    def shrink(self, name: str, size: int) -> None:
        assert size <= self.allocations[name]
        self.allocations[name] = size

    def free(self, name: str) -> None:
        del self.allocations[name]


@dataclass
class TrainingStep:
    """One training step with batch 1, run for its allocations alone. Every moment allocates first and frees last."""

    network: NetworkOperations
    scheme: UpdateScheme
    optimizer_state: str = "none"
    reordering: bool = True
    gradient_accumulation: bool = False
    depthwise_in_place: bool = True
    gradient_bytes: int = 4
    latent_weights: bool = False
    arena: Arena = field(default_factory=Arena)
    gradient_buffer: dict[int, str] = field(default_factory=dict)  # tensor -> name of its allocation
    waiting: dict[str, set[int]] = field(default_factory=dict)  # allocation -> tensors whose producers will read it

    def run(self) -> int:
        """Highest number of bytes alive."""
        self.plan()
        self.allocate_residents()
        self.arena.allocate("activation 0", self.elements(0))
        for position, operation in enumerate(self.network.operations):
            self.forward(position, operation)
        for position, operation in reversed(list(enumerate(self.network.operations))):
            if self.is_classifier(operation) or operation.output in self.needs_gradient:
                self.backward(position, operation)
        assert not self.gradient_buffer
        assert not [name for name in self.arena.allocations if name.startswith(("activation", "mask", "copy", "place"))]
        return self.arena.high_water_mark

    # what the scheme decides before the step

    def plan(self) -> None:
        operations = self.network.operations
        self.needs_gradient: set[int] = set()
        for operation in operations:
            if self.has_updated_bias(operation) or self.needs_gradient.intersection(operation.inputs):
                self.needs_gradient.add(operation.output)

        self.last_reader = {tensor: p for p, operation in enumerate(operations) for tensor in operation.inputs}

        self.first_keeper: dict[int, int] = {}  # tensor -> position of the first operation that keeps some of it
        self.kept_whole: set[int] = set()
        keepers: dict[int, list] = {}
        for position, operation in enumerate(operations):
            tensor = operation.inputs[0]
            if self.is_classifier(operation):
                self.first_keeper.setdefault(tensor, position)
                self.kept_whole.add(tensor)
            elif self.updated_channels(operation):
                self.first_keeper.setdefault(tensor, position)
                keepers.setdefault(tensor, []).append(self.convolution(operation))
                if self.updated_channels(operation) == self.convolution(operation).in_channels:
                    self.kept_whole.add(tensor)
        self.copied_channels = {
            tensor: self.union(convolutions)
            for tensor, convolutions in keepers.items()
            if tensor not in self.kept_whole
        }

    def union(self, convolutions: list) -> int:
        fixed = self.scheme.channels
        if all(convolution.name in fixed for convolution in convolutions):
            return len({channel for convolution in convolutions for channel in fixed[convolution.name]})
        return min(convolutions[0].in_channels, sum(self.scheme.updated_channels(c) for c in convolutions))

    def is_classifier(self, operation: Operation) -> bool:
        return operation.kind == "linear" and operation.name == self.network.classifier_name

    def convolution(self, operation: Operation):
        return self.network.convolutions[operation.layer]

    def has_updated_bias(self, operation: Operation) -> bool:
        if operation.kind != "convolution":
            return False
        return operation.layer >= len(self.network.convolutions) - self.scheme.bias_depth

    def updated_channels(self, operation: Operation) -> int:
        if operation.kind != "convolution":
            return 0
        return self.scheme.updated_channels(self.convolution(operation))

    def can_be_in_place(self, operation: Operation) -> bool:
        if operation.kind != "convolution" or not self.depthwise_in_place:
            return False
        layer = self.convolution(operation)
        return layer.groups == layer.in_channels == layer.out_channels

    def elements(self, tensor: int) -> int:
        return prod(self.network.tensors[tensor])

    def plane(self, tensor: int) -> int:
        return prod(self.network.tensors[tensor][1:])

    # resident

    def allocate_residents(self) -> None:
        state_bytes = {"none": 0, "momentum": 4, "adam": 8}[self.optimizer_state]
        trained = self.classifier_parameters()
        self.arena.allocate("classifier", 4 * self.classifier_parameters())
        for operation in self.network.operations:
            if self.has_updated_bias(operation):
                name, biases = operation.name, self.convolution(operation).out_channels
                self.arena.allocate(f"slice of {name}", self.slice_weights(operation))
                if self.latent_weights:
                    self.arena.allocate(f"latent slice of {name}", 4 * self.slice_weights(operation))
                self.arena.allocate(f"bias of {name}", 4 * biases)
                trained += self.slice_weights(operation) + biases
        self.arena.allocate("optimizer state", state_bytes * trained)
        if self.gradient_accumulation:
            for operation in self.network.operations:
                self.allocate_parameter_gradients(operation)

    def classifier_parameters(self) -> int:
        return self.network.classifier_features * self.network.classifier_classes + self.network.classifier_classes

    def slice_weights(self, operation: Operation) -> int:
        layer = self.convolution(operation)
        per_channel = layer.out_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        return self.updated_channels(operation) * per_channel

    def allocate_parameter_gradients(self, operation: Operation) -> None:
        if self.is_classifier(operation):
            self.arena.allocate(f"parameter gradients of {operation.name}", 4 * self.classifier_parameters())
        elif self.has_updated_bias(operation):
            size = self.gradient_bytes * self.slice_weights(operation) + 4 * self.convolution(operation).out_channels
            self.arena.allocate(f"parameter gradients of {operation.name}", size)

    # forward

    def forward(self, position: int, operation: Operation) -> None:
        arena, output, tensor = self.arena, operation.output, operation.inputs[0]
        if output in self.needs_gradient:
            if operation.kind in ("convolution", "addition"):
                arena.allocate(f"mask of {operation.name}", ceil(self.elements(output) / 8))
            if operation.kind == "max_pool":
                arena.allocate(f"places of {operation.name}", self.elements(output))
        if self.first_keeper.get(tensor) == position and tensor in self.copied_channels:
            arena.allocate(f"copy of {tensor}", self.copied_channels[tensor] * self.plane(tensor))

        size = 4 * self.network.classifier_classes if self.is_classifier(operation) else self.elements(output)
        in_place = (
            self.can_be_in_place(operation) and self.last_reader[tensor] == position and tensor not in self.kept_whole
        )
        if in_place:
            arena.free(f"activation {tensor}")
            arena.allocate(f"activation {output}", max(self.elements(tensor), size) + self.plane(output))
            arena.shrink(f"activation {output}", size)
        else:
            arena.allocate(f"activation {output}", size)
            for read in set(operation.inputs):
                if self.last_reader[read] == position and read not in self.kept_whole:
                    arena.free(f"activation {read}")
        if output not in self.last_reader:
            arena.free(f"activation {output}")

    # backward

    def backward(self, position: int, operation: Operation) -> None:
        arena, output = self.arena, operation.output
        if self.is_classifier(operation):
            self.new_gradient(output, 4 * self.network.classifier_classes)
        if not self.gradient_accumulation:
            self.allocate_parameter_gradients(operation)

        inputs = [tensor for tensor in dict.fromkeys(operation.inputs) if tensor in self.needs_gradient]
        if operation.kind == "addition":
            self.pass_on(output, inputs)
        elif inputs and self.can_be_in_place(operation) and self.is_alone(output) and not self.has_gradient(inputs[0]):
            self.overwrite(output, inputs[0])
        else:
            for tensor in inputs:
                self.contribute(tensor)
        if self.has_gradient(output):
            self.release_gradient(output)

        if self.reordering and not self.gradient_accumulation:
            name = f"parameter gradients of {operation.name}"
            if name in arena.allocations:
                arena.free(name)
        for name in (f"mask of {operation.name}", f"places of {operation.name}"):
            if name in arena.allocations:
                arena.free(name)
        tensor = operation.inputs[0]
        if self.first_keeper.get(tensor) == position:
            arena.free(f"activation {tensor}" if tensor in self.kept_whole else f"copy of {tensor}")

    def has_gradient(self, tensor: int) -> bool:
        return tensor in self.gradient_buffer

    def is_alone(self, tensor: int) -> bool:
        return self.waiting[self.gradient_buffer[tensor]] == {tensor}

    def new_gradient(self, tensor: int, size: int) -> None:
        name = f"gradient of {tensor}"
        self.arena.allocate(name, size)
        self.gradient_buffer[tensor] = name
        self.waiting[name] = {tensor}

    def release_gradient(self, tensor: int) -> None:
        name = self.gradient_buffer.pop(tensor)
        self.waiting[name].remove(tensor)
        if not self.waiting[name]:
            self.arena.free(name)

    def contribute(self, tensor: int) -> None:
        """Writes a gradient, or adds to the one that is there: to a copy if others have still to read that."""
        size = self.gradient_bytes * self.elements(tensor)
        if not self.has_gradient(tensor):
            self.new_gradient(tensor, size)
        elif not self.is_alone(tensor):
            shared = self.gradient_buffer[tensor]
            self.waiting[shared].remove(tensor)
            copy = f"copied gradient of {tensor}"
            self.arena.allocate(copy, size)
            self.gradient_buffer[tensor] = copy
            self.waiting[copy] = {tensor}

    def pass_on(self, output: int, inputs: list[int]) -> None:
        """An addition's inputs take over the gradient of its output."""
        for tensor in inputs:
            if self.has_gradient(tensor):
                self.contribute(tensor)
            else:
                self.gradient_buffer[tensor] = self.gradient_buffer[output]
                self.waiting[self.gradient_buffer[output]].add(tensor)

    def overwrite(self, output: int, tensor: int) -> None:
        """A depthwise convolution writes the gradient of its input over that of its output, by way of one channel."""
        self.release_gradient(output)
        size = max(self.elements(tensor), self.elements(output)) + max(self.plane(tensor), self.plane(output))
        self.new_gradient(tensor, self.gradient_bytes * size)
        self.arena.shrink(self.gradient_buffer[tensor], self.gradient_bytes * self.elements(tensor))


def convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups)


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int = 1):
        super().__init__()
        self.expand = convolution(inputs, hidden)
        self.depthwise = convolution(hidden, hidden, 3, stride, groups=hidden)
        self.project = convolution(hidden, outputs)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.project(relu6(self.depthwise(relu6(self.expand(x)))))
        return x + y if self.is_residual else y


class SmallMobileNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            convolution(3, 8, 3, stride=2),
            nn.ReLU6(),
            convolution(8, 8, 3, groups=8),
            nn.ReLU6(),
            InvertedResidual(8, 24, 12, stride=2),
            InvertedResidual(12, 36, 12),
            InvertedResidual(12, 36, 12),
            InvertedResidual(12, 36, 20, stride=2),
            InvertedResidual(20, 60, 20),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(20, 7),
        )


class GroupedNetwork(nn.Sequential):
    def __init__(self):
        super().__init__(
            convolution(3, 12, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            convolution(12, 24, 3, groups=3),
            nn.ReLU(),
            convolution(24, 48, 3, stride=2, groups=24),  # two outputs per channel: not in place
            nn.ReLU(),
            convolution(48, 16, 1, groups=4),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 2 * 2, 5),
        )


class TangledNetwork(nn.Module):
    """Every way in which gradient buffers meet: residuals over one layer, sums of sums, tensors with three readers."""

    def __init__(self):
        super().__init__()
        self.depthwise_of_input = convolution(3, 3, 3, groups=3)
        self.stem = convolution(3, 8, 3)
        self.single = convolution(8, 8, 3)
        self.depthwise_residual = convolution(8, 8, 3, groups=8)
        self.left = convolution(8, 8, 3, groups=2)
        self.right = convolution(8, 8, 1)
        self.depthwise_branch = convolution(8, 8, 3, groups=8)
        self.joined = convolution(8, 8, 1)
        self.down = convolution(8, 12, 3, stride=2)
        self.down_depthwise = convolution(8, 8, 3, stride=2, groups=8)
        self.down_project = convolution(8, 12, 1)
        self.down_shortcut = convolution(8, 12, 1, stride=2)
        self.classifier = nn.Linear(12, 4)

    def forward(self, x):
        x = relu(self.stem(self.depthwise_of_input(x)))
        x = x + self.single(x)
        x = self.depthwise_residual(x) + x
        left, right = self.left(x), relu(self.right(x))
        inner = left + x
        x = (inner + right) + x
        branch = self.depthwise_branch(x)
        x = self.joined(x + branch) + inner
        first = self.down(x)
        second = self.down_project(self.down_depthwise(x))
        third = self.down_shortcut(x)
        x = relu(first + second)
        x = x + third + max_pool2d(first, 3, 1, 1)
        return self.classifier(x.mean([2, 3]))


def mobilenet_v2_without_head() -> nn.Module:
    network = torchvision.models.mobilenet_v2(width_mult=0.35)
    network.features = network.features[:18]
    network.classifier[1] = nn.Linear(112, 10)
    return network


NETWORKS = {
    "small mobilenet": find_operations(SmallMobileNet(), (3, 32, 32)),
    "mobilenet_v2-w0.35": find_operations(mobilenet_v2_without_head(), (3, 64, 64)),
    "resnet18": find_operations(torchvision.models.resnet18(num_classes=10), (3, 64, 64)),
    "grouped": find_operations(GroupedNetwork(), (3, 16, 16)),
    "tangled": find_operations(TangledNetwork(), (3, 8, 8)),
}

OPTIONS = st.fixed_dictionaries(
    {
        "optimizer_state": st.sampled_from(["none", "momentum", "adam"]),
        "reordering": st.booleans(),
        "gradient_accumulation": st.booleans(),
        "depthwise_in_place": st.booleans(),
        "gradient_bytes": st.sampled_from([4, 4, 1, 2]),
        "latent_weights": st.booleans(),
    }
)


@st.composite
def graphs(draw) -> NetworkOperations:
    """Up to ten operations that read any earlier tensors; those that nobody reads are averaged and added."""
    tensors: list[tuple[int, ...]] = [(draw(st.sampled_from([3, 4])), 6, 6)]
    layers: list[Convolution] = []
    operations: list[Operation] = []
    for position in range(draw(st.integers(1, 10))):
        read = draw(st.integers(0, len(tensors) - 1) | st.just(len(tensors) - 1))
        kind = draw(st.sampled_from(["full", "full", "depthwise", "addition", "addition", "max_pool"]))
        partners = [t for t, shape in enumerate(tensors) if shape == tensors[read] and t != read]
        inputs, layer = (read,), None
        channels, height, width = tensors[read]
        if kind == "addition" and partners:
            inputs = (read, draw(st.sampled_from(partners)))
        elif kind != "max_pool":
            stride = draw(st.sampled_from([1, 1, 2])) if height > 2 else 1
            out_size = (-(-height // stride), -(-width // stride))
            out_channels = channels if kind == "depthwise" else draw(st.sampled_from([4, 4, 6, 12]))
            groups = channels if kind == "depthwise" else 1
            size, kernel = (height, width), (3, 3) if kind == "depthwise" else (1, 1)
            layer, kind = len(layers), "convolution"
            layers.append(
                Convolution(
                    f"conv{layer}", channels, out_channels, kernel, (stride, stride), groups, size, size, out_size, True
                )
            )
            channels, (height, width) = out_channels, out_size
        name = f"conv{layer}" if layer is not None else f"{kind} {position}"
        operations.append(Operation(kind, name, inputs, len(tensors), layer))
        tensors.append((channels, height, width))
    unread = [t for t in range(1, len(tensors)) if not any(t in operation.inputs for operation in operations)]
    for count, tensor in enumerate(unread):
        features, mean = tensors[tensor][0], len(tensors)
        name, size = f"features{count}", (1, 1)
        operations.append(Operation("mean", f"mean {count}", (tensor,), mean))
        operations.append(Operation("convolution", name, (mean,), mean + 1, len(layers)))
        layers.append(Convolution(name, features, 5, size, size, 1, size, size, size, True))
        tensors += [(features, 1, 1), (5, 1, 1)]
        if count:
            operations.append(Operation("addition", f"sum {count}", (mean - 1, mean + 1), mean + 2))
            tensors.append((5, 1, 1))
    operations.append(Operation("linear", "classifier", (len(tensors) - 1,), len(tensors)))
    tensors.append((3,))
    return NetworkOperations(tuple(layers), tuple(operations), tuple(tensors), "classifier", 5, 3)


@st.composite
def schemes(draw, network: NetworkOperations, with_fixed_channels: bool = True) -> UpdateScheme:
    layers = network.convolutions
    depth = draw(st.integers(0, len(layers)))
    in_depth = layers[len(layers) - depth :]
    chosen = draw(st.lists(st.sampled_from(in_depth), unique=True, max_size=12)) if in_depth else []
    weights, channels = {}, {}
    for layer in chosen:
        count = draw(st.integers(1, layer.in_channels) | st.just(layer.in_channels))
        weights[layer.name] = count / layer.in_channels
        if with_fixed_channels and draw(st.booleans()):
            start, step = draw(st.integers(0, layer.in_channels - 1)), draw(st.sampled_from([1, 1, 5]))
            channels[layer.name] = sorted({(start + step * k) % layer.in_channels for k in range(count)})
    return UpdateScheme("network", depth, weights, channels)


@pytest.mark.parametrize("name", NETWORKS)
def test_peak_is_the_high_water_mark_of_a_simulated_step(name):
    network = NETWORKS[name]

    @settings(max_examples=60 if len(network.convolutions) > 20 else 150, deadline=None)
    @given(schemes(network), OPTIONS)
    def check(scheme, options):
        assert PeakMemory(network, **options).peak_bytes(scheme) == TrainingStep(network, scheme, **options).run()

    check()


@settings(max_examples=300, deadline=None)
@given(st.data(), OPTIONS)
def test_peak_of_random_graphs_is_the_high_water_mark(data, options):
    network = data.draw(graphs())
    scheme = data.draw(schemes(network))
    assert PeakMemory(network, **options).peak_bytes(scheme) == TrainingStep(network, scheme, **options).run()


@pytest.mark.parametrize("name", NETWORKS)
def test_peak_of_the_extreme_schemes(name):
    network = NETWORKS[name]
    count = len(network.convolutions)
    everything = {layer.name: 1.0 for layer in network.convolutions}
    for scheme in (
        UpdateScheme("nothing but the classifier", 0),
        UpdateScheme("the last bias", 1),
        UpdateScheme("all biases", count),
        UpdateScheme("everything", count, everything),
    ):
        for in_place in (True, False):
            expected = TrainingStep(network, scheme, depthwise_in_place=in_place).run()
            assert PeakMemory(network, depthwise_in_place=in_place).peak_bytes(scheme) == expected, scheme.network


@pytest.mark.parametrize("name", NETWORKS)
def test_many_schemes_at_once_give_the_same_peaks(name):
    network = NETWORKS[name]

    @settings(max_examples=15, deadline=None)
    @given(st.lists(schemes(network, with_fixed_channels=False), min_size=1, max_size=8), OPTIONS)
    def check(many, options):
        peak_memory = PeakMemory(network, **options)
        depths = np.array([scheme.bias_depth for scheme in many])
        updated = np.array([[scheme.updated_channels(layer) for layer in network.convolutions] for scheme in many])
        peaks = peak_memory.peaks_bytes(depths, updated)
        assert peaks.tolist() == [peak_memory.peak_bytes(scheme) for scheme in many]

    check()


@pytest.mark.parametrize("name", ["resnet18", "tangled"])
def test_channels_that_two_layers_share_are_kept_once(name):
    network = NETWORKS[name]
    readers = [operation for operation in network.operations if operation.kind == "convolution"]
    tensor = next(r.inputs[0] for r in reversed(readers) if sum(o.inputs == r.inputs for o in readers) > 1)
    pair = [network.convolutions[o.layer].name for o in readers if o.inputs == (tensor,)][:2]
    weights = dict.fromkeys(pair, 0.25)
    depth = len(network.convolutions)
    for first, second in (([0, 1], [0, 1]), ([0, 1], [1, 2]), ([0, 1], [2, 3])):
        scheme = UpdateScheme(name, depth, weights, {pair[0]: first, pair[1]: second})
        assert PeakMemory(network).peak_bytes(scheme) == TrainingStep(network, scheme).run()
