"""What surrounds the training of a recipe: its Trainer and folder before, its one test and report after."""

import logging
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from microtune.callbacks.int8_training import Int8Training
from microtune.callbacks.sparse_update import SparseUpdate
from microtune.datamodules.contract import ClassificationData
from microtune.modules.atomic_files import write_json
from microtune.modules.classifier import Classifier
from microtune.modules.int8.files import write_quantized_network
from microtune.modules.int8.network import quantized_tensors
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.checkpoints import WholeFileCheckpointIO, checkpoint_to_resume
from microtune.recipes.training.loggers import log_run_end, log_run_start, make_loggers, wandb_run
from microtune.recipes.training.memory_figures import KIB, draw_memory, memory_figures, size_of
from microtune.recipes.training.networks import DescribedNetwork
from microtune.recipes.training.options import DeviceOptions
from microtune.recipes.training.plan import TrainingPlan
from microtune.recipes.training.run_folder import open_run_folder, refuse_another_run, write_config

log = logging.getLogger(__name__)

INT8_FILE = "network.safetensors"  # in the run's folder: the int8 network as it was trained


@dataclass(frozen=True)
class BegunRun:
    """A run whose folder is open.

    Args:
        out_dir: Its folder.
        checkpoint: What it goes on from; None of a new run.
        memory: Both accounts of memory, for the report; nothing where no scheme is trained.
    """

    out_dir: Path
    checkpoint: Path | None
    memory: dict[str, Any]


def set_up(data: ClassificationData) -> None:
    """Downloads, unpacks and reads; one process of this machine at a time, so that the others find it done."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    with FileLock(Path(tempfile.gettempdir()) / f"microtune-{user}.lock"):
        data.prepare_data()
    data.setup()


def trainer_on(devices: DeviceOptions, **arguments: Any) -> Trainer:
    """A ``Trainer`` on these devices, which writes nothing before ``begin_run`` gives it loggers and a folder.

    Args:
        devices: What trains.
        arguments: Further ones of ``Trainer``: epochs, callbacks, what it does with gradients.

    Raises:
        UserError: Lightning or this machine cannot do so.
    """
    cores = os.cpu_count()
    if devices.accelerator == "cpu" and devices.devices.isdecimal() and int(devices.devices) > cores:
        raise UserError(f"devices is {devices.devices}, but there are {cores} cores: give {cores} at most")
    try:
        return Trainer(
            accelerator=devices.accelerator,
            devices=devices.devices,
            num_nodes=devices.num_nodes,
            strategy=devices.strategy,
            precision=devices.precision,
            plugins=[WholeFileCheckpointIO()],
            logger=False,
            log_every_n_steps=10,
            enable_model_summary=False,
            **arguments,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"accelerator, devices, strategy or precision: {error}") from error


def begin_run(
    recipe: str,
    arguments: dict[str, Any],
    plan: TrainingPlan,
    described: DescribedNetwork,
    scheme: UpdateScheme | None,
    trainer: Trainer,
) -> BegunRun:
    """Opens the run's folder, keeps in it what is to be trained, and gives the Trainer its loggers and its place.

    Args:
        recipe: Name of the recipe.
        arguments: All of its arguments, flat and plain, for ``config.yaml``.
        plan: What is trained.
        described: The network.
        scheme: What is updated; None where everything is, with batch norm, or nothing.
        trainer: From ``trainer_on``: it knows which of several processes this is, and one alone opens the folder.

    Raises:
        UserError: The folder holds something else.
    """
    run = plan.run
    out_dir = open_run_folder(run.out_dir, recipe, run.resume)
    if run.resume:
        refuse_another_run(out_dir, arguments, scheme)
    if plan.trains_int8:
        scaling = "with" if plan.int8.gradient_scaling else "as --gradient_scaling false says, without"
        storage = plan.int8.weight_storage
        log.info("the int8 network is trained %s quantization-aware scaling, its weights %s", scaling, storage)
    memory = {}
    if rank_zero_only.rank == 0 and not (out_dir / "config.yaml").exists():
        write_config(out_dir, arguments)
    if scheme is not None:
        peak_memory = plan.peak_memory(described.operations)
        memory = memory_figures(peak_memory, scheme, plan.device, plan.rechosen_by)
        if rank_zero_only.rank == 0:
            scheme.save(out_dir / "scheme.json")
            title = f"One training step of {scheme.network} at {size_of(described.input_shape)}"
            draw_memory(peak_memory.timeline(scheme), plan.device, title, out_dir / "memory.png")
    trainer.checkpoint_callback.dirpath = str(out_dir)
    trainer.loggers = make_loggers(run.logger, out_dir, recipe)
    log_run_start(wandb_run(trainer.loggers), arguments, scheme, memory, out_dir)
    return BegunRun(out_dir, checkpoint_to_resume(out_dir) if run.resume else None, memory)


def finish_run(
    begun: BegunRun,
    plan: TrainingPlan,
    trainer: Trainer,
    module: Classifier,
    data: ClassificationData,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures on the validation split and once on the test split, and leaves the report and an int8 network's file.

    Args:
        begun: The run.
        plan: What was trained.
        trainer: What trained it.
        module: What was trained.
        data: What it was trained on.
        facts: Further ones for the report.

    Returns:
        What ``report.json`` says.

    Raises:
        UserError: The training diverged.
    """
    forget_averages(trainer)
    report = evaluate(trainer, module, data) | begun.memory
    if not math.isfinite(report["loss"]):
        rate = module.hparams.learning_rate
        raise UserError(f"training diverged at learning rate {rate:g}: start anew with a smaller --learning_rate")
    report |= facts_of_callbacks(trainer) | (facts or {})
    report |= {"epochs": 0 if plan.run.evaluate_only else plan.epochs, "batch_size": plan.batch_size, "seed": plan.seed}
    report["seconds"] = time.monotonic() - plan.started
    if rank_zero_only.rank == 0:
        if plan.trains_int8:
            made = quantized_tensors(module.net, data.class_names, tuple(module.hparams.input_shape))
            write_quantized_network(begun.out_dir / INT8_FILE, *made)
        log_run_end(wandb_run(trainer.loggers), report, module.test_confusion, data.class_names)
        write_json(begun.out_dir / "report.json", report)
        print_result(report, begun.out_dir)
    return report


