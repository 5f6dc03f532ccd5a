"""Promises of folding: equal outputs, the same names, and no wrong fold in silence."""

import pytest
import torch
from torch import nn
from torchvision.models import densenet121, resnet18, resnext50_32x4d

from microtune.modules.networks.batch_norm_folding import find_batch_norm, fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.networks.pretrained_weights import load_weights
from microtune.modules.user_error import UserError


def warm(network, input_shape):
    """A fresh network's activations vanish in eval mode, so that everything would equal everything."""
    torch.manual_seed(0)
    network.train()
    with torch.no_grad():
        network(torch.randn(8, *input_shape))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return network


def assert_equal_outputs(network, folded, input_shape):
    images = torch.randn(4, *input_shape)
    with torch.no_grad():
        expected, outputs = network.eval()(images), folded.eval()(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def convolutions(network, input_shape):
    return [(c.name, c.in_size, c.out_size) for c in find_operations(network, input_shape).convolutions]


@pytest.mark.parametrize(
    ("build", "input_shape"),
    [
        (lambda: mobilenet_v2(0.35, 10), (3, 64, 64)),
        (lambda: mobilenet_v2(0.35, 10, 1, True, "keras"), (1, 49, 65)),
        (lambda: resnet18(num_classes=10), (3, 64, 64)),
        (lambda: resnext50_32x4d(num_classes=10), (3, 64, 64)),
    ],
    ids=["mobilenet_v2", "mobilenet_v2 of keras", "resnet18", "resnext50"],
)
def test_a_folded_network_gives_the_same_outputs(build, input_shape):
    network = warm(build(), input_shape)
    folded = fold_batch_norm(network, input_shape)
    assert find_batch_norm(network) is not None
    assert find_batch_norm(folded) is None
    assert convolutions(folded, input_shape) == convolutions(network, input_shape)
    assert all(module.bias is not None for module in folded.modules() if isinstance(module, nn.Conv2d))
    assert_equal_outputs(network, folded, input_shape)


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("mobilenet_v2-b0353104.pth", {"head_convolution": True}),
        ("mobilenet_v2_w035_keras_imagenet_notop.npz", {"width": 0.35, "padding": "keras"}),
    ],
)
def test_networks_with_real_weights_give_the_same_outputs(shared_data, file, arguments):
    network = mobilenet_v2(**arguments)
    load_weights(network, shared_data / "weights" / file)
    assert_equal_outputs(network, fold_batch_norm(network, (3, 96, 96)), (3, 96, 96))


def test_the_network_itself_is_left_alone():
    network = mobilenet_v2(0.35, 10).eval()
    network.features[3].train()
    modes = [module.training for module in network.modules()]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold_batch_norm(network, (3, 32, 32))
    assert [module.training for module in network.modules()] == modes
    assert [module.training for module in folded.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in (network, folded) for m in n.modules())


def test_every_parameter_of_a_folded_network_requires_a_gradient():
    network = mobilenet_v2(0.35, 10).requires_grad_(False)
    folded = fold_batch_norm(network, (3, 32, 32))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in folded.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_folded_checkpoint_loads_into_a_folded_fresh_network():
    folded, fresh = (fold_batch_norm(mobilenet_v2(0.35, 10), (3, 32, 32)) for _ in range(2))
    fresh.load_state_dict(folded.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(fresh.eval()(images), folded.eval()(images))


def test_a_network_without_batch_norm_is_copied():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).requires_grad_(False)
    copied = fold_batch_norm(network, (3, 8, 8))
    assert copied is not network
    assert copied.state_dict().keys() == network.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in copied.parameters())


def test_a_convolution_with_a_bias_and_batch_norm_without_parameters():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(True))
    network(torch.randn(8, 3, 8, 8))
    assert_equal_outputs(network, fold_batch_norm(network, (3, 8, 8)), (3, 8, 8))


class Wired(nn.Module):
    """Two convolutions and two batch norms, called as a test says."""

    def __init__(self, wiring):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.other_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self, x)


def shared_module(network):
    network.second = network.first
    return network


def shared_weight(network):
    network.second.weight = network.first.weight
    return network


def both(network, x):
    return network.other_norm(network.second(network.norm(network.first(x))))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (shared_module(Wired(both)), "second is shared with first: give each its own module and weight"),
        (shared_weight(Wired(both)), "second is shared with first"),
        (Wired(lambda n, x: n.norm(n.first(n.first(x)))), "first is called 2 times: give each call its own module"),
        (Wired(lambda n, x: n.norm(n.second(n.norm(n.first(x))))), "norm is called 2 times"),
        (Wired(lambda n, x: n.other_norm(n.first(n.norm(x)))), "batch norm norm follows no convolution: put it right"),
        (Wired(lambda n, x: n.norm(n.first(x))), "batch norm other_norm follows no convolution"),
        (Wired(lambda n, x: n.norm(n.first(x).relu())), "batch norm norm follows no convolution"),
        (Wired(lambda n, x: n.norm(n.first(x).relu_())), "batch norm norm follows no convolution"),
        (
            Wired(lambda n, x: (y := n.first(x), n.other_norm(n.second(n.norm(y) + y)))[1]),
            "the output of convolution first is read by more than batch norm norm: folding would change what the other",
        ),
        (
            Wired(lambda n, x: (y := n.first(x), n.norm(y) + n.other_norm(y))[1]),
            "the output of convolution first is read by more than batch norm norm",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(network, message):
    with pytest.raises(UserError, match=message):
        fold_batch_norm(network, (4, 8, 8))


def test_batch_norm_without_running_statistics_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(
        UserError, match="batch norm 1 has no running statistics: build it with track_running_stats=True"
    ):
        fold_batch_norm(network, (3, 8, 8))


def test_batch_norm_before_convolutions_is_refused_in_densenet():
    with pytest.raises(UserError, match=r"batch norm features.denseblock1.denselayer1.norm1 follows no convolution"):
        fold_batch_norm(densenet121(), (3, 64, 64))


def test_a_shape_that_does_not_run_is_refused():
    with pytest.raises(UserError, match=r"does not run on an input of shape \(1, 4, 32, 32\): .*expected input"):
        fold_batch_norm(resnet18(), (4, 32, 32))
