"""Promises of the layers: the gradients are slices of the full ones, and little is stored for them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.sparse_update import subtensor
from microtune.modules.sparse_update.subtensor import (
    MaskedReLU,
    SubTensorConv2d,
    by_input_channel,
    has_subtensor_version,
)
from microtune.modules.user_error import UserError

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@st.composite
def layers(draw):
    """A convolution, the channels of it that are trained, and an input for it."""
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
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel = draw(st.just((1, 1)) | pair)
    stride, padding = draw(pair), draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    # dilation means nothing where the kernel has size 1, and there crashes PyTorch's own padded convolution in float32
    dilation = tuple(1 if k == 1 else d for k, d in zip(kernel, draw(pair), strict=True))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [max(1, e - 2 * p) + draw(st.integers(0, 4)) for e, p in zip(extents, padding, strict=True)]
    torch.manual_seed(draw(st.integers(0, 2**32)))
    convolution = nn.Conv2d(
        groups * group_channels,
        groups * group_outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
    )
    channels = draw(st.lists(st.integers(0, groups * group_channels - 1), unique=True))
    x = torch.randn(draw(st.integers(1, 3)), convolution.in_channels, *size, dtype=convolution.weight.dtype)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    if draw(st.booleans()):
        convolution = convolution.to(memory_format=torch.channels_last)
    return convolution, channels, x.requires_grad_(draw(st.booleans()))


def weights_of_channel(weight, convolution, channel):
    """The weights that read one input channel, written without the function under test."""
    group, position = divmod(channel, convolution.in_channels // convolution.groups)
    outputs = convolution.out_channels // convolution.groups
    return weight[group * outputs : (group + 1) * outputs, position]


def assert_close(found, expected):
    tolerance = TOLERANCE[expected.dtype] * expected.abs().max()
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


@settings(max_examples=300, deadline=None)
@given(layers())
def test_gradients_equal_slices_of_the_full_gradients(layer):
    convolution, channels, x = layer
    full_input = x.detach().clone().requires_grad_(x.requires_grad)
    full = copy.deepcopy(convolution)
    expected = full(full_input)
    scale = torch.randn_like(expected)
    (expected * scale).sum().backward()

    sub_tensor = SubTensorConv2d(convolution, channels, train_bias=True)
    output = sub_tensor(x)
    assert torch.equal(output, expected)
    if not output.requires_grad:
        assert not channels
        assert convolution.bias is None
        return
    (output * scale).sum().backward()
    assert sub_tensor.weight.grad is None
    if channels:
        slices = [weights_of_channel(full.weight.grad, full, channel) for channel in channels]
        tolerance = TOLERANCE[full.weight.dtype] * full.weight.grad.abs().max()
        assert (sub_tensor.weight_slice.grad - torch.stack(slices)).abs().max() <= tolerance
        assert sub_tensor.weight_slice.grad.shape == sub_tensor.weight_slice.shape
    if full.bias is not None:
        assert_close(sub_tensor.bias.grad, full.bias.grad)
    if x.requires_grad:
        assert_close(x.grad, full_input.grad)


@settings(max_examples=50, deadline=None)
@given(layers())
def test_a_step_moves_the_trained_channels_of_the_full_weight_and_nothing_else(layer):
    convolution, channels, x = layer
    before = convolution.weight.detach().clone()
    sub_tensor = SubTensorConv2d(convolution, channels, train_bias=True)
    with torch.no_grad():
        for parameter in sub_tensor.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    after = sub_tensor.plain()
    assert after is convolution
    expected = before.clone()
    for channel in channels:
        weights_of_channel(expected, convolution, channel).add_(1.0)
    assert torch.equal(after.weight, expected)
    assert torch.equal(after(x), F.conv2d(x, expected, after.bias, **settings_of(convolution)))


def settings_of(convolution):
    return {name: getattr(convolution, name) for name in ("stride", "padding", "dilation", "groups")}


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_by_input_channel_is_a_view_with_input_channels_first(groups):
    convolution = nn.Conv2d(6, 12, 3, groups=groups)
    view = by_input_channel(convolution.weight, groups)
    assert view.data_ptr() == convolution.weight.data_ptr()
    assert view.shape == (groups, 6 // groups, 12 // groups, 3, 3)
    for channel in range(6):
        group, position = divmod(channel, 6 // groups)
        assert torch.equal(view[group, position], weights_of_channel(convolution.weight, convolution, channel))


def test_state_dict_is_that_of_the_plain_convolution_with_trained_weights():
    convolution = nn.Conv2d(4, 6, 3)
    before = convolution.weight.detach().clone()
    layer = SubTensorConv2d(convolution, [1, 3], train_bias=True)
    with torch.no_grad():
        layer.weight_slice.add_(1.0)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    before[:, [1, 3]] += 1.0
    assert torch.equal(state["weight"], before)


def test_plain_state_dict_loads_and_its_slice_is_then_trained():
    layer, source = SubTensorConv2d(nn.Conv2d(4, 6, 3), [3, 1], train_bias=True), nn.Conv2d(4, 6, 3)
    state = source.state_dict()
    layer.load_state_dict(state)
    assert list(state) == ["weight", "bias"]
    assert torch.equal(layer.weight_slice, source.weight[:, [3, 1]].transpose(0, 1))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer(x), source(x))
    assert torch.equal(layer.plain().weight, source.weight)


def test_other_channels_keep_what_was_trained():
    convolution = nn.Conv2d(4, 6, 3)
    expected = convolution.weight.detach().clone()
    expected[:, 2] = 5.0
    layer = SubTensorConv2d(convolution, [2])
    with torch.no_grad():
        layer.weight_slice.fill_(5.0)
    layer.set_channels([0, 1])
    assert layer.weight_slice.shape == (2, 6, 3, 3)
    assert torch.equal(layer.weight_slice, expected[:, :2].transpose(0, 1))
    assert torch.equal(layer.weight, expected)


def test_a_copy_is_independent():
    layer = SubTensorConv2d(nn.Conv2d(4, 6, 3), [2], train_bias=True)
    before = layer.weight.detach().clone()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight_slice.fill_(5.0)
        other.bias.fill_(5.0)
    assert torch.equal(other.plain().weight[:, 2], torch.full((6, 3, 3), 5.0))
    assert torch.equal(layer.plain().weight, before)
    assert not (layer.bias == 5.0).any()


def test_a_step_between_forward_and_backward_is_noticed():
    layer = SubTensorConv2d(nn.Conv2d(4, 6, 1), [2])
    output = layer(torch.randn(1, 4, 3, 3)).sum()
    with torch.no_grad():
        layer.weight_slice.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_nothing_is_stored_without_gradients_and_only_k_channels_with_them():
    layer = SubTensorConv2d(nn.Conv2d(8, 6, 1), [2, 3, 7], train_bias=True)
    assert saved_bytes(layer, torch.randn(5, 8, 3, 3, requires_grad=True)) == 5 * 3 * 9 * 4
    with torch.no_grad():
        assert layer(torch.randn(5, 8, 3, 3, requires_grad=True)).grad_fn is None
    bias_only = SubTensorConv2d(nn.Conv2d(8, 6, 1), train_bias=True)
    assert saved_bytes(bias_only, torch.randn(5, 8, 3, 3, requires_grad=True)) == 0


def saved_bytes(module, x):
    """Bytes of the unique storages that autograd keeps for ``module(x)``, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    assert output.requires_grad
    return sum(storage.nbytes() for address, storage in saved.items() if address not in parameters)


