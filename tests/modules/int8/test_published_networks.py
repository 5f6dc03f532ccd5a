"""Promises about the published int8 networks: their numbers come through as they are, and contradictions are told."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from microtune.modules.int8.files import tensor_shapes
from microtune.modules.int8.graph import Quantization, QuantizedConvolution
from microtune.modules.int8.published_networks import architecture_of, read_published_network
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.user_error import UserError

ANY = Quantization(1.0, 0)
REMEDY = r"give a pickle of an int8 network as Lin et al\. published them, such as mbv2-w0\.35\.pkl"


def params(given, written, tensors=None, layer=None):
    entries = {"x_scale": given.scale, "x_zero": given.zero_point}
    entries |= {"y_scale": written.scale, "y_zero": written.zero_point}
    if layer is not None:
        arrays = (("weight", "weight"), ("bias", "bias"), ("w_scales", "weight_scales"))
        entries |= {key: tensors[f"{layer}.{name}"].numpy() for key, name in arrays}
    return entries


def convolution(layer, size, tensors, name):
    return {
        "in_channel": layer.in_channels,
        "in_shape": size,
        "out_channel": layer.out_channels,
        "out_shape": size // layer.stride[0],
        "kernel_size": layer.kernel_size,
        "stride": layer.stride[0],
        "groups": layer.groups,
        "depthwise": layer.groups > 1,
        "act": None,
        "params": params(layer.input, layer.output, tensors, name),
    }


@pytest.fixture
def graph(small_graph):
    """The small network as a published one could be: it pads on all sides, and its classifier is int8."""
    last = small_graph.blocks[2]
    around = replace(last, depthwise=replace(last.depthwise, padding=(1, 1, 1, 1)))
    classifier = replace(small_graph.classifier, output=Quantization(0.1, 3))
    return replace(small_graph, blocks=(*small_graph.blocks[:2], around), classifier=classifier)


@pytest.fixture
def tensors(graph, small_tensors):
    random = torch.Generator().manual_seed(1)
    return small_tensors | {
        "classifier.weight": torch.randint(-127, 128, (10, 16), dtype=torch.int8, generator=random),
        "classifier.bias": torch.randint(-(2**31), 2**31, (10,), dtype=torch.int32, generator=random),
        "classifier.weight_scales": torch.rand(10, generator=random) + 4e-9,
    }


@pytest.fixture
def published(graph, tensors):
    """The dictionary in the pickle."""
    size, entries = 32, {"blocks": [], "feature_mix": None}
    for name, layer in graph.convolutions():
        entry = convolution(layer, size, tensors, name)
        size = entry["out_shape"]
        if name == "first_conv":
            entries[name] = entry
            continue
        _, index, part = name.split(".")
        if int(index) == len(entries["blocks"]):
            entries["blocks"].append({"pointwise1": None, "residual": None, "se": None})
        entries["blocks"][-1][part] = entry
    block = graph.blocks[1]
    summed = params(block.pointwise1.input, block.addition)
    entries["blocks"][1]["residual"] = {"in_channel": 8, "in_shape": 16, "params": summed}
    linear = params(graph.classifier.input, graph.classifier.output, tensors, "classifier")
    linear["weight"] = linear["weight"].reshape(10, 16, 1, 1)
    entries["classifier"] = {
        "in_channel": 16,
        "out_channel": 10,
        "params": linear,
        "kernel_size": (1, 1),
        "stride": 1,
        "groups": 1,
    }
    return entries


@pytest.fixture
def read(tmp_path):
    def read_entries(entries, **arguments):
        (tmp_path / "tiny.pkl").write_bytes(pickle.dumps(entries))
        return read_published_network(tmp_path / "tiny.pkl", **arguments)

    return read_entries


def assert_same(read_tensors, tensors):
    assert read_tensors.keys() == tensors.keys()
    for name in tensors:
        assert read_tensors[name].dtype == tensors[name].dtype
        assert torch.equal(read_tensors[name], tensors[name])


def test_graph_and_tensors_are_what_was_published(read, published, graph, tensors):
    read_graph, read_tensors = read(published)
    assert read_graph == replace(graph, name="tiny-int8")
    assert_same(read_tensors, tensors)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in read_tensors.items()} == tensor_shapes(graph)


def test_the_name_may_be_given(read, published):
    assert read(published, name="mine")[0].name == "mine"


def test_other_ways_to_write_the_same(read, published, graph, tensors):
    for entry in (published["first_conv"], published["blocks"][2]["depthwise"]):
        entry["kernel_size"], entry["act"] = 3, "relu"
        entry["stride"] = np.int64(entry["stride"])
    published["blocks"][1]["depthwise"]["act"] = "relu6"
    published["classifier"]["params"]["weight"] = tensors["classifier.weight"].numpy()
    published["first_conv"]["params"]["x_scale"] = np.float64(graph.input.scale)
    published["blocks"][0]["unknown"] = None
    del published["feature_mix"], published["blocks"][0]["se"], published["blocks"][0]["pointwise1"]
    del published["blocks"][0]["residual"], published["first_conv"]["act"]
    read_graph, read_tensors = read(published)
    assert read_graph == replace(graph, name="tiny-int8")
    assert_same(read_tensors, tensors)


def test_a_last_convolution_is_read(read, published, graph, tensors):
    mixed = Quantization(0.03, -128)
    mix = QuantizedConvolution(16, 32, (1, 1), (1, 1), (0, 0, 0, 0), 1, graph.classifier.input, mixed)
    weights = {"feature_mix.weight": torch.ones(32, 16, 1, 1, dtype=torch.int8)}
    weights |= {"feature_mix.bias": torch.ones(32, dtype=torch.int32), "feature_mix.weight_scales": torch.ones(32)}
    published["feature_mix"] = convolution(mix, 8, weights, "feature_mix")
    with pytest.raises(UserError, match=r"classifier\.in_channel is 16, but the layer before gives 32"):
        read(published)
    classifier = published["classifier"]
    classifier["in_channel"] = 32
    classifier["params"] |= {"x_scale": 0.03, "x_zero": -128, "weight": np.ones((10, 32, 1, 1), np.int8)}
    read_graph, read_tensors = read(published)
    assert read_graph.feature_mix == mix
    assert read_tensors["feature_mix.weight"].shape == (32, 16, 1, 1)


def test_large_kernels_are_padded_with_half_their_size(read, published):
    depthwise = published["blocks"][1]["depthwise"]
    depthwise["kernel_size"] = (5, 7)
    depthwise["params"]["weight"] = np.ones((24, 1, 5, 7), np.int8)
    assert read(published)[0].blocks[1].depthwise.padding == (3, 3, 2, 2)


def test_arrays_that_the_pickle_shares_are_not_shared(read, published):
    shared = published["blocks"][0]["depthwise"]["params"]["bias"]
    published["blocks"][0]["pointwise2"]["params"]["bias"] = shared
    tensors = read(published)[1]
    tensors["blocks.0.depthwise.bias"] += 1
    assert tensors["blocks.0.pointwise2.bias"].tolist() == shared.tolist()


@pytest.mark.parametrize(("scale", "zero_point"), [(2 / 255, 0), (1 / 255, -128), (0.02, 30)])
def test_a_pixel_is_the_integer_less_128(read, published, graph, scale, zero_point):
    published["first_conv"]["params"] |= {"x_scale": scale, "x_zero": zero_point}
    graph = read(published)[0]
    assert graph.input == Quantization(scale, zero_point)
    pixels = torch.arange(256)
    for mean, deviation in zip(*graph.normalization, strict=True):
        real = (pixels / 255 - mean) / deviation
        integers = real / scale + zero_point
        assert torch.allclose(integers, pixels - 128.0, rtol=0, atol=1e-4)


MISSING = object()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        # missing, of another type or out of range
        ("first_conv", MISSING, "first_conv is missing"),
        ("first_conv", None, "first_conv is a NoneType, not a dict"),
        ("classifier", MISSING, "classifier is missing"),
        ("blocks", {}, "blocks is a dict, not a list"),
        ("blocks.1", [], "blocks.1 is a list, not a dict"),
        ("blocks.1.depthwise", None, "blocks.1.depthwise is a NoneType, not a dict"),
        ("blocks.1.pointwise2", MISSING, "blocks.1.pointwise2 is missing"),
        ("blocks.1.pointwise1.params", 3, "blocks.1.pointwise1.params is 3, not a dict"),
        ("blocks.1.pointwise1.params.bias", MISSING, "blocks.1.pointwise1.params.bias is missing"),
        ("first_conv.in_channel", 0, "first_conv.in_channel is 0, not an integer from 1 to 1048576"),
        ("first_conv.in_channel", 3.0, "first_conv.in_channel is 3.0, not an integer from 1 to 1048576"),
        ("first_conv.in_shape", True, "first_conv.in_shape is True, not an integer from 1 to 1048576"),
        ("first_conv.out_channel", 10**9, "first_conv.out_channel is 1000000000, not an integer from 1 to 1048576"),
        ("first_conv.stride", (2, 2), "first_conv.stride is a tuple, not an integer from 1 to"),
        ("first_conv.stride", 0, "first_conv.stride is 0, not an integer from 1 to"),
        ("first_conv.kernel_size", 33, "first_conv.kernel_size is 33, not an integer from 1 to 31"),
        ("first_conv.kernel_size", (3, 3, 3), "first_conv.kernel_size is a tuple, not an integer from 1 to 31"),
        ("first_conv.kernel_size", (3, 4), "first_conv.kernel_size is 3 x 4, and even kernels, .* are not supported"),
        ("first_conv.kernel_size", "3", "first_conv.kernel_size is '3', not an integer from 1 to 31"),
        ("first_conv.depthwise", None, "first_conv.depthwise is a NoneType, not True or False"),
        ("first_conv.params.x_scale", 0.0, "first_conv.params.x_scale is 0.0, not a positive number of 32 bits"),
        ("first_conv.params.x_scale", float("nan"), "first_conv.params.x_scale is nan, not a positive number of 32"),
        ("first_conv.params.x_scale", 1e-320, "first_conv.params.x_scale is 1e-320, not a positive number of 32 bits"),
        ("first_conv.params.x_scale", 1, "first_conv.params.x_scale is 1, not a positive number of 32 bits"),
        ("first_conv.params.y_scale", [1.0], "first_conv.params.y_scale is a list, not a positive number of 32 bits"),
        ("first_conv.params.x_zero", 128, "first_conv.params.x_zero is 128, not an integer from -128 to 127"),
        ("first_conv.params.y_zero", -129, "first_conv.params.y_zero is -129, not an integer from -128 to 127"),
        ("first_conv.params.y_zero", None, "first_conv.params.y_zero is a NoneType, not an integer from -128 to 127"),
        # tensors
        (
            "blocks.1.pointwise1.params.weight",
            np.zeros((24, 8, 1), np.int8),
            r"blocks.1.pointwise1.params.weight is an array of int8 and shape \(24, 8, 1\), not an array of int8 and "
            r"shape \(24, 8, 1, 1\)",
        ),
        (
            "blocks.1.pointwise1.params.weight",
            np.zeros((24, 8, 1, 1), np.float32),
            r"blocks.1.pointwise1.params.weight is an array of float32 and shape .*, not an array of int8 and shape",
        ),
        (
            "blocks.1.pointwise1.params.bias",
            np.zeros(24, np.int64),
            r"blocks.1.pointwise1.params.bias is an array of int64 and shape \(24,\), not an array of int32 and",
        ),
        (
            "blocks.1.pointwise1.params.bias",
            [0] * 24,
            "blocks.1.pointwise1.params.bias is a list, not an array of int32",
        ),
        (
            "blocks.1.pointwise1.params.w_scales",
            np.ones(8, np.float32),
            r"blocks.1.pointwise1.params.w_scales is an array .* \(8,\), not an array of float32 and shape \(24,\)",
        ),
        (
            "blocks.1.pointwise1.params.w_scales",
            np.zeros(24, np.float32),
            "blocks.1.pointwise1.params.w_scales has a scale that is not a positive number",
        ),
        (
            "classifier.params.w_scales",
            np.full(10, np.inf, np.float32),
            "classifier.params.w_scales has a scale that is not a positive number",
        ),
        ("classifier.params.weight", np.zeros((16, 10), np.int8), r"classifier.params.weight is an array .*\(16, 10\)"),
        # what does not fit together
        ("first_conv.groups", 2, "first_conv.groups is 2, which does not divide 3 and 8 channels"),
        ("first_conv.depthwise", True, "first_conv.depthwise is True, but 3 to 8 channels are in 1 groups"),
        ("first_conv.out_shape", 15, "first_conv.out_shape is 15, but the convolution gives 16"),
        ("blocks.1.depthwise.in_channel", 8, "blocks.1.depthwise.in_channel is 8, but the layer before gives 24"),
        ("blocks.1.depthwise.in_shape", 8, "blocks.1.depthwise.in_shape is 8, but the layer before gives 16"),
        (
            "blocks.1.depthwise.params.x_scale",
            0.5,
            "blocks.1.depthwise.params.x_scale is 0.5, but the layer before gives",
        ),
        (
            "blocks.1.depthwise.params.x_zero",
            0,
            "blocks.1.depthwise.params.x_zero is 0, but the layer before gives -128",
        ),
        ("blocks.1.pointwise1.params.x_scale", 0.04, "x_scale is 0.04, but the layer before gives 0.05"),
        ("blocks.2.pointwise1.params.x_scale", 0.04, "x_scale is 0.04, but the layer before gives 0.06"),
        ("blocks.1.pointwise2.params.y_zero", 9, None),  # only the addition reads it, and says nothing of its own
        ("blocks.1.residual.params.x_scale", 0.04, "residual.params.x_scale is 0.04, but the layer before gives 0.05"),
        ("blocks.1.residual.params.x_zero", 7, "blocks.1.residual.params.x_zero is 7, but the layer before gives -4"),
        ("blocks.1.residual.in_channel", 24, "blocks.1.residual.in_channel is 24, but the layer before gives 8"),
        ("blocks.1.residual.in_shape", 8, "blocks.1.residual.in_shape is 8, but the layer before gives 16"),
        ("classifier.in_channel", 8, "classifier.in_channel is 8, but the layer before gives 16"),
        ("classifier.params.x_zero", 8, "classifier.params.x_zero is 8, but the layer before gives 7"),
        # what is not supported
        ("blocks.1.se", {"reduce": 4}, "blocks.1.se is squeeze and excitation, which is not supported"),
        ("blocks.1.residual.kernel_size", (1, 1), "blocks.1.residual is a convolution, which is not supported"),
        ("blocks.1.residual", 3, "blocks.1.residual is 3, not a dict"),
        ("feature_mix", 3, "feature_mix is 3, not a dict"),
        ("feature_mix", {"pool": 3}, "feature_mix has 'pool', which is not supported"),
        ("first_conv.act", "swish", "first_conv.act is 'swish', which is not supported for outputs 0 to 6"),
        ("first_conv.act", ["relu"], "first_conv.act is a list, which is not supported for outputs 0 to 6"),
        ("blocks.1.pointwise2.act", "relu", "pointwise2.act is 'relu', which is not supported for outputs -5.4 to 4.8"),
        ("blocks.1.dilation", 2, "blocks.1 has 'dilation', which is not supported"),
        ("first_conv.dilation", 2, "first_conv has 'dilation', which is not supported"),
        ("first_conv.params.w_zeros", 0, "first_conv.params has 'w_zeros', which is not supported"),
        ("second_head", {}, "the whole has 'second_head', which is not supported"),
        ("classifier.stride", 2, "classifier.stride is 2, not an integer from 1 to 1"),
        ("classifier.groups", 2, "classifier.groups is 2, not an integer from 1 to 1"),
        ("classifier.kernel_size", 3, "classifier.kernel_size is not 1, and a classifier reads the mean"),
        ("blocks.1.depthwise.depthwise", False, "blocks.1.depthwise.depthwise is False, which is not supported"),
        ("blocks.1.pointwise1.kernel_size", 3, "blocks.1.pointwise1.kernel_size is not 1, which is not supported"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(read, published, place, value, message):
    *parents, last = place.split(".")
    item = published
    for key in parents:
        item = item[int(key) if key.isdecimal() else key]
    last = int(last) if last.isdecimal() else last
    if value is MISSING:
        del item[last]
    else:
        item[last] = value
    if message is None:
        read(published)
        return
    with pytest.raises(UserError, match=rf"tiny\.pkl: \S*{message}.*: {REMEDY}$") as refused:
        read(published)
    assert "\n" not in str(refused.value)


def test_relu6_is_refused_where_outputs_are_larger(read, published):
    for layer in (published["first_conv"], published["blocks"][0]["depthwise"]):
        layer["params"] |= {"x_scale": 0.03, "y_scale": 0.03}
    published["blocks"][0]["pointwise2"]["params"]["x_scale"] = 0.03
    read(published)
    published["first_conv"]["act"] = "relu6"
    with pytest.raises(UserError, match=r"first_conv\.act is 'relu6', which is not supported for outputs 0 to 7\.65"):
        read(published)


def test_an_addition_of_other_shapes_is_refused(read, published):
    published["blocks"][2]["residual"] = {"params": params(Quantization(0.06, 2), ANY)}
    with pytest.raises(UserError, match=r"blocks\.2\.residual adds 8 x 16 x 16 to 16 x 8 x 8, which is not possible"):
        read(published)


@pytest.mark.parametrize("content", [[1], 3, None, {}, {"state_dict": 3}])
def test_other_pickles_are_refused(read, content):
    with pytest.raises(UserError, match=rf"tiny\.pkl: (the whole (is|has)|first_conv is missing).*: {REMEDY}$"):
        read(content)


def test_a_hostile_pickle_is_refused(read, tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    pattern = rf"tiny\.pkl is not a published int8 network \(UnpicklingError: it asks for \w+\.open, .*\): {REMEDY}"
    with pytest.raises(UserError, match=pattern):
        read({"first_conv": Hostile()})
    assert not (tmp_path / "touched").exists()


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match=rf"no\.pkl is missing: {REMEDY}"):
        read_published_network(tmp_path / "no.pkl")


@pytest.fixture(scope="module")
def real(shared_data):
    path = shared_data / "weights/mbv2-w0.35.pkl"
    return read_published_network(path), torch.load(path, weights_only=False)


def test_the_published_mobilenet(real):
    (graph, tensors), content = real
    assert graph.name == "mobilenet_v2-w0.35-int8"
    assert graph.input_shape == (3, 128, 128)
    assert graph.input == Quantization(1 / 127.5, 0)
    assert graph.normalization == ((128 / 255,) * 3, (0.5,) * 3)
    assert (len(graph.blocks), graph.feature_mix, graph.class_names) == (17, None, None)
    assert sum(block.addition is not None for block in graph.blocks) == 10
    assert len(list(graph.convolutions())) == 51
    assert (graph.classifier.features, graph.classifier.classes) == (112, 1000)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == tensor_shapes(graph)
    for name, layer in graph.convolutions():
        entry = content
        for key in name.split("."):
            entry = entry[int(key) if key.isdecimal() else key]
        entry = entry["params"]
        assert torch.equal(tensors[f"{name}.weight"], torch.from_numpy(entry["weight"]))
        assert torch.equal(tensors[f"{name}.bias"], torch.from_numpy(entry["bias"]))
        assert torch.equal(tensors[f"{name}.weight_scales"], torch.from_numpy(entry["w_scales"]))
        assert layer.input == Quantization(entry["x_scale"], entry["x_zero"])
        assert layer.output == Quantization(entry["y_scale"], entry["y_zero"])
    linear = content["classifier"]["params"]["weight"]
    assert torch.equal(tensors["classifier.weight"], torch.from_numpy(linear).flatten(1))


def convolutions_of(network):
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            shape = (module.in_channels, module.out_channels, module.kernel_size, module.stride)
            yield QuantizedConvolution(*shape, (0, 0, 0, 0), module.groups, ANY, ANY)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"width": 0.35}, "mobilenet_v2-w0.35"),
        ({"width": 0.35, "head_convolution": True}, "mobilenet_v2-w0.35-head"),
        ({"width": 0.5, "in_channels": 1, "padding": "keras"}, "mobilenet_v2-w0.5"),
        ({"width": 1.4, "head_convolution": True, "in_channels": 7}, "mobilenet_v2-w1.4-head"),
        ({"width": 0.25}, None),
    ],
)
def test_architectures_are_named(arguments, name):
    with torch.device("meta"):
        network = mobilenet_v2(**arguments)
    state = torch.get_rng_state()
    assert architecture_of(convolutions_of(network)) == name
    assert torch.equal(torch.get_rng_state(), state)


def test_another_architecture_has_no_name(graph):
    with torch.device("meta"):
        convolutions = list(convolutions_of(mobilenet_v2(0.35)))
    assert architecture_of([]) is None
    assert architecture_of(convolutions[:-1]) is None
    other = copy.copy(convolutions)
    other[1] = replace(other[1], stride=(2, 2))
    assert architecture_of(other) is None
