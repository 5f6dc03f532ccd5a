"""A network cut in two where training begins: what is frozen in all of many trainings, and the rest."""

import copy

import torch
from torch import Tensor, nn

from microtune.modules.int8.network import QuantizedNetwork
from microtune.modules.networks.mobilenet_v2 import MobileNetV2
from microtune.modules.networks.operations import NetworkOperations
from microtune.modules.user_error import UserError


def cut_network(network: nn.Module, operations: NetworkOperations, bias_depth: int) -> tuple[nn.Module, nn.Module]:
    """Cuts a network in front of the block that holds the first of the last ``bias_depth`` convolutions.

    Nothing before that block changes under any scheme of at most this depth, so that what it computes can be kept.

    Args:
        network: Without batch norm; it is copied.
        operations: Of the network.
        bias_depth: The deepest of the trainings to come, 0 or more.

    Returns:
        The trunk, and the rest with the network's own names: ``rest(trunk(x))`` is ``network(x)``, and the same
        schemes apply to the rest.

    Raises:
        UserError: The network is neither a MobileNetV2 nor an int8 network, or has fewer convolutions.

    Example::

        trunk, rest = cut_network(network, find_operations(network, (3, 96, 96)), bias_depth=12)
        rest(trunk(torch.zeros(1, 3, 96, 96)))
    """
    convolutions = operations.convolutions
    if not isinstance(network, MobileNetV2 | QuantizedNetwork):
        raise UserError(f"a {type(network).__name__} cannot be cut in two: give a MobileNetV2")
    if not 0 <= bias_depth <= len(convolutions):
        raise UserError(f"bias depth {bias_depth} is out of its range: give 0 to {len(convolutions)}")
    trunk, rest = copy.deepcopy(network), copy.deepcopy(network)
    first = convolutions[len(convolutions) - bias_depth].name if bias_depth else None
    if isinstance(network, QuantizedNetwork):
        trunk = _cut_quantized(trunk, rest, first)
    else:
        index = len(network.features) if first is None else int(first.split(".")[1])
        # a slice of a Sequential keeps the names of its parts
        trunk, rest.features = trunk.features[:index], rest.features[index:]
    trunk.eval().requires_grad_(False)
    # which is faster, and what ``features_of`` hands on: a network in that order computes the same, to the bit
    return trunk.to(memory_format=torch.channels_last), rest.to(memory_format=torch.channels_last)


def _cut_quantized(trunk: QuantizedNetwork, rest: QuantizedNetwork, first: str | None) -> nn.Module:
    """Takes from ``rest`` all before the block of the first layer that is trained, and gives that of ``trunk``."""
    parts = ["input", "first_conv", "blocks", "feature_mix"]
    # the layer and all behind it stay in the rest; with none, the mean and the classifier alone
    stays = None if first is None else first.split(".")[0]
    before = parts if stays is None else parts[: max(1, parts.index(stays))]
    for name in before:
        setattr(rest, name, nn.Identity())
    modules = [getattr(trunk, name) for name in before]
    if stays == "blocks":
        index = int(first.split(".")[1])
        modules.append(trunk.blocks[:index])
        rest.blocks = rest.blocks[index:]
    return nn.Sequential(*modules)


@torch.no_grad()
def features_of(trunk: nn.Module, samples: Tensor) -> Tensor:
    """What the trunk makes of samples (N, C, H, W): its output, in PyTorch's ``channels_last`` order.

    Example::

        features_of(trunk, torch.zeros(8, 3, 96, 96)).shape  # (8, 16, 12, 12), say
    """
    return trunk(samples.contiguous(memory_format=torch.channels_last))
