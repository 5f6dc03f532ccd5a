"""Promises about the file of an int8 network: it is exact, the same every time, and no other file passes for one."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from microtune.modules.int8.files import (
    is_quantized_file,
    read_quantized_network,
    tensor_shapes,
    write_quantized_network,
)
from microtune.modules.int8.graph import Quantization
from microtune.modules.user_error import UserError

REMEDY = r": make one with recipes/quantize_network\.py"


@pytest.fixture
def file(tmp_path, small_graph, small_tensors):
    path = tmp_path / "network.safetensors"
    write_quantized_network(path, small_graph, small_tensors)
    return path


@pytest.fixture
def int8_graph(small_graph):
    """With an int8 classifier."""
    return replace(small_graph, classifier=replace(small_graph.classifier, output=Quantization(0.1, 3)))


def random_tensors(graph, seed):
    """All bit patterns that are admitted may occur."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in tensor_shapes(graph).items():
        if dtype == torch.float32:
            numbers = torch.randn(shape, generator=random) * 10.0 ** torch.randint(-40, 30, shape, generator=random)
            tensors[name] = numbers.abs() + 1e-45 if name.endswith("scales") else numbers
        else:
            limits = torch.iinfo(dtype)
            tensors[name] = torch.randint(limits.min, limits.max + 1, shape, dtype=dtype, generator=random)
    return tensors


def assert_same(read, written):
    assert read.keys() == written.keys()
    for name in written:
        assert read[name].dtype == written[name].dtype
        assert torch.equal(read[name], written[name])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_what_was_written_is_read(tmp_path, small_graph, int8_graph, seed, is_int8):
    graph = int8_graph if is_int8 else small_graph
    tensors = random_tensors(graph, seed)
    write_quantized_network(tmp_path / "network.safetensors", graph, tensors)
    read_graph, read_tensors = read_quantized_network(tmp_path / "network.safetensors")
    assert read_graph == graph
    assert list(read_tensors) == list(tensor_shapes(graph))
    assert_same(read_tensors, tensors)


def test_tensors_of_an_int8_and_of_a_float_classifier(small_graph, int8_graph):
    as_float, as_int8 = tensor_shapes(small_graph), tensor_shapes(int8_graph)
    assert len(as_float) == 3 * 9 + 2
    assert len(as_int8) == 3 * 9 + 3
    assert as_float["blocks.1.depthwise.weight"] == (torch.int8, (24, 1, 3, 3))
    assert as_float["blocks.1.depthwise.bias"] == (torch.int32, (24,))
    assert as_float["blocks.1.depthwise.weight_scales"] == (torch.float32, (24,))
    assert as_float["classifier.weight"] == (torch.float32, (10, 16))
    assert as_float["classifier.bias"] == (torch.float32, (10,))
    assert as_int8["classifier.weight"] == (torch.int8, (10, 16))
    assert as_int8["classifier.bias"] == (torch.int32, (10,))
    assert as_int8["classifier.weight_scales"] == (torch.float32, (10,))


def test_the_same_network_gives_the_same_bytes(file, small_graph, small_tensors):
    content = file.read_bytes()
    for _ in range(5):  # safetensors' own order of the metadata is random
        write_quantized_network(file, *read_quantized_network(file))
        assert file.read_bytes() == content
    write_quantized_network(file, small_graph, dict(reversed(small_tensors.items())))
    assert file.read_bytes() == content


def test_the_file_is_an_ordinary_safetensors_file(file, small_graph, small_tensors):
    assert_same(load_file(file), small_tensors)
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    assert metadata == {"format": "microtune-int8", "version": "1", "graph": small_graph.to_json()}
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # else tensors would not be aligned


def test_views_and_parameters_are_written_as_what_they_show(file, small_graph, small_tensors):
    changed = dict(small_tensors)
    weight = small_tensors["blocks.1.pointwise1.weight"]
    changed["blocks.1.pointwise1.weight"] = weight.to(memory_format=torch.channels_last)
    changed["classifier.bias"] = torch.nn.Parameter(small_tensors["classifier.bias"])
    changed["blocks.0.depthwise.bias"] = changed["blocks.0.pointwise2.bias"] = torch.arange(8, dtype=torch.int32)
    write_quantized_network(file, small_graph, changed)
    read = read_quantized_network(file)[1]
    assert_same(read, {name: tensor.detach() for name, tensor in changed.items()})


def test_what_was_read_does_not_change_with_the_file(file, small_tensors):
    read = read_quantized_network(file)[1]
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert_same(read, small_tensors)


