"""The time of one training step by several methods, which take turns."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn

from microtune.modules.int8.stochastic_rounding import IntegerGenerator
from microtune.modules.networks.operations import NetworkOperations
from microtune.modules.sparse_update.channel_choice import choose_channels
from microtune.modules.sparse_update.int8_update import quantized_parameters, round_in_place, scale_gradients
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.update_scheme import UpdateScheme


@dataclass(frozen=True)
class Prepared:
    """A network that trains by one method.

    Args:
        network: A copy, in training mode.
        trained: What the optimizer updates; more may have gradients.
        restore_frozen: What is to be done after each step.
    """

    network: nn.Module
    trained: list[nn.Parameter]
    restore_frozen: Callable[[], None]


def prepared(plain: nn.Module, scheme: UpdateScheme, operations: NetworkOperations, method: str) -> Prepared:
    """A copy of the network that trains by this method.

    Args:
        plain: The network.
        scheme: What is updated, but by ``"full"``.
        operations: Of the network.
        method: ``"full"`` updates everything; ``"published"`` computes every gradient too, then masks and applies those
            of the scheme, as the code of Lin et al. does; ``"freeze"`` computes those of the scheme's whole weights and
            applies them; ``"mask"`` and ``"sub_tensor"`` are those of ``SparseUpdate``.
    """
    network = copy.deepcopy(plain).train()
    if method == "full":
        return Prepared(network, list(network.parameters()), lambda: None)
    channels = choose_channels(network, scheme, operations.convolutions)
    applied = AppliedScheme(network, scheme, operations, channels, "sub_tensor" if method == "sub_tensor" else "mask")
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if method == "published":
        network.requires_grad_(True)
    if method == "freeze":
        applied.remove()
        network.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
    return Prepared(network, trained, (lambda: None) if method == "freeze" else applied.restore_frozen)


def forward_only(network: nn.Module, samples: Tensor) -> None:
    """The forward pass without gradients."""
    with torch.no_grad():
        network(samples)


def training_step(ready: Prepared, samples: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, backward and an SGD step without momentum, ready to be called; of int8 with all that belongs to it."""
    optimizer = torch.optim.SGD(ready.trained, 1e-3)
    trained = {id(parameter) for parameter in ready.trained}
    of_int8 = [one for one in quantized_parameters(ready.network) if id(one.parameter) in trained]
    generator = IntegerGenerator(0)

    def step() -> None:
        ready.network.zero_grad()
        nn.functional.cross_entropy(ready.network(samples), labels).backward()
        scale_gradients(of_int8)
        optimizer.step()
        ready.restore_frozen()
        round_in_place(of_int8, generator)

    return step


def interleaved_seconds(
    steps: dict[str, Callable[[], None]], rounds: int, show_progress: bool
) -> dict[str, list[float]]:
    """Seconds of every step in every round, the methods taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in track(range(rounds + 2), "timing", disable=not show_progress, transient=True):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if index >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds
