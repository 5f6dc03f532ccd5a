"""What loads into a MobileNetV2, and what is refused."""

import logging
import urllib.error

import pytest
import torch
from torch import nn
from torchvision.models import MobileNet_V2_Weights

from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.pretrained_weights import (
    NORMALIZATION,
    class_names_of_weights,
    load_weights,
    padding_of_weights,
    weights_are_folded,
    width_of_weights,
)
from microtune.modules.user_error import UserError

KERAS_FILE = "weights/mobilenet_v2_w035_keras_imagenet_notop.npz"
TORCHVISION_FILE = "weights/mobilenet_v2-b0353104.pth"


def convolution_names(network):
    return [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]


def weighted_names(network):
    return [name for name, _ in network.named_parameters()]


def test_torchvision_weights_give_torchvision_outputs(shared_data):
    network = mobilenet_v2(head_convolution=True).eval()
    load_weights(network, shared_data / TORCHVISION_FILE)
    state = torch.load(shared_data / TORCHVISION_FILE, weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_network_without_the_last_convolution_leaves_it_out(shared_data, caplog):
    caplog.set_level(logging.INFO)
    network = mobilenet_v2(num_classes=10)
    classifier = network.classifier[1].weight.clone()
    load_weights(network, str(shared_data / TORCHVISION_FILE))
    state = torch.load(shared_data / TORCHVISION_FILE, weights_only=True)
    assert torch.equal(network.features[17].conv[2].weight, state["features.17.conv.2.weight"])
    assert torch.equal(network.classifier[1].weight, classifier)
    assert len(caplog.messages) == 1
    assert "fresh classifier of 10 classes and 320 features: " in caplog.messages[0]


def test_other_classes_keep_the_fresh_classifier(shared_data, caplog):
    caplog.set_level(logging.INFO)
    network = mobilenet_v2(num_classes=7, head_convolution=True)
    load_weights(network, shared_data / TORCHVISION_FILE)
    assert network.classifier[1].weight.shape == (7, 1280)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("has one of 1000 classes and 1280 features")


def test_keras_weights_load_with_and_without_the_last_convolution(shared_data, caplog):
    caplog.set_level(logging.INFO)
    for head_convolution in (False, True):
        network = mobilenet_v2(0.35, 10, head_convolution=head_convolution, padding="keras").eval()
        load_weights(network, shared_data / KERAS_FILE)
        outputs = network.features(torch.rand(4, 3, 96, 96) * 2 - 1)
        assert outputs.std() > 0.1  # a fresh network's are below 1e-6
    assert [message.endswith("has none") for message in caplog.messages] == [True, True]


@pytest.mark.parametrize(("padding", "file"), [("keras", KERAS_FILE), ("symmetric", TORCHVISION_FILE)])
def test_one_channel_equals_three_equal_channels(shared_data, caplog, padding, file):
    caplog.set_level(logging.INFO)
    width = 0.35 if padding == "keras" else 1.0
    grey, colour = (mobilenet_v2(width, 10, channels, padding=padding).eval() for channels in (1, 3))
    load_weights(colour, shared_data / file)
    caplog.clear()
    load_weights(grey, shared_data / file)
    assert sum("one input channel: the first convolution of" in message for message in caplog.messages) == 1
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        expected = colour.features(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey.features(images), expected, rtol=1e-3, atol=1e-3)


def save_checkpoint(path, network, padding="symmetric"):
    state = {f"net.{name}": tensor for name, tensor in network.state_dict().items()}
    hyper_parameters = {"network": {"width": 0.35, "padding": padding}, "learning_rate": 0.1}
    torch.save({"state_dict": state | {"metric.sum": torch.ones(1)}, "hyper_parameters": hyper_parameters}, path)
    return path


@pytest.mark.parametrize("padding", ["symmetric", "keras"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_checkpoint_comes_back(tmp_path, padding, folded):
    networks = [mobilenet_v2(0.35, 10, padding=padding) for _ in range(2)]
    if folded:
        networks = [fold_batch_norm(network, (3, 32, 32)) for network in networks]
    path = save_checkpoint(tmp_path / "last.ckpt", networks[0], padding)
    assert padding_of_weights(path) == padding
    load_weights(networks[1], path)
    assert all(torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in networks), strict=True))


def test_padding_follows_the_source():
    sources = {"a.h5": "keras", "a.npz": "keras", "a.pth": "symmetric", "torchvision": "symmetric", "none": "symmetric"}
    assert {source: padding_of_weights(source) for source in sources} == sources
    assert set(NORMALIZATION) == set(sources.values())


def test_none_leaves_the_network_as_it_is():
    network = mobilenet_v2(0.35)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    load_weights(network, "none")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["a.pth", "a.ckpt"])
