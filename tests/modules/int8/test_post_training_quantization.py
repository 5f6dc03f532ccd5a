"""Promises about post-training quantization: what is rounded how, by which range, and how near it comes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from microtune.datamodules.image_folder import ImageFolder
from microtune.modules.int8.activation_ranges import (
    BINS,
    PARTS,
    Histogram,
    estimated_quantization,
    mean_squared_errors,
    quantization_of_range,
)
from microtune.modules.int8.files import read_quantized_network, write_quantized_network
from microtune.modules.int8.graph import Quantization
from microtune.modules.int8.layers import NEAR_ZERO
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.int8.post_training_quantization import (
    calibrate,
    quantize_after_training,
    renormalized,
    weight_scales,
)
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import InvertedResidual, mobilenet_v2
from microtune.modules.networks.pretrained_weights import NORMALIZATION, load_weights
from microtune.modules.user_error import UserError

HALF = ((0.5,), (0.5,))
NETWORKS = {
    "symmetric": {"normalization": NORMALIZATION["symmetric"]},
    "keras": {"padding": "keras", "normalization": NORMALIZATION["keras"]},
    "keras, odd": {"padding": "keras", "normalization": NORMALIZATION["keras"], "size": (33, 35)},
    "head convolution": {"head_convolution": True, "normalization": NORMALIZATION["symmetric"]},
    "grey": {"in_channels": 1, "normalization": HALF},
    "spectrogram": {"in_channels": 1, "normalization": None, "size": (49, 20)},
}
RECTIFIED = ("first_conv", "pointwise1", "depthwise", "feature_mix")


def samples_like(count, channels, size, normalization):
    """Smooth images of whole pixels, normalised, or spectrograms."""
    random = torch.Generator().manual_seed(1)
    images = F.interpolate(torch.rand(count, channels, 5, 5, generator=random), size, mode="bilinear")
    if normalization is None:
        return (images - 0.5) * 4
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in normalization)
    return ((images * 255).round() / 255 - mean) / std


def folded(samples, width=0.1, **arguments):
    """A network whose batch norm has the statistics of the samples, folded."""
    torch.manual_seed(0)
    network = mobilenet_v2(width, num_classes=10, in_channels=samples.shape[1], **arguments)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    nn.init.normal_(network.classifier[1].weight)
    with torch.no_grad():
        network.train()(samples)
    return fold_batch_norm(network.eval(), tuple(samples.shape[1:]))


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    """A network, samples, their normalization, and what is made of them."""
    arguments = dict(NETWORKS[request.param])
    normalization, size = arguments.pop("normalization"), arguments.pop("size", (32, 32))
    samples = samples_like(24, arguments.pop("in_channels", 3), size, normalization)
    network = folded(samples, **arguments)
    calibration = calibrate(network, samples.split(8))
    graph, tensors = quantize_after_training(network, calibration, "a network", normalization=normalization)
    return network, samples, normalization, calibration, graph, tensors


@pytest.fixture(scope="module")
def keras():
    """Samples and a network of Keras' padding, calibrated."""
    samples = samples_like(8, 3, (32, 32), HALF)
    network = folded(samples, padding="keras")
    return network, samples, calibrate(network, [samples])


