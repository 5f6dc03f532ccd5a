"""Promises of a whole int8 network: a device's integers, gradients by hand in float64, the published model's figures.

The reference network below sums in int64 with NumPy and goes back through the layers in float64, one formula each.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.nn import functional as F

from microtune.datamodules.imagenet import ImageNet
from microtune.modules.int8.graph import Quantization, QuantizedConvolution
from microtune.modules.int8.layers import (
    QuantizedAddition,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedMean,
)
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors, quantized_tensors
from microtune.modules.int8.published_networks import read_published_network
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import NetworkOperations, find_operations
from microtune.modules.sparse_update.channel_choice import choose_channels
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

REFERENCE = Path(__file__).parents[4] / "shared" / "reference"
PARTS = ("pointwise1", "depthwise", "pointwise2")
# hypothesis warns of fixtures that are made once for all examples: no test changes these
ONE_FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


@pytest.fixture(scope="module")
def published(shared_data):
    """The int8 network of Lin et al. (2022)."""
    return read_published_network(shared_data / "weights/mbv2-w0.35.pkl")


def build(graph, tensors, num_classes=None) -> QuantizedNetwork:
    torch.manual_seed(0)
    network = QuantizedNetwork(graph, num_classes)
    load_quantized_tensors(network, tensors)
    return network


def photographs(shared_data, graph, resolution, batch_size) -> ImageNet:
    """Codes are pixel - 128, by the graph's normalization."""
    data = ImageNet(
        shared_data / "imagenet",
        resolution,
        batch_size,
        normalization=graph.normalization,
        num_workers=0,
        evaluate_only=True,
    )
    data.setup()
    return data


def some_photographs(shared_data, graph, resolution, count) -> Tensor:
    return next(iter(photographs(shared_data, graph, resolution, batch_size=count).test_dataloader()))[0]


def saturated(rounded, quantization):
    """Whole numbers within int8, less the zero point, and which of them had not saturated."""
    low, high = -128 - quantization.zero_point, 127 - quantization.zero_point
    return rounded.clip(low, high).astype(np.int64), (rounded >= low) & (rounded <= high)


def padded(x: np.ndarray, layer: QuantizedConvolution) -> np.ndarray:
    left, right, top, bottom = layer.padding
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))


def effective_scales(layer: QuantizedConvolution, weight_scales: Tensor) -> np.ndarray:
    scales = weight_scales.numpy().astype(np.float64) * (layer.input.scale / layer.output.scale)
    return scales.astype(np.float32)[:, None, None]


def bias_of(tensors, name) -> np.ndarray:
    """The bias, of which float32 holds the first 24 bits."""
    return tensors[f"{name}.bias"].numpy().astype(np.float32).astype(np.int64)


def convolve(name, layer, tensors, x, trace) -> np.ndarray:
    weight = tensors[f"{name}.weight"].numpy().astype(np.int64).reshape(layer.groups, -1, *layer.weight_shape[1:])
    windows = sliding_window_view(padded(x, layer), layer.kernel_size, axis=(2, 3))
    windows = windows[:, :, :: layer.stride[0], :: layer.stride[1]]
    windows = windows.reshape(len(x), layer.groups, -1, *windows.shape[2:])
    sums = np.einsum("ngihwkl,goikl->ngohw", windows, weight)
    sums = sums.reshape(len(x), -1, *sums.shape[3:]) + bias_of(tensors, name)[:, None, None]
    rounded = np.rint(sums.astype(np.float32) * effective_scales(layer, tensors[f"{name}.weight_scales"]))
    y, passing = saturated(rounded, layer.output)
    trace[name] = (x, passing)
    return y


