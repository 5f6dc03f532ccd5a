"""Layers of an int8 network, in simulation: integers in float tensors, rounded and saturated as an int8 kernel does.

Between layers travel integers *less their zero point*, so that 0 stands for 0: with zero point z they are whole numbers
from -128 - z to 127 - z, and padding with zeros is right. Whole numbers below 2^24 are exact in float32, and so are
their sums, in any order.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microtune.modules.int8.graph import (
    INT8_MAX,
    INT8_MIN,
    Quantization,
    QuantizedClassifier,
    QuantizedConvolution,
)

EXACT = 2**24  # whole numbers up to here are exact in float32
# of a bias: a sum of products more or less does not leave 32 bits, and the number itself is exact in float32
BIAS_LIMIT = 2**31 - 2**24

# Of a layer's median weight scale. What such a channel computes is its bias: its weights, were they all 127, would be
# a hundredth of the others', and a step that is right for those would throw them from one end of int8 to the other.
# In the published MobileNetV2-0.35 31 channels lie below, two a little above, and all others above a tenth.
NEAR_ZERO = 0.01


def integer_range(quantization: Quantization) -> tuple[int, int]:
    """Smallest and largest integer between layers, less the zero point.

    Example::

        integer_range(Quantization(scale=6 / 255, zero_point=-128))  # (0, 255)
    """
    return INT8_MIN - quantization.zero_point, INT8_MAX - quantization.zero_point


def near_zero_scales(scales: Tensor) -> Tensor:
    """Which of a layer's weight scales (out,) are near zero, so that their weights are not trained."""
    return scales < NEAR_ZERO * scales.median()


