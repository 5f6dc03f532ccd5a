"""The callback that trains a network under an update scheme."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from microtune.callbacks.channel_choosing import averaging_callback, first_batches
from microtune.modules.int8.network import QuantizedNetwork
from microtune.modules.networks.operations import Convolution, NetworkOperations, find_operations
from microtune.modules.sparse_update.channel_choice import choose_channels, is_due, seed_at_step, to_be_chosen
from microtune.modules.sparse_update.channel_importance import (
    WITHOUT_DATA,
    Criterion,
    measure_importance,
    summed_cross_entropy,
)
from microtune.modules.sparse_update.fitted_classifier import measure_with_fitted_classifier
from microtune.modules.sparse_update.scheme_application import AppliedScheme, Method, refuse_batch_norm
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)


class SparseUpdate(Callback):
    """Updates, during ``fit``, only what an update scheme names: some biases, some channels of some weights.

    At the start of ``fit`` the network is frozen but for its classifier (its last linear layer) and what the scheme
    updates, and layers that compute and store only that are put in; at its end, or when it fails, they are taken out
    again. Checkpoints hold plain full weights. Parameters of the LightningModule outside the network are left alone.

    Channels are chosen once, or anew every so many steps: then the slices and the optimizer's state move to other
    channels, and what leaves is frozen as it is. A choice by data is made from the first batches of the epoch, in its
    order, so that it is a function of the weights, the epoch and the step, and a resumed run makes the same.

    A device needs little for choices in training. It can score a slice at a time, with as many channels of each layer
    as the scheme updates: so many passes forward and back per sample that all channels have had their turn, none of
    which keeps more than a training step does, and 4 bytes of score per channel; gradient norm and loss decrease sum
    the slices' gradients over the samples too, as gradient accumulation does. The simulation does it in one pass. What
    leaves a slice has to be written where the frozen weights are, so that the flash holds whole weights and not only
    what is frozen. ``microtune.modules.memory.training_memory.dynamic_choice`` has the numbers.

    Args:
        scheme: What is updated: an ``UpdateScheme`` or the path of one in JSON.
        network: Path of the network inside the LightningModule; ``""`` is the LightningModule itself.
        method: ``"sub_tensor"`` computes and stores only what is updated; ``"mask"`` computes whole gradients and
            masks them, the textbook version.
        channel_choice: By which score channels are chosen, the highest first, where the scheme fixes none:
            ``ChannelImportance.scores`` has what they are. ``weight_norm`` and ``random`` choose at once, the others
            before the first step, from training samples.
        seed: Of the random choice.
        input_shape: Channels, height and width of a sample, to run the network once; by default those of the
            LightningModule's ``example_input_array`` if that is images, else that of an int8 network's graph, or the
            first convolution's channels at 224 x 224.
        rechoose_every: Steps of the optimizer after which the channels are chosen anew, by the same score; 0 for never.
        choice_samples: How many training samples a choice by data is made from, or a few more to fill a batch. Before
            the first step the classifier knows nothing yet: then it is fitted to half of them, for the time being, and
            the scores are those of the other half. Not so where ``summed_loss`` is given.
        summed_loss: Of the network and a batch, summed over its samples, for scores that need a loss; by default the
            cross-entropy of its outputs and the batch's second part.

    Attributes:
        channels: Those that are updated, by layer.
        moved_channels: How many have taken the place of another since training began; every choice anew logs its own.

    Raises:
        UserError: An argument has no such value; the network has batch norm, is built in ``configure_model``, or does
            not suit the scheme; a weight averaging callback stands before this one, or anywhere if channels are chosen
            by data or anew; channels are to be chosen anew, and there are none to choose; the training loader cannot
            be read twice; the strategy shards parameters; an optimizer misses a trainable parameter or has one twice;
            a checkpoint was made under another scheme, with another method or with another choice of channels, or with
            other channels where weights are averaged.

    Example::

        trainer = Trainer(callbacks=[SparseUpdate("scheme.json", network="net")])
        trainer.fit(module, data)

        SparseUpdate("scheme.json", channel_choice="taylor", rechoose_every=100)  # dynamic
    """

    def __init__(
        self,
        scheme: UpdateScheme | str | Path,
        network: str = "net",
        method: Method = "sub_tensor",
        channel_choice: Criterion = "weight_norm",
        seed: int = 0,
        input_shape: tuple[int, int, int] | None = None,
        rechoose_every: int = 0,
        choice_samples: int = 256,
        summed_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ):
        for name, value, known in (
            ("method", method, get_args(Method)),
            ("channel_choice", channel_choice, get_args(Criterion)),
        ):
            if value not in known:
                raise UserError(f"{name} is {value!r}: give one of {', '.join(known)}")
        for name, value, least in (("rechoose_every", rechoose_every, 0), ("choice_samples", choice_samples, 1)):
            if value < least:
                raise UserError(f"{name} is {value}: give {least} or more")
        self.scheme = scheme if isinstance(scheme, UpdateScheme) else UpdateScheme.load(scheme)
        self.network = network
        self.method = method
        self.channel_choice = channel_choice
        self.seed = seed
        self.input_shape = input_shape
        self.rechoose_every = rechoose_every
        self.choice_samples = choice_samples
        self.summed_loss = summed_loss or summed_cross_entropy
        self.channels: dict[str, list[int]] = {}
        self.moved_channels = 0
        self.applied: AppliedScheme | None = None
        self._operations: NetworkOperations | None = None
        self._to_be_chosen: list[Convolution] = []
        self._chosen_at_step: int | None = 0
        self._averaging: str | None = None

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
        self._operations = operations
        self._to_be_chosen = to_be_chosen(self.scheme, operations.convolutions)
        is_by_data = self.channel_choice not in WITHOUT_DATA and bool(self._to_be_chosen)
        self._refuse_moves_in_vain(trainer, is_by_data)
        self._chosen_at_step = None if is_by_data else trainer.global_step
        self.moved_channels = 0
        # there are no samples yet: until there are, weight norm stands in
        stand_in = self.channel_choice if self.channel_choice in WITHOUT_DATA else "weight_norm"
        channels = choose_channels(network, self.scheme, operations.convolutions, stand_in, self.seed)
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

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_index: int) -> None:
        """Chooses the channels, for the first time or anew, where that is due: never while gradients accumulate."""
        step, first = trainer.global_step, self._chosen_at_step is None
        if not is_due(step, self._chosen_at_step, self.rechoose_every):
            return
        chosen = self._choose(trainer, pl_module, 0 if first else step)
        entered = self.applied.move_channels(chosen, trainer.optimizers)
        self.channels, self._chosen_at_step = self.applied.channels, step
        for callback in trainer.callbacks:
            if hasattr(callback, "channels_moved"):
                callback.channels_moved(pl_module)
        if first:
            rank_zero_info(f"SparseUpdate chose the channels of {len(chosen)} layers by {self.channel_choice}")
            return
        self.moved_channels += entered
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics({"moved_channels": entered}, step=step)

    def _choose(self, trainer: Trainer, pl_module: LightningModule, step: int) -> dict[str, list[int]]:
        """The channels of every layer that the scheme leaves to choose, the same on all ranks."""
        network, seed = find_network(pl_module, self.network), seed_at_step(self.seed, step)
        self.applied.write_slices()
        importance = None
        if self.channel_choice not in WITHOUT_DATA:
            # a compiled network would not call the hooks that measure
            with (
                first_batches(trainer, pl_module, self.choice_samples, seed) as batches,
                torch.compiler.set_stance("force_eager"),
            ):
                if step == 0 and self.summed_loss is summed_cross_entropy:
                    importance, _ = measure_with_fitted_classifier(
                        network, self._operations, self._to_be_chosen, list(batches)
                    )
                else:
                    importance = measure_importance(network, self._to_be_chosen, batches, self.summed_loss)
        chosen = choose_channels(network, self.scheme, self._to_be_chosen, self.channel_choice, seed, importance)
        return trainer.strategy.broadcast(chosen)

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
        """The scheme, the channels of now, the method, and how and when channels are chosen."""
        scheme = {key: value for key, value in self.scheme.to_dict().items() if key != "provenance"}
        return {
            "scheme": scheme,
            "channels": self.channels,
            "method": self.method,
            "channel_choice": self.channel_choice,
            "rechoose_every": self.rechoose_every,
            "chosen_at_step": self._chosen_at_step,
            "moved_channels": self.moved_channels,
        }

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
        # checkpoints made before there was a choice say nothing of it
        for name, of_old in (("channel_choice", self.channel_choice), ("rechoose_every", 0)):
            value, own = state_dict.get(name, of_old), getattr(self, name)
            if value != own:
                raise UserError(
                    f"the checkpoint was trained with {name}={value!r}, and this is {own!r}: resume with that one, or "
                    "start anew from its weights"
                )
        if self._averaging and self.applied and state_dict["channels"] != self.channels:
            raise UserError(
                f"the checkpoint updates other channels than these weights choose, and {self._averaging} has copied "
                "the network with those: build the module with the weights and the seed that its training began with"
            )
        self._chosen_at_step = state_dict.get("chosen_at_step", 0)
        self.moved_channels = state_dict.get("moved_channels", 0)
        self.channels = state_dict["channels"]
        if self.applied is not None:
            self.applied.set_channels(self.channels)

    def _refuse_unsupported(self, trainer: Trainer) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            name = type(trainer.strategy).__name__
            raise UserError(f"SparseUpdate does not work with {name}, which shards parameters: use strategy='ddp'")
        if name := averaging_callback(trainer.callbacks[: trainer.callbacks.index(self)]):
            raise UserError(f"{name} stands before SparseUpdate and would copy the network too early: put it after")

    def _refuse_moves_in_vain(self, trainer: Trainer, is_by_data: bool) -> None:
        if self.rechoose_every and not self._to_be_chosen:
            raise UserError(
                f"rechoose_every is {self.rechoose_every}, but there is nothing to choose: the scheme fixes the "
                "channels of its layers, or updates them whole or not at all; give 0, or a scheme that updates parts"
            )
        self._averaging = averaging_callback(trainer.callbacks)
        if self._averaging and (self.rechoose_every or is_by_data):
            raise UserError(
                f"{self._averaging} averages slices of weights, whose channels are chosen by data or anew in "
                "training: leave it out, or give channel_choice weight_norm or random and rechoose_every 0"
            )

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
