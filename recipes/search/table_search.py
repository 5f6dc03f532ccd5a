"""The search by a contribution table: the network, the rows that may be chosen, the problem and its proven optimum."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microtune.modules.int8.graph import float_names
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.networks.operations import Convolution
from microtune.modules.search.contributions import Contribution, ContributionTable
from microtune.modules.search.scheme_optimum import Optimum, proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.simple_schemes import is_expanding
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget
from microtune.recipes.search.options import Level, TrialSettings
from microtune.recipes.search.trials import described_by
from microtune.recipes.training.memory_figures import KIB, what_would_fit
from microtune.recipes.training.networks import DescribedNetwork, describe_network

log = logging.getLogger(__name__)


def searched_network(
    settings: TrialSettings, input_width: int | None, in_channels: int, num_classes: int
) -> DescribedNetwork:
    """The network whose schemes are searched.

    Args:
        settings: Settings of the trials; where they name data, the network is that of the data.
        input_width: Width of the input; by default as its height, the resolution.
        in_channels: Number of channels of the input.
        num_classes: Number of outputs of the classifier.
    """
    if settings.data is not None:
        return described_by(settings)
    shape = (in_channels, settings.resolution, settings.resolution if input_width is None else input_width)
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
