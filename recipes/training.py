"""The job that all training recipes share: fine-tune a network under a scheme that fits a microcontroller."""

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import matplotlib
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from microtune.callbacks.sparse_update import SparseUpdate
from microtune.modules.batch_norm_folding import fold_batch_norm
from microtune.modules.channel_choice import ChannelChoice
from microtune.modules.classifier import Classifier, OptimizerName
from microtune.modules.microcontrollers import Microcontroller, microcontroller
from microtune.modules.mobilenet_v2 import build_network, load_weights, padding_of_weights, weights_are_folded
from microtune.modules.peak_memory import PeakMemory
from microtune.modules.scheme_application import Method
from microtune.modules.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.modules.whole_files import write_json
from microtune.recipes.memory_figures import KIB, draw_memory, memory_figures, refuse_oversize
from microtune.recipes.networks import NetworkName, describe_network, scheme_by_name_or_file
from microtune.recipes.run_folder import (
    LoggerName,
    WholeFileCheckpointIO,
    checkpoint_to_resume,
    log_run_end,
    log_run_start,
    make_loggers,
    open_run_folder,
    plain,
    refuse_another_run,
    wandb_run,
    write_config,
)

log = logging.getLogger(__name__)

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
}


def fine_tune(
    data: LightningDataModule,
    recipe: str,
    arguments: dict[str, Any],
    weights: str,
    resolution: int,
    epochs: int,
    batch_size: int,
    seed: int,
    scheme: str = "sub_tensor",
    mcu: str | None = None,
    network: NetworkName = "mobilenet_v2",
    width: float = 0.35,
    head_convolution: bool = False,
    learning_rate: float | None = None,
    optimizer: OptimizerName = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    warmup_fraction: float = 0.1,
    accumulate_batches: int = 1,
    gradient_clip_norm: float | None = None,
    channel_choice: ChannelChoice = "weight_norm",
    method: Method = "sub_tensor",
    sram_bytes: int | None = None,
    flash_bytes: int | None = None,
    reserve_bytes: int | None = None,
    allow_oversize: bool = False,
    accelerator: str = "auto",
    devices: str = "auto",
    strategy: str = "auto",
    precision: str = "32-true",
    logger: LoggerName = "wandb",
    out_dir: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Trains, tests once, and leaves everything in the run's folder; returns what ``report.json`` says.

    Args:
        data: What to learn.
        recipe: Name of the recipe.
        arguments: Of the recipe, which ``config.yaml`` keeps.
        weights: To start from: none, torchvision, or a .pth, .ckpt, .h5 or .npz file.
        resolution: Height and width of the input in pixels.
        epochs: Passes over the training split.
        batch_size: Samples per batch and device.
        seed: Of the fresh classifier, the order of the samples and their augmentation.
        scheme: Update scheme: a JSON file, or classifier, biases, last_layers, sub_tensor (as much as fits the
            microcontroller) or full; none trains everything with batch norm, which no microcontroller does.
        mcu: Microcontroller that a training step must fit; by default stm32f746, unless sram_bytes describes another.
        network: Its architecture.
        width: Multiplier of its channels.
        head_convolution: Whether the network has its last 1x1 convolution.
        learning_rate: At its highest; by default 0.1 / 256 x batch_size x accumulate_batches with SGD (Lin et al.),
            0.001 with AdamW.
        optimizer: sgd or adamw.
        momentum: Of SGD; anything but 0 needs optimizer state.
        weight_decay: Of weights, not of biases and norms.
        label_smoothing: Of the loss.
        warmup_fraction: Part of all steps in which the learning rate rises; then it falls to zero as a cosine.
        accumulate_batches: Batches whose gradients are summed before a step.
        gradient_clip_norm: Largest norm of the gradient.
        channel_choice: How a layer's updated channels are chosen: weight_norm or random.
        method: sub_tensor computes and stores only what is updated, mask is the textbook version.
        sram_bytes: SRAM that one buffer can use; describes another microcontroller, or replaces the named one's.
        flash_bytes: Flash, likewise.
        reserve_bytes: SRAM that is not for training, likewise.
        allow_oversize: Train although the scheme does not fit.
        accelerator: As Lightning's Trainer takes it.
        devices: Number of devices, or auto.
        strategy: As Lightning's Trainer takes it, such as ddp.
        precision: As Lightning's Trainer takes it, such as bf16-mixed.
        logger: wandb (offline unless you are logged in), or csv or none to do without; metrics are kept as CSV in
            any case.
        out_dir: The run's folder; by default a new one below runs/.
        resume: Go on with the run in out_dir after its last finished epoch.
    """
    started = time.monotonic()
    check_ranges(arguments)
    default_mcu = "stm32f746" if sram_bytes is None else None
    device = microcontroller(mcu or default_mcu, sram_bytes, flash_bytes, reserve_bytes)
    data.prepare_data()
    data.setup()
    padding = padding_of_weights(weights)
    described = describe_network(width, resolution, data.num_classes, data.in_channels, head_convolution, padding)
    peak_memory = PeakMemory(
        described.operations,
        optimizer_state="adam" if optimizer == "adamw" else "momentum" if momentum else "none",
        gradient_accumulation=accumulate_batches > 1,
    )
    update_scheme = None if scheme == "none" else scheme_by_name_or_file(scheme, described, peak_memory, device)
    if update_scheme is not None and not allow_oversize:
        remedy = "or give --allow_oversize to train anyway"
        refuse_oversize(peak_memory, update_scheme, device, described.network, remedy)

    if update_scheme is not None and weights == "none":
        log.warning("a scheme updates little of a network that has learnt nothing: give --weights, or --scheme none")

    seed_everything(seed, verbose=False)
    default_rate = 1e-3 if optimizer == "adamw" else 0.1 / 256 * batch_size * accumulate_batches
    module = Classifier(
        {**described.arguments, "folded": update_scheme is not None},
        learning_rate=default_rate if learning_rate is None else learning_rate,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        warmup_fraction=warmup_fraction,
        label_smoothing=label_smoothing,
    )
    load_pretrained(module, weights, described.input_shape)

    out_dir = open_run_folder(out_dir, recipe, resume)
    if resume:
        refuse_another_run(out_dir, plain(arguments), update_scheme)
    callbacks = [ModelCheckpoint(out_dir, "last", save_on_train_epoch_end=True, enable_version_counter=False)]
    if update_scheme is not None:
        callbacks.append(SparseUpdate(update_scheme, "net", method, channel_choice, seed, described.input_shape))
    trainer = make_trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate_batches,
        gradient_clip_val=gradient_clip_norm,
        callbacks=callbacks,
    )
    memory = keep_run_start(out_dir, arguments, update_scheme, peak_memory, device)
    loggers = trainer.loggers = make_loggers(logger, out_dir, recipe)
    log_run_start(wandb_run(loggers), plain(arguments), update_scheme, memory, out_dir)
    trainer.fit(module, data, ckpt_path=checkpoint_to_resume(out_dir) if resume else None)

    report = evaluate(trainer, module, data) | memory
    if not math.isfinite(report["loss"]):
        rate = module.hparams.learning_rate
        raise UserError(f"training diverged at learning rate {rate:g}: start anew with a smaller --learning_rate")
    report |= {"epochs": epochs, "batch_size": batch_size, "seed": seed, "seconds": time.monotonic() - started}
    if rank_zero_only.rank == 0:
        log_run_end(wandb_run(loggers), report, module.test_confusion, data.class_names)
        write_json(out_dir / "report.json", report)
        print_result(report, out_dir)
    return report


def check_ranges(arguments: dict[str, Any]) -> None:
    """Raises ``UserError`` if a number is out of its range."""
    for name, (low, high) in RANGES.items():
        value = arguments.get(name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}: give {low} or more{'' if high == math.inf else f', at most {high}'}")


def make_trainer(**options: Any) -> Trainer:
    """A Trainer that logs every tenth step, to loggers that are set later: nothing is written if it is refused."""
    devices, cores = str(options["devices"]), os.cpu_count()
    if options["accelerator"] == "cpu" and devices.isdecimal() and int(devices) > cores:
        raise UserError(f"devices is {devices}, but there are {cores} cores: give {cores} at most")
    try:
        plugins = [WholeFileCheckpointIO()]
        return Trainer(logger=False, log_every_n_steps=10, enable_model_summary=False, plugins=plugins, **options)
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"accelerator, devices, strategy or precision: {error}") from error


def load_pretrained(module: Classifier, weights: str, input_shape: tuple[int, int, int]) -> None:
    """Loads weights into the module's network, folding their batch norm if the network's is folded."""
    network = module.hparams.network
    if weights == "none":
        return
    if network["folded"] == weights_are_folded(weights):
        load_weights(module.net, weights)
        return
    unfolded = build_network(**{**network, "folded": False})
    load_weights(unfolded, weights)
    module.net.load_state_dict(fold_batch_norm(unfolded, input_shape).state_dict())


def keep_run_start(
    out_dir: Path,
    arguments: dict[str, Any],
    scheme: UpdateScheme | None,
    peak_memory: PeakMemory,
    device: Microcontroller,
) -> dict[str, Any]:
    """Writes what the run is: its arguments, its scheme and the picture of its memory; returns the memory figures."""
    if rank_zero_only.rank == 0 and not (out_dir / "config.yaml").exists():
        write_config(out_dir, arguments)
    if scheme is None:
        return {}
    if rank_zero_only.rank == 0:
        scheme.save(out_dir / "scheme.json")
        matplotlib.use("Agg")
        title = f"One training step of {scheme.network}"
        draw_memory(peak_memory.timeline(scheme), device, title, out_dir / "memory.png")
    return memory_figures(peak_memory, scheme, device)


def evaluate(trainer: Trainer, module: Classifier, data: LightningDataModule) -> dict[str, Any]:
    """Measures on the validation split, and once, at the end, on the test split."""
    validated = trainer.validate(module, data, verbose=False)[0]
    tested = trainer.test(module, data, verbose=False)[0]
    report = {"top1": tested["test/top1"], "val_top1": validated["val/top1"], "loss": tested["test/loss"]}
    if "test/top5" in tested:
        report["top5"] = tested["test/top5"]
    sizes = {name: getattr(data, name) for name in ("train_samples", "val_samples", "test_samples")}
    return report | sizes | {"classes": data.num_classes}


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
    print(f"results: {out_dir / 'report.json'}")