def forget_averages(trainer: Trainer) -> None:
    """Takes averaging out of a Trainer after ``fit``, when the average is in the network.

    It would put the average there again at every test, whatever the network has become.
    """
    trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, EMAWeightAveraging)]


def evaluate(trainer: Trainer, module: Classifier, data: ClassificationData) -> dict[str, Any]:
    """Measures on the validation split, and once, at the end, on the test split."""
    validated = trainer.validate(module, data, verbose=False)[0] if data.val_samples else {}
    tested = trainer.test(module, data, verbose=False)[0]
    report = {"top1": tested["test/top1"], "loss": tested["test/loss"]}
    if validated:
        report["val_top1"] = validated["val/top1"]
    if "test/top5" in tested:
        report["top5"] = tested["test/top5"]
    sizes = {name: getattr(data, name) for name in ("train_samples", "val_samples", "test_samples")}
    return report | sizes | {"classes": data.num_classes}


def facts_of_callbacks(trainer: Trainer) -> dict[str, Any]:
    """How the network was trained, for the report; of the usual way, a choice of channels by weight norm, nothing."""
    facts: dict[str, Any] = {}
    for callback in trainer.callbacks:
        if isinstance(callback, SparseUpdate) and (callback.channel_choice != "weight_norm" or callback.rechoose_every):
            facts["channel_choice"] = callback.channel_choice
            facts |= {"rechoose_every": callback.rechoose_every} if callback.rechoose_every else {}
        elif isinstance(callback, Int8Training):
            facts |= {"gradient_scaling": callback.gradient_scaling, "weight_storage": callback.weight_storage}
            facts |= {"near_zero_channels": sum(callback.near_zero.values())} if callback.gradient_scaling else {}
    return facts


def print_result(report: dict[str, Any], out_dir: Path) -> None:
    """Prints what came out, and where it lies."""
    print(f"top-1 on the test split: {report['top1']:.2%} of {report['test_samples']:,} samples")
    if "peak_memory_bytes" in report:
        verdict = "fits" if report["fits"] else "does not fit"
        print(
            f"one training step (batch 1, int8): peak {report['peak_memory_bytes'] / KIB:.1f} KiB, {verdict} "
            f"{report['mcu']} with {report['budget_bytes'] / KIB:.1f} KiB; "
            f"extra memory {report['extra_memory_bytes'] / KIB:.1f} KiB"
        )
    if "earlier_top1_before" in report:
        print(
            f"top-1 on what it knew before, with its earlier classifier: {report['earlier_top1_before']:.2%}, "
            f"now {report['earlier_top1_after']:.2%}"
        )
    if (out_dir / INT8_FILE).exists():
        print(f"the trained int8 network: {out_dir / INT8_FILE}")
    print(f"results: {out_dir / 'report.json'}")
