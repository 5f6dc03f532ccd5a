"""Extra memory meets the published figures, autograd bytes what PyTorch keeps."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
import torchvision
from torch import nn

from microtune.modules.int8.network import QuantizedNetwork, load_quantized_tensors
from microtune.modules.memory.saved_for_backward import measure_saved_bytes
from microtune.modules.memory.training_memory import (
    DynamicChoice,
    MultiplyAccumulates,
    autograd_bytes_per_sample,
    dynamic_choice,
    extra_memory_bytes,
    extra_memory_per_layer,
    flash_bytes,
    multiply_accumulates,
    needs_gradient,
)
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import Convolution, NetworkOperations, find_operations
from microtune.modules.sparse_update.channel_choice import choose_channels, to_be_chosen
from microtune.modules.sparse_update.channel_importance import Criterion, measure_importance
from microtune.modules.sparse_update.scheme_application import AppliedScheme
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

REFERENCE = Path(__file__).parents[4] / "shared" / "reference"
CLASSIFIER_FEATURES = 112


@pytest.fixture(scope="module")
def published_convolutions() -> list[Convolution]:
    """The layers of Lin et al.'s MobileNetV2-0.35 at 128 px."""
    path = REFERENCE / "mbv2-w0.35_layers.csv"
    if not path.exists():
        pytest.skip(f"the published layer table {path} is not beside the project")
    with path.open() as file:
        return [_convolution(row) for row in csv.DictReader(file)]


def _convolution(row: dict[str, str]) -> Convolution:
    def square(key: str) -> tuple[int, int]:
        return int(row[key]), int(row[key])

    channels = {key: int(row[key]) for key in ("in_channels", "out_channels", "groups")}
    return Convolution(
        name=row["name"],
        kernel_size=square("kernel"),
        stride=square("stride"),
        in_size=square("in_size"),
        padded_size=square("in_size"),
        out_size=square("out_size"),
        has_bias=True,
        **channels,
    )


@pytest.fixture(scope="module")
def published_schemes(published_convolutions) -> dict[str, tuple[UpdateScheme, float]]:
    """Label to scheme and its extra memory in bytes."""
    schemes = {}
    for entry in json.loads((REFERENCE / "mbv2-w0.35_extra_memory.json").read_text()):
        weights = {published_convolutions[int(index)].name: ratio for index, ratio in entry["weights"].items()}
        scheme = UpdateScheme("mobilenet_v2-w0.35", entry["bias_depth"], weights)
        schemes[entry["scheme"]] = (scheme, entry["extra_memory_bytes"])
    return schemes


def test_extra_memory_is_published_figure_to_the_byte(published_convolutions, published_schemes):
    assert len(published_schemes) == 10
    computed = {
        label: extra_memory_bytes(published_convolutions, CLASSIFIER_FEATURES, scheme)
        for label, (scheme, _) in published_schemes.items()
    }
    assert computed == {label: published for label, (_, published) in published_schemes.items()}


def test_our_network_has_the_published_shapes(published_convolutions, published_schemes):
    operations = find_operations(mobilenet_v2(0.35, num_classes=10), (3, 128, 128))
    for scheme, published in published_schemes.values():
        index_of = {convolution.name: index for index, convolution in enumerate(published_convolutions)}
        weights = {operations.convolutions[index_of[name]].name: ratio for name, ratio in scheme.weights.items()}
        ours = UpdateScheme(scheme.network, scheme.bias_depth, weights)
        assert extra_memory_bytes(operations.convolutions, operations.classifier_features, ours) == published


