"""Promises of a scheme in an int8 network: slices of the whole gradient, frozen integers, and one byte per element."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from microtune.modules.int8.graph import Quantization, QuantizedConvolution
from microtune.modules.int8.layers import QuantizedConv2d
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors, quantized_tensors
from microtune.modules.memory.saved_for_backward import measure_saved_bytes
from microtune.modules.memory.training_memory import autograd_bytes_per_sample
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.channel_choice import choose_channels
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.subtensor import SubTensorConv2d, has_subtensor_version
from microtune.modules.sparse_update.update_scheme import UpdateScheme

LAYERS = {  # of the small network of conftest.py, in forward order, with their input channels
    "first_conv": 3,
    "blocks.0.depthwise": 8,
    "blocks.0.pointwise2": 8,
    "blocks.1.pointwise1": 8,
    "blocks.1.depthwise": 24,
    "blocks.1.pointwise2": 24,
    "blocks.2.pointwise1": 8,
    "blocks.2.depthwise": 24,
    "blocks.2.pointwise2": 24,
}
OPTIMIZERS = {  # rates that move weights of int8 by a few units
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=30.0, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.5, weight_decay=0.1),
}
# hypothesis warns of fixtures that are made once for all examples: no test changes these
ONE_FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


@st.composite
def schemes(draw) -> UpdateScheme:
    """Any depth; within it any layers with any share of channels, some of them fixed."""
    depth = draw(st.integers(0, len(LAYERS)))
    names = list(LAYERS)[len(LAYERS) - depth :]
    chosen = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    weights, channels = {}, {}
    for name in chosen:
        count = draw(st.integers(1, LAYERS[name]) | st.just(LAYERS[name]))
        weights[name] = count / LAYERS[name]
        if draw(st.booleans()):
            channels[name] = draw(
                st.lists(st.integers(0, LAYERS[name] - 1), min_size=count, max_size=count, unique=True)
            )
    return UpdateScheme("small-int8", depth, weights, channels)


def build(graph, tensors) -> QuantizedNetwork:
    network = QuantizedNetwork(graph)
    load_quantized_tensors(network, tensors)
    return network


def apply(network, scheme, method="sub_tensor") -> AppliedScheme:
    operations = find_operations(network, (3, 32, 32))
    return AppliedScheme(network, scheme, operations, choose_channels(network, scheme, operations.convolutions), method)


def batch_of(count=2, seed=0, size=32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(count, 3, size, size, generator=generator) * 2 - 1,
        torch.randint(0, 10, (count,), generator=generator),
    )


def weights_of_channel(weight: Tensor, groups: int, channel: int) -> Tensor:
    """The weights that read one input channel, written without the function under test."""
    group, position = divmod(channel, weight.shape[1])
    outputs = len(weight) // groups
    return weight[group * outputs : (group + 1) * outputs, position]


def slices_of(weight: Tensor, groups: int, channels: list[int]) -> Tensor:
    return torch.stack([weights_of_channel(weight, groups, channel) for channel in channels])


def assert_close(found: Tensor, expected: Tensor, full: Tensor):
    """Up to what sums in float32 lose, reckoned by the layer's full gradient: of a slice almost all may cancel."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * full.abs().max()


# --- one layer ---


@st.composite
def layers(draw):
    """A layer with some integers, the channels of it that are trained, and an input for it.

    Scales are powers of two, so that with whole numbers as gradients every sum is exact in float32, in any order.
    """
    groups, group_channels, group_outputs = draw(
        st.sampled_from(
            [
                (1, draw(st.integers(1, 7)), draw(st.integers(1, 6))),  # ordinary
                (draw(st.integers(2, 6)), 1, 1),  # depthwise
                (draw(st.integers(2, 4)), 1, draw(st.integers(2, 3))),  # depthwise with a channel multiplier
                (draw(st.integers(2, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 3))),  # grouped
            ]
        )
    )
    kernel = draw(st.sampled_from([1, 3, 5]))
    description = QuantizedConvolution(
        in_channels=groups * group_channels,
        out_channels=groups * group_outputs,
        kernel_size=(kernel, kernel),
        stride=draw(st.sampled_from([(1, 1), (2, 2)])),
        padding=draw(st.tuples(*[st.integers(0, 2)] * 4)),
        groups=groups,
        input=Quantization(0.25, zero_point := draw(st.integers(-128, 127))),
        output=Quantization(0.5, draw(st.integers(-128, 127))),
    )
    torch.manual_seed(draw(st.integers(0, 2**32)))
    layer = QuantizedConv2d(description)
    layer.load_state_dict(
        {
            "weight": torch.randint(-128, 128, layer.weight.shape).float(),
            "bias": torch.randint(-3000, 3000, layer.bias.shape).float(),
            "weight_scales": 2.0 ** torch.randint(-9, -5, layer.bias.shape),
        }
    )
    size = [kernel + draw(st.integers(0, 4)) for _ in range(2)]
    x = torch.randint(-128, 128, (draw(st.integers(1, 3)), description.in_channels, *size)).float() - zero_point
    channels = draw(st.lists(st.integers(0, description.in_channels - 1), unique=True))
    return layer, channels, x.requires_grad_(draw(st.booleans()))


