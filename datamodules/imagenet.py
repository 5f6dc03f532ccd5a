"""ImageNet, the 1000 classes of ILSVRC2012."""

import functools
import hashlib
import logging
import os
import tarfile
import tempfile
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader
from torchvision.datasets.imagenet import ARCHIVE_META, load_meta_file, parse_devkit_archive
from torchvision.models import MobileNet_V2_Weights

from microtune.datamodules.archives import read_archive
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
from microtune.datamodules.progress import progress_bar
from microtune.datamodules.reproducible_order import random_bits, stratified_split
from microtune.modules.atomic_files import whole_folder
from microtune.modules.user_error import UserError

log = logging.getLogger(__name__)

TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT = (ARCHIVE_META[name][0] for name in ("train", "val", "devkit"))


class ImageNet(LightningDataModule):
    """ImageNet (ILSVRC2012): 1.28 million photographs in 1000 classes, in folders or in the original archives.

    The test split is the official ``val/``, because the labels of the official test images are not public; the
    validation images are taken from ``train/``. There are always 1000 classes, in the order of the sorted WordNet
    identifiers, whichever folders are there, as the published weights have them. Training sees a random part of each
    picture, half of them mirrored; evaluation sees the middle as those weights were evaluated: 224 of 256 pixels.

    Args:
        data_dir: Folder that holds ``train/`` and ``val/`` with a folder per class (``n01440764``) in each, or
            the archives ``ILSVRC2012_img_train.tar``, ``ILSVRC2012_img_val.tar`` and
            ``ILSVRC2012_devkit_t12.tar.gz``, which ``prepare_data`` unpacks (150 GB beside the archives).
        resolution: Height and width of the images, in pixels.
        batch_size: Number of images in a batch; the last one of an epoch may be smaller.
        seed: Seed of order and augmentation of the training images, which are functions of (seed, epoch, index).
        augment: Whether training sees random parts, mirrored or not.
        smallest_crop: Smallest random part, as a fraction of a picture's area.
        normalization: Mean and standard deviation on images from 0 to 1, as the network's weights expect them.
        num_workers: Number of processes that decode; 0 decodes in this one.
        skip_broken: Whether to leave out files that cannot be read, and log how many; this decodes every file in
            ``setup``. Otherwise a file of another kind is an error in ``setup``, and a damaged one when its turn comes.
        evaluate_only: Whether to train nothing: ``train/`` is not needed, and not read. All of ``val/`` is the test
            split, and the validation split is a random tenth of it, by which nothing may be chosen. Otherwise, where
            only ``val/`` is there, it is shared out at random: 80 % to train, 10 % to validate and 10 % to test.
        validation_fraction: Fraction of ``train/`` held out for validation; a class of one image stays in training.
        split_seed: Seed that chooses the validation images, and what ``val/`` is shared out to.

    Raises:
        UserError: if the data is missing, an archive is not the official one, a folder is none of the 1000 classes or
            is empty, a file is no image, or an argument is out of its range.

    Example::

        data = ImageNet("imagenet", resolution=128, num_workers=2)
        data.prepare_data()
        data.setup()
        images, labels = next(iter(data.train_dataloader()))  # (32, 3, 128, 128), (32,)
    """

    num_classes = 1000

    def __init__(
        self,
        data_dir: str | Path,
        resolution: int = 224,
        batch_size: int = 32,
        seed: int = 0,
        augment: bool = True,
        smallest_crop: float = 0.08,
        normalization: Normalization = ((0.5,), (0.5,)),
        num_workers: int = 2,
        skip_broken: bool = False,
        evaluate_only: bool = False,
        validation_fraction: float = 0.01,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        check_image_arguments(resolution, batch_size, normalization, in_channels=3)
        check_smallest_crop(smallest_crop)
        self.data_dir = Path(data_dir).expanduser()
        self.class_names = list(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])
        self.resolution = resolution
        self.input_shape = (3, resolution, resolution)
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.smallest_crop = smallest_crop
        self.normalization = normalization
        self.num_workers = num_workers
        self.skip_broken = skip_broken
        self.evaluate_only = evaluate_only
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self._train: ImageFiles | None = None

    def prepare_data(self) -> None:
        """Unpack the archives of which there is no folder yet; a second call does nothing."""
        # val/ first: what is missing for it shows before the hour that train/ takes.
        if self._is_packed("val"):
            unpack_val(self.data_dir)
        if self._is_packed("train"):
            unpack_train(self.data_dir)

    def setup(self, stage: str | None = None) -> None:
        """List and split the files, whatever the stage; a second call does nothing."""
        if self._train is not None:
            return
        for split in ("val", "train"):
            if self._is_packed(split):
                raise UserError(f"{self.data_dir / ARCHIVE_META[split][0]} is not unpacked: call prepare_data first")
        train, val, test = self._splits()
        short_side = round(self.resolution * 256 / 224)
        middle = functools.partial(middle_part, resolution=self.resolution, short_side=short_side)
        part = functools.partial(random_part, resolution=self.resolution, smallest_crop=self.smallest_crop)
        self._test = ImageFiles(test.names, test.labels, middle, root=test.folder)
        self._val = ImageFiles(val.names, val.labels, middle, root=val.folder)
        self._train = ImageFiles(
            train.names, train.labels, part if self.augment else middle, self.seed, root=train.folder
        )
        self.train_samples, self.val_samples, self.test_samples = map(len, (self._train, self._val, self._test))

    def _is_packed(self, split: str) -> bool:
        """Whether a split that is asked for is in its archive and in no folder."""
        if (self.data_dir / split).is_dir() or (split == "train" and self.evaluate_only):
            return False
        if (self.data_dir / ARCHIVE_META[split][0]).is_file():
            return True
        if split == "val" and any((self.data_dir / wnid).is_dir() for wnid in read_wnids()[:10]):
            raise UserError(f"{self.data_dir} holds the classes: give the folder above it, {self.data_dir.parent}")
        if split == "val":
            raise UserError(
                f"{self.data_dir} has neither val/ nor {VAL_ARCHIVE}: give the folder that holds val/ and train/, or "
                f"register at image-net.org, get {VAL_ARCHIVE} and {DEVKIT}, to train {TRAIN_ARCHIVE} as well, and "
                f"put them in {self.data_dir}"
            )
        return False

    def _splits(self) -> "tuple[LabelledNames, LabelledNames, LabelledNames]":
        images = list_images_by_wnid(self.data_dir / "val", self.skip_broken)
        train_dir = self.data_dir / "train"
        if train_dir.is_dir() and not self.evaluate_only:
            training = list_images_by_wnid(train_dir, self.skip_broken)
            kept, held_out = stratified_split(training.labels, self.validation_fraction, self.split_seed)
            if not len(held_out):
                raise UserError(f"no class of {train_dir} has two images: there are none to validate with, add some")
            return training.chosen(kept), training.chosen(held_out), images
        tenth, another, others = share_out(len(images.names), self.split_seed)
        if self.evaluate_only:
            rank_zero_only(log.info)(
                "nothing is trained: the test split is all of %s, and the validation split a tenth of it", images.folder
            )
            return images.chosen(others[:0]), images.chosen(tenth), images
        if not len(others):
            raise UserError(f"{images.folder} has {len(images.names)} images, too few to share out: add {train_dir}")
        rank_zero_only(log.warning)(
            "%s is missing and %s is shared out for training, validation and test: "
            "accuracies will not compare with published ones",
            *(train_dir, images.folder),
        )
        return images.chosen(others), images.chosen(tenth), images.chosen(another)

    def train_dataloader(self) -> DataLoader:
        if self.evaluate_only:
            raise UserError("evaluate_only leaves no training images: give --evaluate_only false to train")
        return image_loader(self._train, self.batch_size, self.seed, self.num_workers, self.normalization)

    def val_dataloader(self) -> DataLoader:
        return image_loader(self._val, self.batch_size, None, self.num_workers, self.normalization)

    def test_dataloader(self) -> DataLoader:
        return image_loader(self._test, self.batch_size, None, self.num_workers, self.normalization)


