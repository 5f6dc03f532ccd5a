"""How much every input channel of every convolution matters, by seven criteria, from one backward pass."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F

from microtune.modules.int8.layers import QuantizedConv2d, near_zero_scales, saturate, where_not
from microtune.modules.networks.operations import Convolution
from microtune.modules.sparse_update.subtensor import SubTensorConv2d, by_input_channel
from microtune.modules.user_error import UserError

Criterion = Literal["weight_norm", "gradient_norm", "fisher", "taylor", "loss_decrease", "activation_norm", "random"]
WITHOUT_DATA = ("weight_norm", "random")  # what the weights alone say, or nothing does
ELEMENTS_AT_ONCE = 2**23  # of per-sample gradients, or of what they are computed from: 32 MiB of floats


class DivergedError(UserError):
    """A loss is no number."""


@dataclass(frozen=True)
class LayerImportance:
    """What samples say about one convolution; its input channels in the order of ``nn.Conv2d``.

    Args:
        weight_norm: L2 norm of each channel's weights, of shape (in,); of int8 ones as integers.
        gradient: Of the mean loss with respect to the weight, of shape (groups, in / groups, out / groups, kernel
            height, kernel width); of int8 weights with respect to the integers.
        step: What SGD would subtract from the weight per unit of the learning rate, of the same shape: the gradient,
            of an int8 network after quantization-aware scaling.
        bias_gradient, bias_step: Likewise of the bias, of shape (out,); zeros without one.
        fisher: Mean over the samples of each channel's squared gradient, of shape (in,).
        taylor: Mean over the samples of the square of each channel's sum of gradient times weight, of shape (in,).
        activation: Mean over the samples of each channel's sum of squares, of shape (in,).
    """

    weight_norm: Tensor
    gradient: Tensor
    step: Tensor
    bias_gradient: Tensor
    bias_step: Tensor
    fisher: Tensor
    taylor: Tensor
    activation: Tensor

    @property
    def loss_decrease(self) -> Tensor:
        """First-order decrease of the mean loss by a step of learning rate 1 on each channel's weights, (in,)."""
        return (self.gradient * self.step).sum((2, 3, 4)).flatten()

    @property
    def bias_loss_decrease(self) -> float:
        """The same of a step on the whole bias."""
        return float((self.bias_gradient * self.bias_step).sum())


@dataclass(frozen=True)
class ChannelImportance:
    """Scores for the input channels of convolutions, the higher the more they matter.

    Args:
        layers: What was measured of each convolution, in forward order.
        samples: How many samples it was measured on, over all ranks.

    Example::

        importance = measure_importance(network, operations.convolutions, batches)
        importance.scores("taylor")["features.16.conv.0.0"].shape  # (in_channels,)
    """

    layers: dict[str, LayerImportance]
    samples: int

    def scores(self, criterion: Criterion, seed: int = 0) -> dict[str, Tensor]:
        """A score for each input channel of each convolution, float64 of shape (in,).

        - ``weight_norm``: L2 norm of the channel's weights (Lin et al. 2022, section 2.2).
        - ``gradient_norm``: L2 norm of the gradient of the mean loss with respect to them.
        - ``fisher``: diagonal of the empirical Fisher information, summed over them: the mean over the samples of the
          squared gradient of the sample's loss (Theis et al. 2018, arXiv:1801.05787, equation 6, without its factors).
        - ``taylor``: mean over the samples of (sum of gradient times weight) squared, the first-order change of a
          sample's loss if the channel were removed (Molchanov et al. 2019, arXiv:1906.10771, equation 8, of a gate).
        - ``loss_decrease``: first-order decrease of the mean loss by one SGD step on these weights alone, per unit of
          the learning rate: their squared gradient norm, and with an int8 network, whose gradients quantization-aware
          scaling divides by the square of the weights' scale s, sum (gradient / s)^2.
        - ``activation_norm``: root of the mean over the samples of the channel's sum of squares.
        - ``random``: a random order, a function of the layer's name and the seed alone.

        Of int8 layers all but ``loss_decrease`` are of the integers, as autograd and the paper's code see them.

        Args:
            criterion: Which one.
            seed: Of ``random``.
        """
        if criterion == "random":
            return {name: random_scores(name, len(layer.fisher), seed) for name, layer in self.layers.items()}
        return {name: self._of_layer(layer, criterion) for name, layer in self.layers.items()}

    def _of_layer(self, layer: LayerImportance, criterion: Criterion) -> Tensor:
        if criterion == "gradient_norm":
            return layer.gradient.square().sum((2, 3, 4)).flatten().sqrt()
        if criterion == "activation_norm":
            return layer.activation.sqrt()
        return getattr(layer, criterion)


