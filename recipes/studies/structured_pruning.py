"""Which channels of a network go together, how much each such unit matters, and a smaller network without some.

A *unit* is what can be removed at once: one channel of a group that torch-pruning finds (DepGraph, Fang et al. 2023,
arXiv:2301.12900). In MobileNetV2 an expanded channel is an output of the expanding convolution, the depthwise channel
and an input of the projecting one; a channel of the residual stream is an output of every projection that is added to
it, and an input of every convolution that reads it.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args
from zlib import crc32

import torch
from torch import Tensor, nn

from microtune.modules.networks.operations import Convolution, NetworkOperations
from microtune.modules.sparse_update.channel_importance import ChannelImportance, measure_importance
from microtune.modules.user_error import UserError

PruningCriterion = Literal["contribution", "magnitude", "taylor", "fisher", "activation_norm", "random"]
GroupKind = Literal["expanded", "residual_stream"]


@dataclass(frozen=True)
class ChannelGroup:
    """Layers whose channels of the same number are removed together.

    Args:
        name: The first layer that computes its channels.
        channels: How many units it has.
        writers: Convolutions whose outputs they are, in forward order.
        depthwise: Depthwise convolutions that they pass.
        readers: Convolutions, and perhaps the classifier, whose inputs they are.

    Example::

        find_groups(mobilenet_v2(0.35), (3, 96, 96))[0].depthwise  # ("features.1.conv.0.0",)
    """

    name: str
    channels: int
    writers: tuple[str, ...]
    depthwise: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def kind(self) -> GroupKind:
        """Expanded channels pass a depthwise convolution; all others are of the residual stream."""
        return "expanded" if self.depthwise else "residual_stream"


def find_groups(network: nn.Module, input_shape: tuple[int, int, int]) -> list[ChannelGroup]:
    """The groups of a network, in forward order; the classes and the input's channels are in none.

    Args:
        network: Any whose convolutions are dense or depthwise, such as a folded MobileNetV2; it is left as it is.
        input_shape: Channels, height and width of a sample.

    Raises:
        UserError: torch-pruning is not installed, or channels of two layers of a group have other numbers.

    Example::

        groups = find_groups(network, (3, 96, 96))
        sum(group.channels for group in groups)  # all units
    """
    return [group for group, _ in _Dependencies(network, input_shape).groups]


def measure_units(
    network: nn.Module, operations: NetworkOperations, batches: Iterable[tuple[Tensor, Tensor]]
) -> ChannelImportance:
    """Scores of all input channels, those of the classifier too, which reads its features as a 1x1 convolution would.

    Args:
        network: Without batch norm; it is left as it is.
        operations: Of the network.
        batches: Training samples (N, C, H, W) and labels (N,).

    Raises:
        UserError: As ``measure_importance``.

    Example::

        measure_units(network, operations, batches).scores("taylor")["classifier.1"].shape  # (features,)
    """
    measured = copy.deepcopy(network)
    name = operations.classifier_name
    linear = measured.get_submodule(name)
    convolution = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
    convolution.load_state_dict({key: value.reshape(convolution.state_dict()[key].shape)
                                 for key, value in linear.state_dict().items()})  # fmt: skip
    convolution.to(linear.weight)
    measured.set_submodule(name, nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), convolution, nn.Flatten()))
    inside, one = f"{name}.1", (1, 1)
    as_convolution = Convolution(
        inside, linear.in_features, linear.out_features, one, one, 1, one, one, one, linear.bias is not None
    )
    importance = measure_importance(measured, [*operations.convolutions, as_convolution], batches)
    layers = {name if layer == inside else layer: of_layer for layer, of_layer in importance.layers.items()}
    return ChannelImportance(layers, importance.samples)


def unit_scores(
    network: nn.Module,
    input_shape: tuple[int, int, int],
    criterion: PruningCriterion,
    importance: ChannelImportance | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A score for each unit of each group, by the group's name, of shape (channels,): the lowest go first.

    - ``contribution``: ``loss_decrease`` of the unit's weights, what one SGD step on them would bring to first order.
    - ``taylor``, ``fisher``: as ``ChannelImportance.scores`` has them.
    - ``activation_norm``: root of the sum of the squares, divided by its mean over the group.
    - ``magnitude``: ``GroupMagnitudeImportance`` of torch-pruning with its defaults: the squared L2 norms of the
      unit's weights in the dense layers that write or read it, their mean over the layers divided by its mean over
      the group (Fang et al. 2023, section 3.4).
    - ``random``: drawn evenly from [0, 1), a function of the group's name and the seed alone.

    The data's criteria are sums over the layers that read the unit and over its depthwise weights, whose input
    channels have the scores. Contribution, Taylor and Fisher are of the loss, and compare across layers as they are;
    norms do not, and are divided by the mean of their group, as the literature does.

    Args:
        network: Without batch norm.
        input_shape: Channels, height and width of a sample.
        criterion: Which one.
        importance: From ``measure_units``; needed for all but ``magnitude`` and ``random``.
        seed: Of ``random``.

    Raises:
        UserError: The criterion is unknown.

    Example::

        unit_scores(network, (3, 96, 96), "magnitude")["features.17.conv.0.0"].shape  # (336,)
    """
    check_criterion(criterion)
    dependencies = _Dependencies(network, input_shape)
    if criterion == "magnitude":
        magnitude = dependencies.library.importance.GroupMagnitudeImportance()
        return {group.name: magnitude(found).double().cpu() for group, found in dependencies.groups}
    if criterion == "random":
        return {group.name: _random_scores(group, seed) for group, _ in dependencies.groups}
    return {group.name: _summed_scores(group, criterion, importance) for group, _ in dependencies.groups}


