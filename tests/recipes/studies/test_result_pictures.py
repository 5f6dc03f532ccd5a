"""Pictures of results show what the rows and the schemes say."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.studies import result_pictures
from microtune.recipes.studies.result_pictures import (
    channel_grid,
    draw_accuracy_over_memory,
    draw_selection,
    draw_updated_channels,
    input_channels,
)
from microtune.recipes.studies.result_rows import NamedScheme, Result

BASE = Result(
    "cifar10", "fp32", "biases", "extra64", "weight_norm", 0, 0, 0.8, None, 61440.0, 171930.0, 47, 0, 0, 0.05, 1830,
    32, 0.0, 71.5,
)  # fmt: skip
CHOSEN = replace(BASE, way="weight_norm", extra_memory_bytes=61747.0, steps=366, learning_rate=0.006)
NETWORK, LAYER, NEXT = "mobilenet_v2-w0.35", "features.15.conv.0.0", "features.16.conv.0.0"


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and gives the figure and the picture."""

    def draw(function, *arguments):
        path = tmp_path / "pictures/picture.png"
        figures = []
        monkeypatch.setattr(plt, "close", figures.append)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib's about what does not fit
            function(*arguments, path)
        monkeypatch.undo()
        with Image.open(path) as image:
            assert (image.format, min(image.size) > 200) == ("PNG", True)
        (figure,) = figures
        plt.close(figure)
        return figure

    return draw


def labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def points(axes):
    """Of everything that is drawn with a range: the points, in the order in which they are drawn."""
    return [
        [(round(float(x), 6), round(float(y), 6)) for x, y in zip(*drawing[0].get_data(), strict=True)]
        for drawing in axes.containers
    ]


def test_accuracy_over_memory(drawn):
    rows = [replace(BASE, seed=seed, top1=top1) for seed, top1 in enumerate((0.7, 0.8, 0.84))]
    rows += [replace(BASE, budget="extra100", top1=0.9, extra_memory_bytes=102400.0)]
    rows += [replace(BASE, budget="stm32f746", top1=0.6, extra_memory_bytes=118784.0)]
    rows += [replace(BASE, way="full", budget="none", top1=0.5, extra_memory_bytes=1048576.0)]
    rows += [replace(BASE, numbers="int8", way="dynamic", top1=0.4)]
    figure = drawn(draw_accuracy_over_memory, rows[::-1])
    fp32, int8 = figure.axes
    assert (fp32.get_title(), int8.get_title()) == ("fp32; full update needs 1,024 KiB", "int8")
    assert points(fp32) == [[(60, 78), (100, 90)], [(116, 60)]]  # a line, and the microcontroller's apart
    assert points(int8) == [[(60, 40)]]
    assert any(list(line.get_ydata()) == [50, 50] for line in fp32.lines)
    assert labels(figure) == ["biases only", "dynamic channels", "as fits an STM32F746", "full update"]
    (low, high), *_ = [bar.get_segments()[0][:, 1] for bar in fp32.containers[0][2]]
    assert (low, high) == (pytest.approx(70), pytest.approx(84))


def test_one_kind_of_numbers_is_one_panel(drawn):
    figure = drawn(draw_accuracy_over_memory, [BASE])
    assert [axes.get_title() for axes in figure.axes] == ["fp32"]
    assert labels(figure) == ["biases only"]


def test_selection(drawn):
    rows = [replace(CHOSEN, seed=seed, top1=top1) for seed, top1 in enumerate((0.7, 0.8, 0.84))]
    rows += [replace(CHOSEN, criterion="fisher", rechoose_every=50, top1=0.9)]
    rows += [replace(CHOSEN, criterion="random", budget="rp2040", top1=0.6)]
    figure = drawn(draw_selection, rows[::-1])
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["64 KiB", "RP2040"]
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == ["weight norm, static", "random, static", "fisher, every 50 steps"]
    assert (points(first), points(second)) == ([[(78, 0)], [(90, 2)]], [[(60, 1)]])
    dashed = [line for line in first.lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[pytest.approx(78)] * 2]
    assert "dashed: weight norm, static" in figure.get_suptitle()
    assert "dashed" not in drawn(draw_selection, rows[-1:]).get_suptitle()


# ---- schemes