def test_a_file_that_is_missing_or_no_file_of_weights_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"weights file {tmp_path}/{name} does not exist: give none, torchvision, or"):
        load_weights(mobilenet_v2(0.35), tmp_path / name)
    for content in (b"", b"\x00\xffgarbage" * 50, b"PK\x03\x04 half an archive", b"<!doctype html>", b"\x80\x02c"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} cannot be read \(\w+\): it is cut short, no file of torch.save"):
            load_weights(mobilenet_v2(0.35), tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path):
    torch.save(mobilenet_v2(0.35).state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cut.pth cannot be read \(RuntimeError\)"):
        load_weights(mobilenet_v2(0.35), tmp_path / "cut.pth")


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"features.0.0.weight": print}, tmp_path / "code.pt")
    with pytest.raises(UserError, match="or holds more than tensors and plain data; download or save it again"):
        load_weights(mobilenet_v2(0.35), tmp_path / "code.pt")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ([1], "a.pth", r"a.pth holds a list: save network.state_dict\(\) instead"),
        ({"conv1.weight": torch.ones(1)}, "a.pth", "a.pth has no tensor features.0.0.weight: give torchvision's"),
        ({"state_dict": {}}, "a.ckpt", "a.ckpt has no tensor net.features.0.0.weight in its state_dict: give"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, name, message):
    torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=message):
        load_weights(mobilenet_v2(0.35), tmp_path / name)


def test_an_unknown_source_is_refused():
    with pytest.raises(UserError, match=r"weights 'imagenet' are unknown: give none, torchvision, or a .pth, .pt"):
        load_weights(mobilenet_v2(0.35), "imagenet")


