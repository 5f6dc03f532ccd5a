"""Promises of the int8 layers: the integers of a kernel written here in int64, and gradients as if nothing rounded."""

import copy
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from microtune.modules.int8.graph import Quantization, QuantizedClassifier, QuantizedConvolution
from microtune.modules.int8.layers import (
    QuantizedAddition,
    QuantizedConv2d,
    QuantizedInput,
    QuantizedLinear,
    QuantizedMean,
)

BIAS_LIMIT = 2**31 - 2**24
SCALES = st.floats(1e-3, 0.5)
ZERO_POINTS = st.integers(-128, 127) | st.sampled_from([-128, 0, 127])
quantizations = st.builds(Quantization, SCALES, ZERO_POINTS)


def limits(quantization):
    """Of what stands between layers: int8 less the zero point."""
    return -128 - quantization.zero_point, 127 - quantization.zero_point


def windows_of(x, description):
    """What each output element reads: (N, groups, in / groups, height, width, kernel height, kernel width)."""
    left, right, top, bottom = description.padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = sliding_window_view(x, description.kernel_size, axis=(2, 3))
    windows = windows[:, :, :: description.stride[0], :: description.stride[1]]
    return windows.reshape(len(x), description.groups, -1, *windows.shape[2:])


def rescaled(description, weight, bias, weight_scales, x):
    """Rounded outputs of an int8 kernel, not yet saturated, and its effective scales; all sums in int64."""
    grouped = weight.reshape(description.groups, -1, *weight.shape[1:])
    sums = np.einsum("ngihwkl,goikl->ngohw", windows_of(x, description), grouped)
    sums = sums.reshape(len(x), -1, *sums.shape[3:]) + bias[:, None, None]
    ratio = description.input.scale / description.output.scale
    effective = (weight_scales.astype(np.float64) * ratio).astype(np.float32)
    assert sums.dtype == np.int64
    return np.rint(sums.astype(np.float32) * effective[:, None, None]), effective