def convolutions_of(network):
    """In forward order, which is that of the modules."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def loaded(graph, tensors):
    network = QuantizedNetwork(graph).eval()
    load_quantized_tensors(network, tensors)
    return network


def test_weights_are_rounded_to_the_nearest_step_and_the_largest_is_127(case):
    network, _, _, _, graph, tensors = case
    layers = [*zip([name for name, _ in graph.convolutions()], convolutions_of(network), strict=True)]
    for name, layer in (*layers, ("classifier", network.classifier[1])):
        weight = layer.weight.detach().double().numpy()
        integers = tensors[f"{name}.weight"].numpy()
        scales = (abs(weight).reshape(len(weight), -1).max(1) / 127).astype(np.float32)
        scales[scales < NEAR_ZERO * np.median(scales)] = np.nan  # of these another test
        assert np.array_equal(tensors[f"{name}.weight_scales"].numpy(), scales)
        assert np.array_equal(integers, np.rint(weight / scales.reshape(-1, *[1] * (weight.ndim - 1)).astype(float)))
        assert (abs(integers).reshape(len(weight), -1).max(1) == 127).all()


def test_a_bias_is_rounded_after_the_mean_that_the_weights_lost_is_given_back(case):
    """On an input of the measured means, every layer's sum is in int8 what it was, to half a step of the bias."""
    network, _, normalization, calibration, graph, tensors = case
    reads = "input"
    for (name, layer), convolution in zip(graph.convolutions(), convolutions_of(network), strict=True):
        means = calibration.means[reads].view(1, -1, 1, 1).expand(-1, -1, *layer.kernel_size)
        weight, bias = convolution.weight.detach().double(), convolution.bias.detach().double()
        wanted = F.conv2d(means, weight, bias, groups=layer.groups)
        if reads == "input" and normalization is not None:
            means = renormalized(means, normalization, graph.normalization)
        scales = tensors[f"{name}.weight_scales"].double()
        weight = tensors[f"{name}.weight"].double() * scales.view(-1, 1, 1, 1)
        step = scales * layer.input.scale
        got = F.conv2d(means, weight, tensors[f"{name}.bias"].double() * step, groups=layer.groups)
        assert ((got - wanted).abs().flatten() <= step * 0.5001 + 1e-7).all(), name
        reads = name.replace("pointwise2", "addition")
        reads = reads if reads in calibration.means else name
    step = tensors["classifier.weight_scales"].double() * graph.classifier.input.scale
    means, linear = calibration.means[reads], network.classifier[1].double()
    got = (tensors["classifier.weight"].double() @ means) * tensors["classifier.weight_scales"].double()
    got += tensors["classifier.bias"].double() * step
    assert ((got - linear(means)).abs() <= step * 0.5001).all()
    network.float()


def written_by(network):
    """Name in the int8 network and module of every convolution with its activation."""
    yield "first_conv", network.features[0]
    for index, block in enumerate(network.features[1:18]):
        modules = [module for module in block.conv if not isinstance(module, nn.Identity)]
        for name, module in zip(("pointwise1", "depthwise", "pointwise2")[3 - len(modules) :], modules, strict=True):
            yield f"blocks.{index}.{name}", module
    if len(network.features) == 19:
        yield "feature_mix", network.features[18]


def test_every_layer_comes_near_to_what_it_was(case):
    """Layer by layer, each on what it reads in floating point: noise is 25 dB and more below what is computed."""
    network, samples, normalization, _, graph, tensors = case
    int8, seen = loaded(graph, tensors), {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
        for name, module in written_by(network)
    ]
    with torch.no_grad():
        network(samples)
        for hook in hooks:
            hook.remove()
        for name, layer in graph.convolutions():
            given, wanted = seen[name]
            if name == "first_conv" and normalization is not None:
                given = renormalized(given, normalization, graph.normalization)
            low, high = (integer - layer.input.zero_point for integer in (-128, 127))
            integers = (given / layer.input.scale).round().clamp(low, high)
            got = int8.get_submodule(name)(integers) * layer.output.scale
            low, high = ((integer - layer.output.zero_point) * layer.output.scale for integer in (-128, 127))
            noise = (got - wanted.clamp(low, high)).pow(2).mean() / wanted.var()
            assert noise < 0.003, name  # of 0.0019 at most


def test_a_trained_network_computes_in_int8_what_it_did(shared_data):
    data = ImageFolder(shared_data / "flowers17", resolution=96, normalization=NORMALIZATION["keras"], num_workers=0)
    data.setup()
    samples, _ = next(iter(data.val_dataloader()))
    network = mobilenet_v2(0.35, num_classes=17, padding="keras")
    load_weights(network, shared_data / "weights/mobilenet_v2_w035_keras_imagenet_notop.npz")
    network = fold_batch_norm(network, (3, 96, 96)).eval()
    network.classifier = nn.Sequential(nn.Linear(112, 112))
    nn.init.eye_(network.classifier[0].weight)
    nn.init.zeros_(network.classifier[0].bias)  # the classifier gives the features
    graph, tensors = quantize_after_training(network, calibrate(network, [samples]), "x", normalization=HALF)
    with torch.no_grad():
        wanted = network(samples)
        got = loaded(graph, tensors)(renormalized(samples, HALF, graph.normalization))
    noise = (got - wanted).pow(2).mean() / wanted.var(0).mean()
    assert noise < 0.02  # 17 dB; it is 21


def test_the_graph_is_that_of_the_network(case):
    network, samples, _, _, graph, _ = case
    assert (graph.name, graph.input_shape) == ("a network", tuple(samples.shape[1:]))
    described = [layer for _, layer in graph.convolutions()]
    modules = convolutions_of(network)
    assert len(described) == len(modules) == 51 + (graph.feature_mix is not None)
    for layer, module in zip(described, modules, strict=True):
        assert layer.weight_shape == tuple(module.weight.shape)
        assert (layer.stride, layer.groups) == (module.stride, module.groups)
    adds = [block.adds_input for block in network.features if isinstance(block, InvertedResidual)]
    assert [block.addition is not None for block in graph.blocks] == adds
    assert graph.blocks[0].pointwise1 is None