def test_a_checkpoint_that_does_not_say_its_padding_is_refused(tmp_path):
    network = mobilenet_v2(0.35)
    save_checkpoint(tmp_path / "odd.ckpt", network, "same")
    with pytest.raises(UserError, match=r"odd.ckpt says padding 'same' in hyper_parameters\['network'\]: it must be"):
        load_weights(network, tmp_path / "odd.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(UserError, match=r"bare.ckpt says padding None"):
        padding_of_weights(tmp_path / "bare.ckpt")


def test_weights_of_another_padding_are_refused(shared_data):
    message = "were trained with padding 'keras' and the network has 'symmetric': build it with padding='keras'"
    with pytest.raises(UserError, match=message):
        load_weights(mobilenet_v2(0.35), shared_data / KERAS_FILE)
    message = "were trained with padding 'symmetric' and the network has 'keras': build it with padding='symmetric'"
    with pytest.raises(UserError, match=message):
        load_weights(mobilenet_v2(padding="keras"), shared_data / TORCHVISION_FILE)


def test_weights_of_another_shape_are_refused_and_change_nothing(tmp_path):
    torch.save(mobilenet_v2(0.5, 10).state_dict(), tmp_path / "half.pth")
    network = mobilenet_v2(0.35, 10)
    before = network.features[0][0].weight.clone()
    # width 0.5 has the same first convolution, so the first tensor that differs comes later
    message = (
        r"features.2.conv.2.weight is \(16, 48, 1, 1\) in weights .*half.pth and \(8, 48, 1, 1\) in the network: "
        "give weights of this width, and of images for images or of spectrograms for speech"
    )
    with pytest.raises(UserError, match=message):
        load_weights(network, tmp_path / "half.pth")
    assert torch.equal(network.features[0][0].weight, before)


def test_input_channels_that_cannot_be_summed_are_refused(tmp_path):
    torch.save(mobilenet_v2(0.35).state_dict(), tmp_path / "colour.pth")
    with pytest.raises(UserError, match=r"features.0.0.weight is \(16, 3, 3, 3\) in .* and \(16, 2, 3, 3\)"):
        load_weights(mobilenet_v2(0.35, in_channels=2), tmp_path / "colour.pth")


def test_a_missing_last_convolution_is_refused(tmp_path):
    torch.save(mobilenet_v2(0.35).state_dict(), tmp_path / "headless.pth")
    message = "headless.pth have no features.18.0.weight: build the network with head_convolution=False"
    with pytest.raises(UserError, match=message):
        load_weights(mobilenet_v2(0.35, head_convolution=True), tmp_path / "headless.pth")


def test_tensors_missing_or_left_over_are_refused(tmp_path):
    network = mobilenet_v2(0.35)
    state = network.state_dict()
    torch.save({k: v for k, v in state.items() if k != "features.3.conv.2.weight"}, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"less.pth have no features.3.conv.2.weight: give those of torchvision's"):
        load_weights(network, tmp_path / "less.pth")
    torch.save({**state, "features.3.attention.weight": torch.ones(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"more.pth have features.3.attention.weight, which the network has not: give"):
        load_weights(network, tmp_path / "more.pth")


def test_folded_and_unfolded_are_not_mixed(tmp_path):
    network = mobilenet_v2(0.35)
    folded = fold_batch_norm(network, (3, 32, 32))
    torch.save(network.state_dict(), tmp_path / "unfolded.pth")
    torch.save(folded.state_dict(), tmp_path / "folded.pth")
    with pytest.raises(
        UserError, match=r"features.0.0.bias is in only one .*: fold the network first, with fold_batch"
    ):
        load_weights(network, tmp_path / "folded.pth")
    with pytest.raises(UserError, match=r"features.0.0.bias is in only one .*: load them before folding"):
        load_weights(folded, tmp_path / "unfolded.pth")


def test_torchvision_has_width_1_only():
    with pytest.raises(
        UserError, match=r"torchvision has weights of width 1.0 only: build .* width=1.0, or give a file"
    ):
        load_weights(mobilenet_v2(0.35), "torchvision")


def test_torchvision_weights_are_downloaded_by_torchvision(monkeypatch):
    source = mobilenet_v2(head_convolution=True)
    monkeypatch.setattr(MobileNet_V2_Weights, "get_state_dict", lambda *_, **__: source.state_dict())
    network = mobilenet_v2(head_convolution=True)
    load_weights(network, "torchvision")
    assert torch.equal(network.classifier[1].weight, source.classifier[1].weight)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")])
def test_a_failed_download_says_what_to_fetch(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(MobileNet_V2_Weights, "get_state_dict", fail)
    message = (
        r"cannot be downloaded \(.*(no route|invalid hash value).*\): download "
        r"https://download.pytorch.org/models/mobilenet_v2-b0353104.pth on another machine and give the file"
    )
    with pytest.raises(UserError, match=message):
        load_weights(mobilenet_v2(), "torchvision")


# ---- what weights say of themselves


@pytest.mark.parametrize(
    ("width", "found"),
    [(0.35, 0.35), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0), (1.3, 1.3), (1.4, 1.4), (0.1, None), (0.6, None)],
)
def test_width_of_a_state_dict(width, found, tmp_path):
    torch.save(mobilenet_v2(width, 2).state_dict(), tmp_path / "weights.pth")
    assert width_of_weights(tmp_path / "weights.pth") == found


def test_width_of_other_sources(shared_data, tmp_path):
    assert width_of_weights("none") is None
    assert width_of_weights("torchvision") == 1.0
    assert width_of_weights(shared_data / KERAS_FILE) == 0.35
    assert width_of_weights(str(shared_data / TORCHVISION_FILE)) == 1.0
    assert width_of_weights(save_checkpoint(tmp_path / "last.ckpt", mobilenet_v2(0.35, 2))) == 0.35


def test_width_of_a_file_that_is_missing_or_no_weights(tmp_path):
    with pytest.raises(UserError, match=r"a.pth does not exist"):
        width_of_weights(tmp_path / "a.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"foreign.pth has no tensor features.0.0.weight: give torchvision's"):
        width_of_weights(tmp_path / "foreign.pth")


def test_class_names_are_those_of_the_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path / "last.ckpt", mobilenet_v2(0.35, 2))
    assert class_names_of_weights(path) is None  # of before they were kept
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["class_names"] = ["bed", "cat"]
    torch.save(content, path)
    assert class_names_of_weights(path) == ["bed", "cat"]
    for source in ("none", "torchvision", tmp_path / "nowhere.pth", "nowhere.npz"):
        assert class_names_of_weights(source) is None
    with pytest.raises(UserError, match=r"nowhere.ckpt does not exist"):
        class_names_of_weights("nowhere.ckpt")


def test_a_checkpoint_is_read_once_and_anew_when_it_has_changed(monkeypatch, tmp_path):
    read, original = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **options: read.append(given) or original(*given, **options))
    path = tmp_path / "last.ckpt"
    for folded, padding in ((True, "symmetric"), (False, "keras")):
        network = {"folded": folded, "padding": padding}
        torch.save({"state_dict": {}, "hyper_parameters": {"network": network}}, path)
        for _ in range(2):
            assert (weights_are_folded(path), padding_of_weights(path)) == (folded, padding)
    assert len(read) == 2


def test_only_a_checkpoint_can_be_folded(tmp_path):
    path = save_checkpoint(tmp_path / "last.ckpt", mobilenet_v2(0.35, 2))
    assert not any(weights_are_folded(source) for source in ("none", "torchvision", "nowhere.pth", path))
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["network"]["folded"] = True
    torch.save(content, path)
    assert weights_are_folded(path)


def test_classifier_is_wanted_or_not(tmp_path):
    """Refused, nothing is loaded; of the right classes, all is."""
    source = mobilenet_v2(0.35, 7)
    torch.save(source.state_dict(), tmp_path / "seven.pth")
    network = mobilenet_v2(0.35, 10)
    before = network.features[0][0].weight.clone()
    message = (
        r"the classifier of weights .*seven.pth is \(7, 112\), and 10 classes of 112 features are wanted: "
        "give weights trained on these classes, with the same head_convolution"
    )
    with pytest.raises(UserError, match=message):
        load_weights(network, tmp_path / "seven.pth", with_classifier=True)
    assert torch.equal(network.features[0][0].weight, before)
    load_weights(network, tmp_path / "seven.pth")
    assert torch.equal(network.features[0][0].weight, source.features[0][0].weight)
    same = mobilenet_v2(0.35, 7)
    load_weights(same, tmp_path / "seven.pth", with_classifier=True)
    assert torch.equal(same.classifier[1].weight, source.classifier[1].weight)
