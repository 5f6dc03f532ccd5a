"""What a search is about, from the command line: the network, the budget, and where a scheme came from."""

import hashlib
import json
import logging
import random
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microtune.modules.contributions import ContributionTable
from microtune.modules.microcontrollers import MICROCONTROLLERS, Microcontroller, microcontroller
from microtune.modules.peak_memory import PeakMemory
from microtune.modules.quantized_graph import float_names
from microtune.modules.scheme_optimum import Optimum
from microtune.modules.scheme_search import Genome, Memory, SearchProblem
from microtune.modules.simple_schemes import is_expanding
from microtune.modules.user_error import UserError
from microtune.recipes.memory_figures import KIB, what_would_fit
from microtune.recipes.networks import DescribedNetwork, describe_network
from microtune.recipes.run_folder import read_config
from microtune.recipes.trial_setup import TrialSettings, described_by

log = logging.getLogger(__name__)


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


def load_table(path: Path, described: DescribedNetwork) -> ContributionTable:
    """Reads a table; of an int8 network also one that was measured on what it was in floating point."""
    table = ContributionTable.load(path)
    if not described.is_quantized:
        return table
    renamed = table.renamed(float_names(described.network.graph))
    if renamed != table:
        log.info("%s was measured in floating point: its layers go by the names of the int8 network", path)
    return renamed


def check_table(path: Path, table: ContributionTable, described: DescribedNetwork, allow_missing_layers: bool) -> None:
    """Raises ``UserError`` unless the table suits the network, with all expanding convolutions that it could have."""
    convolutions = described.operations.convolutions
    within = convolutions[max(0, len(convolutions) - table.base_depth) :]
    expected = [] if allow_missing_layers else [layer.name for layer in within if is_expanding(layer)]
    try:
        table.check(convolutions, expected)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def make_problem(described: DescribedNetwork, table: ContributionTable, budget: Budget) -> SearchProblem:
    """The search problem; where no scheme fits the budget, the error says what would do."""
    peak_memory = PeakMemory(described.operations)
    device = budget.microcontroller
    if device is not None and peak_memory.floor_bytes > device.budget_bytes:
        what = what_would_fit(peak_memory, device, described.network)
        raise UserError(f"{device.name} has {device.budget_bytes / KIB:.1f} KiB for a training step, but {what}")
    limit = None if device is None else device.flash_bytes
    return SearchProblem(described.name, peak_memory, table, budget.size_bytes, budget.memory, limit)


def all_budgets() -> list[Budget]:
    """The peak budgets of all known microcontrollers, the smallest first."""
    devices = sorted(MICROCONTROLLERS.values(), key=lambda device: device.budget_bytes)
    return [Budget("peak", device.budget_bytes, device) for device in devices]


def refuse_without_data(settings: TrialSettings, fitness: str, finalists: int, all_mcus: bool) -> None:
    """Raises ``UserError`` where schemes are to be trained, but there is nothing to train on."""
    if finalists < 0:
        raise UserError(f"finalists is {finalists}: give 0 or more")
    if all_mcus and fitness == "accuracy":
        raise UserError("all_mcus searches by the table: give --fitness table, or one --mcu at a time")
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
    """As many of the last layers as fit, at each ratio, the highest first; the paper's own schemes are much like it."""
    highest = max((len(ratios) for ratios in problem.ratios), default=1) - 1
    return [problem.from_the_back(option) for option in range(highest, 0, -1)]


def provenance_of(
    recipe: str, arguments: dict[str, Any], contributions: Path, budget: Budget, found: dict[str, Any]
) -> dict[str, Any]:
    """Everything that made a scheme: the commands, the table's contents, the budget, and what the search found.

    The command leaves out what does not decide the outcome, and what is None by default. Where the table lies in the
    folder of its measurement, the arguments of that are kept too.
    """
    left_out = {"out_dir", "resume", "logger", "processes", "cluster", "features", "features_limit_mib", "features_dir"}
    if arguments.get("data") is None:  # nothing is trained
        left_out |= TrialSettings.__dataclass_fields__.keys() - {"network", "width", "head_convolution", "resolution"}
        left_out |= {"trial_seeds", "final_steps", "final_seeds"}
    words = [f"recipes/{recipe}.py"]
    for name, value in arguments.items():
        if value is not None and value != {} and name not in left_out:
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    device = budget.microcontroller
    config = contributions.parent / "config.yaml"
    return {
        "command": "uv run " + shlex.join(words),
        "contributions_sha256": hashlib.sha256(contributions.read_bytes()).hexdigest(),
        "contributions_arguments": read_config(config) if config.exists() else None,
        "memory": budget.memory,
        "mcu": None if device is None else device.name,
        "budget_bytes": budget.size_bytes,
        "found": found,
    }
