"""Puts an update scheme into a network, and takes it out again."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from microtune.modules.int8.layers import QuantizedConv2d
from microtune.modules.networks.batch_norm_folding import find_batch_norm
from microtune.modules.networks.operations import Convolution, NetworkOperations
from microtune.modules.sparse_update.subtensor import (
    MaskedReLU,
    SubTensorConv2d,
    by_input_channel,
    has_subtensor_version,
)
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

Method = Literal["sub_tensor", "mask"]


class AppliedScheme:
    """A network that trains only what a scheme updates, until ``remove``.

    With ``"sub_tensor"`` the layers within the bias depth are replaced by ones that compute and store only what is
    updated. With ``"mask"``, the textbook version, the whole weight gradient is computed and masked, and
    ``restore_frozen`` must be called after every optimizer step, since a zero gradient does not keep weight decay or
    leftover momentum from moving an entry. Layers without a sub-tensor version are masked with either.

    Args:
        network: Without batch norm; changed in place.
        scheme: Checked against ``operations``.
        operations: Of this network.
        channels: Updated input channels of every layer of ``scheme.weights``.
        method: ``"sub_tensor"`` or ``"mask"``.

    Attributes:
        masked_layers: Names of the layers whose weight gradient is masked.
        plain_layers: Names of the layers that have no sub-tensor version although one was asked for; PyTorch keeps
            their whole input.

    Raises:
        UserError: The network has batch norm, or the scheme does not suit it.

    Example::

        applied = AppliedScheme(network, scheme, operations, choose_channels(network, scheme, operations.convolutions))
        ...  # train
        applied.remove()
    """

    def __init__(
        self,
        network: nn.Module,
        scheme: UpdateScheme,
        operations: NetworkOperations,
        channels: dict[str, list[int]],
        method: Method = "sub_tensor",
    ):
        refuse_batch_norm(network)
        scheme.check(operations.convolutions)
        updated = operations.convolutions[len(operations.convolutions) - scheme.bias_depth :]
        refuse_computed_weights(network, updated)
        self.network = network
        self.channels = channels
        self.masked_layers: list[str] = []
        self.plain_layers: list[str] = []
        self._masks: dict[str, _GradientMask] = {}
        self._gradient_flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
        for parameter in network.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in network.get_submodule(operations.classifier_name).parameters():
            parameter.requires_grad_(True)
        for convolution in updated:
            self._apply_to_layer(convolution.name, convolution.in_channels, method)
        if method == "sub_tensor":
            for name, module in list(network.named_modules(remove_duplicate=False)):
                if type(module) in (nn.ReLU, nn.ReLU6):
                    network.set_submodule(name, MaskedReLU(module))

    def _apply_to_layer(self, name: str, in_channels: int, method: Method) -> None:
        layer = self.network.get_submodule(name)
        channels = self.channels.get(name, [])
        is_whole = len(channels) == in_channels
        # autograd's own version of a whole update is as good, but not of int8, where it keeps floats
        if (
            method == "sub_tensor"
            and has_subtensor_version(layer)
            and (isinstance(layer, QuantizedConv2d) or not is_whole)
        ):
            replacement = SubTensorConv2d(layer, channels, train_bias=True)
            # a module may be known by several names, and be called by any of them
            for other, module in list(self.network.named_modules(remove_duplicate=False)):
                if module is layer:
                    self.network.set_submodule(other, replacement)
            return
        if method == "sub_tensor" and not is_whole:
            self.plain_layers.append(name)
        if layer.bias is not None:
            layer.bias.requires_grad_(True)
        layer.weight.requires_grad_(bool(channels))
        if channels and not is_whole:
            self.masked_layers.append(name)
            self._masks[name] = _GradientMask(layer, channels)

    def set_channels(self, channels: dict[str, list[int]]) -> None:
        """Takes other channels of the same layers, before an optimizer exists."""
        for name, indexes in channels.items():
            layer = self.network.get_submodule(name)
            if isinstance(layer, SubTensorConv2d):
                layer.set_channels(indexes)
            elif name in self._masks:
                self._masks[name].remove()
                self._masks[name] = _GradientMask(layer, indexes)
        self.channels = channels

    def move_channels(self, channels: dict[str, list[int]], optimizers: Sequence[torch.optim.Optimizer]) -> int:
        """Takes other channels of layers in training, and moves the optimizers' state of their weights with them.

        Channels that stay keep their state, those that enter begin with zeros, and those that leave are frozen as they
        are, their state dropped. State that is no tensor of the weight's shape, such as Adam's step, is left alone.
        Pending gradients of these weights are dropped. Of int8 layers what leaves is rounded: it goes where the frozen
        weights are, which has no room for copies in floating point.

        Args:
            channels: The input channels that are updated from now on, as many as before; layers not named keep theirs.
            optimizers: Those that train the network.

        Returns:
            How many channels entered.

        Raises:
            UserError: A layer would update another number of channels than before.

        Example::

            applied.move_channels({"features.16.conv.0.0": [0, 3, 7]}, trainer.optimizers)
        """
        for name, indexes in channels.items():
            before = len(self.channels.get(name, ()))
            if len(set(indexes)) != before:
                raise UserError(
                    f"{name} updates {before} channels and would update {len(set(indexes))}: a move keeps their "
                    "number; start anew under a scheme with another update ratio"
                )
        entered = 0
        for name, indexes in channels.items():
            layer = self.network.get_submodule(name)
            entered += len(set(indexes) - set(self.channels.get(name, ())))
            if isinstance(layer, SubTensorConv2d):
                old = layer.channels
                layer.move_channels(indexes)
                for tensor in _state_tensors(layer.weight_slice, optimizers):
                    _move_rows(tensor, old, layer.channels)
                layer.weight_slice.grad = None
            elif name in self._masks:
                not_staying = self._masks[name].move(indexes)
                for tensor in _state_tensors(layer.weight, optimizers):
                    tensor.masked_fill_(not_staying.to(tensor.device), 0)
                layer.weight.grad = None
            _round_if_int8(layer, sorted(set(self.channels.get(name, ())) - set(indexes)))
        self.channels = self.channels | {name: sorted(indexes) for name, indexes in channels.items()}
        return entered

    def write_slices(self) -> None:
        """Writes what was trained into the full weights, as every forward pass and ``state_dict`` do."""
        for module in self.network.modules():
            if isinstance(module, SubTensorConv2d):
                module.write_slice()

    def restore_frozen(self) -> None:
        """Undoes what an optimizer's step did to masked entries."""
        for mask in self._masks.values():
            mask.restore_frozen()

    def remove(self) -> None:
        """Leaves the plain network, with the trained weights and the gradient flags it had."""
        for mask in self._masks.values():
            mask.restore_frozen()
            mask.remove()
        for name, module in list(self.network.named_modules(remove_duplicate=False)):
            if isinstance(module, SubTensorConv2d):
                self.network.set_submodule(name, module.plain())
            elif isinstance(module, MaskedReLU):
                self.network.set_submodule(name, module.activation)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(self._gradient_flags[name])


