"""What a search is about, from the command line: the network, the budget, and where a scheme came from."""

import hashlib
import json
import logging
import math
import random
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from microtune.modules.int8.graph import float_names
from microtune.modules.memory.microcontrollers import MICROCONTROLLERS, Microcontroller, microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.networks.operations import Convolution
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.search.genome_bytes import Memory
from microtune.modules.search.gradient_contributions import gradient_table, with_channels
from microtune.modules.search.integer_program import Genome
from microtune.modules.search.scheme_optimum import Optimum, proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.channel_importance import ChannelImportance
from microtune.modules.sparse_update.fitted_classifier import measure_with_fitted_classifier
from microtune.modules.sparse_update.simple_schemes import is_expanding
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.trials import TrialSettings, described_by, trials
from microtune.recipes.training.memory_figures import KIB, what_would_fit
from microtune.recipes.training.networks import DescribedNetwork, describe_network
from microtune.recipes.training.run_folder import read_config

log = logging.getLogger(__name__)

Level = Literal["sub_tensor", "layer"]
GRADIENT = "gradient"  # in place of a table's file
NATS = "nats per unit of learning rate"  # the unit of a gradient's scores; that of a table's is accuracy
COARSE_OPTIONS = 8  # numbers of channels per layer, where every scheme is trained


@dataclass(frozen=True)
class Budget:
    """What a scheme may take.

    Args:
        memory: Whether the peak of a training step counts, or the paper's extra memory.
        size_bytes: The limit.
        microcontroller: The device whose limit it is; none of extra memory, which leaves out the forward pass.
    """

    memory: Memory
    size_bytes: int
    microcontroller: Microcontroller | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """For a report."""
        mcu = None if self.microcontroller is None else self.microcontroller.name
        return {"memory": self.memory, "budget_bytes": self.size_bytes, "mcu": mcu}

    def __str__(self) -> str:
        whose = f" of {self.microcontroller.name}" if self.microcontroller else ""
        return f"{self.size_bytes / KIB:.1f} KiB of {self.memory} memory{whose}"


def budget_of(
    memory: Memory, budget_kib: float | None, mcu: str | None, sram_bytes: int | None, flash_bytes: int | None,
    reserve_bytes: int | None,
) -> Budget:  # fmt: skip
    """The budget that the command line describes: an MCU by the peak, or kibibytes of either memory."""
    described = mcu is not None or any(size is not None for size in (sram_bytes, flash_bytes, reserve_bytes))
    if budget_kib is not None:
        if not 0 < budget_kib < 1e9:
            raise UserError(f"budget_kib is {budget_kib}: give a positive number of kibibytes")
        if described:
            raise UserError("a microcontroller and budget_kib are two budgets: give one of them")
        return Budget(memory, round(budget_kib * KIB))
    if memory == "extra":
        raise UserError(
            "extra memory leaves out the forward pass, so that no microcontroller is its limit: give --budget_kib, "
            "or --memory peak"
        )
    default = "stm32f746" if sram_bytes is None else None
    device = microcontroller(mcu or default, sram_bytes, flash_bytes, reserve_bytes)
    return Budget("peak", device.budget_bytes, device)


def searched_network(
    settings: TrialSettings, resolution: int, input_width: int | None, in_channels: int, num_classes: int
) -> DescribedNetwork:
    """The network whose schemes are searched: that of the data, where there is any."""
    if settings.data is not None:
        return described_by(settings)
    shape = (in_channels, resolution, resolution if input_width is None else input_width)
    return describe_network(settings.source, shape, num_classes, settings.width, settings.head_convolution)


def load_table(path: Path | str, described: DescribedNetwork) -> ContributionTable:
    """Reads a table; of an int8 network also one that was measured on what it was in floating point."""
    table = ContributionTable.load(path)
    if not described.is_quantized:
        return table
    renamed = table.renamed(float_names(described.network.graph))
    if renamed != table:
        log.info("%s was measured in floating point: its layers go by the names of the int8 network", path)
    return renamed


