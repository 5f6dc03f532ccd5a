"""Promises of the update scheme: what it counts, what it refuses and with which words, and its JSON."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from microtune.modules.networks.operations import Convolution, find_operations
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

NETWORK = nn.Sequential(
    nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 1, groups=10), nn.Conv2d(10, 4, 1), nn.Flatten(), nn.Linear(4, 2)
)
CONVOLUTIONS = find_operations(NETWORK, (3, 1, 1)).convolutions
VALID = {"network": "net", "bias_depth": 2, "weights": {"2": 0.5}}


def convolution(in_channels):
    return Convolution("layer", in_channels, 4, (1, 1), (1, 1), 1, (1, 1), (1, 1), (1, 1), True)


@given(st.integers(1, 3000).flatmap(lambda channels: st.tuples(st.just(channels), st.integers(1, channels))))
def test_k_of_c_channels_as_a_ratio_are_k_channels(numbers):
    in_channels, count = numbers
    scheme = UpdateScheme("net", 1, {"layer": count / in_channels})
    assert scheme.updated_channels(convolution(in_channels)) == count


@given(st.integers(1, 3000), st.integers(1, 1000))
def test_the_number_of_channels_is_rounded_down(in_channels, thousandths):
    scheme = UpdateScheme("net", 1, {"layer": thousandths / 1000})
    assert scheme.updated_channels(convolution(in_channels)) == in_channels * thousandths // 1000


def test_the_product_of_floats_does_not_lose_a_channel():
    assert 0.29 * 100 < 29
    assert UpdateScheme("net", 1, {"layer": 0.29}).updated_channels(convolution(100)) == 29


def test_fixed_channels_count_and_not_the_ratio():
    scheme = UpdateScheme("net", 1, {"layer": 1.0}, {"layer": [4, 1]})
    assert scheme.updated_channels(convolution(10)) == 2
    assert UpdateScheme("net", 1, {"layer": 0.01}, {"layer": [4, 1]}).updated_channels(convolution(10)) == 2


def test_a_layer_that_is_not_named_updates_no_channel():
    assert UpdateScheme("net", 1, {"other": 1.0}).updated_channels(convolution(10)) == 0


@pytest.mark.parametrize(
    "scheme",
    [
        UpdateScheme("net", 0),
        UpdateScheme("net", 3),
        UpdateScheme("net", 3, {"0": 1, "1": 0.1, "2": 1.0}, {"1": [0, 9]}),
        UpdateScheme("net", 1, {"2": 0.01}, {"2": [9]}),
    ],
)
def test_schemes_that_suit_the_network(scheme):
    scheme.check(CONVOLUTIONS)
    scheme.check(CONVOLUTIONS, "net")


VALUE_ERRORS = [
    ({"network": 3}, "network is 3: give the network's name as a string"),
    *(
        ({"bias_depth": depth}, f"bias_depth is {depth!r}: give the number of last biases, 0 or more")
        for depth in (-1, 2.0, True, "2", None, math.nan)
    ),
    ({"weights": ["2"]}, "weights is ['2']: give a mapping"),
    ({"weights": None}, "weights is None: give a mapping"),
    ({"channels": [1]}, "channels is [1]: give a mapping"),
    ({"provenance": "mine"}, "provenance is 'mine': give a mapping"),
    *(
        ({"weights": {"2": ratio}}, f"update ratio of 2 is {ratio!r}: give a number in (0, 1]")
        for ratio in (0, 0.0, -0.5, 1.0000001, 2, math.nan, math.inf, True, False, "0.5", None, [0.5])
    ),
    *(
        ({"channels": {"2": indexes}}, f"channels of 2 are {indexes!r}: give a list of at least one channel index")
        for indexes in ([], "12", 3, None, {"1": 2})
    ),
    ({"channels": {"2": [1, -1]}}, "channel -1 of 2 is no channel index: give an integer, 0 or more"),
    ({"channels": {"2": [1.0]}}, "channel 1.0 of 2 is no channel index"),
    ({"channels": {"2": [True]}}, "channel True of 2 is no channel index"),
    ({"channels": {"2": ["1"]}}, "channel '1' of 2 is no channel index"),
    ({"channels": {"2": [3, 1, 3]}}, "channel 3 of 2 stands there twice: keep one"),
    ({"channels": {"1": [3]}}, "channels of 1 are fixed, but it is not among the weights: add its update ratio"),
    ({"ratio": 1}, "unknown key 'ratio': an update scheme has network, bias_depth, weights, channels, provenance"),
]


@pytest.mark.parametrize(("values", "message"), VALUE_ERRORS, ids=[message[:50] for _, message in VALUE_ERRORS])
def test_wrong_values_are_named(values, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        UpdateScheme.from_dict({**VALID, **values})


@pytest.mark.parametrize("key", VALID)
def test_missing_keys_are_named(key):
    with pytest.raises(UserError, match=f"^key '{key}' is missing: an update scheme has network, bias_depth"):
        UpdateScheme.from_dict({name: value for name, value in VALID.items() if name != key})


NETWORK_ERRORS = [
    (UpdateScheme("net", 4), "bias_depth is 4, but the network has no more than 3 convolutions"),
    (
        UpdateScheme("net", 1, {"3": 1.0}),
        "layer 3 is no convolution of the network: its last ones are 0, 1, 2",
    ),
    (
        UpdateScheme("net", 1, {"0": 1.0}),
        "the weight of 0 is updated, but the layer lies outside bias_depth 1: give at least 3, or leave its weight out",
    ),
    (UpdateScheme("net", 0, {"2": 1.0}), "the weight of 2 is updated, but the layer lies outside bias_depth 0"),
    (
        UpdateScheme("net", 3, {"0": 0.3}),
        "update ratio 0.3 of 0 is none of its 3 input channels: give at least 0.3334",
    ),
    (
        UpdateScheme("net", 3, {"1": 1.0}, {"1": [9, 10, 11]}),
        "channel 10 of 1 does not exist: its input channels are 0 to 9",
    ),
]


@pytest.mark.parametrize(("scheme", "message"), NETWORK_ERRORS, ids=[message[:50] for _, message in NETWORK_ERRORS])
def test_what_does_not_suit_the_network_is_named(scheme, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        scheme.check(CONVOLUTIONS)


def test_scheme_of_another_network():
    with pytest.raises(UserError, match=r"^the scheme is for net, but the network is resnet18: take a scheme made for"):
        UpdateScheme("net", 1).check(CONVOLUTIONS, "resnet18")


@given(st.integers(1, 5000))
def test_the_ratio_that_an_error_proposes_is_enough(in_channels):
    layer = convolution(in_channels)
    with pytest.raises(UserError) as error:
        UpdateScheme("net", 1, {"layer": 1e-5}).check([layer])
    proposed = float(str(error.value).rsplit(" ", 1)[1])
    UpdateScheme("net", 1, {"layer": proposed}).check([layer])


names = st.text(min_size=1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@st.composite
def schemes(draw):
    ratios = st.floats(0, 1, exclude_min=True) | st.just(1)
    weights = draw(st.dictionaries(names, ratios, max_size=4))
    fixed = draw(st.lists(st.sampled_from(sorted(weights)), unique=True)) if weights else []
    channels = {layer: draw(st.lists(st.integers(0, 2000), min_size=1, unique=True)) for layer in fixed}
    provenance = draw(st.dictionaries(st.text(), json_values, max_size=3))
    return UpdateScheme(draw(st.text()), draw(st.integers(0, 100)), weights, channels, provenance)


@given(schemes())
def test_what_was_saved_is_loaded(tmp_path_factory, scheme):
    path = tmp_path_factory.mktemp("scheme") / "scheme.json"
    scheme.save(path)
    assert UpdateScheme.load(path) == scheme
    assert UpdateScheme.load(str(path)) == scheme
    assert UpdateScheme.from_dict(scheme.to_dict()) == scheme


def test_channels_and_provenance_may_be_absent(tmp_path):
    path = tmp_path / "scheme.json"
    path.write_text(json.dumps(VALID))
    assert UpdateScheme.load(path) == UpdateScheme("net", 2, {"2": 0.5}, {}, {})


TEXT = json.dumps(VALID)
FILE_ERRORS = {
    "malformed": (TEXT.replace(":", "=", 1).encode(), "not valid JSON, perhaps cut off: "),
    "truncated": (TEXT[:-10].encode(), "not valid JSON, perhaps cut off: "),
    "empty": (b"", "not valid JSON, perhaps cut off: "),
    "two": ((TEXT + TEXT).encode(), "not valid JSON, perhaps cut off: "),
    "binary": (bytes(range(256)), "this is a binary file, not an update scheme in JSON"),
    "zeros": (bytes(100), "not valid JSON, perhaps cut off: "),
    "deep": (b"[" * 100_000, "not valid JSON, perhaps cut off: "),
    "long_number": (b'{"bias_depth": ' + b"1" * 5000 + b"}", "not valid JSON, perhaps cut off: "),
    "list": (b"[1, 2]", "an update scheme is a JSON object with the keys network, bias_depth, weights, channels, pro"),
    "null": (b"null", "an update scheme is a JSON object with the keys network"),
    "twice": (TEXT.replace("}}", '}, "bias_depth": 3}').encode(), "key 'bias_depth' stands there twice: keep one"),
    "layer_twice": (TEXT.replace("}}", ', "2": 1.0}}').encode(), "key '2' stands there twice: keep one"),
    "nan": (TEXT.replace("0.5", "NaN").encode(), "update ratio of 2 is nan: give a number in (0, 1]"),
    "unknown": (TEXT.replace("}}", '}, "biases": 3}').encode(), "unknown key 'biases': an update scheme has network"),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_files_that_are_no_scheme(tmp_path, name):
    content, message = FILE_ERRORS[name]
    path = tmp_path / "scheme.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: {message}')}"):
        UpdateScheme.load(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"missing.json: cannot read the update scheme: No such file or directory"):
        UpdateScheme.load(tmp_path / "missing.json")
    with pytest.raises(UserError, match="cannot read the update scheme: Is a directory"):
        UpdateScheme.load(tmp_path)


def test_a_scheme_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "scheme.json"
    UpdateScheme("net", 1).save(path)
    with pytest.raises(ValueError, match="JSON"):
        UpdateScheme("net", 2, provenance={"accuracy": math.nan}).save(path)
    assert UpdateScheme.load(path).bias_depth == 1
