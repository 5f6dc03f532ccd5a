"""Promises about the description of an int8 network: layers that do not fit together are refused, JSON is exact."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microtune.modules.int8.graph import Quantization, QuantizedClassifier, QuantizedConvolution, QuantizedGraph
from microtune.modules.user_error import UserError

HERE = Quantization(0.05, -4)
CONVOLUTION = QuantizedConvolution(8, 16, (3, 3), (1, 1), (1, 1, 1, 1), 1, HERE, HERE)


def test_layers_are_named_in_forward_order(small_graph):
    assert [name for name, _ in small_graph.convolutions()] == [
        "first_conv",
        "blocks.0.depthwise",
        "blocks.0.pointwise2",
        "blocks.1.pointwise1",
        "blocks.1.depthwise",
        "blocks.1.pointwise2",
        "blocks.2.pointwise1",
        "blocks.2.depthwise",
        "blocks.2.pointwise2",
    ]
    mix = replace(CONVOLUTION, in_channels=16, out_channels=32, input=small_graph.classifier.input)
    classifier = QuantizedClassifier(32, 10, HERE, None)
    with_mix = replace(small_graph, feature_mix=mix, classifier=classifier)
    assert list(with_mix.convolutions())[-1] == ("feature_mix", mix)


def test_the_weight_of_groups_reads_a_part_of_the_channels():
    assert CONVOLUTION.weight_shape == (16, 8, 3, 3)
    assert replace(CONVOLUTION, groups=4, kernel_size=(1, 5)).weight_shape == (16, 2, 1, 5)


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        ({}, True),
        ({"padding": (0, 2, 0, 2)}, True),
        ({"kernel_size": (1, 5), "padding": (2, 2, 0, 0)}, True),
        ({"kernel_size": (1, 5), "padding": (0, 0, 2, 2)}, False),
        ({"padding": (0, 0, 0, 0)}, False),
        ({"stride": (2, 1)}, False),
    ],
)
def test_size_is_kept(changes, keeps):
    assert replace(CONVOLUTION, **changes).keeps_size is keeps


@settings(deadline=None)
@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False), st.integers(-128, 127), st.text())
def test_json_is_exact(scale, zero_point, name):
    here = Quantization(scale, zero_point)
    graph = QuantizedGraph(
        name, (8, 5, 7), here, None, replace(CONVOLUTION, input=here), (), None, QuantizedClassifier(16, 1, HERE, here)
    )
    assert QuantizedGraph.from_json(graph.to_json()) == graph


def test_json_of_a_whole_network(small_graph):
    graph = replace(small_graph, class_names=tuple("كلمة words".center(10)))
    assert QuantizedGraph.from_json(graph.to_json()) == graph
    assert json.loads(graph.to_json())["blocks"][1]["addition"] == {"scale": 0.06, "zero_point": 2}


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan])
def test_a_scale_must_be_positive(scale):
    with pytest.raises(UserError, match=rf"^a scale is {scale}: it must be positive and finite$"):
        Quantization(scale, 0)


@pytest.mark.parametrize("zero_point", [-129, 128])
def test_a_zero_point_must_be_int8(zero_point):
    with pytest.raises(UserError, match=rf"^a zero point is {zero_point}: it must be from -128 to 127$"):
        Quantization(1.0, zero_point)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 0}, "must be positive, its padding 0 or more"),
        ({"out_channels": -8}, "must be positive, its padding 0 or more"),
        ({"kernel_size": (3, 0)}, "must be positive, its padding 0 or more"),
        ({"stride": (0, 1)}, "must be positive, its padding 0 or more"),
        ({"groups": 0}, "must be positive, its padding 0 or more"),
        ({"padding": (0, 0, -1, 0)}, "must be positive, its padding 0 or more"),
        ({"groups": 3}, "3 groups of a convolution do not divide its 8 and 16 channels"),
        ({"groups": 16}, "16 groups of a convolution do not divide its 8 and 16 channels"),
    ],
)
def test_impossible_convolutions(changes, message):
    with pytest.raises(UserError, match=message):
        replace(CONVOLUTION, **changes)


def changed_block(graph, index, part, **changes):
    block = graph.blocks[index]
    blocks = [*graph.blocks]
    blocks[index] = replace(block, **{part: replace(getattr(block, part), **changes)})
    return replace(graph, blocks=tuple(blocks))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda graph: replace(graph, input=HERE),
            r"^first_conv reads 3 channels of Quantization\(scale=0.0078\d+, zero_point=0\), but gets 3 of Quant.*0.05",
        ),
        (
            lambda graph: replace(graph, input_shape=(1, 32, 32), normalization=None),
            "^first_conv reads 3 channels of .* but gets 1 of",
        ),
        (
            lambda graph: replace(graph, blocks=graph.blocks[1:]),
            r"^blocks.0.pointwise1 reads 8 channels of Quantization\(scale=0.05, .* gets 8 of Quantization\(scale=0.02",
        ),
        # after an addition its scale holds, and not that of what was added
        (
            lambda graph: changed_block(graph, 2, "pointwise1", input=graph.blocks[1].pointwise2.output),
            r"^blocks.2.pointwise1 reads 8 channels of Quantization\(scale=0.04.*gets 8 of Quantization\(scale=0.06",
        ),
        (
            lambda graph: changed_block(graph, 1, "depthwise", in_channels=8, groups=8),
            "^blocks.1.depthwise reads 8 channels of .* but gets 24 of",
        ),
        (
            lambda graph: changed_block(graph, 1, "pointwise2", out_channels=16),
            "^a block makes 16 channels of 8, or another height and width: its input cannot be added",
        ),
        (
            lambda graph: changed_block(graph, 1, "depthwise", stride=(2, 2)),
            "^a block makes 8 channels of 8, or another height and width: its input cannot be added",
        ),
        (
            lambda graph: replace(graph, classifier=replace(graph.classifier, features=8)),
            "^the classifier reads 8 features of .* but gets 16 of",
        ),
        (
            lambda graph: replace(graph, classifier=replace(graph.classifier, input=HERE)),
            r"^the classifier reads 16 features of Quantization\(scale=0.05.* but gets 16 of Quantization\(scale=0.04",
        ),
        (
            lambda graph: replace(graph, classifier=replace(graph.classifier, classes=0)),
            "^a classifier has 16 features and 0 classes: it needs some of both",
        ),
        (lambda graph: replace(graph, input_shape=(3, 0, 32)), r"^input_shape is \(3, 0, 32\): channels, height and"),
        (
            lambda graph: replace(graph, normalization=((0.5,), (0.5,))),
            "^normalization is .* it must have a mean and a positive standard deviation for each of 3 channels",
        ),
        (lambda graph: replace(graph, normalization=((0.5,) * 3, (0.5, 0.5, 0.0))), "a positive standard deviation"),
        (
            lambda graph: replace(graph, normalization=((0.5, 0.5, math.nan), (0.5,) * 3)),
            "a positive standard deviation",
        ),
        (lambda graph: replace(graph, class_names=("a", "b")), "^there are 2 class names for 10 classes"),
    ],
)
def test_what_does_not_fit_together_is_refused(small_graph, change, message):
    with pytest.raises(UserError, match=message):
        change(small_graph)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("name", 3, "^name: Input should be a valid string"),
        ("blocks.1.depthwise.groups", "24", "^blocks.1.depthwise.groups: Input should be a valid integer"),
        ("blocks.1.depthwise.groups", 24.0, "^blocks.1.depthwise.groups: Input should be a valid integer"),
        ("blocks.1.depthwise.groups", True, "^blocks.1.depthwise.groups: Input should be a valid integer"),
        (
            "blocks.1.depthwise.groups",
            0,
            "^blocks.1.depthwise: channels, kernel, stride and groups of a convolution must",
        ),
        ("blocks.1.depthwise.groups", None, "^blocks.1.depthwise.groups: Input should be a valid integer"),
        ("blocks.1.addition.scale", 0, "^blocks.1.addition: a scale is 0.0: it must be positive and finite"),
        ("blocks.1.addition.scale", math.nan, "^blocks.1.addition.scale: Input should be a finite number"),
        ("blocks.1.addition.zero_point", 128, "^blocks.1.addition: a zero point is 128"),
        ("blocks.1.bias", 1, "^blocks.1.bias: Unexpected keyword argument"),
        ("blocks", {}, "^blocks: Input should be a valid array"),
        ("input_shape", [3, 32], "^input_shape.2: Field required"),
        ("input_shape", [1, 32, 32], "^the whole: normalization is .* for each of 1 channels"),
        ("classifier.features", 8, "^the whole: the classifier reads 8 features"),
        ("extra", 1, "^extra: Unexpected keyword argument"),
    ],
)
def test_wrong_json_is_told_with_its_place(small_graph, place, value, message):
    graph = json.loads(small_graph.to_json())
    *parents, last = place.split(".")
    item = graph
    for key in parents:
        item = item[int(key) if key.isdecimal() else key]
    item[last] = value
    with pytest.raises(UserError, match=message) as refused:
        QuantizedGraph.from_json(json.dumps(graph))
    assert "\n" not in str(refused.value)


def test_missing_keys_are_told(small_graph):
    graph = json.loads(small_graph.to_json())
    del graph["blocks"][1]["depthwise"]["stride"]
    with pytest.raises(UserError, match=r"^blocks\.1\.depthwise\.stride: Field required"):
        QuantizedGraph.from_json(json.dumps(graph))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "null", "<html>"])
def test_what_is_no_graph_is_refused(text):
    with pytest.raises(UserError, match=r"^the whole: (Invalid JSON|Input should be)"):
        QuantizedGraph.from_json(text)
