"""The callback that trains a network under an update scheme."""

import logging
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from microtune.modules.channel_choice import ChannelChoice, choose_channels
from microtune.modules.operations import NetworkOperations, find_operations
from microtune.modules.quantized_network import QuantizedNetwork
from microtune.modules.scheme_application import AppliedScheme, Method, refuse_batch_norm
from microtune.modules.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)


class SparseUpdate(Callback):
    """Updates, during ``fit``, only what an update scheme names: some biases, some channels of some weights.

    At the start of ``fit`` the network is frozen but for its classifier (its last linear layer) and what the scheme
    updates, and layers that compute and store only that are put in; at its end, or when it fails, they are taken out
    again. Checkpoints hold plain full weights. Parameters of the LightningModule outside the network are left alone.

    Args:
        scheme: What is updated: an ``UpdateScheme`` or the path of one in JSON.
        network: Path of the network inside the LightningModule; ``""`` is the LightningModule itself.
        method: ``"sub_tensor"`` computes and stores only what is updated; ``"mask"`` computes whole gradients and
            masks them, the textbook version.
        channel_choice: How the channels are chosen where the scheme fixes none: by the L2 norm of their weights,
            largest first, or at random.
        seed: Of the random choice.
        input_shape: Channels, height and width of a sample, to run the network once; by default those of the
            LightningModule's ``example_input_array`` if that is images, else that of an int8 network's graph, or the
            first convolution's channels at 224 x 224.

    Raises:
        UserError: An argument has no such value; the network has batch norm, is built in ``configure_model``, or does
            not suit the scheme; a weight averaging callback stands before this one; the strategy shards parameters;
            an optimizer misses a trainable parameter or has one twice; a checkpoint was made under another scheme or
            with another method.

    Example::

        trainer = Trainer(callbacks=[SparseUpdate("scheme.json", network="net")])
        trainer.fit(module, data)
    """

    def __init__(
        self,
        scheme: UpdateScheme | str | Path,
        network: str = "net",
        method: Method = "sub_tensor",
        channel_choice: ChannelChoice = "weight_norm",
        seed: int = 0,
        input_shape: tuple[int, int, int] | None = None,
    ):
        for name, value, known in (
            ("method", method, get_args(Method)),
            ("channel_choice", channel_choice, get_args(ChannelChoice)),
        ):
            if value not in known:
                raise UserError(f"{name} is {value!r}: give one of {', '.join(known)}")
        self.scheme = scheme if isinstance(scheme, UpdateScheme) else UpdateScheme.load(scheme)
        self.network = network
        self.method = method
        self.channel_choice = channel_choice
        self.seed = seed
        self.input_shape = input_shape
        self.channels: dict[str, list[int]] = {}
        self.applied: AppliedScheme | None = None

    @property
    def state_key(self) -> str:
        """One state per network, so that a Trainer can have several of these."""
        return self._generate_state_key(network=self.network)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the scheme into the network, before the optimizer is made."""
        if stage != "fit":
            return
        self._refuse_unsupported(trainer)
        network = find_network(pl_module, self.network)
        refuse_batch_norm(network)
        input_shape = self.input_shape or _input_shape(pl_module, network)
        try:
            operations = find_operations(network, input_shape)
        except UserError as error:
            raise UserError(f"{error}; SparseUpdate ran it on {input_shape}, another is its input_shape") from error
        self.scheme.check(operations.convolutions)
        channels = choose_channels(network, self.scheme, operations.convolutions, self.channel_choice, self.seed)
        # weights may still differ between ranks here, and a choice made from them
        self.channels = trainer.strategy.broadcast(channels)
        self.applied = AppliedScheme(network, self.scheme, operations, self.channels, self.method)
        self._say_what_is_trained(network, operations)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the optimizers, and restores masked entries after each of their steps."""
        check_optimizers(trainer, pl_module)
        if self.applied.masked_layers:
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(lambda *_: self.applied and self.applied.restore_frozen())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the plain network."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the plain network."""
        self._remove()

    def _remove(self) -> None:
        if self.applied is not None:
            self.applied.remove()
            self.applied = None

    def state_dict(self) -> dict[str, Any]:
        """The scheme, the chosen channels and the method."""
        scheme = {key: value for key, value in self.scheme.to_dict().items() if key != "provenance"}
        return {"scheme": scheme, "channels": self.channels, "method": self.method}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the channels that the checkpoint was trained with."""
        if state_dict["scheme"] != self.state_dict()["scheme"]:
            raise UserError(
                f"the checkpoint was trained under another scheme: bias_depth {state_dict['scheme']['bias_depth']} and "
                f"weights {state_dict['scheme']['weights']}: resume with that one, or start anew from its weights"
            )
        if state_dict["method"] != self.method:
            raise UserError(
                f"the checkpoint was trained with method={state_dict['method']!r}, whose optimizer state has other "
                f"shapes than that of {self.method!r}: resume with that one, or start anew from its weights"
            )
        self.channels = state_dict["channels"]
        if self.applied is not None:
            self.applied.set_channels(self.channels)

    def _refuse_unsupported(self, trainer: Trainer) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            name = type(trainer.strategy).__name__
            raise UserError(f"SparseUpdate does not work with {name}, which shards parameters: use strategy='ddp'")
        for callback in trainer.callbacks[: trainer.callbacks.index(self)]:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                name = type(callback).__name__
                raise UserError(f"{name} stands before SparseUpdate and would copy the network too early: put it after")

    def _say_what_is_trained(self, network: nn.Module, operations: NetworkOperations) -> None:
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        rank_zero_info(
            f"SparseUpdate trains {trained:,} parameters: the classifier, {self.scheme.bias_depth} of "
            f"{len(operations.convolutions)} biases, {len(self.channels)} weights in part or whole"
        )
        if self.applied.plain_layers:
            names = ", ".join(self.applied.plain_layers)
            log.warning("no sub-tensor version of %s: the whole input is stored, the whole gradient computed", names)


def find_network(pl_module: LightningModule, path: str) -> nn.Module:
    """The network at ``path`` inside a LightningModule, without the wrapper that ``torch.compile`` puts around it."""
    try:
        network = pl_module.get_submodule(path)
    except AttributeError as error:
        if type(pl_module).configure_model is not LightningModule.configure_model:
            raise UserError(
                f"there is no network at {path!r} yet: build it in __init__, not in configure_model, which runs later"
            ) from error
        names = ", ".join(name for name, _ in pl_module.named_children())
        raise UserError(f"there is no network at {path!r} in {type(pl_module).__name__}: it has {names}") from error
    return getattr(network, "_orig_mod", network)


def _input_shape(pl_module: LightningModule, network: nn.Module) -> tuple[int, int, int]:
    example = pl_module.example_input_array
    # the LightningModule's input may be something else than the network's, such as a waveform
    if isinstance(example, Tensor) and example.ndim == 4:
        return tuple(example.shape[1:])
    if isinstance(network, QuantizedNetwork):
        return network.graph.input_shape
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise UserError("the network has no nn.Conv2d: an update scheme is about convolutions")
    return (first.in_channels, 224, 224)


def check_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raises ``UserError`` unless each trainable parameter is in exactly one group of one optimizer."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    for name, parameter in pl_module.named_parameters():
        times = held.count(id(parameter)) if parameter.requires_grad else 1
        if times != 1:
            raise UserError(
                f"{name} is to be trained, but is in {times} optimizer groups: in configure_optimizers, give the "
                "optimizer the parameters of self as they are then, each once"
            )