def check_criterion(criterion: str) -> None:
    """Raises ``UserError`` unless it is a ``PruningCriterion``."""
    if criterion not in get_args(PruningCriterion):
        raise UserError(f"criterion {criterion!r} is unknown: give some of {', '.join(get_args(PruningCriterion))}")


def _random_scores(group: ChannelGroup, seed: int) -> Tensor:
    # PyTorch's generator for the CPU reads only the lower 32 bits of its seed
    generator = torch.Generator().manual_seed(crc32(f"{group.name} {seed}".encode()))
    return torch.rand(group.channels, generator=generator, dtype=torch.float64)


def _summed_scores(group: ChannelGroup, criterion: PruningCriterion, importance: ChannelImportance) -> Tensor:
    layers = [importance.layers[name] for name in (*group.depthwise, *group.readers)]
    if criterion == "activation_norm":
        norms = sum(layer.activation for layer in layers).sqrt()
        return norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)
    attribute = "loss_decrease" if criterion == "contribution" else criterion
    return sum(getattr(layer, attribute) for layer in layers)


def pruned_multiply_accumulates(
    operations: NetworkOperations, groups: Sequence[ChannelGroup], kept: Mapping[str, int]
) -> int:
    """Multiply-accumulates of a forward pass where each group keeps so many channels.

    Args:
        operations: Of the network before.
        groups: Its groups.
        kept: Channels that stay, by the group's name.

    Example::

        pruned_multiply_accumulates(operations, groups, {group.name: group.channels // 2 for group in groups})
    """
    inputs = {layer: kept[group.name] for group in groups for layer in group.readers}
    outputs = {layer: kept[group.name] for group in groups for layer in (*group.writers, *group.depthwise)}
    total = 0
    for convolution in operations.convolutions:
        out = outputs.get(convolution.name, convolution.out_channels)
        read = 1 if convolution.is_depthwise else inputs.get(convolution.name, convolution.in_channels)
        kernel, plane = convolution.kernel_size, convolution.out_size
        total += out * read * kernel[0] * kernel[1] * plane[0] * plane[1]
    features = inputs.get(operations.classifier_name, operations.classifier_features)
    return total + features * operations.classifier_classes


def units_to_remove(
    operations: NetworkOperations,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    sparsity: float,
    channel_multiple: int = 1,
) -> dict[str, list[int]]:
    """The units with the lowest scores of the whole network, as few as remove a part of its multiply-accumulates.

    Args:
        operations: Of the network.
        groups: Its groups.
        scores: Of each group's units, from ``unit_scores``.
        sparsity: The part of the multiply-accumulates to remove, above 0 and below 1.
        channel_multiple: Each group keeps a multiple of it, or all, and at least once.

    Returns:
        The channels to remove of each group, sorted, by the group's name.

    Raises:
        UserError: An argument is out of its range, or what must stay takes more than that.

    Example::

        remove_units(network, (3, 96, 96), units_to_remove(operations, groups, scores, sparsity=0.3))
    """
    if not 0 < sparsity < 1:
        raise UserError(f"sparsity is {sparsity}: give the part of multiply-accumulates to remove, above 0 and below 1")
    if channel_multiple < 1:
        raise UserError(f"channel_multiple is {channel_multiple}: give 1 or more")
    orders = {group.name: scores[group.name].sort(stable=True).indices.tolist() for group in groups}
    of_units = torch.tensor([index for index, group in enumerate(groups) for _ in range(group.channels)])
    of_units = of_units[torch.cat([scores[group.name] for group in groups]).sort(stable=True).indices]

    def kept(units: int) -> dict[str, int]:
        gone = torch.bincount(of_units[:units], minlength=len(groups)).tolist()
        return {
            group.name: _rounded_up(group.channels - count, channel_multiple, group.channels)
            for group, count in zip(groups, gone, strict=True)
        }

    whole = pruned_multiply_accumulates(operations, groups, kept(0))
    units = _first_that(
        lambda count: pruned_multiply_accumulates(operations, groups, kept(count)) <= (1 - sparsity) * whole,
        len(of_units),
    )
    if units is None:
        most = 1 - pruned_multiply_accumulates(operations, groups, kept(len(of_units))) / whole
        raise UserError(
            f"sparsity {sparsity:g} would leave a layer without {channel_multiple} channels: give at most {most:.3f}"
        )
    left = kept(units)
    return {group.name: sorted(orders[group.name][: group.channels - left[group.name]]) for group in groups}