class QuantizedConv2d(nn.Conv2d):
    """An int8 convolution: ``saturate(round((sum of products + bias) * effective scale))``.

    The effective scale of an output channel is weight scale x input scale / output scale, computed in float64 and
    rounded to float32 once, as a device would hold it. Halves are rounded to the even number, as C's ``rintf`` does.
    The gradient passes straight through rounding and is zero where the output saturated (Lin et al. 2022, section 2.1);
    it is with respect to the integers.

    Args:
        description: Shapes, scales and zero points.

    Attributes:
        weight: Whole numbers from -128 to 127, or what training makes of them before they are rounded.
        bias: Whole numbers of 32 bits, likewise; of one beyond 2^24 float32 holds the first 24 bits.
        weight_scales: Of the output channels.

    Example::

        layer = QuantizedConv2d(graph.first_conv)
        layer(torch.zeros(1, 3, 128, 128)).shape  # (1, 16, 64, 64)
    """

    device_operation = "convolution"
    saturates = True

    def __init__(self, description: QuantizedConvolution):
        left, right, top, bottom = description.padding
        is_symmetric = left == right and top == bottom
        super().__init__(
            description.in_channels,
            description.out_channels,
            description.kernel_size,
            description.stride,
            padding=(top, left) if is_symmetric else 0,
            groups=description.groups,
        )
        self.description = description
        self.outer_padding = None if is_symmetric else description.padding
        self.low, self.high = integer_range(description.output)
        largest_input = max(abs(value) for value in integer_range(description.input))
        largest_sum = math.prod(description.weight_shape[1:]) * -INT8_MIN * largest_input
        self.accumulates_in = torch.float32 if largest_sum <= EXACT else torch.float64
        self.register_buffer("weight_scales", torch.ones(description.out_channels))
        self.register_buffer("effective_scale", torch.ones(1, description.out_channels, 1, 1), persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)

    @torch.no_grad()
    def scales_changed(self) -> None:
        """Takes note of other weight scales than before."""
        ratio = self.description.input.scale / self.description.output.scale
        self.effective_scale.copy_((self.weight_scales.double() * ratio).view(1, -1, 1, 1))

    def padded(self, x: Tensor) -> Tensor:
        """The input with what of its padding ``nn.Conv2d`` cannot do: more behind than before."""
        return x if self.outer_padding is None else F.pad(x, self.outer_padding)

    def rounded(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The output before it saturates: whole numbers, less the zero point.

        Args:
            x: Of shape (N, in, H, W).
            weight: Whole numbers.
            bias: Whole numbers.
        """
        return self._sums(x, weight).add_(bias.view(1, -1, 1, 1)).to(torch.float32).mul_(self.effective_scale).round_()

    def _sums(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sums of products, exact; a device adds its bias and converts the 32-bit integer to float."""
        dtype = self.accumulates_in
        return self._conv_forward(self.padded(x).to(dtype), weight.to(dtype), None)

    def saturated(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The output, without gradients, of a weight and a bias that training may have made no whole numbers."""
        return self.rounded(x, weight.round(), bias.round()).clamp_(self.low, self.high)

    def of_slice(self, per_output: Tensor, channels: list[int]) -> Tensor:
        """Values of the output channels (out,) as they apply to a slice of the weight, by its input channels.

        Args:
            per_output: Of shape (out,).
            channels: The k input channels of the slice, as in ``SubTensorConv2d``.

        Returns:
            Of shape (k, out / groups, 1, 1), or (1, out, 1, 1) where there is one group.
        """
        of_group = per_output.view(self.groups, -1, 1, 1)
        if self.groups == 1:
            return of_group
        group_channels = self.in_channels // self.groups
        return of_group[[channel // group_channels for channel in channels]]

    def forward(self, x: Tensor) -> Tensor:
        """Integers less their zero point, of shape (N, in, H, W), to (N, out, H', W')."""
        if not torch.is_grad_enabled() or not (x.requires_grad or self.weight.requires_grad or self.bias.requires_grad):
            return self.saturated(x, self.weight, self.bias)
        # what autograd makes of it: every gradient, and floats kept for it. Sparse updates use SubTensorConv2d
        weight, bias = straight_through_round(self.weight), straight_through_round(self.bias)
        sums = (self._sums(x, weight) + bias.view(1, -1, 1, 1)).to(torch.float32)
        outputs = straight_through_round(sums * self.effective_scale)
        return _Saturation.apply(outputs, self.low, self.high)


def _after_loading(layer: QuantizedConv2d, _) -> None:
    layer.scales_changed()


class QuantizedAddition(nn.Module):
    """Adds what two layers wrote, each on its own scale, and rounds and saturates the sum.

    For backward it keeps where the sum saturated, one byte each.

    Args:
        first, second: Of what is added.
        output: Of the sum.

    Example::

        QuantizedAddition(block_input, projection, total)(x, y)
    """

    device_operation = "add"
    saturates = True

    def __init__(self, first: Quantization, second: Quantization, output: Quantization):
        super().__init__()
        self.scales = (first.scale / output.scale, second.scale / output.scale)
        self.range = integer_range(output)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Integers less their zero points, both of shape (N, C, H, W)."""
        return _Addition.apply(first, second, self.scales, self.range)


class _Addition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, scales, limits):
        ctx.scales = scales
        # not add(alpha=...), which may be a fused multiply-add, rounded once and not twice, as the processor likes
        rounded = (first * scales[0]).add_(second * scales[1]).round_()
        if not any(ctx.needs_input_grad):
            return rounded.clamp_(*limits)
        output, saturated = saturate(rounded, *limits)
        ctx.save_for_backward(saturated)
        return output

    @staticmethod
    def backward(ctx, gradient):
        (saturated,) = ctx.saved_tensors
        gradient = where_not(saturated, gradient)
        first, second = (gradient * scale for scale in ctx.scales)
        return first, second, None, None


class QuantizedMean(nn.Module):
    """The mean of every feature map, rounded to int8, handed on as real numbers to the classifier.

    Args:
        quantization: Of the feature map and of its mean.

    Example::

        QuantizedMean(graph.classifier.input)(x).shape  # (N, C)
    """

    device_operation = "mean"
    saturates = False

    def __init__(self, quantization: Quantization):
        super().__init__()
        self.quantization = quantization

    def forward(self, x: Tensor) -> Tensor:
        """Integers less their zero point, of shape (N, C, H, W), to real numbers (N, C)."""
        count, zero_point = x.shape[2] * x.shape[3], self.quantization.zero_point
        # a half is rounded to even as the device sees it, with the zero point
        mean = straight_through_round((x.sum((2, 3)) + zero_point * count) / count)
        return (mean - zero_point) * self.quantization.scale


class QuantizedInput(nn.Module):
    """Makes integers of a sample's real numbers; a device is handed them.

    Args:
        quantization: Of the sample.

    Example::

        QuantizedInput(graph.input)(torch.rand(1, 3, 96, 96) * 2 - 1)
    """

    device_operation = "clone"
    saturates = False

    def __init__(self, quantization: Quantization):
        super().__init__()
        self.quantization = quantization

    def forward(self, x: Tensor) -> Tensor:
        """Real numbers to integers less their zero point, of the same shape."""
        return (x / self.quantization.scale).round_().clamp_(*integer_range(self.quantization))


class QuantizedLinear(nn.Module):
    """An int8 classifier, for inference; a device trains one in floating point.

    Args:
        description: Shapes, scales and zero points.

    Example::

        QuantizedLinear(graph.classifier)(features)  # (N, classes): logits in steps of the output's scale
    """

    def __init__(self, description: QuantizedClassifier):
        super().__init__()
        self.in_features, self.out_features = description.features, description.classes
        self.description = description
        self.register_buffer("weight", torch.zeros(description.classes, description.features))
        self.register_buffer("bias", torch.zeros(description.classes))
        self.register_buffer("weight_scales", torch.ones(description.classes))

    def forward(self, features: Tensor) -> Tensor:
        """Real features (N, features) to real logits (N, classes) of 256 values at most."""
        output = self.description.output
        integers = (features / self.description.input.scale).round().double()
        sums = (F.linear(integers, self.weight.double()) + self.bias).float()
        scale = (self.weight_scales.double() * (self.description.input.scale / output.scale)).float()
        return (sums * scale).round_().clamp_(*integer_range(output)) * output.scale


def saturate(rounded: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Limits whole numbers to a range; the second tensor says, as bool, which of them were outside.

    Args:
        rounded: Of any shape; it is written over.
        low: Smallest value.
        high: Largest value.
    """
    output = rounded.clamp(low, high)
    # not a comparison: converting to bool is several times faster
    return output, rounded.sub_(output).to(torch.bool)


class _Saturation(torch.autograd.Function):
    """``clamp`` whose gradient passes at the limits too: there a number is what it would be without them."""

    @staticmethod
    def forward(ctx, x, low, high):
        output, saturated = saturate(x.clone(), low, high)
        ctx.save_for_backward(saturated)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return where_not(ctx.saved_tensors[0], gradient), None, None


def where_not(saturated: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, and zero where ``saturated`` is true."""
    # multiplied as floats: an operation on bool and float together is not vectorized, and 30 times slower
    return (1 - saturated.view(torch.uint8)).to(gradient.dtype).mul_(gradient)


def straight_through_round(x: Tensor) -> Tensor:
    """Rounds, halves to even; the gradient passes as if it had not (Bengio et al. 2013, section 4)."""
    return _StraightThroughRound.apply(x)


class _StraightThroughRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient
