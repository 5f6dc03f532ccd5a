"""ImageNet: the official classes, the splits, the official archives, and what is refused."""

import hashlib
import io
import itertools
import logging
import shutil
import tarfile

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import imagenet as torchvision_imagenet
from torchvision.models import MobileNet_V2_Weights

from microtune.datamodules.image_files import decode, middle_part, opened, random_part
from microtune.datamodules.imagenet import DEVKIT, TRAIN_ARCHIVE, VAL_ARCHIVE, ImageNet, read_wnids
from microtune.datamodules.reproducible_order import seeded_torch
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.pretrained_weights import NORMALIZATION, load_weights
from microtune.modules.user_error import UserError

TENCH, GOLDFISH, TOILET_TISSUE = "n01440764", "n01443537", "n15075141"  # labels 0, 1 and 999
noise = np.random.default_rng(0)


def jpeg():
    file = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def fill(folder, images_per_class):
    for wnid, count in images_per_class.items():
        (folder / wnid).mkdir(parents=True)
        for number in range(count):
            (folder / wnid / f"{wnid}_{number}.JPEG").write_bytes(jpeg())
    return folder


def ready(folder, **arguments):
    data = ImageNet(folder, **{"resolution": 16, "num_workers": 0, **arguments})
    data.prepare_data()
    data.setup()
    return data


