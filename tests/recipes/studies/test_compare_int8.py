"""The comparison of ways to train an int8 network: rows by name, equal terms, resumed to the bit, clear errors."""

import csv
import dataclasses
import json
import re
import shutil

import pytest
import torch
from PIL import Image

from microtune.modules.int8.files import write_quantized_network
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.studies import compare_int8
from microtune.recipes.studies.compare_int8 import described_row, described_rows, short_name

RECIPE = "compare_int8"
ROWS = "float:full,in_place:scheme.json,unscaled:classifier:32"
NAMES = ["float, full", "in_place, scheme", "unscaled, classifier, batch 32"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def here(here, small_graph, small_tensors):
    """An own current folder that holds a small int8 network for digits, a scheme for it, and other weights."""
    first = dataclasses.replace(small_graph.first_conv, in_channels=1)
    changes = {"input_shape": (1, 32, 32), "normalization": ((0.5,), (0.5,)), "first_conv": first}
    weight = {"first_conv.weight": small_tensors["first_conv.weight"][:, :1].contiguous()}
    graph = dataclasses.replace(small_graph, **changes)
    write_quantized_network(here / "network.safetensors", graph, small_tensors | weight)
    UpdateScheme("small-int8", 3, {"blocks.2.pointwise1": 0.5}).save(here / "scheme.json")
    torch.save(mobilenet_v2(0.1, num_classes=2, in_channels=1).state_dict(), here / "weights.pth")
    return here


@pytest.fixture
def arguments():
    """Of a comparison of some seconds."""
    return {
        "data": "digits", "data_options": '{"classes": [0, 1]}', "rows": ROWS, "network": "network.safetensors",
        "weights": "weights.pth", "width": 0.1, "resolution": 32, "epochs": 1, "batch_size": 64, "seeds": 1,
        "logger": "none", "out_dir": "out",
    }  # fmt: skip


@pytest.fixture
def words(arguments, as_words):
    """The same as words of the command line."""
    return as_words(arguments)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def values_of(folder):
    """The rows of ``results.csv`` without the seconds that they took."""
    return [{**row, "seconds": None} for row in read(folder / "results.csv")]


# ---- rows


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("latent:full", ("latent", "full", 64)),
        ("in_place:scheme.json:1", ("in_place", "scheme.json", 1)),
        ("float:classifier:8", ("float", "classifier", 8)),
        ("unscaled:full", ("unscaled", "full", 64)),
        ("in_place_unscaled:with:colon.json", ("in_place_unscaled", "with:colon.json", 64)),
        ("in_place_unscaled:with:colon.json:2", ("in_place_unscaled", "with:colon.json", 2)),
    ],
)
def test_row(row, expected, here):
    (here / "with:colon.json").touch()
    assert described_row(row, 64) == expected


def test_names_of_rows(here):
    """The batch size that all have is not named."""
    found = described_rows("float:full:2, latent:scheme.json,latent:scheme.json:1", 2)
    assert found == {
        "float, full": ("float", "full", 2),
        "latent, scheme": ("latent", "scheme.json", 2),
        "latent, scheme, batch 1": ("latent", "scheme.json", 1),
    }


# ---- what it writes


def test_comparison(command, words, here):
    ended = command(RECIPE, *words)
    assert ended.status == 0, ended.errors
    out = here / "out"
    assert {path.name for path in out.iterdir()} - {".claims"} == {
        *("config.yaml", "results.csv", "report.json", "comparison.png", "runs")
    }
    assert {path.name for path in (out / "runs").iterdir()} == {
        *("float-full-seed0", "in_place-scheme-seed0", "unscaled-classifier-batch32-seed0")
    }
    rows = read(out / "results.csv")
    assert [row["scheme"] for row in rows] == NAMES
    reports = [json.loads(path.read_text()) for path in sorted(out.glob("runs/*/report.json"))]
    for row, report in zip(rows, reports, strict=True):
        assert (float(row["top1"]), float(row["val_top1"])) == (report["top1"], report["val_top1"])
        assert float(row["memory_bytes"]) == report["peak_memory_bytes"]
    assert "gradient_scaling" not in reports[0]
    assert [(one["gradient_scaling"], one["weight_storage"]) for one in reports[1:]] == [
        (True, "in_place"), (False, "latent"),
    ]  # fmt: skip
    assert [one["batch_size"] for one in reports] == [64, 64, 32]
    assert [UpdateScheme.load(path).network for path in sorted(out.glob("runs/*/scheme.json"))] == [
        *("mobilenet_v2-w0.1", "small-int8", "small-int8")
    ]
    report = json.loads((out / "report.json").read_text())
    assert [entry["scheme"] for entry in report["schemes"]] == NAMES
    assert report["schemes"][1]["difference"] == pytest.approx(float(rows[0]["top1"]) - float(rows[1]["top1"]))
    assert report["missing"] == []
    with Image.open(out / "comparison.png") as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)
    assert re.search(r"│ in_place, scheme +│", ended.output)
    assert ended.output.splitlines()[-1].startswith("results: out/results.csv, report: out/report.json, ")


def test_stopped_and_begun_again(command, words, interrupt, here):
    """One row was killed before its report was written, and one in its first steps."""
    # absolute paths: the interruption brings back the folder that was current before
    words = [*words, "--rows", f"latent:full,in_place:{here}/scheme.json", "--network", here / "network.safetensors"]
    words += ["--out_dir", here / "out"]
    assert command(RECIPE, *words).status == 0
    whole, again = here / "whole", here / "out"
    shutil.copytree(again, whole)
    (again / "runs/latent-full-seed0/report.json").unlink()
    shutil.rmtree(again / "runs/in_place-scheme-seed0")
    (again / "report.json").unlink()
    interrupt(epoch=0)
    with pytest.raises(RuntimeError, match="interrupted by the test"):
        command(RECIPE, *words)
    assert not (again / "report.json").exists()
    known = (again / "runs/latent-full-seed0/report.json").read_bytes()
    assert command(RECIPE, *words).status == 0
    assert values_of(again) == values_of(whole)
    assert (again / "runs/latent-full-seed0/report.json").read_bytes() == known
    for name in ("latent-full-seed0", "in_place-scheme-seed0"):
        networks = [(folder / "runs" / name / "network.safetensors").read_bytes() for folder in (whole, again)]
        assert networks[0] == networks[1]
    changed = command(RECIPE, *words, "--epochs", 2)
    assert changed.status == 2
    assert f"the work in {again} was begun with epochs 1, not 2: go on with --config {again}/config" in changed.errors


# ---- on equal terms


@pytest.mark.parametrize(("rate", "expected"), [(None, 0.1 / 256), (0.32, 0.005)])
def test_terms_are_equal(rate, expected, arguments, pretended, here):
    """Rows differ in the way, the scheme and the batch size, the learning rate being in proportion to it."""
    rows = ",".join(f"{way}:scheme.json" for way in compare_int8.WAYS) + ",in_place:scheme.json:1"
    changes = {
        "rows": rows,
        "learning_rate": rate,
        "seeds": 2,
        "weights": "bright.npz",
        "width": 0.5,
        "data_options": None,
    }
    compare_int8.main(**arguments | changes | {"out_dir": here / "out"})
    ways = [*compare_int8.WAYS, "in_place"]
    assert [call["seed"] for call in pretended.all] == [0] * 6 + [1] * 6
    for call, way in zip(pretended.all, ways * 2, strict=True):
        name = call["out_dir"].name
        batch_size = 1 if "batch1" in name else 64
        assert name == f"{way}-scheme{'-batch1' * (batch_size == 1)}-seed{call['seed']}"
        assert call["batch_size"] == call["data"].batch_size == batch_size
        assert call["learning_rate"] == pytest.approx(expected * batch_size)
        assert (call["scheme"], call["epochs"], call["mcu"]) == ("scheme.json", 1, "stm32f746")
        if way == "float":
            assert (call["weights"], call["width"], call.get("network")) == ("bright.npz", 0.5, None)
        else:
            assert (call["weights"], call.get("width"), call["network"]) == ("none", None, "network.safetensors")
    told = [(call.get("weight_storage"), call.get("gradient_scaling", True)) for call in pretended.all[:6]]
    assert told == [
        (None, True), ("latent", True), ("in_place", True), ("latent", False), ("in_place", False), ("in_place", True),
    ]  # fmt: skip