def run(graph, tensors, x) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of every layer what it reads, in int64, and where its output did not saturate; of the mean, what it reads."""
    trace = {}
    x = convolve("first_conv", graph.first_conv, tensors, x, trace)
    for index, block in enumerate(graph.blocks):
        block_input, read = x, (block.pointwise1 or block.depthwise).input
        for part in PARTS:
            if getattr(block, part) is not None:
                x = convolve(f"blocks.{index}.{part}", getattr(block, part), tensors, x, trace)
        if block.addition is not None:
            ratios = [np.float32(scale / block.addition.scale) for scale in (read.scale, block.pointwise2.output.scale)]
            terms = block_input.astype(np.float32) * ratios[0] + x.astype(np.float32) * ratios[1]
            summed, passing = saturated(np.rint(terms), block.addition)
            trace[f"blocks.{index}.addition"] = (x, passing)
            x = summed
    if graph.feature_mix is not None:
        x = convolve("feature_mix", graph.feature_mix, tensors, x, trace)
    trace["mean"] = (x, None)
    return trace


def mean_of(graph, x) -> np.ndarray:
    """Rounded with its zero point; halves to even."""
    zero_point = graph.classifier.input.zero_point
    # exact: the sums are whole, and IEEE 754 division is rounded correctly
    return np.rint(x.sum((2, 3)) / (x.shape[2] * x.shape[3]) + zero_point) - zero_point


def gradients(graph, tensors, trace, of_features) -> dict[str, Tensor]:
    """Float64 gradients of all weights and biases from the one of the mean's real numbers, layer by layer."""
    found: dict[str, Tensor] = {}
    height, width = trace["mean"][0].shape[2:]
    gradient = of_features[:, :, None, None] * graph.classifier.input.scale / (height * width)
    gradient = gradient.expand(-1, -1, height, width)

    def back(name: str, layer: QuantizedConvolution, gradient: Tensor) -> Tensor:
        x, passing = trace[name]
        effective = torch.from_numpy(effective_scales(layer, tensors[f"{name}.weight_scales"])).double()
        gradient = gradient * torch.from_numpy(passing) * effective
        weight, read = tensors[f"{name}.weight"].double(), torch.from_numpy(padded(x, layer)).double()
        arguments = {"stride": layer.stride, "groups": layer.groups}
        found[f"{name}.bias"] = gradient.sum((0, 2, 3))
        found[f"{name}.weight"] = torch.nn.grad.conv2d_weight(read, weight.shape, gradient, **arguments)
        left, _, top, _ = layer.padding
        of_read = torch.nn.grad.conv2d_input(read.shape, weight, gradient, **arguments)
        return of_read[:, :, top : top + x.shape[2], left : left + x.shape[3]]

    if graph.feature_mix is not None:
        gradient = back("feature_mix", graph.feature_mix, gradient)
    for index, block in reversed(list(enumerate(graph.blocks))):
        of_block_input = 0
        if block.addition is not None:
            gradient = gradient * torch.from_numpy(trace[f"blocks.{index}.addition"][1])
            read = (block.pointwise1 or block.depthwise).input
            of_block_input = gradient * (read.scale / block.addition.scale)
            gradient = gradient * (block.pointwise2.output.scale / block.addition.scale)
        for part in reversed(PARTS):
            if getattr(block, part) is not None:
                gradient = back(f"blocks.{index}.{part}", getattr(block, part), gradient)
        gradient = gradient + of_block_input
    back("first_conv", graph.first_conv, gradient)
    return found


def step_by_hand(graph, tensors, classifier: nn.Linear, codes: np.ndarray, labels: Tensor) -> dict[str, Tensor]:
    """Float64 gradients of the cross entropy of a batch, with a classifier in floating point."""
    trace = run(graph, tensors, codes)
    features = torch.from_numpy(mean_of(graph, trace["mean"][0]) * graph.classifier.input.scale)
    weight, bias = classifier.weight.detach().double(), classifier.bias.detach().double()
    of_logits = (features @ weight.T + bias).softmax(1)
    of_logits = (of_logits - F.one_hot(labels, len(weight))) / len(labels)
    found = gradients(graph, tensors, trace, of_logits @ weight)
    return found | {"classifier.weight": of_logits.T @ features, "classifier.bias": of_logits.sum(0)}


