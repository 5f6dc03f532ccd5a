"""Features kept in memory or on disk, or not kept, are what a trunk makes of the data module's own batches."""

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import nn

from microtune.datamodules.digits import Digits
from microtune.datamodules.image_folder import ImageFolder
from microtune.datamodules.kept_features import MIB, TrunkFeatures
from microtune.datamodules.speech_commands import COMMANDS, SpeechCommands
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.search.frozen_trunk import cut_network, features_of
from microtune.modules.user_error import UserError

KEEPS = ["memory", "disk", "none"]
DATA = ["digits", "speech", "images"]
# no batch of fewer than 16: PyTorch computes those in another order
BATCH_SIZE = {"digits": 50, "speech": 20, "images": 21}
SIZES = {"digits": [50] * 10 + [18], "speech": [20] * 3, "images": [21] * 2}


@pytest.fixture(scope="module")
def speech_dir(tmp_path_factory):
    """Ten commands, 6 clips of each for training, 2 for validation and 2 for the test, and noise."""
    data_dir = tmp_path_factory.mktemp("speech")
    folder = data_dir / "SpeechCommands/speech_commands_v0.02"
    rng = np.random.default_rng(0)
    listed = {"validation": [], "testing": []}
    for number, word in enumerate(COMMANDS):
        (folder / word).mkdir(parents=True)
        for clip in range(10):
            name = f"{word}/{'aaabc'[clip // 2] * 8}_nohash_{clip}.wav"
            tone = np.sin(2 * np.pi * 300 * (number + 1) * np.arange(16_000) / 16_000)
            soundfile.write(folder / name, 0.3 * tone + rng.normal(0, 0.01, 16_000), 16_000, subtype="PCM_16")
            if clip >= 6:
                listed["validation" if clip < 8 else "testing"].append(name)
    for name, clips in listed.items():
        (folder / f"{name}_list.txt").write_text("\n".join(clips) + "\n")
    (folder / "_background_noise_").mkdir()
    noise = rng.normal(0, 0.1, 12 * 16_000)
    soundfile.write(folder / "_background_noise_/white_noise.wav", noise, 16_000, subtype="PCM_16")
    return data_dir


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    """Three classes of 20 images each."""
    data_dir = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("blue", "green", "red"):
        (data_dir / name).mkdir()
        for number in range(20):
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(data_dir / name / f"{number}.png")
    return data_dir


def trunk_for(input_shape, bias_depth=12, seed=0):
    """The trunk of a folded network whose batch norm has the statistics of one batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = mobilenet_v2(0.35, num_classes=4, in_channels=input_shape[0])
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        network.train()(torch.randn(16, *input_shape))
    network = fold_batch_norm(network.eval(), input_shape).to(memory_format=torch.channels_last)
    return cut_network(network, find_operations(network, input_shape), bias_depth)[0]


@pytest.fixture(scope="module")
def trunks():
    """The trunks for the three input shapes."""
    return {name: trunk_for(shape) for name, shape in (("digits", (1, 32, 32)), ("speech", (1, 97, 40)))} | {
        "images": trunk_for((3, 32, 32))
    }


@pytest.fixture
def data_of(speech_dir, images_dir):
    """Makes a data module that is set up."""

    def make(name, **arguments):
        arguments = {"batch_size": BATCH_SIZE[name], "augment": True} | arguments
        if name == "digits":
            data = Digits(**{"classes": (0, 1, 2, 3), "resolution": 32} | arguments)
        elif name == "speech":
            data = SpeechCommands(speech_dir, "words10", **arguments)
        else:
            data = ImageFolder(images_dir, **{"resolution": 32, "num_workers": 0} | arguments)
        data.prepare_data()
        data.setup()
        return data

    return make


def expected_batches(trunk, data, steps, copies):
    """What a Trainer would hand to a network, but that epoch e is augmented as epoch ``e % copies``."""
    loader, epoch = data.train_dataloader(), 0
    found = []
    while len(found) < steps:
        loader.sampler.set_epoch(epoch)
        if epoch < copies:  # nothing but the data module's own loader
            batches = list(loader)
        else:
            keys = [[(epoch % copies, index) for _, index in batch] for batch in loader.batch_sampler]
            batches = [
                loader.collate_fn(
                    loader.dataset.__getitems__(batch)
                    if hasattr(loader.dataset, "__getitems__")
                    else [loader.dataset[key] for key in batch]
                )
                for batch in keys
            ]
        found += [data.on_after_batch_transfer(batch, 0) for batch in batches]
        epoch += 1
    return [(features_of(trunk, samples), labels) for samples, labels in found[:steps]]


def assert_same(batches, expected):
    batches, expected = list(batches), list(expected)
    assert len(batches) == len(expected)
    for (features, labels), (wanted, of_wanted) in zip(batches, expected, strict=True):
        assert torch.equal(labels, of_wanted)
        assert labels.dtype == torch.int64
        assert features.dtype == torch.float32
        assert torch.equal(features, wanted)
        assert features.is_contiguous(memory_format=torch.channels_last)


def concatenated(batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", DATA)
def test_training_batches_are_those_of_the_data_module(name, keep, trunks, data_of, tmp_path):
    """Three epochs and a bit: the third has the first one's augmentation, in an order of its own."""
    trunk, data = trunks[name], data_of(name, seed=5)
    steps = 2 * len(SIZES[name]) + 2
    features = TrunkFeatures(trunk, data, copies=2, keep=keep, folder=tmp_path / "features")
    batches = list(features.training_batches(BATCH_SIZE[name], seed=5, steps=steps))
    assert [len(labels) for _, labels in batches] == (3 * SIZES[name])[:steps]
    assert_same(batches, expected_batches(trunk, data, steps, copies=2))
    assert_same(features.training_batches(BATCH_SIZE[name], seed=5, steps=steps), batches)  # again, the same