def test_failed_trainings_are_missing(command, words, pretended, caplog, here):
    def diverges(folder):
        if folder == "unscaled-scheme-seed1":
            raise UserError("training diverged at learning rate 0.1: start anew")
        return 0.5

    pretended.of = diverges
    ended = command(RECIPE, *words, "--rows", "latent:scheme.json,unscaled:scheme.json", "--seeds", 2)
    assert ended.status == 0, ended.errors
    report = json.loads((here / "out/report.json").read_text())
    assert report["missing"] == ["unscaled, scheme, seed 1"]
    assert "missing: unscaled, scheme, seed 1; the same command tries again\n" in ended.output
    assert "unscaled, scheme, seed 1: training diverged at learning rate 0.1: start anew" in caplog.messages
    assert report["schemes"][1]["top1"] == {"0": 0.5}


def test_where_nothing_comes_out_that_is_an_error(command, words, pretended, here):
    def diverges(folder):
        raise UserError("training diverged: start anew")

    pretended.of = diverges
    ended = command(RECIPE, *words, "--rows", "latent:scheme.json")
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors.endswith(f"{RECIPE}.py: error: latent, scheme, seed 0: training diverged: start anew\n")


# ---- wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--rows", "best:full"], "row 'best:full' is none: give WAY:SCHEME or WAY:SCHEME:BATCH_SIZE, where WAY is"),
        (["--rows", "float:full,latent"], "row 'latent' is none: give WAY:SCHEME"),
        (["--rows", "latent:"], "row 'latent:' is none: give WAY:SCHEME"),
        (["--rows", "latent::8"], "row 'latent::8' is none: give WAY:SCHEME"),
        (["--rows", "latent:full:0"], "row 'latent:full:0' is none: give WAY:SCHEME"),
        (["--rows", "latent:full:-1"], "row 'latent:full:-1' has no scheme"),
        (["--rows", "latent:best"], "row 'latent:best' has no scheme: give a JSON file, classifier or full"),
        (["--rows", "float:none"], "row 'float:none' has no scheme: give a JSON file, classifier or full"),
        (["--rows", "latent:biases"], "row 'latent:biases': biases is what fits, and copies .* give a scheme's JSON"),
        (["--rows", "latent:nowhere.json"], r"row 'latent:nowhere\.json' has no scheme: give a JSON file"),
        (["--rows", "latent:full,latent:full"], "two rows have the name 'latent, full': leave one out, or give its"),
        (["--rows", "latent:full,latent:full:64"], "two rows have the name 'latent, full'"),
        (["--rows", "latent:scheme.json,latent:./scheme.json"], "two rows have the name 'latent, scheme'"),
        (["--rows", ","], "there is nothing to compare: give --rows such as float:full,in_place:full"),
        (["--network", "mobilenet_v2"], r"network is 'mobilenet_v2': give the \.safetensors file of an int8 network"),
        (["--weights", "network.safetensors"], "is a whole int8 network: give it as --network"),
        (
            ["--weights", "none"],
            "a row trains in floating point: give what the int8 network was made of with --weights",
        ),
        (["--seeds", "0"], "seeds is 0: give 1 or more"),
        (["--epochs", "0"], "epochs is 0: give 1 or more"),
        (["--processes", "0"], "processes is 0: give 1 or more"),
        (["--batch_size", "0"], "batch_size is 0: give 1 or more"),
    ],
)
def test_wrong_input(changes, message, refused, words, here):
    refused(message, RECIPE, *words, *changes)


def test_network_that_is_not_there(command, words, here):
    """It is found by the first training, so that the folder is there by then."""
    ended = command(RECIPE, *words, "--network", "nowhere.safetensors", "--rows", "latent:full")
    assert ended.status == 2
    assert "nowhere.safetensors: there is no such file: make one with" in ended.errors.splitlines()[-1]


def test_rows_leave_out_the_network_that_all_are_for(tmp_path):
    UpdateScheme("some_net-w0.35", bias_depth=2).save(tmp_path / "some_net-w0.35_small.json")
    UpdateScheme("some_net-w0.35", bias_depth=2).save(tmp_path / "other.json")
    assert short_name(str(tmp_path / "some_net-w0.35_small.json")) == "small"
    assert short_name(str(tmp_path / "other.json")) == "other"
    assert short_name("full") == "full"
