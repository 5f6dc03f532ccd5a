"""Promises of a scheme in a network: what it moves, what it leaves bit-equal, and what it stores for backward."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.channel_choice import choose_channels
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.subtensor import MaskedReLU, SubTensorConv2d, by_input_channel
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

SHAPE = (3, 8, 8)
CHANNELS = {"stem.0": 3, "expand.0": 8, "depthwise.0": 16, "project": 16, "head.0": 8}  # input channels, forward order
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def _same_weights_in_every_run():
    torch.manual_seed(0)


class BlockNet(nn.Module):
    """An inverted residual block between two ordinary convolutions, the second one grouped."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6(inplace=True))
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(inplace=True))
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2), nn.ReLU())
        self.classifier = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.classifier(self.head(x).mean((2, 3)))


def apply(network, scheme, method="sub_tensor"):
    operations = find_operations(network, SHAPE)
    return AppliedScheme(network, scheme, operations, choose_channels(network, scheme, operations.convolutions), method)


def train(network, applied, optimizer, steps=20):
    """A function of the network and the optimizer alone."""
    optimizer = OPTIMIZERS[optimizer](network.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = torch.randn(4, *SHAPE, generator=generator), torch.randint(4, (4,), generator=generator)
        first = next(network.parameters())
        x, y = x.to(first), y.to(first.device)
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        applied.restore_frozen()
    return optimizer


def updated_entries(state, scheme, channels):
    """Which entries of which tensor the scheme updates, worked out from its words."""
    updated = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in state.items()}
    updated["classifier.weight"][:] = updated["classifier.bias"][:] = True
    for name in list(CHANNELS)[len(CHANNELS) - scheme.bias_depth :]:
        updated[f"{name}.bias"][:] = True
    for name, indexes in channels.items():
        groups = {"depthwise.0": 16, "head.0": 2}.get(name, 1)
        outputs = len(state[f"{name}.weight"]) // groups
        for channel in indexes:
            group, position = divmod(channel, CHANNELS[name] // groups)
            updated[f"{name}.weight"][group * outputs : (group + 1) * outputs, position] = True
    return updated


@st.composite
def schemes(draw):
    bias_depth = draw(st.integers(0, 5))
    weights, channels = {}, {}
    for name in list(CHANNELS)[5 - bias_depth :]:
        count = draw(st.none() | st.integers(1, CHANNELS[name]))
        if count is not None:
            weights[name] = count / CHANNELS[name]
            if draw(st.booleans()):
                indexes = st.permutations(range(CHANNELS[name])).map(lambda order, count=count: order[:count])
                channels[name] = draw(indexes)
    return UpdateScheme("block", bias_depth, weights, channels)


@each_device
@settings(max_examples=40, deadline=None)
@given(schemes(), st.sampled_from(["sub_tensor", "mask"]), st.sampled_from(list(OPTIMIZERS)), st.integers(0, 99))
def test_frozen_entries_are_bit_equal_and_updated_ones_are_not(device, scheme, method, optimizer, seed):
    torch.manual_seed(seed)
    network = BlockNet()
    before = copy.deepcopy(network.state_dict())
    applied = apply(network, scheme, method)
    assert {name: len(indexes) for name, indexes in applied.channels.items()} == {
        name: round(ratio * CHANNELS[name]) for name, ratio in scheme.weights.items()
    }
    train(network.to(device), applied, optimizer)
    applied.remove()
    after = network.cpu().state_dict()
    assert list(after) == list(before)
    for name, updated in updated_entries(before, scheme, applied.channels).items():
        changed = after[name] != before[name]
        assert not changed[~updated].any(), name
        # 20 steps of weight decay move every entry, unless rounding keeps one where it is
        assert changed[updated].float().mean() > 0.9 or not updated.any(), name


@settings(max_examples=25, deadline=None)
@given(schemes(), st.sampled_from(list(OPTIMIZERS)), st.integers(0, 99))
def test_mask_and_sub_tensor_reach_the_same_weights(scheme, optimizer, seed):
    torch.manual_seed(seed)
    networks = [BlockNet().double()]
    networks.append(copy.deepcopy(networks[0]))
    states = []
    for network, method in zip(networks, ("mask", "sub_tensor"), strict=True):
        applied = apply(network, scheme, method)
        train(network, applied, optimizer, steps=5)
        applied.remove()
        states.append(network.state_dict())
    for name, expected in states[0].items():
        # AdamW divides by the root of the squared gradient, and so enlarges rounding errors of tiny gradients
        torch.testing.assert_close(states[1][name], expected, rtol=1e-6, atol=1e-7)


@each_device
def test_gradients_equal_those_of_the_plain_network(device):
    torch.manual_seed(0)
    network = BlockNet().double().to(device)
    plain = copy.deepcopy(network)
    x, y = torch.randn(4, *SHAPE, dtype=torch.float64).to(device), torch.tensor([0, 1, 2, 3]).to(device)
    F.cross_entropy(plain(x), y).backward()
    scheme = UpdateScheme("block", 5, dict.fromkeys(CHANNELS, 0.5))
    applied = apply(network, scheme)
    F.cross_entropy(network(x), y).backward()
    for name, channels in applied.channels.items():
        layer, full = network.get_submodule(name), plain.get_submodule(name)
        outputs, tolerance = full.out_channels // full.groups, 1e-10 * full.weight.grad.abs().max()
        assert tolerance > 0
        for row, channel in enumerate(channels):
            group, position = divmod(channel, full.weight.shape[1])
            expected = full.weight.grad[group * outputs : (group + 1) * outputs, position]
            assert (layer.weight_slice.grad[row] - expected).abs().max() <= tolerance
        assert (layer.bias.grad - full.bias.grad).abs().max() <= 1e-10 * full.bias.grad.abs().max()


def test_gradients_and_optimizer_state_have_the_size_of_the_slices():
    network = BlockNet()
    scheme = UpdateScheme("block", 4, {"expand.0": 0.25, "depthwise.0": 0.5, "project": 1.0, "head.0": 0.75})
    applied = apply(network, scheme)
    optimizer = train(network, applied, "adamw", steps=1)
    expected = {
        "expand.0.weight_slice": (2, 16, 1, 1),
        "expand.0.bias": (16,),
        "depthwise.0.weight_slice": (8, 1, 3, 3),
        "depthwise.0.bias": (16,),
        "project.weight": (8, 16, 1, 1),  # whole: an ordinary layer
        "project.bias": (8,),
        "head.0.weight_slice": (6, 6, 3, 3),
        "head.0.bias": (12,),
        "classifier.weight": (4, 12),
        "classifier.bias": (4,),
    }
    gradients = {name: tuple(p.grad.shape) for name, p in network.named_parameters() if p.grad is not None}
    assert gradients == expected
    state = {
        name: tuple(optimizer.state[p]["exp_avg"].shape)
        for name, p in network.named_parameters()
        if p in optimizer.state
    }
    assert state == expected
    assert {name for name, p in network.named_parameters() if p.requires_grad} == set(expected)


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_remove_leaves_the_plain_network(method):
    network = BlockNet()
    network.stem[0].bias.requires_grad_(False)
    modules = dict(network.named_modules())
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    applied = apply(network, UpdateScheme("block", 4, {"expand.0": 0.5, "project": 1.0, "head.0": 0.5}), method)
    assert {name: p.requires_grad for name, p in network.named_parameters()} != flags
    assert any(isinstance(m, SubTensorConv2d) for m in network.modules()) is (method == "sub_tensor")
    assert any(isinstance(m, MaskedReLU) for m in network.modules()) is (method == "sub_tensor")
    train(network, applied, "sgd", steps=2)
    trained = copy.deepcopy(network.state_dict())
    applied.remove()
    assert {name: id(m) for name, m in network.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags
    assert all(torch.equal(tensor, trained[name]) for name, tensor in network.state_dict().items())
    assert all(p.grad is None or p.grad.shape == p.shape for p in network.parameters())
    network.zero_grad()
    F.cross_entropy(network(torch.randn(4, *SHAPE)), torch.zeros(4, dtype=torch.long)).backward()
    # no mask is left: each input channel gets a gradient
    assert (network.expand[0].weight.grad != 0).any(0).all()


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_state_dict_in_training_is_that_of_the_plain_network(method):
    network = BlockNet()
    names = list(network.state_dict())
    scheme = UpdateScheme("block", 4, {"expand.0": 0.5, "head.0": 0.5})
    applied = apply(network, scheme, method)
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    F.cross_entropy(network(torch.randn(4, *SHAPE)), torch.zeros(4, dtype=torch.long)).backward()
    optimizer.step()  # and no forward pass after it
    applied.restore_frozen()
    state = copy.deepcopy(network.state_dict())
    assert list(state) == names
    plain = BlockNet()
    plain.load_state_dict(state, strict=True)
    applied.remove()
    x = torch.randn(2, *SHAPE)
    assert torch.equal(plain(x), network(x))


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_a_plain_state_dict_loads_into_the_applied_network(method):
    network, source = BlockNet(), BlockNet()
    scheme = UpdateScheme("block", 4, {"expand.0": 0.5, "depthwise.0": 0.5, "head.0": 0.5})
    applied = apply(network, scheme, method)
    train(network, applied, "sgd", steps=2)
    network.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(2, *SHAPE)
    assert torch.equal(network(x), source(x))
    train(network, applied, "sgd", steps=2)
    applied.remove()
    for name, updated in updated_entries(source.state_dict(), scheme, applied.channels).items():
        changed = network.state_dict()[name] != source.state_dict()[name]
        assert torch.equal(changed[~updated], torch.zeros_like(changed[~updated])), name
        assert not updated.any() or changed[updated].any()


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_other_channels_are_trained_after_set_channels(method):
    network = BlockNet()
    before = copy.deepcopy(network.state_dict())
    scheme = UpdateScheme("block", 4, {"expand.0": 0.25, "head.0": 0.25}, {"expand.0": [0, 1], "head.0": [0, 5]})
    applied = apply(network, scheme, method)
    other = {"expand.0": [2, 7], "head.0": [3, 4]}
    applied.set_channels(other)
    train(network, applied, "adamw", steps=2)
    applied.remove()
    for name, updated in updated_entries(before, scheme, other).items():
        changed = network.state_dict()[name] != before[name]
        assert not changed[~updated].any(), name
        assert not updated.any() or changed[updated].any(), name


def saved_bytes(network, x):
    """Bytes of the unique storages that autograd keeps for ``network(x)``, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(x)
    assert output.requires_grad
    return sum(storage.nbytes() for address, storage in saved.items() if address not in parameters)


CLASSIFIER = 12 * 4
HEAD_MASK = 12 * 2 * 2
DEPTHWISE_MASK = EXPAND_MASK = 16 * 4 * 4
STEM_MASK = 8 * 4 * 4
PLANE = 4 * 4 * 4  # bytes of one channel of a feature map within the block


@pytest.mark.parametrize(
    ("bias_depth", "weights", "expected"),
    [
        (0, {}, CLASSIFIER),
        (1, {}, CLASSIFIER + HEAD_MASK),
        (2, {}, CLASSIFIER + HEAD_MASK),  # the projection has no non-linearity
        (3, {}, CLASSIFIER + HEAD_MASK + DEPTHWISE_MASK),
        (4, {}, CLASSIFIER + HEAD_MASK + DEPTHWISE_MASK + EXPAND_MASK),
        (5, {}, CLASSIFIER + HEAD_MASK + DEPTHWISE_MASK + EXPAND_MASK + STEM_MASK),
        (1, {"head.0": 3 / 8}, CLASSIFIER + HEAD_MASK + 3 * PLANE),
        (1, {"head.0": 1.0}, CLASSIFIER + HEAD_MASK + 8 * PLANE),
        (3, {"depthwise.0": 3 / 16}, CLASSIFIER + HEAD_MASK + DEPTHWISE_MASK + 3 * PLANE),
        (
            4,
            {"expand.0": 1 / 8, "depthwise.0": 3 / 16, "project": 1.0, "head.0": 0.5},
            CLASSIFIER + HEAD_MASK + DEPTHWISE_MASK + EXPAND_MASK + (1 + 3 + 16 + 4) * PLANE,
        ),
        (5, {"stem.0": 1 / 3}, CLASSIFIER + HEAD_MASK + DEPTHWISE_MASK + EXPAND_MASK + STEM_MASK + 8 * 8 * 4),
    ],
)
def test_what_is_stored_for_backward_is_what_is_promised(bias_depth, weights, expected):
    network = BlockNet()
    apply(network, UpdateScheme("block", bias_depth, weights))
    assert saved_bytes(network, torch.randn(5, *SHAPE)) == 5 * expected


def test_layers_before_the_reach_build_no_graph():
    network = BlockNet()
    apply(network, UpdateScheme("block", 2))
    outputs = {}
    for name in ("stem", "expand", "depthwise", "project"):
        network.get_submodule(name).register_forward_hook(
            lambda _m, _x, y, name=name: outputs.update({name: y.requires_grad})
        )
    network(torch.randn(2, *SHAPE))
    assert outputs == {"stem": False, "expand": False, "depthwise": False, "project": True}


def test_autocast_stores_slices_in_bfloat16():
    network = BlockNet()
    apply(network, UpdateScheme("block", 4, {"expand.0": 1 / 8, "depthwise.0": 3 / 16, "head.0": 0.5}))
    masks = HEAD_MASK + DEPTHWISE_MASK + EXPAND_MASK
    with torch.autocast("cpu", torch.bfloat16):
        # the classifier's input and its weight are cast to bfloat16 too, and both are kept
        classifier = 5 * 12 * 2 + 4 * 12 * 2
        assert saved_bytes(network, torch.randn(5, *SHAPE)) == 5 * (masks + (1 + 3 + 4) * PLANE // 2) + classifier


class Aliased(nn.Module):
    """A network that calls its convolutions by other names than their first."""

    def __init__(self):
        super().__init__()
        self.convolution, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU()
        self.features = nn.Sequential(self.convolution, self.relu)
        self.same_features = self.features
        self.classifier = nn.Linear(4, 4)

    def forward(self, x):
        return self.classifier(self.same_features(x).mean((2, 3)))


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_a_layer_with_several_names_is_trained_by_each_of_them(method):
    network = Aliased()
    before = copy.deepcopy(network.state_dict())
    modules = {name: id(m) for name, m in network.named_modules(remove_duplicate=False)}
    applied = apply(network, UpdateScheme("aliased", 1, {"convolution": 0.34}, {"convolution": [1]}), method)
    assert network.same_features[0] is network.convolution
    train(network, applied, "sgd", steps=2)
    applied.remove()
    changed = network.convolution.weight != before["convolution.weight"]
    assert changed[:, 1].all()
    assert not changed[:, [0, 2]].any()
    assert list(network.state_dict()) == list(before)
    assert {name: id(m) for name, m in network.named_modules(remove_duplicate=False)} == modules


class StandardizedConvolution(nn.Conv2d):
    """A convolution that computes something else than ``nn.Conv2d``."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


@pytest.mark.parametrize(
    "convolution",
    [
        StandardizedConvolution(3, 4, 3),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 3, padding="same", bias=False),
    ],
    ids=["subclass", "circular", "same", "no_bias"],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_layers_without_a_sub_tensor_version_are_masked_and_exact(convolution, optimizer):
    network = nn.Sequential(
        copy.deepcopy(convolution), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    plain = copy.deepcopy(network)
    applied = apply(network, UpdateScheme("net", 1, {"0": 0.67}, {"0": [0, 2]}))
    assert applied.masked_layers == ["0"]
    x, y = torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 3])
    F.cross_entropy(network(x), y).backward()
    F.cross_entropy(plain(x), y).backward()
    torch.testing.assert_close(network[0].weight.grad[:, [0, 2]], plain[0].weight.grad[:, [0, 2]])
    train(network, applied, optimizer)
    applied.remove()
    changed = network[0].weight != plain[0].weight
    assert changed[:, [0, 2]].all()
    assert not changed[:, 1].any()


def test_a_convolution_without_bias_trains_its_channels_only():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU6(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 4))
    before = copy.deepcopy(network.state_dict())
    applied = apply(network, UpdateScheme("net", 1, {"0": 0.34}, {"0": [1]}))
    train(network, applied, "sgd")
    applied.remove()
    changed = network[0].weight != before["0.weight"]
    assert changed[:, 1].all()
    assert not changed[:, [0, 2]].any()


