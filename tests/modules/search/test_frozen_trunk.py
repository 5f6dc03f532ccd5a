"""A network cut in two computes what it did before, bit for bit, and keeps the names of its layers."""

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.search.frozen_trunk import cut_network, features_of
from microtune.modules.sparse_update.channel_choice import choose_channels
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

SHAPE = (3, 32, 32)


def warmed(padding="symmetric", head_convolution=False):
    """A folded network whose batch norm has the statistics of one batch, so that no layer's output is nearly zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = mobilenet_v2(0.35, num_classes=10, head_convolution=head_convolution, padding=padding)
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        network.train()(torch.randn(16, *SHAPE))
    return fold_batch_norm(network.eval(), SHAPE).eval().to(memory_format=torch.channels_last)


NETWORKS = {
    "symmetric": warmed(),
    "keras": warmed("keras"),
    "head": warmed(head_convolution=True),
}
OPERATIONS = {name: find_operations(network, SHAPE) for name, network in NETWORKS.items()}
each_network = pytest.mark.parametrize("name", NETWORKS)


def cut(name, bias_depth):
    return cut_network(NETWORKS[name], OPERATIONS[name], bias_depth)


@each_network
@given(data=st.data(), samples=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_two_parts_compute_what_the_network_does(name, data, samples, seed):
    convolutions = OPERATIONS[name].convolutions
    trunk, rest = cut(name, data.draw(st.integers(0, len(convolutions))))
    x = torch.randn(samples, *SHAPE, generator=torch.Generator().manual_seed(seed))
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(rest(trunk(x)), NETWORKS[name](x))


@each_network
def test_rest_has_the_last_convolutions_and_no_block_more(name):
    convolutions = OPERATIONS[name].convolutions
    names = [convolution.name for convolution in convolutions]
    for bias_depth in range(1, len(convolutions) + 1, 1 if name == "head" else 7):  # which has all that the others have
        trunk, rest = cut(name, bias_depth)
        shape = tuple(features_of(trunk, torch.zeros(1, *SHAPE)).shape[1:])
        found = find_operations(rest, shape).convolutions
        # the shapes too: only where training begins in the middle of a block does the rest have more layers
        assert found == convolutions[len(convolutions) - len(found) :]
        block = names[-bias_depth].split(".")[1]
        assert found[0].name == next(name for name in names if name.split(".")[1] == block)
        assert set(rest.state_dict()) | {f"features.{key}" for key in trunk.state_dict()} == set(
            NETWORKS[name].state_dict()
        )


@each_network
def test_bias_depth_0_leaves_the_classifier(name):
    trunk, rest = cut(name, 0)
    assert sorted(rest.state_dict()) == ["classifier.1.bias", "classifier.1.weight"]
    features = features_of(trunk, torch.randn(2, *SHAPE))
    found = find_operations(rest, tuple(features.shape[1:]))
    assert found.convolutions == ()
    assert found.classifier_name == OPERATIONS[name].classifier_name


@each_network
def test_whole_depth_leaves_an_empty_trunk(name):
    trunk, rest = cut(name, len(OPERATIONS[name].convolutions))
    assert list(trunk.parameters()) == []
    assert rest.state_dict().keys() == NETWORKS[name].state_dict().keys()


def test_trunk_is_frozen_and_the_rest_as_it_was():
    network = copy.deepcopy(NETWORKS["symmetric"]).train()
    trunk, rest = cut_network(network, OPERATIONS["symmetric"], 10)
    assert not trunk.training
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    assert rest.training
    assert all(parameter.requires_grad for parameter in rest.parameters())


def test_the_network_stays_as_it_was():
    network = copy.deepcopy(NETWORKS["symmetric"])
    before = copy.deepcopy(network.state_dict())
    trunk, rest = cut_network(network, OPERATIONS["symmetric"], 10)
    with torch.no_grad():
        for parameter in (*trunk.parameters(), *rest.parameters()):
            parameter.zero_()
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_same_scheme_has_the_same_gradients():
    """What a scheme trains of the rest has, to the bit, the gradient that it has in the whole network."""
    network, operations = NETWORKS["keras"], OPERATIONS["keras"]
    names = [convolution.name for convolution in operations.convolutions]
    scheme = UpdateScheme("any", 11, {names[-11]: 0.5, names[-9]: 1.0, names[-2]: 0.25})
    trunk, rest = cut_network(network, operations, 11)
    x = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.arange(16) % 10
    gradients = []
    for part, sample in ((copy.deepcopy(network), x), (rest, features_of(trunk, x))):
        shape = tuple(sample.shape[1:])
        part.to(memory_format=torch.channels_last)
        found = find_operations(part, shape)
        AppliedScheme(part, scheme, found, choose_channels(part, scheme, found.convolutions))
        torch.nn.functional.cross_entropy(part.train()(sample), labels).backward()
        gradients.append({key: value.grad for key, value in part.named_parameters() if value.requires_grad})
    whole, behind = gradients
    assert whole.keys() == behind.keys()
    assert all(torch.equal(whole[key], behind[key]) for key in whole)
    assert sum(value.abs().sum().item() for value in whole.values()) > 0.1


def test_features_have_no_graph():
    trunk, _ = cut("symmetric", 20)
    assert not features_of(trunk, torch.randn(4, *SHAPE, requires_grad=True)).requires_grad


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("bias_depth", [20, 51])
def test_features_are_channels_last(bias_depth, in_channels):
    """Samples of one channel are in both orders at once: those of a spectrogram say that they are in the other."""
    network = fold_batch_norm(mobilenet_v2(0.35, num_classes=10, in_channels=in_channels), (in_channels, 32, 32))
    trunk, _ = cut_network(network, find_operations(network, (in_channels, 32, 32)), bias_depth)
    features = features_of(trunk, torch.randn(4, in_channels, 32, 32))
    assert features.is_contiguous(memory_format=torch.channels_last)


def test_another_network_is_refused():
    network = torchvision.models.resnet18(num_classes=10)
    with pytest.raises(UserError, match="a ResNet cannot be cut in two: give a MobileNetV2"):
        cut_network(network, find_operations(network, SHAPE), 3)


@pytest.mark.parametrize("bias_depth", [-1, 52])
def test_bias_depth_refused(bias_depth):
    with pytest.raises(UserError, match=f"bias depth {bias_depth} is out of its range: give 0 to 51"):
        cut("symmetric", bias_depth)
