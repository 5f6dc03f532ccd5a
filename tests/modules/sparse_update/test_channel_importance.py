"""Promises of the scores: equal to autograd's, sample by sample; true to first order; and a network left as it was."""

import copy
import itertools
import math
import re
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from microtune.modules.int8.layers import QuantizedConv2d, saturate, straight_through_round
from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.networks.mobilenet_v2 import build_network
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update import channel_importance
from microtune.modules.sparse_update.channel_importance import (
    LayerImportance,
    measure_importance,
    random_scores,
    summed_cross_entropy,
    weight_norm_scores,
)
from microtune.modules.sparse_update.int8_update import quantized_parameters, scale_gradients
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

CRITERIA = ("weight_norm", "gradient_norm", "fisher", "taylor", "loss_decrease", "activation_norm", "random")
MEASURED = [field.name for field in fields(LayerImportance)]
EXACT = 1e-9  # of networks in float64
SINGLE = 2e-5  # of int8 ones, whose gradients are float32
NO_SAMPLES = "channels are chosen by training samples, and there are none: give at least one batch"
NOT_REACHED = "the weight of {} does not reach the loss, so that it has no gradient: leave it out"


# ---- networks, and what autograd says of them, one sample at a time


def small_network(inplace=True) -> nn.Sequential:
    """Ordinary, depthwise, grouped and pointwise convolutions of 8 px in float64, with biases and without."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.ReLU6(inplace=inplace),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU6(inplace=inplace),
        nn.Conv2d(8, 6, 3, padding="same", padding_mode="reflect", groups=2),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(6, 5, 1),
        nn.Flatten(),
        nn.Linear(80, 4),
    ).double()


def batch_of(count, shape=(3, 8, 8), classes=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.rand(count, *shape, generator=generator, dtype=dtype) * 2 - 1
    return samples, torch.randint(0, classes, (count,), generator=generator)


def int8_network(graph, tensors) -> QuantizedNetwork:
    network = QuantizedNetwork(graph)
    load_quantized_tensors(network, tensors)
    return network


def int8_batch(count, seed=0):
    return batch_of(count, (3, 32, 32), 10, seed, torch.float32)


def convolutions_of(network, shape=(3, 8, 8)):
    return find_operations(network, shape).convolutions


def weights_of_channel(weight, layer, channel):
    """The weights that read one input channel, written without the function under test."""
    group, position = divmod(channel, layer.in_channels // layer.groups)
    outputs = layer.out_channels // layer.groups
    return weight[..., group * outputs : (group + 1) * outputs, position, :, :]


def each_channel(weight, layer):
    """Those of all input channels: (..., in, out / groups, kernel height, kernel width)."""
    return torch.stack([weights_of_channel(weight, layer, c) for c in range(layer.in_channels)], dim=-4)


def by_autograd(network, names, batch):
    """Per layer: gradients of weight (N, ...) and bias (N, out) of each sample's loss, and the inputs (N, ...)."""
    network = copy.deepcopy(network).eval().requires_grad_(True)
    layers = {name: network.get_submodule(name) for name in names}
    found = {name: ([], [], []) for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, given, name=name: found[name][2].append(given[0].detach()[0].clone()))
    for sample, label in zip(*batch, strict=True):
        network.zero_grad()
        F.cross_entropy(network(sample[None]), label[None]).backward()
        for name, layer in layers.items():
            found[name][0].append(layer.weight.grad)
            found[name][1].append(torch.zeros(layer.out_channels) if layer.bias is None else layer.bias.grad)
    return {name: (layer, *(torch.stack(one).double() for one in found[name])) for name, layer in layers.items()}


def expected_of(layer, gradients, bias_gradients, inputs) -> dict[str, torch.Tensor]:
    """Every score by its formula."""
    weight, of_channels = layer.weight.detach().double(), each_channel(gradients, layer)
    gradient = of_channels.mean(0)
    whitened = gradient.square()
    if isinstance(layer, QuantizedConv2d):
        scales = layer.weight_scales.double()
        squares = each_channel((gradients.mean(0) / scales.view(-1, 1, 1, 1)).square(), layer)
        trained = (scales >= 0.01 * scales.median()).double().view(-1, 1, 1, 1).expand_as(layer.weight)
        whitened = squares * each_channel(trained, layer)
    return {
        "weight_norm": each_channel(weight, layer).square().sum((1, 2, 3)).sqrt(),
        "gradient_norm": gradient.square().sum((1, 2, 3)).sqrt(),
        "fisher": of_channels.square().sum((2, 3, 4)).mean(0),
        "taylor": (of_channels * each_channel(weight, layer)).sum((2, 3, 4)).square().mean(0),
        "loss_decrease": whitened.sum((1, 2, 3)),
        "activation_norm": inputs.square().sum((2, 3)).mean(0).sqrt(),
        "gradient": gradient,
        "bias_gradient": bias_gradients.mean(0),
    }


def assert_close(found, expected, tolerance):
    assert found.dtype == torch.float64
    assert found.device.type == "cpu"
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def assert_as_autograd(network, importance, batch, tolerance):
    reference = by_autograd(network, importance.layers, batch)
    assert importance.samples == len(batch[1])
    for name, found in importance.layers.items():
        expected = expected_of(*reference[name])
        layer = reference[name][0]
        outputs = layer.out_channels // layer.groups
        shape = (layer.groups, layer.in_channels // layer.groups, outputs, *layer.kernel_size)
        assert found.gradient.shape == found.step.shape == shape
        assert_close(found.gradient.flatten(0, 1), expected["gradient"], tolerance)
        assert_close(found.bias_gradient, expected["bias_gradient"], tolerance)
        for criterion in CRITERIA[:-1]:
            assert_close(importance.scores(criterion)[name], expected[criterion], tolerance)


def assert_equal_importance(found, expected, tolerance=0.0):
    assert found.samples == expected.samples
    assert list(found.layers) == list(expected.layers)
    for name, measured in itertools.product(found.layers, MEASURED):
        assert_close(getattr(found.layers[name], measured), getattr(expected.layers[name], measured), tolerance)


# ---- exact, of floating point


@st.composite
def networks(draw):
    """A convolution of any kind behind another one, and samples for the two."""
    groups, group_channels, group_outputs = draw(
        st.sampled_from([(1, 3, 2), (1, 1, 4), (4, 1, 1), (3, 1, 2), (2, 2, 3), (3, 2, 1)])
    )
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, dilation, stride = draw(pair), draw(pair), draw(pair)
    padding = draw(st.sampled_from(["same", "valid"]) | st.tuples(st.integers(0, 2), st.integers(0, 2)))
    stride = (1, 1) if padding == "same" else stride
    size = draw(st.tuples(st.integers(7, 9), st.integers(7, 9)))  # more than any kernel and any padding
    channels = groups * group_channels
    torch.manual_seed(draw(st.integers(0, 2**32)))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    bias = draw(st.booleans())
    convolution = nn.Conv2d(
        channels, groups * group_outputs, kernel, stride, padding, dilation, groups, bias, padding_mode=mode
    )
    inplace = draw(st.booleans())
    activation = draw(st.sampled_from([nn.SiLU(inplace), nn.ReLU6(inplace), nn.Identity()]))
    network = nn.Sequential(
        nn.Conv2d(2, channels, 1, bias=draw(st.booleans())), activation, convolution, activation, nn.Flatten()
    )
    with torch.no_grad():
        features = network(torch.zeros(1, 2, *size)).shape[1]
    network = network.append(nn.Linear(features, 3)).double()
    samples, labels = batch_of(draw(st.integers(1, 4)), (2, *size), 3, draw(st.integers(0, 99)))
    if draw(st.booleans()):
        samples, network = (one.to(memory_format=torch.channels_last) for one in (samples, network))
    return network, (samples, labels)


@settings(max_examples=60, deadline=None)
@given(networks(), st.sampled_from([1, 100, channel_importance.ELEMENTS_AT_ONCE]))
def test_of_any_convolution_all_is_as_autograd_says_sample_by_sample(case, elements_at_once):
    network, batch = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel_importance, "ELEMENTS_AT_ONCE", elements_at_once)
        importance = measure_importance(network, convolutions_of(network, batch[0].shape[1:]), [batch])
    assert_as_autograd(network, importance, batch, EXACT)


def test_steps_are_gradients_in_floating_point():
    network = small_network()
    importance = measure_importance(network, convolutions_of(network), [batch_of(3)])
    for layer in importance.layers.values():
        assert torch.equal(layer.step, layer.gradient)
        assert torch.equal(layer.bias_step, layer.bias_gradient)
        assert layer.bias_loss_decrease == pytest.approx(float(layer.bias_gradient.square().sum()), rel=EXACT)
    assert not importance.layers["0"].bias_gradient.any()  # it has none
    assert importance.layers["2"].bias_gradient.any()


