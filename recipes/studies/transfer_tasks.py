"""Transfer tasks: a data set with the networks that are to learn it, and the learning rates to try."""

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from microtune.datamodules.data_sets import DataName
from microtune.modules.user_error import UserError
from microtune.recipes.search.options import TrialSettings
from microtune.recipes.studies.named_json import read_named
from microtune.recipes.studies.ways import Numbers

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TransferTask:
    """A data set, and the network that is to learn it.

    Args:
        data: Name of the data module, as in ``--data``.
        weights: The network in floating point, as in ``--weights``.
        data_dir: Folder of the data.
        data_options: Further arguments of the data module.
        int8_network: The same network in int8, as in ``--network``; without it nothing is trained in int8.
        resolution: Height and width of images, in pixels.
        learning_rates: What is tried, from low to high; searches train with the one in the middle.
        width: Multiplier of the channels of the network in floating point; by default that of the weights.
        head_convolution: Whether that network has its last 1x1 convolution.
        contributions: Table that measure_contributions.py wrote for it.

    Raises:
        pydantic.ValidationError: A value is out of its range.

    Example::

        TransferTask("cifar10", "weights.npz", "data", learning_rates=(0.003, 0.0125, 0.05))
    """

    data: DataName
    weights: str
    data_dir: str | None = None
    data_options: dict[str, Any] = field(default_factory=dict)
    int8_network: str | None = None
    resolution: int = 96
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)] = (0.003, 0.0125, 0.05)
    width: float | None = None
    head_convolution: bool = False
    contributions: str | None = None

    @property
    def numbers(self) -> tuple[Numbers, ...]:
        """What there are networks for; of fresh weights only where there is nothing else."""
        fp32: tuple[Numbers, ...] = ("fp32",) if self.weights != "none" or self.int8_network is None else ()
        return fp32 if self.int8_network is None else (*fp32, "int8")

    @property
    def middle_rate(self) -> float:
        """What searches train with."""
        return sorted(self.learning_rates)[len(self.learning_rates) // 2]

    def trial_settings(self, numbers: Numbers, **further: Any) -> TrialSettings:
        """The settings of trials of the network in floating point or in int8.

        Args:
            numbers: Which of them.
            further: Fields of ``TrialSettings`` that are none of the task's.

        Raises:
            UserError: There is no such network.
        """
        if numbers == "int8" and self.int8_network is None:
            raise UserError(f"there is no int8 network for {self.data}: give it, or leave int8 out")
        if numbers not in self.numbers:
            raise UserError(f"there are no weights in floating point for {self.data}: give them, or leave fp32 out")
        network: dict[str, Any] = {"network": self.int8_network}
        if numbers == "fp32":
            network = {"weights": self.weights, "width": self.width, "head_convolution": self.head_convolution}
        return TrialSettings(
            data=self.data, data_dir=self.data_dir, data_options=self.data_options, resolution=self.resolution,
            **network, **further,
        )  # fmt: skip


def load_tasks(path: Path | str, names: Sequence[str] | None = None) -> dict[str, TransferTask]:
    """Reads a list of data sets: a JSON object from a name to the arguments of ``TransferTask``.

    Args:
        path: Of the file.
        names: Which of them, all by default.

    Raises:
        UserError: The file is missing or no such list, or there is no data set of that name.

    Example::

        load_tasks("recipes/results/data_sets.json", ["cifar10"])["cifar10"].weights
    """
    tasks = read_named(path, TransferTask, "data sets")
    if unknown := [name for name in names or () if name not in tasks]:
        raise UserError(f"{path} has no data set {unknown[0]!r}: it has {', '.join(tasks)}")
    return {name: tasks[name] for name in names or tasks}
