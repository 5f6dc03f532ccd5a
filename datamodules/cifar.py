"""CIFAR-10 and CIFAR-100, read without running what their pickles say."""

import functools
import logging
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from microtune.datamodules.contract import Normalization
from microtune.datamodules.images_in_memory import ImagesInMemory, check_image_arguments, middle_views, random_views
from microtune.datamodules.option_names import AugmentationName
from microtune.datamodules.reproducible_order import data_loader, stratified_split
from microtune.modules.restricted_pickle import read_plain_pickle
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

WHITE = 255


class CIFAR(LightningDataModule):
    """CIFAR-10 or CIFAR-100: 32x32 colour photographs, held in memory and enlarged batch by batch.

    The validation images are taken from the training images.

    Args:
        data_dir: Folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        classes: Number of classes, 10 or 100.
        resolution: Height and width of the images, in pixels.
        batch_size: Number of images in a batch; the last one of an epoch may be smaller.
        seed: Seed of order and augmentation of the training images, which are functions of (seed, epoch, index).
        augmentation: Augmentation of the training images. "shift": moved by up to 4 pixels at 32x32 and half of them
            mirrored, before they are enlarged. "crop", as Lin et al. train: a random part of at least 8 % of the area,
            in other colours (``random_views``); evaluation then sees the middle 87.5 % of height and width. "none": as
            they are.
        normalization: Mean and standard deviation on images from 0 to 1, as the network's weights expect them.
        download: Whether to fetch the data (170 MB) where it is missing.
        num_workers: Number of processes that load; none is enough, unless a GPU trains faster than one core resizes.
        validation_fraction: Fraction of the training images held out for validation; 0 trains on all of them, and
            Lightning then skips validation.
        split_seed: Seed that chooses the validation images.

    Raises:
        UserError: if the data is missing or is not CIFAR, or an argument is out of its range.

    Example::

        data = CIFAR("data", classes=10, resolution=96, download=True)
        data.prepare_data()
        data.setup()
        images, labels = next(iter(data.train_dataloader()))  # (128, 3, 96, 96), (128,)
    """

    def __init__(
        self,
        data_dir: str | Path,
        classes: Literal[10, 100] = 10,
        resolution: int = 96,
        batch_size: int = 128,
        seed: int = 0,
        augmentation: AugmentationName = "shift",
        normalization: Normalization = ((0.5,), (0.5,)),
        download: bool = False,
        num_workers: int = 0,
        validation_fraction: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        check_image_arguments(resolution, batch_size, normalization, in_channels=3)
        if classes not in (10, 100):
            raise UserError(f"there is no CIFAR-{classes}: give 10 or 100 classes")
        if augmentation not in get_args(AugmentationName):
            raise UserError(f"augmentation is {augmentation!r}: give one of {', '.join(get_args(AugmentationName))}")
        self.source = CIFAR10 if classes == 10 else CIFAR100
        self.folder = Path(data_dir).expanduser() / self.source.base_folder
        self.num_classes = classes
        self.resolution = resolution
        self.input_shape = (3, resolution, resolution)
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation
        self.normalization = normalization
        self.download = download
        self.num_workers = num_workers
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self._train: ImagesInMemory | None = None

    def prepare_data(self) -> None:
        """Download the data if that was asked for and it is not there yet."""
        if self.download and not self.folder.exists():
            download_whole(self.source, self.folder)

    def setup(self, stage: str | None = None) -> None:
        """Read and split the images, whatever the stage; a second call does nothing."""
        if self._train is not None:
            return
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder} does not exist: "
                "give --download true (or --data_options.download true), or "
                f"unpack {self.source.url} in {self.folder.parent}"
            )
        self.class_names = read_class_names(self.folder / self.source.meta["filename"], self.num_classes)
        pixels, labels = self._read(self.source.train_list)
        kept, held_out = np.arange(len(labels)), np.arange(0)
        if self.validation_fraction != 0:
            kept, held_out = stratified_split(labels.numpy(), self.validation_fraction, self.split_seed)
        train, evaluation = self._views()
        self._test = self._images(*self._read(self.source.test_list), evaluation)
        self._val = self._images(pixels[held_out], labels[held_out], evaluation)
        self._train = self._images(pixels[kept], labels[kept], train)
        self.train_samples, self.val_samples, self.test_samples = map(len, (self._train, self._val, self._test))
        warn_of_other_contents(self.source, self.folder)

    def _views(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What training and evaluation see of an image, as arguments of ``ImagesInMemory``."""
        if self.augmentation == "crop":
            part = functools.partial(random_views, seed=self.seed, resolution=self.resolution, white=WHITE)
            return {"view": part}, {"view": functools.partial(middle_views, resolution=self.resolution)}
        if self.augmentation == "shift":
            return {"seed": self.seed, "shift_px": 4, "flip": True}, {}
        return {}, {}

    def _images(self, pixels: torch.Tensor, labels: torch.Tensor, view: dict[str, Any]) -> ImagesInMemory:
        return ImagesInMemory(pixels, labels, self.resolution, WHITE, self.normalization, **view)

    def _read(self, files: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        batches = [read_batch(self.folder / name, self.num_classes) for name, _ in files]
        pixels, labels = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*batches, strict=True))
        return pixels, labels

    def train_dataloader(self) -> DataLoader:
        return data_loader(self._train, self.batch_size, shuffle_seed=self.seed, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader | list:
        if not self.val_samples:
            return []
        return data_loader(self._val, self.batch_size, shuffle_seed=None, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return data_loader(self._test, self.batch_size, shuffle_seed=None, num_workers=self.num_workers)


def download_whole(source: type[CIFAR10], folder: Path) -> None:
    """Download and unpack CIFAR beside ``folder`` and rename it last: what is there under that name is whole.

    Args:
        source: Class of torchvision, which knows address, checksum and layout.
        folder: Folder where the unpacked files shall be.

    Raises:
        UserError: if the download fails.

    Example::

        download_whole(CIFAR10, Path("data/cifar-10-batches-py"))
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".cifar-") as unfinished:
        try:
            download_and_extract_archive(source.url, unfinished, filename=source.filename, md5=source.tgz_md5)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{source.url} could not be downloaded ({error}): fetch it yourself and unpack it in {folder.parent}"
            ) from error
        (Path(unfinished) / source.base_folder).rename(folder)


