"""Promises of the operations: found by running the network, whatever it is made of, and what cannot be is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnext50_32x4d

from microtune.modules.networks.operations import evaluation_mode, find_operations
from microtune.modules.user_error import UserError


def convolutions_as_called(network, shape):
    """Name, input size and output size of every convolution in the order of the calls, by hooks."""
    calls = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, x, y, name=name: calls.append((name, tuple(x[0].shape[2:]), tuple(y.shape[2:])))
            )
    network.eval()(torch.zeros(1, *shape))
    return calls


@pytest.mark.parametrize("build", [resnet18, resnext50_32x4d])
def test_convolutions_are_in_the_order_of_the_calls(build):
    network = build(num_classes=7)
    operations = find_operations(network, (3, 64, 48))
    found = [(c.name, c.padded_size, c.out_size) for c in operations.convolutions]
    assert found == convolutions_as_called(network, (3, 64, 48))
    for convolution in operations.convolutions:
        module = network.get_submodule(convolution.name)
        for field in ("in_channels", "out_channels", "kernel_size", "stride", "groups"):
            assert getattr(convolution, field) == getattr(module, field)
        assert convolution.has_bias  # that of the batch norm behind it
    assert operations.classifier_name == "fc"
    assert (operations.classifier_features, operations.classifier_classes) == (network.fc.in_features, 7)


def test_downsampling_of_resnet_comes_after_the_convolutions_beside_it():
    names = [c.name for c in find_operations(resnet18(), (3, 64, 64)).convolutions]
    assert len(names) == 20
    assert names[4:9] == [
        "layer1.1.conv2",
        "layer2.0.conv1",
        "layer2.0.conv2",
        "layer2.0.downsample.0",
        "layer2.1.conv1",
    ]


def test_kinds_of_resnet18():
    operations = find_operations(resnet18(), (3, 64, 64)).operations
    kinds = [operation.kind for operation in operations]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "convolution": 20,
        "addition": 8,
        "max_pool": 1,
        "mean": 1,
        "linear": 1,
    }
    assert kinds[:4] == ["convolution", "max_pool", "convolution", "convolution"]


class Residual(nn.Module):
    """A network whose tensors can be listed by hand."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 8, 1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = nn.Conv2d(8, 4, 1)
        self.relu = nn.ReLU6(inplace=True)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.stem(x))
        y = self.project(self.relu(self.depthwise(self.relu(self.grouped(x)))))
        return self.classifier((x + y).mean((2, 3)))


def test_operations_of_a_network_listed_by_hand():
    found = find_operations(Residual(), (3, 8, 6))
    assert found.tensors == ((3, 8, 6), (4, 4, 3), (8, 4, 3), (8, 4, 3), (4, 4, 3), (4, 4, 3), (4,), (2,))
    assert [(o.kind, o.name, o.inputs, o.output, o.layer, o.activation) for o in found.operations] == [
        ("convolution", "stem", (0,), 1, 0, "hardtanh"),
        ("convolution", "grouped", (1,), 2, 1, "hardtanh"),
        ("convolution", "depthwise", (2,), 3, 2, "hardtanh"),
        ("convolution", "project", (3,), 4, 3, None),
        ("addition", "add 0", (1, 4), 5, None, None),
        ("mean", "mean 0", (5,), 6, None, None),
        ("linear", "classifier", (6,), 7, None, None),
    ]
    assert [c.is_depthwise for c in found.convolutions] == [False, False, True, False]
    assert [c.weight_elements_per_channel for c in found.convolutions] == [4 * 9, 4, 9, 4]
    assert [c.out_elements for c in found.convolutions] == [48, 96, 96, 48]


def test_modes_gradients_and_weights_are_as_before():
    network = resnet18()
    network.layer2.eval()
    network.layer3[0].bn1.eval()
    modes = [module.training for module in network.modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    find_operations(network, (3, 32, 32))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_modes_and_hooks_are_as_before_when_the_network_does_not_run():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(), nn.Flatten(), nn.Linear(5, 2))
    network[1].eval()
    with pytest.raises(UserError, match=r"the network does not run on an input of shape \(1, 3, 2, 2\): mat1 and mat2"):
        find_operations(network, (3, 2, 2))
    assert [module.training for module in network] == [True, False, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_evaluation_mode_restores_each_module():
    network = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with evaluation_mode(network):
        assert not any(module.training for module in network.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in network.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


class Calls(nn.Module):
    """A network whose middle is given."""

    def __init__(self, middle):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 4, 1)
        self.other = nn.Conv2d(4, 4, 1)
        self.middle = middle
        self.classifier = nn.Linear(4, 2)

    def forward(self, x):
        return self.classifier(self.middle(self, self.stem(x)).mean((2, 3)))


def shared_weight(network, x):
    network.other.weight = network.conv.weight
    return network.other(network.conv(x))


TWICE = "is shared or called twice: an update scheme needs one call per layer"


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (lambda n, x: n.conv(n.conv(x)), f"convolution conv {TWICE}"),
        (lambda n, x: n.conv(x) + n.conv(x), f"convolution conv {TWICE}"),
        (shared_weight, f"convolution other {TWICE}"),
        (lambda n, x: F.conv2d(x, n.conv.weight), "calls a convolution that is no nn.Conv2d module: make it one"),
        (lambda n, x: nn.ConvTranspose2d(4, 4, 1)(x), "calls a convolution that is no nn.Conv2d module"),
    ],
)
def test_convolutions_that_cannot_be_told_apart_are_refused(middle, message):
    with pytest.raises(UserError, match=message):
        find_operations(Calls(middle), (3, 4, 4))


def test_shared_module_is_refused():
    convolution = nn.Conv2d(3, 3, 1)
    network = nn.Sequential(convolution, nn.ReLU(), convolution, nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(UserError, match=f"convolution 0 {TWICE}"):
        find_operations(network, (3, 1, 1))


def test_network_without_classifier_is_refused():
    with pytest.raises(UserError, match=r"the network has no nn.Linear: its last one is the classifier"):
        find_operations(nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, 4, 4))


def test_unused_convolutions_are_not_counted():
    network = Calls(lambda n, x: n.conv(x))
    assert [c.name for c in find_operations(network, (3, 4, 4)).convolutions] == ["stem", "conv"]


class ReadsTwice(nn.Module):
    """Reads a convolution's output before its activation, and after it."""

    def __init__(self, first):
        super().__init__()
        self.convolution, self.classifier, self.first = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), first

    def forward(self, x):
        z = self.convolution(x)
        y = z + 1 if self.first else F.relu(z)
        y = y + F.relu(z) if self.first else y + z
        return self.classifier(y.mean((2, 3)))


@pytest.mark.parametrize("first", [True, False])
def test_a_value_read_before_and_after_its_activation_is_refused(first):
    with pytest.raises(UserError, match="the output of convolution is read before its activation by something else"):
        find_operations(ReadsTwice(first), (3, 8, 8))


def test_bias_and_module_of_the_activation_are_noted():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Hardtanh(0, 6), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    operations = find_operations(network, (3, 8, 8))
    assert [convolution.has_bias for convolution in operations.convolutions] == [False, True]
    activations = [(operation.activation, operation.activation_is_module) for operation in operations.operations[:2]]
    assert activations == [("relu", True), ("hardtanh", False)]