def gradients(description, weight, weight_scales, x, rounded, gradient):
    """Float64 gradients of input, weight and bias, straight through rounding and zero where the output saturated."""
    low, high = limits(description.output)
    ratio = description.input.scale / description.output.scale
    effective = (weight_scales.astype(np.float64) * ratio).astype(np.float32).astype(np.float64)
    scaled = np.where((rounded < low) | (rounded > high), 0, gradient) * effective[:, None, None]
    grouped = scaled.reshape(len(x), description.groups, -1, *scaled.shape[2:])
    of_weight = np.einsum("ngihwkl,ngohw->goikl", windows_of(x, description), grouped).reshape(weight.shape)

    left, right, top, bottom = description.padding
    of_input = np.zeros((*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right))
    weight = weight.reshape(description.groups, -1, *weight.shape[1:])
    for row, column in np.ndindex(*description.kernel_size):
        reached = of_input[:, :, row:, column:][:, :, :: description.stride[0], :: description.stride[1]]
        reached = reached[:, :, : scaled.shape[2], : scaled.shape[3]]
        reached += np.einsum("ngohw,goi->ngihw", grouped, weight[..., row, column]).reshape(reached.shape)
    of_input = of_input[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return of_input, of_weight, scaled.sum((0, 2, 3))


def layer_of(description, weight, bias, weight_scales):
    layer = QuantizedConv2d(description)
    tensors = {"weight": weight, "bias": bias, "weight_scales": weight_scales}
    layer.load_state_dict({name: torch.from_numpy(array).float() for name, array in tensors.items()})
    return layer


def assert_is_the_kernel(layer, description, weight, bias, weight_scales, x):
    """Values to the last bit, and gradients up to what sums in float32 lose."""
    rounded, _ = rescaled(description, weight, bias, weight_scales, x)
    leaf = torch.from_numpy(x).float().requires_grad_()
    output = layer(leaf)
    assert output.dtype == torch.float32
    assert np.array_equal(output.detach().numpy(), rounded.clip(*limits(description.output)))
    with torch.no_grad():
        assert torch.equal(layer(leaf), output)

    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(output, [leaf, layer.weight, layer.bias], gradient)
    expected = gradients(description, weight, weight_scales, x, rounded, gradient.double().numpy())
    # what the sums would be if nothing in them cancelled: float32 loses a part of that
    sizes = gradients(description, np.abs(weight), weight_scales, np.abs(x), rounded, gradient.abs().double().numpy())
    for found_tensor, expected_array, size in zip(found, expected, sizes, strict=True):
        assert found_tensor.shape == expected_array.shape
        assert (np.abs(found_tensor.double().numpy() - expected_array) <= 1e-5 * size).all()


@st.composite
def descriptions(draw):
    """Convolutions of all kinds, and the height and width of an input for each."""
    groups, group_channels, group_outputs = draw(
        st.sampled_from(
            [
                (1, draw(st.integers(1, 9)), draw(st.integers(1, 8))),  # ordinary
                (draw(st.integers(2, 8)), 1, 1),  # depthwise
                (draw(st.integers(2, 4)), 1, draw(st.integers(2, 3))),  # depthwise with a channel multiplier
                (draw(st.integers(2, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 3))),  # grouped
            ]
        )
    )
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (3, 1), (1, 5)]))
    left, right, top, bottom = padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    height = max(1, kernel[0] - top - bottom) + draw(st.integers(0, 5))
    width = max(1, kernel[1] - left - right) + draw(st.integers(0, 5))
    description = QuantizedConvolution(
        in_channels=groups * group_channels,
        out_channels=groups * group_outputs,
        kernel_size=kernel,
        stride=draw(st.sampled_from([(1, 1), (2, 2), (1, 2)])),
        padding=padding,
        groups=groups,
        input=draw(quantizations),
        output=draw(quantizations),
    )
    return description, (height, width)


@st.composite
def layers(draw):
    """A description, the arrays of a layer and an input; outputs lie within int8 and far beyond, whatever the scale."""
    description, size = draw(descriptions())
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = random.integers(-128, 128, description.weight_shape)
    channels = description.out_channels
    effective = 10 ** random.uniform(-9, -1, channels)
    # where the effective scale is tiny, as in published models, the bias is what the channel computes
    bias = (random.uniform(-200, 200, channels) / effective).clip(-BIAS_LIMIT, BIAS_LIMIT)
    bias = bias.astype(np.float32).astype(np.int64)
    weight_scales = (effective * description.output.scale / description.input.scale).astype(np.float32)
    low, high = limits(description.input)
    x = random.integers(low, high + 1, (draw(st.integers(1, 2)), description.in_channels, *size))
    return description, weight, bias, weight_scales, x


@settings(max_examples=150, deadline=None)
@given(layers())
def test_a_convolution_is_the_int8_kernel_to_the_last_bit(layer):
    assert_is_the_kernel(layer_of(*layer[:4]), *layer)


