"""The callback that keeps the parameters of an int8 network what a device can hold."""

from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer

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
)
from microtune.modules.user_error import UserError


class Int8Weights(Callback):
    """Brings int8 weights and 32-bit biases back into their range after every optimizer step, and rounds them.

    Args:
        storage: ``"latent"`` keeps copies in floating point, which collect steps smaller than one and are rounded where
            they are used: a device needs 4 bytes more per updated weight for them. ``"in_place"`` rounds after every
            step, so that weights are int8 and biases 32-bit integers at every moment; at random, since a step of less
            than a half would always be lost otherwise.
        seed: Of the random rounding.
        network: Path of the network inside the LightningModule; ``""`` is the LightningModule itself.

    Raises:
        UserError: ``storage`` has no such value, a checkpoint was made with the other, or there are no int8 layers.

    Example::

        trainer = Trainer(callbacks=[SparseUpdate("scheme.json"), QuantizationAwareScaling(), Int8Weights("in_place")])
    """

    def __init__(self, storage: WeightStorage = "in_place", seed: int = 0, network: str = "net"):
        if storage not in get_args(WeightStorage):
            raise UserError(f"storage is {storage!r}: give one of {', '.join(get_args(WeightStorage))}")
        self.storage = storage
        self.network = network
        self.generator = IntegerGenerator(seed)
        self.parameters: list[QuantizedParameter] = []

    @property
    def state_key(self) -> str:
        """One state per network, so that a Trainer can have several of these."""
        return self._generate_state_key(network=self.network)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds what is trained, and follows every step of the optimizers."""
        network = find_network(pl_module, self.network)
        if next(int8_convolutions(network), None) is None:
            raise UserError("there are no int8 weights: the network has no int8 convolution; leave Int8Weights out")
        self.channels_moved(pl_module)
        # not at random, which a run that is resumed would do once more
        if self.storage == "in_place":
            make_whole(network)
        keep_in_range(self.parameters)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.after_step())

    def channels_moved(self, pl_module: LightningModule) -> None:
        """Finds what is trained, whose scales depend on the channels; ``SparseUpdate`` calls it when it moves them."""
        self.parameters = quantized_parameters(find_network(pl_module, self.network))

    def after_step(self) -> None:
        """Limits what is trained to its integers, and rounds it if there are no copies."""
        if self.storage == "in_place":
            round_in_place(self.parameters, self.generator)
        else:
            keep_in_range(self.parameters)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the parameters."""
        self.parameters = []

    def state_dict(self) -> dict[str, Any]:
        """The storage and the state of the generator."""
        return {"storage": self.storage, "generator": self.generator.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint stopped."""
        if state_dict["storage"] != self.storage:
            raise UserError(
                f"the checkpoint was trained with {state_dict['storage']} weights: resume with these, or start anew"
            )
        self.generator.state = state_dict["generator"]
