"""Which input channels of a layer's weight are updated, where the scheme only says how many."""

from typing import Literal
from zlib import crc32

import torch
from torch import Tensor, nn

from microtune.modules.operations import Convolution
from microtune.modules.subtensor import by_input_channel
from microtune.modules.update_scheme import UpdateScheme

ChannelChoice = Literal["weight_norm", "random"]


def channels_by_weight_norm(weight: Tensor, groups: int, count: int) -> list[int]:
    """The ``count`` input channels with the largest L2 norm of their weights (Lin et al. 2022, section 2.2), sorted.

    Args:
        weight: Of a convolution, of shape (out, in / groups, kernel height, kernel width). Of an int8 one these are
            integers, without their scales, as in the paper's code.
        groups: Of the convolution.
        count: How many; of equal norms the first win.
    """
    norms = by_input_channel(weight.detach(), groups).flatten(2).double().norm(dim=2).flatten()
    return sorted(norms.sort(descending=True, stable=True).indices[:count].tolist())


def channels_at_random(layer: str, in_channels: int, count: int, seed: int) -> list[int]:
    """``count`` input channels drawn evenly, sorted; a function of the layer's name and the seed alone."""
    # PyTorch's generator for the CPU reads only the lower 32 bits of its seed
    generator = torch.Generator().manual_seed(crc32(f"{layer} {seed}".encode()))
    return sorted(torch.randperm(in_channels, generator=generator)[:count].tolist())


def choose_channels(
    network: nn.Module,
    scheme: UpdateScheme,
    convolutions: tuple[Convolution, ...],
    choice: ChannelChoice = "weight_norm",
    seed: int = 0,
) -> dict[str, list[int]]:
    """The updated input channels of every layer of ``scheme.weights``: those that it fixes, else by ``choice``.

    Example::

        choose_channels(network, scheme, find_operations(network, (3, 96, 96)).convolutions, "random", seed=1)
    """
    channels = {}
    for convolution in convolutions:
        count = scheme.updated_channels(convolution)
        if convolution.name in scheme.channels:
            channels[convolution.name] = sorted(scheme.channels[convolution.name])
        elif count and choice == "weight_norm":
            weight = network.get_submodule(convolution.name).weight
            channels[convolution.name] = channels_by_weight_norm(weight, convolution.groups, count)
        elif count:
            channels[convolution.name] = channels_at_random(convolution.name, convolution.in_channels, count, seed)
    return channels