def check_table(
    path: Path | str, table: ContributionTable, described: DescribedNetwork, allow_missing_layers: bool
) -> None:
    """Raises ``UserError`` unless the table suits the network, with all expanding convolutions that it could have."""
    convolutions = described.operations.convolutions
    within = convolutions[max(0, len(convolutions) - table.base_depth) :]
    expected = [] if allow_missing_layers else [layer.name for layer in within if is_expanding(layer)]
    try:
        table.check(convolutions, expected)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def searched_rows(
    path: Path | str, table: ContributionTable, convolutions: Sequence[Convolution], level: Level, channel_multiple: int
) -> ContributionTable:
    """The rows of a measured table that may be chosen.

    Args:
        path: Of the table.
        table: All of its rows.
        convolutions: The network's.
        level: Whether layers are updated whole only.
        channel_multiple: The numbers of channels are multiples of it, or the whole layer.

    Raises:
        UserError: None of its weights may be.
    """
    by_name = {convolution.name: convolution for convolution in convolutions}

    def is_searched(row: Contribution) -> bool:
        if row.kind == "bias":
            return True
        of = by_name[row.layer]
        count = UpdateScheme("", row.bias_depth, {row.layer: row.ratio}).updated_channels(of)
        return count == of.in_channels or (level == "sub_tensor" and count % channel_multiple == 0)

    rows = tuple(row for row in table.rows if is_searched(row))
    if table.weight_gains and not any(row.kind == "weight" for row in rows):
        asked, remedy = "a whole layer", "search with --level sub_tensor"
        if level == "sub_tensor":
            asked = f"a whole layer or a multiple of {channel_multiple} channels"
            remedy = "give a smaller --channel_multiple"
        raise UserError(f"{path}: no weight row is of {asked}: measure ratio 1 too, or {remedy}")
    return ContributionTable(rows)


def searched_table(
    path: Path | str, described: DescribedNetwork, allow_missing_layers: bool, level: Level, channel_multiple: int
) -> ContributionTable:
    """Reads a measured table that suits the network, and leaves the rows that may be chosen."""
    table = load_table(path, described)
    check_table(path, table, described, allow_missing_layers)
    return searched_rows(path, table, described.operations.convolutions, level, channel_multiple)


def make_problem(
    described: DescribedNetwork,
    table: ContributionTable,
    budget: Budget,
    fix_channels: Callable[[UpdateScheme], UpdateScheme] | None = None,
) -> SearchProblem:
    """The search problem; where no scheme fits the budget, the error says what would do."""
    peak_memory = PeakMemory(described.operations)
    device = budget.microcontroller
    if device is not None and peak_memory.floor_bytes > device.budget_bytes:
        what = what_would_fit(peak_memory, device, described.network)
        raise UserError(f"{device.name} has {device.budget_bytes / KIB:.1f} KiB for a training step, but {what}")
    limit = None if device is None else device.flash_bytes
    return SearchProblem(described.name, peak_memory, table, budget.size_bytes, budget.memory, limit, fix_channels)


@dataclass(frozen=True)
class Search:
    """What is to be solved, and what is known of it before.

    Args:
        problem: What to solve.
        table: Its contributions.
        optimum: Its proven optimum.
        facts: What a report says of all this.
    """

    problem: SearchProblem
    table: ContributionTable
    optimum: Optimum
    facts: dict[str, Any]


def table_search(described: DescribedNetwork, table: ContributionTable, budget: Budget) -> Search:
    """The search by a measured table."""
    problem = make_problem(described, table, budget)
    return Search(problem, table, proven_optimum(problem), {"score_unit": "accuracy"})


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


def all_budgets() -> list[Budget]:
    """The peak budgets of all known microcontrollers, the smallest first."""
    devices = sorted(MICROCONTROLLERS.values(), key=lambda device: device.budget_bytes)
    return [Budget("peak", device.budget_bytes, device) for device in devices]


def refuse_beside_gradient(fitness: str, all_mcus: bool, allow_missing_layers: bool, **of_a_search: int | None) -> None:
    """Raises ``UserError`` where arguments make no sense beside contributions from a gradient.

    Args:
        fitness: As in the recipe.
        all_mcus: As in the recipe.
        allow_missing_layers: As in the recipe.
        of_a_search: What only a search has, where it was given.
    """
    if all_mcus:
        raise UserError("all_mcus searches by a measured table: give its file as --contributions, or one --mcu")
    if allow_missing_layers:
        raise UserError("allow_missing_layers is of a measured table, and a gradient misses none: leave it out")
    for name, value in of_a_search.items():
        if value and fitness == "table":
            raise UserError(
                f"{name} is {value}, but by the gradient alone the best scheme is computed, not searched for: leave "
                f"--{name} out, or train schemes with --fitness accuracy"
            )