@settings(max_examples=120, deadline=None)
@given(layers(), st.booleans())
def test_gradients_equal_slices_of_the_full_gradients(layer, train_bias):
    plain, channels, x = layer
    full, full_input = copy.deepcopy(plain), x.detach().clone().requires_grad_(x.requires_grad)
    expected = full(full_input)
    gradient = torch.randint(-8, 9, expected.shape).float()
    expected.backward(gradient)

    sub_tensor = SubTensorConv2d(plain, channels, train_bias=train_bias)
    output = sub_tensor(x)
    assert torch.equal(output, expected)
    if not (channels or train_bias or x.requires_grad):
        assert not output.requires_grad
        return
    output.backward(gradient)
    assert sub_tensor.weight.grad is None
    if channels:
        assert torch.equal(sub_tensor.weight_slice.grad, slices_of(full.weight.grad, plain.groups, channels))
    if train_bias:
        assert torch.equal(sub_tensor.bias.grad, full.bias.grad)
    if x.requires_grad:
        assert torch.equal(x.grad, full_input.grad)


@settings(max_examples=50, deadline=None)
@given(layers())
def test_a_step_moves_the_trained_channels_of_the_weight_and_nothing_else(layer):
    plain, channels, x = layer
    weight = plain.weight.detach().clone()
    sub_tensor = SubTensorConv2d(plain, channels, train_bias=True)
    with torch.no_grad():
        for parameter in sub_tensor.parameters():
            if parameter.requires_grad:
                parameter.sub_(1.0)
    for channel in channels:
        weights_of_channel(weight, plain.groups, channel).sub_(1.0)
    expected = copy.deepcopy(plain)
    expected.load_state_dict({**plain.state_dict(), "weight": weight})
    assert torch.equal(sub_tensor(x), expected(x))
    after = sub_tensor.plain()
    assert type(after) is QuantizedConv2d
    assert torch.equal(after.weight, weight)
    assert torch.equal(after(x), expected(x))


@settings(max_examples=100, deadline=None)
@given(layers())
def test_a_layer_keeps_a_byte_per_element_of_updated_channels_and_of_its_output(layer):
    plain, channels, x = layer
    sub_tensor = SubTensorConv2d(plain, channels, train_bias=True)
    kept = len(channels) * x.numel() // x.shape[1] + sub_tensor(x).numel()
    assert measure_saved_bytes(sub_tensor, x) == kept


def test_other_weight_scales_of_a_state_dict_count():
    description = QuantizedConvolution(
        2, 1, (1, 1), (1, 1), (0, 0, 0, 0), 1, Quantization(1.0, 0), Quantization(1.0, 0)
    )
    layer = SubTensorConv2d(QuantizedConv2d(description), [1], train_bias=True)
    state = {"weight": torch.ones(1, 2, 1, 1), "bias": torch.zeros(1), "weight_scales": torch.ones(1)}
    assert layer.state_dict().keys() == state.keys()
    x = torch.full((1, 2, 1, 1), 10.0)
    for scale in (1.0, 0.5):
        layer.load_state_dict({**state, "weight_scales": torch.full((1,), scale)})
        assert layer(x).item() == 20 * scale
    assert layer.plain()(x).item() == 10


def test_sums_beyond_24_bits_are_exact():
    """Which float32 does not hold: the bias brings the sum back to where a unit shows."""
    description = QuantizedConvolution(
        1000, 1, (1, 1), (1, 1), (0, 0, 0, 0), 1, Quantization(1.0, -128), Quantization(1.0, 0)
    )
    plain = QuantizedConv2d(description)
    weight = torch.full((1, 1000, 1, 1), 127.0)
    weight[0, 0] = 1
    state = {"weight": weight, "bias": torch.tensor([-999.0 * 127 * 255 - 1]), "weight_scales": torch.ones(1)}
    plain.load_state_dict(state)
    x = torch.full((1, 1000, 1, 100), 255.0)
    x[0, 0, 0] = torch.arange(100)
    output = SubTensorConv2d(plain, [0, 7], train_bias=True)(x)
    assert output.requires_grad
    assert output.flatten().tolist() == list(range(-1, 99))


