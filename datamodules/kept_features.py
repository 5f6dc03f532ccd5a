"""What a frozen trunk makes of a data set: computed once and kept, or anew in every pass."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from microtune.datamodules.contract import ClassificationData, Split
from microtune.datamodules.option_names import KeepName
from microtune.datamodules.progress import progress_bar
from microtune.datamodules.reproducible_order import Key, data_loader
from microtune.modules.atomic_files import whole_folder
from microtune.modules.search.frozen_trunk import features_of
from microtune.modules.user_error import UserError

MIB = 1024 * 1024
SAMPLES_AT_ONCE = 64
FEW_BATCHES = 8
Batch = tuple[Tensor, Tensor]


class TrunkFeatures:
    """Batches of a data module's samples as a frozen trunk passes them on.

    Samples are augmented in a fixed number of ways: epoch e sees augmentation ``e % copies``. So they can be computed
    once and kept, and kept or not the batches are the same: to the bit where they have 16 samples or more, since
    PyTorch computes smaller ones in another order. Of speech that is mixed with noise single samples may differ by
    1e-6, since their place in the batch decides whether PyTorch computes a power alone or beside others.

    Args:
        trunk: Frozen part of a network, from ``cut_network``.
        data: Data module, set up.
        copies: Number of augmentations of every training sample.
        keep: Where features are kept: in memory, on disk, or nowhere.
        limit_bytes: Largest size of what is kept.
        folder: Folder of what is kept on disk; several processes share it. It must belong to this trunk and this data.

    Raises:
        UserError: What is to be kept needs more than ``limit_bytes``, or keeping on disk has no folder.

    Example::

        features = TrunkFeatures(trunk, data, copies=2)
        for batch, labels in features.training_batches(batch_size=32, seed=0, steps=100):
            ...
    """

    def __init__(
        self,
        trunk: nn.Module,
        data: ClassificationData,
        copies: int,
        keep: KeepName = "memory",
        limit_bytes: float = math.inf,
        folder: Path | None = None,
    ):
        self.trunk = trunk
        self.data = data
        self.copies = copies
        self.keep = keep
        self.samples: dict[Split, int] = {
            "train": data.train_samples,
            "val": data.val_samples,
            "test": data.test_samples,
        }
        self._kept: dict[Split, tuple[NDArray[np.float32], Tensor]] = {}
        with torch.no_grad():
            sample = features_of(trunk, torch.zeros(1, *data.input_shape))
        self.shape: tuple[int, int, int] = tuple(sample.shape[1:])
        if keep == "none":
            return
        self._refuse_too_much(limit_bytes)
        if keep == "disk" and folder is None:
            raise UserError("features are to be kept on disk, but no folder is given")
        for split in ("train", "val"):
            if self.samples[split]:
                self._kept[split] = self._on_disk(split, folder) if keep == "disk" else self._in_memory(split)

    @property
    def size_bytes(self) -> int:
        """What keeping the features takes."""
        return 4 * math.prod(self.shape) * (self.copies * self.samples["train"] + self.samples["val"])

    def training_batches(self, batch_size: int, seed: int, steps: int) -> Iterator[Batch]:
        """Features (N, C, H, W) and labels (N,) of ``steps`` batches, in the order that ``seed`` gives."""
        keys = _batches_of_keys(self.samples["train"], batch_size, seed, steps, self.copies)
        if self.keep == "none":
            return self._computed("train", list(keys))
        return (self._gathered(batch) for batch in keys)

    def first_batches(self, batch_size: int, seed: int, step: int, count: int) -> Iterator[Batch]:
        """The first batches, ``count`` or all, of the epoch that a step of ``training_batches`` is in."""
        loader = data_loader(_Keys(self.samples["train"]), batch_size, shuffle_seed=seed)
        epoch = step // len(loader)
        keys = list(itertools.islice(_batches_of_epoch(loader, epoch, self.copies), count))
        return self._computed("train", keys) if self.keep == "none" else (self._gathered(batch) for batch in keys)

    def evaluation_batches(self, split: Split = "val") -> Iterator[Batch]:
        """Features and labels of the validation split, or of the test split.

        Those of the test split, which a search never asks for, are kept in memory from the first time on, unless
        nothing is kept.
        """
        if split == "test" and split not in self._kept and self.keep != "none":
            self._kept[split] = self._in_memory(split)
        parts = _shared_out(range(self.samples[split]))
        if split not in self._kept:
            return self._computed(split, parts)
        features, labels = self._kept[split]
        return ((_channels_first(np.array(features[0, part])), labels[part]) for part in parts)

    def _refuse_too_much(self, limit_bytes: float) -> None:
        if self.size_bytes > limit_bytes:
            raise UserError(
                f"the features of {self.copies} x {self.samples['train']:,} training and {self.samples['val']:,} "
                f"validation samples take {self.size_bytes / MIB:,.1f} MiB, more than the limit of "
                f"{limit_bytes / MIB:,.4g} MiB: raise --features_limit_mib, keep fewer --copies, keep them with "
                "--features disk, or give --features none to compute them in every pass"
            )

    def _in_memory(self, split: Split) -> tuple[NDArray[np.float32], Tensor]:
        features = np.empty(self._array_shape(split), np.float32)
        return features, self._fill(split, features)

    def _on_disk(self, split: Split, folder: Path) -> tuple[NDArray[np.float32], Tensor]:
        kept = folder / split
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{split}.lock"):
            were_there = kept.exists()
            if not were_there:
                with whole_folder(kept) as partial:
                    features = np.lib.format.open_memmap(
                        partial / "features.npy", mode="w+", dtype=np.float32, shape=self._array_shape(split)
                    )
                    np.save(partial / "labels.npy", self._fill(split, features).numpy())
                    features.flush()
        features = np.load(kept / "features.npy", mmap_mode="r", allow_pickle=False)
        if were_there and not self._are_ours(split, features):
            raise UserError(f"{kept} holds features of another network or data set: remove {folder}")
        return features, torch.from_numpy(np.load(kept / "labels.npy", allow_pickle=False))

    def _are_ours(self, split: Split, features: NDArray[np.float32]) -> bool:
        """Whether kept features have the right shape, and the first of them come out once more."""
        if features.shape != self._array_shape(split):
            return False
        first = _shared_out(range(self.samples[split]))[0]
        keys = [(0, index) for index in first] if split == "train" else first
        computed, _ = next(iter(self._computed(split, [keys])))
        return np.allclose(features[0, : len(first)], computed.permute(0, 2, 3, 1), atol=1e-4)

    def _array_shape(self, split: Split) -> tuple[int, ...]:
        channels, height, width = self.shape
        copies = self.copies if split == "train" else 1
        return copies, self.samples[split], height, width, channels

    def _fill(self, split: Split, features: NDArray[np.float32]) -> Tensor:
        """Writes the features of every copy; returns the labels."""
        labels = torch.empty(self.samples[split], dtype=torch.int64)
        with progress_bar() as progress:
            task = progress.add_task(f"features of the {split} split", total=features.shape[0] * features.shape[1])
            for copy in range(features.shape[0]):
                parts = _shared_out(range(self.samples[split]))
                keys = [[(copy, index) for index in part] if split == "train" else part for part in parts]
                for part, (batch, of_batch) in zip(parts, self._computed(split, keys), strict=True):
                    features[copy, part[0] : part[-1] + 1] = batch.permute(0, 2, 3, 1).numpy()
                    labels[part[0] : part[-1] + 1] = of_batch
                    progress.advance(task, len(part))
        return labels

    def _computed(self, split: Split, batches: list[list[Key]]) -> Iterator[Batch]:
        own = getattr(self.data, f"{split}_dataloader")()
        loader = DataLoader(
            own.dataset,
            batch_sampler=batches,
            # starting processes takes longer than a few batches
            num_workers=own.num_workers if len(batches) > FEW_BATCHES else 0,
            collate_fn=own.collate_fn,
            generator=torch.Generator(),  # without its own, a loader draws a number from the global one per pass
        )
        for batch in loader:
            samples, labels = self.data.on_after_batch_transfer(batch, 0)
            yield features_of(self.trunk, samples), labels

    def _gathered(self, keys: list[Key]) -> Batch:
        features, labels = self._kept["train"]
        indexes = np.array([index for _, index in keys])
        return _channels_first(features[keys[0][0], indexes]), labels[torch.from_numpy(indexes)]


class _Keys(Dataset):
    """Hands out the keys themselves, to see in which order a loader asks for them."""

    def __init__(self, samples: int):
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitems__(self, keys: list[Key]) -> list[Key]:
        return keys


def _batches_of_keys(samples: int, batch_size: int, seed: int, steps: int, copies: int) -> Iterator[list[Key]]:
    """The keys of ``steps`` batches, as the data modules' own loaders ask for them, epoch after epoch."""
    loader = data_loader(_Keys(samples), batch_size, shuffle_seed=seed)
    epochs = (_batches_of_epoch(loader, epoch, copies) for epoch in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


def _batches_of_epoch(loader: DataLoader, epoch: int, copies: int) -> Iterator[list[Key]]:
    loader.sampler.set_epoch(epoch)
    for batch in loader:
        yield [(epoch % copies, index) for _, index in batch]


def _shared_out(indexes: range) -> list[list[int]]:
    """Parts of about ``SAMPLES_AT_ONCE``, none of them much smaller than the others."""
    parts = max(1, len(indexes) // SAMPLES_AT_ONCE)
    return [part.tolist() for part in np.array_split(indexes, parts)]


def _channels_first(features: NDArray[np.float32]) -> Tensor:
    """(N, H, W, C) in memory, as a tensor of shape (N, C, H, W): that is ``channels_last`` without a copy."""
    return torch.from_numpy(features).permute(0, 3, 1, 2)
