"""Any folder of pictures, one subfolder per class."""

import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional

from microtune.datamodules.images_in_memory import Normalization, check_image_arguments, normalized
from microtune.datamodules.progress import progress_bar
from microtune.datamodules.reproducible_order import (
    Key,
    data_loader,
    epochs_and_indices,
    seeded_torch,
    stratified_split,
)
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow reads more, but for some it starts other programs (Ghostscript for EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
LAYOUT = "a folder per class with its images, or train/ and test/ (or val/) with a folder per class in each"


class ImageFolder(LightningDataModule):
    """Pictures in folders, one per class.

    Two layouts are understood. With ``train/`` and ``test/`` (or ``val/`` in its place) the latter is the test split;
    a single folder of classes is split. The validation images are always taken from the training images. Training
    sees a random part of each picture, half of them mirrored; evaluation sees the middle of it.

    Args:
        data_dir: the folder; ``setup`` finds the class names in it, sorted, and ``num_classes``.
        resolution: height and width of the images, in pixels.
        batch_size: images in a batch; the last one of an epoch may be smaller.
        seed: order and augmentation of the training images are functions of (seed, epoch, index).
        augment: whether training sees random parts, mirrored or not.
        smallest_crop: the smallest random part, as a fraction of a picture's area. 0.08 is common for large networks
            and data sets; small ones learn better from more of the picture.
        normalization: mean and standard deviation on images from 0 to 1, as the network's weights expect them.
        num_workers: processes that decode.
        skip_broken: leave out files that cannot be read, and log how many; this decodes every file once in ``setup``.
            Otherwise a file of another kind is an error in ``setup``, and a damaged one when its turn comes.
        validation_fraction: the part of the training images held out for validation.
        test_fraction: the part of a single folder of classes that becomes the test split.
        split_seed: chooses the test and the validation images.

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


class ImageFiles(Dataset):
    """Image files, decoded when asked for and transformed with random numbers that follow from (seed, epoch, index).

    Args:
        paths: the files (N,), an array of text or of bytes.
        labels: the class of each (N,).
        transform: makes an opened Pillow image into uint8 pixels of the network's size.
        seed: the seed of the transform's random numbers.
        root: the folder that the paths are relative to.

    Raises:
        UserError: when a file that cannot be read is asked for.

    Example::

        pixels, label = ImageFiles(paths, labels, transform)[3, 17]  # epoch 3, image 17
    """

    def __init__(
        self,
        paths: np.ndarray,
        labels: np.ndarray,
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
        root: Path = Path(),
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.transform = transform
        self.seed = seed
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        ((epoch,), (index,)) = epochs_and_indices([key])
        with seeded_torch(self.seed, epoch, index), opened(self.root / os.fsdecode(self.paths[index])) as image:
            pixels = self.transform(image)
        return pixels, int(self.labels[index])


def random_part(image: Image.Image, resolution: int, smallest_crop: float) -> Tensor:
    """Return a random part of a picture, scaled to uint8 pixels (3, resolution, resolution), mirrored or not.

    A JPEG is decoded at a half, a quarter or an eighth of its size where that leaves the part with as many pixels as
    are returned or more: of a photograph of 12 megapixels that takes less than half the time.

    Args:
        image: an opened image, not yet decoded.
        resolution: height and width of what is returned, in pixels.
        smallest_crop: the smallest part, as a fraction of the picture's area.

    Example::

        with opened(Path("flowers/daisy/image_0801.jpg")) as image:
            pixels = random_part(image, resolution=96, smallest_crop=0.25)
    """
    top, left, height, width = RandomResizedCrop.get_params(image, [smallest_crop, 1.0], [3 / 4, 4 / 3])
    whole_width, whole_height = image.size
    drafted = image.draft(
        None, (math.ceil(whole_width * resolution / width), math.ceil(whole_height * resolution / height))
    )
    scale = drafted[1][2] / whole_width if drafted else 1  # from the true width, which image.size has rounded up
    box = [math.floor(edge * scale + 0.5) for edge in (left, top, left + width, top + height)]
    # Scaled as a tensor, which takes a quarter of Pillow's time.
    pixels = functional.resize(_pixels(image.crop(box)), [resolution, resolution])
    return pixels.flip(-1) if torch.rand(()) < 0.5 else pixels


def middle_part(image: Image.Image, resolution: int, short_side: int) -> Tensor:
    """Return the middle of a picture as uint8 pixels (3, resolution, resolution).

    Args:
        image: an opened image.
        resolution: height and width of what is returned, in pixels.
        short_side: the size that the picture's shorter side is scaled to before, in pixels.

    Example::

        with opened(Path("flowers/daisy/image_0801.jpg")) as image:
            pixels = middle_part(image, resolution=224, short_side=256)
    """
    return functional.center_crop(functional.resize(_pixels(image), [short_side]), [resolution])


def _pixels(image: Image.Image) -> Tensor:
    return functional.pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def check_smallest_crop(smallest_crop: float) -> None:
    """Refuse a ``smallest_crop`` that is no fraction of a picture's area with a UserError.

    Example::

        check_smallest_crop(0.25)
    """
    if not 0 < smallest_crop <= 1:
        raise UserError(f"smallest_crop {smallest_crop} is no fraction of a picture: give one such as 0.25")


def image_loader(
    images: ImageFiles, batch_size: int, shuffle_seed: int | None, num_workers: int, normalization: Normalization
) -> DataLoader:
    """Return a loader of normalised batches; the other arguments are those of ``data_loader``.

    Example::

        for images, labels in image_loader(files, 32, shuffle_seed=0, num_workers=2, normalization=((0.5,), (0.5,))):
            ...
    """
    collate = functools.partial(_batch, normalization=normalization)
    return data_loader(images, batch_size, shuffle_seed, num_workers, collate)


def _batch(samples: list[tuple[Tensor, int]], normalization: Normalization) -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*samples, strict=True)
    return normalized(torch.stack(pixels), 255, normalization), torch.tensor(labels)


def decode(path: Path) -> Image.Image:
    """Read a picture in RGB, the right way up.

    Raises:
        UserError: if the file cannot be read as an image.

    Example::

        decode(Path("flowers/daisy/image_0801.jpg")).size  # (width, height)
    """
    with opened(path) as image:
        return image.convert("RGB")


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture the right way up, to be decoded by what is done to it.

    Raises:
        UserError: if the file cannot be read as an image, now or inside the block.

    Example::

        with opened(Path("flowers/daisy/image_0801.jpg")) as image:
            image.size  # (width, height)
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            yield image if is_upright else ImageOps.exif_transpose(image)
    # A damaged file makes Pillow fail with almost any exception.
    except Exception as error:
        raise UserError(f"{path} cannot be read as an image ({error}): remove it or give --skip_broken true") from error


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
        folder: the folder of class folders.
        skip_broken: leave out what cannot be read, instead of raising an error for what is no image by its name.
        at_least: the images that each class must have.

    Raises:
        UserError: if there are no class folders, a class has too few images, or a file is no image.

    Example::

        list_images(Path("flowers/train"), skip_broken=False, at_least=2)  # {"daisy": [...], "tulip": [...]}
    """
    images = {path.name: _visible(path) for path in _visible(folder) if path.is_dir()}
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


def find_readable(paths: Iterable[Path], count: int, folder: Path) -> np.ndarray:
    """Decode every image and return which ones can be read; one warning counts the others.

    Args:
        paths: the files, of one folder and in order.
        count: how many they are, for the progress bar.
        folder: the folder that the warning names.

    Returns:
        bool of shape (N,).

    Example::

        paths = sorted(Path("flowers/daisy").iterdir())
        find_readable(paths, len(paths), Path("flowers"))  # array([True, False, True])
    """
    paths, fine, first = iter(paths), [], None
    with progress_bar() as progress, ThreadPoolExecutor() as pool:
        task = progress.add_task(f"reading every image of {folder.name}", total=count)
        # In portions, because the pool would hold a task for each of a million files.
        while portion := list(itertools.islice(paths, 1000)):
            results = list(pool.map(_is_readable, portion))
            first = first or next(itertools.compress(portion, (not result for result in results)), None)
            fine += results
            progress.advance(task, len(portion))
    if first:
        rank_zero_only(log.warning)(
            "%d of %d files in %s cannot be read and are left out, %s the first",
            *(fine.count(False), len(fine), folder, first),
        )
    return np.array(fine, dtype=bool)


def _is_readable(path: Path) -> bool:
    try:
        decode(path)
    except UserError:
        return False
    return True


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
