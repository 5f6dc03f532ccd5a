"""Promises of the choice of channels: the highest scores first, by any criterion; fixed ones by the scheme."""

from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.channel_choice import choose_channels, highest_channels, to_be_chosen
from microtune.modules.sparse_update.channel_importance import measure_importance, random_scores, weight_norm_scores
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.update_scheme import UpdateScheme

BY_DATA = ["gradient_norm", "fisher", "taylor", "loss_decrease", "activation_norm"]
CRITERIA = ["weight_norm", *BY_DATA, "random"]


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


def convolutions_of(net):
    return find_operations(net, (3, 8, 8)).convolutions


def choose(net, scheme, *args):
    return choose_channels(net, scheme, convolutions_of(net), *args)


def largest_norms(weight, groups, count):
    return highest_channels(weight_norm_scores(weight, groups), count)


def at_random(layer, in_channels, count, seed):
    return highest_channels(random_scores(layer, in_channels, seed), count)


def measure(net, convolutions, count=4):
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(count, 3, 8, 8, generator=generator)
    return measure_importance(net, convolutions, [(samples, torch.arange(count) % 2)])


# ---- the highest scores


def test_the_highest_scores_win_and_come_sorted():
    scores = torch.tensor([0.5, 2.0, -1.0, 1.0])
    assert [highest_channels(scores, count) for count in range(5)] == [[], [1], [1, 3], [0, 1, 3], [0, 1, 2, 3]]