def test_a_refused_network_leaves_the_old_file(file, small_graph, small_tensors):
    content = file.read_bytes()
    del small_tensors["first_conv.bias"]
    with pytest.raises(UserError, match=r"network\.safetensors: tensor first_conv\.bias is missing"):
        write_quantized_network(file, small_graph, small_tensors)
    assert file.read_bytes() == content
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_conv.bias": None}, r"tensor first_conv\.bias is missing"),
        ({"classifier.weight": None}, r"tensor classifier\.weight is missing"),
        ({"classifier.weight_scales": torch.ones(10)}, r"tensor classifier\.weight_scales is not one of its graph's"),
        (
            {"first_conv.weight": torch.zeros(8, 3, 3, 3)},
            r"tensor first_conv\.weight is torch\.float32 of shape \(8, 3, 3, 3\), where the graph says torch\.int8 of "
            r"shape \(8, 3, 3, 3\)",
        ),
        (
            {"first_conv.weight": torch.zeros(8, 27, dtype=torch.int8)},
            r"tensor first_conv\.weight is torch\.int8 of shape \(8, 27\), where .*",
        ),
        (
            {"first_conv.bias": torch.zeros(8)},
            r"tensor first_conv\.bias is torch\.float32 .*, where the graph says torch\.int32 .*",
        ),
        (
            {"blocks.1.depthwise.weight_scales": torch.zeros(24)},
            r"tensor blocks\.1\.depthwise\.weight_scales has a scale that is not positive",
        ),
        (
            {"blocks.1.depthwise.weight_scales": torch.tensor([1.0, -1.0] * 12)},
            r"tensor blocks\.1\.depthwise\.weight_scales has a scale that is not positive",
        ),
        (
            {"blocks.1.depthwise.weight_scales": torch.full((24,), torch.inf)},
            r"tensor blocks\.1\.depthwise\.weight_scales has values that are not finite",
        ),
        ({"classifier.bias": torch.full((10,), torch.nan)}, r"tensor classifier\.bias has values that are not finite"),
    ],
)
def test_tensors_that_are_not_the_graphs_are_neither_written_nor_read(
    file, small_graph, small_tensors, change, message
):
    changed = {name: tensor for name, tensor in {**small_tensors, **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=rf"^{file}: {message}{REMEDY}$"):
        write_quantized_network(file, small_graph, changed)
    save_file(changed, file, {"format": "microtune-int8", "version": "1", "graph": small_graph.to_json()})
    with pytest.raises(UserError, match=rf"^{file}: {message}{REMEDY}$"):
        read_quantized_network(file)


def test_an_int8_classifier_needs_its_scales(file, int8_graph, small_tensors):
    with pytest.raises(UserError, match=r"tensor classifier\.weight_scales is missing"):
        write_quantized_network(file, int8_graph, small_tensors)
    scaled = {**small_tensors, "classifier.weight_scales": torch.ones(10)}
    with pytest.raises(UserError, match=r"classifier\.weight is torch\.float32 .* where the graph says torch\.int8"):
        write_quantized_network(file, int8_graph, scaled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pt"}, "it is a safetensors file, but not of an int8 network of microtune"),
        ({"format": None}, "it is a safetensors file, but not of an int8 network of microtune"),
        ({"graph": None}, "it is a safetensors file, but not of an int8 network of microtune"),
        ({"version": "2"}, "it is of version '2', and this microtune reads '1'"),
        ({"version": None}, "it is of version None, and this microtune reads '1'"),
        ({"graph": "{}"}, "its graph is damaged: name: Field required"),
        ({"graph": "<html>"}, "its graph is damaged: the whole: Invalid JSON"),
        ({"graph": "zero"}, "its graph is damaged: classifier.output: a scale is 0.0: it must be positive and finite"),
    ],
)
def test_other_metadata_is_refused(file, int8_graph, change, message):
    graph = int8_graph.to_json()
    metadata = {"format": "microtune-int8", "version": "1", "graph": graph, **change}
    if change.get("graph") == "zero":
        metadata["graph"] = graph.replace('"scale":0.1,', '"scale":0,')
    save_file(load_file(file), file, {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(UserError, match=rf"^{file}: {message}.*{REMEDY}"):
        read_quantized_network(file)


def test_safetensors_of_something_else_is_refused(file):
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=f"^{file}: it is a safetensors file, but not of an int8 network.*{REMEDY}$"):
        read_quantized_network(file)


def test_other_contents_are_refused(file):
    content = file.read_bytes()
    huge = json.dumps({"a": {"dtype": "I8", "shape": [2**60], "data_offsets": [0, 2**60]}}).encode()
    for wrong in (
        b"",
        b"<html>not found</html>",
        b"\xff" * 1000,
        content[:5],
        content[:100],
        content[:-1],
        content + b"\0",
        len(huge).to_bytes(8, "little") + huge,
        (2**50).to_bytes(8, "little") + b"{",
    ):
        file.write_bytes(wrong)
        with pytest.raises(UserError, match=rf"^{file}: it is cut short or no safetensors file \(.*\){REMEDY}$"):
            read_quantized_network(file)


def test_missing_files_and_other_suffixes_are_refused(tmp_path, small_graph, small_tensors):
    path = tmp_path / "missing.safetensors"
    with pytest.raises(UserError, match=rf"^{path}: there is no such file{REMEDY}$"):
        read_quantized_network(path)
    path.mkdir()
    with pytest.raises(UserError, match=rf"^{path}: there is no such file{REMEDY}$"):
        read_quantized_network(path)
    other = tmp_path / "network.pkl"
    with pytest.raises(UserError, match=rf"^{other}: the file of an int8 network ends in \.safetensors{REMEDY}$"):
        read_quantized_network(other)
    with pytest.raises(
        UserError, match=rf"^{other}: the file of an int8 network ends in \.safetensors: give such a name"
    ):
        write_quantized_network(other, small_graph, small_tensors)
    assert not other.exists()


def test_the_suffix_tells_a_quantized_file(tmp_path):
    assert is_quantized_file("runs/network.safetensors")
    assert is_quantized_file(tmp_path / "network.safetensors")
    for other in ("none", "torchvision", "network.pkl", "safetensors", "network.safetensors.ckpt"):
        assert not is_quantized_file(other)


def test_tensors_in_another_memory_order_are_written(small_graph, small_tensors, tmp_path):
    """A network in PyTorch's ``channels_last`` order has such weights."""
    other = {
        name: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        for name, tensor in small_tensors.items()
    }
    for name, tensors in (("plain", small_tensors), ("other", other)):
        write_quantized_network(tmp_path / f"{name}.safetensors", small_graph, tensors)
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