def weight_norm_scores(weight: Tensor, groups: int) -> Tensor:
    """L2 norm of the weights of each input channel, float64 of shape (in,).

    Args:
        weight: Of a convolution, of shape (out, in / groups, kernel height, kernel width).
        groups: Of the convolution.
    """
    return by_input_channel(weight.detach(), groups).flatten(2).double().norm(dim=2).flatten().cpu()


def random_scores(layer: str, in_channels: int, seed: int) -> Tensor:
    """A random order of ``in_channels`` channels as scores; a function of the layer's name and the seed alone."""
    # PyTorch's generator for the CPU reads only the lower 32 bits of its seed
    generator = torch.Generator().manual_seed(crc32(f"{layer} {seed}".encode()))
    scores = torch.empty(in_channels, dtype=torch.float64)
    scores[torch.randperm(in_channels, generator=generator)] = torch.arange(in_channels, 0, -1, dtype=torch.float64)
    return scores


def summed_cross_entropy(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a batch of samples and labels, summed over its samples."""
    samples, labels = batch
    return F.cross_entropy(network(samples), labels, reduction="sum")


def measure_importance(
    network: nn.Module,
    convolutions: Sequence[Convolution],
    batches: Iterable[tuple[Tensor, Tensor]],
    summed_loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor] = summed_cross_entropy,
) -> ChannelImportance:
    """Measures all criteria in one forward and backward pass per batch; the network is left as it was.

    No gradient of a parameter is kept: every layer's is reduced to its sums as soon as backward reaches it, some
    samples at a time. Memory is that of a backward pass with respect to activations, the sums, which are as large as
    the weights, and ``ELEMENTS_AT_ONCE`` elements.

    Under ``torch.distributed`` the sums are added over all ranks, which then have the same scores.

    Args:
        network: With a scheme applied or not, in floating point or int8; measured in evaluation mode.
        convolutions: Of which layers; fewer than all spare the backward pass through those before.
        batches: Training samples (N, C, H, W) and labels (N,), on the network's device.
        summed_loss: Of the network and a batch, summed over its samples.

    Raises:
        UserError: There is no batch, a convolution's weights do not reach the loss, or its input is written over
            before backward.
        DivergedError: The loss is no number.

    Example::

        importance = measure_importance(network, operations.convolutions[-36:], [(samples, labels)])
    """
    sums = {one.name: _LayerSums(one.name, network.get_submodule(one.name)) for one in convolutions}
    samples = 0
    with _only_activations_have_gradients(network), _hooked(sums.values()):
        for batch in batches:
            with torch.enable_grad():
                loss = summed_loss(network, batch)
            if not loss.isfinite():
                raise DivergedError(
                    f"the loss is {loss.item()}, and no channel can be chosen by it: give other weights, or a smaller "
                    "learning rate if it has been training"
                )
            if loss.requires_grad:
                loss.backward()
            samples += len(batch[1])
    samples = int(_over_ranks(torch.tensor(float(samples), dtype=torch.float64), _device_of(network)))
    if samples == 0:
        raise UserError("channels are chosen by training samples, and there are none: give at least one batch")
    # a rank may have no samples: all say the same of each layer, and none waits for another
    reached = _over_ranks(torch.tensor([float(one.reached) for one in sums.values()]), _device_of(network))
    layers = {}
    for (name, of_layer), by_ranks in zip(sums.items(), reached.tolist(), strict=True):
        if not by_ranks:
            raise UserError(f"the weight of {name} does not reach the loss, so that it has no gradient: leave it out")
        layers[name] = of_layer.importance(samples, _device_of(network))
    return ChannelImportance(layers, samples)


class _LayerSums:
    """Sums over samples of one layer, float64 on the CPU, added to by hooks."""

    def __init__(self, name: str, module: nn.Module):
        self.name, self.module = name, module
        self.layer: nn.Conv2d = module.convolution[0] if isinstance(module, SubTensorConv2d) else module
        self.reached = False
        shape = by_input_channel(module.weight, self.layer.groups).shape
        self.gradient = torch.zeros(shape, dtype=torch.float64)
        self.bias_gradient = torch.zeros(self.layer.out_channels, dtype=torch.float64)
        self.fisher, self.taylor, self.activation = torch.zeros(3, self.layer.in_channels, dtype=torch.float64)

    def hook(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        """Has ``add`` called with the gradient of the output when backward reaches it."""
        if not torch.is_grad_enabled():
            return None
        x, version = inputs[0].detach(), inputs[0]._version
        if not output.requires_grad:
            # the first layer: gradients end here. A copy, since what follows may write over it
            output = output.requires_grad_().clone()

        def add(gradient: Tensor) -> None:
            # PyTorch notices it only where it keeps the input itself, which SubTensorConv2d does not
            if x._version != version:
                raise UserError(
                    f"the input of {self.name} is written over after the layer has read it, so that it cannot be "
                    "scored: let the operation that does so not work in place"
                )
            self.add(x, gradient)

        output.register_hook(add)
        return output

    @torch.no_grad()
    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Adds what samples (N, in, H, W) say, given the gradients (N, out, H', W') of their losses."""
        self.reached = True
        layer, weight, bias = self.layer, self.module.weight, self.module.bias
        activation = x.double().square().sum((0, 2, 3))
        if isinstance(layer, QuantizedConv2d):
            _, saturated = saturate(layer.rounded(x, weight.round(), bias.round()), layer.low, layer.high)
            gradient = where_not(saturated, gradient) * layer.effective_scale
            x = layer.padded(x)
        weight = by_input_channel(weight.detach(), layer.groups)
        for of_sample in _per_sample_gradients(layer, x, gradient):
            self.gradient += of_sample.double().sum(0).cpu()
            self.fisher += of_sample.double().square().sum((0, 3, 4, 5)).flatten().cpu()
            self.taylor += (of_sample * weight).double().sum((3, 4, 5)).square().sum(0).flatten().cpu()
        self.bias_gradient += gradient.double().sum((0, 2, 3)).cpu()
        self.activation += activation.cpu()

    def importance(self, samples: int, device: torch.device) -> LayerImportance:
        """The means over all ranks' samples."""
        summed = (self.gradient, self.bias_gradient, self.fisher, self.taylor, self.activation)
        gradient, bias_gradient, fisher, taylor, activation = (_over_ranks(one, device) / samples for one in summed)
        if self.module.bias is None:
            bias_gradient = torch.zeros_like(bias_gradient)
        step, bias_step = self._scaled(gradient, bias_gradient)
        norm = weight_norm_scores(self.module.weight, self.layer.groups)
        return LayerImportance(norm, gradient, step, bias_gradient, bias_step, fisher, taylor, activation)

    def _scaled(self, gradient: Tensor, bias_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias as the optimizer sees them: int8 ones with quantization-aware scaling."""
        if not isinstance(self.layer, QuantizedConv2d):
            return gradient, bias_gradient
        scales = self.layer.weight_scales.double().cpu()
        of_outputs = (self.layer.groups, 1, -1, 1, 1)
        step = (gradient / scales.square().view(of_outputs)).masked_fill(near_zero_scales(scales).view(of_outputs), 0)
        return step, bias_gradient / (scales * self.layer.description.input.scale).square()


def _per_sample_gradients(layer: nn.Conv2d, x: Tensor, gradient: Tensor) -> Iterator[Tensor]:
    """Gradients of each sample's loss with respect to the weight, some samples at a time.

    Yields:
        Of shape (n, groups, in / groups, out / groups, kernel height, kernel width).
    """
    groups, kernel = layer.groups, layer.kernel_size
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    else:
        x = F.pad(x, (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0]))
    places = gradient.shape[2] * gradient.shape[3]
    elements = max(layer.weight.numel(), x.shape[1] * kernel[0] * kernel[1] * places)
    for part, of_part in zip(*(t.split(max(1, ELEMENTS_AT_ONCE // elements)) for t in (x, gradient)), strict=True):
        columns = F.unfold(part, kernel, layer.dilation, stride=layer.stride)
        columns = columns.unflatten(1, (groups, -1))  # (n, groups, in / groups x kernel area, places)
        outputs = of_part.reshape(len(part), groups, gradient.shape[1] // groups, places)
        products = (columns.to(outputs.dtype) @ outputs.transpose(2, 3)).unflatten(2, (-1, *kernel))
        yield products.movedim(5, 3)


@contextmanager
def _only_activations_have_gradients(network: nn.Module) -> Iterator[None]:
    """In evaluation mode, and without a gradient for any parameter."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _hooked(sums: Iterable[_LayerSums]) -> Iterator[None]:
    handles = [one.module.register_forward_hook(one.hook) for one in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """The sum over all ranks, where there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    moved = values.to(device)
    torch.distributed.all_reduce(moved)
    return moved.cpu()