def test_in_place_activations_change_nothing():
    convolutions, batch = convolutions_of(small_network()), batch_of(3)
    in_place, apart = (measure_importance(small_network(inplace), convolutions, [batch]) for inplace in (True, False))
    assert_equal_importance(in_place, apart)


def test_mobilenet_v2_by_autograd():
    network = build_network(width=0.35, num_classes=10, folded=True).double()
    convolutions = convolutions_of(network, (3, 32, 32))
    samples, labels = batch = batch_of(2, (3, 32, 32), 10)
    importance = measure_importance(network, convolutions, [batch])
    assert list(importance.layers) == [convolution.name for convolution in convolutions]
    assert len(convolutions) == 51
    for criterion in CRITERIA:
        for (name, scores), convolution in zip(importance.scores(criterion).items(), convolutions, strict=True):
            assert name == convolution.name
            assert scores.shape == (convolution.in_channels,)
            assert scores.isfinite().all()
            assert (scores >= 0).all()
    network.eval().zero_grad()
    F.cross_entropy(network(samples), labels).backward()
    for name, layer in importance.layers.items():
        of_channels = each_channel(network.get_submodule(name).weight.grad, network.get_submodule(name))
        assert of_channels.any()
        assert_close(layer.gradient.flatten(0, 1), of_channels, 1e-8)  # 51 layers of rounding
        assert_close(layer.bias_gradient, network.get_submodule(name).bias.grad, 1e-8)


def test_padding_that_was_changed_after_the_layer_was_made():
    network = build_network(width=0.1, num_classes=4, padding="keras", folded=True).double()
    convolutions, batch = convolutions_of(network, (3, 32, 32))[:12], batch_of(2, (3, 32, 32))
    assert sum(convolution.in_size != convolution.padded_size for convolution in convolutions) == 3
    assert_as_autograd(network, measure_importance(network, convolutions, [batch]), batch, 1e-8)


# ---- exact, of int8


def test_int8_layers_are_as_autograd_sees_their_integers(small_graph, small_tensors):
    network, batch = int8_network(small_graph, small_tensors), int8_batch(3)
    convolutions = convolutions_of(network, (3, 32, 32))
    assert [network.get_submodule(c.name).outer_padding for c in convolutions].count(None) == 8  # one is asymmetric
    importance = measure_importance(network, convolutions, [batch])
    assert_as_autograd(network, importance, batch, SINGLE)
    assert all(scores.any() for scores in importance.scores("taylor").values())


def test_int8_layers_while_their_latent_weights_are_no_whole_numbers(small_graph, small_tensors):
    network, batch = int8_network(small_graph, small_tensors), int8_batch(2)
    with torch.no_grad():
        for convolution in convolutions_of(network, (3, 32, 32)):
            for parameter in network.get_submodule(convolution.name).parameters():
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    importance = measure_importance(network, convolutions_of(network, (3, 32, 32)), [batch])
    assert_as_autograd(network, importance, batch, SINGLE)


def test_int8_steps_are_those_of_quantization_aware_scaling(small_graph, small_tensors):
    name = "blocks.1.depthwise"
    small_tensors[f"{name}.weight_scales"][[2, 5]] *= 1e-4
    small_tensors["blocks.2.pointwise2.weight_scales"][3] *= 1e-3
    network, (samples, labels) = int8_network(small_graph, small_tensors), int8_batch(3)
    convolutions = convolutions_of(network, (3, 32, 32))
    importance = measure_importance(network, convolutions, [(samples, labels)])
    network.eval()
    F.cross_entropy(network(samples), labels).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    scale_gradients(quantized_parameters(network))
    for convolution in convolutions:
        found, layer = importance.layers[convolution.name], network.get_submodule(convolution.name)
        step, bias_step = layer.weight.grad.double(), layer.bias.grad.double()
        products = gradients[f"{convolution.name}.weight"].double() * step
        assert_close(found.step.flatten(0, 1), each_channel(step, layer), SINGLE)
        assert_close(found.bias_step, bias_step, SINGLE)
        assert_close(found.loss_decrease, each_channel(products, layer).sum((1, 2, 3)), SINGLE)
        of_bias = (gradients[f"{convolution.name}.bias"].double() * bias_step).sum()
        assert found.bias_loss_decrease == pytest.approx(float(of_bias), rel=SINGLE)
    found = importance.layers[name]
    assert found.gradient[[2, 5]].any()
    assert not found.step[[2, 5]].any()
    assert found.loss_decrease[[2, 5]].tolist() == [0, 0]  # of a depthwise layer these are all weights of the channel
    assert importance.layers["blocks.2.pointwise2"].loss_decrease.any()
    assert not importance.layers["blocks.2.pointwise2"].step[0, :, 3].any()