def test_extra_memory_of_a_hand_worked_layer():
    operations = find_operations(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), Pooled(6)), (4, 7, 7))
    (layer,) = extra_memory_per_layer(operations.convolutions, UpdateScheme("x", 1, {"0": 0.75}))
    assert layer.bias_bytes == 4 * 6
    assert layer.mask_bytes == 6 * 5 * 5 / 8
    assert layer.input_bytes == 3 * 7 * 7
    assert layer.weight_bytes == 3 * (6 // 2) * 9
    total_bytes = extra_memory_bytes(operations.convolutions, 6, UpdateScheme("x", 1, {"0": 0.75}))
    assert total_bytes == layer.total_bytes + 6


def test_extra_memory_is_the_sum_over_layers(published_convolutions, published_schemes):
    for scheme, published in published_schemes.values():
        layers = extra_memory_per_layer(published_convolutions, scheme)
        assert sum(layer.total_bytes for layer in layers) + CLASSIFIER_FEATURES == published
        outside = layers[: len(layers) - scheme.bias_depth]
        assert all(layer.total_bytes == 0 for layer in outside)


class Pooled(nn.Module):
    """Mean over the feature map, then a classifier."""

    def __init__(self, features: int):
        super().__init__()
        self.linear = nn.Linear(features, 2)

    def forward(self, x):
        return self.linear(x.mean([2, 3]))


def saved_bytes(network: nn.Module, batch: torch.Tensor) -> int:
    """Bytes of the storages that PyTorch keeps for backward, the network's own left out."""
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(batch)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


NETWORKS = {
    "mobilenet_v2": lambda: mobilenet_v2(0.35, num_classes=10),
    "padded as Keras": lambda: mobilenet_v2(0.35, num_classes=10, padding="keras"),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
}


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("ratios", [(), (1.0,), (0.5, 1.0), (0.34, None, 1.0)])
def test_autograd_bytes_are_what_pytorch_keeps(build, ratios):
    shape, batch_size = (3, 64, 64), 2
    network = fold_batch_norm(build(), shape)
    operations = find_operations(network, shape)
    count = len(operations.convolutions)
    for bias_depth in (0, 7, count // 2, count):
        inside = operations.convolutions[count - bias_depth :]
        chosen = [(c.name, ratios[index % len(ratios)]) for index, c in enumerate(inside) if ratios]
        weights = {name: ratio for name, ratio in chosen if ratio is not None}
        scheme = UpdateScheme("x", bias_depth, weights)
        channels = {c.name: list(range(scheme.updated_channels(c))) for c in inside if c.name in weights}
        applied = AppliedScheme(network, scheme, operations, channels)
        measured = saved_bytes(network, torch.randn(batch_size, *shape))
        applied.remove()
        assert autograd_bytes_per_sample(operations, scheme) * batch_size == measured


def test_autograd_account_names_an_unknown_operation():
    class Gated(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[1](x * x)

    operations = find_operations(Gated(nn.Conv2d(3, 4, 3), Pooled(4)), (3, 8, 8))
    with pytest.raises(UserError, match=r"operation mul 0 needs a gradient .* is not in the account"):
        autograd_bytes_per_sample(operations, UpdateScheme("x", 1))
    assert autograd_bytes_per_sample(operations, UpdateScheme("x", 0)) == 4 * 4


def test_reach_begins_at_the_first_updated_bias():
    operations = find_operations(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), Pooled(5)), (3, 8, 8))
    assert needs_gradient(operations, 0) == (False, False, False, False, False)
    assert needs_gradient(operations, 1) == (False, False, True, True, True)
    assert needs_gradient(operations, 2) == (False, True, True, True, True)


def test_multiply_accumulates_of_a_hand_worked_network():
    operations = find_operations(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1, groups=2), Pooled(6)), (3, 8, 8))
    first, second, classifier = 3 * 9 * 4 * 36, 4 * 3 * 36, 6 * 2
    forward = first + second + classifier
    assert multiply_accumulates(operations, UpdateScheme("x", 0)) == MultiplyAccumulates(forward, classifier)
    biases = MultiplyAccumulates(forward, second + 2 * classifier)
    assert multiply_accumulates(operations, UpdateScheme("x", 2)) == biases
    half = MultiplyAccumulates(forward, second // 2 + 2 * classifier)
    assert multiply_accumulates(operations, UpdateScheme("x", 1, {"1": 0.5})) == half


def test_flash_holds_what_is_frozen():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 2)
    )
    operations = find_operations(network, (3, 3, 3))
    hidden = 6 * 5 + 4 * 5
    assert flash_bytes(operations, UpdateScheme("x", 0)) == 3 * 4 * 9 + 4 * 4 + 4 * 3 + 4 * 6 + hidden
    assert flash_bytes(operations, UpdateScheme("x", 1, {"1": 0.5})) == 3 * 4 * 9 + 4 * 4 + 2 * 3 + hidden


def test_scheme_of_another_network_is_refused():
    operations = find_operations(nn.Sequential(nn.Conv2d(3, 4, 3), Pooled(4)), (3, 8, 8))
    scheme = UpdateScheme("x", 2)
    for account in (autograd_bytes_per_sample, multiply_accumulates, flash_bytes):
        with pytest.raises(UserError, match="bias_depth is 2"):
            account(operations, scheme)
    with pytest.raises(UserError, match="bias_depth is 2"):
        extra_memory_bytes(operations.convolutions, 4, scheme)


