"""The digits: real, shared out by class, split the same way for every choice of classes."""

import pytest
import torch
from sklearn.datasets import load_digits

from microtune.datamodules.digits import Digits
from microtune.modules.user_error import UserError


def ready(**arguments):
    data = Digits(**arguments)
    data.prepare_data()
    data.setup()
    return data


def batches(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_sizes_types_and_range():
    data = ready(batch_size=50)
    assert (data.num_classes, data.input_shape) == (10, (1, 32, 32))
    assert data.class_names == [str(digit) for digit in range(10)]
    assert data.train_samples + data.val_samples + data.test_samples == 1797
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    for loader, samples in zip(loaders, (data.train_samples, data.val_samples, data.test_samples), strict=True):
        images, labels = batches(loader)
        assert images.shape == (samples, 1, 32, 32)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.min() == -1
        assert images.max() == 1
        assert torch.bincount(labels).min() > 0.08 * samples


def test_splits_hold_every_digit_once():
    data = ready(resolution=8)
    images = torch.cat(
        [batches(part())[0] for part in (data.train_dataloader, data.val_dataloader, data.test_dataloader)]
    )
    found = ((images + 1) * 8).flatten(1)
    assert sorted(found.tolist()) == sorted(load_digits().data.tolist())


def test_labels_follow_the_choice_of_classes():
    data = ready(classes=(7, 3), resolution=8)
    assert data.num_classes == 2
    assert data.class_names == ["7", "3"]
    everything = ready(resolution=8)
    images, labels = batches(data.test_dataloader())
    all_images, all_labels = batches(everything.test_dataloader())
    assert torch.equal(images[labels == 0], all_images[all_labels == 7])
    assert torch.equal(images[labels == 1], all_images[all_labels == 3])


def test_split_does_not_depend_on_the_seed_of_training():
    first, second = (batches(ready(seed=seed).val_dataloader())[0] for seed in (0, 1))
    assert torch.equal(first, second)
    assert batches(ready(split_seed=1).val_dataloader())[0].sum() != first.sum()


def test_same_batches_for_the_same_seed():
    first, again, other = (batches(ready(seed=seed, augment=True).train_dataloader())[0] for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_augmentation_differs_by_epoch_and_leaves_evaluation_alone():
    plain, moved = ready(resolution=8), ready(resolution=8, augment=True)
    first, second = (moved._train.__getitems__([(epoch, index) for index in range(100)])[0] for epoch in (0, 1))
    assert not torch.equal(first, second)
    same = (first == plain._train.__getitems__(range(100))[0]).flatten(1).all(1).float().mean()
    assert same < 0.4
    assert torch.equal(batches(plain.test_dataloader())[0], batches(moved.test_dataloader())[0])


def test_second_setup_does_nothing():
    data = ready()
    train = data._train
    data.setup("test")
    assert data._train is train


@pytest.mark.parametrize("classes", [(0, 10), (1, 1), (3,), ()])
def test_classes_refused(classes):
    with pytest.raises(UserError, match="are not two or more different digits: choose among 0 to 9"):
        Digits(classes=classes)
