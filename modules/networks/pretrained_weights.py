"""The weights that exist for MobileNetV2: torchvision's, Keras' and our own checkpoints."""

import logging
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor

from microtune.modules.networks.keras_weights import read_keras_weights
from microtune.modules.networks.mobilenet_v2 import MobileNetV2, Padding
from microtune.modules.user_error import UserError

logger = logging.getLogger(__name__)

# mean and standard deviation per channel of pixels in [0, 1], as the weights saw them in their own training:
# Keras' x / 127.5 - 1, and torchvision's statistics of ImageNet
NORMALIZATION = MappingProxyType(
    {
        "keras": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "symmetric": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }
)

KERAS_SUFFIXES = (".h5", ".npz")
SOURCES = "none, torchvision, or a .pth, .pt, .ckpt, .h5 or .npz file"
# of width 0.35 and resolution 96; others by their numbers
KERAS_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
    "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_96_no_top.h5"
)
FIRST_CONVOLUTION = "features.0.0.weight"
HEAD_CONVOLUTION = "features.18.0.weight"
LAST_PROJECTION = "features.17.conv.2.weight"
CLASSIFIER = ("classifier.1.weight", "classifier.1.bias")


def check_source(source: str | Path) -> None:
    """Raises ``UserError`` if weights are none that ``load_weights`` knows, or a file that is not there.

    Example::

        check_source("torchvision")
    """
    if str(source) not in ("none", "torchvision"):
        _existing_file(source)


def padding_of_weights(source: str | Path) -> Padding:
    """Returns the padding that weights were trained with, which their network must be built with.

    Args:
        source: As in ``load_weights``.

    Raises:
        UserError: A checkpoint cannot be read or does not say its padding.

    Example::

        network = mobilenet_v2(0.35, padding=padding_of_weights("mobilenet_v2_w035_imagenet.h5"))
    """
    suffix = Path(source).suffix
    if suffix != ".ckpt":
        return "keras" if suffix in KERAS_SUFFIXES else "symmetric"
    network = _described_network(source)
    padding = network.get("padding", "symmetric" if network else None)  # the default of a network that is described
    if padding not in get_args(Padding):
        raise UserError(
            f"checkpoint {source} says padding {padding!r} in hyper_parameters['network']: "
            "it must be 'symmetric' or 'keras'; give a checkpoint that a recipe of microtune wrote"
        )
    return padding


def weights_are_folded(source: str | Path) -> bool:
    """Returns whether weights are those of a network without batch norm: only a checkpoint of microtune can be.

    Args:
        source: As in ``load_weights``.

    Example::

        weights_are_folded("torchvision")  # False
    """
    return Path(source).suffix == ".ckpt" and bool(_described_network(source).get("folded", False))


def width_of_weights(source: str | Path) -> float | None:
    """Returns the width that weights were trained with, or None if there are none or their width is unusual.

    Args:
        source: As in ``load_weights``.

    Example::

        width_of_weights("torchvision")  # 1.0
    """
    if str(source) in ("none", "torchvision"):
        return 1.0 if str(source) == "torchvision" else None
    if Path(source).suffix == ".ckpt":
        return _described_network(source).get("width")
    shape = _read_state(source, {}).get(LAST_PROJECTION, torch.empty(0)).shape
    # the projections of the last block are nearly 320 * width, rounded to a multiple of 8
    return {112: 0.35, 160: 0.5, 240: 0.75, 320: 1.0, 416: 1.3, 448: 1.4}.get(shape[0])


def class_names_of_weights(source: str | Path) -> list[str] | None:
    """Returns the classes that weights were trained on, as a checkpoint of microtune says them; else None.

    Args:
        source: As in ``load_weights``.

    Example::

        class_names_of_weights("runs/english/last.ckpt")  # ["bed", "cat", ...]
    """
    return _hyperparameters(source).get("class_names") if Path(source).suffix == ".ckpt" else None


def input_shape_of_weights(source: str | Path) -> tuple[int, ...] | None:
    """Returns channels, height and width that weights were trained on, as a checkpoint of microtune says; else None.

    Args:
        source: As in ``load_weights``.

    Example::

        input_shape_of_weights("runs/english/last.ckpt")  # (1, 97, 40)
    """
    shape = _hyperparameters(source).get("input_shape") if Path(source).suffix == ".ckpt" else None
    return None if shape is None else tuple(shape)


def _hyperparameters(checkpoint: str | Path) -> dict[str, Any]:
    path = _existing_file(checkpoint)
    status = path.stat()
    return _hyperparameters_of(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)  # a recipe asks ten times, and every answer is a whole file read
def _hyperparameters_of(path: Path, modified_ns: int, size_bytes: int) -> dict[str, Any]:
    return _read_torch_file(path).get("hyper_parameters", {})


def _described_network(checkpoint: str | Path) -> dict[str, Any]:
    network = _hyperparameters(checkpoint).get("network")
    if isinstance(network, dict) and "graph" in network:
        raise UserError(
            f"checkpoint {checkpoint} is of an int8 network: give the network.safetensors beside it as --network"
        )
    return network if isinstance(network, dict) else {}


