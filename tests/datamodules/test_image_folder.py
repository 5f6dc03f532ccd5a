"""Folders of images: the layouts, the splits, and what is refused."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from microtune.datamodules.image_files import decode
from microtune.datamodules.image_folder import ImageFolder
from microtune.modules.user_error import UserError


def fill(folder, classes, images_per_class, size=(24, 20)):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(images_per_class):
            colour = (label * 80, number * 8, 100)
            Image.new("RGB", size, colour).save(folder / name / f"{number:02}.png")
    return folder


def ready(folder, **arguments):
    data = ImageFolder(folder, **{"resolution": 16, "num_workers": 0, **arguments})
    data.prepare_data()
    data.setup()
    return data


def batches(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def files(data):
    return [set(part.paths) for part in (data._train, data._val, data._test)]


@pytest.fixture
def one_folder(tmp_path):
    return fill(tmp_path / "pictures", ["b", "a", "c"], 20)


@pytest.fixture
def two_folders(tmp_path):
    fill(tmp_path / "pictures" / "train", ["b", "a", "c"], 20)
    fill(tmp_path / "pictures" / "test", ["c", "b", "a"], 4)
    return tmp_path / "pictures"


def test_real_data(shared_data):
    data = ready(shared_data / "flowers17", resolution=128, batch_size=64, num_workers=2)
    assert (data.num_classes, data.input_shape[0]) == (17, 3)
    assert data.class_names == sorted(data.class_names)
    assert data.class_names[:2] == ["bluebell", "buttercup"]
    assert (data.train_samples, data.val_samples, data.test_samples) == (17 * 54, 17 * 6, 17 * 20)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, 3, 128, 128)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    assert -1 <= images.min() < -0.9
    assert 0.9 < images.max() <= 1
    assert all("/train/" in path for path in data._val.paths)


def test_one_folder_is_split(one_folder):
    data = ready(one_folder)
    assert data.class_names == ["a", "b", "c"]
    assert (data.train_samples, data.val_samples, data.test_samples) == (42, 6, 12)
    train, val, test = files(data)
    assert len(train | val | test) == 60
    assert torch.bincount(batches(data.test_dataloader())[1]).tolist() == [4, 4, 4]
    assert files(ready(one_folder, seed=7)) == [train, val, test]
    assert files(ready(one_folder, split_seed=7)) != [train, val, test]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_held_out_folder_is_the_test_split(two_folders, held_out):
    (two_folders / "test").rename(two_folders / held_out)
    data = ready(two_folders)
    assert (data.train_samples, data.val_samples, data.test_samples) == (54, 6, 12)
    train, val, test = files(data)
    assert all("/train/" in path for path in train | val)
    assert all(f"/{held_out}/" in path for path in test)


def test_val_beside_test_is_left_out(two_folders, caplog):
    shutil.copytree(two_folders / "test", two_folders / "val")
    with caplog.at_level(logging.WARNING):
        data = ready(two_folders)
    assert all("/test/" in path for path in data._test.paths)
    assert caplog.messages == [
        f"{two_folders / 'val'} is not read: test/ is the test split, validation is split off train/"
    ]


def test_class_may_be_called_train(tmp_path):
    data = ready(fill(tmp_path / "pictures", ["train", "plane"], 5))
    assert data.class_names == ["plane", "train"]


def test_labels_follow_the_sorted_names(one_folder):
    images, labels = batches(ready(one_folder).test_dataloader())
    red = ((images[:, 0, 0, 0] + 1) * 127.5).round()
    written = torch.tensor([80.0, 0.0, 160.0])  # "b" was written first
    assert torch.equal(red, written[labels])


def test_batches_do_not_depend_on_workers(two_folders):
    def all_of(**arguments):
        loader = ready(two_folders, batch_size=16, **arguments).train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            epochs.append(batches(loader))
        return epochs

    noise = np.random.default_rng(0)
    for path in two_folders.rglob("*.png"):
        Image.fromarray(noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    alone, together = all_of(num_workers=0), all_of(num_workers=2)
    for (images, labels), (same_images, same_labels) in zip(alone, together, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert not torch.equal(alone[0][0], alone[1][0])
    assert not torch.equal(alone[0][0], all_of(seed=1)[0][0])


def test_augmentation_differs_by_epoch_and_can_be_turned_off(two_folders):
    for path in (two_folders / "train").rglob("*.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    train = ready(two_folders)._train
    assert torch.equal(train[0, 3][0], train[0, 3][0])
    assert not torch.equal(train[0, 3][0], train[1, 3][0])
    plain = ready(two_folders, augment=False)._train
    assert torch.equal(plain[0, 3][0], plain[1, 3][0])


def test_evaluation_sees_the_middle(two_folders):
    path = two_folders / "test" / "a" / "00.png"
    image = Image.new("RGB", (92, 46), (255, 0, 0))
    image.paste((0, 0, 255), (23, 0, 69, 46))
    image.save(path)
    images, _ = next(iter(ready(two_folders, resolution=40).test_dataloader()))
    assert images[0, :, 20, 2:-2].eq(torch.tensor([-1.0, -1.0, 1.0])[:, None]).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "image.tif"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    assert decode(path).mode == "RGB"
    assert np.asarray(decode(path)).min() > 250


def test_photographs_are_turned_upright(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "image.jpg", exif=exif)
    assert decode(tmp_path / "image.jpg").size == (4, 8)


def test_missing_folder_refused(tmp_path):
    with pytest.raises(
        UserError, match="nowhere is not a folder: give one with a folder per class with its images, or"
    ):
        ready(tmp_path / "nowhere")


def test_folder_without_classes_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(UserError, match="has 0 class folders: give a folder with a folder per class"):
        ready(tmp_path)


def test_train_alone_refused(two_folders):
    shutil.rmtree(two_folders / "test")
    with pytest.raises(UserError, match=r"has train/, but neither test/ nor val/: add one, or give .*train to"):
        ready(two_folders)


def test_empty_class_refused(one_folder):
    (one_folder / "d").mkdir()
    (one_folder / "d" / ".DS_Store").touch()
    with pytest.raises(UserError, match=r"class folder .*/d has 0 images: add images or remove it"):
        ready(one_folder)


def test_empty_class_is_left_out_and_counted(one_folder, caplog):
    classes = ready(one_folder).class_names
    (one_folder / "d").mkdir()
    assert ready(one_folder, skip_broken=True).class_names == classes
    expected = f"1 class folders of {len(classes) + 1} are empty and are left out, {one_folder / 'd'} the first"
    assert caplog.messages == [expected]


def test_class_too_small_to_split_refused(one_folder):
    fill(one_folder, ["d"], 2)
    with pytest.raises(UserError, match=r"class folder .*/d has 2 images"):
        ready(one_folder)
    fill(one_folder, ["e"], 3)
    shutil.rmtree(one_folder / "d")
    data = ready(one_folder)
    assert [sum("/e/" in path for path in part) for part in files(data)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("lacking", "message"),
    [("train", r"train lacks the class folders b:"), ("test", r"test lacks the class folders b:")],
)
def test_different_classes_refused(two_folders, lacking, message):
    shutil.rmtree(two_folders / lacking / "b")
    with pytest.raises(UserError, match=f"{message} train/ and test/ must have the same classes"):
        ready(two_folders)


def test_other_files_refused_or_left_out(two_folders, caplog):
    notes = two_folders / "train" / "a" / "notes.txt"
    notes.write_text("not an image")
    with pytest.raises(UserError, match=r"a/notes.txt is not an image file: remove it or give --skip_broken true"):
        ready(two_folders)
    (two_folders / "train" / "c" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with caplog.at_level(logging.WARNING):
        data = ready(two_folders, skip_broken=True)
    assert data.train_samples + data.val_samples == 60
    assert caplog.messages == [
        f"2 of 62 files in {two_folders / 'train'} cannot be read and are left out, {notes} the first"
    ]


def test_damaged_image_is_named(two_folders):
    for path in (two_folders / "test" / "a").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    data = ready(two_folders)
    with pytest.raises(UserError, match=r"test/a/00.png cannot be read as an image \(.*\): remove it or give --skip"):
        next(iter(data.test_dataloader()))


def test_image_too_large_to_be_honest_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(UserError, match=r"image.png cannot be read as an image"):
        decode(tmp_path / "image.png")


def test_file_that_would_start_a_program_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(UserError, match="cannot identify image file"):
        decode(tmp_path / "image.png")


def test_second_setup_does_nothing(one_folder):
    data = ready(one_folder)
    train = data._train
    data.setup("test")
    assert data._train is train


def test_smallest_crop_refused(tmp_path):
    with pytest.raises(UserError, match=r"smallest_crop 0 is no fraction of a picture: give one such as 0.25"):
        ImageFolder(tmp_path, smallest_crop=0)
