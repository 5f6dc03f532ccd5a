"""Layers whose backward pass computes and stores only what an update scheme updates."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from microtune.modules.int8.layers import QuantizedConv2d, saturate, where_not
from microtune.modules.user_error import UserError


def by_input_channel(weight: Tensor, groups: int) -> Tensor:
    """A convolution's weight with its input channels first, as a view.

    Args:
        weight: Of shape (out, in / groups, kernel height, kernel width).
        groups: Of the convolution.

    Returns:
        A view of shape (groups, in / groups, out / groups, kernel height, kernel width): input channel ``c`` is at
        ``[c // (in / groups), c % (in / groups)]``.
    """
    out_channels, group_channels, *kernel = weight.shape
    return weight.view(groups, out_channels // groups, group_channels, *kernel).transpose(1, 2)


def has_subtensor_version(convolution: nn.Conv2d) -> bool:
    """Whether ``SubTensorConv2d`` computes what this convolution computes; it would not call a user's hooks."""
    plain = type(convolution) in (nn.Conv2d, QuantizedConv2d) and convolution.padding_mode == "zeros"
    hooks = (
        convolution._forward_hooks,
        convolution._forward_pre_hooks,
        convolution._backward_hooks,
        convolution._backward_pre_hooks,
    )
    return plain and not isinstance(convolution.padding, str) and not any(hooks)


class SubTensorConv2d(nn.Module):
    """A convolution of which some input channels of the weight, or none, and perhaps the bias are trained.

    Nothing of the input is stored for backward but the ``k`` channels whose weights are trained, and only that slice
    of the weight gradient is computed (Lin et al. 2022, section 2.2). The slice is a parameter of its own, so that
    gradient and optimizer state have its size; ``state_dict`` holds the plain ``weight`` and ``bias`` of ``nn.Conv2d``.
    Of an int8 convolution, what is stored are the int8 integers and where the output saturated.

    Args:
        convolution: What to replace; its parameters are taken over, not copied. ``has_subtensor_version`` must hold.
        channels: Indexes of the k input channels whose weights are trained; none by default.
        train_bias: Whether the bias is trained.

    Example::

        layer = SubTensorConv2d(nn.Conv2d(16, 32, 1), channels=[3, 5], train_bias=True)
        layer.weight_slice.shape  # (2, 32, 1, 1): channels, outputs per group, kernel
    """

    def __init__(self, convolution: nn.Conv2d, channels: list[int] | None = None, train_bias: bool = False):
        super().__init__()
        self.stride, self.padding, self.dilation = convolution.stride, convolution.padding, convolution.dilation
        self.groups = convolution.groups
        self.convolution = [convolution]  # in a list, so that it is no submodule with parameters of its own
        self.weight = convolution.weight.requires_grad_(False)
        self.bias = convolution.bias
        if self.bias is not None:
            self.bias.requires_grad_(train_bias)
        # the scales of an int8 convolution, to be saved and moved like any
        for name, buffer in convolution.named_buffers():
            self.register_buffer(name, buffer, persistent=name not in convolution._non_persistent_buffers_set)
        self.weight_slice: nn.Parameter | None = None
        self.set_channels(channels or [])
        self.register_state_dict_post_hook(_drop_slice)
        self.register_load_state_dict_pre_hook(_take_slice)
        self.register_load_state_dict_post_hook(_after_loading)

    def set_channels(self, channels: list[int]) -> None:
        """Takes other channels to be trained, with the weights they have now; the parameter is a new one."""
        if self.weight_slice is not None:
            self.write_slice()
        self._set_indexes(channels)
        self.weight_slice = nn.Parameter(self._read_slice(self.weight)) if channels else None

    def move_channels(self, channels: list[int]) -> None:
        """Takes other channels to be trained, as many as now, with the weights they have now.

        The parameter is the same one, which an optimizer and DDP go on holding, with other rows: the channels, sorted.

        Args:
            channels: Indexes of the input channels.

        Raises:
            UserError: They are not as many as now.

        Example::

            layer = SubTensorConv2d(nn.Conv2d(16, 32, 1), channels=[3, 5])
            layer.move_channels([4, 5])
        """
        if len(set(channels)) != len(self.channels):
            raise UserError(
                f"{len(set(channels))} channels cannot take the place of {len(self.channels)}, whose number a move "
                "keeps: give as many"
            )
        self.write_slice()
        self._set_indexes(sorted(channels))
        if self.weight_slice is not None:
            with torch.no_grad():
                self.weight_slice.copy_(self._read_slice(self.weight))

    def _set_indexes(self, channels: list[int]) -> None:
        self.channels = list(channels)
        index = torch.tensor(self.channels, dtype=torch.long, device=self.weight.device)
        group_channels = self.weight.shape[1]
        # no buffers: weight averaging averages those, and an average of whole numbers is cut to another index
        self.channel_index = index
        self.group_index = index // group_channels
        self.index_in_group = index % group_channels

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "SubTensorConv2d":
        """Moves the indexes too where the layer moves to another device."""
        for name in ("channel_index", "group_index", "index_in_group"):
            setattr(self, name, function(getattr(self, name)))
        super()._apply(function, recurse)
        for name, buffer in self.named_buffers():
            setattr(self.convolution[0], name, buffer)
        return self

    def _read_slice(self, weight: Tensor) -> Tensor:
        return by_input_channel(weight.detach(), self.groups)[self.group_index, self.index_in_group]

    def write_slice(self) -> None:
        """Writes the trained slice into the full weight."""
        if self.weight_slice is not None:
            weight = by_input_channel(self.weight.detach(), self.groups)
            weight[self.group_index, self.index_in_group] = self.weight_slice.detach()

    def plain(self) -> nn.Conv2d:
        """The ``nn.Conv2d`` that this layer replaced, with the weights trained."""
        self.write_slice()
        convolution = self.convolution[0]
        convolution.weight, convolution.bias = self.weight, self.bias
        return convolution

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (N, in, H, W), to (N, out, H', W')."""
        self.write_slice()
        bias_needs_gradient = self.bias is not None and self.bias.requires_grad
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or self.channels or bias_needs_gradient)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        convolution = self.convolution[0]
        if isinstance(convolution, QuantizedConv2d):
            if not needs_gradient:
                return convolution.saturated(x, self.weight, self.bias)
            return _SubTensorQuantizedConvolution.apply(
                x, self.weight_slice, self.bias, self.weight.detach(), self.channels, self.channel_index, convolution
            )
        if not needs_gradient:
            return F.conv2d(x, self.weight, self.bias, *settings)
        return _SubTensorConvolution.apply(
            x, self.weight_slice, self.bias, self.weight.detach(), self.channels, self.channel_index, settings
        )

    def extra_repr(self) -> str:
        """For ``print(network)``."""
        return f"updated_channels={len(self.channels)} of {self.weight.shape[1] * self.groups}, " + ", ".join(
            f"{name}={getattr(self, name)}" for name in ("stride", "padding", "groups")
        )


def _drop_slice(layer: SubTensorConv2d, state: dict[str, Tensor], prefix: str, _) -> None:
    layer.write_slice()
    state.pop(prefix + "weight_slice", None)


def _after_loading(layer: SubTensorConv2d, _) -> None:
    if isinstance(layer.convolution[0], QuantizedConv2d):
        layer.convolution[0].scales_changed()


def _take_slice(layer: SubTensorConv2d, state: dict[str, Tensor], prefix: str, *_) -> None:
    if layer.weight_slice is not None and prefix + "weight" in state:
        state[prefix + "weight_slice"] = layer._read_slice(state[prefix + "weight"].to(layer.weight.device))


class _SubTensorConvolution(torch.autograd.Function):
    """``conv2d`` that keeps for backward the channels in ``channels`` of its input, and nothing else."""

    @staticmethod
    def forward(ctx, x, weight_slice, bias, weight, channels, channel_index, settings):
        output = F.conv2d(x, weight, bias, *settings)
        ctx.settings, ctx.channels, ctx.input_shape = settings, channels, x.shape
        # autocast may compute in a lower precision than the input has: then that is enough for backward too
        kept = x.index_select(1, channel_index).to(output.dtype) if channels else None
        # the full weight is no part of the graph; the slice is saved so that autograd sees a step taken in between
        ctx.weight = weight
        ctx.save_for_backward(kept, weight_slice)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        kept, weight_slice = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_input = grad_slice = grad_bias = None
        if wanted[0]:
            grad_input = _input_gradient(ctx.input_shape, ctx.weight.to(gradient.dtype), gradient, ctx.settings)
        if wanted[1]:
            grad_slice = _slice_gradient(kept, gradient, ctx.channels, ctx.weight.shape, ctx.settings)
            grad_slice = grad_slice.to(weight_slice.dtype)
        if wanted[2]:
            grad_bias = gradient.sum((0, 2, 3), dtype=ctx.weight.dtype)
        return grad_input, grad_slice, grad_bias, None, None, None, None


class _SubTensorQuantizedConvolution(torch.autograd.Function):
    """An int8 convolution that keeps for backward, as int8, the channels in ``channels`` of its input, and a mask."""

    @staticmethod
    def forward(ctx, x, weight_slice, bias, weight, channels, channel_index, layer):
        output, saturated = saturate(layer.rounded(x, weight.round(), bias.round()), layer.low, layer.high)
        kept = None
        if channels:
            kept = x if channels == list(range(x.shape[1])) else x.index_select(1, channel_index)
            kept = (kept + layer.description.input.zero_point).to(torch.int8)
        ctx.channels, ctx.layer, ctx.weight, ctx.input_shape = channels, layer, weight, x.shape
        ctx.save_for_backward(kept, weight_slice, saturated)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        kept, _, saturated = ctx.saved_tensors
        layer, wanted = ctx.layer, ctx.needs_input_grad
        settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
        scale = layer.effective_scale.flatten()
        gradient = where_not(saturated, gradient)
        grad_input = grad_slice = grad_bias = None
        if wanted[0]:
            left, right, top, bottom = layer.outer_padding or (0, 0, 0, 0)
            count, channels, height, width = ctx.input_shape
            shape = (count, channels, height + top + bottom, width + left + right)
            # rounded once more: a rounded copy would be kept for every layer
            grad_input = _input_gradient(shape, ctx.weight.round() * scale.view(-1, 1, 1, 1), gradient, settings)
            grad_input = (
                grad_input[:, :, top : top + height, left : left + width] if layer.outer_padding else grad_input
            )
        if wanted[1]:
            kept = layer.padded(kept.to(gradient.dtype).sub_(layer.description.input.zero_point))
            grad_slice = _slice_gradient(kept, gradient, ctx.channels, ctx.weight.shape, settings)
            grad_slice *= layer.of_slice(scale, ctx.channels)
        if wanted[2]:
            grad_bias = gradient.sum((0, 2, 3)) * scale
        return grad_input, grad_slice, grad_bias, None, None, None, None


def _input_gradient(input_shape: torch.Size, weight: Tensor, gradient: Tensor, settings: tuple) -> Tensor:
    """Gradient of a convolution's input (N, in, H, W), in the memory order of the output's gradient.

    ``torch.nn.grad.conv2d_input`` goes by a stand-in for the input that has no order, and so leaves ``channels_last``:
    two to ten times slower on a CPU.
    """
    stride, padding, dilation, groups = settings
    is_channels_last = gradient.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if is_channels_last else torch.contiguous_format
    like = torch.empty(input_shape, dtype=gradient.dtype, device=gradient.device, memory_format=order)
    return torch.ops.aten.convolution_backward(
        gradient, like, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )[0]


def _slice_gradient(kept: Tensor, gradient: Tensor, channels: list[int], weight_shape, settings) -> Tensor:
    """Gradient of the slice, (k, out / groups, kernel height, kernel width), from k channels of the input."""
    stride, padding, dilation, groups = settings
    out_channels, group_channels, *kernel = weight_shape
    group_outputs = out_channels // groups
    if groups == 1:
        shape = (out_channels, len(channels), *kernel)
        return conv2d_weight(kept, shape, gradient, stride, padding, dilation).transpose(0, 1)
    if group_channels == 1:
        shape = (len(channels) * group_outputs, 1, *kernel)
        outputs = gradient.unflatten(1, (groups, group_outputs))[:, channels].flatten(1, 2)
        weight_gradient = conv2d_weight(kept, shape, outputs, stride, padding, dilation, len(channels))
        return weight_gradient.view(len(channels), group_outputs, *kernel)
    result = gradient.new_empty(len(channels), group_outputs, *kernel)
    for group in sorted({channel // group_channels for channel in channels}):
        rows = [row for row, channel in enumerate(channels) if channel // group_channels == group]
        outputs = gradient[:, group * group_outputs : (group + 1) * group_outputs]
        shape = (group_outputs, len(rows), *kernel)
        result[rows] = conv2d_weight(kept[:, rows], shape, outputs, stride, padding, dilation).transpose(0, 1)
    return result


class MaskedReLU(nn.Module):
    """ReLU or ReLU6 that stores one byte per element for backward, a mask, and not a float.

    Args:
        activation: The ``nn.ReLU`` or ``nn.ReLU6`` to replace.

    Example::

        MaskedReLU(nn.ReLU6(inplace=True))
    """

    def __init__(self, activation: nn.ReLU | nn.ReLU6):
        super().__init__()
        self.activation = activation
        self.upper = 6.0 if isinstance(activation, nn.ReLU6) else None

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _MaskedClamp.apply(x, self.upper, self.activation.inplace)
        return self.activation(x)


class _MaskedClamp(torch.autograd.Function):
    """``clamp(x, 0, upper)`` that keeps for backward where the value is strictly inside."""

    @staticmethod
    def forward(ctx, x, upper, inplace):
        if inplace:
            ctx.mark_dirty(x)
            x.clamp_(0, upper)
            output = x  # torch.compile wants the input itself, and breaks its graph at clamp_'s result
        else:
            output = x.clamp(0, upper)
        # not two comparisons and an "and": converting to bool is several times faster than comparing
        ctx.save_for_backward((output if upper is None else (upper - output).mul_(output)).to(torch.bool))
        return output

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        # multiplied as floats: an operation on bool and float together is not vectorized, and 30 times slower
        return mask.view(torch.uint8).to(gradient.dtype).mul_(gradient), None, None
