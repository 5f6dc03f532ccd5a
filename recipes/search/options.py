"""The options that searches share, each group of them a frozen dataclass of plain values: the groups of ``--help``."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from microtune.datamodules.data_sets import DataName
from microtune.datamodules.option_names import KeepName
from microtune.modules.search.genome_bytes import Memory
from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import check_at_least_one
from microtune.recipes.training.plan import source_of_weights

GRADIENT = "gradient"  # in place of a table's file

Level = Literal["sub_tensor", "layer"]
FitnessName = Literal["table", "accuracy"]
JudgedBy = Literal["top1", "loss"]
ProposedBy = Literal["evolution", "random"]


@dataclass(frozen=True)
class SearchBudgetOptions:
    """Memory budget

    Args:
        memory: Kind of memory that has the budget: peak of a training step, or extra (the paper's figure).
        budget_kib: Budget in KiB, in place of a microcontroller.
        mcu: Microcontroller that a training step must fit; by default stm32f746, unless another budget is given.
        sram_bytes: SRAM that one buffer can use; describes another microcontroller, or replaces the named one's.
        flash_bytes: Flash for the frozen weights; describes another microcontroller, or replaces the named one's.
        reserve_bytes: SRAM that is not for training; describes another microcontroller, or replaces the named one's.
        all_mcus: Whether to evolve a scheme for every known microcontroller, by the table.
    """

    memory: Memory = "peak"
    budget_kib: float | None = None
    mcu: str | None = None
    sram_bytes: int | None = None
    flash_bytes: int | None = None
    reserve_bytes: int | None = None
    all_mcus: bool = False


@dataclass(frozen=True)
class Effort:
    """Effort of the search

    Args:
        fitness: Fitness of a scheme: table (sum of contributions, seconds) or accuracy (of a short training of each).
        judged_by: Measure of a trial, where fitness is accuracy: loss or top1, both on the validation split. The loss
            tells schemes apart that have as many samples right.
        proposed_by: Source of new schemes, where fitness is accuracy: evolution, or random, which repairs and fills
            what it draws as evolution does.
        front: Whether to search for the best schemes of every size up to the budget at once, where fitness is accuracy.
        evaluations: Number of schemes to evaluate, by default 5,000 by the table; by accuracy in place of total_steps,
            each in one trial.
        rungs: Numbers of optimizer steps of the trials, where fitness is accuracy: every scheme is trained for the
            first, and the best third of all so far for the next. By default 60,180,540, of a front 60,180, or steps
            where that or evaluations is given.
        total_steps: Number of optimizer steps of all trials; by default 20,000.
        population: Number of survivors of a generation; by default 40, or 8 by accuracy.
        trial_seeds: Number of trainings of each scheme, where fitness is accuracy.
        finalists: Number of best schemes to train for longer, beside the table's optimum and as many of the last layers
            as fit; the validation split chooses. By default 4; 0 on several rungs, and by the gradient alone.
        final_steps: Number of optimizer steps of a finalist's training; by default four times those of a trial.
        final_seeds: Number of trainings of each finalist.
        seed: Seed of the search.
    """

    fitness: FitnessName = "table"
    judged_by: JudgedBy = "loss"
    proposed_by: ProposedBy = "evolution"
    front: bool = False
    evaluations: int | None = None
    rungs: str | None = None
    total_steps: int | None = None
    population: int | None = None
    trial_seeds: int = 1
    finalists: int | None = None
    final_steps: int | None = None
    final_seeds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class TrialSettings:
    """Trials, which are short trainings

    Args:
        data: Name of the data set.
        data_dir: Folder of the data set.
        data_options: Further arguments of the data module.
        weights: Weights to start from: none, torchvision, or a .pth, .ckpt, .h5 or .npz file; none for an int8 network,
            which has its own.
        width: Multiplier of the network's channels; by default that of the weights, and 0.35 without.
        head_convolution: Whether the network has its last 1x1 convolution.
        resolution: Height and width of images in pixels. Spectrograms have a shape of their own; without data it is the
            number of their frames.
        base_depth: Deepest bias depth; what lies before it is frozen, and computed once.
        steps: Number of optimizer steps of a trial.
        batch_size: Number of samples per step.
        learning_rate: Learning rate at its highest; by default 0.1 / 256 x batch_size (Lin et al.), and of a search
            with fitness accuracy what a few schemes learn best at, of that and its multiples by powers of two.
        copies: Number of augmentations of every training sample, at most.
        features: Place where the output of the frozen layers is kept: memory, disk or none.
        features_limit_mib: Largest size in MiB of what is kept, in each process.
        features_dir: Folder of what is kept on disk; by default in the run's folder.
        network: Network: mobilenet_v2, or the .safetensors file of an int8 network.

    Raises:
        UserError: A number is out of its range, or the network has weights of its own.

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
    def rate(self) -> float:
        """The learning rate at its highest, also where none is given."""
        return self.learning_rate or 0.1 / 256 * self.batch_size

    @property
    def source(self) -> str:
        """Where the weights are."""
        return source_of_weights(self.network, self.weights)


def check_data_is_named(settings: TrialSettings) -> None:
    """Raises ``UserError`` where trials have nothing to train on."""
    if settings.data is None:
        raise UserError("trials need data: give --data")
