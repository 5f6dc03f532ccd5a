"""Any folder of pictures, one subfolder per class."""

import functools
import itertools
import logging
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from microtune.datamodules.contract import Normalization
from microtune.datamodules.image_files import (
    SUFFIXES,
    ImageFiles,
    check_smallest_crop,
    find_readable,
    image_loader,
    leave_out_empty,
    middle_part,
    random_part,
)
from microtune.datamodules.images_in_memory import check_image_arguments
from microtune.datamodules.reproducible_order import stratified_split
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

LAYOUT = "a folder per class with its images, or train/ and test/ (or val/) with a folder per class in each"


class ImageFolder(LightningDataModule):
    """Pictures in folders, one per class.

    Two layouts are understood. With ``train/`` and ``test/`` (or ``val/`` in its place) the latter is the test split;
    a single folder of classes is split. The validation images are always taken from the training images. Training
    sees a random part of each picture, half of them mirrored; evaluation sees the middle of it.

    Args:
        data_dir: Folder of the images; ``setup`` finds the class names in it, sorted, and ``num_classes``.
        resolution: Height and width of the images, in pixels.
        batch_size: Number of images in a batch; the last one of an epoch may be smaller.
        seed: Seed of order and augmentation of the training images, which are functions of (seed, epoch, index).
        augment: Whether training sees random parts, mirrored or not.
        smallest_crop: Smallest random part, as a fraction of a picture's area. 0.08 is common for large networks
            and data sets; small ones learn better from more of the picture.
        normalization: Mean and standard deviation on images from 0 to 1, as the network's weights expect them.
        num_workers: Number of processes that decode; 0 decodes in this one.
        skip_broken: Whether to leave out files that cannot be read, and log how many; this decodes every file in
            ``setup``. Otherwise a file of another kind is an error in ``setup``, and a damaged one when its turn comes.
        validation_fraction: Fraction of the training images held out for validation.
        test_fraction: Fraction of a single folder of classes that becomes the test split.
        split_seed: Seed that chooses the test and the validation images.

    Raises:
        UserError: if the folder does not have one of the layouts, a class is empty or differs between training and
            test, a file is no image, or an argument is out of its range.

    Example::

        data = ImageFolder("flowers", resolution=128, num_workers=2)
        data.setup()
        images, labels = next(iter(data.train_dataloader()))  # (32, 3, 128, 128), (32,)
    """

    def __init__(
        self,
        data_dir: str | Path,
        resolution: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        augment: bool = True,
        smallest_crop: float = 0.25,
        normalization: Normalization = ((0.5,), (0.5,)),
        num_workers: int = 2,
        skip_broken: bool = False,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        check_image_arguments(resolution, batch_size, normalization, in_channels=3)
        check_smallest_crop(smallest_crop)
        self.data_dir = Path(data_dir).expanduser()
        self.resolution = resolution
        self.input_shape = (3, resolution, resolution)
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.smallest_crop = smallest_crop
        self.normalization = normalization
        self.num_workers = num_workers
        self.skip_broken = skip_broken
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self._train: ImageFiles | None = None

    def setup(self, stage: str | None = None) -> None:
        """List and split the files, whatever the stage; a second call does nothing."""
        if self._train is not None:
            return
        train_dir, test_dir = find_layout(self.data_dir)
        # One image per split and class at the least.
        images = list_images(train_dir, self.skip_broken, at_least=2 if test_dir else 3)
        self.class_names = sorted(images)
        self.num_classes = len(self.class_names)
        paths, labels = _labelled(images)
        if test_dir:
            test_images = list_images(test_dir, self.skip_broken, at_least=1)
            _check_same_classes(train_dir, images, test_dir, test_images)
            test = _labelled(test_images)
        else:
            kept, held_out = stratified_split(labels, self.test_fraction, self.split_seed)
            test = paths[held_out], labels[held_out]
            paths, labels = paths[kept], labels[kept]
        kept, held_out = stratified_split(labels, self.validation_fraction, self.split_seed)
        middle = functools.partial(middle_part, resolution=self.resolution, short_side=round(self.resolution * 1.15))
        part = functools.partial(random_part, resolution=self.resolution, smallest_crop=self.smallest_crop)
        self._test = ImageFiles(*test, middle)
        self._val = ImageFiles(paths[held_out], labels[held_out], middle)
        self._train = ImageFiles(paths[kept], labels[kept], part if self.augment else middle, self.seed)
        self.train_samples, self.val_samples, self.test_samples = map(len, (self._train, self._val, self._test))

    def train_dataloader(self) -> DataLoader:
        return image_loader(self._train, self.batch_size, self.seed, self.num_workers, self.normalization)

    def val_dataloader(self) -> DataLoader:
        return image_loader(self._val, self.batch_size, None, self.num_workers, self.normalization)

    def test_dataloader(self) -> DataLoader:
        return image_loader(self._test, self.batch_size, None, self.num_workers, self.normalization)


def find_layout(data_dir: Path) -> tuple[Path, Path | None]:
    """Return the folder of the training classes and that of the test classes, which is None where all are in one.

    Raises:
        UserError: if the folder does not exist, or has ``train/`` with neither ``test/`` nor ``val/`` beside it.

    Example::

        find_layout(Path("flowers"))  # flowers/train, flowers/test
    """
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} is not a folder: give one with {LAYOUT}")
    train_dir = data_dir / "train"
    # A class may be called "train": then it holds images.
    if not train_dir.is_dir() or any(_is_image_name(path) for path in train_dir.iterdir()):
        return data_dir, None
    held_out = [data_dir / name for name in ("test", "val") if (data_dir / name).is_dir()]
    if not held_out:
        raise UserError(f"{data_dir} has train/, but neither test/ nor val/: add one, or give {train_dir} to split it")
    if len(held_out) == 2:
        rank_zero_only(log.warning)(
            "%s is not read: test/ is the test split, validation is split off train/", held_out[1]
        )
    return train_dir, held_out[0]


