"""Promises of what happens around the optimizer's step: which parameters, their scales, their integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from microtune.modules.int8.graph import Quantization, QuantizedConvolution
from microtune.modules.int8.layers import QuantizedConv2d
from microtune.modules.int8.stochastic_rounding import IntegerGenerator, round_stochastically
from microtune.modules.sparse_update.int8_update import (
    QuantizedParameter,
    int8_convolutions,
    keep_in_range,
    quantized_parameters,
    round_in_place,
    scale_gradients,
)
from microtune.modules.sparse_update.subtensor import SubTensorConv2d

INPUT_SCALE = 0.5
LARGEST_BIAS = 2**31 - 2**24


def int8_layer(scales, in_channels=4, groups=1, kernel=3):
    """An int8 convolution with weights and biases drawn, and these scales of its output channels."""
    quantizations = (Quantization(INPUT_SCALE, -128), Quantization(0.25, 3))
    description = QuantizedConvolution(
        in_channels, len(scales), (kernel, kernel), (1, 1), (1, 1, 1, 1), groups, *quantizations
    )
    layer = QuantizedConv2d(description)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape))
        layer.bias.copy_(torch.randint(-5000, 5000, layer.bias.shape))
        layer.weight_scales.copy_(torch.tensor(scales))
    layer.scales_changed()
    return layer


def frozen(layer, weight=False, bias=False):
    layer.weight.requires_grad_(weight)
    layer.bias.requires_grad_(bias)
    return layer


SCALES = [0.5, 0.25, 1.0, 2.0]


def test_parameters_are_found_in_forward_order_weight_before_bias():
    network = nn.Sequential()
    network.add_module("first", frozen(int8_layer(SCALES)))
    network.add_module("depthwise", SubTensorConv2d(int8_layer(SCALES, groups=4), [1, 3], train_bias=True))
    network.add_module("bias_only", SubTensorConv2d(int8_layer(SCALES), train_bias=True))
    network.add_module("slice_only", SubTensorConv2d(int8_layer(SCALES), [0]))
    network.add_module("whole", int8_layer(SCALES))
    network.add_module("weight_only", frozen(int8_layer(SCALES), weight=True))
    network.add_module("floating_point", nn.Conv2d(4, 4, 1))
    network.add_module("classifier", nn.Linear(4, 2))
    found = quantized_parameters(network)
    expected = [
        ("depthwise", network.depthwise.weight_slice, (-128, 127)),
        ("depthwise", network.depthwise.bias, (-LARGEST_BIAS, LARGEST_BIAS)),
        ("bias_only", network.bias_only.bias, (-LARGEST_BIAS, LARGEST_BIAS)),
        ("slice_only", network.slice_only.weight_slice, (-128, 127)),
        ("whole", network.whole.weight, (-128, 127)),
        ("whole", network.whole.bias, (-LARGEST_BIAS, LARGEST_BIAS)),
        ("weight_only", network.weight_only.weight, (-128, 127)),
    ]
    assert [(one.layer, id(one.parameter), one.limits) for one in found] == [(n, id(p), li) for n, p, li in expected]
    names = [name for name, _, _ in int8_convolutions(network)]
    assert names == ["first", "depthwise", "bias_only", "slice_only", "whole", "weight_only"]
    assert all(isinstance(layer, QuantizedConv2d) for _, _, layer in int8_convolutions(network))
    assert quantized_parameters(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(4, 2))) == []


# in, out, groups: ordinary, depthwise, depthwise with two outputs per channel, grouped
SHAPES = [(4, 4, 1), (4, 4, 4), (4, 8, 4), (6, 8, 2)]


@st.composite
def sub_tensors(draw):
    """A layer and the input channels of it that are trained."""
    in_channels, out_channels, groups = draw(st.sampled_from(SHAPES))
    scales = draw(st.lists(st.floats(2**-10, 1.0, width=32), min_size=out_channels, max_size=out_channels))
    channels = draw(st.lists(st.integers(0, in_channels - 1), unique=True, min_size=1))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    return int8_layer(scales, in_channels, groups), channels


@settings(deadline=None, max_examples=50)
@given(sub_tensors())
def test_every_trained_integer_has_the_scale_of_its_output_channel(layer_and_channels):
    layer, channels = layer_and_channels
    plain_weight, plain_bias = quantized_parameters(layer)
    weight, bias = quantized_parameters(SubTensorConv2d(layer, channels, train_bias=True))
    group_inputs, group_outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for output, scale in enumerate(layer.weight_scales):
        real = scale * INPUT_SCALE
        assert (plain_weight.scale.expand(layer.weight.shape)[output] == scale).all()
        assert bias.scale[output] == plain_bias.scale[output] == real
        for row, channel in enumerate(channels):
            group, place = divmod(output, group_outputs)
            if group == channel // group_inputs:
                assert (weight.scale.expand(weight.parameter.shape)[row, place] == scale).all()


def test_scales_are_where_the_parameters_are():
    """A Trainer moves the network after the scheme is put in; another type is as good a place as another device."""
    network = nn.Sequential(int8_layer(SCALES), SubTensorConv2d(int8_layer(SCALES), [1, 2], train_bias=True))
    found = quantized_parameters(network.to(torch.float64))
    assert len(found) == 4
    for one in found:
        assert one.parameter.dtype == one.scale.dtype == torch.float64, one.layer
    assert network[1].convolution[0].effective_scale.dtype == torch.float64
    network.to("meta")
    assert network[1].convolution[0].effective_scale.device.type == "meta"


NEAR_ZERO_SCALES = [4e-9, 0.009, 0.011, 1.0, 1.0, 1.0, 1.5, 30.0]  # of a median of one
IS_NEAR_ZERO = torch.tensor([True, True, False, False, False, False, False, False])


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_scales_below_a_hundredth_of_the_median_are_near_zero(groups):
    layer = int8_layer(NEAR_ZERO_SCALES, 8, groups)
    weight, bias = quantized_parameters(layer)
    assert torch.equal(weight.near_zero.expand(layer.weight.shape)[:, 0, 0, 0], IS_NEAR_ZERO)
    assert bias.near_zero is None
    channels = [1, 2, 5]
    weight, bias = quantized_parameters(SubTensorConv2d(layer, channels, train_bias=True))
    assert bias.near_zero is None
    groups_of_rows = [channel // (8 // groups) for channel in channels]
    expected = IS_NEAR_ZERO.view(groups, -1)[groups_of_rows]
    assert torch.equal(weight.near_zero.expand(weight.parameter.shape)[..., 0, 0], expected)


def parameter(values, scale=1.0, limits=(-128, 127), near_zero=None):
    value = nn.Parameter(torch.tensor(values))
    return QuantizedParameter("layer", value, torch.tensor(scale), limits, near_zero)


def test_gradients_are_divided_by_the_square_of_the_scale():
    one = parameter([1.0, 2.0, 3.0], scale=[0.5, 2.0, 0.125])
    one.parameter.grad = torch.tensor([1.0, -8.0, 3.0])
    scale_gradients([one])
    assert one.parameter.grad.tolist() == [4.0, -2.0, 192.0]
    assert one.parameter.tolist() == [1.0, 2.0, 3.0]


def test_a_square_too_small_for_float32_does_no_harm():
    """The bias' scale of a channel near zero, squared, is below the smallest float32."""
    one = parameter([0.0], scale=[2.0**-80], limits=(-LARGEST_BIAS, LARGEST_BIAS))
    one.parameter.grad = torch.tensor([2.0**-100])
    scale_gradients([one])
    assert one.parameter.grad.tolist() == [2.0**60]
    assert float(one.scale**2) == 0


