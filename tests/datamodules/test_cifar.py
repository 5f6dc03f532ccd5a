"""CIFAR: real images in known batches, and files that are not what they say."""

import io
import logging
import pickle
import tarfile

import lightning
import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional

from microtune.datamodules import cifar
from microtune.datamodules.cifar import CIFAR
from microtune.datamodules.images_in_memory import random_views, shifted
from microtune.modules.user_error import UserError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def batches(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def write(path, entries, protocol=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(entries, protocol))


def made_up(samples, num_classes, key):
    rng = np.random.default_rng(samples)
    pixels = rng.integers(0, 256, (samples, 3072), dtype=np.uint8)
    return {"data": pixels, key: [index % num_classes for index in range(samples)]}


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    for number in range(1, 6):
        write(folder / f"data_batch_{number}", made_up(20 + number, 10, "labels"))
    write(folder / "test_batch", made_up(20, 10, "labels"))
    write(folder / "batches.meta", {"label_names": NAMES})
    return folder


def ready(data_dir, **arguments):
    data = CIFAR(data_dir, **arguments)
    data.prepare_data()
    data.setup()
    return data


def test_real_data(shared_data):
    data = ready(shared_data / "cifar10")
    assert (data.num_classes, data.input_shape) == (10, (3, 96, 96))
    assert data.class_names == NAMES
    assert (data.train_samples, data.val_samples, data.test_samples) == (5850, 650, 1500)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (128, 3, 96, 96)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    assert images.min() == -1
    assert 0.9 < images.max() <= 1
    assert torch.bincount(batches(data.val_dataloader())[1]).tolist() == [65] * 10


def test_real_images_are_not_changed_by_evaluation(shared_data):
    data = ready(shared_data / "cifar10", resolution=32)
    images, labels = batches(data.test_dataloader())
    with (shared_data / "cifar10/cifar-10-batches-py/test_batch").open("rb") as file:
        entries = pickle.load(file, encoding="latin1")
    assert torch.equal(((images + 1) * 127.5).round().byte().flatten(1), torch.from_numpy(entries["data"]))
    assert labels.tolist() == entries["labels"]


def test_cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    names = [f"class {number}" for number in range(100)]
    write(folder / "train", made_up(300, 100, "fine_labels"))
    write(folder / "test", made_up(100, 100, "fine_labels"))
    write(folder / "meta", {"fine_label_names": names})
    data = ready(tmp_path, classes=100, resolution=32)
    assert data.num_classes == 100
    assert data.class_names == names
    assert (data.train_samples, data.val_samples, data.test_samples) == (200, 100, 100)
    assert batches(data.test_dataloader())[1].tolist() == list(range(100))


def test_splits_are_disjoint_and_whole(cifar10):
    data = ready(cifar10.parent, resolution=32, augmentation="none")
    held = torch.cat([data._train.pixels, data._val.pixels])
    written = [pickle.loads((cifar10 / f"data_batch_{number}").read_bytes())["data"] for number in range(1, 6)]
    assert sorted(held.flatten(1).tolist()) == sorted(np.concatenate(written).tolist())


@pytest.mark.parametrize("augmentation", ["shift", "crop"])
def test_batches_do_not_depend_on_workers(cifar10, augmentation):
    def all_of(**arguments):
        data = ready(cifar10.parent, batch_size=16, resolution=48, augmentation=augmentation, **arguments)
        loader = data.train_dataloader()
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


@pytest.mark.parametrize("augmentation", ["shift", "crop"])
def test_augmentation_of_an_image_does_not_depend_on_its_batch(cifar10, augmentation):
    train = ready(cifar10.parent, augmentation=augmentation)._train
    together, _ = train.__getitems__([(3, index) for index in range(30)])
    assert torch.equal(together[17], train[3, 17][0])
    assert not torch.equal(together[17], train[4, 17][0])


def test_without_augmentation_training_sees_the_images_as_they_are(cifar10):
    train = ready(cifar10.parent, resolution=32, augmentation="none")._train
    images, _ = train.__getitems__([(3, index) for index in range(30)])
    assert torch.equal(((images + 1) * 127.5).round().byte(), train.pixels[:30])


def test_shift_moves_and_mirrors_the_training_images_alone(cifar10):
    data = ready(cifar10.parent, resolution=32, seed=4)
    images, _ = data._train.__getitems__([(2, index) for index in range(50)])
    expected = shifted(data._train.pixels[:50], 4, np.full(50, 2), np.arange(50), shift_px=4, flip=True)
    assert torch.equal(((images + 1) * 127.5).round().byte(), expected)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert torch.equal(((batches(loader)[0] + 1) * 127.5).round().byte(), loader.dataset.pixels)


def test_crop_evaluates_the_middle(cifar10):
    data = ready(cifar10.parent, resolution=128, augmentation="crop")
    for loader in (data.val_dataloader(), data.test_dataloader()):
        images, labels = batches(loader)
        pixels = functional.center_crop(functional.resize(loader.dataset.pixels / 255, [147]), [128])
        torch.testing.assert_close(images, pixels * 2 - 1, rtol=0, atol=1e-5)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, loader.dataset.labels)