@functools.cache
def warn_of_other_contents(source: type[CIFAR10], folder: Path) -> None:
    """Log a warning, once per folder, if the files are not the official ones: a subset, say, is none."""
    other = [name for name, md5 in source.train_list + source.test_list if not check_integrity(folder / name, md5)]
    if other:
        rank_zero_only(log.warning)(
            "%s is not the official CIFAR (the checksums of %d files differ): accuracies will not compare",
            folder,
            len(other),
        )


def read_batch(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of images.

    Args:
        path: File ``data_batch_*``, ``train`` or ``test``.
        num_classes: Number of classes, 10 or 100.

    Returns:
        uint8 pixels of shape (N, 3, 32, 32) and int64 labels of shape (N,).

    Raises:
        UserError: if the file is missing or holds anything else.

    Example::

        pixels, labels = read_batch(Path("data/cifar-10-batches-py/test_batch"), num_classes=10)
    """
    entries = _entries(path)
    pixels = entries.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (3072,) or not len(pixels):
        found = pixels.shape if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise _not_cifar(path, f"'data' is {found}, not an array of shape (images, 3072)")
    key = "labels" if num_classes == 10 else "fine_labels"
    labels = entries.get(key)
    if not isinstance(labels, list) or len(labels) != len(pixels):
        found = f"{len(labels)} long" if isinstance(labels, list) else type(labels).__name__
        raise _not_cifar(path, f"'{key}' is {found}, not a list of {len(pixels)}")
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < num_classes]
    if wrong:
        raise _not_cifar(path, f"label {wrong[0]!r} is not a number from 0 to {num_classes - 1}")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def read_class_names(path: Path, num_classes: int) -> list[str]:
    """Read the names of the classes, in the order of the labels.

    Raises:
        UserError: if the file is missing or does not hold as many names.

    Example::

        read_class_names(Path("data/cifar-10-batches-py/batches.meta"), num_classes=10)  # ["airplane", ...]
    """
    key = "label_names" if num_classes == 10 else "fine_label_names"
    names = _entries(path).get(key)
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise _not_cifar(path, f"'{key}' is not a list of {num_classes} names")
    return names


def _entries(path: Path) -> dict[str, Any]:
    entries = read_plain_pickle(path, "a CIFAR file", _remedy(path), dtypes=("u1",))
    if not isinstance(entries, dict):
        raise _not_cifar(path, f"it holds a {type(entries).__name__}, not a dict")
    return entries


def _not_cifar(path: Path, what: str) -> UserError:
    return UserError(f"{path} is not a CIFAR file ({what}): {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"delete {path.parent} and give --download true"
