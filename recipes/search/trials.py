"""Trials by plain settings, which travel to other processes and machines, where each builds its own."""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from microtune.datamodules.kept_features import MIB, KeepName, Split, TrunkFeatures
from microtune.datamodules.reproducible_order import seeded_torch
from microtune.modules.classifier import Classifier, network_of
from microtune.modules.search.frozen_trunk import cut_network
from microtune.modules.search.integer_program import Genome
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.search.trials import TrialTraining
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.workers import Workers
from microtune.recipes.training.command_line import check_at_least_one
from microtune.recipes.training.data_sets import DataName, data_module
from microtune.recipes.training.networks import DescribedNetwork, describe_network, source_of_weights
from microtune.recipes.training.training import load_pretrained


@dataclass(frozen=True)
class TrialSettings:
    """What decides the outcome of a trial, as plain values.

    Args:
        data: Name of the data set.
        data_dir: Its folder.
        data_options: Further arguments of the data module.
        weights: To start from; none for an int8 network, which has its own.
        width: Multiplier of the network's channels; by default that of the weights, and 0.35 without.
        head_convolution: Whether the network has its last 1x1 convolution.
        resolution: Height and width of images, in pixels.
        base_depth: The deepest bias depth; all before is frozen, and computed once.
        steps: Optimizer steps of a trial.
        batch_size: Samples of a step.
        learning_rate: At its highest; by default 0.1 / 256 x batch_size (Lin et al.).
        copies: How many augmentations of every training sample there are at most.
        features: Where the trunk's output is kept: memory, disk or none.
        features_limit_mib: What may be kept, in each process.
        features_dir: Folder of what is kept on disk; by default in the run's folder.
        network: mobilenet_v2, or the .safetensors file of an int8 network.

    Raises:
        UserError: A number is out of its range.

    Example::

        trials(TrialSettings("digits", None, {}, "none", base_depth=12)).accuracies([scheme], seed=0)
    """

    data: DataName | None = None
    data_dir: str | None = None
    data_options: dict[str, Any] = field(default_factory=dict)
    weights: str = "none"
    width: float | None = None
    head_convolution: bool = False
    resolution: int = 96
    base_depth: int = 36
    steps: int = 100
    batch_size: int = 32
    learning_rate: float | None = None
    copies: int = 4
    features: KeepName = "memory"
    features_limit_mib: float = 4096
    features_dir: str | None = None
    network: str = "mobilenet_v2"

    def __post_init__(self):
        check_at_least_one(
            base_depth=self.base_depth, steps=self.steps, batch_size=self.batch_size, copies=self.copies,
            resolution=self.resolution,
        )  # fmt: skip
        for name in ("width", "learning_rate", "features_limit_mib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}: give a positive number")
        source_of_weights(self.network, self.weights)

    @property
    def source(self) -> str:
        """Where the weights are."""
        return source_of_weights(self.network, self.weights)


def described_by(settings: TrialSettings) -> DescribedNetwork:
    """The network that the settings train, without its weights; raises ``UserError`` without a validation split."""
    described, data = network_and_data(settings)
    if not data.val_samples:
        raise UserError("trials are judged on the validation split: leave validation_fraction 0 out")
    return described


def network_and_data(
    settings: TrialSettings, recipe_seed: int | None = None
) -> tuple[DescribedNetwork, LightningDataModule]:
    """The network that the settings train, without its weights, and the data; a process builds them once."""
    return _network_and_data(_key(settings, OF_THE_DATA), recipe_seed or 0)


def trials(settings: TrialSettings, recipe_seed: int | None = None) -> TrialTraining:
    """The trials of these settings; a process builds them once.

    Args:
        settings: What decides their outcome.
        recipe_seed: Seed whose training is to be that of a training recipe: the augmentation is this seed's, and the
            classifier the one that the recipe begins with. By default all trials share the augmentation, and begin
            with a classifier that has learnt nothing.
    """
    return _trials(_key(settings, TrialSettings.__dataclass_fields__), recipe_seed)


def accuracy(settings: TrialSettings, scheme: dict[str, Any], seeds: tuple[int, ...], split: Split = "val") -> float:
    """Mean accuracy of one scheme over seeds, on the validation split: what a worker is asked for.

    Example::

        accuracy(settings, scheme.to_dict(), seeds=(0, 1))
    """
    # two busy jobs with two threads each slow one another several times (spinning OpenMP threads)
    torch.set_num_threads(1)
    training = trials(settings)
    return sum(training.accuracies([UpdateScheme.from_dict(scheme)], seed, split)[0] for seed in seeds) / len(seeds)


def accuracies(
    workers: Workers, settings: TrialSettings, problem: SearchProblem, seeds: tuple[int, ...], genomes: Sequence[Genome]
) -> list[float | None]:
    """Mean validation accuracy of each genome's scheme over seeds, by the workers; None where a worker was lost."""
    schemes = [problem.scheme(genome).to_dict() for genome in genomes]
    return workers.map(accuracy, [settings] * len(schemes), schemes, [seeds] * len(schemes))


# what of the settings the network and the data depend on
OF_THE_DATA = ("data", "data_dir", "data_options", "network", "weights", "width", "head_convolution", "resolution")
OF_THE_DATA += ("batch_size",)


def _key(settings: TrialSettings, names: Iterable[str]) -> str:
    """Settings as a key of a cache, although they hold a dictionary."""
    return json.dumps({name: getattr(settings, name) for name in names}, default=str, sort_keys=True)


@functools.lru_cache(maxsize=2)
def _network_and_data(key: str, augmentation_seed: int) -> tuple[DescribedNetwork, LightningDataModule]:
    settings = TrialSettings(**json.loads(key))
    if settings.data is None:
        raise UserError("trials need data: give --data")
    data = data_module(
        settings.data, settings.data_dir, settings.source, settings.resolution, settings.batch_size,
        augmentation_seed, settings.data_options,
    )  # fmt: skip
    with seeded_torch(0, 0, 0):
        described = describe_network(
            settings.source, data.input_shape, data.num_classes, settings.width, settings.head_convolution
        )
    return described, data


@functools.lru_cache(maxsize=2)
def _trials(key: str, recipe_seed: int | None) -> TrialTraining:
    settings = TrialSettings(**json.loads(key))
    described, data = network_and_data(settings, recipe_seed)

    def pretrained() -> nn.Module:
        module = Classifier(described.arguments, class_names=data.class_names, input_shape=list(described.input_shape))
        load_pretrained(module, settings.source, described.input_shape, whole=False)
        return module.net

    with seeded_torch(0, 0, 0):  # the same network in every process, even without weights
        network = pretrained()
    trunk, rest = cut_network(network, described.operations, settings.base_depth)
    features = TrunkFeatures(
        trunk,
        data,
        copies=min(settings.copies, math.ceil(settings.steps / len(data.train_dataloader()))),
        keep=settings.features,
        limit_bytes=settings.features_limit_mib * MIB,
        folder=None if settings.features_dir is None else Path(settings.features_dir),
    )

    @functools.cache
    def fresh_classifier(seed: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # as ``train`` begins
            network = network_of(described.arguments) if recipe_seed is None else pretrained()
            return network.classifier.state_dict()

    rate = settings.learning_rate or 0.1 / 256 * settings.batch_size
    return TrialTraining(rest, features, fresh_classifier, settings.steps, settings.batch_size, rate)