def test_crop_enlarges_parts_of_the_training_images(cifar10):
    data = ready(cifar10.parent, resolution=128, seed=4, augmentation="crop", normalization=((0,), (1,)))
    images, labels = data._train.__getitems__([(2, index) for index in range(50)])
    epochs, indices = np.full(50, 2), np.arange(50)
    expected = random_views(data._train.pixels[:50], epochs, indices, seed=4, resolution=128, white=255) / 255
    assert torch.equal(images, expected)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, data._train.labels[:50])


def test_unknown_augmentation_refused(tmp_path):
    with pytest.raises(UserError, match="augmentation is True: give one of none, shift, crop"):
        CIFAR(tmp_path, augmentation=True)


class Recorder(lightning.LightningModule):
    """Counts the training images and the batches of validation."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 10)
        self.trained = self.validated = 0

    def training_step(self, batch, _):
        images, labels = batch
        self.trained += len(labels)
        return torch.nn.functional.cross_entropy(self.layer(images.mean((2, 3))), labels)

    def validation_step(self, batch, _):
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_nothing_is_held_out_on_request(cifar10):
    data = ready(cifar10.parent, resolution=8, batch_size=8, validation_fraction=0.0)
    assert (data.train_samples, data.val_samples, data.test_samples) == (115, 0, 20)
    assert data.val_dataloader() == []
    written = [pickle.loads((cifar10 / f"data_batch_{number}").read_bytes())["data"] for number in range(1, 6)]
    assert data._train.pixels.flatten(1).tolist() == np.concatenate(written).tolist()
    module = Recorder()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, data)
    assert (module.trained, module.validated) == (2 * 115, 0)
    assert trainer.validate(module, data) == []


@pytest.mark.parametrize("fraction", [-0.1, 1, float("nan")])
def test_other_validation_fractions_refused(cifar10, fraction):
    with pytest.raises(UserError, match=f"a held-out fraction of {fraction} splits nothing: give one such as 0.1"):
        ready(cifar10.parent, validation_fraction=fraction)


def test_smaller_than_it_was(cifar10):
    assert next(iter(ready(cifar10.parent, resolution=16).val_dataloader()))[0].shape[1:] == (3, 16, 16)


def test_other_contents_are_mentioned_once(cifar10, caplog):
    with caplog.at_level(logging.WARNING):
        ready(cifar10.parent)
        ready(cifar10.parent)
    assert [record.getMessage().split(" is not ")[1] for record in caplog.records] == [
        "the official CIFAR (the checksums of 6 files differ): accuracies will not compare"
    ]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickle_executes_nothing(cifar10, tmp_path, protocol):
    touched = tmp_path / "touched"
    write(cifar10 / "test_batch", {**made_up(20, 10, "labels"), "extra": Hostile(touched)}, protocol)
    with pytest.raises(UserError, match=r"test_batch is not a CIFAR file \(UnpicklingError: it asks for \w+\.\w+"):
        ready(cifar10.parent)
    assert not touched.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_every_protocol_reads_the_same(tmp_path, protocol):
    entries = made_up(20, 10, "labels")
    entries["data"] = np.asfortranarray(entries["data"])
    write(tmp_path / "test_batch", entries, protocol)
    pixels, labels = cifar.read_batch(tmp_path / "test_batch", 10)
    assert np.array_equal(pixels.reshape(20, -1), entries["data"])
    assert labels.tolist() == entries["labels"]


def test_bytes_of_python_2_are_read(tmp_path):
    # As the official files are: protocol 2, with str where Python 3 has bytes.
    python_2 = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89T\x00\x0c\x00\x00" + bytes(range(256)) * 12 + b"tbU\x06labels]K\x09au."
    )
    (tmp_path / "test_batch").write_bytes(python_2)
    pixels, labels = cifar.read_batch(tmp_path / "test_batch", 10)
    assert pixels.tobytes() == bytes(range(256)) * 12
    assert labels.tolist() == [9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, r"'data' is NoneType, not an array of shape \(images, 3072\)"),
        ({"data": np.zeros((20, 1024), np.uint8)}, r"'data' is \(20, 1024\), not an array"),
        ({"data": np.zeros((0, 3072), np.uint8)}, r"'data' is \(0, 3072\), not an array"),
        ({"data": np.zeros((20, 3072))}, "array of type f8, not u1"),
        ({"data": np.array([print], dtype=object)}, "array of type O8, not b1 or"),
        ({"labels": None}, "'labels' is NoneType, not a list of 20"),
        ({"labels": [0] * 19}, "'labels' is 19 long, not a list of 20"),
        ({"labels": [0] * 19 + [10]}, "label 10 is not a number from 0 to 9"),
        ({"labels": [0] * 19 + [-1]}, "label -1 is not a number from 0 to 9"),
        ({"labels": [0] * 19 + ["cat"]}, "label 'cat' is not a number from 0 to 9"),
    ],
)
def test_wrong_contents_refused(cifar10, changes, message):
    write(cifar10 / "data_batch_3", {**made_up(20, 10, "labels"), **changes}, protocol=4)
    with pytest.raises(UserError, match=f"data_batch_3 is not a CIFAR file .*{message}.*: delete .* --download true"):
        ready(cifar10.parent)


@pytest.mark.parametrize("contents", [b"", b"<html>not found</html>", pickle.dumps([1, 2])])
def test_no_pickle_of_a_dict_refused(cifar10, contents):
    (cifar10 / "test_batch").write_bytes(contents)
    with pytest.raises(UserError, match="test_batch is not a CIFAR file"):
        ready(cifar10.parent)


def test_cut_off_file_refused(cifar10):
    path = cifar10 / "test_batch"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="test_batch is not a CIFAR file"):
        ready(cifar10.parent)


def test_missing_file_refused(cifar10):
    (cifar10 / "data_batch_5").unlink()
    with pytest.raises(UserError, match=r"data_batch_5 is missing: delete .* and give --download true"):
        ready(cifar10.parent)


def test_wrong_names_refused(cifar10):
    write(cifar10 / "batches.meta", {"label_names": NAMES[:9]})
    with pytest.raises(UserError, match=r"batches.meta is not a CIFAR file \('label_names' is not a list of 10 names"):
        ready(cifar10.parent)


def test_missing_folder_refused(tmp_path):
    with pytest.raises(
        UserError,
        match=r"cifar-100-python does not exist: give --download true .*or unpack",
    ):
        ready(tmp_path, classes=100)


def test_other_number_of_classes_refused(tmp_path):
    with pytest.raises(UserError, match="there is no CIFAR-20: give 10 or 100 classes"):
        CIFAR(tmp_path, classes=20)


def serve_archive(monkeypatch, cifar10, extra=()):
    """Let torchvision 'download' an archive of the made-up folder."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(cifar10, arcname=cifar10.name)
        for name in extra:
            tar.addfile(tarfile.TarInfo(name))
    calls = []

    def download_url(url, root, filename, md5):
        calls.append(url)
        with open(f"{root}/{filename}", "wb") as file:
            file.write(archive.getvalue())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    return calls