def test_where_relu6_was_the_output_saturates(case):
    _, _, _, calibration, graph, _ = case
    for name, layer in graph.convolutions():
        highest = layer.output.scale * 255
        if name.rpartition(".")[2] in RECTIFIED:
            assert layer.output.zero_point == -128
            assert highest <= min(6, calibration.histograms[name].high) * (1 + 1e-6)
        else:
            assert layer.output.zero_point > -128


def test_the_same_network_and_samples_give_the_same_integers(keras):
    network, samples, _ = keras
    made = [quantize_after_training(network, calibrate(network, samples.split(3)), "x", "mse", HALF) for _ in range(2)]
    assert made[0][0] == made[1][0]
    assert all(torch.equal(made[0][1][name], made[1][1][name]) for name in made[0][1])


def test_calibration_sees_every_value_once_whatever_the_batches(keras):
    network, samples, calibration = keras
    parts = calibrate(network, samples.split(3))
    assert parts.samples == calibration.samples == 8
    outputs = {}
    network.features[1].conv[1].register_forward_hook(lambda *call: outputs.update(projection=call[2]))
    network.features[0].register_forward_hook(lambda *call: outputs.update(first=call[2]))
    with torch.no_grad():
        network(samples)
    for name, values in (
        ("input", samples),
        ("first_conv", outputs["first"]),
        ("blocks.0.pointwise2", outputs["projection"]),
    ):
        histogram = parts.histograms[name]
        low, high = min(0.0, values.min().item()), max(0.0, values.max().item())
        assert (histogram.low, histogram.high) == pytest.approx((low, high), rel=1e-4)
        nonzero = values[values != 0] if low == 0 else values
        assert histogram.counts.sum() == nonzero.numel()
        expected, _ = np.histogram(nonzero.numpy(), BINS, (histogram.low, histogram.high))
        assert abs(histogram.counts - expected).sum() < 0.02 * nonzero.numel()  # PyTorch and numpy differ at edges
        assert torch.allclose(parts.means[name], values.double().mean((0, 2, 3)), atol=1e-5)


def test_calibration_leaves_the_network_as_it_was(keras):
    network, samples, _ = keras
    network.train()
    calibrate(network, [samples])
    assert network.training
    network.eval()
    assert not any(module._forward_hooks for module in network.features[5].modules())


def test_a_device_hands_in_pixels_less_128_where_mean_and_deviation_were_a_half(keras):
    network, _, calibration = keras
    graph, tensors = quantize_after_training(network, calibration, "x", "min_max", HALF)
    assert graph.input == Quantization(1 / 127.5, 0)
    assert graph.normalization == ((128 / 255,) * 3, (0.5,) * 3)
    pixels = torch.arange(256.0).repeat(3).view(1, 3, 16, 16)
    given = renormalized((pixels / 255 - 0.5) / 0.5, HALF, graph.normalization)
    assert torch.equal(loaded(graph, tensors).input(given), pixels - 128)


def test_other_pixels_span_black_to_white(case):
    _, _, normalization, _, graph, _ = case
    if normalization != NORMALIZATION["symmetric"]:
        return
    means, stds = normalization
    darkest = min(-mean / std for mean, std in zip(means, stds, strict=True))
    brightest = max((1 - mean) / std for mean, std in zip(means, stds, strict=True))
    assert graph.input == quantization_of_range(darkest, brightest)
    assert graph.normalization == normalization


def test_a_spectrogram_spans_what_was_seen_and_has_no_normalization():
    samples = samples_like(8, 1, (49, 20), None)
    network = folded(samples)
    calibration = calibrate(network, [samples])
    graph, _ = quantize_after_training(network, calibration, "x", "min_max")
    assert graph.normalization is None
    assert graph.input == quantization_of_range(samples.min().item(), samples.max().item())


def test_keras_pads_behind_even_sizes_and_around_odd_ones(keras):
    network, _, calibration = keras
    graph, _ = quantize_after_training(network, calibration, "x", "min_max", HALF)
    strided = {name: layer.padding for name, layer in graph.convolutions() if layer.stride == (2, 2)}
    assert strided == dict.fromkeys(
        ("first_conv", "blocks.1.depthwise", "blocks.3.depthwise", "blocks.6.depthwise", "blocks.13.depthwise"),
        (0, 1, 0, 1),
    )
    odd = replace(calibration, sizes=dict.fromkeys(calibration.sizes, (33, 32)))
    graph, _ = quantize_after_training(network, odd, "x", "min_max", HALF)
    assert graph.first_conv.padding == (0, 1, 1, 1)
    assert graph.blocks[0].depthwise.padding == (1, 1, 1, 1)
    assert graph.blocks[0].pointwise2.padding == (0, 0, 0, 0)


