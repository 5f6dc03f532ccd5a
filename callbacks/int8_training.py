"""The callback that trains int8 weights and 32-bit biases with an optimizer made for real numbers."""

import logging
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from microtune.callbacks.sparse_update import find_network
from microtune.modules.int8.stochastic_rounding import IntegerGenerator
from microtune.modules.sparse_update.int8_update import (
    QuantizedParameter,
    WeightStorage,
    int8_convolutions,
    keep_in_range,
    make_whole,
    quantized_parameters,
    round_in_place,
    scale_gradients,
)
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)


class Int8Training(Callback):
    """Trains an int8 network: scales gradients before the optimizer's step, and keeps what it wrote integers in range.

    **Before the step**, quantization-aware scaling (QAS) of gradients for SGD (Lin et al. 2022, section 2.1). An int8
    weight W stands for the real weight w = s W, where s is its output channel's weight scale; a 32-bit bias B stands
    for b = s s_x B, where s_x is the scale of the layer's input. By the chain rule the gradient with respect to W is
    dL/dW = s dL/dw: too small by s, while W is too large by 1/s. In floating point SGD would take the step
    w <- w - r dL/dw, which is, divided by s::

        W <- W - r dL/dw / s  =  W - r (dL/dW) / s^2

    So the gradient is divided by the square of the scale, s^2 of a weight and (s s_x)^2 of a bias (equation 6).
    Momentum is a sum of such gradients and weight decay adds W itself, so that both are right as they are: with v for
    the sum in floating point, the sum here is v / s. There is nothing to tune, and the learning rate is that of a
    network in floating point. The sub-tensors of ``SparseUpdate`` have the scales of their outputs.

    Weights of output channels whose scale is near zero (below a hundredth of the layer's median) get no gradient: what
    they are worth is nothing beside the others, while their step would be a hundred times as long and more. They are
    counted and logged. Biases of these channels are trained.

    **After the step**, weights are brought back into the range of int8 and biases into that of 32 bits, and rounded.

    Args:
        weight_storage: ``"latent"`` keeps copies in floating point, which collect steps smaller than one and are
            rounded where they are used: a device needs 4 bytes more per updated weight for them. ``"in_place"`` rounds
            after every step, so that weights are int8 and biases 32-bit integers at every moment; at random, since a
            step of less than a half would always be lost otherwise. None only scales gradients, and weights leave the
            range of int8.
        gradient_scaling: Whether gradients are scaled; without, an int8 network hardly learns.
        seed: Of the random rounding.
        network: Path of the network inside the LightningModule; ``""`` is the LightningModule itself.

    Attributes:
        near_zero: Number of channels with scales near zero of each layer whose weight is trained, from the start of
            ``fit``.

    Raises:
        UserError: ``weight_storage`` has no such value, a checkpoint was made with another, or there are no int8
            layers. Gradients are to be scaled, and the optimizer is not SGD: those that divide by the gradient's own
            size step as far in integers as in real numbers, which no scaling of gradients mends. Or they are clipped,
            which would measure them in integers.

    Example::

        trainer = Trainer(callbacks=[SparseUpdate("scheme.json"), Int8Training("in_place")])
        trainer.fit(Classifier({"graph": graph.to_json(), "num_classes": 10}, learning_rate=0.025), data)
    """

    def __init__(
        self,
        weight_storage: WeightStorage | None = "in_place",
        gradient_scaling: bool = True,
        seed: int = 0,
        network: str = "net",
    ):
        known = get_args(WeightStorage)
        if weight_storage not in (*known, None):
            raise UserError(f"weight_storage is {weight_storage!r}: give one of {', '.join(known)}, or None")
        if weight_storage is None and not gradient_scaling:
            raise UserError("weight_storage is None and gradient_scaling False: nothing is left to do")
        self.weight_storage = weight_storage
        self.gradient_scaling = gradient_scaling
        self.network = network
        self.generator = IntegerGenerator(seed)
        self.parameters: list[QuantizedParameter] = []
        self.near_zero: dict[str, int] = {}

    @property
    def state_key(self) -> str:
        """One state per network, so that a Trainer can have several of these."""
        return self._generate_state_key(network=self.network)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds what is trained, checks the optimizers and follows every step of theirs."""
        network = find_network(pl_module, self.network)
        if next(int8_convolutions(network), None) is None:
            raise UserError("there are no int8 weights: the network has no int8 convolution; leave Int8Training out")
        self.channels_moved(pl_module)
        if self.gradient_scaling:
            refuse_unscalable(trainer)
            rank_zero_info(f"quantization-aware scaling of {len(self.parameters)} parameters{self._left_alone()}")
        if self.weight_storage is None:
            log.warning("weight_storage is None: weights leave the range of int8")
            return
        # not at random, which a run that is resumed would do once more
        if self.weight_storage == "in_place":
            make_whole(network)
        keep_in_range(self.parameters)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.after_step())

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
        if self.gradient_scaling:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            scale_gradients([one for one in self.parameters if id(one.parameter) in held])

    def after_step(self) -> None:
        """Limits what is trained to its integers, and rounds it if there are no copies."""
        if self.weight_storage == "in_place":
            round_in_place(self.parameters, self.generator)
        else:
            keep_in_range(self.parameters)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the parameters."""
        self.parameters = []

    def state_dict(self) -> dict[str, Any]:
        """The storage and the state of the generator."""
        return {"weight_storage": self.weight_storage, "generator": self.generator.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint stopped."""
        if state_dict["weight_storage"] != self.weight_storage:
            stored = state_dict["weight_storage"] or "unlimited"
            raise UserError(f"the checkpoint was trained with {stored} weights: resume with these, or start anew")
        self.generator.state = state_dict["generator"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses checkpoints of the two callbacks that were before this one."""
        if any(key.startswith("Int8Weights{") for key in checkpoint["callbacks"]):
            raise UserError(
                "the checkpoint was made with Int8Weights, which Int8Training has replaced: resume with the version of "
                "microtune that made it, or start anew from its weights"
            )


def refuse_unscalable(trainer: Trainer) -> None:
    """Raises ``UserError`` where quantization-aware scaling would not make the steps right."""
    for optimizer in trainer.optimizers:
        if not isinstance(optimizer, torch.optim.SGD):
            raise UserError(
                f"quantization-aware scaling is for SGD, and the optimizer is {type(optimizer).__name__}: "
                "use SGD, or gradient_scaling=False"
            )
    if trainer.gradient_clip_val:
        raise UserError(
            f"gradients are clipped at {trainer.gradient_clip_val}, but quantization-aware scaling makes them such "
            "as suit integers, and their size says nothing: leave clipping out"
        )