@pytest.mark.parametrize("name", DATA)
def test_augmentation_of_two_epochs_differs_where_there_are_two_copies(name, trunks, data_of):
    steps = 2 * len(SIZES[name])
    for copies in (1, 2):
        features = TrunkFeatures(trunks[name], data_of(name), copies=copies)
        batches = list(features.training_batches(BATCH_SIZE[name], seed=0, steps=steps))
        sums = [concatenated(part)[0].double().sum() for part in (batches[: steps // 2], batches[steps // 2 :])]
        assert (sums[0] - sums[1]).abs().lt(1e-6 * sums[0].abs()) == (copies == 1)


@pytest.mark.parametrize("keep", KEEPS)
def test_seed_gives_the_order_and_the_data_module_the_augmentation(keep, trunks, data_of, tmp_path):
    features = TrunkFeatures(trunks["digits"], data_of("digits"), copies=1, keep=keep, folder=tmp_path)
    whole = [
        concatenated(features.training_batches(BATCH_SIZE["digits"], seed, len(SIZES["digits"]))) for seed in (0, 1)
    ]
    assert not torch.equal(whole[0][1], whole[1][1])
    sets = [sorted(sample.tobytes() for sample in features.contiguous().numpy()) for features, _ in whole]
    assert sets[0] == sets[1]


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", DATA)
def test_evaluation_batches_hold_the_split_once_in_its_order(name, keep, split, trunks, data_of, tmp_path):
    trunk, data = trunks[name], data_of(name, batch_size=1000)
    features = TrunkFeatures(trunk, data, copies=1, keep=keep, folder=tmp_path)
    found, labels = concatenated(features.evaluation_batches(split))
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    ((samples, of_samples),) = (data.on_after_batch_transfer(batch, 0) for batch in loader)
    assert torch.equal(labels, of_samples)
    assert torch.equal(found, features_of(trunk, samples)) or len(labels) < 16
    torch.testing.assert_close(found, features_of(trunk, samples), rtol=1e-4, atol=1e-4)


def test_a_smaller_last_batch_is_nearly_the_same(trunks, data_of):
    """518 samples in batches of 64 leave 6."""
    data = data_of("digits", batch_size=64)
    kept, computed = (TrunkFeatures(trunks["digits"], data, copies=1, keep=keep) for keep in ("memory", "none"))
    pairs = zip(kept.training_batches(64, 0, 9), computed.training_batches(64, 0, 9), strict=True)
    for (one, of_one), (other, of_other) in pairs:
        assert torch.equal(of_one, of_other)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(of_one) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_the_same_whoever_loads_them(workers, trunks, data_of):
    features = TrunkFeatures(trunks["images"], data_of("images", num_workers=workers), copies=1)
    expected = TrunkFeatures(trunks["images"], data_of("images"), copies=1, keep="none")
    assert_same(features.training_batches(21, 3, 2), expected.training_batches(21, 3, 2))


@pytest.mark.parametrize("keep", KEEPS)
def test_global_random_state_is_left_alone(keep, trunks, data_of, tmp_path):
    data = data_of("images")
    state = torch.get_rng_state()
    features = TrunkFeatures(trunks["images"], data, copies=2, keep=keep, folder=tmp_path)
    list(features.training_batches(21, 0, 5))
    list(features.evaluation_batches())
    assert torch.equal(state, torch.get_rng_state())


def test_size_is_what_is_kept(trunks, data_of, tmp_path):
    data = data_of("digits")
    features = TrunkFeatures(trunks["digits"], data, copies=3, keep="disk", folder=tmp_path)
    assert features.shape == (32, 2, 2)
    assert features.size_bytes == 4 * 32 * 2 * 2 * (3 * 518 + 58)
    files = sorted(path.stat().st_size for path in tmp_path.glob("*/features.npy"))
    assert sum(files) - features.size_bytes <= 2 * 128  # NumPy's header
    assert sum(files) >= features.size_bytes


# ---- on disk


class Counting(nn.Module):
    """A trunk that counts the samples it is given."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.samples = 0

    def forward(self, x):
        self.samples += len(x)
        return self.trunk(x)


def test_features_on_disk_are_computed_once(trunks, data_of, tmp_path):
    data = data_of("digits")
    first, second = Counting(trunks["digits"]), Counting(trunks["digits"])
    one = TrunkFeatures(first, data, copies=2, keep="disk", folder=tmp_path / "deep/er")
    assert first.samples == 1 + 2 * 518 + 58  # one to see the shape
    other = TrunkFeatures(second, data_of("digits"), copies=2, keep="disk", folder=tmp_path / "deep/er")
    assert_same(other.training_batches(50, 0, 14), one.training_batches(50, 0, 14))
    assert_same(other.evaluation_batches(), one.evaluation_batches())
    assert second.samples == 1 + 65 + 58  # the first of each split once more, to see that they are of this network
    assert {path.name for path in (tmp_path / "deep/er").iterdir()} == {"train", "val", "train.lock", "val.lock"}


def test_what_is_half_written_is_not_taken(trunks, data_of, tmp_path, monkeypatch):
    data = data_of("digits")
    original, calls = TrunkFeatures._computed, []

    def broken(*arguments):
        for batch in original(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(TrunkFeatures, "_computed", broken)
    with pytest.raises(KeyboardInterrupt):
        TrunkFeatures(trunks["digits"], data, copies=1, keep="disk", folder=tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "train").exists()
    features = TrunkFeatures(trunks["digits"], data, copies=1, keep="disk", folder=tmp_path)
    assert_same(features.training_batches(50, 0, 11), expected_batches(trunks["digits"], data, 11, copies=1))


@pytest.mark.parametrize(
    "change",
    [
        {"bias_depth": 30},
        {"copies": 1},
        {"classes": (0, 1, 2)},
        {"validation_fraction": 0.2},
        {"weights": 1},  # from here on of the same shapes
        {"augment": False},
    ],
)
def test_a_folder_of_other_features_is_refused(change, trunks, data_of, tmp_path):
    folder = tmp_path / "features"
    TrunkFeatures(trunks["digits"], data_of("digits"), copies=2, keep="disk", folder=folder)
    trunk = trunks["digits"]
    if "bias_depth" in change or "weights" in change:
        trunk = trunk_for((1, 32, 32), change.get("bias_depth", 12), seed=change.get("weights", 0))
    data = data_of("digits", **{key: value for key, value in change.items() if key in Digits.__init__.__annotations__})
    copies = change.get("copies", 2)
    message = f"{folder / 'train'} holds features of another network or data set: remove {folder}"
    with pytest.raises(UserError) as refused:
        TrunkFeatures(trunk, data, copies=copies, keep="disk", folder=folder)
    assert str(refused.value) == message


def test_disk_needs_a_folder(trunks, data_of):
    with pytest.raises(UserError, match="features are to be kept on disk, but no folder is given"):
        TrunkFeatures(trunks["digits"], data_of("digits"), copies=1, keep="disk")


# ---- the limit


@pytest.mark.parametrize("keep", KEEPS)
def test_limit(keep, trunks, data_of, tmp_path):
    data = data_of("digits", resolution=64)
    trunk = trunk_for((1, 64, 64), bias_depth=40)
    arguments = {"copies": 3, "keep": keep, "folder": tmp_path / "features"}
    size_bytes = TrunkFeatures(trunk, data, copies=3, keep="none").size_bytes
    TrunkFeatures(trunk, data, **arguments, limit_bytes=size_bytes)
    if keep == "none":
        TrunkFeatures(trunk, data, **arguments, limit_bytes=0)
        return
    with pytest.raises(UserError) as refused:
        TrunkFeatures(trunk, data, **arguments | {"folder": tmp_path / "other"}, limit_bytes=size_bytes - 1)
    assert str(refused.value) == (
        f"the features of 3 x 518 training and 58 validation samples take {size_bytes / MIB:,.1f} MiB, more than "
        f"the limit of {(size_bytes - 1) / MIB:,.4g} MiB: "
        "raise --features_limit_mib, keep fewer --copies, keep them with --features disk, or give --features none to "
        "compute them in every pass"
    )
    assert not (tmp_path / "other").exists()
