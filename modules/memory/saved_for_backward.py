"""What PyTorch really keeps for the backward pass, measured."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def measure_saved_bytes(network: nn.Module, samples: Tensor) -> int:
    """Bytes that autograd saves in ``network(samples)``: unique storages, parameters not counted.

    Args:
        network: In the mode and with the gradient flags that it trains with.
        samples: A batch (N, channels, height, width); divide by N for autograd bytes per sample.

    Example::

        measure_saved_bytes(torchvision.models.resnet18(), torch.zeros(2, 3, 64, 64)) // 2
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved: dict[int, Tensor] = {}  # the tensor is kept, since a storage's address is its identity only while it lives

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        network(samples)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in parameters)
