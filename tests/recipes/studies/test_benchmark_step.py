"""The benchmark of one training step: what it reports. Times are not tested, for they depend on the machine."""

import json

import pytest
import torch

from microtune.modules.int8.files import write_quantized_network
from microtune.modules.memory.training_memory import autograd_bytes_per_sample
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.studies import benchmark_step

SCHEMES = {
    "99kb": None,
    "classifier": UpdateScheme("mobilenet_v2-w0.35", 0),
    "biases": UpdateScheme("mobilenet_v2-w0.35", 20),
    "depthwise": UpdateScheme("mobilenet_v2-w0.35", 5, {"features.17.conv.1.0": 0.25, "features.17.conv.2": 1.0}),
}


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SCHEMES)
def scheme(request, scheme_file, tmp_path):
    """A scheme and its file."""
    if request.param == "99kb":
        return UpdateScheme.load(scheme_file), scheme_file
    SCHEMES[request.param].save(tmp_path / "scheme.json")
    return SCHEMES[request.param], tmp_path / "scheme.json"


def test_json_is_one_object_and_nothing_else(command, scheme):
    update_scheme, file = scheme
    ended = command(
        *("benchmark_step", "--width", 0.35, "--resolution", 48, "--batch_size", 2, "--scheme", file),
        *("--rounds", 2, "--threads", 1, "--json"),
    )
    assert (ended.status, ended.errors) == (0, "")
    methods = json.loads(ended.output)["methods"]
    assert list(methods) == ["full", "published", "freeze", "mask", "sub_tensor"]
    for row in methods.values():
        assert row.keys() >= {"step_seconds", "autograd_bytes_per_sample", "speedup_over_full"}
        assert row["step_seconds"] > 0
        assert row["speedup_over_full"] > 0
    assert methods["full"]["speedup_over_full"] == 1

    operations = find_operations(mobilenet_v2(0.35, num_classes=10), (3, 48, 48))
    saved = {name: row["autograd_bytes_per_sample"] for name, row in methods.items()}
    assert saved["sub_tensor"] == autograd_bytes_per_sample(operations, update_scheme)
    assert saved["sub_tensor"] <= saved["freeze"] <= saved["mask"] <= saved["full"]
    assert saved["published"] == saved["full"]
    for name, row in methods.items():
        assert row["saved_bytes_ratio_of_full"] == saved["full"] / saved[name]


def test_saved_bytes_do_not_depend_on_the_batch(command, scheme_file):
    def saved(batch_size):
        words = ("--scheme", scheme_file, "--resolution", 32, "--batch_size", batch_size, "--rounds", 1, "--json")
        methods = json.loads(command("benchmark_step", *words).output)["methods"]
        return {name: row["autograd_bytes_per_sample"] for name, row in methods.items()}

    assert saved(1) == saved(3)


def test_table(command, scheme_file):
    ended = command("benchmark_step", "--scheme", scheme_file, "--resolution", 32, "--batch_size", 2, "--rounds", 1)
    assert ended.status == 0
    for method in benchmark_step.METHODS:
        assert method in ended.output
    assert "forward pass alone" in ended.output


def test_thirty_times_fewer_saved_bytes_than_full_update(command, scheme_file):
    """The promise at 128 px, with a scheme like the paper's of 99 KiB."""
    words = ("--scheme", scheme_file, "--resolution", 128, "--batch_size", 2, "--rounds", 1, "--json")
    methods = json.loads(command("benchmark_step", *words).output)["methods"]
    assert methods["sub_tensor"]["saved_bytes_ratio_of_full"] >= 30


def test_input_that_is_not_square(command):
    scheme = UpdateScheme("mobilenet_v2-w0.35", 0)
    ended = command(
        *("benchmark_step", "--resolution", 97, "--input_width", 40, "--in_channels", 1, "--batch_size", 2),
        *("--scheme", "classifier", "--rounds", 1, "--threads", 1, "--json"),
    )
    assert (ended.status, ended.errors) == (0, "")
    operations = find_operations(mobilenet_v2(0.35, num_classes=10, in_channels=1), (1, 97, 40))
    saved = json.loads(ended.output)["methods"]["sub_tensor"]["autograd_bytes_per_sample"]
    assert saved == autograd_bytes_per_sample(operations, scheme)


def test_int8_network(command, small_graph, small_tensors, tmp_path):
    """The same methods; what they store is what the account says, kept activations being int8."""
    write_quantized_network(tmp_path / "small.safetensors", small_graph, small_tensors)
    scheme = UpdateScheme("small-int8", 4, {"blocks.2.pointwise1": 0.5, "blocks.1.pointwise2": 1.0})
    scheme.save(tmp_path / "scheme.json")
    ended = command(
        *("benchmark_step", "--network", tmp_path / "small.safetensors", "--scheme", tmp_path / "scheme.json"),
        *("--resolution", 32, "--batch_size", 2, "--rounds", 1, "--threads", 1, "--json"),
    )
    assert (ended.status, ended.errors) == (0, "")
    saved = {name: row["autograd_bytes_per_sample"] for name, row in json.loads(ended.output)["methods"].items()}
    described = benchmark_step.describe_network(str(tmp_path / "small.safetensors"), (3, 32, 32), 10)
    assert saved["sub_tensor"] == autograd_bytes_per_sample(described.operations, scheme)
    assert saved["sub_tensor"] < saved["mask"] < saved["published"] == saved["full"]
