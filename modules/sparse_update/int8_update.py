"""What an update of int8 parameters needs around the optimizer's step: other gradients before it, integers after it.

An optimizer in floating point knows nothing of scales. Before its step gradients are scaled
(``microtune.callbacks.int8_training`` has the derivation); after it what it wrote is brought back into the range of
int8 weights and 32-bit biases, and, if there is no room for copies in floating point, rounded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from microtune.modules.int8.graph import INT8_MAX, INT8_MIN
from microtune.modules.int8.layers import BIAS_LIMIT, QuantizedConv2d, near_zero_scales
from microtune.modules.int8.stochastic_rounding import IntegerGenerator, round_stochastically
from microtune.modules.sparse_update.subtensor import SubTensorConv2d

WeightStorage = Literal["latent", "in_place"]


@dataclass(frozen=True)
class QuantizedParameter:
    """A trained parameter of an int8 layer.

    Args:
        layer: Module path inside the network.
        parameter: Its integers, or what training makes of them before they are rounded.
        scale: What a step of one is in real numbers; of a shape that broadcasts with the parameter's.
        limits: Smallest and largest integer.
        near_zero: Where the weight's scale is near zero, likewise; none of a bias.
        near_zero_channels: How many output channels that are.
    """

    layer: str
    parameter: nn.Parameter
    scale: Tensor
    limits: tuple[int, int]
    near_zero: Tensor | None = None
    near_zero_channels: int = 0


def quantized_parameters(network: nn.Module) -> list[QuantizedParameter]:
    """The trained parameters of int8 layers in forward order, of each its weight, then its bias.

    Args:
        network: As it is trained, with its scheme applied.

    Example::

        quantized_parameters(network)[0].layer  # "blocks.8.pointwise2"
    """
    found = []
    for name, module, layer in int8_convolutions(network):
        scales = layer.weight_scales
        near_zero = near_zero_scales(scales)
        if layer is module and module.weight.requires_grad:
            shaped = (values.view(-1, 1, 1, 1) for values in (scales, near_zero))
            found.append(QuantizedParameter(name, module.weight, *_weight(*shaped), int(near_zero.sum())))
        elif layer is not module and module.weight_slice is not None:
            shaped = (layer.of_slice(values, module.channels) for values in (scales, near_zero))
            groups = sorted({channel // module.weight.shape[1] for channel in module.channels})
            count = int(near_zero.view(layer.groups, -1)[groups].sum())
            found.append(QuantizedParameter(name, module.weight_slice, *_weight(*shaped), count))
        if module.bias.requires_grad:
            bias_scale = scales * layer.description.input.scale
            found.append(QuantizedParameter(name, module.bias, bias_scale, (-BIAS_LIMIT, BIAS_LIMIT)))
    return found


def _weight(scale: Tensor, near_zero: Tensor) -> tuple[Tensor, tuple[int, int], Tensor]:
    return scale, (INT8_MIN, INT8_MAX), near_zero


def int8_convolutions(network: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizedConv2d]]:
    """Name of every int8 convolution, the module at that place, and the convolution that it is or trains in part."""
    for name, module in network.named_modules():
        layer = module.convolution[0] if isinstance(module, SubTensorConv2d) else module
        if isinstance(layer, QuantizedConv2d):
            yield name, module, layer


@torch.no_grad()
def scale_gradients(parameters: Sequence[QuantizedParameter]) -> None:
    """Divides every gradient by the square of its parameter's scale; weights on scales near zero get none.

    Example::

        loss.backward()
        scale_gradients(parameters)
        optimizer.step()
    """
    for one in parameters:
        if one.parameter.grad is not None:
            # divided twice: the square of a bias' scale may be too small for float32
            one.parameter.grad.div_(one.scale).div_(one.scale)
            if one.near_zero is not None:
                one.parameter.grad.masked_fill_(one.near_zero, 0)


@torch.no_grad()
def make_whole(network: nn.Module) -> None:
    """Rounds all int8 weights and biases, trained or frozen, to the nearest whole number.

    Example::

        make_whole(network)  # of a checkpoint that was trained with latent weights
    """
    for _, module, _ in int8_convolutions(network):
        for parameter in module.parameters(recurse=False):
            parameter.round_()


@torch.no_grad()
def keep_in_range(parameters: Sequence[QuantizedParameter]) -> None:
    """Limits every parameter to the integers that it can be.

    Example::

        optimizer.step()
        keep_in_range(parameters)
    """
    for one in parameters:
        one.parameter.clamp_(*one.limits)


@torch.no_grad()
def round_in_place(parameters: Sequence[QuantizedParameter], generator: IntegerGenerator) -> None:
    """Makes integers within their limits of every parameter, by stochastic rounding.

    The generator is drawn from in the order of ``parameters`` and of their elements' indexes. A weight on a scale near
    zero is not trained, and drawn for like any other.

    Example::

        optimizer.step()
        round_in_place(parameters, generator)
    """
    for one in parameters:
        one.parameter.copy_(round_stochastically(one.parameter, generator).clamp_(*one.limits))