def test_of_equal_scores_the_first_win():
    assert highest_channels(torch.ones(300), 3) == [0, 1, 2]
    scores = torch.ones(300)
    scores[[200, 201]] = 2
    assert highest_channels(scores, 3) == [0, 200, 201]
    assert highest_channels(scores, 1) == [200]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_none_left_out_is_higher_and_none_as_high_is_before(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    chosen = highest_channels(torch.tensor(scores, dtype=torch.float64), count)
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    left_out = set(range(len(scores))) - set(chosen)
    assert all((-scores[winner], winner) < (-scores[loser], loser) for winner in chosen for loser in left_out)


# ---- by weight norm


def test_largest_norms_win():
    weight = torch.zeros(2, 4, 1, 1)
    weight[:, :, 0, 0] = torch.tensor([[1.0, -5.0, 0.0, 3.0], [1.0, 0.0, 2.0, 3.0]])  # squared: 2, 25, 4, 18
    assert [largest_norms(weight, 1, count) for count in (1, 2, 3, 4)] == [[1], [1, 3], [1, 2, 3], [0, 1, 2, 3]]
    assert weight_norm_scores(weight, 1).square().tolist() == pytest.approx([2, 25, 4, 18])


def test_it_is_the_l2_norm_of_the_whole_kernel():
    weight = torch.zeros(1, 2, 2, 2)
    weight[0, 0] = 2.0  # L2 norm 4, L1 norm 8
    weight[0, 1, 0, 1] = 5.0  # L2 norm 5, L1 norm 5
    assert largest_norms(weight, 1, 1) == [1]
    assert weight_norm_scores(weight, 1).tolist() == [4, 5]


def test_of_equal_norms_the_first_win():
    assert largest_norms(torch.ones(5, 300, 1, 1), 1, 3) == [0, 1, 2]
    weight = torch.ones(5, 300, 1, 1)
    weight[:, 200] = 2
    assert largest_norms(weight, 1, 3) == [0, 1, 200]


def test_norms_are_told_apart_in_double_precision():
    weight = torch.zeros(2, 2, 1, 1)
    weight[:, 0] = 4096.0
    weight[0, 1], weight[1, 1] = 4096.0, 4096.001  # whose squares are equal in float32
    assert largest_norms(weight, 1, 1) == [1]


def test_depthwise_channels_are_its_kernels():
    convolution = nn.Conv2d(4, 8, 3, groups=4)  # channel c feeds outputs 2c and 2c + 1
    with torch.no_grad():
        convolution.weight.fill_(0.1)
        convolution.weight[5] = 9.0
        convolution.weight[0] = 5.0
    assert largest_norms(convolution.weight, 4, 2) == [0, 2]


def test_grouped_channels_are_numbered_over_the_groups():
    convolution = nn.Conv2d(6, 4, 3, groups=2)  # inputs 3 to 5 feed outputs 2 and 3
    with torch.no_grad():
        convolution.weight.fill_(0.1)
        convolution.weight[3, 1] = 9.0
        convolution.weight[0, 2] = 5.0
    assert largest_norms(convolution.weight, 2, 2) == [2, 4]


def test_int8_weights_count_as_integers(small_graph, small_tensors):
    small_tensors["blocks.1.depthwise.weight_scales"][:12] *= 1000
    net = QuantizedNetwork(small_graph)
    load_quantized_tensors(net, small_tensors)
    scheme = UpdateScheme("net", 9, {"blocks.1.depthwise": 0.5})
    channels = choose_channels(net, scheme, find_operations(net, (3, 32, 32)).convolutions)["blocks.1.depthwise"]
    norms = small_tensors["blocks.1.depthwise.weight"].long().square().sum((1, 2, 3))
    assert min(norms[channels]) >= max(norms[[channel for channel in range(24) if channel not in channels]])
    assert channels != list(range(12))


# ---- by chance


def test_random_channels_depend_on_seed_and_layer_only():
    first = at_random("a", 100, 10, seed=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert at_random("a", 100, 10, seed=0) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert at_random("b", 100, 10, seed=0) != first
    assert at_random("a", 100, 10, seed=1) != first
    assert first == sorted(set(first))
    assert len(first) == 10
    assert 0 <= first[0] <= first[-1] < 100


def test_random_channels_are_drawn_evenly():
    counts = torch.zeros(10)
    for seed in range(500):
        counts[at_random("layer", 10, 3, seed)] += 1
    # 150 expected of each, standard deviation 10
    assert counts.min() > 100
    assert counts.max() < 200


@settings(max_examples=50)
@given(st.sampled_from(["features.1.conv.0.0", "a", ""]), st.integers(1, 200), st.integers(0, 2**40), st.data())
def test_random_channels_are_those_of_earlier_results(layer, in_channels, seed, data):
    count = data.draw(st.integers(1, in_channels))
    generator = torch.Generator().manual_seed(crc32(f"{layer} {seed}".encode()))
    earlier = sorted(torch.randperm(in_channels, generator=generator)[:count].tolist())
    assert at_random(layer, in_channels, count, seed) == earlier


# ---- of a scheme


@pytest.mark.parametrize("choice", CRITERIA)
def test_the_scheme_says_how_many_and_may_fix_which(choice):
    net = network()
    scheme = UpdateScheme("net", 3, {"0": 0.67, "1": 0.5, "2": 0.25}, {"1": [7, 0, 3]})
    importance = measure(net, convolutions_of(net))
    channels = choose(net, scheme, choice, 3, importance)
    assert {name: len(indexes) for name, indexes in channels.items()} == {"0": 2, "1": 3, "2": 2}
    assert channels["1"] == [0, 3, 7]
    scores = importance.scores(choice, 3)
    assert channels == {"0": highest_channels(scores["0"], 2), "1": [0, 3, 7], "2": highest_channels(scores["2"], 2)}
    if choice == "weight_norm":
        assert channels["2"] == largest_norms(net[2].weight, 2, 2)
    elif choice == "random":
        assert channels["2"] == at_random("2", 8, 2, 3)


def test_weight_norm_is_the_default_and_seed_0():
    net, scheme = network(), UpdateScheme("net", 3, {"0": 0.67, "2": 0.5})
    assert choose(net, scheme) == choose(net, scheme, "weight_norm")
    assert choose(net, scheme, "random") == choose(net, scheme, "random", 0)
    assert len({str(choose(net, scheme, "random", seed)) for seed in range(20)}) > 5


@pytest.mark.parametrize("choice", ["weight_norm", "random"])
def test_without_data_none_is_needed(choice):
    net, scheme = network(), UpdateScheme("net", 3, {"0": 0.67, "1": 0.5, "2": 0.25})
    with_data = choose(net, scheme, choice, 1, measure(net, convolutions_of(net)))
    assert choose(net, scheme, choice, 1) == with_data


@pytest.mark.parametrize("choice", BY_DATA)
def test_only_layers_to_be_chosen_are_measured(choice):
    net = network()
    scheme = UpdateScheme("net", 3, {"0": 1.0, "1": 0.5, "2": 0.25}, {"1": [1, 2]})
    convolutions = to_be_chosen(scheme, convolutions_of(net))
    assert [convolution.name for convolution in convolutions] == ["2"]
    importance = measure(net, convolutions)
    channels = choose(net, scheme, choice, 0, importance)
    assert channels == {"0": [0, 1, 2], "1": [1, 2], "2": highest_channels(importance.scores(choice)["2"], 2)}


def test_to_be_chosen():
    convolutions = convolutions_of(network())

    def names(*args):
        return [convolution.name for convolution in to_be_chosen(UpdateScheme("net", 3, *args), convolutions)]

    assert names() == []
    assert names({"0": 1.0, "1": 1.0}) == []
    assert names({"2": 0.25, "0": 0.4}) == ["0", "2"]  # in forward order
    assert names({"0": 0.4, "1": 0.5}, {"1": [0, 1]}) == ["0"]
    assert names({"0": 0.1}) == []  # none of three channels


def test_layers_that_update_only_their_bias_have_no_channels():
    assert choose(network(), UpdateScheme("net", 3)) == {}
    assert list(choose(network(), UpdateScheme("net", 3, {"1": 1.0}))) == ["1"]


def test_channels_are_chosen_by_the_weights_a_slice_has_now():
    net = network()
    operations, scheme = find_operations(net, (3, 8, 8)), UpdateScheme("net", 3, {"2": 0.25})
    applied = AppliedScheme(net, scheme, operations, {"2": [0, 5]})
    with torch.no_grad():
        net[2].weight_slice.mul_(100)
    assert choose_channels(net, scheme, operations.convolutions) == {"2": [0, 5]}
    with torch.no_grad():
        net[2].weight_slice.zero_()
    chosen = choose_channels(net, scheme, operations.convolutions)
    assert not {0, 5} & set(chosen["2"])
    applied.remove()
    assert choose_channels(net, scheme, operations.convolutions) == chosen