def choosing_network() -> tuple[nn.Module, NetworkOperations]:
    """Two layers that may choose, an ordinary one and a depthwise one, before and behind one that is whole."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 10, 3),
        nn.ReLU6(),
        nn.Conv2d(10, 4, 1),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        Pooled(6),
    )
    return network, find_operations(network, (3, 8, 8))


CHOOSING = UpdateScheme("x", 3, {"2": 0.4, "3": 0.75, "5": 1.0})  # 4 of 10, 3 of 4 and all 8 channels


@pytest.mark.parametrize(
    ("choice", "score_bytes", "sums_gradients", "passes"),
    [
        ("weight_norm", 4 * (10 + 4), False, 0),
        ("random", 0, False, 0),
        ("activation_norm", 4 * (10 + 4), False, 1),
        ("taylor", 4 * (10 + 4), False, 3),  # ceil(10 / 4)
        ("fisher", 4 * (10 + 4), False, 3),
        ("gradient_norm", 4 * (10 + 4), True, 3),
        ("loss_decrease", 4 * (10 + 4), True, 3),
    ],
)
def test_dynamic_choice_of_a_hand_worked_network(choice, score_bytes, sums_gradients, passes):
    found = dynamic_choice(choosing_network()[1], CHOOSING, choice)
    frozen = 3 * 10 * 9 + 4 * 10 + 6 * 4 + 1 * 2 * 9  # first layer with its bias, 6 and 1 channels of 4 and 2 * 9 each
    may_leave = 4 * 4 + 3 * 2 * 9  # the slices; the whole layer stays in SRAM
    assert found == DynamicChoice(score_bytes, sums_gradients, frozen + may_leave, 4 * 4 + 1 * 2 * 9, passes)


@pytest.mark.parametrize(
    "scheme",
    [UpdateScheme("x", 3), UpdateScheme("x", 1, {"5": 1.0}), UpdateScheme("x", 3, {"2": 0.4}, {"2": [1, 5, 7, 9]})],
    ids=["biases", "whole", "fixed"],
)
def test_dynamic_choice_where_there_is_nothing_to_choose(scheme):
    operations = choosing_network()[1]
    expected = DynamicChoice(0, False, flash_bytes(operations, scheme), 0, 0)
    assert {dynamic_choice(operations, scheme, choice) for choice in get_args(Criterion)} == {expected}


def slices_of(operations: NetworkOperations, scheme: UpdateScheme, passes: int) -> Iterator[dict[str, list[int]]]:
    """As many channels of each layer at a time as the scheme updates, until all have had their turn."""
    for number in range(passes):
        yield {
            c.name: [(number * k + offset) % c.in_channels for offset in range(k)]
            for c in to_be_chosen(scheme, operations.convolutions)
            for k in [scheme.updated_channels(c)]
        }


def scores_slice_by_slice(
    network: nn.Module, operations: NetworkOperations, scheme: UpdateScheme, x: torch.Tensor, y: torch.Tensor
) -> tuple[dict[str, dict[str, torch.Tensor]], list[int]]:
    """Scores as a device finds them, sample by sample, and what PyTorch kept for backward in every pass."""
    channels = choose_channels(network, scheme, operations.convolutions)
    applied = AppliedScheme(network, scheme, operations, channels)
    kept = [measure_saved_bytes(network, x[:1])]
    scores = {name: {} for name in ("taylor", "fisher", "gradient_norm")}
    passes = dynamic_choice(operations, scheme, "taylor").scoring_passes
    for slices in slices_of(operations, scheme, passes):
        applied.move_channels(slices, [])
        kept.append(measure_saved_bytes(network, x[:1]))
        sums = {name: [0, 0, 0] for name in slices}
        for sample, label in zip(x.split(1), y.split(1), strict=True):
            network.zero_grad()
            torch.nn.functional.cross_entropy(network(sample), label).backward()
            for name, (taylor, fisher, gradient) in sums.items():
                part = network.get_submodule(name).weight_slice
                products = (part.grad * part.detach()).flatten(1).sum(1)
                squares = part.grad.square().flatten(1).sum(1)
                sums[name] = [taylor + products.square(), fisher + squares, gradient + part.grad]
        for name, (taylor, fisher, gradient) in sums.items():
            layer, count = network.get_submodule(name), len(x)
            for score, values in (
                ("taylor", taylor / count),
                ("fisher", fisher / count),
                ("gradient_norm", (gradient / count).flatten(1).norm(dim=1)),
            ):
                of_layer = scores[score].setdefault(name, torch.full((layer.convolution[0].in_channels,), torch.nan))
                of_layer[layer.channels] = values.float()
    applied.remove()
    return scores, kept


@pytest.mark.parametrize("is_int8", [False, True], ids=["float", "int8"])
def test_scoring_slice_by_slice_gives_the_scores_and_keeps_no_more_than_training(is_int8, small_graph, small_tensors):
    torch.manual_seed(0)
    if is_int8:
        network, scheme = QuantizedNetwork(small_graph), UpdateScheme("x", 5, {"blocks.2.depthwise": 0.3})
        scheme = UpdateScheme("x", 5, {**scheme.weights, "blocks.1.pointwise2": 0.5})
        load_quantized_tensors(network, small_tensors)
        network.eval()
        operations, x, y = find_operations(network, (3, 32, 32)), torch.randn(3, 3, 32, 32) / 2, torch.tensor([0, 4, 9])
    else:
        network, operations = choosing_network()
        scheme, x, y = CHOOSING, torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 1, 0, 1])
    chosen = to_be_chosen(scheme, operations.convolutions)
    expected = measure_importance(network, chosen, [(x, y)])
    found, (in_training, *in_scoring) = scores_slice_by_slice(network, operations, scheme, x, y)
    for name, of_layers in found.items():
        for layer, scores in expected.scores(name).items():
            torch.testing.assert_close(of_layers[layer].double(), scores, rtol=1e-4, atol=1e-6 * scores.max().item())
    assert in_scoring == [in_training] * dynamic_choice(operations, scheme, "taylor").scoring_passes
    assert in_training == autograd_bytes_per_sample(operations, scheme)
    bytes_of_scores = sum(scores.nbytes for scores in found["taylor"].values())
    assert bytes_of_scores == dynamic_choice(operations, scheme, "taylor").score_bytes