def codes_of(graph, images: Tensor) -> np.ndarray:
    """The integers of real numbers, less the zero point."""
    codes = (images.double() / graph.input.scale).round()
    return saturated(codes.numpy(), graph.input)[0]


def random_images(graph, count, size=32, seed=1) -> Tensor:
    """Real numbers of which the integers are beyond doubt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (count, 3, size, size), generator=generator) * graph.input.scale


def assert_close(found: Tensor, expected: Tensor, what: str, tolerance=1e-4):
    assert found.shape == expected.shape, what
    difference = (found.double() - expected).abs().max()
    assert difference <= tolerance * expected.abs().max(), f"{what}: {difference / expected.abs().max():.2g}"


# --- what it is made of ---


def test_modules_have_the_graph_s_names(small_graph, small_tensors):
    feature_mix = replace(small_graph.blocks[2].pointwise2, in_channels=16, input=small_graph.classifier.input)
    for graph in (small_graph, replace(small_graph, feature_mix=feature_mix)):
        network = QuantizedNetwork(graph)
        convolutions = [name for name, m in network.named_modules() if type(m) is QuantizedConv2d]
        assert convolutions == [name for name, _ in graph.convolutions()]
        additions = [name for name, m in network.named_modules() if type(m) is QuantizedAddition]
        assert additions == ["blocks.1.addition"]
        parts = ("weight", "bias", "weight_scales")
        expected = [f"{name}.{part}" for name in convolutions for part in parts]
        assert list(network.state_dict()) == [*expected, "classifier.weight", "classifier.bias"]
        assert isinstance(network.mean, QuantizedMean)
        assert {name for name, _ in network.named_parameters()} == {
            name for name in network.state_dict() if not name.endswith("weight_scales")
        }


def test_the_classifier_is_in_floating_point_where_it_is_trained(small_graph):
    int8 = replace(small_graph.classifier, output=Quantization(0.1, 3))
    of_int8 = replace(small_graph, classifier=int8)
    assert type(QuantizedNetwork(of_int8).classifier) is QuantizedLinear
    for network, classes in [
        (QuantizedNetwork(small_graph), 10),
        (QuantizedNetwork(small_graph, 7), 7),
        (QuantizedNetwork(of_int8, 7), 7),
        (QuantizedNetwork(of_int8, 10), 10),
    ]:
        assert type(network.classifier) is nn.Linear
        assert network.classifier.weight.shape == (classes, 16)
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


def test_training_mode_computes_the_same(small_graph, small_tensors):
    network, images = build(small_graph, small_tensors), random_images(small_graph, 2)
    assert torch.equal(network.train()(images), network.eval()(images))


# --- the integers ---


def zero_points(graph) -> dict[str, int]:
    """Of what every layer writes."""
    found = {name: layer.output.zero_point for name, layer in graph.convolutions()}
    for index, block in enumerate(graph.blocks):
        if block.addition is not None:
            found[f"blocks.{index}.addition"] = block.addition.zero_point
    return found


def outputs_of_all_layers(network, images) -> dict[str, Tensor]:
    """What every int8 layer writes, and under ``"input"`` what the first one reads."""
    outputs = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, QuantizedConv2d | QuantizedAddition | QuantizedMean):
            hooks.append(module.register_forward_hook(lambda m, x, y, name=name: outputs.__setitem__(name, y)))
        if name == "first_conv":
            hooks.append(module.register_forward_pre_hook(lambda m, x: outputs.__setitem__("input", x[0])))
    with torch.no_grad():
        outputs["logits"] = network(images)
    for hook in hooks:
        hook.remove()
    return outputs


def test_every_layer_of_the_published_network_gives_integers_within_int8(shared_data, published):
    graph, tensors = published
    network = build(graph, tensors)
    outputs = outputs_of_all_layers(network, some_photographs(shared_data, graph, 128, 8))
    points = zero_points(graph) | {"input": graph.input.zero_point}
    assert len(points) == 51 + 10 + 1
    for name, quantization in (("mean", graph.classifier.input), ("logits", graph.classifier.output)):  # real numbers
        integers = (outputs[name] / quantization.scale).round()
        assert torch.equal(integers * quantization.scale, outputs[name])
        outputs[name], points[name] = integers, quantization.zero_point
    assert outputs.keys() == points.keys()
    for name, output in outputs.items():
        integers = output + points[name]
        assert torch.equal(integers, integers.round()), name
        assert -128 <= integers.min() < integers.max() <= 127, name


def test_photographs_come_in_as_pixels_less_128(shared_data, published):
    graph, tensors = published
    images = some_photographs(shared_data, graph, 128, 4)
    data = photographs(shared_data, replace(graph, normalization=((0.0,) * 3, (1 / 255,) * 3)), 128, 4)
    pixels = next(iter(data.test_dataloader()))[0].round()
    assert torch.equal(outputs_of_all_layers(build(graph, tensors), images)["input"], pixels - 128)


def assert_all_layers_equal_the_integer_network(graph, tensors, images):
    network = build(graph, tensors)
    outputs = outputs_of_all_layers(network, images)
    trace = run(graph, tensors, codes_of(graph, images))
    names = list(zero_points(graph))
    assert np.array_equal(outputs["input"].numpy(), trace["first_conv"][0])
    for index, block in enumerate(graph.blocks):
        *_, before, last = [f"blocks.{index}.{part}" for part in PARTS]
        assert np.array_equal(outputs[before].numpy(), trace[last][0]), last
        following = [name for name in names if name.startswith(f"blocks.{index + 1}.")] or ["mean"]
        written = outputs[f"blocks.{index}.addition" if block.addition is not None else last]
        if graph.feature_mix is None or following != ["mean"]:
            assert np.array_equal(written.numpy(), trace[following[0]][0]), following[0]
    features = mean_of(graph, trace["mean"][0])
    assert np.array_equal(outputs["mean"].numpy(), np.float32(features) * np.float32(graph.classifier.input.scale))
    return network, features, outputs["logits"]


def test_the_published_network_is_the_integer_network_to_the_last_bit(shared_data, published):
    graph, tensors = published
    images = some_photographs(shared_data, graph, 128, 2)
    _, features, logits = assert_all_layers_equal_the_integer_network(graph, tensors, images)
    classifier = graph.classifier
    sums = features.astype(np.int64) @ tensors["classifier.weight"].numpy().astype(np.int64).T
    sums += tensors["classifier.bias"].numpy()
    ratio = classifier.input.scale / classifier.output.scale
    effective = tensors["classifier.weight_scales"].numpy().astype(np.float64) * ratio
    rounded = np.rint(sums.astype(np.float32) * effective.astype(np.float32))
    expected, _ = saturated(rounded, classifier.output)
    assert np.array_equal(logits.numpy(), np.float32(expected) * np.float32(classifier.output.scale))


@pytest.mark.parametrize("size", [32, 33, 17, 4])
@pytest.mark.parametrize("with_feature_mix", [False, True])
def test_the_small_network_is_the_integer_network_to_the_last_bit(small_graph, small_tensors, size, with_feature_mix):
    graph, tensors = small_graph, dict(small_tensors)
    if with_feature_mix:
        last = Quantization(6 / 255, -128)
        mix = replace(graph.blocks[2].pointwise2, in_channels=16, input=graph.classifier.input, output=last)
        graph = replace(graph, feature_mix=mix, classifier=replace(graph.classifier, input=last))
        for part in ("weight", "bias", "weight_scales"):
            tensors[f"feature_mix.{part}"] = tensors[f"blocks.2.pointwise2.{part}"]
        tensors["feature_mix.weight"] = tensors["feature_mix.weight"][:, :16]
    images = random_images(graph, 3, size)
    network, features, logits = assert_all_layers_equal_the_integer_network(graph, tensors, images)
    real = torch.from_numpy(features * graph.classifier.input.scale)
    expected = real @ network.classifier.weight.double().T + network.classifier.bias.double()
    assert_close(logits, expected.detach(), "logits", 1e-5)


def test_published_accuracy(shared_data, published):
    graph, tensors = published
    network = build(graph, tensors).eval()
    found = []
    with torch.no_grad():
        for images, labels in photographs(shared_data, graph, 128, batch_size=50).test_dataloader():
            found.append(network(images).topk(5).indices == labels[:, None])
    found = torch.cat(found)
    top1, top5 = 100 * found[:, 0].double().mean(), 100 * found.any(1).double().mean()
    print(f"int8 MobileNetV2-0.35 of Lin et al., {len(found)} ImageNet images, 128 px: {top1:.1f} / {top5:.1f} %")
    assert len(found) == 1000
    assert top1 == pytest.approx(50.7, abs=0.5)
    assert top5 == pytest.approx(74.8, abs=0.5)


# --- in and out ---


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_network_gives_back_what_was_put_in(small_graph, small_tensors):
    graph, tensors = quantized_tensors(build(small_graph, small_tensors))
    assert graph == small_graph
    assert_equal(tensors, small_tensors)


def test_the_published_network_is_given_back_as_it_is(published):
    """Its biases of up to 28 bits too: float32 holds each of them, as the code that made them did."""
    graph, tensors = published
    found_graph, found = quantized_tensors(build(graph, tensors))
    assert found_graph == graph
    assert_equal(found, tensors)
    assert max(tensor.abs().max() for name, tensor in tensors.items() if name.endswith(".bias")) > 2**27


@settings(max_examples=50, **ONE_FIXTURE)
@given(data=st.data())
def test_any_bias_is_given_back_with_24_bits_and_room_for_the_sum(small_graph, small_tensors, data):
    """Float32 holds 24 significant bits, and a sum of products has room between the largest bias and 32 bits."""
    limit = 2**31 - 2**24
    special = [-(2**31), 2**31 - 1, -limit, limit, limit + 1, 2**24, 2**24 + 1, 2**25 + 3, -(2**24) - 1, 0]
    numbers = st.integers(-(2**31), 2**31 - 1) | st.sampled_from(special)
    bias = data.draw(st.lists(numbers, min_size=8, max_size=8))
    bias_tensor = {"first_conv.bias": torch.tensor(bias, dtype=torch.int32)}
    network = build(small_graph, small_tensors | bias_tensor)
    expected = small_tensors | {"first_conv.bias": torch.tensor(bias).float().clamp(-limit, limit).to(torch.int32)}
    _, found = quantized_tensors(network)
    assert_equal(found, expected)
    # what is given back computes the same
    images = random_images(small_graph, 1)
    if max(map(abs, bias)) <= limit:
        assert torch.equal(build(small_graph, found)(images), network(images))


def test_weights_beyond_int8_are_limited_and_not_wrapped(small_graph, small_tensors):
    """A training without limits may leave some."""
    network = build(small_graph, small_tensors)
    with torch.no_grad():
        network.first_conv.weight[0, 0] = torch.tensor([[200.0, -200, 127.6], [-128.6, 127.4, 1e6], [-1e6, 0.4, -0.4]])
        network.first_conv.bias[:2] = torch.tensor([1e12, -1e12])
    _, found = quantized_tensors(network)
    expected = [[127, -128, 127], [-128, 127, 127], [-128, 0, 0]]
    assert found["first_conv.weight"][0, 0].tolist() == expected
    assert found["first_conv.bias"][0] >= 2**31 - 2**24
    assert found["first_conv.bias"][1] <= -(2**31 - 2**24)


def test_a_classifier_of_other_classes_is_given_back_in_floating_point(small_graph, small_tensors):
    graph = replace(small_graph, class_names=tuple("abcdefghij"))
    network = build(graph, small_tensors, num_classes=7)
    found_graph, tensors = quantized_tensors(network)
    assert (found_graph.classifier.classes, found_graph.classifier.output) == (7, None)
    assert torch.equal(tensors["classifier.weight"], network.classifier.weight)
    images = random_images(graph, 2)
    assert torch.equal(build(found_graph, tensors)(images), network(images))


def test_a_trained_classifier_takes_the_real_values_of_an_int8_one(shared_data, published):
    graph, tensors = published
    images = some_photographs(shared_data, graph, 128, 4)
    logits, int8_logits = (build(graph, tensors, classes)(images).detach() for classes in (1000, None))
    scale, zero_point = graph.classifier.output.scale, graph.classifier.output.zero_point
    within = (int8_logits > scale * (-128 - zero_point)) & (int8_logits < scale * (127 - zero_point))
    assert within.sum() > 3000
    assert ((logits - int8_logits)[within].abs() <= scale / 2 * 1.0001).all()


def test_a_copy_and_a_state_dict_are_the_network(small_graph, small_tensors):
    network, images = build(small_graph, small_tensors), random_images(small_graph, 2)
    other = QuantizedNetwork(small_graph)
    other.load_state_dict(network.state_dict())
    expected = network(images)
    assert torch.equal(other(images), expected)
    assert torch.equal(copy.deepcopy(network)(images), expected)


REFUSED = "^an int8 network is simulated in float32, whose whole numbers are exact: precision 32-true$"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_precision_is_refused(small_graph, small_tensors, dtype):
    images = random_images(small_graph, 1).to(dtype)
    for network in (build(small_graph, small_tensors), build(small_graph, small_tensors).to(dtype)):
        with pytest.raises(UserError, match=REFUSED):
            network(images)


def test_autocast_is_refused(small_graph, small_tensors):
    network, images = build(small_graph, small_tensors), random_images(small_graph, 1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=REFUSED):
        network(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert network(images).isfinite().all()


# --- gradients of one step ---


def named_gradients(network) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_gradients_of_the_published_network_are_those_by_hand(shared_data, published):
    graph, tensors = published
    images, labels = some_photographs(shared_data, graph, 64, 2), torch.tensor([3, 8])
    network = build(graph, tensors, num_classes=10)
    F.cross_entropy(network(images), labels).backward()
    expected = step_by_hand(graph, tensors, network.classifier, codes_of(graph, images), labels)
    found = named_gradients(network)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 51 + 2
    for name, gradient in expected.items():
        assert_close(found[name], gradient, name)
        assert gradient.any(), name


def test_gradients_under_a_scheme_are_slices_of_those_by_hand(shared_data, published):
    """The published 99 KB scheme: whole layers, sub-tensors, and biases alone; nothing else gets a gradient."""
    graph, tensors = published
    images, labels = some_photographs(shared_data, graph, 64, 2), torch.tensor([3, 8])
    network = build(graph, tensors, num_classes=10)
    operations = find_operations(network, (3, 64, 64))
    scheme = published_schemes(operations)["99KB"][0]
    channels = choose_channels(network, scheme, operations.convolutions)
    expected = step_by_hand(graph, tensors, network.classifier, codes_of(graph, images), labels)
    AppliedScheme(network, scheme, operations, channels)
    F.cross_entropy(network(images), labels).backward()
    names = {"classifier.weight", "classifier.bias"}
    for name in [convolution.name for convolution in operations.convolutions[-scheme.bias_depth :]]:
        assert_close(network.get_submodule(name).bias.grad, expected[f"{name}.bias"], name)
        names.add(f"{name}.bias")
        if name in channels:
            full = expected[f"{name}.weight"]
            assert full.shape[1] > 1, "the scheme updates pointwise layers only"
            slices = full[:, channels[name]].transpose(0, 1)
            assert_close(network.get_submodule(name).weight_slice.grad, slices, name)
            names.add(f"{name}.weight_slice")
    for name in ("weight", "bias"):
        assert_close(getattr(network.classifier, name).grad, expected[f"classifier.{name}"], name)
    assert named_gradients(network).keys() == names


@settings(max_examples=15, **ONE_FIXTURE)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([16, 32, 21]))
def test_gradients_of_the_small_network_are_those_by_hand(small_graph, small_tensors, seed, size):
    images, labels = random_images(small_graph, 2, size, seed), torch.tensor([seed % 10, seed // 10 % 10])
    network = build(small_graph, small_tensors)
    F.cross_entropy(network(images), labels).backward()
    expected = step_by_hand(small_graph, small_tensors, network.classifier, codes_of(small_graph, images), labels)
    found = named_gradients(network)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, name)


# --- accounts of memory ---


def published_schemes(operations: NetworkOperations) -> dict[str, tuple[UpdateScheme, float]]:
    """Label to scheme, for a network of the published layers, and its extra memory in bytes."""
    path = REFERENCE / "mbv2-w0.35_extra_memory.json"
    if not path.exists():
        pytest.skip(f"the published schemes {path.name} are not beside the project")
    schemes = {}
    for entry in json.loads(path.read_text()):
        weights = {operations.convolutions[int(index)].name: ratio for index, ratio in entry["weights"].items()}
        schemes[entry["scheme"]] = (UpdateScheme("", entry["bias_depth"], weights), entry["extra_memory_bytes"])
    return schemes


@pytest.fixture(scope="module")
def both_operations(published) -> tuple[NetworkOperations, NetworkOperations]:
    """Of the published int8 network and of this project's in floating point, at 128 px with 10 classes."""
    int8 = find_operations(build(*published, num_classes=10), (3, 128, 128))
    fp32 = find_operations(fold_batch_norm(mobilenet_v2(0.35, num_classes=10), (3, 128, 128)), (3, 128, 128))
    return int8, fp32


