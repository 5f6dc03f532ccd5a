"""Pruning removes what depends on one another: as exact as zeros, smaller by what the closed form says."""

import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, relu6

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import multiply_accumulates
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.studies.structured_pruning import (
    ChannelGroup,
    check_criterion,
    find_groups,
    measure_units,
    pruned_multiply_accumulates,
    remove_units,
    unit_scores,
    units_to_remove,
    without_unit,
)

DATA_CRITERIA = ("contribution", "taylor", "fisher", "activation_norm")


class SmallNetwork(nn.Module):
    """A stem of 4 channels, an inverted residual of 6 expanded ones, a last projection to 5 features, 3 classes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.expand = nn.Conv2d(4, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.project = nn.Conv2d(6, 4, 1)
        self.last = nn.Conv2d(4, 5, 1)
        self.classifier = nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(relu6(self.depthwise(relu6(self.expand(x)))))
        return self.classifier(self.last(x).mean([2, 3]))


EXPANDED = ChannelGroup("expand", 6, ("expand",), ("depthwise",), ("project",))
STREAM = ChannelGroup("stem", 4, ("stem", "project"), (), ("expand", "last"))
FEATURES = ChannelGroup("last", 5, ("last",), (), ("classifier",))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return SmallNetwork().double()


@pytest.fixture(scope="module", params=["symmetric", "keras", "with head convolution"])
def mobilenet(request):
    """A folded MobileNetV2 of random weights, batch norm included, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        padding = "keras" if request.param == "keras" else "symmetric"
        network = mobilenet_v2(0.1, 4, head_convolution=request.param == "with head convolution", padding=padding)
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -0.5, 1)
        return fold_batch_norm(network.eval(), (3, 32, 32)).double()


def batches_of(shape, classes, sizes=(4, 3)):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, *shape, generator=generator, dtype=torch.float64),
            torch.randint(classes, (size,), generator=generator),
        )
        for size in sizes
    ]


def forward_work(network, shape):
    return multiply_accumulates(find_operations(network, shape), UpdateScheme("", bias_depth=0)).forward


def test_groups_are_what_depends_on_one_another(small):
    assert find_groups(small, (2, 8, 8)) == [STREAM, EXPANDED, FEATURES]
    assert [group.kind for group in (STREAM, EXPANDED, FEATURES)] == ["residual_stream", "expanded", "residual_stream"]


def test_every_channel_of_mobilenet_is_in_one_group(mobilenet):
    groups = find_groups(mobilenet, (3, 32, 32))
    convolutions = find_operations(mobilenet, (3, 32, 32)).convolutions
    dense = [convolution.name for convolution in convolutions if not convolution.is_depthwise]
    assert sorted(layer for group in groups for layer in group.writers) == sorted(dense)
    assert sorted(layer for group in groups for layer in group.readers) == sorted([*dense[1:], "classifier.1"])
    depthwise = [convolution.name for convolution in convolutions if convolution.is_depthwise]
    assert sorted(layer for group in groups for layer in group.depthwise) == sorted(depthwise)
    order = [convolution.name for convolution in convolutions]
    assert [order.index(group.name) for group in groups] == sorted(order.index(group.name) for group in groups)
    assert sum(group.kind == "expanded" for group in groups) == len(depthwise)
    # five stages have several blocks, and at this width the first block adds the stem to its output
    assert sum(len(group.writers) > 1 for group in groups) == 6


def test_the_network_is_left_as_it_is(small):
    small.train()
    small.stem.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with torch.no_grad():
        find_groups(small, (2, 8, 8))
        importance = measure_units(small, find_operations(small, (2, 8, 8)), batches_of((2, 8, 8), 3))
        unit_scores(small, (2, 8, 8), "magnitude", importance)
        smaller = remove_units(small, (2, 8, 8), {"stem": [0, 2]})
    assert small.training
    assert smaller.training
    assert not remove_units(small.eval(), (2, 8, 8), {}).training
    assert not small.stem.weight.requires_grad
    assert small.stem.weight.grad is None
    assert small.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert [module.in_channels for module in (small.expand, small.last)] == [4, 4]


def test_a_unit_that_nothing_reads_is_as_good_as_removed(mobilenet):
    samples = batches_of((3, 32, 32), 4)[0][0]
    changed = 0
    with torch.no_grad():
        whole = mobilenet(samples)
        for group in find_groups(mobilenet, (3, 32, 32)):
            channel = group.channels - 1
            with without_unit(mobilenet, group, channel):
                silent = mobilenet(samples)
            removed = remove_units(mobilenet, (3, 32, 32), {group.name: [channel]})(samples)
            torch.testing.assert_close(silent, removed, rtol=1e-11, atol=1e-11)
            changed += not torch.allclose(silent, whole, rtol=1e-6, atol=1e-9)
            assert torch.equal(mobilenet(samples), whole)
    assert changed > 10  # of 22 to 25 groups; some are silent anyway


def test_an_error_within_the_block_leaves_the_weights(small):
    before = small.project.weight.clone()
    within = without_unit(small, EXPANDED, 2)
    within.__enter__()
    assert not small.project.weight[:, 2].any()
    error = RuntimeError("stop")
    assert not within.__exit__(RuntimeError, error, None)
    assert torch.equal(small.project.weight, before)


def test_removed_units_are_gone_for_real(small):
    smaller = remove_units(small, (2, 8, 8), {"stem": [1], "expand": [5, 0], "last": []})
    shapes = {name: tuple(value.shape) for name, value in smaller.state_dict().items()}
    assert shapes == {
        "stem.weight": (3, 2, 3, 3), "stem.bias": (3,),
        "expand.weight": (4, 3, 1, 1), "expand.bias": (4,),
        "depthwise.weight": (4, 1, 3, 3), "depthwise.bias": (4,),
        "project.weight": (3, 4, 1, 1), "project.bias": (3,),
        "last.weight": (5, 3, 1, 1), "last.bias": (5,),
        "classifier.weight": (3, 5), "classifier.bias": (3,),
    }  # fmt: skip
    assert smaller.depthwise.groups == 4
    stay, stay_expanded = [0, 2, 3], [1, 2, 3, 4]
    assert torch.equal(smaller.project.weight, small.project.weight[stay][:, stay_expanded])
    assert torch.equal(smaller.depthwise.weight, small.depthwise.weight[stay_expanded])
    assert torch.equal(smaller.last.weight, small.last.weight[:, stay])


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
@pytest.mark.parametrize("group", [STREAM, EXPANDED, FEATURES], ids=lambda group: group.name)
def test_scores_sum_those_of_the_layers_that_read_the_unit(small, criterion, group):
    """By autograd, sample by sample; the classifier counts as a 1x1 convolution."""
    batches = batches_of((2, 8, 8), 3)
    importance = measure_units(small, find_operations(small, (2, 8, 8)), batches)
    found = unit_scores(small, (2, 8, 8), criterion, importance)[group.name]
    layers = [small.get_submodule(name) for name in (*group.depthwise, *group.readers)]
    inputs = {}
    hooks = [layer.register_forward_pre_hook(lambda m, given: inputs.update({m: given[0]})) for layer in layers]
    per_sample = {layer: [] for layer in layers}
    squares = {layer: [] for layer in layers}
    for samples, labels in batches:
        for index in range(len(labels)):
            small.zero_grad()
            cross_entropy(small(samples[index : index + 1]), labels[index : index + 1]).backward()
            for layer in layers:
                per_sample[layer].append(layer.weight.grad.clone())
                squares[layer].append(inputs[layer].detach().square().flatten(2 if inputs[layer].ndim > 2 else 1))
    for hook in hooks:
        hook.remove()

    def by_channel(layer, values):
        """Of shape (channel, weights of it): a depthwise convolution has its channels first, others second."""
        is_depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
        return (values if is_depthwise else values.transpose(0, 1)).flatten(1)

    expected = 0
    for layer in layers:
        gradients = [by_channel(layer, gradient) for gradient in per_sample[layer]]
        weight = by_channel(layer, layer.weight.detach())
        if criterion == "contribution":
            expected += (sum(gradients) / len(gradients)).square().sum(1)
        elif criterion == "taylor":
            expected += sum((gradient * weight).sum(1).square() for gradient in gradients) / len(gradients)
        elif criterion == "fisher":
            expected += sum(gradient.square().sum(1) for gradient in gradients) / len(gradients)
        else:
            sums = [square.sum(2)[0] if square.ndim > 2 else square[0] for square in squares[layer]]
            expected += sum(sums) / len(sums)
    if criterion == "activation_norm":
        expected = expected.sqrt() / expected.sqrt().mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_magnitude_is_that_of_the_literature(small):
    """The mean over dense layers of a unit's squared weights, over its mean in the group; no depthwise weights."""
    found = unit_scores(small, (2, 8, 8), "magnitude")
    row, column = (lambda layer: layer.weight.square().flatten(1).sum(1)), (lambda layer: layer.weight.square().sum(0))
    of_group = {
        "stem": row(small.stem) + row(small.project) + column(small.expand).flatten() + column(small.last).flatten(),
        "expand": row(small.expand) + column(small.project).flatten(),
        "last": row(small.last) + column(small.classifier),
    }
    assert found.keys() == of_group.keys()
    for name, expected in of_group.items():
        torch.testing.assert_close(found[name], (expected / expected.mean()).detach(), rtol=1e-5, atol=1e-6)