def test_an_effective_scale_is_rounded_once():
    """Biases near a half show the last bit of the scale: another, were ratio and product rounded one by one."""
    read, written = Quantization(0.1, 0), Quantization(0.3, 0)
    weight_scales = np.random.default_rng(0).uniform(1e-6, 2e-6, 500).astype(np.float32)
    once = (weight_scales.astype(np.float64) * (read.scale / written.scale)).astype(np.float32)
    twice = weight_scales * np.float32(read.scale / written.scale)
    halves = ((np.arange(10.5, 127) / once.astype(np.float64)[:, None]) // 16 * 16).astype(np.float32)
    biases = (halves[..., None] + np.float32([-32, -16, 0, 16, 32])).reshape(len(once), -1)
    rounded = np.rint(biases * once[:, None])
    shows = rounded != np.rint(biases * twice[:, None])
    channels = np.flatnonzero(shows.any(1))
    assert len(channels) > 20
    bias, expected = (array[channels, shows[channels].argmax(1)] for array in (biases, rounded))
    description = replace(plain_description(1, len(channels)), input=read, output=written)
    layer = layer_of(description, np.zeros(description.weight_shape), bias, weight_scales[channels])
    assert layer(torch.zeros(1, 1, 1, 1)).flatten().tolist() == expected.tolist()


def plain_description(in_channels, out_channels, kernel=1, groups=1, output=None):
    """One with equal scales, so that an effective scale is the weight scale."""
    return QuantizedConvolution(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=(kernel, kernel),
        stride=(1, 1),
        padding=(kernel // 2,) * 4,
        groups=groups,
        input=Quantization(0.5, -128),
        output=output or Quantization(0.5, 0),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "description",
    [
        plain_description(1000, 4),
        plain_description(112, 4, kernel=3),
        plain_description(2000, 4, groups=2),
        plain_description(64, 64, kernel=3),  # here a fast algorithm for 3x3 would not be exact
    ],
    ids=["1x1", "3x3", "grouped", "square 3x3"],
)
@pytest.mark.parametrize("signs", ["same", "cancelling"])
@pytest.mark.parametrize("training", [False, True])
def test_sums_beyond_24_bits_are_exact(description, signs, memory_format, training):
    """Float32 holds whole numbers up to 2 ** 24 only; the bias brings these sums back to where a difference shows."""
    random = np.random.default_rng(0)
    weight = np.full(description.weight_shape, 127)
    if signs == "cancelling":  # partial sums are large, the whole is small
        weight[:, weight.shape[1] // 2 :] = -127
    x = random.integers(253, 256, (2, description.in_channels, 9, 9))
    weight_scales = np.full(len(weight), 2.0**-7, np.float32)
    sums, _ = rescaled(description, weight, np.zeros(len(weight), np.int64), weight_scales, x)
    bias = -(np.median(sums, axis=(0, 2, 3)) * 2**7).astype(np.float32).astype(np.int64)
    layer = layer_of(description, weight, bias, weight_scales).to(memory_format=memory_format)
    expected, _ = rescaled(description, weight, bias, weight_scales, x)
    with torch.set_grad_enabled(training):
        found = layer(torch.from_numpy(x).float().contiguous(memory_format=memory_format))
    assert np.array_equal(found.detach().numpy(), expected.clip(-128, 127))
    assert len(found.unique()) > 3


@pytest.mark.parametrize("training", [False, True])
def test_odd_sums_beyond_24_bits_are_exact(training):
    """Each output is the sum less the bias and unscaled: one unit lost would show."""
    description = plain_description(1000, 2)
    weight = np.full(description.weight_shape, 127)
    x = np.full((1, 1000, 1, 100), 255)
    x[0, 0, 0, :] = np.arange(100) + 100
    x[0, 1, 0, :] = 0
    weight[:, 0] = 1
    bias = np.full(2, -998 * 127 * 255 - 146)  # an even number, as float32 holds it in this range
    layer = layer_of(description, weight, bias, np.ones(2, np.float32))
    with torch.set_grad_enabled(training):
        assert layer(torch.from_numpy(x).float())[0, 0, 0].tolist() == list(range(-46, 54))


@settings(max_examples=25, deadline=None)
@given(layers(), st.integers(0, 2**32))
def test_weights_that_an_optimizer_has_changed_need_no_further_call(layer, seed):
    description, weight, bias, weight_scales, x = layer
    module = layer_of(description, weight // 100, bias, weight_scales)
    module(torch.from_numpy(x).float())
    weight = np.random.default_rng(seed).integers(-128, 128, weight.shape)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
        module.bias.neg_()
    assert_is_the_kernel(module, description, weight, -bias, weight_scales, x)


@pytest.mark.parametrize("training", [False, True])
def test_small_weights_that_grow_are_summed_exactly_after_scales_changed(training):
    description = plain_description(1000, 1)
    layer = layer_of(description, np.zeros(description.weight_shape), np.full(1, -998 * 127 * 255), np.ones(1))
    x = torch.full((1, 1000, 1, 1), 255.0)
    x[0, 0], x[0, 1] = 0, 3
    assert layer(x).item() == -128
    with torch.no_grad():
        layer.weight.fill_(127)
        layer.weight[0, 1] = 1
    layer.scales_changed()
    with torch.set_grad_enabled(training):
        assert layer(x).item() == 3


@settings(max_examples=50, deadline=None)
@given(layers(), st.integers(0, 2**32))
def test_weights_between_whole_numbers_count_as_what_they_are_rounded_to(layer, seed):
    description, weight, *others = layer[:4]
    between = np.random.default_rng(seed).uniform(-0.49, 0.49, weight.shape)
    module = layer_of(description, weight + between, *others)
    assert_is_the_kernel(module, *layer)


@settings(max_examples=25, deadline=None)
@given(layers(), st.floats(0.5, 2))
def test_other_weight_scales_count_after_scales_changed_and_in_a_copy(layer, factor):
    description, weight, bias, weight_scales, x = layer
    module = layer_of(*layer[:4])
    weight_scales = weight_scales * np.float32(factor)
    module.weight_scales.copy_(torch.from_numpy(weight_scales))
    module.scales_changed()
    assert_is_the_kernel(module, description, weight, bias, weight_scales, x)
    assert_is_the_kernel(copy.deepcopy(module), description, weight, bias, weight_scales, x)


@settings(max_examples=25, deadline=None)
@given(layers())
def test_a_state_dict_is_all_that_a_layer_is(layer):
    state = layer_of(*layer[:4]).state_dict()
    assert list(state) == ["weight", "bias", "weight_scales"]
    other = QuantizedConv2d(layer[0])
    other.load_state_dict(state)
    assert_is_the_kernel(other, *layer)


def shift(amount, output, effective=1.0):
    """A layer that computes ``(x + amount) * effective``."""
    description = plain_description(1, 1, output=output)
    weight_scales = np.full(1, effective, np.float32)
    return layer_of(description, np.ones((1, 1, 1, 1)), np.full(1, amount), weight_scales)


@pytest.mark.parametrize("zero_point", [-128, -3, 0, 127])
def test_the_gradient_passes_at_the_limits_and_not_beyond(zero_point):
    output = Quantization(0.5, zero_point)
    low, high = limits(output)
    inputs = torch.arange(0.0, 256.0)
    for amount in (low - 1, high - 254):
        x = inputs.clone().requires_grad_()
        y = shift(amount, output)(x.view(1, 1, 1, -1))
        y.sum().backward()
        unlimited = inputs + amount
        assert torch.equal(y.flatten(), unlimited.clamp(low, high))
        assert x.grad.tolist() == [float(low <= value <= high) for value in unlimited.tolist()]
        assert set(x.grad.tolist()) == {0.0, 1.0}


def test_halves_are_rounded_to_the_even_number_before_the_limits_are_compared():
    """127.5 is rounded to 128 and has saturated; -128.5 is rounded to -128 and has not."""
    layer = shift(0, Quantization(0.5, 0), effective=0.5)
    x = torch.tensor([0.0, 1, 2, 3, 5, 253, 254, 255]).requires_grad_()
    y = layer(x.view(1, 1, 1, -1))
    y.sum().backward()
    assert y.flatten().tolist() == [0, 0, 1, 2, 2, 126, 127, 127]
    with torch.no_grad():
        assert torch.equal(layer(x.view(1, 1, 1, -1)), y)
    assert x.grad.tolist() == [0.5] * 7 + [0.0]
    low = torch.zeros(1, 1, 1, 1, requires_grad=True)
    for bias, expected in ((-256, 0.5), (-257, 0.5), (-258, 0.0)):
        layer = shift(bias, Quantization(0.5, 0), effective=0.5)
        (gradient,) = torch.autograd.grad(layer(low).sum(), low)
        assert layer(low).item() == -128
        assert gradient.item() == expected


@pytest.mark.parametrize("effective", [1e-30, 1e30])
def test_a_gradient_through_an_extreme_scale_is_finite(effective):
    layer = shift(1, Quantization(0.5, 0), effective)
    x = torch.zeros(1, 1, 1, 1, requires_grad=True)
    layer(x).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, layer.weight, layer.bias))
    assert layer(x).item() == (127 if effective > 1 else 0)


@st.composite
def summands(draw):
    first, second, output = (draw(quantizations) for _ in range(3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = zip(limits(first), limits(second), strict=True)
    a, b = random.integers(np.array(low)[:, None], np.array(high)[:, None] + 1, (2, 300)).astype(np.float32)
    return first, second, output, a, b


@settings(max_examples=100, deadline=None)
@given(summands())
def test_an_addition_rescales_rounds_and_saturates(case):
    first, second, output, a, b = case
    ratios = [np.float32(quantization.scale / output.scale) for quantization in (first, second)]
    rounded = np.rint(a * ratios[0] + b * ratios[1])
    assert rounded.dtype == np.float32
    leaves = [torch.from_numpy(array).view(3, 4, 5, 5).requires_grad_() for array in (a, b)]
    y = QuantizedAddition(first, second, output)(*leaves)
    low, high = limits(output)
    assert np.array_equal(y.detach().numpy().flatten(), rounded.clip(low, high))
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(y, leaves, gradient)
    passing = (rounded >= low) & (rounded <= high)
    for of_summand, ratio in zip(found, ratios, strict=True):
        expected = gradient.numpy().flatten() * passing * ratio
        np.testing.assert_allclose(of_summand.numpy().flatten(), expected, rtol=1e-6)


def test_an_addition_passes_the_gradient_at_the_limits_and_not_beyond():
    same = Quantization(1.0, 0)
    a = torch.tensor([100.0, 100, 100, -100, -100, -100], requires_grad=True)
    b = torch.tensor([26.0, 27, 28, -27, -28, -29], requires_grad=True)
    y = QuantizedAddition(same, same, same)(a, b)
    y.sum().backward()
    assert y.tolist() == [126, 127, 127, -127, -128, -128]
    assert a.grad.tolist() == b.grad.tolist() == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_an_addition_of_which_one_side_is_frozen(needed):
    same = Quantization(1.0, 0)
    leaves = [torch.full((2,), 70.0, requires_grad=needs) for needs in needed]
    with torch.no_grad():
        leaves[0][0] = 3
    QuantizedAddition(same, same, same)(*leaves).sum().backward()
    for leaf, needs in zip(leaves, needed, strict=True):
        assert (leaf.grad.tolist() == [1, 0]) if needs else (leaf.grad is None)


@settings(max_examples=100, deadline=None)
@given(quantizations, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_a_mean_is_rounded_with_its_zero_point(quantization, height, width, seed):
    low, high = limits(quantization)
    x = np.random.default_rng(seed).integers(low, high + 1, (2, 5, height, width))
    x[0, :, 0, 0] = np.arange(5) + low  # many means near one another: halves come up
    x[0, :, 1:, 1:] = low
    found = QuantizedMean(quantization)(torch.from_numpy(x).float())
    zero_point = quantization.zero_point
    rounded = [
        [round(Fraction(int(x[n, c].sum()), height * width) + zero_point) - zero_point for c in range(5)]
        for n in range(2)
    ]
    assert found.shape == (2, 5)
    assert np.array_equal(found.numpy(), np.float32(rounded) * np.float32(quantization.scale))


@pytest.mark.parametrize(("zero_point", "expected"), [(0, [0, 2, 2]), (1, [1, 1, 3]), (-127, [1, 1, 3])])
def test_halves_of_a_mean_are_rounded_to_even_with_the_zero_point(zero_point, expected):
    x = torch.tensor([[0.0, 1], [1, 2], [2, 3]]).view(1, 3, 1, 2)
    assert QuantizedMean(Quantization(1.0, zero_point))(x).tolist() == [expected]


def test_the_gradient_of_a_mean_is_spread_evenly():
    x = torch.randint(0, 255, (2, 3, 4, 5)).float().requires_grad_()
    gradient = torch.randn(2, 3)
    QuantizedMean(Quantization(0.25, -128))(x).backward(gradient)
    expected = gradient[:, :, None, None].double() * 0.25 / 20
    torch.testing.assert_close(x.grad.double(), expected.expand(2, 3, 4, 5), rtol=1e-6, atol=0)


@settings(max_examples=100, deadline=None)
@given(quantizations, st.integers(0, 2**32))
def test_an_input_is_rounded_and_limited(quantization, seed):
    low, high = limits(quantization)
    scale = np.float32(quantization.scale)
    x = np.random.default_rng(seed).uniform(1.1 * low - 3, 1.1 * high + 3, (2, 3, 4, 5)).astype(np.float32) * scale
    found = QuantizedInput(quantization)(torch.from_numpy(x))
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), np.rint(x / scale).clip(low, high))
    codes = torch.arange(float(low), high + 1)
    assert torch.equal(QuantizedInput(quantization)(codes * quantization.scale), codes)


def test_an_input_far_outside_saturates():
    layer = QuantizedInput(Quantization(1 / 127.5, 0))
    assert layer(torch.tensor([1e30, -1e30, float("inf"), float("-inf")])).tolist() == [127, -128, 127, -128]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 600), st.integers(1, 20), quantizations, quantizations, st.integers(0, 2**32))
def test_an_int8_classifier_is_the_kernel_on_the_means_integers(features, classes, read, written, seed):
    random = np.random.default_rng(seed)
    low, high = limits(read)
    x = random.integers(low, high + 1, (3, features))
    weight = random.integers(-128, 128, (classes, features))
    bias = random.integers(-(2**20), 2**20, classes)
    ratio = read.scale / written.scale
    weight_scales = (10 ** random.uniform(-6, -2, classes) / ratio).astype(np.float32)
    layer = QuantizedLinear(QuantizedClassifier(features, classes, read, written))
    tensors = {"weight": weight, "bias": bias, "weight_scales": weight_scales}
    layer.load_state_dict({name: torch.from_numpy(array).float() for name, array in tensors.items()})

    effective = (weight_scales.astype(np.float64) * ratio).astype(np.float32)
    codes = np.rint((x @ weight.T + bias).astype(np.float32) * effective).clip(*limits(written))
    found = layer(torch.from_numpy(x).float() * read.scale)
    assert np.array_equal(found.detach().numpy(), codes * np.float32(written.scale))


def test_sums_of_an_int8_classifier_beyond_24_bits_are_exact():
    """As many features as a MobileNetV2 of width 1 has; the bias brings the sums back to where a unit shows."""
    read, written = Quantization(0.5, -128), Quantization(0.5, 0)
    layer = QuantizedLinear(QuantizedClassifier(1280, 2, read, written))
    weight = torch.full((2, 1280), 127.0)
    weight[:, 0] = 1
    bias = torch.full((2,), -1279.0 * 127 * 255 - 1)  # an even number, as float32 holds it in this range
    layer.load_state_dict({"weight": weight, "bias": bias, "weight_scales": torch.ones(2)})
    x = torch.full((100, 1280), 255.0)
    x[:, 0] = torch.arange(100)
    assert (layer(x * 0.5) / 0.5)[:, 0].tolist() == list(range(-1, 99))
