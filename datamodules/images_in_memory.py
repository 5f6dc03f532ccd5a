"""Small images held in memory and handed out in whole batches, augmented by (seed, epoch, index)."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import center_crop

from microtune.datamodules.contract import Normalization
from microtune.datamodules.reproducible_order import Key, epochs_and_indices, random_fractions
from microtune.modules.user_error import UserError

View = Callable[[Tensor, np.ndarray, np.ndarray], Tensor]

# timm's create_transform, which torchvision's RandomResizedCrop has as well
SMALLEST_AREA, SLIMMEST_ASPECT, TRIES = 0.08, 3 / 4, 10
COLOR_JITTER = 0.4
BRIGHTNESS, CONTRAST, SATURATION = range(3)
ORDERS = np.array(list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION))))
MIDDLE_PART = 0.875


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
        pixels: Images of shape (N, C, H, W), from 0 to ``white``.
        white: Value of a white pixel: 255 of a photograph.
        normalization: Mean and standard deviation on images from 0 to 1, one value each or one per channel.

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
        pixels: Images of shape (N, C, H, W).
        seed: Seed of the augmentation.
        epochs: Epoch of each image (N,).
        indices: Index of each image (N,).
        shift_px: Farthest that an image is moved, in pixels.
        flip: Whether half of the images are mirrored.

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


def random_views(
    pixels: Tensor, epochs: np.ndarray, indices: np.ndarray, seed: int, resolution: int, white: int
) -> Tensor:
    """Return random parts of colour images in other colours, enlarged, half of them mirrored.

    What timm's ``create_transform(color_jitter=0.4)`` does, with which Lin et al. train: brightness, contrast and
    saturation change by a factor from 0.6 to 1.4 each, in random order. timm changes the colours of the enlarged part;
    here the images change as they are held, many times faster, and contrast turns about the mean of the whole image.

    Args:
        pixels: Images of shape (N, 3, S, S), from 0 to ``white``.
        epochs: Epoch of each image (N,).
        indices: Index of each image (N,).
        seed: Seed of the augmentation.
        resolution: Height and width of what is returned, in pixels.
        white: Value of a white pixel.

    Returns:
        float32 pixels of shape (N, 3, resolution, resolution), from 0 to ``white``.

    Example::

        random_views(torch.rand(2, 3, 32, 32), np.array([1, 1]), np.array([7, 5]), seed=0, resolution=128, white=1)
    """
    boxes, mirror, colors, orders = np.split(
        random_fractions(seed, epochs, indices, draws=2 * TRIES + 7), np.cumsum([2 * TRIES + 2, 1, 3]), axis=1
    )
    factors = torch.from_numpy(1 + COLOR_JITTER * (2 * colors - 1)).float()
    order = torch.from_numpy(ORDERS[(orders[:, 0] * len(ORDERS)).astype(np.int64)])
    return resized_boxes(
        jittered(pixels.float(), factors, order, white),
        torch.from_numpy(random_boxes(boxes, pixels.shape[-1])),
        torch.from_numpy(mirror[:, 0] < 0.5),
        resolution,
    )


def random_boxes(draws: np.ndarray, side_px: int) -> np.ndarray:
    """Return boxes of 8 % to 100 % of a square image's area, with an aspect ratio from 3/4 to 4/3.

    As torchvision's ``RandomResizedCrop`` draws them: uniform in the area and in the logarithm of the aspect ratio, in
    whole pixels. Where a box does not fit, the next of ten is tried; where none does, the box is the whole image.

    Args:
        draws: Random numbers, uniform in [0, 1), of shape (N, 22): ten areas, ten aspect ratios, and the place from top
            and left.
        side_px: Height and width of the image.

    Returns:
        int64 of shape (N, 4): top, left, height and width in pixels.

    Example::

        random_boxes(random_fractions(0, 3, np.arange(128), draws=22), side_px=32)
    """
    areas = (SMALLEST_AREA + (1 - SMALLEST_AREA) * draws[:, :TRIES]) * side_px**2
    aspects = SLIMMEST_ASPECT ** (1 - 2 * draws[:, TRIES : 2 * TRIES])
    tries = np.stack([np.sqrt(areas / aspects), np.sqrt(areas * aspects)], axis=-1).round()
    fits = ((tries > 0) & (tries <= side_px)).all(axis=-1)
    chosen = tries[np.arange(len(tries)), fits.argmax(axis=1)]
    sizes = np.where(fits.any(axis=1, keepdims=True), chosen, side_px)
    corners = np.floor(draws[:, 2 * TRIES :] * (side_px - sizes + 1))
    return np.concatenate([corners, sizes], axis=1).astype(np.int64)


def jittered(pixels: Tensor, factors: Tensor, order: Tensor, white: float) -> Tensor:
    """Return the images in other colours, by torchvision's definitions of brightness, contrast and saturation.

    Each is a blend ``factor * image + (1 - factor) * other``, clamped to [0, ``white``]; the other image is black, the
    mean of the grey image, or the grey image.

    Args:
        pixels: Colour images of shape (N, 3, H, W), floats from 0 to ``white``.
        factors: Factors of brightness, contrast and saturation, float32 of shape (N, 3).
        order: Which of the three comes first, second and third, int64 of shape (N, 3).
        white: Value of a white pixel.

    Example::

        jittered(torch.rand(1, 3, 32, 32), torch.tensor([[1.2, 0.8, 1.4]]), torch.tensor([[0, 2, 1]]), white=1)
    """
    for step in order.T:
        kind = step[:, None, None, None]
        factor = factors.gather(1, step[:, None])[:, :, None, None]
        red, green, blue = pixels.split(1, dim=1)
        gray = 0.2989 * red + 0.587 * green + 0.114 * blue
        other = torch.where(kind == CONTRAST, gray.mean((1, 2, 3), keepdim=True), gray)
        other = torch.where(kind == BRIGHTNESS, 0, other)
        pixels = (pixels * factor + other * (1 - factor)).clamp_(0, white)
    return pixels


def resized_boxes(pixels: Tensor, boxes: Tensor, mirrored: Tensor, resolution: int) -> Tensor:
    """Return one part of each image, scaled to a size and mirrored or not.

    Bilinear, and with antialiasing where the part is larger than the result, as torchvision's ``resized_crop``: a
    weighted sum over rows and one over columns, which as matrix products of the whole batch take few milliseconds.

    Args:
        pixels: Images, float32 of shape (N, C, H, W).
        boxes: Top, left, height and width of each part in pixels, int64 of shape (N, 4).
        mirrored: Whether each part is mirrored, bool of shape (N,).
        resolution: Height and width of what is returned, in pixels.

    Example::

        boxes, mirrored = torch.tensor([[0, 8, 16, 24]]), torch.tensor([True])
        resized_boxes(torch.rand(1, 3, 32, 32), boxes, mirrored, resolution=128)  # (1, 3, 128, 128)
    """
    top, left, height, width = boxes.T
    rows = _resizing_weights(top, height, pixels.shape[-2], resolution)
    columns = _resizing_weights(left, width, pixels.shape[-1], resolution)
    columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ pixels.contiguous() @ columns[:, None].mT


def _resizing_weights(first: Tensor, length: Tensor, pixels: int, resolution: int) -> Tensor:
    """The part of each of ``pixels`` pixels (last axis) in each resized pixel, of images (N,) with a box each."""
    first, length = first[:, None, None], length[:, None, None]
    scale = length / resolution
    middles = first + (torch.arange(resolution)[:, None] + 0.5) * scale
    places = torch.arange(pixels)
    weights = (1 - (places + 0.5 - middles).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights *= (places >= first) & (places < first + length)
    return weights / weights.sum(-1, keepdim=True)


def middle_views(pixels: Tensor, epochs: np.ndarray, indices: np.ndarray, resolution: int) -> Tensor:
    """Return the middle 87.5 % of the images' height and width, as Lin et al. evaluate, in float32.

    Args:
        pixels: Images of shape (N, C, S, S).
        epochs: Epoch of each image (N,), without influence.
        indices: Index of each image (N,), without influence.
        resolution: Height and width of what is returned, in pixels.

    Example::

        middle_views(torch.rand(2, 3, 32, 32), np.zeros(2), np.arange(2), resolution=128)  # the middle of 147x147
    """
    return center_crop(resized(pixels.float(), math.ceil(resolution / MIDDLE_PART)), [resolution, resolution])


def resized(pixels: Tensor, resolution: int) -> Tensor:
    """Return float images of shape (N, C, resolution, resolution), bilinear, antialiased where they become smaller.

    Example::

        resized(torch.rand(2, 3, 32, 32), 96)
    """
    if resolution == pixels.shape[-1]:
        return pixels
    return F.interpolate(pixels, (resolution, resolution), mode="bilinear", antialias=resolution < pixels.shape[-1])


class ImagesInMemory(Dataset):
    """Small images held in memory, handed out as whole batches: augmented, normalised and resized.

    A whole batch at once, because image by image the same work takes several times as long.

    Args:
        pixels: Images, uint8 of shape (N, C, H, W), from 0 to ``white``.
        labels: Class of each image, int64 of shape (N,).
        resolution: Height and width of the images handed out, in pixels.
        white: Value of a white pixel.
        normalization: Mean and standard deviation on images from 0 to 1, one value each or one per channel.
        seed: Seed of the augmentation, or None for none.
        shift_px: Farthest that an image is moved, in pixels of the images as they are held.
        flip: Whether half of the images are mirrored.
        view: Function of pixels, epochs (N,) and indices (N,) to the pixels that are seen, still from 0 to ``white``
            but of any size, in place of moving and mirroring: ``random_views`` or ``middle_views`` with their last
            arguments.

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
        view: View | None = None,
    ) -> None:
        self.pixels = pixels.contiguous(memory_format=torch.channels_last)
        self.labels = labels
        self.resolution = resolution
        self.white = white
        self.normalization = normalization
        self.seed = seed
        self.shift_px = shift_px
        self.flip = flip
        self.view = view

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        epochs, indices = epochs_and_indices(keys)
        chosen = torch.from_numpy(indices)
        images = self.pixels[chosen]
        if self.view is not None:
            images = self.view(images, epochs, indices)
        elif self.seed is not None:
            images = shifted(images, self.seed, epochs, indices, self.shift_px, self.flip)
        # Normalised before it is enlarged: the same numbers from fewer pixels, as interpolation keeps averages.
        images = resized(normalized(images, self.white, self.normalization), self.resolution)
        return images.contiguous(memory_format=torch.channels_last), self.labels[chosen]