def list_images(folder: Path, skip_broken: bool, at_least: int) -> dict[str, list[Path]]:
    """Return the sorted image files of each class folder; hidden files and folders are passed over.

    Args:
        folder: Folder of class folders.
        skip_broken: Whether to leave out what cannot be read, and empty folders, instead of raising an error for them.
        at_least: Number of images that each class must have.

    Raises:
        UserError: if there are no class folders, a class has too few images, or a file is no image.

    Example::

        list_images(Path("flowers/train"), skip_broken=False, at_least=2)  # {"daisy": [...], "tulip": [...]}
    """
    images = {path.name: _visible(path) for path in _visible(folder) if path.is_dir()}
    if skip_broken:
        images = leave_out_empty(images, folder)
    if len(images) < 2:
        raise UserError(f"{folder} has {len(images)} class folders: give a folder with {LAYOUT}")
    entries = [path for paths in images.values() for path in paths]
    if skip_broken:
        fine = find_readable(entries, len(entries), folder)
        broken = set(itertools.compress(entries, ~fine))
        images = {name: [path for path in paths if path not in broken] for name, paths in images.items()}
    else:
        for path in entries:
            if not _is_image_name(path):
                raise UserError(f"{path} is not an image file: remove it or give --skip_broken true")
    for name, paths in images.items():
        if len(paths) < at_least:
            raise UserError(f"class folder {folder / name} has {len(paths)} images: add images or remove it")
    return images


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_image_name(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _labelled(images: dict[str, list[Path]]) -> tuple[np.ndarray, np.ndarray]:
    # Arrays of text, not lists of paths: workers would copy a list's objects page by page as they count references.
    paths = np.array([str(path) for name in sorted(images) for path in images[name]])
    labels = np.repeat(np.arange(len(images)), [len(images[name]) for name in sorted(images)])
    return paths, labels


def _check_same_classes(train_dir: Path, train: dict, test_dir: Path, test: dict) -> None:
    for folder, missing in ((test_dir, train.keys() - test.keys()), (train_dir, test.keys() - train.keys())):
        if missing:
            raise UserError(
                f"{folder} lacks the class folders {', '.join(sorted(missing))}: "
                f"{train_dir.name}/ and {test_dir.name}/ must have the same classes"
            )
