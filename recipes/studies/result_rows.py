"""Measured accuracies as rows of CSV, one training each: what tables and pictures of results are made from."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from microtune.datamodules.data_sets import DATA_SETS
from microtune.modules.csv_rows import read_rows
from microtune.modules.memory.microcontrollers import KIB, MICROCONTROLLERS
from microtune.modules.user_error import UserError

# what the project measures, in the order of tables
DATA = {
    "cifar10": DATA_SETS["cifar10"].title,
    "flowers17": "Flowers-17",
    "speech_commands": DATA_SETS["speech_commands"].title,
    "mswc_arabic": "MSWC Arabic",
    "cifar100": DATA_SETS["cifar100"].title,
}
NUMBERS = ("fp32", "int8")
METHODS = {
    "full": "full update",
    "last_layers": "last layers",
    "biases": "biases only",
    "layers": "evolved, whole layers",
    "sub_tensor": "evolved, sub-tensors",
    "one_pass": "from one backward pass",
    "one_pass_4": "the same, multiples of 4 channels",
    "dynamic": "dynamic channels",
}
BUDGETS = ("extra64", "extra100", "extra256", "stm32f746")
SEEDS = (0, 1, 2)
# as modules/sparse_update/channel_importance.py has them, which imports PyTorch
CRITERIA = ("weight_norm", "gradient_norm", "fisher", "taylor", "loss_decrease", "activation_norm", "random")
LOWEST = {"bias_depth": 0, "updated_layers": 0, "updated_channels": 0, "seed": 0, "rechoose_every": 0} | {
    "steps": 1, "batch_size": 1, "extra_memory_bytes": 0, "peak_memory_bytes": 0
} | {"search_seconds": 0, "train_seconds": 0, "seconds": 0}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One training under a method's scheme: a row of ``results.csv``, whose columns are these, in this order.

    Args:
        data: One of ``DATA``, or another of your own: letters, digits and underscores.
        numbers: What the network computes in: ``"fp32"`` or ``"int8"``.
        method: One of ``METHODS``: where its scheme comes from.
        budget: One of ``BUDGETS``: KiB of extra memory, or a microcontroller; of ``"full"`` it is ``"none"``.
        seed: Of the fresh classifier, the order of the samples and their augmentation.
        top1: Accuracy on the test split, a fraction.
        val_top1: On the validation split; None where it is not known.
        extra_memory_bytes, peak_memory_bytes: Of one training step.
        bias_depth: The biases of this many last convolutions are updated.
        updated_layers, updated_channels: Of how many layers the weights are, and how many of their input channels.
        learning_rate: At its highest.
        steps: Of the training.
        batch_size: Samples per step.
        search_seconds: Time to get the scheme; 0 of a rule.
        train_seconds: Time to train.

    Raises:
        UserError: A value is out of its range, or the memory beyond the budget.

    Example::

        Result("cifar10", "fp32", "biases", "extra64", 0, 0.798, None, 61747, 171930, 47, 0, 0, 0.05, 1830, 32, 0, 71.0)
    """

    data: str
    numbers: str
    method: str
    budget: str
    seed: int
    top1: float
    val_top1: float | None
    extra_memory_bytes: float
    peak_memory_bytes: float
    bias_depth: int
    updated_layers: int
    updated_channels: int
    learning_rate: float
    steps: int
    batch_size: int
    search_seconds: float
    train_seconds: float

    def __post_init__(self):
        _check_name(self.data)
        _check_choices(numbers=(self.numbers, NUMBERS), method=(self.method, METHODS))
        _check_choices(budget=(self.budget, ("none",) if self.method == "full" else BUDGETS))
        _check_ranges(self)
        _check_memory(self.budget, self.extra_memory_bytes, self.peak_memory_bytes)

    @property
    def key(self) -> tuple[str | int, ...]:
        """What no other row has."""
        return self.data, self.numbers, self.method, self.budget, self.seed


@dataclass(frozen=True)
class SelectionResult:
    """One training with channels chosen by a criterion: a row of ``channel_selection.csv``, with these columns.

    Args:
        data: One of ``DATA``, or another of your own: letters, digits and underscores.
        criterion: One of ``CRITERIA``: by which score the channels are chosen.
        rechoose_every: Steps after which they are chosen anew; 0 for once (static).
        budget: ``"extra64"`` for 64 KiB of extra memory, and likewise, or the name of a microcontroller.
        seed: Of the training, and of ``"random"``.
        top1, val_top1: As in ``Result``.
        extra_memory_bytes: Of one training step.
        steps, batch_size, learning_rate: As in ``Result``.
        seconds: Time to train, with the choice.

    Raises:
        UserError: A value is out of its range, or the memory beyond the budget.

    Example::

        SelectionResult("cifar10", "fisher", 50, "extra64", 0, 0.81, None, 61747, 366, 32, 0.006, 71.0)
    """

    data: str
    criterion: str
    rechoose_every: int
    budget: str
    seed: int
    top1: float
    val_top1: float | None
    extra_memory_bytes: float
    steps: int
    batch_size: int
    learning_rate: float
    seconds: float

    def __post_init__(self):
        _check_name(self.data)
        _check_choices(criterion=(self.criterion, CRITERIA))
        if not re.fullmatch(r"extra[1-9]\d{0,8}", self.budget) and self.budget not in MICROCONTROLLERS:
            raise UserError(
                f"budget is {self.budget!r:.80}: give one such as extra64, or one of {', '.join(MICROCONTROLLERS)}"
            )
        _check_ranges(self)
        _check_memory(self.budget, self.extra_memory_bytes, None)

    @property
    def key(self) -> tuple[str | int, ...]:
        """What no other row has."""
        return self.data, self.criterion, self.rechoose_every, self.budget, self.seed


