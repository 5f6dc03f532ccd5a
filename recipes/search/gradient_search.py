"""The search by a gradient: measured in one backward pass, in place of a table that trials measure."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.gradient_contributions import gradient_table, with_channels
from microtune.modules.search.scheme_optimum import Optimum, proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.channel_importance import ChannelImportance
from microtune.modules.sparse_update.fitted_classifier import measure_with_fitted_classifier
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget
from microtune.recipes.search.options import Level, TrialSettings
from microtune.recipes.search.table_search import Search, make_problem
from microtune.recipes.search.trials import described_by, trials
from microtune.recipes.training.networks import DescribedNetwork

NATS = "nats per unit of learning rate"  # the unit of a gradient's scores; that of a table's is accuracy
COARSE_OPTIONS = 8  # numbers of channels per layer, where every scheme is trained


@dataclass(frozen=True)
class MeasuredGradient:
    """What one backward pass says.

    Args:
        importance: Of every channel within the base depth, by the samples of the backward pass.
        classifier_top1: Accuracy, on the samples of the backward pass, of the classifier that was fitted to others.
        samples: Of both.
    """

    importance: ChannelImportance
    classifier_top1: float
    samples: int

    @property
    def facts(self) -> dict[str, Any]:
        """For a report."""
        return {
            "score_unit": NATS, "choice_samples": self.samples, "gradient_samples": self.importance.samples,
            "classifier_top1": self.classifier_top1,
        }  # fmt: skip


def measure_gradient(settings: TrialSettings, samples: int, seed: int) -> MeasuredGradient:
    """Fits the classifier to half of some training samples and measures the gradient of the others' loss: seconds.

    Args:
        settings: Of the network, its data and the base depth.
        samples: How many, or all of a smaller training split: the first in the order that trainings have by this seed.
        seed: Of that order.

    Raises:
        UserError: The base depth is more than the network has.
    """
    convolutions = described_by(settings).operations.convolutions
    if settings.base_depth > len(convolutions):
        raise UserError(f"base_depth is {settings.base_depth}: give no more than the {len(convolutions)} convolutions")
    # one step: the first copy of each sample is as good as another
    training = trials(replace(settings, features="none", steps=1))
    samples = min(samples, training.features.samples["train"])
    steps = math.ceil(samples / settings.batch_size)
    batches = list(_first(samples, training.features.training_batches(settings.batch_size, seed, steps)))
    convolutions = training.operations.convolutions[-settings.base_depth :]
    found = measure_with_fitted_classifier(training.rest, training.operations, convolutions, batches)
    return MeasuredGradient(*found, samples)


def _first(samples: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of no more than so many samples."""
    for features, labels in batches:
        yield features[:samples], labels[:samples]
        samples -= len(labels[:samples])


def gradient_search(
    described: DescribedNetwork,
    measured: MeasuredGradient,
    budget: Budget,
    base_depth: int,
    level: Level,
    channel_multiple: int,
    is_coarse: bool,
) -> Search:
    """The search by a gradient, and the scheme that it says is best: at the granularity of single channels.

    Args:
        described: The network.
        measured: The gradient.
        budget: What a scheme may take.
        base_depth: The deepest bias depth.
        level: Whether layers are updated whole only.
        channel_multiple: The numbers of channels are multiples of it, or the whole layer.
        is_coarse: Whether the problem has a few numbers of channels per layer, beside those of the best scheme.

    Returns:
        Its schemes have the channels of the highest gain, and its optimum is the best scheme.
    """
    convolutions = described.operations.convolutions

    def fix_channels(scheme: UpdateScheme) -> UpdateScheme:
        return with_channels(scheme, convolutions, measured.importance)

    def build(**options: Any) -> tuple[SearchProblem, ContributionTable]:
        table = gradient_table(measured.importance, convolutions, base_depth, channel_multiple, **options)
        return make_problem(described, table, budget, fix_channels), table

    problem, table = build(most_options=1 if level == "layer" else None)
    optimum = proven_optimum(problem)
    if not is_coarse or level == "layer":
        return Search(problem, table, optimum, measured.facts)
    best = problem.scheme(optimum.genome)
    also = {layer: len(channels) for layer, channels in best.channels.items()}
    problem, table = build(most_options=COARSE_OPTIONS, also=also)
    # what is best of all numbers of channels is best of some of them
    return Search(problem, table, Optimum(problem.genome_of(best), optimum.score), measured.facts)
