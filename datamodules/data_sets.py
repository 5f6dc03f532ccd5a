"""The data sets by name: the one list that all recipes read. It imports no PyTorch, as a command line needs none."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from microtune.modules.user_error import UserError

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule


@dataclass(frozen=True)
class DataSet:
    """What recipes know of a data set before its data module is imported.

    Args:
        title: Name in tables.
        module: Data module, a ``ClassificationData``, as ``"package.module:Class"``. Its constructor takes
            ``batch_size`` and ``seed``.
        recipe: Recipe that trains on it, as it is typed below ``recipes/``; None if there is none.
        image_channels: Number of channels of its images, which are resized to the recipe's resolution, and normalised
            as the network's weights expect where these are for as many channels (``resolution`` and ``normalization``
            of the constructor); None where samples are no images.
        is_in_folder: Whether the user says which folder it lies in (``data_dir`` of the constructor).
        arguments: Arguments of the constructor that follow from the name, and so are no options.
        options: Options that recipes set otherwise than the constructor, where the user does not.
        without_augmentation: Options with which training samples are shown as they are.

    Example::

        DataSet("CIFAR-10", "microtune.datamodules.cifar:CIFAR", "train_cifar.py", image_channels=3)
    """

    title: str
    module: str
    recipe: str | None = None
    image_channels: int | None = None
    is_in_folder: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    without_augmentation: Mapping[str, Any] = field(default_factory=lambda: {"augment": False})

    def module_class(self) -> "type[LightningDataModule]":
        """The class of the data module, imported now."""
        return pkgutil.resolve_name(self.module)


_CIFAR = "microtune.datamodules.cifar:CIFAR"
_AS_IT_IS = {"augmentation": "none"}  # CIFAR has more than one way to augment
DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet(
        "Digits", "microtune.datamodules.digits:Digits", image_channels=1, is_in_folder=False, options={"augment": True}
    ),
    "cifar10": DataSet(
        "CIFAR-10", _CIFAR, "train_cifar.py", image_channels=3, arguments={"classes": 10},
        without_augmentation=_AS_IT_IS,
    ),
    "cifar100": DataSet(
        "CIFAR-100", _CIFAR, "train_cifar.py --classes 100", image_channels=3, arguments={"classes": 100},
        without_augmentation=_AS_IT_IS,
    ),
    "image_folder": DataSet(
        "Folder of images", "microtune.datamodules.image_folder:ImageFolder", "train_image_folder.py", image_channels=3
    ),
    "imagenet": DataSet("ImageNet", "microtune.datamodules.imagenet:ImageNet", "train_imagenet.py", image_channels=3),
    "speech_commands": DataSet(
        "Speech Commands", "microtune.datamodules.speech_commands:SpeechCommands", "train_speech_commands.py"
    ),
    "mswc": DataSet("MSWC", "microtune.datamodules.mswc:MSWC", "train_mswc.py"),
}  # fmt: skip
DataName = Literal[*DATA_SETS]  # what a command line offers as --data


def find_data_set(name: str) -> DataSet:
    """A data set of the list.

    Raises:
        UserError: There is none of that name.

    Example::

        find_data_set("cifar10").title  # "CIFAR-10"
    """
    if name not in DATA_SETS:
        raise UserError(f"data is {name!r}: give one of {', '.join(DATA_SETS)}")
    return DATA_SETS[name]
