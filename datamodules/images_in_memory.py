"""Small images held in memory and handed out in whole batches, augmented by (seed, epoch, index)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from microtune.datamodules.reproducible_order import Key, epochs_and_indices, random_fractions
from microtune.modules.user_error import UserError

Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def check_image_arguments(resolution: int, batch_size: int, normalization: Normalization, in_channels: int) -> None:
    """Refuse arguments that no image data module can work with.

    Raises:
        UserError: if resolution or batch size is below 1, or the normalisation does not suit the channels.

    Example::

        check_image_arguments(96, batch_size=32, normalization=((0.5,), (0.5,)), in_channels=3)
    """
    for name, value in (("resolution", resolution), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} {value} is not positive: give a whole number such as 32")
    if len(normalization) != 2 or any(len(values) not in (1, in_channels) for values in normalization):
        raise UserError(
            f"normalization {normalization} does not suit {in_channels} channels: "
            "give means and standard deviations, one of each or one per channel"
        )
    if min(normalization[1]) <= 0:
        raise UserError(f"normalization has a standard deviation of {min(normalization[1])}: give positive ones")


def normalized(pixels: Tensor, white: int, normalization: Normalization) -> Tensor:
    """Return pixels as a network takes them: float32, ``(pixels / white - mean) / std``, channels last in memory.

    Args:
        pixels: images of shape (N, C, H, W), from 0 to ``white``.
        white: the value of a white pixel: 255 of a photograph.
        normalization: mean and standard deviation on images from 0 to 1, one value each or one per channel.

    Example::

        normalized(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 255, ((0.5,), (0.5,)))  # all -1
    """
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in normalization)
    copied = pixels.to(torch.float32, memory_format=torch.channels_last, copy=True)
    return copied.div_(white).sub_(mean).div_(std)


def shifted(pixels: Tensor, seed: int, epochs: np.ndarray, indices: np.ndarray, shift_px: int, flip: bool) -> Tensor:
    """Return the images, each moved by up to ``shift_px`` pixels in x and y over black, half of them mirrored.

    This is a random crop after padding, drawn by (seed, epoch, index) for the whole batch at once.

    Args:
        pixels: images of shape (N, C, H, W).
        seed: the seed of the augmentation.
        epochs: the epoch of each image (N,).
        indices: the number of each image (N,).
        shift_px: the farthest an image is moved, in pixels.
        flip: whether to mirror any.

    Example::

        shifted(torch.rand(2, 3, 32, 32), 0, np.array([1, 1]), np.array([7, 5]), shift_px=4, flip=True)
    """
    height, width = pixels.shape[-2:]
    draws = torch.from_numpy(random_fractions(seed, epochs, indices, draws=3))
    top, left = (draws[:, :2] * (2 * shift_px + 1)).long().T
    mirrored = (draws[:, 2:] < 0.5) & flip
    columns = torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width)) + left[:, None]
    rows = torch.arange(height) + top[:, None]
    images = torch.arange(len(pixels))[:, None, None]
    padded = F.pad(pixels, (shift_px,) * 4)
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class ImagesInMemory(Dataset):
    """Small images held in memory, handed out as whole batches: augmented, normalised and resized.

    A whole batch at once, because image by image the same work takes several times as long.

    Args:
        pixels: uint8 images of shape (N, C, H, W), from 0 to ``white``.
        labels: the class of each image, int64 of shape (N,).
        resolution: height and width of the images handed out, in pixels.
        white: the value of a white pixel.
        normalization: mean and standard deviation on images from 0 to 1, one value each or one per channel.
        seed: the seed of the augmentation, or None for none.
        shift_px: the farthest an image is moved, in pixels of the images as they are held.
        flip: whether half of the images are mirrored.

    Example::

        pixels, labels = torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10)
        data = ImagesInMemory(pixels, labels, 96, white=255, normalization=((0.5,), (0.5,)))
        images, labels = data.__getitems__([0, 3])  # (2, 3, 96, 96), (2,)
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        resolution: int,
        white: int,
        normalization: Normalization,
        seed: int | None = None,
        shift_px: int = 0,
        flip: bool = False,
    ) -> None:
        self.pixels = pixels.contiguous(memory_format=torch.channels_last)
        self.labels = labels
        self.resolution = resolution
        self.white = white
        self.normalization = normalization
        self.seed = seed
        self.shift_px = shift_px
        self.flip = flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        epochs, indices = epochs_and_indices(keys)
        chosen = torch.from_numpy(indices)
        images = self.pixels[chosen]
        if self.seed is not None:
            images = shifted(images, self.seed, epochs, indices, self.shift_px, self.flip)
        # Normalised before it is enlarged: the same numbers from fewer pixels, as interpolation keeps averages.
        images = normalized(images, self.white, self.normalization)
        if self.resolution != images.shape[-1]:
            size = (self.resolution, self.resolution)
            images = F.interpolate(images, size, mode="bilinear", antialias=self.resolution < images.shape[-1])
        return images.contiguous(memory_format=torch.channels_last), self.labels[chosen]
