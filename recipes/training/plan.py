"""What a training recipe was asked for, and every refusal that needs neither the data nor the disk."""

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microtune.modules.int8.files import is_quantized_file, read_quantized_network
from microtune.modules.memory.microcontrollers import Microcontroller, microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.networks.operations import NetworkOperations
from microtune.modules.networks.pretrained_weights import check_source
from microtune.modules.sparse_update.channel_importance import WITHOUT_DATA, Criterion
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.options import (
    BudgetOptions,
    DeviceOptions,
    Int8Options,
    NetworkOptions,
    OptimizationOptions,
    RunOptions,
)
from microtune.recipes.training.run_folder import check_run_folder

MOBILENET_V2 = "mobilenet_v2"
NAMED_SCHEMES = ("classifier", "biases", "last_layers", "sub_tensor", "full")
NOTHING_TO_CHOOSE = ("none", "classifier", "biases", "last_layers", "full")  # no layer is updated in part

RANGES = {
    "epochs": (1, math.inf),
    "accumulate_batches": (1, math.inf),
    "num_workers": (0, math.inf),
    "seed": (0, 2**32 - 1),  # numpy's
    "learning_rate": (0, math.inf),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
    "label_smoothing": (0, 1),
    "warmup_fraction": (0, 1),
    "gradient_clip_norm": (0, math.inf),
    "ema_decay": (0, 1),
    "num_nodes": (1, math.inf),
    "rechoose_every": (0, math.inf),
    "choice_samples": (1, math.inf),
}

