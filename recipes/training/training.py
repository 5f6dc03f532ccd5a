"""The job that all training recipes share: train a network, from scratch or under a scheme that fits an MCU."""

import copy
import logging
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
from filelock import FileLock
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from microtune.callbacks.sparse_update import SparseUpdate
from microtune.modules.atomic_files import write_json
from microtune.modules.classifier import Classifier, OptimizerName
from microtune.modules.int8.files import read_quantized_network, write_quantized_network
from microtune.modules.int8.network import load_quantized_tensors, quantized_tensors
from microtune.modules.memory.microcontrollers import Microcontroller, microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import build_network
from microtune.modules.networks.pretrained_weights import load_weights, weights_are_folded
from microtune.modules.sparse_update.channel_choice import to_be_chosen
from microtune.modules.sparse_update.channel_importance import WITHOUT_DATA, Criterion
from microtune.modules.sparse_update.int8_update import WeightStorage
from microtune.modules.sparse_update.scheme_application import Method
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.int8_training import INT8_FILE, int8_callbacks, int8_report, refuse_unsuited_to_int8
from microtune.recipes.training.memory_figures import (
    KIB,
    draw_memory,
    memory_figures,
    refuse_oversize,
    scheme_fits,
    size_of,
)
from microtune.recipes.training.networks import (
    FILLING_SCHEMES,
    DescribedNetwork,
    class_names_of,
    describe_network,
    scheme_by_name_or_file,
    source_of_weights,
)
from microtune.recipes.training.run_folder import (
    LoggerName,
    WholeFileCheckpointIO,
    check_run_folder,
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
    "ema_decay": (0, 1),
    "num_nodes": (1, math.inf),
    "rechoose_every": (0, math.inf),
    "choice_samples": (1, math.inf),
}


