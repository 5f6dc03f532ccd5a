"""The memory report: its JSON, its table and picture, and what it says where nothing fits."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from microtune.modules.memory.microcontrollers import microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.memory.training_memory import (
    autograd_bytes_per_sample,
    extra_memory_bytes,
    extra_memory_per_layer,
)
from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes import report_memory

REFERENCE = Path(__file__).parents[3] / "shared/reference/mbv2-w0.35_extra_memory.json"
CLASSIFIER_ONLY = UpdateScheme("any", bias_depth=0)


def operations_at(resolution, width=0.35, **arguments):
    return find_operations(mobilenet_v2(width, num_classes=10, **arguments), (3, resolution, resolution))


def report(command, *words):
    ended = command("report_memory", *words, "--json")
    assert (ended.status, ended.errors) == (0, "")
    return json.loads(ended.output)


def test_json_holds_the_figures_of_the_library(command, scheme_file):
    figures = report(command, "--resolution", 128, "--scheme", scheme_file, "--mcu", "stm32f746")
    operations, scheme = operations_at(128), UpdateScheme.load(scheme_file)
    peak_bytes = PeakMemory(operations).peak_bytes(scheme)
    assert figures["extra_memory_bytes"] == extra_memory_bytes(operations.convolutions, 112, scheme)
    assert figures["peak_memory_bytes"] == peak_bytes
    unordered = PeakMemory(operations, reordering=False).peak_bytes(scheme)
    assert figures["peak_memory_bytes_without_reordering"] == unordered > peak_bytes
    assert figures["autograd_bytes_per_sample"] == autograd_bytes_per_sample(operations, scheme)
    assert figures["fits"] is (peak_bytes <= microcontroller("stm32f746").budget_bytes)
    layers = extra_memory_per_layer(operations.convolutions, scheme)
    assert figures["layers"] == [asdict(layer) | {"total_bytes": layer.total_bytes} for layer in layers]


def test_layers_and_classifier_input_add_up(command, scheme_file):
    figures = report(command, "--resolution", 96, "--scheme", scheme_file, "--mcu", "stm32f746")
    assert len(figures["layers"]) == 51
    assert sum(layer["total_bytes"] for layer in figures["layers"]) + 112 == figures["extra_memory_bytes"]


@pytest.mark.parametrize("label", ["49KB", "99KB", "bias only, all"])
def test_published_figure_to_the_byte(label, command, tmp_path):
    if not REFERENCE.exists():
        pytest.skip(f"the published figures {REFERENCE} are not beside the project")
    (entry,) = (entry for entry in json.loads(REFERENCE.read_text()) if entry["scheme"] == label)
    names = [convolution.name for convolution in operations_at(128).convolutions]
    weights = {names[int(index)]: ratio for index, ratio in entry["weights"].items()}
    UpdateScheme("mobilenet_v2-w0.35", entry["bias_depth"], weights).save(tmp_path / "scheme.json")
    figures = report(command, "--resolution", 128, "--scheme", tmp_path / "scheme.json", "--mcu", "stm32f746")
    published = {"49KB": 51002, "99KB": 101792, "bias only, all": 137440}[label]
    assert figures["extra_memory_bytes"] == entry["extra_memory_bytes"] == published


def test_an_int8_network_says_what_it_is(refused, write_network):
    network = write_network("train_cifar")
    words = ("--scheme", "biases", "--mcu", "rp2040", "--network", network, "--width", 0.5)
    refused(r"says what it is: leave --width and --head_convolution out", "report_memory", *words)


def test_pictures_of_two_searches_are_two(command, scheme_file, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        shutil.copy(scheme_file, tmp_path / name / "scheme.json")
        words = ("--scheme", tmp_path / name / "scheme.json", "--mcu", "stm32f746", "--out_dir", tmp_path / "out")
        assert command("report_memory", *words, "--resolution", 32).status == 0
    assert [path.name.split("_")[-2] for path in sorted((tmp_path / "out").iterdir())] == ["first", "second"]


def test_head_convolution(command):
    words = ("--resolution", 96, "--scheme", "classifier", "--mcu", "stm32h743")
    with_head = report(command, *words, "--head_convolution", "true")
    without = report(command, *words, "--head_convolution", "false")
    assert (len(with_head["layers"]), len(without["layers"])) == (52, 51)
    assert (with_head["extra_memory_bytes"], without["extra_memory_bytes"]) == (1280, 112)


def test_scheme_of_the_network_without_head_is_not_for_the_one_with_it(command, scheme_file):
    ended = command(
        "report_memory", "--scheme", scheme_file, "--mcu", "stm32f746", "--head_convolution", "true", "--json"
    )
    assert (ended.status, ended.output) == (2, "")
    assert "the scheme is for mobilenet_v2-w0.35, but the network is mobilenet_v2-w0.35-head" in ended.errors


def test_table_and_picture(command, scheme_file, tmp_path):
    ended = command(
        "report_memory", "--resolution", 96, "--scheme", scheme_file, "--mcu", "stm32f746", "--out_dir", tmp_path / "o"
    )
    assert ended.status == 0
    figures = report(command, "--resolution", 96, "--scheme", scheme_file, "--mcu", "stm32f746")
    assert f"{figures['extra_memory_bytes'] / 1024:.1f} KiB" in ended.output
    assert f"{figures['peak_memory_bytes'] / 1024:.1f} KiB of 288.0 KiB" in ended.output
    assert "fits" in ended.output
    assert f"{figures['sram_margin_bytes'] / 1024:+.1f} KiB" in ended.output
    assert "features.16.conv.0.0" in ended.output  # a layer of the scheme, with its bytes
    (picture,) = (tmp_path / "o").iterdir()
    assert picture.name == "mobilenet_v2-w0.35_96px_scheme_99kb_stm32f746.png"
    assert ended.output.endswith(f"picture: {picture}\n")
    with Image.open(picture) as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), {}),
        (("--optimizer_state", "adam"), {"optimizer_state": "adam"}),
        (("--gradient_accumulation", "true"), {"gradient_accumulation": True}),
        (("--depthwise_in_place", "false"), {"depthwise_in_place": False}),
    ],
)
def test_where_nothing_fits_the_largest_resolution_is_named(words, options, command):
    figures = report(command, "--resolution", 224, "--scheme", "sub_tensor", "--mcu", "rp2040", *words)
    named = int(figures["advice"].rpartition("--resolution ")[2])
    budget_bytes = microcontroller("rp2040").budget_bytes

    def floor_bytes(resolution):
        return PeakMemory(operations_at(resolution), **options).peak_bytes(CLASSIFIER_ONLY)

    assert not figures["fits"]
    assert figures["classifier_only_peak_bytes"] == floor_bytes(224)
    assert named % 16 == 0
    assert floor_bytes(named) <= budget_bytes < floor_bytes(named + 16)


def test_advice_counts_the_optimizer_state(command):
    """A budget between what the classifier needs at 96 px without and with Adam's state."""
    plain, with_state = (
        PeakMemory(operations_at(96), optimizer_state=state).peak_bytes(CLASSIFIER_ONLY) for state in ("none", "adam")
    )
    words = ("--resolution", 112, "--scheme", "classifier", "--sram_bytes", (plain + with_state) // 2)
    words += ("--reserve_bytes", 0)
    assert report(command, *words)["advice"].endswith("--resolution 96")
    assert report(command, *words, "--optimizer_state", "adam")["advice"].endswith("--resolution 80")


def test_advice_is_printed_too(command, tmp_path):
    ended = command(
        "report_memory", "--resolution", 160, "--scheme", "full", "--mcu", "stm32f411", "--out_dir", tmp_path / "o"
    )
    assert ended.status == 0
    assert "does not fit" in ended.output
    assert "the largest resolution that fits, in steps of 16, is" in " ".join(ended.output.split())


def test_no_resolution_helps(command):
    figures = report(command, "--resolution", 96, "--scheme", "classifier", "--sram_bytes", 10, "--reserve_bytes", 0)
    assert figures["advice"].endswith("no smaller resolution would do: take a narrower network or fewer classes")


def test_described_microcontroller(command):
    words = ("--resolution", 96, "--scheme", "classifier", "--sram_bytes", 200_000)
    figures = report(command, *words)
    assert (figures["mcu"], figures["budget_bytes"]) == ("custom", 200_000 - 32 * 1024)
    assert (figures["flash_margin_bytes"], figures["fits"]) == (None, True)
    figures = report(command, *words, "--reserve_bytes", 70_000, "--flash_bytes", 200_000)
    assert figures["budget_bytes"] == 130_000
    assert figures["flash_margin_bytes"] == 200_000 - figures["flash_bytes"]
    assert not figures["fits"]


def test_overrides_beside_a_named_microcontroller(command):
    words = ("--resolution", 96, "--scheme", "classifier", "--mcu", "stm32f746")
    assert report(command, *words, "--reserve_bytes", 1024)["budget_bytes"] == 319 * 1024
    assert report(command, *words, "--sram_bytes", 250 * 1024)["budget_bytes"] == 218 * 1024
    small_flash = report(command, *words, "--flash_bytes", 1000)
    assert small_flash["sram_margin_bytes"] > 0 > small_flash["flash_margin_bytes"]
    assert not small_flash["fits"]


@pytest.mark.parametrize("rule", ["classifier", "biases", "last_layers", "sub_tensor", "full"])
def test_named_scheme(rule, command):
    figures = report(command, "--resolution", 96, "--scheme", rule, "--mcu", "stm32f746")
    assert figures["fits"] is (rule != "full")
    updated = [layer for layer in figures["layers"] if layer["total_bytes"]]
    with_weights = [layer for layer in figures["layers"] if layer["weight_bytes"]]
    assert bool(updated) is (rule != "classifier")
    assert bool(with_weights) is (rule in ("last_layers", "sub_tensor", "full"))


def test_main_is_a_plain_function(scheme_file, capsys):
    report_memory.main(str(scheme_file), "stm32f746", resolution=96, json=True)
    assert json.loads(capsys.readouterr().out)["mcu"] == "stm32f746"


SPEECH = ("--resolution", 97, "--input_width", 40, "--in_channels", 1)


@pytest.mark.parametrize("scheme", ["classifier", "sub_tensor", "full"])
def test_input_that_is_not_square(scheme, command):
    figures = report(command, *SPEECH, "--scheme", scheme, "--mcu", "stm32f746")
    operations = find_operations(mobilenet_v2(0.35, num_classes=10, in_channels=1), (1, 97, 40))
    peak_memory = PeakMemory(operations)
    assert figures["classifier_only_peak_bytes"] == peak_memory.floor_bytes
    assert figures["layers"][0]["mask_bytes"] == (16 * 49 * 20 / 8 if scheme == "full" else 0)
    if scheme == "full":
        everything = UpdateScheme("any", 51, {convolution.name: 1.0 for convolution in operations.convolutions})
        assert figures["peak_memory_bytes"] == peak_memory.peak_bytes(everything)
        assert figures["autograd_bytes_per_sample"] == autograd_bytes_per_sample(operations, everything)
    else:
        assert figures["fits"]
        assert "advice" not in figures


def test_picture_of_an_input_that_is_not_square(command, tmp_path):
    ended = command(
        "report_memory", *SPEECH, "--scheme", "sub_tensor", "--mcu", "stm32f746", "--out_dir", tmp_path / "o"
    )
    assert ended.status == 0
    (picture,) = (tmp_path / "o").iterdir()
    assert picture.name == "mobilenet_v2-w0.35_97x40_sub_tensor_stm32f746.png"


def test_input_width_that_makes_a_square_changes_nothing(command):
    words = ("--scheme", "sub_tensor", "--mcu", "stm32f746", "--resolution", 64)
    assert report(command, *words, "--input_width", 64) == report(command, *words)


def test_advice_for_an_input_that_is_not_square(command):
    words = ("--scheme", "classifier", "--sram_bytes", 1000, "--reserve_bytes", 0)
    figures = report(command, *SPEECH, *words)
    kib = figures["classifier_only_peak_bytes"] / 1024
    expected = f"even the classifier alone needs {kib:.1f} KiB at 97 x 40: take a smaller input or a narrower network"
    assert figures["advice"] == expected