def refuse_beside_table(**of_a_gradient: int | None) -> None:
    """Raises ``UserError`` where arguments are given that only contributions from a gradient have."""
    for name, value in of_a_gradient.items():
        if value is not None:
            raise UserError(
                f"{name} is {value}, but a table brings its own: leave it out, or --contributions {GRADIENT}"
            )


def refuse_beside_all_mcus(resume: bool, memory: Memory, *of_a_budget: str | float | None) -> None:
    """Raises ``UserError`` where arguments make no sense beside the budgets of all microcontrollers.

    Args:
        resume: As in the recipe.
        memory: As in the recipe.
        of_a_budget: What describes another budget, or None.
    """
    if resume:
        raise UserError("all_mcus takes less than a minute or two and is not resumed: leave --resume out")
    if memory != "peak" or any(given is not None for given in of_a_budget):
        raise UserError("all_mcus takes the budget of each known microcontroller: leave out every other budget")


def refuse_without_data(
    settings: TrialSettings, fitness: str, finalists: int, all_mcus: bool, is_gradient: bool = False
) -> None:
    """Raises ``UserError`` where schemes are to be trained, but there is nothing to train on."""
    if finalists < 0:
        raise UserError(f"finalists is {finalists}: give 0 or more")
    if all_mcus and fitness == "accuracy":
        raise UserError("all_mcus searches by the table: give --fitness table, or one --mcu at a time")
    if settings.data is None and is_gradient:
        raise UserError("a gradient is that of training samples: say of what with --data")
    if settings.data is None and fitness == "accuracy":
        raise UserError("fitness accuracy trains every scheme: say on what with --data, or give --fitness table")
    if settings.data is None and finalists and not all_mcus:
        raise UserError("the finalists are trained: say on what with --data, or give --finalists 0")


def good_guesses(problem: SearchProblem, optimum: Optimum, population: int) -> list[Genome]:
    """What a search by accuracy begins with: the table's optimum, rules of thumb, and neighbours of the optimum.

    They are three quarters of a population at most: the rest is random, so that the table does not decide everything.
    """
    neighbours = problem.neighbours(optimum.genome)
    random.shuffle(neighbours)
    guesses = [optimum.genome, *rules_of_thumb(problem), *neighbours]
    return list(dict.fromkeys(guesses))[: population * 3 // 4]


def rules_of_thumb(problem: SearchProblem) -> list[Genome]:
    """As many of the last layers as fit at each option, the highest first; the paper's own schemes are much like it.

    Of a measured table an option is the same ratio in every layer. Of a gradient it is another fraction in each, since
    layers have other numbers of channels to choose from.
    """
    highest = max((len(ratios) for ratios in problem.ratios), default=1) - 1
    return [problem.from_the_back(option) for option in range(highest, 0, -1)]


def provenance_of(
    recipe: str, arguments: dict[str, Any], contributions: Path, budget: Budget, found: dict[str, Any]
) -> dict[str, Any]:
    """Everything that made a scheme: the commands, the table's contents, the budget, and what the search found.

    The command leaves out what does not decide the outcome, and what is None by default. Where the table lies in the
    folder of its measurement, the arguments of that are kept too; a table from a gradient is described by the command.
    """
    left_out = {"out_dir", "resume", "logger", "processes", "cluster", "features", "features_limit_mib", "features_dir"}
    if arguments.get("data") is None:  # nothing is trained
        left_out |= TrialSettings.__dataclass_fields__.keys() - {"network", "width", "head_convolution", "resolution"}
        left_out |= {"trial_seeds", "final_steps", "final_seeds"}
    is_gradient = arguments["contributions"] == GRADIENT
    if is_gradient and arguments["fitness"] == "table":
        left_out |= {"steps", "learning_rate", "copies", "trial_seeds", "final_steps", "final_seeds"}
    words = [f"recipes/{recipe}.py"]
    for name, value in arguments.items():
        if value is not None and value != {} and name not in left_out:
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    device = budget.microcontroller
    config = contributions.parent / "config.yaml"
    return {
        "command": "uv run " + shlex.join(words),
        "contributions_sha256": hashlib.sha256(contributions.read_bytes()).hexdigest(),
        "contributions_arguments": read_config(config) if config.exists() and not is_gradient else None,
        "memory": budget.memory,
        "mcu": None if device is None else device.name,
        "budget_bytes": budget.size_bytes,
        "found": found,
    }
