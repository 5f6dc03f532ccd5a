"""Promises of contributions by gradient: gains true to first order, an exact knapsack."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import extra_memory_bytes
from microtune.modules.networks.operations import find_operations
from microtune.modules.search.gradient_contributions import gradient_table, with_channels
from microtune.modules.search.scheme_optimum import proven_optimum
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.channel_importance import measure_importance
from microtune.modules.sparse_update.fitted_classifier import fit_classifier
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.networks import describe_network

SHAPE = (3, 8, 8)


def small_network(bias=True) -> nn.Sequential:
    """Ordinary, depthwise and pointwise convolutions of 8 px in float64; the second has no bias."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU6(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.ReLU6(),
        nn.Conv2d(4, 3, 1),
        nn.ReLU6(),
        nn.Conv2d(3, 5, 1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(80, 4, bias=bias),
    ).double()
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, nn.Conv2d):  # else few channels are alive
                layer.weight.mul_(3)
    return network


def batches_of(*counts, shape=SHAPE, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(count, *shape, generator=generator, dtype=dtype) * 2 - 1,
            torch.randint(0, classes, (count,), generator=generator),
        )
        for count in counts
    ]


BATCHES = batches_of(16, 16, 8)
NETWORK = small_network()
OPERATIONS = find_operations(NETWORK, SHAPE)
CONVOLUTIONS = OPERATIONS.convolutions
NAMES = [convolution.name for convolution in CONVOLUTIONS]
fit_classifier(NETWORK, OPERATIONS, BATCHES)
IMPORTANCE = measure_importance(NETWORK, CONVOLUTIONS, BATCHES)


def test_gains_by_hand():
    """Squared gradients of the mean loss, as autograd has them."""
    network = copy.deepcopy(NETWORK).eval()
    samples, labels = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    F.cross_entropy(network(samples), labels).backward()
    table = gradient_table(IMPORTANCE, CONVOLUTIONS, 3)
    biases = [(network.get_submodule(name).bias.grad ** 2).sum().item() for name in (NAMES[3], NAMES[2])]
    expected = {0: 0.0, 1: biases[0], 2: sum(biases), 3: sum(biases)}  # the third last has no bias
    assert table.bias_gains == pytest.approx(expected, rel=1e-9)
    assert list(table.weight_gains) == NAMES[1:]
    for name in NAMES[1:]:
        gradient = network.get_submodule(name).weight.grad
        of_channel = gradient.square().sum((1, 2, 3) if name == NAMES[1] else (0, 2, 3))
        ordered = sorted(of_channel.tolist(), reverse=True)
        gains = {count / len(ordered): sum(ordered[:count]) for count in range(1, len(ordered) + 1)}
        assert table.weight_gains[name] == pytest.approx(gains, rel=1e-9)
    assert table.base_depth == 3
    assert all(row.runs == 1 and row.gain_std == 0 for row in table.rows)


@pytest.mark.parametrize(
    ("options", "ratios"),
    [
        ({}, [1 / 4, 2 / 4, 3 / 4, 1]),
        ({"channel_multiple": 2}, [2 / 4, 1]),
        ({"channel_multiple": 3}, [3 / 4, 1]),
        ({"channel_multiple": 8}, [1]),
        ({"most_options": 1}, [1]),
        ({"most_options": 2}, [2 / 4, 1]),
        ({"most_options": 2, "also": {NAMES[2]: 1}}, [1 / 4, 2 / 4, 1]),
        ({"most_options": 2, "also": {NAMES[3]: 1}}, [2 / 4, 1]),
        ({"most_options": 100}, [1 / 4, 2 / 4, 3 / 4, 1]),
    ],
)
def test_numbers_of_channels(options, ratios):
    assert list(gradient_table(IMPORTANCE, CONVOLUTIONS, 4, **options).weight_gains[NAMES[2]]) == ratios


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 5)))
def test_numbers_of_channels_are_multiples_and_end_with_the_whole(base_depth, multiple, most):
    table = gradient_table(IMPORTANCE, CONVOLUTIONS, base_depth, multiple, most)
    assert sorted(table.bias_gains) == list(range(base_depth + 1))
    for convolution in CONVOLUTIONS[-base_depth:]:
        counts = [round(ratio * convolution.in_channels) for ratio in table.weight_gains[convolution.name]]
        assert counts == sorted(set(counts))
        assert counts[-1] == convolution.in_channels
        assert all(count % multiple == 0 for count in counts[:-1])
        every = len(range(multiple, convolution.in_channels, multiple)) + 1
        assert len(counts) == min(most or every, every)