class _GradientMask:
    """Zeroes the gradient of all but some input channels of a layer's weight, and restores them after a step."""

    def __init__(self, layer: nn.Conv2d, channels: list[int]):
        self.layer = layer
        self.updated = self._entries_of(channels)
        self.frozen: Tensor | None = None
        self.hooks = [
            layer.weight.register_hook(self._mask),
            layer.register_load_state_dict_post_hook(lambda *_: setattr(self, "frozen", None)),
        ]

    def _entries_of(self, channels: list[int]) -> Tensor:
        entries = torch.zeros_like(self.layer.weight, dtype=torch.bool)
        groups, group_channels = self.layer.groups, self.layer.weight.shape[1]
        index = torch.tensor(channels)
        by_input_channel(entries, groups)[index // group_channels, index % group_channels] = True
        return entries

    def move(self, channels: list[int]) -> Tensor:
        """Lets other channels be updated; returns where the weight is not updated both before and after."""
        self.restore_frozen()
        before, self.updated = self.updated, self._entries_of(channels)
        self.frozen = None  # what leaves keeps its trained value, which the next backward pass will find
        return ~(before.to(self.updated.device) & self.updated)

    def _mask(self, gradient: Tensor) -> Tensor:
        # remembered only now: until the first step, DDP, a precision or a checkpoint may give the layer other weights
        if self.frozen is None:
            self.frozen = self.layer.weight.detach().clone()
        self.updated = self.updated.to(gradient.device)  # once: the network moves after this is made
        return gradient * self.updated

    def restore_frozen(self) -> None:
        if self.frozen is None:
            return
        weight = self.layer.weight.detach()
        weight.copy_(torch.where(self.updated.to(weight.device), weight, self.frozen.to(weight.device)))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _state_tensors(parameter: nn.Parameter, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[Tensor]:
    """What the optimizers hold for every element of a parameter, such as momentum."""
    for optimizer in optimizers:
        # asked first: looking up a parameter without state would make it one
        for value in optimizer.state[parameter].values() if parameter in optimizer.state else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                yield value


def _round_if_int8(layer: nn.Conv2d | SubTensorConv2d, channels: list[int]) -> None:
    """Rounds the weights of some input channels of an int8 layer, which computes the same with them."""
    convolution = layer.convolution[0] if isinstance(layer, SubTensorConv2d) else layer
    if isinstance(convolution, QuantizedConv2d) and channels:
        weight = by_input_channel(layer.weight.detach(), layer.groups)
        index = torch.tensor(channels, device=weight.device)
        places = (index // weight.shape[1], index % weight.shape[1])
        weight[places] = weight[places].round()


def _move_rows(tensor: Tensor, old: list[int], new: list[int]) -> None:
    """Puts the row of every channel in ``old`` where the channel is in ``new``; rows of others become zero."""
    rows = [(old.index(channel), row) for row, channel in enumerate(new) if channel in old]
    moved = torch.zeros_like(tensor)
    if rows:
        before, after = (list(of_all) for of_all in zip(*rows, strict=True))
        moved[after] = tensor[before]
    tensor.copy_(moved)


def refuse_computed_weights(network: nn.Module, convolutions: Sequence[Convolution]) -> None:
    """Raises ``UserError`` if a convolution's weight is no parameter, but computed from others before each call."""
    for convolution in convolutions:
        if "weight" not in network.get_submodule(convolution.name)._parameters:
            raise UserError(
                f"the weight of {convolution.name} is computed from others (pruning, weight norm): make it permanent "
                "first, with torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )


def refuse_batch_norm(network: nn.Module) -> None:
    """Raises ``UserError`` if the network has batch norm, which a deployed network has not."""
    name = find_batch_norm(network)
    if name is not None:
        raise UserError(
            f"{name} is a {type(network.get_submodule(name)).__name__}: a deployed network has none, so fold it first "
            "with microtune.modules.networks.batch_norm_folding.fold_batch_norm(network, input_shape)"
        )