def test_extra_memory_of_the_int8_network_is_the_published_figure_to_the_byte(both_operations):
    int8, _ = both_operations
    schemes = published_schemes(int8)
    assert len(schemes) == 10
    computed = {
        label: extra_memory_bytes(int8.convolutions, int8.classifier_features, scheme)
        for label, (scheme, _) in schemes.items()
    }
    assert computed == {label: published_bytes for label, (_, published_bytes) in schemes.items()}


def test_operations_are_those_of_the_network_in_floating_point(both_operations):
    """But for names, for which outputs saturate, and for a mean that is a row at once."""
    int8, fp32 = both_operations
    assert [shape + (1, 1) * (shape == (112,)) for shape in int8.tensors] == list(fp32.tensors)
    assert [replace(c, name="") for c in int8.convolutions] == [replace(c, name="") for c in fp32.convolutions]
    for ours, theirs in zip(int8.operations, fp32.operations, strict=True):
        assert (ours.kind, ours.inputs, ours.output, ours.layer) == (
            theirs.kind,
            theirs.inputs,
            theirs.output,
            theirs.layer,
        )
        assert ours.is_quantized is (ours.kind in ("convolution", "addition"))
    assert (int8.classifier_features, int8.classifier_classes) == (112, 10)
    names = [convolution.name for convolution in int8.convolutions]
    assert names[:4] == ["first_conv", "blocks.0.depthwise", "blocks.0.pointwise2", "blocks.1.pointwise1"]
    assert int8.classifier_name == "classifier"


@settings(max_examples=30, **ONE_FIXTURE)
@given(data=st.data())
def test_peak_memory_is_that_of_the_network_in_floating_point(both_operations, data):
    """By a microcontroller's account both are int8."""
    depth = data.draw(st.integers(0, 51))
    layers = data.draw(st.sets(st.integers(51 - depth, 50), max_size=depth)) if depth else set()
    ratios = {layer: data.draw(st.sampled_from([0.125, 0.25, 0.5, 1.0])) for layer in sorted(layers)}
    reordering, state = data.draw(st.booleans()), data.draw(st.sampled_from(["none", "momentum", "adam"]))
    timelines = []
    for operations in both_operations:
        scheme = UpdateScheme("", depth, {operations.convolutions[index].name: r for index, r in ratios.items()})
        memory = PeakMemory(operations, reordering=reordering, optimizer_state=state)
        timelines.append(memory.timeline(scheme).total_bytes)
        assert memory.peak_bytes(scheme) == timelines[-1].max()
    assert np.array_equal(*timelines)