def test_ratios_give_the_numbers_of_channels_back():
    for in_channels in (*range(1, 65), 336, 1344, 2047, 2048):
        convolution = replace(CONVOLUTIONS[2], in_channels=in_channels)
        for count in range(1, in_channels + 1):
            scheme = UpdateScheme("", 1, {convolution.name: count / in_channels})
            assert scheme.updated_channels(convolution) == count


@pytest.mark.parametrize("base_depth", [0, 5])
def test_base_depth_out_of_range(base_depth):
    with pytest.raises(UserError, match=f"base_depth is {base_depth}: give 1 to 4, the network's convolutions"):
        gradient_table(IMPORTANCE, CONVOLUTIONS, base_depth)


# ---- channels


def test_channels_are_the_highest():
    scores = IMPORTANCE.scores("loss_decrease")
    scheme = UpdateScheme("x", 4, {NAMES[0]: 1.0, NAMES[1]: 0.5, NAMES[2]: 0.75, NAMES[3]: 0.4}, {NAMES[3]: [2]})
    chosen = with_channels(scheme, CONVOLUTIONS, IMPORTANCE)
    assert replace(chosen, channels={}) == replace(scheme, channels={})
    assert set(chosen.channels) == set(NAMES[1:])  # the first is updated whole
    assert chosen.channels[NAMES[3]] == [2]  # as the scheme says
    for name, count in ((NAMES[1], 2), (NAMES[2], 3)):
        expected = sorted(range(4), key=lambda channel, name=name: -scores[name][channel])[:count]
        assert chosen.channels[name] == sorted(expected)
    norms = NETWORK.get_submodule(NAMES[1]).weight.flatten(1).norm(dim=1).tolist()
    by_norm = with_channels(scheme, CONVOLUTIONS, IMPORTANCE, "weight_norm")
    assert by_norm.channels[NAMES[1]] == sorted(sorted(range(4), key=lambda channel: -norms[channel])[:2])
    assert by_norm.channels != chosen.channels


def test_layers_that_are_not_chosen_in_need_no_scores():
    few = replace(IMPORTANCE, layers={NAMES[3]: IMPORTANCE.layers[NAMES[3]]})
    scheme = with_channels(UpdateScheme("x", 4, {NAMES[0]: 1.0, NAMES[3]: 0.4}), CONVOLUTIONS, few)
    assert {name: len(channels) for name, channels in scheme.channels.items()} == {NAMES[3]: 1}


# ---- the knapsack


def problem_of(budget_bytes, memory="extra", **options):
    return SearchProblem(
        "x",
        PeakMemory(OPERATIONS),
        gradient_table(IMPORTANCE, CONVOLUTIONS, 3, **options),
        budget_bytes,
        memory,
        fix_channels=lambda scheme: with_channels(scheme, CONVOLUTIONS, IMPORTANCE),
    )


def test_predicted_decrease_is_that_of_a_step_to_first_order():
    problem, rate = problem_of(1e9), 1e-7
    samples, labels = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    for genome in ((3, 2, 1, 2), (3, 4, 4, 3), (1, 0, 0, 1), (2, 0, 3, 0), (3, 0, 0, 0)):
        scheme = problem.scheme(genome)
        network = copy.deepcopy(NETWORK)
        channels = {name: scheme.channels.get(name) or list(range(4 - (name == NAMES[3]))) for name in scheme.weights}
        AppliedScheme(network, scheme, OPERATIONS, channels)
        network.eval()
        updated = [value for name, value in network.named_parameters() if value.requires_grad and "9." not in name]
        before = F.cross_entropy(network(samples), labels)
        before.backward()
        torch.optim.SGD(updated, lr=rate).step()
        after = F.cross_entropy(network(samples), labels)
        assert (before - after).item() / rate == pytest.approx(problem.score(genome), rel=1e-5)