def test_batch_norm_is_refused_and_the_network_unchanged():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 4))
    operations = find_operations(network, SHAPE)
    with pytest.raises(UserError, match=r"1 is a BatchNorm2d: .* fold it first with .*fold_batch_norm"):
        AppliedScheme(network, UpdateScheme("net", 1), operations, {})
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_scheme_of_another_network_is_refused_and_the_network_unchanged():
    network = BlockNet()
    with pytest.raises(UserError, match=r"layer features\.0 is no convolution of the network"):
        AppliedScheme(network, UpdateScheme("net", 1, {"features.0": 1.0}), find_operations(network, SHAPE), {})
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(isinstance(module, MaskedReLU | SubTensorConv2d) for module in network.modules())


def test_a_copy_of_the_applied_network_computes_and_trains_alone():
    network = BlockNet()
    applied = apply(network, UpdateScheme("block", 4, {"expand.0": 0.5, "head.0": 0.5}))
    before = copy.deepcopy(network.state_dict())
    other = copy.deepcopy(network)
    x = torch.randn(2, *SHAPE)
    assert torch.equal(other(x), network(x))
    train(other, applied, "sgd", steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not torch.equal(other(x), network(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
        torch.nn.utils.parametrizations.weight_norm,
    ],
)
def test_a_weight_that_is_computed_is_refused(change):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    change(network[0])
    operations = find_operations(network, (3, 8, 8))
    with pytest.raises(UserError, match=r"the weight of 0 is computed from others \(pruning, weight norm\)"):
        AppliedScheme(network, UpdateScheme("", 1, {"0": 0.5}), operations, {"0": [1]})


MOVING = {"expand.0": 3, "depthwise.0": 5, "head.0": 4}  # layers and how many channels of each


@st.composite
def moves(draw):
    """Channels of the layers of ``MOVING`` before and after a move; sometimes a layer stays."""

    def channels(name):
        order = draw(st.permutations(range(CHANNELS[name])))
        return sorted(order[: MOVING[name]])

    before = {name: channels(name) for name in MOVING}
    moved = draw(st.sets(st.sampled_from(list(MOVING)), min_size=1))
    return before, {name: channels(name) for name in MOVING if name in moved}


def start_of(before, method):
    network = BlockNet()
    scheme = UpdateScheme("block", 4, dict.fromkeys(MOVING, 1.0) | {"project": 1.0}, before)
    return network, apply(network, scheme, method)


def state_by_channel(network, applied, optimizer):
    """The optimizer's tensors of every moving layer, by channel: (layer, state, channel) to a tensor."""
    found = {}
    for name in MOVING:
        layer = network.get_submodule(name)
        is_slice = isinstance(layer, SubTensorConv2d)
        parameter = layer.weight_slice if is_slice else layer.weight
        for key, value in optimizer.state[parameter].items():
            if value.ndim:
                rows = value if is_slice else by_input_channel(value, layer.groups).flatten(0, 1)
                channels = applied.channels[name] if is_slice else range(CHANNELS[name])
                found |= {(name, key, channel): row.clone() for channel, row in zip(channels, rows, strict=True)}
            else:
                found[name, key, None] = value.clone()
    return found


@settings(max_examples=30, deadline=None)
@given(moves(), st.sampled_from(["sub_tensor", "mask"]), st.sampled_from(list(OPTIMIZERS)))
def test_state_moves_with_the_channels(move, method, optimizer):
    before, after = move
    torch.manual_seed(0)
    network, applied = start_of(before, method)
    optimizer = train(network, applied, optimizer, steps=3)
    parameters = dict(network.named_parameters())
    held = state_by_channel(network, applied, optimizer)
    weights = copy.deepcopy(network.state_dict())

    entered = applied.move_channels(after, [optimizer])

    assert entered == sum(len(set(after[name]) - set(before[name])) for name in after)
    assert applied.channels == {"project": list(range(16))} | before | after
    assert all(one is parameters[name] for name, one in network.named_parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    for (name, key, channel), value in state_by_channel(network, applied, optimizer).items():
        stays = channel is None or name not in after or channel in set(before[name]) & set(after[name])
        if stays:
            assert torch.equal(value, held[name, key, channel])
        else:
            assert not value.any()
    for name in after:
        layer = network.get_submodule(name)
        assert (layer.weight_slice if method == "sub_tensor" else layer.weight).grad is None


@settings(max_examples=15, deadline=None)
@given(moves(), st.sampled_from(list(OPTIMIZERS)))
def test_mask_and_sub_tensor_reach_the_same_weights_through_a_move(move, optimizer):
    before, after = move
    states = []
    for method in ("mask", "sub_tensor"):
        torch.manual_seed(0)
        network, applied = start_of(before, method)
        network.double()
        trained = train(network, applied, optimizer, steps=3)
        applied.move_channels(after, [trained])
        go_on(network, applied, trained)
        applied.remove()
        states.append(network.state_dict())
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=1e-6, atol=1e-7)


def go_on(network, applied, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, *SHAPE, generator=generator).to(next(network.parameters()).dtype)
        optimizer.zero_grad()
        F.cross_entropy(network(x), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        applied.restore_frozen()


@settings(max_examples=20, deadline=None)
@given(moves(), st.sampled_from(["sub_tensor", "mask"]), st.sampled_from(list(OPTIMIZERS)))
def test_what_left_and_what_never_entered_is_bit_equal_after_a_move(move, method, optimizer):
    before, after = move
    torch.manual_seed(0)
    network, applied = start_of(before, method)
    first = copy.deepcopy(network.state_dict())
    trained = train(network, applied, optimizer, steps=3)
    applied.move_channels(after, [trained])
    at_move = copy.deepcopy(network.state_dict())
    go_on(network, applied, trained)
    applied.remove()
    scheme = UpdateScheme("block", 4, {})
    of_first = updated_entries(first, scheme, before | {"project": range(16)})
    of_second = updated_entries(first, scheme, before | after | {"project": range(16)})
    for name, updated in of_second.items():
        changed = network.state_dict()[name] != at_move[name]
        assert not changed[~updated].any(), name
        assert changed[updated].float().mean() > 0.9 or not updated.any(), name
        assert torch.equal(at_move[name][~of_first[name]], first[name][~of_first[name]]), name


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
@pytest.mark.parametrize(("layer", "channels", "had"), [("expand.0", [0, 1], 3), ("stem.0", [0], 0)])
def test_a_move_to_another_number_of_channels_is_refused_and_nothing_moves(method, layer, channels, had):
    before = {"expand.0": [0, 1, 2], "depthwise.0": [0, 1, 2, 3, 4], "head.0": [0, 1, 2, 3]}
    network, applied = start_of(before, method)
    with pytest.raises(UserError, match=rf"{layer} updates {had} channels and would update {len(channels)}: a move ke"):
        applied.move_channels({"head.0": [4, 5, 6, 7], layer: channels}, [])
    assert applied.channels == before | {"project": list(range(16))}
    if method == "sub_tensor":
        assert network.head[0].channels == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_int8_weights_that_leave_are_rounded_and_those_that_stay_are_not(method, small_graph, small_tensors):
    network = QuantizedNetwork(small_graph)
    load_quantized_tensors(network, small_tensors)
    name, operations = "blocks.2.pointwise1", find_operations(network, small_graph.input_shape)
    scheme = UpdateScheme("small-int8", 3, {name: 0.25})
    applied = AppliedScheme(network, scheme, operations, {name: [1, 2]}, method)
    before = network.state_dict()[f"{name}.weight"].clone()
    layer = network.get_submodule(name)
    with torch.no_grad():
        if method == "sub_tensor":
            layer.weight_slice.fill_(3.6)
        else:
            layer.weight[:, [1, 2]] = 3.6
    assert applied.move_channels({name: [2, 5]}, []) == 1
    after = network.state_dict()[f"{name}.weight"]
    before[:, 1], before[:, 2] = 4, 3.6
    assert torch.equal(after, before)
