"""Schemes by rule: each fits, and is the largest of its kind that does."""

import dataclasses

import pytest
import torchvision

from microtune.modules.memory.microcontrollers import microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.simple_schemes import (
    biases_that_fit,
    classifier_only,
    expanding_convolutions_that_fit,
    full_update,
    last_layers_that_fit,
)
from microtune.modules.sparse_update.update_scheme import UpdateScheme

RULES = {
    "biases": biases_that_fit,
    "last_layers": last_layers_that_fit,
    "expanding": expanding_convolutions_that_fit,
}
BUDGETS = [150_000, 200_000, 250_000, 300_000, 400_000]  # bytes; the first is little above the forward pass
NAME = "mobilenet_v2-w0.35"
OPERATIONS = find_operations(mobilenet_v2(0.35, num_classes=10), (3, 96, 96))
PEAK_MEMORY = PeakMemory(OPERATIONS)
LAYERS = [convolution.name for convolution in OPERATIONS.convolutions]


def within(budget_bytes):
    return lambda scheme: PEAK_MEMORY.peak_bytes(scheme) <= budget_bytes


@pytest.mark.parametrize("budget_bytes", BUDGETS)
@pytest.mark.parametrize("rule", RULES)
def test_scheme_fits_and_says_how_it_came_about(rule, budget_bytes):
    scheme = RULES[rule](NAME, OPERATIONS, within(budget_bytes))
    scheme.check(OPERATIONS.convolutions, NAME)
    assert within(budget_bytes)(scheme)
    assert "fit" in scheme.provenance["rule"]
    assert UpdateScheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize("budget_bytes", BUDGETS)
def test_one_more_bias_would_not_fit(budget_bytes):
    scheme = biases_that_fit(NAME, OPERATIONS, within(budget_bytes))
    assert scheme.weights == {}
    assert scheme.bias_depth > 0
    deeper = range(scheme.bias_depth + 1, len(LAYERS) + 1)
    assert not any(within(budget_bytes)(dataclasses.replace(scheme, bias_depth=depth)) for depth in deeper)


@pytest.mark.parametrize("budget_bytes", BUDGETS)
def test_one_more_layer_would_not_fit(budget_bytes):
    scheme = last_layers_that_fit(NAME, OPERATIONS, within(budget_bytes))
    assert scheme.weights == dict.fromkeys(LAYERS[len(LAYERS) - scheme.bias_depth :], 1.0)
    for depth in range(scheme.bias_depth + 1, len(LAYERS) + 1):
        assert not within(budget_bytes)(UpdateScheme(NAME, depth, dict.fromkeys(LAYERS[-depth:], 1.0)))


@pytest.mark.parametrize("budget_bytes", BUDGETS)
def test_one_more_expanding_convolution_would_not_fit(budget_bytes):
    fits = within(budget_bytes)
    scheme = expanding_convolutions_that_fit(NAME, OPERATIONS, fits)
    expanding = [f"features.{block}.conv.0.0" for block in range(2, 18)]
    updated = expanding[len(expanding) - len(scheme.weights) :]
    assert list(scheme.weights) == updated
    assert len(updated) >= 1
    assert LAYERS[-scheme.bias_depth] == updated[0]  # biases from the first of them on

    def with_ratio(layers, ratio):
        return UpdateScheme(NAME, len(LAYERS) - LAYERS.index(layers[0]), dict.fromkeys(layers, ratio))

    (ratio,) = set(scheme.weights.values())
    larger = [other for other in (1 / 2, 1 / 4, 1 / 8) if other > ratio]
    assert not any(fits(with_ratio(updated, other)) for other in larger)
    for more in range(len(updated) + 1, len(expanding) + 1):
        assert not any(fits(with_ratio(expanding[-more:], other)) for other in (1 / 2, 1 / 4, 1 / 8))


def test_layer_with_few_channels_updates_one():
    layers = OPERATIONS.convolutions
    scheme = expanding_convolutions_that_fit(NAME, OPERATIONS, lambda _: True, ratios=[1 / 100])
    counts = [scheme.updated_channels(layer) for layer in layers if layer.name in scheme.weights]
    assert counts == [1] * 16


def test_a_larger_budget_never_gives_less():
    for rule in RULES.values():
        depths = [rule(NAME, OPERATIONS, within(budget_bytes)).bias_depth for budget_bytes in BUDGETS]
        assert depths == sorted(depths)
        assert depths[-1] > depths[0]


@pytest.mark.parametrize("rule", RULES)
def test_with_room_for_the_classifier_only(rule):
    scheme = RULES[rule](NAME, OPERATIONS, within(PEAK_MEMORY.floor_bytes))
    assert (scheme.bias_depth, scheme.weights) == (0, {})


@pytest.mark.parametrize("rule", RULES)
def test_where_nothing_fits_there_is_none(rule):
    assert RULES[rule](NAME, OPERATIONS, within(PEAK_MEMORY.floor_bytes - 1)) is None


def test_classifier_only():
    scheme = classifier_only(NAME)
    assert (scheme.network, scheme.bias_depth, scheme.weights, scheme.channels) == (NAME, 0, {}, {})
    assert PEAK_MEMORY.peak_bytes(scheme) == PEAK_MEMORY.floor_bytes


def test_full_update():
    scheme = full_update(NAME, OPERATIONS)
    assert scheme.bias_depth == len(LAYERS) == 51
    assert scheme.weights == dict.fromkeys(LAYERS, 1.0)
    assert not within(microcontroller("stm32f746").budget_bytes)(scheme)


def test_any_network():
    """ResNet-18 has expanding 1x1 convolutions too: the shortcuts of its stages."""
    network = fold_batch_norm(torchvision.models.resnet18(num_classes=10), (3, 64, 64))
    operations = find_operations(network, (3, 64, 64))
    scheme = expanding_convolutions_that_fit("resnet18", operations, lambda _: True)
    assert list(scheme.weights) == [f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)]
    assert set(scheme.weights.values()) == {0.5}
    scheme.check(operations.convolutions, "resnet18")