# MobileNetV2's own (Sandler et al. 2018, section 6.1), but with label smoothing, as those who trained it since have
WITH_BATCH_NORM = {"momentum": 0.9, "weight_decay": 4e-5, "label_smoothing": 0.1, "ema_decay": 0.0}
UNDER_A_SCHEME = {"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0, "ema_decay": 0.0}


def train(
    data: LightningDataModule,
    recipe: str,
    arguments: dict[str, Any],
    weights: str,
    epochs: int,
    batch_size: int,
    seed: int,
    scratch_defaults: dict[str, float] | None = None,
    earlier_data: LightningDataModule | None = None,
    scheme: str | None = None,
    mcu: str | None = None,
    network: str = "mobilenet_v2",
    width: float | None = None,
    head_convolution: bool = False,
    learning_rate: float | None = None,
    optimizer: OptimizerName = "sgd",
    momentum: float | None = None,
    weight_decay: float | None = None,
    label_smoothing: float | None = None,
    warmup_fraction: float = 0.1,
    ema_decay: float | None = None,
    accumulate_batches: int = 1,
    gradient_clip_norm: float | None = None,
    channel_choice: Criterion = "weight_norm",
    rechoose_every: int = 0,
    choice_samples: int = 256,
    method: Method = "sub_tensor",
    gradient_scaling: bool = True,
    weight_storage: WeightStorage = "in_place",
    sram_bytes: int | None = None,
    flash_bytes: int | None = None,
    reserve_bytes: int | None = None,
    allow_oversize: bool = False,
    evaluate_only: bool = False,
    compile: bool = False,
    accelerator: str = "auto",
    devices: str = "1",
    num_nodes: int = 1,
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
        weights: To start from: none, torchvision, or a .pth, .ckpt, .h5 or .npz file; none for an int8 network, which
            has its own.
        epochs: Passes over the training split.
        batch_size: Samples per batch and device.
        seed: Of the fresh classifier, the order of the samples and their augmentation.
        scratch_defaults: The recipe's own settings where training begins from scratch, over ``WITH_BATCH_NORM``.
        earlier_data: What the weights were trained on: tested before and after, with the weights' own classifier, to
            say what was forgotten.
        scheme: Update scheme: a JSON file, or classifier, biases, last_layers, sub_tensor (as much as fits the
            microcontroller) or full; none trains everything with batch norm, which no microcontroller does. By default
            sub_tensor where weights are given, and none from scratch.
        mcu: Microcontroller that a training step must fit; by default stm32f746, unless sram_bytes describes another.
        network: mobilenet_v2, or the .safetensors file of an int8 network, which is trained as a device does it.
        width: Multiplier of its channels; by default that of the weights, and 0.35 from scratch.
        head_convolution: Whether the network has its last 1x1 convolution.
        learning_rate: At its highest; by default 0.1 / 256 x batch_size x accumulate_batches with SGD (Lin et al.),
            0.001 with AdamW, and 0.1 for speech from scratch. It is not scaled by the number of devices.
        optimizer: sgd or adamw.
        momentum: Of SGD; anything but 0 needs optimizer state. By default 0 under a scheme, else 0.9.
        weight_decay: Of weights, not of biases and norms. By default 0 under a scheme, else 0.00004 (Sandler et al.).
        label_smoothing: Of the loss. By default 0 under a scheme, else 0.1.
        warmup_fraction: Part of all steps in which the learning rate rises; then it falls to zero as a cosine.
        ema_decay: Of the exponential moving average of the weights per step, which is what is tested; 0 for none, the
            default but for ImageNet from scratch, which has 0.9999, or less if it takes few steps.
        accumulate_batches: Batches whose gradients are summed before a step.
        gradient_clip_norm: Largest norm of the gradient.
        channel_choice: By which score a layer's updated channels are chosen where the scheme fixes none, the highest
            first: weight_norm (the paper's) or random at once; gradient_norm, fisher, taylor, loss_decrease or
            activation_norm from training samples before the first step.
        rechoose_every: Steps after which they are chosen anew, by the same score; 0 for never. The device then needs
            room for the scores too, and flash for all weights.
        choice_samples: Training samples that a choice is made from.
        method: sub_tensor computes and stores only what is updated, mask is the textbook version.
        gradient_scaling: Of an int8 network, quantization-aware scaling of its gradients; without, it hardly learns.
        weight_storage: Of an int8 network: in_place keeps its weights int8 at every moment, latent keeps copies in
            floating point beside them, for which a device needs 4 bytes more per updated weight.
        sram_bytes: SRAM that one buffer can use; describes another microcontroller, or replaces the named one's.
        flash_bytes: Flash, likewise.
        reserve_bytes: SRAM that is not for training, likewise.
        allow_oversize: Train although the scheme does not fit.
        evaluate_only: Train nothing: test the weights as they are.
        compile: Compile the network with torch.compile: minutes at the start, for faster steps.
        accelerator: As Lightning's Trainer takes it.
        devices: Number of devices on each machine, or auto; each takes batches of its own.
        num_nodes: Machines, each of which runs the recipe.
        strategy: As Lightning's Trainer takes it, such as ddp.
        precision: As Lightning's Trainer takes it, such as bf16-mixed.
        logger: wandb (offline unless you are logged in), or csv or none to do without; metrics are kept as CSV in
            any case.
        out_dir: The run's folder; by default a new one below runs/.
        resume: Go on with the run in out_dir after its last finished epoch.
    """
    started = time.monotonic()
    check_ranges(arguments)
    weights = source_of_weights(network, weights)
    if evaluate_only and weights == "none":
        raise UserError("evaluate_only tests weights: give them with --weights, or an int8 --network")
    default_mcu = "stm32f746" if sram_bytes is None else None
    device = microcontroller(mcu or default_mcu, sram_bytes, flash_bytes, reserve_bytes)
    check_run_folder(out_dir, resume)
    prepare_once(data)
    data.setup()
    described = describe_network(weights, data.input_shape, data.num_classes, width, head_convolution)
    has_batch_norm = weights == "none" if scheme is None else scheme == "none"
    if described.is_quantized:
        refuse_unsuited_to_int8(has_batch_norm, precision, optimizer, gradient_clip_norm, ema_decay, weight_storage)
    if has_batch_norm and batch_size == 1 and not evaluate_only:
        raise UserError("batch_size is 1, and batch norm has no statistics of one sample: give 2 or more")
    peak_memory = PeakMemory(
        described.operations,
        optimizer_state="adam" if optimizer == "adamw" else "momentum" if momentum else "none",
        gradient_accumulation=accumulate_batches > 1,
        latent_weights=described.is_quantized and weight_storage == "latent",
    )
    update_scheme = None
    rechosen_by = channel_choice if rechoose_every and not evaluate_only else None
    if not has_batch_norm and not evaluate_only:
        update_scheme = scheme_that_fits(
            scheme or "sub_tensor", described, peak_memory, device, allow_oversize, rechosen_by
        )
        if weights == "none":
            log.warning("a scheme updates little of a network that has learnt nothing: give --weights")
    if not evaluate_only:
        refuse_unsuited_choice(update_scheme, described, channel_choice, rechoose_every, compile, ema_decay)

    seed_everything(seed, verbose=False)
    settings = settings_of(
        {"learning_rate": 0.1 / 256 * batch_size * accumulate_batches}
        | (WITH_BATCH_NORM if has_batch_norm else UNDER_A_SCHEME)
        | (scratch_defaults if weights == "none" and has_batch_norm and scratch_defaults else {})
        | ({"learning_rate": 1e-3} if optimizer == "adamw" else {}),
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        ema_decay=ema_decay,
    )
    average_decay = settings.pop("ema_decay")
    if ema_decay is None:
        # the average begins with the first step, and of a short run that would be most of it
        steps = epochs * math.ceil(data.train_samples / (batch_size * accumulate_batches))
        average_decay = min(average_decay, steps / (steps + 10))
    module = Classifier(
        described.arguments | network_as_it_is_used(described, weights, evaluate_only, update_scheme is not None),
        optimizer=optimizer,
        warmup_fraction=warmup_fraction,
        class_names=data.class_names,
        input_shape=list(described.input_shape),
        **settings,
    )
    load_pretrained(module, weights, described.input_shape, whole=evaluate_only)
    earlier = None
    if earlier_data is not None and not evaluate_only:
        earlier = earlier_classifier(module, weights, described.input_shape, earlier_data)
    if compile:
        module.net.compile()

    checkpoints = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    callbacks = [checkpoints]
    if update_scheme is not None:
        shape = described.input_shape
        callbacks.append(
            SparseUpdate(update_scheme, "net", method, channel_choice, seed, shape, rechoose_every, choice_samples)
        )
    of_int8 = []
    if described.is_quantized and not evaluate_only:
        of_int8 = int8_callbacks(gradient_scaling, weight_storage, seed)
    averaging = [EMAWeightAveraging(decay=average_decay)] if average_decay else []
    trainer = make_trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate_batches,
        gradient_clip_val=gradient_clip_norm,
        callbacks=callbacks + of_int8 + averaging,
    )
    # the Trainer knows which of several processes this is, and one of them alone opens the folder
    out_dir = open_run_folder(out_dir, recipe, resume)
    if resume:
        refuse_another_run(out_dir, plain(arguments), update_scheme)
    checkpoints.dirpath = str(out_dir)
    memory = keep_run_start(out_dir, arguments, update_scheme, peak_memory, device, rechosen_by)
    forgotten = {} if earlier is None else {"earlier_top1_before": test_quietly(trainer, earlier, earlier_data)}
    loggers = trainer.loggers = make_loggers(logger, out_dir, recipe)
    log_run_start(wandb_run(loggers), plain(arguments), update_scheme, memory, out_dir)
    if not evaluate_only:
        trainer.fit(module, data, ckpt_path=checkpoint_to_resume(out_dir) if resume else None)

    # what it averaged is in the network by now, and it would put it there again, whatever the network has become
    trainer.callbacks = [callback for callback in trainer.callbacks if callback not in averaging]
    report = evaluate(trainer, module, data) | memory
    if not math.isfinite(report["loss"]):
        rate = module.hparams.learning_rate
        raise UserError(f"training diverged at learning rate {rate:g}: start anew with a smaller --learning_rate")
    if earlier is not None:
        take_trunk(earlier, module)
        forgotten["earlier_top1_after"] = test_quietly(trainer, earlier, earlier_data)
    run = {"epochs": 0 if evaluate_only else epochs, "batch_size": batch_size, "seed": seed}
    if update_scheme is not None:
        report |= choice_report(channel_choice, rechoose_every)
    report |= int8_report(of_int8) | forgotten | run | {"seconds": time.monotonic() - started}
    if rank_zero_only.rank == 0:
        if of_int8:
            made = quantized_tensors(module.net, data.class_names, described.input_shape)
            write_quantized_network(out_dir / INT8_FILE, *made)
        log_run_end(wandb_run(loggers), report, module.test_confusion, data.class_names)
        write_json(out_dir / "report.json", report)
        print_result(report, out_dir)
    return report


def scheme_that_fits(
    scheme: str,
    described: DescribedNetwork,
    peak_memory: PeakMemory,
    device: Microcontroller,
    allow_oversize: bool,
    rechosen_by: Criterion | None = None,
) -> UpdateScheme:
    """The scheme of that name or in that file; raises ``UserError`` if it does not fit, unless that is allowed."""
    update_scheme = scheme_by_name_or_file(scheme, described, peak_memory, device, rechosen_by)
    if not allow_oversize:
        remedy = "or give --allow_oversize to train anyway"
        refuse_oversize(peak_memory, update_scheme, device, described.network, remedy, rechosen_by)
    elif scheme in FILLING_SCHEMES and not scheme_fits(peak_memory, update_scheme, device, rechosen_by):
        log.warning("%s takes what fits %s, and nothing does: the classifier alone is updated", scheme, device.name)
    return update_scheme


def refuse_unsuited_choice(
    scheme: UpdateScheme | None,
    described: DescribedNetwork,
    channel_choice: Criterion,
    rechoose_every: int,
    compile: bool,
    ema_decay: float | None,
) -> None:
    """Raises ``UserError`` where channels cannot be chosen so; early, before there is a folder of the run."""
    chooses = scheme is not None and bool(to_be_chosen(scheme, described.operations.convolutions))
    if rechoose_every and not chooses:
        raise UserError(
            f"rechoose_every is {rechoose_every}, but there is nothing to choose: give a --scheme that updates some "
            "channels of layers and does not fix which, such as sub_tensor, or leave it out"
        )
    if rechoose_every and compile:
        raise UserError(
            f"rechoose_every is {rechoose_every}, and a compiled network would be compiled anew for every choice: "
            "leave one of them out"
        )
    if ema_decay and chooses and (rechoose_every or channel_choice not in WITHOUT_DATA):
        raise UserError(
            f"ema_decay is {ema_decay}, and averages slices of weights, whose channels are chosen by data or anew in "
            "training: leave it out, or choose once by weight_norm or random"
        )


def choice_report(channel_choice: Criterion, rechoose_every: int) -> dict[str, Any]:
    """How channels were chosen, for the report; nothing where it is by weight norm, once."""
    report = {} if channel_choice == "weight_norm" else {"channel_choice": channel_choice}
    return report | ({"channel_choice": channel_choice, "rechoose_every": rechoose_every} if rechoose_every else {})


def network_as_it_is_used(
    described: DescribedNetwork, weights: str, evaluate_only: bool, has_scheme: bool
) -> dict[str, bool]:
    """What beside ``described.arguments`` says how the network is built: folded or not, with which classifier."""
    if not described.is_quantized:
        return {"folded": weights_are_folded(weights) if evaluate_only else has_scheme}
    return {"int8_classifier": evaluate_only and described.network.graph.classifier.output is not None}


def prepare_once(data: LightningDataModule) -> None:
    """Downloads and unpacks in one process of this machine at a time: the others find it done."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    with FileLock(Path(tempfile.gettempdir()) / f"microtune-{user}.lock"):
        data.prepare_data()


def settings_of(defaults: dict[str, float], **given: float | None) -> dict[str, float]:
    """What is given, and the defaults for what is None.

    Example::

        settings_of({"momentum": 0.9}, momentum=None, label_smoothing=0.2)  # {"momentum": 0.9, "label_smoothing": 0.2}
    """
    return defaults | {name: value for name, value in given.items() if value is not None}


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


def load_pretrained(module: Classifier, weights: str, input_shape: tuple[int, int, int], whole: bool) -> None:
    """Loads weights into the module's network, folding their batch norm if the network's is folded.

    Args:
        module: Whose network gets the weights.
        weights: As ``load_weights`` takes them.
        input_shape: Channels, height and width of a sample.
        whole: Whether the classifier must be among them; otherwise it stays fresh where the weights have none, or
            one of other classes.

    Raises:
        UserError: The weights do not suit the network.
    """
    network = module.hparams.network
    if weights == "none":
        return
    if "graph" in network and whole and module.net.graph.classifier.classes != network["num_classes"]:
        raise UserError(
            f"{weights} knows {module.net.graph.classifier.classes} classes, and the data has "
            f"{network['num_classes']}: give the data it learnt"
        )
    fresh = copy.deepcopy(module.net.classifier.state_dict())
    if "graph" in network:
        load_quantized_tensors(module.net, read_quantized_network(weights)[1])
    elif weights_are_folded(weights) and not network["folded"]:
        raise UserError(f"{weights} has no batch norm, which --scheme none trains with: give --scheme full, or another")
    elif network["folded"] == weights_are_folded(weights):
        load_weights(module.net, weights, whole)
    else:
        unfolded = build_network(**{**network, "folded": False})
        load_weights(unfolded, weights, whole)
        module.net.load_state_dict(fold_batch_norm(unfolded, input_shape).state_dict())
    known, wanted = class_names_of(weights), module.hparams.class_names
    if known is not None and known != wanted:
        if whole:
            raise UserError(f"{weights} knows {_few(known)}, the data has {_few(wanted)}: give the data it learnt")
        module.net.classifier.load_state_dict(fresh)


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])}, ... ({len(names)})" if len(names) > 3 else ", ".join(names)