def batches(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def files(data):
    return [{part.root / name.decode() for name in part.paths} for part in (data._train, data._val, data._test)]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def three_classes(tmp_path):
    """The first two classes and the last."""
    fill(tmp_path / "train", {TOILET_TISSUE: 20, TENCH: 20, GOLDFISH: 1})
    fill(tmp_path / "val", {TOILET_TISSUE: 4, TENCH: 5, GOLDFISH: 1})
    return tmp_path


@pytest.fixture
def val_alone(three_classes):
    shutil.rmtree(three_classes / "train")
    return three_classes


def test_real_images_are_classified(shared_data):
    data = ready(
        shared_data / "imagenet",
        resolution=224,
        evaluate_only=True,
        batch_size=50,
        normalization=NORMALIZATION["symmetric"],
    )
    assert (data.train_samples, data.val_samples, data.test_samples) == (0, 100, 1000)
    assert files(data)[1] < files(data)[2]
    network = mobilenet_v2(head_convolution=True).eval().to(memory_format=torch.channels_last)
    load_weights(network, shared_data / "weights/mobilenet_v2-b0353104.pth")
    batches = itertools.islice(data.test_dataloader(), 4)
    with torch.no_grad():
        right = [network(images).argmax(1) == labels for images, labels in batches]
    top1 = torch.cat(right).double().mean().item()
    print(f"torchvision's weights, 200 ImageNet images, 224 px: top-1 {top1:.2%}")
    assert top1 >= 0.835  # all 1,000 give 81.4 %


def test_real_images_are_prepared_as_for_the_published_accuracy(shared_data):
    data = ready(shared_data / "imagenet", resolution=224, evaluate_only=True, normalization=((0,), (1,)))
    images, labels = next(iter(data.test_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((32, 3, 224, 224), torch.float32, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= images.min() < 0.01
    assert 0.99 < images.max() <= 1
    assert labels.tolist() == list(range(32))
    published = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(values)[:, None, None] for values in (published.mean, published.std))
    for image, name in zip(images, data._test.paths, strict=False):
        expected = published(decode(shared_data / "imagenet/val" / name.decode())) * std + mean
        levels = ((image - expected) * 255).round().abs()  # Pillow rounds otherwise
        assert levels.max() <= 1
        assert levels.mean() < 0.05


def test_wnids_are_those_of_the_real_folders(shared_data):
    assert list(read_wnids()) == sorted(path.name for path in (shared_data / "imagenet/val").iterdir())


def test_always_the_1000_official_classes(three_classes):
    data = ImageNet(three_classes)
    assert (data.num_classes, data.input_shape, len(data.class_names)) == (1000, (3, 224, 224), 1000)
    assert len(set(data.class_names)) == 1000
    assert [data.class_names[label] for label in (0, 1, 2, 999)] == [
        "tench",
        "goldfish",
        "great white shark",
        "toilet tissue",
    ]
    assert [read_wnids().index(wnid) for wnid in (TENCH, GOLDFISH, TOILET_TISSUE)] == [0, 1, 999]
    data = ready(three_classes)
    assert batches(data.test_dataloader())[1].tolist() == [0] * 5 + [1] + [999] * 4
    assert sorted(set(batches(data.train_dataloader())[1].tolist())) == [0, 1, 999]


def test_validation_is_split_off_train(three_classes):
    data = ready(three_classes, validation_fraction=0.1)
    assert (data.train_samples, data.val_samples, data.test_samples) == (37, 4, 10)
    train, val, test = files(data)
    assert train | val == set((three_classes / "train").rglob("*.JPEG"))
    assert test == set((three_classes / "val").rglob("*.JPEG"))
    assert batches(data.val_dataloader())[1].tolist() == [0, 0, 999, 999]
    assert files(ready(three_classes, validation_fraction=0.1, seed=7)) == [train, val, test]
    assert files(ready(three_classes, validation_fraction=0.1, split_seed=7)) != [train, val, test]
    assert ready(three_classes).val_samples == 2


def test_val_alone_is_shared_out(val_alone, caplog):
    with caplog.at_level(logging.INFO):
        data = ready(val_alone)
    assert (data.train_samples, data.val_samples, data.test_samples) == (8, 1, 1)
    assert set.union(*files(data)) == set((val_alone / "val").rglob("*.JPEG"))
    assert files(ready(val_alone, seed=7)) == files(data)
    assert files(ready(val_alone, split_seed=7)) != files(data)
    assert caplog.messages[0] == (
        f"{val_alone / 'train'} is missing and {val_alone / 'val'} is shared out for training, validation and test: "
        "accuracies will not compare with published ones"
    )


@pytest.mark.parametrize("folder", ["three_classes", "val_alone"])
def test_evaluate_only(folder, request, caplog):
    folder = request.getfixturevalue(folder)
    with caplog.at_level(logging.INFO):
        data = ready(folder, evaluate_only=True)
    assert (data.train_samples, data.val_samples, data.test_samples) == (0, 1, 10)
    train, val, test = files(data)
    assert not train
    assert val < test
    assert test == set((folder / "val").rglob("*.JPEG"))
    assert caplog.messages == [
        f"nothing is trained: the test split is all of {folder / 'val'}, and the validation split a tenth of it"
    ]
    with pytest.raises(UserError, match="evaluate_only leaves no training images: give --evaluate_only false to train"):
        data.train_dataloader()


def test_batches_do_not_depend_on_workers(three_classes):
    def all_of(**arguments):
        loader = ready(three_classes, batch_size=16, **arguments).train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            epochs.append(batches(loader))
        return epochs

    alone, together = all_of(num_workers=0), all_of(num_workers=2)
    for (images, labels), (same_images, same_labels) in zip(alone, together, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert not torch.equal(alone[0][0], alone[1][0])
    assert not torch.equal(alone[0][0], all_of(seed=1)[0][0])


def test_augmentation_differs_by_epoch_and_can_be_turned_off(three_classes):
    train = ready(three_classes)._train
    assert train[0, 3][0].shape == (3, 16, 16)
    assert torch.equal(train[0, 3][0], train[0, 3][0])
    assert not torch.equal(train[0, 3][0], train[1, 3][0])
    plain = ready(three_classes, augment=False)._train
    assert torch.equal(plain[0, 3][0], plain[1, 3][0])


def test_large_jpegs_are_decoded_smaller_without_changing_what_is_seen(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(colours).resize((601, 499), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "large.JPEG", quality=95, subsampling=0)
    picture.save(tmp_path / "large.png")  # has no smaller size to be decoded at
    for epoch in range(8):
        parts = []
        for name in ("large.JPEG", "large.png"):
            with seeded_torch(0, epoch, 0), opened(tmp_path / name) as image:
                parts.append(random_part(image, resolution=32, smallest_crop=0.08).float())
                decoded_width = image.width
        assert decoded_width == 601
        assert (parts[0] - parts[1]).abs().mean() < 2.5
    with seeded_torch(0, 0, 0), opened(tmp_path / "large.JPEG") as image:
        random_part(image, resolution=32, smallest_crop=1)
        assert image.size == (76, 63)  # an eighth


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_are_seen_upright(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    exif = upright.getexif()
    exif[0x0112] = orientation
    upright.save(tmp_path / "turned.JPEG", exif=exif, quality=95)
    decode(tmp_path / "turned.JPEG").save(tmp_path / "upright.png")
    views = []
    for name in ("turned.JPEG", "upright.png"):
        with seeded_torch(0, 1, 2), opened(tmp_path / name) as image:
            views.append(random_part(image, resolution=16, smallest_crop=0.5))
        with opened(tmp_path / name) as image:
            views.append(middle_part(image, resolution=16, short_side=18))
    assert torch.equal(views[0], views[2])
    assert torch.equal(views[1], views[3])


def test_other_kinds_of_images_by_the_name_of_jpeg_are_read(three_classes):
    path = three_classes / "val" / TENCH / f"{TENCH}_0.JPEG"  # there is one in the official training images
    Image.new("RGB", (24, 20), (255, 0, 0)).save(path, "PNG")
    images, _ = next(iter(ready(three_classes, normalization=((0,), (1,))).test_dataloader()))
    assert images[0].mean((1, 2)).tolist() == [1, 0, 0]


def test_second_setup_does_nothing(three_classes):
    data = ready(three_classes)
    train = data._train
    data.setup("test")
    assert data._train is train


def test_hidden_folders_and_files_are_passed_over(three_classes):
    (three_classes / "val" / ".cache").mkdir()
    (three_classes / "val" / TENCH / ".DS_Store").touch()
    (three_classes / "val" / "labels.csv").touch()
    assert ready(three_classes).test_samples == 10


# The official archives


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def packed(members, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in members.items():
            add(tar, name, content)
    return file.getvalue()


def devkit():
    """As the official one: WordNet nodes of which the leaves are classes, and a class number per validation image."""
    nodes = [(1, GOLDFISH, 0), (2, TOILET_TISSUE, 0), (3, TENCH, 0), (4, "n00001740", 2)]
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    synsets = np.array(
        [(number, wnid, "a word, another", "a gloss", children) for number, wnid, children in nodes],
        dtype=[(field, object) for field in fields],
    )
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    folder = "ILSVRC2012_devkit_t12/data"
    truth = "\n".join(["2", "3", "3", "1"]).encode() + b"\n"
    return packed(
        {f"{folder}/meta.mat": meta.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth}, "w:gz"
    )


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Writes an archive, by default to be taken for the official one."""

    def put(split, content, official=True):
        name, md5 = torchvision_imagenet.ARCHIVE_META[split]
        (tmp_path / name).write_bytes(content)
        md5 = hashlib.md5(content).hexdigest() if official else md5
        monkeypatch.setitem(torchvision_imagenet.ARCHIVE_META, split, (name, md5))

    return put


@pytest.fixture
def archives(tmp_path, put):
    train = {wnid: {f"{wnid}_{number}.JPEG": jpeg() for number in range(4)} for wnid in (TOILET_TISSUE, TENCH)}
    val = {f"ILSVRC2012_val_{number:08}.JPEG": jpeg() for number in (2, 1, 4, 3)}
    put("train", packed({f"{wnid}.tar": packed(images) for wnid, images in train.items()}))
    put("val", packed(val))
    put("devkit", devkit())
    return tmp_path, {f"{wnid}/{name}": image for wnid in train for name, image in train[wnid].items()}, val


def visible(folder):
    return sorted(path.name for path in folder.iterdir())


def test_archives_are_unpacked_once(archives):
    folder, train, val = archives
    data = ready(folder)
    assert contents(folder / "train") == train
    wnids = [TOILET_TISSUE, TENCH, TENCH, GOLDFISH]
    names = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 5)]
    assert contents(folder / "val") == {f"{w}/{name}": val[name] for w, name in zip(wnids, names, strict=True)}
    assert visible(folder) == sorted([TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT, "train", "val"])
    assert (data.train_samples, data.val_samples, data.test_samples) == (6, 2, 4)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}
    data.prepare_data()
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")} == before
    for name in (TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT):
        (folder / name).unlink()
    assert files(ready(folder)) == files(data)


def test_evaluate_only_leaves_the_training_archive_alone(archives):
    folder, _, _ = archives
    data = ready(folder, evaluate_only=True)
    assert not (folder / "train").exists()
    assert data.test_samples == 4


def test_archive_without_prepare_data_refused(archives):
    with pytest.raises(UserError, match=f"{VAL_ARCHIVE} is not unpacked: call prepare_data first"):
        ImageNet(archives[0]).setup()


@pytest.mark.parametrize("split", ["train", "val", "devkit"])
def test_archive_with_another_checksum_refused(archives, put, split):
    folder, _, _ = archives
    name, _ = torchvision_imagenet.ARCHIVE_META[split]
    put(split, (folder / name).read_bytes()[:-1] + b"x", official=False)
    with pytest.raises(UserError, match=rf"{name} is not the official archive \(its MD5 is .*\): download it again"):
        ready(folder)
    assert not (folder / ("train" if split == "train" else "val")).exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_archive_cut_short_leaves_nothing(archives, put, split):
    folder, _, _ = archives
    name, _ = torchvision_imagenet.ARCHIVE_META[split]
    put(split, (folder / name).read_bytes()[:3000])
    with pytest.raises(UserError, match=rf"{name} cannot be unpacked \(.*\): download it again"):
        ready(folder)
    assert visible(folder) == sorted([TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT, *(["val"] if split == "train" else [])])


def test_interrupted_unpacking_leaves_nothing(archives, monkeypatch):
    folder, train, _ = archives
    extract, extracted = tarfile.TarFile.extract, []

    def interrupted(tar, member, *arguments, **others):
        extracted.append(member.name)
        if len(extracted) == 4 + 5:
            raise KeyboardInterrupt
        extract(tar, member, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ready(folder)
    assert visible(folder) == sorted([TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT, "val"])
    ready(folder)
    assert contents(folder / "train") == train


@pytest.mark.parametrize("name", ["../x.JPEG", "/x.JPEG/../../x.JPEG"])
def test_member_outside_its_folder_refused(archives, put, name):
    folder, _, _ = archives
    put("train", packed({f"{TENCH}.tar": packed({f"{TENCH}_0.JPEG": jpeg(), name: jpeg()})}))
    with pytest.raises(UserError, match=rf"{TRAIN_ARCHIVE} has a member that would be written outside its folder"):
        ready(folder)
    assert not (folder / "train").exists()
    assert not list(folder.rglob("x.JPEG"))


def test_hostile_validation_image_refused(archives, put):
    folder, _, _ = archives
    put("val", packed({"../ILSVRC2012_val_00000001.JPEG": jpeg()}))
    with pytest.raises(UserError, match=rf"{VAL_ARCHIVE} has a member that would be written outside its folder"):
        ready(folder)
    assert not list(folder.rglob("*.JPEG"))


def test_missing_devkit_refused(archives):
    folder, _, _ = archives
    (folder / DEVKIT).unlink()
    message = rf"{DEVKIT} is missing, and {VAL_ARCHIVE} does not say which class an image is of: get {DEVKIT} from"
    with pytest.raises(UserError, match=message):
        ready(folder)


# What is refused


def test_missing_data_refused(tmp_path, three_classes):
    message = (
        rf"has neither val/ nor {VAL_ARCHIVE}: give the folder that holds val/ and train/, or register at "
        rf"image-net.org, get {VAL_ARCHIVE} and {DEVKIT}, to train {TRAIN_ARCHIVE} as well, and put them in"
    )
    with pytest.raises(UserError, match=message):
        ready(tmp_path / "nowhere")
    shutil.rmtree(three_classes / "val")
    with pytest.raises(UserError, match=message):
        ready(three_classes)


def test_images_without_class_folders_refused(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg())
    message = r"val has no class folders: sort the images into folders such as n01440764, or remove .*val and put the"
    with pytest.raises(UserError, match=message):
        ready(tmp_path)


def test_other_class_refused(three_classes):
    fill(three_classes / "train", {"n00000001": 1})
    with pytest.raises(UserError, match=r"train/n00000001 is none of the 1000 classes, which are named like n0144"):
        ready(three_classes)


def test_empty_class_refused(three_classes):
    (three_classes / "train" / "n01484850").mkdir()
    with pytest.raises(UserError, match=r"class folder .*train/n01484850 has 0 images: add images or remove it"):
        ready(three_classes)


def test_nothing_to_validate_with_refused(three_classes):
    for number in range(1, 20):
        for wnid in (TENCH, TOILET_TISSUE):
            (three_classes / "train" / wnid / f"{wnid}_{number}.JPEG").unlink()
    with pytest.raises(UserError, match=r"no class of .*train has two images: there are none to validate with"):
        ready(three_classes)


def test_too_few_to_share_out_refused(tmp_path):
    fill(tmp_path / "val", {TENCH: 2})
    with pytest.raises(UserError, match=r"val has 2 images, too few to share out: add .*train"):
        ready(tmp_path)


def test_other_files_refused_or_left_out(three_classes, caplog):
    notes = three_classes / "train" / TENCH / "notes.txt"
    notes.write_text("not an image")
    with pytest.raises(UserError, match=r"notes.txt is not an image file: remove it or give --skip_broken true"):
        ready(three_classes)
    path = three_classes / "train" / TOILET_TISSUE / f"{TOILET_TISSUE}_0.JPEG"
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        data = ready(three_classes, skip_broken=True)
    assert data.train_samples + data.val_samples == 40
    assert caplog.messages == [
        f"2 of 42 files in {three_classes / 'train'} cannot be read and are left out, {notes} the first"
    ]


def test_class_of_broken_images_alone_refused(three_classes):
    (three_classes / "val" / GOLDFISH / f"{GOLDFISH}_0.JPEG").write_bytes(b"broken")
    with pytest.raises(UserError, match=rf"class folder .*val/{GOLDFISH} has 0 images"):
        ready(three_classes, skip_broken=True)


def test_empty_classes_are_left_out_and_counted(three_classes, caplog):
    empty = three_classes / "train/n01484850"
    empty.mkdir()
    data = ready(three_classes, skip_broken=True)
    assert data.num_classes == 1000
    assert caplog.messages == [f"1 class folders of 4 are empty and are left out, {empty} the first"]
    for path in (three_classes / "val").rglob("*.JPEG"):
        path.unlink()
    with pytest.raises(UserError, match=r"all class folders of .*val are empty: add images"):
        ready(three_classes, skip_broken=True)


def test_damaged_image_is_named(three_classes):
    path = three_classes / "val" / TENCH / f"{TENCH}_1.JPEG"
    path.write_bytes(path.read_bytes()[:-100])
    data = ready(three_classes)
    with pytest.raises(UserError, match=rf"{path.name} cannot be read as an image \(image file is truncated.*: remove"):
        next(iter(data.test_dataloader()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smallest_crop": 0}, "smallest_crop 0 is no fraction of a picture: give one such as 0.25"),
        ({"resolution": 0}, "resolution 0 is not positive: give a whole number such as 32"),
        ({"normalization": ((0.5,), (0,))}, "normalization has a standard deviation of 0: give positive ones"),
        ({"validation_fraction": 1}, "a held-out fraction of 1 splits nothing: give one such as 0.1"),
    ],
)
def test_arguments_out_of_range_refused(three_classes, arguments, message):
    with pytest.raises(UserError, match=message):
        ready(three_classes, **arguments)
