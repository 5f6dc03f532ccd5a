"""Promises of the contribution table: what it refuses and with which words, its CSV, and its shrunk gains."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from microtune.modules.networks.operations import find_operations
from microtune.modules.search.contributions import Contribution, ContributionTable, shrunk
from microtune.modules.user_error import UserError

NETWORK = nn.Sequential(
    nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 1, groups=10), nn.Conv2d(10, 4, 1), nn.Flatten(), nn.Linear(4, 2)
)
CONVOLUTIONS = find_operations(NETWORK, (3, 1, 1)).convolutions
HEADER = "kind,bias_depth,layer,ratio,gain,gain_std,runs"
LINES = [HEADER, "bias,1,,,0.01,0.001,3", "bias,2,,,0.02,0.001,3", "weight,2,1,0.5,0.012,0.002,3"]
LINES += ["weight,2,1,1.0,0.015,0.002,3", "weight,2,2,0.5,-0.001,0.002,3", "weight,2,2,1.0,0.003,0.002,3"]
BIAS = Contribution("bias", 2, "", 0.0, 0.02, 0.001, 3)
WEIGHT = Contribution("weight", 2, "2", 0.5, 0.012, 0.002, 3)


def load(folder, lines):
    path = folder / "contributions.csv"
    path.write_text("\n".join(lines) + "\n")
    return ContributionTable.load(path)


def test_rows_stay_in_their_order(tmp_path):
    table = load(tmp_path, [HEADER, LINES[5], LINES[2], LINES[6], LINES[1]])
    assert [(row.kind, row.bias_depth, row.layer, row.ratio, row.gain) for row in table.rows] == [
        ("weight", 2, "2", 0.5, -0.001),
        ("bias", 2, "", 0.0, 0.02),
        ("weight", 2, "2", 1.0, 0.003),
        ("bias", 1, "", 0.0, 0.01),
    ]
    assert {(row.gain_std, row.runs) for row in table.rows} == {(0.001, 3), (0.002, 3)}


def test_a_table_by_hand_may_order_its_columns_and_end_its_lines_otherwise(tmp_path):
    path = tmp_path / "contributions.csv"
    path.write_bytes(b"\xef\xbb\xbfruns,gain_std,gain,ratio,layer,bias_depth,kind\r\n\r\n1,,0.5,,,3,bias\r\n\r\n")
    assert ContributionTable.load(path).rows == (Contribution("bias", 3, "", 0.0, 0.5, 0.0, 1),)


def test_ratio_of_a_bias_may_be_0(tmp_path):
    assert load(tmp_path, [HEADER, "bias,2,,0,0.02,0.001,3"]).rows == (BIAS,)


def test_base_depth():
    deep = replace(BIAS, bias_depth=9)
    assert ContributionTable((deep, BIAS, WEIGHT)).base_depth == 2
    assert ContributionTable((BIAS, deep)).base_depth == 9
    assert ContributionTable(()).base_depth == 0


def test_gains_without_noise_are_those_measured():
    exact = [replace(row, gain_std=0.0) for row in (BIAS, replace(BIAS, bias_depth=1, gain=-0.01), WEIGHT)]
    table = ContributionTable((*exact, replace(exact[2], ratio=1.0, gain=0.5)))
    assert table.bias_gains == {0: 0.0, 2: 0.02, 1: -0.01}
    assert table.weight_gains == {"2": {0.5: 0.012, 1.0: 0.5}}


def test_depth_0_has_no_gain_and_does_not_weigh_on_the_others():
    noisy = replace(BIAS, gain=0.02, gain_std=0.01, runs=1)
    zero = Contribution("bias", 0, "", 0.0, 0.0, 0.05, 1)
    assert ContributionTable(()).bias_gains == {0: 0.0}
    assert ContributionTable((zero, noisy)).bias_gains == ContributionTable((noisy,)).bias_gains
    # tau^2 = 0.02^2 - 0.01^2 = 0.0003, and 0.0003 / (0.0003 + 0.0001) = 3/4
    assert ContributionTable((zero, noisy)).bias_gains == {0: 0.0, 2: pytest.approx(0.015)}


def test_each_kind_is_shrunk_by_its_own_noise_and_more_runs_are_less_noise():
    table = ContributionTable((BIAS, replace(WEIGHT, gain=0.02, gain_std=0.02, runs=4)))
    assert table.weight_gains == {"2": {0.5: pytest.approx(0.015)}}
    assert table.bias_gains[2] > 0.0199


def test_shrinking_by_hand():
    # tau^2 = mean(4 - 1, 1 - 0) = 2
    assert shrunk([2.0, -1.0], [1.0, 0.0]) == pytest.approx([2 * 2 / 3, -1.0])
    assert shrunk([0.1, -0.2], [1.0, 1.0]) == [0.0, 0.0]  # nothing but noise
    assert shrunk([0.1], [1e200]) == [0.0]
    assert shrunk([], []) == []


gains_and_errors = st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=1, max_size=8)


@given(st.lists(st.floats(-1, 1)))
def test_without_standard_errors_gains_stay_as_they_are(gains):
    assert shrunk(gains, [0.0] * len(gains)) == gains


@given(gains_and_errors)
def test_shrinking_never_changes_a_sign_and_never_makes_a_gain_grow(pairs):
    gains, errors = zip(*pairs, strict=True)
    for gain, error, small in zip(gains, errors, shrunk(gains, errors), strict=True):
        assert abs(small) <= abs(gain)
        assert small * gain >= 0
        assert error > 0 or small == gain


@given(gains_and_errors, st.integers(-12, 12))
def test_shrinking_knows_no_scale(pairs, exponent):
    scale = 2.0**exponent  # products with powers of two are exact
    gains, errors = zip(*pairs, strict=True)
    assume(all(value == 0 or abs(value) > 1e-100 for value in (*gains, *errors)))  # squares do not vanish
    scaled = shrunk([gain * scale for gain in gains], [error * scale for error in errors])
    assert scaled == [gain * scale for gain in shrunk(gains, errors)]


@given(gains_and_errors)
def test_noisier_of_two_equal_gains_is_shrunk_more(pairs):
    gains, errors = zip(*pairs, strict=True)
    small = shrunk([*gains, 0.5, 0.5], [*errors, 0.1, 0.2])
    assert small[-1] <= small[-2]


values = st.floats(-1, 1)
deviations = st.floats(0, allow_infinity=False)
layer_names = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1)


@st.composite
def tables(draw):
    depths = draw(st.lists(st.integers(1, 200), min_size=1, max_size=4, unique=True))
    layers = draw(st.lists(layer_names, max_size=3, unique=True))
    thousandths = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=3, unique=True))
    keys = [("bias", depth, "", 0.0) for depth in depths]
    keys += [("weight", depths[0], layer, count / 1000) for layer in layers for count in thousandths]
    order = draw(st.permutations(keys))
    return ContributionTable(
        tuple(Contribution(*key, draw(values), draw(deviations), draw(st.integers(1, 100))) for key in order)
    )


@given(tables())
def test_what_was_saved_is_loaded(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("table") / "contributions.csv"
    table.save(path)
    assert ContributionTable.load(path) == table
    assert ContributionTable.load(str(path)) == table


def test_saved_text(tmp_path):
    path = tmp_path / "new" / "contributions.csv"
    ContributionTable((BIAS, replace(WEIGHT, layer='a,"b"', ratio=1))).save(path)
    assert path.read_bytes() == (HEADER + '\nbias,2,,,0.02,0.001,3\nweight,2,"a,""b""",1.0,0.012,0.002,3\n').encode()