def test_autocast_stores_and_computes_in_bfloat16():
    convolution = nn.Conv2d(8, 6, 3)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    full = copy.deepcopy(convolution)
    full(x).square().sum().backward()
    full_input_gradient, x.grad = x.grad, None
    layer = SubTensorConv2d(convolution, [1, 4], train_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(layer, x) == 2 * 2 * 5 * 5 * 2
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    for gradient, expected in [
        (layer.weight_slice.grad, full.weight.grad[:, [1, 4]].transpose(0, 1)),
        (layer.bias.grad, full.bias.grad),
        (x.grad, full_input_gradient),
    ]:
        assert gradient.dtype == torch.float32
        # bfloat16 has 8 bits of mantissa
        assert (gradient - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    ("convolution", "expected"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), True),
        (nn.Conv2d(4, 4, 3, padding="same"), False),
        (nn.Conv2d(4, 4, 3, padding="valid"), False),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), False),
        (type("StandardizedConvolution", (nn.Conv2d,), {})(4, 4, 3), False),
    ],
)
def test_which_convolutions_have_a_sub_tensor_version(convolution, expected):
    assert has_subtensor_version(convolution) is expected


BOUNDS = [0.0, -0.0, 6.0, 1e-45, -1e-45, 5.9999995, 6.0000005, 1e30, -1e30, float("inf"), float("-inf")]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(BOUNDS) | st.floats(-10, 10, width=32), min_size=1, max_size=20),
    st.sampled_from([nn.ReLU, nn.ReLU6]),
    st.booleans(),
)
def test_masked_relu_equals_relu_in_values_and_gradients(values, kind, inplace):
    leaf = torch.tensor(values, requires_grad=True)
    expected_leaf = leaf.detach().clone().requires_grad_(True)
    gradient = torch.arange(1.0, len(values) + 1)
    expected = kind(inplace=inplace)(expected_leaf.clone())
    expected.backward(gradient)
    x = leaf.clone()
    output = MaskedReLU(kind(inplace=inplace))(x)
    output.backward(gradient)
    assert torch.equal(output, expected)
    assert torch.equal(leaf.grad, expected_leaf.grad)
    assert (x.data_ptr() == output.data_ptr()) is inplace


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("inplace", [False, True])
def test_masked_relu_stores_one_byte_per_element(kind, inplace):
    layer = nn.Sequential(SubTensorConv2d(nn.Conv2d(3, 4, 1), train_bias=True), MaskedReLU(kind(inplace=inplace)))
    assert saved_bytes(layer, torch.randn(2, 3, 5, 5)) == 2 * 4 * 5 * 5


