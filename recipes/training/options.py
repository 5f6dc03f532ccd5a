"""The options that training recipes share, each group of them a frozen dataclass: the groups of ``--help``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from microtune.modules.sparse_update.channel_importance import Criterion
from microtune.modules.sparse_update.int8_update import WeightStorage
from microtune.modules.sparse_update.scheme_application import Method

LoggerName = Literal["wandb", "csv", "none"]
OptimizerName = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class NetworkOptions:
    """Network

    Args:
        weights: Weights to start from: none, torchvision, or a .pth, .ckpt, .h5 or .npz file; none for an int8 network,
            which has its own.
        network: Network to train: mobilenet_v2, or the .safetensors file of an int8 network, which is trained as a
            device does it.
        width: Multiplier of its channels; by default that of the weights, and 0.35 from scratch.
        head_convolution: Whether the network has its last 1x1 convolution.
    """

    weights: str = "none"
    network: str = "mobilenet_v2"
    width: float | None = None
    head_convolution: bool = False


@dataclass(frozen=True)
class BudgetOptions:
    """Update scheme and memory budget

    Args:
        scheme: Update scheme: a JSON file, or classifier, biases, last_layers, sub_tensor (as much as fits the
            microcontroller) or full; none trains everything with batch norm, which no microcontroller does. By default
            sub_tensor where weights are given, and none from scratch.
        mcu: Microcontroller that a training step must fit; by default stm32f746, unless sram_bytes describes another.
        sram_bytes: SRAM that one buffer can use; describes another microcontroller, or replaces the named one's.
        flash_bytes: Flash for the frozen weights; describes another microcontroller, or replaces the named one's.
        reserve_bytes: SRAM that is not for training; describes another microcontroller, or replaces the named one's.
        allow_oversize: Whether to train although the scheme does not fit.
        method: Way to update part of a weight: sub_tensor computes and stores only what is updated, mask is the
            textbook version.
        channel_choice: Score by which a layer's updated channels are chosen where the scheme fixes none, the highest
            first: weight_norm (the paper's) or random at once; gradient_norm, fisher, taylor, loss_decrease or
            activation_norm from training samples before the first step.
        rechoose_every: Number of steps after which channels are chosen anew, by the same score; 0 for never. The device
            then needs room for the scores too, and flash for all weights.
        choice_samples: Number of training samples that a choice is made from.
    """

    scheme: str | None = None
    mcu: str | None = None
    sram_bytes: int | None = None
    flash_bytes: int | None = None
    reserve_bytes: int | None = None
    allow_oversize: bool = False
    method: Method = "sub_tensor"
    channel_choice: Criterion = "weight_norm"
    rechoose_every: int = 0
    choice_samples: int = 256


@dataclass(frozen=True)
class OptimizationOptions:
    """Optimization

    Args:
        learning_rate: Learning rate at its highest; by default 0.1 / 256 x batch_size x accumulate_batches with SGD
            (Lin et al.), 0.001 with AdamW, and 0.1 for speech from scratch. It is not scaled by the number of devices.
        optimizer: Optimizer: sgd or adamw.
        momentum: Momentum of SGD; anything but 0 needs optimizer state. By default 0 under a scheme, else 0.9.
        weight_decay: Decay of weights, not of biases and norms. By default 0 under a scheme, else 0.00004 (Sandler et
            al.).
        label_smoothing: Smoothing of the labels in the loss. By default 0 under a scheme, else 0.1.
        warmup_fraction: Part of all steps in which the learning rate rises; then it falls to zero as a cosine.
        ema_decay: Decay of the exponential moving average of the weights per step, which is what is tested; 0 for none,
            the default but for ImageNet from scratch, which has 0.9999, or less if it takes few steps.
        accumulate_batches: Number of batches whose gradients are summed before a step.
        gradient_clip_norm: Largest norm of the gradient.
    """

    learning_rate: float | None = None
    optimizer: OptimizerName = "sgd"
    momentum: float | None = None
    weight_decay: float | None = None
    label_smoothing: float | None = None
    warmup_fraction: float = 0.1
    ema_decay: float | None = None
    accumulate_batches: int = 1
    gradient_clip_norm: float | None = None


@dataclass(frozen=True)
class Int8Options:
    """Int8 network

    Args:
        gradient_scaling: Whether gradients have quantization-aware scaling; without it an int8 network hardly learns.
        weight_storage: Form of the trained weights: in_place keeps them int8 at every moment, latent keeps copies in
            floating point beside them, for which a device needs 4 bytes more per updated weight.
    """

    gradient_scaling: bool = True
    weight_storage: WeightStorage = "in_place"


@dataclass(frozen=True)
class DeviceOptions:
    """Devices that train

    Args:
        accelerator: Kind of device, as Lightning's Trainer takes it: auto, cpu, gpu, ...
        devices: Number of devices on each machine, or auto; each takes batches of its own.
        num_nodes: Number of machines, each of which runs the recipe.
        strategy: Strategy of several devices, as Lightning's Trainer takes it, such as ddp.
        precision: Precision of the computation, as Lightning's Trainer takes it, such as bf16-mixed.
        compile: Whether to compile the network with torch.compile: minutes at the start, for faster steps.
    """

    accelerator: str = "auto"
    devices: str = "1"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    compile: bool = False


@dataclass(frozen=True)
class RunOptions:
    """Run

    Args:
        evaluate_only: Whether to train nothing, and test the weights as they are.
        logger: Logger: wandb (offline unless you are logged in), or csv or none to do without; metrics are kept as CSV
            in any case.
        out_dir: Folder of the run; by default a new one below runs/.
        resume: Whether to go on with the run in out_dir after its last finished epoch.
    """

    evaluate_only: bool = False
    logger: LoggerName = "wandb"
    out_dir: Path | None = None
    resume: bool = False