class RealTwin(nn.Module):
    """An int8 convolution of real weights and a real bias."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.in_scale, self.out_scale = layer.description.input.scale, layer.description.output.scale
        scales = layer.weight_scales.double()
        self.real_weight = nn.Parameter(layer.weight.detach().double() * scales.view(-1, 1, 1, 1))
        self.real_bias = nn.Parameter(layer.bias.detach().double() * scales * self.in_scale)

    def forward(self, x):
        real = self.layer._conv_forward(self.layer.padded(x).double() * self.in_scale, self.real_weight, self.real_bias)
        rounded = straight_through_round(real / self.out_scale)
        _, saturated = saturate(rounded.detach().clone(), self.layer.low, self.layer.high)
        return torch.where(saturated, rounded.detach().clamp(self.layer.low, self.layer.high), rounded).float()


@pytest.mark.parametrize("name", ["blocks.0.depthwise", "blocks.1.pointwise1", "blocks.2.depthwise"])
def test_int8_loss_decrease_is_that_of_the_real_weights(small_graph, small_tensors, name):
    network, (samples, labels) = int8_network(small_graph, small_tensors), int8_batch(3)
    importance = measure_importance(network, convolutions_of(network, (3, 32, 32)), [(samples, labels)])
    layer, logits = network.get_submodule(name), network.eval()(samples)
    network.set_submodule(name, twin := RealTwin(layer))
    assert torch.equal(network(samples), logits)
    F.cross_entropy(network(samples), labels).backward()
    of_channels = each_channel(twin.real_weight.grad, layer).square().sum((1, 2, 3))
    assert_close(importance.layers[name].loss_decrease, of_channels, SINGLE)
    of_bias = float(twin.real_bias.grad.square().sum())
    assert importance.layers[name].bias_loss_decrease == pytest.approx(of_bias, rel=SINGLE)


# ---- true


@pytest.mark.parametrize("name", ["0", "2", "4", "6"])
def test_a_step_on_one_layer_lowers_the_loss_by_its_score(name):
    network, (samples, labels) = small_network(), batch_of(6)
    importance = measure_importance(network, convolutions_of(network), [(samples, labels)])
    layer = network.get_submodule(name).requires_grad_(True)
    weight, rate = layer.weight.detach().clone(), 1e-6

    @torch.no_grad()
    def loss_at(weights):
        layer.weight.copy_(weights)
        return float(F.cross_entropy(network(samples), labels))

    F.cross_entropy(network(samples), labels).backward()
    torch.optim.SGD([layer.weight], lr=rate).step()
    step = layer.weight.detach() - weight
    decrease = (loss_at(weight - step) - loss_at(weight + step)) / 2  # of both sides: without the second order
    scores = importance.scores("loss_decrease")[name]
    assert decrease / rate == pytest.approx(float(scores.sum()), rel=1e-5)
    for channel in range(layer.in_channels):
        of_channel = torch.zeros_like(step)
        weights_of_channel(of_channel, layer, channel).copy_(weights_of_channel(step, layer, channel))
        decrease = (loss_at(weight - of_channel) - loss_at(weight + of_channel)) / 2
        assert decrease / rate == pytest.approx(float(scores[channel]), rel=1e-4, abs=1e-6 * float(scores.max()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["0", "2", "4", "6"])
def test_taylor_is_the_change_of_a_samples_loss_when_a_channel_fades(name):
    network, (samples, labels) = small_network(), batch_of(3)
    scores = measure_importance(network, convolutions_of(network), [(samples, labels)]).scores("taylor")[name]
    layer, epsilon = network.get_submodule(name), 1e-5
    weight = layer.weight.clone()
    for channel in range(layer.in_channels):
        losses = []
        for factor in (1 + epsilon, 1 - epsilon):
            layer.weight.copy_(weight)
            weights_of_channel(layer.weight, layer, channel).mul_(factor)
            losses.append(F.cross_entropy(network(samples), labels, reduction="none"))
        changes = (losses[0] - losses[1]) / (2 * epsilon)
        expected = float(changes.square().mean())
        assert float(scores[channel]) == pytest.approx(expected, rel=1e-5, abs=1e-8 * float(scores.max()))


def test_scores_of_weights_and_by_chance_need_no_samples():
    network, batch = small_network(), batch_of(2)
    importance = measure_importance(network, convolutions_of(network), [batch])
    for name, layer in importance.layers.items():
        module = network.get_submodule(name)
        assert torch.equal(weight_norm_scores(module.weight, module.groups), layer.weight_norm)
        for seed in (0, 1):
            by_chance = random_scores(name, module.in_channels, seed)
            assert torch.equal(importance.scores("random", seed)[name], by_chance)
            assert by_chance.dtype == torch.float64
            assert sorted(by_chance.tolist()) == list(range(1, module.in_channels + 1))  # an order
    of_seeds = [torch.cat(list(importance.scores("random", seed).values())) for seed in (0, 1)]
    assert not torch.equal(*of_seeds)


# ---- which samples, which layers


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(7)), st.lists(st.integers(1, 6), max_size=4).map(sorted))
def test_neither_order_nor_batches_matter(order, cuts):
    network, (samples, labels) = small_network(), batch_of(7)
    convolutions = convolutions_of(network)
    batches = [(samples[part], labels[part]) for part in torch.tensor(order).tensor_split(cuts)]
    found = measure_importance(network, convolutions, iter(batches))
    assert_equal_importance(found, measure_importance(network, convolutions, [(samples, labels)]), EXACT)


def test_the_last_layers_alone_have_the_same_scores_and_spare_the_backward_pass_before():
    network, batch = small_network(), batch_of(3)
    convolutions = convolutions_of(network)
    everything = measure_importance(network, convolutions, [batch])
    for count in (1, 2, 3):
        asked = convolutions[-count:]
        seen, before = [], convolutions[-count - 1].name
        see = network.get_submodule(before).register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        last = measure_importance(network, asked, [batch])
        see.remove()
        assert [output.requires_grad for output in seen] == [False]
        assert list(last.layers) == [c.name for c in asked]
        for name in last.layers:
            for measured in MEASURED:
                assert torch.equal(getattr(last.layers[name], measured), getattr(everything.layers[name], measured))


def test_layers_in_between_may_be_left_out():
    network, batch = small_network(), batch_of(3)
    convolutions = convolutions_of(network)
    some = measure_importance(network, [convolutions[0], convolutions[2]], [batch])
    everything = measure_importance(network, convolutions, [batch])
    assert list(some.layers) == ["0", "4"]
    for name in some.layers:
        assert torch.equal(some.layers[name].fisher, everything.layers[name].fisher)


def test_any_loss_that_is_summed_over_the_samples():
    network, (samples, labels) = small_network(), batch_of(4)
    importance = measure_importance(
        network, convolutions_of(network), [(samples, labels)], lambda net, batch: 3 * summed_cross_entropy(net, batch)
    )
    plain = measure_importance(network, convolutions_of(network), [(samples, labels)])
    for name in plain.layers:
        assert_close(importance.layers[name].gradient, 3 * plain.layers[name].gradient, EXACT)
        assert_close(importance.layers[name].fisher, 9 * plain.layers[name].fisher, EXACT)
    both = summed_cross_entropy(network, (samples, labels))
    assert both.detach().item() == pytest.approx(F.cross_entropy(network(samples), labels).item() * 4, rel=EXACT)


def test_measured_where_gradients_are_off_too():
    network, batch = small_network(), batch_of(2)
    expected = measure_importance(network, convolutions_of(network), [batch])
    with torch.no_grad():
        assert_equal_importance(measure_importance(network, convolutions_of(network), [batch]), expected)


# ---- memory


@pytest.mark.parametrize("samples_at_once", [1, 3])
def test_per_sample_gradients_stay_within_their_bound(monkeypatch, samples_at_once):
    network, batch = small_network(), batch_of(20)
    convolutions = convolutions_of(network)
    expected = measure_importance(network, convolutions, [batch])
    # of one sample, the grouped layer's columns are the most: 8 channels x 9 taps x 16 places
    largest = 8 * 9 * 16
    monkeypatch.setattr(channel_importance, "ELEMENTS_AT_ONCE", samples_at_once * largest)
    columns, gradients, unfold, per_sample = [], [], F.unfold, channel_importance._per_sample_gradients

    def counted_columns(*args, **kwargs):
        columns.append(unfold(*args, **kwargs))
        return columns[-1]

    def counted_gradients(*args):
        for gradient in per_sample(*args):
            gradients.append(gradient)
            yield gradient

    monkeypatch.setattr(channel_importance.F, "unfold", counted_columns)
    monkeypatch.setattr(channel_importance, "_per_sample_gradients", counted_gradients)
    found = measure_importance(network, convolutions, [batch])
    assert max(one.numel() for one in columns) == samples_at_once * largest
    assert max(one.numel() for one in gradients) <= samples_at_once * largest
    assert sum(len(one) for one in gradients) == 20 * len(convolutions)
    assert_equal_importance(found, expected, EXACT)


def test_of_less_room_than_one_sample_needs_one_is_taken(monkeypatch):
    network, batch = small_network(), batch_of(3)
    expected = measure_importance(network, convolutions_of(network), [batch])
    monkeypatch.setattr(channel_importance, "ELEMENTS_AT_ONCE", 1)
    assert_equal_importance(measure_importance(network, convolutions_of(network), [batch]), expected, EXACT)


# ---- left as it was


class Strange(nn.Module):
    """With batch norm and dropout, some of it frozen, some of it in evaluation mode, and gradients from before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5))
        self.classifier = nn.Linear(64, 4)
        self.train()
        self.features[1].eval()
        self.last[3].eval()
        self.features[0].bias.requires_grad_(False)
        self.last[1].weight.requires_grad_(False)
        self.last[0].weight.grad = torch.randn_like(self.last[0].weight)

    def forward(self, x):
        return self.classifier(self.last(self.features(x)))


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")


