"""The data modules by name, for the recipes that take any of them."""

import inspect
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch import LightningDataModule

from microtune.datamodules.cifar import CIFAR
from microtune.datamodules.digits import Digits
from microtune.datamodules.image_folder import ImageFolder
from microtune.datamodules.imagenet import ImageNet
from microtune.datamodules.mswc import MSWC
from microtune.datamodules.speech_commands import SpeechCommands
from microtune.modules.int8.files import is_quantized_file
from microtune.modules.user_error import UserError
from microtune.recipes.training.networks import input_shape_of, normalization_of

DataName = Literal["digits", "cifar10", "cifar100", "image_folder", "imagenet", "speech_commands", "mswc"]
CLASSES: dict[str, type[LightningDataModule]] = {
    "digits": Digits,
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "image_folder": ImageFolder,
    "imagenet": ImageNet,
    "speech_commands": SpeechCommands,
    "mswc": MSWC,
}
WITHOUT_FILES = ("digits",)
SPEECH = ("speech_commands", "mswc")
# what the recipe itself decides
OWN = {"self", "data_dir", "batch_size", "seed", "normalization", "resolution"}


def data_module(
    name: str,
    data_dir: Path | str | None,
    weights: str,
    resolution: int,
    batch_size: int,
    seed: int,
    options: dict[str, Any] | None = None,
) -> LightningDataModule:
    """A data module with its samples normalised as the weights expect them, ready and set up.

    Args:
        name: One of ``DataName``.
        data_dir: Folder of the data.
        weights: From ``source_of_weights``; photographs are normalised as theirs were.
        resolution: Height and width of images, in pixels; speech has the shape of its spectrograms.
        batch_size: Samples per step.
        seed: Of the augmentation.
        options: Further arguments of the data module, such as ``{"task": "words10"}``.

    Raises:
        UserError: An option is unknown, or the data module refuses its arguments.

    Example::

        data_module("cifar10", "data", "none", resolution=96, batch_size=32, seed=0)
    """
    if name not in get_args(DataName):
        raise UserError(f"data is {name!r}: give one of {', '.join(get_args(DataName))}")
    make = CLASSES[name]
    arguments = _known_options(make, name, options or {}) | {"batch_size": batch_size, "seed": seed}
    if name == "digits":
        arguments = {"augment": True} | arguments
    if name not in SPEECH:
        arguments["resolution"] = resolution
    # the digits are grey, and as any network in floating point takes them
    of_digits = name == "digits" and is_quantized_file(weights) and input_shape_of(weights)[0] == 1
    if name not in (*SPEECH, *WITHOUT_FILES) or of_digits:
        arguments["normalization"] = normalization_of(weights)
    if name in ("cifar10", "cifar100"):
        arguments["classes"] = int(name.removeprefix("cifar"))
    if name not in WITHOUT_FILES:
        if data_dir is None:
            raise UserError(f"{name} lies in a folder: give it with --data_dir")
        arguments["data_dir"] = data_dir
    data = make(**arguments)
    data.prepare_data()
    data.setup()
    return data


def _known_options(make: type[LightningDataModule], name: str, options: dict[str, Any]) -> dict[str, Any]:
    known = [parameter for parameter in inspect.signature(make.__init__).parameters if parameter not in OWN]
    if name.startswith("cifar"):
        known.remove("classes")
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}: give one of {', '.join(known)}")
    return {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