Row = TypeVar("Row", Result, SelectionResult)


def title_of(data: str) -> str:
    """A data set as tables have it.

    Example::

        title_of("cifar10")  # "CIFAR-10"
        title_of("my_birds")  # "my_birds"
    """
    titles = {name: one.title for name, one in DATA_SETS.items()} | DATA
    return titles.get(data, data)


def data_sets_of(rows: Iterable[Any]) -> list[str]:
    """The data sets that rows are of, those of ``DATA`` first."""
    found = {row.data for row in rows}
    return [data for data in DATA if data in found] + sorted(found - DATA.keys())


def budget_name(budget: str) -> str:
    """A budget as tables have it.

    Example::

        budget_name("extra64")  # "64 KiB"
        budget_name("stm32f746")  # "STM32F746"
    """
    return f"{budget.removeprefix('extra')} KiB" if budget.startswith("extra") else budget.upper()


def sorted_budgets(budgets: Iterable[str]) -> list[str]:
    """Each budget once: those of extra memory from the smallest on, then the microcontrollers."""

    def place(budget: str) -> tuple[bool, int, str]:
        of_extra = budget.startswith("extra")
        return not of_extra, int(budget.removeprefix("extra")) if of_extra else 0, budget

    return sorted(set(budgets), key=place)


def load_rows(path: Path | str, row_type: type[Row]) -> list[Row]:
    """Reads the rows of a CSV file that ``write_rows`` wrote, or one by hand.

    Args:
        path: The file.
        row_type: ``Result`` or ``SelectionResult``: which columns it has.

    Raises:
        UserError: The file is missing or no such CSV, a row stands there twice, or two rows of one data set differ in
            steps or batch size; the message begins with its path, and says the line where one line is wrong.

    Example::

        load_rows("recipes/results/results.csv", Result)
    """
    return read_rows(path, row_type, _check_equal_steps)


def _check_name(data: str) -> None:
    if not re.fullmatch(r"\w+", data):
        raise UserError(f"data is {data!r:.80}: give a name of letters, digits and underscores")


def _check_choices(**choices: tuple[str, Iterable[str]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"{name} is {value!r:.80}: give {' or '.join(known)}")


def _check_ranges(row: Result | SelectionResult) -> None:
    for field in fields(row):
        name, value = field.name, getattr(row, field.name)
        if name in ("top1", "val_top1") and value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} is {value!r}: give a fraction from 0 to 1")
        if name in LOWEST and not (math.isfinite(value) and value >= LOWEST[name]):
            raise UserError(f"{name} is {value!r}: give {LOWEST[name]} or more")
    if not (math.isfinite(row.learning_rate) and row.learning_rate > 0):
        raise UserError(f"learning_rate is {row.learning_rate!r}: give a positive number")


def _check_memory(budget: str, extra_memory_bytes: float, peak_memory_bytes: float | None) -> None:
    """A table must not have a training under a budget that it exceeds."""
    if budget.startswith("extra"):
        name, size_bytes, limit_bytes = "extra", extra_memory_bytes, int(budget.removeprefix("extra")) * KIB
    elif budget in MICROCONTROLLERS and peak_memory_bytes is not None:
        name, size_bytes, limit_bytes = "peak", peak_memory_bytes, MICROCONTROLLERS[budget].budget_bytes
    else:
        return
    if size_bytes > limit_bytes:
        raise UserError(
            f"{name}_memory_bytes is {size_bytes:g}, but the budget {budget} is {limit_bytes}: give a row that is "
            "within it"
        )


def _check_equal_steps(row: Any, others: Mapping[int, Any]) -> None:
    for line, other in others.items():
        if row.data == other.data and (row.steps, row.batch_size) != (other.steps, other.batch_size):
            raise UserError(
                f"{row.data} was trained for {row.steps} steps of {row.batch_size} samples, in line {line} for "
                f"{other.steps} of {other.batch_size}: give every method the same budget of steps"
            )
