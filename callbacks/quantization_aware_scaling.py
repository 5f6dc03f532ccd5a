"""The callback that gives int8 parameters the steps that they would take in floating point."""

import logging

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from microtune.callbacks.int8_weights import Int8Weights
from microtune.callbacks.sparse_update import find_network
from microtune.modules.sparse_update.int8_update import (
    QuantizedParameter,
    int8_convolutions,
    quantized_parameters,
    scale_gradients,
)
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)


class QuantizationAwareScaling(Callback):
    """Quantization-aware scaling (QAS) of gradients for SGD on an int8 network (Lin et al. 2022, section 2.1).

    An int8 weight W stands for the real weight w = s W, where s is its output channel's weight scale; a 32-bit bias B
    stands for b = s s_x B, where s_x is the scale of the layer's input. By the chain rule the gradient with respect to
    W is dL/dW = s dL/dw: too small by s, while W is too large by 1/s. In floating point SGD would take the step
    w <- w - r dL/dw, which is, divided by s::

        W <- W - r dL/dw / s  =  W - r (dL/dW) / s^2

    So the gradient is divided by the square of the scale, s^2 of a weight and (s s_x)^2 of a bias (equation 6), before
    the optimizer sees it. Momentum is a sum of such gradients and weight decay adds W itself, so that both are right
    as they are: with v for the sum in floating point, the sum here is v / s. There is nothing to tune, and the learning
    rate is that of a network in floating point. The sub-tensors of ``SparseUpdate`` have the scales of their outputs.

    Weights of output channels whose scale is near zero (below a hundredth of the layer's median) get no gradient: what
    they are worth is nothing beside the others, while their step would be a hundred times as long and more. They are
    counted and logged. Biases of these channels are trained.

    Args:
        network: Path of the network inside the LightningModule; ``""`` is the LightningModule itself.

    Attributes:
        near_zero: Number of such channels of each layer whose weight is trained, from the start of ``fit``.

    Raises:
        UserError: The optimizer is not SGD: those that divide by the gradient's own size step as far in integers as in
            real numbers, which no scaling of gradients mends. Gradients are clipped, which would measure them in
            integers. Or the network has no int8 layers.

    Example::

        trainer = Trainer(callbacks=[SparseUpdate("scheme.json"), QuantizationAwareScaling(), Int8Weights()])
        trainer.fit(Classifier({"graph": graph.to_json(), "num_classes": 10}, learning_rate=0.025), data)
    """

    def __init__(self, network: str = "net"):
        self.network = network
        self.parameters: list[QuantizedParameter] = []
        self.near_zero: dict[str, int] = {}

    @property
    def state_key(self) -> str:
        """One state per network, so that a Trainer can have several of these."""
        return self._generate_state_key(network=self.network)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds what is trained, and checks the optimizers."""
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, torch.optim.SGD):
                raise UserError(
                    f"quantization-aware scaling is for SGD, and the optimizer is {type(optimizer).__name__}: "
                    "use SGD, or leave the callback out"
                )
        if trainer.gradient_clip_val:
            raise UserError(
                f"gradients are clipped at {trainer.gradient_clip_val}, but quantization-aware scaling makes them such "
                "as suit integers, and their size says nothing: leave clipping out"
            )
        if not any(isinstance(callback, Int8Weights) for callback in trainer.callbacks):
            log.warning("without the callback Int8Weights weights leave the range of int8: add it")
        network = find_network(pl_module, self.network)
        if next(int8_convolutions(network), None) is None:
            raise UserError("quantization-aware scaling is for int8 networks, and this one has no int8 convolution")
        self.channels_moved(pl_module)
        rank_zero_info(f"quantization-aware scaling of {len(self.parameters)} parameters{self._left_alone()}")

    def channels_moved(self, pl_module: LightningModule) -> None:
        """Finds what is trained, whose scales depend on the channels; ``SparseUpdate`` calls it when it moves them."""
        self.parameters = quantized_parameters(find_network(pl_module, self.network))
        self.near_zero = {one.layer: one.near_zero_channels for one in self.parameters if one.near_zero_channels}

    def _left_alone(self) -> str:
        if not self.near_zero:
            return ""
        layers = ", ".join(f"{count} of {name}" for name, count in self.near_zero.items())
        return f"; the weights of {sum(self.near_zero.values())} channels with scales near zero get none: {layers}"

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Scales the gradients."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        scale_gradients([one for one in self.parameters if id(one.parameter) in held])