def load_weights(network: MobileNetV2, source: str | Path, with_classifier: bool = False) -> None:
    """Loads weights into a network of ``mobilenet_v2``, all of them or, on an error, none.

    What a file need not have is the classifier: where it is absent or of other classes, the network keeps its fresh one
    and one line is logged. A network without the last convolution leaves the file's out.

    Args:
        network: Changed in place. To load a checkpoint of a folded network, give a folded one.
        source: ``"none"``; ``"torchvision"`` (ImageNet, width 1.0, downloaded); a ``.pth`` or ``.pt`` file with
            torchvision's state dict; a ``.ckpt`` of microtune; Keras' weights as ``.h5`` or ``.npz``.
        with_classifier: Refuse a file whose classifier is absent or of other classes.

    Raises:
        UserError: The file is missing or unreadable, was trained with another padding, or has tensors that are not the
            network's; the download fails.

    Example::

        network = mobilenet_v2(num_classes=10)
        load_weights(network, "mobilenet_v2-b0353104.pth")
    """
    if str(source) == "none":
        return
    wanted = network.state_dict()
    state = _read_state(source, wanted)
    _check_padding(network, source)
    if HEAD_CONVOLUTION not in wanted:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("features.18.")}
    _keep_fresh_classifier(state, wanted, source, with_classifier)
    _sum_input_channels(state, wanted, source)
    _check_fits(state, wanted, source)
    network.load_state_dict(state, strict=False)


def _check_padding(network: MobileNetV2, source: str | Path) -> None:
    given = "keras" if hasattr(network.features[0], "pad") else "symmetric"
    right = padding_of_weights(source)
    if given != right:
        raise UserError(
            f"weights {source} were trained with padding {right!r} and the network has {given!r}: "
            f"build it with padding={right!r}"
        )


def _read_state(source: str | Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    if str(source) == "torchvision":
        return _download(wanted)
    path = _existing_file(source)
    if path.suffix in KERAS_SUFFIXES:
        return read_keras_weights(path)
    content = _read_torch_file(path)
    if path.suffix == ".ckpt":
        content = content.get("state_dict", {})
        content = {name.removeprefix("net."): value for name, value in content.items() if name.startswith("net.")}
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if FIRST_CONVOLUTION not in tensors:
        place = f"net.{FIRST_CONVOLUTION} in its state_dict" if path.suffix == ".ckpt" else FIRST_CONVOLUTION
        raise UserError(f"weights file {path} has no tensor {place}: give torchvision's MobileNetV2")
    return tensors


def _existing_file(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.suffix not in (".pth", ".pt", ".ckpt", *KERAS_SUFFIXES):
        raise UserError(f"weights {str(source)!r} are unknown: give {SOURCES}")
    if not path.is_file():
        hint = f"; Keras' are at {KERAS_URL}" if path.suffix in KERAS_SUFFIXES else ""
        raise UserError(f"weights file {path} does not exist: give {SOURCES}{hint}")
    return path


def _read_torch_file(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling raises on bytes that are no pickle is not bounded
        raise UserError(
            f"weights file {path} cannot be read ({type(error).__name__}): it is cut short, no file of torch.save, "
            "or holds more than tensors and plain data; download or save it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"weights file {path} holds a {type(content).__name__}: save network.state_dict() instead")
    return content


def _download(wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    if wanted[FIRST_CONVOLUTION].shape[0] != 32:
        raise UserError("torchvision has weights of width 1.0 only: build the network with width=1.0, or give a file")
    from torchvision.models import MobileNet_V2_Weights  # takes longer to import than PyTorch

    weights = MobileNet_V2_Weights.IMAGENET1K_V1
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # no network, no room, or a hash that is not the file's
        raise UserError(
            f"torchvision's weights cannot be downloaded ({error}): download {weights.url} on another machine "
            "and give the file instead of torchvision"
        ) from error


def _keep_fresh_classifier(
    state: dict[str, Tensor], wanted: dict[str, Tensor], source: str | Path, is_refused: bool
) -> None:
    if all(name in state and state[name].shape == wanted[name].shape for name in CLASSIFIER):
        return
    found = tuple(state[CLASSIFIER[0]].shape) if CLASSIFIER[0] in state else "none"
    classes, features = wanted[CLASSIFIER[0]].shape
    if is_refused:
        raise UserError(
            f"the classifier of weights {source} is {found}, and {classes} classes of {features} features are wanted: "
            "give weights trained on these classes, with the same head_convolution"
        )
    state.update({name: wanted[name] for name in CLASSIFIER})
    why = "has none" if found == "none" else f"has one of {found[0]} classes and {found[1]} features"
    logger.info(f"fresh classifier of {classes} classes and {features} features: {source} {why}")


def _sum_input_channels(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str | Path) -> None:
    weight = state[FIRST_CONVOLUTION]
    if weight.shape[1] == 3 and wanted[FIRST_CONVOLUTION].shape[1] == 1:
        # a grey image is one with three equal channels, on which the convolution is linear: the outputs are equal
        state[FIRST_CONVOLUTION] = weight.sum(dim=1, keepdim=True)
        logger.info(f"one input channel: the first convolution of {source} is summed over its three")


def _check_fits(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str | Path) -> None:
    if HEAD_CONVOLUTION in wanted and HEAD_CONVOLUTION not in state:
        raise UserError(f"weights {source} have no {HEAD_CONVOLUTION}: build the network with head_convolution=False")
    folded = FIRST_CONVOLUTION.replace("weight", "bias")
    if (folded in state) != (folded in wanted):
        remedy = "fold the network first, with fold_batch_norm" if folded in state else "load them before folding"
        raise UserError(f"{folded} is in only one of weights {source} and the network (folded batch norm): {remedy}")
    for name, tensor in wanted.items():
        if name not in state and not name.endswith("num_batches_tracked"):
            raise UserError(f"weights {source} have no {name}: give those of torchvision's MobileNetV2")
        if name in state and state[name].shape != tensor.shape:
            raise UserError(
                f"{name} is {tuple(state[name].shape)} in weights {source} and {tuple(tensor.shape)} in the network: "
                "give weights of this width, and of images for images or of spectrograms for speech"
            )
    unknown = next((name for name in state if name not in wanted), None)
    if unknown is not None:
        raise UserError(
            f"weights {source} have {unknown}, which the network has not: give those of torchvision's MobileNetV2"
        )