ROW_ERRORS = [
    ("biases,2,,,0.02,0.001,3", "kind is 'biases': give bias or weight"),
    ("bias,two,,,0.02,0.001,3", "bias_depth is 'two': give a whole number"),
    ("bias,2.0,,,0.02,0.001,3", "bias_depth is '2.0': give a whole number"),
    ("bias,-1,,,0.02,0.001,3", "bias_depth of a bias row is -1: give 0 or more"),
    ("weight,0,2,0.5,0.02,0.001,3", "bias_depth of a weight row is 0: give 1 or more"),
    ("bias,0,,,0.02,0.001,3", "gain of bias depth 0 is 0.02: that is the classifier only, which gains are counted"),
    ("bias,3,2,,0.02,0.001,3", "a bias row has layer '2' and ratio 0.0: leave both empty"),
    ("bias,3,,0.5,0.02,0.001,3", "a bias row has layer '' and ratio 0.5: leave both empty"),
    ("weight,2,,0.5,0.02,0.001,3", "a weight row has no layer: give the convolution's name"),
    ("weight,2,2,,0.02,0.001,3", "ratio is '': give a number"),
    ("weight,2,2,half,0.02,0.001,3", "ratio is 'half': give a number"),
    *(
        (f"weight,2,2,{ratio},0.02,0.001,3", f"ratio of 2 is {float(ratio)!r}: give a number in (0, 1]")
        for ratio in ("0", "-0.5", "1.0001", "nan", "inf")
    ),
    ("bias,3,,,many,0.001,3", "gain is 'many': give a number"),
    ("bias,3,,,,0.001,3", "gain is '': give a number"),
    ("bias,3,,,nan,0.001,3", "gain is nan: give a finite number"),
    ("bias,3,,,-inf,0.001,3", "gain is -inf: give a finite number"),
    ("bias,3,,,0.02,little,3", "gain_std is 'little': give a number"),
    ("bias,3,,,0.02,,3", "gain_std is '': give a number"),
    ("bias,3,,,0.02,-0.1,3", "gain_std is -0.1: give a finite number, 0 or more"),
    ("bias,3,,,0.02,nan,3", "gain_std is nan: give a finite number, 0 or more"),
    ("bias,3,,,0.02,inf,3", "gain_std is inf: give a finite number, 0 or more"),
    ("bias,3,,,0.02,0.001,0", "runs is 0: give 1 or more"),
    ("bias,3,,,0.02,0.001,", "runs is '': give a whole number"),
    ("bias,3,,,0.02,0.001,1.5", "runs is '1.5': give a whole number"),
    (
        "weight,1,2,0.25,0.02,0.001,3",
        "the weight of 2 was measured with base depth 1, those before with 2: "
        "gains of two base depths do not compare, measure all with one",
    ),
]