def earlier_classifier(
    module: Classifier, weights: str, input_shape: tuple[int, int, int], earlier_data: LightningDataModule
) -> Classifier:
    """The network as its weights were trained: with their own classifier, for the classes of ``earlier_data``."""
    earlier_data.prepare_data()
    earlier_data.setup()
    network = {**module.hparams.network, "num_classes": earlier_data.num_classes}
    earlier = Classifier(network, class_names=earlier_data.class_names)
    load_pretrained(earlier, weights, input_shape, whole=True)
    return earlier


def take_trunk(earlier: Classifier, module: Classifier) -> None:
    """Puts all of the module's network but its classifier into that of ``earlier``."""
    own = {name: value for name, value in earlier.net.state_dict().items() if name.startswith("classifier.")}
    earlier.net.load_state_dict(module.net.state_dict() | own)


def test_quietly(trainer: Trainer, module: Classifier, data: LightningDataModule) -> float:
    """Top-1 on the test split, of which the loggers learn nothing."""
    loggers, trainer.loggers = trainer.loggers, []
    top1 = trainer.test(module, data, verbose=False)[0]["test/top1"]
    trainer.loggers = loggers
    return top1


def keep_run_start(
    out_dir: Path,
    arguments: dict[str, Any],
    scheme: UpdateScheme | None,
    peak_memory: PeakMemory,
    device: Microcontroller,
    rechosen_by: Criterion | None,
) -> dict[str, Any]:
    """Writes what the run is: its arguments, its scheme and the picture of its memory; returns the memory figures."""
    if rank_zero_only.rank == 0 and not (out_dir / "config.yaml").exists():
        write_config(out_dir, arguments)
    if scheme is None:
        return {}
    if rank_zero_only.rank == 0:
        scheme.save(out_dir / "scheme.json")
        matplotlib.use("Agg")
        title = f"One training step of {scheme.network} at {size_of(peak_memory.operations.tensors[0])}"
        draw_memory(peak_memory.timeline(scheme), device, title, out_dir / "memory.png")
    return memory_figures(peak_memory, scheme, device, rechosen_by)


def evaluate(trainer: Trainer, module: Classifier, data: LightningDataModule) -> dict[str, Any]:
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