def everything_about(network):
    return {
        "state": {name: value.clone() for name, value in network.state_dict().items()},
        "parameters": {name: id(parameter) for name, parameter in network.named_parameters()},
        "flags": {name: parameter.requires_grad for name, parameter in network.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in network.named_parameters()},
        "modes": {name: module.training for name, module in network.named_modules()},
        "hooks": {name: [dict(getattr(m, kind)) for kind in HOOKS] for name, m in network.named_modules()},
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for kind in ("parameters", "flags", "modes", "hooks"):
        assert before[kind] == after[kind]
    assert torch.equal(before["random"], after["random"])
    for kind in ("state", "gradients"):
        assert before[kind].keys() == after[kind].keys()
        for name, value in before[kind].items():
            assert value is after[kind][name] is None or torch.equal(value, after[kind][name])


def loss_that_raises(network, batch):
    network(batch[0])
    raise ValueError("no loss today")


def samples_that_raise():
    yield batch_of(2, dtype=torch.float32)
    raise ValueError("no more samples")


@pytest.mark.parametrize(
    ("batches", "loss", "error"),
    [
        (lambda: [batch_of(2, dtype=torch.float32)] * 2, summed_cross_entropy, None),
        (lambda: [batch_of(2, dtype=torch.float32)], loss_that_raises, ValueError),
        (lambda: [batch_of(2, dtype=torch.float32)], lambda *given: summed_cross_entropy(*given) / 0, UserError),
        (samples_that_raise, summed_cross_entropy, ValueError),
        (list, summed_cross_entropy, UserError),
    ],
    ids=["measured", "loss raises", "loss infinite", "samples raise", "no samples"],
)
def test_the_network_is_left_as_it_was(batches, loss, error):
    network = Strange()
    convolutions = convolutions_of(network)
    samples = batches()
    before = everything_about(network)
    if error is None:
        measure_importance(network, convolutions, samples, loss)
    else:
        with pytest.raises(error):
            measure_importance(network, convolutions, samples, loss)
    assert_same(before, everything_about(network))
    assert all(parameter.grad is None for name, parameter in network.named_parameters() if name != "last.0.weight")


def test_measured_in_evaluation_mode_without_a_gradient_of_any_parameter():
    network, batch = Strange(), batch_of(3, dtype=torch.float32)
    seen = []

    def loss(net, batch):
        seen.append([module.training for module in net.modules()] + [p.requires_grad for p in net.parameters()])
        return summed_cross_entropy(net, batch)

    found = measure_importance(network, convolutions_of(network), [batch], loss)
    assert len(seen) == 1
    assert not any(seen[0])
    assert_equal_importance(found, measure_importance(copy.deepcopy(network).eval(), convolutions_of(network), [batch]))
    assert_as_autograd(network, found, batch, SINGLE)


# ---- with a scheme applied


SCHEME = UpdateScheme("small", 4, {"0": 0.67, "2": 0.5, "4": 0.25, "6": 1.0})
CHANNELS = {"0": [0, 2], "2": [1, 3, 5, 7], "4": [0, 6], "6": [0, 1, 2, 3, 4, 5]}
INT8_SCHEME = UpdateScheme("small-int8", 5, {"blocks.1.depthwise": 0.125, "blocks.2.depthwise": 0.25})
INT8_CHANNELS = {"blocks.1.depthwise": [3, 7, 20], "blocks.2.depthwise": [0, 4, 5, 6, 9, 23]}


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_a_scheme_changes_no_score(method, depth):
    network, batch = small_network(), batch_of(3)
    operations = find_operations(network, (3, 8, 8))
    expected = measure_importance(network, operations.convolutions, [batch])
    names = [convolution.name for convolution in operations.convolutions[-depth:]]
    scheme = UpdateScheme("small", depth, {name: SCHEME.weights[name] for name in names})
    applied = AppliedScheme(network, scheme, operations, {name: CHANNELS[name] for name in names}, method)
    before = everything_about(network)
    found = measure_importance(network, operations.convolutions, [batch])
    assert_equal_importance(found, expected, EXACT)
    assert_same(before, everything_about(network))
    applied.remove()


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_a_scheme_in_an_int8_network_changes_no_score(small_graph, small_tensors, method):
    network, batch = int8_network(small_graph, small_tensors), int8_batch(3)
    operations = find_operations(network, (3, 32, 32))
    expected = measure_importance(network, operations.convolutions, [batch])
    applied = AppliedScheme(network, INT8_SCHEME, operations, INT8_CHANNELS, method)
    assert_equal_importance(measure_importance(network, operations.convolutions, [batch]), expected, SINGLE)
    applied.remove()


def train(network, applied, batch, steps, measure):
    """Some steps of SGD, with a measurement before each where it is asked for; the state afterwards."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(steps):
        if measure:
            measure()
        optimizer.zero_grad()
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        optimizer.step()
        applied.restore_frozen()
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_training_goes_on_as_if_nothing_had_been_measured(method):
    batch, states = batch_of(5), []
    for measured in (False, True):
        network = small_network()
        operations = find_operations(network, (3, 8, 8))
        applied = AppliedScheme(network, SCHEME, operations, CHANNELS, method)
        measure = lambda: measure_importance(network, operations.convolutions, [batch])  # noqa: B023, E731
        states.append(train(network, applied, batch, 3, measure if measured else None))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["2.weight"], small_network().state_dict()["2.weight"])


@pytest.mark.parametrize("method", ["sub_tensor", "mask"])
def test_weights_trained_meanwhile_count(method):
    network, batch = small_network(), batch_of(5)
    operations = find_operations(network, (3, 8, 8))
    applied = AppliedScheme(network, SCHEME, operations, CHANNELS, method)
    train(network, applied, batch, 3, None)
    found = measure_importance(network, operations.convolutions, [batch])
    applied.remove()
    assert_equal_importance(found, measure_importance(network, operations.convolutions, [batch]), EXACT)
    fresh = measure_importance(small_network(), operations.convolutions, [batch])
    assert not torch.equal(found.layers["2"].weight_norm, fresh.layers["2"].weight_norm)


# ---- on several processes


PROCESS = """
import os
import sys
import torch
from torch import nn
from microtune.modules.sparse_update.channel_importance import measure_importance
from microtune.modules.networks.operations import Convolution

folder = sys.argv[1]
torch.set_num_threads(1)
child = os.fork()  # importing takes longer than all else
rank = 0 if child else 1
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=True)
network = nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 4)
).double()
network.load_state_dict(given["state"])
convolutions = [Convolution(**one) for one in given["convolutions"]]
found = []
for batches in given["batches"]:
    importance = measure_importance(network, convolutions, batches[rank])
    found.append({"samples": importance.samples, "layers": {n: vars(one) for n, one in importance.layers.items()}})
