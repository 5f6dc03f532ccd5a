"""What PyTorch keeps for backward, as measured, is what the autograd account says: to the byte."""

import copy
import functools

import pytest
import torch
import torchvision
from torch import nn

from microtune.modules.memory.saved_for_backward import measure_saved_bytes
from microtune.modules.memory.training_memory import autograd_bytes_per_sample
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.channel_choice import choose_channels
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.update_scheme import UpdateScheme


class GroupedNetwork(nn.Module):
    """Grouped, strided and dilated convolutions with ReLU and ReLU6, and an addition."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6(inplace=True))
        self.grouped = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.ReLU())
        self.pointwise = nn.Conv2d(16, 8, 1, bias=False)
        self.depthwise = nn.Sequential(nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=8), nn.ReLU6())
        self.last = nn.Conv2d(16, 12, 3, stride=2, groups=2)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.pointwise(self.grouped(x))
        return self.classifier(self.last(self.depthwise(x)).mean((2, 3)))


NETWORKS = {
    "mobilenet_v2": (functools.partial(mobilenet_v2, 0.35, num_classes=10), (3, 48, 48)),
    "mobilenet_v2 of Keras": (functools.partial(mobilenet_v2, 0.35, num_classes=10, padding="keras"), (3, 48, 48)),
    "resnet18": (functools.partial(torchvision.models.resnet18, num_classes=10), (3, 40, 40)),
    "grouped": (GroupedNetwork, (3, 20, 20)),
}
# how many of the last layers have their bias updated, and which of these a part of their weight, by ratio
SCHEMES = {
    "classifier": lambda depth: (0, {}),
    "last bias": lambda depth: (1, {}),
    "half of the biases": lambda depth: (depth // 2, {}),
    "all biases": lambda depth: (depth, {}),
    "last layer, whole": lambda depth: (1, {1: 1.0}),
    "last layer, half": lambda depth: (1, {1: 0.5}),
    "every other layer, half": lambda depth: (depth, dict.fromkeys(range(1, depth + 1, 2), 0.5)),
    "some layers, mixed": lambda depth: (depth - 1, {1: 1.0, 2: 0.5, 3: 0.25, depth - 1: 0.5}),
    "neighbours, whole": lambda depth: (3, {1: 1.0, 2: 1.0, 3: 1.0}),
    "everything": lambda depth: (depth, dict.fromkeys(range(1, depth + 1), 1.0)),
}


@functools.cache
def described(name):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = fold_batch_norm(build(), shape)
    return network, find_operations(network, shape), shape


def scheme_of(name, label):
    convolutions = described(name)[1].convolutions
    bias_depth, ratios = SCHEMES[label](len(convolutions))
    weights = {
        convolutions[-depth].name: max(ratio, 1 / convolutions[-depth].in_channels) for depth, ratio in ratios.items()
    }
    return UpdateScheme(name, bias_depth, weights)


def measured_per_sample(name, scheme, batch_size):
    network, operations, shape = described(name)
    trained = copy.deepcopy(network).train()
    AppliedScheme(trained, scheme, operations, choose_channels(trained, scheme, operations.convolutions))
    saved_bytes = measure_saved_bytes(trained, torch.randn(batch_size, *shape))
    assert saved_bytes % batch_size == 0
    return saved_bytes // batch_size


def test_ten_schemes():
    assert len(SCHEMES) == 10


@pytest.mark.parametrize("label", SCHEMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_measured_bytes_equal_the_account(name, label):
    operations, scheme = described(name)[1], scheme_of(name, label)
    account = autograd_bytes_per_sample(operations, scheme)
    assert [measured_per_sample(name, scheme, batch_size) for batch_size in (1, 3)] == [account, account]
    assert account > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_account_distinguishes_the_schemes(name):
    """So that the equality above is not one of constants."""
    accounts = {autograd_bytes_per_sample(described(name)[1], scheme_of(name, label)) for label in SCHEMES}
    assert len(accounts) >= 7


def test_hand_worked_layer():
    """A convolution keeps its input, ReLU its output, and the linear layer its input."""
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    samples = torch.randn(4, 2, 4, 4)
    convolution_input, relu_output_and_linear_input = 4 * 2 * 16 * 4, 4 * 48 * 4
    assert measure_saved_bytes(network, samples) == convolution_input + relu_output_and_linear_input


def test_parameters_are_not_counted():
    network = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    assert measure_saved_bytes(network, torch.randn(5, 6)) == 2 * 5 * 6 * 4  # the two inputs


def test_storage_is_counted_once_and_whole():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x):
            half = x[:, :4]
            return self.one(half) + self.other(half)

    assert measure_saved_bytes(Twice(), torch.randn(3, 8)) == 3 * 8 * 4


def test_nothing_is_saved_where_nothing_is_trained():
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU()).requires_grad_(False)
    assert measure_saved_bytes(network, torch.randn(1, 2, 4, 4)) == 0


def test_surrounding_no_grad_makes_no_difference():
    network = nn.Linear(6, 6)
    with torch.no_grad():
        assert measure_saved_bytes(network, torch.randn(5, 6)) == 5 * 6 * 4


class FunctionalNetwork(nn.Module):
    """Activations as functions, which store floats, and convolutions without a bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.second = nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(8, 8, 1, bias=False)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        x = nn.functional.relu(self.first(x))
        x = nn.functional.relu6(self.second(x))
        return self.classifier(torch.sigmoid(self.third(x)).mean((2, 3)))


@pytest.mark.parametrize("bias_depth", [0, 1, 2, 3])
@pytest.mark.parametrize("ratios", [{}, {"third": 0.5}, {"third": 1.0, "second": 0.25}, {"first": 1.0, "second": 1.0}])
def test_functions_and_missing_biases_are_in_the_account(bias_depth, ratios):
    network, samples = FunctionalNetwork(), torch.randn(2, 3, 10, 10)
    operations = find_operations(network, (3, 10, 10))
    names = [convolution.name for convolution in operations.convolutions]
    within = names[len(names) - bias_depth :]
    scheme = UpdateScheme("", bias_depth, {name: ratio for name, ratio in ratios.items() if name in within})
    AppliedScheme(network, scheme, operations, choose_channels(network, scheme, operations.convolutions))
    assert measure_saved_bytes(network, samples) == 2 * autograd_bytes_per_sample(operations, scheme)