def test_download_is_done_once(cifar10, tmp_path, monkeypatch):
    calls = serve_archive(monkeypatch, cifar10)
    data_dir = tmp_path / "new" / "data"
    data = ready(data_dir, download=True)
    data.prepare_data()
    assert calls == [CIFAR10.url]
    assert [path.name for path in data_dir.iterdir()] == ["cifar-10-batches-py"]
    assert data.test_samples == 20


def test_interrupted_unpacking_leaves_nothing(cifar10, tmp_path, monkeypatch):
    serve_archive(monkeypatch, cifar10)

    def interrupted(archive, folder, *_):
        (tmp_path / "was here").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ready(tmp_path / "new", download=True)
    assert (tmp_path / "was here").exists()
    assert list((tmp_path / "new").iterdir()) == []


def test_archive_that_leaves_its_folder_is_refused(cifar10, tmp_path, monkeypatch):
    serve_archive(monkeypatch, cifar10, extra=["../../escaped"])
    with pytest.raises(tarfile.OutsideDestinationError):
        ready(tmp_path / "new", download=True)
    assert not (tmp_path / "escaped").exists()
    assert list((tmp_path / "new").iterdir()) == []


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", unreachable)
    with pytest.raises(UserError, match=r"could not be downloaded \(no route to host\): fetch it yourself and unpack"):
        ready(tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []
