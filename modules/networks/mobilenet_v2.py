"""MobileNetV2 as microcontrollers run it."""

from collections import OrderedDict
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from microtune.modules.networks.batch_norm_folding import fold_batch_norm_
from microtune.modules.user_error import UserError

Padding = Literal["symmetric", "keras"]

# of the blocks: expansion, output channels at width 1, repetitions, stride of the first (Sandler et al. 2018, table 2)
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class KerasPadding(nn.Module):
    """Pads an input as Keras does before a 3x3 convolution of stride 2.

    An even size gets one pixel behind it, an odd one a pixel on both sides (``correct_pad`` of keras.applications).
    Maps (N, C, H, W) to (N, C, H + 1 + H % 2, W + 1 + W % 2).

    Example::

        KerasPadding()(torch.zeros(1, 3, 128, 97)).shape  # (1, 3, 129, 99)
    """

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return functional.pad(images, (width % 2, 1, height % 2, 1))


class InvertedResidual(nn.Module):
    """Expands by a 1x1 convolution, filters each channel by a 3x3, and projects; adds the input where shapes allow.

    Args:
        in_channels: Of the input (N, in_channels, H, W).
        out_channels: Of the output.
        stride: Of the 3x3 convolution, 1 or 2.
        expansion: Channels between, as a multiple of ``in_channels``; 1 for no expanding convolution.
        norm_eps: Of the batch norms.

    Example::

        InvertedResidual(16, 24, stride=2, expansion=6)(torch.zeros(1, 16, 64, 64)).shape  # (1, 24, 32, 32)
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, norm_eps: float = 1e-5):
        super().__init__()
        self.adds_input = stride == 1 and in_channels == out_channels
        hidden = in_channels * expansion
        expanding = [] if expansion == 1 else [_convolution(in_channels, hidden, 1, norm_eps=norm_eps)]
        self.conv = nn.Sequential(
            *expanding,
            _convolution(hidden, hidden, 3, stride, groups=hidden, norm_eps=norm_eps),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels, norm_eps),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds_input else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018), with the module names and fresh weights of torchvision's, to the bit.

    It is not torchvision's own, whose import takes longer than PyTorch's. Build it by ``mobilenet_v2``.

    Args:
        num_classes: Outputs of the classifier.
        width: Multiplies every layer's channels.
        norm_eps: Of the batch norms.
        dropout: Probability, in front of the classifier.
    """

    def __init__(self, num_classes: int, width: float, norm_eps: float, dropout: float):
        super().__init__()
        channels, last = _rounded(32 * width), _rounded(1280 * max(1.0, width))
        features: list[nn.Module] = [_convolution(3, channels, 3, stride=2, norm_eps=norm_eps)]
        for expansion, at_width_1, repetitions, stride in BLOCKS:
            for repetition in range(repetitions):
                wanted = _rounded(at_width_1 * width)
                features.append(InvertedResidual(channels, wanted, 1 if repetition else stride, expansion, norm_eps))
                channels = wanted
        features.append(_convolution(channels, last, 1, norm_eps=norm_eps))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        x = functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


def _convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, norm_eps: float = 1e-5
) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels, norm_eps), nn.ReLU6(inplace=True))


def _rounded(channels: float) -> int:
    """To a multiple of 8, at most a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def mobilenet_v2(
    width: float = 1.0,
    num_classes: int = 1000,
    in_channels: int = 3,
    head_convolution: bool = False,
    padding: Padding = "symmetric",
    dropout: float = 0.0,
) -> MobileNetV2:
    """Builds a MobileNetV2 with fresh weights; it maps (N, in_channels, H, W) to (N, num_classes).

    Args:
        width: Multiplies every layer's channels, which are then rounded to a multiple of 8.
        num_classes: Outputs of the classifier.
        in_channels: 3 for colour, 1 for grey images and spectrograms.
        head_convolution: Keep the last 1x1 convolution, to max(1, width) * 1280 channels (52 convolutions). Without it
            (51) the classifier reads the 320 * width channels of the last block: what fits a microcontroller.
        padding: ``"keras"`` builds what Keras' weights were trained in: its padding of convolutions of stride 2 and its
            batch-norm epsilon of 1e-3. Layers have the same names either way, so that schemes carry over.
        dropout: Probability, in front of the classifier; torchvision trains with 0.2.

    Raises:
        UserError: An argument is outside its range.

    Example::

        network = mobilenet_v2(0.35, num_classes=10)
        network(torch.zeros(1, 3, 128, 128)).shape  # (1, 10)
    """
    _check_arguments(width, num_classes, in_channels, padding, dropout)
    network = MobileNetV2(num_classes, width, 1e-3 if padding == "keras" else 1e-5, dropout)
    if not head_convolution:
        _drop_head_convolution(network, num_classes)
    if in_channels != 3:
        first = network.features[0][0]
        first = nn.Conv2d(in_channels, first.out_channels, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(first.weight, mode="fan_out")
        network.features[0][0] = first
    if padding == "keras":
        _pad_as_keras(network)
    return network


def _check_arguments(width: float, num_classes: int, in_channels: int, padding: str, dropout: float) -> None:
    if not 0 < width <= 4:
        raise UserError(f"width {width} is not in (0, 4]: give a multiplier such as 0.35 or 1.0")
    if num_classes < 1:
        raise UserError(f"num_classes {num_classes} is not positive: give the data set's number of classes")
    if in_channels < 1:
        raise UserError(f"in_channels {in_channels} is not positive: give 3 for colour, 1 for grey or spectrograms")
    if padding not in get_args(Padding):
        raise UserError(f"padding {padding!r} is unknown: give 'symmetric' or 'keras'")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout {dropout} is not in [0, 1): give a probability such as 0.2")


def _drop_head_convolution(network: MobileNetV2, num_classes: int) -> None:
    network.features = network.features[:-1]
    projection = network.features[-1].conv[-2]
    classifier = nn.Linear(projection.out_channels, num_classes)
    nn.init.normal_(classifier.weight, 0, 0.01)
    nn.init.zeros_(classifier.bias)
    network.classifier[1] = classifier


def _pad_as_keras(network: MobileNetV2) -> None:
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.padding = (0, 0)
            parent = name.rpartition(".")[0]
            children = OrderedDict(pad=KerasPadding(), **dict(network.get_submodule(parent).named_children()))
            network.set_submodule(parent, nn.Sequential(children))


def build_network(
    *,
    width: float,
    num_classes: int,
    in_channels: int = 3,
    head_convolution: bool = False,
    padding: Padding = "symmetric",
    folded: bool = False,
) -> nn.Module:
    """A MobileNetV2 with fresh weights, as the hyperparameters of a checkpoint describe it.

    Args:
        width, num_classes, in_channels, head_convolution, padding: As in ``mobilenet_v2``.
        folded: Whether its batch norm is folded.

    Example::

        build_network(width=0.35, num_classes=10, folded=True)
    """
    network = mobilenet_v2(width, num_classes, in_channels, head_convolution, padding)
    return fold_batch_norm_(network, (in_channels, 32, 32)) if folded else network


def network_name(width: float, head_convolution: bool) -> str:
    """Names a MobileNetV2 as update schemes do.

    Example::

        network_name(0.35, head_convolution=False)  # "mobilenet_v2-w0.35"
        network_name(1, head_convolution=True)  # "mobilenet_v2-w1.0-head"
    """
    return f"mobilenet_v2-w{float(width)}" + ("-head" if head_convolution else "")