def test_random_scores_are_a_function_of_the_seed(small):
    first, again, other = (unit_scores(small, (2, 8, 8), "random", seed=seed) for seed in (0, 0, 2**32))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert all(((scores >= 0) & (scores < 1)).all() for scores in first.values())


def test_dead_channels_have_a_norm_of_zero_and_not_of_nan(small):
    nn.init.zeros_(small.expand.weight)
    nn.init.zeros_(small.expand.bias)
    nn.init.zeros_(small.depthwise.bias)
    importance = measure_units(small, find_operations(small, (2, 8, 8)), batches_of((2, 8, 8), 3))
    assert unit_scores(small, (2, 8, 8), "activation_norm", importance)["expand"].tolist() == [0] * 6


def whole_and_least(operations, groups, channel_multiple):
    """Multiply-accumulates with all channels, and with those that must stay."""
    of_all = {group.name: group.channels for group in groups}
    least = {group.name: min(channel_multiple, group.channels) for group in groups}
    return tuple(pruned_multiply_accumulates(operations, groups, kept) for kept in (of_all, least))


@pytest.fixture(scope="module")
def parts(mobilenet):
    """Its operations and groups."""
    return find_operations(mobilenet, (3, 32, 32)), find_groups(mobilenet, (3, 32, 32))


@settings(max_examples=25, deadline=None)
@given(sparsity=st.floats(0.02, 0.9), channel_multiple=st.integers(1, 9), seed=st.integers(0, 1000))
def test_the_lowest_units_go_and_no_more_than_must(parts, sparsity, channel_multiple, seed):
    operations, groups = parts
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.channels, generator=generator) for group in groups}
    whole, least = whole_and_least(operations, groups, channel_multiple)
    goal = (1 - sparsity) * whole
    if least > goal:
        text = f"sparsity {sparsity:g} would leave a layer without {channel_multiple} channels"
        with pytest.raises(UserError, match=re.escape(text)):
            units_to_remove(operations, groups, scores, sparsity, channel_multiple)
        return
    removed = units_to_remove(operations, groups, scores, sparsity, channel_multiple)
    kept = {group.name: group.channels - len(removed[group.name]) for group in groups}
    assert pruned_multiply_accumulates(operations, groups, kept) <= goal
    for group in groups:
        gone = removed[group.name]
        assert gone == sorted(scores[group.name].argsort()[: len(gone)].tolist())
        assert kept[group.name] == group.channels or kept[group.name] % channel_multiple == 0
        assert kept[group.name] >= min(channel_multiple, group.channels)
    if channel_multiple == 1:
        highest_gone, last = max((float(scores[name][gone].max()), name) for name, gone in removed.items() if gone)
        assert pruned_multiply_accumulates(operations, groups, kept | {last: kept[last] + 1}) > goal
        for group in groups:
            lowest_left = float(scores[group.name].sort().values[len(removed[group.name])])
            # lower ones stay only where they are the last of their layer
            assert lowest_left > highest_gone or kept[group.name] == 1


