"""Handwritten digits that need no download."""

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from microtune.datamodules.contract import Normalization
from microtune.datamodules.images_in_memory import ImagesInMemory, check_image_arguments
from microtune.datamodules.reproducible_order import data_loader, stratified_split
from microtune.modules.user_error import UserError


class Digits(LightningDataModule):
    """The 1,797 handwritten digits of scikit-learn: one channel, 8x8 pixels, enlarged.

    The digits can be shared out, so that a network learns some of them first and is adapted to others later. An image
    is in the same split whatever the choice: what one run tests on, no other run trained on.

    Args:
        classes: Digits to use; the first is label 0, the second label 1, and so on.
        resolution: Height and width of the images, in pixels.
        batch_size: Number of images in a batch; the last one of an epoch may be smaller.
        seed: Seed of order and augmentation of the training images, which are functions of (seed, epoch, index).
        augment: Whether to move each training image by up to one of its 8x8 pixels.
        normalization: Mean and standard deviation on images from 0 to 1, as the network's weights expect them.
        validation_fraction: Fraction of the training images held out for validation.
        split_seed: Seed that chooses the test and the validation images.

    Raises:
        UserError: if a class is no digit or is named twice, or an argument is out of its range.

    Example::

        data = Digits(classes=(0, 1, 2, 3, 4), resolution=32)
        data.setup()
        images, labels = next(iter(data.train_dataloader()))  # (64, 1, 32, 32), (64,)
    """

    def __init__(
        self,
        classes: tuple[int, ...] = tuple(range(10)),
        resolution: int = 32,
        batch_size: int = 64,
        seed: int = 0,
        augment: bool = False,
        normalization: Normalization = ((0.5,), (0.5,)),
        validation_fraction: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        check_image_arguments(resolution, batch_size, normalization, in_channels=1)
        if not set(classes) <= set(range(10)) or len(set(classes)) != len(classes) or len(classes) < 2:
            raise UserError(f"classes {tuple(classes)} are not two or more different digits: choose among 0 to 9")
        self.classes = tuple(classes)
        self.class_names = [str(digit) for digit in classes]
        self.num_classes = len(classes)
        self.resolution = resolution
        self.input_shape = (1, resolution, resolution)
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.normalization = normalization
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self._train: ImagesInMemory | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and split the digits, whatever the stage; a second call does nothing."""
        if self._train is not None:
            return
        pixels, digits = load_digits(return_X_y=True)
        pixels = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 8, 8)
        # Split before the choice of classes, so that every choice has the same test images.
        rest, test = stratified_split(digits, 0.2, self.split_seed)
        kept, held_out = stratified_split(digits[rest], self.validation_fraction, self.split_seed)
        self._test = self._chosen(pixels, digits, test)
        self._val = self._chosen(pixels, digits, rest[held_out])
        self._train = self._chosen(pixels, digits, rest[kept], seed=self.seed if self.augment else None)
        self.train_samples, self.val_samples, self.test_samples = map(len, (self._train, self._val, self._test))

    def _chosen(
        self, pixels: torch.Tensor, digits: np.ndarray, part: np.ndarray, seed: int | None = None
    ) -> ImagesInMemory:
        part = part[np.isin(digits[part], self.classes)]
        labels = torch.tensor([self.classes.index(digit) for digit in digits[part]])
        return ImagesInMemory(
            pixels[part], labels, self.resolution, white=16, normalization=self.normalization, seed=seed, shift_px=1
        )

    def train_dataloader(self) -> DataLoader:
        return data_loader(self._train, self.batch_size, shuffle_seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        return data_loader(self._val, self.batch_size, shuffle_seed=None)

    def test_dataloader(self) -> DataLoader:
        return data_loader(self._test, self.batch_size, shuffle_seed=None)
