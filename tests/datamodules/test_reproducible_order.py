"""Order and augmentation follow from (seed, epoch, index), whoever loads and wherever a run was resumed."""

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from microtune.datamodules.digits import Digits
from microtune.datamodules.images_in_memory import ImagesInMemory, check_image_arguments, normalized, shifted
from microtune.datamodules.reproducible_order import (
    EvaluationOrder,
    ReproducibleOrder,
    data_loader,
    epochs_and_indices,
    random_bits,
    random_fractions,
    seeded_torch,
    stratified_split,
)
from microtune.modules.user_error import UserError

HALF = ((0.5,), (0.5,))


def test_random_bits_are_these_on_every_machine():
    assert random_bits(0, 0, np.array([0]), draws=1)[0, 0] == 5691588981419774585
    assert random_bits(-1, 3, np.array([7]), draws=1).dtype == np.uint64


def test_random_bits_do_not_depend_on_the_batch():
    together = random_bits(5, 2, np.arange(10), draws=3)
    alone = np.concatenate([random_bits(5, np.array([2]), np.array([index]), draws=3) for index in range(10)])
    assert (together == alone).all()


def test_random_bits_differ_in_seed_epoch_index_and_draw():
    grids = [random_bits(seed, epoch, np.arange(50), draws=4) for seed in range(10) for epoch in range(10)]
    assert len(np.unique(grids)) == 10 * 10 * 50 * 4


def test_random_fractions_are_uniform_and_uncorrelated():
    fractions = random_fractions(0, 1, np.arange(100_000), draws=3)
    assert fractions.min() >= 0
    assert fractions.max() < 1
    counts = np.histogram(fractions[:, 0], bins=20)[0]
    assert abs(counts - 5000).max() < 5 * 5000**0.5
    assert abs(np.corrcoef(fractions.T) - np.eye(3)).max() < 0.02


def test_seeded_torch_restores_the_state_and_repeats():
    state = torch.get_rng_state()
    with seeded_torch(0, 3, 17):
        first = torch.rand(4)
    with seeded_torch(0, 3, 17):
        assert torch.equal(first, torch.rand(4))
    with seeded_torch(0, 4, 17):
        assert not torch.equal(first, torch.rand(4))
    assert torch.equal(state, torch.get_rng_state())


def test_order_is_a_permutation_per_seed_and_epoch():
    def order_of(seed, epoch):
        order = ReproducibleOrder(range(100), seed)
        order.set_epoch(epoch)
        epochs, indices = zip(*order, strict=True)
        assert set(epochs) == {epoch}
        assert sorted(indices) == list(range(100))
        return indices

    orders = {order_of(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order_of(1, 2) == order_of(1, 2)


def test_processes_share_the_order_of_one(monkeypatch):
    whole = list(ReproducibleOrder(range(10), seed=0))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(list(ReproducibleOrder(range(10), seed=0)))
    assert parts == [whole[0::2], whole[1::2]]


def test_plain_indices_are_of_epoch_0():
    epochs, indices = epochs_and_indices([(2, 7), 5])
    assert epochs.tolist() == [2, 0]
    assert indices.tolist() == [7, 5]


def test_loading_leaves_the_global_random_state_alone():
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    data = ImagesInMemory(pixels, torch.arange(20), 32, 255, HALF, seed=0, shift_px=4, flip=True)
    state = torch.get_rng_state()
    list(data_loader(data, 8, shuffle_seed=0))
    assert torch.equal(state, torch.get_rng_state())


def test_stratified_split():
    labels = np.repeat([0, 1, 2], [100, 50, 2])
    kept, held_out = stratified_split(labels, 0.1, split_seed=0)
    assert np.bincount(labels[held_out]).tolist() == [10, 5, 1]
    assert sorted([*kept, *held_out]) == list(range(152))
    assert held_out.tolist() == stratified_split(labels, 0.1, split_seed=0)[1].tolist()
    assert held_out.tolist() != stratified_split(labels, 0.1, split_seed=1)[1].tolist()


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_stratified_split_refuses(fraction):
    with pytest.raises(UserError, match=f"held-out fraction of {fraction} splits nothing"):
        stratified_split(np.array([0, 1]), fraction, split_seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, HALF, 3), "resolution 0 is not positive"),
        ((32, -1, HALF, 3), "batch_size -1 is not positive"),
        ((32, 8, ((0.5, 0.5), (0.5,)), 3), "does not suit 3 channels: give means and standard deviations"),
        ((32, 8, ((0.5,), (0.0,)), 3), "standard deviation of 0.0: give positive ones"),
    ],
)
def test_image_arguments_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        check_image_arguments(*arguments)


