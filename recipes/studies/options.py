"""The options of a study of ways to train, each group of them a frozen dataclass: the groups of ``--help``."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from microtune.datamodules.data_sets import DataName
from microtune.datamodules.option_names import KeepName
from microtune.modules.user_error import UserError
from microtune.recipes.studies.way_schemes import budget_by_name
from microtune.recipes.training.command_line import check_at_least_one, listed
from microtune.recipes.training.plan import check_ranges

EPOCHS = 10
COPIES = 4  # of the augmentation, where steps are given


@dataclass(frozen=True)
class WayOptions:
    """Ways to train

    Args:
        ways: Ways to train, the others compared with the first, such as
            evolved=scheme.json,biases,q=expanding:ratio=0.25; schemes are a JSON file, last_layers, biases, expanding,
            random, classifier, full, gradient or accuracy (searched for by it); names of ways in ways_file stand for
            these. By default all of ways_file.
        ways_file: List of ways in JSON, such as recipes/studies/ways/methods.json.
        scheme: Scheme of the ways that do not say theirs, such as those of recipes/studies/ways/int8.json.
        budgets: KiB of extra memory (extra64) or of peak memory (peak200), microcontrollers, or none, which takes
            schemes as they are; separated by commas.
        base_depth: Deepest bias depth of searches; features are kept behind it.
        contributions: Table whose layers, ratios and bias depths random schemes are drawn from; by default all
            expanding convolutions and all bias depths.
    """

    ways: str | None = None
    ways_file: Path | None = None
    scheme: str | None = None
    budgets: str = "stm32f746"
    base_depth: int = 36
    contributions: Path | None = None


@dataclass(frozen=True)
class TaskOptions:
    """Data and networks

    Args:
        data: Name of the data set.
        data_dir: Folder of the data.
        data_options: Further arguments of the data module.
        weights: Network in floating point: none, torchvision, or a .pth, .ckpt, .h5 or .npz file.
        network: The .safetensors file of the same network in int8.
        resolution: Height and width of images, in pixels; speech has the shape of its spectrograms.
        width: Multiplier of the channels of the network in floating point; by default that of the weights.
        head_convolution: Whether the network in floating point has its last 1x1 convolution.
        data_sets: List of data sets with their networks, such as recipes/results/data_sets.json, in place of one.
        only: Names of those that are wanted, separated by commas.
        numbers: Numbers that ways compute in which do not say theirs: fp32, int8 or both; by default all there are
            networks for.
    """

    data: DataName | None = None
    data_dir: str | None = None
    data_options: dict[str, Any] | None = None
    weights: str = "none"
    network: str = "mobilenet_v2"
    resolution: int = 96
    width: float | None = None
    head_convolution: bool = False
    data_sets: Path | None = None
    only: str | None = None
    numbers: str | None = None


@dataclass(frozen=True)
class TermOptions:
    """Terms of the trainings, the same for all ways

    Args:
        epochs: Number of passes over the training split; 10 without steps.
        steps: Number of optimizer steps of batch_size samples, in place of epochs; augmentations then recur after 4
            passes.
        batch_size: Number of samples per step.
        learning_rate: Learning rate at its highest; by default 0.1 / 256 x batch_size (Lin et al.), and of a list of
            data sets the best of those that it has, for each way.
        learning_rates: Rates to choose from for each way, by validation accuracy with a seed that is not reported.
        rate_budget: Budget that rates are chosen at, for all budgets; by default each has its own.
        warmup_fraction: Part of all steps in which the learning rate rises; then it falls to zero as a cosine.
        seeds: Number of trainings of each way.
        copies: Number of augmentations of every training sample; by default one for each epoch, or 4 with steps.
        features: Place where the output of the frozen layers is kept: memory, disk or none.
        features_limit_mib: Largest size in MiB of what is kept, in each process.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    learning_rates: str | None = None
    rate_budget: str | None = None
    warmup_fraction: float = 0.1
    seeds: int = 3
    copies: int | None = None
    features: KeepName = "disk"
    features_limit_mib: float = 4096

    def filled_in(self, has_task_rates: bool) -> "TermOptions":
        """With its defaults; of a list of data sets, which has learning rates to choose from, that stays open."""
        terms = self
        if terms.steps is None:
            terms = replace(terms, epochs=terms.epochs or EPOCHS)
        if terms.learning_rate is None and terms.learning_rates is None and not has_task_rates:
            terms = replace(terms, learning_rate=0.1 / 256 * terms.batch_size)
        return replace(terms, copies=terms.copies or terms.epochs or COPIES)


def refuse_contradictions(tried: WayOptions, task: TaskOptions, terms: TermOptions, processes: int) -> None:
    """Raises ``UserError`` where an option is out of its range, or makes no sense beside another; reads no file."""
    check_at_least_one(
        batch_size=terms.batch_size, seeds=terms.seeds, processes=processes, base_depth=tried.base_depth,
        steps=terms.steps, copies=terms.copies,
    )  # fmt: skip
    check_ranges(vars(terms))
    if task.data is None and task.data_sets is None:
        raise UserError("there is no data: give --data, or a list of data sets with --data_sets")
    given = vars(tried) | vars(task) | vars(terms)
    for name, other in (
        ("epochs", "steps"), ("learning_rate", "learning_rates"), ("data_sets", "data"), ("data", "only"),
        ("data_sets", "learning_rates"),
    ):  # fmt: skip
        if given[name] is not None and given[other] is not None:
            raise UserError(f"{name} is {given[name]} beside {other} {given[other]}: leave one of them out")
    budgets = listed(tried.budgets)
    for budget in budgets:
        budget_by_name(budget)
    if terms.rate_budget is not None and terms.rate_budget not in budgets:
        raise UserError(f"rate_budget is {terms.rate_budget}: give one of --budgets, {', '.join(budgets)}")