def _rounded_up(channels: int, multiple: int, most: int) -> int:
    return min(most, max(multiple, -(-channels // multiple) * multiple))


def _first_that(holds: Any, most: int) -> int | None:
    """The smallest number up to ``most`` for which a condition holds that stays true once it is; None if none."""
    if not holds(most):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def remove_units(
    network: nn.Module, input_shape: tuple[int, int, int], removed: Mapping[str, Sequence[int]]
) -> nn.Module:
    """A copy of the network without some units: its tensors are smaller.

    Args:
        network: Without batch norm; it is left as it is.
        input_shape: Channels, height and width of a sample.
        removed: Channels of each group, by the group's name; JSON keeps them, and makes the same network again.

    Raises:
        UserError: A group or channel is unknown, or a group would keep no channel.

    Example::

        smaller = remove_units(network, (3, 96, 96), json.loads(path.read_text()))
    """
    dependencies = _Dependencies(network, input_shape)
    groups = {group.name: group for group, _ in dependencies.groups}
    for name, channels in removed.items():
        if name not in groups:
            raise UserError(f"{name} begins no group of channels: give one of {', '.join(groups)}")
        count = groups[name].channels
        if not set(channels) <= set(range(count)) or len(set(channels)) == count:
            raise UserError(f"channels {list(channels)} of {name} cannot be removed: give some of 0 to {count - 1}")
    smaller = dependencies.network
    for name, channels in removed.items():
        if channels:
            remove = dependencies.library.prune_conv_out_channels
            root = smaller.get_submodule(name)
            dependencies.graph.get_pruning_group(root, remove, sorted(set(channels))).prune()
    return smaller.train(network.training)


@contextmanager
def without_unit(network: nn.Module, group: ChannelGroup, channel: int) -> Iterator[None]:
    """In the block no layer reads the unit, so that the network computes what it would if the unit were removed.

    Args:
        network: With all of the group's readers; in the block their weights for the unit are zero.
        group: Of the unit.
        channel: Its number.

    Example::

        with without_unit(network, group, 3), torch.no_grad():
            logits = network(samples)
    """
    weights = [network.get_submodule(name).weight.detach() for name in group.readers]
    before = [weight[:, channel].clone() for weight in weights]
    for weight in weights:
        weight[:, channel] = 0
    try:
        yield
    finally:
        for weight, values in zip(weights, before, strict=True):
            weight[:, channel] = values


class _Dependencies:
    """torch-pruning's graph of a copy of the network, and its groups by their names, in forward order."""

    def __init__(self, network: nn.Module, input_shape: tuple[int, int, int]):
        self.library = _torch_pruning()
        # it finds out by autograd what reads what, and leaves the network in evaluation mode
        self.network = copy.deepcopy(network).requires_grad_(True)
        self.names = {module: name for name, module in self.network.named_modules()}
        parameter = next(self.network.parameters())
        sample = torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device)
        with torch.enable_grad():
            # of a bare tensor it would try the samples one by one first, and take every layer as called twice
            self.graph = self.library.DependencyGraph().build_dependency(self.network, (sample,), verbose=False)
        linears = [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        found = self.graph.get_all_groups(ignored_layers=linears[-1:], root_module_types=(nn.Conv2d, nn.Linear))
        self.groups = sorted(
            ((self._described(group), group) for group in found), key=lambda pair: self._place(pair[0])
        )

    def _place(self, group: ChannelGroup) -> int:
        return list(self.names.values()).index(group.name)

    def _described(self, found: Any) -> ChannelGroup:
        writers, depthwise, readers = [], [], []
        channels = len(found[0].idxs)
        for dependency, indexes in found:
            module = dependency.target.module
            if module not in self.names:
                continue  # an operation without weights
            name = self.names[module]
            if list(indexes) != list(range(channels)):
                raise UserError(
                    f"channel numbers of {name} are not those of {self.names[found[0].dep.target.module]}, from which "
                    "they come through a concatenation or a flattened map: give a network without, such as MobileNetV2"
                )
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                if not module.groups == module.in_channels == module.out_channels:
                    raise UserError(f"{name} has {module.groups} groups of channels: give dense or depthwise ones")
                depthwise.append(name)
            elif self.graph.is_out_channel_pruning_fn(dependency.handler):
                writers.append(name)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                readers.append(name)
        order = list(self.names.values()).index
        writers, depthwise, readers = (tuple(sorted(layers, key=order)) for layers in (writers, depthwise, readers))
        return ChannelGroup((writers + depthwise)[0], channels, writers, depthwise, readers)


def _torch_pruning() -> ModuleType:
    try:
        import torch_pruning  # an extra: who prunes nothing needs none of it
    except ImportError as error:
        raise UserError(
            "pruning needs the package torch-pruning: uv sync --extra prune, or pip install 'microtune[prune]'"
        ) from error
    return torch_pruning
