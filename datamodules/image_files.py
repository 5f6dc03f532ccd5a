"""Image files: opened, cut and scaled to a network's size as fast as they can be, and handed out in batches."""

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
from lightning.pytorch.utilities import rank_zero_only
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional

from microtune.datamodules.contract import Normalization
from microtune.datamodules.images_in_memory import normalized
from microtune.datamodules.progress import progress_bar
from microtune.datamodules.reproducible_order import (
    Key,
    data_loader,
    epochs_and_indices,
    seeded_torch,
)
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow reads more, but for some it starts other programs (Ghostscript for EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class ImageFiles(Dataset):
    """Image files, decoded when asked for and transformed with random numbers that follow from (seed, epoch, index).

    Args:
        paths: Files (N,), an array of text or of bytes.
        labels: Class of each file (N,).
        transform: Function that makes an opened Pillow image into uint8 pixels of the network's size.
        seed: Seed of the transform's random numbers.
        root: Folder that the paths are relative to.

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
        image: Opened image, not yet decoded.
        resolution: Height and width of what is returned, in pixels.
        smallest_crop: Smallest part, as a fraction of the picture's area.

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
        image: Opened image.
        resolution: Height and width of what is returned, in pixels.
        short_side: Size that the picture's shorter side is scaled to before, in pixels.

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


def leave_out_empty(files: dict[str, list], folder: Path) -> dict[str, list]:
    """The class folders that hold files; one warning counts the others.

    Example::

        leave_out_empty({"daisy": ["a.jpg"], "tulip": []}, Path("flowers"))  # {"daisy": ["a.jpg"]}
    """
    empty = [name for name, names in files.items() if not names]
    if empty:
        rank_zero_only(log.warning)(
            "%d class folders of %d are empty and are left out, %s the first", len(empty), len(files), folder / empty[0]
        )
    return {name: names for name, names in files.items() if names}


def find_readable(paths: Iterable[Path], count: int, folder: Path) -> np.ndarray:
    """Decode every image and return which ones can be read; one warning counts the others.

    Args:
        paths: Files of one folder, in order.
        count: Number of files, for the progress bar.
        folder: Folder that the warning names.

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