# MobileNetV2's own (Sandler et al. 2018, section 6.1), but with label smoothing, as those who trained it since have
WITH_BATCH_NORM = {"momentum": 0.9, "weight_decay": 4e-5, "label_smoothing": 0.1}
UNDER_A_SCHEME = {"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0}


@dataclass(frozen=True)
class TrainingPlan:
    """What is to be trained, with every default filled in.

    Args:
        network, budget, optimization, int8, devices, run: Options of the recipe.
        epochs: Number of passes over the training split.
        batch_size: Number of samples per batch and device.
        seed: Seed of the training.
        source: Weights to start from: none, torchvision, or a file; an int8 network's file holds its own.
        scheme: Name or file of the update scheme; None where everything is trained with batch norm, or nothing.
        device: Microcontroller that a training step must fit.
        hyperparameters: Arguments of ``Classifier`` on how it learns.
        ema_decay: Decay of the exponential moving average of the weights, of a long training; 0 for none.
        started: Moment at which the plan was made, by ``time.monotonic``.
    """

    network: NetworkOptions
    budget: BudgetOptions
    optimization: OptimizationOptions
    int8: Int8Options
    devices: DeviceOptions
    run: RunOptions
    epochs: int
    batch_size: int
    seed: int
    source: str
    scheme: str | None
    device: Microcontroller
    hyperparameters: dict[str, Any]
    ema_decay: float
    started: float = field(default_factory=time.monotonic, compare=False)

    @property
    def is_quantized(self) -> bool:
        """Whether an int8 network is trained."""
        return is_quantized_file(self.source)

    @property
    def trains_int8(self) -> bool:
        """Whether an int8 network is trained, and not only tested."""
        return self.is_quantized and not self.run.evaluate_only

    @property
    def rechosen_by(self) -> Criterion | None:
        """Score by which channels are chosen anew in training; None if they are not."""
        return self.budget.channel_choice if self.budget.rechoose_every and not self.run.evaluate_only else None

    def peak_memory(self, operations: NetworkOperations) -> PeakMemory:
        """The account of a training step's peak, with what this training holds beside activations and gradients."""
        adam, momentum = self.hyperparameters["optimizer"] == "adamw", self.hyperparameters["momentum"]
        return PeakMemory(
            operations,
            optimizer_state="adam" if adam else "momentum" if momentum else "none",
            gradient_accumulation=self.optimization.accumulate_batches > 1,
            latent_weights=self.is_quantized and self.int8.weight_storage == "latent",
        )

    def averaging_decay(self, train_samples: int) -> float:
        """Decay of the average of the weights in a training on so many samples; 0 for none.

        A default one is less in a short run: the average begins with the first step, and would be most of that.
        """
        if self.optimization.ema_decay is not None:
            return self.ema_decay
        batches = self.batch_size * self.optimization.accumulate_batches
        steps = self.epochs * math.ceil(train_samples / batches)
        return min(self.ema_decay, steps / (steps + 10))


def plan_training(
    network: NetworkOptions,
    budget: BudgetOptions,
    optimization: OptimizationOptions,
    int8: Int8Options,
    devices: DeviceOptions,
    run: RunOptions,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    num_workers: int,
    rate_from_scratch: float | None = None,
    ema_decay_from_scratch: float = 0.0,
) -> TrainingPlan:
    """Fills in the defaults, and refuses what cannot be; reads no file and no data, and writes nothing.

    Args:
        network, budget, optimization, int8, devices, run: Options of the recipe.
        epochs: Number of passes over the training split.
        batch_size: Number of samples per batch and device.
        seed: Seed of the training.
        num_workers: Number of processes that load the data.
        rate_from_scratch: Learning rate of SGD where training begins from scratch; by default that of Lin et al.
        ema_decay_from_scratch: Decay of the average of the weights there.

    Raises:
        UserError: A number is out of its range, a name is unknown, or options contradict one another.

    Example::

        plan_training(
            NetworkOptions(), BudgetOptions(scheme="sub_tensor"), OptimizationOptions(), Int8Options(),
            DeviceOptions(), RunOptions(), epochs=10, batch_size=32, seed=0, num_workers=0,
        ).hyperparameters["learning_rate"]  # 0.0125
    """
    given = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "num_workers": num_workers}
    check_ranges(given | vars(budget) | vars(optimization) | vars(devices))
    source = source_of_weights(network.network, network.weights, network.width, network.head_convolution)
    if run.evaluate_only and source == "none":
        raise UserError("evaluate_only tests weights: give them with --weights, or an int8 --network")
    if run.resume and run.out_dir is None:
        raise UserError("--resume goes on with the run in a folder: give it with --out_dir")
    default_mcu = "stm32f746" if budget.sram_bytes is None else None
    device = microcontroller(budget.mcu or default_mcu, budget.sram_bytes, budget.flash_bytes, budget.reserve_bytes)
    scheme = budget.scheme or ("none" if source == "none" else "sub_tensor")
    trains_batch_norm = scheme == "none"
    if not trains_batch_norm:
        check_scheme_name(scheme)
    if is_quantized_file(source):
        refuse_unsuited_to_int8(trains_batch_norm, optimization, devices, int8)
    if trains_batch_norm and batch_size == 1 and not run.evaluate_only:
        raise UserError("batch_size is 1, and batch norm has no statistics of one sample: give 2 or more")
    if scheme in ("none", *NAMED_SCHEMES) and not run.evaluate_only:  # what is in a file is seen later
        refuse_unsuited_choice(scheme not in NOTHING_TO_CHOOSE, budget, optimization, devices)
    from_scratch = source == "none" and trains_batch_norm
    rate = 0.1 / 256 * batch_size * optimization.accumulate_batches
    if from_scratch and rate_from_scratch is not None:
        rate = rate_from_scratch
    if optimization.optimizer == "adamw":
        rate = 1e-3
    settings = {"learning_rate": rate, **(WITH_BATCH_NORM if trains_batch_norm else UNDER_A_SCHEME)}
    settings |= {name: value for name in settings if (value := getattr(optimization, name)) is not None}
    settings |= {"optimizer": optimization.optimizer, "warmup_fraction": optimization.warmup_fraction}
    default_decay = ema_decay_from_scratch if from_scratch else 0.0
    return TrainingPlan(
        network, budget, optimization, int8, devices, run, epochs, batch_size, seed, source,
        scheme=None if trains_batch_norm or run.evaluate_only else scheme,
        device=device,
        hyperparameters=settings,
        ema_decay=default_decay if optimization.ema_decay is None else optimization.ema_decay,
    )  # fmt: skip


def check_named_files(plan: TrainingPlan) -> None:
    """Asks for what the plan names, before the data: the run's folder, the scheme's file and the weights.

    Raises:
        UserError: The folder holds something else, or a file is missing or cannot be read.
    """
    check_run_folder(plan.run.out_dir, plan.run.resume)
    if plan.scheme is not None and plan.scheme not in NAMED_SCHEMES:
        UpdateScheme.load(plan.scheme)
    if plan.is_quantized:
        read_quantized_network(plan.source)
    else:
        check_source(plan.source)