def test_a_classifier_that_is_fresh_stays_in_floating_point(keras):
    network, _, calibration = keras
    graph, tensors = quantize_after_training(
        network, calibration, "x", "min_max", HALF, class_names=list("abcdefghij"), classifier_is_trained=False
    )
    assert graph.classifier.output is None
    assert graph.class_names == tuple("abcdefghij")
    assert torch.equal(tensors["classifier.weight"], network.classifier[1].weight)
    assert torch.equal(tensors["classifier.bias"], network.classifier[1].bias)
    assert "classifier.weight_scales" not in tensors
    tensors["classifier.weight"].zero_()
    assert network.classifier[1].weight.any()  # it was a copy


def test_logits_are_not_clipped_whatever_the_estimator(keras):
    network, _, calibration = keras
    logits = Histogram(0.0, 100.0, np.r_[np.full(BINS // 10, 1e4), np.zeros(BINS - BINS // 10 - 1), 1])
    assert estimated_quantization(logits, "mse") != quantization_of_range(0.0, 100.0)
    calibration = replace(calibration, histograms=calibration.histograms | {"classifier": logits})
    graph, _ = quantize_after_training(network, calibration, "x", "mse", HALF)
    assert graph.classifier.output == quantization_of_range(0.0, 100.0)


@pytest.mark.parametrize("classifier_is_trained", [True, False])
def test_a_network_in_channels_last_is_written_and_read(keras, tmp_path, classifier_is_trained):
    network, _, calibration = keras
    graph, tensors = quantize_after_training(
        network.to(memory_format=torch.channels_last), calibration, "x", "min_max", HALF,
        classifier_is_trained=classifier_is_trained,
    )  # fmt: skip
    write_quantized_network(tmp_path / "x.safetensors", graph, tensors)
    read_graph, read_tensors = read_quantized_network(tmp_path / "x.safetensors")
    assert read_graph == graph
    assert all(torch.equal(read_tensors[name], tensors[name]) for name in tensors)


FLOATS = st.floats(-1e6, 1e6, width=32)


@given(FLOATS, FLOATS)
def test_zero_is_an_integer_and_a_range_is_held_to_half_a_step(low, high):
    low, high = min(low, high), max(low, high)
    quantization = quantization_of_range(low, high)
    scale, zero_point = quantization.scale, quantization.zero_point
    assert -128 <= zero_point <= 127
    lowest, highest = scale * (-128 - zero_point), scale * (127 - zero_point)
    assert lowest <= 0 <= highest
    assert lowest - scale * 0.501 <= min(low, 0)
    assert lowest <= min(low, 0) + scale * 0.501
    assert max(high, 0) - scale * 0.501 <= highest
    if high - low > 1e-3:
        assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 255)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 6.0, Quantization(6 / 255, -128)),
        (-6.0, 0.0, Quantization(6 / 255, 127)),
        (-1.0, 1.0, Quantization(2 / 255, 0)),  # -0.5, halves to the even number
        (2.0, 5.1, Quantization(5.1 / 255, -128)),
        (0.0, 0.0, Quantization(1 / 255, -128)),
        (0.0, 1e-40, Quantization(1 / 255, -128)),
    ],
)
def test_ranges_worked_by_hand(low, high, expected):
    assert quantization_of_range(low, high) == expected


counts = st.lists(st.integers(0, 50), min_size=4, max_size=40).map(lambda values: np.array(values, np.float64))


@given(st.floats(-10, 0), st.floats(0.01, 10), counts)
@settings(max_examples=30, deadline=None)
def test_the_mse_range_is_never_worse_than_the_whole_one(low, high, values):
    histogram = Histogram(low, high, values)
    if not values.any():
        assert estimated_quantization(histogram, "mse") == estimated_quantization(histogram, "min_max")
        return
    errors = mean_squared_errors(histogram, [estimated_quantization(histogram, one) for one in ("mse", "min_max")])
    assert errors[0] <= errors[1]
    # nor than a range of which one end alone is moved
    moved = [quantization_of_range(low, high * part) for part in PARTS]
    assert errors[0] <= min(mean_squared_errors(histogram, moved))


