"""Promises of the peak's linear form; what the bytes are is in the by-hand and simulation tests."""

import time

import numpy as np
import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from microtune.modules.memory.microcontrollers import microcontroller
from microtune.modules.memory.peak_memory import CATEGORIES, PeakMemory, largest_resolution_that_fits
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

MOBILENET = find_operations(mobilenet_v2(0.35, num_classes=10), (3, 128, 128))
RESNET = find_operations(torchvision.models.resnet18(num_classes=10), (3, 64, 64))
PEAK_MEMORIES = {
    network: {
        "default": PeakMemory(operations),
        "without reordering": PeakMemory(operations, reordering=False),
        "accumulating": PeakMemory(operations, gradient_accumulation=True),
        "not in place": PeakMemory(operations, depthwise_in_place=False),
        "momentum": PeakMemory(operations, optimizer_state="momentum"),
        "adam": PeakMemory(operations, optimizer_state="adam"),
        "int8 gradients": PeakMemory(operations, gradient_bytes=1),
        "latent weights": PeakMemory(operations, latent_weights=True),
    }
    for network, operations in (("mobilenet", MOBILENET), ("resnet", RESNET))
}


def random_schemes(operations, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bias depths and updated channels, about half of the layers with none."""
    generator = np.random.default_rng(seed)
    layers = len(operations.convolutions)
    in_channels = np.array([convolution.in_channels for convolution in operations.convolutions])
    depths = generator.integers(0, layers + 1, count)
    ratios = generator.choice([0, 0, 0, 0.125, 0.25, 0.5, 1], (count, layers))
    ratios[np.arange(layers) < layers - depths[:, None]] = 0
    return depths, np.floor(ratios * in_channels).astype(np.int64)


def as_scheme(operations, depth: int, updated_channels: np.ndarray) -> UpdateScheme:
    pairs = zip(operations.convolutions, updated_channels.tolist(), strict=True)
    return UpdateScheme("x", int(depth), {c.name: count / c.in_channels for c, count in pairs if count})


@pytest.mark.parametrize("network", PEAK_MEMORIES)
@pytest.mark.parametrize("options", PEAK_MEMORIES["mobilenet"])
def test_batch_equals_one_by_one(network, options):
    peak_memory = PEAK_MEMORIES[network][options]
    depths, updated = random_schemes(peak_memory.operations, 40, seed=3)
    peaks = peak_memory.peaks_bytes(depths, updated)
    schemes = [as_scheme(peak_memory.operations, *row) for row in zip(depths, updated, strict=True)]
    assert peaks.tolist() == [peak_memory.peak_bytes(scheme) for scheme in schemes]


@pytest.mark.parametrize("network", PEAK_MEMORIES)
def test_options_only_cost(network):
    depths, updated = random_schemes(PEAK_MEMORIES[network]["default"].operations, 500, seed=4)
    peaks = {name: peak_memory.peaks_bytes(depths, updated) for name, peak_memory in PEAK_MEMORIES[network].items()}
    assert (peaks["without reordering"] >= peaks["default"]).all()
    assert (peaks["without reordering"] > peaks["default"]).any()
    assert (peaks["accumulating"] >= peaks["without reordering"]).all()
    assert (peaks["not in place"] >= peaks["default"]).all()
    assert (peaks["momentum"] > peaks["default"]).all()
    assert (peaks["adam"] > peaks["momentum"]).all()
    assert (peaks["int8 gradients"] <= peaks["default"]).all()
    latent = PEAK_MEMORIES[network]["latent weights"].operations.convolutions
    weights = updated @ np.array([convolution.weight_elements_per_channel for convolution in latent])
    assert (peaks["latent weights"] == peaks["default"] + 4 * weights).all()
    assert (peaks["default"] >= PEAK_MEMORIES[network]["default"].floor_bytes).all()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), network=st.sampled_from(["mobilenet", "resnet"]))
def test_more_copied_channels_never_need_less(data, network):
    """Of copied channels only: keeping all is no copy, and so may take less than keeping all but one."""
    peak_memory = PEAK_MEMORIES[network]["default"]
    depths, updated = random_schemes(peak_memory.operations, 1, seed=data.draw(st.integers(0, 10_000)))
    layers = np.flatnonzero(np.arange(updated.shape[1]) >= updated.shape[1] - depths[0])
    if len(layers) == 0:
        return
    layer = data.draw(st.sampled_from(layers.tolist()))
    most = peak_memory.operations.convolutions[layer].in_channels - 1
    counts = sorted(data.draw(st.lists(st.integers(0, most), min_size=2, max_size=6)))
    rows = np.repeat(updated, len(counts), axis=0)
    rows[:, layer] = counts
    peaks = peak_memory.peaks_bytes(np.repeat(depths, len(counts)), rows)
    assert (np.diff(peaks) >= 0).all()


@pytest.mark.parametrize(("resolution", "floor_kib"), [(128, 224), (96, 126)])
def test_floor_is_the_first_expansion(resolution, floor_kib):
    operations = find_operations(mobilenet_v2(0.35, num_classes=10), (3, resolution, resolution))
    timeline = PeakMemory(operations).timeline(UpdateScheme("x", 0))
    activations = timeline.bytes_of_category["activations"]
    assert activations.max() == floor_kib * 1024
    assert timeline.moments[activations.argmax()] == "features.2.conv.0.0 forward"
    classifier_bytes = 4 * (112 + 1) * 10
    assert PeakMemory(operations).floor_bytes == floor_kib * 1024 + classifier_bytes


def test_timeline_names_every_moment_and_category():
    timeline = PEAK_MEMORIES["mobilenet"]["default"].timeline(UpdateScheme("x", 3, {"features.17.conv.0.0": 0.5}))
    assert tuple(timeline.bytes_of_category) == CATEGORIES
    assert timeline.moments[:1] == ("features.0.0 forward",)
    assert timeline.moments[-5:] == (
        "classifier.1 backward",
        "mean 0 backward",
        "features.17.conv.2 backward",
        "features.17.conv.1.0 backward",
        "features.17.conv.0.0 backward",
    )
    assert all(in_bytes.shape == (len(timeline.moments),) for in_bytes in timeline.bytes_of_category.values())
    assert all((in_bytes >= 0).all() for in_bytes in timeline.bytes_of_category.values())
    kept = timeline.bytes_of_category["kept inputs"]
    position = timeline.moments.index("features.17.conv.0.0 forward")
    assert kept[position - 1] == 0
    assert kept[position] == kept[-1] == 28 * 4 * 4


def test_rows_give_the_timeline():
    """What a mixed-integer program relies on: constants and coefficients, and nothing else."""
    peak_memory = PEAK_MEMORIES["mobilenet"]["default"]
    scheme = UpdateScheme("x", 20, {"features.14.conv.0.0": 1.0, "features.15.conv.0.0": 0.25})
    rows = peak_memory.rows(20)
    whole, part = (next(i for i, c in enumerate(MOBILENET.convolutions) if c.name == name) for name in scheme.weights)
    total = rows.constant + 32 * rows.per_updated_channel[..., whole] + rows.kept_whole[..., whole]
    total += 14 * (rows.per_updated_channel[..., part] + rows.per_kept_channel[..., part])
    assert (total.sum(0) == peak_memory.timeline(scheme).total_bytes).all()


def test_layers_that_read_one_activation_keep_its_union_once():
    peak_memory = PEAK_MEMORIES["resnet"]["default"]
    first, second = "layer2.0.conv1", "layer2.0.downsample.0"

    def kept_channels(weights, channels=None):
        timeline = peak_memory.timeline(UpdateScheme("x", 16, weights, channels or {}))
        at_the_end = timeline.bytes_of_category["kept inputs"][timeline.moments.index(f"{first} backward")]
        return at_the_end / (16 * 16)

    assert kept_channels({first: 0.25}) == 16
    assert kept_channels({first: 0.25, second: 0.5}) == 16 + 32
    assert kept_channels({first: 0.75, second: 0.75}) == 64
    assert kept_channels({first: 0.25, second: 1.0}) == 64
    assert kept_channels({first: 0.5, second: 0.5}, {first: [1, 2, 3], second: [3, 4]}) == 4
    assert kept_channels({first: 0.5, second: 0.5}, {first: [1, 2, 3]}) == 3 + 32
    assert kept_channels({second: 0.25}) == 0  # its own backward came before


def test_100_000_peaks_take_seconds():
    depths, updated = random_schemes(MOBILENET, 100_000, seed=5)
    start = time.process_time()
    assert PeakMemory(MOBILENET).peaks_bytes(depths, updated).shape == (100_000,)
    assert time.process_time() - start < 10


def test_operations_of_unknown_kind_are_refused_where_they_need_a_gradient():
    class Network(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.activation, self.linear = activation, nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(self.second(self.activation(self.first(x))).mean([2, 3]))

    class Square(nn.Module):
        def forward(self, x):
            return x * x

    for module, message in ((nn.SiLU(), "the silu of first needs a gradient"), (Square(), "operation mul 0 needs")):
        peak_memory = PeakMemory(find_operations(Network(module), (3, 8, 8)))
        assert peak_memory.peak_bytes(UpdateScheme("x", 1)) > peak_memory.floor_bytes
        with pytest.raises(UserError, match=message):
            peak_memory.peak_bytes(UpdateScheme("x", 2))


def test_wrong_options_and_arrays_are_refused():
    with pytest.raises(UserError, match="optimizer_state is 'sgd': give one of none, momentum, adam"):
        PeakMemory(MOBILENET, optimizer_state="sgd")
    with pytest.raises(UserError, match="gradient_bytes is 0"):
        PeakMemory(MOBILENET, gradient_bytes=0)
    peak_memory = PEAK_MEMORIES["mobilenet"]["default"]
    nothing = np.zeros((1, 51), dtype=int)
    with pytest.raises(UserError, match=r"shapes \(1,\) and \(1, 50\): give \(schemes,\) and \(schemes, 51\)"):
        peak_memory.peaks_bytes(np.array([0]), nothing[:, 1:])
    with pytest.raises(UserError, match="a bias depth is out of its range: give 0 to 51"):
        peak_memory.peaks_bytes(np.array([52]), nothing)
    outside = nothing.copy()
    outside[0, 40] = 5
    with pytest.raises(UserError, match=r"5 channels of features\.14\.conv\.1\.0 are updated with bias depth 10"):
        peak_memory.peaks_bytes(np.array([10]), outside)
    with pytest.raises(UserError, match="bias_depth is 52"):
        peak_memory.peak_bytes(UpdateScheme("x", 52))


def test_largest_resolution_that_fits():
    network = mobilenet_v2(1.0, num_classes=10)
    device = microcontroller("stm32f746", flash_bytes=8 * 1024 * 1024)
    peak_memory = PeakMemory(find_operations(network, (3, 128, 128)))
    fitting, next_larger = (PeakMemory(find_operations(network, (3, size, size))).floor_bytes for size in (96, 112))
    assert fitting <= device.budget_bytes < next_larger
    assert largest_resolution_that_fits(network, peak_memory, device, below=128) == 96
    assert largest_resolution_that_fits(network, peak_memory, device, below=96) == 80
    assert largest_resolution_that_fits(network, peak_memory, device, below=96, step=32) == 64


def test_no_resolution_fits_where_the_weights_exceed_the_flash():
    network = mobilenet_v2(1.0, num_classes=10)
    peak_memory = PeakMemory(find_operations(network, (3, 96, 96)))
    assert largest_resolution_that_fits(network, peak_memory, microcontroller("stm32f746"), below=96) is None
    network, small = mobilenet_v2(0.35, num_classes=10), microcontroller(sram_bytes=40 * 1024)
    peak_memory = PeakMemory(find_operations(network, (3, 33, 33)))
    assert largest_resolution_that_fits(network, peak_memory, small, below=33, step=32) is None