@pytest.mark.parametrize("channel_multiple", [1, 4])
def test_the_closed_form_is_what_the_pruned_network_does(mobilenet, channel_multiple):
    shape = (3, 32, 32)
    operations, groups = find_operations(mobilenet, shape), find_groups(mobilenet, shape)
    scores = unit_scores(mobilenet, shape, "random", seed=3)
    removed = units_to_remove(operations, groups, scores, 0.4, channel_multiple)
    smaller = remove_units(mobilenet, shape, removed)
    kept = {group.name: group.channels - len(removed[group.name]) for group in groups}
    assert forward_work(smaller, shape) == pruned_multiply_accumulates(operations, groups, kept)
    assert forward_work(smaller, shape) <= 0.6 * forward_work(mobilenet, shape)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in mobilenet.parameters())
    before, after = (PeakMemory(find_operations(one, shape)).inference_peak_bytes for one in (mobilenet, smaller))
    assert after <= before
    # its groups are those of before, so that it can be pruned again
    again = find_groups(smaller, shape)
    assert [(group.name, group.channels) for group in again] == list(kept.items())


def test_of_equal_scores_the_first_go(small):
    operations, groups = find_operations(small, (2, 8, 8)), find_groups(small, (2, 8, 8))
    equal = {group.name: torch.ones(group.channels) for group in groups}
    whole = forward_work(small, (2, 8, 8))
    one_stem = pruned_multiply_accumulates(operations, groups, {"stem": 3, "expand": 6, "last": 5})
    removed = units_to_remove(operations, groups, equal, 1 - one_stem / whole - 1e-9)
    assert removed == {"stem": [0], "expand": [], "last": []}


class Concatenating(SmallNetwork):
    """The second half of what ``last`` reads comes from elsewhere."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.project(relu6(self.depthwise(relu6(self.expand(x)))))], dim=1)
        return self.classifier(self.last(x).mean([2, 3]))


class Grouped(SmallNetwork):
    """A convolution in two groups."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=2)


MISTAKES = {
    "sparsity 0": (lambda s: units_to_remove(None, [], {}, 0.0), r"sparsity is 0\.0: give the part of multiply-acc"),
    "sparsity 1": (lambda s: units_to_remove(None, [], {}, 1), r"sparsity is 1: give .* above 0 and below 1"),
    "multiple 0": (lambda s: units_to_remove(None, [], {}, 0.5, 0), r"channel_multiple is 0: give 1 or more"),
    "unknown group": (lambda s: remove_units(s, (2, 8, 8), {"project": [0]}), r"project begins no group of channels: "),
    "unknown channel": (
        lambda s: remove_units(s, (2, 8, 8), {"stem": [4]}),
        r"channels \[4\] of stem cannot be removed: give some of 0 to 3",
    ),
    "all channels": (
        lambda s: remove_units(s, (2, 8, 8), {"stem": [0, 1, 2, 3]}),
        r"channels \[0, 1, 2, 3\] of stem cannot be removed",
    ),
    "unknown criterion": (lambda s: check_criterion("size"), r"criterion 'size' is unknown: give some of contribution"),
    "concatenation": (
        lambda s: find_groups(Concatenating(), (2, 8, 8)),
        r"channel numbers of last are not those of project, .* give a network without, such as MobileNetV2",
    ),
    "groups of channels": (lambda s: find_groups(Grouped(), (2, 8, 8)), r"depthwise has 2 groups of channels: give"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(small, mistake):
    call, text = MISTAKES[mistake]
    with pytest.raises(UserError, match=text):
        call(small)


def test_a_sparsity_out_of_reach_says_what_is(small):
    operations, groups = find_operations(small, (2, 8, 8)), find_groups(small, (2, 8, 8))
    scores = unit_scores(small, (2, 8, 8), "random")
    with pytest.raises(UserError, match=r"would leave a layer without 3 channels: give at most 0\.") as error:
        units_to_remove(operations, groups, scores, 0.95, channel_multiple=3)
    most = float(str(error.value).split()[-1])
    units_to_remove(operations, groups, scores, most - 0.001, channel_multiple=3)


def test_without_the_library_the_extra_is_named(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UserError, match=r"needs the package torch-pruning: uv sync --extra prune, or pip install"):
        find_groups(small, (2, 8, 8))


def test_scores_of_data_keep_the_number_of_samples(small):
    importance = measure_units(small, find_operations(small, (2, 8, 8)), batches_of((2, 8, 8), 3))
    assert importance.samples == 7
    assert list(importance.layers) == ["stem", "expand", "depthwise", "project", "last", "classifier"]
