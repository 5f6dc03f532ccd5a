"""The recipe that makes int8 files: from a checkpoint, from published weights, and what it refuses."""

import os
import pickle
import re

import pytest
import torch

from microtune.datamodules.digits import Digits
from microtune.modules.classifier import Classifier
from microtune.modules.int8.files import read_quantized_network
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.int8.post_training_quantization import calibrate, quantize_after_training, renormalized
from microtune.modules.int8.published_networks import read_published_network
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import build_network
from microtune.recipes.quantize_network import TrainingSamples, channels_near_zero

NETWORK = {"width": 0.1, "num_classes": 10, "in_channels": 1, "folded": False}
PICKLE = "weights/mbv2-w0.35.pkl"
KERAS = "weights/mobilenet_v2_w035_keras_imagenet_notop.npz"


@pytest.fixture(scope="module")
def digits():
    data = Digits(batch_size=32)
    data.setup()
    return data


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    """A small network that knows most digits, trained for some seconds."""
    torch.manual_seed(0)
    module = Classifier(NETWORK, class_names=digits.class_names, input_shape=[1, 32, 32])
    optimizer = torch.optim.AdamW(module.parameters(), 0.02)
    steps = 3 * len(digits.train_dataloader())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for _ in range(3):
        for samples, labels in digits.train_dataloader():
            optimizer.zero_grad()
            module.loss(module(samples), labels).backward()
            optimizer.step()
            schedule.step()
    path = tmp_path_factory.mktemp("digits") / "last.ckpt"
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return path


@pytest.fixture(scope="module")
def folded(checkpoint):
    """The checkpoint's network as the recipe quantizes it."""
    network = build_network(**NETWORK)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("net."): values for name, values in state.items()})
    return fold_batch_norm(network, (1, 32, 32)).eval().to(memory_format=torch.channels_last)


def correct(network, data, change=lambda samples: samples):
    with torch.no_grad():
        return sum(int((network(change(x)).argmax(1) == y).sum()) for x, y in data.val_dataloader())


def loaded(graph, tensors):
    network = QuantizedNetwork(graph).eval()
    load_quantized_tensors(network, tensors)
    return network


def rows_of(output):
    """The table of accuracies: of each network top-1 in percent."""
    return {name.strip(): float(value) for name, value in re.findall(r"│ ([\w, ]+?) +│ ([\d.]+)% │", output)}


def test_a_checkpoint_is_quantized_by_its_data(command, checkpoint, folded, digits, tmp_path):
    out = tmp_path / "digits.safetensors"
    ended = command(
        *("quantize_network", "--source", checkpoint, "--out", out, "--data", "digits", "--resolution", 32),
        *("--samples", 200),
    )
    assert (ended.status, ended.errors) == (0, "")
    graph, tensors = read_quantized_network(out)
    assert graph.name == "mobilenet_v2-w0.1-int8"
    assert graph.class_names == tuple("0123456789")
    # what the library makes of the same samples
    calibration = calibrate(folded, TrainingSamples(digits, 200))
    assert calibration.samples == 200
    expected = quantize_after_training(folded, calibration, graph.name, "mse", digits.normalization, digits.class_names)
    assert graph == expected[0]
    assert all(torch.equal(tensors[name], expected[1][name]) for name in expected[1])
    # the table is about these networks
    in_float = correct(folded, digits)
    in_int8 = correct(
        loaded(graph, tensors), digits, lambda samples: renormalized(samples, digits.normalization, graph.normalization)
    )
    top1 = rows_of(ended.output)
    assert top1.keys() == {"float", "int8, min_max", "int8, mse"}
    assert top1["float"] == pytest.approx(in_float / digits.val_samples * 100, abs=0.01)
    assert top1["int8, mse"] == pytest.approx(in_int8 / digits.val_samples * 100, abs=0.01)
    assert in_float > 0.6 * digits.val_samples
    assert in_int8 > in_float - 0.03 * digits.val_samples
    assert "ranges of 200 samples of the training split" in ended.output
    weights = sum(values.numel() for values in tensors.values() if values.dtype == torch.int8)
    assert f"written: {out}, {out.stat().st_size / 1024:,.1f} KiB, of which {weights / 1024:,.1f} KiB" in ended.output
    assert f"--network {out}" in ended.output
    assert "near zero" not in ended.output


