"""What the training recipes do for an int8 network beside what they do for any."""

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback

from microtune.callbacks.int8_training import Int8Training
from microtune.modules.classifier import OptimizerName
from microtune.modules.sparse_update.int8_update import WeightStorage
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

INT8_FILE = "network.safetensors"  # in the run's folder: the network as it was trained


def refuse_unsuited_to_int8(
    has_batch_norm: bool,
    precision: str,
    optimizer: OptimizerName,
    gradient_clip_norm: float | None,
    ema_decay: float | None,
    weight_storage: WeightStorage,
) -> None:
    """Raises ``UserError`` where an int8 network cannot be trained so."""
    if has_batch_norm:
        raise UserError("--scheme none trains with batch norm, which an int8 network has not: give --scheme full")
    if precision not in ("32-true", "32"):
        raise UserError(
            f"precision is {precision}, and an int8 network is simulated in float32, whose whole numbers are exact: "
            "give 32-true"
        )
    if optimizer != "sgd":
        raise UserError(
            f"optimizer is {optimizer}, whose steps are as long in integers as in real numbers, so that int8 weights "
            "hardly move: give sgd"
        )
    if gradient_clip_norm:
        raise UserError("gradient_clip_norm would measure an int8 network's gradients in integers: leave it out")
    if ema_decay and weight_storage == "in_place":
        raise UserError("ema_decay averages weights in floating point: give --weight_storage latent, or leave it out")


def int8_callbacks(gradient_scaling: bool, weight_storage: WeightStorage, seed: int) -> list[Callback]:
    """What trains an int8 network right, and a line that says so."""
    scaling = "with" if gradient_scaling else "as --gradient_scaling false says, without"
    log.info("the int8 network is trained %s quantization-aware scaling, its weights %s", scaling, weight_storage)
    return [Int8Training(weight_storage, gradient_scaling, seed)]


def int8_report(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """How an int8 network was trained, for the report; nothing where ``callbacks`` are none."""
    report = {}
    for callback in callbacks:
        if isinstance(callback, Int8Training):
            report["gradient_scaling"] = callback.gradient_scaling
            if callback.gradient_scaling:
                report["near_zero_channels"] = sum(callback.near_zero.values())
            report["weight_storage"] = callback.weight_storage
    return report