class LabelledNames(NamedTuple):
    """The images of a folder of class folders, by name.

    Args:
        folder: Folder of class folders.
        names: Path ``class/file`` of each image (N,). An array of bytes: 1.28 million names take 40 MB, of text four
            times as much, and as a list they would be copied by each worker as it counts references.
        labels: Class of each image (N,).

    Example::

        LabelledNames(Path("val"), np.array([b"n01440764/a.JPEG"]), np.array([0]))
    """

    folder: Path
    names: np.ndarray
    labels: np.ndarray

    def chosen(self, indices: np.ndarray) -> "LabelledNames":
        """Return some of the images."""
        return LabelledNames(self.folder, self.names[indices], self.labels[indices])


@functools.cache
def read_wnids() -> tuple[str, ...]:
    """Return the WordNet identifiers of the 1000 classes in the order of the labels, which is sorted.

    Example::

        read_wnids()[0]  # "n01440764"
    """
    return tuple(resources.files("microtune.datamodules").joinpath("imagenet_wnids.txt").read_text("utf-8").split())


def list_images_by_wnid(folder: Path, skip_broken: bool) -> LabelledNames:
    """List the images of the class folders, sorted; hidden files and folders are passed over.

    Args:
        folder: Folder of class folders, each named by its WordNet identifier.
        skip_broken: Whether to leave out what cannot be read, instead of raising an error for what is no image by its
            name.

    Raises:
        UserError: if a folder is none of the 1000 classes or is empty, there is none, or a file is no image.

    Example::

        list_images_by_wnid(Path("imagenet/val"), skip_broken=False).labels  # array([0, 0, ..., 999])
    """
    with os.scandir(folder) as entries:
        wnids = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    if not wnids:
        raise UserError(
            f"{folder} has no class folders: sort the images into folders such as {read_wnids()[0]}, "
            f"or remove {folder} and put the archives from image-net.org in {folder.parent} to have them unpacked"
        )
    label_of = {wnid: label for label, wnid in enumerate(read_wnids())}
    files = {}
    for wnid in wnids:
        if wnid not in label_of:
            raise UserError(
                f"{folder / wnid} is none of the 1000 classes, which are named like n01440764: is this ImageNet? "
                "train_image_folder.py takes any folder of classes"
            )
        files[wnid] = _names_in_class(folder / wnid, skip_broken)
    if skip_broken:
        files = leave_out_empty(files, folder)
    names = [np.array([os.fsencode(f"{wnid}/{name}") for name in found], bytes) for wnid, found in files.items()]
    labels = [np.full(len(found), label_of[wnid]) for wnid, found in files.items()]
    if not files:
        raise UserError(f"all class folders of {folder} are empty: add images")
    images = LabelledNames(folder, np.concatenate(names), np.concatenate(labels))
    if skip_broken:
        paths = (folder / os.fsdecode(name) for name in images.names)
        images = images.chosen(find_readable(paths, len(images.names), folder))
    counts = np.bincount(images.labels, minlength=len(label_of))
    for wnid in files:
        if counts[label_of[wnid]] == 0:
            raise UserError(f"class folder {folder / wnid} has 0 images: add images or remove it")
    return images


