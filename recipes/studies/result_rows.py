"""Measured accuracies as rows of CSV, one training each: what studies write, and tables and pictures are made from."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from microtune.datamodules.data_sets import DATA_SETS
from microtune.modules.memory.microcontrollers import KIB, MICROCONTROLLERS
from microtune.modules.user_error import UserError

if TYPE_CHECKING:  # it imports PyTorch, which takes seconds
    from microtune.modules.sparse_update.update_scheme import UpdateScheme

# what the project measures, in the order of tables
DATA = {
    "cifar10": DATA_SETS["cifar10"].title,
    "flowers17": "Flowers-17",
    "speech_commands": DATA_SETS["speech_commands"].title,
    "mswc_arabic": "MSWC Arabic",
    "cifar100": DATA_SETS["cifar100"].title,
}
NUMBERS = ("fp32", "int8")
# the ways of ways/methods.json, as tables name them
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
Criterion = Literal["weight_norm", "gradient_norm", "fisher", "taylor", "loss_decrease", "activation_norm", "random"]
CRITERIA = get_args(Criterion)

Name = Annotated[str, Field(pattern=r"^\w+$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Result:
    """One training: a row of ``results.csv``, whose columns are these, in this order.

    Args:
        data: Name of the data set.
        numbers: What the network computes in: ``"fp32"`` or ``"int8"``.
        way: Name of the way to train.
        budget: ``"extra64"`` for 64 KiB of extra memory, ``"peak200"`` for a peak of 200 KiB, the name of a
            microcontroller, or ``"none"``.
        criterion: By which score the channels are chosen that the scheme leaves open.
        rechoose_every: Steps after which they are chosen anew; 0 for once.
        seed: Of the fresh classifier and the order of the samples.
        top1: Accuracy on the test split, a fraction.
        val_top1: On the validation split; None where there is none.
        extra_memory_bytes, peak_memory_bytes: Of one training step, the peak with what choosing channels anew needs.
        bias_depth: The biases of this many last convolutions are updated.
        updated_layers, updated_channels: Of how many layers the weights are, and how many of their input channels.
        learning_rate: At its highest.
        steps: Of the training.
        batch_size: Samples per step.
        search_seconds: Time to get the scheme; 0 of a rule.
        train_seconds: Time to train.

    Raises:
        UserError: There is no such budget, or the memory is beyond it.

    Example::

        read_rows("recipes/results/results.csv", Result)[0].top1
    """

    data: Name
    numbers: Literal["fp32", "int8"]
    way: Name
    budget: str
    criterion: Criterion
    rechoose_every: Count
    seed: Count
    top1: Fraction
    val_top1: Fraction | None
    extra_memory_bytes: Amount
    peak_memory_bytes: Amount
    bias_depth: Count
    updated_layers: Count
    updated_channels: Count
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    steps: AtLeastOne
    batch_size: AtLeastOne
    search_seconds: Amount
    train_seconds: Amount

    def __post_init__(self):
        # a table must not have a training under a budget that it exceeds
        memory, kib = memory_and_kib(self.budget)
        size_bytes = getattr(self, f"{memory}_memory_bytes")
        if kib is not None and size_bytes > kib * KIB:
            raise UserError(
                f"{memory}_memory_bytes is {size_bytes:g}, but the budget {self.budget} is {kib * KIB:g}: give a row "
                "that is within it"
            )

    @property
    def key(self) -> tuple[str | int, ...]:
        """What no other row has."""
        return self.data, self.numbers, self.way, self.budget, self.seed


def memory_and_kib(budget: str) -> tuple[Literal["extra", "peak"], float | None]:
    """Which memory a budget is of, and how much; None of ``"none"``.

    Raises:
        UserError: There is no such budget.

    Example::

        memory_and_kib("extra64")  # ("extra", 64.0)
        memory_and_kib("stm32f746")  # ("peak", 288.0)
    """
    if budget == "none":
        return "peak", None
    if budget in MICROCONTROLLERS:
        return "peak", MICROCONTROLLERS[budget].budget_bytes / KIB
    found = re.fullmatch(r"(extra|peak)(\d{1,9}(?:\.\d{1,9})?)", budget)
    if not found or float(found[2]) == 0:
        raise UserError(
            f"budget is {budget!r:.80}: give KiB of extra memory such as extra64 or of peak memory such as peak200, "
            f"none, or one of {', '.join(MICROCONTROLLERS)}"
        )
    return found[1], float(found[2])


@dataclass(frozen=True)
class NamedScheme:
    """A scheme and what it was made for.

    Args:
        data: One of ``DATA``.
        budget: One of ``BUDGETS``.
        method: One of ``METHODS``.
        scheme: Which channels of which layers.
    """

    data: str
    budget: str
    method: str
    scheme: "UpdateScheme"

    @property
    def name(self) -> str:
        """As its file is called."""
        return f"{self.data}-{self.budget}-{self.method}"


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
        budget_name("peak200")  # "200 KiB at the peak"
        budget_name("stm32f746")  # "STM32F746"
    """
    if budget.startswith("peak"):
        return f"{budget.removeprefix('peak')} KiB at the peak"
    return f"{budget.removeprefix('extra')} KiB" if budget.startswith("extra") else budget.upper()


def sorted_budgets(budgets: Iterable[str]) -> list[str]:
    """Each budget once: those of extra memory from the smallest on, then those of the peak by their names."""

    def place(budget: str) -> tuple[bool, float, str]:
        memory, kib = memory_and_kib(budget)
        return memory == "peak", kib if memory == "extra" else 0, budget

    return sorted(set(budgets), key=place)