def source_of_weights(
    network: str, weights: str = "none", width: float | None = None, head_convolution: bool = False
) -> str:
    """Where the weights are: an int8 network's file holds its own.

    Args:
        network: ``"mobilenet_v2"``, or the file of an int8 network.
        weights: As ``load_weights`` takes them, or ``"none"``.
        width: Multiplier of the network's channels, which an int8 network has of its own.
        head_convolution: Whether the network has its last 1x1 convolution, which an int8 network has or has not.

    Raises:
        UserError: The network is neither, or its file is given together with what it says itself.

    Example::

        source_of_weights("mobilenet_v2", "torchvision")  # "torchvision"
        source_of_weights("network.safetensors", "none")  # "network.safetensors"
    """
    if is_quantized_file(network):
        if weights != "none":
            raise UserError(f"{network} is an int8 network, which has its own weights: leave --weights out")
        if width is not None or head_convolution:
            raise UserError(f"{network} says what it is: leave --width and --head_convolution out")
        return network
    if network != MOBILENET_V2:
        raise UserError(f"network is {network!r}: give {MOBILENET_V2}, or the .safetensors file of an int8 network")
    if is_quantized_file(weights):
        raise UserError(f"{weights} is a whole int8 network: give it as --network")
    return weights


def check_scheme_name(scheme: str) -> None:
    """Raises ``UserError`` for what is neither the name of a rule nor looks like a file: by a suffix or a folder."""
    if scheme not in NAMED_SCHEMES and not Path(scheme).suffix and os.sep not in scheme:
        raise UserError(f"unknown scheme {scheme!r}: give a JSON file or one of {', '.join(NAMED_SCHEMES)}")


def check_ranges(arguments: dict[str, Any]) -> None:
    """Raises ``UserError`` if a number is out of its range."""
    for name, (low, high) in RANGES.items():
        value = arguments.get(name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}: give {low} or more{'' if high == math.inf else f', at most {high}'}")


def refuse_unsuited_to_int8(
    trains_batch_norm: bool, optimization: OptimizationOptions, devices: DeviceOptions, int8: Int8Options
) -> None:
    """Raises ``UserError`` where an int8 network cannot be trained so."""
    if trains_batch_norm:
        raise UserError("--scheme none trains with batch norm, which an int8 network has not: give --scheme full")
    if devices.precision not in ("32-true", "32"):
        raise UserError(
            f"precision is {devices.precision}, and an int8 network is simulated in float32, whose whole numbers are "
            "exact: give 32-true"
        )
    if optimization.optimizer != "sgd":
        raise UserError(
            f"optimizer is {optimization.optimizer}, whose steps are as long in integers as in real numbers, so that "
            "int8 weights hardly move: give sgd"
        )
    if optimization.gradient_clip_norm:
        raise UserError("gradient_clip_norm would measure an int8 network's gradients in integers: leave it out")
    if optimization.ema_decay and int8.weight_storage == "in_place":
        raise UserError("ema_decay averages weights in floating point: give --weight_storage latent, or leave it out")


def refuse_unsuited_choice(
    chooses: bool, budget: BudgetOptions, optimization: OptimizationOptions, devices: DeviceOptions
) -> None:
    """Raises ``UserError`` where channels cannot be chosen so.

    Args:
        chooses: Whether the scheme updates a part of some layer without fixing which channels.
        budget, optimization, devices: Options of the recipe.
    """
    if budget.rechoose_every and not chooses:
        raise UserError(
            f"rechoose_every is {budget.rechoose_every}, but there is nothing to choose: give a --scheme that updates "
            "some channels of layers and does not fix which, such as sub_tensor, or leave it out"
        )
    if budget.rechoose_every and devices.compile:
        raise UserError(
            f"rechoose_every is {budget.rechoose_every}, and a compiled network would be compiled anew for every "
            "choice: leave one of them out"
        )
    by_data = budget.channel_choice not in WITHOUT_DATA
    if optimization.ema_decay and chooses and (budget.rechoose_every or by_data):
        raise UserError(
            f"ema_decay is {optimization.ema_decay}, and averages slices of weights, whose channels are chosen by data "
            "or anew in training: leave it out, or choose once by weight_norm or random"
        )
