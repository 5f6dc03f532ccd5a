"""Trials by plain settings, which travel to other processes and machines, where each builds its own."""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microtune.datamodules.contract import ClassificationData, Split
from microtune.datamodules.kept_features import MIB, TrunkFeatures
from microtune.datamodules.reproducible_order import seeded_torch
from microtune.modules.search.frozen_trunk import cut_network
from microtune.modules.search.integer_program import Genome
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.search.short_training import TrialTraining
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.options import JudgedBy, TrialSettings, check_data_is_named
from microtune.recipes.search.workers import Workers
from microtune.recipes.training.data_module import data_module
from microtune.recipes.training.networks import DescribedNetwork, describe_network

WORST_LOSS = 100.0  # nats: of what diverged


def described_by(settings: TrialSettings) -> DescribedNetwork:
    """The network that the settings train, without its weights; raises ``UserError`` without a validation split."""
    described, data = network_and_data(settings)
    if not data.val_samples:
        raise UserError("trials are judged on the validation split: leave validation_fraction 0 out")
    return described


def network_and_data(
    settings: TrialSettings, recipe_seed: int | None = None
) -> tuple[DescribedNetwork, ClassificationData]:
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


def fitness(
    settings: TrialSettings,
    scheme: dict[str, Any],
    seeds: tuple[int, ...],
    steps: int | None = None,
    judged_by: JudgedBy = "top1",
    learning_rate: float | None = None,
    split: Split = "val",
) -> float:
    """What one scheme is worth, the higher the better: the mean over seeds of its accuracy, or of its loss, negative.

    It is what a worker is asked for.

    Args:
        settings: Of the trials.
        scheme: As plain values.
        seeds: Of the trainings.
        steps: In place of those of the settings.
        judged_by: The measure; a loss that is no number, or beyond it, counts as ``WORST_LOSS``.
        learning_rate: In place of that of the settings.
        split: Where it is measured.

    Example::

        fitness(settings, scheme.to_dict(), seeds=(0, 1))  # 0.71, the mean accuracy
    """
    # two busy jobs with two threads each slow one another several times (spinning OpenMP threads)
    torch.set_num_threads(1)
    training, update = trials(settings), [UpdateScheme.from_dict(scheme)]
    found = [training.evaluate(training.train(update, seed, learning_rate, steps=steps), split)[0] for seed in seeds]
    if judged_by == "top1":
        return sum(one.top1 for one in found) / len(seeds)
    losses = [one.cross_entropy if one.cross_entropy < WORST_LOSS else WORST_LOSS for one in found]
    return -sum(losses) / len(seeds)


def fitnesses(
    workers: Workers,
    settings: TrialSettings,
    problem: SearchProblem,
    seeds: tuple[int, ...],
    genomes: Sequence[Genome],
    steps: int | None = None,
    judged_by: JudgedBy = "top1",
    learning_rate: float | None = None,
) -> list[float | None]:
    """The fitness of each genome's scheme, by the workers; None where a worker was lost."""
    schemes, count = [problem.scheme(genome).to_dict() for genome in genomes], len(genomes)
    return workers.map(
        fitness, [settings] * count, schemes, [seeds] * count, [steps] * count, [judged_by] * count,
        [learning_rate] * count,
    )  # fmt: skip


# what of the settings the network and the data depend on
OF_THE_DATA = ("data", "data_dir", "data_options", "network", "weights", "width", "head_convolution", "resolution")
OF_THE_DATA += ("batch_size",)


def _key(settings: TrialSettings, names: Iterable[str]) -> str:
    """Settings as a key of a cache, although they hold a dictionary."""
    return json.dumps({name: getattr(settings, name) for name in names}, default=str, sort_keys=True)


@functools.lru_cache(maxsize=2)
def _network_and_data(key: str, augmentation_seed: int) -> tuple[DescribedNetwork, ClassificationData]:
    settings = TrialSettings(**json.loads(key))
    check_data_is_named(settings)
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
    # Lightning takes seconds to import, which a command line need not wait for
    from microtune.modules.classifier import Classifier, network_of
    from microtune.recipes.training.pretrained import load_pretrained

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

    return TrialTraining(rest, features, fresh_classifier, settings.steps, settings.batch_size, settings.rate)