def test_resolution_is_the_checkpoints_and_other_classes_get_a_fresh_classifier(command, checkpoint, tmp_path):
    words = ("--source", checkpoint, "--data", "digits", "--data_options.classes", "[3, 4, 5]", "--samples", 32)
    ended = command("quantize_network", *words, "--out", tmp_path / "one.safetensors")
    assert ended.status == 0
    assert "the classifier of 3 classes is fresh and stays in floating point: train it" in ended.output
    assert "Top-1" not in ended.output
    graph, tensors = read_quantized_network(tmp_path / "one.safetensors")
    assert graph.input_shape == (1, 32, 32)
    assert (graph.classifier.classes, graph.classifier.output) == (3, None)
    assert graph.class_names == ("3", "4", "5")
    assert tensors["classifier.weight"].dtype == torch.float32
    command("quantize_network", *words, "--out", tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_speech_has_no_normalization_and_is_not_augmented(command, tiny_mswc, tmp_path):
    torch.manual_seed(0)
    network = NETWORK | {"num_classes": 3}
    module = Classifier(network, class_names=["bed", "cat", "tree"], input_shape=[1, 97, 40])
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, tmp_path / "speech.ckpt")
    out = tmp_path / "speech.safetensors"
    ended = command(
        *("quantize_network", "--source", tmp_path / "speech.ckpt", "--out", out, "--data", "mswc"),
        *("--data_dir", tiny_mswc, "--samples", 16),
    )
    assert (ended.status, ended.errors) == (0, "")
    graph, _ = read_quantized_network(out)
    assert (graph.input_shape, graph.normalization) == ((1, 97, 40), None)
    assert "recipes/train_mswc.py --network" in ended.output
    assert rows_of(ended.output).keys() == {"float", "int8, min_max", "int8, mse"}


def test_the_published_network_is_read(command, shared_data, tmp_path):
    out = tmp_path / "network.safetensors"
    ended = command("quantize_network", "--source", shared_data / PICKLE, "--out", out)
    assert (ended.status, ended.errors) == (0, "")
    graph, tensors = read_quantized_network(out)
    expected = read_published_network(shared_data / PICKLE)
    assert graph == expected[0]
    assert all(torch.equal(tensors[name], expected[1][name]) for name in expected[1])
    assert "mobilenet_v2-w0.35-int8: 51 convolutions and a classifier of 1000 classes (int8)" in ended.output
    assert "of which 342.5 KiB are int8 weights" in ended.output
    assert "31 output channels have a weight scale near zero" in ended.output
    assert "blocks.8.pointwise1 (3)" in ended.output


def test_keras_weights_are_quantized_without_their_classifier(command, shared_data, tmp_path):
    out = tmp_path / "keras.safetensors"
    ended = command(
        *("quantize_network", "--source", shared_data / KERAS, "--out", out, "--data", "image_folder"),
        *("--data_dir", shared_data / "flowers17", "--data_options.num_workers", 0),
        *("--resolution", 64, "--samples", 32, "--estimator", "min_max"),
    )
    assert ended.status == 0
    graph, _ = read_quantized_network(out)
    assert graph.name == "mobilenet_v2-w0.35-int8"
    assert graph.first_conv.padding == (0, 1, 0, 1)
    assert (graph.classifier.classes, graph.classifier.output) == (17, None)
    assert "train_image_folder.py" in ended.output


def test_channels_near_zero_are_those_that_scaling_leaves_out():
    assert channels_near_zero(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.011, 0.009, 1e-9])) == 2


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_runs_nothing(command, tmp_path):
    source, made = tmp_path / "hostile.pkl", tmp_path / "made"
    source.write_bytes(pickle.dumps({"first_conv": Hostile(made)}))
    ended = command("quantize_network", "--source", source, "--out", tmp_path / "out.safetensors")
    assert ended.status == 2
    assert ended.errors.count("\n") == 1
    assert re.search(r"hostile\.pkl.*mkdir", ended.errors)
    assert {path.name for path in tmp_path.iterdir()} == {"hostile.pkl"}