def test_a_layer_moves_to_another_device_with_all_that_it_needs():
    """To the one without data, which every machine has."""
    description = QuantizedConvolution(
        4, 6, (3, 3), (1, 1), (0, 1, 0, 1), 1, Quantization(1.0, 0), Quantization(1.0, 0)
    )
    layer = SubTensorConv2d(QuantizedConv2d(description), [1, 2], train_bias=True).to("meta")
    for module in (layer, layer.plain()):
        assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}


def test_a_layer_with_hooks_keeps_them_and_is_not_replaced(small_graph):
    layer = QuantizedConv2d(small_graph.first_conv)
    assert has_subtensor_version(layer)
    layer.register_forward_hook(lambda *_: None)
    assert not has_subtensor_version(layer)


# --- a network ---


def test_the_layers_drawn_from_are_those_of_the_network(small_graph):
    assert {name: layer.in_channels for name, layer in small_graph.convolutions()} == LAYERS


@settings(max_examples=25, **ONE_FIXTURE)
@given(scheme=schemes(), seed=st.integers(0, 2**32))
def test_sub_tensor_and_mask_compute_the_same(small_graph, small_tensors, scheme, seed):
    images, labels = batch_of(seed=seed)
    networks, outputs, channels = {}, {}, {}
    for method in ("plain", "sub_tensor", "mask"):
        networks[method] = build(small_graph, small_tensors)
        if method != "plain":
            channels = apply(networks[method], scheme, method).channels
        outputs[method] = networks[method](images)
        F.cross_entropy(outputs[method], labels).backward()
        assert torch.equal(outputs[method], outputs["plain"])
    updated_biases = list(LAYERS)[len(LAYERS) - scheme.bias_depth :]
    for name in LAYERS:
        plain, ours, masked = (network.get_submodule(name) for network in networks.values())
        assert (masked.bias.grad is not None) == (ours.bias.grad is not None) == (name in updated_biases)
        if name in updated_biases:
            for layer in (ours, masked):
                assert_close(layer.bias.grad, plain.bias.grad, plain.bias.grad)
        assert (masked.weight.grad is not None) == (name in channels)
        if name in channels:
            full, updated = plain.weight.grad, torch.zeros_like(plain.weight)
            for channel in channels[name]:
                weights_of_channel(updated, plain.groups, channel).fill_(1.0)
            assert_close(masked.weight.grad, full * updated, full)
            assert not masked.weight.grad[updated == 0].any()
            assert_close(ours.weight_slice.grad, slices_of(full, plain.groups, channels[name]), full)
    for name in ("weight", "bias"):
        classifiers = [getattr(network.classifier, name).grad for network in networks.values()]
        assert torch.equal(classifiers[0], classifiers[1])
        assert torch.equal(classifiers[0], classifiers[2])


def test_the_drawn_gradients_are_not_zero(small_graph, small_tensors):
    """So that the equalities above are not those of zeros."""
    network = build(small_graph, small_tensors)
    apply(network, UpdateScheme("small-int8", len(LAYERS), dict.fromkeys(LAYERS, 1.0)))
    images, labels = batch_of()
    F.cross_entropy(network(images), labels).backward()
    for name in LAYERS:
        layer = network.get_submodule(name)
        assert layer.bias.grad.count_nonzero() > len(layer.bias) / 2
        assert layer.weight_slice.grad.count_nonzero() > layer.weight_slice.numel() / 2


@settings(max_examples=12, **ONE_FIXTURE)
@given(scheme=schemes(), method=st.sampled_from(["sub_tensor", "mask"]), optimizer=st.sampled_from(list(OPTIMIZERS)))
def test_what_is_frozen_stays_bit_identical(small_graph, small_tensors, scheme, method, optimizer):
    network = build(small_graph, small_tensors)
    before = copy.deepcopy(network)
    names = [name for name, _ in before.named_modules()]
    applied = apply(network, scheme, method)
    steps = OPTIMIZERS[optimizer]([p for p in network.parameters() if p.requires_grad])
    for seed in range(4):
        images, labels = batch_of(seed=seed)
        steps.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        steps.step()
        applied.restore_frozen()
    channels, output = applied.channels, network(images)
    with torch.no_grad():
        assert torch.equal(network(images), output)
    applied.remove()
    assert torch.equal(network(images), output)

    assert [name for name, _ in network.named_modules()] == names
    assert [type(m) for m in network.modules()] == [type(m) for m in before.modules()]
    assert {name: p.requires_grad for name, p in network.named_parameters()} == {
        name: p.requires_grad for name, p in before.named_parameters()
    }
    for index, name in enumerate(LAYERS):
        layer, old = network.get_submodule(name), before.get_submodule(name)
        assert torch.equal(layer.weight_scales, old.weight_scales)
        assert (not torch.equal(layer.bias, old.bias)) is (index >= len(LAYERS) - scheme.bias_depth)
        frozen = torch.ones_like(old.weight, dtype=torch.bool)
        for channel in channels.get(name, []):
            weights_of_channel(frozen, old.groups, channel).fill_(False)
        assert torch.equal(layer.weight[frozen], old.weight[frozen])
        if name in channels:
            assert not torch.equal(layer.weight, old.weight)
    assert not torch.equal(network.classifier.weight, before.classifier.weight)


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_a_scheme_leaves_names_and_values_of_the_state_dict(small_graph, small_tensors, method):
    network = build(small_graph, small_tensors)
    before = copy.deepcopy(network.state_dict())
    scheme = UpdateScheme("small-int8", 6, {"blocks.1.pointwise1": 0.5, "blocks.2.depthwise": 0.25})
    applied = apply(network, scheme, method)
    assert applied.plain_layers == []
    under_scheme = network.state_dict()
    assert under_scheme.keys() == before.keys()
    assert all(torch.equal(under_scheme[name], tensor) for name, tensor in before.items())
    network.load_state_dict(before)
    applied.remove()
    assert all(type(network.get_submodule(name)) is QuantizedConv2d for name in LAYERS)
    assert list(network.state_dict()) == list(before)
    _, tensors = quantized_tensors(network)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in small_tensors.items())