def test_masked_relu_computes_as_before_without_gradients():
    relu = MaskedReLU(nn.ReLU6())
    x = torch.tensor([-1.0, 3.0, 9.0])
    assert relu(x).tolist() == [0.0, 3.0, 6.0]
    assert relu(x).grad_fn is None


def test_a_second_derivative_is_refused_and_not_wrong():
    layer = SubTensorConv2d(nn.Conv2d(4, 3, 1), [0, 2], train_bias=True)
    loss = layer(torch.randn(2, 4, 5, 5, requires_grad=True)).square().sum()
    (gradient,) = torch.autograd.grad(loss, layer.weight_slice, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_a_layer_with_hooks_keeps_them_and_is_not_replaced():
    convolution = nn.Conv2d(4, 3, 1)
    assert has_subtensor_version(convolution)
    convolution.register_forward_hook(lambda *_: None)
    assert not has_subtensor_version(convolution)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (8, 2)])
def test_input_gradient_keeps_the_memory_order(order, groups, stride):
    """``torch.nn.grad.conv2d_input`` loses ``channels_last``, and with it most of the speed of what follows."""
    weight = torch.randn(8, 8 // groups, 3, 3)
    gradient = torch.randn(2, 8, 6 // stride, 6 // stride).contiguous(memory_format=order)
    settings = ((stride, stride), (1, 1), (1, 1), groups)
    found = subtensor._input_gradient(torch.Size((2, 8, 6, 6)), weight, gradient, settings)
    assert found.is_contiguous(memory_format=order)
    expected = torch.nn.grad.conv2d_input((2, 8, 6, 6), weight, gradient, *settings)
    torch.testing.assert_close(found, expected)


@settings(max_examples=100, deadline=None)
@given(layers(), st.randoms(use_true_random=False))
def test_moved_channels_are_read_and_left_ones_written_to_the_bit(layer, random):
    convolution, channels, _ = layer
    sub_tensor = SubTensorConv2d(convolution, channels)
    expected, parameter = convolution.weight.detach().clone(), sub_tensor.weight_slice
    for _ in range(3):
        if channels:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter))
            for row, channel in enumerate(sub_tensor.channels):
                weights_of_channel(expected, convolution, channel).copy_(parameter[row].detach())
        moved = random.sample(range(convolution.in_channels), len(channels))
        sub_tensor.move_channels(moved)
        assert sub_tensor.channels == sorted(moved)
        assert sub_tensor.weight_slice is parameter
        assert torch.equal(sub_tensor.weight, expected)
        for row, channel in enumerate(sorted(moved)):
            assert torch.equal(parameter[row], weights_of_channel(expected, convolution, channel))


def test_a_moved_layer_trains_its_new_channels():
    layer = SubTensorConv2d(nn.Conv2d(4, 6, 3, groups=2), [0, 2])
    layer.move_channels([3, 1])
    full, x = copy.deepcopy(layer.plain()), torch.randn(2, 4, 5, 5)
    full.weight.requires_grad_(True)
    full(x).square().sum().backward()
    layer(x).square().sum().backward()
    expected = [weights_of_channel(full.weight.grad, full, channel) for channel in (1, 3)]
    torch.testing.assert_close(layer.weight_slice.grad, torch.stack(expected))


@pytest.mark.parametrize("channels", [[], [0], [0, 0], [0, 1, 2]])
def test_a_move_to_another_number_of_channels_is_refused(channels):
    layer = SubTensorConv2d(nn.Conv2d(4, 6, 3), [1, 2])
    count = len(set(channels))
    with pytest.raises(UserError, match=f"^{count} channels cannot take the place of 2, whose number a move keeps: "):
        layer.move_channels(channels)
    assert layer.channels == [1, 2]


def test_int8_channels_move_to_the_bit(small_graph, small_tensors):
    network = QuantizedNetwork(small_graph)
    load_quantized_tensors(network, small_tensors)
    convolution = network.get_submodule("blocks.1.depthwise")
    before = convolution.weight.detach().clone()
    layer = SubTensorConv2d(convolution, [3, 5])
    with torch.no_grad():
        layer.weight_slice.fill_(-7.25)  # a copy in floating point
    layer.move_channels([4, 5])
    before[[3, 5]] = -7.25
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight_slice[:, 0], before[[4, 5], 0])