def test_weights_on_scales_near_zero_get_no_gradient_even_if_it_is_infinite():
    one = parameter([1.0, 2.0], scale=[1e-30, 0.5], near_zero=torch.tensor([True, False]))
    one.parameter.grad = torch.tensor([1.0, 1.0])
    scale_gradients([one])
    assert one.parameter.grad.tolist() == [0.0, 4.0]


def test_parameters_without_a_gradient_are_left_alone():
    one = parameter([1.0], near_zero=torch.tensor([True]))
    scale_gradients([one])
    assert one.parameter.grad is None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-(2.0**40), 2.0**40, width=32) | st.floats(-140, 140, width=32), min_size=1), st.booleans())
def test_values_are_limited_and_else_kept(values, is_bias):
    limits = (-LARGEST_BIAS, LARGEST_BIAS) if is_bias else (-128, 127)
    one = parameter(values, limits=limits)
    keep_in_range([one])
    assert one.parameter.tolist() == [min(max(value, limits[0]), limits[1]) for value in values]
    assert one.parameter.requires_grad


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-300, 300, width=32), min_size=1), st.integers(0, 2**32 - 1))
def test_rounding_in_place_gives_integers_within_the_limits(values, seed):
    one = parameter(values)
    round_in_place([one], IntegerGenerator(seed))
    rounded, x = one.parameter.detach(), torch.tensor(values)
    assert (rounded == rounded.round()).all()
    assert rounded.min() >= -128
    assert rounded.max() <= 127
    assert ((rounded == x.floor().clamp(-128, 127)) | (rounded == x.ceil().clamp(-128, 127))).all()


def test_parameters_are_drawn_for_one_after_the_other_near_zero_or_not():
    torch.manual_seed(0)
    many = [
        parameter((torch.randn(5, 3) * 50).tolist(), near_zero=torch.tensor(True)),
        parameter((torch.randn(4) * 1000).tolist(), limits=(-LARGEST_BIAS, LARGEST_BIAS)),
    ]
    expected = round_stochastically(torch.cat([one.parameter.detach().flatten() for one in many]), IntegerGenerator(3))
    generator = IntegerGenerator(3)
    round_in_place(many, generator)
    assert torch.equal(torch.cat([one.parameter.detach().flatten() for one in many]), expected.clamp(-(2**30), 2**30))
    assert generator.state == IntegerGenerator(3).state + 19 * 0x9E3779B9 & 0xFFFFFFFF
