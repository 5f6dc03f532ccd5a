"""The list of data sets: what it says is what is trained on, and what is wrong in it is said with its place."""

import json

import pytest

from microtune.modules.user_error import UserError
from microtune.recipes.studies.transfer_tasks import TransferTask, load_tasks

CIFAR = {"data": "cifar10", "weights": "weights.npz", "data_dir": "data", "learning_rates": [0.05, 0.003, 0.0125]}


@pytest.fixture
def listed(tmp_path):
    """Writes a list and returns its path."""

    def write(entries):
        path = tmp_path / "data_sets.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return path

    return write


def test_all_or_some_are_read_in_the_order_asked_for(listed):
    path = listed({"cifar10": CIFAR, "other": {"data": "digits", "weights": "none"}})
    assert load_tasks(path) == {"cifar10": TransferTask(**CIFAR), "other": TransferTask("digits", "none")}
    assert list(load_tasks(path, ["other", "cifar10"])) == ["other", "cifar10"]


def test_searches_train_with_the_rate_in_the_middle():
    assert TransferTask(**CIFAR).middle_rate == 0.0125


def test_settings_of_both_kinds_of_numbers(tmp_path):
    data_set = TransferTask(**CIFAR, data_options={"augmentation": "none"}, resolution=64)
    floating = data_set.trial_settings("fp32", base_depth=20, steps=7, batch_size=16, features="none")
    assert (floating.data, floating.data_dir, floating.data_options) == ("cifar10", "data", {"augmentation": "none"})
    assert (floating.weights, floating.network, floating.resolution) == ("weights.npz", "mobilenet_v2", 64)
    assert (floating.base_depth, floating.steps, floating.batch_size, floating.features) == (20, 7, 16, "none")
    with pytest.raises(UserError, match="there is no int8 network for cifar10: give it, or leave int8 out"):
        data_set.trial_settings("int8")
    both = TransferTask(**CIFAR, int8_network="network.safetensors", width=0.5)
    quantized = both.trial_settings("int8")
    assert (quantized.network, quantized.weights, quantized.width) == ("network.safetensors", "none", None)
    assert both.trial_settings("fp32").width == 0.5
    with pytest.raises(UserError, match="there are no weights in floating point for cifar10: give them, or leave fp32"):
        TransferTask("cifar10", "none", int8_network="network.safetensors").trial_settings("fp32")


@pytest.mark.parametrize(
    ("weights", "int8_network", "numbers"),
    [
        ("weights.npz", None, ("fp32",)),
        ("weights.npz", "network.safetensors", ("fp32", "int8")),
        ("none", "network.safetensors", ("int8",)),
        ("none", None, ("fp32",)),
    ],
)
def test_numbers_are_those_of_the_networks(weights, int8_network, numbers):
    """Fresh weights are only trained where there is nothing else."""
    assert TransferTask("cifar10", weights, int8_network=int8_network).numbers == numbers


def test_the_committed_list_is_one():
    found = load_tasks("recipes/results/data_sets.json")
    assert list(found) == ["cifar10", "flowers17", "speech_commands", "mswc_arabic"]
    assert all(data_set.int8_network for data_set in found.values())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", "data_sets.json: not valid JSON: Expecting"),
        ([], "this is no list of data sets: give an object from a name to its fields"),
        ({"cifar10": 3}, "this is no list of data sets"),
        (
            {"cifar10": CIFAR | {"rate": 1}},
            "cifar10 has the unknown field 'rate': give some of data, weights, data_dir",
        ),
        ({"my-birds": CIFAR}, "the name 'my-birds' would suit no table: give letters, digits and underscores"),
        ({"cifar10": {"data": "cifar10"}}, "cifar10 has no 'weights': add it"),
        ({"cifar10": CIFAR | {"learning_rates": []}}, r"cifar10: learning_rates is \[\]: .* at least 1 item"),
        (
            {"cifar10": CIFAR | {"learning_rates": [0.1, -1]}},
            "cifar10: learning_rates is -1: it should be greater than 0",
        ),
        (
            {"cifar10": CIFAR | {"learning_rates": "0.1"}},
            "cifar10: learning_rates is '0.1': it should be a valid tuple",
        ),
    ],
)
def test_what_is_wrong_is_said(entries, message, listed):
    with pytest.raises(UserError, match=message):
        load_tasks(listed(entries))


def test_a_missing_list_and_a_missing_name(tmp_path, listed):
    with pytest.raises(UserError, match=r"none.json: cannot read the list of data sets: No such file or directory"):
        load_tasks(tmp_path / "none.json")
    with pytest.raises(UserError, match="has no data set 'cifar100': it has cifar10"):
        load_tasks(listed({"cifar10": CIFAR}), ["cifar100"])