@pytest.mark.parametrize(("row", "message"), ROW_ERRORS, ids=[row for row, _ in ROW_ERRORS])
def test_wrong_rows_are_named_with_their_line(tmp_path, row, message):
    expected = f"{tmp_path / 'contributions.csv'}: line 8: {message}"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}") as error:
        load(tmp_path, [*LINES, row])
    assert "\n" not in str(error.value)


DOUBLED = {
    "bias,1,,,0.02,0.001,3": "lines 2 and 8 are both bias, 1",
    "weight,2,1,0.5,0.02,0.001,3": "lines 4 and 8 are both weight, 1, 0.5",
    "weight,2,1,0.5000000001,0.02,0.001,3": "lines 4 and 8 are both weight, 1, 0.5",
}


@pytest.mark.parametrize("row", DOUBLED)
def test_an_update_is_measured_in_one_line(tmp_path, row):
    with pytest.raises(UserError) as error:
        load(tmp_path, [*LINES, row])
    assert str(error.value) == f"{tmp_path / 'contributions.csv'}: {DOUBLED[row]}: keep one"


def test_a_layer_called_bias_is_no_bias(tmp_path):
    assert len(load(tmp_path, [HEADER, "bias,1,,,0.02,0.001,3", "weight,1,bias,1.0,0.02,0.001,3"]).rows) == 2


