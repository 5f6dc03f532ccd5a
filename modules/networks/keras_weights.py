"""Keras' MobileNetV2 weights under torchvision's names."""

import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from microtune.modules.user_error import UserError

# Keras' array -> torch's tensor, and the order of axes that makes one the other
CONVOLUTION = {"kernel": ("weight", (3, 2, 0, 1))}
DEPTHWISE = {"depthwise_kernel": ("weight", (2, 3, 0, 1))}
BATCH_NORM = {
    "gamma": ("weight", (0,)),
    "beta": ("bias", (0,)),
    "moving_mean": ("running_mean", (0,)),
    "moving_variance": ("running_var", (0,)),
}
LINEAR = {"kernel": ("weight", (1, 0)), "bias": ("bias", (0,))}
HEAD = {"Conv_1", "Conv_1_bn", "predictions", "Logits"}  # what a file may leave out

Layer = tuple[str, str, dict[str, tuple[str, tuple[int, ...]]]]


def read_keras_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a file of keras.applications' MobileNetV2 into a state dict with torchvision's names.

    Both generations of layer names are known: ``block_1_expand``, and ``mobl1_conv_1_expand`` as in the files that
    keras.applications downloads.

    Args:
        path: ``.h5`` (weights or a whole model of Keras 2), or ``.npz`` with arrays such as ``Conv1/kernel``.

    Returns:
        float32 tensors: convolutions as (out, in / groups, height, width), batch norm, and, where the file has them,
        the last convolution (``features.18``) and the classifier as (classes, features).

    Raises:
        UserError: The file cannot be read, or an array of MobileNetV2 is missing or has another number of axes.

    Example::

        state = read_keras_weights("mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_128.h5")
        state["features.0.0.weight"].shape  # (16, 3, 3, 3)
    """
    path = Path(path)
    try:
        arrays = _read_npz(path) if path.suffix == ".npz" else _read_h5(path)
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"weights file {path} cannot be read ({type(error).__name__}): it is cut short or no {path.suffix} file of "
            "plain arrays; download it again"
        ) from error
    present = {name.partition("/")[0] for name in arrays}
    state = {}
    for layer, module, kind in _layers():
        if layer in present or layer not in HEAD:
            for array, (parameter, axes) in kind.items():
                state[f"{module}.{parameter}"] = _transposed(arrays, f"{layer}/{array}", axes, path)
    return state


def _layers() -> Iterator[Layer]:
    """Keras' layer, torchvision's module and what arrays it has."""
    yield "Conv1", "features.0.0", CONVOLUTION
    yield "bn_Conv1", "features.0.1", BATCH_NORM
    for block in range(17):
        prefix = f"block_{block}_" if block else "expanded_conv_"
        conv = f"features.{block + 1}.conv"
        stage = 0
        if block:
            yield f"{prefix}expand", f"{conv}.0.0", CONVOLUTION
            yield f"{prefix}expand_BN", f"{conv}.0.1", BATCH_NORM
            stage = 1
        yield f"{prefix}depthwise", f"{conv}.{stage}.0", DEPTHWISE
        yield f"{prefix}depthwise_BN", f"{conv}.{stage}.1", BATCH_NORM
        yield f"{prefix}project", f"{conv}.{stage + 1}", CONVOLUTION
        yield f"{prefix}project_BN", f"{conv}.{stage + 2}", BATCH_NORM
    yield "Conv_1", "features.18.0", CONVOLUTION
    yield "Conv_1_bn", "features.18.1", BATCH_NORM
    yield "predictions", "classifier.1", LINEAR
    yield "Logits", "classifier.1", LINEAR


def _transposed(arrays: dict[str, np.ndarray], name: str, axes: tuple[int, ...], path: Path) -> Tensor:
    if name not in arrays:
        raise UserError(
            f"weights file {path} has no array {name}: give keras.applications' MobileNetV2, "
            "as .h5 of its own download or .npz"
        )
    if arrays[name].ndim != len(axes):
        raise UserError(
            f"array {name} of weights file {path} has shape {arrays[name].shape}, not {len(axes)} axes: "
            "give keras.applications' MobileNetV2"
        )
    return torch.from_numpy(np.ascontiguousarray(arrays[name].transpose(axes), dtype=np.float32))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {_array_name(name): file[name] for name in file.files}


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    arrays = {}

    def read(name: str, item: h5py.Group | h5py.Dataset) -> None:
        # a whole model's file also holds moments of the optimizer, under the layers' names
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer_weights"):
            arrays[_array_name(name)] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(read)
    return arrays


def _array_name(path: str) -> str:
    """``mobl1_conv_1_expand/mobl1_conv_1_expand/kernel:0`` -> ``block_1_expand/kernel``."""
    layer, _, array = "/".join(path.split("/")[-2:]).rpartition("/")
    first_names = re.fullmatch(r"(mobl|bn)(\d+)_conv_\d+_(?:bn_)?(expand|depthwise|project)", layer)
    if first_names:
        kind, block, stage = first_names.groups()
        prefix = f"block_{block}_" if int(block) else "expanded_conv_"
        layer = prefix + stage + ("_BN" if kind == "bn" else "")
    return f"{layer}/{array.removesuffix(':0')}"