try:
    measure_importance(network, convolutions, [], lambda *_: torch.tensor(1.0))
except Exception as error:
    errors = [str(error)]
try:
    batches = [] if rank == 0 else given["batches"][0][1]
    measure_importance(network, convolutions, batches, lambda *_: torch.tensor(1.0))
except Exception as error:
    errors.append(str(error))
torch.save((found, errors), f"{folder}/found{rank}.pt")
torch.distributed.destroy_process_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_ranks_add_their_samples_and_agree(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 4)
    ).double()
    samples, labels = batch_of(7)

    def part(start, stop):
        return samples[start:stop], labels[start:stop]

    uneven = [[part(0, 2)], [part(2, 4), part(4, 7)]]
    one_without = [[], [part(0, 7)]]
    convolutions = convolutions_of(network)  # handed over, since PyTorch imports for seconds before it finds them
    given = {"state": network.state_dict(), "convolutions": [asdict(one) for one in convolutions]}
    torch.save({**given, "batches": [uneven, one_without]}, tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", PROCESS, tmp_path], check=True, timeout=120)
    expected = measure_importance(network, convolutions, [(samples, labels)])
    found, errors = zip(
        *(torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in range(2)), strict=True
    )
    assert errors[0] == errors[1] == [NO_SAMPLES, NOT_REACHED.format("0")]
    for of_rank in zip(*found, strict=True):
        for one in of_rank:
            assert one["samples"] == 7
            for name, measured in itertools.product(expected.layers, MEASURED):
                value = one["layers"][name][measured]
                assert torch.equal(value, of_rank[0]["layers"][name][measured])
                assert_close(value, getattr(expected.layers[name], measured), EXACT)


# ---- errors


def test_no_samples():
    network = small_network()
    with pytest.raises(UserError, match=f"^{re.escape(NO_SAMPLES)}$"):
        measure_importance(network, convolutions_of(network), [])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_no_number(value):
    network = small_network()
    text = (
        f"the loss is {value}, and no channel can be chosen by it: give other weights, or a smaller learning "
        "rate if it has been training"
    )
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        measure_importance(
            network, convolutions_of(network), [batch_of(2)], lambda *given: summed_cross_entropy(*given) + value
        )


class WithIdleLayer(nn.Module):
    """One convolution that is run for nothing, or is not run for a sample of this kind."""

    def __init__(self, is_called):
        super().__init__()
        self.used, self.idle, self.classifier = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3), nn.Linear(72, 4)
        self.is_called = is_called

    def forward(self, x):
        if self.is_called:
            self.idle(x)
        return self.classifier(self.used(x).flatten(1))