COMMON = "the columns are kind,bias_depth,layer,ratio,gain,gain_std,runs"
NOT_FINISHED = "the measurement is not finished, measure_contributions goes on where it stopped"
FILE_ERRORS = {
    "empty": (b"", f"the file is empty: {COMMON}"),
    "blank": (b"\n\n", f"the file is empty: {COMMON}"),
    "binary": (bytes(range(256)), "this is a binary file, not CSV"),
    "zeros": (bytes(100), "this is a binary file, not CSV"),
    "other": (b"accuracy,step\n", f"line 1: unknown column 'accuracy': {COMMON}"),
    "semicolons": (HEADER.replace(",", ";").encode(), "line 1: unknown column 'kind;bias_depth;layer;"),
    "missing_column": (HEADER.replace(",runs", "").encode(), f"line 1: column 'runs' is missing: {COMMON}"),
    "doubled_column": ((HEADER + ",runs").encode(), f"line 1: column 'runs' stands there twice: {COMMON}"),
    "header_only": (HEADER.encode(), f"there are no bias rows: {NOT_FINISHED}"),
    "no_bias": ("\n".join([HEADER, *LINES[3:]]).encode(), f"there are no bias rows: {NOT_FINISHED}"),
    "no_base": (
        "\n".join([*LINES[:2], *LINES[3:]]).encode(),
        f"base depth 2 of the weight rows has no bias row: {NOT_FINISHED}",
    ),
    "lacking_ratio": (
        "\n".join(LINES[:-1]).encode(),
        f"layer 2 lacks ratio 1.0, which others have: {NOT_FINISHED}",
    ),
    "cut_off": ("\n".join(LINES)[:-7].encode(), "line 7 has 6 fields, not 7, perhaps cut off: mend it"),
    "one_more": ("\n".join([*LINES, LINES[1] + ",5"]).encode(), "line 8 has 8 fields, not 7, perhaps cut off"),
    "open_quote": ("\n".join([*LINES, 'weight,2,"1']).encode(), "line 8: not valid CSV, perhaps cut off: "),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_files_that_are_no_table(tmp_path, name):
    content, message = FILE_ERRORS[name]
    path = tmp_path / "contributions.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: {message}')}") as error:
        ContributionTable.load(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    expected = f"{tmp_path / 'missing.csv'}: the file cannot be read: No such file or directory"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        ContributionTable.load(tmp_path / "missing.csv")
    with pytest.raises(UserError, match="the file cannot be read: Is a directory"):
        ContributionTable.load(tmp_path)


def test_values_are_refused_where_rows_are_made():
    with pytest.raises(UserError, match=r"^gain is nan: give a finite number$"):
        replace(WEIGHT, gain=math.nan)


def test_a_table_of_the_network(tmp_path):
    table = load(tmp_path, LINES)
    table.check(CONVOLUTIONS)
    table.check(CONVOLUTIONS, ["2", "1"])
    load(tmp_path, LINES[:2]).check(CONVOLUTIONS)


CHECK_ERRORS = [
    (
        replace(WEIGHT, layer="3"),
        "layer 3 of the contribution table is no convolution of the network, whose last ones are 0, 1, 2: "
        "take a table measured on it",
    ),
    (
        replace(WEIGHT, bias_depth=4),
        "the contribution table has bias depth 4, but the network has no more than 3 convolutions: take a table",
    ),
    (replace(BIAS, bias_depth=4), "the contribution table has bias depth 4, but the network has no more than 3"),
    (
        replace(WEIGHT, layer="0"),
        "layer 0 of the contribution table lies outside its base depth 2: measure it with a base depth of at least 3, "
        "or leave its rows out",
    ),
    (
        replace(WEIGHT, ratio=0.09),
        "ratio 0.09 of 2 in the contribution table is none of its 10 input channels: give at least 0.1",
    ),
]


@pytest.mark.parametrize(("row", "message"), CHECK_ERRORS, ids=[message[:50] for _, message in CHECK_ERRORS])
def test_what_does_not_suit_the_network_is_named(row, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as error:
        ContributionTable((replace(BIAS, bias_depth=1), row)).check(CONVOLUTIONS)
    assert "\n" not in str(error.value)


def test_missing_layers_are_named():
    expected = (
        "missing layers: the contribution table has no weight rows of 1, 0: measure them, measure_contributions goes "
        "on where it stopped; or search without them with --allow_missing_layers"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        ContributionTable((BIAS, WEIGHT)).check(CONVOLUTIONS, ["1", "2", "0"])
