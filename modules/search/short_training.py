"""Trials: short trainings of candidate schemes from one network, judged on the validation split."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from microtune.modules.int8.stochastic_rounding import IntegerGenerator
from microtune.modules.learning_rate import learning_rate_factor
from microtune.modules.networks.operations import NetworkOperations, find_operations
from microtune.modules.sparse_update.channel_choice import choose_channels, is_due, seed_at_step, to_be_chosen
from microtune.modules.sparse_update.channel_importance import (
    WITHOUT_DATA,
    Criterion,
    DivergedError,
    measure_importance,
)
from microtune.modules.sparse_update.fitted_classifier import measure_with_fitted_classifier
from microtune.modules.sparse_update.int8_update import (
    WeightStorage,
    keep_in_range,
    quantized_parameters,
    round_in_place,
    scale_gradients,
)
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
Split = Literal["train", "val", "test"]


class Features(Protocol):
    """What a frozen trunk makes of a data set, such as ``TrunkFeatures`` of ``datamodules/kept_features.py``.

    Attributes:
        shape: Channels, height and width of a sample's features.
        samples: How many there are in each split.
    """

    shape: tuple[int, int, int]
    samples: dict[Split, int]

    def training_batches(self, batch_size: int, seed: int, steps: int) -> Iterator[Batch]:
        """Features (N, C, H, W) and labels (N,) of ``steps`` batches, in the order that ``seed`` gives."""

    def first_batches(self, batch_size: int, seed: int, step: int, count: int) -> Iterator[Batch]:
        """The first batches, ``count`` or all, of the epoch that a step of ``training_batches`` is in."""

    def evaluation_batches(self, split: Split) -> Iterator[Batch]:
        """Features and labels of the validation split, or of the test split."""


@dataclass(frozen=True)
class Choice:
    """How a trial chooses the channels that its scheme does not fix, as ``SparseUpdate`` does.

    Args:
        criterion: By which score.
        rechoose_every: Steps after which they are chosen anew; 0 for once, at the start.
        samples: Training samples that scores are measured on. Before the first step the classifier knows nothing yet:
            then it is fitted to half of them, for the time being, and the scores are those of the other half.
    """

    criterion: Criterion = "weight_norm"
    rechoose_every: int = 0
    samples: int = 256


@dataclass(frozen=True)
class Int8Update:
    """How a trial updates an int8 network, as the callbacks ``QuantizationAwareScaling`` and ``Int8Weights`` do.

    Args:
        weight_storage: As in ``Int8Weights``.
        gradient_scaling: Whether gradients are scaled.
    """

    weight_storage: WeightStorage = "in_place"
    gradient_scaling: bool = True


@dataclass(frozen=True)
class Evaluation:
    """What a trained network is worth on a split.

    Args:
        top1: Accuracy, a fraction.
        cross_entropy: Mean loss in nats per sample; no number where the training diverged.
    """

    top1: float
    cross_entropy: float


class TrialTraining:
    """Trains candidate schemes for a number of steps and tells their accuracy on the validation split.

    A trial does what ``Classifier`` and ``SparseUpdate`` do under a Trainer (SGD without momentum, warm-up, cosine), to
    the bit in batches of 16 samples or more, and of an int8 network ``Int8Training``; but it always has a fresh
    classifier, begins behind the frozen trunk, and has no Trainer around it, which would take as long again. Candidates
    of one call train side by side: they share the batches and, where it is not kept, the trunk's work.

    Args:
        rest: The network behind the trunk, from ``cut_network``.
        features: What the trunk makes of the data.
        fresh_classifier: Gives the classifier's weights that a seed begins with.
        steps: Optimizer steps of a trial.
        batch_size: Samples of a step.
        learning_rate: At its highest.
        warmup_fraction: Part of the steps in which it rises.

    Example::

        trunk, rest = cut_network(network, operations, bias_depth=36)
        trials = TrialTraining(rest, TrunkFeatures(trunk, data, copies=1), fresh_classifier, steps=100)
        trials.accuracies([scheme, other], seed=0)  # [0.71, 0.73]
    """

    def __init__(
        self,
        rest: nn.Module,
        features: Features,
        fresh_classifier: Callable[[int], Mapping[str, Tensor]],
        steps: int,
        batch_size: int = 32,
        learning_rate: float = 0.0125,
        warmup_fraction: float = 0.1,
    ):
        self.rest = rest
        self.features = features
        self.operations = find_operations(self.rest, features.shape)
        self.fresh_classifier = fresh_classifier
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.warmup_fraction = warmup_fraction

    def accuracies(self, schemes: Sequence[UpdateScheme], seed: int, split: Split = "val") -> list[float]:
        """Top-1 after training each of the schemes, with the same classifier and batches.

        Args:
            schemes: The candidates, none deeper than the trunk allows.
            seed: Of the fresh classifier and the order of the samples.
            split: Where the accuracy is measured. Nothing may be chosen by that on ``"test"``.

        Raises:
            UserError: A scheme reaches into the trunk.
        """
        return self.accuracies_on((split,), schemes, seed)[split]

    def accuracies_on(
        self,
        splits: Sequence[Split],
        schemes: Sequence[UpdateScheme],
        seed: int,
        learning_rate: float | None = None,
        choice: Choice | None = None,
    ) -> dict[Split, list[float]]:
        """Top-1 on several splits after one training of each of the schemes.

        Args:
            splits: Where the accuracy is measured.
            schemes: As in ``accuracies``.
            seed: As in ``accuracies``, and of a random choice of channels.
            learning_rate: In place of that of the trials.
            choice: Of channels; by default the largest weights.

        Raises:
            UserError: A scheme reaches into the trunk.
        """
        candidates = self.train(schemes, seed, learning_rate, choice)
        return {split: [one.top1 for one in self.evaluate(candidates, split)] for split in splits}

    def train(
        self,
        schemes: Sequence[UpdateScheme],
        seed: int,
        learning_rate: float | None = None,
        choice: Choice | None = None,
        int8_update: Int8Update | None = None,
        warmup_fraction: float | None = None,
        steps: int | None = None,
    ) -> list["Candidate"]:
        """Trains a network under each of the schemes.

        Args:
            schemes: As in ``accuracies``.
            seed: As in ``accuracies_on``.
            learning_rate: As in ``accuracies_on``.
            choice: As in ``accuracies_on``.
            int8_update: Of an int8 network; by default with scaled gradients, and in place.
            warmup_fraction: In place of that of the trials.
            steps: In place of those of the trials; the schedule of learning rates ends with them.

        Returns:
            What was trained; a loss that is no number says that it diverged.

        Raises:
            UserError: A scheme reaches into the trunk.
        """
        choice = choice or Choice()
        peak = self.learning_rate if learning_rate is None else learning_rate
        steps = self.steps if steps is None else steps
        warmup_steps = round((self.warmup_fraction if warmup_fraction is None else warmup_fraction) * steps)
        candidates = [self._candidate(scheme, seed, int8_update or Int8Update()) for scheme in schemes]
        chosen_at_step = 0 if choice.criterion == "weight_norm" else None  # candidates begin with the largest weights
        for step, (features, labels) in enumerate(self.features.training_batches(self.batch_size, seed, steps)):
            if is_due(step, chosen_at_step, choice.rechoose_every):
                chosen_at_step = step
                samples = self._choosing_batches(choice, seed, step)
                for candidate in candidates:
                    candidate.choose(choice.criterion, seed, step, samples)
            factor = learning_rate_factor(step, warmup_steps, steps)
            for candidate in candidates:
                candidate.step(features, labels, peak * factor)
        for scheme, candidate in zip(schemes, candidates, strict=True):
            if not math.isfinite(candidate.loss):
                log.warning(
                    "a trial with bias depth %d and %d weights diverged at learning rate %g, and its accuracy means "
                    "little: give a smaller --learning_rate",
                    scheme.bias_depth,
                    len(scheme.weights),
                    peak,
                )
        return candidates

    def step_seconds(self, scheme: UpdateScheme, steps: int = 5) -> float:
        """Seconds of an optimizer step behind the trunk, measured on this machine, the fastest of some."""
        candidate = self._candidate(scheme, 0, Int8Update())
        features = torch.zeros(self.batch_size, *self.features.shape)
        labels, seconds = torch.zeros(self.batch_size, dtype=torch.long), []
        for _ in range(steps):
            started = time.perf_counter()
            candidate.step(features, labels, 0.0)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def evaluate(self, candidates: Sequence["Candidate"], split: Split) -> list[Evaluation]:
        """What each of the trained networks is worth; nothing may be chosen by that on ``"test"``."""
        sums = torch.zeros(len(candidates), 2, dtype=torch.float64)
        for features, labels in self.features.evaluation_batches(split):
            for index, candidate in enumerate(candidates):
                sums[index] += candidate.correct_and_loss(features, labels)
        samples = self.features.samples[split]
        return [Evaluation(correct / samples, loss / samples) for correct, loss in sums.tolist()]

    def _choosing_batches(self, choice: Choice, seed: int, step: int) -> list[Batch]:
        """The first batches of the epoch that the step is in."""
        if choice.criterion in WITHOUT_DATA:
            return []
        count = math.ceil(choice.samples / self.batch_size)
        return list(self.features.first_batches(self.batch_size, seed, step, count))

    def _candidate(self, scheme: UpdateScheme, seed: int, int8_update: Int8Update) -> "Candidate":
        if scheme.bias_depth > len(self.operations.convolutions):
            raise UserError(
                f"bias depth {scheme.bias_depth} reaches into the frozen trunk: give at most "
                f"{len(self.operations.convolutions)}, or a larger --base_depth"
            )
        network = copy.deepcopy(self.rest)
        network.classifier.load_state_dict(self.fresh_classifier(seed))
        return Candidate(network, scheme, self.operations, seed, int8_update)


class Candidate:
    """One network in training.

    Attributes:
        network: What is trained, behind the trunk.
        loss: Of its last step.
    """

    def __init__(
        self,
        network: nn.Module,
        scheme: UpdateScheme,
        operations: NetworkOperations,
        seed: int,
        int8_update: Int8Update,
    ):
        self.network, self.scheme, self.operations = network.train(), scheme, operations
        channels = choose_channels(network, scheme, operations.convolutions)
        self.applied = AppliedScheme(network, scheme, operations, channels)
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=math.nan)
        self.quantized = quantized_parameters(network)  # none in floating point
        self.int8_update, self.generator = int8_update, IntegerGenerator(seed)
        self.loss = math.nan

    def choose(self, criterion: Criterion, seed: int, step: int, batches: Sequence[Batch]) -> None:
        """Chooses channels anew, and takes those from now on; a training that diverged keeps those that it has."""
        chosen = to_be_chosen(self.scheme, self.operations.convolutions)
        if not chosen:
            return
        importance = None
        try:
            if batches and step == 0:
                importance, _ = measure_with_fitted_classifier(self.network, self.operations, chosen, batches)
            elif batches:
                importance = measure_importance(self.network, chosen, batches)
        except DivergedError:
            return
        seed = seed_at_step(seed, step)
        moved = choose_channels(self.network, self.scheme, chosen, criterion, seed, importance)
        self.applied.move_channels(moved, [self.optimizer])
        self.quantized = quantized_parameters(self.network)

    def step(self, features: Tensor, labels: Tensor, learning_rate: float) -> None:
        """Updates the network by the gradient of one batch."""
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.network(features), labels)
        loss.backward()
        if self.int8_update.gradient_scaling:
            scale_gradients(self.quantized)
        self.optimizer.step()
        if self.int8_update.weight_storage == "in_place":
            round_in_place(self.quantized, self.generator)
        else:
            keep_in_range(self.quantized)
        self.loss = float(loss.detach())

    @torch.no_grad()
    def correct_and_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """How many of a batch the network gets right, and its loss, summed over the samples: float64 of shape (2,)."""
        logits = self.network.eval()(features)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return torch.stack([(logits.argmax(dim=1) == labels).sum(), loss]).double()