def test_the_mse_range_clips_an_outlier_and_keeps_an_even_distribution():
    even = Histogram(-1.0, 1.0, np.ones(BINS))
    assert estimated_quantization(even, "mse").scale == pytest.approx(2 / 255, rel=0.02)
    outlier = Histogram(0.0, 100.0, np.r_[np.full(BINS // 10, 1e4), np.zeros(BINS - BINS // 10 - 1), 1])
    assert estimated_quantization(outlier, "min_max") == quantization_of_range(0.0, 100.0)
    assert estimated_quantization(outlier, "mse").scale * 255 < 30


def test_mean_squared_error_worked_by_hand():
    histogram = Histogram(0.0, 2.0, np.array([3.0, 1.0]))
    errors = mean_squared_errors(histogram, [Quantization(1.0, -128), Quantization(0.005, 0), Quantization(0.25, 127)])
    # the middles are 0.5 and 1.5: in steps of 1 they go to the even numbers 0 and 2
    assert errors[0] == 0.25
    # 127 steps of 0.005 are 0.635
    assert errors[1] == pytest.approx((1.5 - 0.635) ** 2 / 4)
    # nothing is above 0
    assert errors[2] == (3 * 0.5**2 + 1.5**2) / 4


def test_a_channel_that_is_switched_off_gets_the_scale_of_the_others():
    weight = torch.tensor([[1.27, 0.1], [1e-9, -2e-9], [-2.54, 0.0], [0.0, 0.0], [0.127, 0.0], [3.81, 0.0]])
    scales = weight_scales(weight)
    assert scales.tolist() == pytest.approx([0.01, 0.01, 0.02, 0.01, 0.001, 0.03])
    assert (scales >= NEAR_ZERO * scales.median()).all()
    assert weight_scales(torch.zeros(3, 2, 1, 1)).tolist() == [1, 1, 1]


def test_a_switched_off_channel_keeps_its_bias_within_32_bits(keras):
    network, _, calibration = keras
    layer = network.features[1].conv[0][0]
    kept = {name: values.clone() for name, values in layer.state_dict().items()}
    with torch.no_grad():
        layer.weight[0], layer.bias[0] = 1e-12, 3.0
        layer.weight[1] = 0
    _, tensors = quantize_after_training(network, calibration, "x", "min_max", HALF)
    layer.load_state_dict(kept)
    assert tensors["blocks.0.depthwise.weight"][:2].any() == torch.tensor(False)
    assert tensors["blocks.0.depthwise.bias"][0].abs() < 2**24


def test_a_bias_that_32_bits_do_not_hold_saturates(keras):
    network, _, calibration = keras
    layer = network.classifier[1]
    kept = layer.bias.detach().clone()
    with torch.no_grad():
        layer.bias[0] = 1e12
    _, tensors = quantize_after_training(network, calibration, "x", "min_max", HALF)
    with torch.no_grad():
        layer.bias.copy_(kept)
    assert tensors["classifier.bias"][0] == 2**31 - 2**24


def test_renormalized_is_what_the_other_normalization_gives():
    pixels = torch.rand(2, 3, 4, 4)
    given, wanted = NORMALIZATION["symmetric"], ((0.3,), (0.7,))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in given)
    assert torch.allclose(renormalized((pixels - mean) / std, given, wanted), (pixels - 0.3) / 0.7, atol=1e-6)


def test_errors(keras):
    network, samples, calibration = keras
    with pytest.raises(UserError, match="the network is a ResNet: only a MobileNetV2 can be quantized"):
        calibrate(resnet18(), [samples])
    with pytest.raises(
        UserError, match=r"batch norm features\.0\.1 is not folded: fold it first, with fold_batch_norm"
    ):
        calibrate(mobilenet_v2(0.1), [samples])
    with pytest.raises(UserError, match=r"batch norm features\.0\.1 is not folded"):
        quantize_after_training(mobilenet_v2(0.1), calibration, "x")
    with pytest.raises(UserError, match="there are no samples to calibrate on: give a few hundred"):
        calibrate(network, [])
    with pytest.raises(UserError, match="estimator is 'max': give one of min_max, mse"):
        quantize_after_training(network, calibration, "x", "max")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite_is_named(keras, value):
    network, samples, _ = keras
    broken = samples.clone()
    broken[0, 0, 3, 3] = value
    with pytest.raises(UserError, match="input is not finite on the samples: give a network that was trained"):
        calibrate(network, [broken])
    assert not any(module._forward_hooks for module in network.features[5].modules())