def named(weights, channels=None, budget="extra64", method="one_pass", data="cifar10", network=NETWORK):
    return NamedScheme(data, budget, method, UpdateScheme(network, 12, weights, channels or {}))


def test_channel_grid_by_hand():
    scheme = named({"a": 0.5, "b": 0.7, "c": 1.0}, {"a": [0, 3]}).scheme
    grid = channel_grid(scheme, {"a": 4, "b": 3, "c": 2, "d": 1})
    np.testing.assert_array_equal(grid, [[3, 1, 1, 3], [2, 2, 1, 0], [3, 3, 0, 0], [1, 0, 0, 0]])


def test_updated_channels(drawn):
    schemes = [
        named({NEXT: 0.05}, {NEXT: [1, 3]}),
        named({LAYER: 1.0}, budget="extra100", method="layers"),
        named({NEXT: 0.5}, budget="extra100"),
    ]
    figure = drawn(draw_updated_channels, schemes)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == [
        "evolved, whole layers, 100 KiB\nbiases of the last 12 layers",
        "from one backward pass, 64 KiB\nbiases of the last 12 layers",
        "from one backward pass, 100 KiB\nbiases of the last 12 layers",
    ]
    whole, one_pass, half = (axes.images[0].get_array() for axes in panels.values())
    # two layers of 56 input channels
    np.testing.assert_array_equal(whole, [[3] * 56, [1] * 56])
    np.testing.assert_array_equal(one_pass, [[1] * 56, [1, 3, 1, 3, *[1] * 52]])
    np.testing.assert_array_equal(half, [[1] * 56, [2] * 28 + [1] * 28])
    axes = panels["from one backward pass, 64 KiB\nbiases of the last 12 layers"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [LAYER, NEXT]
    assert labels(figure) == ["updated", "updated; which ones is chosen when training begins", "frozen"]
    assert labels(drawn(draw_updated_channels, schemes[:1])) == ["updated", "frozen"]


@pytest.mark.parametrize(("data", "in_channels"), [("cifar10", 3), ("mswc_arabic", 1)])
def test_input_channels(data, in_channels):
    found = input_channels([named({LAYER: 1.0}, data=data)])
    assert len(found) == 51
    assert (next(iter(found.values())), found[LAYER]) == (in_channels, 56)
    of_wider = input_channels([named({LAYER: 1.0}, data=data, network="mobilenet_v2-w1.0-head")])
    assert (len(of_wider), of_wider[LAYER]) == (52, 160)


@pytest.mark.parametrize(
    ("schemes", "error"),
    [
        (
            [named({LAYER: 1.0}, network="resnet18")],
            "scheme cifar10-extra64-one_pass is for resnet18: give one for a MobileNetV2 in floating point",
        ),
        (
            [named({LAYER: 1.0}, network="mobilenet_v2-w0.35-int8")],
            "scheme cifar10-extra64-one_pass is for mobilenet_v2-w0.35-int8: give one for a MobileNetV2",
        ),
        (
            [named({LAYER: 1.0}), named({LAYER: 1.0}, method="layers", network="mobilenet_v2-w1.0")],
            "scheme cifar10-extra64-layers: the scheme is for mobilenet_v2-w1.0, but the network is mobilenet_v2-w0.35",
        ),
        ([named({"nowhere": 1.0})], "scheme cifar10-extra64-one_pass: layer nowhere is no convolution of the network"),
        ([named({})], "no scheme of cifar10 updates a weight, and there is nothing to draw: leave them out"),
    ],
)
def test_schemes_that_cannot_be_drawn(schemes, error, tmp_path):
    with pytest.raises(UserError) as caught:
        draw_updated_channels(schemes, tmp_path / "picture.png")
    assert str(caught.value).startswith(error)
    assert not list(tmp_path.iterdir())


def test_no_figure_stays_open(tmp_path):
    before = plt.get_fignums()
    draw_accuracy_over_memory([BASE], tmp_path / "a.png")
    draw_selection([CHOSEN], tmp_path / "b.png")
    draw_updated_channels([named({LAYER: 1.0})], tmp_path / "c.png")
    assert plt.get_fignums() == before
    assert result_pictures.COLORS.keys() == result_pictures.MARKERS.keys()
