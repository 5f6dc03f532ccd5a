"""Which samples come when, and how each is augmented, as a function of (seed, epoch, index) and of nothing else.

So a run resumed from its last finished epoch sees what one never stopped would have seen, whatever the number of
workers. The sampler sends ``(epoch, index)`` pairs to the data set, which draws its random numbers from them: there is
no state to save, to share with workers or to restore, and torch's global random state is left alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from microtune.modules.user_error import UserError

Key = int | tuple[int, int]


def random_bits(seed: int, epochs: np.ndarray | int, indices: np.ndarray, draws: int) -> np.ndarray:
    """Return ``draws`` random 64-bit numbers per sample, each a hash of (seed, epoch, index, draw).

    The hash is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied once per part of the key.

    Args:
        seed: Seed, any integer.
        epochs: Epoch, or one per sample (N,).
        indices: Indices of the samples, int64 of shape (N,).
        draws: Number of random numbers that each sample gets.

    Returns:
        uint64 of shape (N, draws).

    Example::

        random_bits(0, 3, np.arange(128), draws=2).shape  # (128, 2)
    """
    key = np.array([seed % 2**64], dtype=np.uint64)
    for part in (np.asarray(epochs), indices):
        key = _mixed(key ^ _mixed(part.astype(np.uint64)))
    return _mixed(key[:, None] + np.arange(1, draws + 1, dtype=np.uint64))


def _mixed(bits: np.ndarray) -> np.ndarray:
    bits = np.atleast_1d(bits) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def random_fractions(seed: int, epochs: np.ndarray | int, indices: np.ndarray, draws: int) -> np.ndarray:
    """Return ``random_bits`` as float64 numbers, uniform in [0, 1), of shape (N, draws).

    Example::

        flipped = random_fractions(0, 3, np.arange(128), draws=1)[:, 0] < 0.5
    """
    return (random_bits(seed, epochs, indices, draws) >> np.uint64(11)) * 2.0**-53


@contextmanager
def seeded_torch(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Let torch's CPU random numbers follow from (seed, epoch, index) inside the block, and restore them behind it.

    Example::

        with seeded_torch(0, epoch=3, index=17):
            image = torchvision.transforms.v2.RandomResizedCrop(96)(image)
    """
    state = torch.get_rng_state()
    # torch.manual_seed would seed the GPUs as well, whose state this block does not restore.
    torch.default_generator.manual_seed(int(random_bits(seed, epoch, np.array([index]), draws=1)[0, 0]))
    try:
        yield
    finally:
        torch.set_rng_state(state)


class ReproducibleOrder(DistributedSampler):
    """Shuffles by (seed, epoch) and yields ``(epoch, index)`` pairs, under DDP each process its own part of them.

    Lightning calls ``set_epoch`` with the right epoch, after a resume too, and leaves a ``DistributedSampler`` as it
    is, so that ``use_distributed_sampler`` makes no difference. Like any ``DistributedSampler`` it repeats a few
    samples where their number is no multiple of the processes'.

    Args:
        dataset: Data set with a length, whose ``__getitem__`` or ``__getitems__`` takes ``(epoch, index)`` pairs.
        seed: Seed, any integer; the same one gives the same orders.

    Example::

        order = ReproducibleOrder(range(5), seed=0)
        order.set_epoch(2)
        list(order)  # [(2, 3), (2, 4), (2, 0), (2, 2), (2, 1)]
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        super().__init__(
            dataset,
            *_processes(),
            # The parent shuffles by seed + epoch, under which seed 0 in epoch 1 would be seed 1 in epoch 0.
            seed=int(random_bits(seed, 0, np.array([0]), draws=1)[0, 0] >> np.uint64(2)),
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        return ((epoch, index) for index in super().__iter__())


class EvaluationOrder(DistributedSampler):
    """The data set's own order, under DDP each process its own part of it, and no sample twice.

    Lightning's own would repeat samples until all processes have as many, and count them twice in the accuracy.

    Args:
        dataset: Data set with a length.

    Example::

        list(EvaluationOrder(range(5)))  # [0, 1, 2, 3, 4]
    """

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset, *_processes(), shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))


def _processes() -> tuple[int, int]:
    """How many processes there are, and the number of this one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def epochs_and_indices(keys: Sequence[Key]) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs and the indices of a batch of keys, each int64 of shape (N,); a plain index is of epoch 0.

    Plain indices come from samplers other than ``ReproducibleOrder``: for evaluation, and from Lightning's
    ``overfit_batches``.

    Example::

        epochs_and_indices([(2, 7), (2, 5)])  # array([2, 2]), array([7, 5])
    """
    pairs = np.array([key if isinstance(key, tuple) else (0, key) for key in keys], dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def stratified_split(labels: np.ndarray, held_out_fraction: float, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split samples into kept and held out, every class in the same proportion.

    A class of two samples or more has at least one on either side.

    Args:
        labels: Class of each sample, integers of shape (N,).
        held_out_fraction: Fraction to hold out, above 0 and below 1.
        split_seed: Seed that chooses the samples; the seed of the training has no part in it.

    Returns:
        The sorted indices kept and held out.

    Raises:
        UserError: if the fraction is not between 0 and 1.

    Example::

        kept, held_out = stratified_split(np.repeat([0, 1], 50), held_out_fraction=0.1, split_seed=0)  # 90 and 10
    """
    if not 0 < held_out_fraction < 1:
        raise UserError(f"a held-out fraction of {held_out_fraction} splits nothing: give one such as 0.1")
    bits = random_bits(split_seed, 0, np.arange(len(labels)), draws=1)[:, 0]
    by_class = np.lexsort((bits, labels))
    held_out = []
    for members in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        count = max(1, round(len(members) * held_out_fraction))
        held_out.append(members[: min(count, len(members) - 1)])
    held_out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def data_loader(
    dataset: Dataset, batch_size: int, shuffle_seed: int | None, num_workers: int = 0, collate: Callable | None = None
) -> DataLoader:
    """Return a loader in reproducible order, which draws nothing from torch's global random state.

    Args:
        dataset: Data set to load; see ``ReproducibleOrder`` for the keys it is asked for.
        batch_size: Number of samples in a batch; the last one may be smaller, but of one sample it is left out in
            training.
        shuffle_seed: Seed of the shuffling, or None for the data set's own order.
        num_workers: Number of processes that load; the batches do not depend on it.
        collate: Function that makes the batch of what the data set returns; by default that is a whole batch.

    Example::

        for images, labels in data_loader(dataset, batch_size=32, shuffle_seed=0):
            ...
    """
    sampler = EvaluationOrder(dataset) if shuffle_seed is None else ReproducibleOrder(dataset, shuffle_seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        # batch norm has no statistics of a single sample
        drop_last=shuffle_seed is not None and batch_size > 1 and len(sampler) % batch_size == 1 and len(sampler) > 1,
        num_workers=num_workers,
        collate_fn=collate or _as_it_is,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # without its own, a loader draws a number from the global one per epoch
    )


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch
