"""Promises about Keras' files: every layout gives the same tensors, and what is no such file is refused."""

import re

import h5py
import numpy as np
import pytest
import torch

from microtune.modules.networks.keras_weights import read_keras_weights
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.pretrained_weights import load_weights
from microtune.modules.user_error import UserError

KERAS_FILE = "weights/mobilenet_v2_w035_keras_imagenet_notop.npz"


@pytest.fixture(scope="module")
def arrays(shared_data):
    with np.load(shared_data / KERAS_FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def first_layer_name(layer):
    """The name in the files that keras.applications downloads."""
    match = re.fullmatch(r"(?:block_(\d+)|expanded_conv)_(expand|depthwise|project)(_BN)?", layer)
    if not match:
        return layer
    block, stage, norm = match[1] or 0, match[2], match[3]
    return f"bn{block}_conv_{block}_bn_{stage}" if norm else f"mobl{block}_conv_{block}_{stage}"


def write_h5(path, arrays, root="", rename=lambda layer: layer):
    """As Keras 2: a group per layer with ``weight_names``, and the arrays under the layer's name once more."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            layer, array_name = name.split("/")
            layer = rename(layer)
            group = file.require_group(f"{root}{layer}")
            group[f"{layer}/{array_name}:0"] = array
            names = [*group.attrs.get("weight_names", []), f"{layer}/{array_name}:0"]
            group.attrs["weight_names"] = np.array(names, dtype="S")
    return path


def test_tensors_are_the_arrays_with_their_axes_moved(shared_data, arrays):
    state = read_keras_weights(shared_data / KERAS_FILE)
    assert len(state) == len(arrays) == 260
    expected = {name for name in mobilenet_v2(0.35, head_convolution=True).state_dict() if "num_batches" not in name}
    assert state.keys() == expected - {"classifier.1.weight", "classifier.1.bias"}
    assert state["features.0.0.weight"][5, 2, 0, 1] == arrays["Conv1/kernel"][0, 1, 2, 5]
    depthwise = arrays["block_3_depthwise/depthwise_kernel"]
    assert state["features.4.conv.1.0.weight"].shape == (48, 1, 3, 3)
    assert state["features.4.conv.1.0.weight"][7, 0, 2, 1] == depthwise[2, 1, 7, 0]
    assert torch.equal(
        state["features.1.conv.2.running_var"], torch.tensor(arrays["expanded_conv_project_BN/moving_variance"])
    )
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


@pytest.mark.parametrize("rename", [lambda layer: layer, first_layer_name], ids=["names of now", "names of the files"])
@pytest.mark.parametrize("root", ["", "model_weights/"])
def test_h5_gives_what_npz_gives(tmp_path, shared_data, arrays, root, rename):
    path = write_h5(tmp_path / "keras.h5", arrays, root, rename)
    with h5py.File(path, "a") as file:
        file["optimizer_weights/Adam/m/Conv1/kernel:0"] = np.zeros((3, 3, 3, 16), np.float32)
    state, expected = read_keras_weights(path), read_keras_weights(shared_data / KERAS_FILE)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layer", ["predictions", "Logits"])
def test_the_classifier_is_read_where_it_is_present(tmp_path, arrays, layer):
    kernel, bias = np.random.default_rng(0).random((1280, 10), np.float32), np.arange(10, dtype=np.float32)
    path = write_h5(tmp_path / "top.h5", {**arrays, f"{layer}/kernel": kernel, f"{layer}/bias": bias})
    network = mobilenet_v2(0.35, 10, head_convolution=True, padding="keras")
    load_weights(network, path)
    assert torch.equal(network.classifier[1].weight, torch.tensor(kernel.T))
    assert torch.equal(network.classifier[1].bias, torch.tensor(bias))


def test_a_file_without_the_last_convolution_is_read(tmp_path, arrays):
    np.savez(tmp_path / "headless.npz", **{name: a for name, a in arrays.items() if not name.startswith("Conv_1")})
    assert not any(name.startswith("features.18") for name in read_keras_weights(tmp_path / "headless.npz"))
    load_weights(mobilenet_v2(0.35, padding="keras"), tmp_path / "headless.npz")


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, arrays, suffix):
    whole, broken = tmp_path / f"whole{suffix}", tmp_path / f"broken{suffix}"
    np.savez(whole, **arrays) if suffix == ".npz" else write_h5(whole, arrays)
    content = whole.read_bytes()
    for part in (b"", b"\x00\xff" * 100, content[: len(content) // 2]):
        broken.write_bytes(part)
        with pytest.raises(
            UserError, match=rf"broken{suffix} cannot be read \(\w+\): it is cut short or no {suffix} file"
        ):
            read_keras_weights(broken)


def test_pickled_objects_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", **{"Conv1/kernel": np.array([print], dtype=object)})
    with pytest.raises(UserError, match=r"objects.npz cannot be read \(ValueError\)"):
        read_keras_weights(tmp_path / "objects.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Conv1/kernel": None}, "has no array Conv1/kernel: give keras.applications' MobileNetV2, as .h5 of its own"),
        ({"block_5_expand_BN/gamma": None}, "has no array block_5_expand_BN/gamma"),
        ({"Conv_1_bn/beta": None}, "has no array Conv_1_bn/beta"),
        (
            {"Conv1/kernel": np.ones(3)},
            r"array Conv1/kernel of .* has shape \(3,\), not 4 axes: give keras.applications'",
        ),
    ],
)
def test_arrays_of_another_network_are_refused(tmp_path, arrays, change, message):
    changed = {name: array for name, array in {**arrays, **change}.items() if array is not None}
    np.savez(tmp_path / "other.npz", **changed)
    with pytest.raises(UserError, match=message):
        read_keras_weights(tmp_path / "other.npz")


def test_a_file_of_another_width_is_refused(shared_data):
    message = r"features.0.0.weight is \(16, 3, 3, 3\) in weights .* and \(32, 3, 3, 3\) in the network: give weights"
    with pytest.raises(UserError, match=message):
        load_weights(mobilenet_v2(1.0, padding="keras"), shared_data / KERAS_FILE)
