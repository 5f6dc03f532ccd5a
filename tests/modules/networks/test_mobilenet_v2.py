"""Promises of the network: its layers, its names, Keras' padding."""

import csv

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torchvision.models import resnet18, resnext50_32x4d

from microtune.modules.networks.mobilenet_v2 import KerasPadding, MobileNetV2, mobilenet_v2, network_name
from microtune.modules.networks.operations import find_operations
from microtune.modules.user_error import UserError

KERAS_FILE = "weights/mobilenet_v2_w035_keras_imagenet_notop.npz"
TORCHVISION_FILE = "weights/mobilenet_v2-b0353104.pth"


def convolution_names(network):
    return [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]


def weighted_names(network):
    return [name for name, _ in network.named_parameters()]


@pytest.mark.parametrize(("head_convolution", "count", "features"), [(False, 51, 112), (True, 52, 1280)])
@pytest.mark.parametrize("padding", ["symmetric", "keras"])
def test_number_of_convolutions_and_classifier_inputs(head_convolution, count, features, padding):
    network = mobilenet_v2(0.35, 10, head_convolution=head_convolution, padding=padding)
    operations = find_operations(network, (3, 64, 64))
    assert len(operations.convolutions) == count
    assert (operations.classifier_name, operations.classifier_features) == ("classifier.1", features)
    assert operations.classifier_classes == 10


@pytest.mark.parametrize("head_convolution", [False, True])
def test_layers_have_the_same_names_with_either_padding(head_convolution):
    networks = [mobilenet_v2(0.35, 10, 3, head_convolution, padding) for padding in ("symmetric", "keras")]
    assert weighted_names(networks[0]) == weighted_names(networks[1])
    names = [[c.name for c in find_operations(network, (3, 64, 64)).convolutions] for network in networks]
    assert names[0] == names[1] == convolution_names(networks[1])
    assert names[0][0] == "features.0.0"
    assert "features.2.conv.1.0" in names[0]


@pytest.mark.parametrize("padding", ["symmetric", "keras"])
def test_shapes_are_those_of_the_published_network(shared_data, padding):
    with (shared_data.parent / "reference/mbv2-w0.35_layers.csv").open() as file:
        published = [{key: value for key, value in row.items() if key != "name"} for row in csv.DictReader(file)]
    layers = find_operations(mobilenet_v2(0.35, padding=padding), (3, 128, 128)).convolutions
    found = [
        (c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.groups, c.in_size[0], c.out_size[0])
        for c in layers
    ]
    assert found == [tuple(int(value) for key, value in row.items() if key != "index") for row in published]


@pytest.mark.parametrize("padding", ["symmetric", "keras"])
def test_one_input_channel(padding):
    network = mobilenet_v2(0.35, 5, in_channels=1, padding=padding)
    assert network(torch.randn(2, 1, 40, 101)).shape == (2, 5)
    assert find_operations(network, (1, 40, 101)).convolutions[0].in_channels == 1


def test_dropout_stands_before_the_classifier():
    assert mobilenet_v2(0.35, dropout=0.2).classifier[0].p == 0.2
    assert mobilenet_v2(0.35).classifier[0].p == 0.0


def test_epsilon_of_batch_norm_is_that_of_the_weights():
    for padding, epsilon in (("keras", 1e-3), ("symmetric", 1e-5)):
        norms = [m for m in mobilenet_v2(0.35, padding=padding).modules() if isinstance(m, nn.BatchNorm2d)]
        assert {norm.eps for norm in norms} == {epsilon}


@pytest.mark.parametrize(("network", "count"), [(resnet18, 20), (resnext50_32x4d, 53)])
def test_find_operations_reads_residual_and_grouped_networks(network, count):
    operations = find_operations(network(), (3, 64, 64))
    assert len(operations.convolutions) == count
    assert operations.convolutions[0].out_size == (32, 32)
    assert sum(operation.kind == "addition" for operation in operations.operations) == (8 if count == 20 else 16)
    grouped = {c.groups for c in operations.convolutions}
    assert grouped == ({1} if count == 20 else {1, 32})
    assert not any(c.is_depthwise for c in operations.convolutions)


def keras_same_convolution(images, weight, groups):
    """TensorFlow's padding "same" as documented, for stride 2 and kernel 3, one output pixel at a time."""
    height, width = images.shape[-2:]
    out_height, out_width = -(-height // 2), -(-width // 2)
    top = max((out_height - 1) * 2 + 3 - height, 0) // 2
    left = max((out_width - 1) * 2 + 3 - width, 0) // 2
    framed = functional.pad(images, (left, 3, top, 3))
    columns = []
    for row in range(out_height):
        for column in range(out_width):
            patch = framed[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            columns.append(functional.conv2d(patch, weight, groups=groups).flatten(1))
    return torch.stack(columns, -1).unflatten(-1, (out_height, out_width))


@pytest.mark.parametrize("size", [(12, 12), (11, 11), (12, 9), (7, 10), (1, 2)])
@pytest.mark.parametrize("name", ["features.0", "features.2.conv.1"])
def test_convolutions_of_stride_2_pad_as_keras_does(size, name):
    padded = mobilenet_v2(0.35, padding="keras").get_submodule(name)
    convolution = padded.get_submodule("0")
    images = torch.randn(2, convolution.in_channels, *size)
    expected = keras_same_convolution(images, convolution.weight, convolution.groups)
    torch.testing.assert_close(convolution(padded.pad(images)), expected, rtol=1e-4, atol=1e-5)


def test_every_convolution_of_stride_2_has_keras_padding_and_no_other():
    network = mobilenet_v2(0.35, padding="keras")
    strided = [name.rpartition(".")[0] for name, m in network.named_modules() if getattr(m, "stride", 1) == (2, 2)]
    padded = [name.removesuffix(".pad") for name, m in network.named_modules() if isinstance(m, KerasPadding)]
    assert padded == strided
    assert len(padded) == 5


def test_names_of_networks():
    assert network_name(0.35, False) == "mobilenet_v2-w0.35"
    assert network_name(1, True) == "mobilenet_v2-w1.0-head"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 35}, r"width 35 is not in \(0, 4\]: give a multiplier such as 0.35"),
        ({"width": float("nan")}, r"width nan is not in \(0, 4\]"),
        ({"num_classes": 0}, "num_classes 0 is not positive: give the data set's"),
        ({"in_channels": 0}, "in_channels 0 is not positive: give 3 for colour"),
        ({"padding": "same"}, "padding 'same' is unknown: give 'symmetric' or 'keras'"),
        ({"dropout": 1.0}, r"dropout 1.0 is not in \[0, 1\): give a probability"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        mobilenet_v2(**arguments)


@pytest.mark.parametrize("width", [0.1, 0.35, 0.9, 1.0, 1.4])
def test_network_is_torchvisions_to_the_bit(width):
    """Names, order, fresh weights and outputs; so its weights and ours are the same."""
    networks = []
    for make in (
        torchvision.models.MobileNetV2,
        lambda *arguments: MobileNetV2(*arguments, norm_eps=1e-5, dropout=0.2),
    ):
        torch.manual_seed(3)
        networks.append(make(17, width))
        networks[-1].drawn = torch.rand(1)
    theirs, ours = (network.state_dict() for network in networks)
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert networks[0].drawn == networks[1].drawn
    images = torch.randn(2, 3, 64, 64)
    outputs = [network.eval()(images) for network in networks]
    assert torch.equal(*outputs)