def test_every_layer_within_the_bias_depth_is_replaced_and_no_other(small_graph, small_tensors):
    """Whole updates too: PyTorch's own would keep inputs as floats."""
    network = build(small_graph, small_tensors)
    apply(network, UpdateScheme("small-int8", 4, {"blocks.2.pointwise1": 1.0}))
    replaced = [name for name, module in network.named_modules() if type(module) is SubTensorConv2d]
    assert replaced == list(LAYERS)[-4:]


def test_a_copy_of_the_applied_network_computes_and_trains_alone(small_graph, small_tensors):
    network = build(small_graph, small_tensors)
    apply(network, UpdateScheme("small-int8", 4, {"blocks.2.pointwise1": 0.5}))
    before = copy.deepcopy(network.state_dict())
    other = copy.deepcopy(network)
    images, labels = batch_of()
    assert torch.equal(other(images), network(images))
    F.cross_entropy(other(images), labels).backward()
    OPTIMIZERS["sgd"]([p for p in other.parameters() if p.requires_grad]).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not torch.equal(other(images), network(images))


# --- bytes ---


def bytes_by_hand(graph, scheme, size) -> int:
    """Per sample: int8 inputs of what is updated, a byte per output in reach, and the classifier's features."""
    sizes, kept = {}, 4 * graph.classifier.features
    reached = list(LAYERS)[len(LAYERS) - scheme.bias_depth :]
    height = size
    for name, layer in graph.convolutions():
        sizes[name] = height
        left, right, _, _ = layer.padding
        written = (height + left + right - layer.kernel_size[0]) // layer.stride[0] + 1
        if name in reached:
            kept += layer.out_channels * written**2
        kept += round(scheme.weights.get(name, 0) * layer.in_channels) * height**2
        height = written
    if scheme.bias_depth >= 4:  # the addition lies behind blocks.1.pointwise2, or is reached past the block
        kept += 8 * sizes["blocks.2.pointwise1"] ** 2
    return kept


@settings(max_examples=25, **ONE_FIXTURE)
@given(scheme=schemes(), count=st.integers(1, 3), size=st.sampled_from([32, 20, 17]))
def test_measured_bytes_equal_the_account_and_the_count_by_hand(small_graph, small_tensors, scheme, count, size):
    network = build(small_graph, small_tensors)
    operations = find_operations(network, (3, size, size))
    AppliedScheme(network, scheme, operations, choose_channels(network, scheme, operations.convolutions))
    account = autograd_bytes_per_sample(operations, scheme)
    assert account == bytes_by_hand(small_graph, scheme, size)
    assert measure_saved_bytes(network, batch_of(count, size=size)[0]) == account * count


def test_a_mask_keeps_far_more(small_graph, small_tensors):
    scheme = UpdateScheme("small-int8", len(LAYERS), dict.fromkeys(LAYERS, 0.5))
    measured = []
    for method in ("sub_tensor", "mask"):
        network = build(small_graph, small_tensors)
        apply(network, scheme, method)
        measured.append(measure_saved_bytes(network, batch_of()[0]))
    assert measured[1] > 3 * measured[0]


def test_an_int8_mean_needs_nothing_kept(small_graph, small_tensors):
    """Its gradient is spread evenly: only the classifier's features are kept, however large the feature map."""
    network = build(replace(small_graph, input_shape=(3, 64, 64)), small_tensors)
    operations = find_operations(network, (3, 64, 64))
    AppliedScheme(network, UpdateScheme("small-int8", 0), operations, {})
    assert isinstance(network.classifier, nn.Linear)
    assert measure_saved_bytes(network, batch_of(size=64)[0]) == 2 * 4 * 16
