"""The samples by which the channels of an update scheme are chosen in training."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from microtune.modules.user_error import UserError


@contextmanager
def first_batches(
    trainer: Trainer, pl_module: LightningModule, samples: int, seed: int
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """The first batches of the training loader in the current epoch's order, as the training step would get them.

    The order is that of samplers with a seed of their own, as this project's have; another is drawn from ``seed``.

    The loader's own iterator and workers and all random state are left as they were. Under DDP every process gets its
    part of the samples.

    Args:
        trainer: In ``fit``, whose loop has told the sampler the epoch.
        pl_module: The module in training.
        samples: As many as at least, over all processes, unless the epoch has fewer.
        seed: Of what the data set or the data module draws, if it draws from a global random state.

    Raises:
        UserError: The loader is no ``DataLoader`` that makes batches of a data set with a length.

    Example::

        with first_batches(trainer, pl_module, samples=128, seed=0) as batches:
            importance = measure_importance(network, convolutions, batches)
    """
    loader = trainer.train_dataloader
    is_one = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    if not is_one or isinstance(loader.dataset, IterableDataset):
        kind = _kind(loader.dataset if is_one else loader)
        raise UserError(
            f"channels are chosen by the first training samples, which a {kind} cannot give twice: give the Trainer "
            "one DataLoader with batches of a data set that has a length, or choose by weight_norm or random"
        )
    again = DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        collate_fn=loader.collate_fn,
        num_workers=0,
        generator=torch.Generator(),  # without its own, a loader draws a number from the global one
    )
    with isolate_rng(), _generators_as_they_were(loader):
        # a run that was resumed has another global random state than one never stopped
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  what data sets draw from without a generator
        yield _as_in_training(trainer, pl_module, again, math.ceil(samples / trainer.world_size))


def _as_in_training(
    trainer: Trainer, pl_module: LightningModule, loader: DataLoader, samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    count, batches, seen = trainer.num_training_batches, iter(loader), 0
    # limit_train_batches may allow fewer than the loader has; asked for one by one, so that none is loaded in vain
    while seen < samples and count > 0 and (batch := next(batches, None)) is not None:
        # What Lightning 2.6 does between the loader and on_train_batch_start (_TrainingEpochLoop.advance): data modules
        # do their work there, such as the spectrograms of keyword audio, and nothing public calls these hooks.
        moved = trainer.precision_plugin.convert_input(batch)
        moved = pl_module._on_before_batch_transfer(moved, dataloader_idx=0)
        moved = trainer.strategy.batch_to_device(moved, dataloader_idx=0)
        if not isinstance(moved, list | tuple) or len(moved) < 2:
            raise UserError(
                f"channels are chosen by batches of samples and labels, and the training batch is a {_kind(moved)}: "
                "give pairs, or choose by weight_norm or random"
            )
        yield moved
        seen, count = seen + len(moved[1]), count - 1


@contextmanager
def _generators_as_they_were(loader: DataLoader) -> Iterator[None]:
    """Restores the state of generators that samplers of a loader draw the order from."""
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    generators = [getattr(sampler, "generator", None) for sampler in samplers]
    states = [(generator, generator.get_state()) for generator in generators if isinstance(generator, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def averaging_callback(callbacks: list[Callback]) -> str | None:
    """Class of the first callback that averages weights; None if there is none.

    Example::

        averaging_callback(trainer.callbacks)  # "EMAWeightAveraging"
    """
    averaging = (one for one in callbacks if isinstance(one, WeightAveraging | StochasticWeightAveraging))
    return next((_kind(one) for one in averaging), None)


def _kind(value: Any) -> str:
    return type(value).__name__