@pytest.mark.parametrize("is_called", [True, False])
def test_a_layer_that_does_not_reach_the_loss(is_called):
    network, batch = WithIdleLayer(True), batch_of(2, dtype=torch.float32)
    convolutions = convolutions_of(network)
    network.is_called = is_called
    with pytest.raises(UserError, match=f"^{re.escape(NOT_REACHED.format('idle'))}$"):
        measure_importance(network, convolutions, [batch])
    used = [convolution for convolution in convolutions if convolution.name != "idle"]
    assert_as_autograd(network, measure_importance(network, used, [batch]), batch, SINGLE)


def test_a_loss_without_the_network():
    network = small_network()
    with pytest.raises(UserError, match=f"^{re.escape(NOT_REACHED.format('0'))}$"):
        measure_importance(network, convolutions_of(network), [batch_of(2)], lambda *_: torch.tensor(1.0))


class Residual(nn.Module):
    """One that may add in place, to what a convolution has read."""

    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.classifier = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(192, 4)
        self.in_place = in_place
        self.double()

    def forward(self, x):
        x = self.first(x)
        return self.classifier((x.add_ if self.in_place else x.add)(self.second(x)).flatten(1))


@pytest.mark.parametrize("in_place", [True, False])
def test_an_input_that_is_written_over(in_place):
    network, batch = Residual(in_place), batch_of(3)
    operations = find_operations(network, (3, 8, 8))
    AppliedScheme(network, UpdateScheme("residual", 2, {"second": 0.34}), operations, {"second": [1]})
    F.cross_entropy(network(batch[0]), batch[1]).backward()  # it can be trained
    if not in_place:
        found = measure_importance(network, operations.convolutions, [batch])
        assert_as_autograd(Residual(in_place), found, batch, EXACT)
        return
    text = (
        "the input of second is written over after the layer has read it, so that it cannot be scored: let the "
        "operation that does so not work in place"
    )
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        measure_importance(network, operations.convolutions, [batch])