def every_scheme(channel_multiple):
    """Every subset of the channels of each of the last three layers, at every depth that holds it, with its score."""
    scores = IMPORTANCE.scores("loss_decrease")
    subsets = {}
    for convolution in CONVOLUTIONS[-3:]:
        of = range(convolution.in_channels)
        counts = [n for n in range(1, len(of) + 1) if n % channel_multiple == 0 or n == len(of)]
        subsets[convolution.name] = [[], *(list(one) for n in counts for one in itertools.combinations(of, n))]
    biases = [IMPORTANCE.layers[name].bias_loss_decrease for name in reversed(NAMES)]
    for depth in range(4):
        within = NAMES[4 - depth :]
        for chosen in itertools.product(*(subsets[name] for name in within)):
            channels = {name: one for name, one in zip(within, chosen, strict=True) if one}
            gain = sum(scores[name][one].sum().item() for name, one in channels.items())
            yield UpdateScheme("x", depth, dict.fromkeys(channels, 1.0), channels), sum(biases[:depth]) + gain


def bytes_of(memory, scheme):
    if memory == "extra":
        return extra_memory_bytes(CONVOLUTIONS, OPERATIONS.classifier_features, scheme)
    return PeakMemory(OPERATIONS).peak_bytes(scheme)


@pytest.mark.parametrize("channel_multiple", [1, 2])
@pytest.mark.parametrize("memory", ["extra", "peak"])
def test_optimum_is_the_best_of_all_subsets_of_channels(memory, channel_multiple):
    schemes = [(bytes_of(memory, scheme), score) for scheme, score in every_scheme(channel_multiple)]
    sizes = sorted({size for size, _ in schemes})
    found = set()
    for budget in sizes[:: max(1, len(sizes) // 12)]:
        problem = problem_of(budget, memory, channel_multiple=channel_multiple)
        optimum = proven_optimum(problem)
        scheme = problem.scheme(optimum.genome)
        assert optimum.score == pytest.approx(max(score for size, score in schemes if size <= budget), rel=1e-9)
        assert bytes_of(memory, scheme) == problem.memory_bytes(optimum.genome) <= budget
        of_channels = IMPORTANCE.scores("loss_decrease")
        gains = [of_channels[name].sort(descending=True).values for name in scheme.weights]
        counts = [scheme.updated_channels(one) for one in CONVOLUTIONS if one.name in scheme.weights]
        by_hand = sum(gain[:count].sum().item() for gain, count in zip(gains, counts, strict=True))
        assert optimum.score == pytest.approx(problem.gains_of(optimum.genome)[0] + by_hand)
        found.add((scheme.bias_depth, *counts))
    assert len(found) > 5


def test_bytes_of_every_number_of_channels_are_those_of_the_account():
    """The moments that a problem leaves out are never the peak, whatever the number of channels."""
    described = describe_network("none", (3, 32, 32), 10)
    convolutions, peak_memory = described.operations.convolutions, PeakMemory(described.operations)
    network = described.network.double()
    batches = batches_of(2, shape=(3, 32, 32), classes=10)
    importance = measure_importance(network, convolutions[-9:], batches)
    problem = SearchProblem("x", peak_memory, gradient_table(importance, convolutions, 9), 1e9)
    assert problem.account.constant.shape[1] > 1
    genomes = [
        (9, *(min(part * count // 7, count) for count in (len(ratios) - 1 for ratios in problem.ratios)))
        for part in range(8)
    ]
    genomes += [(9, *(len(ratios) - 1 if index == layer else 0 for index, ratios in enumerate(problem.ratios)))
                for layer in range(9)]  # fmt: skip
    for genome in genomes:
        assert problem.memory_bytes(genome) == peak_memory.peak_bytes(problem.scheme(genome))
