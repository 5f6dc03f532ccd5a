"""Promises of the choice of channels: largest norm first, random by seed and layer alone, fixed by the scheme."""

import pytest
import torch
from torch import nn

from microtune.modules.channel_choice import channels_at_random, channels_by_weight_norm, choose_channels
from microtune.modules.operations import find_operations
from microtune.modules.update_scheme import UpdateScheme


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


def choose(net, scheme, *args):
    return choose_channels(net, scheme, find_operations(net, (3, 8, 8)).convolutions, *args)


def test_largest_norms_win():
    weight = torch.zeros(2, 4, 1, 1)
    weight[:, :, 0, 0] = torch.tensor([[1.0, -5.0, 0.0, 3.0], [1.0, 0.0, 2.0, 3.0]])  # squared: 2, 25, 4, 18
    assert [channels_by_weight_norm(weight, 1, count) for count in (1, 2, 3, 4)] == [
        [1],
        [1, 3],
        [1, 2, 3],
        [0, 1, 2, 3],
    ]


def test_it_is_the_l2_norm_of_the_whole_kernel():
    weight = torch.zeros(1, 2, 2, 2)
    weight[0, 0] = 2.0  # L2 norm 4, L1 norm 8
    weight[0, 1, 0, 1] = 5.0  # L2 norm 5, L1 norm 5
    assert channels_by_weight_norm(weight, 1, 1) == [1]


def test_of_equal_norms_the_first_win():
    assert channels_by_weight_norm(torch.ones(5, 300, 1, 1), 1, 3) == [0, 1, 2]
    weight = torch.ones(5, 300, 1, 1)
    weight[:, 200] = 2
    assert channels_by_weight_norm(weight, 1, 3) == [0, 1, 200]


def test_depthwise_channels_are_its_kernels():
    convolution = nn.Conv2d(4, 8, 3, groups=4)  # channel c feeds outputs 2c and 2c + 1
    with torch.no_grad():
        convolution.weight.fill_(0.1)
        convolution.weight[5] = 9.0
        convolution.weight[0] = 5.0
    assert channels_by_weight_norm(convolution.weight, 4, 2) == [0, 2]


def test_grouped_channels_are_numbered_over_the_groups():
    convolution = nn.Conv2d(6, 4, 3, groups=2)  # inputs 3 to 5 feed outputs 2 and 3
    with torch.no_grad():
        convolution.weight.fill_(0.1)
        convolution.weight[3, 1] = 9.0
        convolution.weight[0, 2] = 5.0
    assert channels_by_weight_norm(convolution.weight, 2, 2) == [2, 4]


def test_random_channels_depend_on_seed_and_layer_only():
    first = channels_at_random("a", 100, 10, seed=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert channels_at_random("a", 100, 10, seed=0) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert channels_at_random("b", 100, 10, seed=0) != first
    assert channels_at_random("a", 100, 10, seed=1) != first
    assert first == sorted(set(first))
    assert len(first) == 10
    assert 0 <= first[0] <= first[-1] < 100


def test_random_channels_are_drawn_evenly():
    counts = torch.zeros(10)
    for seed in range(500):
        counts[channels_at_random("layer", 10, 3, seed)] += 1
    # 150 expected of each, standard deviation 10
    assert counts.min() > 100
    assert counts.max() < 200


@pytest.mark.parametrize("choice", ["weight_norm", "random"])
def test_the_scheme_says_how_many_and_may_fix_which(choice):
    net = network()
    scheme = UpdateScheme("net", 3, {"0": 0.67, "1": 0.5, "2": 0.25}, {"1": [7, 0, 3]})
    channels = choose(net, scheme, choice, 3)
    assert {name: len(indexes) for name, indexes in channels.items()} == {"0": 2, "1": 3, "2": 2}
    assert channels["1"] == [0, 3, 7]
    if choice == "weight_norm":
        assert channels["2"] == channels_by_weight_norm(net[2].weight, 2, 2)
    else:
        assert channels["2"] == channels_at_random("2", 8, 2, 3)


def test_layers_that_update_only_their_bias_have_no_channels():
    assert choose(network(), UpdateScheme("net", 3)) == {}
    assert list(choose(network(), UpdateScheme("net", 3, {"1": 1.0}))) == ["1"]