def test_normalized():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    images = normalized(pixels, 255, ((0.0, 0.5, 1.0), (1.0, 0.5, 2.0)))
    assert images.flatten().tolist() == [0, 1, -1, 1, -0.5, 0]


def test_shifted_is_padding_cropping_and_mirroring():
    pixels = torch.randint(1, 256, (200, 3, 6, 6), dtype=torch.uint8)
    indices = np.arange(200)
    moved = shifted(pixels, 0, np.full(200, 1), indices, shift_px=2, flip=True)
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    seen = set()
    for before, after in zip(padded, moved, strict=True):
        crops = {
            (top, left, mirrored): before[:, top : top + 6, left : left + 6].flip(-1 if mirrored else ())
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
        }
        seen |= {key for key, crop in crops.items() if torch.equal(crop, after)}
        assert any(torch.equal(crop, after) for crop in crops.values())
    assert len(seen) > 45
    unmoved = shifted(pixels, 0, np.full(200, 1), indices, shift_px=0, flip=False)
    assert torch.equal(unmoved, pixels)


class Recorder(lightning.LightningModule):
    """Trains a linear layer and notes what it saw."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seen = {}

    def training_step(self, batch, _):
        images, labels = batch
        self.seen.setdefault(self.current_epoch, []).append(images)
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch, _):
        self.log("val/loss", batch[0].mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    def run(epochs, at_epoch_end=True, checkpoint=None):
        torch.manual_seed(0)
        model = Recorder()
        folder = tmp_path_factory.mktemp("checkpoints")
        saving = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=at_epoch_end)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[saving], enable_progress_bar=False
        )
        trainer.fit(model, Digits(resolution=8, batch_size=400, augment=True), ckpt_path=checkpoint)
        return model, folder

    return run


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_resumed_run_is_bit_equal(fit, at_epoch_end):
    whole, _ = fit(epochs=3)
    _, folder = fit(epochs=2, at_epoch_end=at_epoch_end)
    resumed, _ = fit(epochs=3, checkpoint=folder / "epoch=1.ckpt")
    assert list(resumed.seen) == [2]
    assert torch.equal(torch.cat(resumed.seen[2]), torch.cat(whole.seen[2]))
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert not torch.equal(torch.cat(whole.seen[0]), torch.cat(whole.seen[1]))


@pytest.mark.parametrize(("samples", "processes"), [(10, 3), (2, 4), (7, 1)])
def test_evaluation_shares_every_sample_once(samples, processes):
    orders = [EvaluationOrder(range(samples)) for _ in range(processes)]
    for rank, order in enumerate(orders):
        order.rank, order.num_replicas = rank, processes
    assert sorted(index for order in orders for index in order) == list(range(samples))
    assert [len(list(order)) for order in orders] == [len(order) for order in orders]


@pytest.mark.parametrize(
    ("samples", "batch_size", "in_training", "in_evaluation"),
    [(7, 3, [3, 3], [3, 3, 1]), (8, 3, [3, 3, 2], [3, 3, 2]), (2, 1, [1, 1], [1, 1]), (1, 4, [1], [1])],
)
def test_a_single_sample_left_over_is_no_batch_in_training(samples, batch_size, in_training, in_evaluation):
    """Batch norm has no statistics of one."""
    numbers = type("Numbers", (), {"__len__": lambda _: samples, "__getitem__": lambda _, key: key})()
    for shuffle_seed, expected in ((0, in_training), (None, in_evaluation)):
        assert list(data_loader(numbers, batch_size, shuffle_seed, collate=len)) == expected