def _names_in_class(folder: Path, skip_broken: bool) -> list[str]:
    # The names alone: asking the file system about each of a million files would take minutes.
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    for name in names:
        if not skip_broken and not name.lower().endswith(SUFFIXES):
            raise UserError(f"{folder / name} is not an image file: remove it or give --skip_broken true")
    return names


def share_out(count: int, split_seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sorted indices of a random tenth of the samples, of another tenth, and of the others.

    Not class by class, because a class may have a single image.

    Example::

        tenth, another, others = share_out(1000, split_seed=0)  # 100, 100 and 800
    """
    order = np.argsort(random_bits(split_seed, 0, np.arange(count), draws=1)[:, 0], kind="stable")
    tenth = max(1, round(count / 10))
    return np.sort(order[:tenth]), np.sort(order[tenth : 2 * tenth]), np.sort(order[2 * tenth :])


def unpack_train(data_dir: Path) -> None:
    """Unpack the archive of the training images, a tar of one tar per class, to ``train/``, whole or not at all.

    The inner archives are read out of the outer one and never written.

    Raises:
        UserError: if the archive is not the official one or a member would leave its folder.

    Example::

        unpack_train(Path("imagenet"))
    """
    archive = data_dir / TRAIN_ARCHIVE
    check_archive(archive, ARCHIVE_META["train"][1])
    with whole_folder(data_dir / "train") as partial, read_archive(archive) as members:
        for outer, member in members:
            if member.isfile():
                with tarfile.open(fileobj=outer.extractfile(member), mode="r|") as inner:
                    for image in inner:
                        inner.extract(image, partial / Path(member.name).stem, filter="data")


def unpack_val(data_dir: Path) -> None:
    """Unpack the archive of the official validation images to ``val/``, whole or not at all.

    The archive is flat: the class of its n-th image is in the n-th line of a file in the development kit.

    Raises:
        UserError: if an archive is missing or is not the official one, or a member would leave its folder.

    Example::

        unpack_val(Path("imagenet"))
    """
    archive, devkit = data_dir / VAL_ARCHIVE, data_dir / DEVKIT
    if not devkit.is_file():
        raise UserError(
            f"{devkit} is missing, and {VAL_ARCHIVE} does not say which class an image is of: "
            f"get {DEVKIT} from image-net.org too and put it in {data_dir}"
        )
    check_archive(devkit, ARCHIVE_META["devkit"][1])
    check_archive(archive, ARCHIVE_META["val"][1])
    with tempfile.TemporaryDirectory() as folder:  # torchvision leaves its meta.bin there
        parse_devkit_archive(folder, file=str(devkit.absolute()))
        wnids = load_meta_file(folder)[1]
    with whole_folder(data_dir / "val") as partial, read_archive(archive) as members:
        for tar, member in members:
            if member.isfile():
                number = int(Path(member.name).stem.removeprefix("ILSVRC2012_val_"))
                tar.extract(member, partial / wnids[number - 1], filter="data")


def check_archive(path: Path, md5: str) -> None:
    """Read an archive once and compare its checksum, with a progress bar over its bytes.

    Raises:
        UserError: if the checksum is another one.

    Example::

        check_archive(Path("imagenet/ILSVRC2012_img_val.tar"), "29b22e2961454d5413ddabcf34fc5622")
    """
    with (
        progress_bar() as progress,
        progress.open(path, "rb", description=f"checking {path.name}") as file,
    ):
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise UserError(f"{path} is not the official archive (its MD5 is {found}, not {md5}): download it again")