MISTAKES = {
    "another suffix": (
        ["--source", "x.pkl", "--out", "net.pth"],
        r"out is net\.pth: give a name that ends in \.safetensors",
    ),
    "a folder": (["--source", "x.pkl", "--out", "folder.safetensors"], r"out is folder\.safetensors, a folder: give"),
    "a file that exists": (
        ["--source", "x.pkl", "--out", "there.safetensors"],
        r"there\.safetensors exists: give another --out, or --overwrite to replace it",
    ),
    "no source": (
        ["--source", "none", "--out", "o.safetensors", "--data", "digits"],
        r"source is 'none': give torchvision, a \.pth, \.pt, \.ckpt, \.h5, \.npz or a published \.pkl file",
    ),
    "an unknown source": (["--source", "x.onnx", "--out", "o.safetensors"], r"source is 'x\.onnx': give torchvision"),
    "an int8 source": (
        ["--source", "there.safetensors", "--out", "o.safetensors"],
        r"there\.safetensors is an int8 network already: give one in floating point",
    ),
    "no data": (
        ["--source", "x.ckpt", "--out", "o.safetensors"],
        r"x\.ckpt is in floating point, .*: give --data, one of digits, cifar10, .*, and --data_dir",
    ),
    "data for a pickle": (
        ["--source", "x.pkl", "--out", "o.safetensors", "--data", "digits"],
        r"x\.pkl is an int8 network with ranges of its own: leave --data and --data_dir out",
    ),
    "no pickle": (["--source", "x.pkl", "--out", "o.safetensors"], r"x\.pkl"),
    "no checkpoint": (
        ["--source", "x.ckpt", "--out", "o.safetensors", "--data", "digits"],
        r"weights file x\.ckpt does not exist",
    ),
    "no samples": (
        ["--source", "x.ckpt", "--out", "o.safetensors", "--data", "digits", "--samples", "0"],
        "samples is 0: give 1 or more",
    ),
    "an unknown estimator": (
        ["--source", "x.ckpt", "--out", "o.safetensors", "--data", "digits", "--estimator", "max"],
        "estimator is max: give one of",
    ),
    "an unknown option": (
        ["--source", "torchvision", "--out", "o.safetensors", "--data", "digits", "--data_options.shift", "1"],
        "digits has no option 'shift': give one of classes",
    ),
    "a seed below 0": (
        ["--source", "x.ckpt", "--out", "o.safetensors", "--data", "digits", "--seed", "-1"],
        "seed is -1: give 0 or more",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_and_write_nothing(mistake, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "there.safetensors").write_text("kept")
    words, message = MISTAKES[mistake]
    ended = command("quantize_network", *words)
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors.count("\n") == 1
    assert re.search(message, ended.errors), ended.errors
    assert {path.name for path in tmp_path.iterdir()} == {"folder.safetensors", "there.safetensors"}
    assert (tmp_path / "there.safetensors").read_text() == "kept"


def test_overwrite_replaces_the_file_and_the_estimator_that_is_asked_for_is_written(
    command, checkpoint, folded, digits, tmp_path
):
    out = tmp_path / "there.safetensors"
    out.write_text("earlier")
    words = ("--source", checkpoint, "--data", "digits", "--samples", 32, "--estimator", "min_max", "--out", out)
    assert command("quantize_network", *words).status == 2
    assert out.read_text() == "earlier"
    assert command("quantize_network", *words, "--overwrite").status == 0
    calibration = calibrate(folded, TrainingSamples(digits, 32))
    expected, _ = quantize_after_training(
        folded, calibration, "mobilenet_v2-w0.1-int8", "min_max", digits.normalization, digits.class_names
    )
    assert read_quantized_network(out)[0] == expected
