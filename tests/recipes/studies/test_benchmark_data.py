"""The benchmark of the loaders: what it reports. Rates are not tested, for they depend on the machine."""

import json

import pytest

SMALL = ("--batch_size", 8, "--num_workers", 0, "--resolution", 32, "--batches", 1, "--rounds", 1)
KEYS = {
    *("input_shape", "num_workers", "setup_seconds", "loader_samples_per_second"),
    *("front_end_samples_per_second", "step_samples_per_second", "loader_over_step"),
}
SHAPES = {
    "digits": [1, 32, 32],
    "cifar": [3, 32, 32],
    "image_folder": [3, 32, 32],
    "imagenet": [3, 32, 32],
    "speech_commands": [1, 97, 40],
    "mswc": [1, 97, 40],
}


@pytest.fixture
def folders(tiny_cifar, tiny_images, tiny_imagenet, tiny_speech_commands, tiny_mswc):
    """All data sets, as words of the command line."""
    return {
        "cifar": tiny_cifar,
        "image_folder": tiny_images,
        "imagenet": tiny_imagenet,
        "speech_commands": tiny_speech_commands,
        "mswc": tiny_mswc,
    }


@pytest.fixture
def all_sets(folders, tiny_speech_commands):
    return [word for name, folder in folders.items() for word in (f"--{name}", folder)]


def test_json_is_one_object_and_nothing_else(command, all_sets):
    ended = command("benchmark_data", *all_sets, *SMALL, "--json")
    assert ended.status == 0
    report = json.loads(ended.output)
    assert report.keys() == {"threads", "batch_size", "data"}
    assert report["batch_size"] == 8
    assert {name: row["input_shape"] for name, row in report["data"].items()} == SHAPES
    for name, row in report["data"].items():
        assert row.keys() == KEYS
        assert row["num_workers"] == 0
        assert row["setup_seconds"] >= 0
        assert row["loader_samples_per_second"] > 0
        assert row["step_samples_per_second"] > 0
        assert row["loader_over_step"] == row["loader_samples_per_second"] / row["step_samples_per_second"]
        if name in ("speech_commands", "mswc"):
            assert row["front_end_samples_per_second"] > 0
        else:
            assert row["front_end_samples_per_second"] is None


def test_only_the_given_sets_and_the_digits(command, tiny_mswc):
    ended = command("benchmark_data", "--mswc", tiny_mswc, "--languages", "en,ar", *SMALL, "--json")
    assert (ended.status, ended.errors) == (0, "")
    assert list(json.loads(ended.output)["data"]) == ["digits", "mswc"]


def test_table_has_a_row_per_set(command, tiny_cifar, tiny_images):
    few = (*SMALL, "--num_workers", 1)
    ended = command("benchmark_data", "--cifar", tiny_cifar, "--image_folder", tiny_images, *few)
    assert ended.status == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ended.output.splitlines() if "│" in line]
    assert [row[:3] for row in rows] == [
        ["digits", "1 x 32 x 32", "0"],
        ["cifar", "3 x 32 x 32", "0"],
        ["image_folder", "3 x 32 x 32", "1"],
    ]
    assert {row[-1] for row in rows} <= {"step", "loader"}
    assert all((float(row[-2]) >= 1) is (row[-1] == "step") for row in rows if row[-2] != "1.00")
    assert "batch size 8" in ended.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rounds", 0), "rounds is 0: give 1 or more"),
        (("--batches", 0), "batches is 0: give 1 or more"),
        (("--batch_size", 0), "batch_size 0 is not positive"),
        (("--batch_size", 2000), "an epoch has 1 batches, too few to measure: give a smaller --batch_size"),
        (("--cifar", "nowhere"), "nowhere/cifar-10-batches-py does not exist"),
        (("--image_folder", "nowhere"), "nowhere is not a folder"),
        (("--imagenet", "nowhere"), "nowhere has neither val/ nor ILSVRC2012_img_val.tar"),
        (("--speech_commands", "nowhere"), "nowhere/SpeechCommands/speech_commands_v0.02 does not exist"),
        (("--mswc", "nowhere"), "nowhere/en does not exist"),
        (("--scheme", "smallest"), "smallest: cannot read the update scheme"),
    ],
)
def test_mistake_is_one_line(words, message, command, monkeypatch, tmp_path):
    """Also without --json: rich's progress bar prints an empty line to a standard error that is no terminal."""
    monkeypatch.chdir(tmp_path)
    ended = command("benchmark_data", *SMALL, *words)
    assert (ended.status, ended.output) == (2, "")
    assert ended.errors.startswith("benchmark_data.py: error: ")
    assert message in ended.errors
    assert ended.errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_negative_number_of_workers(command, tiny_images):
    ended = command("benchmark_data", "--image_folder", tiny_images, *SMALL, "--num_workers", -1, "--json")
    assert (ended.status, ended.output) == (2, "")
    assert "num_workers is -1: give 0 or more" in ended.errors
